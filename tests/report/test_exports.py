"""What serving tools are given: fields, ranges, round trips, names that mean mischief."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from command_line import run
from samples import MANIFEST, study_table
from scipy.optimize import isotonic_regression
from stored_forecast import LOAD, stored

from cpmtp.latency import LatencyModel, MeasuredLatency
from cpmtp.report.exports.acceptance_table import (
    KINDS,
    AcceptanceTable,
    DraftedFor,
    never_rising,
    rates_of_lengths,
)
from cpmtp.report.exports.formats import FORMATS, read_table, write_export
from cpmtp.report.exports.of_decoding import table_of_decoding
from cpmtp.report.exports.of_forecast import table_of_forecast
from cpmtp.report.exports.of_study import table_of_study
from cpmtp.report.exports.wanted import Wanted
from cpmtp.report.first_screen.stored_forecast import HeadsForecast

HOSTILE = (
    'quo"te',
    "apo'strophe",
    "two\nlines\r\n--spec-draft-n-max 99",
    "nextn: 9\n",
    "大小 ñ \u202e",
    "  spaces  ",
    "$(touch mischief) `id`; | & > x",
    "</script>",
    "back\\slash \\udc80",
    "no text \udc80",
    "\x00\x07",
)
VLLM = {
    "num_speculative_tokens",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
    "num_speculative_tokens_per_batch_size",
}
PROFILE = {
    *("schema_version", "measured", "method", "draft_checkpoint", "target_model", "block_size"),
    *("num_speculative_tokens", "max_supported_k", "verification_method"),
    *("conditional_accept_rates", "marginal_accept_rates", "mean_accept_length"),
    *("mean_accept_length_per_request", "accept_length_model", "accept_length_by_k"),
    *("acceptance_length_histogram", "per_category", "measurement_conditions", "validation"),
}


def random_table(seed: int, name: str = "m") -> AcceptanceTable:
    chance = np.random.default_rng(seed)
    rates = never_rising(chance.random(1 + seed % 7).tolist())
    kind = list(KINDS)[seed % 3]
    told = {"model": name, "draft": name, "rule": ("token", "block")[seed % 2], "texts": name}
    schedule = (DraftedFor(1, 4, len(rates)), DraftedFor(5, 64, 0)) if seed % 2 else ()
    return AcceptanceTable(rates, kind, told, {len(rates): 1.5}, schedule)


def written(folder, table: AcceptanceTable, to: str) -> str:
    return write_export(table, to, folder / "file")[0].read_text("utf-8")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_reads_back_to_the_same_table(to, seed, tmp_path):
    table = random_table(seed)
    file, whole = write_export(table, to, tmp_path / "file")
    assert read_table(whole) == table
    read = FORMATS[to].rates
    assert read is None or read(file.read_text("utf-8")) == table.rates


def test_the_engine_gets_the_fields_it_documents(tmp_path):
    table = AcceptanceTable((0.9, 0.5), "forecast", {"model": "m"}, {}, (DraftedFor(1, 8, 2),))
    found = json.loads(written(tmp_path, table, "vllm"))
    assert set(found) == VLLM
    assert found["num_speculative_tokens"] == len(found["synthetic_acceptance_rates"]) == 2
    assert found["rejection_sample_method"] == "synthetic"
    assert found["num_speculative_tokens_per_batch_size"] == [[1, 8, 2]]
    without = json.loads(written(tmp_path, AcceptanceTable((0.9,), "measured"), "vllm"))
    assert set(without) == VLLM - {"num_speculative_tokens_per_batch_size"}


def test_the_profile_has_both_conventions_and_says_whether_it_was_measured(tmp_path):
    lengths = {1: 1.9, 2: 2.4}
    for kind in KINDS:
        told = {"model": "m", "rule": "block", "texts": "own samples"}
        found = json.loads(
            written(
                tmp_path, AcceptanceTable((0.9, 0.5), kind, told, lengths), "speculation-profile"
            )
        )
        assert set(found) == PROFILE
        assert found["measured"] is (kind == "measured")
        assert found["measurement_conditions"] == {"kind": KINDS[kind], **told}
    assert found["marginal_accept_rates"] == [0.9, 0.5]
    assert np.cumprod(found["conditional_accept_rates"]) == pytest.approx([0.9, 0.5], abs=1e-5)
    assert found["mean_accept_length"] == pytest.approx(1 + sum(found["marginal_accept_rates"]))
    assert found["accept_length_by_k"] == {"1": 1.9, "2": 2.4}
    assert found["verification_method"] == "block"
    token = AcceptanceTable((0.9,), "measured", {"rule": "token"})
    profile = json.loads(written(tmp_path, token, "speculation-profile"))
    assert profile["verification_method"] == "longest_prefix"


def test_arguments_and_estimators_get_numbers_alone(tmp_path):
    table = AcceptanceTable((0.9, 0.5), "ceiling")
    assert (
        written(tmp_path, table, "llama.cpp")
        == "--spec-draft-n-max 2 --spec-synth-rates 0.900000,0.500000\n"
    )
    assert written(tmp_path, table, "aiconfigurator") == "nextn: 2\nnextn_accepted: 1.4\n"


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_mean_mischief_stay_names(to, name, tmp_path):
    table = random_table(5, name)
    file, whole = write_export(table, to, tmp_path / "file")
    assert read_table(whole) == table
    text = file.read_text("utf-8")
    if to == "speculation-profile":
        assert json.loads(text)["target_model"]["name"] == name
    elif to == "vllm":
        assert set(json.loads(text)) <= VLLM
    elif to == "llama.cpp":
        assert re.fullmatch(r"--spec-draft-n-max \d+ --spec-synth-rates [\d.,]+\n", text)
    else:
        assert re.fullmatch(r"nextn: \d+\nnextn_accepted: [\d.]+\n", text)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((), "no drafted token"),
        ((1.2,), "expected 0 to 1"),
        ((-0.1,), "expected 0 to 1"),
        ((math.nan,), "expected 0 to 1"),
        ((0.5, 0.6), "survive more often"),
    ],
)
def test_rates_that_no_draft_has_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        AcceptanceTable(rates, "measured")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="expected one of ceiling"):
        AcceptanceTable((0.5,), "guessed")


@pytest.mark.parametrize("seed", range(20))
def test_rates_that_rise_by_chance_are_brought_to_the_nearest_that_do_not(seed):
    values = np.random.default_rng(seed).random(6)
    found = never_rising(values.tolist())
    nearest = isotonic_regression(values, increasing=False).x
    assert found == pytest.approx(nearest, abs=1e-6)
    assert sum(found) == pytest.approx(values.sum(), abs=6e-6)


@pytest.mark.parametrize("horizons", [(2, 3, 4, 5), (3, 5), (5,), (2, 5)])
def test_rates_give_the_lengths_they_are_from(horizons):
    survival = np.array([0.8, 0.6, 0.45, 0.3])
    lengths = {n: 1 + survival[: n - 1].sum() for n in horizons}
    rates = rates_of_lengths(lengths)
    assert len(rates) == 4 and all(a >= b for a, b in itertools.pairwise(rates))
    for n, length in lengths.items():
        assert 1 + sum(rates[: n - 1]) == pytest.approx(length, abs=1e-5)
    if horizons == (2, 3, 4, 5):
        assert rates == pytest.approx(survival)
    if horizons == (5,):  # one ratio throughout
        assert np.ptp(np.array(rates[1:]) / rates[:-1]) < 1e-5


def study(horizon: int = 3):
    """Ranks 1 to 8; the second token survives with a third of tokens per call."""
    table = study_table(lambda rank: 0.4 / rank)
    whole = table["tokens_per_call_block_target"]
    return table.assign(
        survival_block_target_3=whole - 1 - table["survival_block_target_2"],
        computed="complete",
        anchored=True,
        temperature=1.0,
    )


def test_a_study_gives_the_means_of_the_best_fits():
    table = study()
    found = table_of_study(table, MANIFEST, Wanted(rank=4))
    rows = table[(table["rank"] == 4) & (table["method"] == "em")]
    wanted = rows[[f"survival_block_target_{k}" for k in (2, 3)]].mean()
    assert found.kind == "ceiling" and found.rates == pytest.approx(wanted, abs=1e-6)
    assert found.mean_length == pytest.approx(rows["tokens_per_call_block_target"].mean(), abs=1e-5)
    told = found.conditions
    assert (told["model"], told["texts"], told["contexts"], told["documents"]) == ("m", "d", 64, 32)
    assert told["versions"] == {"cpmtp": "0"} and told["anchored"] is True
    low, high = told["mean_length_interval"]
    assert low < found.mean_length < high


def test_what_a_study_does_not_have_is_refused():
    with pytest.raises(ValueError, match="no horizon 3 with rank 5: the study has 3 with 1, 3 "):
        table_of_study(study(), MANIFEST, Wanted(rank=5))
    with pytest.raises(ValueError, match="no model 'x' in this study: it has m"):
        table_of_study(study(), MANIFEST, Wanted(model="x"))
    several = pd.concat([study(), study().assign(model="other")])
    with pytest.raises(ValueError, match="choose one with --model and --domain"):
        table_of_study(several, MANIFEST)
    assert table_of_study(several, MANIFEST, Wanted(model="other")).conditions["model"] == "other"


def test_a_forecast_gives_the_differences_of_its_horizons(tmp_path):
    found = HeadsForecast.read(stored(tmp_path))
    table = table_of_forecast(found)
    assert table.kind == "forecast" and table.rates == pytest.approx((0.7, 0.5))
    assert table.conditions["mean_length_interval"] == [1.8, 2.5]
    assert table.conditions["draft"] == "cp, rank 4"
    model = {"name": "m", "fingerprint": "f" * 64, "device": "cpu", "dtype": "float32"}
    of = table_of_forecast(HeadsForecast(found.table, found.told | {"model": model})).conditions
    assert (of["model"], of["model_sha256"]) == ("m", "f" * 64)
    assert table.by_drafted == {1: 1.7, 2: 2.2}
    other = table_of_forecast(found, None, Wanted(head="markov 64"))
    assert other.mean_length == pytest.approx(2.1) and len(other.rates) == 2
    assert other.rates[1] == pytest.approx(other.rates[0] ** 2, abs=1e-5)
    short = table_of_forecast(found, None, Wanted(horizon=2))
    assert short.rates == pytest.approx((0.7,))


def test_what_the_answer_owes_to_luck_is_not_exported(tmp_path):
    folder = stored(tmp_path)
    told = json.loads((folder / "forecast.json").read_text())
    told["choices"][0]["tokens_per_call"] = [2.08, 1.7, 2.4]
    (folder / "forecast.json").write_text(json.dumps(told))
    table = table_of_forecast(HeadsForecast.read(folder))
    assert table.rates == pytest.approx((0.7 * 0.9, 0.5 * 0.9))
    assert table.mean_length == pytest.approx(2.08)


def test_the_schedule_is_the_fastest_horizon_at_each_load(tmp_path):
    folder = stored(tmp_path)
    told = json.loads((folder / "forecast.json").read_text())
    told["settings"]["loads"] = [2, 8, 64]
    (folder / "forecast.json").write_text(json.dumps(told))
    costs = {  # seconds of a plain step and of a cycle of two and of three tokens
        2: (1.0, 1.1, 1.2),
        8: (1.0, 1.2, 1.9),
        64: (1.0, 2.0, 3.0),
    }

    class Times(MeasuredLatency):
        def plain_seconds(self, batch=1, *, source=None):
            return costs[batch][0]

        def cycle_seconds(self, sizes, batch=1, *, source=None):
            assert sizes["form"] == "cp" and sizes["rank"] == 4
            return costs[batch][sizes["horizon"] - 1]

    table = table_of_forecast(HeadsForecast.read(folder), Times(LatencyModel(1.0, 1.0)))
    lengths = (1.0, 1.7, 2.2)
    best = [int(np.argmax([t / s for t, s in zip(lengths, costs[b], strict=True)])) for b in costs]
    assert best == [2, 1, 0]
    assert table.schedule == (DraftedFor(1, 7, 2), DraftedFor(8, 63, 1), DraftedFor(64, 64, 0))


def test_a_forecast_without_a_head_is_refused(tmp_path):
    found = HeadsForecast.read(stored(tmp_path, best="plain decoding"))
    with pytest.raises(ValueError, match="plain decoding, which needs no head, is the fastest"):
        table_of_forecast(found)
    assert table_of_forecast(found, None, Wanted(head="cp 4")).drafted == 2
    with pytest.raises(ValueError, match="no head 'x': choose one with --head, of cp 4, markov"):
        table_of_forecast(found, None, Wanted(head="x"))
    with pytest.raises(ValueError, match="no horizon 7 of 'cp 4': there is 3, 2"):
        table_of_forecast(found, None, Wanted(head="cp 4", horizon=7))
    with pytest.raises(ValueError, match=f"no forecast at load 3: there is {LOAD}"):
        table_of_forecast(found, None, Wanted(load=3))


def decoded(**changes) -> pd.DataFrame:
    shared = dict(model="m", rank=1, horizon=3, rule="block", anchored=True)
    rows = [
        shared | dict(head="slow", measured=2.4, tokens_per_second=100.0),
        shared | dict(head="fast", measured=2.2, tokens_per_second=120.0),
        shared | dict(head="fast", measured=2.9, tokens_per_second=900.0, rule="token"),
        shared | dict(head="plain", measured=np.nan, horizon=np.nan, tokens_per_second=1e4),
    ]
    return pd.DataFrame([row | changes for row in rows])


def test_decoding_gives_the_fastest_head_by_block_verification():
    found = table_of_decoding(decoded())
    assert (found.kind, found.conditions["head"]) == ("measured", "fast")
    assert found.mean_length == pytest.approx(2.2, abs=1e-5)
    assert found.rates[1] == pytest.approx(found.rates[0] ** 2, abs=1e-5)
    assert "mean length alone" in found.conditions["rates_from"]
    assert table_of_decoding(decoded(), Wanted(head="slow")).mean_length == pytest.approx(2.4)
    untimed = decoded().drop(columns="tokens_per_second")
    assert table_of_decoding(untimed).conditions["head"] == "slow"


def test_counts_of_every_position_are_used_where_they_are_stored():
    found = table_of_decoding(decoded(measured_survival_2=0.8, measured_survival_3=0.4))
    assert found.rates == (0.8, 0.4) and found.conditions["rates_from"].startswith("counts")


def test_what_was_not_decoded_is_refused():
    with pytest.raises(ValueError, match="nothing was decoded with head 'x': there is slow, fast"):
        table_of_decoding(decoded(), Wanted(head="x"))
    with pytest.raises(ValueError, match="domain 'x': there is no such column"):
        table_of_decoding(decoded(), Wanted(domain="x"))
    with pytest.raises(ValueError, match="choose one with --model, of m, other"):
        table_of_decoding(pd.concat([decoded(), decoded(model="other")]))
    with pytest.raises(ValueError, match="without the columns"):
        table_of_decoding(pd.DataFrame({"a": [1]}))


@pytest.mark.parametrize("to", FORMATS)
def test_the_command_writes_what_it_says(monkeypatch, capsys, tmp_path, to):
    file = tmp_path / "out" / "file"
    status, out, err = run(
        monkeypatch, capsys, "export", stored(tmp_path), "--to", to, "--out", file
    )
    assert (status, err) == (0, "")
    assert out.startswith("forecast of a trained head: model not named, cp, rank 4")
    assert read_table(f"{file}.table.json").rates == (0.7, 0.5) and file.is_file()


def test_the_command_takes_what_was_measured_first(monkeypatch, capsys, tmp_path):
    stored(tmp_path)
    decoded().to_parquet(tmp_path / "decoding.parquet")
    _, out, _ = run(monkeypatch, capsys, "export", tmp_path, "--to", "vllm")
    assert out.startswith("measured in decoding: m, cp, rank 1")
    assert (tmp_path / "speculative_config.json").is_file()
    _, out, _ = run(monkeypatch, capsys, "export", tmp_path, "--to", "vllm", "--kind", "forecast")
    assert out.startswith("forecast")


def test_the_command_reads_the_shipped_study(monkeypatch, capsys, tmp_path, root):
    folder = root / "data" / "studies" / "reference"
    status, out, _ = run(
        monkeypatch, capsys, "export", folder, "--to", "speculation-profile", "--model", "code",
        "--rank", 8, "--horizon", 3, "--out", tmp_path / "profile.json",
    )  # fmt: skip
    assert status == 0 and out.startswith("ceiling")
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert (
        profile["target_model"]["name"] == "code" and len(profile["target_model"]["sha256"]) == 64
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--to", "tensorrt"), "no format 'tensorrt': choose one of vllm, llama.cpp"),
        (("--to", "vllm", "--kind", "guess"), "--kind 'guess': expected measured, forecast"),
        (("--to", "vllm", "--kind", "measured"), "nothing measured in"),
        (("--to", "vllm", "--head", "x"), "no head 'x'"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, more, message):
    status, _, err = run(monkeypatch, capsys, "export", stored(tmp_path), *more)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_head_or_a_load_of_a_study_is_refused_and_what_to_use_is_quoted(
    monkeypatch, capsys, tmp_path, root
):
    folder = root / "data" / "studies" / "reference"
    arguments = ("export", folder, "--to", "vllm", "--model", "code")
    for option, value in (("head", "markov 64"), ("load", "8")):
        status, _, err = run(monkeypatch, capsys, *arguments, f"--{option}", value)
        assert status == 2 and f"{option} " in err and "no " + option in err
    _, out, _ = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "a $(b) ;c.json")
    assert "$(cat 'a $(b) ;c.json')" in out


def test_folders_without_results_are_refused(monkeypatch, capsys, tmp_path):
    for folder, message in ((tmp_path, "nothing to export in"), (tmp_path / "no", "no folder")):
        status, _, err = run(monkeypatch, capsys, "export", folder, "--to", "vllm")
        assert status == 2 and message in err and err.count("\n") == 1


def test_a_file_that_is_no_table_is_refused(tmp_path):
    for text in ("", "[]", '{"rates": [2], "kind": "measured"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="expected a table as"):
            read_table(tmp_path / "a.json")
