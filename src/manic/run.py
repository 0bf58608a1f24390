"""A run: the base optimizer, its schedule, what a checkpoint says of them, and the mode that takes a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manic.algorithm import Frozen, Learner, fresh_state, on_host, stored_field
from manic.bases import Look, check_params, hidden
from manic.checkpoint import loading
from manic.checkpoint.record import Record
from manic.collectives import anywhere
from manic.diagnostics import Monitor, Snapshot, snapshot, warn
from manic.parameters import KEPT, lr_of, shards
from manic.schedules import Schedule, fold
from manic.sweeps.kernels import name_for
from manic.tuner import Options
from manic.units import base_lr, boost, enlarge, expect
from manic.wrapper import Closure, Inside, uninterrupted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Run:
    """Keep the param groups, the record and the mode (learning or frozen) consistent.

    Args:
        base_optimizer: the optimizer that is wrapped.
        schedule: the LR scheduler inside.
        options: the tuner's options.
        device: where the tuner's state is; None: where the first parameter is.
        process_group: the ranks that share one model's parameters without a mark on the tensors.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        schedule: Schedule,
        options: Options,
        device: torch.device | str | None,
        process_group: ProcessGroup | None,
    ) -> None:
        self.inside, self.schedule, self.monitor = Inside(base_optimizer), schedule, Monitor()
        self.process_group = process_group
        first = next((p.device for p in self.inside.params()), torch.device("cpu"))
        self.device = first if device is None else torch.device(device)
        self.calls = 0  # of step() so far, counted on the host
        self._looked = False  # at a step of the base
        self._boost = 1.0  # of the lr, in the base lr of the record
        name, sweeps = self.inside.name, name_for(first)
        self.record = Record(name, schedule.name, 0.0, lazy=True, frozen=False, sweeps=sweeps, options=options)
        if inner := hidden(base_optimizer):
            self.monitor.tell(
                f"{name} holds a {type(inner).__name__} with param groups of its own, which sees neither this lr "
                "nor the schedule: combine the optimizers with manic.chain(...) instead, and wrap that"
            )
        self._written = self.record.written()  # this very object in each of our groups tells that it is ours
        self._mode: Learner | Frozen
        try:
            self._start_afresh(self.record)
            self.watch()
        except BaseException:
            self.inside.leave()
            raise

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups."""
        return self.inside.groups

    def step(self, closure: Closure | None) -> None:
        """Take one step, and step the schedule if the step counted."""
        with self.inside.lock:
            self.adopt()
            if not self.groups:
                return
            if self.inside.is_rehearsal(closure, self._anywhere):
                self.inside.create_state(self._mode.divisors, self._mode.enter)
                return
            uninterrupted(lambda: self._step(closure))

    def _step(self, closure: Closure | None) -> None:
        self.calls += 1
        look = None if self._looked else self._look()
        try:
            counts = self._mode.step(closure)
        finally:
            if look is not None:
                look.end()
        if counts:
            self.schedule.step(self.groups, self.monitor.tell)
        if look is not None:
            self._looked = counts
            for message in look.found:
                self.monitor.tell(message)

    @disable_dynamo
    def _look(self) -> Look:
        return Look(self.inside.optimizer)

    def read(self, field: str) -> Tensor:
        """A 0-d field of every learned scale: [k], a copy. Without any param group: one 0."""
        if not self.groups:
            return fresh_state(self.record.options, self.device)[:1]
        return stored_field(self.groups, self.record.options, field)

    def snapshot(self) -> Snapshot:
        """Copy what the run knows to the host. One sync."""
        with self.inside.between_steps():
            self.adopt()
            return snapshot(self.groups, self.record.options, self.record.unit)

    # ------------------------------------------------------------------ freeze and unwrap

    def freeze(self) -> None:
        """As ``manic.Mechanic.freeze()``."""
        self.adopt()
        self._check_lrs()
        if self.calls > 0 and not any(self.snapshot().scales):
            raise ValueError(f"no scale has been learned in {self.calls} step(s): train on, and freeze later")
        if self.inside.unproportional:
            self.monitor.tell(
                f"the update of {self.inside.unproportional} is not proportional to its lr, which now carries the "
                "frozen scale: its steps will differ from those so far",
                "frozen",
            )
        state = self.inside.optimizer.state
        for p in [p for p in self.inside.params() if p in state]:
            for key in KEPT:
                state[p].pop(key, None)
            if not state[p]:
                del state[p]  # the base itself keeps none
        self._settle(dataclasses.replace(self.record, frozen=True))

    def unwrap(self, schedulers: Sequence[LRScheduler], *, waiting: bool) -> Optimizer:
        """As ``manic.Mechanic.unwrap()``. `waiting`: an LR scheduler was built on this optimizer or on the Mechanic."""
        if waiting and not schedulers:
            raise ValueError(
                "you step an LR scheduler that was built on this optimizer: pass it, unwrap(scheduler), so that the "
                "scale goes into its lrs as well"
            )
        scales = self.snapshot().scales
        if not any(scales):
            raise ValueError(f"no scale has been learned in {self.calls} step(s): train on, and unwrap later")
        scheduler = self.schedule.scheduler
        inside = [] if scheduler is None or scheduler in schedulers else [scheduler]
        self._check_lrs()
        fold(self.groups, [*inside, *schedulers], scales)
        self.freeze()
        base = self.inside.optimizer
        if len(set(scales)) == 1 and base.defaults.get("lr") is not None:
            base.defaults["lr"] = base.defaults["lr"] * scales[0]  # for groups that the user adds later
        self.inside.leave()
        return base

    def _check_lrs(self) -> None:
        if any(lr_of(group) is None for group in self.groups):
            raise ValueError(
                f"a param group of {self.inside.name} has no lr to carry the scale: give every group an lr"
            )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As ``manic.Mechanic.state_dict()``."""
        self.adopt()
        if self.calls == 0 and not self.inside.begun():
            self.inside.create_state(self._mode.divisors, self._mode.enter)
        self._write()
        for sentence in self.schedule.gaps():
            self.monitor.tell(sentence)
        whole = self.process_group is None
        spread = not whole or shards(self.inside.layouts()[0]) > 1
        return loading.pack(self.inside.optimizer, spread=spread, whole=whole and not self.record.frozen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``manic.Mechanic.load_state_dict()``."""
        before = self.record, self._written, self._mode, self.calls, self._boost
        self.inside.loading = True
        try:
            with loading.all_or_nothing(self.inside.optimizer, self.schedule, self._anywhere):
                self._load(state_dict)
        except BaseException:
            self.record, self._written, self._mode, self.calls, self._boost = before
            raise
        finally:
            self.inside.loading = False

    def _load(self, state_dict: dict[str, Any]) -> None:
        fresh, spread = fresh_state(self.record.options, self.device), self.process_group is not None
        merged = self._anywhere if isinstance(self._mode, Learner) and self._mode.fresh else None
        found = loading.load(
            self.inside.optimizer, self.schedule, self.record, state_dict, fresh, spread=spread, merged=merged
        )
        if found is None:
            self._start_afresh(self.record)
            return
        saved, steps, skipped = found
        self.calls, self._boost = steps + skipped, self._boost_now()
        # A step that the host skipped creates no state. So this state is from before the first step.
        self._settle(saved, fresh=steps == 0 and (skipped == 0 or on_host(self.groups[0]["mechanic_step"])))

    def _anywhere(self, here: bool) -> bool:
        """Whether `here` is true on any process that has a part of the model. One collective."""
        return anywhere(here, self.inside.layouts(), self.process_group, self.device)

    # ------------------------------------------------------------------ groups, record and mode

    def _start_afresh(self, record: Record) -> None:
        """Begin with a new tuner, and take the base lr from the groups."""
        for group in self.groups:
            group.pop("mechanic_state", None)
            group.pop("mechanic_step", None)
        self._attach_state(self.groups, record.options)
        self.calls = 0
        lazy = not self.inside.begun()  # Adagrad has state from construction on
        found = self._base_lr(record.options)
        self._settle(dataclasses.replace(record, base_lr=found, lazy=lazy, frozen=False), fresh=True)
        if not lazy:
            self._mode.enter([p for p in self.inside.params() if self.inside.optimizer.state.get(p)])

    def _base_lr(self, options: Options) -> float:
        """The lr that "scale_free" divides out of the base's step."""
        if options.variant == "paper":
            return 1.0
        self._boost = self._boost_now()
        return base_lr(self.groups) / self._boost

    def _boost_now(self) -> float:
        return 1.0 if self.inside.unproportional else boost(self.groups)

    def _follow_dtypes(self) -> None:
        """Go on in another unit if the first bfloat16 parameters have come, or the first float16 ones."""
        factor = self._boost_now() / self._boost
        if factor != 1 and self.record.options.variant != "paper" and self.record.base_lr > 0:
            enlarge(self.groups, factor)
            self._boost *= factor
            self._settle(dataclasses.replace(self.record, base_lr=self.record.base_lr / factor))

    def _attach_state(self, groups: list[dict[str, Any]], options: Options) -> None:
        """Give groups the tuner's tensors: those of the first group, or with per_group new ones."""
        for group in groups:
            first = self.groups[0]
            shared = None if options.per_group else first.get("mechanic_state")
            step = first.get("mechanic_step")
            group["mechanic_state"] = fresh_state(options, self.device) if shared is None else shared
            zero = torch.zeros((), dtype=torch.float32, device=self.device)
            group["mechanic_step"] = zero if step is None else step

    @disable_dynamo
    def adopt(self) -> None:
        """Take in param groups that the user has added, or loaded into the base optimizer itself."""
        if self.inside.loading:  # the base's hooks or a schedule may call this while the groups are half loaded
            return
        bare = [group for group in self.groups if "mechanic_state" not in group]
        ours = [group for group in self.groups if "mechanic_state" in group]
        if any(group.get("mechanic_options") is not self._written for group in ours):
            raise ValueError(
                f"the param groups of {self.inside.name} were loaded or copied without the Mechanic, which now knows "
                "only half of its state: load a checkpoint with the Mechanic's load_state_dict(), and do not copy the "
                "entries of a group whose names begin with mechanic_"
            )
        if bare:
            check_params(self.inside.optimizer)
        if self.record.base_lr == 0 and (found := self._base_lr(self.record.options)) > 0:
            self._settle(dataclasses.replace(self.record, base_lr=found))
        if bare or self.calls == 0:
            self._follow_dtypes()
        if bare and not ours:
            warn(
                f"the param groups of {self.inside.name} were replaced without the Mechanic (did you call "
                "load_state_dict of the base optimizer?): the tuner starts afresh"
            )
            self._start_afresh(self.record)
        elif bare:
            if self.record.frozen and self.record.options.per_group:
                raise ValueError("a frozen Mechanic learns no scale for a new param group: add it before freeze()")
            self._attach_state(bare, self.record.options)
            if not self.record.options.per_group:
                expect(self.groups[0]["mechanic_state"], bare, self.record.unit)
            self._settle(self.record)
        elif len(self._mode.divisors) != len(self.groups):  # the user has removed a group
            self._settle(self.record)

    def _settle(self, record: Record, *, fresh: bool | None = None) -> None:
        """Work out anew what follows from a record and the groups. `fresh`: of ``Learner``; None: as it was."""
        if record.frozen:
            scales = snapshot(self.groups, record.options, record.unit).scales
            self._mode = Frozen(self.inside, scales)
        else:
            was = fresh if fresh is not None else isinstance(self._mode, Learner) and self._mode.fresh
            self._mode = Learner(self.inside, record, self.device, self.process_group, fresh=was)
        if record != self.record:
            self.record, self._written = record, record.written()
        self._write()
        self.monitor.forget()
        self.schedule.forget()

    def _write(self) -> None:
        loading.write(self.groups, self._written, self.schedule)

    # ------------------------------------------------------------------ calls of the base optimizer itself

    def watch(self) -> None:
        """Notice a step or a save of the base optimizer itself. A copy has no hooks, and calls this again."""
        self.inside.watch(self._on_base_step, self._on_base_state_dict)

    def _on_base_step(self, *_: object) -> None:
        if not self.inside.stepping:
            self.monitor.tell(
                f"{self.inside.name}.step() was called, not the step() of the Mechanic that wraps it: that update is "
                "not scaled. Call the Mechanic's step() only"
            )

    def _on_base_state_dict(self, *_: object) -> None:
        """Keep ``base_optimizer.state_dict()`` complete."""
        if self.inside.stepping:
            self.monitor.tell(
                f"{self.inside.name}.state_dict() was called during step(), where lr is temporarily changed: save "
                "after step()"
            )
        elif not self.inside.loading:
            self.adopt()
            self._write()
