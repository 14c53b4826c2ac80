"""Peak memory of training heads of a real model, with and without a draft vocabulary.

Run by hand: python tests/benchmarks/training_memory.py FOLDER POSITIONS, where FOLDER holds a
causal language model with a large vocabulary. Each head is trained for two steps in a process of
its own, in bfloat16. The base model alone, after a pass over the same windows, is the first column;
what training adds to it is beside what the head's weights take and what the logits of a step would,
were they all kept in single precision.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

HEADS = [{"form": "markov", "transition_rank": 64}, {"form": "cp", "rank": 8}]
VOCABULARIES = (4096, None)


def peak() -> int:
    """Bytes resident at most so far; not ru_maxrss, which a child inherits."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return 1024 * int(found[1])


def measured(folder: str, positions: int, head: dict, vocabulary: int | None) -> str:
    """One training, in words."""
    import torch

    import cpmtp

    torch.set_num_threads(1)
    lm = cpmtp.load_language_model(folder, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lm.vocab_size, (2, positions), generator=generator)
    lm.unembed(lm.hidden_states(tokens[:1])[:, :1])
    before, begun = peak(), time.perf_counter()
    shape = {"rows": 1, "length": positions, "steps": 2, "vocabulary": vocabulary}
    trained = cpmtp.train_head(lm, tokens=tokens, **shape, **head)
    more, spent = peak() - before, time.perf_counter() - begun
    weights = 4 * sum(p.numel() for p in trained.parameters())
    drafted = trained.drafted * trained.rank * trained.support_size
    logits = 4 * positions * drafted
    return (
        f"{head['form']:8} {vocabulary or lm.vocab_size:6} {positions:5} positions: base "
        f"{before / 1e9:.2f} GB, training adds {more / 1e9:.2f} GB, weights {weights / 1e9:.3f} "
        f"GB, logits would be {logits / 1e9:.2f} GB, {spent / 2:.1f} s a step"
    )


def main() -> None:
    """Every head in a process of its own."""
    folder, positions, *case = sys.argv[1:]
    if case:
        print(measured(folder, int(positions), HEADS[int(case[0])], VOCABULARIES[int(case[1])]))
        return
    for v in range(len(VOCABULARIES)):
        for h in range(len(HEADS)):
            command = [sys.executable, __file__, folder, positions, str(h), str(v)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
