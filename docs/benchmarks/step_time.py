"""How long a wrapped step takes, as a multiple of the plain one: python docs/benchmarks/step_time.py

Base: AdamW(fused=True), gradients that stay. In one process, interleaved: per round plain, contender, plain; the ratio
of a round is the contender's time over the mean of its two neighbours, and the figure is the median of the rounds. The
control is another plain optimizer in the contender's place: how far from 1.00 it is, is how far to trust the rest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manic import Mechanic

Shapes = list[tuple[int, ...]]
Build = Callable[[list[nn.Parameter]], Any]


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


def adamw(parameters: list[nn.Parameter]) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


# The module that it needs, and how it is built around AdamW.
CONTENDERS: dict[str, tuple[str, Callable[[Any], Build]]] = {
    "control": ("torch", lambda _: adamw),
    "manic": ("manic", lambda _: lambda p: Mechanic(adamw(p))),
    "manic, store_delta=False": ("manic", lambda _: lambda p: Mechanic(adamw(p), store_delta=False)),
    "mechanic-pytorch": (
        "mechanic_pytorch",
        lambda m: lambda p: m.mechanize(torch.optim.AdamW)(p, lr=1e-3, fused=True),
    ),
    "AdamWScheduleFree": ("schedulefree", lambda m: lambda p: trained(m.AdamWScheduleFree(p))),
    "Prodigy": ("prodigyopt", lambda m: lambda p: m.Prodigy(p)),
}


def trained(optimizer: Any) -> Any:
    optimizer.train()
    return optimizer


def parameters_of(shapes: Shapes, device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        p = nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(device))
        p.grad = 0.01 * torch.randn(shape, generator=generator).to(device)
        parameters.append(p)
    return parameters


def seconds(optimizer: Any, repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ratio(shapes: Shapes, build: Build, rounds: int, device: torch.device) -> dict[str, float]:
    """Median of the rounds' ratios, their quartiles, and the plain step in milliseconds."""
    plain, contender = adamw(parameters_of(shapes, device)), build(parameters_of(shapes, device))
    for optimizer in (plain, contender):
        seconds(optimizer, 3, device)
    repeats = max(1, round(0.05 / seconds(plain, 3, device)))
    times = [seconds(plain, repeats, device)]
    ratios = []
    for _ in range(rounds):
        ours = seconds(contender, repeats, device)
        times.append(seconds(plain, repeats, device))
        ratios.append(2 * ours / (times[-1] + times[-2]))
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": median, "low": low, "high": high, "plain_ms": 1e3 * statistics.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each measurement (default: 15)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch threads (default: 1 2)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}; step time over that of AdamW(fused=True), median [quartiles]")
    results = []
    for case in args.cases:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for contender in args.contenders:
                module, make = CONTENDERS[contender]
                try:
                    build = make(importlib.import_module(module))
                except ImportError:
                    continue  # a peer that is not installed
                figures = ratio(CASES[case], build, args.rounds, args.device)
                results.append({"case": case, "threads": threads, "contender": contender, **figures})
                print(
                    f"{case:12} {threads} thread(s) | {contender:24} | {figures['ratio']:6.2f} "
                    f"[{figures['low']:.2f}, {figures['high']:.2f}] | plain {figures['plain_ms']:.2f} ms",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "machine": name, "results": results}, indent=1))


if __name__ == "__main__":
    main()
