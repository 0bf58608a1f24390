"""What most tests train: a small nonlinear regression, in torch and in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Problem:
    """mean(log cosh(a·x - b)) over one of four batches per step, x of 12 elements as a matrix and a vector."""

    rows: list[list[float]]
    targets: list[float]
    start: list[float]

    def gradient(self, x: list[float], t: int) -> list[float]:
        total = [0.0] * len(x)
        for a, b in list(zip(self.rows, self.targets, strict=True))[t % 4 :: 4]:
            slope = math.tanh(math.fsum(p * q for p, q in zip(a, x, strict=True)) - b)
            total = [g + slope * ai for g, ai in zip(total, a, strict=True)]
        return [g * 4 / len(self.rows) for g in total]

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        x = torch.tensor(self.start, dtype=dtype)
        return [nn.Parameter(x[:8].view(2, 4).clone()), nn.Parameter(x[8:].clone())]

    def loss(self, parameters: list[nn.Parameter], t: int) -> Tensor:
        dtype = parameters[0].dtype
        rows, targets = torch.tensor(self.rows, dtype=dtype)[t % 4 :: 4], torch.tensor(self.targets, dtype=dtype)
        return (rows @ flat(parameters) - targets[t % 4 :: 4]).cosh().log().mean()

    def train(self, parameters: list[nn.Parameter], optimizer: Any, steps: range | int) -> None:
        for t in steps if isinstance(steps, range) else range(steps):
            optimizer.zero_grad()
            self.loss(parameters, t).backward()
            optimizer.step()


def regression() -> Problem:
    """The problem of most tests."""
    generator = random.Random(0)
    rows = [[generator.gauss(0, 1) for _ in range(12)] for _ in range(40)]
    truth = [generator.gauss(0, 1) for _ in range(12)]
    targets = [sum(a * b for a, b in zip(row, truth, strict=True)) + generator.gauss(0, 0.1) for row in rows]
    return Problem(rows, targets, [generator.gauss(0, 0.3) for _ in range(12)])


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters])


def gap(got: Any, wanted: Any, start: Any) -> float:
    """The largest difference, in units of the distance moved. Fails if nothing moved."""
    got, wanted, start = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted, start))
    moved = (wanted - start).abs().max().item()
    assert moved > 1e-3, "nothing moved: the comparison would be vacuous"
    return (got - wanted).abs().max().item() / moved


def cosine(steps: int) -> Callable[[int], float]:
    return lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))


def pulled(p: nn.Parameter, m: Any, steps: int = 1, target: float = 3.0) -> None:
    """Steps towards a target."""
    for _ in range(steps):
        p.grad = p.detach() - target
        m.step()


class Wrapped(torch.optim.Optimizer):
    """As a framework wraps an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.defaults = optimizer, optimizer.defaults
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)
