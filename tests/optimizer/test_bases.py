"""Bases that are not as torch's own are: in their hooks, their state, their closures."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from resuming import resumed
from torch import nn
from torch.optim import SGD, Optimizer
from training import Problem, flat, pulled

from manic import Mechanic


class Outlined(Optimizer):
    """As Lookahead of timm: it skips Optimizer.__init__, and has but some of what that makes."""

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)


def test_a_base_that_has_not_all_hooks() -> None:
    p = nn.Parameter(torch.ones(5))
    base = Outlined(SGD([p], lr=0.1))
    m = Mechanic(base)
    pulled(p, m, 50)
    assert (p - 3).norm() < 4
    assert m.unwrap() is base
    assert not base._optimizer_step_pre_hooks


class Counting(Optimizer):
    """Keeps state that is no parameter's, as MADGRAD does."""

    def __init__(self, params: Any, lr: float, at_once: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        if at_once:
            self.state["k"] = torch.zeros(2)  # type: ignore[index]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["k"] = self.state.get("k", torch.zeros(2)) + 1  # type: ignore[index,call-overload]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["n"] = self.state[p].get("n", 0) + 1
                p.sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("at_once", [False, True])
def test_state_that_is_no_parameters(at_once: bool) -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    m, other = (Mechanic(Counting([x], 1e-4, at_once)) for x in (p, q))
    pulled(p, m, 20)
    resumed((p, m), (q, other), 5)
    m.freeze()
    assert set(m.state[p]) == {"n"}
    before = p.detach().clone()
    pulled(p, m)
    assert (p - before).abs().max() < 2 * m.effective_lr()[0]
    pulled(q, other.unwrap())
    assert torch.allclose(p, q, atol=1e-7)


class SharpnessAware(Optimizer):
    """Foret et al. 2021, as github.com/davda54/sam is used: the closure is for the place to which it has moved."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = SGD(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        moves = [0.05 * p.grad / p.grad.norm() for group in self.param_groups for p in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            torch._foreach_add_(params, moves)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(params, moves)
        self.inner.param_groups = self.param_groups
        self.inner.step()


def test_a_base_that_moves_before_it_asks_its_closure_gets_an_answer_from_there(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(SharpnessAware(parameters, lr=0.1))
    seen = []

    def closure() -> Any:
        m.zero_grad()
        seen.append(flat(parameters).detach().clone())
        loss = problem.loss(parameters, 0)
        loss.backward()
        return loss

    first = float(closure().detach())
    seen.clear()
    for _ in range(60):
        m.step(closure)
    assert len(seen) == 120
    assert (seen[1] - seen[0]).norm() > 0.01
    assert float(closure().detach()) < 0.5 * first
