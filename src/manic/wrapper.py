"""An optimizer around an optimizer: what it owes PyTorch, how it steps the one inside, and how a step stays whole."""

from __future__ import annotations

import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import Optimizer

from manic.bases import UNPROPORTIONAL
from manic.chains import members, name_of, params_of, prepare, with_members
from manic.parameters import Layout, layout_of, local, lr_of, shards

Closure = Callable[[], Any]


def _of_the_base(name: str) -> Any:
    """A property that reads and sets an attribute of the base optimizer."""
    return property(
        lambda self: getattr(self.base_optimizer, name),
        lambda self, value: setattr(self.base_optimizer, name, value),
        doc=f"The base optimizer's ``{name}``.",
    )


class Wrapper(Optimizer):
    """Keep the part of the ``torch.optim.Optimizer`` contract that has nothing to do with tuning.

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own. Loading replaces them, so every use looks
    them up anew.
    """

    base_optimizer: Optimizer
    param_groups, state, defaults = map(_of_the_base, ("param_groups", "state", "defaults"))

    def __init__(self, base_optimizer: Optimizer) -> None:
        # Optimizer.__init__ would build its own param_groups and state; this is the rest of what it does.
        # The hooks must not be the base's: torch would call each twice.
        prepare(self)
        self.base_optimizer = base_optimizer

    @disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad()``."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        # Without the hooks, as in torch, and without an LR scheduler's patch of `step`, which cannot be pickled.
        return {k: v for k, v in vars(self).items() if k != "step" and not k.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when it is unpickled or copied; or by a user who sets ``{"state": …}``, which is the base's."""
        theirs: dict[str, Any] = {name: state[name] for name in ("state", "param_groups", "defaults") if name in state}
        super().__setstate__({name: value for name, value in state.items() if name not in theirs})
        if "state" in theirs:
            theirs["state"] = defaultdict(dict, theirs["state"])
        if theirs:
            self.base_optimizer.__setstate__(theirs)

    def __getattr__(self, name: str) -> Any:
        if "base_optimizer" not in vars(self) and not name.startswith("__"):
            raise RuntimeError("this Mechanic was unwrapped: go on with the optimizer that unwrap() returned")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    scheduler: Any  # the LR scheduler inside, or None

    @property
    def scheduled_outside(self) -> bool:
        """Whether another LR scheduler than the one inside was built on this optimizer. (It puts a mark on step.)"""
        on_base = self.scheduler is None and hasattr(self.base_optimizer.step, "_wrapped_by_lr_sched")
        return on_base or hasattr(vars(self).get("step"), "_wrapped_by_lr_sched")


class Inside:
    """The base optimizer, which steps at another lr than its groups say."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.lock = threading.RLock()  # held during a step, a save and a load: other threads wait for the end
        self.stepping = False  # in its step: parameters and lr are temporarily changed
        self.finished = False  # its last step has returned
        self.loading = False  # a load has replaced some of its groups
        self._lent: list[tuple[dict[str, Any], float, Any, Any]] = []  # group, divisor, the user's lr, the lent one
        self._hooks: list[Any] = []

    @property
    def name(self) -> str:
        """The name of its class, and of those that it is made of."""
        return name_of(self.optimizer)

    @property
    def unproportional(self) -> str:
        """The name of the first of its optimizers whose update is not proportional to its lr; "": there is none."""
        return next((type(one).__name__ for one in members(self.optimizer) if isinstance(one, UNPROPORTIONAL)), "")

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Its param groups."""
        return self.optimizer.param_groups

    def params(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return list(params_of(self.optimizer))

    def layouts(self) -> list[Layout]:
        """How the parameters are spread over processes, sharded ones first: the same list on every rank."""
        found = dict.fromkeys(map(layout_of, self.params()))
        return sorted(found, key=shards, reverse=True) or [None]

    def begun(self) -> bool:
        """Whether some parameter has state. (A base may keep other state beside it.)"""
        return any(self.optimizer.state.get(p) for p in self.params())

    def watch(self, on_step: Callable[..., None], on_state_dict: Callable[..., None]) -> None:
        """Call these before its step and its state_dict. An optimizer that skips Optimizer.__init__ has no hooks."""
        for one in with_members(self.optimizer):
            if hasattr(one, "_optimizer_step_pre_hooks"):
                self._hooks.append(one.register_step_pre_hook(on_step))
        if hasattr(self.optimizer, "_optimizer_state_dict_pre_hooks"):
            self._hooks.append(self.optimizer.register_state_dict_pre_hook(on_state_dict))

    def leave(self) -> None:
        """Remove our hooks and our keys in its groups."""
        for handle in self._hooks:
            handle.remove()
        for group in self.groups:
            for key in [key for key in group if key.startswith("mechanic_")]:
                del group[key]

    def step(self, closure: Closure | None, divisors: Sequence[float]) -> None:
        """Step it at lr / divisor of each group."""
        self.finished = False
        try:
            self.stepping = True
            self._lend(divisors)
            # In one line, so that no interrupt comes between the two.
            _, self.finished = self.optimizer.step() if closure is None else self.optimizer.step(closure), True
        finally:
            self.come_back()

    def _lend(self, divisors: Sequence[float]) -> None:
        for group, divisor in zip(self.groups, divisors, strict=True):
            lr = lr_of(group)
            if lr is not None and divisor != 1:
                self._lent.append((group, divisor, lr, (lr if isinstance(lr, Tensor) else float(lr)) / divisor))
                group["lr"] = self._lent[-1][-1]

    def come_back(self) -> None:
        """End its step: give each group the user's lr back. A second call does nothing."""
        while self._lent:
            group, divisor, lr, ours = self._lent[-1]
            # A base that sets its own lr has changed the lent one.
            group["lr"] = lr if group["lr"] is ours or group["lr"] is lr else group["lr"] * divisor
            self._lent.pop()
        self.stepping = False

    # ------------------------------------------------------------------ before the first step

    @disable_dynamo
    def is_rehearsal(self, closure: Closure | None, anywhere: Callable[[bool], bool]) -> bool:
        """Whether torch.distributed.checkpoint takes this step: it makes an optimizer create its state by a step with
        lr and gradients of 0. Reads values only while there is no state and every lr is 0.

        Args:
            closure: of the step.
            anywhere: whether its argument is true on any process, so that all decide alike.
        """
        if closure is not None or self.begun():
            return False
        lrs = [lr_of(group, 1) for group in self.groups]
        if not all((not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0 for lr in lrs):
            return False
        grads = [local(p.grad) for p in self.params() if p.grad is not None]
        return anywhere(len(grads) > 0) and not anywhere(any(bool(g.count_nonzero()) for g in map(_values, grads)))

    def create_state(self, divisors: Sequence[float], enter: Callable[[list[Tensor]], None]) -> None:
        """Create the state that the first step will create: by a step with lr and gradients of 0, undone but for it.

        A base that cannot be stepped so (it needs a closure, or sparse gradients) gets none.

        Args:
            divisors: as in ``step()``.
            enter: gives parameters what we keep for them.
        """
        everyone, state = self.params(), self.optimizer.state
        params = [p for p in everyone if p.requires_grad]
        groups, grads, kept = [dict(group) for group in self.groups], [p.grad for p in everyone], dict(state)
        copies = [p.detach().clone() for p in params]
        try:
            try:
                for p in everyone:
                    if not p.requires_grad:
                        p.grad = None
                    elif p.grad is None or bool(_values(local(p.grad)).count_nonzero()):  # DCP has set zeros itself
                        p.grad = torch.zeros_like(p)
                for group in self.groups:
                    if lr_of(group) is not None:
                        group["lr"] = group["lr"] * 0
                self.step(None, divisors)
            finally:
                for p in reversed(params):
                    p.detach().copy_(copies.pop())  # gone before the slots come
                for p, grad in zip(everyone, grads, strict=True):
                    p.grad = grad
                for group, before in zip(self.groups, groups, strict=True):  # some bases count their steps here
                    group.clear()
                    group.update(before)
            enter(params)
            for t in [value for p in params for value in state.get(p, {}).values()]:
                if isinstance(t, Tensor) and t.is_floating_point():  # 0/0, where a float16 eps is 0
                    local(t).nan_to_num_(0.0)
        except BaseException as error:  # state without slots would pass for that of steps that counted
            state.clear()
            state.update(kept)
            if not isinstance(error, Exception):
                raise

    # ------------------------------------------------------------------ in the middle of a step

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Hold off the steps of other threads. Waits for the end of one that is under way.

        Raises:
            RuntimeError: this thread is in a step: the caller would see the temporary parameters and lr.
        """
        with self.lock:
            if self.stepping:
                raise RuntimeError(
                    "this cannot be called during step() (from a hook on the base optimizer or a closure): parameters "
                    "and lr are temporarily changed. Call it after step(), or from a hook on the Mechanic"
                )
            yield

    def __getstate__(self) -> dict[str, Any]:
        # torch copies an optimizer without its hooks
        return {**{name: value for name, value in vars(self).items() if name != "lock"}, "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())


def _values(grad: Tensor) -> Tensor:
    return grad._values() if grad.is_sparse else grad


def evaluate(closure: Closure | None, params: Callable[[], list[Tensor]]) -> tuple[Any, Closure | None]:
    """Call the closure.

    Returns:
        the loss, and a closure for the base. Its first call returns this loss without computing it again, unless the
        base has first moved the parameters or dropped their gradients (as sharpness-aware ones do).
    """
    if closure is None:
        return None, None
    compute = torch.enable_grad()(closure)

    def marks() -> list[tuple[int, bool]]:
        return [(p._version, p.grad is None) for p in params()]

    loss = compute()
    known = [marks()]
    return loss, lambda: loss if known and known.pop() == marks() else compute()


def uninterrupted(work: Callable[[], None]) -> None:
    """Call `work`. Signals that Python handles wait until it returns; a second Ctrl-C does not."""
    handlers: dict[int, Any] = {}
    came: list[tuple[int, Any]] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and any(number == before for before, _ in came):
            came.clear()
            handlers[number](number, frame)
        else:
            came.append((number, frame))

    def put_back() -> None:  # a second call does nothing
        for caught, handler in handlers.items():
            if signal.getsignal(caught) == note:  # else the step itself has set another
                signal.signal(caught, handler)

    try:
        with suppress(ValueError):  # of a thread that gets no signals
            for number in signal.valid_signals():
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, note)
        work()
        put_back()
    except BaseException:
        put_back()
        raise
    finally:
        for caught, frame in came:
            handlers[caught](caught, frame)
