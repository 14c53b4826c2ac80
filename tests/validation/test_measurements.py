"""Decoding with heads beside their forecast, and ways of decoding in turns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.heads.cp_head import CPHead
from cpmtp.language_model import sample_sequences
from cpmtp.pretrained import embedded_heads, load_language_model
from cpmtp.validation import measurements
from cpmtp.validation.measurements import (
    SHAPE,
    decode_beside_forecast,
    decode_in_turns,
    plain_texts,
)

NEW, PROMPT = 12, 8


@pytest.fixture(scope="module")
def lm():
    return load_language_model("code")


@pytest.fixture(scope="module")
def head(lm):
    return CPHead.from_pretrained(embedded_heads("code")["baseline"]).attach(lm)


@pytest.fixture(scope="module")
def prompts(lm):
    return list(sample_sequences(lm, 5, PROMPT, seed=1))


@pytest.mark.parametrize(("rule", "temperature"), [("token", 1.0), ("block", 0.6)])
def test_a_head_stands_beside_its_forecast_with_the_intervals_of_both(
    lm, head, prompts, rule, temperature
):
    texts = plain_texts(lm, prompts, new_tokens=NEW, temperature=temperature, seed=3)
    assert texts.shape == (5, PROMPT + NEW) and torch.equal(texts[:, :PROMPT], torch.stack(prompts))
    options = {"rule": rule, "temperature": temperature}
    (row,) = decode_beside_forecast(
        lm, [("mine", head)], new_tokens=NEW, texts=texts, prompts=prompts, seed=4, **options
    )
    found = forecast_cycles(lm, head, texts, start=PROMPT, **options)
    stats = speculative_generate(lm, head, prompts, max_new_tokens=NEW, seed=4, **options).stats
    half = norm.ppf(0.975) * np.std(stats.tokens_per_call_by_row, ddof=1) / math.sqrt(5)
    expected = {
        "plain_forecast": (found.unweighted, *found.unweighted_interval),
        "forecast": (found.tokens_per_call, *found.interval),
        "measured": (
            stats.tokens_per_call,
            stats.tokens_per_call - half,
            stats.tokens_per_call + half,
        ),
    }
    for name, values in expected.items():
        assert tuple(row[name + end] for end in ("", "_low", "_high")) == pytest.approx(values)
    assert row["head"] == "mine" and row["horizon"] == head.horizon and row["rank"] == head.rank
    survived = [row[f"measured_survival_{k}"] for k in range(2, head.horizon + 1)]
    assert 1 + sum(survived) == pytest.approx(stats.tokens_per_call)
    assert survived == sorted(survived, reverse=True)


def test_what_is_not_asked_for_is_not_in_the_table(lm, head, prompts):
    (row,) = decode_beside_forecast(lm, [("mine", head)], new_tokens=4, prompts=prompts[:2])
    survived = {f"measured_survival_{k}" for k in range(2, head.horizon + 1)}
    measured = {"measured", "measured_low", "measured_high"}
    assert set(row) == {"head", *SHAPE, *measured, *survived}


def test_the_first_turn_is_not_counted_and_the_others_by_their_median(
    lm, head, prompts, monkeypatch
):
    rates = {None: [1.0, 10.0, 30.0, 20.0], "token": [1e9, 50, 40, 60], "block": [0.0, 90, 70, 80]}
    seen = []

    def planted(lm, head, prompts, count, options):
        seen.append((head is not None, options["seed"], [p.tolist() for p in prompts]))
        rule = options["rule"] if head is not None else None
        return {"tokens_per_second": rates[rule][options["seed"]]}

    monkeypatch.setattr(measurements, "_by_cycles", planted)
    monkeypatch.setattr(
        measurements, "_by_transformers", lambda *arguments: {"tokens_per_second": 7.0}
    )
    turns = [[prompt] for prompt in prompts[:4]]
    rows = decode_in_turns(lm, {"mine": head}, turns, new_tokens=NEW, rules=("token", "block"))
    assert [(row["head"], row["rule"]) for row in rows] == [
        ("transformers", None),
        ("plain", None),
        ("mine", "token"),
        ("mine", "block"),
    ]
    assert [row["tokens_per_second"] for row in rows] == [7.0, 20.0, 50.0, 80.0]
    assert [row["speedup"] for row in rows] == [7 / 20, 1.0, 2.5, 4.0]
    assert {row["rounds"] for row in rows} == {3} and rows[3]["rank"] == head.rank
    # Every way gets the same prompts and the same seed in a turn, one way after another.
    assert seen == [
        (drafted, turn, [prompts[turn].tolist()])
        for turn in range(4)
        for drafted in (False, True, True)
    ]


def test_one_prompt_or_one_turn_is_refused(lm, head, prompts):
    with pytest.raises(ValueError, match="1 prompts: expected at least 2"):
        decode_beside_forecast(lm, [("mine", head)], new_tokens=4, prompts=prompts[:1])
    with pytest.raises(ValueError, match="1 turns: expected at least 2"):
        decode_in_turns(lm, {"mine": head}, [prompts], new_tokens=4)
