"""Algorithm 1 of arXiv 2306.00144 in plain Python floats, written from the paper and from nothing in manic.

Slow, obvious, and independent of torch: what the tests compare with. Vectors are lists of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
Vector = list[float]
Update = Callable[[Vector, Vector, float], Vector]  # (x, g, factor of the schedule) -> u


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def mechanic(
    x: Vector,
    gradient: Callable[[Vector, int], Vector],
    base: Update,
    schedule: Callable[[int], float],
    steps: int,
    *,
    variant: str = "paper",
    betas: tuple[float, ...] = BETAS,
    s_decay: float = 0.01,
    s_init: float | None = None,
    eps: float = 1e-8,
) -> Iterator[tuple[Vector, float]]:
    """Yields x and Σ s after every step.

    "paper": Algorithm 1. "scale_free": the same with λ relative to ‖x - x_ref‖/‖x‖, the start relative to
    ‖x_ref‖ over the size of an update, and no ε.
    """
    n, ref = len(betas), list(x)
    delta = [0.0] * len(x)
    m, v, r, s = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    last, largest = 0.0, 0.0  # ‖Δ‖ of the step before; the largest change of it so far
    for t in range(steps):
        g = gradient(x, t)
        total = math.fsum(s)
        if variant == "paper":
            bet, guard = 1e-8 if s_init is None else s_init, eps
            weight = total
        else:
            largest = max(largest, abs(norm(delta) - last))
            last = norm(delta)
            relative = 1e-4 * (1 + norm(ref)) / largest if largest else 0.0
            bet, guard = relative if s_init is None else s_init, 0.0
            weight = total * norm(delta) / norm(x)
        h = dot(delta, [gi + s_decay * weight * norm(g) / norm(x) * xi for gi, xi in zip(g, x, strict=True)])
        u = base(x, g, schedule(t))
        for i, beta in enumerate(betas):
            m[i] = max(beta * m[i], abs(h))
            v[i] = beta**2 * v[i] + h**2
            r[i] = max(0.0, beta * r[i] - s[i] * h)
            wealth = bet / n * m[i] + r[i]
            bottom = math.sqrt(v[i]) + guard
            s[i] = wealth / bottom if bottom else 0.0
        delta = [d + ui for d, ui in zip(delta, u, strict=True)]
        total = math.fsum(s)
        x = [xr + total * d for xr, d in zip(ref, delta, strict=True)]
        yield x, total


def sgd(lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Update:
    buffer: Vector = []

    def update(x: Vector, g: Vector, factor: float) -> Vector:
        g = [gi + weight_decay * xi for gi, xi in zip(g, x, strict=True)]
        buffer[:] = [momentum * b + gi for b, gi in zip(buffer, g, strict=True)] if buffer else g
        direction = [gi + momentum * b for gi, b in zip(g, buffer, strict=True)] if nesterov else buffer
        return [-lr * factor * d for d in direction]

    return update


def adamw(lr: float, weight_decay: float = 0.01, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Update:
    first: Vector = []
    second: Vector = []
    count = 0

    def update(x: Vector, g: Vector, factor: float) -> Vector:
        nonlocal count
        count += 1
        if not first:
            first[:], second[:] = [0.0] * len(x), [0.0] * len(x)
        rate = lr * factor
        first[:] = [beta1 * a + (1 - beta1) * gi for a, gi in zip(first, g, strict=True)]
        second[:] = [beta2 * b + (1 - beta2) * gi**2 for b, gi in zip(second, g, strict=True)]
        up, down = 1 - beta1**count, 1 - beta2**count
        return [
            -rate * weight_decay * xi - rate * (a / up) / (math.sqrt(b / down) + eps)
            for xi, a, b in zip(x, first, second, strict=True)
        ]

    return update


def sign(lr: float) -> Update:
    """u = -lr·sign(g)·|x|^(1/2): depends on x and g, and belongs to no library."""
    return lambda x, g, factor: [
        -lr * factor * math.copysign(1.0, gi) * math.sqrt(abs(xi)) if gi else 0.0 for xi, gi in zip(x, g, strict=True)
    ]
