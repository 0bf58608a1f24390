"""Bases that are not as torch's own are: in their hooks, their state, their closures, their lrs."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from resuming import resumed
from torch import distributed, nn
from torch.optim import SGD, Optimizer
from training import Problem, flat, pulled

import manic.optim
from manic import Mechanic, chain, mechanize


class Outlined(Optimizer):
    """As Lookahead of timm: it skips Optimizer.__init__, and has but some of what that makes."""

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)


def test_a_base_that_has_not_all_hooks() -> None:
    p = nn.Parameter(torch.ones(5))
    base = Outlined(SGD([p], lr=0.1))
    m = Mechanic(base)
    pulled(p, m, 50)
    assert (p - 3).norm() < 4
    assert m.unwrap() is base
    assert not base._optimizer_step_pre_hooks


class Counting(Optimizer):
    """Keeps state that is no parameter's, as MADGRAD does."""

    def __init__(self, params: Any, lr: float, at_once: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        if at_once:
            self.state["k"] = torch.zeros(2)  # type: ignore[index]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["k"] = self.state.get("k", torch.zeros(2)) + 1  # type: ignore[index,call-overload]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["n"] = self.state[p].get("n", 0) + 1
                p.sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("at_once", [False, True])
def test_state_that_is_no_parameters(at_once: bool) -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    m, other = (Mechanic(Counting([x], 1e-4, at_once)) for x in (p, q))
    pulled(p, m, 20)
    resumed((p, m), (q, other), 5)
    m.freeze()
    assert set(m.state[p]) == {"n"}
    before = p.detach().clone()
    pulled(p, m)
    assert (p - before).abs().max() < 2 * m.effective_lr()[0]
    pulled(q, other.unwrap())
    assert torch.allclose(p, q, atol=1e-7)


class SharpnessAware(Optimizer):
    """Foret et al. 2021, as github.com/davda54/sam is used: the closure is for the place to which it has moved."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = SGD(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        moves = [0.05 * p.grad / p.grad.norm() for group in self.param_groups for p in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            torch._foreach_add_(params, moves)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(params, moves)
        self.inner.param_groups = self.param_groups
        self.inner.step()


def test_a_base_that_moves_before_it_asks_its_closure_gets_an_answer_from_there(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(SharpnessAware(parameters, lr=0.1))
    seen = []

    def closure() -> Any:
        m.zero_grad()
        seen.append(flat(parameters).detach().clone())
        loss = problem.loss(parameters, 0)
        loss.backward()
        return loss

    first = float(closure().detach())
    seen.clear()
    for _ in range(60):
        m.step(closure)
    assert len(seen) == 120
    assert (seen[1] - seen[0]).norm() > 0.01
    assert float(closure().detach()) < 0.5 * first


# ---------------------------------------------------------------------- those that go wrong in a Mechanic


class ScheduleFreeInAll(SGD):
    """One of a family that is known by its name: its eval() replaces the weights by others, from its state."""


class ZeroRedundancyOptimizer(SGD):
    """As torch.distributed.optim has it, by its name: its state dict has to be gathered first."""


class Lists(SGD):
    """A container whose state dict is a list."""

    def state_dict(self) -> Any:
        return [super().state_dict()]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ScheduleFreeInAll, "wrap the plain optimizer"),
        (type("Child", (ScheduleFreeInAll,), {}), "Child trains weights that it keeps"),
        (ZeroRedundancyOptimizer, "fully_shard"),
        (torch.optim.LBFGS, "strong_wolfe"),
        (Lists, r"manic\.chain"),
    ],
)
def test_bases_that_are_refused(kind: Any, message: str) -> None:
    p = nn.Parameter(torch.ones(5))
    base = kind([p], lr=0.1)
    with pytest.raises(ValueError, match=message):
        Mechanic(base)
    assert not any(name.startswith("mechanic_") for name in base.param_groups[0])
    with pytest.raises(ValueError, match=message if kind is not Lists else r"manic\.chain"):
        mechanize(kind)([p], lr=0.1)


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in torch itself
def test_a_mechanic_in_a_zero_redundancy_optimizer_is_refused() -> None:
    zero = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer
    p = nn.Parameter(torch.ones(5))
    for kind in (mechanize(SGD), manic.optim.SGD):
        with pytest.raises(ValueError, match=r"each process would learn a scale.*fully_shard"):
            zero([p], kind, lr=0.1)
    with pytest.raises(ValueError, match=r"a part of the state.*fully_shard"):
        Mechanic(zero([p], SGD, lr=0.1))


def test_one_that_a_chain_would_hide_is_refused() -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match="ScheduleFreeInAll trains weights"):
        Mechanic(chain(SGD([p], lr=0.1), ScheduleFreeInAll([q], lr=0.1)))


class Averaging(Optimizer):
    """Steps a copy of the parameters, and leaves the parameters at the mean: schedule-free under another name."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(z=p.clone(), k=0)
                state["k"] += 1
                state["z"].sub_(p.grad, alpha=group["lr"])
                p.lerp_(state["z"], 1 / state["k"])


class Anchored(Optimizer):
    """Keeps where it began, as D-Adaptation and Prodigy do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("start", p.clone().half())
                p.sub_(p.grad, alpha=group["lr"])


class Momentum(Optimizer):
    """Keeps what has the shape of a parameter, and is none."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("ones", torch.ones_like(p))
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize(("kind", "key"), [(Averaging, "z"), (Anchored, "start"), (Momentum, "")])
def test_a_base_that_keeps_a_copy_of_the_parameters_is_told_of_once(kind: Any, key: str, state_first: bool) -> None:
    p, q = nn.Parameter(torch.tensor([0.5, -2.0, 3.0])), nn.Parameter(torch.ones(4))
    base = kind([q, p], {"lr": 0.1})
    m = Mechanic(chain(base, SGD([nn.Parameter(torch.ones(2))], lr=0.1)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if state_first:
            m.state_dict()
        q.grad = torch.zeros(4)
        pulled(p, m, 5)
    assert [str(one.message).partition(", which")[0] for one in told] == (
        [f"{kind.__name__} keeps a copy of the parameters in its state, {key!r}"] if key else []
    )
    assert not any(hooks for one in m.base_optimizer.optimizers for hooks in [one._optimizer_step_post_hooks])


def shrink(base: Any, *_: object) -> None:
    for group in base.param_groups:
        for p in group["params"]:
            p.data.mul_(0.99)  # which torch does not count as a change of p


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("edits", [True, False])
@pytest.mark.parametrize("late", [False, True])
def test_a_hook_on_the_base_that_edits_weights_is_told_of(when: str, edits: bool, late: bool) -> None:
    p = nn.Parameter(torch.tensor([0.1, 2.0, 3.0]))
    base = SGD([p], lr=0.1)
    seen = []
    hook = shrink if edits else lambda *_: seen.append(p.sum())
    m = Mechanic(base) if late else None
    register = base.register_step_pre_hook if when == "pre" else base.register_step_post_hook
    register(hook)
    m = m or Mechanic(base)
    expected = pytest.warns(UserWarning, match="register it on the Mechanic") if edits else nullcontext()
    with expected:
        pulled(p, m, 3)
    assert edits or len(seen) == 3


def test_the_same_hook_on_the_mechanic_is_not_told_of() -> None:
    p = nn.Parameter(torch.tensor([0.1, 2.0, 3.0]))
    m = Mechanic(SGD([p], lr=0.1))
    m.register_step_post_hook(shrink)
    pulled(p, m, 3)


class Container(Optimizer):
    """Shows groups of its own, and steps optimizers that have others."""

    def __init__(self, params: list[Any], hold: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.inner = hold([SGD([p], lr=0.1) for p in params])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.inner.values() if isinstance(self.inner, dict) else self.inner:
            one.step()


@pytest.mark.parametrize("hold", [list, tuple, lambda found: dict(enumerate(found))])
def test_a_container_that_ignores_its_groups_is_told_of(hold: Any) -> None:
    with pytest.warns(UserWarning, match=r"Container holds a SGD with param groups of its own.*manic\.chain"):
        Mechanic(Container([nn.Parameter(torch.ones(5))], hold))


def test_one_that_shares_its_groups_is_not() -> None:
    Mechanic(SharpnessAware([nn.Parameter(torch.ones(5))], lr=0.1))


# ---------------------------------------------------------------------- ordinary things


class Relative(Optimizer):
    """Sets its own step, as Adafactor does for T5, and needs no lr."""

    def __init__(self, params: Any, lr: Any = None) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                lr = 0.01 if group["lr"] is None else float(group["lr"])
                p.sub_(p.grad.sign(), alpha=lr * max(1e-3, float(p.square().mean().sqrt())))


def test_lr_none_runs_as_a_group_without_an_lr() -> None:
    class Without(Relative):
        def __init__(self, params: Any) -> None:
            Optimizer.__init__(self, params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["lr"] = None
            super().step()
            for group in self.param_groups:
                del group["lr"]

    p, q, r = (nn.Parameter(torch.ones(5)) for _ in range(3))
    m, other, resumed = Mechanic(Relative([p])), Mechanic(Without([q])), Mechanic(Relative([r]))
    for one, optimizer in ((p, m), (q, other)):
        pulled(one, optimizer, 100)
    assert torch.equal(p, q)
    assert (p - 3).norm() < 1
    assert m.effective_lr() == [float(m.scale)]
    m.load_state_dict(m.state_dict())
    r.data.copy_(p)
    resumed.load_state_dict(m.state_dict())
    for one, optimizer in ((p, m), (r, resumed)):
        pulled(one, optimizer, 10)
    assert torch.equal(p, r)
    with pytest.raises(ValueError, match="no lr to carry the scale"):
        m.freeze()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "lr", [numpy.float32(0.25), numpy.float64(0.25), numpy.int64(1), 1, Fraction(1, 4), torch.tensor(0.25)], ids=repr
)
def test_an_lr_of_any_kind_of_number(lr: Any, scheduled: bool) -> None:
    def trained(lr: Any, steps: int = 20) -> tuple[nn.Parameter, Mechanic]:
        p = nn.Parameter(torch.ones(5))
        base = torch.optim.AdamW([p], lr=copy.deepcopy(lr))  # schedulers write into a tensor
        schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda t: numpy.float64(1 / (1 + t))) if scheduled else None
        m = Mechanic(base, schedule)
        pulled(p, m, steps)
        return p, m

    p, m = trained(lr)
    q, other = trained(float(lr))
    assert torch.equal(p, q)
    assert m.effective_lr() == pytest.approx(other.effective_lr(), rel=1e-6)  # a tensor is float32
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    r, again = trained(lr, 1)
    again.load_state_dict(torch.load(file, weights_only=True))
    r.data.copy_(p)
    pulled(p, m, 5)
    pulled(r, again, 5)
    assert torch.equal(p, r)


@pytest.mark.parametrize("how", ["state", "clear"])
@pytest.mark.parametrize("chained", [False, True])
def test_the_state_can_be_reset_in_both_ways(how: str, chained: bool) -> None:
    ends = []
    for way in ("clear", how):
        p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
        base = torch.optim.AdamW([p], lr=0.1)
        m = Mechanic(chain(base, SGD([q], lr=0.1)) if chained else base)
        pulled(p, m, 10)
        if way == "clear":
            m.state.clear()
        else:
            m.__setstate__({"state": {}})
        assert len(m.state) == len(base.state) == 0
        pulled(p, m, 10)
        ends.append(p)
    assert torch.equal(*ends)


def test_an_optimizer_with_no_group() -> None:
    p = nn.Parameter(torch.ones(5))
    m = Mechanic(SGD([p], lr=0.1))
    pulled(p, m, 3)
    m.param_groups.clear()
    m.state.clear()
    m.step()
    assert (m.metrics(), m.effective_lr(), float(m.scale), float(m.skipped)) == ({}, [], 0.0, 0.0)
    assert m.state_dict() == {"state": {}, "param_groups": []}
    before = p.detach().clone()
    with pytest.warns(UserWarning, match="the tuner starts afresh"):
        m.add_param_group({"params": [p]})
    pulled(p, m, 20)
    assert not torch.equal(p, before)
