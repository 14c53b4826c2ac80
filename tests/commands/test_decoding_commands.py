"""`cpmtp generate`, `train-head` and `models`: what they print, and how bad input ends."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from command_line import run
from samples import random_llama_folder

from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.draft_head import DraftHead
from cpmtp.pretrained import embedded_models, load_language_model

SHORT = ("generate", "recommended", "--model", "code", "--max-new-tokens", 60)
STORED = "data/studies/head/decoding.parquet"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_llama_folder(tmp_path_factory.mktemp("base") / "mine", window=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 60)
    return path


def test_the_embedded_models_are_listed_with_their_size(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "models")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(embedded_models())
    assert "1,594,560 parameters" in out and "bits per byte" in out


def test_text_is_printed_and_what_it_took_beside_it(monkeypatch, capsys, tmp_path):
    monitor = tmp_path / "calls.jsonl"
    status, out, err = run(monkeypatch, capsys, *SHORT, "--prompt", "import ", "--monitor", monitor)
    assert status == 0, err
    assert out.startswith("import ") and len(out) > 40
    for said in ("tokens per call", "tokens per second", "latency per token", "target ", "draft "):
        assert said in err
    assert "forecast" not in err and "drift" not in err
    assert all("accepted" in json.loads(line) for line in monitor.read_text().splitlines())


def test_plain_decoding_needs_no_head_and_has_no_forecast(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "generate", "--max-new-tokens", 3)
    assert status == 0 and out.startswith("def add(a, b):") and "tokens per call    1.000" in err
    status, out, err = run(monkeypatch, capsys, "generate", "--expect", STORED)
    assert (status, out) == (2, "") and "--expect without a head" in err
    status, out, err = run(monkeypatch, capsys, "generate", "--compare")
    assert (status, out) == (2, "") and "--compare without a head" in err


def forecasts(path, **columns):
    """A table with one forecast of the embedded head."""
    row = dict(model="code", rank=8, horizon=4, anchored=True, rule="block") | columns
    pd.DataFrame([row]).to_parquet(path)
    return path


def test_decoding_that_keeps_its_forecast_is_told_so(monkeypatch, capsys, tmp_path):
    table = forecasts(tmp_path / "f.parquet", forecast_low=1.0, forecast_high=4.0)
    status, _, err = run(monkeypatch, capsys, *SHORT, "--expect", table)
    assert status == 0
    assert err.splitlines()[-1] == "tokens per call within the forecast of 1.000 to 4.000"


def test_decoding_that_leaves_its_forecast_is_told_so(monkeypatch, capsys, tmp_path):
    table = forecasts(tmp_path / "f.parquet", forecast_low=3.99, forecast_high=4.0)
    status, _, err = run(monkeypatch, capsys, *SHORT, "--expect", table)
    assert status == 0 and err.splitlines()[-1].startswith("drift: tokens per call ")
    assert "below the forecast of 3.990 to 4.000" in err


def test_the_stored_forecasts_hold_for_the_embedded_heads(monkeypatch, capsys, root):
    _, _, err = run(monkeypatch, capsys, *SHORT, "--expect", root / STORED)
    assert "the forecast of 2.550 to 2.642" in err


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (("--temperature", 0.7), "no column temperature"),
        (("--top-k", 20), "no column top_k"),
        (("--top-p", 0.9), "no column top_p"),
        (("--temperature", 0, "--rule", "greedy"), "no column temperature"),
    ],
)
def test_a_forecast_of_another_distribution_is_refused(monkeypatch, capsys, root, sampling, said):
    status, out, err = run(monkeypatch, capsys, *SHORT, "--expect", root / STORED, *sampling)
    assert (status, out) == (2, "") and said in err and len(err.splitlines()) == 1


def test_a_forecast_that_says_how_the_target_was_sampled_must_match(monkeypatch, capsys, tmp_path):
    table = forecasts(
        tmp_path / "f.parquet", temperature=0.7, top_k=20, forecast_low=1.0, forecast_high=4.0
    )
    sampled = ("--temperature", 0.7, "--top-k", 20)
    status, _, err = run(monkeypatch, capsys, *SHORT, *sampled, "--expect", table)
    assert status == 0 and "within the forecast" in err
    status, out, err = run(monkeypatch, capsys, *SHORT, "--expect", table)
    assert (status, out) == (2, "") and "has 0 rows" in err


def test_a_head_is_trained_told_the_first_token_unless_asked(
    monkeypatch, capsys, tmp_path, base, text
):
    shape = ("--horizon", 3, "--rank", 2, "--steps", 2, "--corpus", text)
    for kind, anchored in ((), True), (("--no-anchored",), False):
        folder = tmp_path / str(anchored)
        status, out, err = run(
            monkeypatch, capsys, "train-head", "--model", base, *shape, *kind, "--out", folder
        )
        assert status == 0, err
        assert "steps            2 in" in out and f"head             {folder}" in out
        assert CPHead.from_pretrained(folder).anchored is anchored
    status, out, err = run(
        monkeypatch, capsys, "generate", folder, "--model", base, "--max-new-tokens", 5
    )
    assert status == 0 and "tokens per call" in err


def test_a_text_ends_where_it_is_told_to(monkeypatch, capsys, base):
    asked = ("generate", "--model", base, "--max-new-tokens", 40, "--prompt", "def", "--seed", 2)
    _, whole, err = run(monkeypatch, capsys, *asked, "--ignore-eos")
    assert "in 40 calls" in err
    ids = load_language_model(base).encode(whole[:-1])
    place = next(k for k in range(10, 40) if int(ids[k]) not in ids[:k].tolist())
    text = load_language_model(base).decode(ids[:place])
    ended = (*asked, "--eos", f"{int(ids[place])},0")
    # The end of the text is no part of it.
    assert run(monkeypatch, capsys, *ended)[1] == text + "\n"
    stop = load_language_model(base).decode(ids[place : place + 2])
    _, stopped, _ = run(monkeypatch, capsys, *asked, "--ignore-eos", "--stop", stop, "--stop", "§")
    assert stopped == text + stop + "\n"


def test_the_models_own_end_of_text_ends_it_unless_it_is_ignored(monkeypatch, capsys, base):
    calls = {}
    for option in ((), ("--ignore-eos",)):
        asked = ("generate", "--model", base, "--max-new-tokens", 250, "--seed", 1, *option)
        _, _, err = run(monkeypatch, capsys, *asked)
        calls[option] = int(re.search(r"in (\d+) calls", err)[1])
    # A random model's law over 99 tokens is nearly flat: its end comes soon.
    assert calls[()] < calls[("--ignore-eos",)] == 250


def test_a_head_is_compared_with_plain_decoding(monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, *SHORT, "--compare")
    assert status == 0 and re.search(
        r"plain decoding +\d+\.\d tokens per second, with the head \d+\.\d: \d\.\d\d times", err
    )


def test_windows_are_of_any_length_and_the_end_says_what_to_do_next(
    monkeypatch, capsys, tmp_path, base, text
):
    asked = ("train-head", "--model", base, "--steps", 1, "--rank", 2, "--corpus", text)
    status, out, err = run(monkeypatch, capsys, *asked, "--length", 40, "--out", tmp_path / "h")
    assert status == 0, err
    for said in ("of 40 tokens, 100.0% of the texts", "ceiling          4", "break-even  "):
        assert said in out
    assert out.endswith(
        f"next             cpmtp generate {tmp_path / 'h'} --model {base} --compare\n"
    )
    card = (tmp_path / "h" / "README.md").read_text("utf-8")
    assert f"# A draft head for {base.name}" in card and "| rank | 2 |" in card


def test_a_head_of_another_form_is_trained_and_decoded_with(
    monkeypatch, capsys, tmp_path, base, text
):
    shape = ("--form", "markov_mixture", "--rank", 2, "--transition-rank", 3, "--vocabulary", 6)
    budget = ("--positions", 1000, "--length", 64, "--precision", "bfloat16")
    given = ("--model", base, *shape, *budget, "--corpus", text, "--out", tmp_path)
    status, out, err = run(monkeypatch, capsys, "train-head", *given)
    assert status == 0, err
    assert "steps            2 in" in out
    head = DraftHead.from_pretrained(tmp_path)
    assert (head.form, head.rank, head.transition_rank) == ("markov_mixture", 2, 3)
    assert head.support_size == 6
    tokens = ("--max-new-tokens", 5)
    status, _, err = run(monkeypatch, capsys, "generate", tmp_path, "--model", base, *tokens)
    assert status == 0 and "tokens per call" in err
    status, out, err = run(
        monkeypatch, capsys, "train-head", "--model", base, "--form", "cp", "--transition-rank", 2
    )
    assert (status, out) == (2, "") and "has no transitions" in err


BAD = [
    (("generate", "--model", "./nope"), "no folder ./nope: expected"),
    (("generate", "--model", "~/nope"), "no folder ~/nope"),
    (("generate", "--model", "/nope/at/all"), "no folder /nope/at/all"),
    (("generate", "--model", "some/folder/deep"), "no folder some/folder/deep"),
    (("generate", "--model", "weights.gguf"), "no file weights.gguf"),
    (("generate", "--model", "no-such-model"), "unknown model 'no-such-model'"),
    (("generate", "nowhere", "--model", "code"), "'nowhere' holds no head"),
    (("generate", "--model", "code", "--device", "abacus"), "unknown device 'abacus'"),
    (("generate", "--model", "code", "--device", "meta"), "device 'meta' cannot be used here"),
    (("generate", "--model", "code", "--temperature", "-1"), "temperature"),
    (("generate", "--model", "code", "--prompt", ""), "prompt"),
    (("train-head", "--model", "./nope"), "no folder ./nope"),
    (("train-head", "--model", "code", "--device", "abacus"), "unknown device 'abacus'"),
    (("train-head", "--model", "code", "--objective", "luck"), "unknown objective 'luck'"),
    (("train-head", "--model", "code", "--steps", "0"), "steps 0"),
    (("study", "--model", "./nope"), "no folder ./nope"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line_and_status_two(monkeypatch, capsys, arguments, said):
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and said in err, err
    if "no folder" in said:
        assert "hub did not" not in err and "expected NAME" not in err


def test_a_head_to_begin_with_that_is_not_there_is_refused(monkeypatch, capsys, base, text):
    arguments = ("--model", base, "--corpus", text, "--start", "nowhere")
    status, out, err = run(monkeypatch, capsys, "train-head", *arguments)
    assert (status, out) == (2, "") and "'nowhere' holds no head" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("command", ["generate", "train-head"])
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys, command, device):
    status, out, err = run(monkeypatch, capsys, command, "--model", "code", "--device", device)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert f"device '{device}' cannot be used here" in err and "take cpu" in err
