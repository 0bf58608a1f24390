"""The sweeps in torch's own operations: for every kind of parameter, on every device.

They go through the elements in cache-sized pieces: stretches of a large tensor, or small tensors end to end. A piece is
worked on in the dtype of the slot (float32, or float64 for float64 parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manic.parameters import ParamState, column, join, local, split
from manic.sweeps.base import COLUMNS

end_to_end: Any = torch._utils._flatten_dense_tensors
apart: Any = torch._utils._unflatten_dense_tensors

PIECE = 64 * 1024  # elements: some float32 pieces fit in a core's L2 cache, and a float32 sum keeps its digits
SMALL = PIECE // 8  # elements up to which tensors are laid end to end, in copies
PACKED = PIECE // 2  # elements of such a piece: with those of the piece before it that is a megabyte of copies


class Piece(NamedTuple):
    """Elements of one tensor, or several small tensors end to end; complex numbers as pairs of real ones."""

    states: Sequence[ParamState]  # whose elements these are: more than one where small tensors lie end to end
    param: Tensor
    grad: Tensor | None  # None: sparse
    slot: Tensor
    copy: Tensor  # the parameter's elements at x_t
    rest: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.slot.dtype

    def targets(self, name: str) -> list[Tensor]:
        """Where what was worked out for one field is to be written."""
        return [getattr(self, name)] if len(self.states) == 1 else column(self.states, name)


class Write(NamedTuple):
    """What a move has worked out for one piece. To carry it out twice does no harm."""

    targets: list[Tensor]
    values: Any

    def carry_out(self) -> None:
        """Copy the values to their places."""
        torch._foreach_copy_(self.targets, self.values)


def put_aside(states: Sequence[ParamState]) -> None:
    """Copy x_t."""
    params = [local(state.param.detach()) for state in states]
    copies = []
    for state, param in zip(states, params, strict=True):
        if state.copy is None or state.copy.shape != param.shape or state.copy.dtype != param.dtype:
            state.copy = torch.empty_like(param)
        copies.append(state.copy)
    if params:
        torch._foreach_copy_(copies, params)


def measure(states: Sequence[ParamState], difference: bool) -> Tensor:
    """The sums of every piece of one group, and of the rows of a sparse gradient: float64 or float32 [pieces, 5]."""
    values: list[Tensor] = []
    for piece in pieces(states):
        values += _measure(piece, difference)
    first = states[0]
    none = local(first.slot).new_zeros(0, COLUMNS, dtype=torch.float32)
    found = torch.stack(values).view(-1, COLUMNS) if values else none
    if first.grad is not None and first.grad.is_sparse:
        found = torch.cat([found.double(), _measure_rows(first, difference)])
    return found


def _measure(piece: Piece, difference: bool) -> list[Tensor]:
    """<d,g>, <d,x>, ‖g‖², ‖x‖², ‖d‖²: 0-d each."""
    x = join(piece.param, piece.rest, piece.dtype)
    d = _row(x - piece.slot if difference else piece.slot)
    x = _row(x)
    delta_grad = grad_sq = d.new_zeros(())
    if piece.grad is not None:
        g = _row(piece.grad.to(piece.dtype))
        delta_grad, grad_sq = torch.dot(d, g), torch.dot(g, g)
    return [delta_grad, torch.dot(d, x), grad_sq, torch.dot(x, x), torch.dot(d, d)]


def _measure_rows(state: ParamState, difference: bool) -> Tensor:
    """What the rows that a sparse gradient stores add to <d,g> and ‖g‖²: [1, 5]."""
    grad = state.grad.coalesce()  # type: ignore[union-attr]
    rows = tuple(grad.indices())
    d = state.slot[rows]
    if difference:
        rest = None if state.rest is None else state.rest[rows]
        d = join(state.param.detach()[rows], rest, d.dtype) - d
    sums = d.new_zeros(1, COLUMNS, dtype=torch.float64)
    for g, part in _cut_up(grad.values(), d):
        g, part = _row(g.to(part.dtype)), _row(part)
        sums[0, 0] += torch.dot(part, g)
        sums[0, 2] += torch.dot(g, g)
    return sums


def update(piece: Piece) -> Tensor:
    """u, and 0 where it is not finite, in the dtype of the slot."""
    after, before = piece.param.to(piece.dtype), piece.copy.to(piece.dtype)
    out = None if piece.param.dtype == piece.dtype else after  # a copy, which is not needed any more
    return torch.sub(after, before, out=out).nan_to_num_(0.0, 0.0, 0.0)


def square(t: Tensor) -> Tensor:
    """‖t‖², 0-d."""
    row = _row(t)
    return torch.dot(row, row)


def move(piece: Piece, difference: bool, motion: Tensor) -> tuple[Write, Tensor]:
    """Where x and the slot go, and ‖u‖², 0-d. `motion`: [4], as in ``manic.tuner.Motion``, dtype and device of slot."""
    x_delta, x_update, slot_delta, slot_update = motion
    u = update(piece)
    x = join(piece.copy, piece.rest, piece.dtype)
    moved = torch.addcmul(x, x - piece.slot if difference else piece.slot, x_delta).addcmul_(u, x_update)
    # lerp, since a factor of 1 is to give x itself, and y + (x - y) may have lost its digits.
    slot = torch.lerp(piece.slot, x, slot_delta) if difference else piece.slot.addcmul(piece.slot, slot_delta)
    slot.addcmul_(u, slot_update)
    update_sq = square(u)
    del u, x  # a step is to hold little at a time
    stored, rest = split(moved, piece.param.dtype)
    targets, values = [*piece.targets("param"), *piece.targets("slot")], [stored, slot]
    if rest is not None:
        targets += piece.targets("rest")
        values.append(rest)
    if len(piece.states) > 1:
        likes = [column(piece.states, name) for name in ("param", "slot", "rest")[: len(values)]]
        values = [part for value, like in zip(values, likes, strict=True) for part in apart(value, like)]
    return Write(targets, values), update_sq


def pieces(states: Sequence[ParamState]) -> Iterator[Piece]:
    """All elements of a group, in the same pieces whenever it is the same: one tensor, or small ones of a kind."""
    first = states[0]
    if len(states) > 1:
        names = ("param", "grad", "slot", "copy", *(() if first.rest is None else ("rest",)))
        flat = {name: end_to_end([t.detach() for t in column(states, name)]) for name in names}
        yield Piece(states, flat["param"], flat["grad"], flat["slot"], flat["copy"], flat.get("rest"))
        return
    grad = None if first.grad is None or first.grad.is_sparse else first.grad
    for param, g, slot, copy, rest in _cut_up(first.param, grad, first.slot, first.copy, first.rest):
        yield Piece(states, param, g, slot, copy, rest)


def _row(t: Tensor) -> Tensor:
    """In one dimension, and where no sum of it depends on the address: a resumed process may have it elsewhere."""
    row = t if t.dim() == 1 else t.reshape(-1)
    return row if row.data_ptr() % 64 == 0 else row.clone()


def _cut_up(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors of one shape (or None) as tuples of views of at most PIECE elements; complex ones as real pairs.

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
    if first.numel() > PIECE:
        longest = max(range(first.dim()), key=lambda d: first.shape[d])
        size = PIECE if first.dim() == 1 else -(-first.shape[longest] // 2)
        count = -(-first.shape[longest] // size)
        columns = [[None] * count if t is None else t.split(size, longest) for t in views]
        if first.dim() == 1:
            yield from zip(*columns, strict=True)
        else:
            for piece in zip(*columns, strict=True):
                yield from _cut(list(piece))
    elif first.numel() > 0:
        yield tuple(views)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
