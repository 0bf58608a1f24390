"""A small nonlinear regression, in torch and in plain Python, that most tests train."""

from __future__ import annotations

import math
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manic import Mechanic

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="all broken checkpoints, not a sample (nox -s soak)")


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


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters])


def gap(got: Any, wanted: Any, start: Any) -> float:
    """The largest difference, in units of the distance moved. Fails if nothing moved."""
    got, wanted, start = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted, start))
    moved = (wanted - start).abs().max().item()
    assert moved > 1e-3, "nothing moved: the comparison would be vacuous"
    return (got - wanted).abs().max().item() / moved


def free_port() -> int:
    """A port that nobody listens on at this moment, for processes that are to meet there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def cosine(steps: int) -> Callable[[int], float]:
    return lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))


@pytest.fixture
def problem() -> Problem:
    generator = random.Random(0)
    rows = [[generator.gauss(0, 1) for _ in range(12)] for _ in range(40)]
    truth = [generator.gauss(0, 1) for _ in range(12)]
    targets = [sum(a * b for a, b in zip(row, truth, strict=True)) + generator.gauss(0, 0.1) for row in rows]
    return Problem(rows, targets, [generator.gauss(0, 0.3) for _ in range(12)])


@pytest.fixture
def trained(problem: Problem) -> Callable[..., tuple[list[nn.Parameter], Mechanic]]:
    """trained(base class, steps, base options, **options of Mechanic): parameters and Mechanic after `steps`."""

    def build(
        base: Any = torch.optim.AdamW,
        steps: int = 30,
        *,
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-3,
        **options: Any,
    ) -> tuple[list[nn.Parameter], Mechanic]:
        parameters = problem.parameters(dtype)
        mechanic = Mechanic(base(parameters, lr=lr), **options)
        problem.train(parameters, mechanic, steps)
        return parameters, mechanic

    return build


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
