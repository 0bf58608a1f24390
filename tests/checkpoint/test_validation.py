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

from manic.checkpoint.validation import (
    _alike,
    _check_schedule,
    _check_tensor,
    _check_value,
    _check_whole,
    _endless,
    by_number,
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
        *((2, 1, True), (2.5, 1, True), (1, 2.5, True), (INF, 1, True), (NAN, 1.0, False), (True, 1, False)),
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
    ("value", "here", "endless"),
    [
        *((INF, 1.0, True), (-INF, 1, True), (torch.tensor(INF), 1.0, True), (INF, "x", True), (INF, None, True)),
        *((INF, INF, False), (INF, -INF, False), (1.0, INF, False), (1, 1, False), (NAN, 1.0, False)),
        *(("x", 1.0, False), ([INF], 1.0, False)),
    ],
    ids=repr,
)
def test_a_number_that_is_infinite_where_it_is_not_here(value: Any, here: Any, endless: bool) -> None:
    assert _endless(value, here) is endless


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
        _check_whole(params, {0: {slot: params[0]}}, groups, Options(variant=variant, betas=(0.9,)))


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
    here = SCHEDULES[name]().state_dict()
    saved = copy.deepcopy(here)
    change(saved)
    if says is None:
        _check_schedule(saved, here, "Cosine")
    else:
        with pytest.raises(ValueError) as found:  # noqa: PT011
            _check_schedule(saved, here, "Cosine")
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
        _check_tensor("x", value, p)
    else:
        with pytest.raises(ValueError) as found:  # noqa: PT011
            _check_tensor("x", value, p)
        assert says in str(found.value)


def test_a_value_of_one_dimension() -> None:
    """Adafactor's variance of a vector."""
    _check_value("variance", "what", torch.ones(3), torch.ones(2), LINE)
    with pytest.raises(ValueError, match="what is"):
        _check_value("variance", "what", torch.tensor(1.0), torch.ones(2), LINE)


SHAPED_LIKE = torch.ones(2, 2)  # by a stand-in of two elements in each dimension


@pytest.mark.parametrize(
    ("name", "value", "like", "fits"),
    [
        ("anything", "x", None, True),
        *(("exp_avg", value, SHAPED_LIKE, fits) for value, fits in ((torch.ones(3, 2), True), (torch.ones(3), False))),
        *(("exp_avg", value, torch.ones(3, 2), fits) for value, fits in ((torch.ones(3, 2), True), (None, False))),
        ("exp_avg", torch.full((3, 2), NAN), SHAPED_LIKE, False),
        ("exp_avg", torch.full((3, 2), INF), SHAPED_LIKE, True),
        # Adafactor's rows and columns, of which the stand-in has other shapes
        *(("row_var", value, torch.ones(2, 1), fits) for value, fits in ((torch.ones(3, 1), True), (2.0, False))),
        *(("row_var", value, torch.ones(2, 1), False) for value in (torch.ones(3), torch.ones(3, 1, device="meta"))),
        ("row_var", torch.full((3, 1), NAN), torch.ones(2, 1), False),
        *(("step", value, torch.tensor(3.0), True) for value in (torch.tensor(0.0), torch.tensor(7.0), 7, 7.5)),
        *(("step", value, torch.tensor(3.0), False) for value in (torch.tensor(7), torch.ones(1), -1, INF, NAN, "7")),
        *(("step", value, torch.tensor(3.0), False) for value in (None, True, torch.tensor(-1.0), torch.tensor(NAN))),
        *(("step", value, 3, True) for value in (0, 7, 7.0, torch.tensor(7))),
        *(("step", value, 3, False) for value in (-1, "7", None, True, [7], NAN)),
        *(("mu", value, torch.tensor(1.0), True) for value in (torch.tensor(-1.0), -1.0, INF)),
        *(("other", value, "word", fits) for value, fits in (("x", True), (1, False), (None, False))),
        *(("flag", value, True, fits) for value, fits in ((False, True), (1, False))),
    ],
    ids=repr,
)
def test_a_value_in_the_state_of_the_base(name: str, value: Any, like: Any, fits: bool) -> None:
    if fits:
        _check_value(name, "what", value, like, P)
    else:
        with pytest.raises(ValueError, match=r"what (is|has)"):
            _check_value(name, "what", value, like, P)


def test_state_that_dcp_has_left_under_a_string() -> None:
    groups = [{"params": [0, 1]}, {"params": [2, "name"]}]
    state = {0: {"a": 1}, "0": {"step": 3}, "1": {"step": 4}, 2: {"b": 1}, "name": {"c": 1}, "7": {"d": 1}}
    given = copy.deepcopy(state)
    assert by_number({"state": state, "param_groups": groups}) == {
        **{0: {"a": 1, "step": 3}, 1: {"step": 4}, 2: {"b": 1}},
        **{"name": {"c": 1}, "7": {"d": 1}},
    }
    assert state == given
