"""The sweeps for dense tensors on CUDA devices, in Triton: one launch a sweep, whatever the number of tensors.

No atomics, so that two runs give the same bits. Nothing is read back, and the addresses are in tables on the device, so
that a CUDA graph can capture a step.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manic.sweeps.base import Table
from manic.sweeps.eager import COLUMNS

BLOCK = 1024  # elements in flight at a time
TAIL = tl.constexpr(16)  # masks of whole multiples of it leave wide loads whole; what is over goes by itself


@triton.jit
def _address(row, column: tl.constexpr, X: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row + column).to(tl.pointer_type(X))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _row(table, X: tl.constexpr, ALIGNED: tl.constexpr):
    """Of this program's piece: x, g, slot, x_t, rest, how many elements, and how many of them are whole in TAIL."""
    W: tl.constexpr = tl.float64 if X == tl.float64 else tl.float32  # noqa: SIM300
    R: tl.constexpr = tl.int16 if X == tl.bfloat16 else tl.float32  # noqa: SIM300
    row = table + 6 * tl.program_id(0).to(tl.int64)
    x, g = _address(row, 1, X, ALIGNED), _address(row, 2, X, ALIGNED)
    slot, before, rest = _address(row, 3, W, ALIGNED), _address(row, 4, X, ALIGNED), _address(row, 5, R, ALIGNED)
    count = tl.load(row).to(tl.int32)
    return x, g, slot, before, rest, count, tl.multiple_of(count // TAIL * TAIL, TAIL)


@triton.jit
def _join(stored, rest, at, inside):
    """x from its leading digits and, for bfloat16 and float16, their rest: as ``manic.parameters.join()``."""
    if stored.dtype == tl.bfloat16:
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(rest + at, mask=inside, other=0).to(tl.int32)
        magnitude = tl.maximum(((bits & 0x7FFF) << 16) + low, 0)
        return (magnitude | ((bits & 0x8000) << 16)).to(tl.float32, bitcast=True)
    if stored.dtype == tl.float16:
        return stored.to(tl.float32) + tl.load(rest + at, mask=inside, other=0.0)
    return stored.to(tl.float64 if stored.dtype == tl.float64 else tl.float32)


@triton.jit
def _put(x, rest, at, inside, value):
    """Store x, and its rest: as ``manic.parameters.split()``."""
    if x.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7FC00000)
        high = (magnitude + 0x8000) >> 16
        tl.store(rest + at, (magnitude - (high << 16)).to(tl.int16), mask=inside)
        stored = (high | ((bits >> 16) & 0x8000)).to(tl.int16)
        tl.store(x + at, stored.to(tl.bfloat16, bitcast=True), mask=inside)
    elif x.dtype.element_ty == tl.float16:
        stored = value.to(tl.float16)
        left = value - stored.to(tl.float32)
        tl.store(rest + at, tl.where(tl.abs(left) <= 65504.0, left, 0.0), mask=inside)
        tl.store(x + at, stored, mask=inside)
    else:
        tl.store(x + at, value, mask=inside)


@triton.jit
def _products(x, g, slot, before, rest, at, inside, DIFFERENCE: tl.constexpr):
    """Puts x aside, and yields what is to be added up of it."""
    stored = tl.load(x + at, mask=inside, other=0.0)
    tl.store(before + at, stored, mask=inside)
    here = _join(stored, rest, at, inside)
    d = tl.load(slot + at, mask=inside, other=0.0)
    gradient = tl.load(g + at, mask=inside, other=0.0).to(d.dtype)
    if DIFFERENCE:
        d = here - d
    return d * gradient, d * here, gradient * gradient, here * here, d * d


@triton.jit
def _measure(table, sums, DIFFERENCE: tl.constexpr, X: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Row i of `sums`: ⟨d,g⟩, ⟨d,x⟩, ‖g‖², ‖x‖², ‖d‖² over piece i."""
    x, g, slot, before, rest, count, whole = _row(table, X, ALIGNED)
    delta_grad = tl.zeros([BLOCK], slot.dtype.element_ty)
    delta_x, grad_sq, x_sq, delta_sq = delta_grad, delta_grad, delta_grad, delta_grad
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        dg, dx, gg, xx, dd = _products(x, g, slot, before, rest, at, at < whole, DIFFERENCE)
        delta_grad += dg
        delta_x += dx
        grad_sq += gg
        x_sq += xx
        delta_sq += dd
    over = whole + tl.arange(0, TAIL)
    dg, dx, gg, xx, dd = _products(x, g, slot, before, rest, over, over < count, DIFFERENCE)
    out = sums + 5 * tl.program_id(0).to(tl.int64)
    tl.store(out, (tl.sum(delta_grad) + tl.sum(dg)).to(tl.float64))
    tl.store(out + 1, (tl.sum(delta_x) + tl.sum(dx)).to(tl.float64))
    tl.store(out + 2, (tl.sum(grad_sq) + tl.sum(gg)).to(tl.float64))
    tl.store(out + 3, (tl.sum(x_sq) + tl.sum(xx)).to(tl.float64))
    tl.store(out + 4, (tl.sum(delta_sq) + tl.sum(dd)).to(tl.float64))


@triton.jit
def _advance(x, slot, before, rest, at, inside, x_delta, x_update, slot_delta, slot_update, DIFFERENCE: tl.constexpr):
    """Takes x and the slot where `motion` sends them, and yields u², and d² of where x is left."""
    stored = tl.load(before + at, mask=inside, other=0.0)
    here = _join(stored, rest, at, inside)
    y = tl.load(slot + at, mask=inside, other=0.0)
    u = tl.load(x + at, mask=inside, other=0.0).to(y.dtype) - stored.to(y.dtype)
    u = tl.where(tl.abs(u) < float("inf"), u, 0.0)
    d = y
    if DIFFERENCE:
        d = here - y
    there = tl.fma(u, x_update, tl.fma(d, x_delta, here))
    _put(x, rest, at, inside, there)
    # y + 1·(x - y) is to be x itself: the difference may have lost the digits of x.
    if DIFFERENCE:
        from_x = slot_delta >= 0.5
        slot_delta = tl.where(from_x, slot_delta - 1, slot_delta)
        y = tl.where(from_x, here, y)
    kept = tl.fma(u, slot_update, tl.fma(d, slot_delta, y))
    tl.store(slot + at, kept, mask=inside)
    left = kept
    if DIFFERENCE:
        left = there - kept
    return u * u, tl.where(inside, left * left, 0.0)


@triton.jit
def _move(
    table, found, motion, DIFFERENCE: tl.constexpr, X: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """As ``Table.sweep()``; row i of `found`: ‖u‖² and ‖d‖² over piece i."""
    x, _, slot, before, rest, count, whole = _row(table, X, ALIGNED)
    a, s, e, f = tl.load(motion), tl.load(motion + 1), tl.load(motion + 2), tl.load(motion + 3)
    update_sq = tl.zeros([BLOCK], slot.dtype.element_ty)
    left_sq = update_sq
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        uu, dd = _advance(x, slot, before, rest, at, at < whole, a, s, e, f, DIFFERENCE)
        update_sq += uu
        left_sq += dd
    over = whole + tl.arange(0, TAIL)
    uu, dd = _advance(x, slot, before, rest, over, over < count, a, s, e, f, DIFFERENCE)
    out = found + 2 * tl.program_id(0).to(tl.int64)
    tl.store(out, (tl.sum(update_sq) + tl.sum(uu)).to(tl.float64))
    tl.store(out + 1, (tl.sum(left_sq) + tl.sum(dd)).to(tl.float64))


@triton.jit
def _discard(table, counts, X: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients become 0 unless the step counts; if it does, none of them is touched."""
    if tl.load(counts) == 0:
        _, g, _, _, _, count, _ = _row(table, X, ALIGNED)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(g + at, tl.zeros([BLOCK], X), mask=at < count)


TYPES = {getattr(torch, name): getattr(tl, name) for name in ("float64", "float32", "bfloat16", "float16")}


class Triton(Table):
    """The launches."""

    name = "Triton"
    dtypes = frozenset(TYPES)
    piece = 16 * 1024
    _spare: tuple[Tensor, ...] = ()  # pinned memory for steps that will be captured
    _captured: tuple[Tensor, ...] = ()  # that of captured steps, for good: each replay brings its table along from it

    def measure(self) -> Tensor:
        self.look()
        self._upload()
        sums = torch.empty(self.length, COLUMNS, dtype=torch.float64, device=self.device)
        self._launch(_measure, sums, self.difference)
        return sums

    def sweep(self, motion: Tensor) -> None:
        self._launch(_move, self.found, motion, self.difference)
        self.moved.value = 1

    def discard(self, counts: Tensor) -> None:
        self._launch(_discard, counts)

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        """One program per piece, on the device that the tensors are on."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self.length:
                kernel[(self.length,)](self._on_device, *arguments, TYPES[self.first.param.dtype], self.aligned, BLOCK)

    def _upload(self) -> None:
        """Bring the table to where the kernels can read it. No memory can be pinned while a graph is captured."""
        self._on_device = self.rows
        if self.device.type != "cuda":  # Triton's interpreter
            return
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing and not self._spare:
            self._spare = tuple(torch.empty_like(self.rows, pin_memory=True) for _ in range(2))
        if capturing and self._spare:
            pinned, *spare = self._spare
            self._spare = tuple(spare)
        else:
            pinned = torch.empty_like(self.rows, pin_memory=True)
        if capturing:
            self._captured += (pinned,)
        self._on_device = pinned.copy_(self.rows).to(self.device, non_blocking=True)
