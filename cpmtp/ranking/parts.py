"""What a choice is made for, one model and kind of text and draft at a time, and a context's best
fit.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

OUTCOME = "tokens_per_call_block_target"
CONTEXT_KEYS = ["model", "domain", "document", "context"]
# What a table may hold several of and a choice is made for one of, with the plural in words.
PARTS = {
    "model": "models",
    "domain": "domains",
    "temperature": "temperatures",
    "anchored": "kinds of draft (anchored True and False)",
    "form": "forms",
    "transition_rank": "transition ranks",
}
_KINDS = ("temperature", "anchored", "form", "transition_rank")


def best_fits(table: pd.DataFrame, *, column: str = OUTCOME) -> pd.DataFrame:
    """The rows of the best method of every context, horizon and rank.

    A study's table has a row per method, good and bad ones: a mean over all of them is no ceiling.
    Of these rows it is, ``best_fits(table).groupby(["model", "rank"]).mean(numeric_only=True)``.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `run_study` or `read_study`; its column `best` marks the same rows where
        every context was fitted by the same methods.
    column : str
        What is to be high.

    Returns
    -------
    pandas.DataFrame
        One row per model, domain, document, context, temperature, kind of draft (anchored or not,
        form, transition rank), horizon and rank, in the table's order. Failed fits are never among
        them; where methods tie, the first is taken.

    Raises
    ------
    ValueError
        If a column is missing or no row is usable.

    Examples
    --------
    >>> row = dict(model="m", domain="d", document="a", context=0, horizon=2, rank=1, status="ok")
    >>> rows = [row | dict(method="als", tokens_per_call_block_target=1.2)]
    >>> rows += [row | dict(method="em", tokens_per_call_block_target=1.5)]
    >>> best_fits(pd.DataFrame(rows))["method"].tolist()
    ['em']
    """
    usable = usable_rows(table, column)
    kinds = [name for name in _KINDS if name in table]
    groups = usable.reset_index(drop=True).groupby(
        [*CONTEXT_KEYS, *kinds, "horizon", "rank"], sort=False, dropna=False
    )
    return usable.iloc[sorted(groups[column].idxmax())]


def usable_rows(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Rows whose fit did not fail and that have a value.

    Methods that only some contexts were fitted by, where there are others, are left out: a mean
    over contexts compares like with like.

    Raises
    ------
    ValueError
        If a column is missing or no row is usable.
    """
    needed = (*CONTEXT_KEYS, "horizon", "rank", "method", "status", column)
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(
            f"the table has no column {', '.join(missing)}: expected a table of run_study"
        )
    usable = table[(table["status"] != "failed") & table[column].notna() & ~_is_partial(table)]
    if usable.empty:
        raise ValueError("the table has no usable row: every fit failed; look at the messages")
    return usable


def partial_methods(table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Methods that means over contexts leave out, since only some contexts were fitted by them: how
    many, of how many.

    Examples
    --------
    >>> row = dict(model="m", domain="d", document="a", horizon=2)
    >>> rows = [row | dict(context=i, method="em") for i in range(3)]
    >>> partial_methods(pd.DataFrame([*rows, rows[0] | dict(method="acceptance")]))
    {'acceptance': (1, 3)}
    """
    rows = table[_is_partial(table)]
    every = len(table[CONTEXT_KEYS].drop_duplicates())
    counted = rows[[*CONTEXT_KEYS, "method"]].drop_duplicates().groupby("method").size()
    return {str(method): (int(count), every) for method, count in counted.items()}


def _is_partial(table: pd.DataFrame) -> np.ndarray:
    """Rows of a method that other contexts of the same horizon and kind of draft lack, unless every
    method is like that; (rows,) bool.
    """
    kinds = [name for name in _KINDS if name in table]
    places = ["model", "domain", *kinds, "horizon"]
    columns = [*dict.fromkeys([*places, *CONTEXT_KEYS]), "method"]
    once = table[columns].drop_duplicates()
    contexts = once.drop(columns="method").drop_duplicates().groupby(places, dropna=False).size()
    counts = once.groupby([*places, "method"], dropna=False).size().rename("fitted").reset_index()
    counts = counts.merge(contexts.rename("there").reset_index(), on=places)
    counts["partial"] = counts["fitted"] < counts["there"]
    whole = counts.groupby(places, dropna=False)["partial"].transform("all")
    counts["partial"] &= ~whole
    found = table[[*places, "method"]].merge(counts, on=[*places, "method"], how="left")
    return found["partial"].to_numpy(dtype=bool)


def require_one_part(table: pd.DataFrame, *, pooled: bool) -> None:
    """Refuse a table of several models, domains, temperatures or kinds of draft unless they are to
    be pooled.

    Raises
    ------
    ValueError
        If there are several and they are not.
    """
    for name, several in PARTS.items():
        values = table[name].unique().tolist() if name in table and not pooled else []
        if len(values) > 1:
            told = "" if name == "anchored" else f" ({', '.join(map(str, values[:5]))})"
            raise ValueError(
                f"the table holds several {several}{told}: select one, as in "
                f"table[table[{name!r}] == {values[0]!r}], or pass pooled=True to take them "
                "together"
            )


def several_kinds(table: pd.DataFrame) -> list[str]:
    """Columns beside model and domain that the table has several values of."""
    return [name for name in _KINDS if name in table and table[name].nunique() > 1]


def reference_form(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``cp`` where there are any, else those of the first form and transition rank:
    forms side by side are `form_summary`'s.
    """
    if not several_kinds(table[[n for n in ("form", "transition_rank") if n in table]]):
        return table
    if (table["form"] == "cp").any():
        return table[table["form"] == "cp"]
    first = table.iloc[0]
    same = (table["form"] == first["form"]) & (table["transition_rank"] == first["transition_rank"])
    return table[same]


def table_parts(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """The parts of a table that a rank is chosen for, each with its name.

    Returns
    -------
    list of ((model, domain), table)
        The domain with the temperature and kind of draft where the table has several.
    """
    keys = several_kinds(table)
    found = []
    for (model, domain, *others), part in table.groupby(["model", "domain", *keys], sort=False):
        told = dict(zip(keys, others, strict=True))
        notes = [f"temperature {told['temperature']:g}"] if "temperature" in told else []
        notes += (
            [("anchored" if told["anchored"] else "unanchored") + " drafts"]
            if "anchored" in told
            else []
        )
        notes += [str(told["form"])] if "form" in told else []
        notes += (
            [f"transition rank {told['transition_rank']}"] if told.get("transition_rank") else []
        )
        found.append(((model, ", ".join([domain, *notes])), part))
    return found
