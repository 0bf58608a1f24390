"""What gpu.py checks: numbers, bits, and that no step waits. Each check says what it found, on any device.

Run as a script it is the new process of the resume check: python gpu_checks.py FOLDER
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comparing import BASES, run_both
from contenders import Parameters, adamw
from resuming import same
from step_time import parameters_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import regression

from manic import Mechanic
from manic.parameters import REST, ParamState, join, split, wide
from manic.sweeps.kernels import kernels_for
from manic.sweeps.native import native
from manic.sweeps.passes import Passes

STEPS = 80  # of Training; a resumed run is saved half way


@dataclass
class Found:
    """The result of a check. `reached` is None where there is no goal."""

    result: str
    reached: bool | None = None
    figures: dict[str, float] = field(default_factory=dict)


def same_bits(alike: bool) -> Found:
    return Found("same bits" if alike else "other bits", alike)


# ---------------------------------------------------------------------- numbers


def version_of_triton() -> str:
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"


def kernels_of(device: torch.device) -> Any:
    """Triton; on a CPU in its interpreter, or else the C++, or None."""
    if device.type == "cpu":
        # Triton's interpreter is NumPy, and older ones stumble over integers that wrap around.
        recent = tuple(map(int, version_of_triton().split(".")[:2])) >= (3, 9)
        if not recent or importlib.util.find_spec("numpy") is None:
            return native()
    from manic.sweeps.triton_kernels import Triton

    return Triton


def limit(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


def kernels_beside_eager(device: torch.device, dtype: torch.dtype) -> Found:
    kernels, dry = kernels_of(device), device.type == "cpu"
    if kernels is None or dtype not in kernels.dtypes:
        return Found("there are none here")
    if not dry and kernels_for(device) is not kernels:
        return Found("manic does not choose them", False)
    many, large = (3, [4097]) if dry else (500, [4097, 16_383, 16_401, 100_003, 4_000_037])
    value = apart(kernels, dtype, device, [1, 15, 16, 17, *large, *range(100, 100 + many)])
    return Found(f"{value:.1e} ({kernels.__name__})", value <= limit(dtype), {"value": value})


@torch.no_grad()
def apart(kernels: Any, dtype: torch.dtype, device: torch.device, sizes: list[int]) -> float:
    """The largest difference between two steps with `kernels` and with the eager sweeps. That of an element is in units
    of 1 + its size, that of a sum in units of the norms that it is made of. With either slot, and at odd addresses."""
    worst = []
    for difference, offset in ((True, 0), (True, 1), (False, 0)):
        ends: list[list[tuple[Tensor, Tensor]]] = [[], []]  # values and their units, with each of the two
        for end, which in zip(ends, (kernels, None), strict=True):
            generator = torch.Generator().manual_seed(0)
            states = []
            for n in sizes:
                x, g, y = (torch.randn(n, generator=generator).to(device, wide(dtype)) for _ in range(3))
                stored, rest = split(x, dtype)
                param = torch.empty(n + offset, dtype=dtype, device=device)[offset:].copy_(stored)
                states.append(ParamState(nn.Parameter(param), g.to(dtype), 1.0, 0, y, rest))
            passes = Passes(states, difference=difference, kernels=lambda _, which=which: which)
            for motion in ([0.3, 0.7, 0.8, 0.75], [-0.1, 0.2, 1.0, 0.1]):
                ((_, row),) = passes.measure(torch.zeros(1, dtype=torch.float64, device=device))
                sums = row[0, :5]  # <d,g> <d,x> |g|² |x|² |d|²
                end.append((sums, torch.cat([(sums[2:4] * sums[4]).sqrt(), sums[2:]])))
                passes.discard(torch.ones(1, dtype=torch.bool, device=device))
                for state in states:
                    state.param += 0.01 * state.grad  # type: ignore[operator]
                (moved,) = passes.move(torch.tensor([motion], dtype=torch.float64, device=device)).values()
                end.append((moved, moved))
            tensors = [t for s in states for t in (join(s.param.detach(), s.rest, wide(dtype)), s.slot)]
            passes.discard(torch.zeros(1, dtype=torch.bool, device=device))
            end.extend((t.double(), 1 + t.double().abs()) for t in [*tensors, *(s.grad for s in states)])
        worst += [((a - b).abs() / unit).max() for (a, _), (b, unit) in zip(*ends, strict=True)]
    return torch.stack(worst).max().item()


def run_beside_oracle(device: torch.device, variant: str) -> Found:
    """100 steps of a small regression, AdamW and cosine, in float64: the larger gap of x and of the scale. "scale_free"
    also meets a wild gradient."""
    BASES["fused"] = (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True), BASES["adamw"][1])
    unit, wild, options = (0.1, 1e4, {}) if variant == "scale_free" else (1.0, 1.0, {"s_init": 1e-4})
    with torch.device(device):  # where the problem makes its tensors
        gaps = run_both(regression(), "fused", torch.float64, True, unit, wild, 100, variant=variant, **options)
    return Found(f"{max(gaps):.1e}", max(gaps) <= 1e-9, {"value": max(gaps)})


# ---------------------------------------------------------------------- whole runs


class Training:
    """A small network with its Mechanic and a schedule; another batch in every step."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = [torch.randn(n, m, generator=generator) / math.sqrt(n) for n, m in ((64, 601), (601, 16))]
        self.weights = [nn.Parameter(w.to(device, dtype)) for w in start]
        optimizer = adamw(self.weights)
        self.mechanic = Mechanic(optimizer, CosineAnnealingLR(optimizer, T_max=STEPS))

    def loss(self, t: int) -> Tensor:
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(t)).to(self.weights[0])
        return ((x @ self.weights[0]).tanh() @ self.weights[1] - x[:, :16].sin()).float().square().mean()

    def train(self, start: int = 0, stop: int = STEPS) -> Training:
        for t in range(start, stop):
            self.mechanic.zero_grad()
            self.loss(t).backward()
            self.mechanic.step()
        return self

    def state(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "mechanic": self.mechanic.state_dict()}


def two_runs(device: torch.device, dtype: torch.dtype) -> Found:
    one, other = (Training(device, dtype).train() for _ in range(2))
    return same_bits(same(one.state(), other.state()) and bool(one.mechanic.scale > 0))


def resumed_run(device: torch.device, dtype: torch.dtype) -> Found:
    run = Training(device, dtype).train(stop=STEPS // 2)
    half = [w.detach().clone() for w in run.weights]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(run.state(), Path(folder, "half.pt"))
        threads = str(torch.get_num_threads())  # on a CPU a product's bits may depend on them
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, __file__, folder], env=env, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"the new process failed: {done.stderr[-3000:]}")
        end = torch.load(Path(folder, "end.pt"), weights_only=True)
    return same_bits(same(run.train(STEPS // 2).state(), end) and not same(half, end["weights"]))


def resume(folder: Path) -> None:
    """Resume in the new process, with a model of other weights, and save where the run ends."""
    saved = torch.load(folder / "half.pt", weights_only=True)
    run = Training(saved["weights"][0].device, saved["weights"][0].dtype, seed=99)
    with torch.no_grad():
        for w, kept in zip(run.weights, saved["weights"], strict=True):
            w.copy_(kept)
    run.mechanic.load_state_dict(saved["mechanic"])
    torch.save(run.train(STEPS // 2).state(), folder / "end.pt")


def bfloat16_beside_float32(device: torch.device) -> Found:
    """Loss on a batch that neither run has seen; and how many elements have digits beyond those of bfloat16."""
    runs = [Training(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    before = runs[0].loss(STEPS).item()
    full, half = (run.train().loss(STEPS).item() for run in runs)
    rest = torch.cat([runs[1].mechanic.state[w][REST].flatten() for w in runs[1].weights])
    share = rest.count_nonzero().item() / rest.numel()
    reached = abs(half - full) <= 0.02 * full and full < before / 3 and share > 0.9
    figures = {"before": before, "float32": full, "bfloat16": half, "rest": share}
    return Found(f"{before:.3f} to {half:.4f}; float32 {full:.4f}; {share:.0%} have a rest", reached, figures)


# ---------------------------------------------------------------------- what only CUDA has


def under_way(device: torch.device) -> Mechanic:
    """A Mechanic that has taken its first steps, on parameters of two dtypes."""
    parameters = parameters_of([(300, 300), (7,)], device)
    parameters.append(nn.Parameter(torch.ones(64, 64, device=device, dtype=torch.bfloat16)))
    parameters[-1].grad = torch.ones_like(parameters[-1])
    optimizer = adamw(parameters)
    mechanic = Mechanic(optimizer, CosineAnnealingLR(optimizer, T_max=100))
    for _ in range(6):
        mechanic.step()
    torch.cuda.synchronize()
    return mechanic


def host_reads(device: torch.device) -> Found:
    mechanic, noticed = under_way(device), False
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            mechanic.step()
        try:
            mechanic.scale.item()
        except RuntimeError:
            noticed = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Found("none" if noticed else "none, but item() was not noticed either", noticed)


def busy_device(device: torch.device) -> Found:
    """Steps are to return while the device is still at other work, which takes it about a second."""
    mechanic, over = under_way(device), torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)
    over.record()
    for _ in range(3):
        mechanic.step()
    waited = over.query()
    torch.cuda.synchronize()
    return Found("wait" if waited else "return", not waited)


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """A step, after its first four, as a CUDA graph: to call it is to replay the graph."""
    for _ in range(4):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_kept: Any = step) -> None:  # the graph does not keep what it works on
        graph.replay()

    return replay


def replayed_step(device: torch.device) -> Found:
    def build() -> tuple[Parameters, Callable[[], None]]:
        parameters = parameters_of([(3,), (5_000,), (70_000,)], device)
        lr = torch.tensor(1e-3, device=device)
        mechanic = Mechanic(torch.optim.AdamW(parameters, lr=lr, fused=True, capturable=True))

        def step() -> None:
            for p in parameters:
                p.grad.copy_(p.detach().sin())  # type: ignore[union-attr]
            mechanic.step()

        return parameters, step

    (eager, step), (others, other) = build(), build()
    for _ in range(24):
        step()
    replay = captured(other)
    before = [p.detach().clone() for p in others]
    for _ in range(20):
        replay()
    return same_bits(all(map(torch.equal, eager, others)) and not all(map(torch.equal, before, others)))


if __name__ == "__main__":
    resume(Path(sys.argv[1]))
