"""What the benchmarks compare: AdamW plain, with manic, and with what else is installed. And how they time it."""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from manic import Mechanic, algorithm

Parameters = list[nn.Parameter]
Build = Callable[[Parameters], Any]  # something with a step()


def adamw(parameters: Parameters) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


class Eager(Mechanic):
    """Sweeps as where manic was installed without a C++ compiler."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with patch.object(algorithm, "kernels_for", lambda _: None):
            return super().step(closure)


def frozen(parameters: Parameters) -> Mechanic:
    mechanic = Mechanic(adamw(parameters))
    bare = [p for p in parameters if p.grad is None]  # without gradients there is nothing to learn
    for p in bare:
        p.grad = torch.full_like(p, 1e-3)
    for _ in range(3):
        mechanic.step()
    mechanic.freeze()
    for p in bare:
        p.grad = None
    return mechanic


def schedule_free(module: Any) -> Build:
    def build(parameters: Parameters) -> Any:
        optimizer = module.AdamWScheduleFree(parameters, lr=1e-3)
        optimizer.train()
        return optimizer

    return build


class Optax:
    """An optax transformation, jitted, on arrays of the same shapes and gradients of the same size."""

    def __init__(self, make: Callable[[Any], Any], parameters: Parameters) -> None:
        import jax
        import jax.numpy as jnp
        import optax
        import optax.contrib

        transformation = make(optax)
        self.values = [jnp.full(tuple(p.shape), 0.02) for p in parameters]
        self.grads = [jnp.full(tuple(p.shape), 0.01) for p in parameters]
        self.state = jax.tree.map(jnp.copy, transformation.init(self.values))  # parts of it share their memory

        def update(values: Any, grads: Any, state: Any) -> Any:
            updates, state = transformation.update(grads, state, values)
            return optax.apply_updates(values, updates), state

        self.update, self.wait = jax.jit(update, donate_argnums=(0, 2)), jax.block_until_ready

    def step(self) -> None:
        self.values, self.state = self.wait(self.update(self.values, self.grads, self.state))


def optax_adamw(parameters: Parameters) -> Any:
    return Optax(lambda optax: optax.adamw(1e-3), parameters)


# The module that it needs, how it is built, and what it is compared with.
CONTENDERS: dict[str, tuple[str, Callable[[Any], Build], Build]] = {
    "control": ("torch", lambda _: adamw, adamw),
    "manic": ("manic", lambda _: lambda p: Mechanic(adamw(p)), adamw),
    "manic, eager": ("manic", lambda _: lambda p: Eager(adamw(p)), adamw),
    "manic, frozen": ("manic", lambda _: frozen, adamw),
    "mechanic-pytorch": (
        "mechanic_pytorch",
        lambda m: lambda p: m.mechanize(torch.optim.AdamW)(p, lr=1e-3, fused=True),
        adamw,
    ),
    "Prodigy": ("prodigyopt", lambda m: lambda p: m.Prodigy(p), adamw),
    "AdamWScheduleFree": ("schedulefree", schedule_free, adamw),
    "optax mechanize / optax adamw": (
        "optax",
        lambda _: lambda p: Optax(lambda optax: optax.contrib.mechanize(optax.adamw(1e-3)), p),
        optax_adamw,
    ),
}


def installed(names: list[str]) -> Iterator[tuple[str, Build, Build]]:
    """Name, contender and what it is compared with; what is not installed is left out."""
    for name in names:
        module, make, plain = CONTENDERS[name]
        try:
            yield name, make(importlib.import_module(module)), plain
        except ImportError:
            continue


def seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Mean time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ratio(
    plain: Callable[[], Any], contender: Callable[[], Any], rounds: int, device: torch.device
) -> dict[str, float]:
    """Interleaved: plain, contender, plain, … A round's ratio is the contender's time over the mean of its two
    neighbours. Median and quartiles of the rounds, and the plain call in milliseconds."""
    for call in (plain, contender):
        seconds(call, 3, device)
    repeats = max(1, round(0.05 / seconds(plain, 3, device)))
    times = [seconds(plain, repeats, device)]
    ratios = []
    for _ in range(rounds):
        ours = seconds(contender, repeats, device)
        times.append(seconds(plain, repeats, device))
        ratios.append(2 * ours / (times[-1] + times[-2]))
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": median, "low": low, "high": high, "plain_ms": 1e3 * statistics.median(times)}


def machine(device: torch.device) -> str:
    """torch's version and the name of the processor or GPU."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {model}, {torch.backends.cpu.get_cpu_capability()}"


def write(path: Path | None, device: torch.device, results: list[dict[str, Any]]) -> None:
    """The figures for report.py, as JSON; nowhere if `path` is None."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1))
