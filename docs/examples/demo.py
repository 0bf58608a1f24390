"""The main job: train a character GPT at base learning rates a billion apart, kill a run, resume it.

    nox -s demo            (or: python docs/examples/demo.py, with torch, matplotlib and tqdm installed)

1. trains with Mechanic, and with plain AdamW, at base lr 1e-6, 1e-3 and 1e3 (warm-up, then cosine);
2. trains the run at 1e-3 once more in another process, kills that process (SIGKILL) mid-way, starts it again,
   and compares its parameters with those of the run that nobody interrupted: every bit;
3. prints one table, and writes one picture.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from chargpt import CharGPT, batch, corpus, loss_of, validation_loss, warmup_cosine
from tqdm import tqdm

from manic import Mechanic

LRS = (1e-6, 1e-3, 1e3)
KILLED = 1e-3  # the base lr of the run that is killed
EVERY = 20  # steps between two checkpoints of that run


def train(lr: float, tuned: bool, steps: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """One run; with `checkpoint`, one that goes on from that file if it exists, and writes it as it goes."""
    torch.manual_seed(0)
    model = CharGPT()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = warmup_cosine(optimizer, steps, warmup=steps // 10)
    if tuned:
        optimizer = Mechanic(optimizer, schedule)

    start = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["mechanic"])
        start = saved["step"]

    text, history = corpus()[0], []
    name = f"{'Mechanic' if tuned else 'AdamW':8} lr {lr:g}"
    with tqdm(range(start, steps), desc=name, initial=start, total=steps, disable=None, leave=True) as bar:
        for step in bar:
            loss = loss_of(model, batch(text, step))
            optimizer.zero_grad()
            loss.backward()
            lrs = optimizer.effective_lr() if tuned else schedule.get_last_lr()
            optimizer.step()
            if not tuned:
                schedule.step()
            scale = float(optimizer.scale) if tuned else 1.0
            history.append((loss.item(), scale, lrs[0]))
            bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{scale:.2e}", effective_lr=f"{lrs[0]:.2e}")
            if checkpoint is not None and (step + 1) % EVERY == 0:
                state = {"model": model.state_dict(), "mechanic": optimizer.state_dict(), "step": step + 1}
                save(state, checkpoint)
    return {
        "history": torch.tensor(history),
        "loss": validation_loss(model),
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that is whole or not there, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def kill_and_resume(steps: int, out: Path) -> tuple[int, dict[str, Any]]:
    """The run at base lr KILLED in a process that is killed mid-way and started again.

    Returns the step of the checkpoint that it went on from, and its result.
    """
    checkpoint, result = out / "killed.pt", out / "resumed.pt"
    for path in (checkpoint, result):
        path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--steps", str(steps), "--worker", str(checkpoint), str(result)]

    print(f"\ntraining at base lr {KILLED:g} in another process, to be killed mid-way")
    process = subprocess.Popen(command)
    while not (checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= steps // 2):
        if process.poll() is not None:
            raise SystemExit(f"the worker ended by itself (exit code {process.returncode}) before it could be killed")
        time.sleep(0.05)
    process.kill()
    process.wait()
    step = torch.load(checkpoint, weights_only=True)["step"]
    print(f"\nkilled (exit code {process.returncode}); resuming from the checkpoint of step {step}")
    subprocess.run(command, check=True)
    return step, torch.load(result, weights_only=True)


def picture(runs: dict[tuple[float, bool], dict[str, Any]], steps: int, path: Path) -> None:
    """Loss and scale over steps, one colour per base lr."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(LRS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    styles = {True: ("solid", 2.5), False: ("dashed", 1.2)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for (lr, tuned), run in runs.items():
        loss, scale, _ = run["history"].double().T
        smooth = [loss[max(0, i - 9) : i + 1].mean() for i in range(steps)]
        style, width = styles[tuned]
        # The tuned runs lie on top of each other: the later, the thinner, so that all can be seen.
        width += 1.5 * (len(LRS) - 1 - LRS.index(lr)) * tuned
        label = f"{'Mechanic' if tuned else 'AdamW'}, base lr {lr:g}"
        if not (loss[steps // 2 :] < 7.5).all():
            label += " (off the chart)"
        left.plot(smooth, color=colors[lr], linestyle=style, linewidth=width, label=label)
        if tuned:
            right.plot(torch.where(scale > 0, scale, math.nan), color=colors[lr], linewidth=2, label=f"base lr {lr:g}")
    left.set(title="training loss (mean of 10 steps)", xlabel="step", ylabel="nats per character", ylim=(1.5, 7.5))
    right.set(title="learned scale", xlabel="step", ylabel="scale (factor on the base's updates)", yscale="log")
    left.legend()
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, steps)
    figure.suptitle("A character GPT on Python's standard library: AdamW alone, and in Mechanic")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the results (default: out/demo)")
    parser.add_argument("--worker", nargs=2, type=Path, metavar=("CHECKPOINT", "RESULT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2 * EVERY:
        parser.error(f"--steps must be at least {2 * EVERY}")
    if args.worker:
        checkpoint, result = args.worker
        torch.save(train(KILLED, True, args.steps, checkpoint), result)
        return

    args.out.mkdir(parents=True, exist_ok=True)
    runs = {(lr, tuned): train(lr, tuned, args.steps) for tuned in (False, True) for lr in LRS}
    step, resumed = kill_and_resume(args.steps, args.out)
    whole = runs[KILLED, True]["parameters"]
    same = all(torch.equal(whole[name], p) for name, p in resumed["parameters"].items())

    print(f"\nvalidation loss after {args.steps} steps, nats per character")
    print(f"{'base lr':>8} | {'AdamW':>7} | {'Mechanic':>8} | {'scale':>9} | {'peak effective lr':>17}")
    for lr in LRS:
        plain, tuned = runs[lr, False], runs[lr, True]
        loss = f"{plain['loss']:7.3f}" if math.isfinite(plain["loss"]) else "    nan"
        scale, peak = tuned["history"][-1, 1], tuned["history"][:, 2].max()
        print(f"{lr:8g} | {loss} | {tuned['loss']:8.3f} | {scale:9.2e} | {peak:17.2e}")
    verdict = "bitwise the same as" if same else "NOT the same as"
    print(f"\nkilled at mid-way, resumed from step {step}: its parameters are {verdict} those of the uninterrupted run")
    picture(runs, args.steps, args.out / "demo.png")
    print(f"picture: {args.out / 'demo.png'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
