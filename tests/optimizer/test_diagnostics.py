"""What a run tells of itself: metrics(), and the warnings about what seems to be wrong."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Rprop
from torch.optim.lr_scheduler import LambdaLR, StepLR
from training import Problem, flat

from manic import Mechanic, callbacks
from manic.diagnostics import ENOUGH, IDLE
from manic.tuner import TunerState


@pytest.mark.parametrize("options", [{}, {"variant": "paper", "s_init": 1e-3}])
def test_the_figures_are_those_of_the_run(options: dict[str, Any], problem: Problem) -> None:
    parameters = problem.parameters(torch.float64)
    mechanic = Mechanic(AdamW(parameters, lr=0.1), **options)
    problem.train(parameters, mechanic, 20)
    x, scale, kept = flat(parameters).detach(), mechanic.scale.item(), mechanic.state
    if options:  # x_ref is where the run began
        ref = torch.tensor(problem.start, dtype=torch.float64)
    else:
        ref = flat([kept[p]["mechanic_ref"] for p in parameters]).clone()
    problem.train(parameters, mechanic, range(20, 21))
    found = mechanic.metrics()
    assert found.keys() == {"scale", "h", "delta_norm", "outliers", "effective_lr", "skipped"}
    assert found["scale"] == mechanic.scale.item() > 0
    assert [found["effective_lr"]] == mechanic.effective_lr() == [0.1 * found["scale"]]
    assert found["delta_norm"] > 0
    assert scale * found["delta_norm"] == pytest.approx((x - ref).norm().item())
    assert found["h"] == mechanic.param_groups[0]["mechanic_state"][4 * (6 if options else 1)].item() != 0


def test_skipped_steps_and_outliers_are_counted(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(SGD(parameters, lr=0.1))
    factors = {12: math.nan, 13: math.inf, 20: 1e6}
    for t in range(30):
        mechanic.zero_grad()
        problem.loss(parameters, t).backward()
        parameters[0].grad *= factors.get(t, 1.0)
        mechanic.step()
    found = mechanic.metrics()
    assert (found["skipped"], found["outliers"]) == (2, 1)
    mechanic.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    assert mechanic.metrics() == found


@pytest.mark.parametrize(
    ("names", "expected"), [(("encoder", "head"), ("encoder", "head")), (("a", "a"), "01"), ((None, "b"), "0b")]
)
@pytest.mark.parametrize("per_group", [False, True])
def test_groups_go_by_their_names(names: Any, expected: Any, per_group: bool, problem: Problem) -> None:
    parameters = problem.parameters()
    groups = [
        {"params": [p], "lr": torch.tensor(lr, dtype=torch.float64), **({"name": name} if name else {})}
        for p, lr, name in zip(parameters, (0.1, 0.3), names, strict=True)
    ]
    mechanic = Mechanic(AdamW(groups), per_group=per_group)
    problem.train(parameters, mechanic, 10)
    found = mechanic.metrics()
    rates = mechanic.effective_lr()
    assert [found[f"effective_lr/{name}"] for name in expected] == rates
    assert rates[0] > 0
    if per_group:
        assert [found[f"scale/{name}"] for name in expected] == mechanic.scale.tolist()
        assert len(found) == 11
    else:
        assert rates[1] == pytest.approx(3 * rates[0])
        assert found["scale"] == mechanic.scale.item()
        assert len(found) == 7


def test_tensorboard_gets_what_is_logged(problem: Problem) -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: dict[tuple[str, int], float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen[name, step] = value

    parameters, writer = problem.parameters(), Writer()
    mechanic = Mechanic(AdamW(parameters, lr=0.1), log_func=callbacks.tensorboard(writer), log_every=5)
    problem.train(parameters, mechanic, 10)
    assert {step for _, step in writer.seen} == {5, 10}
    expected = {(f"mechanic/{name}", 10): value for name, value in mechanic.metrics().items()}
    assert writer.seen.items() >= expected.items()


# ---------------------------------------------------------------------- what seems to be wrong


def told(mechanic: Mechanic, step: Any, steps: int, every: int = 10) -> list[str]:
    """The warnings of `steps` steps that are logged every so many."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            step(t)
            if (t + 1) % every == 0:
                mechanic.metrics()
    return [str(warning.message) for warning in caught]


def of(problem: Problem, parameters: list[nn.Parameter], mechanic: Mechanic, factor: Any = lambda t: 1.0) -> Any:
    """A step of training; gradients times factor(t)."""

    def step(t: int) -> None:
        mechanic.zero_grad()
        problem.loss(parameters, t).backward()
        for p in parameters:
            p.grad *= factor(t)
        mechanic.step()

    return step


@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("options", [{}, {"per_group": True}, {"variant": "paper", "s_init": 1e-3}])
def test_nothing_is_told_of_a_run_that_is_well(base: Any, options: dict[str, Any], problem: Problem) -> None:
    parameters = problem.parameters()
    optimizer = base([{"params": [p]} for p in parameters], lr=1.0)
    mechanic = Mechanic(optimizer, LambdaLR(optimizer, lambda t: 1 / (1 + t // 100)), **options)
    assert told(mechanic, of(problem, parameters, mechanic), 3 * ENOUGH, every=1) == []
    assert mechanic.metrics()["skipped"] == 0
    mechanic.freeze()
    assert told(mechanic, of(problem, parameters, mechanic), 20, every=1) == []


@pytest.mark.parametrize(
    ("options", "lr", "factor", "message"),
    [
        ({}, 0.1, lambda t: math.nan if t % 20 > 8 else 1.0, r"^1\d of the last 10 steps were skipped.*not finite"),
        ({}, 0.1, lambda t: 0.0, "^all gradients were 0 in 10 steps"),
        ({}, 0.0, lambda t: 1.0, "^the base optimizer has not moved the parameters in 10 steps"),
        ({"variant": "paper"}, 1e-8, lambda t: 1.0, "^the scale has not left its start in 100 steps.*base lr of 1"),
        ({}, 0.1, lambda t: 1e7 if t % 8 == 7 and t > 20 else 1.0, r"^in \d of the last 10 steps no update followed"),
    ],
    ids=["not finite", "zero", "no lr", "paper", "outliers"],
)
def test_what_is_wrong_is_told_once(
    options: dict[str, Any], lr: float, factor: Any, message: str, problem: Problem
) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(SGD(parameters, lr=lr), **options)
    found = [
        text for text in told(mechanic, of(problem, parameters, mechanic, factor), 160) if re.search(message, text)
    ]
    assert len(found) == 1, found


def test_a_scale_that_stays_at_its_start_is_told() -> None:
    p = nn.Parameter(torch.zeros(3))
    mechanic = Mechanic(SGD([p], lr=0.1))

    def step(t: int) -> None:  # a loss that rises along what was done so far, wherever that leads
        d = p.detach() - mechanic.state[p]["mechanic_ref"] if t > 1 else torch.ones(3)
        p.grad = d / d.norm()
        mechanic.step()

    (found,) = told(mechanic, step, 150)
    assert "the scale has not left its start in 100 steps" in found


@pytest.mark.parametrize("options", [{}, {"per_group": True}], ids=str)
def test_a_scale_that_comes_back_to_its_start_is_not_told(options: dict[str, Any], problem: Problem) -> None:
    """As it does where a loss without noise is at its minimum. Whoever looks for the first time cannot know."""
    parameters = problem.parameters()
    mechanic = Mechanic(AdamW([{"params": [p]} for p in parameters], lr=0.1), **options)
    step = of(problem, parameters, mechanic)
    assert told(mechanic, step, ENOUGH + 10) == []
    for group in mechanic.param_groups:
        TunerState.unpack(group["mechanic_state"], 1).scale.mul_(1e-9)
    assert told(mechanic, lambda t: None, 20) == []
    mechanic._run.monitor.forget()
    found = told(mechanic, lambda t: None, 20)
    assert len(found) == (len(parameters) if options else 1)
    assert all(re.search("^the scale.* has not left its start in 110 steps, or is back there", text) for text in found)


def test_parameters_without_bounds_are_told() -> None:
    p = nn.Parameter(torch.zeros(3))
    mechanic = Mechanic(SGD([p], lr=0.1))

    def step(t: int) -> None:
        p.grad = -torch.ones(3)  # of a loss that falls for ever
        mechanic.step()

    (found,) = told(mechanic, step, 150)
    assert "away from where they began" in found


def test_a_group_is_called_by_its_name(problem: Problem) -> None:
    parameters = problem.parameters()
    groups = [{"params": [p], "name": name} for p, name in zip(parameters, ("encoder", "head"), strict=True)]
    mechanic = Mechanic(SGD(groups, lr=0.1), per_group=True)

    def step(t: int) -> None:
        mechanic.zero_grad()
        problem.loss(parameters, t).backward()
        parameters[1].grad = None
        mechanic.step()

    (found,) = told(mechanic, step, 20)
    assert "all gradients of group head were 0" in found


def test_a_base_that_its_lr_does_not_scale(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(Rprop(parameters, lr=0.01))
    (found,) = told(mechanic, of(problem, parameters, mechanic), 20)
    assert "the update of Rprop is not proportional to its lr" in found


@pytest.mark.parametrize("on", ["base", "mechanic"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_scheduler_that_nobody_steps(on: str, stepped: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    mechanic = Mechanic(optimizer)
    schedule = StepLR(mechanic if on == "mechanic" else optimizer, IDLE // 2, 0.9)

    def step(t: int) -> None:
        p.grad = p.detach().clone()
        mechanic.step()
        if stepped:
            schedule.step()

    found = [text for text in told(mechanic, step, IDLE + 200, every=100) if "pass it in" in text]
    assert len(found) == (not stepped)
