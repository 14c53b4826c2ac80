"""What no training can buy at a real vocabulary: left and right factors from text, what a head can
output, longer blocks. Goes on where it was stopped.

Run from the checkout: python data/studies/real_bounds.py OUT MODEL STAGE [STAGE …]

MODEL is a folder of a causal language model (the figures of the pages are of
SmolLM2-135M-Instruct).

neighbours  at text positions: the four likeliest next tokens, and what follows each of them
factors     left and right factors from more and more of these positions, of several ranks
population  three tokens under top-k 50 on held-out texts, drafts told the first: every form with
            these factors, and logits that the unembedding can make
cooler      three tokens at temperature 0.7, without the text's factors
mixtures    of `population`, chains with weights, in fewer contexts
curve       of `population`, only single chains without gates, by rank and positions
horizons    anchored fits under top-k 4, 3 to 8 tokens
not_told    four tokens under top-k 16, drafts that are not told the first: components and hidden
            states of as many
others      a population fit of 48 contexts under top-k 16, judged on 16 others
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bounds
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

import cpmtp
from cpmtp.corpora import split_held_out, standard_library_documents
from cpmtp.decomposition.descent.text_factors import TextPairs, text_factors
from cpmtp.decomposition.trees.readout import fit_readout
from cpmtp.training.heads import windows_of_text
from cpmtp.whole_files import write_parquet, write_tensors, write_text

DOMAINS = ("code", "prose")
# Windows of text, tokens that are tried after each position, and tokens kept after each of these.
LENGTH, BEFORE, AFTER = 128, 4, 16
WINDOWS, AT_ONCE = 416, 26
# Shares of the positions and transition ranks of the factors.
SHARES, WIDTHS, MOST_WIDTHS = (1 / 16, 1 / 4), (16, 64), (4, 16, 64, 256)
STEPS, RATE = 240, 0.05
# Contexts and their tokens; contexts of a population fit and of its judgement.
CONTEXTS = {
    "population": 12,
    "mixtures": 6,
    "curve": 12,
    "horizons": 24,
    "cooler": 12,
    "not_told": 8,
}
OTHERS, CONTEXT = (48, 16), 96
# A lower temperature; components of mixtures.
COOL, MIXTURES = 0.7, (2, 4)
# First tokens of less mass earn one token where logits through the unembedding are compared.
LEAST_MASS = 1e-2
# Passes of fits with given factors, of one chain and of mixtures.
OF_CHAINS, OF_MIXTURES = 15, 5
HORIZONS = (3, 4, 6, 8)
# Tokens of the other stages.
LENGTHS = {"horizons": HORIZONS, "not_told": (4,)}
# Tables, and the stages whose parts they hold: mixtures stand in the table of the others.
TABLES = {name: (name,) for name in ("population", "curve", "horizons", "cooler", "not_told")}
TABLES["population"] += ("mixtures",)


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


def factor_file(out: Path, share: float, width: int) -> Path:
    """Where factors are kept."""
    return out / "factors" / f"{width}-of-{share:g}.safetensors"


def grid() -> list[tuple[float, int]]:
    """Shares of the positions and ranks."""
    return [(1.0, k) for k in MOST_WIDTHS] + [(share, k) for share in SHARES for k in WIDTHS]


def factors(lm, out: Path) -> None:
    """One file for each share of the positions and each rank."""
    found = stored_neighbours(out)
    names = ("before", "before_probs", "after", "after_probs")
    parts = [found[name].long() if "probs" not in name else found[name] for name in names]
    pairs = TextPairs.of(*parts)
    for share, width in grid():
        file = factor_file(out, share, width)
        if not file.exists():
            started, some = time.process_time(), pairs[: round(share * len(pairs))]
            left, right, trace = text_factors(some, lm.vocab_size, width, steps=STEPS, rate=RATE)
            kept = {"left": left.float(), "right": right.float(), "trace": trace}
            kept["positions"] = torch.tensor([len(some)])
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, {name: part.contiguous() for name, part in kept.items()})
            ends = f"{float(trace[:20].mean()):.4f} {float(trace[-20:].mean()):.4f}"
            print(len(some), width, ends, f"{time.process_time() - started:.1f} s", flush=True)


def stored_factors(out: Path, share: float, width: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Left and right factors, and how many positions they come from."""
    found = load_file(factor_file(out, share, width))
    return (found["left"].double(), found["right"].double()), int(found["positions"])


@dataclass(frozen=True)
class Unit:
    """A context, named as the studies name theirs."""

    model: str
    domain: str
    document: str
    context: int
    token_ids: Tensor


def units(lm, count: int, held_out: bool = True) -> list[Unit]:
    """Contexts of documents of both kinds in turn, one of each document."""
    found = []
    for domain in DOMAINS:
        texts, own = sorted(documents(domain, held_out), key=lambda one: one.name), []
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(7))
        for place in order.tolist():
            ids = lm.encode(texts[place].text[:4000])
            if len(ids) >= 2 * CONTEXT and len(own) < -(-count // len(DOMAINS)):
                own.append((domain, texts[place].name, ids[CONTEXT : 2 * CONTEXT]))
        found.append(own)
    turns = [one for pair in zip(*found, strict=False) for one in pair][:count]
    return [Unit("SmolLM2", *named, place, ids) for place, (*named, ids) in enumerate(turns)]


def given(out: Path, width: int, gated: bool, rank: int = 1) -> dict:
    """What `fit` is asked for with factors of all positions."""
    form = "markov" if rank == 1 else "markov_mixture"
    asked = {"rank": rank, "form": form, "transitions": stored_factors(out, 1.0, width)[0]}
    passes = OF_CHAINS if rank == 1 else OF_MIXTURES
    return asked | {"gated": gated, "max_iterations": passes}


def population(unit: Unit, lm, out: Path) -> pd.DataFrame:
    """One context under top-k 50, with the text's factors."""
    tree = cpmtp.complete_joint(lm, unit.token_ids, 3, top_k=50)
    named = bounds.common(unit) | {"horizon": 3, "top_k": 50, "temperature": 1.0}
    asked = {"cp 2": {"rank": 2}, "cp 8": {"rank": 8, "max_iterations": 30}}
    asked |= {f"markov {width} gated": given(out, width, True) for width in (16, 64)}
    rows = [named | row for row in readouts(tree, lm, out)]
    rows += [named | row for row in fitted(tree, asked)]
    return pd.DataFrame([*rows, named | bounds.best_path(tree)])


def cooler(unit: Unit, lm, out: Path) -> pd.DataFrame:
    """One context under top-k 50 at temperature 0.7, factors its own."""
    tree = cpmtp.complete_joint(lm, unit.token_ids, 3, top_k=50, temperature=COOL)
    named = bounds.common(unit) | {"horizon": 3, "top_k": 50, "temperature": COOL}
    asked = {f"cp {rank}": {"rank": rank, "max_iterations": 30} for rank in (1, 2, 8)}
    own: dict = {"form": "markov", "rank": 1, "transition_rank": 16, "gated": True}
    own["max_iterations"] = OF_CHAINS
    rows = fitted(tree, asked | {"markov 16 gated, own factors": own})
    return pd.DataFrame([named | row for row in [*rows, bounds.best_path(tree)]])


def not_told(unit: Unit, lm, out: Path) -> pd.DataFrame:
    """One context, four tokens: as the embedded models' are judged."""
    return pd.DataFrame(bounds.four_tokens(unit, lm))


def fitted(tree, asked: dict[str, dict]) -> list[dict]:
    """A row for each of these fits."""
    return [
        bounds.row_of(tree, name, cpmtp.fit(tree, anchored=True, **options))
        for name, options in asked.items()
    ]


def mixtures(unit: Unit, lm, out: Path) -> pd.DataFrame:
    """One context under top-k 50: chains of `population` with weights."""
    tree = cpmtp.complete_joint(lm, unit.token_ids, 3, top_k=50)
    named = bounds.common(unit) | {"horizon": 3, "top_k": 50, "temperature": 1.0}
    asked = {f"markov_mixture {r}, 16 gated": given(out, 16, True, r) for r in MIXTURES}
    return pd.DataFrame([named | row for row in fitted(tree, asked)])


def curve(unit: Unit, lm, out: Path) -> pd.DataFrame:
    """One context under top-k 50: by rank and positions, and through the unembedding."""
    tree = cpmtp.complete_joint(lm, unit.token_ids, 3, top_k=50)
    named = bounds.common(unit) | {"horizon": 3, "top_k": 50, "temperature": 1.0}
    return pd.DataFrame([named | row for row in readouts(tree, lm, out)])


def readouts(tree, lm, out: Path) -> Iterator[dict]:
    """Single chains with given factors: any logits, and those through the unembedding."""
    readout = lm.unembedding.detach()
    for share, width in [(0.0, 0), *grid()]:
        transitions, positions = stored_factors(out, share, width) if width else (None, 0)
        named = {"rank": 1, "transition_rank": width, "positions": positions}
        name = "cp 1" if not width else f"markov {width}" + (share < 1) * f" of {positions}"
        ways = {"": (None, {})}
        if share in (0.0, 1.0) and width in (0, 16):
            ways |= {", few first": (None, {"least_mass": LEAST_MASS})}
            ways |= {", unembedding": (readout, {"least_mass": LEAST_MASS})}
        for way, (matrix, how) in ways.items():
            draft, kl = fit_readout(tree, matrix, transitions=transitions, **how)
            row = {"draft": name + way, "kl_nats": kl}
            whole = share in (0.0, 1.0)
            yield (
                named | row | {"tokens_per_call": bounds.earned(tree, draft) if whole else math.nan}
            )


def others(lm, out: Path) -> None:
    """Factors of contexts, judged on contexts of other documents."""
    many, few = OTHERS
    trees = [
        cpmtp.complete_joint(lm, unit.token_ids, 3, top_k=16) for unit in units(lm, many, False)
    ]
    started = time.perf_counter()
    shared = cpmtp.fit_population(trees, 1, 64, gated=True, anchored=True, max_iterations=60)
    seconds, rows = time.perf_counter() - started, []
    for unit in units(lm, few):
        tree = cpmtp.complete_joint(lm, unit.token_ids, 3, top_k=16)
        named = bounds.common(unit) | {"horizon": 3, "top_k": 16, "temperature": 1.0}
        asked = {"cp 1": {"rank": 1}, "cp 2": {"rank": 2}}
        fits = {name: cpmtp.fit(tree, anchored=True, **options) for name, options in asked.items()}
        fits["48 contexts, markov 64 gated"] = shared.refit(tree, max_iterations=60)
        of_text = given(out, 64, True) | {"max_iterations": 60}
        fits["text, markov 64 gated"] = cpmtp.fit(tree, anchored=True, **of_text)
        rows += [named | bounds.row_of(tree, name, fit) for name, fit in fits.items()]
    table = pd.DataFrame(rows).assign(
        population_seconds=seconds, population_objective=shared.objective
    )
    write_parquet(out / "others.parquet", table)
    write_text(out / "others.csv", bounds.summary(table).to_csv(index=False, float_format="%.5g"))


OF_CONTEXT = {
    "population": population,
    "mixtures": mixtures,
    "curve": curve,
    "cooler": cooler,
    "not_told": not_told,
}


def by_context(lm, out: Path, stage: str) -> None:
    """A part per context, then the table of those that are there."""
    lengths = LENGTHS.get(stage, (3,))
    tasks = [(horizon, unit) for horizon in lengths for unit in units(lm, CONTEXTS[stage])]
    tasks.sort(key=lambda task: (task[0] == HORIZONS[-1], task[1].context))
    for horizon, unit in tasks:
        file = part_file(out, stage, horizon, unit.context)
        if not file.exists():
            if stage == "horizons":
                made = bounds.horizons(unit, lm, horizon)
            else:
                made = OF_CONTEXT[stage](unit, lm, out)
            write_parquet(file, made)
            print(time.strftime("%H:%M:%S"), file.name, flush=True)


def restore(out: Path) -> None:
    """Contexts of stored tables as parts again, so that a run goes on from the tables alone."""
    for table, stages in TABLES.items():
        file = out / f"{table}.parquet"
        rows = pd.read_parquet(file) if file.exists() else pd.DataFrame()
        for (context, horizon), own in rows.groupby(["context", "horizon"]) if len(rows) else ():
            mixed = own["draft"].str.startswith("markov_mixture")
            for stage, part in zip(stages, (own[~mixed], own[mixed]), strict=False):
                place = part_file(out, stage, horizon, context)
                if len(part) and not place.exists():
                    write_parquet(place, part)


def part_file(out: Path, stage: str, horizon: int, context: int) -> Path:
    """Where a context's rows are kept."""
    return out / "parts" / f"{stage}-{horizon}-{context:03d}.parquet"


def tables(lm, out: Path) -> None:
    """Of the parts that are there."""
    for table_name, stages in TABLES.items():
        parts = out / "parts"
        files = [file for stage in stages for file in sorted(parts.glob(f"{stage}-*.parquet"))]
        if files:
            table = pd.concat(map(pd.read_parquet, files), ignore_index=True)
            write_parquet(out / f"{table_name}.parquet", table)
            text = bounds.summary(table).to_csv(index=False, float_format="%.5g")
            write_text(out / f"{table_name}.csv", text)


def main(out: Path, model: str, stages: list[str]) -> None:
    """The stages in turn."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    restore(out)
    lm = cpmtp.load_language_model(model, dtype="bfloat16")
    at_once = {"neighbours": neighbours, "factors": factors, "others": others, "tables": tables}
    for stage in stages:
        if stage in at_once:
            at_once[stage](lm, out)
        else:
            by_context(lm, out, stage)
    tables(lm, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
