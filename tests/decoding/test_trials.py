"""Every way that is gone gives what full passes give; a way that does not is not gone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, VOCAB, tiny

from cpmtp.decoding import target as targets
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.decoding.trials import WAYS, gap_of, way_of
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.heads.cp_head import CPHead
from cpmtp.joint_distribution import exact_joint
from cpmtp.pretrained import load_language_model
from cpmtp.pretrained.adapter import HuggingFaceLanguageModel
from cpmtp.pretrained.trials import (
    SHORT,
    boundaries,
    hidden_gap,
    later_tokens_gap,
    tolerance,
)

# Few passes each; the others stand behind the marker.
QUICK = ("llama", "gemma2", "mistral", "bart", "lfm2", "roberta", "longrope")
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n not in QUICK]
EVERY = [*QUICK, *SLOW]


def prompts(*lengths: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (length,), generator=draw) for length in lengths]


def a_head(lm) -> CPHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = lm.model.get_output_embeddings().weight.shape[1]
        head = CPHead(hidden_size=width, vocab_size=VOCAB, horizon=4, rank=2, anchored=True)
    return head.attach(lm)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_ragged_batch_is_drawn_from_what_full_passes_say(name, with_head):
    lm = tiny(name)
    head = a_head(lm) if with_head else None
    out = speculative_generate(
        lm, head, prompts(9, 4, 14), max_new_tokens=30, temperature=0.8, audit=True
    )
    assert out.stats.way == ARCHITECTURES[name][2]
    assert out.stats.audit <= tolerance(lm, 44)
    assert out.stats.audit_findings.passed
    assert out.stats.audit_findings.positions == 90


@pytest.mark.parametrize("name", EVERY)
def test_greedy_text_is_that_of_full_passes(name):
    lm = tiny(name)
    (prompt,) = prompts(11)
    text = prompt
    for _ in range(20):
        following = lm.next_token_log_probs(text[None])[0].argmax()
        text = torch.cat([text, following[None]])
    for head in (None, a_head(lm)):
        out = speculative_generate(lm, head, prompt, max_new_tokens=20, temperature=0)
        assert torch.equal(out.sequences[0], text)


@pytest.mark.parametrize("name", EVERY)
def test_a_joint_is_that_of_full_passes(name):
    lm = tiny(name)
    for context in prompts(5, 22):
        joint = exact_joint(lm, context, 2)
        rows = torch.cat([context.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
        second = lm.next_token_log_probs(rows).double().exp()
        first = lm.next_token_log_probs(context[None])[0].double().exp()
        gap = 0.5 * (joint.probs - first[:, None] * second).abs().sum()
        assert gap <= 2 * tolerance(lm, 24)


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_half_precision_is_followed_up_to_its_rounding(name):
    lm = tiny(name, dtype=torch.bfloat16)
    out = speculative_generate(lm, a_head(lm), prompts(9, 4), max_new_tokens=70, audit=True)
    assert out.stats.way == ARCHITECTURES[name][2]
    # Eight units in the last place of bfloat16, and a fault makes tens of percent.
    assert out.stats.audit <= 8 * torch.finfo(torch.bfloat16).eps
    assert out.stats.audit_findings.passed


def test_an_audit_without_room_for_a_twin_reckons_with_some_last_places(monkeypatch):
    lm = load_language_model("code", dtype=torch.bfloat16)
    ids = prompts(9, 4)

    def run():
        out = speculative_generate(lm, None, ids, max_new_tokens=30, audit=True)
        return out.stats.audit_findings

    measured = run()
    monkeypatch.setattr(type(lm), "twin", property(lambda lm: lm))
    reckoned = run()
    assert reckoned.passed
    assert 0.25 < reckoned.precision / measured.precision < 4


def test_an_encoder_is_refused_in_one_line():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    lm = HuggingFaceLanguageModel(
        transformers.AutoModelForCausalLM.from_config(config), name="bert"
    )
    for use in (
        lambda: speculative_generate(lm, None, prompts(5)[0], max_new_tokens=3),
        lambda: exact_joint(lm, prompts(5)[0], 2),
        lambda: lm.hidden_states(prompts(5)[0][None]),
    ):
        with pytest.raises(ValueError, match="looks at later tokens") as refused:
            use()
        assert "\n" not in str(refused.value)


def test_boundaries_are_read_off_every_part_of_a_configuration():
    assert boundaries(transformers.MistralConfig(sliding_window=64), 1000) == [64]
    assert boundaries(transformers.MistralConfig(sliding_window=64), 64) == []
    parts = transformers.Gemma3Config(text_config={"sliding_window": 33})
    assert 33 in boundaries(parts, 1000)
    assert 24 in boundaries(tiny("longrope").model.config, 90)


def test_a_way_is_tried_again_where_a_longer_text_crosses_another_boundary():
    lm = tiny("longrope")
    assert way_of(lm, rows=1, longest=12, hidden=False) == "rows"
    assert way_of(lm, rows=1, longest=60, hidden=False) == "passes of prefixes"


def test_a_recurrent_state_is_never_cropped_however_little_it_says():
    lm = tiny("falcon_h1")
    with torch.inference_mode(), pytest.raises(ValueError, match="recurrent state"):
        WAYS["recorded rows"](lm, False).begin(prompts(9, 4))
    assert way_of(lm, rows=2, longest=30, hidden=False) == "replayed"


def test_a_choice_among_all_tokens_is_seen_though_it_seldom_shows():
    lm = tiny("deepseek_v32")
    # Once in eight times just after the eighth token, and never before it.
    with torch.inference_mode():
        assert later_tokens_gap(lm, ()) <= tolerance(lm, 8)
    assert way_of(lm, rows=1, longest=30, hidden=False) == "passes of prefixes"


class _Faulty:
    """Faults a target may have; each changes one method of the way ``batch``."""

    @staticmethod
    def keeps_everything(target, counts):
        target._positions = target._positions + target._added

    @staticmethod
    def positions_off_by_one(lm, hidden):
        target = targets.BatchTarget(lm, hidden)
        asked = target._asked
        target._asked = lambda tokens, cache, last, **inputs: asked(
            tokens, cache, last, **inputs | {"position_ids": inputs["position_ids"] + (not last)}
        )
        return target

    @staticmethod
    def mask_dropped(lm, hidden):
        target = targets.BatchTarget(lm, hidden)
        asked = target._asked
        target._asked = lambda tokens, cache, last, **inputs: asked(
            tokens, cache, last, **inputs | {"attention_mask": None}
        )
        return target

    @staticmethod
    def nothing_cropped(lm, hidden):
        target = targets.BatchTarget(lm, hidden)
        target.keep = lambda counts: _Faulty.keeps_everything(target, counts)
        return target

    @staticmethod
    def stale_row(lm, hidden):
        target = targets.RowsTarget(lm, hidden, recording=False)
        keep = target.keep
        target.keep = lambda counts: keep(counts.clone().index_fill_(0, torch.tensor(1), 3))
        return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fault", ["positions_off_by_one", "mask_dropped", "nothing_cropped", "stale_row"]
)
def test_a_fault_of_the_target_exceeds_the_trials_tolerance_tenfold(fault, dtype):
    lm = tiny("llama", dtype=dtype)
    with torch.inference_mode():
        gap = gap_of(getattr(_Faulty, fault), False)(lm.twin, SHORT)
        assert gap > 10 * tolerance(lm.twin, max(SHORT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fault", ["positions_off_by_one", "mask_dropped", "nothing_cropped", "stale_row"]
)
def test_a_fault_of_the_target_is_found_by_the_audit(fault, dtype, monkeypatch):
    lm = load_language_model("code", dtype=dtype)
    texts, uniform = prompts(9, 4, 14), torch.full((lm.vocab_size, 1), 1 / lm.vocab_size)
    draft = CPDistribution(torch.ones(1), [uniform] * 3)

    def audited():
        out = speculative_generate(lm, lambda text: draft, texts, max_new_tokens=30, audit=True)
        return out.stats.audit_findings

    honest = audited()
    monkeypatch.setitem(WAYS, "batch", getattr(_Faulty, fault))
    monkeypatch.setattr(type(lm.trials), "passes", lambda *ignored: True)
    found = audited()
    assert honest.passed
    assert found.distance > 10 * found.allowed
    if dtype == torch.float32:
        assert found.largest > 1000 * 8 * honest.rounding


def one_layer_early(lm: HuggingFaceLanguageModel, monkeypatch) -> None:
    trunk = copy.copy(lm.trunk)
    trunk._modules = dict(trunk._modules)
    trunk.layers = torch.nn.ModuleList(list(trunk.layers)[:-1])
    trunk.config = copy.deepcopy(trunk.config)
    trunk.config.num_hidden_layers -= 1
    monkeypatch.setitem(lm.__dict__, "trunk", trunk)


def cap_ignored(lm: HuggingFaceLanguageModel, monkeypatch) -> None:
    monkeypatch.setattr(lm, "unembed", lambda hidden: lm.model.get_output_embeddings()(hidden))


@pytest.mark.parametrize("plant", [one_layer_early, cap_ignored])
def test_logits_of_other_hidden_states_or_without_their_cap_fail_their_trial(plant, monkeypatch):
    lm = tiny("gemma2")
    plant(lm, monkeypatch)
    with torch.inference_mode():
        assert hidden_gap(lm, SHORT) > 10 * tolerance(lm, max(SHORT))
    with pytest.raises(ValueError, match="cannot be computed from its last hidden states"):
        lm.require_hidden_states()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plant", [one_layer_early, cap_ignored])
def test_the_same_is_found_by_the_audit(plant, dtype, monkeypatch):
    lm = tiny("gemma2", dtype=dtype)

    def audited():
        texts = prompts(9, 4, 14)
        out = speculative_generate(lm, a_head(lm), texts, max_new_tokens=30, audit=True)
        return out.stats.audit_findings

    honest = audited()
    plant(lm, monkeypatch)
    monkeypatch.setattr(type(lm.trials), "passes", lambda *ignored: True)
    found = audited()
    assert honest.passed
    assert found.distance > 10 * found.allowed


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_logits_are_the_models_own_however_it_makes_them(name):
    lm = tiny(name)
    ids = prompts(12)[0][None]
    own = lm.unembed(lm.hidden_states(ids)).softmax(-1)
    expected = lm.full_logits(ids).softmax(-1)
    torch.testing.assert_close(own, expected)
    # A bare product with the output embeddings is another distribution.
    raw = lm.model.get_output_embeddings()(lm.hidden_states(ids)).softmax(-1)
    assert float(0.5 * (raw - expected).abs().sum(-1).max()) > 0.01


def test_one_model_serves_several_threads():
    lm = tiny("llama")
    contexts = prompts(*range(4, 16))
    expected = [exact_joint(lm, context, 2).probs for context in contexts]
    found: dict[int, torch.Tensor] = {}

    def work(some):
        for index in some:
            found[index] = exact_joint(lm, contexts[index], 2).probs

    threads = [threading.Thread(target=work, args=(range(k, 12, 2),)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], probs) for index, probs in enumerate(expected))


def test_a_head_fits_the_same_weights_in_another_precision():
    head, lm = a_head(tiny("llama")), tiny("llama", dtype=torch.bfloat16)
    head.base_sha256 = tiny("llama").fingerprint
    assert lm.fingerprint == tiny("llama").fingerprint
    head.attach(lm)
    head.base_sha256 = tiny("llama").exact_fingerprint
    head.attach(tiny("llama"))
