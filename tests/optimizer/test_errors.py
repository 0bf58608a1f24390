"""Wrong use: a message that names what was given and what to do, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from resuming import same
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from training import pulled

from manic import Mechanic, mechanize
from manic import run as running


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, **options)


WRONG_OPTIONS = [
    ({"variant": "Paper"}, "'Paper'"),
    ({"betas": ()}, "non-empty"),
    ({"betas": 0.9}, "0.9"),
    ({"betas": "0.9"}, "non-empty"),
    ({"betas": b"\0"}, "non-empty"),
    ({"betas": (0.9, 1.5)}, r"1\.5"),
    ({"betas": (-0.1,)}, r"-0\.1"),
    ({"betas": (0.9, "x")}, "'x'"),
    ({"s_decay": -1e-9}, "s_decay must be >= 0, got -1e-09"),
    ({"s_decay": float("nan")}, "s_decay"),
    ({"s_init": 0.0}, "s_init must be > 0, got 0.0"),
    ({"s_init": -1}, "s_init"),
    ({"s_init": True}, "s_init"),
    ({"s_init": float("inf")}, "s_init"),
    ({"eps": 0}, "eps must be > 0, got 0"),
    ({"eps": None}, "eps"),
    ({"log_every": -1}, "log_every.*-1"),
    ({"log_every": 2.5}, "log_every.*2.5"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS, ids=str)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    optimizer = sgd()
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        Mechanic(optimizer, **options)
    assert optimizer.param_groups[0] == before
    assert Mechanic(optimizer).base_optimizer is optimizer, "a failed attempt left the optimizer wrapped"


def test_log_func_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"log_func.*3"):
        Mechanic(sgd(), log_func=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("betas", [[0.5], (0.0, 1.0), (1,)])
def test_betas_at_the_ends_of_their_range_are_fine(betas: Any) -> None:
    assert Mechanic(sgd(), betas=betas).scale == 0


def test_a_class_is_not_an_instance() -> None:
    with pytest.raises(TypeError, match=r"not the class SGD: Mechanic\(SGD\(model.parameters\(\), lr=...\)\)"):
        Mechanic(torch.optim.SGD)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(1, 1)])
def test_not_an_optimizer(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"torch.optim.Optimizer, got {type(wrong).__name__}"):
        Mechanic(wrong)


def test_wrapped_twice() -> None:
    optimizer = sgd()
    mechanic = Mechanic(optimizer)
    with pytest.raises(ValueError, match="already"):
        Mechanic(mechanic)
    with pytest.raises(ValueError, match="SGD has a Mechanic's state already"):
        Mechanic(optimizer)


def test_an_optimizer_without_parameters_in_its_groups() -> None:
    mechanic = Mechanic(torch.optim.SGD([{"params": []}], lr=0.1))
    mechanic.step()
    assert mechanic.scale == 0


def test_schedulers_that_cannot_be_inside() -> None:
    optimizer = sgd()
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        Mechanic(optimizer, ReduceLROnPlateau(optimizer))
    with pytest.raises(TypeError, match=r"LRScheduler, got 0\.1"):
        Mechanic(optimizer, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ExponentialLR was built on another optimizer"):
        Mechanic(optimizer, ExponentialLR(sgd(), 0.9))
    assert "mechanic_state" not in optimizer.param_groups[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_delta_is_accepted_and_does_nothing(dtype: torch.dtype) -> None:
    """Scripts for mechanic-pytorch pass it."""
    runs = []
    for options in ({}, {"store_delta": True}, {"store_delta": False}):
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        mechanic = Mechanic(torch.optim.SGD([p], lr=0.1), **options)
        for _ in range(10):
            p.grad = p.detach() - 0.5
            mechanic.step()
        runs.append(mechanic.state_dict())
    assert runs[0]["state"][0]["mechanic_ref"].abs().sum() > 0
    assert same(runs[1], runs[0])
    assert same(runs[2], runs[0])


def test_a_bad_group_is_refused_by_torch_and_leaves_nothing() -> None:
    mechanic = Mechanic(sgd())
    with pytest.raises(ValueError, match="more than one parameter group"):
        mechanic.add_param_group({"params": mechanic.param_groups[0]["params"]})
    assert len(mechanic.param_groups) == 1


@pytest.mark.parametrize("wrong", ["SGD", nn.Linear, Mechanic, sgd()])
def test_mechanize_takes_an_optimizer_class(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes an optimizer class"):
        mechanize(wrong)


def test_a_parameter_twice_in_a_group_is_refused() -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="duplicate"):
        base = SGD([p, p], lr=0.1)
    with pytest.raises(ValueError, match="a param group has a parameter twice"):
        Mechanic(base)
    m = Mechanic(SGD([nn.Parameter(torch.ones(4))], lr=0.1))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="has a parameter twice"):
        m.add_param_group({"params": [p, p]})
    assert len(m.param_groups) == 1


@pytest.mark.parametrize("kind", ["eager", "native"])
def test_a_parameter_that_has_grown_is_told_and_can_begin_anew(kind: str, sweeps: Callable[[str], None]) -> None:
    sweeps(kind)
    p = nn.Parameter(torch.ones(5))
    m = Mechanic(SGD([p], lr=0.1, momentum=0.9))
    pulled(p, m, 5)
    p.grad, p.data = None, torch.cat([p.data, torch.ones(2)])
    with pytest.raises(
        ValueError, match=r"param group 0 has become \(7,\), the Mechanic keeps \(5,\) for it.*state.pop\(parameter\)$"
    ):
        pulled(p, m)
    m.state.pop(p)
    before = (p.detach() - 3).norm()
    pulled(p, m, 20)
    assert (p.detach() - 3).norm() < before


def test_a_constructor_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(2))
    base = SGD([p], lr=0.1)
    before = dict(base.param_groups[0])
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "watch", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Mechanic(base)
    assert base.param_groups[0].keys() == before.keys()
    assert not base._optimizer_step_pre_hooks
    pulled(p, Mechanic(base), 3)  # of whose steps nobody is warned
