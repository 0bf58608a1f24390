"""pack and unpack: what ``state_dict`` and ``load_state_dict`` do, whole or not at all.

Layout (format 1): that of ``Optimizer.state_dict()``; in every param group ``mechanic_state``,
``mechanic_step``, ``mechanic_options`` and, with an inner scheduler, ``mechanic_scheduler``; in the state of
every parameter that has stepped ``mechanic_ref`` and, unless it is recomputed, ``mechanic_delta``.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manic.fit import FORMAT, SHAPED, TUNER, WRONG, Record, by_id, by_number, check
from manic.reduction import anywhere
from manic.schedules import differences, name_of, parts
from manic.storage import DELTA, REF, wide
from manic.tuner import Options, Tuner

if TYPE_CHECKING:
    from manic.mechanic import Mechanic

INSIDE = ("manic", "torch")  # a warning names the user's own line


def record(mechanic: Mechanic) -> None:
    """Write what a checkpoint says of its Mechanic into the param groups, in types that ``weights_only`` admits.

    In tuples, which DCP stores whole: it takes dicts apart, and turns their keys into strings (MultiStepLR's are ints).
    """
    scheduler = mechanic.scheduler
    options = {
        "format": FORMAT,
        "base": type(mechanic.base_optimizer).__name__,
        "scheduler": None if scheduler is None else name_of(scheduler),
        "unit": mechanic._unit,
        "lazy": mechanic._lazy,
        "frozen": mechanic._frozen,
        **dataclasses.asdict(mechanic._options),
    }
    if mechanic._record != (options,):  # else it is the same object still, by which our groups are known
        mechanic._record = (options,)
    for group in mechanic.param_groups:
        group["mechanic_options"] = mechanic._record
        if scheduler is not None:
            group["mechanic_scheduler"] = (copy.deepcopy(scheduler.state_dict()),)


def warn(message: str) -> None:
    """A UserWarning at the first caller outside torch and this package."""
    callers = [name.partition(".")[0] for name in _callers()]
    warnings.warn(message, stacklevel=1 + next((i for i, name in enumerate(callers) if name not in INSIDE), 0))


def for_dcp() -> bool:
    """Whether torch.distributed.checkpoint's save or load is asking: a state dict tells it what to store, or load."""
    return any(name.startswith("torch.distributed.checkpoint.state_dict_") for name in _callers())


def _callers() -> list[str]:
    """The names of the modules on the stack, from the caller of this function outwards."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        names.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back  # type: ignore[assignment]
    return names


def pack(mechanic: Mechanic) -> dict[str, Any]:
    """The state dict. Its tensors are the live ones, as in torch, but for the tuner's: DCP loads in place, and what
    it has read before it fails must not pass for the tuner's own."""
    record(mechanic)  # the scheduler has moved on
    state_dict = mechanic.base_optimizer.state_dict()
    live = [group[key] for group in mechanic.param_groups for key in TUNER]
    copies = {t: t.clone() for t in dict.fromkeys(live)}  # the groups share theirs
    groups = [{**group, **{key: copies[group[key]] for key in TUNER}} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def unpack(mechanic: Mechanic, state_dict: dict[str, Any]) -> None:
    """Load a state dict, or raise and leave every object as it was: on all processes that share the model, or on none.

    One collective for a sharded model, so that no process goes on alone while another raises.
    """
    scheduler = mechanic.scheduler
    schedule = {} if scheduler is None else copy.deepcopy(scheduler.state_dict())
    owners = [mechanic.base_optimizer, mechanic, *(() if scheduler is None else parts(scheduler))]
    before = [(owner, dict(vars(owner))) for owner in owners]

    def undo() -> None:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
        if scheduler is not None:
            scheduler.load_state_dict(schedule)  # the functions that it calls may have attributes as well

    layouts = mechanic._layouts()
    fault: Exception | None = None
    mechanic._loading = True
    try:
        _load(mechanic, state_dict)
    except WRONG as error:
        known = isinstance(error, (ValueError, torch.OutOfMemoryError))
        fault = error if known else ValueError(f"the checkpoint cannot be loaded: {error!r}")
    except Exception as error:
        fault = error
    except BaseException:
        undo()
        raise
    finally:
        mechanic._loading = False
    if anywhere(fault is not None, layouts, mechanic.process_group, mechanic._device):
        undo()
        raise fault or ValueError(
            "the checkpoint does not fit on another rank, whose error says why: nothing is loaded"
        )


def _load(mechanic: Mechanic, state_dict: dict[str, Any]) -> None:
    saved = check(mechanic, state_dict)
    state_dict = {**state_dict, "state": by_number(state_dict)}
    if saved is None:
        warn(
            f"the checkpoint has nothing of a Mechanic in it: the state of {type(mechanic.base_optimizer).__name__} "
            "is loaded, and the tuner starts afresh"
        )
        _load_base(mechanic, state_dict)
        mechanic._start_afresh()
        return
    _name_differences(mechanic, saved)
    live = mechanic.state
    _load_base(mechanic, state_dict)
    mechanic._options, mechanic._unit = saved.options, saved.unit
    mechanic._lazy, mechanic._frozen = saved.lazy, saved.frozen
    _load_tuner(mechanic, state_dict, live)
    if mechanic.scheduler is not None and saved.schedule is not None:
        mechanic.scheduler.load_state_dict(copy.deepcopy(saved.schedule))
        _try_schedule(mechanic.scheduler)
        mechanic.scheduler.load_state_dict(copy.deepcopy(saved.schedule))  # a function may count its calls
    mechanic._settle()


def _name_differences(mechanic: Mechanic, saved: Record) -> None:
    notes = [
        f"{field.name} = {getattr(saved.options, field.name)!r} replaces {getattr(mechanic._options, field.name)!r}"
        for field in dataclasses.fields(Options)
        if getattr(saved.options, field.name) != getattr(mechanic._options, field.name)
    ]
    theirs, ours = saved.scheduler, mechanic.scheduler
    if theirs is not None and ours is None:
        notes.append(f"its scheduler {theirs} is left out, since this Mechanic has none")
    if theirs is None and ours is not None:
        notes.append(f"it has no scheduler, so {type(ours).__name__} stays as it is")
    if ours is not None and saved.schedule is not None:
        notes.extend(differences(ours, saved.schedule))
    if notes:
        warn("the checkpoint was written under other options: " + "; ".join(notes))


def _try_schedule(scheduler: LRScheduler) -> None:
    """Have it work out the lrs of now, which it cannot where what it has loaded does not go together. Nothing stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is not how users should ask
        for part in parts(scheduler):
            if type(part).get_lr is LRScheduler.get_lr:  # which those that are made of others do not have
                continue
            dicts = [vars(part), *part.optimizer.param_groups]  # OneCycleLR sets the momentum
            before = [dict(values) for values in dicts]
            part.get_lr()
            for values, old in zip(dicts, before, strict=True):
                values.clear()
                values.update(old)


def _load_base(mechanic: Mechanic, state_dict: dict[str, Any]) -> None:
    """The base's own part, by its own rules, except that scalars keep their dtype."""
    base = mechanic.base_optimizer
    state = {
        key: {k: v for k, v in values.items() if k not in (REF, DELTA)} if isinstance(values, dict) else values
        for key, values in state_dict["state"].items()
    }
    base.load_state_dict({**state_dict, "state": {key: values for key, values in state.items() if values != {}}})
    # torch casts float state to the parameter's dtype: right for moments, but NAdam's and ASGD's float32
    # scalars would be rounded to bfloat16.
    for key, p in by_id(mechanic, state_dict).items():
        for name, value in state.get(key, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() and name not in SHAPED:
                base.state[p][name] = value.to(device=base.state[p][name].device, copy=True)


def _load_tuner(mechanic: Mechanic, state_dict: dict[str, Any], live: Mapping[Tensor, Any]) -> None:
    """Copies of the accumulators, x_ref and Δ, on the devices and in the dtypes that they live in."""
    groups, fresh = mechanic.param_groups, mechanic._fresh_state()
    for group, other in zip(groups, state_dict["param_groups"], strict=True):
        group["mechanic_state"] = fresh.clone().copy_(other["mechanic_state"])
        group["mechanic_step"] = other["mechanic_step"].to(mechanic._device, torch.float32, copy=True)
    for group in groups[1:]:
        group["mechanic_step"] = groups[0]["mechanic_step"]
        if not mechanic._options.per_group:
            group["mechanic_state"] = groups[0]["mechanic_state"]
    for key, p in by_id(mechanic, state_dict).items():
        for name in (REF, DELTA):
            saved = state_dict["state"].get(key, {}).get(name)
            if saved is None:
                continue
            if saved is not live.get(p, {}).get(name):  # else DCP has loaded into the live tensor, and no copy is due
                saved = torch.empty_like(p.detach(), dtype=wide(p.dtype)).copy_(saved)
            mechanic.state[p][name] = saved
    first = state_dict["param_groups"][0]
    skipped = Tuner.unpack(first["mechanic_state"], len(mechanic._options.betas)).skipped
    mechanic._resume_at(int(first["mechanic_step"]), int(skipped))
