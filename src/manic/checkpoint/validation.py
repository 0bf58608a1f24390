"""Whether a checkpoint fits: what is asked of it before anything is loaded, and of the base when it has loaded."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from manic.chains import owners, params_of
from manic.checkpoint.record import Record, is_plain
from manic.parameters import KEPT, REST, RESTS, SLOT, corner, layout_of, local, lr_of, shards
from manic.schedules import IN_A_GROUP, PER_GROUP
from manic.tuner import Options, TunerState

# What torch and this package raise at a value of the wrong kind.
WRONG = (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError)


def by_number(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with its state by parameter. DCP leaves what is no tensor (a count of steps, say) under the
    number as a string.

    Raises:
        ValueError: it is no state dict.
    """
    try:
        state = dict(state_dict["state"])
        for key in chain.from_iterable(group["params"] for group in state_dict["param_groups"]):
            if isinstance(key, int) and str(key) in state:
                state[key] = {**state.get(key, {}), **state.pop(str(key))}
    except WRONG as error:
        raise ValueError(
            "this is no optimizer state: it must be a dict with 'state' and 'param_groups', as state_dict() returns it "
            f"(of a checkpoint with several entries, pass the optimizer's): {error!r}"
        ) from error
    return {**state_dict, "state": state}


def by_id(base: Optimizer, groups: list[dict[str, Any]]) -> dict[Any, Tensor]:
    """The live parameters by the ids that they have in the groups of a checkpoint."""
    ids = chain.from_iterable(group["params"] for group in groups)
    return dict(zip(ids, params_of(base), strict=True))


# ---------------------------------------------------------------------- settings


def check_groups(base: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Check that they have the parameters of the live ones, and settings of the same kinds."""
    if len(groups) != len(base.param_groups):
        raise ValueError(
            f"the checkpoint has {len(groups)} param groups, the optimizer has {len(base.param_groups)}: build it with "
            "the groups of the run that was saved"
        )
    ids = [key for group in groups for key in group["params"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the param groups of the checkpoint have a parameter twice: {ids}")
    for i, (saved, live, one) in enumerate(zip(groups, base.param_groups, owners(base), strict=True)):
        theirs, ours = len(saved["params"]), len(live["params"])
        if theirs != ours:
            raise ValueError(
                f"param group {i} has {theirs} parameters in the checkpoint and {ours} in the optimizer: build the "
                "model and the optimizer as in the run that was saved"
            )
        for name, default in one.defaults.items():
            # torch fills in the flags that an older version did not have; a number is another optimizer's.
            if name not in saved and default is not None and not isinstance(default, bool):
                raise ValueError(f"param group {i} of the checkpoint has no {name!r}: is it that of another optimizer?")
        lost = live.keys() & set(IN_A_GROUP) - saved.keys()
        if lost and "mechanic_scheduler" in live.keys() & saved.keys():
            raise ValueError(f"param group {i} of the checkpoint has no {min(lost)!r}, which its scheduler needs")
        own = {"params", *(name for name in live if name.startswith("mechanic_"))}
        unset = {name for name in _may_be_none(one) if saved.get(name) is None}
        check_settings(saved, {k: v for k, v in live.items() if k not in own | unset}, f"param group {i}")


def _may_be_none(one: Optimizer) -> set[str]:
    """The settings of an optimizer that are None by default."""
    unset = {name for name, parameter in _arguments(type(one).__init__).items() if parameter.default is None}
    return (unset | {name for name, value in one.defaults.items() if value is None}) - set(IN_A_GROUP)


@lru_cache
def _arguments(constructor: Callable[..., None]) -> Mapping[str, inspect.Parameter]:
    """The arguments of an optimizer's constructor. Looking takes a while, and many parameters have the same one."""
    return inspect.signature(constructor).parameters


def check_record(saved: Record, here: Record) -> None:
    """Check that a checkpoint is of a Mechanic around the same base, with the same scheduler if both have one."""
    if saved.base != here.base:
        raise ValueError(
            f"the checkpoint is of a Mechanic around {saved.base}, this one is around {here.base}: wrap the "
            "same optimizer"
        )
    if None not in (saved.scheduler, here.scheduler) and saved.scheduler != here.scheduler:
        raise ValueError(
            f"the checkpoint was written with the scheduler {saved.scheduler}, this Mechanic has {here.scheduler}: "
            "build the same one, or pass none in to go on without the saved schedule"
        )


def check_schedule(saved: dict[str, Any], here: dict[str, Any], scheduler: LRScheduler, of: str = "") -> None:
    """Check that a scheduler's state in the checkpoint has what it needs, and of the same kinds as here.

    A scheduler that is not torch's may keep anything: of it, only the attributes that torch's base class knows are
    looked at. (It is tried out when it has loaded.)
    """
    of = of or type(scheduler).__name__
    for key in ("last_epoch", "base_lrs"):
        if key in here and key not in saved:
            raise ValueError(f"the state of {of} has no {key!r} in the checkpoint")
    parts = getattr(scheduler, "_schedulers", None)
    theirs = saved.get("_schedulers")
    if parts and theirs is not None:
        if not isinstance(theirs, list | tuple) or list(map(type, theirs)) != [dict] * len(parts):
            raise ValueError(f"_schedulers of {of} is {theirs!r} in the checkpoint, {here['_schedulers']!r} here")
        for part, its, ours in zip(parts, theirs, here["_schedulers"], strict=True):
            check_schedule(its, ours, part, f"{of}._schedulers")
    ours = {key: value for key, value in here.items() if key != "_schedulers"}
    if not type(scheduler).__module__.startswith("torch.optim"):
        ours = {key: value for key, value in ours.items() if key in ("last_epoch", "_step_count", *PER_GROUP)}
    check_settings(saved, ours, of)


def check_settings(saved: dict[str, Any], here: dict[str, Any], of: str) -> None:
    """Check that what a group or a scheduler has in the checkpoint is of the same kinds as here. It may lack something:
    an older torch did not have it."""
    for key, value in here.items():
        if key not in saved:
            continue
        theirs, like = saved[key], value
        if isinstance(value, list) and not value:
            like = None
        elif key in (*PER_GROUP, "lr_lambdas") and isinstance(theirs, list | tuple) and theirs:
            like = [value[0] for _ in theirs]  # it may not know of a group that was added
        if not _alike(theirs, like):
            raise ValueError(
                f"{key} of {of} is {theirs!r} in the checkpoint, {value!r} here: build the optimizer and the scheduler "
                "as in the run that was saved"
            )


def _alike(value: Any, here: Any) -> bool:
    """Whether a value of a checkpoint can take the place of the one that is here: it is of the same kind, no NaN, and
    no infinite number where that one is not."""
    if here is None:
        return True
    if isinstance(here, bool):
        return isinstance(value, bool)
    if _is_number(here):
        return _is_number(value) and (math.isfinite(value) or (math.isinf(value) and math.isinf(here)))
    if isinstance(here, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(here) and all(map(_alike, value, here))
    if isinstance(here, Mapping):
        named = [key for key in here if isinstance(key, str)]
        if not isinstance(value, Mapping) or not all(key in value for key in named):
            return False
        return all(_alike(value[k], here[k]) and (value[k] == here[k] or not isinstance(here[k], str)) for k in named)
    return isinstance(value, type(here))


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool and is_plain(value)
    return isinstance(value, Real) and not isinstance(value, bool)


# ---------------------------------------------------------------------- state


def check_state(params: dict[Any, Tensor], state: dict[Any, Any], saved: Record | None) -> None:
    """Check that every state is of a parameter, and has of ours what the variant keeps."""
    foreign = [key for key in state if isinstance(key, int) and key not in params]
    if foreign:
        raise ValueError(f"the checkpoint has state of parameter {foreign[0]}, which is in none of its param groups")
    for key, p in params.items():
        values = state.get(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"the state of parameter {key} is {values!r} in the checkpoint, and must be a dict")
        ours: dict[str, torch.dtype | None] = {}
        if saved is None or not saved.frozen:
            ours = {SLOT[saved.options.variant if saved is not None else "scale_free"]: None}
            ours |= {REST: RESTS[p.dtype]} if p.dtype in RESTS else {}
        kept = values.keys() & set(KEPT)
        if kept not in (ours.keys(), set()):
            raise ValueError(
                f"the state of parameter {key} has {sorted(kept)} in the checkpoint, and must have {sorted(ours)}: was "
                "it saved with parameters of another dtype?"
            )
        for name in sorted(kept):
            _check_ours(f"{name} of parameter {key}", values[name], p, ours[name])


def check_whole(
    params: dict[Any, Tensor], state: dict[Any, Any], groups: list[dict[str, Any]], options: Options
) -> None:
    """Check that every parameter of the last step has its slot: without it, it would silently begin anew."""
    counts = [TunerState.unpack(group["mechanic_state"], len(options.memories)).numel for group in groups]
    members = [group["params"] for group in groups]
    slot, step = SLOT[options.variant], int(groups[0]["mechanic_step"])
    if not state and any(counts):
        raise ValueError(
            f"the checkpoint is of step {step}, and its 'state' is empty. To begin the state anew, load the whole "
            "checkpoint, and call optimizer.state.clear() then"
        )
    if not options.per_group:
        counts, members = counts[:1], [list(chain.from_iterable(members))]
    for count, keys in zip(counts, members, strict=True):
        # DCP leaves out the frozen ones.
        there = [key for key in keys if slot in state.get(key, {}) or not params[key].requires_grad]
        numel = sum(params[key].numel() for key in there)
        if numel < float(count) * (1 if count.dtype == torch.float64 else 1 - 1e-6):
            raise ValueError(
                f"the checkpoint is of step {step}, but has no {slot!r} for "
                f"{float(count) - numel:.0f} of the {float(count):.0f} elements that had a gradient then. "
                "torch.distributed.checkpoint loads what it is asked for: ask with the Mechanic itself, "
                "dcp.load({'mechanic': mechanic}), or with get_state_dict, while no gradients are there, and not frozen"
            )


def _check_ours(what: str, value: Any, p: Tensor, dtype: torch.dtype | None = None) -> None:
    """Check the slot or the rest of p. `dtype`: that it must have; None: any of the same kind as p."""
    fits = isinstance(value, Tensor) and value.shape == p.shape
    if fits and dtype is None:
        fits = (value.is_floating_point(), value.is_complex()) == (p.is_floating_point(), p.is_complex())
    _check_tensor(what, value, p, fits=fits and dtype in (None, value.dtype))
    if not bool(_extremes(value).isfinite().all()):
        raise ValueError(f"{what} has values in the checkpoint that are not finite: it is damaged")


def _extremes(t: Tensor) -> Tensor:
    """The smallest and the largest value, or NaN if there is one; in no memory that grows with t."""
    values = torch.view_as_real(local(t).detach()) if t.is_complex() else local(t).detach()
    return torch.stack(torch.aminmax(values)) if values.numel() else values.new_zeros(2)


def _check_tensor(what: str, value: Any, p: Tensor, *, fits: bool) -> None:
    """Check that a value can be the state of p. `fits`: whether its shape and dtype do."""
    if not fits or not is_plain(value):
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} is {got} in the checkpoint; the parameter is {tuple(p.shape)} {p.dtype}")
    theirs, ours = shards(layout_of(value)), shards(layout_of(p))
    if value.shape == p.shape and theirs != ours:
        raise ValueError(
            f"{what} is cut over {theirs} processes in the checkpoint, the parameter over {ours}: to change their "
            "number, save and load with torch.distributed.checkpoint"
        )


# ---------------------------------------------------------------------- the base's own


def try_out(base: Optimizer, unit: float = 1.0) -> None:
    """Check that torch's own optimizers can go on, at lr / unit, with what they have loaded. Changes nothing.

    Raises:
        ValueError: one cannot.
    """
    members = [
        (one, group, p) for one, group in zip(owners(base), base.param_groups, strict=True) for p in group["params"]
    ]
    for number, (one, group, p) in enumerate(members):
        plain = type(local(p)) in (Tensor, torch.nn.Parameter) and not p.is_meta
        if not type(one).__module__.startswith("torch.optim"):
            continue
        # A part of a parameter has nothing to do with Adafactor's rows and columns of the whole.
        if p not in base.state or not plain or (isinstance(one, Adafactor) and shards(layout_of(p)) > 1):
            continue
        state = {name: value for name, value in base.state[p].items() if name not in KEPT}
        for name, value in state.items():
            if isinstance(value, Tensor | int | float):
                _check_value(f"{name} of parameter {number}", torch.as_tensor(value), p)
        try:
            _step_a_stand_in(one, group if lr_of(group) is None else {**group, "lr": group["lr"] / unit}, p, state)
        except KeyError as error:
            # SGD that was built without momentum creates it when a group has some for the first time.
            begins = isinstance(one, SGD) and not one.defaults["momentum"]
            if not begins or any(error.args[0] in base.state.get(q, ()) for q in group["params"]):
                raise ValueError(f"the checkpoint has no {error} for parameter {number}") from error
        except WRONG as error:
            raise ValueError(
                f"{type(one).__name__} cannot step parameter {number} with the options and the state in the "
                f"checkpoint: {error}"
            ) from error


def _check_value(what: str, value: Tensor, p: Tensor) -> None:
    """Check a value of the base's state: one number, or a tensor with the sizes of p. (Adafactor's have some of 1.)"""
    sizes = value.dim() == p.dim() and all(n in (1, size) for n, size in zip(value.shape, p.shape, strict=True))
    _check_tensor(what, value, p, fits=sizes or value.dim() == 0)
    if bool(_extremes(value).isnan().any()):
        raise ValueError(
            f"{what} has NaN in it: the checkpoint is damaged, or its run had diverged. Load an earlier one"
        )
    if what.startswith("step ") and not 0 <= value < math.inf:
        raise ValueError(f"{what} is {value.item()} in the checkpoint")


def _step_a_stand_in(one: Optimizer, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    """Step the first two elements of p in each of its dimensions, with those of its state, as `one` would.

    Raises:
        KeyError: the state lacks something.
        Another of WRONG: an option or a value is broken.
    """
    small = torch.nn.Parameter(torch.zeros_like(corner(p)))
    small.grad = torch.ones_like(small)
    if isinstance(one, SparseAdam):
        small.grad = small.grad.to_sparse()
    # The constructor knows the ranges of all options. (Some schedules make the lr negative.)
    known = _arguments(type(one).__init__).keys() - {"params", "lr"}
    stand_in = type(one)([small], **{name: value for name, value in group.items() if name in known})
    stand_in.param_groups[0].update({**group, "params": [small]})
    stand_in.state.clear()
    if state:
        corners = {k: corner(v).clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in state.items()}
        stand_in.state[small] = corners
    step = type(one).step
    getattr(step, "__wrapped__", step)(stand_in)  # without the hooks that see every optimizer
    for name, value in stand_in.state[small].items():
        if value is not None and name not in state:
            raise KeyError(name)
    if not bool(small.isfinite().all()):
        raise ArithmeticError("its updates are not finite")
