"""Which sweeps there are for the tensors of a device, beside the eager ones."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from manic.parameters import ParamState
from manic.sweeps.base import Kernels, Memory
from manic.sweeps.native import native


def kernels_for(device: torch.device, *, compiled: bool) -> Kernels | None:
    """What there is for tensors on `device`; None: the eager sweeps."""
    if device.type == "cuda":
        return triton(device)
    return native() if compiled and device.type == "cpu" else None


@lru_cache
def triton(device: torch.device) -> Kernels | None:
    """The Triton sweeps; None, with a warning, where a small example does not come out right."""
    try:
        from manic.sweeps.triton_kernels import Triton
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
    ref = x - delta
    state = ParamState(x.clone(), x.clone(), 1.0, 0, ref.clone())
    memory = Memory([state], kernels.piece)
    motion = torch.tensor([-0.5, 0.5, 0.25, 0.75], device=device)
    sums = kernels.measure([state], True, memory).sum(0)
    kernels.discard([state], torch.ones((), dtype=torch.bool, device=device), memory)
    state.param += update
    kernels.move([state], True, motion, memory)
    products = (delta, x), (delta, x), (x, x), (x, x), (delta, delta)
    pairs = [
        (sums, torch.stack([(a * b).double().sum() for a, b in products])),
        (memory.update_sq.sum(), update.double().square().sum()),
        (state.param, x - delta / 2 + update / 2),
        (state.slot, ref + delta / 4 + 0.75 * update),
    ]
    return all(bool((a - b).abs().max() < 1e-5 * b.abs().max()) for a, b in pairs)
