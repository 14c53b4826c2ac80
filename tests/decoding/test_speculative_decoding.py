"""Self-speculative decoding: the target's law untouched, whatever the draft; caches, endings,
batches.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_draft

from cpmtp.decoding import speculative as speculative_decoding
from cpmtp.decoding.generation_hook import custom_generate
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.heads.cp_head import CPHead
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import MarkovLanguageModel, sample_sequences, separated_hmm
from cpmtp.pretrained import HuggingFaceLanguageModel, embedded_heads, load_language_model
from cpmtp.training.new_models import new_llama
from cpmtp.validation.checks import law_p_value

VOCAB = 5


def a_model(*, dtype=torch.float64, window: int = 64, seed: int = 0) -> HuggingFaceLanguageModel:
    model = new_llama(VOCAB, width=96, layers=2, window=window, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    model.lm_head.weight = torch.nn.Parameter(
        0.05 * torch.randn(VOCAB, 96, generator=generator, dtype=dtype)
    )
    return HuggingFaceLanguageModel(model)


def a_head(lm, *, anchored=True, rank=2, horizon=4) -> CPHead:
    torch.manual_seed(3)
    head = (
        CPHead(hidden_size=96, vocab_size=VOCAB, horizon=horizon, rank=rank, anchored=anchored)
        .attach(lm)
        .eval()
    )
    return head.requires_grad_(False)


def plain_greedy(lm, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """By transformers, one token after another; nothing is padding and nothing ends the text."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lm.model.generate(
        prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, **options
    )


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("rule", ["greedy", "block"])
def test_greedy_output_is_plain_greedy_decoding(rule, anchored):
    lm = a_model()
    head = a_head(lm, anchored=anchored)
    for seed in range(4):
        prompt = torch.randint(VOCAB, (5 + seed,), generator=torch.Generator().manual_seed(seed))
        plain = plain_greedy(lm, prompt, 40)
        out = speculative_generate(lm, head, prompt, max_new_tokens=40, rule=rule, temperature=0)
        assert out.sequences[0].tolist() == plain[0].tolist()


def test_a_batch_of_prompts_of_different_lengths_gives_what_each_gives_alone():
    lm = a_model()
    head = a_head(lm)
    prompts = [
        torch.randint(VOCAB, (k,), generator=torch.Generator().manual_seed(k)) for k in (3, 9, 5, 1)
    ]
    together = speculative_generate(lm, head, prompts, max_new_tokens=30, temperature=0)
    alone = [
        speculative_generate(lm, head, prompt, max_new_tokens=30, temperature=0)
        for prompt in prompts
    ]
    assert [row.tolist() for row in together.token_ids] == [one.token_ids.tolist() for one in alone]


def test_a_batch_on_a_real_cache_follows_the_law():
    lm = a_model()
    prompts = [torch.tensor([2, 1])] * 700 + [torch.tensor([0, 3, 2, 1])] * 700
    out = speculative_generate(lm, a_head(lm), prompts, max_new_tokens=3, seed=4)
    for rows, prompt in ((out.token_ids[:700], prompts[0]), (out.token_ids[700:], prompts[-1])):
        assert law_p_value(torch.stack(list(rows)), exact_joint(lm, prompt, 3).probs) > 1e-3


def test_processing_applies_to_target_and_draft_alike():
    lm, prompt = a_model(), torch.tensor([2, 1])
    out = speculative_generate(
        lm, a_head(lm), [prompt] * 1000, max_new_tokens=3, top_k=3, top_p=0.9, temperature=0.8
    )
    joint = exact_joint(lm, prompt, 3, top_k=3, top_p=0.9, temperature=0.8).probs
    assert law_p_value(torch.stack(list(out.token_ids)), joint) > 1e-3


def test_a_draft_equal_to_the_target_is_always_accepted():
    lm = separated_hmm(2, 4)

    def exact(text):
        joint = exact_joint(lm, text, 2).probs
        eye = torch.eye(4, dtype=torch.float64)
        # A joint of two tokens as a mixture over its first.
        rows = joint.sum(1)
        return speculative_decoding.CPDistribution(rows, [eye, (joint / rows[:, None]).T])

    out = speculative_generate(lm, exact, torch.tensor([0]), max_new_tokens=31)
    assert out.stats.tokens_per_call == 3.0
    assert out.stats.accepted_counts == (0, 0, 10)
    assert out.stats.accepted_per_position == (10, 10)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    lm = a_model()
    runs = [
        speculative_generate(lm, a_head(lm), torch.tensor([1]), max_new_tokens=30, seed=s).token_ids
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_drafting_off_is_plain_sampling():
    lm = a_model()
    out = speculative_generate(lm, None, torch.tensor([1]), max_new_tokens=12)
    assert len(out.token_ids) == 12
    assert out.stats.calls == 12
    assert out.stats.tokens_per_call == 1.0


def test_a_row_ends_with_the_end_of_text_inside_an_accepted_draft():
    lm = a_model()
    head = a_head(lm)
    whole = speculative_generate(lm, head, torch.tensor([1]), max_new_tokens=40, seed=5).token_ids
    for eos in range(VOCAB):
        cut = speculative_generate(
            lm, head, torch.tensor([1]), max_new_tokens=40, seed=5, eos_token_id=eos
        ).token_ids
        places = (whole == eos).nonzero()
        expected = whole[: int(places[0]) + 1] if len(places) else whole
        assert torch.equal(cut, expected)


def test_a_callback_sees_every_block_before_its_release_and_may_stop_it():
    lm, seen = a_model(), []

    def watch(row, block):
        seen.append(block)
        return len(seen) < 4

    out = speculative_generate(lm, a_head(lm), torch.tensor([1]), max_new_tokens=60, callback=watch)
    assert len(seen) == 4
    assert torch.equal(out.token_ids, torch.cat(seen[:3]))


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it():
    lm = a_model()
    lm.decode = lambda ids: "".join("abcde"[i] for i in ids.tolist())
    whole = lm.decode(
        speculative_generate(lm, a_head(lm), torch.tensor([1]), max_new_tokens=40, seed=2).token_ids
    )
    stop = whole[7:9]
    out = speculative_generate(
        lm, a_head(lm), torch.tensor([1]), max_new_tokens=40, seed=2, stop_strings=[stop]
    )
    assert lm.decode(out.token_ids) == whole[: whole.index(stop) + 2]


def test_stop_strings_for_a_model_that_writes_no_text_are_refused():
    with pytest.raises(ValueError, match="for a model without decode"):
        speculative_generate(separated_hmm(2, 4), None, torch.tensor([0]), stop_strings=["ab"])


def test_the_window_can_be_filled_to_its_last_position():
    lm = a_model(window=16)
    out = speculative_generate(
        lm, a_head(lm), torch.tensor([1, 2, 3]), max_new_tokens=13, temperature=0
    )
    plain = plain_greedy(lm, torch.tensor([1, 2, 3]), 13)
    assert out.sequences[0].tolist() == plain[0].tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    horizon=st.integers(1, 5),
    count=st.integers(0, 9),
    rows=st.integers(1, 3),
    masked=st.sets(st.integers(1, 5), max_size=4),
    eos=st.one_of(st.none(), st.integers(0, 5)),
    rule=st.sampled_from(["token", "block"]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_whatever_is_asked_only_possible_tokens_come_out_and_rows_end_where_they_should(
    seed, horizon, count, rows, masked, eos, rule, temperature
):
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(6, 6, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    table[:, sorted(masked)] = 0
    table = table / table.sum(1, keepdim=True)
    lm = MarkovLanguageModel(table[0], table)
    draft = random_draft(6, horizon, 2, seed=seed)
    prompts = [torch.randint(6, (1 + k,), generator=generator) for k in range(rows)]
    out = speculative_generate(
        lm,
        lambda text: draft,
        prompts,
        max_new_tokens=count,
        rule=rule,
        temperature=temperature,
        seed=seed,
        eos_token_id=eos,
    )
    for prompt, new in zip(prompts, out.token_ids, strict=True):
        text = torch.cat([prompt[-1:], new])
        assert bool((table[text[:-1], text[1:]] > 0).all())
        ended = eos is not None and eos in new.tolist()
        assert len(new) == (new.tolist().index(eos) + 1 if ended else count)
    assert out.stats.tokens == sum(map(len, out.token_ids))
    if eos is None and count:
        drafted = sum(k * times for k, times in enumerate(out.stats.accepted_counts))
        assert out.stats.tokens == rows + drafted + sum(out.stats.accepted_counts)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("model", ["code", "prose"])
def test_a_real_model_with_its_head_emits_the_law_of_the_model_alone(
    model, rule, temperature, batch
):
    lm = load_language_model(model)
    head = CPHead.from_pretrained(embedded_heads(model)["recommended"]).attach(lm)
    prompt = sample_sequences(lm, 1, 24, seed=5)[0]
    options = {"max_new_tokens": 3 + head.horizon, "rule": rule, "temperature": temperature}
    tokens = []
    for seed in range(1200 // batch):
        out = speculative_generate(lm, head, [prompt] * batch, seed=seed, **options)
        tokens += [new[:3] for new in out.token_ids]
    # One in a thousand for all sixteen cells together.
    assert (
        law_p_value(torch.stack(tokens), exact_joint(lm, prompt, 3, temperature=temperature).probs)
        > 1e-3 / 16
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["code", "prose"])
def test_greedy_output_of_a_real_model_is_plain_greedy_decoding_over_ten_thousand_tokens(model):
    lm = load_language_model(model)
    lm.model.double()
    head = CPHead.from_pretrained(embedded_heads(model)["recommended"]).double()
    head.base_sha256 = ""  # the same weights in another precision
    head.attach(lm)
    for prompt in sample_sequences(lm, 50, 40, seed=3):
        out = speculative_generate(
            lm, head, prompt, max_new_tokens=200, rule="greedy", temperature=0.0
        )
        assert torch.equal(out.sequences[0][None], plain_greedy(lm, prompt, 200))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_as_many_tokens_as_asked_come_out(count):
    lm = a_model()
    assert (
        len(speculative_generate(lm, a_head(lm), torch.tensor([1]), max_new_tokens=count).token_ids)
        == count
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.tensor([], dtype=torch.long)}, "empty prompt"),
        ({"token_ids": torch.zeros(60, dtype=torch.long)}, "run past the model's 64 positions"),
        ({"token_ids": torch.tensor([VOCAB])}, "prompt tokens must be"),
        ({"rule": "luck"}, "unknown rule"),
        ({"rule": "greedy"}, "at temperature 0 only"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_input_is_refused(changes, message):
    lm = a_model()
    arguments = {"token_ids": torch.tensor([1]), "max_new_tokens": 10} | changes
    with pytest.raises(ValueError, match=message):
        speculative_generate(lm, a_head(lm), arguments.pop("token_ids"), **arguments)


def test_transformers_generate_can_call_it():
    lm = a_model()
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = lm.model.generate(prompt, **options)
    assert torch.equal(
        lm.model.generate(prompt, custom_generate=custom_generate(lm, a_head(lm)), **options), plain
    )


LAWS = [
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.9},
]


def generated(law, *, rows: int = 1500, **options) -> torch.Tensor:
    """What transformers' ``generate`` returns when it samples by drafts: the new tokens."""
    lm, prompt = a_model(), torch.tensor([[2, 1]])
    out = lm.model.generate(
        prompt.expand(rows, -1),
        attention_mask=torch.ones(rows, 2),
        custom_generate=custom_generate(lm, a_head(lm, horizon=3)),
        do_sample=True,
        max_new_tokens=3,
        **({"eos_token_id": None, "pad_token_id": 0} | law | options),
    )
    assert torch.equal(out[:, :2], prompt.expand(rows, -1))
    return out[:, 2:]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_what_transformers_samples_by_drafts_follows_the_law_it_asked_for(law):
    tokens, lm = generated(law), a_model()
    for other in LAWS:
        p_value = law_p_value(tokens, exact_joint(lm, torch.tensor([2, 1]), 3, **other).probs)
        assert p_value > 1e-3 if other == law else p_value < 1e-6, other


def test_transformers_samples_without_drafts_follow_the_same_law():
    lm, law = a_model(), {"temperature": 1.5, "top_k": 4, "top_p": 0.9}
    torch.manual_seed(0)
    plain = lm.model.generate(
        torch.tensor([[2, 1]]).expand(1500, -1),
        attention_mask=torch.ones(1500, 2),
        do_sample=True,
        max_new_tokens=3,
        eos_token_id=None,
        pad_token_id=0,
        **law,
    )
    joint = exact_joint(lm, torch.tensor([2, 1]), 3, **law).probs
    assert law_p_value(plain[:, 2:], joint) > 1e-3


def test_rows_that_transformers_sees_end_early_are_filled_with_its_padding():
    tokens = generated({}, rows=400, eos_token_id=4, pad_token_id=0)
    whole = generated({}, rows=400)
    ended = (whole == 4).cumsum(1) - (whole == 4).long() > 0
    assert 0 < ended.sum() < ended.numel()
    assert torch.equal(tokens, whole.masked_fill(ended, 0))


def test_the_monitor_gets_a_line_per_cycle(tmp_path):
    lm = a_model()
    out = speculative_generate(
        lm, a_head(lm), torch.tensor([1]), max_new_tokens=20, monitor=tmp_path / "log.jsonl"
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == out.stats.calls - 1
    assert sum(line["accepted"][0] + 1 for line in lines) >= 19
    assert set(lines[0]["seconds"]) == {"target", "draft", "verification", "rest"}
    assert out.stats.latency(0.95) >= out.stats.latency(0.5) > 0


def test_whoever_watches_is_told_after_every_cycle():
    """The last told is what the run comes to."""
    lm, told = a_model(), []
    draft = random_draft(lm.vocab_size, 2, 2, seed=1)
    prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    out = speculative_generate(
        lm, lambda text: draft, prompts, max_new_tokens=20, seed=0, watch=told.append
    )
    assert len(told) == out.stats.calls - 1
    assert told[-1].tokens_per_call == out.stats.tokens_per_call
    assert told[-1].stage_seconds == out.stats.stage_seconds
    assert [p.tokens for p in told] == sorted(p.tokens for p in told)
    # The first token of a row comes with its prompt.
    assert told[-1].tokens == out.stats.tokens - len(prompts)
    assert sum(out.stats.stage_shares.values()) == pytest.approx(1)
    assert f"{out.stats.tokens_per_call:.2f} tokens per call, draft " in str(told[-1])
