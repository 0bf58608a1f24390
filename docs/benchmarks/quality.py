"""How far from the best hand-tuned lr: python docs/benchmarks/quality.py

Every contender trains every task (tasks.py) with every base optimizer and schedule. The score of a run is its excess,

    e = (L - L_tuned) / (L_init - L_tuned),    0: as good as the best lr of a grid; 1: as if it had not trained

L being the validation loss at the end. The grid goes by half decades: first every second lr, then the neighbours of the
best. Three seeds choose its winner; three others score it and the contenders, seed against seed. From 3,000 steps on,
one seed chooses and one scores. Every run goes to a CSV as it ends; a benchmark that was killed goes on there.

`--ablation` runs, instead of the peers, manic with one of its rules changed at a time.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import math
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tasks import TASKS, chargpt
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from manic import Mechanic, chain, scale_free

CHOOSE, SCORE = (0, 1, 2), (3, 4, 5)  # seeds
LONG = 3000  # steps from which one seed must do
WINDOWS = 20  # of equal length, in each of which the training loss is averaged
SCHEDULES = ("constant", "cosine")
CLIPPED = 1.0  # the norm of the gradients, where the lr falls linearly, as in the Trainer of Transformers
ANY_LR = tuple(10.0**k for k in range(-8, 5, 2))
FAR_LR = (1e-8, 1e-2, 1.0, 1e4)
USUAL = 1e-2  # the base lr of a contender that is said not to care


Row = dict[str, Any]  # of the CSV: a run, and what came out


@dataclass(frozen=True)
class Run:
    """One training run, and the columns by which the CSV knows it again."""

    task: str
    base: str
    schedule: str
    contender: str
    lr: float
    seed: int
    steps: int

    @property
    def cell(self) -> tuple[str, ...]:
        return self.task, self.base, self.schedule, str(self.steps)


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675: the sign of an interpolated momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.lerp(p.grad, m, 0.9).sign())
                m.lerp_(p.grad, 0.01)


# The class, and its options.
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
    "Lion": (Lion, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Muon + AdamW": (torch.optim.AdamW, {}),  # the second; Muon takes the matrices inside
}


def built(run: Run, model: nn.Module, by: Callable[[Any], Any] = lambda base: base) -> Any:
    """The run's base optimizer; `by` may wrap the class."""
    base, options = BASES[run.base]
    return by(base)(model.parameters(), lr=run.lr, **options)


def optimizers(run: Run, model: nn.Module) -> list[Any]:
    """The run's base optimizers: one, or Muon for the matrices inside and AdamW for the rest, at one lr."""
    if run.base != "Muon + AdamW":
        return [built(run, model)]
    named = list(model.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and name.startswith(("blocks.", "2."))}
    muon = torch.optim.Muon([p for name, p in named if name in inside], lr=run.lr, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([p for name, p in named if name not in inside], lr=run.lr)]


# Where each base's best lr may lie: half decades, from the first exponent to the last.
GRIDS = {
    "SGD": (-3.0, 1.5),
    "momentum": (-5.0, 1.0),
    "AdamW": (-4.5, 0.0),
    "Lion": (-5.5, -1.0),
    "RMSprop": (-4.5, 0.0),
    "Adagrad": (-3.5, 1.0),
    "Muon + AdamW": (-4.5, 0.0),
}
SHORT = ("SGD", "momentum", "AdamW", "Lion", "RMSprop")  # the bases of the first family


def grid(base: str) -> list[float]:
    low, high = GRIDS[base]
    return [float(f"{10 ** (low + k / 2):.3g}") for k in range(round(2 * (high - low)) + 1)]


def factor(schedule: str, steps: int) -> Callable[[int], float]:
    """Constant; a linear warm-up over a tenth of the steps and half a cosine down to 0; or linearly down to 0."""
    if schedule == "linear":
        return lambda step: 1 - step / steps
    return chargpt.warmup_factor(steps, max(1, steps // 10)) if schedule == "cosine" else lambda step: 1.0


# ---------------------------------------------------------------------- contenders


class Stepper:
    """An optimizer and its schedule; what its authors want evaluated instead of the last iterate, if anything."""

    def __init__(self, optimizer: Any, run: Run) -> None:
        self.optimizer = optimizer
        self.schedule = LambdaLR(optimizer, factor(run.schedule, run.steps))

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()

    def evaluated(self, model: nn.Module) -> nn.Module:
        return model


class Tuned(Stepper):
    """manic."""

    def __init__(self, optimizer: Any, run: Run, **options: Any) -> None:
        super().__init__(optimizer, run)
        self.mechanic = Mechanic(optimizer, self.schedule, **options)

    def step(self) -> None:
        self.mechanic.step()


class Together(Stepper):
    """Several steppers, each with parameters of its own."""

    def __init__(self, steppers: list[Stepper]) -> None:
        self.steppers = steppers

    def step(self) -> None:
        for stepper in self.steppers:
            stepper.step()


class ByClass(Stepper):
    """mechanic-pytorch, which is no Optimizer for a scheduler: the group's lr is set by hand."""

    def __init__(self, optimizer: Any, run: Run) -> None:
        self.optimizer, self.factor, self.lr, self.count = optimizer, factor(run.schedule, run.steps), run.lr, 0

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor(self.count)
        self.optimizer.step()
        self.count += 1


class Averaged(Stepper):
    """DoG and LDoG, whose authors evaluate a running average."""

    def __init__(self, optimizer: Any, run: Run, model: nn.Module, averager: Any) -> None:
        super().__init__(optimizer, run)
        self.average = averager(model)

    def step(self) -> None:
        super().step()
        self.average.step()

    def evaluated(self, model: nn.Module) -> nn.Module:
        return self.average.averaged_model


class ScheduleFree(Stepper):
    def __init__(self, optimizer: Any, run: Run) -> None:
        super().__init__(optimizer, run)
        optimizer.train()

    def evaluated(self, model: nn.Module) -> nn.Module:
        self.optimizer.eval()
        return model


class Optax(Stepper):
    """optax.contrib.mechanize, jitted, on arrays that are copied from and to the model in every step."""

    def __init__(self, parameters: list[nn.Parameter], run: Run) -> None:
        import jax
        import jax.numpy as jnp
        import optax
        import optax.contrib

        shape = factor(run.schedule, run.steps)
        bases = {
            "SGD": lambda lr: optax.sgd(lr),
            "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
            "AdamW": lambda lr: optax.adamw(lr, weight_decay=0.01),
            "Lion": lambda lr: optax.lion(lr, weight_decay=0.0),
            "RMSprop": lambda lr: optax.rmsprop(lr, decay=0.99),
        }
        self.parameters, self.asarray = parameters, jnp.asarray
        table = jnp.asarray([shape(t) for t in range(run.steps)])
        tuned = optax.contrib.mechanize(bases[run.base](lambda count: run.lr * table[count]))
        self.state = tuned.init(self.values(False))
        self.update = jax.jit(tuned.update)

    def values(self, grads: bool) -> list[Any]:
        return [self.asarray((p.grad if grads else p.detach()).numpy()) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        import numpy as np

        updates, self.state = self.update(self.values(True), self.state, self.values(False))
        for p, u in zip(self.parameters, updates, strict=True):
            p.add_(torch.from_numpy(np.array(u)))


@dataclass(frozen=True)
class Contender:
    """What is needed, with which bases it is compared, at which base lrs it runs, and how it is built."""

    module: str
    bases: tuple[str, ...]
    lrs: tuple[float, ...]
    build: Callable[[Any, nn.Module, Run], Stepper]
    schedules: tuple[str, ...] = SCHEDULES
    dtype: torch.dtype = torch.float32  # of the parameters
    rule: tuple[tuple[str, Any], ...] = ()  # constants and functions of manic.scale_free, other than they are
    sparse: bool = True  # whether it takes sparse gradients
    short: bool = False  # whether it runs in the first family alone, for the figure

    def usual(self, lr: float) -> bool:
        """Whether its users would give this base lr. The others show what the base lr does."""
        return lr == USUAL or len(self.lrs) == 1


def chained(run: Run, model: nn.Module) -> Any:
    """The run's base optimizers as one."""
    bases = optimizers(run, model)
    return chain(*bases) if len(bases) > 1 else bases[0]


def plain(_: Any, model: nn.Module, run: Run) -> Stepper:
    return Stepper(chained(run, model), run)


def manic(**options: Any) -> Callable[[Any, nn.Module, Run], Stepper]:
    return lambda _, model, run: Tuned(chained(run, model), run, **options)


def two_mechanics(_: Any, model: nn.Module, run: Run) -> Stepper:
    return Together([Tuned(base, run) for base in optimizers(run, model)])


def authors(module: Any, model: nn.Module, run: Run) -> Stepper:
    return ByClass(built(run, model, module.mechanize), run)


def dadaptation(module: Any, model: nn.Module, run: Run) -> Stepper:
    parameters = model.parameters()
    if run.base == "AdamW":
        optimizer = module.DAdaptAdam(parameters, weight_decay=0.01, decouple=True)
    elif run.base == "Lion":
        optimizer = module.DAdaptLion(parameters)
    else:
        optimizer = module.DAdaptSGD(parameters, momentum=0.9 if run.base == "momentum" else 0.0)
    return Stepper(optimizer, run)


def dog(name: str) -> Callable[[Any, nn.Module, Run], Stepper]:
    return lambda m, model, run: Averaged(getattr(m, name)(model.parameters()), run, model, m.PolynomialDecayAverager)


ALL = tuple(BASES)
CONTENDERS: dict[str, Contender] = {
    "tuned": Contender("torch", ALL, (), plain),  # at the lrs of the base's grid
    "plain": Contender("torch", ("AdamW",), ANY_LR, plain, ("cosine",), short=True),
    "manic": Contender("manic", ALL, FAR_LR, manic()),
    "manic, bfloat16": Contender("manic", ALL, (USUAL,), manic(), dtype=torch.bfloat16),
    "manic, chain per group": Contender("manic", ("Muon + AdamW",), (USUAL,), manic(per_group=True)),
    "manic, two Mechanics": Contender("manic", ("Muon + AdamW",), (USUAL,), two_mechanics),
    "manic, paper": Contender("manic", ("AdamW",), FAR_LR, manic(variant="paper"), ("cosine",), short=True),
    "mechanic-pytorch": Contender("mechanic_pytorch", SHORT, (1.0,), authors, sparse=False),
    "optax mechanize": Contender(
        "optax",
        SHORT,
        (1.0,),
        lambda _, m, run: Optax([p for p in m.parameters() if p.requires_grad], run),
        sparse=False,
    ),
    "Prodigy": Contender(
        "prodigyopt",
        ("AdamW",),
        (1.0,),
        lambda m, model, run: Stepper(
            m.Prodigy(model.parameters(), weight_decay=0.01, safeguard_warmup=run.schedule == "cosine"), run
        ),
    ),
    "Prodigy plus schedule-free": Contender(
        "prodigyplus",
        ("AdamW",),
        (1.0,),
        lambda m, model, run: ScheduleFree(m.ProdigyPlusScheduleFree(model.parameters(), weight_decay=0.01), run),
        ("constant",),
    ),
    "D-Adaptation": Contender("dadaptation", ("SGD", "momentum", "AdamW", "Lion"), (1.0,), dadaptation, sparse=False),
    "DoG": Contender("dog", ("SGD",), (1.0,), dog("DoG"), sparse=False),
    "LDoG": Contender("dog", ("SGD",), (1.0,), dog("LDoG"), sparse=False),
    "ScheduleFree": Contender(
        "schedulefree",
        ("AdamW",),
        (0.0025,),  # its default
        lambda m, model, run: ScheduleFree(
            m.AdamWScheduleFree(model.parameters(), lr=run.lr, warmup_steps=run.steps // 10, weight_decay=0.01), run
        ),
        ("constant",),
    ),
    "AdamW 1e-3": Contender("torch", ("AdamW",), (1e-3,), plain),
    "AdamW 5e-5": Contender("torch", ("AdamW",), (5e-5,), plain, ("linear",)),  # for fine-tuning
    "NAdamW": Contender(
        "torch",
        ("AdamW",),
        (2e-3,),  # its default
        lambda m, model, run: Stepper(
            m.optim.NAdam(model.parameters(), lr=run.lr, weight_decay=0.01, decoupled_weight_decay=True), run
        ),
    ),
    "SGD 1e-2": Contender("torch", ("SGD", "momentum"), (1e-2,), plain),
}


def changed(options: dict[str, Any] | None = None, **rule: Any) -> Contender:
    return Contender("manic", ALL, (USUAL,), manic(**(options or {})), rule=tuple(rule.items()))


ABLATION = {
    "Δ = Σu: no forgetting": changed(MEMORY=0.0),
    "update j weighs as much as j in Δ": changed(MEMORY=1.0),
    "every fall of S in full": changed(PATIENCE=1e30),
    "no fall of S but by records": changed(PATIENCE=0.0),
    "every h > 0 is a record": changed(RECORD=0.0),
    "no h is a record": changed(RECORD=math.inf),
    "every update is followed, |h| and ‖g‖ count in full": changed(SURPRISE=math.inf),
    "no caution: h/√v": changed(CAUTION=0.0),
    "nothing is tolerated where the lr falls": changed(hovering=lambda patient, share: 0 * share),
    "λ = 0": changed({"s_decay": 0.0}),
    "floor a thousand times lower": changed(FLOOR=1e-9),
    "no replaced weights are noticed": changed(REPLACED=math.inf),
    "start ten times higher": changed(START=1e-2),
    "start ten times lower": changed(START=1e-4),
}
CONTENDERS |= ABLATION

# The contenders of the figure of e against the number of steps, and of the runs from LONG steps on; their colours.
OVER_STEPS = {"manic": "#0b6e4f", "Prodigy": "#c2571a", "AdamW 1e-3": "#5b6474"}


# The cells of --quick, and what e may be at most there: loose bounds, since one seed tells no more.
QUICK = {
    **dict.fromkeys(product(("logreg", "MLP", "CNN"), ("momentum", "AdamW"), SCHEDULES), 0.25),
    ("GPT", "AdamW", "constant"): 0.1,
    ("tune GPT", "AdamW", "linear"): 0.05,
    ("LoRA GPT", "AdamW", "constant"): 0.05,
    ("logreg, batch 1", "SGD", "constant"): 0.1,
    ("7 layers", "AdamW", "cosine"): 0.1,
    ("trigrams", "AdamW", "cosine"): 0.1,
    ("hybrid MLP", "Muon + AdamW", "constant"): 0.5,  # where it does not do well yet
}


def train(run: Run) -> dict[str, Any]:
    """The run's losses: validation before and after, and the mean training loss of each window."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # runs that have diverged may stay finite, and take ten times as long
    warnings.simplefilter("ignore")
    task, contender = TASKS[run.task], CONTENDERS[run.contender]
    model = task.start(run.seed).to(contender.dtype)
    initial = task.validate(model)
    stepper = contender.build(importlib.import_module(contender.module), model, run)
    losses = []
    with mock.patch.multiple(scale_free, **dict(contender.rule)) if contender.rule else nullcontext():
        for step in range(run.steps):
            model.zero_grad()
            loss = task.loss(model, task.batch(1_000_000 * run.seed + step))
            if not math.isfinite(float(loss)):
                break
            loss.backward()
            if run.schedule == "linear":
                nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
            stepper.step()
            losses.append(float(loss))
    final = task.validate(stepper.evaluated(model)) if len(losses) == run.steps else math.inf
    width = max(1, run.steps // WINDOWS)
    windows = [statistics.fmean(losses[at : at + width]) for at in range(0, len(losses), width)]
    return {**asdict(run), "initial": initial, "final": final, "curve": " ".join(f"{loss:.5g}" for loss in windows)}


# ---------------------------------------------------------------------- many runs


def cells(tasks: Iterable[str], bases: Iterable[str], quick: bool) -> list[Run]:
    """A run of the grid for each cell, whose lr and seed are not known yet. `quick`: the cells of QUICK."""
    found = []
    for task in tasks:
        for base, schedule in TASKS[task].cells or product(SHORT, SCHEDULES):
            if base in bases and (not quick or (task, base, schedule) in QUICK):
                found.append(Run(task, base, schedule, "tuned", math.nan, 0, TASKS[task].steps))
    return found


def seeds(run: Run, of: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    return of[:1] if quick or run.steps >= LONG else of


def planned(cells: list[Run], contenders: Iterable[str], quick: bool) -> list[Run]:
    """Every run but those of the grid. `quick`: one seed, fewer lrs."""
    runs = []
    for cell, name in product(cells, contenders):
        contender = CONTENDERS[name]
        falling = "cosine" if cell.schedule == "linear" else cell.schedule
        if cell.base not in contender.bases or not {falling, cell.schedule} & {*contender.schedules}:
            continue
        if importlib.util.find_spec(contender.module) is None:
            continue
        if not contender.sparse and cell.task == "trigrams, sparse":
            continue
        if contender.short and TASKS[cell.task].family != "short":
            continue
        if cell.steps >= LONG and name not in {*OVER_STEPS, *ABLATION}:
            continue
        lrs = contender.lrs[:2] if quick else contender.lrs
        if USUAL in lrs and cell.steps >= LONG:
            lrs = (USUAL,)
        for lr in lrs:
            some = seeds(cell, SCORE if contender.usual(lr) else SCORE[:1], quick)
            runs += [replace(cell, contender=name, lr=lr, seed=seed) for seed in some]
    return runs


def search(cells: list[Run], rows: list[Row], quick: bool) -> list[Run]:
    """The runs of the grid that are to come next: every second lr (of long runs: three in the middle), then the
    neighbours of the best."""
    best, runs = winners(rows), []
    for cell in cells:
        lrs = grid(cell.base)
        some = lrs[::2] if cell.steps < LONG else lrs[2:8:2]
        if cell.cell in best and not quick:
            at = lrs.index(best[cell.cell].lr)
            some = list(dict.fromkeys([*some, *lrs[max(0, at - 1) : at + 2]]))
        runs += [replace(cell, lr=lr, seed=seed) for lr in some for seed in seeds(cell, CHOOSE, quick)]
    return runs


def winners(rows: list[Row]) -> dict[tuple[str, ...], Run]:
    """The lr of the grid with the lowest mean loss, by cell; a run that broke off counts as one that did not learn."""
    losses: dict[Run, list[float]] = {}
    for row in rows:
        if row["contender"] == "tuned" and row["seed"] in CHOOSE:
            run = replace(of(row), seed=0)
            losses.setdefault(run, []).append(min(row["final"], row["initial"]))
    best: dict[tuple[str, ...], Run] = {}
    for run, found in losses.items():
        if run.cell not in best or statistics.fmean(found) < statistics.fmean(losses[best[run.cell]]):
            best[run.cell] = run
    return best


def at_the_edge(rows: list[Row]) -> Iterator[str]:
    """The cells whose best lr may lie beyond the grid."""
    for run in winners(rows).values():
        if run.lr in (grid(run.base)[0], grid(run.base)[-1]):
            yield f"{' '.join(run.cell)}: the best lr of the grid, {run.lr:g}, is its last"


def of(row: dict[str, Any]) -> Run:
    return Run(**{field.name: row[field.name] for field in fields(Run)})


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    numbers = {"lr": float, "seed": int, "steps": int, "initial": float, "final": float}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)  # a killed process may leave half a line
    rows = list(csv.DictReader(whole.splitlines()))
    return [{k: numbers.get(k, str)(v) for k, v in row.items()} for row in rows]


def carry_out(runs: list[Run], path: Path, processes: int) -> list[Row]:
    """The runs that the CSV does not have yet; all its rows."""
    from tqdm import tqdm

    rows = read(path)
    done = {of(row) for row in rows}
    todo = sorted((run for run in runs if run not in done), key=lambda run: -run.steps * ("GPT" in run.task))
    if not todo:
        return rows
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not rows
    with multiprocessing.get_context("spawn").Pool(processes) as pool, path.open("a", newline="") as file:
        for row in tqdm(pool.imap_unordered(train, todo), total=len(todo), disable=None):
            writer = csv.DictWriter(file, row.keys())
            if fresh:
                writer.writeheader()
                fresh = False
            writer.writerow(row)
            file.flush()
            rows.append(row)
    return rows


# ---------------------------------------------------------------------- what came out


Excess = dict[tuple[str, float], dict[tuple[str, ...], list[float]]]  # by contender and base lr, by cell, of each seed


def scored(rows: list[Row], score: Callable[[Row, Row], float]) -> Excess:
    """The score of every run but those of the grid, beside the run of the best lr with its seed."""
    best = winners(rows)
    tuned = {
        (run.cell, row["seed"]): row
        for row in rows
        if row["contender"] == "tuned" and (run := of(row)) == replace(best[run.cell], seed=run.seed)
    }
    found: Excess = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):  # they lie in the order in which they ended
        reference = tuned.get((of(row).cell, row["seed"]))
        if row["contender"] != "tuned" and reference is not None:
            at = found.setdefault((row["contender"], row["lr"]), {})
            at.setdefault(of(row).cell, []).append(score(row, reference))
    return found


def excess(rows: list[Row]) -> Excess:
    """e of every scored run, seed against seed; at most 1 for one that broke off."""

    def e(row: Row, reference: Row) -> float:
        value = (row["final"] - reference["final"]) / (reference["initial"] - reference["final"])
        return min(value, 1.0) if math.isfinite(value) else 1.0

    return scored(rows, e)


def arrivals(rows: list[Row]) -> Excess:
    """The share of the steps after which a run's training loss, window by window, is as low as that of the tuned run in
    its last window; inf if it never is."""

    def share(row: Row, reference: Row) -> float:
        goal = float(reference["curve"].split()[-1])
        curve = [float(loss) for loss in row["curve"].split()]
        return next(((k + 1) / WINDOWS for k, loss in enumerate(curve) if loss <= goal), math.inf)

    return scored(rows, share)


def mean_and_worst(by_cell: dict[tuple[str, ...], list[float]], cells: Iterable[tuple[str, ...]]) -> str:
    means = [statistics.fmean(by_cell[cell]) for cell in cells if cell in by_cell]
    return f"{statistics.fmean(means):.3f}, {max(means):.3f}" if means else ""


def table(found: Excess) -> str:
    """One line per contender and base lr: e over the cells, manic's on the same cells, and how many runs were lost
    (e = 1)."""
    ours = found.get(("manic", USUAL), {})
    lines = ["| contender | base lr | cells | e: mean, worst cell | manic there | lost |", "|---" * 6 + "|"]
    for (name, lr), at in sorted(found.items(), key=lambda item: (list(CONTENDERS).index(item[0][0]), item[0][1])):
        there = mean_and_worst(ours, at) if name != "manic" else ""
        lost = sum(e >= 1 for values in at.values() for e in values)
        lines.append(f"| {name} | {lr:g} | {len(at)} | {mean_and_worst(at, at)} | {there} | {lost} |")
    return "\n".join(lines)


def by_family(found: Excess, soon: Excess) -> str:
    """One line per family and contender, at the base lr that its users would give: as `table`, and when it arrives."""
    lines = ["| family | contender | cells | e: mean, worst cell | manic there | there after: median, worst |"]
    lines += ["|---" * 6 + "|"]
    for family in dict.fromkeys(task.family for task in TASKS.values()):
        for (name, lr), at in found.items():
            mine = [cell for cell in at if TASKS[cell[0]].family == family]
            if not mine or not CONTENDERS[name].usual(lr):
                continue
            there = mean_and_worst(found.get(("manic", USUAL), {}), mine) if name != "manic" else ""
            shares = [share for cell in mine for share in soon[name, lr][cell]]
            when = ", ".join(f"{x:.2f}" if x <= 1 else "–" for x in (statistics.median(shares), max(shares)))
            lines.append(f"| {family} | {name} | {len(mine)} | {mean_and_worst(at, mine)} | {there} | {when} |")
    return "\n".join(lines)


def by_cell(found: Excess) -> str:
    """One line per cell of manic: its family, whether the law may be chosen on it, and e at the usual base lr, the mean
    of the seeds and the worst of them."""
    lines = ["| family | part | task | base, schedule | e: mean, worst seed |", "|---" * 5 + "|"]
    for cell, es in found.get(("manic", USUAL), {}).items():
        task, shown = TASKS[cell[0]], f"{statistics.fmean(es):.3f}, {max(es):.3f}"
        lines.append(f"| {task.family} | {task.part} | {cell[0]} | {cell[1]}, {cell[2]} | {shown} |")
    return "\n".join(lines)


def spread(found: Excess, name: str) -> float:
    """The largest difference that the base lr makes to e, over all cells."""
    by_cell: dict[tuple[str, ...], list[float]] = {}
    for (contender, _), cells in found.items():
        for cell, values in cells.items():
            if contender == name:
                by_cell.setdefault(cell, []).append(values[0])  # of the seed that every lr has
    return max((max(values) - min(values) for values in by_cell.values()), default=math.nan)


def pyplot() -> Any:
    """matplotlib, which needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def chart(rows: list[Row], path: Path) -> None:
    """Final loss against base lr, AdamW with warm-up and cosine, one panel per task."""
    looks = {
        "plain": ("AdamW", "#5b6474", "-"),
        "manic, paper": ("manic, the published method", "#b0b7c3", "--"),
        "manic": ("manic", "#0b6e4f", "-"),
    }
    mine = [r for r in rows if (r["base"], r["schedule"], r["seed"]) == ("AdamW", "cosine", SCORE[0])]
    tasks = [task for task in TASKS if any(r["task"] == task and r["contender"] == "plain" for r in mine)]
    if not tasks:
        return
    columns = min(3, len(tasks))
    plt = pyplot()
    figure, panels = plt.subplots(-(-len(tasks) // columns), columns, figsize=(3.6 * columns, 6), squeeze=False)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for task, panel in zip(tasks, panels.flat, strict=False):
        initial = next(r["initial"] for r in mine if r["task"] == task)
        for contender, (label, colour, style) in looks.items():
            some = [
                r
                for r in mine
                if r["task"] == task and r["contender"] in (contender, *(["tuned"] * (label == "AdamW")))
            ]
            points = sorted((r["lr"], min(r["final"], 1.1 * initial)) for r in some)
            if points:
                panel.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=label)
        panel.set_xscale("log")
        panel.set_title(task, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for row in panels:
        row[0].set_ylabel("validation loss at the end")
    for panel in panels[-1]:
        panel.set_xlabel("base learning rate")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def horizon(found: Excess, path: Path) -> None:
    """e against the number of steps, one panel per model and schedule."""
    lines: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for (name, lr), cells in found.items():
        for (task, base, schedule, _), es in cells.items():
            model = task.split()[0]
            shown = model in ("GPT", "LSTM") and base == "AdamW" and name in OVER_STEPS
            if shown and CONTENDERS[name].usual(lr):
                at = lines.setdefault((model, schedule), {}).setdefault(name, [])
                at.append((TASKS[task].steps, statistics.fmean(es)))
    if not lines:
        return

    plt = pyplot()
    figure, panels = plt.subplots(1, len(lines), figsize=(3.2 * len(lines), 3.4), sharey=True, squeeze=False)
    for ((model, schedule), by_name), panel in zip(sorted(lines.items()), panels[0], strict=True):
        panel.axhline(0, color="#d0d4db", linewidth=1)
        for name in (name for name in OVER_STEPS if name in by_name):
            panel.plot(*zip(*sorted(by_name[name]), strict=True), marker=".", color=OVER_STEPS[name], label=name)
        panel.set_xscale("log")
        steps = sorted({step for points in by_name.values() for step, _ in points})
        panel.set_xticks(steps, [f"{step:,}" for step in steps])
        panel.minorticks_off()
        panel.set_title(f"{model}, {schedule} lr", loc="left", fontsize=10)
        panel.set_xlabel("steps")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("e: 0 is the best lr")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(OVER_STEPS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def peers(found: Excess, path: Path) -> None:
    """Mean and worst e of the others, family by family, beside manic on the same cells; more than 1 counts as 1."""
    ours, least = found.get(("manic", USUAL), {}), -0.1
    families: dict[str, dict[str, list[list[float]]]] = {task.family: {} for task in TASKS.values()}
    for (name, lr), at in found.items():
        if name.startswith(("manic", "plain")) or not CONTENDERS[name].usual(lr):
            continue
        for cell in (cell for cell in at if cell in ours):
            two = families[TASKS[cell[0]].family].setdefault(name, [[], []])
            two[0].append(statistics.fmean(ours[cell]))
            two[1].append(statistics.fmean(at[cell]))
    names = [name for name in reversed(CONTENDERS) if any(name in some for some in families.values())]
    shown = [family for family, some in families.items() if some]
    if not shown:
        return
    plt = pyplot()
    rows = -(-len(shown) // 4)
    size = (13, 1 + 3 * rows)
    figure, panels = plt.subplots(rows, min(4, len(shown)), figsize=size, sharey=True, squeeze=False)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for family, panel in zip(shown, panels.flat, strict=False):
        for name, two in families[family].items():
            for es, colour, below in zip(two, ("#0b6e4f", "#c2571a"), (0.17, -0.17), strict=True):
                y = names.index(name) - below
                mean, worst = (min(max(es_of(es), least), 1.0) for es_of in (statistics.fmean, max))
                panel.plot([mean, worst], [y, y], color=colour, linewidth=1.5)
                panel.plot(mean, y, "o", color=colour, markersize=5)
        panel.axvline(0, color="#d0d4db", linewidth=1, zorder=0)
        panel.set_xlim(least - 0.02, 1.04)
        panel.set_yticks(range(len(names)), names)
        panel.set_title(family, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("e: 0 is the best lr")
    labels = {"#c2571a": "the other: mean, and a line to its worst cell", "#0b6e4f": "manic on the same cells"}
    handles = [plt.Line2D([], [], color=colour, marker="o", label=label) for colour, label in labels.items()]
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def quick_check(found: Excess) -> Iterator[str]:
    """What is wrong, by the bounds of QUICK."""
    usual = {cell: statistics.fmean(values) for cell, values in found["manic", USUAL].items()}
    if len(usual) != len(QUICK):
        yield f"{len(usual)} cells were scored, not the {len(QUICK)} of QUICK"
    for (task, base, schedule, _), e in usual.items():
        if e > QUICK[task, base, schedule]:
            yield f"manic: e {e:.3f} on {task}, {base}, {schedule} (at most {QUICK[task, base, schedule]})"
    if statistics.fmean(usual.values()) > 0.05:
        yield f"manic: mean e {statistics.fmean(usual.values()):.3f} (at most 0.05)"
    if spread(found, "manic") > 0.02:
        yield f"manic: the base lr changes e by {spread(found, 'manic'):.3f} (at most 0.02)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/quality"), help="folder of the CSV, the table, the figure"
    )
    parser.add_argument("--processes", type=int, default=2, help="at a time, one thread each (default: 2)")
    families = list(dict.fromkeys(task.family for task in TASKS.values()))
    parser.add_argument("--families", nargs="*", default=families, choices=families, help="default: all")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), help="default: all of the families")
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES), help="default: all")
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS), help="default: all but the ablation's")
    parser.add_argument("--ablation", action="store_true", help="manic with one rule changed at a time")
    parser.add_argument("--quick", action="store_true", help="few cells, one seed, and loose bounds that must hold")
    args = parser.parse_args()
    path = args.out / ("quick.csv" if args.quick else "runs.csv")
    names = args.contenders or [name for name in CONTENDERS if name not in ABLATION]
    if args.ablation:
        names = ["tuned", "manic", *ABLATION]
    tasks = args.tasks or [name for name, task in TASKS.items() if task.family in args.families]
    if args.quick:
        tasks, names = list(dict.fromkeys(task for task, _, _ in QUICK)), ["tuned", "manic"]
        path.unlink(missing_ok=True)
    mine = cells(tasks, args.bases, args.quick)
    rows = carry_out(planned(mine, names, args.quick), path, args.processes)
    known = -1
    while known < len(rows):
        known = len(rows)
        rows = carry_out(search(mine, rows, args.quick), path, args.processes)
    score = [replace(run, seed=s) for run in winners(rows).values() for s in seeds(run, SCORE, args.quick)]
    rows = carry_out(score, path, args.processes)
    rows = [row for row in rows if row["contender"] in {"tuned", *names} and row["task"] in tasks]
    found = excess(rows)
    for edge in at_the_edge(rows):
        print(edge)
    text = f"{table(found)}\n\n{by_family(found, arrivals(rows))}\n\n{by_cell(found)}\n"
    print(f"{text}\nspread of manic's e over the base lr, any cell: {spread(found, 'manic'):.4f}")
    (args.out / ("ablation.md" if args.ablation else "table.md")).write_text(text, encoding="utf-8")
    chart(rows, args.out / "loss_against_lr.png")
    horizon(found, args.out / "horizon.png")
    peers(found, args.out / "peers.png")
    faults = list(quick_check(found)) if args.quick else []
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
