"""What no training can buy at a real vocabulary: left and right factors from text, what a head can
output, longer blocks. Goes on where it was stopped.

Run from the checkout: python data/studies/real_bounds.py OUT MODEL STAGE [STAGE …]

MODEL is a folder of a causal language model (the figures of the pages are of
SmolLM2-135M-Instruct).

neighbours  at text positions: the four likeliest next tokens, and what follows each of them
factors     left and right factors from more and more of these positions, of several ranks
population  three tokens under top-k 50 on held-out texts: every form with these factors
amount      chains with factors of few and of many positions and of each rank, and logits that the
            unembedding can make, on the first of these contexts
horizons    anchored fits under top-k 4, 3 to 8 tokens
others      a population fit of 48 contexts, judged on 16 others
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cpmtp.corpora import split_held_out, standard_library_documents
from cpmtp.training.heads import windows_of_text
from cpmtp.whole_files import write_tensors

DOMAINS = ("code", "prose")
# Windows of text, tokens that are tried after each position, and tokens kept after each of these.
LENGTH, BEFORE, AFTER = 128, 4, 16
WINDOWS, AT_ONCE = 416, 26


def documents(domain: str, held_out: bool) -> list:
    """Of one kind of text."""
    return list(split_held_out(standard_library_documents(domain), 0.05)[held_out])


def windows(lm) -> Iterator[Tensor]:
    """Text of both kinds in turn, (AT_ONCE, LENGTH) at a time."""
    found = []
    for place, domain in enumerate(DOMAINS):
        rows = windows_of_text(lm, [one.text for one in documents(domain, False)], LENGTH)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(place))
        found.append(rows[order[: WINDOWS // len(DOMAINS)]])
    yield from torch.stack(found, 1).flatten(0, 1).split(AT_ONCE)  # (windows, LENGTH)


@torch.inference_mode()
def after_window(lm, window: Tensor) -> dict[str, Tensor]:
    """For every position: its likeliest next tokens, and the likeliest after each of these."""
    logits, cache = lm.step(window[None])
    before = logits[0].float().log_softmax(-1).topk(BEFORE)  # (positions, BEFORE)
    positions = torch.arange(len(window))
    owner = positions.repeat_interleave(BEFORE)  # (branches,)
    # Branches see the text up to their position and themselves.
    sees = positions[None] <= owner[:, None]  # (branches, positions)
    visible = torch.cat([sees, torch.eye(len(owner), dtype=torch.bool)], 1)
    mask = torch.zeros(1, 1, *visible.shape, dtype=lm.model.dtype)
    mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
    where = {"position_ids": owner[None] + 1, "attention_mask": mask}
    logits, _ = lm.step(before.indices.flatten()[None], cache, **where)  # (1, branches, vocab)
    after = logits[0].float().topk(AFTER)  # (branches, AFTER)
    shape = (len(window), BEFORE, AFTER)
    return {
        "before": before.indices.to(torch.int32),
        "before_probs": before.values.softmax(-1),
        "after": after.indices.view(shape).to(torch.int32),
        "after_probs": after.values.softmax(-1).view(shape),
    }


def neighbours(lm, out: Path) -> None:
    """Some windows a file."""
    for number, some in enumerate(windows(lm)):
        file = out / "neighbours" / f"{number:03d}.safetensors"
        if not file.exists():
            parts = [after_window(lm, window) for window in some]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, found)
            print(time.strftime("%H:%M:%S"), file.name, flush=True)


def stored_neighbours(out: Path) -> dict[str, Tensor]:
    """Of all windows."""
    parts = [load_file(file) for file in sorted((out / "neighbours").glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def main(out: Path, model: str, stages: list[str]) -> None:
    """The stages in turn."""
    import cpmtp

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    lm = cpmtp.load_language_model(model, dtype="bfloat16")
    for stage in stages:
        {"neighbours": neighbours}[stage](lm, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
