"""Where tokens per call are lost, of every form: fits and heads by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from reference import brute_force_survival
from rounding import rounding

from cpmtp.decomposition.fitting import fit
from cpmtp.heads.conditionals import path_conditionals
from cpmtp.heads.evaluation import head_ceilings, rank_ceilings, waterfall
from cpmtp.joint_distribution import exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.heads import HeadTrainingSettings, train_head, train_heads
from cpmtp.training.new_models import new_llama

TINY = HeadTrainingSettings(horizon=3, rank=2, steps=30, rows=2, length=16, sequences=8)
VOCAB = 6


@pytest.fixture(scope="module")
def lm():
    model = new_llama(VOCAB, width=96, layers=1, window=64, seed=0)
    generator = torch.Generator().manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(VOCAB, 96, generator=generator))
    return HuggingFaceLanguageModel(model, name="tiny")


# A survival adds 6 ** 3 products of at most three conditionals, each a quotient of sums of as many
# probabilities; tokens per call add three survivals.
ALLOWED = 3 * rounding(torch.float64, 8 * VOCAB**3)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_waterfall_is_what_every_draft_earns_by_the_definition_and_falls(lm, rule):
    heads = train_heads(
        lm,
        [replace(TINY, anchored=anchored) for anchored in (True, False)],
    )
    contexts = {f"c{i}": row for i, row in enumerate(lm.sample_tokens(3, 6, seed=9))}
    table = waterfall(lm, heads, contexts, rule=rule).set_index(["context", "anchored"])
    assert len(table) == 6 and (table["rule"] == rule).all() and (table["exact_limit"] == 3).all()
    for name, head in itertools.product(contexts, heads):
        joint, row = exact_joint(lm, contexts[name], 3), table.loc[name, head.anchored]
        drafts = {"learned": laws_of(lm, head, contexts[name])}
        for method in ("em", "acceptance"):
            fitted = fit(joint, 2, method, anchored=head.anchored, rule=rule).distribution
            drafts[f"{method}_fit"] = fitted.to_tensor()
        earned = {
            column: brute_force_survival(joint.probs, draft, rule, "target")
            for column, draft in drafts.items()
        }
        for column, survival in earned.items():
            assert row[column] == pytest.approx(float(survival.sum()), abs=ALLOWED), column
        survival = row[["survival_1", "survival_2", "survival_3"]].tolist()
        assert survival == pytest.approx(earned["learned"].tolist(), abs=ALLOWED)
        levels = row[["exact_limit", "acceptance_fit", "em_fit", "learned"]]
        gaps = row[["rank_gap", "objective_gap", "learning_gap"]]
        assert gaps.tolist() == (-levels.diff().iloc[1:]).tolist()
        # Thirty steps do not reach what a fit to one context finds.
        assert (gaps >= -ALLOWED).all() and row["learning_gap"] > 0


OTHERS = [
    {"form": "markov", "rank": 1, "transition_rank": 2},
    {"form": "markov", "rank": 1, "transition_rank": 2, "gated": False, "anchored": False},
    {"form": "markov_mixture", "transition_rank": 2, "vocabulary": (0, 1, 2, 4, 5)},
    {"form": "recurrent", "rank": 1},
]
# A head's logits add some 96 products in single precision for each of three modelled tokens, and
# are exponents.
ALLOWED_OF_HEADS = 9 * rounding(torch.float32, 4 * 96)


@pytest.mark.parametrize("form", OTHERS, ids=str)
def test_the_waterfall_of_every_form_keeps_what_the_head_stores_and_frees_the_rest(lm, form):
    settings = replace(TINY, **form)
    head = train_head(lm, settings)
    context = lm.sample_tokens(1, 6, seed=9)[0]
    row = waterfall(lm, [head], {"c": context}, rule="block").iloc[0]
    joint = exact_joint(lm, context, 3)
    assert row["form"] == head.form and row["transition_rank"] == head.transition_rank

    def earned(draft):
        return float(brute_force_survival(joint.probs, draft, "block", "target").sum())

    assert row["learned"] == pytest.approx(
        earned(along_all(lm, head, context)), abs=ALLOWED_OF_HEADS
    )
    if head.form == "recurrent":
        assert row["em_fit"] == row["acceptance_fit"] == row["exact_limit"] == 3
        assert math.isnan(row["own_transitions"])
    else:
        right = torch.zeros(1, 2, VOCAB).index_copy(-1, head.kept, head.right[None]).double()
        asked = {"rank": head.rank, "form": head.form, "anchored": head.anchored}
        stored = {"transitions": (head.left[None].double(), right), "gated": head.gated}
        own = {"transition_rank": 2, "gated": head.gated and head.anchored}
        for column, method, options in (
            ("em_fit", "em", stored),
            ("acceptance_fit", "acceptance", stored),
            ("own_transitions", "em", own),
        ):
            draft = fit(joint, method=method, **asked, **options).distribution
            assert row[column] == pytest.approx(earned(draft.to_tensor()), abs=ALLOWED), column
    gaps = row[["rank_gap", "objective_gap", "learning_gap"]]
    assert gaps.sum() == pytest.approx(3 - row["learned"], abs=ALLOWED)
    assert (gaps >= -ALLOWED).all() and row["learning_gap"] > 0


def test_stored_factors_that_say_nothing_leave_the_ceiling_of_components_alone(lm):
    context = lm.sample_tokens(1, 6, seed=9)[0]
    joint = exact_joint(lm, context, 3)
    head = train_head(lm, replace(TINY, form="markov_mixture", transition_rank=2, steps=1))
    head.right.zero_()
    found, plain = head_ceilings(joint, head), rank_ceilings(joint, 2, True)
    assert found["em_fit"] == pytest.approx(plain["em_fit"], abs=1e-3)
    assert found["own_transitions"] > plain["em_fit"] + 1e-3


def along_all(lm, head, context) -> torch.Tensor:
    """The head's law of x_2, x_3 after every x_1, from what it says along every path."""
    paths = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)  # (paths, 3)
    hidden = lm.hidden_states(context[None])[0, -1].expand(len(paths), 1, -1)
    with torch.no_grad():
        features = head.features(hidden, torch.nn.functional.pad(paths, (1, 0)))
        logits = head.logits(hidden, features, *head.weights())
        found = path_conditionals(head, features.log_weights, logits, paths[:, None])
    return found.of_path()[:, 0].double().prod(-1).view(VOCAB, VOCAB, VOCAB)


def laws_of(lm, head, context) -> torch.Tensor:
    """The head's float32 output as one tensor in float64: after every first token, or of all."""
    with torch.no_grad():
        hidden = lm.hidden_states(context[None])[0, -1]
        out = head(hidden.expand(VOCAB, -1), torch.arange(VOCAB)) if head.anchored else head(hidden)
    weights, factors = out.weights.double(), [factor.double() for factor in out.factors]
    weights = weights / weights.sum(-1, keepdim=True)
    factors = [factor / factor.sum(-2, keepdim=True) for factor in factors]
    equation = "xr,xyr,xzr->xyz" if head.anchored else "r,xr,yr,zr->xyz"
    return torch.einsum(equation, weights, *factors)
