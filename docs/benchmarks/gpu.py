"""Check manic on a GPU and measure it, in one call of less than 8 minutes: python docs/benchmarks/gpu.py

It needs CUDA, torch, Triton and this checkout, which need not be installed. It prints one table: a check or figure,
what came out, the goal, and whether that was reached. The exit status is 0 if no goal was missed and nothing was
skipped for want of time. `--dry` goes as far as a CPU lets it, on little, and judges no time.

A step's floor is 1 + the time to move 9 words per parameter (what the two sweeps read and write) over that of the plain
step, at the bandwidth of a large copy. What fits into the cache can be below it. Memory: bytes per parameter in the
state and held after five steps, both less what plain AdamW has, and transiently in a sixth.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.append(str(Path(__file__).parents[2] / "src"))  # where manic is not installed
import gpu_checks
import memory
from contenders import Parameters, adamw, machine, ratio, seconds, write
from gpu_checks import Found, captured, limit
from step_time import CASES, Shapes, parameters_of

import manic
from manic import Mechanic

BUDGET = 420.0  # seconds, after which no check begins
MODELS = {name: CASES[name] for name in ("500 small", "ResNet-50", "GPT-2 small")} | {"8 x 16.8M": 8 * [(4096, 4096)]}


class Check(NamedTuple):
    name: str
    goal: str
    call: Callable[[], Found]
    on_cpu: bool = True  # whether a CPU has what it is about


# ---------------------------------------------------------------------- time and memory


@lru_cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the best of some large copies."""
    source = torch.ones(2**18 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 10, device) for _ in range(6))


def copying(device: torch.device) -> Found:
    return Found(f"{bandwidth(device) / 1e9:.0f} GB/s", None, {"bytes_per_second": bandwidth(device)})


def capturable(parameters: Parameters) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True, capturable=True)


def step_time(device: torch.device, shapes: Shapes, goal: float, graphs: bool = False) -> Found:
    """In units of the plain step, beside a control (another plain optimizer) and the floor."""
    dry, build = device.type == "cpu", capturable if graphs else adamw
    if dry:
        shapes = [tuple(min(n, 64) for n in shape) for shape in shapes[:8]]
    builds = (build, build, lambda parameters: Mechanic(build(parameters)))
    steps = [make(parameters_of(shapes, device)).step for make in builds]
    plain, other, ours = map(captured, steps) if graphs else steps
    figures = ratio(plain, ours, 2 if dry else 15, device)
    figures["control"] = ratio(plain, other, 2 if dry else 15, device)["ratio"]
    moved = 9 * 4 * sum(map(math.prod, shapes))
    figures["floor"] = 1 + moved / bandwidth(device) / (1e-3 * figures["plain_ms"])
    text = "{ratio:.2f} [{low:.2f}, {high:.2f}] control {control:.2f} floor {floor:.2f} plain {plain_ms:.3f} ms"
    return Found(text.format(**figures), None if dry or goal == math.inf else figures["ratio"] <= goal, figures)


def held(build: Callable[[Parameters], Any], device: torch.device, numel: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes in the state, held and transient; on a CPU those in the state alone."""
    parameters = memory.parameters_of(numel, 8, dtype, device)
    gc.collect()
    before = 0 if device.type == "cpu" else torch.cuda.memory_allocated()
    optimizer = build(parameters)
    for _ in range(5):
        optimizer.step()
    found = {"state": memory.stored(optimizer.state)}
    if device.type != "cpu":
        after = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        found |= {"held": after - before, "transient": torch.cuda.max_memory_allocated() - after}
    return found


def bytes_held(device: torch.device, dtype: torch.dtype, *goals: float) -> Found:
    dry = device.type == "cpu"
    numel = 8 * (2**14 if dry else 2**23)  # tensors of whole MiB, which the allocator does not round up
    plain, ours = (held(build, device, numel, dtype) for build in (adamw, lambda p: Mechanic(adamw(p))))
    figures = {name: (ours[name] - (name != "transient") * plain[name]) / numel for name in ours}
    reached = all(figure <= goal + 0.05 for figure, goal in zip(figures.values(), goals, strict=not dry))
    text = ", ".join(f"{name} {figure:.2f}" for name, figure in figures.items())
    return Found(text + "; the others: not on a CPU" * dry, reached, figures)


# ---------------------------------------------------------------------- the table


def versions() -> Found:
    python, triton, cuda = platform.python_version(), gpu_checks.version_of_triton(), torch.version.cuda
    return Found(f"manic {manic.__version__}, Python {python}, Triton {triton}, CUDA {cuda}")


def checks(device: torch.device) -> Iterator[Check]:
    def check(name: str, goal: str, function: Callable[..., Found], *arguments: Any, on_cpu: bool = True) -> Check:
        return Check(name, goal, partial(function, device, *arguments), on_cpu)

    yield Check("versions", "-", versions)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        yield check(f"kernels beside eager, {dtype}", f"<= {limit(dtype)}", gpu_checks.kernels_beside_eager, dtype)
    for variant in ("scale_free", "paper"):
        yield check(f"a run beside the oracle's, {variant}", "<= 1e-09", gpu_checks.run_beside_oracle, variant)
    for dtype in (torch.float32, torch.bfloat16):
        yield check(f"two runs, {dtype}", "same bits", gpu_checks.two_runs, dtype)
        yield check(f"resumed in a new process, {dtype}", "same bits", gpu_checks.resumed_run, dtype)
    yield check("loss of bfloat16 and float32", "within 2 %", gpu_checks.bfloat16_beside_float32)
    yield check("host reads in a step", "none", gpu_checks.host_reads, on_cpu=False)
    yield check("steps on a busy device", "return", gpu_checks.busy_device, on_cpu=False)
    yield check("bytes per parameter, torch.float32", "<= 4, 4, 4", bytes_held, torch.float32, 4, 4, 4)
    yield check("bytes per parameter, torch.bfloat16", "<= 6, 6, 2", bytes_held, torch.bfloat16, 6, 6, 2)
    yield check("bandwidth of a copy", "-", copying)
    for name, shapes in MODELS.items():
        large = sum(map(math.prod, shapes)) >= 1e8
        yield check(f"step / plain, {name}", "<= 2.2" if large else "-", step_time, shapes, 2.2 if large else math.inf)
    # Last, since a capture that fails may leave CUDA in a state in which nothing works.
    yield check("a replayed step and the eager one", "same bits", gpu_checks.replayed_step, on_cpu=False)
    graphs = MODELS["500 small"], 1.5, True
    yield check("step / plain, 500 small, CUDA graphs", "<= 1.5", step_time, *graphs, on_cpu=False)


def tried(check: Check) -> Found:
    """Make a check. One that raises has failed."""
    try:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return check.call()
    except Exception as error:
        traceback.print_exc()
        return Found(f"{type(error).__name__}: {error}".splitlines()[0][:160], False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, on little, without what only CUDA has")
    parser.add_argument("--json", type=Path, help="write the table there, for report.py")
    args = parser.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which cuBLAS gives the same bits every time
    if args.dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --dry goes as far as a CPU lets it")
    device, start = torch.device("cpu" if args.dry else "cuda:0"), time.monotonic()
    line = "{:40} | {:68} | {:10} | {}"
    print(machine(device), line.format("check or figure", "result", "goal", "ok"), sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    for check in checks(device):
        if args.dry and not check.on_cpu:
            found, ok = Found("not on a CPU"), "-"
        elif time.monotonic() - start > BUDGET:
            found, ok = Found(f"did not begin within {BUDGET:.0f} seconds"), "skipped"
        else:
            found = tried(check)
            ok = {True: "yes", False: "NO", None: "-"}[found.reached]
        print(line.format(check.name, found.result, check.goal, ok), flush=True)
        rows.append({"check": check.name, "goal": check.goal, "ok": ok, **asdict(found)})
        write(args.json, device, rows)  # each time: the machine may be taken away
    print(f"{time.monotonic() - start:.0f} seconds")
    amiss = [f"{row['check']} ({row['ok']})" for row in rows if row["ok"] in ("NO", "skipped")]
    if amiss:
        print("not as it should be:", "; ".join(amiss))
    return int(bool(amiss))


if __name__ == "__main__":
    sys.exit(main())
