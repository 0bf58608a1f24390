"""How exact the sums over very many elements are: python docs/benchmarks/sums.py

‖g‖² of 100 million elements, as one torch.dot in float32 and as a Mechanic measures it, against float64. Relative
errors. (mechanic-pytorch adds up one torch.vdot per tensor.) Beside them the worst torch.dot over 64 Ki of these
elements: how exact that is differs with the processor; the eager sums are as exact as that, of any number of elements.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from contenders import machine, write
from torch import nn

from manic.parameters import ParamState
from manic.sweeps.native import native
from manic.sweeps.passes import Passes
from manic.tuner import Sums


def errors(numel: int, dtype: torch.dtype) -> dict[str, float]:
    g = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = [piece.double().square().sum().item() for piece in g.split(2**16)]
    short = [torch.dot(piece, piece).item() for piece in (part.float() for part in g.split(2**16))]
    found = {
        "one torch.dot": abs(torch.dot(g.float(), g.float()).item() / sum(exact) - 1),
        "torch.dot, 64 Ki": max(abs(a / b - 1) for a, b in zip(short, exact, strict=True)),
    }
    zeros = torch.zeros(numel)
    rest = torch.zeros(numel, dtype=torch.int16) if dtype == torch.bfloat16 else None
    for name, kernels in (("manic", native()), ("manic, eager", None)):
        state = ParamState(nn.Parameter(g), g, 1.0, 0, zeros, rest)
        passes = Passes([state], kernels=lambda _, kernels=kernels: kernels)
        ((_, sums),) = passes.measure(torch.zeros(1, dtype=torch.float64))
        found[name] = abs(Sums(*sums[0]).grad_sq.item() / sum(exact) - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000, help="elements (default: 100 million)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(torch.device('cpu'))}; {args.numel:,} elements, relative error of ‖g‖²")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, error in errors(args.numel, dtype).items():
            kind = str(dtype).removeprefix("torch.")
            results.append({"dtype": kind, "how": name, "error": error})
            print(f"{kind:9} {name:16} | {error:.1e}", flush=True)
    write(args.json, torch.device("cpu"), results)


if __name__ == "__main__":
    main()
