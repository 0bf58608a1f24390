"""The sweeps of sweeps.py for dense tensors on CUDA devices, in Triton: one launch a sweep, whatever the number of
tensors. No atomics, so that two runs give the same bits; nothing is read back, and the addresses are in tables on the
device, so that a CUDA graph can capture a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manic.kernels import Kernels, Memory
from manic.storage import Slot

BLOCK = 1024  # elements in flight at a time
TAIL = tl.constexpr(16)  # masks of whole multiples of it leave wide loads whole; what is over goes by itself


@triton.jit
def _row(table, X: tl.constexpr, W: tl.constexpr, ALIGNED: tl.constexpr):
    """Of this program's piece: x, g, x_ref, Δ, the number of elements and the part of it that is whole in TAIL."""
    row = table + 5 * tl.program_id(0).to(tl.int64)
    x = tl.load(row + 1).to(tl.pointer_type(X))
    g = tl.load(row + 2).to(tl.pointer_type(X))
    ref = tl.load(row + 3).to(tl.pointer_type(W))
    delta = tl.load(row + 4).to(tl.pointer_type(W))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        g = tl.multiple_of(g, 16)
        ref = tl.multiple_of(ref, 16)
        delta = tl.multiple_of(delta, 16)
    count = tl.load(row).to(tl.int32)
    return x, g, ref, delta, count, tl.multiple_of(count // TAIL * TAIL, TAIL)


@triton.jit
def _at(ref, delta, scale, X: tl.constexpr):
    """x as it is stored where it stands at x_ref + S·Δ."""
    return tl.fma(delta, scale, ref).to(X)


@triton.jit
def _bits(x, at, BITS: tl.constexpr):
    """Of x, by which an edit is told: an odd number of times that depends on the place. The upper half, with the sign,
    goes into the lower one, or an even number would lose it."""
    HALF: tl.constexpr = BITS.primitive_bitwidth // 2
    bits = x.to(BITS, bitcast=True)
    places = (at * -0x61C88647 >> 8) | 1
    return (bits ^ ((bits >> HALF) & ((1 << HALF) - 1))) * places.to(BITS)


@triton.jit
def _products(x, g, delta, at, inside, W: tl.constexpr, BITS: tl.constexpr):
    stored = tl.load(x + at, mask=inside, other=0.0)
    here, gradient = stored.to(W), tl.load(g + at, mask=inside, other=0.0).to(W)
    d = tl.load(delta + at, mask=inside, other=0.0)
    return d * gradient, d * here, gradient * gradient, here * here, d * d, _bits(stored, at, BITS)


@triton.jit
def _shift(x, ref, delta, at, inside, S, X: tl.constexpr, W: tl.constexpr):
    """x_ref is shifted under the elements that are not at x_ref + S·Δ."""
    here = tl.load(x + at, mask=inside, other=0.0).to(W)
    d = tl.load(delta + at, mask=inside, other=0.0)
    r = tl.load(ref + at, mask=inside, other=0.0)
    tl.store(ref + at, here - d * S, mask=inside & (here != _at(r, d, S, X).to(W)))


@triton.jit
def _measure(
    table, scale, left, sums, KNOWN: tl.constexpr, X: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of `sums`: ⟨Δ,g⟩, ⟨Δ,x⟩, ‖g‖², ‖x‖², ‖Δ‖² over piece i. Where ⟨Δ,x⟩ or the sum of the bits of x is not
    what `left` says, x_ref gives way."""
    x, g, ref, delta, count, whole = _row(table, X, W, ALIGNED)
    delta_grad = tl.zeros([BLOCK], W)
    delta_x = tl.zeros([BLOCK], W)
    grad_sq = tl.zeros([BLOCK], W)
    x_sq = tl.zeros([BLOCK], W)
    delta_sq = tl.zeros([BLOCK], W)
    bits = tl.zeros([BLOCK], BITS)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        dg, dx, gg, xx, dd, b = _products(x, g, delta, at, at < whole, W, BITS)
        delta_grad += dg
        delta_x += dx
        grad_sq += gg
        x_sq += xx
        delta_sq += dd
        bits += b
    rest = whole + tl.arange(0, TAIL)
    dg, dx, gg, xx, dd, b = _products(x, g, delta, rest, rest < count, W, BITS)
    found = (tl.sum(delta_x) + tl.sum(dx)).to(tl.float64)
    bits_found = tl.sum(bits.to(tl.int64)) + tl.sum(b.to(tl.int64))
    piece = tl.program_id(0).to(tl.int64)
    out = sums + 5 * piece
    tl.store(out, (tl.sum(delta_grad) + tl.sum(dg)).to(tl.float64))
    tl.store(out + 1, found)
    tl.store(out + 2, (tl.sum(grad_sq) + tl.sum(gg)).to(tl.float64))
    tl.store(out + 3, (tl.sum(x_sq) + tl.sum(xx)).to(tl.float64))
    tl.store(out + 4, (tl.sum(delta_sq) + tl.sum(dd)).to(tl.float64))

    edited = True
    if KNOWN:
        same = tl.load(left + 2 * piece) == found.to(tl.int64, bitcast=True)
        edited = (tl.load(left + 2 * piece + 1) != bits_found) | (not same)
    if edited:
        S = tl.load(scale)
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _shift(x, ref, delta, at, at < whole, S, X, W)
        _shift(x, ref, delta, rest, rest < count, S, X, W)


@triton.jit
def _advance(
    x, ref, delta, at, inside, here, there, keep, fade, counts, X: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    d = tl.load(delta + at, mask=inside, other=0.0)
    r = tl.load(ref + at, mask=inside, other=0.0)
    update = tl.load(x + at, mask=inside, other=0.0).to(W) - _at(r, d, here, X).to(W)
    whole = d * keep + tl.where(counts & (tl.abs(update) <= LARGEST), update, 0.0)
    r = tl.fma(whole, there * (1 - fade), r)
    d = whole * fade
    moved = _at(r, d, there, X)
    tl.store(ref + at, r, mask=inside)
    tl.store(delta + at, d, mask=inside)
    tl.store(x + at, moved, mask=inside)
    return d * moved.to(W), _bits(moved, at, BITS)


@triton.jit
def _move(
    table, motion, ok, left, X: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `Kernels.move`; row i of `left`: the bits of ⟨Δ,x⟩ and the sum of the bits of x over piece i."""
    x, _, ref, delta, count, whole = _row(table, X, W, ALIGNED)
    here, there, keep, fade = tl.load(motion), tl.load(motion + 1), tl.load(motion + 2), tl.load(motion + 3)
    counts = True
    if ok is not None:
        counts = tl.load(ok) != 0
    delta_x = tl.zeros([BLOCK], W)
    bits = tl.zeros([BLOCK], BITS)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        dx, b = _advance(x, ref, delta, at, at < whole, here, there, keep, fade, counts, X, W, BITS, LARGEST)
        delta_x += dx
        bits += b
    rest = whole + tl.arange(0, TAIL)
    dx, b = _advance(x, ref, delta, rest, rest < count, here, there, keep, fade, counts, X, W, BITS, LARGEST)
    piece = tl.program_id(0).to(tl.int64)
    found = (tl.sum(delta_x) + tl.sum(dx)).to(tl.float64)
    tl.store(left + 2 * piece, found.to(tl.int64, bitcast=True))
    tl.store(left + 2 * piece + 1, tl.sum(bits.to(tl.int64)) + tl.sum(b.to(tl.int64)))


@triton.jit
def _discard(table, ok, X: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients become 0 unless the step counts; if it does, none of them is touched."""
    if tl.load(ok) == 0:
        _, g, _, _, count, _ = _row(table, X, W, False)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(g + at, tl.zeros([BLOCK], X), mask=at < count)


# Of x; of x_ref and Δ; of the sum of the bits of x.
TYPES = {
    torch.float64: (tl.float64, tl.float64, tl.int64),
    torch.float32: (tl.float32, tl.float32, tl.int32),
    torch.bfloat16: (tl.bfloat16, tl.float32, tl.int16),
    torch.float16: (tl.float16, tl.float32, tl.int16),
}


class Triton(Kernels):
    """The launches."""

    dtypes = frozenset(TYPES)
    piece = 16 * 1024

    def measure(self, slots: Sequence[Slot], scale: Tensor, memory: Memory) -> Tensor:
        sums = torch.empty(memory.pieces, 5, dtype=torch.float64, device=memory.marks.device)
        table = _on_device(memory, memory.table(slots), again=True)
        types = TYPES[slots[0].param.dtype]
        _launch(_measure, memory, table, scale, memory.marks, sums, memory.known, *types, memory.aligned, BLOCK)
        return sums

    def move(self, slots: Sequence[Slot], motion: Tensor, ok: Tensor | None, memory: Memory) -> None:
        table = _on_device(memory, memory.rows)
        types, largest = TYPES[slots[0].param.dtype], torch.finfo(slots[0].ref.dtype).max
        _launch(_move, memory, table, motion, ok, memory.marks, *types, largest, memory.aligned, BLOCK)

    def discard(self, slots: Sequence[Slot], ok: Tensor, memory: Memory) -> None:
        table = _on_device(memory, memory.table(slots))
        _launch(_discard, memory, table, ok, *TYPES[slots[0].param.dtype][:2], BLOCK)


def _launch(kernel: Any, memory: Memory, *arguments: Any) -> None:
    """One program per piece, on the device that the tensors are on."""
    device = memory.marks.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if memory.pieces:
            kernel[(memory.pieces,)](*arguments)


def _on_device(memory: Memory, table: Tensor, *, again: bool = False) -> Tensor:
    """The table where the kernels can read it, always at the same address; `again`: a sweep begins.

    A captured step brings its table along each time it is replayed, from pinned memory of its own; after that nobody
    can say what the device holds, so that a step that is not replayed brings its own as well.
    """
    device = memory.marks.device
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
