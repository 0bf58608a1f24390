"""The two passes over memory: measure (the sums that h needs) and move (Δ += u, x = x_ref + S·Δ).

Both go through the elements in cache-sized blocks. A block is worked on in the dtype of x_ref (float32,
or float64 for float64 parameters), and block sums are added up in the dtype of the tuner (float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manic.storage import Slot, local
from manic.tuner import Sums

# The first five columns of the sums are what one block yields; the others come from elsewhere.
GRAD_SQ, X_SQ, ENTERED_SQ, NUMEL = map(Sums._fields.index, ("grad_sq", "x_sq", "entered_sq", "numel"))

BLOCK = 128 * 1024  # elements: some float32 blocks fit in a core's L2 cache, and a float32 sum keeps its digits


def measure(slots: Sequence[Slot], scales: Tensor) -> Tensor:
    """One pass over x, g, Δ and x_ref: the sums of every learned scale.

    An element that does not stand at x_ref + S·Δ was moved by somebody else (an edit, or it sat out while S
    changed): its x_ref is shifted so that x stays. Where Δ is recomputed an edit cannot be told from an
    update; there x_t is noted for :func:`move`.

    Args:
        slots: the parameters with a gradient.
        scales: [k], S of each learned scale as of the last :func:`move`.

    Returns:
        [k, 8], columns as in :class:`manic.tuner.Sums`, dtype and device of `scales`. The last one, ‖u_{t-1}‖², is
        for the caller to fill in: :func:`move` knew it.
    """
    parts: dict[tuple[int, bool, torch.device, torch.dtype], list[Tensor]] = {}
    for slot in slots:
        key = (slot.index, slot.entering, slot.ref.device, slot.ref.dtype)
        parts.setdefault(key, []).extend(_measure(slot, _like(scales[slot.index], slot.ref)))

    sums = scales.new_zeros(len(scales), len(Sums._fields))
    for (index, entering, _, _), values in parts.items():
        if values:
            row = torch.stack(values).to(scales.dtype).view(-1, 5).sum(0).to(scales.device)
            sums[index, :5] += row
            if entering:
                sums[index, ENTERED_SQ] += row[X_SQ]
    for slot in slots:
        sums[slot.index, NUMEL] += local(slot.param).numel()
    return sums


def _measure(slot: Slot, scale: Tensor) -> Iterator[Tensor]:
    """Block after block: <Δ,g>, <Δ,x>, ‖g‖², ‖x‖², ‖Δ‖², 0-d each."""
    assert slot.grad is not None
    if slot.delta is None:
        slot.x = slot.param.clone()
    dense = None if slot.grad.is_sparse else slot.grad
    zero = scale.new_zeros(())
    for p, g, ref, delta in _blocks(slot.param, dense, slot.ref, slot.delta):
        x = p.to(ref.dtype)
        if delta is None:
            delta = _recomputed(x, ref, scale)
        else:
            shifted = x != _placed(ref, delta, scale, p.dtype)
            ref.copy_(torch.where(shifted, x - delta * scale, ref))
        if g is None:
            yield from (zero, _dot(delta, x), zero, _dot(x, x), _dot(delta, delta))
        else:
            g = g.to(ref.dtype)
            yield from (slot.sign * _dot(delta, g), _dot(delta, x), _dot(g, g), _dot(x, x), _dot(delta, delta))
    if slot.grad.is_sparse:  # the rows that it stores add to <Δ,g> and ‖g‖²
        grad = slot.grad.coalesce()
        rows = tuple(grad.indices())
        delta = slot.delta[rows] if slot.delta is not None else _recomputed(slot.param[rows], slot.ref[rows], scale)
        for g, d in _blocks(grad.values(), delta):
            g = g.to(d.dtype)
            yield from (slot.sign * _dot(d, g), zero, _dot(g, g), zero, zero)


def move(slots: Sequence[Slot], before: Tensor, after: Tensor, ok: Tensor) -> Tensor:
    """One pass over x, Δ and x_ref after the base step: Δ_{t+1} = Δ_t + u_t, x_{t+1} = x_ref + S_{t+1}·Δ_{t+1}.

    What the base did is read off the parameters: u_t = x - x_t, and x_t is where the last :func:`move` put it.

    Args:
        slots: the parameters with a gradient, as :func:`measure` left them.
        before, after: [k], S_t and S_{t+1} of each learned scale.
        ok: 0-d bool. False undoes the step: Δ and x become what they were.

    Returns:
        [k], ‖u_t‖² over the parameters whose Δ is recomputed.
    """
    update_sq = torch.zeros_like(after)
    for slot in slots:
        here, there = _like(before[slot.index], slot.ref), _like(after[slot.index], slot.ref)
        counts = ok.to(slot.ref.device)
        for p, ref, delta, x in _blocks(slot.param, slot.ref, slot.delta, slot.x):
            if delta is not None:
                x = _placed(ref, delta, here, p.dtype)
            # An element whose update is not finite (0/0 in the base, say) stays where it is.
            update = torch.where(counts, (p.to(ref.dtype) - x).nan_to_num_(0.0, 0.0, 0.0), 0)
            if delta is None:
                delta = _recomputed(x, ref, here)
                update_sq[slot.index] += _dot(update, update).to(update_sq)
            delta += update
            p.copy_(torch.where(counts, _placed(ref, delta, there, ref.dtype), x))
    return update_sq


def hold(slots: Sequence[Slot], before: Tensor, after: Tensor) -> None:
    """Keep x and the recomputed Δ of parameters that sit out while S changes: x_ref moves instead."""
    for slot in slots:
        ratio = _like(after[slot.index], slot.ref) / _like(before[slot.index], slot.ref)
        for p, ref in _blocks(slot.param, slot.ref):
            ref.copy_(torch.where(ratio.isfinite(), p - ratio * (p - ref), p))


def _placed(ref: Tensor, delta: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x_ref + S·Δ as a parameter of `dtype` holds it, in the dtype of `ref`."""
    return (ref + delta * scale).to(dtype).to(ref.dtype)


def _recomputed(x: Tensor, ref: Tensor, scale: Tensor) -> Tensor:
    """Δ = (x - x_ref) / S, and 0 where S is 0."""
    return torch.where(scale > 0, (x - ref) / scale, 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _like(scale: Tensor, ref: Tensor) -> Tensor:
    """A 0-d tensor on the device of `ref` and in its (real) dtype."""
    return scale.to(device=ref.device, dtype=ref.dtype.to_real())


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors of one shape (or None) as tuples of views of at most BLOCK elements; complex ones as real pairs.

    In memory order where all of them are dense and laid out alike (channels_last among them), else cut along
    the longest dimension until the pieces are small.
    """
    views = [None if t is None else _real(local(t.detach())) for t in tensors]
    first = views[0]
    assert first is not None
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    flat = [None if t is None else t.permute(order) for t in views]
    if all(t is None or t.is_contiguous() for t in flat):
        flat = [None if t is None else t.view(-1) for t in flat]
    yield from _cut(flat)


def _cut(views: list[Any]) -> Iterator[tuple[Any, ...]]:
    first = views[0]
    if first.numel() > BLOCK:
        longest = max(range(first.dim()), key=lambda d: first.shape[d])
        size = BLOCK if first.dim() == 1 else -(-first.shape[longest] // 2)
        pieces = [None if t is None else t.split(size, longest) for t in views]
        for i in range(-(-first.shape[longest] // size)):
            yield from _cut([None if piece is None else piece[i] for piece in pieces])
    elif first.numel() > 0:
        yield tuple(views)
