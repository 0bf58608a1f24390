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

    "paper": Algorithm 1. "scale_free": docs/algorithm.md.
    """
    if variant == "scale_free":
        yield from scale_free(x, gradient, base, schedule, steps, betas=betas, s_decay=s_decay, s_init=s_init)
        return
    n, ref = len(betas), list(x)
    delta = [0.0] * len(x)
    m, v, r, s = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    bet = 1e-8 if s_init is None else s_init
    for t in range(steps):
        g = gradient(x, t)
        total = math.fsum(s)
        h = dot(delta, [gi + s_decay * total * norm(g) / norm(x) * xi for gi, xi in zip(g, x, strict=True)])
        u = base(x, g, schedule(t))
        for i, beta in enumerate(betas):
            m[i] = max(beta * m[i], abs(h))
            v[i] = beta**2 * v[i] + h**2
            r[i] = max(0.0, beta * r[i] - s[i] * h)
            wealth = bet / n * m[i] + r[i]
            s[i] = wealth / (math.sqrt(v[i]) + eps)
        delta = [d + ui for d, ui in zip(delta, u, strict=True)]
        total = math.fsum(s)
        x = [xr + total * d for xr, d in zip(ref, delta, strict=True)]
        yield x, total


def scale_free(
    x: Vector,
    gradient: Callable[[Vector, int], Vector],
    base: Update,
    schedule: Callable[[int], float],
    steps: int,
    *,
    betas: tuple[float, ...],
    s_decay: float,
    s_init: float | None,
) -> Iterator[tuple[Vector, float]]:
    """The equations of docs/algorithm.md."""
    n, origin, peak = len(betas), norm(x), 0.0
    delta, kept = [0.0] * len(x), 0.0  # Δ; how much of ‖Δ‖ was there before the last update
    m, v = [0.0] * n, [0.0] * n
    total, size, largest, fade = 0.0, 0.0, 0.0, 1.0  # S; the mean ‖g‖; the largest update; the last fade
    for t in range(steps):
        g = gradient(x, t)
        leap = max(1.0, schedule(t) / peak / 10) if peak else 1.0
        delta, total, kept, largest = [leap * d for d in delta], total / leap, leap * kept, leap * largest
        m, v = [leap * mi for mi in m], [leap**2 * vi for vi in v]
        largest = max(largest, abs(norm(delta) / fade - kept))
        whole = (1 + origin) / largest if largest else 0.0
        first = 1e-3 * whole if s_init is None else s_init
        far = total * norm(delta) / norm(x)
        h = dot(delta, [gi + s_decay * far * norm(g) / norm(x) * xi for gi, xi in zip(g, x, strict=True)])
        size = size or norm(g)
        h /= size
        size += 2 / (t + 2) * (min(norm(g), 2 * size) - size)
        usual = min(abs(h), 2 * max(m)) if any(m) else abs(h)
        step = wild = 0.0
        for i, beta in enumerate(betas):
            then = math.sqrt(v[i] + 4 * m[i] ** 2)
            m[i] = max(beta * m[i], usual)
            v[i] = beta**2 * v[i] + usual**2
            now = math.sqrt(v[i] + 4 * m[i] ** 2)
            if now:
                wild += abs(h) / (then or now) / n
                step += usual / now / n if h < 0 else -h / (then or now) / n
        peak = max(peak, schedule(t))
        share = schedule(t) / peak if peak else 0.0
        before, total = total, max((total or first) * math.exp(share * max(step, -3)), min(1e-6 * whole, first))
        ratio = total / before if before else 0.0
        keep = min(ratio / 0.9, 1) / ratio if ratio else 0.0
        fade = 1.0 if share < 0.99 else (t + 2) / (t + 3)
        u = base(x, g, schedule(t)) if wild < 2 else [0.0 * ui for ui in base(x, [0.0] * len(x), schedule(t))]
        kept = keep * norm(delta)
        whole = [keep * d + ui for d, ui in zip(delta, u, strict=True)]
        ref = [xi - before * d + total * (1 - fade) * w for xi, d, w in zip(x, delta, whole, strict=True)]
        delta = [fade * w for w in whole]
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
