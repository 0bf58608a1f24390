"""The unit of updates: the base lr that "scale_free" divides out of every step of the base optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from manic.parameters import lr_of
from manic.tuner import TunerState

BOOST = 2.0**16  # of the lr of bfloat16 parameters in the base's step


def base_lr(groups: Sequence[Mapping[str, Any]]) -> float:
    """The largest lr of the param groups, that of the start of a schedule; 0 while all of them are 0."""
    lrs = [float(group.get("initial_lr", lr)) for group in groups if (lr := lr_of(group)) is not None]
    return max(lrs, default=1.0)


def boost(groups: Sequence[Mapping[str, Any]]) -> float:
    """The factor on the lr of the base's step: BOOST if some parameters are bfloat16 and none is float16, else 1.

    In bfloat16 x + u has 8 bits. They are those of u if u is large beside x. In float16 such a u would overflow.
    """
    dtypes = {p.dtype for group in groups for p in group["params"]}
    coarse = torch.bfloat16 in dtypes and torch.float16 not in dtypes
    return BOOST if coarse and any(lr_of(group) is not None for group in groups) else 1.0


def units(groups: Iterable[Mapping[str, Any]], unit: float) -> list[float]:
    """By what the base's update of each param group is divided: the unit, but 1 where there is no lr to divide."""
    return [1.0 if lr_of(group) is None else unit for group in groups]


def enlarge(groups: Iterable[Mapping[str, Any]], factor: float) -> None:
    """Convert the tuner's state ("scale_free") to updates `factor` times as large. Groups may share one state."""
    for flat in dict.fromkeys(group["mechanic_state"] for group in groups if "mechanic_state" in group):
        flat.copy_(TunerState.unpack(flat, 1).in_unit(factor).pack())


def expect(flat: torch.Tensor, groups: Iterable[Mapping[str, Any]], unit: float) -> None:
    """Raise the highest lr so far to that of new groups, so that the rule does not take it for a warm-up of the others.

    Args:
        flat: the ``mechanic_state`` that the new groups will share.
        groups: the new ones.
        unit: that is divided out.
    """
    peak = flat[TunerState.place("peak")]
    lrs = [abs(float(lr)) / unit for group in groups if (lr := lr_of(group)) is not None]
    if lrs and bool(peak > 0):
        peak.clamp_(min=max(lrs))
