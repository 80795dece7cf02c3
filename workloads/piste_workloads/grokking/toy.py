r"""Grokking in two dimensions, in closed form: a linear problem with a fast and a slow direction.

Training points `z ~ N(0, diag(1, eps))` given `|z_1| >= s`, with `y = sign(z_1)`, and the squared loss
`1/2 E (w . z - y)^2`. With `phi` and `Q` the density and the upper tail of N(0, 1):

    m_1 = E|z_1| = phi(s) / Q(s)        m_2 = E z_1^2 = 1 + s m_1
    Sigma = diag(m_2, eps)              c = E y z = (m_1, 0)           w_ols = Sigma^-1 c = (m_1 / m_2, 0)

Gradient descent has

    w(k) = A^k w(0) + (I - A^k) w_ols,  A = I - eta Sigma                                     (GD)

so that the part of `w(0)` along the slow direction is forgotten at the rate `eta eps`. The modified scheme
takes `Sigma^-1` times the gradient, and all directions at equal speed:

    w(k) = (1 - eta)^k w(0) + (1 - (1 - eta)^k) w_ols                                         (equal)

Test points have directions that are uniform over the arc between the boundary `z_1 = 0` and the angle theta
from the first axis, on the side where `w(0)` errs. With `alpha` the angle of `w(k)` from the first axis, the
share of them on the wrong side is

    E(k) = min(1, alpha / (pi/2 - theta)),   alpha = arccos r_k,   r_k = w_1 / ||w||

It is 1 while `|w_2| tan(theta) > w_1`, about until `k* = log(tau) / (eta eps)`, with
`tau = |w_2(0)| tan(theta) m_2 / m_1`.

Source: Pasand and Dohmatob, "Egalitarian gradient descent" (arXiv:2510.04930), section 3. The paper's account
of the test points was not at hand: the arc is the one that gives its `k*` and `E(k)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from piste_workloads.grokking.config import Toy
from piste_workloads.grokking.points import Points


def moments(margin: float) -> tuple[float, float]:
    """`m_1` and `m_2` of `|z|` for `z ~ N(0, 1)` given `|z| >= margin`."""
    density = math.exp(-(margin**2) / 2.0) / math.sqrt(2.0 * math.pi)
    # m_1 = phi(s) / Q(s), m_2 = 1 + s m_1
    first = density / (0.5 * math.erfc(margin / math.sqrt(2.0)))
    return first, 1.0 + margin * first


def least_squares(margin: float) -> Tensor:
    """`w_ols`, `(2,)`."""
    first, second = moments(margin)
    return torch.tensor([first / second, 0.0], dtype=torch.float64)


def weights_after(task: Toy, step_size: float, steps: Sequence[int]) -> Tensor:
    """`w(k)` of the population's problem in closed form.

    Args:
        task: The problem, and by `equal` the scheme.
        step_size: eta.
        steps: The k that are asked for.

    Returns:
        `(len(steps), 2)` in float64.
    """
    speeds = torch.tensor([moments(task.margin)[1], task.epsilon], dtype=torch.float64)
    factors = 1.0 - step_size * (torch.ones_like(speeds) if task.equal else speeds)
    # w(k) = A^k w(0) + (I - A^k) w_ols
    powers = factors ** torch.tensor(steps, dtype=torch.float64)[:, None]
    start = torch.tensor(task.start, dtype=torch.float64)
    return powers * start + (1.0 - powers) * least_squares(task.margin)


def accuracy_of(weights: Tensor, angle: float) -> Tensor:
    """`1 - E` of weights `(..., 2)` that lean as the first ones do."""
    # E = min(1, alpha / (pi/2 - theta))
    alpha = torch.atan2(weights[..., 1].abs(), weights[..., 0])
    return 1.0 - (alpha / (math.pi / 2.0 - angle)).clamp(max=1.0)


def plateau_steps(task: Toy, step_size: float) -> float:
    """`k*`: about how long gradient descent errs on every test point, for large first weights."""
    first, second = moments(task.margin)
    # tau = |w_2(0)| tan(theta) m_2 / m_1, k* = log(tau) / (eta eps)
    tau = abs(task.start[1]) * math.tan(task.angle) * second / first
    return math.log(tau) / (step_size * task.epsilon)


def training_points(task: Toy, generator: torch.Generator) -> Points:
    """The training points: a sample, or eight points with the population's `Sigma` and `c`."""
    scale = math.sqrt(task.epsilon)
    if not task.samples:
        # |z_1| = m_1 +- sqrt(m_2 - m_1^2) has the moments m_1 and m_2, z_2 = +- sqrt(eps) has 0 and eps.
        first, second = moments(task.margin)
        spread = math.sqrt(second - first**2)
        axes = [torch.tensor(values, dtype=torch.float64) for values in ((1.0, -1.0), (1.0, -1.0))]
        sizes = torch.tensor([first - spread, first + spread], dtype=torch.float64)
        signs, sizes, sides = torch.meshgrid(axes[0], sizes, axes[1], indexing="ij")
        inputs = torch.stack([(signs * sizes).flatten(), scale * sides.flatten()], -1)
        return Points(inputs, signs.flatten())
    # |z_1| given |z_1| >= s has the upper tail u Q(s): z_1 = Q^-1(u Q(s)), u uniform
    uniform = torch.rand(task.samples, generator=generator, dtype=torch.float64)
    tail = 0.5 * math.erfc(task.margin / math.sqrt(2.0))
    sizes = -torch.special.ndtri((1.0 - uniform) * tail)
    signs = 1.0 - 2.0 * torch.randint(2, (task.samples,), generator=generator).double()
    slow = scale * torch.randn(task.samples, generator=generator, dtype=torch.float64)
    return Points(torch.stack([signs * sizes, slow], -1), signs)


def unseen_points(task: Toy, offset: float) -> Points:
    """Test points: evenly spaced directions of the arc, shifted by a part of their spacing."""
    arc = math.pi / 2.0 - task.angle
    numbers = torch.arange(task.test_points, dtype=torch.float64)
    from_boundary = arc * (numbers + offset) / task.test_points
    wrong_side = -math.copysign(1.0, task.start[1])
    inputs = torch.stack([from_boundary.sin(), wrong_side * from_boundary.cos()], -1)
    return Points(inputs, torch.ones(task.test_points, dtype=torch.float64))


def equalizer(task: Toy, inputs: Tensor) -> Tensor:
    """`Sigma^1/2` of the training points where all directions are to have equal speed, else I; `(2, 2)`.

    Gradient descent on `u = Sigma^1/2 w` with inputs `Sigma^-1/2 z` is the modified scheme on `w`:
    `Sigma^1/2 (w - eta Sigma^-1 grad) = u - eta Sigma^-1/2 grad`.
    """
    if not task.equal:
        return torch.eye(2, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    root: Tensor = vectors @ torch.diag(values.sqrt()) @ vectors.T
    return root
