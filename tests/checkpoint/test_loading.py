"""Whole checkpoints: what loads as if nothing had been, what is refused, what is told."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from resuming import Pair, laid_open, resumed, same
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torch.optim import lr_scheduler as schedulers
from training import pulled

from manic import Mechanic, algorithm
from manic import run as running


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_another_implementation_of_the_base_loads_as_in_torch(options: dict[str, Any], wrapped: bool) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    m = Mechanic(AdamW([p], lr=0.1)) if wrapped else AdamW([p], lr=0.1)
    pulled(p, m, 3)
    other = Mechanic(AdamW([q], lr=0.1, **options))
    if wrapped:
        other.load_state_dict(m.state_dict())
    else:
        with pytest.warns(UserWarning, match="nothing of a Mechanic"):
            other.load_state_dict(m.state_dict())
    assert other.param_groups[0][next(iter(options))] is None


@pytest.mark.parametrize("parts", [("ExponentialLR", "StepLR"), ("CosineAnnealingLR", "LinearLR")], ids=str)
def test_a_scheduler_that_is_made_of_others_is_not_half_loaded(parts: tuple[str, str]) -> None:
    def build(names: tuple[str, str]) -> Pair:
        p = nn.Parameter(torch.ones(3))
        base = SGD([p], lr=0.1)
        makes: dict[str, Callable[[], Any]] = {
            "LinearLR": lambda: schedulers.LinearLR(base, total_iters=4),
            "CosineAnnealingLR": lambda: schedulers.CosineAnnealingLR(base, T_max=30),
            "ExponentialLR": lambda: schedulers.ExponentialLR(base, 0.9),
            "StepLR": lambda: schedulers.StepLR(base, 5),
        }
        made = schedulers.SequentialLR(base, [makes[name]() for name in names], milestones=[4])
        return p, Mechanic(base, made)

    p, m = build(("LinearLR", "CosineAnnealingLR"))
    pulled(p, m, 6)
    _, other = build(parts)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"with the scheduler SequentialLR\(LinearLR, CosineAnnealingLR\), this Mech"):
        other.load_state_dict(m.state_dict())
    assert same(other.state_dict(), before)


def test_the_state_dict_of_the_optimizer_inside_is_as_good() -> None:
    """A script that goes on saving `optimizer`: its schedule was that of the last mechanic.state_dict()."""

    def build() -> Pair:
        p = nn.Parameter(torch.ones(6))
        base = AdamW([p], lr=0.1)
        return p, Mechanic(base, schedulers.CosineAnnealingLR(base, T_max=20))

    one, other = build(), build()
    pulled(*one, 7)
    resumed(one, other, 7, one[1].base_optimizer.state_dict())
    base = one[1].unwrap()
    assert not any(key.startswith("mechanic_") for key in base.state_dict()["param_groups"][0])


@pytest.mark.parametrize("who", ["hook", "schedule"])
def test_who_asks_while_a_checkpoint_is_loaded_does_not_break_it(who: str) -> None:
    def build() -> Pair:
        p = nn.Parameter(torch.ones(6))
        base = AdamW([p], lr=0.1)
        made: list[Mechanic] = []

        def factor(t: int) -> float:
            if who == "schedule" and made:
                assert made[0].effective_lr()
            return 1 / (1 + t)

        made.append(Mechanic(base, schedulers.LambdaLR(base, factor)))
        if who == "hook":
            base.register_load_state_dict_post_hook(lambda base: base.state_dict() and None)
        return p, made[0]

    one, other = build(), build()
    pulled(*one, 5)
    resumed(one, other, 5)


def test_a_function_in_a_schedule_that_counts_its_calls() -> None:
    class Falling:
        n = 0

        def __call__(self, epoch: int) -> float:
            self.n += 1
            return 1 / (1 + self.n)

    def build() -> Pair:
        p = nn.Parameter(torch.ones(6))
        base = SGD([p], lr=0.1)
        return p, Mechanic(base, schedulers.LambdaLR(base, Falling()))

    one, other = build(), build()
    pulled(*one, 5)
    resumed(one, other, 5)


def test_a_small_parameter_beside_a_large_one_is_missed() -> None:
    parameters = [nn.Parameter(torch.ones(n)) for n in (3_000_000, 2)]
    m = Mechanic(SGD(parameters, lr=0.1))
    for p in parameters:
        p.grad = p.detach().clone()
    m.step()
    state = m.state_dict()
    del state["state"][1]
    with pytest.raises(ValueError, match="no 'mechanic_ref' for 2 of the 3000002 elements"):
        m.load_state_dict(state)


def test_a_mechanics_checkpoint_loaded_into_the_optimizer_inside_is_told() -> None:
    """Its moments were thrown away in the next step, without a word."""
    p = nn.Parameter(torch.ones(6))
    m = Mechanic(RMSprop([p], lr=0.1))
    pulled(p, m, 5)
    state = copy.deepcopy(m.state_dict())
    m.base_optimizer.load_state_dict(state)
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of RMSprop were loaded or copied.*the Mechanic's load_state_dict\(\)"):
            pulled(p, m)
    assert torch.equal(p, before)
    m.load_state_dict(state)
    twin = copy.deepcopy((p, m))
    for some in (twin, (p, m)):
        pulled(*some, 3)
    assert torch.equal(p, twin[0])


def test_a_run_whose_first_step_was_skipped_on_a_device_resumes_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it has created the base's state, which is not that of a rehearsal."""
    for module in (algorithm, running):
        monkeypatch.setattr(module, "on_host", lambda _: False)
    runs = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(6))
        runs.append((p, Mechanic(AdamW([p], lr=0.1))))
    one, other = runs
    one[0].grad = torch.full_like(one[0], torch.nan)
    one[1].step()
    resumed(one, other, 20)


class Trainer:
    """A function of the epoch that holds more than numbers."""

    def __init__(self) -> None:
        self.lock, self.model = threading.Lock(), nn.Linear(1000, 100)
        self.table = {"rates": (1.0, 0.5), "counts": [Counter(a=2)], "at": numpy.float64(0.5)}
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return numpy.float64(1 / (1 + self.calls))


class Held(schedulers.LRScheduler):
    """A schedule that keeps its trainer, as torch's keep all their attributes."""

    def __init__(self, optimizer: Any) -> None:
        self.trainer = Trainer()
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [lr * self.trainer(self.last_epoch) for lr in self.base_lrs]


class Both(schedulers.LRScheduler):
    """A schedule of a user that is made of others, and does not know how to save them."""

    def __init__(self, optimizer: Any) -> None:
        self._schedulers = [schedulers.ExponentialLR(optimizer, 1.0)]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [lr * 0.9**self.last_epoch for lr in self.base_lrs]


def in_a_row(base: Any) -> schedulers.LRScheduler:
    parts = [schedulers.LambdaLR(base, Trainer()), schedulers.CyclicLR(base, 0.1, 0.2, scale_fn=Trainer())]
    return schedulers.SequentialLR(base, parts, milestones=[3])


@pytest.mark.parametrize(
    ("build", "left_out"),
    [
        (lambda base: schedulers.LambdaLR(base, Trainer()), {"lock", "model"}),
        (lambda base: schedulers.MultiplicativeLR(base, Trainer()), {"lock", "model"}),
        (in_a_row, {"lock", "model"}),
        (Held, {"trainer"}),
        (Both, {"_schedulers"}),
    ],
    ids=["LambdaLR", "MultiplicativeLR", "SequentialLR", "of a user", "of others"],
)
def test_what_a_schedule_holds_that_no_checkpoint_can(build: Any, left_out: set[str]) -> None:
    def one() -> Pair:
        p = nn.Parameter(torch.ones(6))
        base = SGD([p], lr=0.1, momentum=0.9)
        return p, Mechanic(base, build(base))

    (p, m), (q, other) = one(), one()
    pulled(p, m, 5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        states = [m.state_dict() for _ in range(2)]
    assert {str(one.message).split("'")[1] for one in told} == left_out
    assert len(told) == len(left_out)
    file = io.BytesIO()
    torch.save(states[1], file)
    assert file.tell() < 20_000
    file.seek(0)
    with torch.no_grad():
        q.copy_(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(torch.load(file, weights_only=True))
    if build is Held:
        other.scheduler.trainer.calls = m.scheduler.trainer.calls  # type: ignore[union-attr]
    pulled(p, m, 5)
    pulled(q, other, 5)
    assert torch.equal(p, q)


def test_what_weights_only_admits_by_name_is_saved() -> None:
    p = nn.Parameter(torch.ones(6))
    base = SGD([p], lr=0.1)
    schedule = schedulers.LambdaLR(base, Trainer())
    schedule.lr_lambdas[0].lock = Fraction(1, 2)
    schedule.lr_lambdas[0].model = OrderedDict(a={1, 2}, b=torch.ones(2), c=torch.float32)
    m = Mechanic(base, schedule)
    with torch.serialization.safe_globals([torch.dtype]):
        saved = laid_open(m.state_dict())["param_groups"][0]["mechanic_scheduler"][0]["lr_lambdas"][0]
    assert saved["lock"] == 0.5
    assert type(saved["lock"]) is type(saved["table"]["at"]) is float
    assert saved["table"] == {"rates": (1.0, 0.5), "counts": [Counter(a=2)], "at": 0.5}
    assert list(saved["model"]) == ["a", "b", "c"]
    schedule.lr_lambdas[0].model["b"].zero_()
    assert saved["model"]["b"].sum() == 2


def test_a_thousand_groups_and_a_schedule() -> None:
    sizes = []
    for wrap in (lambda base: base, lambda base: Mechanic(base, schedulers.CosineAnnealingLR(base, 100))):
        params = [nn.Parameter(torch.ones(2)) for _ in range(1000)]
        optimizer = wrap(AdamW([{"params": [p]} for p in params], lr=0.1))
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
        torch.save(optimizer.state_dict(), file := io.BytesIO())
        sizes.append(file.tell())
    assert sizes[1] < 2 * sizes[0]


def test_a_checkpoint_with_an_empty_state_is_refused_with_the_way_out() -> None:
    p = nn.Parameter(torch.ones(6))
    m = Mechanic(AdamW([p], lr=0.1))
    pulled(p, m, 3)
    with pytest.raises(ValueError, match=r"step 3, and its 'state' is empty.*optimizer\.state\.clear\(\)"):
        m.load_state_dict({**m.state_dict(), "state": {}})
    assert len(m.state) == 1
