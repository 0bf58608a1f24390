"""Every case of the resume matrix. Run as a script it is the new process: it resumes, and saves where it ends.

python resuming.py OPTIMIZER CHECKPOINTS RESULTS
"""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import pulled

from manic import Mechanic
from manic.checkpoint.record import opened

STEPS = 30
SAVED_AT = (0, 1, 25)
LR = 1.0


def same(a: Any, b: Any) -> bool:
    """To the bit, in dicts and lists as well."""
    if isinstance(a, Tensor):
        bits = torch.int16 if a.dtype == torch.bfloat16 else a.dtype  # a rest in a state dict may look like NaN
        return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def laid_open(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the scheduler's state as a dict in a tuple, which a Mechanic loads as well."""
    groups = [
        {key: (opened(value),) if key == "mechanic_scheduler" else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


Pair = tuple[nn.Parameter, Mechanic]


def resumed(one: Pair, other: Pair, steps: int, state: Any = None) -> None:
    """The other loads what one has saved (or `state`), and both take the same steps."""
    (p, m), (q, twin) = one, other
    twin.load_state_dict(copy.deepcopy(m.state_dict() if state is None else state))
    q.data.copy_(p)
    for run in (one, other):
        pulled(*run, steps)
    assert torch.equal(p, q)
    assert same(m.state_dict(), twin.state_dict())


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer that this torch has, but LBFGS, which a Mechanic refuses."""
    found = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    left_out = ("Optimizer", "LBFGS")
    return {
        name: value
        for name, value in found.items()
        if issubclass(value, torch.optim.Optimizer) and name not in left_out
    }


class Case(NamedTuple):
    optimizer: str
    scheduler: str
    variant: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def cases(optimizer: str) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    schedulers = ("none", "cosine", "onecycle", "sequential")
    product = itertools.product(schedulers, ("scale_free", "paper"), dtypes)
    return [Case(optimizer, *rest) for rest in product]


class Run:
    """A tiny network, or an embedding with sparse gradients, with its Mechanic."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        shapes = [(6, 5), (5, 3)]
        self.sparse = case.optimizer == "SparseAdam"
        self.parameters = [nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(case.dtype)) for s in shapes]
        if self.sparse:
            self.parameters = self.parameters[:1]
        options: dict[str, Any] = {"SGD": {"momentum": 0.9}}.get(case.optimizer, {})
        base = optimizers()[case.optimizer](self.parameters, lr=LR, **options)
        schedule = self.schedule(case.scheduler, base)
        start = {"s_init": 1e-2} if case.variant == "paper" else {}
        self.mechanic = Mechanic(base, schedule, variant=case.variant, **start)

    @staticmethod
    def schedule(name: str, base: torch.optim.Optimizer) -> Any:
        schedulers = torch.optim.lr_scheduler
        if name == "cosine":
            return schedulers.CosineAnnealingLR(base, T_max=STEPS)
        if name == "onecycle":
            cycles = any(key in base.defaults for key in ("momentum", "betas"))
            return schedulers.OneCycleLR(base, max_lr=LR, total_steps=STEPS + 1, div_factor=2, cycle_momentum=cycles)
        if name == "sequential":
            parts = [schedulers.LinearLR(base, total_iters=5), schedulers.ExponentialLR(base, gamma=0.9)]
            return schedulers.SequentialLR(base, parts, milestones=[5])
        return None

    def loss(self, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + t)
        first = self.parameters[0]
        if self.sparse:
            rows = torch.randint(6, (3,), generator=generator)
            return F.embedding(rows, first, sparse=True).float().square().sum()
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        return ((x.to(first.dtype) @ first).tanh() @ self.parameters[1] - y.to(first.dtype)).float().square().mean()

    def train(self, steps: range) -> Iterator[int]:
        for t in steps:
            yield t
            self.mechanic.zero_grad()
            self.loss(t).backward()
            self.mechanic.step()
        yield steps.stop

    def state(self) -> dict[str, Any]:
        return {"model": list(self.parameters), "mechanic": self.mechanic.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for p, saved in zip(self.parameters, state["model"], strict=True):
                p.copy_(saved)
        self.mechanic.load_state_dict(state["mechanic"])


def main(optimizer: str, checkpoints: str, results: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
    warnings.filterwarnings("ignore", message="ASGD keeps a copy")
    saved = torch.load(checkpoints, weights_only=True)
    ends = {}
    for case in cases(optimizer):
        for at in SAVED_AT:
            run = Run(case, seed=99)
            run.load(saved[case.name, at])
            list(run.train(range(at, STEPS)))
            ends[case.name, at] = [p.detach() for p in run.parameters], run.mechanic.scale
    torch.save(ends, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
