"""Lossless self-speculative decoding: one forward pass of the target per cycle, whose law is left
as it is.

The cycle: the token y that the last call ended with is known; the head drafts the n - 1 tokens
after it from ``Q(x_2:n | y)``; one forward pass of the target over ``[y, x_2, …, x_n]`` gives its
laws after each of them; verification accepts a beginning of the draft and draws one more token,
which is the next cycle's y.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.acceptance.verification import VERIFIED, check_rule
from cpmtp.decoding.audit import Audit, finished
from cpmtp.decoding.endings import Endings
from cpmtp.decoding.judging import judge
from cpmtp.decoding.prompt_lookup import PromptLookup
from cpmtp.decoding.stats import GenerationStats, Progress, Recorder
from cpmtp.decoding.trials import CALLS, PREFIXES, open_target
from cpmtp.drafts.blocks import Block, CPBlock, Drafted
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.drafting import Drafter, drafter
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.language_model import LanguageModel
from cpmtp.sampling_law import SamplingLaw

_RULES = (*VERIFIED, "greedy")
# A draft for models without hidden states: the text so far, its last token being x_1, to the law of
# x_2 … x_n.
ContextDraft = Callable[[Tensor], CPDistribution]


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes
    ----------
    token_ids : (time,) long tensor, or a list of them for a batch
        The new tokens, up to and with the end-of-text token.
    prompts : list of (time,) long tensors
    stats : GenerationStats
    """

    token_ids: Tensor | list[Tensor]
    prompts: list[Tensor]
    stats: GenerationStats

    def __repr__(self) -> str:
        rows = f"{len(self.prompts)} texts" if isinstance(self.token_ids, list) else "1 text"
        return f"Generation({rows}, {self.stats!r})"

    @property
    def sequences(self) -> list[Tensor]:
        """Prompts and new tokens together."""
        new = self.token_ids if isinstance(self.token_ids, list) else [self.token_ids]
        # (time,) each
        return [torch.cat([prompt, more]) for prompt, more in zip(self.prompts, new, strict=True)]


@takes_what_is_given
def speculative_generate(
    lm: Any,
    draft: Any,
    token_ids: Any,
    *,
    max_new_tokens: int = 200,
    rule: str = "block",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: Any = None,
    stop_strings: Any = (),
    callback: Callable[[int, Tensor], bool | None] | None = None,
    monitor: str | Path | None = None,
    watch: Callable[[Progress], None] | None = None,
    audit: bool = False,
) -> Generation:
    """Generate text whose law is the target's own, several tokens per forward pass.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel or LanguageModel
        The target.
    draft : DraftHead, PromptLookup, callable or None
        A head of this target; or what looks drafts up in the text; or, for any target, a function
        of the text so far (time,), the known token being its last, to the CP distribution of the
        tokens after it. None: plain decoding,
        one token per call, through the same loop.
    token_ids : (time,) long tensor, list, array or text, or several
        A prompt of at least one token, or a batch of prompts, whose lengths may differ.
    max_new_tokens : int
        Per row.
    rule : {"block", "token", "greedy"}
        ``greedy`` needs ``temperature=0``.
    temperature, top_k, top_p
        The target's law; the draft's next-token laws are put through the same.
    eos_token_id : int, several, or "model", optional
        A row ends with it; default: none. ``"model"``: those that the model's own files name.
    stop_strings : str or sequence of str
        A row ends with the token that completes one of them.
    callback : callable, optional
        Called with (row, new tokens) before a block is released; returning False withholds it and
        ends the row.
    monitor : path, optional
        A file to which every cycle appends a line of JSON.
    watch : callable, optional
        Called after every cycle with how far the run is: tokens, tokens per call, seconds by stage.
    audit : bool
        Hold the distributions that tokens were drawn from against full forward passes, every 64
        tokens; what was found is in ``stats.audit`` and ``stats.audit_findings``.

    Raises
    ------
    ValueError
        If a prompt is empty or runs past the model's window, a name is unknown, ``greedy`` comes
        with a temperature above 0, an end of text is no token or string of the model's, or the head
        belongs to another model.

    References
    ----------
    leviathan2023fast, sun2024block, stern2018blockwise

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.drafts.cp_distribution import CPDistribution
    >>> uniform = CPDistribution(torch.ones(1), [torch.full((4, 1), 0.25)] * 2)
    >>> lm, prompt = separated_hmm(2, 4), torch.tensor([0])
    >>> out = speculative_generate(lm, lambda text: uniform, prompt, max_new_tokens=5)
    >>> len(out.token_ids), 1 <= out.stats.tokens_per_call <= 3
    (5, True)
    """
    law = SamplingLaw(temperature, top_k, top_p)
    single = isinstance(token_ids, Tensor) and token_ids.ndim == 1
    prompts: list[Tensor] = (
        [token_ids] if isinstance(token_ids, Tensor) and single else list(token_ids)
    )
    _check(lm, prompts, rule, law, max_new_tokens)
    if isinstance(draft, DraftHead):
        draft.attach(lm)
    elif not (draft is None or isinstance(draft, PromptLookup)) and (
        isinstance(draft, LanguageModel) or not callable(draft)
    ):
        raise ValueError(
            f"a {type(draft).__name__} as draft: expected a head, or a function from the text so "
            "far to the distribution of the tokens after its last one"
        )
    endings = Endings.of(lm, eos_token_id, stop_strings, callback)
    plan = _Plan(law, "token" if rule == "greedy" else rule, seed, max_new_tokens, endings)
    started = time.perf_counter()
    with torch.inference_mode():
        run = _Run(lm, draft, prompts, plan, audit=audit)
        run.recorder.monitor, run.recorder.watch = Path(monitor) if monitor else None, watch
        run.read_prompts()
        while run.running:
            run.cycle()
        new = [torch.tensor(row, dtype=torch.long) for row in run.new]
        findings = finished(run.audit, run.texts())
    seconds = time.perf_counter() - started - (findings.seconds if findings else 0.0)
    stats = run.recorder.finish(seconds, sum(map(len, new)), run.way, findings)
    return Generation(new[0] if single else new, list(prompts), stats)


@dataclass(frozen=True)
class _Plan:
    """What stays the same from cycle to cycle."""

    law: SamplingLaw
    rule: str
    seed: int
    limit: int
    endings: Endings


class _Run:
    """The state of the loop: what each row has, knows and is waiting for."""

    def __init__(
        self,
        lm: Any,
        draft: DraftHead | PromptLookup | ContextDraft | None,
        prompts: list[Tensor],
        plan: _Plan,
        *,
        audit: bool,
    ):
        self.draft, self.plan, self.prompts = draft, plan, prompts
        longest = max(map(len, prompts)) + plan.limit
        heads = isinstance(draft, DraftHead)
        followed = open_target(lm, rows=len(prompts), longest=longest, hidden=heads)
        self.target, self.way = followed.target, followed.way
        self.window = getattr(lm, "max_context", None)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.known = torch.empty(0)
        self.hidden: Tensor | None = None
        self.ready: Drafter | None = None
        self.new: list[list[int]] = [[] for _ in prompts]
        self.running = set(range(len(prompts))) if plan.limit else set()
        horizon = draft.horizon if isinstance(draft, DraftHead | PromptLookup) else 1
        self.recorder = Recorder(len(prompts), horizon)
        by_prefix = self.way in (PREFIXES, CALLS)
        self.audit = Audit(lm, plan.law, len(prompts), by_prefix=by_prefix) if audit else None

    def texts(self) -> list[Tensor]:
        """Prompts and new tokens of all rows."""
        rows = zip(self.prompts, self.new, strict=True)
        # (time,) each
        return [torch.cat([prompt, torch.tensor(new, dtype=torch.long)]) for prompt, new in rows]

    def read_prompts(self) -> None:
        """The first call: what follows the prompts."""
        if not self.running:
            self.recorder.calls = 0
            return
        scores, self.hidden = self.target.begin(self.prompts)
        nothing = Drafted.empty(len(scores), scores.device)
        uniform = self._uniform(len(scores), 1).expand(-1, 2)  # (batch, 2)
        _, self.known = judge(scores[:, None], nothing, self.plan.law, self.plan.rule, uniform)
        first = {row: [int(self.known[row])] for row in sorted(self.running)}
        self._release(first, scores[:, None])  # (batch, 1, vocab)

    def cycle(self) -> None:
        begun = self._now()
        longest = min(
            max(self.plan.limit - len(self.new[row]) for row in self.running) - 1, self._room()
        )
        block = self._block(longest)
        length = block.length if block else 0
        uniform = self._uniform(len(self.known), length + 3)
        path = block.sample(self.plan.law, uniform) if block else self._no_draft()
        drafted = self._now()
        tokens = torch.cat([self.known[:, None], path.tokens], 1)  # (batch, length + 1)
        scores, hidden = self.target.extend(tokens, self.running)
        judged = self._now()
        numbers = uniform[:, length + 1 :]  # (batch, 2)
        accepted, following = judge(scores, path, self.plan.law, self.plan.rule, numbers)
        counts, drawn, ends = accepted.tolist(), path.tokens.tolist(), following.tolist()
        verified = self._now()
        if hidden is not None:
            self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), accepted]
        self.known = following
        # A row that has ended is carried along where it ended.
        self.target.keep(
            torch.tensor(
                [count + 1 if row in self.running else 0 for row, count in enumerate(counts)]
            )
        )
        rows = sorted(self.running)
        # What goes beyond a row's last wanted token is not emitted: the row's draft might as well
        # have been shorter.
        emitted = {row: min(counts[row], self.plan.limit - len(self.new[row]) - 1) for row in rows}
        blocks = {row: [*drawn[row][: counts[row]], ends[row]] for row in rows}
        self._release(blocks, scores)
        stages = {
            "draft": drafted - begun,
            "target": judged - drafted,
            "verification": verified - judged,
        }
        stages["rest"] = time.perf_counter() - verified
        self.recorder.horizon = max(self.recorder.horizon, length + 1)
        self.recorder.cycle(emitted, stages)

    def _no_draft(self) -> Drafted:
        return Drafted.empty(len(self.known), self.known.device)

    def _block(self, longest: int) -> Block | None:
        """What is drafted after the known tokens: at most `longest` of them."""
        if self.draft is None or longest < 1:
            return None
        if isinstance(self.draft, DraftHead):
            assert self.hidden is not None  # a head without hidden states is refused
            if self.ready is None:
                self.ready = drafter(self.draft, self.hidden.dtype)
            return self.ready.block(self.hidden, self.known).first(longest)
        if isinstance(self.draft, PromptLookup):
            return self.draft.block(self.texts()).first(longest)
        return CPBlock.of_distributions([self.draft(text) for text in self.texts()]).first(longest)

    def _uniform(self, *shape: int) -> Tensor:
        """From the generator on the CPU, so that a seed means the same on every device."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).to(
            self.target.device
        )

    def _now(self) -> float:
        """The clock, after what a device has been given is done: a stage's time is its own."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    def _room(self) -> int:
        """Drafted tokens for which the model still has positions, after the known one."""
        if self.window is None:
            return self.plan.limit
        return self.window - max(
            len(self.prompts[row]) + len(self.new[row]) for row in self.running
        )

    def _release(
        self, blocks: dict[int, list[int]], scores: Float[Tensor, "batch positions vocab"]
    ) -> None:
        """Hand out what rows have got, whose tokens were drawn from these scores."""
        for row, block in blocks.items():
            wanted = block[: self.plan.limit - len(self.new[row])]
            block, ended = self.plan.endings.cut(self.new[row], wanted)
            callback = self.plan.endings.callback
            if callback and callback(row, torch.tensor(block)) is False:
                self.running.discard(row)
                continue
            self.new[row] += block
            if self.audit is not None:
                self.audit.note(row, scores[row, : len(block)])
                text = [self.prompts[row], torch.tensor(self.new[row], dtype=torch.long)]
                self.audit.hold(row, torch.cat(text), at_end=False)  # (time,)
            if ended or len(self.new[row]) >= self.plan.limit:
                self.running.discard(row)


def _check(lm, prompts: list[Tensor], rule: str, law: SamplingLaw, max_new_tokens: int) -> None:
    check_rule(rule, _RULES, temperature=law.temperature)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 0")
    if not prompts or any(p.ndim != 1 or not len(p) for p in prompts):
        raise ValueError(
            "an empty prompt: give at least one token (the start-of-text token, if nothing else)"
        )
    for prompt in prompts:
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < lm.vocab_size:
            raise ValueError(
                f"prompt tokens must be in [0, {lm.vocab_size}): got {int(prompt.min())} to "
                f"{int(prompt.max())}"
            )
    window = getattr(lm, "max_context", None)
    longest = max(len(p) for p in prompts)
    if window is not None and longest + max_new_tokens > window:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones run past the model's "
            f"{window} positions: "
            f"shorten the prompt or ask for at most {max(window - longest, 0)}"
        )
