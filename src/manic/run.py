"""A run: the optimizer inside, its schedule, what a checkpoint says of them, and how a step is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manic.algorithm import Frozen, Learner, field_of, fresh_state, on_host, stored
from manic.checkpoint import loading
from manic.checkpoint.record import Record
from manic.collectives import anywhere
from manic.diagnostics import UNPROPORTIONAL, Monitor, Snapshot, snapshot, warn
from manic.parameters import KEPT
from manic.schedules import Schedule, fold
from manic.tuner import Options
from manic.wrapper import Closure, Inside, check_params, uninterrupted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BOOST = 2.0**16  # of the lr of bfloat16 parameters in the base's step


class Run:
    """Keeps the param groups, the record and the mode in step with each other.

    Args:
        base_optimizer: the optimizer inside.
        schedule: of the scheduler inside.
        options: what the user asked the tuner to do.
        device: where the tuner's state is; None: where the first parameter is.
        process_group: the ranks over which one model's parameters are spread without a mark on the tensors.
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
        devices = [p.device for p in self.inside.params()]
        self.device = torch.device(device) if device is not None else [*devices, torch.device("cpu")][0]
        self.calls = 0  # of step() so far, as the host knows
        self.compiled = False
        # Adagrad and its like have state from construction on, so that DCP does not make them rehearse.
        lazy = not self.inside.begun()
        self.record = Record(self.inside.name, schedule.name, 0.0, lazy, frozen=False, options=options)
        self._written = self.record.written()  # one object in all of our groups, by which they are known
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
        """One step, and one of the schedule if the step counted."""
        self.adopt()
        if self.inside.is_rehearsal(closure, self._anywhere):
            self.inside.create_state(self._mode.divisors, self._mode.enter)
            return
        uninterrupted(lambda: self._step(closure))

    def _step(self, closure: Closure | None) -> None:
        self.calls += 1
        if self._mode.step(closure):
            self.schedule.step(self.groups, self.monitor.tell)

    def read(self, field: str) -> Tensor:
        """A 0-d field of every learned scale: [k], a copy."""
        return field_of(stored(self.groups, self.record.options), field)

    def snapshot(self) -> Snapshot:
        """The run at this moment, on the host. One sync."""
        self.inside.refuse_in_a_step()
        self.adopt()
        return snapshot(self.groups, self.record.options, self.record.unit)

    def compile(self) -> None:
        """Take compiled sweeps from now on."""
        self.compiled = True
        self._settle(self.record)

    # ------------------------------------------------------------------ freeze and unwrap

    def freeze(self) -> None:
        """As ``manic.Mechanic.freeze()``."""
        self.adopt()
        self._check_lrs()
        if self.calls > 0 and not any(self.snapshot().scales):
            raise ValueError(f"no scale has been learned in {self.calls} step(s): train on, and freeze later")
        if isinstance(self.inside.optimizer, UNPROPORTIONAL):
            self.monitor.tell(
                f"the update of {self.inside.name} is not proportional to its lr, which now carries the frozen scale: "
                "the steps will not be those that were taken so far",
                "frozen",
            )
        state = self.inside.optimizer.state
        for p in [p for p in self.inside.params() if p in state]:
            for key in KEPT:
                state[p].pop(key, None)
            if not state[p]:
                del state[p]  # as the base would have it
        self._settle(dataclasses.replace(self.record, frozen=True))

    def unwrap(self, schedulers: Sequence[LRScheduler], *, waiting: bool) -> Optimizer:
        """As ``manic.Mechanic.unwrap()``. `waiting`: an LR scheduler was built on this optimizer or on the Mechanic."""
        if waiting and not schedulers:
            raise ValueError(
                "an LR scheduler that you step yourself was built on this optimizer: the scale must be folded into it "
                "as well, unwrap(scheduler)"
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
        if len(set(scales)) == 1 and "lr" in base.defaults:
            base.defaults["lr"] = base.defaults["lr"] * scales[0]  # of a group that is added later
        self.inside.leave()
        return base

    def _check_lrs(self) -> None:
        if any("lr" not in group for group in self.groups):
            raise ValueError(f"a param group of {self.inside.name} has no lr to carry the scale")

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As ``manic.Mechanic.state_dict()``."""
        self.adopt()
        if self.inside.begun() or (self.record.frozen and self.calls > 0):
            return self._pack()
        with self.inside.rehearsed(self._mode.divisors, self._mode.enter):
            return self._pack()

    def _pack(self) -> dict[str, Any]:
        self._write()
        return loading.pack(self.inside.optimizer, self._mode.packed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``manic.Mechanic.load_state_dict()``."""
        record, written, mode, calls = self.record, self._written, self._mode, self.calls
        self.inside.loading = True
        try:
            with loading.all_or_nothing(self.inside.optimizer, self.schedule, self._anywhere):
                self._load(state_dict)
        except BaseException:
            self.record, self._written, self._mode, self.calls = record, written, mode, calls
            raise
        finally:
            self.inside.loading = False

    def _load(self, state_dict: dict[str, Any]) -> None:
        fresh, spread = fresh_state(self.record.options, self.device), self.process_group is not None
        found = loading.load(self.inside.optimizer, self.schedule, self.record, state_dict, fresh, spread=spread)
        if found is None:
            self._start_afresh(dataclasses.replace(self.record, frozen=False))
            return
        saved, steps, skipped = found
        self.calls = steps + skipped
        # On the host what was skipped has created no state, so that what there is was rehearsed.
        self._settle(saved, fresh=steps == 0 and (skipped == 0 or on_host(self.groups[0]["mechanic_step"])))

    def _anywhere(self, here: bool) -> bool:
        """Whether `here` is true on any process that has a part of the model. One collective, on all of them."""
        return anywhere(here, self.inside.layouts(), self.process_group, self.device)

    # ------------------------------------------------------------------ groups, record and mode

    def _start_afresh(self, record: Record) -> None:
        """A tuner that has seen nothing, and the base lr, from the groups as they are."""
        for group in self.groups:
            group.pop("mechanic_state", None)
            group.pop("mechanic_step", None)
        self._attach_state(self.groups, record.options)
        self.calls = 0
        self._settle(dataclasses.replace(record, base_lr=self._base_lr(record.options)), fresh=True)
        if not record.lazy:
            self._mode.enter([p for p in self.inside.params() if self.inside.optimizer.state.get(p)])

    def _base_lr(self, options: Options) -> float:
        """The lr that "scale_free" divides out: the largest of the groups; 0 while all of them are 0.

        For bfloat16 parameters, which hold 8 bits of x + u, a fraction of it: u counts for all of them where it is
        large beside x, and is read off with the bits of u rather than those of x.
        """
        if options.variant == "paper":
            return 1.0
        lrs = [float(group.get("initial_lr", group["lr"])) for group in self.groups if "lr" in group]
        dtypes = {p.dtype for p in self.inside.params()}
        coarse = torch.bfloat16 in dtypes and torch.float16 not in dtypes  # which holds no such lr
        boosted = coarse and not isinstance(self.inside.optimizer, UNPROPORTIONAL)
        return max(lrs, default=1.0) / (BOOST if boosted else 1.0)

    def _attach_state(self, groups: list[dict[str, Any]], options: Options) -> None:
        """The tuner's tensors for groups that have none: those of the first group, or (per_group) fresh ones."""
        first = self.groups[0]
        for group in groups:
            shared = None if options.per_group else first.get("mechanic_state")
            step = first.get("mechanic_step")
            group["mechanic_state"] = fresh_state(options, self.device) if shared is None else shared
            group["mechanic_step"] = torch.zeros((), device=self.device) if step is None else step

    @disable_dynamo
    def adopt(self) -> None:
        """Take in the groups that the Mechanic does not know: added, or loaded behind its back."""
        if self.inside.loading:  # what the base, its hooks or a schedule ask meanwhile finds the groups half loaded
            return
        bare = [group for group in self.groups if "mechanic_state" not in group]
        ours = [group for group in self.groups if "mechanic_state" in group]
        if any(group.get("mechanic_options") is not self._written for group in ours):
            raise ValueError(
                f"the param groups of {self.inside.name} were loaded or copied behind the Mechanic, with half of what "
                "it knows: load a checkpoint with load_state_dict() of the Mechanic, and leave the entries of a group "
                "whose names begin with mechanic_ where they are"
            )
        for group in bare:
            check_params(group["params"])
        if self.record.base_lr == 0 and (base_lr := self._base_lr(self.record.options)) > 0:
            self._settle(dataclasses.replace(self.record, base_lr=base_lr))
        if len(bare) == len(self.groups):
            warn(
                f"the param groups of {self.inside.name} were replaced behind the Mechanic (did you call "
                "load_state_dict of the optimizer inside?): the tuner starts afresh"
            )
            self._start_afresh(dataclasses.replace(self.record, frozen=False))
        elif bare:
            if self.record.frozen and self.record.options.per_group:
                raise ValueError("a frozen Mechanic learns no scale for a new param group: add it before freeze()")
            self._attach_state(bare, self.record.options)
            self._settle(self.record)
        elif len(self._mode.divisors) != len(self.groups):  # a group was taken out
            self._settle(self.record)

    def _settle(self, record: Record, *, fresh: bool | None = None) -> None:
        """Take up a record: with the groups as they are, what follows from it is worked out anew.

        `fresh`: as in ``manic.algorithm.Learner``; None: as it was.
        """
        if record.frozen:
            scales = snapshot(self.groups, record.options, record.unit).scales
            self._mode = Frozen(self.inside, scales)
        else:
            was = fresh if fresh is not None else isinstance(self._mode, Learner) and self._mode.fresh
            self._mode = Learner(
                self.inside, record, self.device, self.process_group, compiled=self.compiled, fresh=was
            )
        if record != self.record:
            self.record, self._written = record, record.written()
        self._write()
        self.monitor.forget()
        self.schedule.forget()

    def _write(self) -> None:
        loading.write(self.groups, self._written, self.schedule)

    # ------------------------------------------------------------------ what happens behind the Mechanic

    def watch(self) -> None:
        """See when the optimizer inside is stepped or saved. A copy comes without hooks, and calls this."""
        self.inside.watch(self._on_base_step, self._on_base_state_dict)

    def _on_base_step(self, *_: object) -> None:
        if not self.inside.stepping:
            self.monitor.tell(
                f"{self.inside.name}.step() was called behind the Mechanic that wraps it: that update is not scaled. "
                "Call the Mechanic's step() alone."
            )

    def _on_base_state_dict(self, *_: object) -> None:
        """Keep ``base_optimizer.state_dict()`` complete."""
        if self.inside.stepping:
            self.monitor.tell(
                f"{self.inside.name}.state_dict() was called in the middle of a step: its lr is not yours. Save after "
                "step()"
            )
        elif not self.inside.loading:
            self.adopt()
            self._write()
