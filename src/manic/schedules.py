"""Folding a scale into everything that an optimizer and its LR schedulers hold in units of the lr."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

IN_A_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # the last three are OneCycleLR's and SWALR's
PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")  # lists; of all schedulers, CyclicLR and ReduceLROnPlateau


def parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """A scheduler and those that it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from parts(inner)


def name_of(scheduler: LRScheduler) -> str:
    """Its class, and the classes of those that it is made of: "SequentialLR(LinearLR, CosineAnnealingLR)"."""
    inner = ", ".join(map(name_of, getattr(scheduler, "_schedulers", None) or ()))
    return type(scheduler).__name__ + (f"({inner})" if inner else "")


def fold(groups: Sequence[dict[str, Any]], schedulers: Sequence[LRScheduler], scales: Sequence[float]) -> None:
    """Multiply every lr of each param group, and those that the schedulers keep for it, with its scale.

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
            group[name] = group[name] * scale  # anew: groups may share a tensor
    for part in found:
        for name in vars(part).keys() & set(PER_GROUP):
            values = getattr(part, name)
            # A scheduler may not know of the groups that were added after it was built.
            setattr(part, name, [lr * scale for lr, scale in zip(values, scales, strict=False)])
    for part, name in shared:
        setattr(part, name, getattr(part, name) * scales[0])


def differences(scheduler: LRScheduler, state: dict[str, Any]) -> Iterator[str]:
    """What a scheduler was built with, and will lose to a state that it loads: "T_max = 100 replaces 200"."""
    here = scheduler.state_dict()
    for name in sorted(inspect.signature(type(scheduler)).parameters.keys() - {"last_epoch", "schedulers"}):
        key = f"_{name}" if f"_{name}" in here else name  # SequentialLR's _milestones
        theirs, ours = state.get(key), here.get(key)
        if theirs is not None and ours is not None and not isinstance(ours, Tensor) and theirs != ours:
            yield f"{name} = {theirs!r} replaces {ours!r} in {type(scheduler).__name__}"
    for inner, saved in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        yield from differences(inner, saved)


def _shared(scheduler: LRScheduler) -> Iterator[str]:
    """What it holds in units of the lr for all groups together."""
    if hasattr(scheduler, "eta_min"):
        yield "eta_min"
    if isinstance(scheduler, ReduceLROnPlateau):
        yield from ("default_min_lr", "eps")
