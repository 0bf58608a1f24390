"""Checkpoints of older versions: format 1, with two tensors per parameter, x = x_ref + S·Δ; and format 2 with other
rules for the scale, at first with several accumulators in "scale_free", then with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manic.checkpoint.record import FORMAT, in_a_tuple
from manic.diagnostics import warn
from manic.parameters import DELTA, REF, REST, RESTS
from manic.tuner import TunerState

# The fields of mechanic_state after the four of [n]: in format 1, in format 2 at first, and then.
FORMAT_1 = (
    *("h", "scale", "delta_norm", "numel", "update_norm", "ref_sq", "skipped", "steps", "grad_norm", "keep", "fade"),
    *("outliers", "peak", "update_sq"),
)
FIRST = (
    *("h", "scale", "delta_norm", "moved", "x_norm", "members", "numel", "update_norm", "ref_sq", "skipped", "steps"),
    *("grad_norm", "keep", "fade", "outliers", "peak", "update_sq"),
)
SECOND = (*FIRST[:12], "quiet", *FIRST[12:], "left_sq")


def upgraded(state_dict: dict[str, Any], params: Mapping[Any, Tensor]) -> dict[str, Any]:
    """A state dict of an older version as one of this version, with a warning; any other as it is. Changes nothing in
    place. "scale_free" keeps x_ref, and "paper" Δ.

    Args:
        state_dict: of a Mechanic, or of a plain optimizer.
        params: the live parameters by their ids, with the checkpoint's values: where Δ was not stored, it comes from
            them.

    Raises:
        ValueError: it is broken.
    """
    groups, state = state_dict["param_groups"], dict(state_dict["state"])
    if not is_older(groups[0]):
        return state_dict
    try:
        options = in_a_tuple(groups[0]["mechanic_options"], "")
        written = options["format"]
        for group in groups if written == 1 else ():
            scale = (group if options["per_group"] else groups[0])["mechanic_state"][4 * len(options["betas"]) + 1]
            for key in [key for key in group["params"] if REF in state.get(key, {})]:
                state[key] = _kept(state[key], params[key], float(scale), paper=options["variant"] == "paper")
        new_groups = [upgraded_group(group) for group in groups]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"this checkpoint of an older version is broken: {error!r}") from error
    rule = " and a new rule for the scale" if options["variant"] == "scale_free" else ""
    warn(
        f"an older version of manic wrote this checkpoint, in format {written}: the run goes on with one tensor per "
        f"parameter{rule}, and your next checkpoint is of this version"
    )
    return {**state_dict, "state": state, "param_groups": new_groups}


def is_older(group: Mapping[str, Any]) -> bool:
    """Whether a param group of a checkpoint says that an older version wrote it."""
    try:
        return in_a_tuple(group["mechanic_options"], "")["format"] in (1, 2)
    except (KeyError, TypeError, ValueError):
        return False


def _layout(options: Mapping[str, Any], length: int) -> tuple[int, tuple[str, ...]]:
    """How many accumulators an older ``mechanic_state`` of this length has, and its other fields."""
    several = len(options["betas"])
    if options["format"] == 1:
        return several, FORMAT_1
    if length == 4 * several + len(FIRST):
        return several, FIRST
    return several if options["variant"] == "paper" else 1, SECOND


def upgraded_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group of an older version as one of this version.

    Raises:
        KeyError, ValueError: it is broken.
    """
    options, state = {"sweeps": None, **in_a_tuple(group["mechanic_options"], "options are")}, group["mechanic_state"]
    n, names = _layout(options, len(state))
    if options["format"] == 1:
        options["base_lr"] = options.pop("unit")
        del options["store_delta"]
    options["format"] = FORMAT
    if state.shape != (4 * n + len(names),):
        raise ValueError(f"mechanic_state must have {4 * n + len(names)} elements, got {tuple(state.shape)}")
    fields = dict(zip(names, state[4 * n :], strict=True))
    zero, unknown = torch.zeros_like(fields["h"]), torch.full_like(fields["h"], -1.0)
    # Where format 1 did not know it, nothing is compared with the step before.
    fields = {"moved": zero, "x_norm": zero, "members": unknown, "left_sq": unknown, **fields}
    if names is FORMAT_1:
        fields["update_sq"] = unknown
    several = state[: 4 * n].view(4, n)
    if options["variant"] == "scale_free":  # one memory: the largest |h|, and the longest sum of its squares
        several = several.amax(1, keepdim=True)
        several[2] = (several[1] / fields["steps"].clamp_min(1)).sqrt()  # for the mean of |h|
    last = torch.stack([fields[name] for name in TunerState._fields[4:]])
    return {**group, "mechanic_options": (options,), "mechanic_state": torch.cat([several.reshape(-1), last])}


def _kept(old: Mapping[str, Any], p: Tensor, scale: float, *, paper: bool) -> dict[str, Any]:
    """The slot, and the rest, of a parameter."""
    new = {name: value for name, value in old.items() if name not in (REF, DELTA)}
    ref, delta = old[REF], old.get(DELTA)
    if paper:
        recomputed = (p.detach().to(ref.dtype) - ref.to(p.device)) / scale if scale else torch.zeros_like(ref)
        new[DELTA] = recomputed if delta is None else delta
    else:
        new[REF] = ref
    if p.dtype in RESTS and delta is not None:
        x = ref + delta * scale
        stored = x.to(p.dtype)
        if p.dtype == torch.float16:
            new[REST] = (x - stored).nan_to_num(0.0, 0.0, 0.0)
        else:  # of the number that format 1 has stored, which a tie may have rounded the other way
            bits = x.abs().view(torch.int32) - stored.float().abs().view(torch.int32)
            new[REST] = bits.clamp(-0x8000, 0x7FFF).to(torch.int16)
    return new
