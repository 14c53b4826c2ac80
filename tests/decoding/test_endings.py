"""Where decoding ends, and what is kept of transformers' options behind its ``generate``."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from cpmtp.decoding.generation_hook import custom_generate
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.language_model import separated_hmm
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.heads import train_head
from cpmtp.training.new_models import new_llama

VOCAB = 6
PROMPT = torch.tensor([1, 2])


@pytest.fixture(scope="module")
def lm():
    """A flat law: every token comes soon, and all that stands before it counts."""
    model = new_llama(VOCAB, width=96, layers=1, window=96, seed=0)
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(VOCAB, 96, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(weight)
    return HuggingFaceLanguageModel(model)


def generated(lm, ids=PROMPT[None], **options):
    hook = custom_generate(lm, None, stop_strings=options.pop("ours", ()))
    plain = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    return lm.model.generate(ids, custom_generate=hook, **plain | options)


@pytest.mark.parametrize("given", [4, [4], (4, 3), torch.tensor([3, 4]), range(3, 5)])
def test_a_text_ends_with_the_first_of_the_tokens_that_end_texts(lm, given):
    ends = {4} if str(given) in ("4", "[4]") else {3, 4}
    whole = speculative_generate(lm, None, PROMPT, max_new_tokens=40).token_ids.tolist()
    place = min(whole.index(token) for token in ends)
    out = speculative_generate(lm, None, PROMPT, max_new_tokens=40, eos_token_id=given)
    assert out.token_ids.tolist() == whole[: place + 1]


def test_the_models_own_ends_are_its_generation_configs(lm):
    whole = speculative_generate(lm, None, PROMPT, max_new_tokens=40).token_ids.tolist()
    before = lm.model.generation_config
    try:
        for named, expected in ((3, (3,)), ([5, 3], (5, 3)), (None, ())):
            lm.model.generation_config = GenerationConfig(eos_token_id=named)
            assert lm.eos_token_ids == expected
            asked = {"max_new_tokens": 40, "eos_token_id": "model"}
            found = speculative_generate(lm, None, PROMPT, **asked).token_ids.tolist()
            first = min((whole.index(token) for token in expected), default=len(whole) - 1)
            assert found == whole[: first + 1]
    finally:
        lm.model.generation_config = before


def test_a_model_that_names_no_end_has_none():
    asked = {"max_new_tokens": 7, "eos_token_id": "model"}
    out = speculative_generate(separated_hmm(2, 6), None, PROMPT, **asked)
    assert len(out.token_ids) == 7


def test_one_stop_string_is_a_whole_one(lm, monkeypatch):
    monkeypatch.setattr(
        lm, "decode", lambda ids: "".join("abcdef"[i] for i in ids.tolist()), raising=False
    )
    whole = lm.decode(speculative_generate(lm, None, PROMPT, max_new_tokens=40).token_ids)
    stop = whole[9:12]
    for given in (stop, [stop], ("zzz", stop)):
        out = speculative_generate(lm, None, PROMPT, max_new_tokens=40, stop_strings=given)
        assert lm.decode(out.token_ids) == whole[: whole.index(stop) + 3]
    hooked = generated(lm, max_new_tokens=40, ours=stop)[0, 2:]
    assert lm.decode(hooked) == whole[: whole.index(stop) + 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eos_token_id": "x"}, "eos_token_id 'x': expected a token id"),
        ({"eos_token_id": [1, VOCAB]}, f"eos_token_id {VOCAB}: expected ids in"),
        ({"eos_token_id": -1}, "eos_token_id -1"),
        ({"eos_token_id": [1.5]}, "eos_token_id 1.5"),
        ({"eos_token_id": True}, "eos_token_id True"),
        ({"stop_strings": ""}, "stop string ''"),
        ({"stop_strings": ["a", ""]}, "none empty"),
        ({"stop_strings": [3]}, "stop string 3"),
    ],
)
def test_an_end_that_means_nothing_is_refused(lm, change, said):
    with pytest.raises(ValueError) as error:
        speculative_generate(lm, None, PROMPT, max_new_tokens=3, **change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_stop_strings_need_a_model_that_writes_text():
    with pytest.raises(ValueError, match="without decode"):
        speculative_generate(separated_hmm(2, 6), None, PROMPT, stop_strings="a")


def test_transformers_lists_of_ends_stop_at_any(lm):
    whole = generated(lm)[0, 2:].tolist()
    for ends in ([3, 4], [4, 3], [5]):
        found = generated(lm, eos_token_id=ends)[0, 2:].tolist()
        assert found == whole[: min(whole.index(token) for token in ends) + 1]


def test_padding_on_the_left_is_no_text(lm):
    ids = torch.tensor([[0, 0, 0, 5, 1], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    asked = {"do_sample": False, "max_new_tokens": 8}
    found = generated(lm, ids, attention_mask=mask, **asked)
    alone = [
        generated(lm, row[known.bool()][None], **asked)
        for row, known in zip(ids, mask, strict=True)
    ]
    assert torch.equal(found[:, :5], ids)
    for row, expected in zip(found, alone, strict=True):
        assert torch.equal(row[5:], expected[0, -8:])
    options = {"eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(found, lm.model.generate(ids, attention_mask=mask, **asked, **options))
    unmasked = generated(lm, ids, attention_mask=torch.ones_like(mask), **asked)
    assert not torch.equal(unmasked, found)


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]]])
def test_padding_elsewhere_is_refused(lm, mask):
    with pytest.raises(ValueError, match="on the left"):
        generated(lm, torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor(mask))


REFUSED = {
    "num_beams": 2,
    "repetition_penalty": 1.2,
    "bad_words_ids": [[3]],
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "no_repeat_ngram_size": 2,
    "min_p": 0.9,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "sequence_bias": [[[3], 1.0]],
    "guidance_scale": 2.0,
    "max_time": 0.0,
    "min_new_tokens": 3,
    "min_length": 9,
    "forced_eos_token_id": 3,
    "remove_invalid_values": True,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_is_not_kept_to_is_refused_by_its_name(lm, name):
    with pytest.raises(ValueError) as error:
        generated(lm, **{name: REFUSED[name]})
    assert "does not keep to" in str(error.value) and f" {name}=" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_nobody_knows_yet_is_refused_too(lm):
    config = GenerationConfig(max_length=9)
    config.some_new_option = 0.3
    hook = custom_generate(lm, None)
    with pytest.raises(ValueError, match=r"some_new_option=0\.3"):
        hook(lm.model, PROMPT[None], generation_config=config)


def test_processors_criteria_and_inputs_of_the_callers_are_refused_by_name(lm):
    class Mine(list):
        """A rule of the caller's."""

        def __call__(self, ids, scores, **_):
            return scores

    with pytest.raises(ValueError, match="does not keep to Mine"):
        generated(lm, logits_processor=[Mine()])
    with pytest.raises(ValueError, match="does not keep to Mine"):
        generated(lm, stopping_criteria=[Mine()])
    config = GenerationConfig(max_length=9)
    with pytest.raises(ValueError, match="does not keep to inputs_embeds"):
        custom_generate(lm, None)(
            lm.model, PROMPT[None], generation_config=config, inputs_embeds=torch.ones(1)
        )


class Written(list):
    """A streamer that keeps what it gets."""

    put = list.append

    def end(self):
        self.append(None)


def test_a_streamer_gets_the_prompt_and_every_cycles_tokens_once(lm):
    head = train_head(lm, horizon=3, rank=2, steps=1, rows=1, length=8, sequences=1)
    for draft in (None, head):
        written = Written()
        hook = custom_generate(lm, draft, streamer=written)
        asked = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": 4, "pad_token_id": 0}
        whole = lm.model.generate(PROMPT[None], custom_generate=hook, **asked)[0]
        prompt, *cycles, end = written
        assert end is None and torch.equal(prompt, PROMPT)
        assert torch.equal(torch.cat([prompt, *cycles]), whole)
        assert all(1 <= len(tokens) <= (1 if draft is None else 3) for tokens in cycles)
        with pytest.raises(ValueError, match="a streamer for 2 texts"):
            lm.model.generate(PROMPT.repeat(2, 1), custom_generate=hook, **asked)


def test_drafts_of_another_model_are_refused(lm):
    other = HuggingFaceLanguageModel(new_llama(VOCAB, width=96, layers=1, window=96, seed=1))
    with pytest.raises(ValueError, match="another model"):
        hook = custom_generate(lm, None)
        other.model.generate(PROMPT[None], custom_generate=hook, max_new_tokens=3)


def test_options_that_change_nothing_are_taken(lm):
    plain = generated(lm)
    for name, value in (("use_cache", False), ("renormalize_logits", True), ("min_length", 0)):
        assert torch.equal(generated(lm, **{name: value}), plain)
    assert generated(lm, num_return_sequences=3).shape == (3, 22)
