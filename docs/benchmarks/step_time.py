"""How long a wrapped step takes, as a multiple of the plain one: python docs/benchmarks/step_time.py

Base: AdamW(fused=True), gradients that stay. Contender and plain step take turns in one process (`ratio` in
contenders.py). The control is another plain optimizer in the contender's place: how far from 1.00 it is, is how far to
trust the rest. The floor is 1 + the time to read six words per parameter over that of the plain step: the two sweeps
must read x, g and x_ref, and x, x_t and x_ref. What they write comes on top. torch.sum and torch.dot do the reading, in
as many flat tensors; the fastest of their runs counts.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from contenders import CONTENDERS, Build, Parameters, adamw, installed, machine, ratio, seconds, write
from torch import nn

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Convolutions, norms and the last layer."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for shape in ((inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * inner, width, 1, 1), (4 * inner,), (4 * inner,)]
            width = 4 * inner
    return [*shapes, (1000, width), (1000,)]


def gpt2_small() -> Shapes:
    w = 768
    layer: Shapes = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,), (w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(50257, w), (1024, w), *(12 * layer), (w,), (w,)]


CASES: dict[str, Shapes] = {
    "500 small": 500 * [(32, 64)],
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
    "3 x 16.8M": 3 * [(4096, 4096)],
}


def parameters_of(shapes: Shapes, device: torch.device) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        p = nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(device))
        p.grad = 0.01 * torch.randn(shape, generator=generator).to(device)
        parameters.append(p)
    return parameters


def floor(shapes: Shapes, plain_ms: float, device: torch.device) -> float:
    """1 + six words of reading per parameter, in units of the plain step."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    flat = [torch.ones(numel, device=device) for _ in range(6)]
    repeats = max(1, round(20 / plain_ms))

    def sums() -> None:
        for t in flat:
            t.sum()

    def dots() -> None:
        for a, b in zip(flat[::2], flat[1::2], strict=True):
            torch.dot(a, b)

    reading = min(seconds(read, repeats, device) for _ in range(7) for read in (sums, dots))
    return 1 + 1e3 * reading / plain_ms


def begun(build: Build, shapes: Shapes, device: torch.device) -> float:
    """Milliseconds until an optimizer is built and has taken its first step."""
    parameters = parameters_of(shapes, device)
    return 1e3 * seconds(lambda: build(parameters).step(), 1, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each measurement (default: 15)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch threads (default: 1 2)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    print(f"{machine(args.device)}; step time over that of AdamW(fused=True), median [quartiles]")
    results = []
    for case in args.cases:
        shapes = CASES[case]
        for threads in args.threads:
            torch.set_num_threads(threads)
            for name, build, plain in installed(args.contenders):
                if plain is not adamw and threads != max(args.threads):
                    continue  # JAX takes all cores
                steps = [make(parameters_of(shapes, args.device)).step for make in (plain, build)]
                figures = ratio(*steps, args.rounds, args.device)
                if name == "control":
                    figures["floor"] = floor(shapes, figures["plain_ms"], args.device)
                results.append({"case": case, "threads": threads, "contender": name, **figures})
                print(
                    f"{case:12} {threads} thread(s) | {name:29} | {figures['ratio']:6.2f} "
                    f"[{figures['low']:.2f}, {figures['high']:.2f}] | plain {figures['plain_ms']:.2f} ms"
                    + (f" | floor {figures['floor']:.2f}" if "floor" in figures else ""),
                    flush=True,
                )
    for name, build, _ in installed([name for name in args.contenders if name in ("control", "manic")]):
        times = [begun(build, CASES["500 small"], args.device) for _ in range(args.rounds)]
        print(f"500 small    built, and the first step | {name:20} | {statistics.median(times):6.1f} ms", flush=True)
    write(args.json, args.device, results)


if __name__ == "__main__":
    main()
