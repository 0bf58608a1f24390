"""Which sweeps there are for the tensors of a device, beside the eager ones."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from manic.parameters import ParamState
from manic.sweeps.base import Table
from manic.sweeps.eager import Group
from manic.sweeps.native import native


def kernels_for(device: torch.device) -> type[Table] | None:
    """What there is for tensors on `device`; None: the eager sweeps."""
    if device.type == "cuda":
        return triton(device)
    return native() if device.type == "cpu" else None


def name_for(device: torch.device) -> str:
    """What checkpoints call the sweeps for tensors on `device`."""
    kernels = kernels_for(device)
    return f"eager {device.type}" if kernels is None else kernels.name


@lru_cache
def triton(device: torch.device) -> type[Table] | None:
    """The Triton sweeps; None, with a warning, where a small example does not come out right."""
    try:
        from manic.sweeps.triton_kernels import Triton
    except ImportError:
        return None
    try:
        if _works(Triton, device):
            return Triton
        fault = "they give wrong results"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    warnings.warn(f"the Triton sweeps do not run on {device}, the eager ones do instead ({fault})", stacklevel=2)
    return None


def _works(kernels: type[Table], device: torch.device) -> bool:
    """Whether one step of a small example comes out as the eager sweeps have it. Waits for the device."""
    ends = []
    for sweeps in (kernels, Group):
        x, grad, slot, update = (torch.linspace(-1, n, 3000, device=device) for n in (1, 2, 3, 4))
        group = sweeps([ParamState(x, grad, 1.0, 0, slot)], True)
        sums = group.measure().double().sum(0)
        group.discard(torch.ones((), dtype=torch.bool, device=device))
        x += update
        (found,) = group.move(torch.tensor([-0.5, 0.5, 0.25, 0.75], device=device))
        ends.append([sums, found, x, grad, slot])
    return all(bool((a - b).abs().max() < 1e-5 * b.abs().max()) for a, b in zip(*ends, strict=True))
