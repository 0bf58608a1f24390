"""Defects that were found by trying to break it, each as it was found."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from resuming import same
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, Rprop
from torch.optim import lr_scheduler as schedulers
from training import Problem, flat

from manic import Mechanic, algorithm
from manic import run as running
from manic.sweeps.native import Native
from manic.sweeps.passes import Passes


def pulled(p: nn.Parameter, m: Any, steps: int = 1, target: float = 3.0) -> None:
    """Steps towards a target."""
    for _ in range(steps):
        p.grad = p.detach() - target
        m.step()


Run = tuple[nn.Parameter, Mechanic]


def resumed(one: Run, other: Run, steps: int, state: Any = None) -> None:
    """The other loads what one has saved (or `state`), and both take the same steps."""
    (p, m), (q, twin) = one, other
    twin.load_state_dict(copy.deepcopy(m.state_dict() if state is None else state))
    q.data.copy_(p)
    for run in (one, other):
        pulled(*run, steps)
    assert torch.equal(p, q)
    assert same(m.state_dict(), twin.state_dict())


# ---------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("calls", [1, 2])
def test_ctrl_c_waits_until_the_step_is_whole(calls: int, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the base has stepped x is x + u. One Ctrl-C waits, for the schedule as well; a second one does not, and
    x is again what it was."""
    runs = []
    for _ in range(2):
        parameters = problem.parameters()
        base = AdamW(parameters, lr=1e-4)
        runs.append((parameters, Mechanic(base, schedulers.ExponentialLR(base, 0.9))))
        problem.train(*runs[-1], 5)
    (parameters, m), (twins, twin) = runs
    real = Passes.move

    def interrupted(*arguments: Any) -> Any:
        for _ in range(calls):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    before, x = signal.getsignal(signal.SIGINT), flat(parameters).detach().clone()
    monkeypatch.setattr(Passes, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        problem.train(parameters, m, range(5, 6))
    assert torch.equal(flat(parameters), x) == (calls == 2)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    problem.train(twins, twin, range(5, 6))
    assert torch.equal(flat(parameters), flat(twins)) == (calls == 1)
    if calls == 1:
        assert same(m.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGWINCH"])
@pytest.mark.parametrize("where", ["base", "move", "frozen"])
def test_a_signal_that_saves_finds_whole_steps(
    where: str, name: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler of jobs sends it before it takes the machine away. Every signal waits that has a handler."""
    parameters = problem.parameters()
    base = AdamW(parameters, lr=1e-4)
    m = Mechanic(base, schedulers.ExponentialLR(base, 0.9))
    problem.train(parameters, m, 20)
    if where == "frozen":
        m.freeze()
    saved: list[Any] = []

    def save(*_: Any) -> None:
        saved.append(copy.deepcopy((flat(parameters).detach(), m.state_dict())))

    def send(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments) if arguments[1:] and where == "move" else None

    number = getattr(signal, name)
    before = signal.signal(number, save)
    real = Passes.move
    if where == "move":
        monkeypatch.setattr(Passes, "move", send)
    else:
        base.register_step_post_hook(send)
    try:
        problem.train(parameters, m, range(20, 21))
        assert signal.getsignal(number) is save
    finally:
        signal.signal(number, before)
    assert len(saved) == 1
    assert same(saved[0], (flat(parameters).detach(), m.state_dict()))


def test_signals_belong_to_the_main_thread_and_to_who_asks_last(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that a closure has put there stays; where no handler can be put, steps go on without."""
    parameters = problem.parameters()
    m = Mechanic(SGD(parameters, lr=0.1))
    before = signal.getsignal(signal.SIGINT)

    def theirs(*_: Any) -> None: ...

    def put(*_: Any) -> None:
        signal.signal(signal.SIGINT, theirs)

    handle = m.base_optimizer.register_step_pre_hook(put)
    try:
        problem.train(parameters, m, 2)
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)
    handle.remove()
    x = flat(parameters).detach().clone()
    threads = [threading.Thread(target=problem.train, args=(parameters, m, range(2, 4)))]
    monkeypatch.setattr(threading, "main_thread", lambda: threads[0])  # as Python sees it where it is embedded
    threads[0].start()
    threads[0].join()
    assert m.metrics()["skipped"] == 0
    assert int(m.param_groups[0]["mechanic_step"]) == 4
    assert not torch.equal(flat(parameters), x)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_does_not_leave_the_lr_lent(problem: Problem) -> None:
    """One that comes when the first of two groups has its lent lr."""

    class Interrupting(float):
        def __truediv__(self, other: float) -> float:
            raise KeyboardInterrupt

    parameters = problem.parameters()
    base = SGD([{"params": [p]} for p in parameters], lr=0.01)
    m = Mechanic(base)
    base.param_groups[1]["lr"] = Interrupting(0.01)
    with pytest.raises(KeyboardInterrupt):
        m._run.inside.step(None, [0.1, 0.1])
    assert [group["lr"] for group in base.param_groups] == [0.01, 0.01]
    assert not m._run.inside.stepping


@pytest.mark.parametrize(
    "ask", ["state_dict", "metrics", "effective_lr", lambda m: m.load_state_dict({}), lambda m: m.freeze()]
)
def test_in_the_middle_of_a_step_nobody_is_told_the_lent_lr(ask: Any) -> None:
    """A hook that saved there wrote a checkpoint whose lr was a thousand times too large."""
    p = nn.Parameter(torch.ones(5))
    base = SGD([p], lr=1e-3)
    m = Mechanic(base)
    pulled(p, m, 5)
    handle = base.register_step_post_hook(lambda *_: ask(m) if callable(ask) else getattr(m, ask)())
    x, lr = p.detach().clone(), m.effective_lr()
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        pulled(p, m)
    handle.remove()
    torch.testing.assert_close(p.detach(), x)
    assert m.effective_lr() == lr
    m.register_step_post_hook(lambda *_: m.state_dict())
    pulled(p, m, 3)


def test_a_copy_in_the_middle_of_a_step_is_refused(problem: Problem) -> None:
    """It had the lent lr for good, and was in the middle of a step for ever."""
    parameters = problem.parameters()
    m = Mechanic(SGD(parameters, lr=0.1))
    m.base_optimizer.register_step_post_hook(lambda *_: copy.deepcopy(m) and None)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        problem.train(parameters, m, 1)


def test_the_optimizer_inside_may_ask_itself_in_a_step(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(SGD(parameters, lr=0.1))
    m.base_optimizer.register_step_post_hook(lambda base, *_: base.state_dict() and None)
    with pytest.warns(UserWarning, match=r"SGD.state_dict\(\) was called in the middle of a step: its lr"):
        problem.train(parameters, m, 3)


@pytest.mark.parametrize("when", ["skipped", "raised"])
def test_a_first_step_that_came_to_nothing_is_a_first_step(when: str) -> None:
    """What a rehearsal (of torch.distributed.checkpoint) leaves after a step that was skipped goes; what a step has
    left whose scheduler raised stays."""
    ends = []
    for disturbed in (False, True):
        p = nn.Parameter(torch.ones(6))
        base = AdamW([p], lr=0.1)
        wrong = [when == "raised" and disturbed]

        def factor(t: int, wrong: list[bool] = wrong) -> float:
            if wrong[0] and t == 1:
                raise RuntimeError("not yet")
            return 1.0

        m = Mechanic(base, schedulers.LambdaLR(base, factor))
        if when == "skipped":
            p.grad = torch.full_like(p, torch.nan)
            m.step()
            if disturbed:  # as get_state_dict does
                p.grad, base.param_groups[0]["lr"] = torch.zeros_like(p), 0.0
                m.step(closure=None)
                base.param_groups[0]["lr"] = 0.1
                assert m.state[p]
        elif disturbed:
            with pytest.raises(RuntimeError, match="not yet"):
                pulled(p, m)
            wrong[0] = False
            pulled(p, m, 9)
        pulled(p, m, 10 - (when == "raised" and disturbed) * 10)
        ends.append([p.detach().clone(), m.state[p]["step"], m._run.read("ref_sq")])
    assert same(*ends)


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


# ---------------------------------------------------------------------- bases


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


def test_a_frozen_base_whose_updates_do_not_go_by_its_lr_is_told(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(Rprop(parameters, lr=0.01))
    problem.train(parameters, m, 10)
    with pytest.warns(UserWarning, match="Rprop is not proportional to its lr, which now carries the frozen scale"):
        m.freeze()


def test_bfloat16_beside_float16() -> None:
    parameters = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    m = Mechanic(SGD(parameters, lr=1e-2))
    for _ in range(5):
        for p in parameters:
            p.grad = p.detach() - 3
        m.step()
    assert all(p.isfinite().all() for p in parameters)


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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_has_grown_is_told_and_can_begin_anew(compiled: bool) -> None:
    p = nn.Parameter(torch.ones(5))
    m = Mechanic(SGD([p], lr=0.1, momentum=0.9))
    if compiled:
        m.compile()
    pulled(p, m, 5)
    p.grad, p.data = None, torch.cat([p.data, torch.ones(2)])
    with pytest.raises(
        ValueError, match=r"param group 0 has become \(7,\), its slot is \(5,\).*state.pop\(parameter\)$"
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


# ---------------------------------------------------------------------- checkpoints


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
    def build(names: tuple[str, str]) -> Run:
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

    def build() -> Run:
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
    def build() -> Run:
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

    def build() -> Run:
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
        with pytest.raises(ValueError, match=r"of RMSprop were loaded or copied.*load_state_dict\(\) of the M"):
            pulled(p, m)
    assert torch.equal(p, before)
    m.load_state_dict(state)
    twin = copy.deepcopy((p, m))
    for some in (twin, (p, m)):
        pulled(*some, 3)
    assert torch.equal(p, twin[0])


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_where_in_memory_a_tensor_lies_makes_no_difference(where: str, dtype: torch.dtype) -> None:
    """A resumed process may have its gradients at other addresses: DDP with gradient_as_bucket_view."""

    def at(offset: int) -> torch.Tensor:
        return torch.empty(x0.numel() + 16, dtype=dtype)[offset:][: x0.numel()].view_as(x0)

    generator = torch.Generator().manual_seed(0)
    x0, target = (torch.randn(100, 100, dtype=dtype, generator=generator) for _ in range(2))
    ends = []
    for offset in (0, 1, 3):
        p = nn.Parameter(at(offset if where == "x" else 0).copy_(x0))
        m = Mechanic(AdamW([p], lr=1e-3))
        for _ in range(40):
            p.grad = at(offset if where == "g" else 0).copy_(p.detach() - target)
            m.step()
        ends.append([p.detach().clone(), m.scale])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    assert (ends[0][0] - x0).norm() > 1


@pytest.mark.parametrize("change", ["double", "bfloat16", "smaller"])
def test_natively_a_parameter_may_become_another(change: str) -> None:
    """The tables of the C++ sweeps were those of before: they wrote past the end."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(400_000))
        m = Mechanic(SGD([p], lr=1e-3))
        if compiled:
            m.compile()
        for t in range(6):
            if t == 2 and change == "smaller":
                p.grad, p.data = None, p.data[:10].clone()
                m.state.pop(p)
            elif t == 2:
                p.grad, p.data = None, getattr(p.data, change)()
            p.grad = p.detach().clone()
            m.step()
        ends.append([p.detach().double(), m.scale])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["Turned", "SGD"])
def test_natively_a_base_may_put_x_elsewhere(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Turned(Optimizer):
        """Works on the transpose, and leaves x with its strides."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    u = (p.grad.T / p.grad.norm()).contiguous().T
                    p.data = u.mul(-group["lr"]).add(p.data)

    moves: list[Any] = []
    real = Native.move
    monkeypatch.setattr(Native, "move", lambda *arguments: moves.append(real(*arguments)))
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        start, target = torch.randn(7, 5), torch.randn(7, 5)
        p = nn.Parameter(start.clone())
        m = Mechanic(Turned([p], 1e-2) if base == "Turned" else SGD([p], 1e-2))
        if compiled:
            m.compile()
        for _ in range(12):
            p.grad = (p.detach() - target).contiguous()
            m.step()
        ends.append(p.detach())
    assert len(moves) == (0 if base == "Turned" else 12)
    assert ends[0].stride() == ends[1].stride() == ((1, 7) if base == "Turned" else (5, 1))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    assert (ends[0] - target).norm() < 0.95 * (start - target).norm()


def test_natively_with_another_default_device(problem: Problem) -> None:
    ends = []
    for device in ("cpu", "meta"):
        parameters = problem.parameters()
        m = Mechanic(SGD(parameters, lr=0.1))
        m.compile()
        for t in range(10):
            m.zero_grad()
            problem.loss(parameters, t).backward()
            with torch.device(device):
                m.step()
        ends.append(flat(parameters).detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_edit_that_exchanges_elements_which_never_moved(compiled: bool) -> None:
    """Experts or words in another order: they stay where the user has put them."""
    e = nn.Embedding(1000, 16, _weight=torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)))
    m = Mechanic(SGD(e.parameters(), lr=1e-2))
    if compiled:
        m.compile()

    def step() -> None:
        m.zero_grad()
        (e(torch.arange(100)) - 1).square().mean().backward()
        m.step()

    for _ in range(10):
        step()
    with torch.no_grad():
        e.weight[[500, 501]] = e.weight[[501, 500]]
    wanted = e.weight.detach()[500:].clone()
    step()
    assert torch.equal(e.weight[500:], wanted)
