"""What a form holds exactly is found again."""

import pytest
from planted_forms import hidden_markov, joints, markov_mixture

from cpmtp.decomposition.fitting import fit

SEEDS = range(20)
CLOSE = {"restarts": 2, "max_iterations": 400, "tolerance": 1e-6}


@pytest.mark.parametrize(
    ("plant", "form"),
    [
        (
            lambda seed: markov_mixture(seed, 4, 4, 2, 2),
            {"form": "markov_mixture", "rank": 2, "transition_rank": 2},
        ),
        (lambda seed: hidden_markov(seed, 5, 4, 3), {"form": "hmm", "rank": 3, "restarts": 2}),
    ],
)
def test_planted_distributions_are_found_from_most_seeds(plant, form):
    joint = joints([plant(seed) for seed in SEEDS])
    found = fit(joint, method="gradient", **(CLOSE | form))
    assert int((found.objective <= 1e-4).sum()) >= 18
    # A CP distribution of that rank holds none of them.
    assert bool((fit(joint, form["rank"]).objective > 1e-4).all())
