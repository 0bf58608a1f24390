"""An interrupted step leaves the state of before the step, or the state of after it.

Whatever raises during ``mechanic.step()``: parameters, slots, tuner and lr belong to one moment, and training can go
on. The base's own state may be a step ahead.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from resuming import same
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

import manic
from manic import Mechanic

FOLDER = os.path.dirname(manic.__file__)
SIZES = [(2, 4), (4,), (90, 100)]  # small and large parameters take different paths
LARGE = [(300, 300), (300,), (300, 200)]  # a step takes some milliseconds
HITS = 20  # interrupts at random times that come during a step
TRIES = 1000  # at most, for as many
SAMPLE = 50  # places per case, without --every


class Late(BaseException):
    """Interrupts a step."""


class Failing(SGD):
    """Raises `error` when its update is done, or half done."""

    error: type[BaseException] | None = None
    half = False

    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in params]
        loss = super().step(closure)
        if self.error is None:
            return loss
        for p, x in zip(params, kept, strict=True):
            done = len(p) // 2 if self.half else len(p)
            p.data[done:] = x[done:]
        raise self.error


class Run:
    """Holds parameters and their Mechanic; it has not stepped yet."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(s, generator=generator).to(case.dtype)) for s in case.sizes]
        self.rate_raises = False
        self.base: Any = case.base(self.parameters, lr=1e-3)
        self.m = Mechanic(self.base, LambdaLR(self.base, self.rate) if case.scheduled else None)

    def rate(self, t: int) -> float:
        if self.rate_raises:
            raise Late
        return 0.9**t

    def gradients(self, t: int) -> None:
        for i, p in enumerate(self.parameters):
            target = torch.linspace(2, 3 + i, len(p)).roll(t).to(p.dtype)
            p.grad = p.detach() - target.view(-1, *[1] * (p.dim() - 1))

    def step(self, *steps: int) -> None:
        for t in steps:
            self.gradients(t)
            self.m.step()

    def seen(self) -> dict[str, Any]:
        """Copy all that must belong to one moment."""
        states, groups = [self.m.state.get(p, {}) for p in self.parameters], self.m.param_groups
        seen = {
            "parameters": [p.detach() for p in self.parameters],
            "slots": [{key: state[key] for key in state if key.startswith("mechanic_")} for state in states],
            "tuner": [[group["mechanic_state"], group["mechanic_step"]] for group in groups],
            "lr": [group["lr"] for group in groups],
        }
        return copy.deepcopy(seen)


class Case(NamedTuple):
    """Describes a run up to the step that is interrupted."""

    base: Any
    dtype: torch.dtype = torch.float32
    sizes: list[tuple[int, ...]] = SIZES
    steps: int = 4  # before that one
    frozen: bool = False
    scheduled: bool = False
    sweeps: str = "native"

    def run(self) -> Run:
        run = Run(self)
        run.step(*range(self.steps))
        if self.frozen:
            run.m.freeze()
            run.step(self.steps)
        run.gradients(self.steps)
        return run


CASES = {
    "adamw": Case(AdamW),
    "sgd bfloat16": Case(Failing, torch.bfloat16),
    "first step": Case(AdamW, steps=0),
    "frozen": Case(AdamW, frozen=True),
    "frozen sgd": Case(Failing, frozen=True),
    "scheduled": Case(AdamW, scheduled=True),
    "eager": Case(AdamW, sweeps="eager"),
    "eager sgd bfloat16": Case(Failing, torch.bfloat16, sweeps="eager"),
    "eager first step": Case(AdamW, steps=0, sweeps="eager"),
}
# A frozen step is the base's own. If the base is interrupted, it is as it would be without manic.
LEARNING = [name for name, case in CASES.items() if not case.frozen]


class Oracle:
    """Knows an undisturbed run: before the step, after it, and two steps later."""

    def __init__(self, case: Case) -> None:
        self.case = case
        run = case.run()
        self.before = run.seen()
        start = time.perf_counter()
        run.m.step()
        self.seconds = time.perf_counter() - start
        self.after = run.seen()
        run.step(case.steps + 1, case.steps + 2)
        self.later = run.seen(), copy.deepcopy(run.m.state_dict())
        assert not same(self.before, self.after), "the step changes nothing, so no test could fail"

    def moment(self, seen: dict[str, Any]) -> str:
        """Return "before" or "after"; else say what is torn. The schedule steps last and may miss the step."""
        if same(seen, self.before):
            return "before"
        if same(seen, self.after) or (self.case.scheduled and same(seen, self.after | {"lr": self.before["lr"]})):
            return "after"
        torn = [key for key in seen if not same(seen[key], self.before[key]) and not same(seen[key], self.after[key])]
        return f"torn: {', '.join(torn) or 'of two moments'}"

    def faults(self, interrupt: Callable[[Run], object], *wanted: str) -> str:
        """Take the step in `interrupt`, which raises; return what is wrong then, "" if nothing is."""
        run, installed = self.case.run(), handlers()
        faults = []
        try:
            interrupt(run)
            faults.append("nothing came out")
        except (Late, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
            pass
        torch.set_grad_enabled(True)  # an exception inside torch's own no_grad() may leave it off
        if handlers() != installed:
            faults.append("signal handlers")
            restore(installed)
        moment = self.moment(run.seen())
        if moment not in (wanted or ("before", "after")):
            faults.append(moment)
        else:
            try:
                faults += [] if self.goes_on(run, moment) else ["goes on differently"]
            except Exception as error:
                faults.append(f"cannot go on: {error!r}")
        return "; ".join(faults)

    def goes_on(self, run: Run, moment: str) -> bool:
        """Compare the next steps, bitwise. A base without state goes on as the undisturbed run; any other as a new
        process that loads what the interrupted run saves."""
        run.rate_raises = False
        t = self.case.steps
        if self.case.base is Failing:
            run.base.error = None
            run.step(*([t] if moment == "before" else []), t + 1, t + 2)
            return same((run.seen(), run.m.state_dict()), self.later)
        twin = Run(self.case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if self.case.scheduled else "error")  # a schedule that missed the step
            twin.m.load_state_dict(copy.deepcopy(run.m.state_dict()))
            for p, q in zip(twin.parameters, run.parameters, strict=True):
                p.data.copy_(q)
            run.step(t + 1, t + 2)
            twin.step(t + 1, t + 2)
        return same((run.seen(), run.m.state_dict()), (twin.seen(), twin.m.state_dict()))


def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def restore(installed: dict[int, Any]) -> None:
    for number, handler in installed.items() - handlers().items():
        signal.signal(number, handler)


def late(*_: object) -> None:
    raise Late


def wait() -> None:
    """Sleep until an interrupt comes. Not at one go: the interrupt may wait for the end of a sleep."""
    for _ in range(100_000):
        time.sleep(1e-4)


def alarm(*_: object) -> None:
    signal.raise_signal(signal.SIGALRM)


def ctrl_c_twice(*_: object) -> None:
    for _again in range(2):
        signal.raise_signal(signal.SIGINT)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Give torch one thread, and SIGINT and SIGALRM handlers that raise."""
    threads, installed = torch.get_num_threads(), handlers()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, late)
    yield
    torch.set_num_threads(threads)
    restore(installed)


# ---------------------------------------------------------------------- at every place


class AtLine:
    """Takes a step, and acts where the n-th line of manic begins (0: nowhere). If the action raises, that line raises,
    and Python ends the trace: the step handles it undisturbed."""

    def __init__(self, n: int, act: Callable[[], object]) -> None:
        self.n, self.act = n, act
        self.places: list[str] = []

    def __call__(self, run: Run) -> None:
        tracer = sys.gettrace()  # coverage's
        sys.settrace(self._trace)
        try:
            run.m.step()
        finally:
            sys.settrace(tracer)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            self.reach(f"{os.path.relpath(frame.f_code.co_filename, FOLDER)}:{frame.f_lineno}")
        return self._trace

    def reach(self, place: str) -> None:
        self.places.append(place)
        if len(self.places) == self.n:
            self.act()


class AtCall(AtLine):
    """The same where the n-th call of torch begins: in the middle of a line, and in the base."""

    def __call__(self, run: Run) -> None:
        reach = self.reach

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                reach(getattr(func, "__name__", str(func)))
                return func(*args, **(kwargs or {}))

        with Mode():
            run.m.step()


PLACES: list[tuple[str, type[AtLine], Callable[[], object]]] = [
    *((case, AtLine, late) for case in CASES),
    ("adamw", AtLine, alarm),
    ("adamw", AtLine, ctrl_c_twice),
    *((case, AtCall, out_of_memory) for case in LEARNING),
]


@pytest.mark.parametrize("i", range(len(PLACES)), ids=[f"{a}-{b.__name__}-{c.__name__}" for a, b, c in PLACES])
def test_at_every_place(i: int, sweeps: Callable[[str], None], request: pytest.FixtureRequest) -> None:
    """Interrupt a step at each line, or torch call, that it runs. Without --every this takes a sample, another one in
    each case, from the first and the last run of each line."""
    case, at, act = PLACES[i]
    sweeps(CASES[case].sweeps)
    oracle = Oracle(CASES[case])
    for _ in range(2):  # the first step of a process runs more lines
        undisturbed, run = at(0, act), CASES[case].run()
        undisturbed(run)
    assert same(run.seen(), oracle.after)
    places = undisturbed.places
    chosen = list(range(1, len(places) + 1))
    if not request.config.getoption("--every"):
        if at is AtLine:
            ends = {place: n for n, place in reversed([*enumerate(places, 1)])}, dict(zip(places, chosen, strict=True))
            chosen = sorted({n for end in ends for n in end.values()})
        stride = len(chosen) // SAMPLE + 1
        chosen = chosen[i % stride :: stride]
    found = {f"{n} {places[n - 1]}": oracle.faults(at(n, act)) for n in chosen}
    assert len(found) > 10
    assert not {place: fault for place, fault in found.items() if fault}


# ---------------------------------------------------------------------- at random times


def at_random(base: Any, interrupt: Callable[[Run, float], object], inside: list[bool]) -> None:
    """Interrupt steps after a random part of the seconds that they take. `inside`: whether that was before the end."""
    oracle, rng = Oracle(Case(base, sizes=LARGE)), random.Random(0)
    seconds = min(Oracle(oracle.case).seconds for _ in range(3))
    gc.disable()  # Python drops an exception that comes in a callback of the collector, as hypothesis sets one
    try:
        faults = Counter[str]()
        while sum(inside) < HITS and len(inside) < TRIES:  # on a busy machine many come too late
            faults[oracle.faults(lambda run: interrupt(run, rng.uniform(0, seconds)))] += 1
    finally:
        gc.enable()
    assert faults.keys() == {""}, faults
    assert sum(inside) >= HITS, f"only {sum(inside)} of {TRIES} interrupts came during the step"


@pytest.mark.usefixtures("both_sweeps")
@pytest.mark.parametrize("base", [AdamW, Failing])
def test_a_time_limit(base: Any) -> None:
    """The handler of SIGALRM raises."""
    inside: list[bool] = []

    def limited(run: Run, seconds: float) -> None:
        inside.append(True)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-5))
        run.m.step()
        inside[-1] = False
        wait()

    at_random(base, limited, inside)


@pytest.mark.usefixtures("both_sweeps")
@pytest.mark.parametrize("base", [AdamW, Failing])
def test_an_exception_from_another_thread(base: Any) -> None:
    inside: list[bool] = []
    main = ctypes.c_ulong(threading.get_ident())

    def stop(seconds: float) -> None:
        time.sleep(seconds)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Late))

    def stopped(run: Run, seconds: float) -> None:
        inside.append(True)
        threading.Thread(target=stop, args=(seconds,)).start()
        run.m.step()
        inside[-1] = False
        wait()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        at_random(base, stopped, inside)
    finally:
        sys.setswitchinterval(interval)


# ---------------------------------------------------------------------- in the base and in the schedule


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("case", LEARNING)
def test_ctrl_c_twice_while_the_base_steps(case: str, when: str, sweeps: Callable[[str], None]) -> None:
    sweeps(CASES[case].sweeps)

    def interrupt(run: Run) -> None:
        handle = getattr(run.base, f"register_step_{when}_hook")(ctrl_c_twice)
        try:
            run.m.step()
        finally:
            handle.remove()

    assert Oracle(CASES[case]).faults(interrupt) == ""


@pytest.mark.usefixtures("both_sweeps")
@pytest.mark.parametrize(("error", "half"), [(Late, False), (MemoryError, True), (torch.OutOfMemoryError, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 4])
def test_the_base_raises(error: Any, half: bool, dtype: torch.dtype, steps: int) -> None:
    """The base has moved the parameters, or half of each: they return, and the run goes on as if undisturbed."""

    def interrupt(run: Run) -> None:
        run.base.error, run.base.half = error, half
        run.m.step()

    assert Oracle(Case(Failing, dtype, steps=steps)).faults(interrupt, "before") == ""


def test_the_schedule_raises() -> None:
    """The schedule steps last: all the rest of the step is done."""

    def interrupt(run: Run) -> None:
        run.rate_raises = True
        run.m.step()

    assert Oracle(CASES["scheduled"]).faults(interrupt, "after") == ""


# ---------------------------------------------------------------------- what a step keeps


@pytest.mark.parametrize("how", ["accepted", "rejected", "raised"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_no_gradient_outlives_zero_grad(how: str, frozen: bool, loaded: bool) -> None:
    """zero_grad() frees the gradients of the last step, however that step ended, also after load_state_dict()."""
    run = Case(Failing, frozen=frozen).run()
    saved = copy.deepcopy(run.m.state_dict())
    grads: list[Any] = [p.grad for p in run.parameters]
    if how == "rejected":
        grads[0][0] = torch.nan
    run.base.error = Late if how == "raised" else None
    memory = [StorageWeakRef(grad.untyped_storage()) for grad in grads]
    del grads
    with contextlib.suppress(Late):
        run.m.step()
    if loaded:
        run.m.load_state_dict(saved)
    assert not any(storage.expired() for storage in memory)
    run.m.zero_grad()
    assert all(storage.expired() for storage in memory)
