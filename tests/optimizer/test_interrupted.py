"""What comes in the middle of a step waits until it is whole, or is refused; and a first step that came to nothing."""

from __future__ import annotations

import copy
import os
import signal
import threading
from typing import Any

import pytest
import torch
from resuming import same
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from training import Problem, flat, pulled

from manic import Mechanic
from manic.sweeps.passes import Passes


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
        def __float__(self) -> float:
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
    with pytest.raises(RuntimeError, match=r"during step\(\)"):
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
    with pytest.raises(RuntimeError, match=r"during step\(\)"):
        problem.train(parameters, m, 1)


def test_the_optimizer_inside_may_ask_itself_in_a_step(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(SGD(parameters, lr=0.1))
    m.base_optimizer.register_step_post_hook(lambda base, *_: base.state_dict() and None)
    with pytest.warns(UserWarning, match=r"SGD.state_dict\(\) was called during step\(\), where lr"):
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


def test_an_interrupted_state_dict_before_the_first_step_leaves_no_state(problem: Problem) -> None:
    """State of the base without slots passed for that of steps that counted: AdamW went on from its second step."""
    ends = []
    for interrupted in (False, True):
        parameters = problem.parameters()
        m = Mechanic(AdamW(parameters, lr=0.1))
        if interrupted:

            def stop(*_: Any) -> None:
                raise KeyboardInterrupt

            handle = m.base_optimizer.register_step_post_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                m.state_dict()
            handle.remove()
        problem.train(parameters, m, 5)
        ends.append(flat(parameters).detach())
    assert torch.equal(*ends)
