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
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manic.storage import DELTA, REF, wide
from manic.tuner import Options, Tuner

if TYPE_CHECKING:
    from manic.mechanic import Mechanic

FORMAT = 1

# State that torch's optimizers keep in the shape of the parameter. (Not Adafactor's and LBFGS's.)
SHAPED = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "prev", "ax"),
}


def record(mechanic: Mechanic) -> None:
    """Write what a checkpoint says of its Mechanic into the param groups, in types that ``weights_only`` admits."""
    scheduler = mechanic.scheduler
    for group in mechanic.param_groups:
        group["mechanic_options"] = {
            "format": FORMAT,
            "base": type(mechanic.base_optimizer).__name__,
            "scheduler": None if scheduler is None else type(scheduler).__name__,
            "unit": mechanic._unit,
            "lazy": mechanic._lazy,
            **dataclasses.asdict(mechanic._options),
        }
        if scheduler is not None:
            group["mechanic_scheduler"] = copy.deepcopy(scheduler.state_dict())


def warn(message: str) -> None:
    """A UserWarning at the first caller outside torch and this package."""
    frame: FrameType | None = sys._getframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("manic", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def pack(mechanic: Mechanic) -> dict[str, Any]:
    """The state dict. Its tensors are the live ones, as in torch; the scheduler's state is a copy."""
    record(mechanic)  # the scheduler has moved on
    return mechanic.base_optimizer.state_dict()


def unpack(mechanic: Mechanic, state_dict: dict[str, Any]) -> None:
    """Load a state dict, or raise ValueError and leave every object as it was."""
    groups = _check_groups(mechanic, state_dict)
    plain = not any("mechanic_state" in group for group in groups)
    if plain:
        _check_state(mechanic, state_dict, mechanic._options)
        warn(
            f"the checkpoint is that of a plain optimizer: the state of {type(mechanic.base_optimizer).__name__} "
            "is loaded, and the tuner starts afresh"
        )
    else:
        options, unit, lazy = _check_tuner(mechanic, groups)
        _check_state(mechanic, state_dict, options)
        _name_differences(mechanic, groups[0]["mechanic_options"], options)

    base, scheduler = mechanic.base_optimizer, mechanic.scheduler
    schedule = {} if scheduler is None else copy.deepcopy(scheduler.state_dict())
    undo = [(owner, dict(vars(owner))) for owner in (base, mechanic)]
    try:
        _load_base(mechanic, state_dict)
        if plain:
            mechanic._start_afresh()
        else:
            mechanic._options, mechanic._unit, mechanic._lazy = options, unit, lazy
            _load_tuner(mechanic, state_dict)
            if scheduler is not None and "mechanic_scheduler" in groups[0]:
                scheduler.load_state_dict(copy.deepcopy(groups[0]["mechanic_scheduler"]))
            mechanic._settle()
    except BaseException:
        for owner, attributes in undo:
            vars(owner).clear()
            vars(owner).update(attributes)
        if scheduler is not None:
            scheduler.load_state_dict(schedule)
        raise


# ---------------------------------------------------------------------- does it fit?


def _check_groups(mechanic: Mechanic, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        saved, live = state_dict["param_groups"], mechanic.param_groups
        sizes = [len(group["params"]) for group in saved], [len(group["params"]) for group in live]
        state_dict["state"].items()
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "this is no optimizer state: it must be a dict with 'state' and 'param_groups', as state_dict() "
            "returns it (of a checkpoint with several entries, pass the optimizer's)"
        ) from error
    if len(sizes[0]) != len(sizes[1]):
        raise ValueError(f"the checkpoint has {len(sizes[0])} param groups, the optimizer has {len(sizes[1])}")
    for i, (theirs, ours) in enumerate(zip(*sizes, strict=True)):
        if theirs != ours:
            raise ValueError(f"param group {i} has {theirs} parameters in the checkpoint and {ours} in the optimizer")
        for name, default in mechanic.defaults.items():
            # torch fills in the flags that an older version did not have; a number is another optimizer's.
            if name not in saved[i] and default is not None and not isinstance(default, bool):
                raise ValueError(f"param group {i} of the checkpoint has no {name!r}: is it that of another optimizer?")
    return list(saved)


def _check_tuner(mechanic: Mechanic, groups: list[dict[str, Any]]) -> tuple[Options, float, bool]:
    """The options, unit and laziness that the checkpoint was written with."""
    for i, group in enumerate(groups):
        for key in ("mechanic_options", "mechanic_state", "mechanic_step"):
            if key not in group:
                raise ValueError(f"param group {i} of the checkpoint has no {key!r}")
    saved = dict(groups[0]["mechanic_options"])
    found = saved.pop("format", None)
    if found != FORMAT:
        raise ValueError(f"the checkpoint has format {found!r}, this version of manic reads {FORMAT}: upgrade manic")
    theirs, ours = saved.pop("base", None), type(mechanic.base_optimizer).__name__
    if theirs != ours:
        raise ValueError(f"the checkpoint is of a Mechanic around {theirs}, this one is around {ours}")
    theirs, scheduler = saved.pop("scheduler", None), mechanic.scheduler
    if theirs is not None and scheduler is not None and theirs != type(scheduler).__name__:
        raise ValueError(
            f"the checkpoint was written with the scheduler {theirs}, this Mechanic has {type(scheduler).__name__}"
        )
    try:
        unit, lazy = float(saved.pop("unit")), bool(saved.pop("lazy"))
        options = Options(**saved)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's options are broken: {error}") from error

    for i, group in enumerate(groups):
        shape = (Tuner.size(len(options.betas)),)
        for key, expected in (("mechanic_state", shape), ("mechanic_step", ())):
            value = group[key]
            if not isinstance(value, Tensor) or value.shape != expected or not value.is_floating_point():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{key} of param group {i} must be a float tensor of shape {expected}, got {got}")

    return options, unit, lazy


def _check_state(mechanic: Mechanic, state_dict: dict[str, Any], options: Options) -> None:
    params = _by_id(mechanic, state_dict)
    mechanic._check_params(list(params.values()), options)
    for key, values in state_dict["state"].items():
        if key not in params or not isinstance(values, dict):
            continue
        wanted = {REF, DELTA} if options.store_delta else {REF}
        if values.keys() & {REF, DELTA} not in (wanted, set()):
            ours = sorted(values.keys() & {REF, DELTA})
            raise ValueError(f"the state of parameter {key} has {ours}, not {sorted(wanted)}")
        p = params[key]
        for name in values.keys() & (wanted | SHAPED):
            value = values[name]
            if not isinstance(value, Tensor) or value.shape != p.shape or value.is_complex() != p.is_complex():
                got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name} of parameter {key} is {got} in the checkpoint; the parameter is {tuple(p.shape)} {p.dtype}"
                )


def _name_differences(mechanic: Mechanic, saved: dict[str, Any], options: Options) -> None:
    notes = [
        f"{field.name} = {getattr(options, field.name)!r} replaces {getattr(mechanic._options, field.name)!r}"
        for field in dataclasses.fields(Options)
        if getattr(options, field.name) != getattr(mechanic._options, field.name)
    ]
    theirs, ours = saved.get("scheduler"), mechanic.scheduler
    if theirs is not None and ours is None:
        notes.append(f"its scheduler {theirs} is left out, since this Mechanic has none")
    if theirs is None and ours is not None:
        notes.append(f"it has no scheduler, so {type(ours).__name__} stays as it is")
    if notes:
        warn("the checkpoint was written under other options: " + "; ".join(notes))


def _by_id(mechanic: Mechanic, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
    """The live parameters by the ids that they have in the checkpoint."""
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in mechanic.param_groups)
    return dict(zip(ids, params, strict=True))


# ---------------------------------------------------------------------- load


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
    for key, p in _by_id(mechanic, state_dict).items():
        for name, value in state.get(key, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
                base.state[p][name] = value.to(device=base.state[p][name].device, copy=True)


def _load_tuner(mechanic: Mechanic, state_dict: dict[str, Any]) -> None:
    """Copies of the accumulators, x_ref and Δ, on the devices and in the dtypes that they live in."""
    groups, fresh = mechanic.param_groups, mechanic._fresh_state()
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        group["mechanic_state"] = fresh.clone().copy_(saved["mechanic_state"])
        group["mechanic_step"] = saved["mechanic_step"].to(mechanic._device, torch.float32, copy=True)
    for group in groups[1:]:
        group["mechanic_step"] = groups[0]["mechanic_step"]
        if not mechanic._options.per_group:
            group["mechanic_state"] = groups[0]["mechanic_state"]
    for key, p in _by_id(mechanic, state_dict).items():
        for name in (REF, DELTA):
            if name in state_dict["state"].get(key, {}):
                value = torch.empty_like(p.detach(), dtype=wide(p.dtype))
                mechanic.state[p][name] = value.copy_(state_dict["state"][key][name])
    first = state_dict["param_groups"][0]
    skipped = Tuner.unpack(first["mechanic_state"], len(mechanic._options.betas)).skipped
    mechanic._calls = int(first["mechanic_step"]) + int(skipped)
