"""The Hugging Face adapter: every architecture gives the joint that full forward passes give, fast
where it can.
"""

from __future__ import annotations

import pytest
import torch
from reference_joint import full_pass_joint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    RwkvConfig,
)

from cpmtp.joint_distribution import exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel, embedded_models, load_language_model
from cpmtp.training.new_models import new_llama

CONTEXT = torch.tensor([3, 1, 4, 1, 5])
SMALL = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=11, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, num_attention_heads=4, max_position_embeddings=64),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=8, max_position_embeddings=64),
    "sliding": MistralConfig(**SMALL, **HEADS, max_position_embeddings=64, sliding_window=4),
    "mamba": MambaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, state_size=4),
    "rwkv": RwkvConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, context_length=64),
}
SHARES = {"llama", "gpt2", "gpt_neox"}


def random_model(kind: str, sharpness: float = 4.0) -> HuggingFaceLanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with (
        torch.no_grad()
    ):  # freshly initialised models are all but uniform, which would hide mistakes
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(sharpness)
    return HuggingFaceLanguageModel(model, name=kind)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_architecture_gives_the_joint_of_full_forward_passes(kind):
    lm = random_model(kind)
    assert lm.shares_prefixes == (kind in SHARES)
    joint = exact_joint(lm, CONTEXT, 3)
    expected, conditionals = full_pass_joint(lm, CONTEXT, 3)
    assert abs(joint.probs.sum().item() - 1) <= 1e-9
    assert 0.5 * (joint.probs - expected).abs().sum() <= 1e-5
    assert _worst_conditional(joint, conditionals) <= 1e-4
    assert expected.max() > 3 * expected.mean()  # a uniform law would agree with anything


def _worst_conditional(joint, conditionals, floor=-20.0):
    worst = 0.0
    for k, expected in enumerate(conditionals, 1):
        found = joint.conditional_probs(k).log().view(expected.shape)
        counted = expected > floor
        worst = max(worst, (found - expected)[counted].abs().max().item())
    return worst


@pytest.mark.parametrize("kind", sorted(SHARES))
def test_a_shared_prefix_gives_what_each_branch_gives_alone(kind):
    lm = random_model(kind)
    continuations = torch.randint(11, (40, 3), generator=torch.Generator().manual_seed(1))
    alone = torch.cat(
        [lm.next_token_log_probs(torch.cat([CONTEXT, c])[None]) for c in continuations]
    )
    torch.testing.assert_close(
        lm.continuation_log_probs(CONTEXT, continuations), alone, atol=1e-4, rtol=1e-4
    )
    lm.batch_tokens = 4  # however it is cut into passes
    torch.testing.assert_close(
        lm.continuation_log_probs(CONTEXT, continuations), alone, atol=1e-4, rtol=1e-4
    )
    assert lm.model.config._attn_implementation == "sdpa"


def test_a_new_context_is_not_answered_from_the_last_ones_cache():
    lm = random_model("llama")
    first = exact_joint(lm, CONTEXT, 2).probs
    other = exact_joint(lm, CONTEXT.flip(0), 2).probs
    assert not torch.allclose(first, other)
    torch.testing.assert_close(exact_joint(lm, CONTEXT, 2).probs, first)


def test_a_double_precision_forward_pass_is_kept():
    lm = random_model("llama")
    double = HuggingFaceLanguageModel(lm.model.double())
    joint, (expected, _) = exact_joint(double, CONTEXT, 2), full_pass_joint(double, CONTEXT, 2)
    torch.testing.assert_close(joint.probs, expected, atol=1e-13, rtol=1e-9)


def test_a_half_precision_forward_pass_stays_near_and_sums_to_one():
    lm = random_model("llama", sharpness=2.0)
    expected = exact_joint(lm, CONTEXT, 2).probs
    joint = exact_joint(HuggingFaceLanguageModel(lm.model.bfloat16()), CONTEXT, 2)
    assert abs(joint.probs.sum().item() - 1) <= 1e-9
    assert 0.5 * (joint.probs - expected).abs().sum() <= 0.05


def test_contexts_and_horizons_beyond_the_window_are_refused():
    lm = random_model("llama")
    assert exact_joint(lm, torch.zeros(63, dtype=torch.long), 2).horizon == 2
    with pytest.raises(
        ValueError,
        match=r"context of 64 tokens and horizon 2 run past the model's 64 positions: .* most 63",
    ):
        exact_joint(lm, torch.zeros(64, dtype=torch.long), 2)


def test_an_empty_context_needs_a_start_token():
    empty = torch.empty(0, dtype=torch.long)
    lm = random_model("llama")
    started = exact_joint(lm, torch.tensor([lm.model.config.bos_token_id]), 2)
    torch.testing.assert_close(exact_joint(lm, empty, 2).probs, started.probs)
    lm.model.config.bos_token_id = None
    with pytest.raises(ValueError, match="no start-of-text token"):
        exact_joint(lm, empty, 2)


def test_weights_that_are_not_numbers_are_found_out():
    model = new_llama(11, width=32, layers=1, window=64, seed=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        exact_joint(HuggingFaceLanguageModel(model), CONTEXT, 2)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="without a tokenizer"):
        random_model("llama").encode("def")


def _sampled_context(lm, length):
    return lm.sample_tokens(1, length, seed=1)[0]


def _check_real_joint(lm, horizon, length):
    context = _sampled_context(lm, length)
    joint = exact_joint(lm, context, horizon)
    expected, conditionals = full_pass_joint(lm, context, horizon)
    assert lm.shares_prefixes
    assert abs(joint.probs.sum().item() - 1) <= 1e-9
    assert 0.5 * (joint.probs - expected).abs().sum() <= 1e-5
    assert _worst_conditional(joint, conditionals) <= 1e-4
    if horizon > 1:
        shorter = exact_joint(lm, context, horizon - 1).probs
        assert (joint.marginal(horizon - 1).probs - shorter).abs().max() <= 1e-9


def test_a_real_models_joint_is_that_of_full_forward_passes(stories):
    _check_real_joint(load_language_model(stories), 2, 32)


@pytest.mark.parametrize("name", ["code", "prose"])
def test_an_embedded_models_joint_is_that_of_full_forward_passes(name):
    if name not in embedded_models():
        pytest.skip(f"the embedded model {name} is not there yet")
    _check_real_joint(load_language_model(name), 2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["code", "prose"])
def test_an_embedded_models_joint_of_three_is_that_of_full_forward_passes(name):
    if name not in embedded_models():
        pytest.skip(f"the embedded model {name} is not there yet")
    _check_real_joint(load_language_model(name), 3, 16)
