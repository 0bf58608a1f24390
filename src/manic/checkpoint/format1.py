"""Checkpoints of format 1, which versions before 0.2 wrote: two tensors per parameter, x = x_ref + S·Δ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manic.checkpoint.record import FORMAT, in_a_tuple
from manic.diagnostics import warn
from manic.parameters import DELTA, REF, REST, RESTS
from manic.tuner import TunerState

# The fields of mechanic_state after the four of [n].
FIELDS = (
    *("h", "scale", "delta_norm", "numel", "update_norm", "ref_sq", "skipped", "steps", "grad_norm", "keep", "fade"),
    *("outliers", "peak", "update_sq"),
)


def upgraded(state_dict: dict[str, Any], params: Mapping[Any, Tensor]) -> dict[str, Any]:
    """A state dict of format 1 as one of format 2, with a warning; any other as it is. Changes nothing in place.

    "scale_free" keeps x_ref, and "paper" Δ.

    Args:
        state_dict: of a Mechanic, or of a plain optimizer.
        params: the live parameters by their ids, with the checkpoint's values: where Δ was not stored, it comes from
            them.

    Raises:
        ValueError: it is broken.
    """
    groups, state = state_dict["param_groups"], dict(state_dict["state"])
    if format_of(groups[0]) != 1:
        return state_dict
    try:
        options = in_a_tuple(groups[0]["mechanic_options"], "")
        n, paper = len(options["betas"]), options["variant"] == "paper"
        for group in groups:
            scale = float((group if options["per_group"] else groups[0])["mechanic_state"][4 * n + 1])
            for key in [key for key in group["params"] if REF in state.get(key, {})]:
                state[key] = _kept(state[key], params[key], scale, paper=paper)
        new_groups = [upgraded_group(group) for group in groups]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"this checkpoint of format 1 is broken: {error!r}") from error
    warn(
        "this checkpoint has format 1, with two tensors per parameter: the run goes on with one, within rounding, and "
        "your next checkpoint has the new format"
    )
    return {**state_dict, "state": state, "param_groups": new_groups}


def format_of(group: Mapping[str, Any]) -> Any:
    """The format that a param group of a checkpoint says it has; None: it does not say."""
    try:
        return in_a_tuple(group["mechanic_options"], "").get("format")
    except (KeyError, TypeError, ValueError):
        return None


def upgraded_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group of format 1 as one of format 2.

    Raises:
        KeyError, ValueError: it is broken.
    """
    options = dict(in_a_tuple(group["mechanic_options"], "options are"))
    options.update(format=FORMAT, base_lr=options.pop("unit"))
    del options["store_delta"]
    n, old = len(options["betas"]), group["mechanic_state"]
    if old.shape != (4 * n + len(FIELDS),):
        raise ValueError(f"mechanic_state must have {4 * n + len(FIELDS)} elements, got {tuple(old.shape)}")
    fields = dict(zip(FIELDS, old[4 * n :], strict=True))
    zero, unknown = torch.zeros_like(fields["h"]), torch.full_like(fields["h"], -1.0)
    # Nothing is compared with the step before.
    fields.update(moved=zero, x_norm=zero, members=unknown, update_sq=unknown)
    state = torch.cat([old[: 4 * n], torch.stack([fields[name] for name in TunerState._fields[4:]])])
    return {**group, "mechanic_options": (options,), "mechanic_state": state}


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
