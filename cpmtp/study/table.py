"""The columns of a study's table, and Parquet files of one context's rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cpmtp.study.settings import StudySettings
from cpmtp.whole_files import write_parquet

SCHEMA_VERSION = 5
RULES = ("token", "block", "coupling")
FIRST_TOKENS = ("target", "draft")
TIMING_COLUMNS = ("joint_seconds", "fit_seconds")
# What identifies a row.
KEY_COLUMNS = (
    "model",
    "domain",
    "document",
    "context",
    "temperature",
    "horizon",
    "rank",
    "method",
    "anchored",
    "form",
    "transition_rank",
)

# Of methods that share all of these, one is the best.
_BEST_OF = tuple(name for name in KEY_COLUMNS if name != "method")
_OUTCOME = "tokens_per_call_block_target"

_FIXED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "schema_version": (pa.int64(), "version of this list of columns"),
    "model": (pa.string(), "as it was named in the settings"),
    "domain": (pa.string(), "named corpus the context was cut from, or 'own samples'"),
    "document": (
        pa.string(),
        "file or sample the context was cut from; contexts of one document are one cluster",
    ),
    "context": (pa.int64(), "number of the context within model and domain"),
    "context_text": (pa.string(), "the context, decoded; empty where the model does not decode"),
    "context_tokens": (pa.int64(), "its length in tokens"),
    "context_bytes": (
        pa.int64(),
        "UTF-8 bytes of its text after the first token; 0 where the model does not decode",
    ),
    "context_nats": (
        pa.float64(),
        "-log p of its tokens after the first, each given those before it in the context, nats",
    ),
    "domain_bits_per_byte": (
        pa.float64(),
        "bits per byte of all contexts of this model and domain: how far the text is from what "
        "the model knows",
    ),
    "temperature": (pa.float64(), "of the target's law"),
    "top_k": (pa.float64(), "tokens that the target's law keeps; absent: all"),
    "top_p": (pa.float64(), "mass of the tokens that the target's law keeps; absent: all"),
    "horizon": (pa.int64(), "number of tokens the joint covers, n"),
    "rank": (pa.int64(), "number of components of the draft, r"),
    "method": (pa.string(), "of the fit"),
    "anchored": (pa.bool_(), "whether the draft is told the first token"),
    "form": (pa.string(), "family of the draft: cp, markov, markov_mixture or hmm"),
    "transition_rank": (pa.int64(), "rank of the token-to-token correction, k; 0: none"),
    "gated": (pa.bool_(), "whether every first token scales the correction by gates of its own"),
    "restarts": (pa.int64(), "random starts; the best is kept"),
    "status": (pa.string(), "ok, not_converged or failed"),
    "message": (pa.string(), "why it is not ok"),
    "best": (
        pa.bool_(),
        "whether this method gives the most tokens per call (block rule, first token from the "
        "target) of its context, temperature, horizon, rank, form and kind of draft; one row of "
        "each",
    ),
    "converged": (pa.float64(), "1 if the fit met its tolerance, else 0"),
    "iterations": (pa.float64(), "passes over the joint"),
    "parameters": (pa.float64(), "free parameters of the draft"),
    "free_numbers": (
        pa.float64(),
        "what a head would have to output for one context (anchored: and first token)",
    ),
    "shared_numbers": (
        pa.float64(),
        "left and right factors: what a head would store",
    ),
    "serial_steps": (pa.float64(), "draws that must follow each other to draft a block"),
    "objective": (pa.float64(), "what the method minimises, in its own unit"),
    "kl_nats": (
        pa.float64(),
        "KL divergence from the exact joint to the draft, nats; of a truncated joint: absent",
    ),
    "kl_floor_nats": (
        pa.float64(),
        "divergence that no draft of this rank goes below, nats; of a tree: absent",
    ),
    "total_variation": (pa.float64(), "half the sum of |P - Q|"),
    "relative_frobenius": (pa.float64(), "Frobenius norm of P - Q over that of P"),
    "hellinger": (pa.float64(), "Hellinger distance"),
    "raw_relative_error": (
        pa.float64(),
        "relative_frobenius of a squared-error method's raw answer",
    ),
    "negative_mass": (
        pa.float64(),
        "sum of the raw answer's negative entries, as a positive number",
    ),
    "mass_deficit": (pa.float64(), "1 minus the sum of the raw answer"),
    "joint": (
        pa.string(),
        "what drafts are fitted to: dense; complete: a tree of all mass but 1e-9; tree: a "
        "truncated joint",
    ),
    "computed": (
        pa.string(),
        "how tokens per call and survival were. complete: exact; certified: lower bounds, with "
        "upper ones of tokens per call beside; sampled: estimates from sampled texts, with 95 % "
        "intervals of tokens per call, under the token and block rules alone",
    ),
    "kept_mass": (
        pa.float64(),
        "probability of the sequences the joint holds; 1 where it is dense",
    ),
    "joint_entropy_nats": (pa.float64(), "entropy of the exact joint, nats; of a tree: absent"),
    "first_token_entropy_nats": (pa.float64(), "entropy of the first token's law, nats"),
    "total_correlation_nats": (
        pa.float64(),
        "sum of the marginals' entropies minus the joint's; the KL floor of rank 1",
    ),
    "beyond_one_token_nats": (
        pa.float64(),
        "sum of I(x_i; x_<i-1 | x_{i-1}), nats: divergence of the chain of the joint's own "
        "conditionals, which no Markov draft goes below; absent where only cp was studied",
    ),
    "beyond_one_token_nats_anchored": (pa.float64(), "the same where the first token is told"),
    "markov_tokens_per_call": (
        pa.float64(),
        "what that chain earns (block rule, first token from the target)",
    ),
    "markov_tokens_per_call_anchored": (pa.float64(), "the same where the first token is told"),
    "joint_seconds": (pa.float64(), "time for the exact joint or tree of this context"),
    "fit_seconds": (
        pa.float64(),
        "time for this fit; acceptance: from the em fit it begins from, where em is a method, too",
    ),
}


def column_descriptions(longest_horizon: int = 3) -> dict[str, str]:
    """What each column means, in the table's order.

    Examples
    --------
    >>> column_descriptions()["rank"]
    'number of components of the draft, r'
    """
    return {
        field.name: field.metadata[b"description"].decode() for field in _schema(longest_horizon)
    }


def table_schema(settings: StudySettings) -> pa.Schema:
    """Names, types and descriptions of the table's columns."""
    return _schema(max(settings.horizons))


@lru_cache(maxsize=8)
def _plain_schema(longest_horizon: int) -> pa.Schema:
    """Without the descriptions: they would be the larger part of a small file."""
    return pa.schema([pa.field(field.name, field.type) for field in _schema(longest_horizon)])


@lru_cache(maxsize=8)
def _schema(longest_horizon: int) -> pa.Schema:
    columns = dict(_FIXED_COLUMNS)
    timing = {name: columns.pop(name) for name in TIMING_COLUMNS}
    for rule in RULES:
        for first in FIRST_TOKENS:
            told = f"under the {rule} rule, first token from the {first}"
            columns[f"tokens_per_call_{rule}_{first}"] = (
                pa.float64(),
                f"expected tokens per call of the target {told}: exact, a certified lower bound or "
                "an estimate, as `computed` says",
            )
            for end in ("lower", "upper"):
                columns[f"tokens_per_call_{end}_{rule}_{first}"] = (
                    pa.float64(),
                    f"the same {told}: certified {end} bound; where sampled the {end} end of the "
                    "95 % interval",
                )
    for rule in RULES:
        for first in FIRST_TOKENS:
            for k in range(1, longest_horizon + 1):
                what = (
                    f"probability that the first {k} tokens survive under the {rule} rule, "
                    f"first token from the {first}"
                )
                columns[f"survival_{rule}_{first}_{k}"] = (pa.float64(), what)
    fields = [
        pa.field(name, kind, metadata={"description": text})
        for name, (kind, text) in (columns | timing).items()
    ]
    return pa.schema(fields, metadata={"cpmtp_schema_version": str(SCHEMA_VERSION)})


_MISSING: dict = {pa.string(): "", pa.int64(): 0, pa.bool_(): False}


def rows_to_table(rows: Sequence[dict], settings: StudySettings) -> pa.Table:
    """Rows with whatever columns they have; numbers that are not there are NaN."""
    schema = _plain_schema(max(settings.horizons))
    numbers = [field.name for field in schema if field.type == pa.float64()]
    # One NumPy array for most of the table: lists column by column took as long as writing the
    # file.
    values = np.array(
        [[row.get(name, math.nan) for name in numbers] for row in rows], dtype=np.float64
    ).T.copy()
    columns = dict(zip(numbers, values, strict=True))
    arrays = []
    for field in schema:
        if field.name in columns:
            arrays.append(pa.array(columns[field.name], field.type, from_pandas=False))
        else:
            missing = _MISSING[field.type]
            arrays.append(pa.array([row.get(field.name, missing) for row in rows], field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def is_best(table: pd.DataFrame) -> np.ndarray:
    """The column `best` of a table, (rows,) bool; of methods that tie the first."""
    found = np.zeros(len(table), dtype=bool)
    usable = np.flatnonzero((table["status"] != "failed") & table[_OUTCOME].notna())
    rows = table.iloc[usable].reset_index(drop=True)
    groups = rows.groupby(list(_BEST_OF), sort=False, dropna=False, observed=True)
    found[usable[groups[_OUTCOME].idxmax().to_numpy(dtype=int)]] = True
    return found


def with_best(table: pa.Table) -> pa.Table:
    """The table with its column `best` filled in."""
    columns = table.select([*_BEST_OF, "status", _OUTCOME])
    best = is_best(columns.to_pandas(strings_to_categorical=True))
    index = table.schema.get_field_index("best")
    return table.set_column(index, table.schema.field(index), pa.array(best))


def write_part(path: Path, table: pa.Table) -> None:
    """Write one context's rows with their digest.

    Not forced to the disk: what a power cut spoils is noticed when it is read.
    """
    signed = table.replace_schema_metadata({_DIGEST: _digest(table)})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    write_parquet(path, signed, forced=False, **options)


def read_part(path: Path, settings: StudySettings, rows: int) -> pa.Table:
    """Read one context's rows, or raise a ValueError that says what is wrong with the file."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            table = file.read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from error
    schema = _plain_schema(max(settings.horizons))
    if not table.schema.equals(schema) or len(table) != rows:
        raise ValueError(f"{len(table)} rows of other columns than expected")
    if (table.schema.metadata or {}).get(_DIGEST) != _digest(table):
        raise ValueError("its contents are not what was written")
    return pa.Table.from_arrays(table.columns, schema=schema)


def packed(table: pa.Table) -> bytes:
    """A small table in one piece: thousands of them as Arrow tables take several times their
    values' room.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def joined(parts: list[bytes], settings: StudySettings) -> pa.Table:
    """One table out of packed ones, with the columns' descriptions; `parts` is emptied, so that
    both are not held at once.
    """
    groups, waiting = [], []
    parts.reverse()
    while parts:
        waiting.append(pa.ipc.open_stream(parts.pop()).read_all())
        if len(waiting) == 256:
            groups.append(pa.concat_tables(waiting).combine_chunks())
            waiting = []
    table = pa.concat_tables([*groups, *waiting]).combine_chunks()
    return pa.Table.from_arrays(table.columns, schema=table_schema(settings))


_DIGEST = b"cpmtp_content_sha256"


def _digest(table: pa.Table) -> bytes:
    """SHA-256 of all values; Parquet's own checksums leave out what is not in a page."""
    digest = hashlib.sha256()
    for column in table.columns:
        values = column.to_numpy()
        digest.update(
            json.dumps(values.tolist()).encode() if values.dtype == object else values.tobytes()
        )
    return digest.hexdigest().encode()
