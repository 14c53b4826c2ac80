"""L-BFGS of many runs by itself: known minima, scipy's L-BFGS-B, and no run minding the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rounding import rounding
from scipy import optimize
from torch import Tensor

from cpmtp.decomposition.descent.quasi_newton import minimise


def bowl(condition: float, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The Hessian of a convex quadratic of a given conditioning, and where its minimum, 0, lies."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    lowest = torch.randn(size, generator=generator, dtype=torch.float64)
    return (basis * scales) @ basis.T, lowest


def quadratics(hessians: Tensor, lowest: Tensor):
    """A convex quadratic per run."""

    def evaluate(runs: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        apart = points - lowest[runs]
        gradient = (hessians[runs] @ apart[..., None])[..., 0]
        return 0.5 * (apart * gradient).sum(1), gradient

    return evaluate


def rosenbrock(runs: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The banana-shaped valley of every run; its minimum, 0, is at ones."""
    points = points.detach().requires_grad_()
    left, right = points[:, :-1], points[:, 1:]
    values = (100 * (right - left**2) ** 2 + (1 - left) ** 2).sum(1)
    return values.detach(), torch.autograd.grad(values.sum(), points)[0]


def scipys(evaluate, start: Tensor) -> optimize.OptimizeResult:
    """L-BFGS-B on one run, with the same memory, as far down as it goes."""

    def single(point):
        value, gradient = evaluate(torch.zeros(1, dtype=torch.long), torch.from_numpy(point)[None])
        return value.item(), gradient[0].numpy()

    options = {"maxcor": 10, "ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxfun": 5000}
    return optimize.minimize(single, start.numpy(), jac=True, method="L-BFGS-B", options=options)


SETTINGS = {"curvature": lambda _, x: torch.ones_like(x), "max_passes": 600, "tolerance": 1e-10}
# Ten passes that gain less than the tolerance end a run: what is left is of that order.
LEFT = 100 * SETTINGS["tolerance"]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("condition", "size"), [(1, 1), (1, 8), (1e2, 2), (1e2, 30), (1e4, 8), (1e6, 2), (1e6, 8)]
)
def test_the_bottom_of_a_bowl_is_found_about_as_fast_as_scipy_finds_it(condition, size, scaled):
    hessian, lowest = bowl(condition, size)
    evaluate, start = quadratics(hessian[None], lowest[None]), torch.zeros(size).double()
    diagonal = hessian.diagonal() if scaled else torch.ones(size).double()
    found = minimise(
        evaluate, start[None], **(SETTINGS | {"curvature": lambda _, x: diagonal.expand_as(x)})
    )
    reference = scipys(evaluate, start)
    assert found.converged == (True,) and 0 <= found.values.item() <= LEFT
    assert found.values.item() <= reference.fun + LEFT
    # The smallest curvature is 1: half a squared distance is at most what is left.
    apart = (found.points[0] - lowest).norm().item()
    assert apart <= math.sqrt(2 * LEFT)
    assert len(found.traces[0]) <= 2 * reference.nfev + 10


@pytest.mark.parametrize("size", [2, 5, 10])
def test_the_end_of_a_curved_valley_is_found_about_as_fast_as_scipy_finds_it(size):
    start = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64)[:size]
    found, reference = minimise(rosenbrock, start[None], **SETTINGS), scipys(rosenbrock, start)
    assert found.converged == (True,) and 0 <= found.values.item() <= LEFT
    assert reference.fun <= LEFT
    torch.testing.assert_close(found.points[0], torch.ones(size).double(), atol=1e-3, rtol=0)
    np.testing.assert_allclose(found.points[0], reference.x, atol=1e-3)
    assert len(found.traces[0]) <= 2 * reference.nfev + 10


def mixed(size: int = 6) -> tuple:
    """Bowls from round to narrow, and a start for each."""
    bowls = [bowl(condition, size, seed) for seed, condition in enumerate((1, 1e1, 1e3, 1e5))]
    hessians, lowest = (torch.stack(parts) for parts in zip(*bowls, strict=True))
    return hessians, lowest, torch.zeros(len(bowls), size).double()


def test_runs_at_once_all_find_their_own_bottom():
    hessians, lowest, start = mixed()
    found = minimise(quadratics(hessians, lowest), start, **SETTINGS)
    assert found.converged == (True,) * 4
    assert (found.values <= LEFT).all()
    lengths = [len(trace) for trace in found.traces]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # the narrow ones take longer


@pytest.mark.parametrize("company", ["alone", "among others", "beside one that breaks down"])
def test_what_a_run_does_depends_on_no_other(company):
    hessians, lowest, start = mixed()
    # Few passes: a rounding in the last digit has no time to grow past a millionfold, and a shared
    # step, scale or history shows in the first digits.
    few = SETTINGS | {"max_passes": 8, "tolerance": 0.0}
    together = minimise(quadratics(hessians, lowest), start, **few)
    for run in range(len(start)):
        rows = [run] if company == "alone" else [3, run, 0]
        other = start[rows].clone()
        if company == "beside one that breaks down":
            other[0] = 1e200  # its values are infinite
        found = minimise(quadratics(hessians[rows], lowest[rows]), other, **few)
        place = rows.index(run) if company == "alone" else 1
        allowed = rounding(torch.float64, 10**6)
        assert found.traces[place] == pytest.approx(together.traces[run], rel=allowed, abs=allowed)
        torch.testing.assert_close(
            found.points[place], together.points[run], rtol=allowed, atol=allowed
        )


@pytest.mark.parametrize("valley", ["bowls", "rosenbrock", "steep"])
def test_values_never_rise_and_the_last_is_that_of_the_point(valley):
    hessians, lowest, start = mixed()
    generator = torch.Generator().manual_seed(1)
    start = start + 3 * torch.randn(start.shape, generator=generator, dtype=torch.float64)

    def steep(runs, points):
        return points.cosh().log().sum(1) + 1e3 * points[:, 0] ** 4, torch.cat(
            [points[:, :1].tanh() + 4e3 * points[:, :1] ** 3, points[:, 1:].tanh()], 1
        )

    evaluate = {"bowls": quadratics(hessians, lowest), "rosenbrock": rosenbrock, "steep": steep}
    found = minimise(evaluate[valley], start, **(SETTINGS | {"max_passes": 80, "tolerance": 0.0}))
    runs = torch.arange(len(start))
    for run, trace in enumerate(found.traces):
        assert (np.diff(trace) <= 0).all() and trace[-1] < trace[0]
        assert trace[-1] == found.values[run].item()
    assert torch.allclose(evaluate[valley](runs, found.points)[0], found.values)


def test_a_step_that_leaves_the_domain_is_taken_back():
    def barrier(runs, points):
        inside = (points > 0).all(1)
        safe = points.clamp_min(1e-3)
        values = torch.where(inside, (safe - safe.log()).sum(1), math.inf)
        return values, torch.where(inside[:, None], 1 - 1 / safe, math.nan)

    start = torch.tensor([[3.5, 0.5], [0.01, 20.0]], dtype=torch.float64)
    found = minimise(barrier, start, **SETTINGS)
    assert found.converged == (True, True) and (found.values - 2).abs().max() <= LEFT
    torch.testing.assert_close(found.points, torch.ones(2, 2).double(), atol=1e-4, rtol=0)


def test_no_step_is_longer_than_four_in_any_direction():
    seen = []

    def slope(runs, points):
        seen.append(points.clone())
        return -points.sum(1), torch.full_like(points, -1.0)

    start = torch.zeros(1, 3, dtype=torch.float64)
    minimise(
        slope,
        start,
        **(SETTINGS | {"curvature": lambda _, x: 1e-6 * torch.ones_like(x)} | {"max_passes": 5}),
    )
    steps = torch.stack(seen).diff(dim=0).abs()
    assert steps.max() <= 4 * (1 + rounding(torch.float64, 4)) and steps.max() > 3.9


def test_a_start_at_the_bottom_stays_there():
    hessian, lowest = bowl(100, 4)
    found = minimise(quadratics(hessian[None], lowest[None]), lowest[None], **SETTINGS)
    assert torch.equal(found.points[0], lowest) and found.values.item() == 0
    assert found.converged == (True,)


def test_a_run_stops_where_ten_passes_gain_less_than_the_tolerance_and_not_before():
    hessians, lowest, start = mixed()
    for tolerance in (1e-1, 1e-3, 1e-6):
        found = minimise(
            quadratics(hessians, lowest), start, **(SETTINGS | {"tolerance": tolerance})
        )
        for trace in found.traces:
            gains = [early - late for early, late in zip(trace, trace[10:], strict=False)]
            assert gains[-1] < tolerance
            # Near a perfect fit a thousandth of what is left counts, where that is less.
            least = [min(tolerance, max(1e-3 * late, 1e-10)) for late in trace[10:]]
            # Passes of one step are recorded together, and looked at after the step.
            whole = [i for i in range(len(gains) - 1) if trace[i + 10] != trace[i + 11]]
            assert all(gains[i] >= least[i] for i in whole)


@pytest.mark.parametrize("passes", [0, 1, 5])
def test_a_run_that_may_take_no_more_passes_says_that_it_did_not_converge(passes):
    hessians, lowest, start = mixed()
    found = minimise(quadratics(hessians, lowest), start, **(SETTINGS | {"max_passes": passes}))
    assert found.converged == (False,) * 4
    if passes == 0:
        assert torch.equal(found.points, start) and all(len(t) == 1 for t in found.traces)
    # The last step may be shortened up to eleven times before it counts.
    assert all(passes + 1 <= len(trace) <= passes + 12 for trace in found.traces)
