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
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from manic.reduction import anywhere
from manic.storage import DELTA, REF, layout_of, local, shards, wide
from manic.tuner import Options, Tuner

if TYPE_CHECKING:
    from manic.mechanic import Mechanic

FORMAT = 1

INSIDE = ("manic", "torch")  # a warning names the user's own line
TUNER = ("mechanic_state", "mechanic_step")

# State that torch's optimizers keep in the shape of the parameter. (Not Adafactor's and LBFGS's.)
SHAPED = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "prev", "ax"),
}


def record(mechanic: Mechanic) -> None:
    """Write what a checkpoint says of its Mechanic into the param groups, in types that ``weights_only`` admits.

    In tuples, which DCP stores whole: it takes dicts apart, and turns their keys into strings (MultiStepLR's are ints).
    """
    scheduler = mechanic.scheduler
    for group in mechanic.param_groups:
        options = {
            "format": FORMAT,
            "base": type(mechanic.base_optimizer).__name__,
            "scheduler": None if scheduler is None else type(scheduler).__name__,
            "unit": mechanic._unit,
            "lazy": mechanic._lazy,
            "frozen": mechanic._frozen,
            **dataclasses.asdict(mechanic._options),
        }
        group["mechanic_options"] = (options,)
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
    before = [(owner, dict(vars(owner))) for owner in (mechanic.base_optimizer, mechanic)]

    def undo() -> None:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
        if scheduler is not None:
            scheduler.load_state_dict(schedule)

    layouts, fault = mechanic._layouts(), None
    try:
        _load(mechanic, state_dict)
    except Exception as error:
        fault = error
    except BaseException:
        undo()
        raise
    if anywhere(fault is not None, layouts, mechanic.process_group, mechanic._device):
        undo()
        raise fault or ValueError(
            "the checkpoint does not fit on another rank, whose error says why: nothing is loaded"
        )


def _load(mechanic: Mechanic, state_dict: dict[str, Any]) -> None:
    try:
        state_dict = {**state_dict, "state": _by_number(state_dict)}
        groups = _check_groups(mechanic, state_dict)
        plain = not any("mechanic_state" in group for group in groups)
        saved = None if plain else _check_tuner(mechanic, groups)
        options, frozen = (mechanic._options, False) if saved is None else (saved.options, saved.frozen)
        _check_state(mechanic, state_dict, options, frozen=frozen)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            "this is no optimizer state: it must be a dict with 'state' and 'param_groups', as state_dict() returns it "
            f"(of a checkpoint with several entries, pass the optimizer's): {error!r}"
        ) from error

    if saved is None:
        warn(
            f"the checkpoint is that of a plain optimizer: the state of {type(mechanic.base_optimizer).__name__} "
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
    if mechanic.scheduler is not None and "mechanic_scheduler" in groups[0]:
        mechanic.scheduler.load_state_dict(copy.deepcopy(groups[0]["mechanic_scheduler"][0]))
        mechanic._epoch = None
    mechanic._settle()


# ---------------------------------------------------------------------- does it fit?


def _check_groups(mechanic: Mechanic, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    saved, live = state_dict["param_groups"], mechanic.param_groups
    sizes = [len(group["params"]) for group in saved], [len(group["params"]) for group in live]
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


class Record(NamedTuple):
    """What a checkpoint says of its Mechanic: see ``record()``."""

    base: str  # name of the base's class
    scheduler: str | None  # of the inner scheduler's
    unit: float  # the base lr that is divided out
    lazy: bool  # the base creates its state in its first step
    frozen: bool
    options: Options


def read_record(groups: Sequence[Mapping[str, Any]]) -> Record:
    """What the param groups of a checkpoint say of their Mechanic, and that their tensors are as it says.

    Raises:
        ValueError: something is missing, broken, or of another format.
    """
    for i, group in enumerate(groups):
        for key in ("mechanic_options", *TUNER):
            if key not in group:
                raise ValueError(f"param group {i} of the checkpoint has no {key!r}")
    saved = groups[0]["mechanic_options"][0]
    if not isinstance(saved, dict):
        raise ValueError(f"the checkpoint's options are broken: {saved!r}")
    saved = saved.copy()
    found = saved.pop("format", None)
    if found != FORMAT:
        raise ValueError(f"the checkpoint has format {found!r}, this version of manic reads {FORMAT}: upgrade manic")
    try:
        base, scheduler = saved.pop("base"), saved.pop("scheduler")
        unit, lazy, frozen = float(saved.pop("unit")), saved.pop("lazy"), saved.pop("frozen")
        if not isinstance(lazy, bool) or not isinstance(frozen, bool):
            raise TypeError(f"lazy = {lazy!r} and frozen = {frozen!r} must be bools")
        options = Options(**saved)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's options are broken: {error}") from error
    for i, group in enumerate(groups):
        for key, expected in zip(TUNER, ((Tuner.size(len(options.betas)),), ()), strict=True):
            value = group[key]
            if not isinstance(value, Tensor) or value.shape != expected or not value.is_floating_point():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{key} of param group {i} must be a float tensor of shape {expected}, got {got}")
            _check_finite(f"{key} of param group {i}", value)
    return Record(base, scheduler, unit, lazy, frozen, options)


def _check_tuner(mechanic: Mechanic, groups: list[dict[str, Any]]) -> Record:
    """The checkpoint's record, of a Mechanic around the same base, with a scheduler of the same kind."""
    saved = read_record(groups)
    ours, scheduler = type(mechanic.base_optimizer).__name__, mechanic.scheduler
    if saved.base != ours:
        raise ValueError(f"the checkpoint is of a Mechanic around {saved.base}, this one is around {ours}")
    if saved.scheduler is not None and scheduler is not None and saved.scheduler != type(scheduler).__name__:
        raise ValueError(
            f"the checkpoint was written with the scheduler {saved.scheduler}, this Mechanic has "
            f"{type(scheduler).__name__}"
        )
    return saved


def _check_state(mechanic: Mechanic, state_dict: dict[str, Any], options: Options, *, frozen: bool) -> None:
    params, state = _by_id(mechanic, state_dict), state_dict["state"]
    mechanic._check_params(list(params.values()), options)
    foreign = [key for key in state if isinstance(key, int) and key not in params]
    if foreign:
        raise ValueError(f"the checkpoint has state of parameter {foreign[0]}, which is in none of its param groups")
    ours = set() if frozen else {REF, DELTA} if options.store_delta else {REF}
    known = SHAPED if type(mechanic.base_optimizer).__module__.startswith("torch.optim") else set()
    stepped = {key: state[key] for key in params if isinstance(state.get(key), dict) and state[key]}
    for key, values in stepped.items():
        if values.keys() & {REF, DELTA} not in (ours, set()):
            raise ValueError(
                f"the state of parameter {key} has {sorted(values.keys() & {REF, DELTA})}, not {sorted(ours)}"
            )
        for name in sorted(values.keys() & (ours | known)):
            _check_tensor(f"{name} of parameter {key}", values[name], params[key], finite=name in ours)
    whole = frozen or mechanic.process_group is not None or any(REF in values for values in stepped.values())
    for group in state_dict["param_groups"]:
        if (
            not whole
            and "mechanic_state" in group
            and Tuner.unpack(group["mechanic_state"], len(options.betas)).numel > 0
        ):
            raise ValueError(
                f"the checkpoint is of step {int(group['mechanic_step'])}, but has no {REF!r} for any parameter. "
                "torch.distributed.checkpoint loads what it is asked for: ask with the Mechanic itself, "
                "dcp.load({'mechanic': mechanic}), or with get_state_dict, while no gradients are there, and not frozen"
            )
        members = [key for key in group["params"] if key in stepped]
        for name in sorted(known & set(chain.from_iterable(stepped[key] for key in members))):
            without = [key for key in members if name not in stepped[key]]
            if without:
                raise ValueError(
                    f"the checkpoint has no {name!r} for parameter {without[0]}, as for others of its group"
                )


def _check_tensor(what: str, value: Any, p: Tensor, *, finite: bool) -> None:
    """That a value of the checkpoint can be the state of p."""
    if not isinstance(value, Tensor) or value.shape != p.shape or value.is_complex() != p.is_complex():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} is {got} in the checkpoint; the parameter is {tuple(p.shape)} {p.dtype}")
    if shards(layout_of(value)) != shards(layout_of(p)):
        raise ValueError(
            f"{what} is cut over {shards(layout_of(value))} processes in the checkpoint, the parameter over "
            f"{shards(layout_of(p))}: to change their number, save and load with torch.distributed.checkpoint"
        )
    if finite:
        _check_finite(what, value)


def _check_finite(what: str, value: Tensor) -> None:
    if not bool(local(value).isfinite().all()):
        raise ValueError(f"{what} has values in the checkpoint that are not finite: it is damaged")


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
    if notes:
        warn("the checkpoint was written under other options: " + "; ".join(notes))


def _by_number(state_dict: dict[str, Any]) -> dict[Any, Any]:
    """The state by parameter. DCP leaves what is no tensor (a count of steps, say) under the number as a string."""
    state = dict(state_dict["state"])
    for key in chain.from_iterable(group["params"] for group in state_dict["param_groups"]):
        if isinstance(key, int) and str(key) in state:
            state[key] = {**state.get(key, {}), **state.pop(str(key))}
    return state


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
    for key, p in _by_id(mechanic, state_dict).items():
        for name in (REF, DELTA):
            saved = state_dict["state"].get(key, {}).get(name)
            if saved is None:
                continue
            if saved is not live.get(p, {}).get(name):  # else DCP has loaded into the live tensor, and no copy is due
                saved = torch.empty_like(p.detach(), dtype=wide(p.dtype)).copy_(saved)
            mechanic.state[p][name] = saved
    first = state_dict["param_groups"][0]
    skipped = Tuner.unpack(first["mechanic_state"], len(mechanic._options.betas)).skipped
    mechanic._calls = int(first["mechanic_step"]) + int(skipped)
