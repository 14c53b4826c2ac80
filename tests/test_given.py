"""What people give in the place of token ids, models, joints and names of options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import BigramTable, random_llama_folder

import cpmtp
from cpmtp.joint_distribution.given import as_language_model, as_prompts, as_token_ids
from cpmtp.language_model import separated_hmm
from cpmtp.pretrained import load_language_model

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


HABITS = [
    (lambda: cpmtp.fit(torch.ones(2, 2) / 4, 1, random_state=3), "'random_state': .* seed here"),
    (lambda: cpmtp.fit(torch.ones(2, 2) / 4, n_components=1), "'n_components': .* rank here"),
    (lambda: cpmtp.fit(torch.ones(2, 2) / 4, 1, tol=1e-3), "'tol': .* tolerance here"),
    (lambda: cpmtp.fit(torch.ones(2, 2) / 4, 1, max_iter=9), "max_iterations here"),
    (lambda: cpmtp.exact_joint(BigramTable(), prompt=IDS, horizon=2), "context here"),
    (lambda: cpmtp.speculative_generate(BigramTable(), None, IDS, max_tokens=2), "max_new_tokens"),
    (lambda: cpmtp.speculative_generate(BigramTable(), None, IDS, stop="x"), "stop_strings"),
    (lambda: cpmtp.run_study(models=[BigramTable()], n_jobs=2), "workers here"),
    (lambda: cpmtp.run_study(models=[BigramTable()], random_state=2), "seed here"),
    (
        lambda: cpmtp.train_head(cpmtp.load_language_model("code"), random_state=2),
        "'random_state': .* seed here",
    ),
    (
        lambda: cpmtp.train_head(cpmtp.load_language_model("code"), colour=2),
        "no option 'colour': expected form, ",
    ),
    (lambda: cpmtp.run_study(models=[BigramTable()], nonsense=2), "expected one of models"),
]


@pytest.mark.parametrize(("call", "said"), HABITS)
def test_an_option_by_another_librarys_name_is_told_its_own(call, said):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_option_that_nothing_is_called_is_a_type_error():
    with pytest.raises(TypeError, match="nonsense"):
        cpmtp.fit(torch.ones(2, 2) / 4, 1, nonsense=3)


def test_what_is_shown_of_an_object_is_short(lm):
    joint = cpmtp.exact_joint(BigramTable(), IDS, 3)
    fit = cpmtp.fit(joint, 2)
    tree = cpmtp.truncated_joint(BigramTable(), IDS, 3)
    for shown in (joint, fit, fit.distribution, tree, lm):
        assert len(repr(shown)) < 200 and "\n" not in repr(shown) and " at 0x" not in repr(shown)
    assert "rank=2" in repr(fit) and "mine" in repr(lm)


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
    again = cpmtp.run_study(models=[(lm.model, lm.tokenizer)], texts=texts, **small)
    assert again[same].equals(found[same])


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
    ):
        assert call(pair) == call(lm)
