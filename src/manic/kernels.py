"""The sweeps below Python, for dense tensors: C++ on the CPU (``native.cpp``, compiled when asked for) and Triton on
CUDA devices (``triton_kernels.py``). They do what the eager pieces of sweeps.py do, in one pass over memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manic.storage import Slot, column, local
from manic.tuner import tune


class Memory:
    """What the kernels keep between two sweeps over the same parameters, all of one dtype.

    `marks`, int64 [pieces, 2]: what ``Kernels.move()`` left of x, to tell an edit by: the bits of ⟨Δ,x⟩ in float64,
    and the sum of the bits of x by their places, which sees a change in any one, and exchanges. The tensors stay where
    they are: a CUDA graph may hold their addresses.
    """

    def __init__(self, slots: Sequence[Slot], piece: int) -> None:
        tensors, host = column(slots, "ref"), torch.device("cpu")  # whatever the default device is
        numel = torch.tensor([t.numel() for t in tensors], device=host)
        pieces = (numel + piece - 1) // piece
        self._owner = torch.repeat_interleave(pieces)  # whose piece
        begin = piece * (torch.arange(len(self._owner), device=host) - (pieces.cumsum(0) - pieces)[self._owner])
        x, ref = slots[0].param.element_size(), slots[0].ref.element_size()
        sizes = torch.tensor([x, x, ref, ref], device=host)
        count = (numel[self._owner] - begin).clamp_max(piece)
        self._offsets = torch.cat([count[:, None], begin[:, None] * sizes], 1)
        self.pieces = len(self._owner)
        self.marks = torch.zeros(self.pieces, 2, dtype=torch.int64, device=tensors[0].device)
        self.known = False  # whether the marks are those of the last step
        self._addresses: list[list[int]] = [[]] * 4
        self.rows = self._offsets  # the table of the last look
        self.aligned = False  # whether every address is a multiple of 16
        # The table on a device: itself, which one it is, whether a CUDA graph uploads it, and from where.
        self.on_device: Tensor | None = None
        self.uploaded: Tensor | None = None
        self.captured = False
        self.spare: list[Tensor] = []
        self.kept: list[Tensor] = []

    def table(self, slots: Sequence[Slot]) -> Tensor:
        """int64 [pieces, 5] on the CPU: how many elements, and where their x, g, x_ref and Δ begin now."""
        addresses = [[t.data_ptr() for t in column(slots, name)] for name in ("param", "grad", "ref", "delta")]
        if addresses != self._addresses:
            self._addresses = addresses
            self.aligned = not any(address % 16 for column in addresses for address in column)
            self.rows = self._offsets.clone()
            self.rows[:, 1:] += torch.tensor(addresses, device=self.rows.device).T[self._owner]
        return self.rows

    def elsewhere(self, slots: Sequence[Slot]) -> bool:
        """Whether some x lies in other memory than when the table was made, perhaps in another order: the base has
        replaced it."""
        return [t.data_ptr() for t in column(slots, "param")] != self._addresses[0]


class Kernels(ABC):
    """Sweeps over parameters of one dtype, learned scale and device, at once."""

    dtypes: frozenset[torch.dtype]  # of parameters
    piece: int  # elements that one row of the tables, and of the sums, is about

    @abstractmethod
    def measure(self, slots: Sequence[Slot], scale: Tensor, memory: Memory) -> Tensor:
        """⟨Δ,g⟩, ⟨Δ,x⟩, ‖g‖², ‖x‖² and ‖Δ‖² of every piece: float64 [pieces, 5].

        In pieces that are not as the last ``move()`` left them, x_ref is shifted under the elements that do not
        stand at x_ref + S·Δ. `scale`: S, 0-d, in the dtype of x_ref and on its device.
        """

    @abstractmethod
    def move(self, slots: Sequence[Slot], motion: Tensor, ok: Tensor | None, memory: Memory) -> None:
        """As ``manic.sweeps.move()``, with x where ``measure()`` found it; takes down the marks.

        `motion`: [4], S_t, S_{t+1}, keep and fade, in the dtype of x_ref and on its device. `ok`: 0-d bool there,
        False: updates do not count.
        """

    def discard(self, slots: Sequence[Slot], ok: Tensor, memory: Memory) -> None:
        """The gradients become 0 unless `ok`, 0-d bool on their device."""
        discard_eagerly(slots, ok)


def discard_eagerly(slots: Sequence[Slot], ok: Tensor) -> None:
    """The same for gradients of any kind, each of which is read and written."""
    for slot in slots:
        assert slot.grad is not None
        values = slot.grad._values() if slot.grad.is_sparse else local(slot.grad)
        values.masked_fill_(~ok, 0)


class Native(Kernels):
    """``native.cpp``, through ctypes, which lets other Python threads run meanwhile."""

    dtypes = frozenset({torch.float32, torch.float64, torch.bfloat16})
    piece = 64 * 1024

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    def measure(self, slots: Sequence[Slot], scale: Tensor, memory: Memory) -> Tensor:
        sums = torch.empty(memory.pieces, 5, dtype=torch.float64, device=memory.marks.device)
        left = memory.marks if memory.known else None
        self._call("measure", slots, memory, memory.table(slots), scale, left, sums)
        return sums

    def move(self, slots: Sequence[Slot], motion: Tensor, ok: Tensor | None, memory: Memory) -> None:
        self._call("move", slots, memory, memory.rows, motion, ok, memory.marks)

    def _call(self, sweep: str, slots: Sequence[Slot], memory: Memory, table: Tensor, *others: Tensor | None) -> None:
        function = getattr(self._library, f"{sweep}_{str(slots[0].param.dtype).removeprefix('torch.')}")
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (table, *others)]
        function(ctypes.c_int64(memory.pieces), *pointers, ctypes.c_int(torch.get_num_threads()))


@lru_cache(maxsize=1)
def native() -> Native:
    """The C++ sweeps: built by torch once per kind of processor, and kept beside torch's own extensions.

    Raises:
        RuntimeError: there is no compiler or no ninja, or they fail.
    """
    from torch.utils import cpp_extension

    # By the instructions that torch found here, not those of the machine that builds: the folder may be shared.
    capability = torch.backends.cpu.get_cpu_capability()
    architecture = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}.get(capability, [])
    threads = "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"
    # No a·b + c in one rounding but where it is asked for: x_t is rebuilt, so both ways must give the same.
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
        return Native(str(library))
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"the C++ sweeps could not be built: {error}\nThey need a C++ compiler (g++ or clang++) and ninja "
            "(pip install manic[compile]). Without compile() a Mechanic does the same, in more passes over memory"
        ) from error


@lru_cache
def triton(device: torch.device) -> Kernels | None:
    """The Triton sweeps; None, with a warning, where a small example does not come out right."""
    try:
        from manic.triton_kernels import Triton
    except ImportError:
        return None
    kernels = Triton()
    try:
        fault = None if _works(kernels, device) else "they give wrong results"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault is None:
        return kernels
    warnings.warn(f"the Triton sweeps do not run on {device}, the eager ones do instead ({fault})", stacklevel=2)
    return None


def _works(kernels: Kernels, device: torch.device) -> bool:
    """Whether one step of a small example is right. Waits for the device."""
    x, delta, update = (torch.linspace(-1, n, 3000, device=device) for n in (1, 2, 3))
    delta_now = delta.clone()
    slot = Slot(x.clone(), x.clone(), 1.0, 0, x - delta / 2, delta_now)
    memory = Memory([slot], kernels.piece)
    true = torch.ones((), dtype=torch.bool, device=device)
    motion = torch.tensor([0.5, 1.0, 0.5, 0.75], device=device)
    sums = kernels.measure([slot], motion[0], memory).sum(0)
    kernels.discard([slot], true, memory)
    slot.param += update
    kernels.move([slot], motion, true, memory)
    products = (delta, x), (delta, x), (x, x), (x, x), (delta, delta)
    pairs = [
        (sums, torch.stack([(a * b).double().sum() for a, b in products])),
        (delta_now, 0.75 * (delta / 2 + update)),
        (slot.param, x + update),
        (slot.ref, x - delta / 2 + (delta / 2 + update) / 4),
    ]
    return all(bool((a - b).abs().max() < 1e-5 * b.abs().max()) for a, b in pairs)


def kernels_for(device: torch.device, *, compiled: bool) -> Kernels | None:
    """What there is for tensors on `device`; None: the eager sweeps."""
    if device.type == "cuda":
        return triton(device)
    return native() if compiled and device.type == "cpu" else None


@lru_cache(maxsize=1)
def compiled_tune() -> Callable[..., Any]:
    """``manic.tuner.tune()`` in a kernel or two instead of some sixty."""
    return torch.compile(tune, fullgraph=True, dynamic=False)
