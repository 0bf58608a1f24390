"""What a whole training step takes, as a multiple of the plain one: python docs/benchmarks/end_to_end.py

A GPT of 23 million parameters on 512 characters per step (docs/examples/chargpt.py): forward, backward, step,
zero_grad. Base: AdamW(fused=True). Contender and plain take turns in one process, each with a model of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Build, adamw, installed, machine, ratio, write

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from chargpt import CONTEXT, CharGPT, batch, corpus, loss_of


def training(build: Build, layers: int, width: int, tokens: int, device: torch.device) -> Callable[[], Any]:
    """One step of it, as a function."""
    torch.manual_seed(0)
    model = CharGPT(layers, width, heads=width // 64).to(device)
    optimizer = build(list(model.parameters()))
    characters = batch(corpus()[0], 0, size=tokens // CONTEXT).to(device)

    def step() -> None:
        loss_of(model, characters).backward()
        optimizer.step()
        model.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each measurement (default: 15)")
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = sum(p.numel() for p in CharGPT(args.layers, args.width, heads=args.width // 64).parameters())
    print(f"{machine(args.device)}; {size / 1e6:.1f}M parameters, {args.tokens} tokens, {args.threads} thread(s)")
    results = []
    for name, build, plain in installed(args.contenders):
        if plain is not adamw:
            continue  # optax: another framework, another model
        shape = args.layers, args.width, args.tokens, args.device
        figures = ratio(training(adamw, *shape), training(build, *shape), args.rounds, args.device)
        results.append({"contender": name, "threads": args.threads, **figures})
        print(
            f"{name:29} | {figures['ratio']:6.3f} [{figures['low']:.3f}, {figures['high']:.3f}] "
            f"| plain {figures['plain_ms']:.0f} ms",
            flush=True,
        )
    write(args.json, args.device, results)


if __name__ == "__main__":
    main()
