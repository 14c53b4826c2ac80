"""What no training can buy, by form: longer blocks, drafts that are not sampled, left and right
factors shared by contexts. Goes on where it was stopped.

Run from the checkout: python data/studies/bounds.py OUT STAGE [STAGE …] [MODEL]

MODEL (code or prose) leaves a process that model's contexts, for two side by side.

horizons    anchored fits under top-k 4, 3 to 8 tokens, on complete joints
proposals   anchored fits under top-k 16 at four temperatures, proposals sampled and argmaxes
population  left and right factors of contexts 32 to 55, judged on contexts 0 to 31: told the first
            token
not_told    the same of drafts that are not told it, judged on contexts 0 to 15; beside them four
            tokens under top-k 16, where hidden states and components part
tables      of what is there

A context is a part of its own; tables hold the contexts that every model has by now.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
from anchored import SETTINGS

import cpmtp
from cpmtp.resampling import CLUSTER_KEYS, Clusters, intervals
from cpmtp.study.models import open_language_model
from cpmtp.study.plan import plan_study
from cpmtp.whole_files import write_parquet, write_text

REFERENCE, BEST_PATH, FULL_CHAIN = "cp 1", "best path", "full chain"
CP = {f"cp {rank}": {"rank": rank} for rank in (1, 2, 4, 8)}
MARKOV = {
    "markov 16": {"rank": 1, "form": "markov", "transition_rank": 16},
    "markov 16 gated": {"rank": 1, "form": "markov", "transition_rank": 16, "gated": True},
}
OF_HORIZONS = {**CP, "hmm 4": {"rank": 4, "form": "hmm"}, "markov 16": MARKOV["markov 16"]}
OF_PROPOSALS = {"cp 1": CP["cp 1"], "cp 4": CP["cp 4"], **MARKOV}
HORIZONS, TEMPERATURES = (3, 4, 6, 8), (0.0, 0.5, 0.7, 1.0)
# Contexts of every model whose longer blocks are studied, and whose proposals are.
LONGER, TRIED = range(24), range(16)
STAGES = ("horizons", "proposals", "population", "not_told")
# Contexts that shared factors come from, and that they are judged on.
FITTED, JUDGED = range(32, 56), range(32)
# Contexts that drafts not told the first token are judged on, and mixtures of those that are told.
NOT_TOLD, MIXED = range(16), range(6)
# First tokens of less mass are left out where shared factors are fitted.
LEAST_MASS = 1e-2
SHARED = {"markov 16": (16, False), "markov 16 gated": (16, True), "markov 64 gated": (64, True)}
MIXTURES = (2, 4)
# Passes of fits with given factors: of one chain, of mixtures that are told and not, and of the
# shared factors themselves.
OF_CHAINS, OF_MIXTURES, OF_SHARED = 40, (20, 40), 80
OF_HMM = {"rank": 8, "form": "hmm", "max_iterations": 12}


def common(unit) -> dict:
    """What names a context."""
    return {key: getattr(unit, key) for key in (*CLUSTER_KEYS, "context")}


def earned(joint, draft, **options) -> float:
    """Tokens per call of a complete joint."""
    found = cpmtp.implied_acceptance(joint, draft, **options)
    return getattr(found, "tokens_per_call", None) or found.tokens_per_call_lower


def row_of(joint, name: str, fit) -> dict:
    """Of one draft."""
    draft = fit.distribution
    row = {"draft": name, "rank": draft.rank, "status": fit.status, "kl_nats": fit.objective}
    row |= {"transition_rank": getattr(draft, "transition_rank", 0), "fit_seconds": fit.seconds}
    row |= {"tokens_per_call": earned(joint, draft)}
    return row | {"free_numbers": draft.free_numbers, "shared_numbers": draft.shared_numbers}


def best_path(joint) -> dict:
    """Of drafts that are not sampled."""
    found = cpmtp.best_path_tokens_per_call(joint)
    return {"draft": BEST_PATH, "tokens_per_call": getattr(found, "lower", found)}


def full_chain(joint) -> dict:
    """Of chains of the joint's own conditionals, and what they do not hold."""
    memory = cpmtp.token_memory(joint)
    row = {"draft": FULL_CHAIN, "tokens_per_call": memory.markov_tokens_per_call_anchored}
    row |= {"kl_nats": float(memory.beyond_one_token_anchored.sum())}
    row |= {"total_correlation": memory.total_correlation}
    row |= {"tokens_per_call_not_told": memory.markov_tokens_per_call}
    return row | {"beyond_one_token_not_told": float(memory.beyond_one_token.sum())}


def horizons(unit, lm, horizon: int) -> pd.DataFrame:
    """One context under top-k 4 at one length of block."""
    joint = cpmtp.complete_joint(lm, torch.as_tensor(unit.token_ids), horizon, top_k=4)
    named = common(unit) | {"horizon": horizon, "top_k": 4, "temperature": 1.0}
    rows = [
        named | row_of(joint, name, cpmtp.fit(joint, anchored=True, **asked))
        for name, asked in OF_HORIZONS.items()
    ]
    return pd.DataFrame([*rows, named | full_chain(joint), named | best_path(joint)])


def proposals(unit, lm, horizon: int) -> pd.DataFrame:
    """One context under top-k 16 at every temperature, drafts sampled and not."""
    rows, context = [], torch.as_tensor(unit.token_ids)
    for temperature in TEMPERATURES:
        law = {"temperature": temperature} | ({"top_k": 16} if temperature else {})
        joint = cpmtp.complete_joint(lm, context, horizon, **law)
        named = common(unit) | {"horizon": horizon, "top_k": 16, "temperature": temperature}
        for name, asked in OF_PROPOSALS.items():
            fit = cpmtp.fit(joint, anchored=True, **asked)
            row = row_of(joint, name, fit)
            row["tokens_per_call_argmax"] = earned(joint, fit.distribution, proposal="argmax")
            rows.append(named | row)
        rows.append(named | best_path(joint))
    return pd.DataFrame(rows)


def shared_factors(units: list, lm, out: Path, told: bool) -> dict:
    """Left and right factors of one model's other contexts, kept in a file."""
    file = out / "parts" / f"shared-{'told' if told else 'not-told'}-{units[0].model}.pt"
    if not file.exists():
        contexts = [unit for unit in units if unit.context in FITTED]
        joints = [cpmtp.exact_joint(lm, torch.as_tensor(unit.token_ids), 3) for unit in contexts]
        how = {"anchored": told, "least_mass": LEAST_MASS, "max_iterations": OF_SHARED}
        found = {}
        for name, (width, gated) in SHARED.items():
            shared = cpmtp.fit_population(joints, 1, width, gated=gated, **how)
            found[name] = {"left": shared.left, "right": shared.right}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
    return torch.load(file, weights_only=True)


def given(shared: dict, name: str, rank: int = 1) -> dict:
    """What `fit` is asked for a chain, or a mixture of chains, with factors of others."""
    asked = {"rank": rank, "form": "markov" if rank == 1 else "markov_mixture"}
    asked |= {"transitions": (shared[name]["left"], shared[name]["right"])}
    return asked | {"gated": SHARED[name][1]}


def population(unit, lm, shared: dict, told: bool) -> pd.DataFrame:
    """One context, whole distribution: forms with left and right factors of other contexts."""
    joint = cpmtp.exact_joint(lm, torch.as_tensor(unit.token_ids), 3)
    named = common(unit) | {"horizon": 3, "temperature": 1.0, "anchored": told}
    asked = {name: CP[name] for name in ("cp 1", "cp 2", "cp 8")}
    asked |= {name: given(shared, name) | {"max_iterations": OF_CHAINS} for name in SHARED}
    for rank in MIXTURES if not told or unit.context in MIXED else ():
        chains = given(shared, "markov 16 gated", rank)
        passes = {"max_iterations": OF_MIXTURES[0 if told else 1]}
        asked[f"markov_mixture {rank}, 16 gated"] = chains | passes
    fits = {name: cpmtp.fit(joint, anchored=told, **options) for name, options in asked.items()}
    rows = [named | row_of(joint, name, fit) for name, fit in fits.items()]
    rows.append(named | (best_path(joint) if told else full_chain(joint)))
    return pd.DataFrame(rows + ([] if told else four_tokens(unit, lm)))


def four_tokens(unit, lm) -> list[dict]:
    """Components and hidden states of as many, not told the first token, under top-k 16."""
    tree = cpmtp.complete_joint(lm, torch.as_tensor(unit.token_ids), 4, top_k=16)
    named = common(unit) | {"horizon": 4, "top_k": 16, "temperature": 1.0, "anchored": False}
    asked = {"cp 1": CP["cp 1"], "cp 8": CP["cp 8"], "hmm 8": OF_HMM}
    return [
        named | row_of(tree, name, cpmtp.fit(tree, **options)) for name, options in asked.items()
    ]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per model, block, temperature and draft: mean tokens per call (block rule), the gain on
    `cp 1` in the same contexts, and 95 % intervals over documents.
    """
    parts = []
    for (model, horizon, temperature), rows in table.groupby(["model", "horizon", "temperature"]):
        index = [*CLUSTER_KEYS, "context"]
        wide = rows.pivot(index=index, columns="draft", values="tokens_per_call")
        wide = wide[list(dict.fromkeys(rows["draft"]))]
        part = pd.DataFrame({"draft": wide.columns, "contexts": wide.notna().sum().to_numpy()})
        part.insert(0, "temperature", temperature)
        part.insert(0, "horizon", horizon)
        part.insert(0, "model", model)
        gains = wide.sub(wide[REFERENCE], axis=0)
        for name, scores in (("tokens_per_call", wide), ("gain", gains)):
            found = [_mean_with_interval(scores[[draft]].dropna()) for draft in wide.columns]
            part[name], part[f"{name}_low"], part[f"{name}_high"] = zip(*found, strict=True)
        drafts = rows.groupby("draft")
        for name in ("tokens_per_call_argmax", "kl_nats", "free_numbers", "shared_numbers"):
            if name in rows:
                part[name] = drafts[name].mean().reindex(wide.columns).to_numpy()
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _mean_with_interval(scores: pd.DataFrame) -> tuple[float, float, float]:
    """Of one draft, over the contexts that it was fitted to."""
    if scores.empty:
        return (float("nan"),) * 3
    clusters = Clusters.of(scores)
    low, high = intervals(clusters, seed=0)
    return float(clusters.means()[0]), float(low[0]), float(high[0])


def part_file(out: Path, stage: str, unit, horizon: int) -> Path:
    """Where a context's rows are kept."""
    return out / "parts" / f"{stage}-{horizon}-{unit.model}-{unit.context:03d}.parquet"


def restore(out: Path, stage: str, tasks: list) -> None:
    """Contexts of a stored table as parts again, so that a run goes on from the table alone."""
    table = out / f"{stage}.parquet"
    if table.exists():
        rows = pd.read_parquet(table)
        for unit, horizon in tasks:
            own = rows[(rows["model"] == unit.model) & (rows["context"] == unit.context)]
            file = part_file(out, stage, unit, horizon)
            own = own[own["horizon"] == horizon] if stage == "horizons" else own
            if len(own) and not file.exists():
                write_parquet(file, own)


def write_tables(out: Path, stage: str, tasks: list) -> None:
    """The table and its summary, of the contexts that every model has by now."""
    done: dict[tuple[int, int], list[Path]] = {}
    for unit, horizon in tasks:
        file = part_file(out, stage, unit, horizon)
        if file.exists():
            done.setdefault((horizon, unit.context), []).append(file)
    models = len({unit.model for unit, _ in tasks})
    files = [file for _, parts in sorted(done.items()) if len(parts) == models for file in parts]
    if files:
        table = pd.concat(map(pd.read_parquet, files), ignore_index=True)
        write_parquet(out / f"{stage}.parquet", table)
        text = summary(table).to_csv(index=False, float_format="%.5g")
        write_text(out / f"{stage}.csv", text)


def tasks_of(stage: str, units: list) -> list[tuple]:
    """Contexts and lengths of a stage, the longest blocks last."""
    of_stage = {"horizons": LONGER, "not_told": NOT_TOLD, "proposals": TRIED}
    contexts = of_stage.get(stage, JUDGED)
    chosen = [unit for unit in units if unit.context in contexts]
    tasks = [(unit, n) for unit in chosen for n in (HORIZONS if stage == "horizons" else (3,))]
    return sorted(tasks, key=lambda task: (task[1] == HORIZONS[-1], task[0].context))


def main(out: Path, asked: list[str]) -> None:
    """One part per context, then the tables."""
    only = set(asked) & set(SETTINGS.models)
    torch.set_num_threads(1)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    units = sorted(plan_study(SETTINGS)[0], key=lambda unit: unit.context)
    for stage in STAGES if "tables" in asked else [name for name in asked if name not in only]:
        tasks = tasks_of(stage, units)
        restore(out, stage, tasks)
        for unit, horizon in tasks if "tables" not in asked else ():
            file = part_file(out, stage, unit, horizon)
            if file.exists() or (only and unit.model not in only):
                continue
            lm = open_language_model(unit.model)
            if stage in ("population", "not_told"):
                own = [other for other in units if other.model == unit.model]
                told = stage == "population"
                rows = population(unit, lm, shared_factors(own, lm, out, told), told)
            else:
                rows = {"horizons": horizons, "proposals": proposals}[stage](unit, lm, horizon)
            write_parquet(file, rows)
        write_tables(out, stage, tasks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
