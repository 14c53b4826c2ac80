"""What components say, at one context of every model: the most telling thing there is to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cpmtp.whole_files import write_parquet

FILE = "components.parquet"
_RANK, _TOKENS = 4, 6


def write_components(settings, out: Path, table: pd.DataFrame, *, seconds: float) -> None:
    """Fit rank 4, not told the first token, to the middle one of every model's contexts (by what
    rank 1 earns) and keep its components' tokens; what would take long, or has no text, is left
    out.

    Parameters
    ----------
    settings : StudySettings
    out : path
        The study's folder; gets `components.parquet`.
    table : pandas.DataFrame
        Of the study.
    seconds : float
        For each model's joint and fit; where the study's own took longer there is none.
    """
    found = []
    for name in settings.models:
        rows = table[(table["model"] == name) & (table["status"] != "failed")]
        rows = rows[rows["form"] == "cp"]
        if len(rows):
            found += _of_model(settings, name, rows, seconds)
    if found:
        write_parquet(out / FILE, pd.concat(found, ignore_index=True))


def _of_model(settings, name: str, rows: pd.DataFrame, seconds: float) -> list[pd.DataFrame]:
    import cpmtp
    from cpmtp.language_model import writes_text
    from cpmtp.study.models import open_language_model
    from cpmtp.study.plan import StudyUnit, tree_horizons
    from cpmtp.study.rows import unit_joint

    horizon = int(rows["horizon"].max())
    of_horizon = rows[(rows["horizon"] == horizon) & (rows["rank"] == rows["rank"].min())]
    middle = of_horizon.sort_values("tokens_per_call_block_target").iloc[(len(of_horizon) - 1) // 2]
    own = rows[(rows["context"] == middle["context"]) & (rows["domain"] == middle["domain"])]
    if own["joint_seconds"].max() + own["fit_seconds"].max() > seconds:
        return []
    lm: Any = open_language_model(name, settings.device, settings.dtype)
    text = str(middle["context_text"])
    reads = getattr(lm, "encode", None) or getattr(lm, "encode_document", None)
    if not writes_text(lm) or not text or reads is None:
        return []
    ids = tuple(int(token) for token in reads(text).tolist())
    unit = StudyUnit(
        *(name, str(middle["domain"]), str(middle["document"]), int(middle["context"]), ids, text),
        temperature=settings.temperatures[0],
        trees=tree_horizons(lm.vocab_size, settings),
    )
    joint, _ = unit_joint(settings, unit, lm, horizon)
    if isinstance(joint, Exception):
        return []
    fit = cpmtp.fit(joint, rank=_RANK, method="em", seed=settings.seed)
    where = {"model": name, "domain": unit.domain, "context_text": text, "horizon": horizon}
    return [fit.top_tokens(lm, _TOKENS).assign(**where)]
