"""The sweeps for dense tensors on CUDA devices, in Triton: one launch a sweep, whatever the number of tensors.

No atomics, so that two runs give the same bits. Nothing is read back, and the addresses are in tables on the device, so
that a CUDA graph can capture a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manic.parameters import ParamState
from manic.sweeps.base import COLUMNS, Kernels, Memory

BLOCK = 1024  # elements in flight at a time
TAIL = tl.constexpr(16)  # masks of whole multiples of it leave wide loads whole; what is over goes by itself


@triton.jit
def _row(table, X: tl.constexpr, W: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr):
    """Of this program's piece: x, g, slot, x_t, rest, how many elements, and how many of them are whole in TAIL."""
    row = table + 6 * tl.program_id(0).to(tl.int64)
    x = tl.load(row + 1).to(tl.pointer_type(X))
    g = tl.load(row + 2).to(tl.pointer_type(X))
    slot = tl.load(row + 3).to(tl.pointer_type(W))
    before = tl.load(row + 4).to(tl.pointer_type(X))
    rest = tl.load(row + 5).to(tl.pointer_type(R))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        g = tl.multiple_of(g, 16)
        slot = tl.multiple_of(slot, 16)
        before = tl.multiple_of(before, 16)
        rest = tl.multiple_of(rest, 16)
    count = tl.load(row).to(tl.int32)
    return x, g, slot, before, rest, count, tl.multiple_of(count // TAIL * TAIL, TAIL)


@triton.jit
def _join(stored, rest, at, inside, X: tl.constexpr, W: tl.constexpr):
    """x from its leading digits and, for bfloat16 and float16, their rest: as ``manic.parameters.join()``."""
    if X == tl.bfloat16:  # noqa: SIM300
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(rest + at, mask=inside, other=0).to(tl.int32)
        magnitude = tl.maximum(((bits & 0x7FFF) << 16) + low, 0)
        return (magnitude | ((bits & 0x8000) << 16)).to(tl.float32, bitcast=True)
    if X == tl.float16:  # noqa: SIM300
        return stored.to(W) + tl.load(rest + at, mask=inside, other=0.0)
    return stored.to(W)


@triton.jit
def _put(x, rest, at, inside, value, X: tl.constexpr, W: tl.constexpr):
    """Store x, and its rest: as ``manic.parameters.split()``."""
    if X == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7FC00000)
        high = (magnitude + 0x8000) >> 16
        tl.store(rest + at, (magnitude - (high << 16)).to(tl.int16), mask=inside)
        stored = (high | ((bits >> 16) & 0x8000)).to(tl.int16)
        tl.store(x + at, stored.to(tl.bfloat16, bitcast=True), mask=inside)
    elif X == tl.float16:  # noqa: SIM300
        stored = value.to(tl.float16)
        left = value - stored.to(W)
        tl.store(rest + at, tl.where(tl.abs(left) <= 65504.0, left, 0.0), mask=inside)
        tl.store(x + at, stored, mask=inside)
    else:
        tl.store(x + at, value, mask=inside)


@triton.jit
def _products(
    x, g, slot, before, rest, at, inside, DIFFERENCE: tl.constexpr, X: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Puts x aside, and yields what is to be added up of it."""
    stored = tl.load(x + at, mask=inside, other=0.0)
    tl.store(before + at, stored, mask=inside)
    here = _join(stored, rest, at, inside, X, W)
    gradient = tl.load(g + at, mask=inside, other=0.0).to(W)
    d = tl.load(slot + at, mask=inside, other=0.0)
    if DIFFERENCE:
        d = here - d
    return d * gradient, d * here, gradient * gradient, here * here, d * d


@triton.jit
def _measure(
    table, sums, DIFFERENCE: tl.constexpr, X: tl.constexpr, W: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of `sums`: ⟨d,g⟩, ⟨d,x⟩, ‖g‖², ‖x‖², ‖d‖² over piece i."""
    x, g, slot, before, rest, count, whole = _row(table, X, W, R, ALIGNED)
    delta_grad = tl.zeros([BLOCK], W)
    delta_x = tl.zeros([BLOCK], W)
    grad_sq = tl.zeros([BLOCK], W)
    x_sq = tl.zeros([BLOCK], W)
    delta_sq = tl.zeros([BLOCK], W)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        dg, dx, gg, xx, dd = _products(x, g, slot, before, rest, at, at < whole, DIFFERENCE, X, W)
        delta_grad += dg
        delta_x += dx
        grad_sq += gg
        x_sq += xx
        delta_sq += dd
    over = whole + tl.arange(0, TAIL)
    dg, dx, gg, xx, dd = _products(x, g, slot, before, rest, over, over < count, DIFFERENCE, X, W)
    out = sums + 5 * tl.program_id(0).to(tl.int64)
    tl.store(out, (tl.sum(delta_grad) + tl.sum(dg)).to(tl.float64))
    tl.store(out + 1, (tl.sum(delta_x) + tl.sum(dx)).to(tl.float64))
    tl.store(out + 2, (tl.sum(grad_sq) + tl.sum(gg)).to(tl.float64))
    tl.store(out + 3, (tl.sum(x_sq) + tl.sum(xx)).to(tl.float64))
    tl.store(out + 4, (tl.sum(delta_sq) + tl.sum(dd)).to(tl.float64))


@triton.jit
def _update(x, at, inside, before, W: tl.constexpr, LARGEST: tl.constexpr):
    """u, and 0 where it is not finite."""
    u = tl.load(x + at, mask=inside, other=0.0).to(W) - before.to(W)
    return tl.where(tl.abs(u) <= LARGEST, u, 0.0)


@triton.jit
def _update_sq(
    table, update_sq, X: tl.constexpr, W: tl.constexpr, R: tl.constexpr, LARGEST: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Entry i of `update_sq`: ‖u‖² over piece i."""
    x, _, _, before, _, count, whole = _row(table, X, W, R, ALIGNED)
    total = tl.zeros([BLOCK], W)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        u = _update(x, at, at < whole, tl.load(before + at, mask=at < whole, other=0.0), W, LARGEST)
        total += u * u
    over = whole + tl.arange(0, TAIL)
    u = _update(x, over, over < count, tl.load(before + over, mask=over < count, other=0.0), W, LARGEST)
    tl.store(update_sq + tl.program_id(0).to(tl.int64), (tl.sum(total) + tl.sum(u * u)).to(tl.float64))


@triton.jit
def _advance(
    x, slot, before, rest, at, inside, x_delta, x_update, slot_delta, slot_update, DIFFERENCE: tl.constexpr,
    X: tl.constexpr, W: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    stored = tl.load(before + at, mask=inside, other=0.0)
    u = _update(x, at, inside, stored, W, LARGEST)
    here = _join(stored, rest, at, inside, X, W)
    y = tl.load(slot + at, mask=inside, other=0.0)
    d = y
    if DIFFERENCE:
        d = here - y
    _put(x, rest, at, inside, tl.fma(u, x_update, tl.fma(d, x_delta, here)), X, W)
    # y + 1·(x - y) is to be x itself: the difference may have lost the digits of x.
    if DIFFERENCE:
        from_x = slot_delta >= 0.5
        slot_delta = tl.where(from_x, slot_delta - 1, slot_delta)
        y = tl.where(from_x, here, y)
    tl.store(slot + at, tl.fma(u, slot_update, tl.fma(d, slot_delta, y)), mask=inside)
    return u * u


@triton.jit
def _move(
    table, motion, update_sq, DIFFERENCE: tl.constexpr, X: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    LARGEST: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `Kernels.move`; entry i of `update_sq`: ‖u‖² over piece i."""
    x, _, slot, before, rest, count, whole = _row(table, X, W, R, ALIGNED)
    a, s, e, f = tl.load(motion), tl.load(motion + 1), tl.load(motion + 2), tl.load(motion + 3)
    total = tl.zeros([BLOCK], W)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += _advance(x, slot, before, rest, at, at < whole, a, s, e, f, DIFFERENCE, X, W, LARGEST)
    over = whole + tl.arange(0, TAIL)
    last = _advance(x, slot, before, rest, over, over < count, a, s, e, f, DIFFERENCE, X, W, LARGEST)
    tl.store(update_sq + tl.program_id(0).to(tl.int64), (tl.sum(total) + tl.sum(last)).to(tl.float64))


@triton.jit
def _discard(table, ok, X: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients become 0 unless the step counts; if it does, none of them is touched."""
    if tl.load(ok) == 0:
        _, g, _, _, _, count, _ = _row(table, X, W, R, False)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(g + at, tl.zeros([BLOCK], X), mask=at < count)


# Of x; of its slot; of its rest, where it has one.
TYPES = {
    torch.float64: (tl.float64, tl.float64, tl.int8),
    torch.float32: (tl.float32, tl.float32, tl.int8),
    torch.bfloat16: (tl.bfloat16, tl.float32, tl.int16),
    torch.float16: (tl.float16, tl.float32, tl.float32),
}


class Triton(Kernels):
    """The launches."""

    dtypes = frozenset(TYPES)
    piece = 16 * 1024

    def measure(self, states: Sequence[ParamState], difference: bool, memory: Memory) -> Tensor:
        sums = torch.empty(memory.pieces, COLUMNS, dtype=torch.float64, device=memory.device)
        table = _on_device(memory, memory.table(states), again=True)
        _launch(_measure, memory, table, sums, difference, *TYPES[states[0].param.dtype], memory.aligned, BLOCK)
        return sums

    def update_sq(self, states: Sequence[ParamState], memory: Memory) -> None:
        table = _on_device(memory, memory.rows)
        types, largest = TYPES[states[0].param.dtype], torch.finfo(states[0].slot.dtype).max
        _launch(_update_sq, memory, table, memory.update_sq, *types, largest, memory.aligned, BLOCK)

    def move(self, states: Sequence[ParamState], difference: bool, motion: Tensor, memory: Memory) -> None:
        table = _on_device(memory, memory.rows)
        types, largest = TYPES[states[0].param.dtype], torch.finfo(states[0].slot.dtype).max
        _launch(_move, memory, table, motion, memory.update_sq, difference, *types, largest, memory.aligned, BLOCK)
        memory.moved.value = 1

    def discard(self, states: Sequence[ParamState], ok: Tensor, memory: Memory) -> None:
        table = _on_device(memory, memory.table(states))
        _launch(_discard, memory, table, ok, *TYPES[states[0].param.dtype], BLOCK)


def _launch(kernel: Any, memory: Memory, *arguments: Any) -> None:
    """One program per piece, on the device that the tensors are on."""
    device = memory.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if memory.pieces:
            kernel[(memory.pieces,)](*arguments)


def _on_device(memory: Memory, table: Tensor, *, again: bool = False) -> Tensor:
    """The table where the kernels can read it, always at the same address; `again`: a sweep begins.

    A captured step brings its table along each time it is replayed, from pinned memory of its own; after that nobody
    can say what the device holds, so that a step that is not replayed brings its own as well.
    """
    device = memory.device
    if device.type == "cpu":  # Triton's interpreter
        return table
    capturing = torch.cuda.is_current_stream_capturing()
    memory.captured |= capturing
    if memory.on_device is None:
        memory.on_device = torch.empty_like(table, device=device)
    if memory.uploaded is not table or (again and memory.captured):
        if not capturing and not memory.spare:
            memory.spare = [torch.empty_like(table, pin_memory=True) for _ in range(2)]
        pinned = memory.spare.pop() if capturing and memory.spare else torch.empty_like(table, pin_memory=True)
        memory.on_device.copy_(pinned.copy_(table), non_blocking=True)
        memory.uploaded = table
        if capturing:
            memory.kept.append(pinned)
    return memory.on_device
