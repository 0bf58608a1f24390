"""The LR scheduler inside a Mechanic, and how ``unwrap()`` multiplies every lr with the scale."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

IN_A_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # the last three are OneCycleLR's and SWALR's
PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")  # lists; of all schedulers, CyclicLR and ReduceLROnPlateau
OF_OTHERS = ("_schedulers", "lr_lambdas", "_scale_fn_custom")  # attributes of other objects, each in a dict


class Schedule:
    """Step the LR scheduler that was built on the base optimizer, and notice if something else steps it too.

    Args:
        scheduler: an LR scheduler built on `base`, or None.
        base: the base optimizer.

    Raises:
        TypeError: it is no LR scheduler, or one that needs a metric in every step.
        ValueError: it was built on another optimizer.
    """

    def __init__(self, scheduler: LRScheduler | None, base: Optimizer) -> None:
        self.scheduler = scheduler
        self.left_out: dict[str, str] = {}  # attributes that its last state lacks, and their types
        self._left: tuple[Any, list[Any]] | None = None  # its epoch, and the lrs, after our last step
        if scheduler is None:
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric in every step, which Mechanic does not have: leave it out here, "
                "build it on the optimizer or the Mechanic, and step it yourself"
            )
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}")
        if scheduler.optimizer is not base:
            raise ValueError(
                f"the {type(scheduler).__name__} was built on another optimizer: build it on the "
                f"{type(base).__name__} that you wrap, before you wrap it"
            )

    @property
    def name(self) -> str | None:
        """Its class, and the classes of those that it is made of; None: there is no scheduler."""
        return None if self.scheduler is None else name_of(self.scheduler)

    @property
    def members(self) -> list[Any]:
        """All whose attributes a load replaces: the scheduler, those that it is made of, and the objects that they
        call."""
        if self.scheduler is None:
            return []
        found: list[Any] = list(parts(self.scheduler))
        called = [vars(part).get(name) for part in found for name in OF_OTHERS[1:]]
        objects = [one for value in called for one in (value if isinstance(value, list) else [value])]
        return [*found, *(one for one in objects if hasattr(one, "__dict__"))]

    def state(self) -> dict[str, Any] | None:
        """A copy of what ``weights_only`` admits of its state dict; None: there is no scheduler.

        The rest (a lock, a model or a trainer that the schedule holds) stays out, and loading leaves it as it is.
        """
        if self.scheduler is None:
            return None
        self.left_out = {}
        return _attributes(self.scheduler.state_dict(), self.left_out)

    def gaps(self) -> Iterator[str]:
        """A sentence on each attribute that its last state lacks."""
        for name, kind in self.left_out.items():
            yield (
                f"the checkpoint leaves out {name!r} of the {self.name}, a {kind}, which torch.load(weights_only=True) "
                "does not read. If the schedule needs it to go on, keep it in numbers, strings, lists, dicts or tensors"
            )

    @disable_dynamo
    def step(self, groups: Sequence[dict[str, Any]], tell: Callable[[str], None]) -> None:
        """Step it. Tell the user if something else has stepped it too, or has set the lr."""
        if self.scheduler is None:
            return
        name, (epoch, lrs), left = type(self.scheduler).__name__, self._where(groups), self._left
        self.scheduler.step()
        self._left = self._where(groups)
        if left is not None and epoch != left[0]:
            tell(
                f"something else also steps the {name} that you passed in: remove that call, since mechanic.step() "
                "steps it. If a framework steps it, build it on the Mechanic instead, and pass none in"
            )
        elif left is not None and lrs != left[1]:
            tell(
                f"something else has set the lr, which the {name} that you passed in sets in every step. If that is "
                "another LR scheduler, remove one of them (the Trainer of Transformers builds its own)"
            )

    def forget(self) -> None:
        """Compare nothing with the step before."""
        self._left = None

    def load(self, state: dict[str, Any]) -> None:
        """Load a copy of a state, and check that the scheduler can compute its lrs from it."""
        assert self.scheduler is not None
        live = self.scheduler.state_dict()  # what the state has left out stays as it is
        self.scheduler.load_state_dict({**live, **copy.deepcopy(state)})
        _try_out(self.scheduler)
        self.scheduler.load_state_dict({**live, **copy.deepcopy(state)})  # a function may count its calls

    def _where(self, groups: Sequence[dict[str, Any]]) -> tuple[Any, list[Any]]:
        """Its epoch, and the lr of every group: of a tensor, its version, since reading it may wait for a device."""
        lrs = [group.get("lr") for group in groups]
        marks = [(id(lr), lr._version) if isinstance(lr, Tensor) else lr for lr in lrs]
        return getattr(self.scheduler, "last_epoch", None), marks

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_left": None}  # it holds identities


def _attributes(values: dict[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    """A copy of those attributes that ``weights_only`` admits. The others go to `left_out`, with their types."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        try:
            if name not in OF_OTHERS or value is None:
                kept[name] = plain(value)
            elif isinstance(value, dict):
                kept[name] = _attributes(value, left_out)
            else:
                kept[name] = [one if one is None else _attributes(one, left_out) for one in value]
        except (TypeError, AttributeError, RecursionError):
            left_out[name] = type(value).__name__
    return kept


def plain(value: Any) -> Any:
    """A copy in the types that ``torch.load(weights_only=True)`` admits: numpy's numbers and fractions as Python's.

    Raises:
        TypeError: there is another type in it.
    """
    kind: Any = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if kind in (list, tuple, set):
        return kind(map(plain, value))
    if kind in (dict, OrderedDict, Counter):
        return kind({plain(key): plain(one) for key, one in value.items()})
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if kind in torch.serialization.get_safe_globals():
        return copy.deepcopy(value)
    raise TypeError(f"weights_only does not admit {kind.__name__}")


def _try_out(scheduler: LRScheduler) -> None:
    """Let a scheduler compute its lrs, which raises if its state is inconsistent. Changes nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises users against get_lr()
        for part in parts(scheduler):
            if type(part).get_lr is LRScheduler.get_lr:  # a scheduler that is made of others has none
                continue
            dicts = [vars(part), *part.optimizer.param_groups]  # OneCycleLR sets the momentum
            before = [dict(values) for values in dicts]
            part.get_lr()
            for values, old in zip(dicts, before, strict=True):
                values.clear()
                values.update(old)


def parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """A scheduler, and those that it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from parts(inner)


def name_of(scheduler: LRScheduler) -> str:
    """Its class, with those that it is made of: "SequentialLR(LinearLR, CosineAnnealingLR)"."""
    inner = ", ".join(map(name_of, getattr(scheduler, "_schedulers", None) or ()))
    return type(scheduler).__name__ + (f"({inner})" if inner else "")


def fold(groups: Sequence[dict[str, Any]], schedulers: Sequence[LRScheduler], scales: Sequence[float]) -> None:
    """Multiply the lrs of each param group, and those that schedulers keep for it, with its scale.

    Args:
        groups: the param groups of the optimizer.
        schedulers: torch's own, or others that keep lrs in ``base_lrs`` and the groups alone.
        scales: one for each group.

    Raises:
        ValueError: a scheduler has one lr for all groups, and their scales differ. Nothing is changed.
    """
    found = {id(part): part for scheduler in schedulers for part in parts(scheduler)}.values()
    shared = [(part, name) for part in found for name in _shared(part) if getattr(part, name)]
    if shared and len(set(scales)) > 1:
        part, name = shared[0]
        raise ValueError(
            f"{name} = {getattr(part, name)!r} of {type(part).__name__} is one lr for all groups, and their scales "
            f"differ ({', '.join(f'{scale:.3g}' for scale in scales)}): set it to 0"
        )
    for group, scale in zip(groups, scales, strict=True):
        for name in group.keys() & set(IN_A_GROUP):
            group[name] = group[name] * scale  # a new tensor: groups may share the old one
    for part in found:
        for name in vars(part).keys() & set(PER_GROUP):
            values = getattr(part, name)
            # A scheduler does not know groups that were added after it was built.
            setattr(part, name, [lr * scale for lr, scale in zip(values, scales, strict=False)])
    for part, name in shared:
        setattr(part, name, getattr(part, name) * scales[0])


def differences(scheduler: LRScheduler, state: dict[str, Any]) -> Iterator[str]:
    """The constructor arguments that a loaded state will replace: "T_max = 100 replaces 200"."""
    here = scheduler.state_dict()
    for name in sorted(inspect.signature(type(scheduler)).parameters.keys() - {"last_epoch", "schedulers"}):
        key = f"_{name}" if f"_{name}" in here else name  # SequentialLR's _milestones
        theirs, ours = state.get(key), here.get(key)
        if theirs is not None and ours is not None and _differ(theirs, ours):
            yield f"{name} = {theirs!r} replaces {ours!r} in {type(scheduler).__name__}"
    for inner, saved in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        yield from differences(inner, saved)


def _differ(a: Any, b: Any) -> bool:
    """Whether two values differ; False where that cannot be told (there are tensors in them)."""
    try:
        return bool(a != b)
    except Exception:
        return False


def _shared(scheduler: LRScheduler) -> Iterator[str]:
    """Its attributes that are one lr for all groups."""
    if hasattr(scheduler, "eta_min"):
        yield "eta_min"
    if isinstance(scheduler, ReduceLROnPlateau):
        yield from ("default_min_lr", "eps")
