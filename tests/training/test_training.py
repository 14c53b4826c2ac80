"""Training of base models: resumable to the bit, measured on what was held out."""

from __future__ import annotations

import json

import pytest
import torch
from rounding import rounding

from cpmtp.corpora import Document
from cpmtp.pretrained import load_language_model
from cpmtp.training.base_models import BaseTrainingSettings, train_base
from cpmtp.training.muon import OWN, Muon, orthogonalise

TINY = BaseTrainingSettings(
    steps=6, windows_per_step=2, window=32, width=96, layers=1, warmup=2, merges=2
)


@pytest.fixture
def library(monkeypatch):
    """A standard library of a few lines, so that a training takes seconds."""
    documents = [Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 8) for i in range(40)]
    monkeypatch.setattr(
        "cpmtp.training.base_models.standard_library_documents", lambda domain: documents
    )


def test_a_training_stopped_and_resumed_ends_with_the_same_weights(library, tmp_path):
    def stop(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    train_base("code", tmp_path / "whole", TINY)
    with pytest.raises(KeyboardInterrupt):
        train_base("code", tmp_path / "stopped", TINY, checkpoint_seconds=0.0, callback=stop)
    assert (tmp_path / "stopped" / "checkpoint.safetensors").is_file()
    train_base("code", tmp_path / "stopped", TINY)
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]
    assert not (tmp_path / "stopped" / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_refused(library, tmp_path):
    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_base("code", tmp_path, TINY, checkpoint_seconds=0.0, callback=stop)
    other = BaseTrainingSettings(
        steps=6, windows_per_step=2, window=32, width=96, layers=2, warmup=2, merges=2
    )
    with pytest.raises(ValueError, match="other settings"):
        train_base("code", tmp_path, other)


def test_training_lowers_the_loss_and_writes_its_recipe(library, tmp_path):
    losses = []
    settings = BaseTrainingSettings(
        steps=40, windows_per_step=4, window=32, width=96, layers=1, warmup=2, merges=2
    )
    result = train_base("code", tmp_path, settings, callback=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0]
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["held_out_bits_per_byte"] == pytest.approx(result.bits_per_byte, abs=1e-4)
    assert recipe["tokens_seen"] == result.tokens_seen == 40 * 4 * 32
    lm = load_language_model(tmp_path)
    text = "def f(x):\n\treturn x + 1\n"
    assert lm.decode(lm.encode(text)) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (1, 6, 6)])
def test_orthogonalising_brings_singular_values_near_one_and_keeps_directions(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=dtype)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalise(matrices, 8) @ right.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    # Eight rounds of three products of eight terms; a small singular value, and what is off beside
    # it, grows up to 3.5 times in each until it is near one.
    allowed = 3.5**8 * rounding(dtype, 8 * 3 * 8)
    assert (found - torch.diag_embed(diagonal)).abs().max() < allowed


def test_muon_moves_what_a_family_shares_at_the_full_rate_and_the_rest_more_slowly():
    """Two families of three: one gradient for all of a family, and gradients without a mean."""
    torch.manual_seed(0)
    # Integers: means and differences are exact, and no rounding of theirs is made a step of.
    shared = torch.randint(-9, 10, (2, 1, 4, 6)).float().expand(-1, 3, -1, -1)
    own = torch.randint(-9, 10, (2, 2, 4, 6)).float()
    own = torch.cat([own, -own.sum(1, keepdim=True)], 1)

    def moved(gradient, members, **share):
        maps = torch.nn.Parameter(torch.zeros(6, 4, 6))
        maps.grad = gradient.reshape(6, 4, 6).clone()
        Muon([{"params": [maps], "members": members} | share], 1.0, momentum=0.0).step()
        return -maps.detach().view(2, 3, 4, 6)

    torch.testing.assert_close(moved(shared, 3), moved(shared, 1))
    torch.testing.assert_close(moved(own, 3), OWN * moved(own, 1), rtol=1e-4, atol=1e-5)
    shares = moved(own, 3, own=(0.5, 0.1))
    torch.testing.assert_close(shares[0], 0.5 * moved(own, 1)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shares[1], 0.1 * moved(own, 1)[1], rtol=1e-4, atol=1e-5)
    both = moved(10 * shared + own, 3)
    torch.testing.assert_close(both, moved(shared, 1) + OWN * moved(own, 1), rtol=1e-3, atol=1e-4)
