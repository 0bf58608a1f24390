"""A training process that is killed at any moment, again and again: python killed.py KILLS FOLDER

Each life is a new process with a new model, forked from one that has imported torch and done nothing else. It goes on
from the last checkpoint, and writes one every few steps by the recipe of docs/checkpoints.md. After each it notes that
the save has returned: what the next life finds must be as new as that. What it has counted goes to stdout, as JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from resuming import same
from torch import nn

from manic import Mechanic

STEPS, EVERY = 400, 4
LONGEST = 0.3  # seconds that a life may last at most
SAVING = 0.006  # seconds that a save takes, from the first byte to the rename
RECIPE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def recipe() -> dict[str, Any]:
    """save and load, as the documentation has them."""
    found: dict[str, Any] = {"torch": torch}
    (text,) = [
        code for code in re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.DOTALL) if "def save(" in code
    ]
    exec(text[: text.index("\nsave(")], found)
    return found


def build(seed: int) -> tuple[nn.Module, Mechanic]:
    """120 000 parameters: writing them takes a good part of a life."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 80))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS))


def note(step: int, path: str) -> None:
    """At no moment is there half of it."""
    Path(path + ".new").write_text(str(step))
    os.replace(path + ".new", path)


def noted(path: str) -> int:
    return int(Path(path).read_text()) if os.path.exists(path) else 0


def live(checkpoint: str, seed: int, *, saving: bool) -> Any:
    """Train from the last checkpoint to the end; what is there then."""
    files = recipe()
    model, mechanic = build(seed)
    begin = 0
    if saving and os.path.exists(checkpoint):
        found = files["load"](checkpoint)
        model.load_state_dict(found["model"])
        mechanic.load_state_dict(found["mechanic"])
        begin = found["step"]
    note(begin, checkpoint + ".begun")
    for step in range(begin, STEPS):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        mechanic.zero_grad()
        (model(x) - x.repeat(1, 4).sin()).square().mean().backward()
        mechanic.step()
        if saving and (step + 1) % EVERY == 0:
            files["save"](
                {"model": model.state_dict(), "mechanic": mechanic.state_dict(), "step": step + 1}, checkpoint
            )
            note(step + 1, checkpoint + ".saved")
    return {"model": model.state_dict(), "mechanic": mechanic.state_dict()}


def born(checkpoint: str, seed: int, *, saving: bool) -> int:
    """A process that lives; its number. It leaves its end beside the checkpoint."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.save(live(checkpoint, seed, saving=saving), checkpoint + ".ending")
        os.replace(checkpoint + ".ending", checkpoint + ".end")
        code = 0
    finally:
        os._exit(code)


def main(kills: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dice, turns = random.Random(0), itertools.cycle([True, False])
    files = recipe()
    counts = {"kills": 0, "while_writing": 0, "runs": 0, "unreadable": 0, "steps_lost": 0, "different": 0, "failed": 0}
    while counts["kills"] < kills:
        seed = counts["runs"]
        whole, checkpoint = str(folder / f"whole-{seed}"), str(folder / f"run-{seed}")
        counts["failed"] += os.waitpid(born(whole, seed, saving=False), 0)[1] != 0
        while not os.path.exists(checkpoint + ".end"):
            last = files["load"](checkpoint)["step"] if os.path.exists(checkpoint) else 0
            child = born(checkpoint, seed, saving=True)
            # The last life may take its time.
            deadline = time.monotonic() + LONGEST * dice.random() if counts["kills"] < kills else math.inf
            aimed = next(turns)  # at a moment in which it writes
            status = None
            while status is None and (
                time.monotonic() < deadline or (aimed and not os.path.exists(checkpoint + ".partial"))
            ):
                number, code = os.waitpid(child, os.WNOHANG)
                status = code if number else None
                time.sleep(0.0002)
            if status is None:
                if aimed and dice.random() < 0.5:  # not at the first byte, but near the last, fsync and the rename
                    time.sleep(SAVING * dice.random())
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
            if status == signal.SIGKILL:
                counts["kills"] += 1
                counts["while_writing"] += os.path.exists(checkpoint + ".partial")
            elif status != 0:
                counts["failed"] += 1
                break
            try:
                now = files["load"](checkpoint)["step"] if os.path.exists(checkpoint) else 0
            except Exception:
                counts["unreadable"] += 1
                break
            begun = checkpoint + ".begun"
            if os.path.exists(begun):
                counts["steps_lost"] += max(0, last - noted(begun))
                os.unlink(begun)
            counts["steps_lost"] += max(0, max(last, noted(checkpoint + ".saved")) - now)
            Path(checkpoint + ".partial").unlink(missing_ok=True)
        else:
            ends = [torch.load(name + ".end", weights_only=True) for name in (whole, checkpoint)]
            counts["different"] += not same(*ends)
        counts["runs"] += 1
        shutil.rmtree(folder)
        folder.mkdir()
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
