"""The runs behind data/format1: checkpoints of the last version that kept two tensors for each parameter.

Today's Mechanic must load these files, so nobody writes them anew with today's code. Run this script with the last
version that wrote format 1, commit d48c991:

    python tests/support/format1.py OUT_DIR

It also resumes every file, and fails unless that run ends where the uninterrupted one ended, to the bit.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manic import Mechanic

FOLDER = Path(__file__).parents[1] / "data" / "format1"
LATER = 10  # steps from the checkpoint to "later"
SHAPES = ((3, 4), (4,))


class Case(NamedTuple):
    """A run with AdamW ("scale_free") or with SGD and momentum ("paper")."""

    dtype: torch.dtype = torch.float32
    saved_at: int = 25  # after so many steps
    variant: str = "scale_free"
    store_delta: bool = True
    per_group: bool = False  # each parameter in a group of its own
    cosine: bool = False  # a CosineAnnealingLR inside
    frozen_at: int | None = None


CASES = {
    "scale_free": Case(cosine=True),
    "scale_free-float64": Case(torch.float64),
    "scale_free-bfloat16": Case(torch.bfloat16),
    "scale_free-float16": Case(torch.float16),
    "scale_free-recomputed": Case(store_delta=False),
    "scale_free-per_group": Case(per_group=True),
    "scale_free-frozen": Case(frozen_at=20),
    "scale_free-step0": Case(saved_at=0),
    "scale_free-step1": Case(saved_at=1),
    "scale_free-bfloat16-step1": Case(torch.bfloat16, saved_at=1),  # its update is 2**16 times larger than x
    "paper": Case(variant="paper"),
    "paper-bfloat16": Case(torch.bfloat16, variant="paper"),
    "paper-float16": Case(torch.float16, variant="paper"),
    "paper-recomputed": Case(variant="paper", store_delta=False),
    "paper-step1": Case(saved_at=1, variant="paper"),
}


class Run:
    """Two parameters that are drawn to fixed targets through noise, with their Mechanic.

    The gradient follows from the parameters and the number of the step, so that a new process repeats a run.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.parameters = [torch.nn.Parameter(uniform(i, shape).to(case.dtype)) for i, shape in enumerate(SHAPES)]
        self.targets = [3 * uniform(10 + i, shape).sign() + uniform(20 + i, shape) for i, shape in enumerate(SHAPES)]
        groups: Any = self.parameters
        if case.per_group:
            groups = [{"params": [p], "lr": lr} for p, lr in zip(self.parameters, (0.1, 0.05), strict=True)]
        base: torch.optim.Optimizer
        options: dict[str, Any] = {"store_delta": case.store_delta, "per_group": case.per_group}
        if case.variant == "paper":
            base = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
            options["s_init"] = 1e-2  # the scale leaves its start within a few steps
        else:
            base = torch.optim.AdamW(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=50) if case.cosine else None
        self.mechanic = Mechanic(base, schedule, variant=case.variant, **options)

    def train(self, steps: range) -> None:
        for t in steps:
            if t == self.case.frozen_at:
                self.mechanic.freeze()
            for i, (p, target) in enumerate(zip(self.parameters, self.targets, strict=True)):
                noise = uniform(100 + 2 * t + i, tuple(p.shape))
                p.grad = (p.detach().double() - target + noise).to(p.dtype)
            self.mechanic.step()

    def go_on(self) -> None:
        """From the checkpoint to "later"."""
        self.train(range(self.case.saved_at, self.case.saved_at + LATER))

    def scale(self) -> float | list[float]:
        """A float; with `per_group` a list."""
        found: float | list[float] = self.mechanic.scale.tolist()
        return found

    def save(self) -> dict[str, Any]:
        values = [p.detach() for p in self.parameters]
        return copy.deepcopy({"parameters": values, "mechanic": self.mechanic.state_dict()})

    def load(self, saved: dict[str, Any]) -> None:
        """The model first, as in the README."""
        with torch.no_grad():
            for p, value in zip(self.parameters, saved["parameters"], strict=True):
                p.copy_(value)
        self.mechanic.load_state_dict(saved["mechanic"])


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    """In [-1, 1), float64. Every machine makes the same bits, since this takes no logarithm and no root."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def write(name: str, folder: Path) -> None:
    """One file, and the check that it can be resumed."""
    run, path = Run(CASES[name]), folder / f"{name}.pt"
    run.train(range(CASES[name].saved_at))
    saved = run.save()
    found = saved["mechanic"]["param_groups"][0]["mechanic_options"][0]["format"]
    if found != 1:
        raise SystemExit(f"this version writes format {found}: take commit d48c991")
    run.go_on()
    later = [p.detach() for p in run.parameters]
    torch.save({**saved, "later": later, "scale": run.scale()}, path)

    resumed = Run(CASES[name])
    resumed.load(torch.load(path, weights_only=True))
    resumed.go_on()
    if not all(map(torch.equal, resumed.parameters, later)) or resumed.scale() != run.scale():
        raise SystemExit(f"{name}: the resumed run ends elsewhere")


def main(folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in CASES:
        write(name, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
