"""What C++ and Triton have in common: what their sweeps take and give."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from manic.parameters import ParamState, column
from manic.sweeps.eager import Group

ALIGNED = 32  # elements: where in a buffer a tensor may begin, so that wide loads are whole


class Table(Group, ABC):
    """Parameters that one sweep takes at once: a table of their pieces, and one buffer for x_t of them all."""

    name: str  # that checkpoints know them by: sweeps of the same name give the same bits
    dtypes: frozenset[torch.dtype]  # of parameters
    piece: int  # elements that one row of the table, and of the sums, is about

    def __init__(self, states: Sequence[ParamState], difference: bool) -> None:
        super().__init__(states, difference)
        tensors, host = column(states, "slot"), torch.device("cpu")  # whatever the default device is
        self._params = column(states, "param")
        self._kept = [tensors, *([] if self.first.rest is None else [column(states, "rest")])]
        self.device = tensors[0].device
        numel = torch.tensor([t.numel() for t in tensors], device=host)
        counts = (numel + self.piece - 1) // self.piece
        self._owner = torch.repeat_interleave(counts)  # whose piece
        self.length = len(self._owner)
        begin = self.piece * (torch.arange(self.length, device=host) - (counts.cumsum(0) - counts)[self._owner])
        count = (numel[self._owner] - begin).clamp_max(self.piece)
        x, slot = self.first.param.element_size(), self.first.slot.element_size()
        rest = 0 if self.first.rest is None else self.first.rest.element_size()
        widths = torch.tensor([x, x, slot, x, rest], device=host)  # as `look()` has them
        self._offsets = torch.cat([count[:, None], begin[:, None] * widths], 1)
        room = (numel + ALIGNED - 1) // ALIGNED * ALIGNED
        self._room = int(room.sum())
        self._places: list[int] = (room.cumsum(0) - room).tolist()  # of each tensor in `_aside`, in elements
        self._addresses: list[list[int]] = []
        # int64 [length, 6] on the CPU: how many elements, and where their x, g, slot, x_t and rest (0: none) begin.
        self.rows = self._offsets
        self.aligned = False  # whether every address is a multiple of 16
        self.found = torch.zeros(self.length, 2, dtype=torch.float64, device=self.device)  # ‖u‖² and ‖d‖² of each piece
        self.moved = ctypes.c_int64(0)  # 1: sweep() has done its work
        self._instead: list[Group] = []  # what moves where x lies elsewhere

    def look(self) -> None:
        """Begin a step: make the table anew if anything lies elsewhere than in the last one."""
        self.moved.value, self._instead = 0, []
        if self._aside is None:
            self._aside = [torch.empty(self._room, dtype=self.first.param.dtype, device=self.device)]  # one for all
        columns = [self._params, column(self.states, "grad"), *self._kept]
        addresses = [[*map(Tensor.data_ptr, tensors)] for tensors in columns]
        start, width = self._aside[0].data_ptr(), self._aside[0].element_size()
        addresses.insert(3, [start + width * place for place in self._places])
        if addresses != self._addresses:
            self._addresses = []  # until the table is whole: an interrupt may come in between
            self.aligned = not any(address % 16 for column in addresses for address in column)
            self.rows = self._offsets.clone()
            self.rows[:, 1 : 1 + len(addresses)] += torch.tensor(addresses, device=self.rows.device).T[self._owner]
            self._addresses = addresses

    @abstractmethod
    def measure(self) -> Tensor:
        """As that of a Group: float64 [length, COLUMNS]."""

    @abstractmethod
    def sweep(self, motion: Tensor) -> None:
        """As ``move()``. What it yields of every piece goes to ``found``, and when all is done a 1 to ``moved``."""

    def move(self, motion: Tensor) -> list[Tensor]:
        """As that of a Group, which does it if the base has put x into other memory than the table says."""
        if not self._instead and [*map(Tensor.data_ptr, self._params)] != self._addresses[0]:
            pairs = zip(self.states, self.before(), strict=True)
            self._instead = [Group([state], self.difference, [before]) for state, before in pairs]
        if self._instead:
            return [found for group in self._instead for found in group.move(motion)]
        if not self.moved.value:
            self.sweep(motion)
        return [self.found.sum(0)]

    def release(self) -> None:
        super().release()
        self._instead = []

    def before(self) -> list[Tensor]:
        assert self._aside is not None
        slots = zip(self._kept[0], self._places, strict=True)
        return [self._aside[0].as_strided(slot.shape, slot.stride(), place) for slot, place in slots]
