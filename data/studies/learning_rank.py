"""What makes a head of a higher rank learn its first drafted position as fast as one of rank 1;
goes on where it was stopped.

Run from the checkout:
python data/studies/learning_rank.py OUT [--models M …] [--seeds S …] [--variants NAME …]

Heads of form cp (and mixtures of chains, for what wins), told the first token, of four tokens, are
trained on the windows of the grid (`curves.py`) for 128k positions, at the grid's rates, and judged
on its held-out texts. A variant changes one
thing: how fast the components' maps part, how equal they begin, the rate of the mixture weights or
of all, the weight of the load-balancing loss, the trunk, or the horizon (two tokens: the first
position alone). `rows/` in OUT has a file per head; `learning_rank.csv` has, per model and variant
with its seeds averaged, S_2 less that of rank 1 in the same trunk and horizon, and less that of the
same head as it was before, with 95 % intervals over documents, paired; the same of tokens per call.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import curves
import curves_summary
import pandas as pd
import torch

import cpmtp
from cpmtp.training import heads as head_training
from cpmtp.training.heads import HeadTrainingSettings, train_heads
from cpmtp.whole_files import write_text

THOUSANDS, AT_ONCE = 128, 6
RATES = {"code": 1.6e-2, "prose": 3.2e-2}  # of form cp in the grid
CHAINED_RATE = 3.2e-2  # of form markov_mixture, on both models


@dataclass(frozen=True)
class Variant:
    """One way to train a head; the defaults are how it was done before this study.

    Attributes
    ----------
    rank, horizon : int
    chained : bool
        Form markov_mixture, with transitions of rank 32, in the place of cp.
    wide : bool
        The grid's wide trunk.
    own, first : float, optional
        Rate of what a position's maps have of their own, to that of what they share; of the first
        position alone.
    apart : float, optional
        Size of what each component's maps have of their own at the start, to that of what they
        share; None: they are drawn one by one.
    mixture, rate : float
        Learning rate of the mixture weights, and of everything, to the usual.
    balance : float
        Weight of the load-balancing loss.
    """

    rank: int = 8
    horizon: int = curves.HORIZON
    chained: bool = False
    wide: bool = False
    own: float | None = None
    first: float | None = None
    apart: float | None = None
    mixture: float = 1.0
    rate: float = 1.0
    balance: float = 0.0

    @property
    def name(self) -> str:
        """What it changes, for files and tables."""
        usual = Variant()
        named = vars(self).items()
        changes = [
            f"{k} {v}" for k, v in named if k not in ("rank", "chained") and v != getattr(usual, k)
        ]
        form = "mixture" if self.chained else "cp"
        return " ".join([f"{form} {self.rank}", *changes])

    @property
    def single(self) -> Variant:
        """Rank 1 in the same trunk and horizon."""
        return Variant(1, self.horizon, wide=self.wide)

    @property
    def usual(self) -> Variant:
        """As it is, of the same rank, trunk and horizon."""
        return Variant(self.rank, self.horizon, self.chained, self.wide)

    def settings(self, model: str, seed: int) -> HeadTrainingSettings:
        """Of a head."""
        forms = {"form": "markov_mixture", "transition_rank": 32}
        return HeadTrainingSettings(
            **(forms if self.chained else {"form": "cp"}),
            rank=self.rank,
            horizon=self.horizon,
            **(curves.LARGE if self.wide else curves.SMALL),
            balance=self.balance,
            learning_rate=(CHAINED_RATE if self.chained else RATES[model]) * self.rate,
            positions=THOUSANDS * 1024,
            rows=curves.ROWS,
            length=curves.LENGTH,
            precision="bfloat16",
            seed=seed,
        )


VARIANTS = [
    Variant(1),
    Variant(),
    *(Variant(own=share) for share in (0.1, 1.0)),
    Variant(apart=0.1),
    Variant(apart=0.1, own=0.1),
    *(Variant(mixture=share) for share in (0.1, 10.0)),
    *(Variant(rate=share) for share in (0.5, 2.0)),
    Variant(balance=0.1),
    *(Variant(rank, horizon=2) for rank in (1, 8)),
    *(Variant(rank, wide=True) for rank in (1, 8)),
    *(Variant(first=share) for share in (0.03, 0.1)),
    *(Variant(first=share, apart=0.1) for share in (0.03, 0.1)),
    Variant(16),
    Variant(16, own=0.1),
    Variant(16, apart=0.1),
    *(Variant(4, chained=True, apart=share) for share in (None, 0.1)),
]


def optimisers(variant: Variant, usual: Any, head: Any, settings: Any) -> list:
    """The usual ones, with the variant's rates."""
    found = usual(head, settings)
    for optimiser in found:
        for group in list(optimiser.param_groups):
            if group.get("members", 1) > 1:
                later = group["own"] if variant.own is None else variant.own
                first = later if variant.first is None else variant.first
                group["own"] = [first] + [later] * (head.drafted - 1)
            mixture = [p for p in group["params"] if any(p is m for m in head.mixture.parameters())]
            if mixture and variant.mixture != 1:
                group["params"] = [p for p in group["params"] if all(p is not m for m in mixture)]
                more = {"params": mixture, "lr": group["lr"] * variant.mixture}
                optimiser.add_param_group(more)
                if not group["params"]:
                    optimiser.param_groups.remove(group)
    return found


def trained(out: Path, lm: Any, variants: list[Variant], seed: int) -> list[dict]:
    """A row per variant: sums on the held-out texts, as the curves' rows have them."""
    settings = [variant.settings(lm.name, seed) for variant in variants]
    # A start is copied into the head that is trained.
    starts = [
        head_training._new_head(lm, own, variant.apart)
        for variant, own in zip(variants, settings, strict=True)
    ]
    tokens = curves.windows(lm, out, THOUSANDS * 1024 // curves.LENGTH, seed)
    usual, order = head_training._optimisers, iter(variants)

    def own_optimisers(head: Any, own: HeadTrainingSettings) -> list:
        return optimisers(next(order), usual, head, own)

    with patch.object(head_training, "_optimisers", own_optimisers):
        heads = train_heads(lm, settings, tokens=tokens, starts=starts)
    texts, names = curves.held_out_texts(lm, out)
    common = {"model": lm.name, "seed": seed, "torch": torch.__version__}
    return [
        common | {"variant": variant.name} | curves.scores(lm, head, texts, names)
        for variant, head in zip(variants, heads, strict=True)
    ]


def summary(out: Path) -> pd.DataFrame:
    """A line per model and variant."""
    files = sorted((out / "rows").glob("*.json"))
    table = pd.DataFrame([json.loads(file.read_text("utf-8")) for file in files])
    lines = []
    for model, rows in table.groupby("model"):
        by_name = {name: set(same["seed"]) for name, same in rows.groupby("variant")}
        for variant in (v for v in VARIANTS if v.name in by_name):
            line = {"model": model, "variant": variant.name}
            for prefix, other in (("less_rank_1", variant.single), ("less_usual", variant.usual)):
                seeds = by_name[variant.name] & by_name.get(other.name, set())
                mine, its = (
                    curves_summary.Cell.of(
                        rows[(rows["variant"] == name) & rows["seed"].isin(seeds)]
                    )
                    for name in (variant.name, other.name)
                )
                line |= {"seeds": len(seeds), "survival_2": mine.survival[1].value}
                line["tokens_per_call"] = mine.tokens.value
                first = mine.survival[1] - its.survival[1]
                line |= curves_summary.with_interval(f"survival_2_{prefix}", first)
                line |= curves_summary.with_interval(f"tokens_{prefix}", mine.tokens - its.tokens)
            lines.append(line)
    return pd.DataFrame(lines)


def main() -> None:
    """What is missing, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--variants", nargs="+", help="names of some; default: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in ("rows", "samples"):
        (given.out / folder).mkdir(parents=True, exist_ok=True)
    for seed, model in product(given.seeds, given.models):
        asked = [v for v in VARIANTS if given.variants is None or v.name in given.variants]
        files = {v: given.out / "rows" / f"{model}-{v.name}-{seed}.json" for v in asked}
        missing = [variant for variant, file in files.items() if not file.exists()]
        for at in range(0, len(missing), AT_ONCE):
            lm, some = cpmtp.load_language_model(model), missing[at : at + AT_ONCE]
            for variant, row in zip(some, trained(given.out, lm, some, seed), strict=True):
                write_text(files[variant], json.dumps(row) + "\n")
                print(files[variant].stem, *(row[k] for k in ("tokens_per_call", "survival_2")))
    write_text(
        given.out / "learning_rank.csv", summary(given.out).to_csv(index=False, float_format="%.5g")
    )


if __name__ == "__main__":
    main()
