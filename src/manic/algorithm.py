"""One step of Algorithm 1 (arXiv 2306.00144), learning or frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo

from manic.checkpoint.record import Record
from manic.collectives import over_group, over_mesh
from manic.parameters import KEPT, REST, SLOT, Layout, ParamState, collect, entry, lr_of, shards, signature
from manic.scale_free import scale_free
from manic.sweeps.kernels import kernels_for
from manic.sweeps.passes import Passes
from manic.tuner import (
    Motion,
    Options,
    Sums,
    TunerState,
    Value,
    finite,
    growth,
    inner_product,
    largest_update,
    over,
    sqrt,
    where,
)
from manic.units import units
from manic.wrapper import Closure, Inside

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PAPER_S_INIT = 1e-8


class Learner:
    """Take steps that learn the scale.

    Args:
        base: the base optimizer. Its groups hold the tuner's state, its state holds the slots.
        record: options, and the base lr that is divided out.
        device: where the tuner's state is.
        process_group: the ranks that share one model's parameters without a mark on the tensors.
        fresh: no step has counted yet, so that any state is from before the first step.
    """

    def __init__(
        self,
        base: Inside,
        record: Record,
        device: torch.device,
        process_group: ProcessGroup | None,
        *,
        fresh: bool = True,
    ) -> None:
        self.base, self.record, self.device, self.process_group = base, record, device, process_group
        self.fresh = fresh
        self._starting = 3 if record.options.variant == "scale_free" else 0  # steps in which some S may still be 0
        self._passes: tuple[Any, Passes] | None = None  # of the last step, and by what they are known again
        self._betas = torch.tensor(record.options.memories, dtype=precise(device), device=device)

    @property
    def divisors(self) -> list[float]:
        """What each group's lr is divided by in the base's step, so that the run is the same at every base lr.

        The groups keep their ratios and the schedule. An update at lr about 1 is large enough for x_t + u_t - x_t to
        keep its digits.
        """
        return units(self.base.groups, self.record.unit)

    def step(self, closure: Closure | None) -> bool:
        """Algorithm 1: x_t to x_{t+1}. False: the host saw a gradient that is not finite, and nothing has moved."""
        if self.fresh:
            self._forget_rehearsal()
        passes = self._take()  # the parameters that have a gradient
        bare = [one.param for one in passes.states if one.entering and not self.base.optimizer.state.get(one.param)]
        try:
            sums = self._measure(passes)  # <d,g> <d,x> |g|² |x|² |d|² of all ranks; x_t is put aside
            ok = torch.isfinite(sums).all()
            new, motion = self._tune(sums, ok)  # h m v r W → s_{t+1}, and where that sends x and its slot
            if known_false(ok):
                self._store([old._replace(skipped=old.skipped + 1) for old in self.tuners()])
                return False
            try:
                self._keep_quiet(passes, new, ok)
                self.base.step(closure, self.divisors)  # the parameters hold x_t + u_t
                self._finish(passes, new, motion, ok)  # x_{t+1}; x_ref, or Δ; the tuner's state
            except BaseException:
                self.base.come_back()
                if passes.moving:  # too late to go back
                    self._finish(passes, new, motion, ok)
                else:
                    passes.restore()
                    for p in bare:  # the base may have created half of its state
                        self.base.optimizer.state.pop(p, None)
                raise
            return True
        finally:
            passes.release()

    @disable_dynamo
    def _take(self) -> Passes:
        """The parameters that have a gradient, grouped anew only if something differs from the last step."""
        options, groups, state = self.record.options, self.base.groups, self.base.optimizer.state
        params = self.base.params()
        grads = [p.grad for p in params]
        looks = signature(params, grads, state)
        seen = looks and ([(len(group["params"]), group.get("maximize")) for group in groups], *looks)
        if self._passes is not None and self._passes[0] is not None and self._passes[0] == seen:
            passes = self._passes[1]
            for one, grad in zip(passes.states, (g for g in grads if g is not None), strict=True):
                one.grad = grad
            return passes
        states = list(collect(groups, state, options.variant, per_group=options.per_group))
        difference = options.variant == "scale_free"
        passes = Passes(states, self.base.layouts(), difference, kernels_for)
        entering = any(one.entering for one in states)  # they take x_ref now: group anew in the next step
        self._passes = None if entering else seen, passes
        return passes

    @disable_dynamo
    def _measure(self, passes: Passes) -> Tensor:
        """The global sums at x_t: [k, 10], columns as in ``manic.tuner.Sums``."""
        shares = self._shares()
        total = torch.zeros(len(shares), len(Sums._fields), dtype=shares.dtype, device=shares.device)
        for i, (layout, part) in enumerate(passes.measure(shares)):
            if i == 0:
                part[:, -2:] = shares
            total += over_mesh(part, layout)
        return over_group(total, self.process_group)

    def _tune(self, sums: Tensor, ok: Tensor) -> tuple[list[TunerState], Tensor]:
        """The scalar half: the new state of every learned scale, not yet stored, and the motion, [k, 4].

        Args:
            sums: as ``_measure()`` returns them.
            ok: whether the step counts, a 0-d bool on the tuner's device.
        """
        options, unit = self.record.options, self.record.unit
        rates = [lr_of(group, unit) / unit for group in self.base.groups]
        shared = [*zip(rates, strict=True)] if options.per_group else [rates]  # by the groups that share one scale
        if on_host(ok) and options.variant == "scale_free":
            return self._tune_on_host(sums, not known_false(ok), shared)
        found = [
            tune(old, Sums(*row), ok, self._betas, options, unit, _largest(some, sums))
            for old, row, some in zip(self.tuners(), sums, shared, strict=True)
        ]
        return [new for new, _ in found], torch.stack([torch.stack(motion) for _, motion in found])

    @disable_dynamo
    def _tune_on_host(
        self, sums: Tensor, ok: bool, shared: Sequence[Sequence[Value]]
    ) -> tuple[list[TunerState], Tensor]:
        """As ``_tune()``, in Python's numbers. `shared`: of each learned scale, its groups' lrs over the base lr."""
        options, unit = self.record.options, self.record.unit
        olds = map(TunerState.on_host, _flats(self.base.groups, options))
        found = [
            tune(old, Sums(*row), ok, self._betas, options, unit, max(abs(float(rate)) for rate in rates))
            for old, row, rates in zip(olds, sums.tolist(), shared, strict=True)
        ]
        motions = torch.tensor([motion for _, motion in found], dtype=sums.dtype, device=sums.device)
        return [new.on(sums) for new, _ in found], motions

    def _keep_quiet(self, passes: Passes, new: list[TunerState], ok: Tensor) -> None:
        """Give the base gradients of 0 where no update may follow."""
        counts = ok & (torch.stack([state.outliers for state in new]) == self.read("outliers"))
        if not on_host(counts) or known_false(counts):
            passes.discard(counts)

    @disable_dynamo
    def _finish(self, passes: Passes, new: list[TunerState], motion: Tensor, ok: Tensor) -> None:
        """Complete a step after the base's. It may be interrupted anywhere, and called again."""
        shares = torch.where(ok, self._added(passes.move(motion)), self._shares())
        self._put(passes.states)
        new = [state._replace(update_sq=u, left_sq=d) for state, (u, d) in zip(new, shares, strict=True)]
        if self._starting:  # while S is 0, a checkpoint must know ‖u‖ of the whole model, which no later sum tells
            update_sq = shares[:, 0].clamp_min(0)
            total = over_group(over_mesh(update_sq, self.base.layouts()[0]), self.process_group).sqrt()
            new = [
                state._replace(update_norm=torch.where(state.scale > 0, state.update_norm, norm))
                for state, norm in zip(new, total, strict=True)
            ]
        self._store(new)
        self._starting = max(self._starting - 1, 0)
        self.fresh &= not passes.states

    def _shares(self) -> Tensor:
        """This process's shares of ‖u‖² of the last step, and of ‖d‖² of where it left x: [k, 2]."""
        return torch.stack([flat[-2:] for flat in _flats(self.base.groups, self.record.options)])

    def _added(self, parts: dict[Layout, Tensor]) -> Tensor:
        """As ``_shares()``, of this step.

        The next step adds them up over the first layout's shards. A tensor that is whole on each gives a fraction.
        """
        first = next(iter(parts))
        shares = [part if shards(layout) > 1 else part / shards(first) for layout, part in parts.items()]
        return torch.stack(shares).sum(0).nan_to_num_(0.0, 0.0, 0.0)

    def _put(self, states: Sequence[ParamState]) -> None:
        """Store the slots of the parameters that entered (or have changed their dtype), now that the base has created
        its own state for them.

        In the order of the parameters, in which every rank gathers them.
        """
        slot = SLOT[self.record.options.variant]
        for one in [one for one in states if one.new]:
            kept = self.base.optimizer.state[one.param]
            kept[slot] = one.slot
            if one.rest is None:
                kept.pop(REST, None)
            else:
                kept[REST] = one.rest

    def _store(self, tuners: list[TunerState]) -> None:
        """Write the tuner's new state into the param groups."""
        for flat, tuner in zip(_flats(self.base.groups, self.record.options), tuners, strict=True):
            flat.copy_(tuner.pack())
        self.base.groups[0]["mechanic_step"].copy_(tuners[0].steps)  # shared by all groups

    # ------------------------------------------------------------------ the state

    def tuners(self) -> list[TunerState]:
        """The state of every learned scale: one, or one per group; live views."""
        options = self.record.options
        return [TunerState.unpack(flat, len(options.memories)) for flat in _flats(self.base.groups, options)]

    def read(self, field: str) -> Tensor:
        """A 0-d field of every learned scale: [k], a copy."""
        return stored_field(self.base.groups, self.record.options, field)

    @disable_dynamo
    def _forget_rehearsal(self) -> None:
        """Drop state that was created before the first step: the base begins it now."""
        state = self.base.optimizer.state
        for p in [p for p in self.base.params() if SLOT[self.record.options.variant] in state.get(p, {})]:
            if self.record.lazy:
                del state[p]
            elif p.grad is not None:
                for key in KEPT:
                    state[p].pop(key, None)
            else:  # it stays, so that every checkpoint has it; x may have been loaded since it was made
                state[p].update(entry(p, self.record.options.variant))

    def enter(self, params: Sequence[Tensor]) -> None:
        """Give parameters their slots before the first step."""
        for p in params:
            self.base.optimizer.state[p].update(entry(p, self.record.options.variant))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_passes": None}  # its keys are identities


class Frozen:
    """Take steps that learn nothing: x_{t+1} = x_t + S·u_t, which is the base's own step at lr × scale.

    Args:
        base: the base optimizer.
        scales: of each param group, in the user's units; 0: none was learned.
    """

    def __init__(self, base: Inside, scales: Sequence[float]) -> None:
        self.base = base
        self.divisors = [1 / scale if scale > 0 else math.inf for scale in scales]

    def enter(self, params: Sequence[Tensor]) -> None:
        """Do nothing: no parameter gets a slot."""

    def step(self, closure: Closure | None) -> bool:
        """Take the base's own step. No gradient is looked at."""
        if all(math.isinf(divisor) for divisor in self.divisors):
            raise ValueError(
                "this Mechanic was frozen before it had learned a scale. Load a frozen checkpoint into it, or build a "
                "new Mechanic, train, and call freeze() then"
            )
        count = self.base.groups[0]["mechanic_step"]
        after = count + 1
        self.base.finished = False
        try:
            self.base.step(closure, self.divisors)
            count.copy_(after)
        except BaseException:
            self.base.come_back()
            if self.base.finished:
                count.copy_(after)
            raise
        return True


def tune(
    old: TunerState, sums: Sums, ok: Value, betas: Tensor, options: Options, unit: float, lr: Value
) -> tuple[TunerState, Motion]:
    """Update the tuner: Algorithm 1 from h_t to s_{t+1}.

    Args:
        old: the state after the last step. It and what follows are 0-d tensors, or in "scale_free" Python's numbers.
        sums: the global sums at x_t.
        ok: 0-d bool. False: the sums are not finite. Then nothing moves, and the state changes only in the count of
            skipped steps and the norm of the parameters that entered.
        betas: ``options.memories`` as a [n] tensor on the state's device.
        options: variant, s_decay, s_init, eps.
        unit: the base lr that "scale_free" divides out of Δ; ``options.s_init`` is in the user's units.
        lr: 0-d, |lr| of this step over the base lr.

    Returns:
        the new state, with the old ``update_sq`` and ``left_sq``, and the motion.
    """
    ref_sq = old.ref_sq + where(finite(sums.entered_sq), sums.entered_sq, 0.0)
    if options.variant == "paper":
        new, motion = paper(old, sums, betas, options)
    else:
        new, motion = scale_free(old._replace(ref_sq=ref_sq), sums, options, unit, lr)
    new = new._replace(members=sums.members, numel=sums.numel, steps=old.steps + 1)
    kept = TunerState(*(where(ok, a, b) for a, b in zip(new, old, strict=True)))
    return (
        kept._replace(ref_sq=ref_sq, skipped=where(ok, old.skipped, old.skipped + 1)),
        Motion(*(where(ok, factor, 0.0) for factor in motion)),
    )


def paper(old: TunerState, sums: Sums, betas: Tensor, options: Options) -> tuple[TunerState, Motion]:
    """Algorithm 1."""
    largest = torch.finfo(betas.dtype).max ** 0.4  # so that the sum of squares stays finite while a run diverges
    h = inner_product(sums, options.s_decay, old.s.sum()).clamp(-largest, largest)
    m = torch.maximum(betas * old.m, h.abs())
    v = betas.square() * old.v + h.square()
    r = (betas * old.r - old.s * h).clamp_min(0)
    wealth = (options.s_init or PAPER_S_INIT) / betas.numel() * m + r
    s = over(wealth, v.sqrt() + options.eps)
    scale, norm, one = s.sum(), sqrt(sums.delta_sq), torch.ones_like(h)
    change, same = growth(old, sums)
    new = old._replace(
        m=m,
        v=v,
        r=r,
        s=s,
        h=h,
        scale=scale,
        delta_norm=norm,
        moved=norm,
        x_norm=sums.x_sq.sqrt(),
        update_norm=largest_update(old.update_norm, change, same),
        keep=one,
        fade=one,
    )
    return new, Motion(scale - old.scale, scale, torch.zeros_like(h), one)


def precise(device: torch.device) -> torch.dtype:
    """The dtype of the tuner's state on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_host(ok: Tensor) -> bool:
    """Whether the host can act upon `ok` without waiting for a device."""
    return ok.device.type == "cpu"


def known_false(ok: Tensor) -> bool:
    """Whether the host knows that some of `ok` is False."""
    # This reads host memory; `not ok` would call `item()`, which a step never does.
    return on_host(ok) and len(ok.logical_not().nonzero()) > 0


def _flats(groups: Sequence[dict[str, Any]], options: Options) -> list[Tensor]:
    return [group["mechanic_state"] for group in (groups if options.per_group else groups[:1])]


def stored_field(groups: Sequence[dict[str, Any]], options: Options, name: str) -> Tensor:
    """A 0-d field of every learned scale that param groups hold: [k], a copy."""
    place = TunerState.place(name)
    return torch.stack([flat[place] for flat in _flats(groups, options)])


def fresh_state(options: Options, device: torch.device) -> Tensor:
    """A new ``mechanic_state``."""
    return torch.zeros(TunerState.size(len(options.memories)), dtype=precise(device), device=device)


def _largest(lrs: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """The largest |lr|, 0-d on the device of `like`; a CUDA graph can capture it. (Some schedules go below 0.)"""
    found = [lr.to(like).reshape(()).abs() for lr in lrs if isinstance(lr, Tensor)]
    numbers = [abs(float(lr)) for lr in lrs if not isinstance(lr, Tensor)]
    found += [like.new_full((), max(numbers))] if numbers else []
    return torch.stack(found).amax() if len(found) > 1 else found[0]
