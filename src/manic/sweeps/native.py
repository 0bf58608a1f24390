"""The sweeps in C++ for dense tensors on the CPU: ``native.cpp``, built when manic is installed."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from manic.diagnostics import warn
from manic.sweeps.base import Table
from manic.sweeps.eager import COLUMNS

X86_64 = ("x86_64", "AMD64")
LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # of x86-64 processors, by what torch calls them


class Native(Table):
    """``native.cpp``, through ctypes, which lets other Python threads run meanwhile."""

    dtypes = frozenset({torch.float32, torch.float64, torch.bfloat16})
    piece = 64 * 1024
    library: ctypes.CDLL

    def measure(self) -> Tensor:
        self.look()
        sums = torch.empty(self.length, COLUMNS, dtype=torch.float64, device=self.device)
        self._call("measure", sums.data_ptr())
        return sums

    def sweep(self, motion: Tensor) -> None:
        self._call("move", motion.data_ptr(), self.found.data_ptr(), ctypes.addressof(self.moved))

    def _call(self, sweep: str, *addresses: int) -> None:
        function = getattr(self.library, f"{sweep}_{str(self.first.param.dtype).removeprefix('torch.')}")
        pointers = map(ctypes.c_void_p, (self.rows.data_ptr(), *addresses))
        function(ctypes.c_int64(self.length), self.difference, torch.get_num_threads(), *pointers)


@lru_cache(maxsize=1)
def native() -> type[Native] | None:
    """The C++ sweeps for this processor; None, with a warning, where the installation has none that loads."""
    here = platform.machine() in X86_64
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2") if here else "baseline"
    try:
        Native.library = ctypes.CDLL(str(Path(__file__).with_name(f"native-{level}.so")))
    except OSError as error:
        warn(
            f"manic has no C++ sweeps here ({error}): on the CPU its steps take 3 to 4 times as long. Install a C++ "
            "compiler (g++ or clang++), uninstall manic, and install it again with pip's --no-cache-dir"
        )
        return None
    Native.name = f"C++ {level}"
    return Native
