"""Heads of every form: their laws by the definition, what a decoder draws, draft vocabularies, and
the layer over the text.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from rounding import rounding
from safetensors.torch import load_file
from torch.nn.functional import embedding, rms_norm, silu

from cpmtp.heads import drafting
from cpmtp.heads.conditionals import path_conditionals
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.drafting import drafted_block
from cpmtp.heads.trunk import TextLayer
from cpmtp.sampling_law import SamplingLaw

VOCAB, WIDTH, HORIZON = 6, 12, 4
FORMS = [
    {"form": "cp", "rank": 3},
    {"form": "markov", "transition_rank": 2},
    {"form": "markov", "transition_rank": 2, "gated": False},
    {"form": "markov_mixture", "rank": 2, "transition_rank": 3},
    {"form": "recurrent"},
]
KEPT = [None, (0, 2, 3, 5)]
# Logits add some hundred products of numbers of size one; laws are quotients of sums of them.
ROUNDING = rounding(torch.float64, 10_000)


def a_head(*, anchored=True, vocabulary=None, hidden_size=WIDTH, **form) -> DraftHead:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden_size, "vocab_size": VOCAB, "horizon": HORIZON, "blocks": 1}
    head = DraftHead(anchored=anchored, vocabulary=vocabulary, **shape, **form)
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    head.attach_weights(torch.randn(VOCAB, hidden_size), torch.randn(VOCAB, hidden_size))
    return head.double().eval().requires_grad_(False)


def states(count: int, size: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def along(head: DraftHead, hidden: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Conditionals of x_2 … x_n along paths (count, horizon), over all ids."""
    tokens = torch.nn.functional.pad(path, (1, 0))
    features = head.features(hidden[:, None], tokens)
    logits = head.logits(hidden[:, None], features, *head.weights())
    found = path_conditionals(head, features.log_weights, logits, path[:, None]).drafted[:, 0]
    return found.new_zeros(len(path), HORIZON - 1, VOCAB).index_copy(-1, head.kept, found)


def by_definition(head: DraftHead, hidden: torch.Tensor, path: list[int]) -> list[torch.Tensor]:
    """The next token's law after each beginning of a path, x_1 known: one term after another."""
    ids = list(range(VOCAB)) if head.vocabulary is None else head.vocabulary
    embed = rms_norm(head.embedding, (head.hidden_size,))
    entered = torch.cat([hidden, embed[path[0]]]) if head.anchored else hidden
    stream = head.enter.weight @ entered
    block = head.blocks[0]
    normed = rms_norm(stream, stream.shape, block.norm.weight, block.norm.eps)
    stream = stream + block.down.weight @ silu(block.up.weight @ normed)

    def norm(s):
        return rms_norm(s, s.shape, head.norm.weight, head.norm.eps)

    z = norm(stream)
    weights = (head.mixture.weight @ z + head.mixture.bias).softmax(0)
    first = 1 if head.anchored else 0
    state, laws = stream, []
    for i in range(head.drafted):
        before = path[i + first - 1] if i else None
        if head.form == "recurrent" and i:
            read = torch.cat(
                [
                    rms_norm(state, state.shape, head.step.norm.weight, head.step.norm.eps),
                    embed[before],
                ]
            )
            state = state + head.step.down.weight @ silu(head.step.up.weight @ read)
        rows = []
        for a in range(head.rank):
            read = norm(state) if head.form == "recurrent" else z
            logits = head.unembedding @ (hidden + head.maps[i * head.rank + a] @ read)
            if head.has_transitions and i:
                gate = head.gates(z)[i - 1] if head.gated else 1.0
                logits = logits + (head.left[before] * gate) @ head.right
            rows.append(logits.softmax(0))
        mixed = sum(w * row for w, row in zip(weights, rows, strict=True))
        laws.append(torch.zeros(VOCAB, dtype=torch.float64).index_copy(0, torch.tensor(ids), mixed))
        if path[i + first] in ids:
            place = ids.index(path[i + first])
            weights = weights * torch.stack([row[place] for row in rows])
            weights = weights / weights.sum()
    return laws[1 - first :]


@pytest.mark.parametrize("vocabulary", KEPT)
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_conditionals_along_paths_are_the_definitions(form, anchored, vocabulary):
    head, hidden = a_head(anchored=anchored, vocabulary=vocabulary, **form), states(3)
    # Tokens that are never drafted may be known, not only x_1.
    paths = torch.tensor([[1, 2, 3, 0], [4, 0, 1, 5], [3, 3, 5, 2]])
    found = along(head, hidden, paths)
    for k, path in enumerate(paths.tolist()):
        expected = torch.stack(by_definition(head, hidden[k], path))
        torch.testing.assert_close(found[k], expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("law", [SamplingLaw(), SamplingLaw(0.7, top_k=3)], ids=str)
@pytest.mark.parametrize("vocabulary", KEPT)
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_block_says_of_what_it_draws_what_the_head_says_of_it(form, anchored, vocabulary, law):
    head, hidden = a_head(anchored=anchored, vocabulary=vocabulary, **form), states(40)
    first = torch.arange(40) % VOCAB
    generator = torch.Generator().manual_seed(2)
    uniform = torch.rand(40, HORIZON, generator=generator, dtype=torch.float64)
    found = drafted_block(head, hidden, first).sample(law, uniform)
    path, q = found.tokens, found.over_all(VOCAB)
    expected = law.process(along(head, hidden, torch.cat([first[:, None], path], 1)))
    torch.testing.assert_close(q, expected, atol=ROUNDING, rtol=0)
    assert (q.gather(-1, path.unsqueeze(-1)) > 0).all()
    if vocabulary:
        outside = [v for v in range(VOCAB) if v not in vocabulary]
        assert not q[..., outside].any() and not torch.isin(path, torch.tensor(outside)).any()
    fewer = drafted_block(head, hidden, first).first(2).sample(law, uniform)
    shorter = fewer.tokens
    assert shorter.shape[1] == fewer.probs.shape[1] == fewer.length == 2
    if not (law.is_identity and head.form == "cp"):  # which draws all tokens of a component
        assert torch.equal(shorter, path[:, :2])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_drawn_follows_the_heads_law(form):
    """Frequencies of whole paths against the product of the conditionals along each."""
    head, count = a_head(**form), 20_000
    hidden, first = states(1), torch.tensor([4])
    uniform = torch.rand(
        count, HORIZON, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    block = drafted_block(head, hidden.expand(count, -1), first.expand(count))
    path = block.sample(SamplingLaw(), uniform).tokens
    every = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    laws = along(
        head, hidden.expand(len(every), -1), torch.cat([first.expand(len(every), 1), every], 1)
    )
    probs = laws.gather(-1, every.unsqueeze(-1)).squeeze(-1).prod(1)
    assert probs.sum().item() == pytest.approx(1, abs=len(every) * ROUNDING)
    places = (path * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    share = torch.bincount(places, minlength=VOCAB**3) / count
    # The sum of squared deviations has this expectation, and a standard deviation below it.
    assert (share - probs).square().sum() < 4 * (probs * (1 - probs)).sum() / count


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_a_heads_distribution_is_its_conditionals(form, anchored):
    head, hidden = a_head(anchored=anchored, vocabulary=KEPT[1], **form), states(1)
    first, path = torch.tensor([2]), torch.tensor([[2, 0, 3, 5]])
    draft, laws = head.draft(hidden, first), along(head, hidden, path)[0]
    for k in range(HORIZON - 1):
        found = draft.next_token_probs(path[:, 1 : k + 1])
        torch.testing.assert_close(found[0], laws[k], atol=ROUNDING, rtol=0)
    with pytest.raises(ValueError, match="recurrent head has no factors"):
        a_head(form="recurrent")(hidden, first)


def test_over_more_ids_than_hidden_numbers_the_logits_are_the_same():
    """The maps go through the unembedding, or are multiplied with it first."""
    for form in FORMS:
        wide, hidden = a_head(hidden_size=4, **form), states(2, 4)
        few = DraftHead.readout(wide)
        assert few is wide.maps
        path = torch.tensor([[1, 2, 3, 0], [4, 0, 1, 5]])
        found = along(wide, hidden, path)
        for k in range(2):
            expected = torch.stack(by_definition(wide, hidden[k], path[k].tolist()))
            torch.testing.assert_close(found[k], expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("model", ["code", "prose"])
@pytest.mark.parametrize("name", ["baseline", "recommended"])
def test_stored_heads_give_the_numbers_they_always_gave(root, model, name):
    folder = root / "data" / "heads" / model / name
    head, stored = DraftHead.from_pretrained(folder), load_file(folder / "model.safetensors")
    w = {key: value.double() for key, value in stored.items()}
    torch.manual_seed(0)
    unembed, embed, hidden = torch.randn(104, 192), torch.randn(104, 192), torch.randn(3, 192)
    tokens = torch.tensor([5, 0, 103])
    head.attach_weights(unembed, embed)
    draft = head(hidden, tokens)
    unembed, embed, hidden = unembed.double(), embed.double(), hidden.double()
    z = hidden
    if head.anchored:
        z = torch.cat([z, rms_norm(embedding(tokens, embed), (192,))], -1)
    z = z @ w["enter.weight"].T
    for k in itertools.count():
        if f"blocks.{k}.up.weight" not in w:
            break
        normed = rms_norm(z, z.shape[-1:], w[f"blocks.{k}.norm.weight"])
        z = z + silu(normed @ w[f"blocks.{k}.up.weight"].T) @ w[f"blocks.{k}.down.weight"].T
    z = rms_norm(z, z.shape[-1:], w["norm.weight"])
    weights = (z @ w["mixture.weight"].T + w["mixture.bias"]).softmax(-1)
    # Logits add some hundred products that come to ten or so, in single precision.
    allowed = 100 * rounding(torch.float32, 400)
    torch.testing.assert_close(draft.weights.double(), weights, atol=allowed, rtol=0)
    for position, factor in enumerate(draft.factors):
        for a in range(head.rank):
            moved = hidden + z @ w["maps"][position * head.rank + a].T
            law = (moved @ unembed.T).softmax(-1)
            torch.testing.assert_close(factor[..., a].double(), law, atol=allowed, rtol=0)


def test_the_layer_over_the_text_is_a_causal_layer_over_text_and_draft_in_a_row():
    torch.manual_seed(0)
    layer = TextLayer(64, 5).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    stream = torch.randn(2, 7, 64, dtype=torch.float64)
    drafted = torch.randn(2, 7, 2, 5, dtype=torch.float64)
    found = layer(stream, drafted)
    for t in range(7):
        row = stream[:, : t + 1]
        for j in range(3):
            alone = layer(row, drafted[:, :0].new_zeros(2, row.shape[1], 0, 5))[:, -1, 0]
            torch.testing.assert_close(found[:, t, j], alone, atol=ROUNDING, rtol=0)
            if j < 2:
                entered = layer.fuse(torch.cat([alone, drafted[:, t, j]], -1))
                row = torch.cat([row, entered[:, None]], 1)


def test_a_head_over_the_text_reads_nothing_that_is_yet_to_come():
    head = a_head(form="recurrent", over_text=True, hidden_size=32)
    hidden, tokens = states(8, 32)[None], torch.randint(VOCAB, (1, 8 + HORIZON))
    other_hidden, other_tokens = hidden.clone(), tokens.clone()
    other_hidden[:, 4:], other_tokens[:, 3 + HORIZON :] = 0.0, 0
    states_, others = head.features(hidden, tokens), head.features(other_hidden, other_tokens)
    torch.testing.assert_close(states_.states[:, :4], others.states[:, :4], atol=ROUNDING, rtol=0)
    assert not torch.allclose(states_.states[:, 4:], others.states[:, 4:])
    with pytest.raises(ValueError, match="not decoded with"):
        drafted_block(head, states(1, 32), torch.tensor([1]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"form": "luck"}, "unknown form"),
        ({"form": "markov", "rank": 2}, "one component"),
        ({"form": "cp", "transition_rank": 2}, "no transitions"),
        ({"form": "markov", "transition_rank": 0}, "at least 1"),
        ({"form": "cp", "over_text": True}, "only anchored recurrent"),
        ({"form": "recurrent", "over_text": True, "width": 33}, "multiple of"),
        ({"vocabulary": [1, 1]}, "draft vocabulary"),
        ({"vocabulary": [VOCAB]}, "draft vocabulary"),
        ({"vocabulary": []}, "draft vocabulary"),
    ],
)
def test_shapes_that_are_none_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        DraftHead(hidden_size=8, vocab_size=VOCAB, anchored=True, **bad)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_was_made_ready_is_made_again_when_weights_change(form):
    head, hidden, first = a_head(**form), states(3), torch.tensor([0, 1, 2])
    law, uniform = SamplingLaw(), torch.full((3, HORIZON), 0.4, dtype=torch.float64)
    drafter = drafting.drafter(head, head.maps.dtype)
    drafter.block(hidden, first).sample(law, uniform)
    assert drafting.drafter(head, head.maps.dtype) is drafter
    with torch.no_grad():
        head.maps.mul_(-1.5)
    found = drafted_block(head, hidden, first).sample(law, uniform)
    path = torch.cat([first[:, None], found.tokens], 1)
    expected = along(head, hidden, path)
    torch.testing.assert_close(found.over_all(VOCAB), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_head_of_a_narrower_model_drafts_in_that_precision(form):
    """Near what it says in its own; and what is said of a path is what it was drawn from."""
    head, hidden = a_head(**form), states(400)
    first, law = torch.arange(400) % VOCAB, SamplingLaw()
    uniform = torch.rand(
        400, HORIZON, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    ready = drafting.drafter(head, torch.bfloat16)
    assert ready.head.maps.dtype == torch.bfloat16 and head.maps.dtype == torch.float64
    found = ready.block(hidden.bfloat16(), first).sample(law, uniform)
    assert found.probs.dtype == torch.float32
    sums = found.probs.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    own = along(head, hidden, torch.cat([first[:, None], found.tokens], 1))
    gap = 0.5 * (found.over_all(VOCAB) - own).abs().sum(-1)
    assert float(gap.mean()) < 0.02


@pytest.mark.parametrize("most", [0, 30, 1 << 20], ids=["nothing", "drafted ids", "everything"])
@pytest.mark.parametrize("anchored", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_draft_is_the_same_whatever_is_multiplied_beforehand(most, anchored, count, monkeypatch):
    """More ids than hidden numbers: maps and embeddings of drafted tokens may be multiplied with
    what reads them, or each by itself.
    """
    monkeypatch.setattr(drafting, "_READ_OFTEN", most)
    head = a_head(form="recurrent", anchored=anchored, vocabulary=KEPT[1], hidden_size=3)
    hidden, first = states(count, 3), torch.tensor([1, 0, 4])[:count]
    uniform = torch.rand(
        count, HORIZON, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    found = drafted_block(head, hidden, first).sample(SamplingLaw(), uniform)
    expected = along(head, hidden, torch.cat([first[:, None], found.tokens], 1))
    torch.testing.assert_close(found.over_all(VOCAB), expected, atol=ROUNDING, rtol=0)
