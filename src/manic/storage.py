"""x_ref and Δ: where they lie, in which dtype, and which parameters take part in a step.

Both are stored in the base optimizer's ``state[p]``, so that they travel and shard like its own state,
in the shape and strides of p and in float32 (float64 for float64 parameters): for bfloat16 parameters
they are the master weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    layout: Layout = None  # where the elements of param, grad, ref and delta are
    entering: bool = False  # x_ref was taken in this step, Δ is 0
    x: Tensor | None = None  # x_t, where Δ is recomputed: the base step overwrites the parameter


# Where the elements of a parameter are: all here (None), or a DTensor's mesh and whether each of its dimensions cuts.
Layout = tuple[Any, tuple[bool, ...]] | None


def layout_of(p: Any) -> Layout:
    """The layout of a parameter: sums over parameters of one layout are completed by one collective."""
    if not hasattr(p, "placements"):
        return None
    return p.device_mesh, tuple(placement.is_shard() for placement in p.placements)


def shards(layout: Layout) -> int:
    """How many processes a parameter's elements are cut over."""
    if layout is None:
        return 1
    mesh, cuts = layout
    return math.prod(mesh.size(i) for i, cut in enumerate(cuts) if cut)


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor: a view."""
    return t.to_local() if hasattr(t, "to_local") else t


def column(slots: Sequence[Slot], name: str) -> list[Tensor]:
    """This process's parts of one field ("param", "grad", "ref", "delta") of slots of one layout."""
    tensors = [getattr(slot, name) for slot in slots]
    return tensors if slots[0].layout is None else [local(t) for t in tensors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of x_ref and Δ for a parameter of `dtype`: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def entry(p: Tensor, *, store_delta: bool) -> tuple[Tensor, Tensor | None]:
    """x_ref, p's value of this moment, and Δ = 0 or, where it is recomputed, None."""
    ref = p.detach().to(wide(p.dtype), copy=True)
    return ref, torch.zeros_like(ref) if store_delta else None


def slots(
    param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any], *, store_delta: bool, per_group: bool
) -> Iterator[Slot]:
    """Every parameter that has a gradient, or has had one and sits this step out.

    A parameter gets x_ref and Δ with its first gradient. They are not put into `state` here: many optimizers
    take an empty ``state[p]`` for "first step".
    """
    for i, group in enumerate(param_groups):
        sign = -1.0 if group.get("maximize") else 1.0
        for p in group["params"]:
            ref = state.get(p, {}).get(REF)
            if p.grad is None and ref is None:
                continue
            entering = ref is None
            if entering:
                ref, delta = entry(p, store_delta=store_delta)
            elif ref.shape != p.shape:
                raise ValueError(
                    f"a parameter of param group {i} has become {tuple(p.shape)}, its x_ref is {tuple(ref.shape)}: "
                    "to begin it anew, take its state out, optimizer.state.pop(parameter)"
                )
            else:
                delta = state[p].get(DELTA)
            grad = p.grad
            if grad is not None and getattr(grad, "placements", None) != getattr(p, "placements", None):
                grad = grad.redistribute(placements=p.placements)
            yield Slot(p, grad, sign, i if per_group else 0, ref, delta, layout_of(p), entering)


def signature(params: list[Tensor], state: Mapping[Tensor, Any]) -> tuple[Any, ...] | None:
    """All that decides how the parameters, their gradients and their state are taken together, to be compared with
    that of another step. None: it cannot be told."""
    if not {Tensor, torch.nn.Parameter}.issuperset(map(type, params)):
        return None
    kept = [entries and (id(entries.get(REF)), id(entries.get(DELTA))) for entries in map(state.get, params)]
    grads = [
        g if g is None else (g.dtype, g.stride(), g.is_neg()) if g.layout is torch.strided else g.layout
        for g in [p.grad for p in params]
    ]
    return [*map(id, params)], [(p.dtype, p.device, p.shape, p.stride()) for p in params], grads, kept
