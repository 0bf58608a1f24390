"""What a checkpoint costs in memory, with and without Mechanic: python docs/benchmarks/checkpoint_bytes.py

Counts the bytes that torch's CPU allocator hands out (not the process's size) during each call, per parameter: the most
that was held at once beyond what was there before, and what was still held after it.
"""

# mypy: disable-error-code="attr-defined, no-untyped-call"
from __future__ import annotations

import argparse
import gc
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.profiler import ProfilerActivity, profile

from manic import Mechanic


def held(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes held at most, and at the end, beyond those held before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    at_most = now = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type().name == "CPU":
            now += event.nbytes()
            at_most = max(at_most, now)
    del result
    return at_most, now


def build(numel: int, tuned: bool, steps: int) -> tuple[nn.Module, Any]:
    tensors = 12
    model = nn.ParameterList([nn.Parameter(torch.ones(numel // tensors)) for _ in range(tensors)])
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if tuned:
        optimizer = Mechanic(optimizer)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def measure(numel: int, tuned: bool, folder: Path) -> dict[str, tuple[int, int]]:
    """The calls of docs/checkpoints.md; what is loaded is loaded into a fresh optimizer."""

    def save() -> None:
        dcp.save({"optimizer": get_optimizer_state_dict(*trained)}, checkpoint_id=folder)

    def load() -> None:
        state = {"optimizer": get_optimizer_state_dict(*fresh)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(*fresh, state["optimizer"])

    trained, fresh = build(numel, tuned, steps=2), build(numel, tuned, steps=0)
    saved = trained[1].state_dict()
    results = {
        "state_dict()": held(lambda: trained[1].state_dict()),
        "load_state_dict()": held(lambda: fresh[1].load_state_dict(saved)),
    }
    fresh = build(numel, tuned, steps=0)
    results["get_optimizer_state_dict, dcp.save"] = held(save)
    results["dcp.load, set_optimizer_state_dict"] = held(load)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters, float32 (default: 100 million)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    print(f"torch {torch.__version__}, {platform.machine()}, {args.numel:,} float32 parameters, AdamW; bytes/parameter")
    print(f"{'':36} | {'plain: at most':>14} {'after':>6} | {'Mechanic: at most':>17} {'after':>6}")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        plain, tuned = measure(args.numel, False, Path(one)), measure(args.numel, True, Path(other))
    for name in plain:
        (a, b), (c, d) = ([value / args.numel for value in values[name]] for values in (plain, tuned))
        print(f"{name:36} | {a:14.2f} {b:6.2f} | {c:17.2f} {d:6.2f}")


if __name__ == "__main__":
    main()
