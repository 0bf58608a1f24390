"""freeze(): the scale stays, x_ref goes, and what remains is the base optimizer at group lr × scale."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import training
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Rprop
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import Problem, flat, gap

from manic import Mechanic

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

STEPS = 30
LR = 1e-3  # the base's; what is trained at is LR × scale

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),  # has state from construction on
}


def plain(base: str, parameters: list[nn.Parameter]) -> Any:
    make, settings = BASES[base]
    first, second = parameters
    return make([{"params": [first]}, {"params": [second], "lr": 3 * LR}], lr=LR, **settings)


class Run:
    """Two groups at lrs of ratio 1 : 3, a cosine inside."""

    def __init__(self, problem: Problem, base: str = "AdamW", **options: Any) -> None:
        self.problem, self.parameters = problem, problem.parameters()
        self.optimizer = plain(base, self.parameters)
        self.mechanic = Mechanic(self.optimizer, CosineAnnealingLR(self.optimizer, T_max=4 * STEPS), **options)

    def train(self, first: int, last: int) -> Run:
        self.problem.train(self.parameters, self.mechanic, range(first, last))
        return self


@pytest.mark.parametrize("options", [{}, {"per_group": True}, {"variant": "paper"}])
@pytest.mark.parametrize("base", BASES)
def test_a_frozen_run_is_that_of_the_plain_optimizer_at_lr_times_scale(
    base: str, options: dict[str, Any], problem: Problem
) -> None:
    if options.get("variant") == "paper":
        options = {**options, "s_init": 1.0}
    run = Run(problem, base, **options).train(0, STEPS)
    before, scale, rate = flat(run.parameters).detach(), run.mechanic.scale, run.mechanic.effective_lr()
    run.mechanic.freeze()
    assert torch.equal(flat(run.parameters), before)

    others = [nn.Parameter(p.detach().clone()) for p in run.parameters]
    optimizer = plain(base, others)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for t in range(STEPS, 2 * STEPS):
        for group, lr in zip(optimizer.param_groups, run.mechanic.effective_lr(), strict=True):
            group["lr"] = lr
        problem.train(others, optimizer, range(t, t + 1))
        run.train(t, t + 1)
    assert torch.equal(run.mechanic.scale, scale)
    assert gap(flat(run.parameters).detach(), flat(others).detach(), before) < 1e-6
    assert run.mechanic.effective_lr()[0] < rate[0], "the schedule goes on"
    assert run.mechanic.param_groups[0]["mechanic_step"] == 2 * STEPS


def test_what_the_wrapper_held_is_let_go(problem: Problem) -> None:
    run = Run(problem, "SGD").train(0, 5)
    held = [weakref.ref(values[key]) for values in run.mechanic.state.values() for key in values]
    assert len(held) == 2
    run.mechanic.freeze()
    assert not any(ref() is not None for ref in held)
    assert not run.mechanic.state, "as plain SGD would have it"
    run.train(5, 8)
    assert not run.mechanic.state
    assert "frozen" in repr(run.mechanic)


def test_freezing_twice_is_freezing_once(problem: Problem) -> None:
    one, two = Run(problem).train(0, 10), Run(problem).train(0, 10)
    one.mechanic.freeze()
    two.mechanic.freeze()
    two.mechanic.freeze()
    assert torch.equal(flat(one.train(10, 20).parameters), flat(two.train(10, 20).parameters))


def test_a_late_group_trains_at_the_frozen_scale(problem: Problem) -> None:
    run = Run(problem, "SGD").train(0, 10)
    run.mechanic.freeze()
    late = nn.Parameter(torch.zeros(()))
    run.mechanic.add_param_group({"params": [late], "lr": 7.0})
    late.grad = torch.ones(())
    run.mechanic.step()
    assert late.item() == pytest.approx(-7 * run.mechanic.scale.item())


def test_a_group_that_has_learned_nothing_stays_where_it_is(problem: Problem) -> None:
    """per_group, and one group was frozen in the other sense: no gradient ever came."""
    run = Run(problem, "SGD", per_group=True)
    run.parameters[1].requires_grad_(False)
    for t in range(10):
        run.mechanic.zero_grad()
        problem.loss(run.parameters, t).backward()
        run.mechanic.step()
    run.mechanic.freeze()
    run.parameters[1].requires_grad_(True)
    before = [p.detach().clone() for p in run.parameters]
    run.train(10, 11)
    assert not torch.equal(run.parameters[0], before[0])
    assert torch.equal(run.parameters[1], before[1])


def test_a_base_that_sets_its_own_lr_frozen(problem: Problem) -> None:
    class Halving(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"] = group["lr"] / 2
            return loss

    parameters = problem.parameters()
    mechanic = Mechanic(Halving(parameters, lr=1.0))
    problem.train(parameters, mechanic, 5)
    mechanic.freeze()
    problem.train(parameters, mechanic, range(5, 7))
    assert mechanic.param_groups[0]["lr"] == pytest.approx(2.0**-7)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_closures_and_tensor_lrs(lr: Any, problem: Problem) -> None:
    ends = []
    for closed in (False, True):
        parameters, calls = problem.parameters(), []
        mechanic = Mechanic(torch.optim.AdamW(parameters, lr=lr))
        for t in range(20):

            def closure(t: int = t, mechanic: Any = mechanic, parameters: Any = parameters, calls: Any = calls) -> Any:
                mechanic.zero_grad()
                loss = problem.loss(parameters, t)
                loss.backward()
                calls.append(t)
                return loss

            if t == 10:
                mechanic.freeze()
            if closed:
                assert isinstance(mechanic.step(closure), torch.Tensor)
            else:
                closure()
                mechanic.step()
        assert calls == list(range(20))
        assert mechanic.param_groups[0]["lr"] is lr
        ends.append(flat(parameters).detach())
    assert torch.equal(*ends)


def test_a_frozen_base_whose_updates_do_not_go_by_its_lr_is_told(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(Rprop(parameters, lr=0.01))
    problem.train(parameters, m, 10)
    with pytest.warns(UserWarning, match="Rprop is not proportional to its lr, which now carries the frozen scale"):
        m.freeze()


# ---------------------------------------------------------------------- checkpoints


RESUME = """
import sys, torch
sys.path[:0] = {paths!r}
from training import Problem, flat
from test_freeze import Run, STEPS
problem, values, state = torch.load(sys.argv[1], weights_only=True)
run = Run(Problem(**problem), sys.argv[2])
with torch.no_grad():
    for p, value in zip(run.parameters, values):
        p.copy_(value)
run.mechanic.load_state_dict(state)
if sys.argv[3] == "again":
    run.mechanic.freeze()
run.train(STEPS, 2 * STEPS)
torch.save([flat(run.parameters).detach(), run.mechanic.scale, run.mechanic.state_dict()], sys.argv[1])
"""


@pytest.mark.parametrize("script", ["once", "again"])
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_a_new_process_goes_on_frozen_bit_for_bit(base: str, script: str, problem: Problem, tmp_path: Path) -> None:
    run = Run(problem, base).train(0, 20)
    run.mechanic.freeze()
    run.train(20, STEPS)
    path = tmp_path / "checkpoint.pt"
    torch.save([vars(problem), run.parameters, run.mechanic.state_dict()], path)
    run.train(STEPS, 2 * STEPS)
    code = RESUME.format(paths=[str(Path(file).parent) for file in (__file__, training.__file__)])
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(path), base, script], check=True)
    end, scale, state = torch.load(path, weights_only=True)
    assert torch.equal(end, flat(run.parameters))
    assert torch.equal(scale, run.mechanic.scale)
    assert state["param_groups"][0]["mechanic_step"] == 2 * STEPS


def test_copies_stay_frozen(problem: Problem) -> None:
    run = Run(problem).train(0, 10)
    run.mechanic.freeze()
    other = copy.deepcopy(run)
    assert torch.equal(flat(run.train(10, 20).parameters), flat(other.train(10, 20).parameters))
    assert not any("mechanic_ref" in values for values in other.mechanic.state.values())


def test_a_checkpoint_of_before_takes_a_frozen_one_back(problem: Problem) -> None:
    run = Run(problem).train(0, 10)
    values, state = copy.deepcopy([run.parameters, run.mechanic.state_dict()])
    run.train(10, 20)
    end = flat(run.parameters).detach()
    run.mechanic.freeze()
    run.train(20, 25)
    with torch.no_grad():
        for p, value in zip(run.parameters, values, strict=True):
            p.copy_(value)
    run.mechanic.load_state_dict(state)
    assert torch.equal(flat(run.train(10, 20).parameters), end)


@pytest.mark.parametrize("route", ["Stateful", "state_dict"])
@pytest.mark.parametrize("base", ["AdamW", "SGD", "Adagrad"])
def test_dcp_of_a_frozen_one(base: str, route: str, problem: Problem, tmp_path: Path) -> None:
    def parts(run: Run) -> dict[str, Any]:
        model = nn.ParameterList(run.parameters)
        run.mechanic.zero_grad()
        mechanic = run.mechanic if route == "Stateful" else get_optimizer_state_dict(model, run.mechanic)
        return {"mechanic": mechanic, "model": model}

    run = Run(problem, base).train(0, 10)
    run.mechanic.freeze()
    run.train(10, 15)
    dcp.save(parts(run), checkpoint_id=tmp_path / "checkpoint")
    run.train(15, 20)

    other = Run(problem, base)
    other.mechanic.freeze()
    with torch.no_grad():
        for p in other.parameters:
            p.zero_()
    state = parts(other)
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    if route == "state_dict":
        set_optimizer_state_dict(state["model"], other.mechanic, state["mechanic"])
    assert torch.equal(flat(run.parameters), flat(other.train(15, 20).parameters))
    assert run.mechanic.scheduler.last_epoch == other.mechanic.scheduler.last_epoch == 20


def test_get_state_dict_of_a_frozen_one_without_state_is_no_step(problem: Problem) -> None:
    """For plain SGD torch takes empty state for "not yet there", and rehearses."""
    run = Run(problem, "SGD").train(0, 10)
    run.mechanic.freeze()
    run.mechanic.zero_grad()
    before = flat(run.parameters).detach()
    get_optimizer_state_dict(nn.ParameterList(run.parameters), run.mechanic)
    assert torch.equal(flat(run.parameters), before)
    assert run.mechanic.scheduler.last_epoch == 10
    assert run.mechanic.param_groups[0]["mechanic_step"] == 10
    assert not run.mechanic.state


@pytest.mark.parametrize("value", [None, 1, torch.tensor([True, False])])
def test_a_checkpoint_that_does_not_say_whether_it_is_frozen(value: Any, problem: Problem) -> None:
    run = Run(problem).train(0, 5)
    state = copy.deepcopy(run.mechanic.state_dict())
    state["param_groups"][0]["mechanic_options"][0]["frozen"] = value
    with pytest.raises(ValueError, match="frozen"):
        run.mechanic.load_state_dict(state)


def test_slots_in_a_frozen_checkpoint_are_left_out(problem: Problem) -> None:
    """With full_state_dict torch merges in those of the Mechanic that loads it."""
    run = Run(problem).train(0, 20)
    state = copy.deepcopy(run.mechanic.state_dict())
    state["param_groups"][0]["mechanic_options"][0]["frozen"] = True
    run.mechanic.load_state_dict(state)
    assert not any("mechanic_ref" in values for values in run.mechanic.state.values())


# ---------------------------------------------------------------------- errors


def test_too_early(problem: Problem) -> None:
    run, twin = Run(problem), Run(problem)
    run.mechanic.step()  # without a gradient
    twin.mechanic.step()
    with pytest.raises(ValueError, match="no scale has been learned in 1 step"):
        run.mechanic.freeze()
    assert torch.equal(flat(run.train(1, 10).parameters), flat(twin.train(1, 10).parameters))


def test_a_fresh_one_waits_for_a_checkpoint(problem: Problem) -> None:
    run = Run(problem)
    run.mechanic.freeze()
    with pytest.raises(ValueError, match="frozen before it had learned"):
        run.train(0, 1)
    assert torch.equal(flat(run.parameters), torch.tensor(problem.start))
    assert run.mechanic.scheduler.last_epoch == 0


def test_no_lr_to_carry_the_scale() -> None:
    class Fixed(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)

    p = nn.Parameter(torch.ones(3))
    mechanic = Mechanic(Fixed([p], {}))
    for _ in range(5):
        p.grad = p.detach().clone()
        mechanic.step()
    with pytest.raises(ValueError, match="has no lr"):
        mechanic.freeze()
    assert "mechanic_ref" in mechanic.state[p]


def test_a_late_group_has_no_scale_of_its_own(problem: Problem) -> None:
    run = Run(problem, "SGD", per_group=True).train(0, 10)
    run.mechanic.freeze()
    with pytest.raises(ValueError, match="before freeze"):
        run.mechanic.add_param_group({"params": [nn.Parameter(torch.zeros(()))]})
    assert len(run.mechanic.param_groups) == 2
    run.train(10, 12)
