"""x_ref and Δ: where they lie, in which dtype, and which parameters take part in a step.

Both are stored in the base optimizer's ``state[p]``, so that they travel and shard like its own state,
in the shape and strides of p and in float32 (float64 for float64 parameters): for bfloat16 parameters
they are the master weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REF = "mechanic_ref"
DELTA = "mechanic_delta"


@dataclass
class Slot:
    """One parameter in one step."""

    param: Tensor  # x
    grad: Tensor | None  # g_t; None: the parameter sits this step out
    sign: float  # -1 where the group maximizes: h is about the objective that is minimised
    index: int  # which learned scale
    ref: Tensor  # x_ref, shape of param
    delta: Tensor | None  # Δ, shape of param; None: recomputed as (x - x_ref) / S
    entering: bool = False  # x_ref was taken in this step, Δ is 0
    x: Tensor | None = None  # x_t, where Δ is recomputed: the base step overwrites the parameter


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of x_ref and Δ for a parameter of `dtype`: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def slots(
    param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any], *, store_delta: bool, per_group: bool
) -> Iterator[Slot]:
    """Every parameter that has a gradient, or has had one and sits this step out.

    A parameter gets x_ref, its value of that moment, and Δ = 0 with its first gradient.
    They are not put into `state` here: many optimizers take an empty ``state[p]`` for "first step".
    """
    for i, group in enumerate(param_groups):
        sign = -1.0 if group.get("maximize") else 1.0
        for p in group["params"]:
            ref = state.get(p, {}).get(REF)
            if p.grad is None and ref is None:
                continue
            entering = ref is None
            if entering:
                ref = p.detach().to(wide(p.dtype), copy=True)
                delta = torch.zeros_like(ref) if store_delta else None
            else:
                delta = state[p].get(DELTA)
            yield Slot(p, p.grad, sign, i if per_group else 0, ref, delta, entering)
