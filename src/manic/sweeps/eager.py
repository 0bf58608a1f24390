"""The sweeps in torch's own operations: for every kind of parameter, on every device.

They take the parameters in cache-sized pieces, small ones together. A piece is worked on in the dtype of the slot
(float32, or float64 for float64 parameters).

A sweep knows no law and no variant. With y the slot, d = x - y (x_ref is kept) or d = y (Δ is kept), and a move is
x += a·d + s·u and y += e·d + f·u.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manic.parameters import ParamState, column, join, local, split

COLUMNS = 5  # of what measure() yields: <d,g>, <d,x>, ‖g‖², ‖x‖², ‖d‖²
PIECE = 64 * 1024  # elements: some float32 pieces fit in a core's L2 cache, and a float32 sum keeps its digits
TOGETHER = PIECE // 2  # elements of small parameters, which are copied into one tensor


class Piece(NamedTuple):
    """Elements of one parameter: views; complex numbers as pairs of real ones."""

    param: Tensor
    slot: Tensor
    grad: Tensor | None = None  # None: sparse
    rest: Tensor | None = None
    before: Any = None  # the parameter's elements at x_t: a tensor, where they have been put aside


class Group:
    """Parameters that the sweeps take together: alike in layout, learned scale, dtypes and device.

    Args:
        states: the parameters; one alone, if its gradient is sparse.
        difference: the slot is x_ref, and d = x - x_ref. False: the slot is Δ, which is d.
        aside: x_t of each, where it has been put aside already.
    """

    def __init__(self, states: Sequence[ParamState], difference: bool, aside: list[Tensor] | None = None) -> None:
        self.states, self.first, self.difference, self._aside = states, states[0], difference, aside
        self.numel = sum(slot.numel() for slot in column(states, "slot"))  # of this process's elements
        self.members = sum(state.member for state in states)
        # By batch, as far as a move has come: what is still to be written where, and what it yields.
        self._moves: list[tuple[list[tuple[Tensor, Tensor]], Tensor]] = []

    def measure(self) -> Tensor:
        """Put x_t aside, and sum up every piece, and the rows of a sparse gradient: [n, COLUMNS]."""
        self._moves = []
        params = [param.detach() for param in column(self.states, "param")]
        if self._aside is None:
            self._aside = [torch.empty_like(param) for param in params]
        torch._foreach_copy_(self._aside, params)
        sums = [value for batch in self.batches() for value in _measure(_joined(batch), self.difference)]
        none = local(self.first.slot).new_zeros((), dtype=torch.float32)
        found = torch.stack(sums or [none] * COLUMNS).view(-1, COLUMNS)
        if self.first.grad is not None and self.first.grad.is_sparse:
            found = torch.cat([found.double(), _measure_rows(self.first, self.difference)])
        return found

    def discard(self, counts: Tensor) -> None:
        """The gradients become 0 unless `counts`, 0-d bool on their device."""
        for state in self.states:
            assert state.grad is not None
            values = state.grad._values() if state.grad.is_sparse else local(state.grad)
            values.masked_fill_(~counts, 0)

    def move(self, motion: Tensor) -> list[Tensor]:
        """Take x and the slots to where `motion`, [4], real and beside the slot, sends them. Return ‖u‖², and ‖d‖² of
        where x is left, in parts: [2] each.

        It may be interrupted anywhere, and the next call completes it: what is to be written is worked out first, and
        to write it twice does no harm.
        """
        for i, batch in enumerate(self.batches()):
            if i == len(self._moves):
                self._moves.append(_move(batch, self.difference, motion))
            writes, _ = self._moves[i]
            if writes:
                torch._foreach_copy_([place for place, _ in writes], [value for _, value in writes])
                writes.clear()
        return [found for _, found in self._moves]

    def restore(self) -> None:
        """Put x_t back into the parameters."""
        torch._foreach_copy_([param.detach() for param in column(self.states, "param")], self.before())

    def release(self) -> None:
        """Let go of the gradients; and of x_t, but on the CPU, where fresh pages cost as much as the pass."""
        for state in self.states:
            state.grad = None
        if self.first.slot.device.type != "cpu":
            self._aside = None

    def pieces(self) -> Iterator[Piece]:
        """All elements, in the same pieces in every call."""
        for one, before in zip(self.states, self.before(), strict=True):
            grad = one.grad if one.grad is not None and not one.grad.is_sparse else None
            tensors = {"param": one.param, "slot": one.slot, "rest": one.rest, "grad": grad}
            present = {name: local(t).detach() for name, t in tensors.items() if t is not None}
            yield from _cut_up(**present, before=before)

    def batches(self) -> Iterator[list[Piece]]:
        """The pieces, the small ones together: each operation of torch has its price, for however few elements."""
        batch: list[Piece] = []
        room = TOGETHER
        for piece in self.pieces():
            size = piece.param.numel() if piece.param.dim() == 1 else PIECE
            if batch and size > room:
                yield batch
                batch, room = [], TOGETHER
            batch.append(piece)
            room -= size
        if batch:
            yield batch

    def before(self) -> list[Tensor]:
        """x_t of each parameter, as it was put aside: views."""
        assert self._aside is not None
        return self._aside


def _joined(batch: list[Piece]) -> Piece:
    """A batch as one piece; of several, a copy."""
    if len(batch) == 1:
        return batch[0]
    fields: Any = zip(*batch, strict=True)
    whole: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in fields]
    return Piece(*whole)


def _measure(piece: Piece, difference: bool) -> list[Tensor]:
    """<d,g>, <d,x>, ‖g‖², ‖x‖², ‖d‖²: 0-d each."""
    x = join(piece.param, piece.rest, piece.slot.dtype)
    d = _row(x - piece.slot if difference else piece.slot)
    x = _row(x)
    delta_grad = grad_sq = d.new_zeros(())
    if piece.grad is not None:
        g = _row(piece.grad.to(d.dtype))
        delta_grad, grad_sq = torch.dot(d, g), torch.dot(g, g)
    return [delta_grad, torch.dot(d, x), grad_sq, torch.dot(x, x), torch.dot(d, d)]


def _measure_rows(state: ParamState, difference: bool) -> Tensor:
    """Sum up <d,g> and ‖g‖² over the rows that a sparse gradient stores: [1, COLUMNS]."""
    grad = state.grad.coalesce()  # type: ignore[union-attr]
    rows = tuple(grad.indices())
    tensors = {"param": state.param.detach(), "slot": state.slot, "rest": state.rest}
    sums = state.slot.new_zeros(1, COLUMNS, dtype=torch.float64)
    for piece in _cut_up(grad=grad.values(), **{name: t[rows] for name, t in tensors.items() if t is not None}):
        found = _measure(piece, difference)
        sums[0, 0] += found[0]
        sums[0, 2] += found[2]
    return sums


def _move(batch: list[Piece], difference: bool, motion: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Work out what to write where; and ‖u‖², and ‖d‖² where x is left: [2]."""
    piece = _joined(batch)
    x_delta, x_update, slot_delta, slot_update = motion
    dtype = piece.slot.dtype
    u = (piece.param.to(dtype) - piece.before).nan_to_num_(0.0, 0.0, 0.0)  # 0 where it is not finite
    x = join(piece.before, piece.rest, dtype)
    moved = torch.addcmul(x, x - piece.slot if difference else piece.slot, x_delta).addcmul_(u, x_update)
    # lerp, since a factor of 1 is to give x itself, and y + (x - y) may have lost its digits.
    slot = torch.lerp(piece.slot, x, slot_delta) if difference else piece.slot.addcmul(piece.slot, slot_delta)
    slot.addcmul_(u, slot_update)
    row = _row(u)
    update_sq = torch.dot(row, row)
    del u, x, row  # a step is to hold little at a time
    row = _row(moved - slot if difference else slot)
    found = torch.stack([update_sq, torch.dot(row, row)])
    del row
    stored, rest = split(moved, piece.param.dtype)
    writes: list[tuple[Tensor, Tensor]] = []
    for name, whole in (("param", stored), ("slot", slot), ("rest", rest)):
        if whole is not None and getattr(piece, name) is not None:
            places = [getattr(one, name) for one in batch]
            parts = [whole] if len(batch) == 1 else torch.split(whole, [place.numel() for place in places])
            writes += zip(places, parts, strict=True)
    return writes, found


def _row(t: Tensor) -> Tensor:
    """In one dimension, and where no sum of it depends on the address: a resumed process may have it elsewhere."""
    row = t if t.dim() == 1 else t.reshape(-1)
    return row if row.data_ptr() % 64 == 0 else row.clone()


def _cut_up(**tensors: Tensor) -> Iterator[Piece]:
    """Tensors of one shape in views of at most PIECE elements.

    In memory order where all of them are dense and laid out alike (channels_last among them), else cut along
    the longest dimension until the pieces are small.
    """
    views = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors.values()]
    if not all(t.is_contiguous() for t in views):
        order = sorted(range(views[0].dim()), key=views[0].stride, reverse=True)
        views = [t.permute(order) for t in views]
    parts = [[t.view(-1) for t in views] if all(t.is_contiguous() for t in views) else views]
    while parts:
        part = parts.pop()
        if part[0].numel() > PIECE:
            shape = part[0].shape
            size = PIECE if len(shape) == 1 else -(-max(shape) // 2)
            cut = [torch.split(t, size, shape.index(max(shape))) for t in part]
            parts += [list(some) for some in zip(*cut, strict=True)][::-1]
        elif part[0].numel() > 0:
            yield Piece(**dict(zip(tensors, part, strict=True)))
