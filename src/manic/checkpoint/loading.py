"""Writing and loading a state dict: whole or not at all, on every process that shares the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.checkpoint.format1 import upgraded
from manic.checkpoint.record import TENSORS, Record
from manic.checkpoint.validation import SHAPED, WRONG, Target, by_id, by_number, check
from manic.diagnostics import warn
from manic.parameters import KEPT, REST, RESTS, wide
from manic.schedules import Schedule, differences
from manic.tuner import Options, TunerState


def write(groups: list[dict[str, Any]], written: tuple[dict[str, Any]], schedule: Schedule) -> None:
    """Put into the param groups what a checkpoint says besides tensors. `written`: of ``Record.written()``."""
    state = schedule.state()
    for group in groups:
        group["mechanic_options"] = written
        if state is not None:
            group["mechanic_scheduler"] = (state,)


def pack(base: Optimizer, *, spread: bool) -> dict[str, Any]:
    """The state dict. Its tensors are the live ones, as in torch, but for the tuner's.

    DCP loads in place, and what it has read before it fails must not pass for the tuner's own.

    Args:
        base: the optimizer inside, whose groups say all that is to be said.
        spread: this process has only a part of the model: its share of ‖u‖² stays out.
    """
    state_dict = base.state_dict()
    live = [group[key] for group in base.param_groups for key in TENSORS]
    copies = {t: t.clone() for t in dict.fromkeys(live)}  # the groups share theirs
    if spread:
        for group in base.param_groups:
            copies[group["mechanic_state"]][-1] = -1.0
    groups = [{**group, **{key: copies[group[key]] for key in TENSORS}} for group in state_dict["param_groups"]]
    state = {key: _gatherable(values) for key, values in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def _gatherable(values: Any) -> Any:
    """The state of a parameter, with an int16 rest of a sharded one in int32: neither gloo nor NCCL gathers int16."""
    rest = values.get(REST) if isinstance(values, dict) else None
    if rest is None or rest.dtype != torch.int16 or not hasattr(rest, "placements"):
        return values
    return {**values, REST: rest.to(torch.int32)}


@contextmanager
def all_or_nothing(base: Optimizer, schedule: Schedule, anywhere: Callable[[bool], bool]) -> Iterator[None]:
    """What fails inside leaves optimizer and schedule as they were, and so it is on every process if one fails.

    Args:
        anywhere: whether its argument is true on any process; one collective, so that none goes on alone.

    Raises:
        ValueError: the checkpoint does not fit, here or on another rank.
    """
    state = schedule.state()
    owners = [base, *schedule.members]
    before = [(owner, dict(vars(owner))) for owner in owners]

    def undo() -> None:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
        if schedule.scheduler is not None and state is not None:
            schedule.scheduler.load_state_dict(state)  # the functions that it calls may have attributes as well

    fault: Exception | None = None
    try:
        yield
    except WRONG as error:
        known = isinstance(error, (ValueError, torch.OutOfMemoryError))
        fault = error if known else ValueError(f"the checkpoint cannot be loaded: {error!r}")
    except Exception as error:
        fault = error
    except BaseException:
        undo()
        raise
    if anywhere(fault is not None):
        undo()
        raise fault or ValueError(
            "the checkpoint does not fit on another rank, whose error says why: nothing is loaded"
        )


def load(
    target: Target, schedule: Schedule, state_dict: dict[str, Any], fresh: Tensor
) -> tuple[Record, int, int] | None:
    """Load a state dict that fits.

    Args:
        target: what it is loaded into.
        schedule: of the same Mechanic.
        state_dict: of ``pack()``, of an older version, or of the plain base.
        fresh: a ``mechanic_state`` that has seen nothing, for a count of betas: its dtype and device are those of ours.

    Returns:
        what the checkpoint says of its Mechanic, how many of its steps counted, and how many were skipped; None: it was
        a plain optimizer's.

    Raises:
        ValueError: it does not fit.
    """
    state_dict = upgraded(state_dict, target.params)
    found = check(target, state_dict)
    state_dict = {**state_dict, "state": by_number(state_dict)}
    if found is None:
        warn(
            f"the checkpoint has nothing of a Mechanic in it: the state of {type(target.base).__name__} is loaded, and "
            "the tuner starts afresh"
        )
        _load_base(target.base, state_dict)
        return None
    saved, saved_schedule = found
    _name_differences(target, saved, saved_schedule)
    live = target.base.state
    _load_base(target.base, state_dict)
    _load_tensors(target.base, saved.options, state_dict, live, fresh)
    if schedule.scheduler is not None and saved_schedule is not None:
        schedule.load(saved_schedule)
    first = state_dict["param_groups"][0]
    skipped = TunerState.unpack(first["mechanic_state"], len(saved.options.betas)).skipped
    return dataclasses.replace(saved, scheduler=target.record.scheduler), int(first["mechanic_step"]), int(skipped)


def _name_differences(target: Target, saved: Record, saved_schedule: dict[str, Any] | None) -> None:
    notes = [
        f"{field.name} = {getattr(saved.options, field.name)!r} replaces {getattr(target.record.options, field.name)!r}"
        for field in dataclasses.fields(Options)
        if getattr(saved.options, field.name) != getattr(target.record.options, field.name)
    ]
    if saved.scheduler is not None and target.scheduler is None:
        notes.append(f"its scheduler {saved.scheduler} is left out, since this Mechanic has none")
    if saved.scheduler is None and target.scheduler is not None:
        notes.append(f"it has no scheduler, so {type(target.scheduler).__name__} stays as it is")
    if target.scheduler is not None and saved_schedule is not None:
        notes.extend(differences(target.scheduler, saved_schedule))
    if notes:
        warn("the checkpoint was written under other options: " + "; ".join(notes))


def _load_base(base: Optimizer, state_dict: dict[str, Any]) -> None:
    """The base's own part, by its own rules, except that scalars keep their dtype."""
    state = {
        key: {k: v for k, v in values.items() if k not in KEPT} if isinstance(values, dict) else values
        for key, values in state_dict["state"].items()
    }
    base.load_state_dict({**state_dict, "state": {key: values for key, values in state.items() if values != {}}})
    # torch casts float state to the parameter's dtype: right for moments, but NAdam's and ASGD's float32
    # scalars would be rounded to bfloat16.
    for key, p in by_id(base, state_dict).items():
        for name, value in state.get(key, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() and name not in SHAPED:
                base.state[p][name] = value.to(device=base.state[p][name].device, copy=True)


def _load_tensors(
    base: Optimizer, options: Options, state_dict: dict[str, Any], live: Mapping[Tensor, Any], fresh: Tensor
) -> None:
    """Copies of the accumulators, the slots and the rests, on the devices and in the dtypes that they live in."""
    groups = base.param_groups
    for group, other in zip(groups, state_dict["param_groups"], strict=True):
        group["mechanic_state"] = other["mechanic_state"].to(fresh, copy=True)
        group["mechanic_step"] = other["mechanic_step"].to(fresh.device, torch.float32, copy=True)
    for group in groups[1:]:
        group["mechanic_step"] = groups[0]["mechanic_step"]
        if not options.per_group:
            group["mechanic_state"] = groups[0]["mechanic_state"]
    for key, p in by_id(base, state_dict).items():
        for name in KEPT:
            saved = state_dict["state"].get(key, {}).get(name)
            if saved is None:
                continue
            if saved is not live.get(p, {}).get(name):  # else DCP has loaded into the live tensor, and no copy is due
                dtype = RESTS[p.dtype] if name == REST else wide(p.dtype)
                saved = torch.empty_like(p.detach(), dtype=dtype).copy_(saved)
            base.state[p][name] = saved
