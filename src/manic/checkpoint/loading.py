"""Writing and loading a state dict: whole or not at all, on every process that shares the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.chains import with_members
from manic.checkpoint.older import upgraded
from manic.checkpoint.record import TENSORS, Record, read, sealed
from manic.checkpoint.validation import (
    WRONG,
    by_id,
    by_number,
    check_groups,
    check_record,
    check_schedule,
    check_state,
    check_whole,
    try_out,
)
from manic.diagnostics import warn
from manic.parameters import KEPT, REST, RESTS, SLOT, local, wide
from manic.schedules import IN_A_GROUP, Schedule, differences, plain
from manic.tuner import TunerState

SCALARS = ("mu_product", "eta", "mu")  # NAdam's and ASGD's, float32 beside parameters of any dtype


def write(groups: list[dict[str, Any]], written: tuple[dict[str, Any]], schedule: Schedule) -> None:
    """Put into the param groups what a checkpoint says besides tensors. `written`: of ``Record.written()``."""
    state = schedule.state()
    whole = None if state is None else sealed(state)
    for group in groups:
        group["mechanic_options"] = written
        if whole is not None:
            group["mechanic_scheduler"] = whole


def pack(base: Optimizer, *, spread: bool, whole: bool) -> dict[str, Any]:
    """The state dict. Its tensors are the live ones, as in torch, but for the tuner's.

    DCP loads in place, and what it has read before it fails must not pass for the tuner's own.

    Args:
        base: the optimizer inside, whose groups say all that is to be said.
        spread: this process has only a part of the model: its shares of ‖u‖² and ‖d‖² stay out.
        whole: the parameters here, with what is marked on them, are all of the model's.
    """
    state_dict, live = base.state_dict(), base.param_groups
    copies = {group[key]: group[key].clone() for group in live for key in TENSORS}  # the groups share theirs
    if spread:
        for group in live:
            copies[group["mechanic_state"]][-2:] = -1.0
    for flat in dict.fromkeys(group["mechanic_state"] for group in live) if whole else ():
        # The user may have taken out the state of some parameters.
        mine = [p for group in live if group["mechanic_state"] is flat for p in group["params"]]
        there = sum(p.numel() for p in mine if not base.state.get(p, {}).keys().isdisjoint(KEPT))
        copies[flat][TunerState.place("numel")].clamp_(max=there)
    # A hook of the base may have copied all that is in its state dict.
    groups = [
        {**{key: _numbers(value) for key, value in group.items()}, **{key: copies[own[key]] for key in TENSORS}}
        for group, own in zip(state_dict["param_groups"], live, strict=True)
    ]
    return {**state_dict, "state": _rests_as(torch.bfloat16, state_dict["state"]), "param_groups": groups}


def _numbers(value: Any) -> Any:
    """A setting of a group: numbers that ``weights_only`` does not admit, such as numpy's, as Python's. (A new tuple is
    made of betas, and of the options.)"""
    if type(value) in (list, tuple):
        return type(value)(map(_numbers, value))
    if type(value) is dict:
        return {key: _numbers(one) for key, one in value.items()}
    return plain(value) if isinstance(value, Real) else value


def _rests_as(dtype: torch.dtype, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state with every rest of 16 bits in `dtype`: the same bits, in the same memory.

    The live ones are int16, which no backend of torch.distributed sends. A backend that sends the bfloat16 parameter
    sends its rest too.
    """

    def seen(values: Any) -> Any:
        rest = values.get(REST) if isinstance(values, dict) else None
        if not isinstance(rest, Tensor) or rest.dtype not in (torch.int16, torch.bfloat16):
            return values
        bits: Any = local(rest).view(dtype)
        if hasattr(rest, "placements"):
            sharded: Any = rest
            bits = sharded.from_local(
                bits, sharded.device_mesh, sharded.placements, shape=rest.shape, stride=rest.stride()
            )
        return {**values, REST: bits}

    return {key: seen(values) for key, values in state.items()}


@contextmanager
def all_or_nothing(base: Optimizer, schedule: Schedule, anywhere: Callable[[bool], bool]) -> Iterator[None]:
    """What fails inside leaves optimizer and schedule as they were, and so it is on every process if one fails.

    Args:
        anywhere: whether its argument is true on any process; one collective, so that none goes on alone.

    Raises:
        ValueError: the checkpoint does not fit, here or on another rank.
    """
    before = [(owner, dict(vars(owner))) for owner in (*with_members(base), *schedule.members)]

    def undo() -> None:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)

    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        known = isinstance(error, (ValueError, torch.OutOfMemoryError)) or not isinstance(error, WRONG)
        fault = error if known else ValueError(f"the checkpoint cannot be loaded: {error!r}")
    except BaseException:
        undo()
        raise
    if anywhere(fault is not None):
        undo()
        raise fault or ValueError(
            "the checkpoint does not fit on another rank, whose error says why: nothing is loaded"
        )


def load(
    base: Optimizer,
    schedule: Schedule,
    record: Record,
    state_dict: dict[str, Any],
    fresh: Tensor,
    *,
    spread: bool,
    merged: Callable[[bool], bool] | None,
) -> tuple[Record, int, int] | None:
    """Load a state dict that fits. To be called in ``all_or_nothing()``.

    Args:
        base: the optimizer inside.
        schedule: of the same Mechanic.
        record: of the same Mechanic.
        state_dict: of ``pack()``, of an older version, or of the plain base.
        fresh: a ``mechanic_state`` that has seen nothing, of any length: its dtype and device are those of ours.
        spread: other processes hold parameters of this model without a mark on the tensors.
        merged: None, or, where our state is from before the first step: whether its argument is true on any process.

    Returns:
        what the checkpoint says of its Mechanic, how many of its steps counted, and how many were skipped; None: it was
        a plain optimizer's.

    Raises:
        ValueError: it does not fit.
    """
    state_dict = by_number(state_dict)
    check_groups(base, state_dict["param_groups"])
    params, live = by_id(base, state_dict["param_groups"]), base.state
    state_dict = upgraded(state_dict, params)
    groups, state = state_dict["param_groups"], _rests_as(torch.int16, state_dict["state"])
    if merged is not None and merged(_is_merged(groups, state, params, live)):
        groups = [{k: v for k, v in group.items() if not k.startswith("mechanic_")} for group in groups]
        state = _without(KEPT, state)
        state_dict = {**state_dict, "state": state, "param_groups": groups}
    if not any("mechanic_state" in group for group in groups):
        check_state(params, state, None)
        _load_base(base, _with_our_lrs(base, schedule, state_dict), params)
        try_out(base)
        warn(
            f"the checkpoint has nothing of a Mechanic in it: the state of {type(base).__name__} is loaded, and the "
            "tuner starts afresh"
        )
        return None
    saved, plan = read(groups)
    # set_state_dict, with full_state_dict, merges what it loads into what is here. So other slots are the live ones.
    state = _without(KEPT if saved.frozen else {*SLOT.values()} - {SLOT[saved.options.variant]}, state)
    check_record(saved, record)
    if schedule.scheduler is not None and plan is not None:
        check_schedule(plan, schedule.state() or {}, schedule.scheduler)
    check_state(params, state, saved)
    if not saved.frozen and not spread:
        check_whole(params, state, groups, saved.options)
    _load_base(base, state_dict if plan is not None else _with_our_lrs(base, schedule, state_dict), params)
    _load_tuner(base.param_groups, groups, fresh, per_group=saved.options.per_group)
    for key, p in params.items():
        if state.get(key):
            base.state[p].update(_kept(state[key], live.get(p, {}), p))
    try_out(base, 1.0 if saved.frozen else saved.unit)
    notes = _differences(saved, record)
    if schedule.scheduler is not None and plan is not None:
        notes += differences(schedule.scheduler, plan)
        schedule.load(plan)
    if notes:
        warn("the checkpoint was written under other options: " + "; ".join(notes))
    skipped = TunerState.unpack(groups[0]["mechanic_state"], len(saved.options.memories)).skipped
    here = dataclasses.replace(saved, scheduler=record.scheduler, sweeps=record.sweeps)
    return here, int(groups[0]["mechanic_step"]), int(skipped)


def _is_merged(
    groups: list[dict[str, Any]], state: dict[Any, Any], params: Mapping[Any, Tensor], live: Mapping[Tensor, Any]
) -> bool:
    """Whether a state dict is a plain optimizer's, which set_state_dict, with full_state_dict, has merged into the
    state that we created before the first step: no step was taken, and yet a moment is not 0 any more."""
    first = groups[0]
    if not isinstance(first.get("mechanic_step"), Tensor) or bool(first["mechanic_step"] != 0):
        return False
    for key, p in params.items():
        for name, value in state.get(key, {}).items() if isinstance(state.get(key), dict) else ():
            here = live.get(p, {}).get(name)
            moment = name not in KEPT and isinstance(value, Tensor) and isinstance(here, Tensor)
            if moment and value.shape == here.shape and not local(here).any() and bool(local(value).any()):
                return True
    return False


def _without(names: Collection[str], state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state without the values of these names."""
    return {
        key: {k: v for k, v in values.items() if k not in names} if isinstance(values, dict) else values
        for key, values in state.items()
    }


def _with_our_lrs(base: Optimizer, schedule: Schedule, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict that has no scheduler, with the lrs that the scheduler here has set, and what else it keeps in the
    groups: it computes the next ones from these."""
    if schedule.scheduler is None:
        return state_dict
    groups = [
        {
            **theirs,
            **{k: v for k, v in ours.items() if k in IN_A_GROUP or not (k in theirs or k.startswith("mechanic_"))},
        }
        for theirs, ours in zip(state_dict["param_groups"], base.param_groups, strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def _differences(saved: Record, here: Record) -> list[str]:
    """List the options that a checkpoint replaces, and what becomes of the schedulers."""
    theirs, ours = dataclasses.asdict(saved.options), dataclasses.asdict(here.options)
    notes = [f"{name} = {theirs[name]!r} replaces {ours[name]!r}" for name in ours if theirs[name] != ours[name]]
    if saved.scheduler is not None and here.scheduler is None:
        notes.append(f"its scheduler {saved.scheduler} is left out, since this Mechanic has none")
    if saved.scheduler is None and here.scheduler is not None:
        notes.append(f"it has no scheduler, so {here.scheduler} stays as it is")
    if saved.sweeps not in (None, here.sweeps) and not saved.frozen:
        notes.append(
            f"its steps ran in the {saved.sweeps} sweeps, and yours run in the {here.sweeps} ones: the last digits "
            "will differ from those of a run that was never interrupted"
        )
    return notes


def _load_base(base: Optimizer, state_dict: dict[str, Any], params: Mapping[Any, Tensor]) -> None:
    """The base's own part, by its own rules, except that scalars keep their dtype."""
    state = _without(KEPT, state_dict["state"])
    try:
        base.load_state_dict({**state_dict, "state": {key: values for key, values in state.items() if values != {}}})
    except WRONG as error:
        raise ValueError(f"{type(base).__name__} cannot load its part of the checkpoint: {error!r}") from error
    # torch casts float state to the parameter's dtype, which is right for moments alone.
    for key, p in params.items():
        for name, value in state.get(key, {}).items():
            scalar = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
            if scalar and (p.dim() > 0 or name in SCALARS):
                base.state[p][name] = value.to(device=base.state[p][name].device, copy=True)


def _load_tuner(groups: list[dict[str, Any]], saved: list[dict[str, Any]], fresh: Tensor, *, per_group: bool) -> None:
    """Copies of the tuner's tensors, on the device and in the dtypes that they live in."""
    for group, other in zip(groups, saved, strict=True):
        group["mechanic_state"] = other["mechanic_state"].to(fresh, copy=True)
        group["mechanic_step"] = other["mechanic_step"].to(fresh.device, torch.float32, copy=True)
    for group in groups[1:]:
        group["mechanic_step"] = groups[0]["mechanic_step"]
        if not per_group:
            group["mechanic_state"] = groups[0]["mechanic_state"]


def _kept(saved: Mapping[str, Any], live: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Copies of the slot and the rest of p, where it lives, and the live ones where DCP has loaded into these."""
    kept: dict[str, Tensor] = {}
    for name in [name for name in KEPT if name in saved]:  # in one order on all ranks, which will gather them
        given, own = saved[name], live.get(name)
        if own is not None and own.dtype == given.dtype and local(own).data_ptr() == local(given).data_ptr():
            kept[name] = own
        else:
            dtype = RESTS[p.dtype] if name == REST else wide(p.dtype)
            kept[name] = torch.empty_like(p.detach(), dtype=dtype).copy_(given)
    return kept
