"""What a checkpoint may differ in, rule by rule. Whole checkpoints: test_hostile.py, test_resume.py."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from manic import Mechanic
from manic.checkpoint.validation import (
    _alike,
    _check_ours,
    by_number,
    check_schedule,
    check_whole,
    try_out,
)
from manic.parameters import DELTA, REF, SLOT
from manic.schedules import differences
from manic.tuner import Options, TunerState

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "here", "fits"),
    [
        *((anything, None, True) for anything in (None, 1, "x", [1], NAN)),
        *((True, True, True), (False, True, True), (1, True, False), (None, True, False), ("x", False, False)),
        *((2, 1, True), (2.5, 1, True), (1, 2.5, True), (NAN, 1.0, False), (True, 1, False)),
        *((None, 1, False), ("1", 1, False), ([1], 1, False)),
        *((torch.tensor(2.0), 1, True), (torch.tensor([2]), 1.0, True), (torch.tensor(NAN), 1.0, False)),
        *((torch.ones(2), 1.0, False), (torch.tensor(1j), 1.0, False), (torch.tensor(True), 1.0, False)),
        *((torch.tensor(1.0, device="meta"), 1.0, False), (torch.ones(1).to_sparse(), 1.0, False)),
        *((1.0, torch.tensor(2.0), True), (torch.ones(1), torch.tensor(2.0), True), (True, torch.tensor(2.0), False)),
        *(([1, 2], (3, 4), True), ((1, 2), [3, 4], True), ([1], [3, 4], False), ([1, "x"], [3, 4], False)),
        *((1, [1], False), ({0: 1}, [1], False), ([], [], True), ([NAN], [1.0], False)),
        *(({"a": 1}, {"a": 2}, True), ({"a": 1, "b": 2}, {"a": 2}, True), ({"b": 2}, {"a": 2}, False)),
        *(({"a": "x"}, {"a": 2}, False), ({"a": "x"}, {"a": "x"}, True), ({"a": "y"}, {"a": "x"}, False)),
        *(({}, {3: 1}, True), ([("a", 1)], {"a": 1}, False), ({"a": {"b": 1}}, {"a": {"b": "x"}}, False)),
        *(("x", "y", True), (1, "x", False), (b"x", "x", False)),
    ],
    ids=repr,
)
def test_a_setting_that_can_take_the_place_of_another(value: Any, here: Any, fits: bool) -> None:
    assert _alike(value, here) is fits


@pytest.mark.parametrize(
    ("value", "here", "fits"),
    [
        *((INF, 1.0, False), (-INF, 1, False), (torch.tensor(INF), 1.0, False), (INF, "x", False), (INF, None, True)),
        *((INF, INF, True), (INF, -INF, True), (1.0, INF, True), (1, 1, True), (NAN, 1.0, False), (NAN, INF, False)),
        *(("x", 1.0, False), ([INF], 1.0, False), ([INF], [1.0], False), ({"a": INF}, {"a": 1}, False)),
    ],
    ids=repr,
)
def test_a_number_that_is_infinite_where_it_is_not_here(value: Any, here: Any, fits: bool) -> None:
    assert _alike(value, here) is fits


@pytest.mark.parametrize(
    ("dtype", "missing", "fits"),
    [
        *((torch.float64, 0, True), (torch.float64, 2, False)),
        *((torch.float32, 2, True), (torch.float32, 100, False)),  # which rounds: two of three million is nothing there
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", SLOT)
def test_what_had_a_gradient_has_its_slot(variant: str, dtype: torch.dtype, missing: int, fits: bool) -> None:
    """Which is x_ref in "scale_free", Δ in "paper"."""
    slot = {"scale_free": REF, "paper": DELTA}[variant]
    params = {i: torch.empty(n, device="meta", requires_grad=True) for i, n in enumerate((3_000_000, missing))}
    state = torch.zeros(TunerState.size(1), dtype=dtype)
    TunerState.unpack(state, 1).numel.fill_(3_000_000 + missing)
    groups = [{"params": [0, 1], "mechanic_state": state, "mechanic_step": torch.tensor(7.0)}]
    with nullcontext() if fits else pytest.raises(ValueError, match=f"of step 7, but has no '{slot}' for {missing} of"):
        check_whole(params, {0: {slot: params[0]}}, groups, Options(variant=variant, betas=(0.9,)))


def base() -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=0.1)


def sequential() -> schedulers.LRScheduler:
    optimizer = base()
    parts = [schedulers.LinearLR(optimizer, total_iters=4), schedulers.MultiStepLR(optimizer, [3, 5])]
    return schedulers.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULES = {
    "chained": lambda: schedulers.ChainedScheduler([schedulers.LinearLR(base())]),
    "cosine": lambda: schedulers.CosineAnnealingLR(base(), T_max=9),
    "lambda": lambda: schedulers.LambdaLR(base(), [lambda t: 1.0, lambda t: 1.0]),
    "plateau": lambda: schedulers.ReduceLROnPlateau(base()),
    "sequential": sequential,
}


def inside(i: int, key: str, value: Any) -> Any:
    return lambda s: s["_schedulers"][i].update({key: value})


@pytest.mark.filterwarnings("ignore:Detected call")
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("chained", lambda s: None, None),
        ("cosine", lambda s: None, None),
        ("cosine", lambda s: s.pop("last_epoch"), "the state of Cosine has no 'last_epoch' in the checkpoint"),
        ("cosine", lambda s: s.pop("base_lrs"), "no 'base_lrs'"),
        ("cosine", lambda s: s.pop("T_max"), None),  # an older torch may not have had it
        ("cosine", lambda s: s.update(more=1), None),
        ("cosine", lambda s: s.update(T_max=50), None),
        ("cosine", lambda s: s.update(T_max="50"), "T_max of Cosine is '50' in the checkpoint, 9 here"),
        ("cosine", lambda s: s.update(T_max=INF), "T_max of Cosine is inf in the checkpoint, 9 here"),
        ("cosine", lambda s: (s.pop("T_max"), s.update(eta_min=NAN)), "eta_min of Cosine is nan"),
        ("cosine", lambda s: s.update(base_lrs=[0.5]), None),  # it did not know of a group that was added
        ("cosine", lambda s: s.update(base_lrs=(0.5, 0.5)), None),
        ("cosine", lambda s: s.update(base_lrs=[]), "base_lrs of Cosine is []"),
        ("cosine", lambda s: s.update(base_lrs=0.5), "base_lrs of Cosine is 0.5"),
        ("cosine", lambda s: s.update(base_lrs={0: 0.5, 1: 0.5}), "base_lrs of Cosine is {0"),
        ("cosine", lambda s: s.update(base_lrs=[0.5, "x"]), "base_lrs of Cosine is [0.5, 'x']"),
        ("cosine", lambda s: s.update(base_lrs=[0.5, INF]), "base_lrs of Cosine is [0.5, inf]"),
        ("cosine", lambda s: s.update(_last_lr=[0.5, NAN]), "_last_lr of Cosine is [0.5, nan]"),
        ("lambda", lambda s: s.update(lr_lambdas=[None]), None),
        ("lambda", lambda s: s.update(lr_lambdas=None), "lr_lambdas of Cosine is None"),
        ("plateau", lambda s: None, None),  # its best is infinite so far, and so is its worst
        ("plateau", lambda s: s.update(factor=INF), "factor of Cosine is inf"),
        ("sequential", lambda s: None, None),
        ("sequential", lambda s: s.update(_milestones=[7]), None),
        (
            "sequential",
            lambda s: s.update(_milestones=[7, 9]),
            "_milestones of Cosine is [7, 9] in the checkpoint, [4] here",
        ),
        ("sequential", lambda s: s.update(_milestones=[]), "_milestones of Cosine is []"),
        ("sequential", lambda s: s["_schedulers"].pop(), "_schedulers of Cosine is"),
        ("sequential", lambda s: s.update(_schedulers=[1, 2]), "_schedulers of Cosine is [1, 2]"),
        (
            "sequential",
            inside(0, "total_iters", "x"),
            "total_iters of Cosine._schedulers is 'x' in the checkpoint, 4 here",
        ),
        ("sequential", inside(1, "base_lrs", [INF]), "base_lrs of Cosine._schedulers is [inf]"),
        ("sequential", inside(1, "milestones", None), "milestones of Cosine._schedulers is None"),
        ("sequential", inside(1, "base_lrs", [0.5]), None),
        ("sequential", lambda s: s["_schedulers"][1].pop("last_epoch"), "the state of Cosine._schedulers has no"),
    ],
)
def test_the_state_of_a_scheduler(name: str, change: Any, says: str | None) -> None:
    scheduler = SCHEDULES[name]()
    here = scheduler.state_dict()
    saved = copy.deepcopy(here)
    change(saved)
    if says is None:
        check_schedule(saved, here, scheduler, "Cosine")
    else:
        with pytest.raises(ValueError) as found:  # noqa: PT011
            check_schedule(saved, here, scheduler, "Cosine")
        assert says in str(found.value)


def test_settings_are_compared_of_schedulers_that_both_have() -> None:
    here, other = sequential(), sequential().state_dict()
    assert list(differences(here, other)) == []
    del other["_schedulers"][1]
    other["_schedulers"][0]["total_iters"] = 5
    assert list(differences(here, other)) == ["total_iters = 5 replaces 4 in LinearLR"]


P = nn.Parameter(torch.ones(3, 2))
LINE = nn.Parameter(torch.ones(3))
COMPLEX = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("value", "p", "says"),
    [
        (torch.ones(3, 2), P, None),
        (torch.ones(3, 2, dtype=torch.float64), P, None),
        (torch.ones(3, 2, dtype=torch.complex64), COMPLEX, None),
        (torch.ones(2, 3), P, "x is (2, 3) torch.float32 in the checkpoint; the parameter is (3, 2) torch.float32"),
        (torch.ones(3, 2, dtype=torch.int64), P, "x is (3, 2) torch.int64 in"),
        (torch.ones(3, 2, dtype=torch.complex64), P, "x is (3, 2) torch.complex64 in"),
        (torch.ones(3, 2), COMPLEX, "the parameter is (3, 2) torch.complex64"),
        (torch.ones(3, 2, device="meta"), P, "x is (3, 2)"),
        (torch.ones(3, 2).to_sparse(), P, "x is (3, 2)"),
        ([1.0], P, "x is list in the checkpoint"),
    ],
    ids=repr,
)
def test_a_tensor_in_the_shape_of_a_parameter(value: Any, p: torch.Tensor, says: str | None) -> None:
    if says is None:
        _check_ours("x", value, p)
    else:
        with pytest.raises(ValueError) as found:  # noqa: PT011
            _check_ours("x", value, p)
        assert says in str(found.value)


FULL, GONE = (lambda value, *shape: torch.full(shape or (3, 2), value)), "taken out"


@pytest.mark.parametrize(
    ("base", "name", "value", "fits"),
    [
        *(("AdamW", "exp_avg", value, True) for value in (FULL(1.0), FULL(1.0).double())),
        *(("AdamW", "exp_avg", value, False) for value in (FULL(1.0, 3), FULL(1.0, 3, 1), FULL(1.0, 2, 3), FULL(NAN))),
        *(("AdamW", "exp_avg", value, False) for value in (None, 1.0, "x", [1.0], GONE, FULL(INF))),
        *(("AdamW", "exp_avg", value, False) for value in (FULL(1.0).to_sparse(), FULL(1.0).to("meta"))),
        ("AdamW", "exp_avg_sq", FULL(INF), True),  # as after a large gradient in float16
        *(("SGD", "momentum_buffer", value, False) for value in (FULL(1.0, 3), GONE)),
        # Adafactor's rows and columns
        *(("Adafactor", "row_var", value, True) for value in (FULL(1.0, 3, 1), FULL(1.0, 3, 1).double())),
        *(("Adafactor", "row_var", value, False) for value in (2.0, FULL(1.0, 3), FULL(1.0, 2, 1), GONE)),
        *(("Adafactor", "row_var", value, False) for value in (FULL(NAN, 3, 1), FULL(1.0, 3, 1).to("meta"))),
        *(("AdamW", "step", value, True) for value in (torch.tensor(0.0), torch.tensor(7.0), 7, 7.5, torch.tensor(7))),
        *(("NAdam", "step", value, False) for value in (-1, INF, NAN, "7", None, [7], GONE, FULL(1.0, 1))),
        *(("RMSprop", "step", torch.tensor(value), False) for value in (-1.0, NAN, INF)),
        *(("NAdam", "mu_product", value, True) for value in (torch.tensor(0.5), 0.5, torch.tensor(0.5).double())),
        *(("NAdam", "mu_product", value, False) for value in (NAN, "x", None, FULL(1.0, 2), GONE)),
    ],
    ids=repr,
)
def test_a_value_in_the_state_of_the_base(base: str, name: str, value: Any, fits: bool) -> None:
    """The loader accepts what the base can step with."""

    def build() -> Mechanic:
        p = nn.Parameter(torch.ones(3, 2))
        mechanic = Mechanic(getattr(torch.optim, base)([p], **({"momentum": 0.9} if base == "SGD" else {})))
        p.grad = torch.ones_like(p)
        mechanic.step()
        return mechanic

    state_dict, mechanic = copy.deepcopy(build().state_dict()), build()
    values = state_dict["state"][0]
    assert name in values
    values.update({name: value})
    if value is GONE:
        del values[name]
    if fits:
        mechanic.load_state_dict(state_dict)
        mechanic.step()
    else:
        with pytest.raises(ValueError, match=rf"{name}|{base} cannot"):
            mechanic.load_state_dict(state_dict)


@pytest.mark.parametrize(("value", "fits"), [(FULL(1.0, 3), True), (torch.tensor(1.0), False), (FULL(1.0, 1), False)])
def test_a_value_of_one_dimension(value: torch.Tensor, fits: bool) -> None:
    """Adafactor's variance of a vector."""
    base = torch.optim.Adafactor([LINE])
    base.state[LINE] = {"step": torch.tensor(1.0), "variance": value}
    with nullcontext() if fits else pytest.raises(ValueError, match="Adafactor cannot step parameter 0"):
        try_out(base)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        *((FULL(1.0).to(dtype), True) for dtype in (torch.int16, torch.bfloat16)),
        *((FULL(1.0).to(dtype), False) for dtype in (torch.int32, torch.float32, torch.float16, torch.int8)),
        (torch.ones(2, 3, dtype=torch.int16), False),
    ],
    ids=repr,
)
def test_the_rest_of_a_bfloat16_parameter(value: torch.Tensor, fits: bool) -> None:
    """16 bits: int16 where it lives, bfloat16 in a state dict, and no other."""
    p = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    mechanic = Mechanic(torch.optim.SGD([p], lr=0.1))
    state_dict = copy.deepcopy(mechanic.state_dict())
    assert state_dict["state"][0]["mechanic_rest"].dtype == torch.bfloat16
    state_dict["state"][0]["mechanic_rest"] = value
    with nullcontext() if fits else pytest.raises(ValueError, match="mechanic_rest of parameter 0 is"):
        mechanic.load_state_dict(state_dict)


def test_state_that_dcp_has_left_under_a_string() -> None:
    groups = [{"params": [0, 1]}, {"params": [2, "name"]}]
    state = {0: {"a": 1}, "0": {"step": 3}, "1": {"step": 4}, 2: {"b": 1}, "name": {"c": 1}, "7": {"d": 1}}
    given = copy.deepcopy(state)
    assert by_number({"state": state, "param_groups": groups})["state"] == {
        **{0: {"a": 1, "step": 3}, 1: {"step": 4}, 2: {"b": 1}},
        **{"name": {"c": 1}, "7": {"d": 1}},
    }
    assert state == given
