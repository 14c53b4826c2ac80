"""The files that other tools read, each thin, and all back into the one table.

Model names, texts and versions are in files that have a place for them, as JSON strings; files of
arguments hold numbers alone. Fields are those the formats document: see `docs/exports.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmtp.report.exports.acceptance_table import (
    KINDS,
    MEASURED,
    AcceptanceTable,
    DraftedFor,
)
from cpmtp.whole_files import write_text

TABLE_VERSION = 1
_PROFILE_VERSION = "1.0"
_DRAFTED, _RATES, _SCHEDULE = (
    "num_speculative_tokens",
    "synthetic_acceptance_rates",
    "num_speculative_tokens_per_batch_size",
)


@dataclass(frozen=True)
class Format:
    """A file that another tool reads.

    Attributes
    ----------
    file : str
        What it is called unless it is given a name.
    written : callable
        A table as the file's text.
    rates : callable
        The file's text to the rates it holds; None where it holds their sum alone.
    use : str
        What to do with the file.
    """

    file: str
    written: Callable[[AcceptanceTable], str]
    rates: Callable[[str], tuple[float, ...]] | None
    use: str


def _speculative_config(table: AcceptanceTable) -> str:
    found: dict[str, Any] = {_DRAFTED: table.drafted}
    found |= {"rejection_sample_method": "synthetic", _RATES: list(table.rates)}
    if table.schedule:
        found[_SCHEDULE] = [[one.first, one.last, one.drafted] for one in table.schedule]
    return _json(found)


def _arguments(table: AcceptanceTable) -> str:
    rates = ",".join(f"{rate:.6f}" for rate in table.rates)
    return f"--spec-draft-n-max {table.drafted} --spec-synth-rates {rates}\n"


def _rates_of_arguments(text: str) -> tuple[float, ...]:
    words = text.split()
    return tuple(float(rate) for rate in words[words.index("--spec-synth-rates") + 1].split(","))


def _profile(table: AcceptanceTable) -> str:
    told = table.conditions
    rule = {"token": "longest_prefix"}.get(told.get("rule", ""), told.get("rule"))
    lengths = table.by_drafted or {table.drafted: table.mean_length}
    found = {
        "schema_version": _PROFILE_VERSION,
        "measured": table.kind == MEASURED,
        "method": told.get("draft"),
        "draft_checkpoint": None,
        "target_model": {"name": told.get("model"), "sha256": told.get("model_sha256")},
        _DRAFTED: table.drafted,
        "block_size": table.drafted + 1,
        "max_supported_k": table.drafted,
        "verification_method": rule,
        "conditional_accept_rates": list(table.conditional),
        "marginal_accept_rates": list(table.rates),
        "mean_accept_length": table.mean_length,
        "mean_accept_length_per_request": None,
        "accept_length_model": "measured_per_k",
        "accept_length_by_k": {str(k): length for k, length in sorted(lengths.items())},
        "acceptance_length_histogram": None,
        "per_category": None,
        "measurement_conditions": {"kind": KINDS[table.kind], **told},
        "validation": None,
    }
    return _json(found)


def _estimator_settings(table: AcceptanceTable) -> str:
    return f"nextn: {table.drafted}\nnextn_accepted: {table.accepted}\n"


FORMATS = {
    "vllm": Format(
        "speculative_config.json",
        _speculative_config,
        lambda text: tuple(json.loads(text)[_RATES]),
        'vllm serve … --speculative-config "$(cat {file})", with the method and draft model added',
    ),
    "llama.cpp": Format(
        "llama_cpp_arguments.txt",
        _arguments,
        _rates_of_arguments,
        "llama-server … $(cat {file}), with a draft model; it replaces the acceptance decision",
    ),
    "speculation-profile": Format(
        "speculation_profile.json",
        _profile,
        lambda text: tuple(json.loads(text)["marginal_accept_rates"]),
        "ship {file} with the draft's weights",
    ),
    "aiconfigurator": Format(
        "aiconfigurator.yaml",
        _estimator_settings,
        None,
        "the two lines of {file} into an experiment's config, or as --nextn and --nextn-accepted",
    ),
}


def format_of(name: str) -> Format:
    """The format of this name.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"no format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def write_export(table: AcceptanceTable, to: str, path: str | Path) -> tuple[Path, Path]:
    """Write a table for a tool, and beside it the whole table with its conditions.

    Parameters
    ----------
    table : AcceptanceTable
    to : {"vllm", "llama.cpp", "speculation-profile", "aiconfigurator"}
    path : path
        The tool's file; the table's is named after it, `NAME.table.json`.

    Returns
    -------
    (Path, Path)
        Both files.

    Raises
    ------
    ValueError
        If the format is unknown.
    """
    path = Path(path)
    whole = path.with_name(f"{path.name}.table.json")
    written = write_text(path, format_of(to).written(table))
    return written, write_text(whole, _json(_as_told(table)))


def read_table(path: str | Path) -> AcceptanceTable:
    """The table that `write_export` left beside a tool's file.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        return AcceptanceTable(
            tuple(found["rates"]),
            found["kind"],
            found["conditions"],
            {int(k): length for k, length in found["mean_length_by_drafted"].items()},
            tuple(DraftedFor(*one) for one in found["drafted_by_batch"]),
        )
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r}: {error}; expected a table as `cpmtp export` writes it"
        ) from error


def _as_told(table: AcceptanceTable) -> Mapping[str, Any]:
    return {
        "table_version": TABLE_VERSION,
        "kind": table.kind,
        "kind_in_words": KINDS[table.kind],
        "drafted_tokens": table.drafted,
        "rates": list(table.rates),
        "conditional_rates": list(table.conditional),
        "nextn_accepted": table.accepted,
        "mean_length": table.mean_length,
        "mean_length_by_drafted": {str(k): length for k, length in table.by_drafted.items()},
        "drafted_by_batch": [[one.first, one.last, one.drafted] for one in table.schedule],
        "conditions": table.conditions,
    }


def _json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
