"""What is kept per parameter, in which dtype, and which parameters take part in a step.

Each parameter has one slot in the base optimizer's ``state[p]``, so that it travels and shards like the base's own
state: ``mechanic_ref`` (x_ref) in "scale_free", ``mechanic_delta`` (Δ) in "paper". The slot has the shape and strides
of p, and is float32 or better. Parameters in bfloat16 and float16 also have ``mechanic_rest``: the digits of x that p
cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

REF = "mechanic_ref"
DELTA = "mechanic_delta"
REST = "mechanic_rest"
KEPT = (REF, DELTA, REST)  # every key of ours in state[p]
SLOT = {"scale_free": REF, "paper": DELTA}  # the slot, by variant
RESTS = {torch.bfloat16: torch.int16, torch.float16: torch.float32}  # dtype of the rest, by that of the parameter

LOOKS, DTYPE = attrgetter("dtype", "device", "shape"), attrgetter("dtype")

# Where the elements of a parameter are: all here (None), or a DTensor's mesh and whether each of its dimensions cuts.
Layout = tuple[Any, tuple[bool, ...]] | None


@dataclass
class ParamState:
    """One parameter in one step."""

    param: Tensor  # x, or its leading digits
    grad: Tensor | None  # g_t, with the strides that autograd gave it; may be sparse
    sign: float  # -1 where the group maximizes: h is about the objective that is minimised
    index: int  # which learned scale
    slot: Tensor  # x_ref or Δ, shape of param
    rest: Tensor | None = None  # the digits of x that param cannot hold, shape of param; None: it holds all
    layout: Layout = None  # where the elements of param, grad, slot and rest are
    entering: bool = False  # the slot was made in this step: d is 0
    new: bool = False  # slot or rest are not in the base's state yet
    member: float = 0.0  # a whole number below 2**32 that stands for this parameter's place among the groups


def lr_of(group: Mapping[str, Any], default: Any = None) -> Any:
    """The lr of a param group; `default` where it has none, or None, as Adafactor with its own step sizes."""
    lr = group.get("lr")
    return default if lr is None else lr


def layout_of(p: Any) -> Layout:
    """The layout of a parameter. One collective adds up the sums of all parameters that share a layout."""
    if not hasattr(p, "placements"):
        return None
    return p.device_mesh, tuple(placement.is_shard() for placement in p.placements)


def shards(layout: Layout) -> int:
    """How many processes share the elements of one parameter."""
    if layout is None:
        return 1
    mesh, cuts = layout
    return math.prod(mesh.size(i) for i, cut in enumerate(cuts) if cut)


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor: a view."""
    return t.to_local() if hasattr(t, "to_local") else t


def corner(t: Tensor) -> Tensor:
    """The first two elements of this process's part in each dimension: a view."""
    return local(t).detach()[(slice(2),) * t.dim()]


def column(states: Sequence[ParamState], name: str) -> list[Tensor]:
    """This process's parts of one field ("param", "grad", "slot", …) of parameters of one layout."""
    tensors = [getattr(state, name) for state in states]
    return tensors if states[0].layout is None else [local(t) for t in tensors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the slot of a parameter of `dtype`: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def entry(p: Tensor, variant: str) -> dict[str, Tensor]:
    """What `state[p]` holds of ours where d is 0: x_ref is x of this moment, or Δ is 0."""
    ref = p.detach().to(wide(p.dtype), copy=True)
    kept = {SLOT[variant]: ref if variant == "scale_free" else ref.zero_()}
    if p.dtype in RESTS:
        kept[REST] = torch.zeros_like(p.detach(), dtype=RESTS[p.dtype])
    return kept


def join(stored: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in `dtype` from the parameter's elements and their rest. May be `stored` itself."""
    if rest is None:
        return stored.to(dtype)
    if rest.dtype == torch.float32:
        return stored.float() + rest
    # The magnitude's bits as an integer. An edit may have put a 0 beside a negative rest.
    bits = (stored.view(torch.int16) & 0x7FFF).to(torch.int32).bitwise_left_shift_(16).add_(rest).clamp_(min=0)
    return bits.view(torch.float32).copysign_(stored)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The inverse of ``join()``: the nearest numbers in `dtype`, and the rest where there is one."""
    if dtype not in RESTS:
        return x, None
    if dtype == torch.float16:
        stored = x.to(dtype)
        return stored, (x - stored).nan_to_num_(0.0, 0.0, 0.0)
    bits = x.abs().view(torch.int32).clamp_(max=0x7FC00000)  # one NaN for all: others would wrap around
    high = (bits + 0x8000).bitwise_and_(-0x10000)
    rest = bits.sub_(high).to(torch.int16)
    del bits  # a step is to hold little at a time
    return high.view(torch.float32).copysign_(x).to(dtype), rest


def collect(
    param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any], variant: str, *, per_group: bool
) -> Iterator[ParamState]:
    """Every parameter that has a gradient.

    A parameter gets its slot with its first gradient. The slot is not put into `state` here: many optimizers take an
    empty ``state[p]`` for "first step".
    """
    place = 0
    for i, group in enumerate(param_groups):
        sign = -1.0 if group.get("maximize") else 1.0
        for p in group["params"]:
            place += 1
            grad = p.grad
            if grad is None:
                continue
            kept = state.get(p, {})
            entering = SLOT[variant] not in kept
            if entering:
                kept = entry(p, variant)
            slot = kept[SLOT[variant]].to(wide(p.dtype))  # the parameter may have changed its dtype
            if slot.shape != p.shape:
                raise ValueError(
                    f"a parameter of param group {i} has become {tuple(p.shape)}, the Mechanic keeps "
                    f"{tuple(slot.shape)} for it: to begin it anew, take its state out, optimizer.state.pop(parameter)"
                )
            if getattr(grad, "placements", None) != getattr(p, "placements", None):
                grad = grad.redistribute(placements=p.placements)
            rest, needed = kept.get(REST), RESTS.get(p.dtype)
            if needed is None:
                rest = None
            elif rest is None or rest.dtype != needed:
                rest = torch.zeros_like(p.detach(), dtype=needed)
            index, member = (i if per_group else 0), _member(place)
            new = entering or slot is not kept[SLOT[variant]] or rest is not kept.get(REST)
            yield ParamState(p, grad, sign, index, slot, rest, layout_of(p), entering, new, member)


def _member(place: int) -> float:
    """A number for the parameter at a place, such that no two sets of places have the same sum."""
    return float(int.from_bytes(blake2b(place.to_bytes(8, "little"), digest_size=4).digest(), "little"))


def signature(params: list[Tensor], grads: list[Tensor | None], state: Mapping[Tensor, Any]) -> list[Any] | None:
    """All that decides how parameters, gradients and slots are taken together, to be compared with that of another
    step. None: it cannot be told. (Loops in C, since a step waits for this.)"""
    if not {Tensor, torch.nn.Parameter}.issuperset(map(type, params)):
        return None
    there = [g for g in grads if g is not None]
    strided = [g for g in there if g.layout is torch.strided]
    looks = [*map(LOOKS, params)]
    entries = [*map(state.get, params)]
    kept = [[one and id(one.get(key)) for one in entries] for key in (REF, DELTA)]
    if not RESTS.keys().isdisjoint(look[0] for look in looks):
        kept.append([one and id(one.get(REST)) for one in entries])
    kinds = [*map(DTYPE, strided)], [*map(Tensor.stride, strided)], [*map(Tensor.is_neg, strided)]
    others = [(g is None) or g.layout for g in grads] if len(strided) < len(grads) else []
    return [[*map(id, params)], looks, [*map(Tensor.stride, params)], kinds, others, kept]
