"""A Mechanic as a Stateful: dcp.save({"mechanic": mechanic}), dcp.load into one that has never stepped.

One process; tests/system/test_distributed.py has the new processes, and the sharded parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler
from training import Problem, flat

from manic import Mechanic

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
STEPS = 24


class Counting(torch.optim.SGD):
    """A base that keeps an int per parameter, and one per group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["calls"] = 0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    count = self.state[p].get("count", 0) + 1
                    self.state[p]["count"] = count
                    p.data.add_(p.grad, alpha=-group["lr"] / count)


def schedulers() -> dict[str, Callable[[Any], Any]]:
    s = lr_scheduler
    return {
        "none": lambda o: None,
        "step": lambda o: s.StepLR(o, step_size=5),
        "multistep": lambda o: s.MultiStepLR(o, milestones=[4, 14]),
        "multiplicative": lambda o: s.MultiplicativeLR(o, lambda t: 0.9),
        "lambda": lambda o: s.LambdaLR(o, lambda t: 0.9**t),
        "constant": lambda o: s.ConstantLR(o, total_iters=7),
        "linear": lambda o: s.LinearLR(o, total_iters=7),
        "exponential": lambda o: s.ExponentialLR(o, gamma=0.9),
        "polynomial": lambda o: s.PolynomialLR(o, total_iters=STEPS),
        "cosine": lambda o: s.CosineAnnealingLR(o, T_max=STEPS),
        "restarts": lambda o: s.CosineAnnealingWarmRestarts(o, T_0=6),
        "onecycle": lambda o: s.OneCycleLR(o, max_lr=1.0, total_steps=STEPS + 1),
        "cyclic": lambda o: s.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=4, cycle_momentum=False),
        "chained": lambda o: s.ChainedScheduler([s.ConstantLR(o, total_iters=3), s.ExponentialLR(o, gamma=0.9)]),
        "sequential": lambda o: s.SequentialLR(o, [s.LinearLR(o), s.ExponentialLR(o, gamma=0.9)], milestones=[5]),
    }


def build(problem: Problem, base: Any, schedule: Callable[[Any], Any], scale: float = 1.0) -> Any:
    parameters = problem.parameters()
    with torch.no_grad():
        for p in parameters:
            p.mul_(scale)
    optimizer = base(parameters, lr=0.1)
    return parameters, Mechanic(optimizer, schedule(optimizer))


@pytest.mark.parametrize("at", [0, 10])
@pytest.mark.parametrize(
    ("base", "scheduler"),
    [
        *((torch.optim.AdamW, name) for name in schedulers()),
        *((base, "cosine") for base in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam, Counting)),
    ],
)
def test_resume(base: Any, scheduler: str, at: int, problem: Problem, tmp_path: Path) -> None:
    parameters, mechanic = build(problem, base, schedulers()[scheduler])
    problem.train(parameters, mechanic, at)
    dcp.save({"mechanic": mechanic, "model": nn.ParameterList(parameters)}, checkpoint_id=tmp_path / "checkpoint")
    problem.train(parameters, mechanic, range(at, STEPS))
    assert mechanic.scale > 0

    others, other = build(problem, base, schedulers()[scheduler], scale=0.5)
    dcp.load({"mechanic": other, "model": nn.ParameterList(others)}, checkpoint_id=tmp_path / "checkpoint")
    problem.train(others, other, range(at, STEPS))
    assert torch.equal(flat(parameters), flat(others))
    assert torch.equal(mechanic.scale, other.scale)
    assert mechanic.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    if base is Counting:
        assert other.param_groups[0]["calls"] == STEPS
        assert {key for values in other.state.values() for key in values} == {"count", "mechanic_ref"}


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, Counting])
def test_a_fresh_one_is_left_as_it_was(base: Any, problem: Problem, tmp_path: Path) -> None:
    """Saving one, or trying to load one in vain, changes nothing: with gradients, frozen parameters, a tensor lr."""
    runs = []
    for touched in (False, True):
        parameters, mechanic = build(problem, base, schedulers()["cosine"])
        parameters.append(nn.Parameter(torch.ones(2), requires_grad=False))
        mechanic.param_groups[0]["params"].append(parameters[-1])
        if base is torch.optim.AdamW:
            mechanic.param_groups[0]["lr"] = torch.tensor(0.1)
        problem.loss(parameters[:2], 0).backward()
        if touched:
            gradient, group = parameters[0].grad, dict(mechanic.param_groups[0])
            state_dict = mechanic.state_dict()
            assert all("mechanic_ref" in state_dict["state"][i] for i in range(2)), "it shows what there will be"
            dcp.save({"mechanic": mechanic}, checkpoint_id=tmp_path / "checkpoint")
            (tmp_path / "checkpoint" / "__0_0.distcp").write_bytes(b"")
            with pytest.raises(CheckpointException):
                dcp.load({"mechanic": mechanic}, checkpoint_id=tmp_path / "checkpoint")
            assert parameters[0].grad is gradient
            assert mechanic.param_groups[0].keys() == group.keys()
            assert all(mechanic.param_groups[0][key] is group[key] for key in ("lr", "params", "mechanic_state"))
            assert mechanic.scheduler.last_epoch == 0
        mechanic.step()
        problem.train(parameters[:2], mechanic, range(1, STEPS))
        runs.append((parameters, mechanic))
    assert torch.equal(flat(runs[0][0]), flat(runs[1][0]))
    assert torch.equal(runs[0][1].scale, runs[1][1].scale)


def test_the_dict_of_a_fresh_one_is_a_template(problem: Problem, tmp_path: Path) -> None:
    """dcp.load fills in what it is given: the plain dict of a fresh Mechanic has a place for x_ref."""
    parameters, mechanic = build(problem, torch.optim.AdamW, schedulers()["cosine"])
    problem.train(parameters, mechanic, 10)
    dcp.save({"mechanic": mechanic.state_dict()}, checkpoint_id=tmp_path / "checkpoint")
    others, other = build(problem, torch.optim.AdamW, schedulers()["cosine"])
    state = {"mechanic": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    assert other.scale == 0
    other.load_state_dict(state["mechanic"])
    assert torch.equal(other.scale, mechanic.scale)
    assert torch.equal(other.state[others[0]]["exp_avg"], mechanic.state[parameters[0]]["exp_avg"])


def test_a_rehearsal_leaves_the_counts_of_the_base_alone(problem: Problem) -> None:
    parameters, mechanic = build(problem, Counting, schedulers()["none"])
    model = nn.ParameterList(parameters)
    assert any(key.startswith("0.") or key == "0" for key in get_optimizer_state_dict(model, mechanic)["state"])
    assert mechanic.param_groups[0]["calls"] == 0
    problem.train(parameters, mechanic, STEPS)
    assert mechanic.param_groups[0]["calls"] == STEPS
    assert mechanic.state[parameters[0]]["count"] == STEPS


def test_a_gradient_of_a_frozen_parameter_leaves_no_state(problem: Problem) -> None:
    """It is left over from before the parameter was frozen, and the first step has not come yet."""
    parameters, mechanic = build(problem, torch.optim.AdamW, schedulers()["none"])
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[0].requires_grad_(False)
    gradient, before = parameters[0].grad, flat(parameters)
    assert 0 not in mechanic.state_dict()["state"]
    assert mechanic.state_dict()["state"].keys() == {*range(1, len(parameters))}
    assert parameters[0].grad is gradient
    assert torch.equal(flat(parameters), before)


def test_steps_without_any_gradient_before_the_first(problem: Problem) -> None:
    """A checkpoint of then is not that of a run that has not begun, whose state the first step drops."""
    parameters, mechanic = build(problem, torch.optim.AdamW, schedulers()["none"])
    for _ in range(3):
        mechanic.step()
    saved = mechanic.state_dict()
    assert saved["state"] == {}
    others, other = build(problem, torch.optim.AdamW, schedulers()["none"])
    other.load_state_dict(saved)
    problem.train(parameters, mechanic, STEPS)
    problem.train(others, other, STEPS)
    assert torch.equal(flat(parameters), flat(others))
    assert mechanic.state[parameters[0]]["step"] == other.state[others[0]]["step"] == STEPS


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_a_load_that_breaks_off_leaves_no_trace_in_a_fresh_one(base: Any, problem: Problem) -> None:
    """dcp.load writes into the tensors of get_optimizer_state_dict; then a file ends, and nothing is ever loaded."""
    runs = []
    for touched in (False, True):
        parameters, mechanic = build(problem, base, schedulers()["cosine"])
        if touched:
            state_dict = get_optimizer_state_dict(nn.ParameterList(parameters), mechanic)
            tensors = [t for values in state_dict["state"].values() for t in values.values()]
            tensors += [t for group in state_dict["param_groups"] for t in group.values()]
            for t in [t for t in tensors if isinstance(t, torch.Tensor)]:
                t.fill_(7)
        problem.train(parameters, mechanic, STEPS)
        runs.append((parameters, mechanic))
    assert torch.equal(flat(runs[0][0]), flat(runs[1][0]))
    assert torch.equal(runs[0][1].scale, runs[1][1].scale)
