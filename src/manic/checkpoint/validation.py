"""Whether a checkpoint fits: all that is asked of one before anything is loaded."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manic.checkpoint.record import Record, is_plain, read
from manic.parameters import KEPT, REST, RESTS, SLOT, layout_of, local, shards
from manic.schedules import IN_A_GROUP, PER_GROUP
from manic.tuner import Options, TunerState

# State that torch's optimizers keep in the shape of the parameter. (Not Adafactor's and LBFGS's.)
SHAPED = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "prev", "ax", "step_size"),
}

# What torch and this package raise at a value of the wrong kind.
WRONG = (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError)


class Target(NamedTuple):
    """What a checkpoint is to be loaded into."""

    base: Optimizer
    scheduler: LRScheduler | None
    record: Record
    spread: bool  # other processes hold parameters of this model without a mark on the tensors

    @property
    def params(self) -> list[Tensor]:
        """The live parameters, in order."""
        return [p for group in self.base.param_groups for p in group["params"]]


def check(target: Target, state_dict: dict[str, Any]) -> tuple[Record, dict[str, Any] | None] | None:
    """What a checkpoint that fits says: its record and the state of its scheduler; None: it is a plain optimizer's.
    Changes nothing.

    Raises:
        ValueError: it does not fit.
    """
    try:
        state_dict = {**state_dict, "state": by_number(state_dict)}
        groups = _check_groups(target, state_dict)
        plain = not any("mechanic_state" in group for group in groups)
        saved = None if plain else _check_record(target, groups)
        _check_state(target, state_dict, None if saved is None else saved[0])
    except ValueError:
        raise
    except WRONG as error:
        raise ValueError(
            "this is no optimizer state: it must be a dict with 'state' and 'param_groups', as state_dict() returns it "
            f"(of a checkpoint with several entries, pass the optimizer's): {error!r}"
        ) from error
    return saved


def by_number(state_dict: dict[str, Any]) -> dict[Any, Any]:
    """The state by parameter. DCP leaves what is no tensor (a count of steps, say) under the number as a string."""
    state = dict(state_dict["state"])
    for key in chain.from_iterable(group["params"] for group in state_dict["param_groups"]):
        if isinstance(key, int) and str(key) in state:
            state[key] = {**state.get(key, {}), **state.pop(str(key))}
    return state


def by_id(base: Optimizer, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
    """The live parameters by the ids that they have in the checkpoint."""
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in base.param_groups)
    return dict(zip(ids, params, strict=True))


# ---------------------------------------------------------------------- param groups


def _check_groups(target: Target, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    saved, live = state_dict["param_groups"], target.base.param_groups
    sizes = [len(group["params"]) for group in saved], [len(group["params"]) for group in live]
    if len(sizes[0]) != len(sizes[1]):
        raise ValueError(f"the checkpoint has {len(sizes[0])} param groups, the optimizer has {len(sizes[1])}")
    ids = [key for group in saved for key in group["params"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the param groups of the checkpoint have a parameter twice: {ids}")
    constructor = inspect.signature(type(target.base).__init__).parameters
    for i, (theirs, ours) in enumerate(zip(*sizes, strict=True)):
        if theirs != ours:
            raise ValueError(f"param group {i} has {theirs} parameters in the checkpoint and {ours} in the optimizer")
        for name, default in target.base.defaults.items():
            # torch fills in the flags that an older version did not have; a number is another optimizer's.
            if name not in saved[i] and default is not None and not isinstance(default, bool):
                raise ValueError(f"param group {i} of the checkpoint has no {name!r}: is it that of another optimizer?")
        lost = live[i].keys() & set(IN_A_GROUP) - saved[i].keys()
        if lost and "mechanic_scheduler" in live[i].keys() & saved[i].keys():
            raise ValueError(f"param group {i} of the checkpoint has no {min(lost)!r}, which its scheduler needs")
        own = {name for name in live[i] if name.startswith("mechanic_")}
        for name in saved[i].keys() & live[i].keys() - own - {"params"}:
            value, here = saved[i][name], live[i][name]
            optional = target.base.defaults.get(name) is None or getattr(constructor.get(name), "default", 0) is None
            unset = value is None and optional and name not in IN_A_GROUP
            endless = name in IN_A_GROUP and _is_number(value) and not math.isfinite(value)
            if not unset and (endless or not _alike(value, here)):
                raise ValueError(f"{name} of param group {i} is {value!r} in the checkpoint, {here!r} here")
    return list(saved)


def _alike(value: Any, here: Any) -> bool:
    """Whether a setting of a checkpoint can take the place of the one that is here: the same kind, and no NaN."""
    if here is None:
        return True
    if isinstance(here, bool):
        return isinstance(value, bool)
    if _is_number(here):
        return _is_number(value) and not math.isnan(value)
    if isinstance(here, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(here) and all(map(_alike, value, here))
    if isinstance(here, Mapping):
        named = [key for key in here if isinstance(key, str)]
        if not isinstance(value, Mapping) or not all(key in value for key in named):
            return False
        return all(_alike(value[k], here[k]) and (value[k] == here[k] or not isinstance(here[k], str)) for k in named)
    return isinstance(value, type(here))


def _endless(value: Any, here: Any) -> bool:
    """Whether it is infinite, and what is here is not."""
    return _is_number(value) and math.isinf(value) and not (_is_number(here) and math.isinf(here))


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool and is_plain(value)
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------- the Mechanic's own


def _check_record(target: Target, groups: list[dict[str, Any]]) -> tuple[Record, dict[str, Any] | None]:
    """The checkpoint's record, of a Mechanic around the same base, with a scheduler of the same kind."""
    saved, schedule = read(groups)
    if saved.base != target.record.base:
        raise ValueError(
            f"the checkpoint is of a Mechanic around {saved.base}, this one is around {target.record.base}"
        )
    if target.scheduler is not None and schedule is not None:
        if saved.scheduler != target.record.scheduler:
            raise ValueError(
                f"the checkpoint was written with the scheduler {saved.scheduler}, this Mechanic has "
                f"{target.record.scheduler}"
            )
        _check_schedule(schedule, target.scheduler.state_dict(), type(target.scheduler).__name__)
    return saved, schedule


def _check_schedule(saved: dict[str, Any], here: dict[str, Any], name: str) -> None:
    """That its settings are of the same kinds as here."""
    for key, value in here.items():
        if key not in saved:
            if key in ("last_epoch", "base_lrs"):
                raise ValueError(f"the state of {name} has no {key!r} in the checkpoint")
            continue
        theirs, wrong = saved[key], ValueError(f"{key} of {name} is {saved[key]!r} in the checkpoint, {value!r} here")
        if not isinstance(value, list):
            if _endless(theirs, value) or not _alike(theirs, value):
                raise wrong
        elif value and (not isinstance(theirs, list | tuple) or not theirs):
            raise wrong
        elif value and isinstance(value[0], dict) and "last_epoch" in value[0]:  # schedulers in a scheduler
            if len(theirs) != len(value) or not all(isinstance(part, dict) for part in theirs):
                raise wrong
            for part, ours in zip(theirs, value, strict=True):
                _check_schedule(part, ours, f"{name}.{key}")
        else:
            # Of the lists by group there may be fewer: a group may have been added that it did not know of.
            like = value[:1] * len(theirs) if key in (*PER_GROUP, "lr_lambdas") and value else value
            if not _alike(theirs, like) or any(map(_endless, theirs, like)):
                raise wrong


# ---------------------------------------------------------------------- state


def _check_state(target: Target, state_dict: dict[str, Any], saved: Record | None) -> None:
    params, state = by_id(target.base, state_dict), state_dict["state"]
    foreign = [key for key in state if isinstance(key, int) and key not in params]
    if foreign:
        raise ValueError(f"the checkpoint has state of parameter {foreign[0]}, which is in none of its param groups")
    for key in params:
        if not isinstance(state.get(key, {}), dict):
            raise ValueError(f"the state of parameter {key} is {state[key]!r} in the checkpoint, and must be a dict")
    stepped = {key: state[key] for key in params if state.get(key)}
    for key, values in stepped.items():
        _check_kept(key, values, params[key], saved)
    if saved is not None and not saved.frozen and not target.spread:
        _check_whole(params, stepped, state_dict["param_groups"], saved.options)
    if type(target.base).__module__.startswith("torch.optim"):
        _check_base_state(target, state_dict["param_groups"], stepped, params)


def _check_kept(key: Any, values: dict[str, Any], p: Tensor, saved: Record | None) -> None:
    """That what a parameter has of ours is what the variant keeps."""
    ours: set[str] = set()
    if saved is None or not saved.frozen:
        slot = SLOT[saved.options.variant if saved is not None else "scale_free"]
        ours = {slot, REST} if p.dtype in RESTS else {slot}
    if values.keys() & set(KEPT) not in (ours, set()):
        raise ValueError(
            f"the state of parameter {key} has {sorted(values.keys() & set(KEPT))} in the checkpoint, and must have "
            f"{sorted(ours)}: was it saved with parameters of another dtype?"
        )
    for name in sorted(ours & values.keys()):
        what, value = f"{name} of parameter {key}", values[name]
        like = RESTS[p.dtype] if name == REST else None
        _check_tensor(what, value, p, floating=False if like == torch.int16 else None)
        if like == torch.int16 and not _are_int16(value):
            raise ValueError(f"{what} is {value.dtype} in the checkpoint, and must be {like}")
        _check_finite(what, value)


def _check_whole(
    params: dict[Any, Tensor], stepped: dict[Any, Any], groups: list[dict[str, Any]], options: Options
) -> None:
    """Check that every parameter of the last step has its slot: without it, it would silently begin anew."""
    counts = [TunerState.unpack(group["mechanic_state"], len(options.betas)).numel for group in groups]
    members = [group["params"] for group in groups]
    slot = SLOT[options.variant]
    if not options.per_group:
        counts, members = counts[:1], [list(chain.from_iterable(members))]
    for count, keys in zip(counts, members, strict=True):
        known = [key for key in keys if slot in stepped.get(key, {})]
        frozen = [key for key in keys if key not in known and not params[key].requires_grad]  # DCP leaves them out
        numel = sum(params[key].numel() for key in known + frozen)
        if numel < float(count) * (1 if count.dtype == torch.float64 else 1 - 1e-6):
            raise ValueError(
                f"the checkpoint is of step {int(groups[0]['mechanic_step'])}, but has no {slot!r} for "
                f"{float(count) - numel:.0f} of the {float(count):.0f} elements that had a gradient then. "
                "torch.distributed.checkpoint loads what it is asked for: ask with the Mechanic itself, "
                "dcp.load({'mechanic': mechanic}), or with get_state_dict, while no gradients are there, and not frozen"
            )


def _check_base_state(
    target: Target, groups: list[dict[str, Any]], stepped: dict[Any, Any], params: dict[Any, Tensor]
) -> None:
    """That one of torch's own optimizers finds in the state what it will look for."""
    base = target.base
    examples: dict[Any, dict[str, Any] | None] = {}
    for i, group in enumerate(groups):
        members = [key for key in group["params"] if key in stepped]
        known = {name for key in members for name in stepped[key].keys() & SHAPED}
        for key in members:
            p, values = params[key], stepped[key]
            kind = i, p.dtype, p.device, p.dim()
            if kind not in examples:
                examples[kind] = _example(base, i, group, p)
            example = examples[kind]
            if not target.record.lazy:
                example = {name: value for name, value in base.state[p].items() if name not in KEPT}
            elif example is None:
                example = dict.fromkeys(known, p)
            for name, like in example.items():
                if like is not None and name not in values:
                    raise ValueError(f"the checkpoint has no {name!r} for parameter {key}")
                _check_value(name, f"{name} of parameter {key}", values.get(name), like, p)


def _example(base: Optimizer, i: int, options: Mapping[str, Any], p: Tensor) -> dict[str, Any] | None:
    """The state that the base's first step makes for a parameter like p, by the checkpoint's options; None: it cannot
    be told, since the base wants a closure, sparse gradients, or state that is there from the start.

    Raises:
        ValueError: the options do not work.
    """
    here = base.param_groups[i]
    try:
        return _first_state(base, {**here, **options}, p)
    except WRONG as error:
        try:
            _first_state(base, here, p)
        except WRONG:
            return None
        raise ValueError(f"the options of param group {i} in the checkpoint do not work: {error}") from error


def _first_state(base: Optimizer, options: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """What two steps of a stand-in leave, with two elements in every dimension of p.

    Raises:
        ArithmeticError: they lead to what is not finite.
    """
    small = torch.nn.Parameter(local(p).detach().new_zeros((2,) * p.dim()))
    small.grad = torch.ones_like(small)
    stand_in = object.__new__(type(base))
    vars(stand_in).update({**vars(base), "param_groups": [{**options, "params": [small]}], "state": defaultdict(dict)})
    step = type(base).step
    for _ in range(2):  # the first does not use all of the options
        getattr(step, "__wrapped__", step)(stand_in)  # without the hooks that see every optimizer
    if not bool(small.isfinite().all()):
        raise ArithmeticError("its updates are not finite")
    return dict(stand_in.state[small])


def _check_value(name: str, what: str, value: Any, like: Any, p: Tensor) -> None:
    """That a value of the checkpoint is what the base keeps in its place."""
    if like is None:
        return
    if isinstance(like, Tensor) and (like.dim() > 0 or name in SHAPED):
        if like.shape in (p.shape, (2,) * p.dim()):
            _check_tensor(what, value, p)
        elif not isinstance(value, Tensor) or value.dim() != like.dim() or not is_plain(value):
            raise ValueError(f"{what} is {value!r} in the checkpoint, and must be a tensor of {like.dim()} dimensions")
        if bool(local(value).isnan().any()):
            raise ValueError(f"{what} has NaN in it: the checkpoint is damaged, or of a run that was lost")
        return
    number = isinstance(like, Tensor) or _is_number(like)
    if isinstance(like, Tensor) and isinstance(value, Tensor):
        same = (value.dim(), value.is_floating_point()) == (0, like.is_floating_point())
    else:
        same = isinstance(value, int | float | Tensor) if number else True
    if not same or not _alike(value, 0.0 if number else like) or (name == "step" and not 0 <= value < math.inf):
        raise ValueError(f"{what} is {value!r} in the checkpoint")


def _check_tensor(what: str, value: Any, p: Tensor, *, floating: bool | None = None) -> None:
    """That a value of the checkpoint can be the state of p. `floating`: whether it holds such numbers, if not as p."""
    fits = isinstance(value, Tensor) and value.shape == p.shape and is_plain(value)
    expected = p.is_complex(), p.is_floating_point() if floating is None else floating
    if not fits or (value.is_complex(), value.is_floating_point()) != expected:
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} is {got} in the checkpoint; the parameter is {tuple(p.shape)} {p.dtype}")
    if shards(layout_of(value)) != shards(layout_of(p)):
        raise ValueError(
            f"{what} is cut over {shards(layout_of(value))} processes in the checkpoint, the parameter over "
            f"{shards(layout_of(p))}: to change their number, save and load with torch.distributed.checkpoint"
        )


def _are_int16(value: Tensor) -> bool:
    """Whether int16 holds all values. Those of a sharded model are int32 in the checkpoint."""
    if value.dtype != torch.int32:
        return value.dtype == torch.int16
    mine = local(value)
    return bool(((mine >= -0x8000) & (mine <= 0x7FFF)).all())


def _check_finite(what: str, value: Tensor) -> None:
    if not bool(local(value).isfinite().all()):
        raise ValueError(f"{what} has values in the checkpoint that are not finite: it is damaged")
