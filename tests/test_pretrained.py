"""The Hugging Face adapter: every architecture gives the joint that full forward passes give, fast
where it can.
"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from reference import full_pass_joint
from rounding import FORWARD, rounding
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    RobertaConfig,
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


# Whatever precision its weights have, its states are single.
SINGLE_INSIDE = {"mamba"}


def random_model(
    kind: str, sharpness: float = 4.0, dtype: torch.dtype = torch.float32
) -> HuggingFaceLanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with (
        torch.no_grad()
    ):  # freshly initialised models are all but uniform, which would hide mistakes
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(sharpness)
    return HuggingFaceLanguageModel(model.to(dtype), name=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_architecture_gives_the_joint_of_full_forward_passes(kind, dtype):
    lm = random_model(kind, dtype=dtype)
    assert lm.shares_prefixes == (kind in SHARES)
    expected, conditionals = full_pass_joint(lm, CONTEXT, 3)
    double = dtype == torch.float64 and kind not in SINGLE_INSIDE
    allowed = FORWARD if double else _single_precision(kind)
    _check_joint(exact_joint(lm, CONTEXT, 3), expected, conditionals, allowed)
    assert expected.max() > 3 * expected.mean()  # a uniform law would agree with anything


def _single_precision(kind: str) -> float:
    """What passes of other shapes may differ by in single precision: eight times what separates
    it from double, as measured on this machine, and the rounding of log-probabilities themselves.
    """
    conditionals = [
        full_pass_joint(random_model(kind, dtype=dtype), CONTEXT, 3)[1]
        for dtype in (torch.float32, torch.float64)
    ]
    apart = _worst_log_prob(*conditionals)
    return 8 * apart + rounding(torch.float32, 11 + 20)


def _check_joint(joint, expected, conditionals, allowed: float) -> None:
    """Conditionals as close as allowed to log-probabilities, and products of them as follows."""
    entries = joint.probs.numel()
    assert abs(joint.probs.sum().item() - 1) <= rounding(torch.float64, entries)
    found = [joint.conditional_probs(k).log() for k in range(1, joint.horizon + 1)]
    assert _worst_log_prob(found, conditionals) <= allowed
    # A product of n conditionals, each off by a factor of e to the allowed.
    distance = 0.5 * (joint.probs - expected).abs().sum()
    assert distance <= 0.5 * math.expm1(joint.horizon * allowed)


def _worst_log_prob(found, expected, floor: float = -20.0) -> float:
    return max(
        (one.view(other.shape) - other)[other > floor].abs().max().item()
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", sorted(SHARES))
def test_a_shared_prefix_gives_what_each_branch_gives_alone(kind):
    lm = random_model(kind, dtype=torch.float64)
    continuations = torch.randint(11, (40, 3), generator=torch.Generator().manual_seed(1))
    alone = torch.cat(
        [lm.next_token_log_probs(torch.cat([CONTEXT, c])[None]) for c in continuations]
    )
    torch.testing.assert_close(
        lm.continuation_log_probs(CONTEXT, continuations), alone, atol=FORWARD, rtol=0
    )
    lm.batch_tokens = 4  # however it is cut into passes
    torch.testing.assert_close(
        lm.continuation_log_probs(CONTEXT, continuations), alone, atol=FORWARD, rtol=0
    )
    assert lm.model.config._attn_implementation == "sdpa"


def test_a_new_context_is_not_answered_from_the_last_ones_cache():
    lm = random_model("llama")
    first = exact_joint(lm, CONTEXT, 2).probs
    other = exact_joint(lm, CONTEXT.flip(0), 2).probs
    assert not torch.allclose(first, other)
    torch.testing.assert_close(exact_joint(lm, CONTEXT, 2).probs, first)


def test_a_double_precision_forward_pass_is_kept():
    single, double = (random_model("llama", dtype=d) for d in (torch.float32, torch.float64))
    joint, (expected, _) = exact_joint(double, CONTEXT, 2), full_pass_joint(double, CONTEXT, 2)
    torch.testing.assert_close(joint.probs, expected, atol=0, rtol=3 * FORWARD)
    assert (exact_joint(single, CONTEXT, 2).probs / expected - 1).abs().max() > 100 * FORWARD


def test_a_half_precision_forward_pass_stays_near_and_sums_to_one():
    lm = random_model("llama", sharpness=2.0)
    expected = exact_joint(lm, CONTEXT, 2).probs
    joint = exact_joint(HuggingFaceLanguageModel(lm.model.bfloat16()), CONTEXT, 2)
    assert abs(joint.probs.sum().item() - 1) <= rounding(torch.float64, 11**2)
    # Logits of about one, rounded some six times on their way, of two tokens.
    assert 0.5 * (joint.probs - expected).abs().sum() <= rounding(torch.bfloat16, 2 * 6)


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
    _check_joint(joint, expected, conditionals, FORWARD)
    if horizon > 1:
        shorter = exact_joint(lm, context, horizon - 1).probs
        allowed = rounding(torch.float64, joint.probs.numel())
        assert (joint.marginal(horizon - 1).probs - shorter).abs().max() <= allowed


def test_a_real_models_joint_is_that_of_full_forward_passes(stories):
    _check_real_joint(load_language_model(stories, dtype=torch.float64), 2, 32)


@pytest.mark.parametrize("name", ["code", "prose"])
def test_an_embedded_models_joint_is_that_of_full_forward_passes(name):
    if name not in embedded_models():
        pytest.skip(f"the embedded model {name} is not there yet")
    _check_real_joint(load_language_model(name, dtype=torch.float64), 2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["code", "prose"])
def test_an_embedded_models_joint_of_three_is_that_of_full_forward_passes(name):
    if name not in embedded_models():
        pytest.skip(f"the embedded model {name} is not there yet")
    _check_real_joint(load_language_model(name, dtype=torch.float64), 3, 16)


def _stored(folder, change) -> None:
    """A small model's folder whose weights are what `change` makes of them."""
    random_model("llama").model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, "3 missing weights"),
        (lambda w: w | {"model.layers.9.extra": torch.ones(2)}, "1 unexpected weights"),
        (lambda w: w | {"model.norm.weight": torch.ones(7)}, "could not be loaded"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused_in_one_line(change, said, tmp_path, capfd):
    _stored(tmp_path, change)
    capfd.readouterr()
    with pytest.raises(ValueError, match=said) as refused:
        load_language_model(tmp_path)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_models_are_loaded_by_several_threads_at_once():
    found: list[HuggingFaceLanguageModel] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_language_model("code"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({lm.fingerprint for lm in found}) == 1 and len(found) == 3


def test_a_model_of_text_and_pictures_is_read_by_its_part_for_text():
    text = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2}
    text |= {"max_position_embeddings": 64, "sliding_window": 4, "query_pre_attn_scalar": 8}
    pictures = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    pictures |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=4)
    lm = HuggingFaceLanguageModel(AutoModelForCausalLM.from_config(config))
    assert lm.max_context == 64 and lm.vocab_size == 24
    assert lm.sample_tokens(2, 5).shape == (2, 5)
    with pytest.raises(ValueError, match="64 positions"):
        exact_joint(lm, torch.zeros(64, dtype=torch.long), 2)


def test_a_table_of_positions_that_begins_after_the_padding_is_shorter_than_it_looks():
    config = RobertaConfig(
        vocab_size=24,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        is_decoder=True,
        pad_token_id=1,
    )
    lm = HuggingFaceLanguageModel(AutoModelForCausalLM.from_config(config))
    assert lm.max_context == 64
    with pytest.raises(ValueError, match="64 positions"):
        exact_joint(lm, torch.full((65,), 3), 1)
