"""Two studies side by side: two models, two corpora, two dates."""

from __future__ import annotations

import pandas as pd

from cpmtp.ranking.parts import reference_form
from cpmtp.ranking.scores import sampled_rows
from cpmtp.resampling import Clusters, difference_interval, intervals, seeded

# What a context is, whoever continues it: the same text from the same document.
_SHARED = ["domain", "document", "context", "context_text", "temperature", "anchored"]
_SETTING = ["model", "domain", "temperature", "anchored"]


@seeded
def compare_studies(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    rule: str = "block",
    first_token: str = "target",
    seed: int = 0,
) -> pd.DataFrame:
    """Tokens per call of two studies with the difference's 95 % bootstrap interval (BCa).

    Parts of the tables are compared where model, domain, temperature and kind of draft agree; of
    several forms ``cp`` is. What only one value of is in each table may differ: two models on one
    corpus, one model on two corpora. A context's value at a rank is that of its best fit;
    contexts that both tables have are compared one by one (then the others are left out), otherwise
    means are. Documents are what is resampled.

    Parameters
    ----------
    first, second : pandas.DataFrame
        Of `run_study`.
    rule, first_token : str
    seed : int
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Per (compared, horizon, rank): `first`, `second` (mean tokens per call), `difference`
        (second minus first), `difference_low`, `difference_high` (NaN where one
        context is all there is), `paired`, `shared_contexts`, and
        `truncated`: whether joints of either study are, so that these are means of lower bounds;
        `sampled`: whether tokens per call of either study are estimates instead.

    Raises
    ------
    ValueError
        If the tables have other columns, or nothing in common that could be compared.

    Examples
    --------
    >>> row = dict(model="m", domain="d", context_text="a", temperature=1.0, anchored=False)
    >>> row |= dict(horizon=2, rank=1, status="ok")
    >>> def table(value):
    ...     contexts = [dict(document=str(c), context=c) for c in range(9)]
    ...     rows = pd.DataFrame([row | context for context in contexts])
    ...     return rows.assign(tokens_per_call_block_target=value)
    >>> compare_studies(table(1.5), table(1.75))["difference"].tolist()
    [0.25]
    """
    column = f"tokens_per_call_{rule}_{first_token}"
    for table in (first, second):
        missing = [
            name
            for name in (*_SHARED, "model", "horizon", "rank", "status", column)
            if name not in table
        ]
        if missing:
            raise ValueError(
                f"the table has no column {', '.join(missing)}: expected a table of run_study of "
                "this version"
            )
    rows = []
    # Of several forms cp is compared.
    first, second = reference_form(first), reference_form(second)
    for name, part, other in _matching_parts(first, second):
        values = [_values(table, column) for table in (part, other)]
        for horizon, rank in sorted(set(values[0].columns) & set(values[1].columns)):
            before, after = (v[horizon, rank].dropna() for v in values)
            found = {"compared": name, "horizon": horizon, "rank": rank}
            found |= _difference(before, after, seed)
            ways = [_ways(table, horizon, column) for table in (part, other)]
            flags = {name: any(name in way for way in ways) for name in ("truncated", "sampled")}
            rows.append(found | flags)
    if not rows:
        raise ValueError(
            "the studies have no horizon and rank of the same model and domain in common"
        )
    return pd.DataFrame(rows)


def _matching_parts(first: pd.DataFrame, second: pd.DataFrame):
    """Parts that agree in all that varies; what each table has one value of only may differ."""
    free = [name for name in _SETTING if first[name].nunique() == 1 and second[name].nunique() == 1]
    keys = [name for name in _SETTING if name not in free]
    named = [
        f"{_told(n, first[n].iloc[0])} against {_told(n, second[n].iloc[0])}"
        for n in free
        if first[n].iloc[0] != second[n].iloc[0]
    ]
    same = [
        str(first[n].iloc[0])
        for n in ("model", "domain")
        if n in free and first[n].iloc[0] == second[n].iloc[0]
    ]
    if not keys:
        yield ", ".join([*named, *same]), first, second
        return
    others = {key: part for key, part in second.groupby(keys, sort=False)}
    for key, part in first.groupby(keys, sort=False):
        if key in others:
            told = [_told(n, k) for n, k in zip(keys, key, strict=True)]
            yield ", ".join([*told, *named, *same]), part, others[key]


def _ways(table: pd.DataFrame, horizon: int, column: str) -> set[str]:
    """How the figures of a horizon that are not exact were computed."""
    here = table[(table["horizon"] == horizon) & table[column].notna()]
    if "joint" not in table:
        return set()
    sampled = sampled_rows(here)
    bounds = (here["joint"] == "tree") & ~sampled
    return {name for name, rows in (("truncated", bounds), ("sampled", sampled)) if rows.any()}


def _told(name: str, value: object) -> str:
    """A value of what may differ, in words."""
    if name == "anchored":
        return "anchored drafts" if value else "unanchored drafts"
    return f"temperature {value}" if name == "temperature" else str(value)


def _values(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Best value any method reached: rows contexts, columns (horizon, rank)."""
    usable = table[(table["status"] != "failed") & table[column].notna()]
    return usable.pivot_table(
        index=_SHARED, columns=["horizon", "rank"], values=column, aggfunc="max"
    )


def _difference(first: pd.Series, second: pd.Series, seed: int) -> dict:
    # Contexts without a text cannot be told to be the same.
    shared = first.index.intersection(second.index)
    shared = shared[shared.get_level_values("context_text") != ""] if len(shared) else shared
    paired = len(shared) > 0
    if paired:
        first, second = first[shared], second[shared]
        (low,), (high,) = intervals(_clusters(second - first), seed)
    else:
        low, high = difference_interval(_clusters(first), _clusters(second), seed)
    return {
        "first": first.mean(),
        "second": second.mean(),
        "difference": second.mean() - first.mean(),
        "difference_low": low,
        "difference_high": high,
        "paired": paired,
        "shared_contexts": len(shared),
    }


def _clusters(values: pd.Series) -> Clusters:
    return Clusters.of(values.to_frame(), keys=["domain", "document"])
