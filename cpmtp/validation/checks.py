"""What is checked beside decoding: the law of the output, estimates against exact joints, the
head's share by model size.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from scipy.stats import chi2

from cpmtp.acceptance.implied import acceptance_profiles
from cpmtp.acceptance.sampled import estimate_acceptance
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.evaluation import head_draft
from cpmtp.joint_distribution import exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.new_models import new_llama
from cpmtp.validation.measurements import peak_memory
from cpmtp.validation.presets import BasePlan
from cpmtp.validation.stages import Workplace

_WIDE_VOCABULARY = 4096
_LAW_HORIZON = 3
_TIMED_TOKENS = 48


def check_law(place: Workplace, plan: BasePlan, seed: int) -> list[dict]:
    """p-values of the first three tokens out of decoding with each head of the largest horizon,
    against their exact joint.
    """
    lm, preset = place.load(plan), place.preset
    prompt = place.text(plan, "held_out")[seed % preset.prompts]
    joint = exact_joint(lm, prompt, _LAW_HORIZON).probs.cpu()
    rows: list[dict] = []
    # More tokens are drafted than are looked at, so that every draft has its full length.
    count = _LAW_HORIZON + max(preset.horizons)
    for name, head in place.heads(plan, lm):
        for rule in ("token", "block") if head.horizon == max(preset.horizons) else ():
            own_seed = 1000 * seed + len(rows)
            out = speculative_generate(
                lm, head, [prompt] * preset.law_rows, max_new_tokens=count, rule=rule, seed=own_seed
            )
            p_value = law_p_value(torch.stack([new[:_LAW_HORIZON] for new in out.token_ids]), joint)
            rows.append(
                {"base": plan.name, "head": name, "rule": rule, "seed": seed, "p_value": p_value}
            )
    return rows


def law_p_value(tokens: torch.Tensor, joint: torch.Tensor) -> float:
    """p-value of the likelihood-ratio test (G-test) of texts (count, n) against a joint; 0 where
    one is impossible.

    Texts expected fewer than five times are pooled into one cell.
    """
    expected = joint.flatten() * len(tokens)
    shape = torch.tensor([joint.shape[0] ** k for k in range(joint.ndim - 1, -1, -1)])
    seen = Counter((tokens * shape).sum(1).tolist())
    if any(float(expected[cell]) == 0 for cell in seen):
        return 0.0
    large = torch.nonzero(expected >= 5).flatten().tolist()
    cells = [(seen[cell], float(expected[cell])) for cell in large]
    cells.append((len(tokens) - sum(c for c, _ in cells), len(tokens) - sum(e for _, e in cells)))
    statistic = 2 * sum(count * math.log(count / mean) for count, mean in cells if count)
    return float(chi2.sf(statistic, max(len(cells) - 1, 1)))


def check_estimates(place: Workplace, plan: BasePlan, context: int) -> list[dict]:
    """Tokens per call after one context: exact, from the dense joint of three tokens, beside the
    Monte Carlo estimate.
    """
    lm = place.load(plan)
    prompt = place.text(plan, "held_out")[context]
    joint = exact_joint(lm, prompt, _LAW_HORIZON)
    rows = []
    for name, head in place.heads(plan, lm):
        draft = head_draft(lm, head, prompt, horizon=_LAW_HORIZON)
        exact = float(acceptance_profiles(joint, draft, ("block",))["block"].survival.sum())
        found = estimate_acceptance(lm, draft, prompt, samples=400, seed=context)
        low, high = found.tokens_per_call_interval
        estimate = {"estimate": found.tokens_per_call, "estimate_low": low, "estimate_high": high}
        rows.append(
            {"base": plan.name, "head": name, "context": context, "exact": exact} | estimate
        )
    return rows


def time_width(place: Workplace, width: int) -> list[dict]:
    """The stages of a cycle over a base model of random weights, by its width, with a head of the
    largest horizon and rank.
    """
    preset = place.preset
    model = new_llama(_WIDE_VOCABULARY, width=width, layers=preset.width_layers, window=256, seed=0)
    lm = HuggingFaceLanguageModel(model.to(preset.device, getattr(torch, preset.dtype)))
    head = DraftHead(
        hidden_size=width,
        vocab_size=_WIDE_VOCABULARY,
        horizon=max(preset.horizons),
        rank=max(preset.ranks),
        anchored=True,
        width=preset.head_width,
        blocks=preset.head_blocks,
    )
    head = head.to(lm.device).attach(lm).requires_grad_(False)
    prompt = torch.arange(preset.prompt)
    speculative_generate(lm, head, prompt, max_new_tokens=8)
    peak_memory(lm.device)
    stats = speculative_generate(lm, head, prompt, max_new_tokens=_TIMED_TOKENS, seed=1).stats
    row = {
        "width": width,
        "parameters": sum(w.numel() for w in model.parameters()),
        "peak_bytes": peak_memory(lm.device),
    }
    share = 1 - stats.stage_seconds["target"] / sum(stats.stage_seconds.values())
    return [row | stats.cycle_seconds | {"draft_and_verification_share": share}]
