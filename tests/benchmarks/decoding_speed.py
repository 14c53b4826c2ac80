"""Decoding on this machine, head by head: tokens per second beside plain decoding, the cycle's
cost, acceptance out of domain.

    python tests/benchmarks/decoding_speed.py speed code HEADS/r1 HEADS/r8-anchored
    python tests/benchmarks/decoding_speed.py acceptance code HEADS/r1 HEADS/r8 [--shifted FILE]

`speed` interleaves every way of decoding in one process, on the same prompts, and takes medians;
`acceptance` gives tokens per call pooled over rows, with the half-width of a 95 % interval over the
rows (the row is the unit: cycles of a row are dependent).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.decoding.stats import STAGES
from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.drafting import drafted_block
from cpmtp.language_model import sample_sequences
from cpmtp.pretrained import load_language_model
from cpmtp.validation.measurements import decode_beside_forecast, decode_in_turns


def prompts_of(lm, count: int, length: int, shifted: Path | None = None) -> list[torch.Tensor]:
    """From the model itself, or cut from a text it has not learned."""
    if shifted is None:
        return list(sample_sequences(lm, count, length, seed=11))
    ids = lm.encode(shifted.read_text("utf-8", errors="replace")[:400_000])
    starts = torch.linspace(0, len(ids) - length - 1, count).long().tolist()
    return [ids[s : s + length] for s in starts]


def head_of(lm, folder: Path) -> CPHead:
    return CPHead.from_pretrained(folder).attach(lm).eval().requires_grad_(False)


def speed(lm, folders: list[Path], *, rounds: int, count: int) -> None:
    """A table: rows heads and rules, columns tokens per second and the ratios that are asked of
    them.
    """
    heads = {folder.name: head_of(lm, folder) for folder in folders}
    turns = [[prompt] for prompt in prompts_of(lm, rounds + 1, 32)]
    for temperature, rules in ((1.0, ("token", "block")), (0.0, ("greedy",))):
        how = {"new_tokens": count, "rules": rules, "temperature": temperature}
        rows = decode_in_turns(lm, heads, turns, **how)
        generate = rows[0]["tokens_per_second"]
        for row in rows:
            more = ""
            if row["head"] in heads:
                stages = sum(row[f"{name}_seconds"] for name in STAGES)
                share = stages / (row["target_seconds"] + row["draft_seconds"])
                more = f"{share:.3f} {row['tokens_per_call']:.3f}"
            print(
                f"T={temperature:g} {row['head']:14} {row['rule'] or '':6} "
                f"{row['tokens_per_second']:7.1f} {row['tokens_per_second'] / generate:6.2f} "
                f"{row['speedup']:6.2f} {more}",
                flush=True,
            )


def cycle_cost(lm, folders: list[Path], *, repeats: int = 200) -> None:
    """Seconds of a cycle over those of one bare forward pass of n tokens and the head alone, at the
    same cache length.
    """
    from transformers import DynamicCache

    for folder in folders:
        head = head_of(lm, folder)
        prompt = prompts_of(lm, 1, 128)[0]
        out = speculative_generate(lm, head, prompt, max_new_tokens=300, seed=1)
        cycles = sum(out.stats.cycle_seconds.values())
        with torch.inference_mode():
            cache = DynamicCache()
            # The middle of the run: half of what it generated is in the cache.
            hidden = lm.model.model(
                sample_sequences(lm, 1, 278, seed=2), use_cache=True, **{lm.cache_name: cache}
            ).last_hidden_state
            tokens, bare, alone = prompt[None, : head.horizon], [], []
            for _ in range(repeats):
                begun = time.perf_counter()
                lm.model(tokens, use_cache=True, **{lm.cache_name: cache})
                bare.append(time.perf_counter() - begun)
                cache.crop(-tokens.shape[1])
                begun = time.perf_counter()
                drafted_block(head, hidden[:, -1], tokens[:, 0])
                alone.append(time.perf_counter() - begun)
        floor = statistics.median(bare) + statistics.median(alone)
        print(
            f"{folder.name:14} cycle {1e3 * cycles:.2f} ms, forward "
            f"{1e3 * statistics.median(bare):.2f} ms, "
            f"head {1e3 * statistics.median(alone):.2f} ms, ratio {cycles / floor:.2f}",
            flush=True,
        )


def acceptance(
    lm, folders: list[Path], *, rows: int, count: int, shifted: Path | None, temperature: float
) -> None:
    prompts = prompts_of(lm, rows, 64, shifted)
    heads = [(folder.name, head_of(lm, folder)) for folder in folders]
    how = {"prompts": prompts, "new_tokens": count, "temperature": temperature, "seed": 5}
    for rule in ("token", "block"):
        for row in decode_beside_forecast(lm, heads, rule=rule, **how):
            half = row["measured_high"] - row["measured"]
            print(
                f"{row['head']:14} {rule:6} {row['measured']:.4f} +- {half:.4f} "
                f"({half / row['measured']:.1%})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "cycle", "acceptance"))
    parser.add_argument("model")
    parser.add_argument("heads", type=Path, nargs="+")
    parser.add_argument("--shifted", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    lm = load_language_model(options.model)
    if options.what == "speed":
        speed(lm, options.heads, rounds=options.rounds, count=options.count)
    elif options.what == "cycle":
        cycle_cost(lm, options.heads)
    else:
        acceptance(
            lm,
            options.heads,
            rows=options.rows,
            count=options.count,
            shifted=options.shifted,
            temperature=options.temperature,
        )


if __name__ == "__main__":
    main()
