"""What people give in the place of token ids, models, joints and names of options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import tiny
from samples import BigramTable, random_llama_folder

import cpmtp
from cpmtp.joint_distribution.given import as_language_model, as_prompts, as_token_ids
from cpmtp.language_model import separated_hmm
from cpmtp.pretrained import load_language_model
from cpmtp.training.heads import windows_of_text

IDS = [3, 1, 2]
FORMS = {
    "list": IDS,
    "tuple": tuple(IDS),
    "numpy": np.array(IDS),
    "int32": torch.tensor(IDS, dtype=torch.int32),
    "row": torch.tensor([IDS]),
    "row of a list": [IDS],
    "tokenizer": {"input_ids": [IDS], "attention_mask": [[1, 1, 1]]},
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_language_model(random_llama_folder(tmp_path_factory.mktemp("m") / "mine"))


@pytest.mark.parametrize("form", FORMS)
def test_a_context_in_any_form_gives_the_same_joint_and_text(form):
    table = BigramTable()
    expected = cpmtp.exact_joint(table, torch.tensor(IDS), 2).probs
    assert torch.equal(cpmtp.exact_joint(table, FORMS[form], 2).probs, expected)
    assert torch.equal(
        cpmtp.truncated_joint(table, FORMS[form], 2).mass,
        cpmtp.truncated_joint(table, torch.tensor(IDS), 2).mass,
    )
    whole = cpmtp.speculative_generate(table, None, torch.tensor(IDS), max_new_tokens=4)
    given = cpmtp.speculative_generate(table, None, FORMS[form], max_new_tokens=4)
    assert torch.equal(given.sequences[0], whole.sequences[0])


def test_a_text_is_read_by_the_models_own_tokenizer(lm):
    ids = lm.encode("def add")
    assert torch.equal(
        cpmtp.exact_joint(lm, "def add", 1).probs, cpmtp.exact_joint(lm, ids, 1).probs
    )
    out = cpmtp.speculative_generate(lm, None, ["def add", "a"], max_new_tokens=2)
    assert [len(row) for row in out.sequences] == [len(ids) + 2, 3]
    assert torch.equal(as_token_ids(lm.tokenizer("def add", return_tensors="pt"), lm), ids)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.tensor([1.0, 2.0]), "float32: expected one row of token ids"),
        ([1.5], "expected one row of token ids"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        ([[1, 2], [3]], "a list: expected token ids"),
        ([True, False], "bool"),
        (torch.ones(1, 1, 1).long(), r"shape \(1, 1, 1\)"),
        (3, "an? int"),
        ({3, 1}, "a set"),
        (object(), "an? object"),
        ("text", "no encode"),
        (["a"], "expected"),
    ],
)
def test_what_is_no_row_of_token_ids_is_refused_in_one_line(given, said):
    with pytest.raises(ValueError, match=said) as error:
        cpmtp.exact_joint(separated_hmm(2, 6), given, 2)
    assert "\n" not in str(error.value)


def test_prompts_with_padding_are_refused():
    with pytest.raises(ValueError, match="without its padding"):
        as_prompts({"input_ids": [[0, 3]], "attention_mask": [[0, 1]]})


def test_a_model_of_transformers_goes_where_a_language_model_goes(lm):
    ids = torch.tensor(IDS)
    expected = cpmtp.exact_joint(lm, ids, 2).probs
    assert torch.equal(cpmtp.exact_joint(lm.model, ids, 2).probs, expected)
    pair = (lm.model, lm.tokenizer)
    assert torch.equal(cpmtp.exact_joint(pair, lm.decode(ids), 2).probs, expected)
    assert as_language_model(pair) is as_language_model(pair)
    out = cpmtp.speculative_generate(pair, None, "def", max_new_tokens=3)
    assert torch.equal(
        out.token_ids, cpmtp.speculative_generate(lm, None, "def", max_new_tokens=3).token_ids
    )
    head = cpmtp.train_head(pair, horizon=3, rank=1, steps=1, rows=1, length=8, sequences=1)
    assert head.vocab_size == lm.vocab_size


@pytest.mark.parametrize("given", [3, "code", (), [1, 2], torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_in_one_line(given):
    with pytest.raises(ValueError, match=r"language model|load_language_model") as error:
        cpmtp.exact_joint(given, IDS, 2)
    assert "\n" not in str(error.value)


def test_a_tensor_goes_where_a_joint_goes_and_a_fit_where_a_draft_goes():
    joint = cpmtp.exact_joint(BigramTable(), IDS, 3)
    fit = cpmtp.fit(joint, 2)
    tokens = cpmtp.implied_acceptance(joint, fit.distribution).tokens_per_call
    learned = joint.probs.clone().requires_grad_()
    for given in (joint.probs, joint.probs.numpy(), learned, cpmtp.JointDistribution(learned)):
        assert cpmtp.fit(given, 2).objective == fit.objective
        assert cpmtp.implied_acceptance(given, fit).tokens_per_call == tokens
        assert cpmtp.divergences(given, fit) == cpmtp.divergences(joint, fit.distribution)
        assert torch.equal(
            cpmtp.rank_floors(given, [1]).kl_nats, cpmtp.rank_floors(joint, [1]).kl_nats
        )


def test_windows_of_token_ids_are_rows_of_one_length(lm):
    rows = [[3, 1, 2, 0, 1, 3, 2, 1]] * 2
    head = cpmtp.train_head(lm, tokens=rows, horizon=3, rank=1, steps=1, rows=1, length=8)
    expected = cpmtp.forecast_cycles(lm, head, torch.tensor(rows)).tokens_per_call
    for given in (rows, np.array(rows), torch.tensor(rows, dtype=torch.int32), {"input_ids": rows}):
        assert cpmtp.forecast_cycles(lm, head, given).tokens_per_call == expected
    refused = {
        "rows of equally many": ([[1, 2], [3]], [1, 2, 3], [[0.5, 1.0]] * 2, object()),
        r"tokens must be in \[0, ": ([[1, 2, 3, 4, 5, 10**6]] * 2, [[-1, 2, 3, 4, 5, 6]] * 2),
    }
    for said, several in refused.items():
        for given in several:
            with pytest.raises(ValueError, match=said):
                cpmtp.forecast_cycles(lm, head, given)
            with pytest.raises(ValueError, match=said):
                cpmtp.train_head(lm, tokens=given, horizon=3, rank=1, steps=1)


def test_a_head_is_trained_on_texts_in_memory(lm):
    texts = ["def add(a, b):\n    return a + b\n" * 3, "a = b\n" * 9]
    small = {"horizon": 3, "rank": 1, "steps": 2, "rows": 2, "length": 16}
    head = cpmtp.train_head((lm.model, lm.tokenizer), tokens=texts, **small)
    windows = windows_of_text(lm, texts, 16)
    expected = cpmtp.train_head(lm, tokens=windows, **small)
    assert torch.equal(head.maps, expected.maps)
    one = cpmtp.train_head(lm, tokens=texts[0], **small)
    assert torch.equal(one.maps, cpmtp.train_head(lm, tokens=texts[:1], **small).maps)


SMALL = {"ranks": (1, 2), "methods": "em", "contexts": 2, "context_length": 4}


def test_a_study_of_objects_and_texts_is_that_of_files(lm, tmp_path):
    texts = ["def add(a, b):\n    return a + b\n" * 4, "a + b", " "]
    for k, text in enumerate(texts):
        (tmp_path / f"{k}.txt").write_text(text)
    small = SMALL | {"horizons": 2}
    found = cpmtp.run_study(models=[lm], texts=texts, **small)
    expected = cpmtp.run_study(models=[lm], corpus=tmp_path, **small)
    # Starts of fits depend on the names.
    same = ["context", "rank", "context_text", "context_nats", "joint_entropy_nats"]
    assert found[same].equals(expected[same])
    assert set(found["model"]) == {"mine"} and set(found["domain"]) == {"texts"}
    assert set(found["document"]) == {"text 0", "text 1"}
    for pair in ([(lm.model, lm.tokenizer)], (lm.model, lm.tokenizer)):
        again = cpmtp.run_study(models=pair, texts=texts, **small)
        assert again[same].equals(found[same])
    with pytest.raises(ValueError, match=r"without a tokenizer: .* as a pair"):
        cpmtp.run_study(models=lm.model, texts=texts, **small)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_without_its_tokenizer_is_studied_on_its_own_samples(name):
    lm = tiny(name)
    found = cpmtp.run_study(models=[lm.model, lm], horizons=2, **SMALL)
    first, second = (rows for _, rows in found.groupby("model"))
    numbers = ["context", "rank", "context_nats", "joint_entropy_nats"]
    assert first[numbers].reset_index(drop=True).equals(second[numbers].reset_index(drop=True))
    assert set(found["context_text"]) == {""} and set(found["status"]) == {"ok"}
    words = cpmtp.top_tokens(cpmtp.fit(cpmtp.exact_joint(lm.model, IDS, 2), 2), lm.model, count=1)
    assert (words["token"] == words["token_id"].astype(str)).all()


def test_objects_of_one_name_are_told_apart_and_forgotten(tmp_path):
    models = [BigramTable(), BigramTable(seed=1), "samples:hidden_markov"]
    found = cpmtp.run_study(models=models, out=tmp_path, **SMALL)
    assert set(found["model"]) == {"BigramTable", "BigramTable 2", "samples:hidden_markov"}
    assert cpmtp.run_study(models=models, out=tmp_path, **SMALL).equals(found)
    with pytest.raises(ValueError, match="unknown model 'BigramTable'"):
        cpmtp.run_study(models=["BigramTable"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": [BigramTable()], "workers": 2}, "studied in this process"),
        ({"models": [3]}, "a int for a language model"),
        ({"texts": "one"}, "a list of strings"),
        ({"texts": []}, "0 texts, none with a word"),
        ({"texts": [3]}, "a list of strings"),
        ({"texts": ["a"]}, "encode_document"),
        ({"texts": ["a"], "corpus": __file__}, "texts beside the domains corpus"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_any_work(options, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        cpmtp.run_study(**{"models": [BigramTable()]} | options, out=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_heads_and_their_forecasts_take_a_model_of_transformers(lm):
    pair = (lm.model, lm.tokenizer)
    head = cpmtp.train_head(lm, horizon=3, rank=1, steps=1, rows=1, length=8, sequences=1)
    tokens = cpmtp.sample_sequences(lm, 2, 12, seed=0)
    for call in (
        lambda model: cpmtp.forecast_cycles(model, head, tokens).tokens_per_call,
        lambda model: cpmtp.held_out_survival(model, head, tokens).sum().item(),
        lambda model: cpmtp.head_draft(model, head, tokens[0]).prefix_probs(1).max().item(),
        lambda model: cpmtp.sample_sequences(model, 2, 9, seed=3).tolist(),
        lambda model: cpmtp.waterfall(model, head, [tokens[0].tolist()])["learned"].item(),
        lambda model: cpmtp.estimate_acceptance(lm, model, IDS, horizon=2).tokens_per_call,
    ):
        assert call(pair) == call(lm)
    measured = cpmtp.measure_latency(pair, [head], (1, 2), context=4, rounds=1, seconds=0.1)
    assert measured.measured_on["model"] == lm.name and len(measured.curves[0].times) == 2


def test_what_is_no_draft_is_told_what_is_one(lm):
    head = cpmtp.train_head(lm, horizon=3, rank=1, steps=1, rows=1, length=8, sequences=1)
    fit = cpmtp.fit(cpmtp.exact_joint(lm, IDS, 2), 2)
    for given in ("recommended", fit, lm, lm.model, 3):
        with pytest.raises(ValueError, match="as draft: expected a head, or a function"):
            cpmtp.speculative_generate(lm, given, IDS, max_new_tokens=2)
    joint = cpmtp.exact_joint(lm, IDS, 3)
    for call in (cpmtp.implied_acceptance, cpmtp.divergences):
        with pytest.raises(ValueError, match=r"a DraftHead as draft: .* head_draft"):
            call(joint, head)
    with pytest.raises(ValueError, match=r"a DraftHead as draft: .* head_draft"):
        cpmtp.estimate_acceptance(lm, head, IDS)
