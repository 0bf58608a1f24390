"""A run of a Mechanic beside the same run of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch.optim.lr_scheduler import LambdaLR
from training import Problem, cosine, flat, gap

from manic import Mechanic

STEPS = 200
WILD = 60  # the step whose gradient is, where that is asked for


class Sign(torch.optim.Optimizer):
    """The custom optimizer of oracle.sign, with an option that torch's optimizers do not have."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "power": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign() * p.abs() ** group["power"])


BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[], oracle.Update]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.5), lambda: oracle.sgd(0.5)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda: oracle.sgd(0.1, 0.9)),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda: oracle.sgd(0.1, 0.9, nesterov=True),
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1), lambda: oracle.adamw(0.1, 0.1)),
    "custom": (lambda p: Sign(p, lr=0.1), lambda: oracle.sign(0.1)),
}


def as_held(base: oracle.Update, dtype: torch.dtype) -> oracle.Update:
    """u as x_t + u_t holds it in float64: beside x an update of 1e-7 has lost half of its digits."""
    if dtype != torch.float64:
        return base
    return lambda x, g, factor: [(xi + ui) - xi for xi, ui in zip(x, base(x, g, factor), strict=True)]


def run_both(
    problem: Problem,
    base: str,
    dtype: torch.dtype,
    scheduled: bool | Callable[[int], float],
    unit: float = 1.0,
    wild: float = 1.0,
    steps: int = STEPS,
    **options: Any,
) -> tuple[float, float]:
    """Gap of the parameters and relative gap of the scale after `steps`, Mechanic against the oracle.

    `unit`: the base lr, where the oracle's base works at 1/unit of it and its scale is unit times as large.
    `wild`: what one of the gradients is multiplied with.
    """
    build, update = BASES[base]
    factor = scheduled if callable(scheduled) else cosine(STEPS) if scheduled else lambda t: 1.0
    parameters = problem.parameters(dtype)
    optimizer = build(parameters)
    mechanic = Mechanic(optimizer, LambdaLR(optimizer, factor) if scheduled else None, **options)
    problem.train(parameters, mechanic, WILD)
    for p in parameters:
        p.register_hook(lambda grad: grad * wild if mechanic.param_groups[0]["mechanic_step"] == WILD else grad)
    problem.train(parameters, mechanic, range(WILD, steps))

    def gradient(x: list[float], t: int) -> list[float]:
        return [g * (wild if t == WILD else 1) for g in problem.gradient(x, t)]

    start = flat(problem.parameters(dtype)).tolist()
    trace = oracle.mechanic(start, gradient, as_held(update(), dtype), lambda t: factor(t) / unit, steps, **options)
    *_, (x, scale) = trace
    assert scale > 1e-4, "the scale never started: the comparison would be vacuous"
    return gap(flat(parameters).detach(), x, start), abs(mechanic.scale.item() * unit - scale) / scale
