"""The learned head: proper distributions, anchoring, and files that only fit their base model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpmtp.heads.cp_head import CPHead
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.new_models import new_llama

SHAPES = [
    {},
    {"anchored": True},
    {"anchored": True, "blocks": 1, "width": 24},
    {"blocks": 2},
]


def a_head(*, hidden_size=12, vocab_size=7, horizon=3, rank=2, **shape) -> CPHead:
    torch.manual_seed(0)
    head = CPHead(
        hidden_size=hidden_size, vocab_size=vocab_size, horizon=horizon, rank=rank, **shape
    )
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return head.attach_weights(
        torch.randn(vocab_size, hidden_size), torch.randn(vocab_size, hidden_size)
    ).eval()


def base(seed: int = 0) -> HuggingFaceLanguageModel:
    return HuggingFaceLanguageModel(
        new_llama(7, width=96, layers=1, window=64, seed=seed), name=f"base{seed}"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_gives_a_distribution_of_the_right_shape(shape):
    head = a_head(**shape)
    law = head(torch.randn(5, 12), torch.randint(7, (5,)))
    assert law.batch_shape == (5,)
    assert (law.horizon, law.rank, law.vocab_size) == (3 - head.anchored, 2, 7)
    assert torch.allclose(law.to_tensor().flatten(1).sum(1), torch.ones(5), atol=1e-5)


def test_an_unanchored_draft_is_the_joint_given_its_first_token():
    head, hidden = a_head(), torch.randn(1, 12)
    joint = head(hidden).to_tensor()[0]
    drafted = head.draft(hidden.expand(7, -1), torch.arange(7)).to_tensor()
    assert torch.allclose(drafted, joint / joint.sum((1, 2), keepdim=True), atol=1e-5)


def test_an_anchored_draft_depends_on_its_first_token_and_an_unanchored_head_does_not():
    hidden, tokens = torch.randn(1, 12).expand(2, -1), torch.tensor([0, 3])
    for anchored in (True, False):
        law = a_head(anchored=anchored, blocks=1)(hidden, tokens).to_tensor()
        assert torch.allclose(law[0], law[1]) is not anchored


def test_rank_one_is_independent_heads():
    head, hidden = a_head(rank=1), torch.randn(4, 12)
    product = torch.einsum("bi,bj,bk->bijk", *(f[..., 0] for f in head(hidden).factors))
    assert torch.allclose(head(hidden).to_tensor(), product, atol=1e-6)
    assert torch.allclose(
        head.draft(hidden, torch.tensor([0, 1, 2, 3])).factors[0], head(hidden).factors[1]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_comes_back_from_its_folder(shape, tmp_path):
    lm = base()
    head = (
        CPHead(hidden_size=96, vocab_size=7, horizon=3, rank=2, base_sha256=lm.fingerprint, **shape)
        .attach(lm)
        .eval()
    )
    head.save_pretrained(tmp_path)
    again = CPHead.from_pretrained(tmp_path).attach(lm)
    hidden, tokens = torch.randn(2, 96), torch.randint(7, (2,))
    assert torch.equal(head(hidden, tokens).to_tensor(), again(hidden, tokens).to_tensor())
    assert json.loads((tmp_path / "config.json").read_text())["horizon"] == 3


def test_a_head_refuses_another_base_model():
    lm = base()
    head = CPHead(
        hidden_size=96, vocab_size=7, horizon=3, rank=2, base="base0", base_sha256=lm.fingerprint
    )
    with pytest.raises(ValueError, match=r"trained on 'base0'.*not on 'base1'"):
        head.attach(base(seed=1))
    other = HuggingFaceLanguageModel(new_llama(9, width=96, layers=1, window=64, seed=0))
    with pytest.raises(ValueError, match="does not fit an unembedding"):
        CPHead(hidden_size=96, vocab_size=7, horizon=3, rank=2).attach(other)


def test_a_head_without_a_base_model_says_so():
    with pytest.raises(ValueError, match="attach"):
        CPHead(hidden_size=4, vocab_size=5, horizon=2, rank=1)(torch.randn(1, 4))


def test_a_damaged_head_file_is_a_clear_error(tmp_path):
    head = CPHead(hidden_size=96, vocab_size=7, horizon=3, rank=2)
    head.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="does not hold this head's weights"):
        CPHead.from_pretrained(tmp_path)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="does not hold this head's weights"):
        CPHead.from_pretrained(tmp_path)
    file.write_bytes(whole)
    weights = load_file(file)
    del weights["maps"]
    save_file(weights, file)
    with pytest.raises(ValueError, match="does not hold this head's weights"):
        CPHead.from_pretrained(tmp_path)


def test_weights_stored_in_half_precision_are_read(tmp_path):
    head = a_head()
    head.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: w.to(torch.bfloat16) for name, w in load_file(file).items()}, file)
    again = CPHead.from_pretrained(tmp_path)
    assert again.maps.dtype == torch.float32
    assert torch.allclose(again.maps, head.maps, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("bad", [{"horizon": 1}, {"rank": 0}, {"blocks": -1}])
def test_an_impossible_shape_is_refused(bad):
    with pytest.raises(ValueError, match="at least"):
        CPHead(**({"hidden_size": 4, "vocab_size": 5, "horizon": 3, "rank": 2} | bad))
