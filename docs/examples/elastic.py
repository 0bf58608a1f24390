"""Kill a worker of an FSDP2 training: the group starts again by itself, and the run ends as if nothing had been.

    python docs/examples/elastic.py        (with torch, matplotlib and tqdm installed; on the CPU, about a minute)

1. trains fsdp.py on 2 processes, uninterrupted;
2. trains it again, kills one of the 2 processes (SIGKILL) mid-way and leaves the rest to torchrun; compares each
   step, also those that were done twice, and the final parameters with those of the first run: every bit;
3. goes on from the same checkpoint with 1 process, which sums in another order: compares up to rounding;
4. prints one table, and writes one picture.
"""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

SCRIPT = Path(__file__).with_name("fsdp.py")
EVERY = 20  # steps between two checkpoints
VICTIM = 1  # the rank that is killed
TOLERANCE = 1e-5  # of the losses on another number of processes, relative
PATIENCE = 180  # seconds without a step until a run counts as stuck

Record = dict[str, float]


def launch(out: Path, steps: int, processes: int) -> subprocess.Popen[bytes]:
    """Start torchrun. What it and its workers print goes into a file: they have much to say about a killed worker."""
    out.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    torchrun += ["--nproc-per-node", str(processes)]
    script = [str(SCRIPT), "--steps", str(steps), "--every", str(EVERY), "--out", str(out)]
    # On the CPU and in one thread a sum is always made in the same order. On a GPU some are not.
    exact = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    restartable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see fsdp.py
    with (out / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [*torchrun, *script], env={**os.environ, **exact, **restartable}, stdout=log, stderr=subprocess.STDOUT
        )


def follow(process: subprocess.Popen[bytes], out: Path, name: str, steps: int, until: int | None = None) -> None:
    """Wait for the end of the run, or until it has done `until` steps."""
    done, since = -1, time.monotonic()
    with tqdm(total=steps, desc=name, disable=None) as bar:
        while True:
            ended = process.poll() is not None
            records = history(out)
            if len(records) != done:
                done, since = len(records), time.monotonic()
                bar.n = int(records[-1]["step"]) + 1 if records else 0
                bar.refresh()
            if ended or (until is not None and bar.n >= until):
                break
            if time.monotonic() - since > PATIENCE:
                process.terminate()
                raise SystemExit(f"{name}: no step for {PATIENCE} seconds, see {out / 'log.txt'}")
            time.sleep(0.02)
    if process.returncode or (ended and until is not None):
        raise SystemExit(f"{name}: ended with exit code {process.returncode}, see {out / 'log.txt'}")


def history(out: Path) -> list[Record]:
    """The steps in the order in which they were done; without a last line that is still being written."""
    path = out / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lives(records: list[Record]) -> list[dict[int, Record]]:
    """Cut where a step is not the successor of the one before."""
    found: list[dict[int, Record]] = []
    last = -1
    for record in records:
        step = int(record["step"])
        if not found or step != last + 1:
            found.append({})
        found[-1][step] = record
        last = step
    return found


def workers(out: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(out.glob("rank*.pid"))]


def norm(parameters: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(p.double().square().sum()) for p in parameters.values()))


def kill_one(out: Path, steps: int, spare: Path) -> tuple[int, int]:
    """A run that loses a worker some steps after a checkpoint, which is copied into `spare`.

    Returns the step that was the last one seen before the kill, and the number of processes that were replaced.
    """
    name = "2 processes, one killed"
    process = launch(out, steps, 2)
    follow(process, out, name, steps, until=steps // 2 // EVERY * EVERY + EVERY // 4)
    before = workers(out)
    os.kill(before[VICTIM], signal.SIGKILL)
    seen = int(history(out)[-1]["step"])
    # No need to hurry: the next life imports torch for longer than this takes.
    checkpoint = max(out.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    shutil.copytree(checkpoint, spare / checkpoint.name)
    follow(process, out, f"{name}: goes on", steps)
    return seen, len(set(workers(out)) - set(before))


def picture(whole: dict[int, Record], parts: list[dict[int, Record]], one: dict[int, Record], path: Path) -> None:
    """The losses of the three runs: all steps, and those around the kill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kill, resumed = max(parts[0]), min(parts[-1])
    # They lie on top of each other: the later, the thinner, so that all can be seen.
    dots = {"color": "black", "linestyle": "none", "marker": "o", "markersize": 3.5, "markerfacecolor": "white"}
    curves: list[tuple[dict[int, Record], str, dict[str, Any]]] = [
        (whole, "2 processes, uninterrupted", {"color": "0.83", "linewidth": 9}),
        (parts[0], "killed run, first life", {"color": "tab:red", "linewidth": 4}),
        (parts[-1], "killed run, second life", {"color": "tab:blue", "linewidth": 1.5}),
        (one, "1 process, from the same checkpoint", dots),
    ]
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes in panels:
        for life, label, style in curves:
            axes.plot(list(life), [record["loss"] for record in life.values()], label=label, **style)
        axes.axvline(resumed, color="tab:blue", linestyle="dashed", linewidth=1, label=f"checkpoint of step {resumed}")
        axes.plot(kill, parts[0][kill]["loss"], "x", color="tab:red", markersize=14, markeredgewidth=3, label="kill")
        axes.grid(alpha=0.3)
        axes.set(xlabel="step", ylabel="nats per character")
    near = range(max(0, resumed - 6), min(len(whole), kill + 8))
    losses = [whole[step]["loss"] for step in near]
    margin = 0.1 * (max(losses) - min(losses))
    panels[0].set(title="training loss", xlim=(-1, len(whole)))
    panels[1].set(
        title="around the kill", xlim=(near[0] - 0.5, near[-1] + 0.5), ylim=(min(losses) - margin, max(losses) + margin)
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle("FSDP2 with Mechanic: one of two workers is killed, torchrun starts the group again")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="steps of each run (default: 80)")
    parser.add_argument("--out", type=Path, default=Path("out/elastic"), help="its folder (default: out/elastic)")
    args = parser.parse_args()
    if args.steps < 2 * EVERY:
        parser.error(f"--steps must be at least {2 * EVERY}")
    steps = args.steps
    folders = [args.out / name for name in ("uninterrupted", "killed", "one")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    uninterrupted, killed, one = folders

    follow(launch(uninterrupted, steps, 2), uninterrupted, "2 processes, uninterrupted", steps)
    seen, replaced = kill_one(killed, steps, spare=one)
    follow(launch(one, steps, 1), one, "1 process, same checkpoint", steps)

    (whole,), parts, (alone,) = (lives(history(folder)) for folder in folders)
    resumed = min(parts[-1])
    twice = parts[0].keys() & parts[-1].keys() if len(parts) == 2 else set()
    again = sum(parts[0][step] == parts[-1][step] for step in twice)
    joined = {step: record for life in parts for step, record in life.items()}
    same = sum(joined.get(step) == whole.get(step) for step in range(steps))
    first, second, third = (torch.load(folder / "final.pt", weights_only=True) for folder in folders)
    equal = sum(name in second and torch.equal(first[name], second[name]) for name in first)
    apart = max(abs(record["loss"] / whole[step]["loss"] - 1) for step, record in alone.items())
    moved = norm({name: third[name] - p for name, p in first.items()}) / norm(first)

    checks = [
        ("processes that torchrun replaced", f"{replaced} of 2", replaced == 2),
        ("steps done twice, the same both times", f"{again} of {len(twice)}", again == len(twice) > 0),
        ("steps the same as without the kill", f"{same} of {steps}", same == steps and whole.keys() == joined.keys()),
        ("final parameters the same", f"{equal} of {len(first)}", equal == len(first) == len(second)),
        (f"1 process: losses within {TOLERANCE:g}", f"{apart:.1e}", apart <= TOLERANCE and min(alone) == resumed),
    ]
    print(f"\nworker {VICTIM} was killed after step {seen}; the group went on from the checkpoint of step {resumed}\n")
    print(f"{'check':38} | {'figure':>8} | holds")
    for name, figure, holds in checks:
        print(f"{name:38} | {figure:>8} | {'yes' if holds else 'NO'}")
    print('\n"The same" is every bit of loss, scale, effective lr and parameters. Not so on 1 process, where')
    print(f"sums are made in another order: its final parameters are {moved:.1e} apart, relative to their norm.")
    picture(whole, parts, alone, args.out / "elastic.png")
    print(f"picture: {args.out / 'elastic.png'}")
    if not all(holds for *_, holds in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
