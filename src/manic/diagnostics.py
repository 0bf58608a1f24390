"""The figures for a log, and warnings about what seems to be wrong with a run.

All of it is computed on the host, from one copy of the tuner's state, when the user asks; nothing in a step.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manic.parameters import lr_of
from manic.tuner import Options, TunerState
from manic.units import units

ENOUGH = 100  # steps after which a scale has long left its start (it takes 20 to 50)
IDLE = 1000  # steps at one lr after which the user may have forgotten to step the scheduler
INSIDE = ("manic", "torch")  # a warning names the user's line, not theirs
HARDLY = 1e-5  # times 1 + ‖x_ref‖: a step too small to train with
FAR = 100.0  # times 1 + ‖x_ref‖: a distance from x_ref that no useful run reaches


class Snapshot(NamedTuple):
    """A run at one moment, on the host."""

    step: int  # calls of step() so far, skipped steps included
    options: Options
    unit: float  # the base lr that is divided out of Δ
    units: list[float]  # that of each param group: 1 where it has no lr
    names: list[str]  # of the param groups
    lrs: list[float]  # theirs, at this moment
    tuners: list[TunerState]  # one; with per_group one per group

    @property
    def scales(self) -> list[float]:
        """The learned scale of each param group."""
        scales = [float(tuner.scale) for tuner in self.tuners]
        scales = scales if self.options.per_group else scales * len(self.names)
        return [scale / unit for scale, unit in zip(scales, self.units, strict=True)]

    @property
    def effective_lrs(self) -> list[float]:
        """lr × scale of each param group."""
        return [lr * scale for lr, scale in zip(self.lrs, self.scales, strict=True)]

    @property
    def highest_lrs(self) -> list[float]:
        """The highest lr of the run times the scale, by param group; 0 in "paper", which does not keep it."""
        highest = [float(tuner.peak) for tuner in self.tuners]
        highest = highest if self.options.per_group else highest * len(self.names)
        parts = zip(highest, self.units, self.scales, strict=True)
        return [peak * unit * scale for peak, unit, scale in parts]

    @property
    def owners(self) -> list[str]:
        """The group names of the tuners; "" where one serves all groups."""
        return self.names if len(self.tuners) > 1 else [""] * len(self.tuners)


def snapshot(groups: Sequence[dict[str, Any]], options: Options, unit: float) -> Snapshot:
    """Read a run from its param groups, live or in a checkpoint. Waits for their device, once."""
    if not groups:
        return Snapshot(0, options, unit, [], [], [], [])
    flats = [group["mechanic_state"] for group in (groups if options.per_group else groups[:1])]
    rates = [lr_of(group, 1.0) for group in groups]
    tensors = [groups[0]["mechanic_step"], *(lr for lr in rates if isinstance(lr, Tensor))]
    together = torch.cat([*flats, *(t.to(flats[0]).reshape(1) for t in tensors)]).cpu()
    size = TunerState.size(len(options.memories))
    parts = together[: size * len(flats)].view(-1, size)
    step, *values = together[size * len(flats) :].tolist()
    numbers = iter(values)
    lrs = [next(numbers) if isinstance(lr, Tensor) else float(lr) for lr in rates]
    tuners = [TunerState.unpack(part, len(options.memories)) for part in parts]
    calls = int(step) + int(tuners[0].skipped)
    return Snapshot(calls, options, unit, units(groups, unit), names_of(groups), lrs, tuners)


def names_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """The names of param groups: their "name" if all have different ones, else their number."""
    names = [str(group.get("name", i)) for i, group in enumerate(groups)]
    return names if len(set(names)) == len(names) else [str(i) for i in range(len(names))]


def metrics(look: Snapshot) -> dict[str, float]:
    """As ``manic.Mechanic.metrics()``."""
    found: dict[str, float] = {}
    its = look.units if look.options.per_group else [look.unit] * len(look.tuners)
    for owner, tuner, unit in zip(look.owners, look.tuners, its, strict=True):
        end = owner and f"/{owner}"
        found[f"scale{end}"] = float(tuner.scale) / unit
        found[f"h{end}"] = float(tuner.h)
        found[f"delta_norm{end}"] = float(tuner.delta_norm) * unit
        found[f"outliers{end}"] = float(tuner.outliers)
    for name, lr in zip(look.names, look.effective_lrs, strict=True):
        found["effective_lr" if len(look.names) == 1 else f"effective_lr/{name}"] = lr
    for tuner in look.tuners[:1]:
        found["skipped"] = float(tuner.skipped)
    return found


def findings(
    look: Snapshot, last: Snapshot, level: Snapshot, unproportional: str, waiting: bool
) -> Iterator[tuple[str, str]]:
    """Find what seems to be wrong with a run that is still learning: the kind of each fault, and a message.

    Args:
        look: the run now.
        last: the snapshot before; or the same one.
        level: the first snapshot with these lrs; or the same one.
        unproportional: the name of a base optimizer whose update is not proportional to its lr; "": there is none.
        waiting: the user has to step an LR scheduler.
    """
    since = look.step - last.step
    if not look.tuners:
        return
    skipped = int(look.tuners[0].skipped - last.tuners[0].skipped)
    if since >= 10 and skipped >= since / 2:
        yield (
            "skipped",
            f"{skipped} of the last {since} steps were skipped, because gradients were not finite. Look at the loss "
            "and at its input; with float16, use a GradScaler",
        )
    if unproportional:
        yield (
            "unproportional",
            f"the update of {unproportional} is not proportional to its lr: only the schedule has an effect, not the "
            "base lr, and effective_lr() is no lr for the plain optimizer",
        )
    if waiting and look.step - level.step >= IDLE:
        yield (
            "waiting",
            f"an LR scheduler was built on this optimizer, but the lr has been {look.lrs[0]:g} for "
            f"{look.step - level.step} steps: pass it in, Mechanic(optimizer, scheduler), or call its step(). "
            "(Ignore this if the schedule is level for so long.)",
        )
    for owner, tuner, before in zip(look.owners, look.tuners, last.tuners, strict=True):
        of = owner and f" of group {owner}"
        first = look is last or float(before.steps) < ENOUGH  # look since the start should have been left
        for kind, message in _of_one(tuner, look.options, of, first):
            yield kind + of, message
        outliers = int(tuner.outliers - before.outliers)
        if since >= 10 and outliers >= max(2, since / 10):
            yield (
                f"outliers{of}",
                f"in {outliers} of the last {since} steps no update followed the gradient{of}, since ⟨Δ, g⟩ was far "
                "larger than before: look for broken batches, or clip the gradients by their norm",
            )


def _of_one(tuner: TunerState, options: Options, of: str, first: bool) -> Iterator[tuple[str, str]]:
    """Find what is wrong by the state of one learned scale. A scale may come back to its start at the minimum, so
    only the `first` look asks whether it has left it."""
    steps, scale, update_norm = float(tuner.steps), float(tuner.scale), float(tuner.update_norm)
    size, away = 1 + math.sqrt(tuner.ref_sq), scale * float(tuner.delta_norm)
    if steps >= 10 and update_norm == 0:
        if float(tuner.numel) == 0 or (options.variant == "scale_free" and float(tuner.grad_norm) == 0):
            yield (
                "gradients",
                f"all gradients{of} were 0 in {steps:.0f} steps. Check that these are the parameters of the model that "
                "you train, that the loss depends on them, and that zero_grad() does not come between backward() and "
                "step()",
            )
        else:
            yield (
                "updates",
                f"the base optimizer has not moved the parameters{of} in {steps:.0f} steps. Check that its lr is not 0 "
                "(is its scheduler stepped?) and that its updates are not below the parameters' last digit (SGD, "
                "bfloat16)",
            )
    elif first and steps >= ENOUGH and options.s_init is None and scale * update_norm <= HARDLY * size:
        yield (
            "start",
            f"the scale{of} has not left its start in {steps:.0f} steps, or is back there: the updates so far do not "
            "lower the loss. Check the sign of the loss, and that each batch is a fair sample."
            + (' (variant="paper" needs a base lr of 1 or more.)' if options.variant == "paper" else ""),
        )
    elif steps >= ENOUGH and away > FAR * size:
        yield (
            "unbounded",
            f"the parameters{of} are {away:.2g} away from where they began, more than {FAR:.0f} times their norm then, "
            "and the scale still grows. Check whether the loss has diverged. If it has no minimum (as on classes that "
            "can be separated without error), weight decay gives it one",
        )


class Monitor:
    """Warns of what seems to be wrong with a run, once of each."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._seen: tuple[Snapshot, Snapshot] | None = None  # the first with the lrs of the last, and the last

    def tell(self, message: str, kind: str = "") -> None:
        """Warn, once of each kind, or once with each message."""
        if (kind or message) not in self._told:
            self._told.add(kind or message)
            warn(message)

    def examine(self, now: Snapshot, unproportional: str, *, waiting: bool) -> None:
        """Warn of what seems to be wrong with a run that is still learning. Arguments as in ``findings()``."""
        level, last = self._seen or (now, now)
        level = level if level.lrs == now.lrs else now
        self._seen = level, now
        for kind, message in findings(now, last, level, unproportional, waiting):
            self.tell(message, kind)

    def forget(self) -> None:
        """Do not compare the next snapshot with the last."""
        self._seen = None


def warn(message: str) -> None:
    """A UserWarning at the first caller outside torch and this package."""
    packages = [name.partition(".")[0] for name in callers()]
    warnings.warn(message, stacklevel=1 + next((i for i, name in enumerate(packages) if name not in INSIDE), 0))


def callers() -> list[str]:
    """The names of the modules on the stack, innermost first."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        names.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back  # type: ignore[assignment]
    return names
