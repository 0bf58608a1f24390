"""The sweeps in C++ for dense tensors on the CPU: ``native.cpp``, compiled when asked for."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from manic.sweeps.base import Table
from manic.sweeps.eager import COLUMNS


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
        self._call("move", motion.data_ptr(), self.update_sq.data_ptr(), ctypes.addressof(self.moved))

    def _call(self, sweep: str, *addresses: int) -> None:
        function = getattr(self.library, f"{sweep}_{str(self.first.param.dtype).removeprefix('torch.')}")
        pointers = map(ctypes.c_void_p, (self.rows.data_ptr(), *addresses))
        function(ctypes.c_int64(self.length), self.difference, torch.get_num_threads(), *pointers)


@lru_cache(maxsize=1)
def native() -> type[Native]:
    """The C++ sweeps: built by torch once per kind of processor, and kept beside torch's own extensions.

    Raises:
        RuntimeError: there is no compiler or no ninja, or they fail.
    """
    from torch.utils import cpp_extension

    # By the instructions that torch found here, not those of the machine that builds: the folder may be shared.
    capability = torch.backends.cpu.get_cpu_capability()
    architecture = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}.get(capability, [])
    threads = "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"
    # No a·b + c in one rounding but where it is asked for: the eager sweeps round like that.
    exact = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags = ["-O3", *architecture, threads, *exact]
    source = Path(__file__).with_name("native.cpp")
    made_of = hashlib.sha256("\n".join([source.read_text(), torch.__version__, *flags]).encode())
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "manic"
        library = folder / f"native-{made_of.hexdigest()[:16]}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # In a folder of its own: a process that is killed in one that is shared leaves a lock for all that follow.
            with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as place:
                built = cpp_extension.load(
                    "manic_native",
                    [str(source)],
                    extra_cflags=flags,
                    extra_ldflags=[threads],
                    build_directory=place,
                    is_python_module=False,
                )
                os.replace(built, library)
        Native.library = ctypes.CDLL(str(library))
        return Native
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"the C++ sweeps could not be built: {error}\nThey need a C++ compiler (g++ or clang++) and ninja "
            "(pip install manic[compile]). Without compile() a Mechanic does the same, in more passes over memory"
        ) from error
