"""What eager pieces, C++ and Triton have in common: what a sweep takes and gives.

A sweep knows no law and no variant. With y the slot, d = x - y (x_ref is kept) or d = y (Δ is kept), and a move is
x += a·d + s·u and y += e·d + f·u.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from manic.parameters import ParamState, column, local

ALIGNED = 32  # elements: where in a buffer a tensor may begin, so that wide loads are whole
COLUMNS = 5  # of what measure() yields: <d,g>, <d,x>, ‖g‖², ‖x‖², ‖d‖²


class Memory:
    """What kernels keep about the parameters that they take together, all of one dtype: a table of their pieces, and
    x_t, which a step puts aside."""

    def __init__(self, states: Sequence[ParamState], piece: int) -> None:
        tensors, host = column(states, "slot"), torch.device("cpu")  # whatever the default device is
        first = states[0]
        numel = torch.tensor([t.numel() for t in tensors], device=host)
        pieces = (numel + piece - 1) // piece
        self._owner = torch.repeat_interleave(pieces)  # whose piece
        begin = piece * (torch.arange(len(self._owner), device=host) - (pieces.cumsum(0) - pieces)[self._owner])
        count = (numel[self._owner] - begin).clamp_max(piece)
        x, rest = first.param.element_size(), 0 if first.rest is None else first.rest.element_size()
        widths = torch.tensor([x, x, first.slot.element_size(), x, rest], device=host)  # as `_look()` has them
        self._offsets = torch.cat([count[:, None], begin[:, None] * widths], 1)
        room = (numel + ALIGNED - 1) // ALIGNED * ALIGNED
        self._places: list[int] = (room.cumsum(0) - room).tolist()  # of each tensor in `_aside`, in elements
        self._numel, self._dtype, self.device = int(room.sum()), first.param.dtype, tensors[0].device
        self._aside: Tensor | None = None
        self.pieces = len(self._owner)
        self.update_sq = torch.zeros(self.pieces, dtype=torch.float64, device=self.device)
        self.moved = ctypes.c_int64(0)  # 1: move() has done its work. The C++ sweep sets it itself
        self._addresses: list[list[int]] = []
        self.rows = self._offsets  # the table of the last look
        self.aligned = False  # whether every address is a multiple of 16
        # The table on a device: itself, which one it is, whether a CUDA graph uploads it, and from where.
        self.on_device: Tensor | None = None
        self.uploaded: Tensor | None = None
        self.captured = False
        self.spare: list[Tensor] = []
        self.kept: list[Tensor] = []

    def _look(self, states: Sequence[ParamState]) -> list[list[int]]:
        if self._aside is None:
            self._aside = torch.empty(self._numel, dtype=self._dtype, device=self.device)
        start, width = self._aside.data_ptr(), self._aside.element_size()
        param, grad, slot = ([t.data_ptr() for t in column(states, name)] for name in ("param", "grad", "slot"))
        rest = [0] * len(states) if states[0].rest is None else [t.data_ptr() for t in column(states, "rest")]
        return [param, grad, slot, [start + width * place for place in self._places], rest]

    def table(self, states: Sequence[ParamState]) -> Tensor:
        """int64 [pieces, 6] on the CPU: how many elements, and where their x, g, slot, x_t and rest (0: none) begin."""
        addresses = self._look(states)
        if addresses != self._addresses:
            self._addresses = addresses
            self.aligned = not any(address % 16 for column in addresses for address in column)
            self.rows = self._offsets.clone()
            self.rows[:, 1:] += torch.tensor(addresses, device=self.rows.device).T[self._owner]
        return self.rows

    def elsewhere(self, states: Sequence[ParamState]) -> bool:
        """Whether some x lies in other memory than when the table was made: the base has replaced it."""
        return [t.data_ptr() for t in column(states, "param")] != self._addresses[0]

    def show(self, states: Sequence[ParamState]) -> None:
        """Let the parameters' `copy` be x_t, as the kernels have put it aside."""
        assert self._aside is not None
        for state, slot, place in zip(states, column(states, "slot"), self._places, strict=True):
            state.copy = self._aside.as_strided(slot.shape, slot.stride(), place)

    def release(self) -> None:
        """Hand x_t back to the allocator. On the CPU fresh pages cost as much as the pass, so there it stays."""
        if self.device.type != "cpu":
            self._aside = None


class Kernels(ABC):
    """Sweeps over parameters of one dtype, learned scale and device, at once."""

    dtypes: frozenset[torch.dtype]  # of parameters
    piece: int  # elements that one row of the tables, and of the sums, is about

    @abstractmethod
    def measure(self, states: Sequence[ParamState], difference: bool, memory: Memory) -> Tensor:
        """The sums of every piece: float64 [pieces, COLUMNS]. Puts x_t aside. `difference`: d = x - y, else y."""

    @abstractmethod
    def update_sq(self, states: Sequence[ParamState], memory: Memory) -> None:
        """‖u‖² of every piece goes to ``memory.update_sq``, while the parameters hold x_t + u_t."""

    @abstractmethod
    def move(self, states: Sequence[ParamState], difference: bool, motion: Tensor, memory: Memory) -> None:
        """Take x and y to where `motion`, [4], of the dtype and device of y, sends them.

        ‖u‖² of every piece goes to ``memory.update_sq``, and a 1 to ``memory.moved`` when all is done.
        """

    def discard(self, states: Sequence[ParamState], ok: Tensor, memory: Memory) -> None:
        """The gradients become 0 unless `ok`, 0-d bool on their device."""
        discard_eagerly(states, ok)


def discard_eagerly(states: Sequence[ParamState], ok: Tensor) -> None:
    """The same for gradients of any kind, each of which is read and written."""
    for state in states:
        assert state.grad is not None
        values = state.grad._values() if state.grad.is_sparse else local(state.grad)
        values.masked_fill_(~ok, 0)
