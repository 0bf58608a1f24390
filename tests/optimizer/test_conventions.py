"""What PyTorch's own tests ask of an optimizer, asked of a Mechanic."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import same
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training import Problem, flat, pulled

from manic import Mechanic

FLAGS = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(net: nn.Module, optimizer: Any, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for t in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
        optimizer.zero_grad()
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


# ---------------------------------------------------------------------- state_dict


@pytest.mark.parametrize("named", list(itertools.product([False, True], repeat=2)))
def test_parameters_with_names(named: tuple[bool, bool]) -> None:
    """As torch does, the names travel in the groups, and a state with names and one without load into each other."""
    runs = []
    for with_names in named:
        net = model()
        parameters: Any = net.named_parameters() if with_names else net.parameters()
        runs.append((net, Mechanic(AdamW(parameters, lr=0.1))))
    (net, mechanic), (other, twin) = runs
    train(net, mechanic, range(10))
    state = copy.deepcopy(mechanic.state_dict())
    if named[0]:
        assert state["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    twin.load_state_dict(state)
    other.load_state_dict(net.state_dict())
    train(net, mechanic, range(10, 20))
    train(other, twin, range(10, 20))
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


def test_a_state_dict_of_before_a_flag_was_there() -> None:
    net = model()
    mechanic = Mechanic(AdamW(net.parameters(), lr=0.1))
    train(net, mechanic, range(10))
    state = copy.deepcopy(mechanic.state_dict())
    for group in state["param_groups"]:
        for flag in FLAGS & group.keys():
            del group[flag]
    other = copy.deepcopy(net)
    twin = Mechanic(AdamW(other.parameters(), lr=0.1))
    twin.load_state_dict(state)
    train(net, mechanic, range(10, 20))
    train(other, twin, range(10, 20))
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.booleans(), st.sampled_from(["SGD", "AdamW", "Adagrad", "RMSprop"]))
def test_a_state_dict_survives_any_number_of_round_trips(steps: int, per_group: bool, base: str) -> None:
    net = model()
    groups = [{"params": layer.parameters()} for layer in (net[0], net[2])]
    mechanic = Mechanic(getattr(torch.optim, base)(groups, lr=0.1), per_group=per_group)
    train(net, mechanic, range(steps))
    state = copy.deepcopy(mechanic.state_dict())
    for _ in range(3):
        mechanic.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    assert same(mechanic.state_dict(), state)


def test_hooks_of_state_dict_and_load_state_dict() -> None:
    """They may replace what they are given, in the order in which they were registered, or in front; until removed."""
    mechanic = Mechanic(SGD(model().parameters(), lr=0.1))
    seen: list[str] = []

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_: seen.append(name) or result  # type: ignore[func-returns-value]

    other: dict[str, Any] = {"instead": 1}
    handles = [
        mechanic.register_state_dict_pre_hook(note("pre")),
        mechanic.register_state_dict_pre_hook(note("first"), prepend=True),
        mechanic.register_state_dict_post_hook(note("post", other)),
    ]
    assert mechanic.state_dict() is other
    assert seen == ["first", "pre", "post"]
    for handle in handles:
        handle.remove()
    seen.clear()
    good = copy.deepcopy(mechanic.state_dict())
    mechanic.register_load_state_dict_pre_hook(note("load", good))
    mechanic.register_load_state_dict_post_hook(note("loaded"))
    mechanic.load_state_dict({"broken": True})
    assert seen == ["load", "loaded"]


# ---------------------------------------------------------------------- hooks of step


def test_hooks_of_all_optimizers_see_the_wrapper_and_the_base() -> None:
    """One step of each: those of every optimizer, then those of the wrapper, then the same of the base inside."""
    net = model()
    base = AdamW(net.parameters(), lr=0.1)
    mechanic = Mechanic(base)
    seen: list[tuple[str, str]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda optimizer, *_: seen.append((name, type(optimizer).__name__))

    handles = [
        register_optimizer_step_pre_hook(note("all, before")),
        register_optimizer_step_post_hook(note("all, after")),
        mechanic.register_step_pre_hook(note("before")),
        mechanic.register_step_post_hook(note("after")),
        base.register_step_pre_hook(note("before")),
        base.register_step_post_hook(note("after")),
    ]
    try:
        train(net, mechanic, range(1))
    finally:
        for handle in handles:
            handle.remove()
    inside = [("all, before", "AdamW"), ("before", "AdamW"), ("after", "AdamW"), ("all, after", "AdamW")]
    outside = [("all, before", "Mechanic"), ("before", "Mechanic"), ("after", "Mechanic"), ("all, after", "Mechanic")]
    assert seen == [*outside[:2], *inside, *outside[2:]]


def test_a_pre_hook_may_replace_the_closure(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(SGD(parameters, lr=0.1))

    def closure() -> Any:
        mechanic.zero_grad()
        loss = problem.loss(parameters, 0)
        loss.backward()
        return loss

    mechanic.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))
    loss: Any = mechanic.step()
    assert loss.item() > 0
    assert parameters[0].grad is not None


def test_a_step_hook_may_replace_gradients(problem: Problem) -> None:
    """With a closure, which was called again then, and undid it."""
    parameters = problem.parameters()
    base = SGD(parameters, lr=0.1)
    m = Mechanic(base)
    calls = []

    def clip(*_: Any) -> None:
        for p in parameters:
            assert p.grad is not None
            p.grad = p.grad.clamp(-1e-3, 1e-3)

    def closure() -> Any:
        calls.append(0)
        m.zero_grad()
        loss = problem.loss(parameters, 0)
        loss.backward()
        return loss

    base.register_step_pre_hook(clip)
    for _ in range(5):
        m.step(closure)
    assert len(calls) == 5
    assert all(p.grad is not None and p.grad.abs().max() <= 1e-3 for p in parameters)


# ---------------------------------------------------------------------- param groups


def test_param_groups_that_torch_refuses(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(SGD(parameters[:1], lr=0.1))
    problem.train(parameters, mechanic, 5)
    before = copy.deepcopy(mechanic.state_dict())
    (first, second) = parameters
    wrong: list[tuple[Any, type[Exception]]] = [
        ({"params": [first]}, ValueError),  # in another group already
        ({"params": {second}}, TypeError),  # no order
        ({"params": [second * 2]}, ValueError),  # no leaf
        ({"params": ["weight"]}, TypeError),
        ([second], TypeError),
    ]
    for group, error in wrong:
        with pytest.raises(error):
            mechanic.add_param_group(group)
        assert same(mechanic.state_dict(), before)
    with pytest.warns(UserWarning, match="duplicate parameters"):  # which "will cause an error" one day
        twice = SGD([second, second], lr=0.1)
    with pytest.raises(ValueError, match="a param group has a parameter twice"):
        Mechanic(twice)


def test_the_lr_and_weight_decay_of_a_group_are_its_own(problem: Problem) -> None:
    """A group of lr 0 stays; a group that decays ends nearer to 0 than one that does not."""
    ends = []
    for decay in (0.0, 10.0):
        parameters = problem.parameters(torch.float64)
        groups = [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:], "weight_decay": decay}]
        start = parameters[0].detach().clone()
        problem.train(parameters, Mechanic(AdamW(groups, lr=0.1, weight_decay=0.0)), 60)
        assert torch.equal(parameters[0], start)
        ends.append(parameters[1].detach().norm())
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_group_that_is_taken_out(frozen: bool) -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    base = Adam([{"params": [p]}, {"params": [q]}], lr=0.1)
    m = Mechanic(base)
    for t in range(8):
        if t == 4:
            del base.param_groups[1]
            if frozen:
                m.freeze()
        q.grad = q.detach() - 3
        pulled(p, m)
    assert base.param_groups[0]["lr"] == 0.1
    assert m.effective_lr()[0] > 0


# ---------------------------------------------------------------------- kinds of tensors, kinds of steps


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_complex_parameters_are_their_real_views(base: str, shape: tuple[int, ...]) -> None:
    target = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    runs = []
    for real in (False, True):
        p = nn.Parameter(torch.zeros((*shape, 2), dtype=torch.float64) if real else torch.zeros_like(target))
        mechanic = Mechanic(getattr(torch.optim, base)([p], lr=0.1))
        for _ in range(30):
            z = torch.view_as_complex(p.detach()) if real else p.detach()
            gradient = z - target
            p.grad = torch.view_as_real(gradient) if real else gradient
            mechanic.step()
        runs.append(torch.view_as_complex(p.detach()) if real else p.detach())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)
    assert runs[0].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"differentiable": False, "amsgrad": True}])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_lr_that_is_a_tensor(options: dict[str, Any], scheduled: bool) -> None:
    """It stays the tensor that it was, and the run is that of the number."""
    runs = []
    for lr in (0.125, torch.tensor(0.125, dtype=torch.float64)):
        if options.get("foreach") and isinstance(lr, torch.Tensor):
            options = {}  # torch refuses it, unless capturable
        net = model().double()
        base = AdamW(net.parameters(), lr=lr, **options)
        schedule = torch.optim.lr_scheduler.StepLR(base, 5, 0.5) if scheduled else None
        mechanic = Mechanic(base, schedule)
        train(net, mechanic, range(20), torch.float64)
        if isinstance(lr, torch.Tensor):
            assert mechanic.param_groups[0]["lr"] is base.param_groups[0]["lr"]
            assert isinstance(mechanic.param_groups[0]["lr"], torch.Tensor)
        assert float(mechanic.param_groups[0]["lr"]) == (0.125 / 16 if scheduled else 0.125)
        runs.append(flat(net.parameters()).detach())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", [AdamW, SGD])
def test_the_implementations_of_a_base_agree(base: Any) -> None:
    runs = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        net = model().double()
        mechanic = Mechanic(base(net.parameters(), lr=0.1, **options))
        for t in range(20):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            mechanic.zero_grad()
            (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
            mechanic.step()
        runs.append(flat(net.parameters()).detach())
    for other in runs[1:]:
        torch.testing.assert_close(runs[0], other, rtol=1e-9, atol=1e-9)


def test_capturable_on_the_cpu_is_refused_by_torch_and_moves_nothing() -> None:
    """(On CUDA, where it is meant to be used: test_kernels.py.)"""
    net = model()
    mechanic = Mechanic(AdamW(net.parameters(), lr=0.1, capturable=True))
    before = flat(net.parameters()).detach().clone()
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        train(net, mechanic, range(1))
    assert torch.equal(flat(net.parameters()), before)
    assert mechanic.scale == 0


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("options", [{}, {"per_group": True}, {"variant": "paper"}], ids=str)
def test_deterministic_algorithms(options: dict[str, Any]) -> None:
    """Nothing is refused, and two runs give the same bits."""
    runs = []
    for _ in range(2):
        net = model()
        mechanic = Mechanic(AdamW(net.parameters(), lr=0.1), **options)
        train(net, mechanic, range(30))
        runs.append(flat(net.parameters()).detach())
    assert torch.equal(*runs)


def test_another_default_dtype() -> None:
    """The state of the tuner does not depend on it, nor does the run."""
    runs = []
    for default in (torch.float32, torch.float64):
        net = model()
        torch.set_default_dtype(default)
        try:
            mechanic = Mechanic(AdamW(net.parameters(), lr=0.1))
            for t in range(20):
                x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float32)
                mechanic.zero_grad()
                (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
                mechanic.step()
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append((flat(net.parameters()).detach(), mechanic.param_groups[0]["mechanic_state"]))
    (one, state), (two, other) = runs
    assert torch.equal(one, two)
    assert torch.equal(state, other)


def test_a_deep_copy_has_all_public_attributes() -> None:
    net = model()
    mechanic = Mechanic(AdamW(net.parameters(), lr=0.1), log_every=3)
    mechanic.mine = {"anything": [1, 2]}  # type: ignore[attr-defined]
    train(net, mechanic, range(5))
    twin = copy.deepcopy(mechanic)
    public = {name for name in vars(mechanic) if not name.startswith("_")} - {"step"}
    assert public <= vars(twin).keys()
    assert twin.mine == mechanic.mine  # type: ignore[attr-defined]
    assert twin.mine is not mechanic.mine  # type: ignore[attr-defined]
    assert same(twin.state_dict(), mechanic.state_dict())


def test_bfloat16_beside_float16() -> None:
    parameters = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    m = Mechanic(SGD(parameters, lr=1e-2))
    for _ in range(5):
        for p in parameters:
            p.grad = p.detach() - 3
        m.step()
    assert all(p.isfinite().all() for p in parameters)
