"""What a wrapped optimizer holds, in bytes per parameter: python docs/benchmarks/memory.py

Counts what torch's allocator hands out and takes back (not the process's size). State: the tensors in the state dict,
less what plain AdamW has there. Held: what is held after three steps beyond parameters and gradients, less what plain
AdamW holds. Transient: the most that one more step holds at any moment beyond what is held before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from checkpoint_bytes import held
from contenders import CONTENDERS, Build, Parameters, adamw, installed, machine, write
from torch import nn


def parameters_of(numel: int, tensors: int, dtype: torch.dtype, device: torch.device | None = None) -> Parameters:
    parameters = [nn.Parameter(torch.ones(numel // tensors, dtype=dtype, device=device)) for _ in range(tensors)]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    return parameters


def stored(state: Any) -> int:
    """Bytes of the tensors in an optimizer's state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(stored, state.values())) if isinstance(state, dict) else 0


def measure(build: Build, numel: int, tensors: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes in the state after three steps; bytes held then beyond parameters and gradients; and transiently in a
    fourth step."""
    parameters = parameters_of(numel, tensors, dtype)
    kept: list[Any] = []

    def run() -> None:
        kept.append(build(parameters))
        for _ in range(3):
            kept[0].step()

    _, persistent = held(run)
    transient, _ = held(kept[0].step)
    return stored(kept[0].state), persistent, transient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000, help="parameters (default: 50 million)")
    parser.add_argument("--tensors", type=int, default=10, help="in that many tensors (default: 10)")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}; {args.numel:,} parameters in {args.tensors} tensors; bytes per parameter")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        plain_state, plain, _ = measure(adamw, args.numel, args.tensors, dtype)
        for name, build, base in installed(args.contenders):
            if base is not adamw:
                continue
            state, persistent, transient = measure(build, args.numel, args.tensors, dtype)
            more = (state - plain_state) / args.numel, (persistent - plain) / args.numel, transient / args.numel
            figures = dict(zip(("state", "persistent", "transient"), more, strict=True))
            kind = str(dtype).removeprefix("torch.")
            results.append({"contender": name, "dtype": kind, **figures, "transient_bytes": transient})
            print(
                f"{kind:9} {name:25} | state {figures['state']:5.2f} | held {figures['persistent']:5.2f} | transient "
                f"{figures['transient']:5.2f} ({transient / 2**20:.2f} MiB)",
                flush=True,
            )
    write(args.json, torch.device("cpu"), results)


if __name__ == "__main__":
    main()
