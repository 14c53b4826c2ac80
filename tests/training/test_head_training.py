"""Training of heads: resumable to the bit, side by side, and clear when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from samples import CharacterTable

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.fitting import fit
from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.evaluation import head_draft, held_out_survival
from cpmtp.heads.losses import HeadLoss
from cpmtp.joint_distribution import exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training import head_settings, kept_states, loop
from cpmtp.training import heads as head_training
from cpmtp.training.heads import HeadTrainingSettings, train_head, train_heads, windows_of_text
from cpmtp.training.new_models import new_llama

FORMS = [
    {},
    {"form": "markov_mixture", "transition_rank": 2, "vocabulary": 4},
    {"form": "recurrent", "rank": 1, "precision": "bfloat16"},
    {"form": "recurrent", "rank": 1, "over_text": True},
]
TINY = HeadTrainingSettings(
    horizon=3, rank=2, steps=6, rows=2, length=16, sequences=8, precision="float32"
)
VOCAB = 6


def a_model(seed: int = 0) -> HuggingFaceLanguageModel:
    model = new_llama(VOCAB, width=96, layers=1, window=64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(VOCAB, 96, generator=generator))
    return HuggingFaceLanguageModel(model, name=f"tiny{seed}")


@pytest.fixture(scope="module")
def lm():
    return a_model()


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("anchored", [True, False])
def test_training_earns_more_tokens_per_call(lm, anchored):
    tokens = lm.sample_tokens(64, 24, seed=5)
    untrained = train_head(lm, TINY, steps=1, anchored=anchored)
    trained = train_head(lm, TINY, steps=150, anchored=anchored, sequences=64)
    before, after = (
        held_out_survival(lm, head, tokens).sum(1).mean() for head in (untrained, trained)
    )
    assert after > before + 0.2


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_training_stopped_and_resumed_ends_with_the_same_weights(lm, tmp_path, form):
    """In its second pass over the windows, whose hidden states are kept."""

    def stop(step, out):
        if step == 5:
            raise KeyboardInterrupt

    settings, stopped = replace(TINY, **form), tmp_path / "stopped"
    train_head(lm, settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_head(lm, settings, out=stopped, checkpoint_seconds=0.0, callback=stop)
    train_head(lm, settings, out=stopped)
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    rows = [
        (tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "stopped")
    ]
    assert [r.split(",")[0::2] for r in rows[0]] == [r.split(",")[0::2] for r in rows[1]]
    assert not (tmp_path / "stopped" / "checkpoint.safetensors").exists()


def environment(root) -> dict[str, str]:
    """Of a process that imports this file."""
    path = os.pathsep.join([str(root), str(root / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


TRAIN = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_head_training import TINY, a_model
from cpmtp.training.heads import train_head
torch.set_num_threads(1)
train_head(a_model(), TINY, form="markov_mixture", transition_rank=2, steps=14, out=sys.argv[1],
           checkpoint_seconds=0.0,
           callback=lambda step, out: (print(step, flush=True), time.sleep(0.01)))
"""


def test_a_training_that_was_killed_goes_on_to_the_same_weights(root, tmp_path):
    script = TRAIN.format(tests=str(root / "tests" / "training"))
    command = [sys.executable, "-c", script]
    subprocess.run(
        [*command, str(tmp_path / "whole")], check=True, capture_output=True, env=environment(root)
    )
    with subprocess.Popen(
        [*command, str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(root),
    ) as process:
        while process.stdout.readline().strip() != "6":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run(
        [*command, str(tmp_path / "killed")], check=True, capture_output=True, env=environment(root)
    )
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


SHARED = """
import sys, torch
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from test_head_training import TINY, a_model
from cpmtp.training.heads import train_head
torch.set_num_threads(1)
head = train_head(a_model(), TINY, **{budget})
torch.save(head.state_dict(), sys.argv[1] + str(PartialState().process_index))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "budget",
    [
        {"steps": 6},
        {"seconds": 1.0},
        {"form": "markov", "rank": 1},
        {"form": "recurrent", "rank": 1},
    ],
)
def test_processes_that_share_the_windows_end_at_the_same_step_with_the_same_weights(
    lm, root, tmp_path, budget
):
    script = tmp_path / "script.py"
    script.write_text(SHARED.format(tests=str(root / "tests" / "training"), budget=budget))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*command, "--nproc_per_node", "2", script, tmp_path / "weights"],
        check=True,
        capture_output=True,
        env=environment(root),
    )
    found = [torch.load(tmp_path / f"weights{rank}", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    if "seconds" not in budget:  # the mean over both shares is the mean over all windows
        alone = train_head(lm, TINY, **budget).state_dict()
        assert all(torch.allclose(found[0][name], alone[name], atol=1e-4) for name in alone)


def test_heads_trained_side_by_side_are_those_trained_alone(lm):
    settings = [TINY, HeadTrainingSettings(**(vars(TINY) | {"rank": 1, "anchored": True}))]
    together = train_heads(lm, settings)
    for head, setting in zip(together, settings, strict=True):
        alone = train_head(lm, setting)
        assert all(
            torch.equal(a, b) for a, b in zip(head.parameters(), alone.parameters(), strict=True)
        )


def test_hidden_states_are_computed_once_and_shared_by_all_heads(lm, monkeypatch):
    def counted(tokens):
        seen.append(tuple(map(tuple, tokens.tolist())))
        return usual(tokens)

    usual, seen = lm.hidden_states, []
    monkeypatch.setattr(lm, "hidden_states", counted)
    train_heads(lm, [TINY, replace(TINY, rank=1)], tokens=lm.sample_tokens(8, 16, seed=1))
    assert len(seen) == len(set(seen)) == 4  # eight windows, two in a batch, six steps
    assert len({row for batch in seen for row in batch}) == 8


def test_hidden_states_kept_in_a_file_give_the_same_weights(lm, monkeypatch):
    in_memory = train_head(lm, TINY)
    monkeypatch.setattr(kept_states, "_IN_MEMORY", 0)
    in_a_file = train_head(lm, TINY)
    pairs = zip(in_memory.parameters(), in_a_file.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_every_window_is_seen_in_every_pass_and_passes_differ(lm):
    tokens = torch.arange(12 * 16).view(12, 16) % VOCAB
    states = kept_states.KeptStates(lm, tokens, rows=3, seed=1)
    passes = [[states.batch(4 * p + k)[0] for k in range(4)] for p in range(3)]
    for batches in passes:
        assert sorted(number for batch in batches for number in batch) == list(range(12))
        assert sorted(map(tuple, batches)) == sorted(map(tuple, passes[0]))
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_a_draft_vocabulary_of_a_size_is_the_most_frequent_tokens(lm):
    tokens = torch.tensor([[0, 1, 1, 2, 2, 2] * 3, [5, 5, 4, 2, 1, 0] * 3])[:, :16]
    head = train_head(lm, TINY, steps=1, tokens=tokens.repeat(4, 1), vocabulary=2)
    assert head.vocabulary == [1, 2]


def test_a_budget_in_positions_is_one_in_steps(lm):
    heads = [train_head(lm, TINY, positions=5 * 2 * 16 - 3), train_head(lm, TINY, steps=5)]
    pairs = zip(*(head.parameters() for head in heads), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_heads_with_other_data_are_not_trained_side_by_side(lm):
    with pytest.raises(ValueError, match="share steps"):
        train_heads(lm, [TINY, HeadTrainingSettings(**(vars(TINY) | {"rows": 3}))])


def test_a_time_budget_ends_a_training_with_the_step_that_spends_it(lm, monkeypatch):
    class Clock:
        """A step takes a tenth of a second, and nothing else any time."""

        seconds = 100.0

        def monotonic(self):
            return self.seconds

    def tick(step, out):
        steps.append(step)
        clock.seconds += 0.1

    steps, clock = [], Clock()
    monkeypatch.setattr(loop, "time", clock)
    train_head(lm, TINY, seconds=0.95, callback=tick)
    assert steps == list(range(1, 11))
    assert steps[-1] > TINY.steps  # which are not what ends it


@pytest.mark.parametrize("form", [{}, {"form": "markov_mixture", "transition_rank": 2}], ids=str)
def test_components_begin_alike_and_a_single_one_as_it_was_drawn(lm, form):
    settings = replace(TINY, rank=3, **form)
    drawn, begun = (
        head_training._new_head(lm, settings, *apart).maps.unflatten(0, (-1, 3))
        for apart in ((None,), ())
    )
    torch.testing.assert_close(begun, drawn[:, :1] + head_training.APART * drawn)
    one, drawn = (head_training._new_head(lm, replace(TINY, rank=1), a).maps for a in (0.1, None))
    assert torch.equal(one, drawn)


@pytest.mark.parametrize(("units", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_precision_nobody_asked_for_is_the_processors_best_and_is_told(
    lm, tmp_path, monkeypatch, units, precision
):
    monkeypatch.setattr(head_settings, "has_bfloat16_units", lambda device: units)
    train_head(lm, TINY, precision="auto", out=tmp_path / "auto")
    train_head(lm, TINY, precision=precision, out=tmp_path / "asked")
    assert weights(tmp_path / "auto") == weights(tmp_path / "asked")
    recipe = json.loads((tmp_path / "auto" / "recipe.json").read_text())
    assert recipe["settings"]["precision"] == precision
    assert HeadTrainingSettings().precision == "auto"


def test_a_checkpoint_in_another_precision_is_not_gone_on_from(lm, tmp_path, monkeypatch):
    def stop(step, out):
        if step == 2:
            raise KeyboardInterrupt

    units = {"cpu": True}
    monkeypatch.setattr(head_settings, "has_bfloat16_units", units.get)
    with pytest.raises(KeyboardInterrupt):
        train_head(lm, TINY, precision="auto", out=tmp_path, checkpoint_seconds=0.0, callback=stop)
    units["cpu"] = False
    with pytest.raises(ValueError, match="other settings"):
        train_head(lm, TINY, precision="auto", out=tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(lm, tmp_path):
    def stop(step, out):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_head(
            lm,
            TINY,
            out=tmp_path,
            checkpoint_seconds=0.0,
            callback=lambda step, out: step == 2 and stop(step, out),
        )
    with pytest.raises(ValueError, match="other settings"):
        train_head(lm, TINY, out=tmp_path, rank=3)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        train_head(lm, TINY, out=tmp_path)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(lm, tmp_path, monkeypatch):
    usual = head_training.head_loss

    def broken(head, hidden, tokens, unembed, **options):
        out = usual(head, hidden, tokens, unembed, **options)
        broken.calls += 1
        return HeadLoss(out.loss * float("nan"), out.survival) if broken.calls == 4 else out

    broken.calls = 0
    monkeypatch.setattr(head_training, "head_loss", broken)
    with pytest.raises(
        ValueError, match=r"loss is nan at step 3, windows \[\d.*lower the learning rate"
    ):
        train_head(lm, TINY, out=tmp_path, checkpoint_seconds=0.0)
    checkpoint = load_file(tmp_path / "checkpoint.safetensors")
    assert all(torch.isfinite(value.float()).all() for value in checkpoint.values())


def test_windows_longer_than_the_models_are_refused(lm):
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        train_head(lm, TINY, length=65)
    with pytest.raises(ValueError, match="windows of 3 tokens for a horizon of 3"):
        train_head(lm, TINY, length=3)


@pytest.mark.parametrize(
    "bad",
    [{"objective": "luck"}, {"steps": 0}, {"seconds": -1.0}, {"learning_rate": 0.0}, {"rank": 0}],
)
def test_settings_out_of_range_are_refused(lm, bad):
    with pytest.raises(ValueError, match=r"expected|unknown"):
        train_head(lm, TINY, **bad)


def test_text_is_cut_into_windows():
    class Letters(CharacterTable):
        def encode_document(self, text):
            return torch.tensor([ord(c) for c in text])

    assert windows_of_text(Letters(), ["abcde", "fg", "h"], 2).tolist() == [
        [97, 98],
        [99, 100],
        [102, 103],
    ]
    with pytest.raises(ValueError, match="no text is 9 tokens long"):
        windows_of_text(Letters(), ["abc"], 9)


@pytest.mark.parametrize("anchored", [True, False])
def test_a_head_with_enough_capacity_reaches_the_fit_of_one_context(anchored):
    """What the fit finds, the module can represent: trained on all continuations of a context."""
    lm = a_model(seed=2)
    context = torch.tensor([1, 4, 2, 0, 5])
    joint = exact_joint(lm, context, horizon=3)
    ceiling = implied_acceptance(
        joint, fit(joint, rank=2, method="em", anchored=anchored, restarts=4).distribution
    )
    torch.manual_seed(0)
    head = CPHead(
        hidden_size=96, vocab_size=VOCAB, horizon=3, rank=2, anchored=anchored, blocks=1
    ).attach(lm)
    hidden = lm.hidden_states(context[None])[0, -1]
    paths = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    law = joint.probs.flatten().float()
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(400):
        if anchored:
            each = head(hidden.expand(VOCAB, -1), torch.arange(VOCAB))
            found = torch.stack(
                [each[x].log_prob(paths[paths[:, 0] == x][:, 1:]) for x in range(VOCAB)]
            ).flatten()
        else:
            found = head(hidden).log_prob(paths)
        loss = -(law * found).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned = implied_acceptance(joint, head_draft(lm, head.requires_grad_(False), context))
    assert learned.tokens_per_call >= 0.99 * ceiling.tokens_per_call
