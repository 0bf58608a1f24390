"""Checkpoints that one torch writes and another loads: python tests/support/exchange.py write|read FOLDER

Every run of format1.py, by today's code: with torch.save, and with torch.distributed.checkpoint. The reader
continues for some steps, and must end where the writer ended.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from format1 import CASES, Run
from resuming import same
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from training import flat

CLOSE = 1e-6  # how far the two may end from each other, as a share of the way that the writer went


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        run = Run(case)
        run.train(range(case.saved_at))
        saved = run.save()
        dcp.save({"mechanic": run.mechanic}, checkpoint_id=folder / f"{name}.dcp")
        run.go_on()
        torch.save({**saved, "later": run.save()}, folder / f"{name}.pt")
    print(f"torch {torch.__version__} wrote {len(CASES)} checkpoints, in two forms each")


def read(folder: Path) -> None:
    different, farthest = 0, 0.0
    for name, case in CASES.items():
        for form in ("pt", "dcp"):
            run, theirs = Run(case), torch.load(folder / f"{name}.pt", weights_only=True)
            if form == "dcp":
                if case.frozen_at is not None:
                    run.mechanic.freeze()  # as docs/checkpoints.md has it
                some = DefaultLoadPlanner(allow_partial_load=True)  # torch 2.6 knows fewer settings of AdamW
                dcp.load({"mechanic": run.mechanic}, checkpoint_id=folder / f"{name}.dcp", planner=some)
            run.load(
                copy.deepcopy({**theirs, "mechanic": theirs["mechanic"] if form == "pt" else run.mechanic.state_dict()})
            )
            if not same(numbers(run.mechanic.state_dict()), numbers(theirs["mechanic"])):
                raise SystemExit(f"{name}.{form}: what was loaded is not what was written")
            run.go_on()
            later = flat(theirs["later"]["parameters"]).double()
            way = (later - flat(theirs["parameters"]).double()).abs().max().item()
            gap = (flat(run.parameters).detach().double() - later).abs().max().item()
            if not way > 1e-3:
                raise SystemExit(f"{name}.{form}: nothing moved, so that this says nothing")
            farthest = max(farthest, gap / way)
            different += gap > 0
    print(
        f"torch {torch.__version__} read {2 * len(CASES)} checkpoints of {folder.name}: {different} runs "
        f"end elsewhere, the farthest by {farthest:.1e} of its way"
    )
    if farthest > CLOSE:
        raise SystemExit(f"that is more than {CLOSE}")


def numbers(state_dict: dict[str, Any]) -> Any:
    """All that is in a state dict but what torch itself adds to its param groups, which differs by version."""
    groups = [
        {k: v for k, v in group.items() if k.startswith("mechanic_state")} for group in state_dict["param_groups"]
    ]
    return state_dict["state"], groups


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
