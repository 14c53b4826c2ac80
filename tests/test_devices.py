"""What a device computes is what the CPU computes, to the precision of its numbers."""

from __future__ import annotations

import pytest
import torch
from rounding import FITTED, FORWARD, rounding

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.decomposition.fitting import fit
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.losses import OBJECTIVES, head_loss
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.base_models import BaseTrainingSettings, _NextTokens, _optimisers
from cpmtp.training.heads import HeadTrainingSettings, train_head
from cpmtp.training.loop import Batch, Run
from cpmtp.training.new_models import new_llama
from cpmtp.validation.checks import law_p_value

VOCAB = 9


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ]
)
def device(request) -> str:
    return request.param


def a_model(device: str, dtype: torch.dtype = torch.float64) -> HuggingFaceLanguageModel:
    return HuggingFaceLanguageModel(
        new_llama(VOCAB, width=96, layers=2, window=64, seed=0).to(device, dtype)
    )


def a_head(lm: HuggingFaceLanguageModel, *, anchored: bool = True) -> CPHead:
    torch.manual_seed(3)
    head = CPHead(hidden_size=96, vocab_size=VOCAB, horizon=3, rank=2, anchored=anchored, blocks=1)
    return head.to(lm.device, lm.model.dtype).attach(lm).eval().requires_grad_(False)


def test_joints_agree(device):
    context = torch.tensor([1, 2, 3])
    found, expected = (exact_joint(a_model(d), context, 3).probs.cpu() for d in (device, "cpu"))
    torch.testing.assert_close(found, expected, atol=0, rtol=3 * FORWARD)


@pytest.mark.parametrize("method", ["em", "gradient", "acceptance"])
def test_fits_agree(device, method):
    probs = exact_joint(a_model("cpu"), torch.tensor([1, 2]), 3).probs
    settings = {"method": method, "seed": 0, "max_iterations": 8, "restarts": 1}
    found, expected = (fit(JointDistribution(probs.to(d)), 2, **settings) for d in (device, "cpu"))
    torch.testing.assert_close(
        found.distribution.to_tensor().cpu(), expected.distribution.to_tensor(), atol=FITTED, rtol=0
    )


def test_implied_acceptance_agrees(device):
    joint = exact_joint(a_model("cpu"), torch.tensor([1, 2]), 3)
    draft = fit(joint, 2, seed=0).distribution
    expected = implied_acceptance(joint, draft, rule="block").tokens_per_call
    moved = type(draft)(draft.weights.to(device), [factor.to(device) for factor in draft.factors])
    found = implied_acceptance(
        JointDistribution(joint.probs.to(device)), moved, rule="block"
    ).tokens_per_call
    assert found == pytest.approx(expected, abs=3 * rounding(torch.float64, 16 * VOCAB**3))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_head_losses_agree(device, objective):
    values = []
    for place in (device, "cpu"):
        lm = a_model(place)
        tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1)).to(place)
        values.append(
            head_loss(
                a_head(lm), lm.hidden_states(tokens), tokens, lm.unembed, objective=objective
            ).loss.cpu()
        )
    torch.testing.assert_close(*values, atol=0, rtol=3 * FORWARD)


def test_a_head_learns_where_its_base_model_is(device):
    lm = a_model(device, torch.float32)
    settings = HeadTrainingSettings(horizon=3, rank=2, steps=3, rows=2, length=16, sequences=4)
    head = train_head(lm, settings)
    assert head.maps.device.type == device


@pytest.mark.parametrize("anchored", [True, False])
def test_a_seed_decodes_the_same_text_and_the_forecast_is_the_same(device, anchored):
    texts, forecasts = [], []
    for place in (device, "cpu"):
        lm = a_model(place)
        head = a_head(lm, anchored=anchored)
        prompts = [torch.tensor([1, 2]), torch.tensor([4, 5])]
        out = speculative_generate(lm, head, prompts, max_new_tokens=20, seed=7)
        texts.append([row.tolist() for row in out.token_ids])
        forecasts.append(
            forecast_cycles(lm, head, torch.stack(out.sequences).cpu(), start=2).tokens_per_call
        )
    assert texts[0] == texts[1]
    assert forecasts[0] == pytest.approx(forecasts[1], rel=3 * FORWARD)


def test_what_is_decoded_follows_the_exact_joint(device):
    lm, prompt = a_model(device), torch.tensor([1, 2])
    out = speculative_generate(lm, a_head(lm), [prompt] * 800, max_new_tokens=5, seed=0)
    tokens = torch.stack([row[:2] for row in out.token_ids])
    assert law_p_value(tokens, exact_joint(lm, prompt, 2).probs.cpu()) > 1e-3


def test_a_step_of_base_training_in_mixed_precision_lowers_the_loss(device):
    model = new_llama(VOCAB, width=96, layers=1, window=32, seed=0).to(device)
    settings = BaseTrainingSettings(bfloat16=True)
    objective = _NextTokens(model, settings)
    run = Run(model, objective, _optimisers(model, settings), checkpoint=None, key="")
    batch = Batch([0], (torch.arange(32).remainder(3).expand(4, -1),))
    losses = [run.advance(batch, 1.0).loss.item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
