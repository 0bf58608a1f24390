"""What a checkpoint says of its Mechanic besides tensors: the only place where that is written and read.

Layout (format 3): that of ``Optimizer.state_dict()``; in every param group ``mechanic_state``, ``mechanic_step``,
``mechanic_options`` and, with an inner scheduler, ``mechanic_scheduler``; in the state of every parameter that has
stepped what ``manic.parameters.entry()`` makes. The options are a dict in a tuple, which torch.distributed.checkpoint
stores whole. The scheduler's state is a file of ``torch.save``, as bytes: ``get_state_dict`` takes all else apart,
makes strings of a dict's keys (MultiStepLR's are ints), a dict of a Counter, and refuses a set.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from manic.tuner import Options, TunerState

FORMAT = 3
TENSORS = ("mechanic_state", "mechanic_step")


@dataclass(frozen=True)
class Record:
    """The facts about a Mechanic that travel in every checkpoint."""

    base: str  # name of the base's class
    scheduler: str | None  # class of the inner scheduler, and of those that it is made of
    base_lr: float  # the lr that "scale_free" divides out; 0: not known yet, since every lr is 0
    lazy: bool  # the base creates its state in its first step
    frozen: bool
    sweeps: str | None  # which took the steps: the same ones go on bit for bit; None: not known
    options: Options

    @property
    def unit(self) -> float:
        """The base lr that is divided out; 1 while it is not known."""
        return self.base_lr or 1.0

    def written(self) -> tuple[dict[str, Any]]:
        """In types that ``weights_only`` admits: the value of ``mechanic_options``."""
        facts = {name: value for name, value in vars(self).items() if name != "options"}
        return ({"format": FORMAT, **facts, **asdict(self.options)},)


def read(groups: Sequence[Mapping[str, Any]]) -> tuple[Record, dict[str, Any] | None]:
    """What the param groups of a checkpoint say, and the state of its scheduler.

    Raises:
        ValueError: something is missing, broken, or of another format.
    """
    for i, group in enumerate(groups):
        for key in ("mechanic_options", *TENSORS):
            if key not in group:
                raise ValueError(f"param group {i} of the checkpoint has no {key!r}")
    saved = in_a_tuple(groups[0]["mechanic_options"], "options are").copy()
    found = saved.pop("format", None)
    if not isinstance(found, int) or found != FORMAT:
        raise ValueError(
            f"the checkpoint has format {found!r}, and this version of manic reads format {FORMAT} and older ones: "
            "upgrade manic"
        )
    try:
        base, scheduler = saved.pop("base"), saved.pop("scheduler")
        base_lr, lazy, frozen = float(saved.pop("base_lr")), saved.pop("lazy"), saved.pop("frozen")
        sweeps = saved.pop("sweeps")
        if not isinstance(lazy, bool) or not isinstance(frozen, bool):
            raise TypeError(f"lazy = {lazy!r} and frozen = {frozen!r} must be bools")
        if not isinstance(sweeps, str | None):
            raise TypeError(f"sweeps = {sweeps!r} must be a string, or None")
        if not 0 <= base_lr < math.inf:
            raise ValueError(f"base_lr = {base_lr} must be >= 0 and finite")
        options = Options(**saved)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's options are broken: {error}") from error
    for i, group in enumerate(groups):
        _check_tensors(i, group, groups[0], options)
    schedule = None
    if scheduler is not None:
        if "mechanic_scheduler" not in groups[0]:
            raise ValueError(f"the checkpoint has a {scheduler}, and no 'mechanic_scheduler'")
        schedule = opened(groups[0]["mechanic_scheduler"])
    return Record(base, scheduler, base_lr, lazy, frozen, sweeps, options), schedule


def _check_tensors(i: int, group: Mapping[str, Any], first: Mapping[str, Any], options: Options) -> None:
    for key, expected in zip(TENSORS, ((TunerState.size(len(options.memories)),), ()), strict=True):
        value = group[key]
        fits = isinstance(value, Tensor) and value.shape == expected and is_plain(value)
        if not fits or not value.is_floating_point():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} of param group {i} must be a float tensor of shape {expected}, got {got}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key} of param group {i} has values that are not finite: the checkpoint is damaged")
        if not options.per_group and not torch.equal(value, first[key].to(value)):
            raise ValueError(f"{key} of param group {i} differs from that of group 0, and they share one scale")


def sealed(state: dict[str, Any]) -> bytes:
    """The state of a scheduler, in types that ``weights_only`` admits, as one value: of ``mechanic_scheduler``."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def opened(value: Any) -> dict[str, Any]:
    """The inverse of ``sealed()``; at first format 3 had a dict in a tuple there.

    Raises:
        ValueError: it is broken.
    """
    if not isinstance(value, bytes):
        return in_a_tuple(value, "state of the scheduler is")
    try:
        state = torch.load(io.BytesIO(value), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError("the checkpoint's state of the scheduler is broken: it is no file of torch.save") from error
    return in_a_tuple((state,), "state of the scheduler is")


def in_a_tuple(value: Any, what: str) -> dict[str, Any]:
    """A dict that was put into a tuple."""
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], dict):
        return value[0]
    raise ValueError(f"the checkpoint's {what} broken: {value!r}")


def is_plain(value: Tensor) -> bool:
    """Whether a tensor has its values in memory, one after the other."""
    return value.layout is torch.strided and not value.is_meta
