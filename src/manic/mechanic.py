"""The wrapper: Algorithm 1 of arXiv 2306.00144 around any built ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import math
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manic import checkpoint, report
from manic.kernels import Kernels, compiled_tune, kernels_for, native
from manic.reduction import over_group, over_mesh
from manic.report import UNPROPORTIONAL, Look
from manic.schedules import fold, parts
from manic.storage import DELTA, REF, Layout, Slot, entry, layout_of, shards, signature, slots, wide
from manic.sweeps import GRAD_SQ, NUMEL, Carried, Group, discard, grouped, hold, measure, move, still
from manic.tuner import DEFAULT_BETAS, Options, Sums, Tuner, tune

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("manic")

# By which a process is told to stop, or to save.
SIGNALS = signal.valid_signals() & {getattr(signal, f"SIG{name}", 0) for name in ("INT", "TERM", "HUP", "USR1", "USR2")}
BOOST = 2.0**16  # of the lr of bfloat16 parameters in the base's step

Active = dict[Layout, list[Group]]


class Plan(NamedTuple):
    """What takes part in a step."""

    seen: Any  # by what it is known again
    slots: list[Slot]  # the parameters that have a gradient
    active: Active  # the same, grouped for the sweeps
    idle: list[Slot]  # a recomputed Δ and no gradient: they sit this step out


class Mechanic(Optimizer):
    r"""Learns the scale of another optimizer's updates, so that its learning rate needs no tuning.

        Algorithm 1 of arXiv 2306.00144, n = len(betas); per step t, with the base optimizer's update u_t:
            h_t     = < Δ_t , g_t + λ·(Σ s_t)·(‖g_t‖/‖x_t‖)·x_t >
            m_t     = max(β·m_{t-1}, |h_t|)
            v_t     = β²·v_{t-1} + h_t²
            r_t     = max(0, β·r_{t-1} - s_t·h_t)
            W_t     = (s_init/n)·m_t + r_t
            s_{t+1} = W_t / (√v_t + ε)
            Δ_{t+1} = Δ_t + u_t
            x_{t+1} = x_ref + (Σ s_{t+1})·Δ_{t+1}

    That is ``variant="paper"``. The default, ``"scale_free"``, takes the same sums and the same two tensors and
    needs no lr at all: its equations are in docs/algorithm.md.

    The wrapper is a ``torch.optim.Optimizer``: its ``param_groups``, ``state`` and ``defaults`` are the base
    optimizer's own, and everything it knows is in ``state_dict()``. In each param group it keeps
    ``mechanic_state`` (float64 [4n + 14], see ``manic.tuner.Tuner``), ``mechanic_step`` (float32 []),
    ``mechanic_options`` and ``mechanic_scheduler`` (a dict in a tuple); in ``state[p]``, from p's first step on,
    ``mechanic_ref`` and ``mechanic_delta`` (shape of p, float32 or better).

    Args:
        base_optimizer: an optimizer that is already built, on any lr.
        scheduler: an LR scheduler built on `base_optimizer`. It is stepped once per ``step()``; do not
            step it yourself. A scheduler that you step yourself may be built on either optimizer instead.
        variant: ``"scale_free"`` gives the same run at every base lr: the base works at lr / base lr, and the log
            of the scale follows the sign and the relative size of h. ``"paper"`` is Algorithm 1 to the letter.
        betas: decay of each of the n accumulators, in [0, 1].
        s_decay: λ, >= 0.
        s_init: the first scale, > 0. None: 1e-8 (``"paper"``), or the scale whose first step moves x by
            1e-3·(1 + ‖x_ref‖) (``"scale_free"``).
        eps: ε, > 0, in ``"paper"``; ``"scale_free"`` needs none.
        store_delta: False keeps one tensor per parameter instead of two and recomputes Δ as (x - x_ref)/S.
            Not for bfloat16 and float16 parameters, whose digits do not hold Δ.
        per_group: learn one scale per param group.
        device: where the accumulators live and are updated. None: the first parameter's device.
        process_group: the ranks that share one model whose parameters are spread over them without a mark
            on the tensors (FSDP1, pipeline stages): their sums are added up, in one all-reduce per step.
        log_func: called with ``{"iter_count": int, "s": float, ...}``: ``s`` is the scale (a list with `per_group`),
            and the rest is ``metrics()``. None: ``logging.getLogger("manic")``.
        log_every: call `log_func` every that many steps; 0: never, and nothing is read back from the device.

    Raises:
        TypeError: `base_optimizer` is no optimizer instance, or `scheduler` no LR scheduler of a kind that
            can be stepped without a metric.
        ValueError: an option out of its range, an optimizer that is wrapped already, a scheduler built on
            another optimizer, parameters that `store_delta=False` cannot serve.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        variant: str = "scale_free",
        betas: tuple[float, ...] = DEFAULT_BETAS,
        s_decay: float = 0.01,
        s_init: float | None = None,
        eps: float = 1e-8,
        store_delta: bool = True,
        per_group: bool = False,
        device: torch.device | str | None = None,
        process_group: ProcessGroup | None = None,
        log_func: Callable[[dict[str, Any]], object] | None = None,
        log_every: int = 0,
    ) -> None:
        _check_base(base_optimizer)
        _check_scheduler(scheduler, base_optimizer)
        self._options = Options(variant, betas, s_decay, s_init, eps, bool(store_delta), bool(per_group))
        if log_func is not None and not callable(log_func):
            raise TypeError(f"log_func must be callable, got {log_func!r}")
        if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 0:
            raise ValueError(f"log_every must be an int >= 0 (0: never), got {log_every!r}")
        for group in base_optimizer.param_groups:
            self._check_params(group["params"], self._options)

        # Optimizer.__init__ would build param_groups and state of its own; these are the parts that it adds.
        # The hooks must not be the base's: each would be called twice.
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()
        self._warned_capturable_if_run_uncaptured = True

        self.base_optimizer = base_optimizer
        self.scheduler = scheduler
        self.process_group = process_group
        self.log_func = log_func
        self.log_every = log_every
        devices = [p.device for group in base_optimizer.param_groups for p in group["params"]]
        self._device = torch.device(device) if device is not None else [*devices, torch.device("cpu")][0]
        self._stepping = self._loading = False
        self._compiled = False
        self._plan: Plan | None = None
        self._carried: Carried = {}
        self._told: set[str] = set()  # the warnings that were given
        self._looks: tuple[Look, Look] | None = None  # of metrics(): the first with the lrs of the last, and the last
        self._left: tuple[Any, list[Any]] | None = None  # where our own last step left scheduler and lrs
        # Adagrad and its like have state from construction on, so that nobody makes them rehearse.
        self._lazy = not self._begun()
        self._record: tuple[dict[str, Any], ...] = ()  # what our groups say of us, in all of them the same object
        self._watch: list[Any] = []  # the hooks on the base
        try:
            self._start_afresh()
            self._watch_base()
        except BaseException:
            self._leave_base()
            raise

    # ------------------------------------------------------------------ the algorithm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Algorithm 1: the base optimizer's update, at the learned scale.

        A gradient that is not finite (or whose squares overflow float32) changes nothing but the count of
        skipped steps: on the CPU the base and the scheduler are not stepped at all; elsewhere, where looking
        at the flag would stall the device, the base sees gradients of zero. So it does, with "scale_free", where
        ⟨Δ, g⟩ is a multiple of all that was seen before: the scale takes notice, but no update follows.

        Args:
            closure: re-evaluates the model and returns the loss; called once, under ``enable_grad``, and as
                often again as the base optimizer asks for it.

        Returns:
            the closure's loss, or None.
        """
        loss, closure = _evaluate(closure, self._params)
        self._adopt()
        if self._rehearse(closure):
            return loss
        if self._frozen:
            self._step_frozen(closure)
            return loss
        if self._fresh:
            self._forget_rehearsal()
        _, taking, active, idle = self._take()
        before = self._read("scale")  # S_t
        sums = self._measure(active, before)  # ⟨Δ,g⟩ ⟨Δ,x⟩ ‖g‖² ‖x‖² ‖Δ‖²
        tuners, ok = self._tune(sums)  # h m v r W → s_{t+1}
        if _known_false(ok):
            self._commit([old._replace(skipped=old.skipped + 1) for old in self._tuners()], ok)
        else:
            motion, counts = _verdict(self._tuners(), tuners, ok)
            with _Uninterrupted():
                self._propose(active, closure, before, counts)  # x_t + u_t
                update_sq = self._move(active, motion, counts)  # Δ takes in u_t, x = x_ref + S_{t+1}·Δ
                hold(idle, before, motion[:, 1])
                self._store(taking)
                self._fresh &= not taking
                self._commit([new._replace(update_sq=u) for new, u in zip(tuners, update_sq, strict=True)], ok)
                self._step_schedule()
        self._log()
        return loss

    @disable_dynamo
    def _rehearse(self, closure: object) -> bool:
        """torch.distributed.checkpoint makes an optimizer create its state by a step with lr and gradients of 0.

        Only where no state is: before the first real step, or frozen around a base that keeps none. Such a step runs
        the base and nothing else: the parameters stay, tuner and scheduler wait, and x_ref and Δ lie in the state for
        a checkpoint to be loaded over them. Returns whether this step was one. It looks at values only while every lr
        is 0.
        """
        if closure is not None or self._begun():
            return False
        lrs = [torch.as_tensor(group.get("lr", 1)) for group in self.param_groups]
        if not all(_on_host(lr) and float(lr) == 0 for lr in lrs):
            return False
        plan = self._take()
        sums = self._measure(plan.active, self._read("scale")).sum(0)  # of all ranks: their verdict is the same
        if sums[NUMEL] == 0 or sums[GRAD_SQ] != 0:
            return False
        self._create_state(plan.slots)
        return True

    def _create_state(self, taking: list[Slot]) -> None:
        """What a first step with lr and gradients of 0 creates, and nothing else of it."""
        before = [dict(group) for group in self.param_groups]
        self._step_base(None)
        for group, values in zip(self.param_groups, before, strict=True):
            group.update(values)  # some bases count their steps here
        for slot in taking:
            slot.param.copy_(slot.ref)
        self._store(taking)

    @torch.no_grad()
    def _rehearsed(self) -> dict[str, Any]:
        """The state dict as it will be after the first step: what DCP is to store, or load. Nothing stays of it."""
        params = self._params()
        before, grads = [dict(group) for group in self.param_groups], [p.grad for p in params]
        try:
            for p in params:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            for group in self.param_groups:
                if "lr" in group:
                    group["lr"] = group["lr"] * 0
            self._create_state(self._take().slots)
            for group, values in zip(self.param_groups, before, strict=True):
                group.update(values)
            return checkpoint.pack(self)
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            for group, values in zip(self.param_groups, before, strict=True):
                group.clear()
                group.update(values)
            self.state.clear()

    @disable_dynamo
    def _forget_rehearsal(self) -> None:
        """Sweep away what a rehearsal, or a checkpoint of one, left in the state: the first real step begins."""
        for p in [p for p in self._params() if REF in self.state.get(p, {})]:
            if self._lazy:
                del self.state[p]  # the base's own first step is still to come
            elif p.grad is not None:
                self.state[p].pop(REF), self.state[p].pop(DELTA, None)

    @disable_dynamo
    def _take(self) -> Plan:
        """What takes part in this step. Worked out anew only where something is not as it was in the last one."""
        options, groups = self._options, self.param_groups
        looks = signature(self._params(), self.state)
        seen = looks and ([(len(group["params"]), group.get("maximize")) for group in groups], *looks)
        if self._plan is None or self._plan.seen is None or self._plan.seen != seen:
            every = list(slots(groups, self.state, store_delta=options.store_delta, per_group=options.per_group))
            taking = [slot for slot in every if slot.grad is not None]
            active: Active = {layout: [] for layout in self._layouts()}
            for group in grouped(taking, self._kernels):
                active[group.layout].append(group)
            idle = [slot for slot in every if slot.grad is None and slot.delta is None]
            entering = any(slot.entering for slot in taking)  # whose x_ref is x of this moment
            self._plan = Plan(None if entering else seen, taking, active, idle)
        else:
            for slot in self._plan.slots:
                slot.grad = slot.param.grad
        return self._plan

    def _kernels(self, device: torch.device) -> Kernels | None:
        return kernels_for(device, compiled=self._compiled)

    def _layouts(self) -> list[Layout]:
        """How the parameters are spread over processes, alike on every rank: sharded ones first."""
        found = dict.fromkeys(map(layout_of, self._params()))
        return sorted(found, key=shards, reverse=True) or [None]

    @disable_dynamo
    def _measure(self, active: Active, before: Tensor) -> Tensor:
        """The global sums at x_t: [k, 8], columns as in ``manic.tuner.Sums``."""
        total = torch.zeros(len(before), len(Sums._fields), dtype=before.dtype, device=before.device)
        for i, (layout, mine) in enumerate(active.items()):
            part = measure(mine, before, self._carried)
            if i == 0:
                part[:, -1] = self._read("update_sq")
            total += over_mesh(part, layout)
        return over_group(total, self.process_group)

    @disable_dynamo
    def _move(self, active: Active, motion: Tensor, counts: Tensor | None) -> Tensor:
        """The second pass; returns ‖u_t‖² over this process's share of the parameters, [k]."""
        layouts = list(active)
        update_sq = motion.new_zeros(len(motion))
        carries: Carried = {}
        for layout, mine in active.items():
            part, left = move(mine, motion, counts, self._carried)
            carries |= left
            # The shares are added up over the first layout's shards: of a tensor that is whole on each, a fraction.
            update_sq += part if shards(layout) > 1 else part / shards(layouts[0])
        self._carried = carries
        return update_sq.nan_to_num_(0.0, 0.0, 0.0)

    def _flat(self) -> list[Tensor]:
        """The stored state of every learned scale: one, or one per group."""
        groups = self.param_groups if self._options.per_group else self.param_groups[:1]
        return [group["mechanic_state"] for group in groups]

    def _tuners(self) -> list[Tuner]:
        """The same, as views that have names."""
        return [Tuner.unpack(flat, len(self._options.betas)) for flat in self._flat()]

    def _read(self, field: str) -> Tensor:
        """A 0-d field of every learned scale, [k]; a copy."""
        return _field(self._tuners(), field)

    def _tune(self, sums: Tensor) -> tuple[list[Tuner], Tensor]:
        """The scalar half of the step: the new state of every learned scale, not yet stored, and whether the
        step counts, a 0-d bool on the tuner's device."""
        ok = torch.isfinite(sums).all()
        unit = self._unit or 1.0
        pairs = zip(self._tuners(), sums, strict=True)
        tune_one = compiled_tune() if self._compiled and not _on_host(ok) else tune
        rates = [group.get("lr", unit) / unit for group in self.param_groups]
        lrs = [_largest(some, sums) for some in (zip(rates) if self._options.per_group else [rates])]
        return [
            tune_one(old, Sums(*row), ok, self._betas, self._options, unit, lr)
            for (old, row), lr in zip(pairs, lrs, strict=True)
        ], ok

    def _commit(self, tuners: list[Tuner], ok: Tensor) -> None:
        """The end of a step: what the tuner has learned from it becomes its state."""
        for flat, tuner in zip(self._flat(), tuners, strict=True):
            flat.copy_(tuner.pack())
        self.param_groups[0]["mechanic_step"].add_(ok)  # shared by all groups
        self._calls += 1

    def _propose(
        self, active: Active, closure: Callable[[], Any] | None, before: Tensor, counts: Tensor | None
    ) -> None:
        """The base optimizer's own step: the parameters hold x_t + u_t. If it raises, they hold x_t again."""
        if counts is not None:
            for mine in active.values():
                discard(mine, counts, self._carried)
        try:
            self._step_base(closure)
        except BaseException:
            for mine in active.values():
                move(mine, still(before), torch.zeros_like(before, dtype=torch.bool), self._carried)
            raise

    def _step_base(self, closure: Callable[[], Any] | None) -> None:
        try:
            self._stepping = True  # not behind the wrapper's back
            with self._lent_lr():
                self.base_optimizer.step() if closure is None else self.base_optimizer.step(closure)
        finally:
            self._stepping = False

    @contextmanager
    def _lent_lr(self) -> Iterator[None]:
        """The base at lr / base lr: its schedule and the ratios of its groups stay, and the updates are large
        enough beside the parameters that x_t + u_t - x_t keeps the digits of u_t. Frozen: at lr × scale."""
        lent = []
        try:
            for group, divisor in zip(self.param_groups, self._divisors, strict=True):
                if "lr" in group and divisor != 1:
                    lent.append((group, divisor, group["lr"], group["lr"] / divisor))
                    group["lr"] = lent[-1][-1]
            yield
        finally:
            for group, divisor, lr, ours in lent:
                # A base that sets its own lr has set the lent one.
                group["lr"] = lr if group["lr"] is ours or group["lr"] is lr else group["lr"] * divisor

    def _step_frozen(self, closure: Callable[[], Any] | None) -> None:
        """x_{t+1} = x_t + S·u_t, and nothing learned."""
        if all(math.isinf(divisor) for divisor in self._divisors):
            raise ValueError(
                "this Mechanic was frozen before it had learned a scale, which serves to load a frozen checkpoint: "
                "load one, or build a new Mechanic, train, and call freeze() then"
            )
        with _Uninterrupted():
            self._step_base(closure)
            self.param_groups[0]["mechanic_step"].add_(1)
            self._calls += 1
            self._step_schedule()
        self._log()

    @disable_dynamo
    def _step_schedule(self) -> None:
        if self.scheduler is None:
            return
        name, (epoch, lrs), left = type(self.scheduler).__name__, self._schedule(), self._left
        self.scheduler.step()
        self._left = self._schedule()
        if left is not None and epoch != left[0]:
            self._tell(
                f"{name} was stepped by somebody else as well: mechanic.step() steps it, so do not (a framework that "
                "steps schedulers itself wants one that is built on the Mechanic, and none inside)"
            )
        elif left is not None and lrs != left[1]:
            self._tell(
                f"the lr was set by somebody else, though {name} is inside and sets it in every step. If that is "
                "another LR scheduler, leave one out (Trainer of Transformers builds one of its own)"
            )

    def _schedule(self) -> tuple[Any, list[Any]]:
        """Where the scheduler inside stands, and the lr of every group; for a tensor, which may be on a device, what
        tells whether it was written to."""
        lrs = [group.get("lr") for group in self.param_groups]
        marks = [(id(lr), lr._version) if isinstance(lr, Tensor) else lr for lr in lrs]
        return getattr(self.scheduler, "last_epoch", None), marks

    def _tell(self, message: str, kind: str = "") -> None:
        """A warning, once: of its kind, or with these words."""
        if (kind or message) not in self._told:
            self._told.add(kind or message)
            checkpoint.warn(message)

    def _store(self, taking: list[Slot]) -> None:
        """x_ref and Δ of the parameters that entered, beside the state that the base has now created for them: in the
        order of the parameters, in which every rank gathers them. The step's own tensors are let go."""
        for slot in taking:
            slot.grad = slot.x = None
            if slot.entering and not self._frozen:
                self._put(slot.param, slot.ref, slot.delta)

    def _put(self, p: Tensor, ref: Tensor, delta: Tensor | None) -> None:
        self.state[p][REF] = ref
        if delta is not None:
            self.state[p][DELTA] = delta

    @disable_dynamo
    @torch.no_grad()
    def compile(self) -> None:
        """Compile what a step runs, as ``torch.nn.Module.compile()`` does for a module: the same to rounding, faster.

        On the CPU the two passes over memory become C++ (for dense parameters in float32, float64 and bfloat16), built
        by ``torch.utils.cpp_extension`` in a second or two and kept in its folder. Elsewhere the scalar half goes
        through ``torch.compile``, in the next step. Not part of a checkpoint: a run that is to resume bit for bit
        compiles both times, or neither.

        Raises:
            RuntimeError: there is no C++ compiler or no ninja, or they fail. The Mechanic goes on as before.
        """
        if any(p.device.type == "cpu" for group in self.param_groups for p in group["params"]):
            native()
        self._compiled = True
        self._settle()

    @disable_dynamo
    @torch.no_grad()
    def freeze(self) -> None:
        """Stop learning: the scale stays as it is, x_ref and Δ are freed, and from here on a step is the base
        optimizer's own, at group lr × scale. It waits for the device; no way back.

        Gradients that are not finite are the base's own concern again, and bfloat16 and float16 parameters lose their
        float32 masters. Schedules go on, checkpoints say that they are frozen, and so is who loads one. On a Mechanic
        that has not stepped yet it only prepares for such a checkpoint, as ``torch.distributed.checkpoint`` needs it.

        Raises:
            ValueError: steps were taken, and no scale was learned in them; a param group has no lr.
        """
        self._adopt()
        self._check_lrs()
        if self._calls > 0 and not any(self._look().scales):
            raise ValueError(f"no scale has been learned in {self._calls} step(s): train on, and freeze later")
        if isinstance(self.base_optimizer, UNPROPORTIONAL):
            self._tell(
                f"the update of {type(self.base_optimizer).__name__} is not proportional to its lr, which now carries "
                "the frozen scale: the steps will not be those that were taken so far",
                "frozen",
            )
        self._frozen = True
        for p in [p for p in self._params() if p in self.state]:
            values = self.state[p]
            values.pop(REF, None), values.pop(DELTA, None)
            if not values:
                del self.state[p]  # as the base would have it
        self._settle()

    @disable_dynamo
    @torch.no_grad()
    def unwrap(self, *schedulers: LRScheduler) -> Optimizer:
        """The plain base optimizer back, to go on as the frozen Mechanic would: ``freeze()``, and the learned scale
        folded into its lrs and into the base lrs of its scheduler.

        Step it and the scheduler that was inside yourself from here on, and save their own state dicts: nothing of the
        wrapper is left in them. The Mechanic cannot be used any more.

        Args:
            schedulers: those that you step yourself, built on the Mechanic or on the base. The one inside needs no
                mention.

        Returns:
            ``base_optimizer``, whose updates are those of lr × scale.

        Raises:
            TypeError: no LR scheduler.
            ValueError: nothing was learned yet; a param group has no lr; a scheduler is another optimizer's, or was
                built on this one and is not given; one holds an lr for groups whose scales differ. Nothing is changed.
        """
        for scheduler in schedulers:
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(f"unwrap takes torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}")
            if scheduler.optimizer is not self.base_optimizer and mechanic_in(scheduler.optimizer) is not self:
                raise ValueError(f"the {type(scheduler).__name__} was built on another optimizer: leave it out")
        if self._stepped_outside() and not schedulers:
            raise ValueError(
                "an LR scheduler that you step yourself was built on this optimizer: the scale must be folded into it "
                "as well, unwrap(scheduler)"
            )
        scales = self._look().scales
        if not any(scales):
            raise ValueError(f"no scale has been learned in {self._calls} step(s): train on, and unwrap later")
        inside = [] if self.scheduler is None or self.scheduler in schedulers else [self.scheduler]
        self._check_lrs()
        fold(self.param_groups, [*inside, *schedulers], scales)
        self.freeze()
        base = self.base_optimizer
        if len(set(scales)) == 1 and "lr" in base.defaults:
            base.defaults["lr"] = base.defaults["lr"] * scales[0]  # of a group that is added later
        for scheduler in schedulers:
            for part in parts(scheduler):
                part.optimizer = base
        self._leave_base()
        vars(self).clear()
        return base

    def __getattr__(self, name: str) -> Any:
        if "base_optimizer" not in vars(self) and not name.startswith("__"):
            raise RuntimeError("this Mechanic was unwrapped: go on with the optimizer that unwrap() returned")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _stepped_outside(self) -> bool:
        """Whether an LR scheduler is built on this optimizer that is not the one inside. (One puts a mark on step.)"""
        on_base = self.scheduler is None and hasattr(self.base_optimizer.step, "_wrapped_by_lr_sched")
        return on_base or hasattr(vars(self).get("step"), "_wrapped_by_lr_sched")

    def _check_lrs(self) -> None:
        if any("lr" not in group for group in self.param_groups):
            raise ValueError(f"a param group of {type(self.base_optimizer).__name__} has no lr to carry the scale")

    # ------------------------------------------------------------------ what the user reads

    @property
    def scale(self) -> Tensor:
        """The factor on the base optimizer's updates, Σ s: float64 [], or [groups] with `per_group`; no sync.

        A new tensor on the tuner's device.
        """
        scales = self._read("scale") / (self._unit or 1.0)
        return scales if self._options.per_group else scales[0]

    def effective_lr(self) -> list[float]:
        """The lr that each param group trains at: its current lr times the scale. One sync."""
        return self._look().effective_lrs

    def metrics(self) -> dict[str, float]:
        """What a log wants to know, as floats. One sync.

        - ``scale``; ``effective_lr``, which is lr × scale.
        - ``h``: < 0 while Δ still points downhill, about 0 where the scale has settled. ``"scale_free"``: without a
          unit; ``"paper"``: as in Algorithm 1.
        - ``delta_norm``: ‖Δ‖ when the last step began, over the elements that had a gradient, in units of the user's
          lr: scale × delta_norm is how far the parameters were from x_ref.
        - ``skipped``: steps with a gradient that was not finite. ``outliers``: steps whose gradient was so far out of
          all proportion that no update followed it.

        With several param groups ``effective_lr/NAME``, NAME being the group's ``"name"``, or its number; with
        `per_group` the others, but for ``skipped``, likewise. What seems to be wrong with the run (a scale that stays
        at its start, or grows without bound; gradients that are 0, or not finite; an lr that nobody steps, or that does
        not enter the update) is told in a warning, once.
        """
        look = self._look()
        self._examine(look)
        return report.metrics(look)

    @property
    def skipped(self) -> Tensor:
        """Steps skipped so far because a gradient was not finite: float64 [], a new tensor; no sync."""
        return self._read("skipped")[0]

    def _look(self) -> Look:
        """The run at this moment, on the host."""
        self._refuse_in_a_step()
        self._adopt()
        return report.look_at(self.param_groups, self._options, self._unit or 1.0)

    def _log(self) -> None:
        if self.log_every == 0 or self._calls % self.log_every:
            return
        found = self.metrics()
        if self.log_func is not None:
            self.log_func({"iter_count": self._calls, "s": self.scale.tolist(), **found})
        else:
            logger.info("step %d: %s", self._calls, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

    def _examine(self, look: Look) -> None:
        """Warn of what seems to be wrong."""
        level, last = self._looks or (look, look)
        level = level if level.lrs == look.lrs else look
        self._looks = level, look
        if not self._frozen:
            waiting = self._stepped_outside()
            for kind, message in report.findings(look, last, level, type(self.base_optimizer), waiting):
                self._tell(message, kind)

    # ------------------------------------------------------------------ the Optimizer contract

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's param groups: loading replaces them, so they are looked up every time."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    @disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad()``."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    @disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group()``.

        The new parameters' x_ref is their value at their first step. The group shares the learned scale, or
        starts its own with `per_group`.
        """
        before = len(self.param_groups)
        self.base_optimizer.add_param_group(param_group)
        try:
            self._adopt()
        except ValueError:
            del self.param_groups[before:]
            raise

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Everything: the base's state, the tuner, x_ref, Δ, the options and the scheduler.

        Its tensors are the live ones, as in torch, but for the few numbers of the tuner. Load it with
        ``torch.load(path, weights_only=True)`` and ``load_state_dict()``. A Mechanic is a ``Stateful`` of
        ``torch.distributed.checkpoint`` as well: ``dcp.save({"mechanic": mechanic})``, ``dcp.load`` likewise.
        """
        self._refuse_in_a_step()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._adopt()
        fresh = not self._begun() and checkpoint.for_dcp()
        state_dict = self._rehearsed() if fresh else checkpoint.pack(self)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _or(post_hook(self, state_dict), state_dict)
        return state_dict

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: the next ``step()`` is the one that the saved run would have taken, bit for bit.

        The tuner's options follow the checkpoint, with a warning that names those that differ; so do lr and
        the other options of the base, as in torch. The state of a plain base optimizer (no wrapper) loads too:
        then the tuner starts afresh, with a warning.

        Raises:
            ValueError: the checkpoint does not fit (format, base class, scheduler class, number of groups or
                parameters, shapes, shards, missing or foreign state, NaN, infinite values of our own). Nothing has been
                loaded then, and on every other process that shares the model ``load_state_dict`` raises as well.
        """
        self._refuse_in_a_step()
        if not isinstance(state_dict, dict):
            raise ValueError(f"load_state_dict takes the dict that state_dict() returned, got {state_dict!r}")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or(pre_hook(self, state_dict), state_dict)
        checkpoint.unpack(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_in_a_step()
        # Without the hooks, as torch does, and without the patch that an LR scheduler puts on the instance's
        # `step`: it can be neither pickled nor copied.
        kept = {k: v for k, v in vars(self).items() if k != "step" and not k.endswith("_hooks")}
        return {**kept, "_carried": {}, "_plan": None, "_left": None, "_watch": []}  # which go by identity

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_base()  # a copied or unpickled optimizer comes without its hooks

    def __repr__(self) -> str:
        if "base_optimizer" not in vars(self):
            return "Mechanic (unwrapped)"
        lines = [f"Mechanic around {type(self.base_optimizer).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            hidden = ("params", *(key for key in group if key.startswith("mechanic_")))
            lines.extend(f"    {key}: {group[key]}" for key in sorted(group.keys() - hidden))
        return "\n".join([*lines, f"{self._options}{', frozen' if self._frozen else ''})"])

    # ------------------------------------------------------------------ set-up

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _begun(self) -> bool:
        """Whether there is state of some parameter. (A base may keep state of its own beside it.)"""
        return any(self.base_optimizer.state.get(p) for group in self.param_groups for p in group["params"])

    def _refuse_in_a_step(self) -> None:
        if self._stepping:
            raise RuntimeError(
                "this was called in the middle of a step, by a hook on the optimizer inside, a closure or another "
                "thread: parameters and lr are not those of a step's end. Use hooks of the Mechanic, or set a flag "
                "and do it after step()"
            )

    def _start_afresh(self) -> None:
        """A tuner that has seen nothing, and the lr that it divides out, from the groups as they are."""
        self._take_unit()
        for group in self.param_groups:
            group.pop("mechanic_state", None)
            group.pop("mechanic_step", None)
        self._clothe(self.param_groups)
        self._calls, self._frozen, self._fresh = 0, False, True  # fresh: no step has created x_ref and Δ
        self._settle()
        if not self._lazy:
            for p in [p for p in self._params() if self.state.get(p)]:
                self._put(p, *entry(p, store_delta=self._options.store_delta))

    def _resume_at(self, steps: int, skipped: int) -> None:
        """Where a checkpoint was written: after so many steps that counted, and so many others."""
        self._calls = steps + skipped
        # On the host what was skipped has created no state, so that what there is was rehearsed.
        self._fresh = steps == 0 and (skipped == 0 or _on_host(self.param_groups[0]["mechanic_step"]))

    def _take_unit(self) -> None:
        """The lr that "scale_free" divides out: the largest of the groups; 0 while all of them are 0.

        For bfloat16 parameters, which hold 8 bits of x + u, a fraction of it: u counts for all of them where it is
        large beside x, and is read off with the bits of u rather than those of x.
        """
        if self._options.variant == "paper":
            self._unit = 1.0
            return
        lrs = [float(group.get("initial_lr", group["lr"])) for group in self.param_groups if "lr" in group]
        dtypes = {p.dtype for p in self._params()}
        coarse = torch.bfloat16 in dtypes and torch.float16 not in dtypes  # which holds no such lr
        boosted = coarse and not isinstance(self.base_optimizer, UNPROPORTIONAL)
        self._unit = max(lrs, default=1.0) / (BOOST if boosted else 1.0)

    def _clothe(self, groups: list[dict[str, Any]]) -> None:
        """The wrapper's tensors for groups that have none: those of the first group, or (per_group) fresh ones."""
        first = self.param_groups[0]
        for group in groups:
            shared = None if self._options.per_group else first.get("mechanic_state")
            step = first.get("mechanic_step")
            group["mechanic_state"] = self._fresh_state() if shared is None else shared
            group["mechanic_step"] = torch.zeros((), device=self._device) if step is None else step

    @disable_dynamo
    def _adopt(self) -> None:
        """Take in the groups that the wrapper does not know: added, or loaded behind its back."""
        if self._loading:  # what the base, its hooks or a schedule ask meanwhile finds the groups half loaded
            return
        bare = [group for group in self.param_groups if "mechanic_state" not in group]
        ours = [group for group in self.param_groups if "mechanic_state" in group]
        if any(group.get("mechanic_options") is not self._record for group in ours):
            raise ValueError(
                f"the param groups of {type(self.base_optimizer).__name__} were loaded or copied behind the Mechanic, "
                "with half of what it knows: load a checkpoint with load_state_dict() of the Mechanic, and leave the "
                "entries of a group whose names begin with mechanic_ where they are"
            )
        for group in bare:
            self._check_params(group["params"], self._options)
        if self._unit == 0:
            self._take_unit()
            self._settle()
        if len(bare) == len(self.param_groups):
            checkpoint.warn(
                f"the param groups of {type(self.base_optimizer).__name__} were replaced behind the Mechanic (did you "
                "call load_state_dict of the optimizer inside?): the tuner starts afresh"
            )
            self._start_afresh()
        elif bare:
            if self._frozen and self._options.per_group:
                raise ValueError("a frozen Mechanic learns no scale for a new param group: add it before freeze()")
            self._clothe(bare)
            self._settle()
        elif len(self._divisors) != len(self.param_groups):  # a group was taken out
            self._settle()

    def _settle(self) -> None:
        """What follows from options, unit and groups: the β on the device, the base's lr, the groups' own record."""
        checkpoint.record(self)
        self._carried = {}  # what our own last step left of x: nothing, for these groups
        self._plan = None
        self._looks = None
        self._left = None
        self._betas = torch.tensor(self._options.betas, dtype=_precise(self._device), device=self._device)
        if self._frozen:
            scales = report.look_at(self.param_groups, self._options, self._unit or 1.0).scales
            self._divisors = [1 / scale if scale > 0 else math.inf for scale in scales]
        else:
            self._divisors = [self._unit or 1.0] * len(self.param_groups)

    def _fresh_state(self) -> Tensor:
        size = Tuner.size(len(self._options.betas))
        return torch.zeros(size, dtype=_precise(self._device), device=self._device)

    @staticmethod
    def _check_params(params: list[Tensor], options: Options) -> None:
        if len({id(p) for p in params}) < len(params):
            raise ValueError(
                "a param group has a parameter twice, which would be stepped twice: give each once, as parameters() of "
                "the whole model does, with tied weights too"
            )
        for p in params:
            if not options.store_delta and wide(p.dtype) != p.dtype:
                raise ValueError(
                    f"store_delta=False recomputes Δ from the parameters, and the digits of {p.dtype} cannot hold it; "
                    "use store_delta=True, or keep the parameters in float32 (autocast computes in bfloat16)"
                )

    def _watch_base(self) -> None:
        # Some wrappers skip Optimizer.__init__ and have no hooks; they go unwatched.
        base = self.base_optimizer
        if hasattr(base, "_optimizer_step_pre_hooks"):
            self._watch.append(base.register_step_pre_hook(self._on_base_step))
        if hasattr(base, "_optimizer_state_dict_pre_hooks"):
            self._watch.append(base.register_state_dict_pre_hook(self._on_base_state_dict))

    def _leave_base(self) -> None:
        """Nothing of the wrapper stays on the base."""
        for handle in self._watch:
            handle.remove()
        for group in self.param_groups:
            for key in [key for key in group if key.startswith("mechanic_")]:
                del group[key]

    def _on_base_step(self, *_: object) -> None:
        if not self._stepping:
            self._tell(
                f"{type(self.base_optimizer).__name__}.step() was called behind the Mechanic that wraps it: that "
                "update is not scaled. Call the Mechanic's step() alone."
            )

    def _on_base_state_dict(self, *_: object) -> None:
        """Who saves the optimizer inside saves what the Mechanic would."""
        if self._stepping:
            name = type(self.base_optimizer).__name__
            self._tell(
                f"{name}.state_dict() was called in the middle of a step: its lr is not yours. Save after step()"
            )
        elif not self._loading:
            self._adopt()
            checkpoint.record(self)


def mechanize(base: type[Optimizer], **options: Any) -> type[Mechanic]:
    """For code that builds its optimizer by class: ``mechanize(torch.optim.SGD)(model.parameters(), lr=0.1)``.

    Args:
        base: an optimizer class.
        options: keyword arguments of ``Mechanic``.

    Returns:
        a class to be called with the base's own arguments. What it builds is a plain ``Mechanic``.

    Raises:
        TypeError: `base` is no optimizer class, or that of a Mechanic.
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)) or issubclass(base, Mechanic):
        raise TypeError(
            f"mechanize takes an optimizer class, such as torch.optim.SGD, not {base!r}; "
            "an optimizer that is built already goes to Mechanic(optimizer)"
        )

    # A class, since trainers ask for a subclass of Optimizer; with __new__, so that what it builds can be pickled.
    def build(_: type, *args: Any, **base_options: Any) -> Mechanic:
        return Mechanic(base(*args, **base_options), **options)

    return type(f"Mechanic{base.__name__}", (Mechanic,), {"__new__": build, "__doc__": mechanize.__doc__})


def is_mechanized(optimizer: object) -> bool:
    """Whether `optimizer` is a ``Mechanic``."""
    return isinstance(optimizer, Mechanic)


def mechanic_in(optimizer: Any) -> Mechanic | None:
    """The Mechanic that an optimizer is, or that a framework has wrapped once more; None: there is none."""
    while optimizer is not None and not isinstance(optimizer, Mechanic):
        optimizer = vars(optimizer).get("_optimizer", vars(optimizer).get("optimizer"))
    return optimizer


def _evaluate(
    closure: Callable[[], Any] | None, params: Callable[[], list[Tensor]]
) -> tuple[Any, Callable[[], Any] | None]:
    """The loss, and a closure for the base whose first call returns that loss without computing it again: unless the
    base has moved the parameters before, or let go of their gradients (as sharpness-aware ones do)."""
    if closure is None:
        return None, None
    evaluate = torch.enable_grad()(closure)

    def marks() -> list[tuple[int, bool]]:
        return [(p._version, p.grad is None) for p in params()]

    loss = evaluate()
    known = [marks()]
    return loss, lambda: loss if known and known.pop() == marks() else evaluate()


class _Uninterrupted:
    """Signals wait for the end of what is inside, where the parameters are in between; a second Ctrl-C does not."""

    def __enter__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.waiting: list[tuple[int, Any]] = []
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self.handlers[number] = handler
                try:
                    signal.signal(number, self._note)
                except ValueError:  # this is not the main thread, where signals arrive
                    self.handlers.clear()
                    return

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in [other for other, _ in self.waiting]:
            self.waiting.clear()
            self.handlers[number](number, frame)
        else:
            self.waiting.append((number, frame))

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self._note:  # else somebody inside has put another there
                signal.signal(number, handler)
        for number, frame in self.waiting:
            self.handlers[number](number, frame)


def _field(tuners: list[Tuner], name: str) -> Tensor:
    return torch.stack([getattr(tuner, name) for tuner in tuners])


def _on_host(ok: Tensor) -> bool:
    """Whether the host can act upon `ok` without waiting for a device."""
    return ok.device.type == "cpu"


def _known_false(ok: Tensor) -> bool:
    # A look at a value in host memory. Not `not ok`, which is `item()`: that has no place in a step.
    return _on_host(ok) and len(ok.logical_not().nonzero()) > 0


def _verdict(old: list[Tuner], new: list[Tuner], ok: Tensor) -> tuple[Tensor, Tensor | None]:
    """S_t, S_{t+1}, keep and fade of each learned scale, [k, 4], and whether u_t is followed, [k] bool; None: all are,
    and the host knows it. A step that does not count moves nothing."""
    before = _field(old, "scale")
    motion = torch.stack([before, *(_field(new, name) for name in ("scale", "keep", "fade"))], 1)
    counts = ok & (_field(new, "outliers") == _field(old, "outliers"))
    if _on_host(counts) and not _known_false(counts):
        return motion, None
    return torch.where(ok, motion, still(before)), counts


def _largest(lrs: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """0-d, made on the device of `like` from numbers, which a captured graph allows."""
    found = [lr.to(like).reshape(()) for lr in lrs if isinstance(lr, Tensor)]
    numbers = [lr for lr in lrs if not isinstance(lr, Tensor)]
    found += [like.new_full((), max(numbers))] if numbers else []
    return torch.stack(found).amax() if len(found) > 1 else found[0]


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _or(new: Any, old: Any) -> Any:
    return old if new is None else new


def _check_base(base: object) -> None:
    if isinstance(base, type):
        raise TypeError(
            f"Mechanic wraps an optimizer that is built already, not the class {base.__name__}: "
            f"Mechanic({base.__name__}(model.parameters(), lr=...)), or mechanize({base.__name__})(model.parameters())"
        )
    if isinstance(base, Mechanic):
        raise ValueError("this optimizer is a Mechanic already; wrap the plain optimizer, once")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}")
    if any("mechanic_state" in group for group in base.param_groups):
        raise ValueError(
            f"this {type(base).__name__} is wrapped by another Mechanic already, or has "
            "loaded the checkpoint of one; build a new one"
        )


def _check_scheduler(scheduler: object, base: Optimizer) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau needs a metric in every step, which Mechanic does not have: leave it out here, "
            "build it on the optimizer or the Mechanic, and step it yourself"
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}")
    if scheduler.optimizer is not base:
        raise ValueError(
            f"the {type(scheduler).__name__} was built on another optimizer: build it on the {type(base).__name__} "
            "that you wrap, before you wrap it"
        )
