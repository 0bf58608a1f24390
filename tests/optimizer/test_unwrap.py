"""unwrap(): the plain optimizer back, which goes on as the frozen Mechanic would."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR
from training import Problem, Wrapped, flat, gap

from manic import Mechanic
from manic.schedules import fold

STEPS, LR = 30, 0.02

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: 1 / (1 + 0.05 * t)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.97),
    "StepLR": lambda o: schedules.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [5, 35, 40], 0.3),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.2, 40),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 45),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 50, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 2 * STEPS, LR / 5),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 11, 1, LR / 5),
    "CyclicLR": lambda o: schedules.CyclicLR(o, LR / 4, LR, 8, cycle_momentum=False),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, LR, 2 * STEPS + 1, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 35), schedules.CosineAnnealingLR(o, STEPS, LR / 9)], [35]
    ),
    "SequentialLR of two that keep base lrs": lambda o: schedules.SequentialLR(
        o, [schedules.LambdaLR(o, lambda t: 0.1 + t / 50), schedules.CosineAnnealingLR(o, STEPS, LR / 9)], [45]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 40), schedules.ExponentialLR(o, 0.98)]
    ),
    "SWALR": lambda o: SWALR(o, LR / 3, 40),
}


class Run:
    """A problem in training by AdamW with a scheduler inside, or (None) outside; plain after unwrap()."""

    def __init__(self, problem: Problem, schedule: str = "CosineAnnealingLR", inside: bool = True, **options: Any):
        self.problem, self.parameters = problem, problem.parameters()
        groups = [{"params": [p], "lr": LR / (i + 1)} for i, p in enumerate(self.parameters)]
        self.optimizer: Any = torch.optim.AdamW(groups, weight_decay=0.1)
        self.schedule = SCHEDULES[schedule](self.optimizer)
        self.mechanic = Mechanic(self.optimizer, self.schedule if inside else None, **options)

    def train(self, first: int, last: int, *, plain: bool = False, schedule: bool = False) -> Run:
        for t in range(first, last):
            self.problem.train(self.parameters, self.optimizer if plain else self.mechanic, range(t, t + 1))
            if schedule and self.schedule is not None:
                self.schedule.step()
        return self


@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_unwrapped_run_is_the_frozen_one(schedule: str, problem: Problem) -> None:
    frozen, run = (Run(problem, schedule).train(0, STEPS) for _ in range(2))
    before = flat(run.parameters).detach()
    frozen.mechanic.freeze()
    assert run.mechanic.unwrap() is run.optimizer
    for t in range(STEPS, 2 * STEPS):
        lrs = [group["lr"] for group in run.optimizer.param_groups]
        assert lrs == pytest.approx(frozen.mechanic.effective_lr(), rel=1e-9)
        frozen.train(t, t + 1)
        run.train(t, t + 1, plain=True, schedule=True)
    assert gap(flat(run.parameters).detach(), flat(frozen.parameters).detach(), before) < 1e-6


@pytest.mark.parametrize("on", ["base", "mechanic"])
def test_a_scheduler_that_you_step_yourself_is_handed_over(on: str, problem: Problem) -> None:
    frozen, run = Run(problem, "none"), Run(problem, "none")
    for one in (frozen, run):
        one.schedule = SCHEDULES["LambdaLR"](one.mechanic if on == "mechanic" else one.optimizer)
        one.train(0, STEPS, schedule=True)
    frozen.mechanic.freeze()
    before = copy.deepcopy([*run.parameters, run.schedule.base_lrs])
    with pytest.raises(ValueError, match=r"unwrap\(scheduler\)"):
        run.mechanic.unwrap()
    assert run.schedule.base_lrs == before[-1]
    run.mechanic.unwrap(run.schedule)
    assert run.schedule.optimizer is run.optimizer
    frozen.train(STEPS, 2 * STEPS, schedule=True)
    run.train(STEPS, 2 * STEPS, plain=True, schedule=True)
    assert gap(flat(run.parameters).detach(), flat(frozen.parameters).detach(), flat(before[:-1]).detach()) < 1e-6


def test_plateau(problem: Problem) -> None:
    """Its min_lr and eps are lrs too: 40 reductions by half would end below both."""
    ends = []
    for plain in (False, True):
        run = Run(problem, "none").train(0, STEPS)
        schedule = schedules.ReduceLROnPlateau(run.mechanic, factor=0.5, patience=0, min_lr=LR / 100, eps=LR / 300)
        if plain:
            run.mechanic.unwrap(schedule)
        else:
            run.mechanic.freeze()
        for _ in range(40):
            schedule.step(1.0)
        ends.append([g["lr"] for g in run.optimizer.param_groups] if plain else run.mechanic.effective_lr())
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)


def test_one_scale_per_group(problem: Problem) -> None:
    frozen, run = (Run(problem, "ExponentialLR", per_group=True).train(0, STEPS) for _ in range(2))
    frozen.mechanic.freeze()
    run.mechanic.unwrap()
    rates = frozen.mechanic.effective_lr()
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx(rates, rel=1e-9)
    assert rates[0] != pytest.approx(2 * rates[1], rel=0.01)


def test_nothing_of_the_wrapper_is_left(problem: Problem) -> None:
    run = Run(problem).train(0, STEPS)
    held = [weakref.ref(v[key]) for v in run.mechanic.state.values() for key in v if key.startswith("mechanic")]
    assert len(held) == 2
    mechanic, run.mechanic = run.mechanic, None
    optimizer = mechanic.unwrap()
    assert not any(ref() is not None for ref in held)
    other = Run(problem)
    del other.mechanic
    plain = torch.optim.AdamW(other.parameters, lr=LR)
    schedules.CosineAnnealingLR(plain, 5)
    assert optimizer.state_dict()["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()
    run.train(STEPS, STEPS + 3, plain=True)  # warnings are errors here: nobody watches the base any more
    assert repr(mechanic) == "Mechanic (unwrapped)"
    for use in (lambda: mechanic.step(), lambda: mechanic.state_dict(), lambda: mechanic.scale, mechanic.metrics):
        with pytest.raises(RuntimeError, match="unwrapped"):
            use()


def test_it_may_be_wrapped_again(problem: Problem) -> None:
    run = Run(problem, "none").train(0, STEPS)
    run.mechanic = Mechanic(run.mechanic.unwrap())
    run.train(STEPS, 2 * STEPS)
    assert run.mechanic.scale > 0


def test_a_frozen_one_and_a_late_group(problem: Problem) -> None:
    run = Run(problem, "none").train(0, STEPS)
    run.mechanic.freeze()
    scale = run.mechanic.scale.item()
    optimizer = run.mechanic.unwrap()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(()))]})
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(1e-3 * scale)


def test_tensor_lrs_that_groups_share(problem: Problem) -> None:
    parameters = problem.parameters()
    lr = torch.tensor(LR, dtype=torch.float64)
    mechanic = Mechanic(torch.optim.AdamW([{"params": [p]} for p in parameters], lr=lr))
    problem.train(parameters, mechanic, STEPS)
    rates = mechanic.effective_lr()
    assert [float(group["lr"]) for group in mechanic.unwrap().param_groups] == pytest.approx(rates)
    assert lr == LR, "the user's own tensor stays"


PLAIN = """
import sys, torch
sys.modules["manic"] = None  # it is not needed any more
values, optimizer_state, schedule_state, grads = torch.load(sys.argv[1], weights_only=True)
parameters = [torch.nn.Parameter(value) for value in values]
optimizer = torch.optim.AdamW([{"params": [p], "lr": 1.0} for p in parameters], weight_decay=0.5)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1)
optimizer.load_state_dict(optimizer_state)
schedule.load_state_dict(schedule_state)
for step in grads:
    for p, grad in zip(parameters, step):
        p.grad = grad
    optimizer.step()
    schedule.step()
torch.save(parameters, sys.argv[1])
"""


def test_an_unwrapped_run_resumes_without_manic(problem: Problem, tmp_path: Path) -> None:
    run = Run(problem).train(0, STEPS)
    run.mechanic.unwrap()
    run.train(STEPS, STEPS + 5, plain=True, schedule=True)
    saved = [run.parameters, run.optimizer.state_dict(), run.schedule.state_dict()]
    saved, grads = copy.deepcopy(saved), []
    for t in range(STEPS + 5, 2 * STEPS):
        run.train(t, t + 1, plain=True, schedule=True)
        grads.append([p.grad.clone() for p in run.parameters])
    torch.save([*saved, grads], tmp_path / "checkpoint.pt")
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path / "checkpoint.pt")], check=True)
    ends = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(ends, run.parameters, strict=True))


def test_a_warm_start_from_a_scale_that_was_found(problem: Problem) -> None:
    found = Run(problem, "none").train(0, STEPS).mechanic.scale.item()
    run = Run(problem, "none", s_init=found).train(0, 2)
    assert run.mechanic.scale.item() == pytest.approx(found)


def test_a_scheduler_on_what_a_framework_has_wrapped(problem: Problem) -> None:
    runs = []
    for wrapped in (False, True):
        run = Run(problem, "none")
        on = Wrapped(run.mechanic) if wrapped else run.mechanic
        run.schedule = schedules.CosineAnnealingLR(on, 2 * STEPS, LR / 5)
        for t in range(STEPS):
            problem.train(run.parameters, on, range(t, t + 1))
            run.schedule.step()
        assert run.mechanic.unwrap(run.schedule) is run.optimizer
        runs.append(flat(run.train(STEPS, 2 * STEPS, plain=True, schedule=True).parameters))
    assert torch.equal(*runs)


# ---------------------------------------------------------------------- errors: nothing is changed


@pytest.mark.parametrize(
    ("options", "give", "error", "match"),
    [
        ({}, lambda run: ["cosine"], TypeError, "got 'cosine'"),
        ({}, lambda run: [Run(run.problem).schedule], ValueError, "CosineAnnealingLR was built on another optimizer"),
        (
            *({"per_group": True}, lambda run: [], ValueError),
            r"eta_min = 0.004 of CosineAnnealingLR is one lr for all groups, and their scales differ "
            r"\([-+.e\d]+, [-+.e\d]+\): set it to 0",
        ),
    ],
)
def test_errors(options: Any, give: Any, error: Any, match: str, problem: Problem) -> None:
    run, twin = (Run(problem, **options).train(0, 10) for _ in range(2))
    with pytest.raises(error, match=match):
        run.mechanic.unwrap(*give(run))
    assert torch.equal(flat(run.train(10, 20).parameters), flat(twin.train(10, 20).parameters))


def test_too_early(problem: Problem) -> None:
    """Before the first step, and after one without a gradient."""
    run, twin = Run(problem), Run(problem)
    for t in range(2):
        with pytest.raises(ValueError, match=f"no scale has been learned in {t} step"):
            run.mechanic.unwrap()
        if t == 0:
            run.mechanic.step()
            twin.mechanic.step()
    assert torch.equal(flat(run.train(1, 10).parameters), flat(twin.train(1, 10).parameters))


def test_a_name_that_is_not_there(problem: Problem) -> None:
    with pytest.raises(AttributeError, match="'Mechanic' object has no attribute 'scales'"):
        Run(problem).mechanic.scales  # noqa: B018


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("composed", [False, True])
def test_a_group_that_the_scheduler_does_not_know_of(composed: bool) -> None:
    """It was added after the scheduler was built: the checkpoint loads where both are there at once, and unwraps."""

    def build(groups: int) -> tuple[list[nn.Parameter], Mechanic]:
        parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters[:groups]], lr=1e-2)
        schedule: Any = schedules.ExponentialLR(optimizer, 0.9)
        if composed:
            schedule = schedules.SequentialLR(optimizer, [schedule, schedules.ExponentialLR(optimizer, 0.8)], [50])
        return parameters, Mechanic(optimizer, schedule)

    def train(parameters: list[nn.Parameter], mechanic: Mechanic) -> None:
        for _ in range(8):
            for p in parameters:
                p.grad = p.detach() - 0.5
            mechanic.step()

    parameters, mechanic = build(1)
    mechanic.add_param_group({"params": parameters[1:], "lr": 2e-2, "initial_lr": 2e-2})
    train(parameters, mechanic)
    _, other = build(2)
    other.load_state_dict(mechanic.state_dict())
    assert other.effective_lr() == mechanic.effective_lr()
    wanted = mechanic.effective_lr()
    assert [group["lr"] for group in other.unwrap().param_groups] == pytest.approx(wanted)


def test_one_group_and_the_floor_of_its_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR)
    schedule = schedules.CosineAnnealingLR(optimizer, STEPS, LR / 5)
    fold(optimizer.param_groups, [schedule], [3.0])
    assert (optimizer.param_groups[0]["lr"], schedule.eta_min) == pytest.approx((3 * LR, 3 * LR / 5))
