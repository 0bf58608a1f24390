"""Options and fixtures of all tests. support/training.py holds the problem that they train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from training import Problem, regression

from manic import Mechanic, algorithm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="all broken checkpoints, not a sample (nox -s soak)")


@pytest.fixture
def problem() -> Problem:
    return regression()


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """sweeps("eager"): from now on every Mechanic sweeps as without a library; sweeps("native"): as usual."""
    chosen = algorithm.kernels_for
    choices: dict[str, Any] = {"native": chosen, "eager": lambda _: None}
    return lambda kind: monkeypatch.setattr(algorithm, "kernels_for", choices[kind])


@pytest.fixture(params=["native", "eager"])
def both_sweeps(request: pytest.FixtureRequest, sweeps: Callable[[str], None]) -> None:
    """Run the test twice, with the one and with the other."""
    sweeps(request.param)


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
