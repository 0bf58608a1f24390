"""The public face: what the user builds, steps, reads, saves and loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manic.bases import check_base, check_params
from manic.diagnostics import metrics
from manic.run import Run
from manic.schedules import Schedule, parts
from manic.tuner import DEFAULT_BETAS, Options
from manic.units import units
from manic.wrapper import Wrapper, evaluate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("manic")


class Mechanic(Wrapper):
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

    That is ``variant="paper"``. The default, ``"scale_free"``, works at every base lr: docs/algorithm.md has its
    equations.

    The wrapper is a ``torch.optim.Optimizer``: its ``param_groups``, ``state`` and ``defaults`` are the base
    optimizer's own, and everything it knows is in ``state_dict()``. In each param group it keeps
    ``mechanic_state`` (float64 [4n + 18], see ``manic.tuner.TunerState``; n = 1 in ``"scale_free"``),
    ``mechanic_step`` (float32 []), ``mechanic_options`` (a dict in a tuple) and ``mechanic_scheduler`` (bytes). In
    ``state[p]``, from p's first step on, it keeps one tensor of p's shape, float32 or better: ``mechanic_ref`` (x_ref;
    ``"paper"``: ``mechanic_delta``, Δ), and for bfloat16 and float16 parameters ``mechanic_rest``: the digits of x that
    they cannot hold, as int16 (whose bits a state dict holds as bfloat16) and float32.

    Args:
        base_optimizer: an optimizer that is already built, on any lr.
        scheduler: an LR scheduler built on `base_optimizer`. It is stepped once per ``step()``; do not
            step it yourself. A scheduler that you step yourself may be built on either optimizer instead.
        variant: ``"scale_free"`` gives the same run at every base lr: the base works at lr / base lr, and the log
            of the scale follows the sign and the relative size of h. ``"paper"`` is Algorithm 1 to the letter.
        betas: decay of each of the n accumulators of ``"paper"``, in [0, 1]. None: the six of the paper.
            ``"scale_free"`` has one accumulator, which forgets nothing.
        s_decay: λ, >= 0.
        s_init: the first scale, > 0. None: 1e-8 (``"paper"``), or the scale whose first step moves x by
            1e-3·(1 + ‖x_ref‖) (``"scale_free"``).
        eps: ε, > 0, in ``"paper"``; ``"scale_free"`` needs none.
        per_group: learn one scale per param group.
        device: where the accumulators live and are updated. None: the first parameter's device.
        process_group: the ranks that share one model whose parameters are spread over them without a mark
            on the tensors (FSDP1, pipeline stages): their sums are added up, in one all-reduce per step.
        log_func: called with ``{"iter_count": int, "s": float, ...}``: ``s`` is the scale (a list with `per_group`),
            and the rest is ``metrics()``. None: ``logging.getLogger("manic")``.
        log_every: call `log_func` every that many steps; 0: never, and nothing is read back from the device.
        store_delta: accepted for scripts that were written for mechanic-pytorch. It changes nothing.

    Raises:
        TypeError: `base_optimizer` is no optimizer instance, or `scheduler` no LR scheduler of a kind that
            can be stepped without a metric.
        ValueError: an option out of its range, a scheduler built on another optimizer, an optimizer that is wrapped
            already or goes wrong in a Mechanic (LBFGS, schedule-free ones, ZeroRedundancyOptimizer: docs/bases.md),
            parameters that share memory.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        variant: str = "scale_free",
        betas: tuple[float, ...] | None = None,
        s_decay: float = 0.01,
        s_init: float | None = None,
        eps: float = 1e-8,
        per_group: bool = False,
        device: torch.device | str | None = None,
        process_group: ProcessGroup | None = None,
        log_func: Callable[[dict[str, Any]], object] | None = None,
        log_every: int = 0,
        store_delta: bool = True,
    ) -> None:
        check_base(base_optimizer)
        schedule = Schedule(scheduler, base_optimizer)
        options = Options(variant, DEFAULT_BETAS if betas is None else betas, s_decay, s_init, eps, bool(per_group))
        if log_func is not None and not callable(log_func):
            raise TypeError(f"log_func must be callable, got {log_func!r}")
        if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 0:
            raise ValueError(f"log_every must be an int >= 0 (0: never), got {log_every!r}")
        check_params(base_optimizer)
        super().__init__(base_optimizer)
        self.log_func = log_func
        self.log_every = log_every
        self._run = Run(base_optimizer, schedule, options, device, process_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Algorithm 1: the base optimizer's update, at the learned scale.

        A gradient that is not finite (or whose squares overflow float32) changes only the count of skipped steps. On
        the CPU the Mechanic then steps neither the base nor the scheduler. On other devices, where the host does not
        wait for the gradients, the base gets gradients of zero. "scale_free" also gives the base gradients of zero
        where ⟨Δ, g⟩ is a multiple of all values before: the scale takes it into account, but no update follows.

        If anything interrupts a step, parameters and tuner are those before the step or those after it.

        Args:
            closure: re-evaluates the model and returns the loss; called once, under ``enable_grad``, and as
                often again as the base optimizer asks for it.

        Returns:
            the closure's loss, or None.
        """
        loss, closure = evaluate(closure, self._run.inside.params)
        self._run.step(closure)
        self._log()
        return loss

    @disable_dynamo
    @torch.no_grad()
    def freeze(self) -> None:
        """Stop learning: the scale stays, x_ref is freed, and each further step is the base optimizer's own, at group
        lr × scale. This waits for the device and cannot be undone.

        The base then gets gradients that are not finite as they are. bfloat16 and float16 parameters lose the digits
        that they cannot hold. Schedules go on. A checkpoint says that it is frozen, and a Mechanic that loads it is
        frozen too. ``torch.distributed.checkpoint`` loads it only into a Mechanic that is frozen already.

        Raises:
            ValueError: the steps so far have learned no scale; a param group has no lr.
        """
        with self._run.inside.between_steps():
            self._run.freeze()

    @disable_dynamo
    @torch.no_grad()
    def unwrap(self, *schedulers: LRScheduler) -> Optimizer:
        """Give back the plain base optimizer, which goes on as the frozen Mechanic would: ``freeze()``, and multiply
        its lrs, and those that its scheduler holds, with the learned scale.

        From then on step it and the scheduler that was inside yourself, and save their own state dicts. They hold
        nothing of the wrapper. The Mechanic cannot be used any more.

        Args:
            schedulers: those that you step yourself, built on the Mechanic or on the base; not the one inside.

        Returns:
            ``base_optimizer``, whose updates are those of lr × scale.

        Raises:
            TypeError: an argument is no LR scheduler.
            ValueError: no scale was learned yet; a param group has no lr; a scheduler belongs to another optimizer; one
                that was built on this optimizer is missing; one holds an lr for groups whose scales differ. Nothing is
                changed.
        """
        for scheduler in schedulers:
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(f"unwrap takes torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}")
            if scheduler.optimizer is not self.base_optimizer and mechanic_in(scheduler.optimizer) is not self:
                raise ValueError(f"the {type(scheduler).__name__} was built on another optimizer: leave it out")
        with self._run.inside.between_steps():
            base = self._run.unwrap(schedulers, waiting=self.scheduled_outside)
        for scheduler in schedulers:
            for part in parts(scheduler):
                part.optimizer = base
        vars(self).clear()
        return base

    # ------------------------------------------------------------------ what the user reads

    @property
    def scheduler(self) -> LRScheduler | None:
        """The LR scheduler that ``step()`` steps."""
        return self._run.schedule.scheduler

    @property
    def scale(self) -> Tensor:
        """The factor on the base optimizer's updates, Σ s: float64 [], or [groups] with `per_group`; no sync."""
        scales, unit = self._run.read("scale"), self._run.record.unit
        if not self._run.record.options.per_group:
            return scales[0] / unit
        return scales / torch.tensor(units(self.param_groups, unit) or [unit], dtype=scales.dtype, device=scales.device)

    @property
    def skipped(self) -> Tensor:
        """Steps skipped so far because a gradient was not finite: float64 [], a new tensor; no sync."""
        return self._run.read("skipped")[0]

    def effective_lr(self) -> list[float]:
        """The lr that each param group trains at: its current lr times the scale. One sync."""
        return self._run.snapshot().effective_lrs

    def metrics(self) -> dict[str, float]:
        """The figures for a log, as floats. One sync.

        - ``scale``; ``effective_lr``, which is lr × scale.
        - ``h``: < 0 while Δ still points downhill, about 0 where the scale has settled. ``"scale_free"``: without a
          unit; ``"paper"``: as in Algorithm 1.
        - ``delta_norm``: ‖Δ‖ when the last step began, over the elements that had a gradient, in units of the user's
          lr: scale × delta_norm is how far the parameters were from x_ref.
        - ``skipped``: steps with a gradient that was not finite. ``outliers``: steps whose gradient was so large that
          no update followed it.

        With several param groups: ``effective_lr/NAME``, where NAME is the group's ``"name"`` or its number. With
        `per_group` the other figures have a NAME too, except ``skipped``. This also warns, once, if something seems to
        be wrong with the run: a scale that stays at its start or grows without bound, gradients that are 0 or not
        finite, a scheduler that is not stepped, a base whose update does not depend on its lr.
        """
        now = self._run.snapshot()
        if not self._run.record.frozen:
            self._run.monitor.examine(now, self._run.inside.unproportional, waiting=self.scheduled_outside)
        return metrics(now)

    def _log(self) -> None:
        if self.log_every == 0 or self._run.calls == 0 or self._run.calls % self.log_every:
            return
        calls, found = self._run.calls, self.metrics()
        if self.log_func is not None:
            self.log_func({"iter_count": calls, "s": self.scale.tolist(), **found})
        else:
            logger.info("step %d: %s", calls, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

    # ------------------------------------------------------------------ the Optimizer contract

    @disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group()``.

        The new parameters' x_ref is their value at their first step. The group shares the learned scale, or
        starts its own with `per_group`.
        """
        before = len(self.param_groups)
        self.base_optimizer.add_param_group(param_group)
        try:
            self._run.adopt()
        except ValueError:
            del self.param_groups[before:]
            raise

    @disable_dynamo
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything: the base's state, the tuner, x_ref (or Δ), the options and the scheduler.

        Its tensors are the live ones, as in torch, except the few numbers of the tuner. Load it with
        ``torch.load(path, weights_only=True)`` and ``load_state_dict()``. A Mechanic is also a ``Stateful`` of
        ``torch.distributed.checkpoint``: ``dcp.save({"mechanic": mechanic})``, and ``dcp.load`` likewise. For this, a
        call before the first step creates the state that the first step will create.
        """
        with self._run.inside.between_steps():
            for pre_hook in self._optimizer_state_dict_pre_hooks.values():
                pre_hook(self)
            state_dict = self._run.state_dict()
            for post_hook in self._optimizer_state_dict_post_hooks.values():
                state_dict = _or(post_hook(self, state_dict), state_dict)
        return state_dict

    @disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: the next ``step()`` is the one that the saved run would have taken, bit for bit.

        The checkpoint's options replace those of the tuner, with a warning that names those that differ. As in torch,
        its lr and other options replace the base's. The state dict of a plain base optimizer (no wrapper) loads too:
        then the tuner starts afresh, with a warning.

        Raises:
            ValueError: the checkpoint does not fit (format, base class, scheduler class, number of groups or
                parameters, shapes, shards, missing or foreign state, NaN, infinite values of the tuner). Then nothing
                is loaded, and ``load_state_dict`` raises on every other process that shares the model.
        """
        with self._run.inside.between_steps():
            if not isinstance(state_dict, dict):
                raise ValueError(f"load_state_dict takes the dict that state_dict() returned, got {state_dict!r}")
            state_dict = state_dict.copy()
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = _or(pre_hook(self, state_dict), state_dict)
            self._run.load_state_dict(state_dict)
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        with self._run.inside.between_steps():
            return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_run" in state:
            self._run.watch()

    def __repr__(self) -> str:
        if "base_optimizer" not in vars(self):
            return "Mechanic (unwrapped)"
        record = self._run.record
        lines = [f"Mechanic around {record.base} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            hidden = ("params", *(key for key in group if key.startswith("mechanic_")))
            lines.extend(f"    {key}: {group[key]}" for key in sorted(group.keys() - hidden))
        return "\n".join([*lines, f"{record.options}{', frozen' if record.frozen else ''})"])


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

    # A class, since trainers ask for a subclass of Optimizer; with __new__, so that its instances can be pickled.
    def build(_: type, *args: Any, **base_options: Any) -> Mechanic:
        return Mechanic(base(*args, **base_options), **options)

    return type(f"Mechanic{base.__name__}", (Mechanic,), {"__new__": build, "__doc__": mechanize.__doc__})


def is_mechanized(optimizer: object) -> bool:
    """Whether `optimizer` is a ``Mechanic``."""
    return isinstance(optimizer, Mechanic)


def mechanic_in(optimizer: Any) -> Mechanic | None:
    """The Mechanic that `optimizer` is, or that a framework's wrapper holds; None: there is none."""
    while optimizer is not None and not isinstance(optimizer, Mechanic):
        optimizer = vars(optimizer).get("_optimizer", vars(optimizer).get("optimizer"))
    return optimizer


def _or(new: Any, old: Any) -> Any:
    return old if new is None else new
