"""Algorithm 1 of arXiv 2306.00144 in plain Python floats, written from the paper and from nothing in manic.

Slow, obvious, and independent of torch: what the tests compare with. Vectors are lists of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
Vector = list[float]
Update = Callable[[Vector, Vector, float], Vector]  # (x, g, factor of the schedule) -> u
Edit = Callable[[Vector, int], Vector]  # (x, t) -> x


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def over(a: float, b: float) -> float:
    """a / b, and 0 where b is 0."""
    return a / b if b else 0.0


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
    edit: Edit | None = None,
) -> Iterator[tuple[Vector, float]]:
    """Yields x and Σ s after every step.

    "paper": Algorithm 1. "scale_free": docs/algorithm.md. `edit` returns what somebody makes of x before step t, and
    before the gradient of that step is taken; in "paper" x_ref is shifted by as much.
    """
    if variant == "scale_free":
        yield from scale_free(x, gradient, base, schedule, steps, s_decay=s_decay, s_init=s_init, edit=edit)
        return
    n, ref = len(betas), list(x)
    delta = [0.0] * len(x)
    m, v, r, s = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    bet = 1e-8 if s_init is None else s_init
    for t in range(steps):
        if edit is not None:
            before, x = x, edit(list(x), t)
            ref = [xr + new - old for xr, new, old in zip(ref, x, before, strict=True)]
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
    s_decay: float,
    s_init: float | None,
    edit: Edit | None = None,
) -> Iterator[tuple[Vector, float]]:
    """The equations of docs/algorithm.md, with one slot.

    d = x - x_ref is what x has been moved, by the steps and by edits. Δ is d / S. S starts in the step after
    the first update that is not 0.
    """
    ref: Vector = []
    m, v, typical, peak = 0.0, 0.0, 0.0, 0.0  # the largest |h|, the sum of h², the mean |h|, the highest lr
    scale, largest = 0.0, 0.0  # S; the largest update
    size = 0.0  # the mean ‖g‖
    # Of the last step: ‖d‖ before its update, and at its end; by how much x was drawn back; the fade; ‖u‖; ‖x‖ before.
    kept, left, drawn, fade, update, x_norm = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for t in range(steps):
        if edit is not None:
            x = edit(list(x), t)
        if t == 0:
            ref, origin = list(x), norm(x)
        g = gradient(x, t)
        d = [xi - xr for xi, xr in zip(x, ref, strict=True)]

        # An update has moved x by S·‖u‖ at most. What goes far beyond that replaced the weights.
        growth = abs(over(norm(d), fade) - kept)
        shift = abs(norm(x) - x_norm) - drawn
        replaced = scale > 0 and max(growth, shift) > 3 * scale * update + 1e-5 * (norm(x) + norm(d))
        x_norm = norm(x)
        # What an edit has taken back of d counts in Δ no more.
        rest = min(1.0, norm(d) / left) if left and not replaced else 1.0
        if replaced:
            d, ref, growth = [0.0] * len(x), list(x), 0.0

        # A higher lr: S is about updates at the highest so far, and so is all that was learned.
        lr = abs(schedule(t))
        leap = max(1.0, over(lr, peak))
        m, v, typical, scale = leap * m, leap**2 * v, leap * typical, scale / leap
        largest, update = leap * largest, leap * update
        largest = max(largest, over(growth, scale)) or update
        whole = over(1 + origin, largest)
        first = 1e-3 * whole if s_init is None or not whole else max(s_init, 1e-6 * whole)

        pull = s_decay * over(norm(d), norm(x)) * over(norm(g), norm(x))
        size = size or norm(g)
        h = over(dot([over(1.0, scale) * di for di in d], [gi + pull * xi for gi, xi in zip(g, x, strict=True)]), size)
        seen = min(norm(g), 2 * size)
        calm = min(1.0, over(size, norm(g)))
        recent = 2 / (t + 2) if norm(g) > 0 else 0.0  # no gradient says nothing
        size += recent * (seen - size)
        usual = min(abs(h), 2 * m) if m else abs(h)
        then = math.sqrt(v + 4 * m**2)
        m, v = max(m, usual), v + usual**2
        typical = typical + recent * (usual - typical) if typical else usual
        now = math.sqrt(v + 4 * m**2)
        wild = over(abs(h), then or now)
        record = h > 0 and wild >= 0.5

        peak = max(peak, lr)
        share = over(lr, peak)
        patience = math.sqrt(100 / (t + 100))
        step = patience * usual if h > 0 else -calm * usual
        step = over(step - math.sqrt(patience * (1 - share)) * typical, now) if h else 0.0
        if record:
            step = over(usual, then or now)
        before, scale = scale, max(scale * math.exp(-share * step) if scale else first, 1e-6 * whole)
        fade = rest**2 * (1.0 if share < 1 else ((t + 2) / (t + 3)) ** 0.25)

        outlier = wild >= 2
        u = base(x, [0.0] * len(x) if outlier else g, schedule(t))
        update = norm(u)
        if outlier:
            u = [0.0 * ui for ui in u]
        if before > 0 and not replaced:
            # A record draws x back along d, by as much as S falls.
            back = min(scale / before, 1.0) if record else 1.0
            drawn = (1 - back) * norm(d)
            x = [xr + back * di for xr, di in zip(ref, d, strict=True)]
            d = [back * di for di in d]
        else:
            drawn, d = norm(d), [0.0] * len(x)
        kept = norm(d)
        x = [xi + scale * ui for xi, ui in zip(x, u, strict=True)]
        d = [fade * (di + scale * ui) for di, ui in zip(d, u, strict=True)]
        ref = [xi - di for xi, di in zip(x, d, strict=True)]
        left = norm(d)
        yield x, scale


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
