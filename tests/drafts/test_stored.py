"""Drafts and fits in files and on devices; their components in words and as a picture."""

from __future__ import annotations

import pytest
import torch
from samples import BigramTable, CharacterTable, random_cp

import cpmtp
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.drafts.support import Support
from cpmtp.joint_distribution.stored import Stored


def simplex(*shape: int, axis: int = -1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(*shape, generator=generator, dtype=torch.float64).softmax(axis)


def drafts() -> dict[str, Stored]:
    some = Support.of(torch.tensor([0, 2, 3]), vocab_size=6, positions=2, batch_shape=(2,))
    joint = cpmtp.exact_joint(BigramTable(), [1, 2], 3)
    logits = simplex(3, 2, 5).log()
    return {
        "cp": random_cp((), 5, 3, 2),
        "support": CPDistribution(simplex(2, 2), [simplex(2, 3, 2, axis=-2)] * 2, some),
        "markov": MarkovMixture(simplex(2), logits, simplex(1, 5, 2), simplex(1, 2, 5)),
        "hmm": HMMDistribution(simplex(2), simplex(2, 2, 2), [simplex(5, 2, axis=-2)] * 3),
        "fit": cpmtp.fit(joint, 2),
        "anchored": cpmtp.fit(joint, 2, anchored=True),
        "failed": cpmtp.fit(joint.marginal(1), 2, "als"),
        "tree": cpmtp.fit(cpmtp.truncated_joint(BigramTable(), [1, 2], 3), 2, anchored=True),
    }


@pytest.mark.parametrize("name", drafts())
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    draft = drafts()[name]
    path = draft.save(tmp_path / "draft.safetensors")
    again = type(draft).load(path)
    assert repr(again) == repr(draft)
    mine, its = (getattr(d, "distribution", d) for d in (draft, again))
    assert type(its) is type(mine)
    for one in (0, 3) if mine.batch_shape == (6,) else (0,) if mine.batch_shape else (None,):
        some, other = (d if one is None else d[one] for d in (mine, its))
        assert torch.equal(some.to_tensor(), other.to_tensor())
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", drafts())
def test_a_draft_in_another_precision_is_the_same_draft(name):
    draft = drafts()[name]
    assert repr(draft.to("cpu")) == repr(draft)
    moved = draft.to(torch.float32)
    mixture = getattr(moved, "distribution", moved)
    mixture = getattr(mixture, "entries", mixture)
    assert mixture.weights.dtype == torch.float32
    if mixture.support is not None:
        assert all(ids.dtype == torch.int64 for ids in mixture.support.ids)


@pytest.mark.parametrize("content", [b"", b"no file", None])
def test_a_file_that_holds_no_draft_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "draft"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no CPDistribution") as error:
        CPDistribution.load(path)
    assert "\n" not in str(error.value)


def test_another_kind_of_draft_is_refused(tmp_path):
    path = random_cp((), 5, 3, 2).save(tmp_path / "draft")
    with pytest.raises(ValueError, match="holds CPDistribution: expected MarkovMixture"):
        MarkovMixture.load(path)
    path = cpmtp.exact_joint(BigramTable(), [1], 2)
    path.save(tmp_path / "joint")
    with pytest.raises(ValueError, match="holds no draft: expected CPDistribution"):
        CPDistribution.load(tmp_path / "joint")


@pytest.mark.parametrize("name", ["cp", "markov", "hmm", "fit"])
def test_components_are_listed_heaviest_first_with_their_tokens(name):
    draft = drafts()[name]
    mixture = getattr(draft, "distribution", draft)
    table = cpmtp.top_tokens(draft, CharacterTable(), count=3)
    assert table.groupby("component")["weight"].first().is_monotonic_decreasing
    assert len(table) == mixture.rank * mixture.horizon * 3
    assert (table["token"] == [chr(97 + i) for i in table["token_id"]]).all()
    for _, rows in table.groupby(["component", "position"]):
        assert rows["probability"].is_monotonic_decreasing and rows["probability"].sum() <= 1 + 1e-9
    # By hand: the law of the first token in each component.
    heaviest = int(mixture.weights.argmax())
    first = next(mixture.component_probs())[heaviest]
    rows = table.query("component == 0 and position == 1")
    assert rows["probability"].tolist() == first.sort(descending=True).values[:3].tolist()


def test_components_of_a_product_mixture_are_its_factors():
    draft = random_cp((), 5, 3, 2)
    for position, probs in enumerate(draft.component_probs()):
        assert torch.equal(probs, draft.factors[position].mT)


def test_components_of_what_has_batch_axes_or_none_are_refused():
    anchored = drafts()["anchored"]
    with pytest.raises(ValueError, match="select one"):
        anchored.top_tokens(None)
    assert len(cpmtp.top_tokens(anchored.distribution[2], None, count=1)) == 4
    with pytest.raises(ValueError, match="has components"):
        cpmtp.top_tokens(cpmtp.exact_joint(BigramTable(), [1], 2), None)
    with pytest.raises(ValueError, match="count 0"):
        cpmtp.top_tokens(random_cp((), 5, 3, 2), None, count=0)


def test_components_are_drawn_with_their_weights_and_tokens():
    from matplotlib.figure import Figure

    table = cpmtp.top_tokens(drafts()["cp"], CharacterTable(), count=5)
    ax = cpmtp.plot_components(table, Figure().subplots())
    weights = table.groupby("component")["weight"].first()
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"weight {w:.2f}" for w in weights]
    assert len(ax.patches) == 2 * 3 * 5
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(6)
    assert {text.get_text() for text in ax.texts} <= set(table["token"])
    with pytest.raises(ValueError, match="what top_tokens returns"):
        cpmtp.plot_components(table.iloc[:0], Figure().subplots())
