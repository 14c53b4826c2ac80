"""Means and medians of a study's table over contexts: what the report shows beside the choice."""

from __future__ import annotations

import pandas as pd

from cpmtp.ranking.parts import (
    CONTEXT_KEYS,
    OUTCOME,
    best_fits,
    reference_form,
    require_one_part,
    usable_rows,
)


def method_summary(
    table: pd.DataFrame, column: str = OUTCOME, *, pooled: bool = False
) -> pd.DataFrame:
    """Per (horizon, rank, method): medians and quartiles of the errors, the mean of `column`,
    failures and seconds; of one part of a table unless `pooled`, as for `select_rank`.
    """
    require_one_part(table, pooled=pooled)
    usable = table.assign(
        failed=table["status"] == "failed", not_converged=table["status"] == "not_converged"
    )
    grouped = usable.groupby(["horizon", "rank", "method"])
    summary = grouped.agg(
        contexts=("context", "size"),
        failed=("failed", "sum"),
        not_converged=("not_converged", "sum"),
        kl_nats=("kl_nats", lambda v: v.quantile(0.5, interpolation="lower")),
        # Without interpolation: a squared-error fit that misses what P has is infinitely far from
        # it.
        kl_nats_low=("kl_nats", lambda v: v.quantile(0.25, interpolation="lower")),
        kl_nats_high=("kl_nats", lambda v: v.quantile(0.75, interpolation="higher")),
        total_variation=("total_variation", "median"),
        relative_frobenius=("relative_frobenius", "median"),
        tokens_per_call=(column, "mean"),
        fit_seconds=("fit_seconds", "median"),
    )
    return summary.reset_index()


def survival_by_rank(
    table: pd.DataFrame,
    rule: str = "block",
    first_token: str = "target",
    *,
    pooled: bool = False,
) -> pd.DataFrame:
    """Mean survival per (horizon, rank, position), each context represented by its best method; of
    one part of a table unless `pooled`. Where joints are truncated it is that of the lower bounds.
    """
    require_one_part(table, pooled=pooled)
    best = best_fits(table, column=f"tokens_per_call_{rule}_{first_token}")
    prefix = f"survival_{rule}_{first_token}_"
    positions = [name for name in best if name.startswith(prefix)]
    means = best.groupby(["horizon", "rank"])[positions].mean()
    long = (
        means.rename(columns=lambda name: int(name.removeprefix(prefix)))
        .rename_axis(columns="position")
        .stack()
    )
    return long.dropna().rename("survival").reset_index()


def objective_gap(table: pd.DataFrame, column: str = OUTCOME) -> pd.DataFrame:
    """Where tokens per call are lost before any learning: the exact limit, the fit by tokens per
    call, the fit by divergence.

    Returns
    -------
    pandas.DataFrame
        Per (model, domain, horizon, rank) on contexts where both methods gave an answer:
        `exact_limit`, `acceptance_fit`, `em_fit`, `lost_to_rank`, `lost_to_objective`, `contexts`.
        Empty where a method is missing.
    """
    keys = ["model", "domain", "horizon", "rank"]
    table = reference_form(table)  # of several forms that of cp
    usable = table[(table["status"] != "failed") & table["method"].isin(["acceptance", "em"])]
    wide = usable.pivot_table(index=[*keys, "document", "context"], columns="method", values=column)
    if set(wide.columns) != {"acceptance", "em"}:
        return pd.DataFrame(columns=[*keys, "exact_limit", "acceptance_fit", "em_fit"])
    grouped = wide.dropna().groupby(level=keys)
    means = (
        grouped.mean()
        .rename(columns={"acceptance": "acceptance_fit", "em": "em_fit"})
        .reset_index()
    )
    means.insert(len(keys), "exact_limit", means["horizon"].astype(float))
    means["lost_to_rank"] = means["exact_limit"] - means["acceptance_fit"]
    means["lost_to_objective"] = means["acceptance_fit"] - means["em_fit"]
    return means.assign(contexts=grouped.size().to_numpy()).rename_axis(columns=None)


def partial_gains(table: pd.DataFrame, method: str, *, column: str = OUTCOME) -> pd.Series:
    """What a method that only some contexts were fitted by earns there beyond all others, on
    average of those contexts, by horizon and rank.

    Raises
    ------
    ValueError
        If no context has such a fit and another one.
    """
    keys = [*CONTEXT_KEYS, "horizon", "rank"]
    own, others = (
        usable_rows(rows, column).groupby(keys)[column].max()
        for rows in (table[table["method"] == method], table[table["method"] != method])
    )
    gains = (own - others).dropna().clip(lower=0)
    return gains.groupby(["horizon", "rank"]).mean()
