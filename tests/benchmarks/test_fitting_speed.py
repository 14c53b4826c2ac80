"""Fits against other libraries' fits, batches against one after another, one sweep against its
matrix products.

Run with
``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_fitting_speed.py -n 0 --benchmark-only -s
--benchmark-disable-gc``.
Arms of one comparison run one after another on the same joint; what is printed are ratios, and
absolute figures only beside them.
"""

from __future__ import annotations

import resource
import time

import pytest
import torch

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.descent.em import Targets, expected_counts, outer_products
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.starts import random_starts
from cpmtp.drafts.cp_distribution import CPDistribution, normalised_cp
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import sample_sequences, separated_hmm
from cpmtp.prefix_tree import truncated_joint
from cpmtp.pretrained import HuggingFaceLanguageModel, load_language_model
from cpmtp.resampling import normal_half_width
from cpmtp.training.new_models import new_llama

CONTEXTS_PER_MODEL = 8
RANKS = (2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def joints() -> list[JointDistribution]:
    """Horizon-3 joints after sampled contexts of both embedded models."""
    found = []
    for name in ("code", "prose"):
        lm = load_language_model(name)
        contexts = sample_sequences(lm, CONTEXTS_PER_MODEL, 48, seed=1)
        found += [exact_joint(lm, context, 3) for context in contexts]
    return found


def fastest(*works, rounds: int = 7) -> list[float]:
    """Seconds of each work's fastest round; every round runs all works."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for place, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[place] = min(best[place], time.perf_counter() - started)
    return best


def once(benchmark, work):
    return benchmark.pedantic(work, rounds=1, iterations=1)


@pytest.mark.parametrize("rank", [8, 32])
def test_a_sweep_costs_little_more_than_its_three_matrix_products(benchmark, joints, rank):
    joint = joints[0]
    targets, start = Targets.of(joint), random_starts(joint, rank, 1, 0)
    left, right = start.factors[0, 0].contiguous(), outer_products(start.factors[:, 1:])[0]
    model = torch.empty(left.shape[1], right.shape[1], dtype=torch.float64)
    pulls = torch.empty_like(left), torch.empty_like(right)

    def products():
        torch.mm(left.T, right, out=model)
        torch.mm(right, model.T, out=pulls[0])
        torch.mm(left, model, out=pulls[1])

    works = (
        products,
        lambda: expected_counts(targets, start, with_kl=False),
        lambda: expected_counts(targets, start),
    )
    alone, plain, judged = once(benchmark, lambda: fastest(*works, rounds=15))
    print(
        f"\nrank {rank}: products {1e3 * alone:.2f} ms; sweep x {plain / alone:.2f}, with its "
        f"divergence x {judged / alone:.2f}"
    )


def poisson_cp(joint: JointDistribution, rank: int, iterations: int) -> tuple[float, float]:
    """Divergence and seconds of pyttb's Poisson tensor factorisation."""
    import pyttb

    start = random_starts(joint, rank, 1, 0)
    initial = pyttb.ktensor(
        [f.T.numpy().copy() for f in start.factors[0]], start.weights[0].numpy().copy()
    )
    started = time.perf_counter()
    options = {"maxiters": iterations, "printitn": 0, "stoptol": 1e-8}
    found, _, _ = pyttb.cp_apr(
        pyttb.tensor(joint.probs.numpy().copy()), rank, algorithm="mu", init=initial, **options
    )
    seconds = time.perf_counter() - started
    found.normalize(normtype=1)
    factors = [torch.from_numpy(f.copy()).clamp_min(0) for f in found.factor_matrices]
    return divergences(
        joint, normalised_cp(torch.from_numpy(found.weights.copy()).flatten(), factors)
    ).kl_nats, seconds


def test_em_reaches_what_a_poisson_factorisation_ends_with_in_a_fraction_of_its_time(
    benchmark, joints
):
    def compare():
        for place in (0, 4, 9, 13):
            kl, seconds = poisson_cp(joints[place], 32, 20)
            line = f"\nrank 32 context {place}: pyttb ends at {kl:.4f} nats after {seconds:.1f} s"
            for passes in (1, 2, 4, 8, 16, 32, 64, 128):
                runs = [
                    fit(joints[place], 32, "em", max_iterations=passes, tolerance=0.0)
                    for _ in range(3)
                ]
                if runs[0].objective <= kl:
                    break
            fastest_run = min(run.seconds for run in runs)
            print(
                f"{line} | em with {passes} passes: {runs[0].objective:.4f} in "
                f"1/{seconds / fastest_run:.0f} of its time"
            )

    once(benchmark, compare)


@pytest.mark.parametrize("rank", RANKS)
def test_em_against_squared_error_fits(benchmark, joints, rank):
    def compare():
        for place in (0, 9):
            joint, em = joints[place], fit(joints[place], rank, "em")
            line = (
                f"\nrank {rank} context {place}: em {em.objective:.4f} nats, "
                f"{tokens(joint, em.distribution):.3f} tokens"
            )
            for method in ("als", "hals", "mu"):
                other = fit(joint, rank, method, max_iterations=100, tolerance=0.0)
                kl, earned = (
                    divergences(joint, other.distribution).kl_nats,
                    tokens(joint, other.distribution),
                )
                line += (
                    f" | {method} {kl:.4f}, {earned:.3f}, em takes x "
                    f"{em.seconds / other.seconds:.2f}"
                )
            print(line)

    once(benchmark, compare)


def tokens(joint: JointDistribution, draft: CPDistribution, rule: str = "block") -> float:
    return implied_acceptance(joint, draft, rule=rule).tokens_per_call


@pytest.mark.parametrize("rank", RANKS)
def test_tokens_per_call_by_method_paired_over_contexts(benchmark, joints, rank):
    methods = ("em", "gradient", "als", "hals", "mu")

    def compare():
        best = torch.tensor([-fit(joint, rank, "acceptance").objective for joint in joints])
        line = f"\nrank {rank}, {len(joints)} contexts: acceptance {best.mean():.4f}"
        for method in methods:
            gain = best - torch.tensor(
                [tokens(joint, fit(joint, rank, method).distribution) for joint in joints]
            )
            half = normal_half_width(float(gain.std()) / len(gain) ** 0.5)
            line += f" | over {method} {gain.mean():+.4f} ± {half:.4f} (worst {gain.min():+.4f})"
        print(line)

    once(benchmark, compare)


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_gradient_against_em_in_divergence(benchmark, joints, rank):
    def compare():
        pairs = [(fit(joint, rank, "em"), fit(joint, rank, "gradient")) for joint in joints]
        em, gradient = torch.tensor([[e.objective, g.objective] for e, g in pairs]).T
        time_ratio = sum(g.seconds for _, g in pairs) / sum(e.seconds for e, _ in pairs)
        ratio = gradient / em
        print(
            f"\nrank {rank}: gradient's divergence over em's, {len(joints)} contexts: sums "
            f"{gradient.sum() / em.sum():.3f}, "
            f"mean {ratio.mean():.3f}, median {ratio.median():.3f}, from {ratio.min():.3f} to "
            f"{ratio.max():.3f}; "
            f"its time x {time_ratio:.1f}"
        )

    once(benchmark, compare)


@pytest.mark.parametrize(("vocab", "horizon"), [(16, 2), (32, 2), (16, 3), (32, 3)])
def test_one_batch_against_one_after_another(benchmark, vocab, horizon):
    contexts, rank = 32, 4
    lm = separated_hmm(6, vocab)
    singles = [
        exact_joint(lm, torch.tensor([i % vocab, i // 2 % vocab]), horizon) for i in range(contexts)
    ]
    batch = JointDistribution(torch.stack([s.probs for s in singles]), horizon)
    settings = {"restarts": 4, "max_iterations": 40, "tolerance": 0.0}

    def compare():
        works = (
            lambda: fit(batch, rank, **settings),
            lambda: [fit(single, rank, **settings) for single in singles],
        )
        together, alone = fastest(*works, rounds=2)
        print(
            f"\n{contexts} contexts x 4 restarts, V={vocab}, n={horizon}: one batch is "
            f"{alone / together:.1f} x faster"
        )

    once(benchmark, compare)


def test_one_batch_of_embedded_joints_is_not_slower(benchmark, joints):
    batch = JointDistribution(torch.stack([j.probs for j in joints[:4]]), 3)
    settings = {"restarts": 4, "max_iterations": 20, "tolerance": 0.0}

    def compare():
        works = (
            lambda: fit(batch, 8, **settings),
            lambda: [fit(j, 8, **settings) for j in joints[:4]],
        )
        together, alone = fastest(*works, rounds=2)
        print(
            f"\n4 contexts x 4 restarts, V={batch.vocab_size}, n=3: one batch is "
            f"{alone / together:.2f} x faster"
        )

    once(benchmark, compare)


def test_four_tokens_fit_in_memory(benchmark):
    def run():
        lm = separated_hmm(6, 100)
        joint = exact_joint(lm, torch.tensor([0]), 4)
        result = fit(joint, 16)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"\n10^8 entries, rank 16: {result.objective:.2e} nats, {result.iterations} sweeps, "
            f"{result.seconds:.0f} s, "
            f"{result.status}, peak {peak:.1f} GB"
        )

    once(benchmark, run)


def test_a_tree_of_a_hundred_thousand_sequences_over_a_wide_vocabulary(benchmark):
    def run():
        model = new_llama(32_000, width=96, layers=2, window=64, seed=0)
        # Sharp enough for the entropy of real text.
        model.lm_head.weight = torch.nn.Parameter(
            0.36 * torch.randn(32_000, 96, generator=torch.Generator().manual_seed(0))
        )
        lm = HuggingFaceLanguageModel(model)
        tree = truncated_joint(lm, torch.arange(16), 3, mass=1.0, max_nodes=3000, max_children=47)
        result = fit(tree, 32)
        print(
            f"\n{len(tree.levels[-1]):,} sequences of three tokens out of 32,000, rank 32: "
            f"{result.iterations} sweeps in "
            f"{result.seconds:.1f} s, {result.status}"
        )

    once(benchmark, run)
