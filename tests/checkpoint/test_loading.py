"""Whole checkpoints: what loads as if nothing had been, what is refused, what is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from resuming import Pair, resumed, same
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
