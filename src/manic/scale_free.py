"""The rule of ``variant="scale_free"``, the default: the same run at every base lr (docs/algorithm.md)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from manic.tuner import (
    Motion,
    Options,
    Sums,
    TunerState,
    Value,
    exp,
    growth,
    inner_product,
    largest_update,
    maximum,
    minimum,
    negated,
    over,
    sqrt,
    where,
)

# All without a unit.
START = 1e-3  # the first update moves x by this fraction of 1 + ‖x_ref‖, as DoG starts
FLOOR = 1e-6  # and none by less than this
CAUTION = 4.0  # how much the largest |h| weighs beside the sum of squares: S grows by less than 1.6 in a step
SURPRISE = 2.0  # |h| and ‖g‖ may grow so many times; no update follows an h so many times all that came before
RECORD = 0.5  # an h > 0 so large beside all of before is an overshoot, not noise: it alone draws x back
PATIENCE = 100.0  # steps after which an h > 0 that is no record is more and more taken for hovering
MEMORY = 0.25  # update j weighs as much as j to this power in Δ
REPLACED = 3.0  # a change of ‖x − x_ref‖ or ‖x‖ by more than so many updates: the weights were replaced
ROUNDING = 1e-5  # and by more than this, beside ‖x‖ and ‖x − x_ref‖


def hovering(patient: Value, share: Value) -> Value:
    """The part of the usual |h| that is tolerated where the lr falls to `share` of the highest."""
    return sqrt(patient * maximum(1 - share, 0.0))


def scale_free(old: TunerState, sums: Sums, options: Options, unit: float, lr: Value) -> tuple[TunerState, Motion]:
    """The log of S goes down the gradient h, in steps of h over its size so far: docs/algorithm.md."""
    # Weights that were replaced: all that is known of d is of no use, and x_ref takes x.
    begun = old.scale > 0
    change, same = growth(old, sums)
    x, d = sqrt(sums.x_sq), sqrt(sums.delta_sq)
    last_update = sqrt(maximum(sums.update_sq, 0.0))
    usual = REPLACED * old.scale * last_update + ROUNDING * (x + d)
    shift = abs(x - old.x_norm) - (1 - old.keep) * old.moved  # but for how far x was drawn back
    replaced = begun & same & (sums.update_sq >= 0) & (maximum(change, shift) > usual)
    d, delta_grad, delta_x, change = (
        where(replaced, 0.0, value) for value in (d, sums.delta_grad, sums.delta_x, change)
    )

    # A rising lr is a change of unit for all that was before. So in a warm-up S grows by what it sees, not by what it
    # makes up for, and has nothing to take back at the end.
    leap = maximum(over(lr, old.peak), 1.0)
    old_m, old_v, old_r, old_scale = old.m[0] * leap, old.v[0] * leap * leap, old.r[0] * leap, old.scale / leap
    delta_norm = over(d, old_scale)
    update_norm = largest_update(old.update_norm * leap, over(change, old_scale), same)
    # S starts in the step after the first update, whose size is all that it needs.
    update_norm = where(update_norm > 0, update_norm, last_update * leap)
    whole = over(1 + sqrt(old.ref_sq), update_norm)  # the scale at which an update is as large as x; 0: not known
    least = FLOOR * whole  # d would not have the digits of a smaller step
    first = START * whole
    if options.s_init is not None:
        first = where(whole > 0, maximum(least, options.s_init * unit), 0.0)

    gradient = sqrt(sums.grad_sq)
    size = where(old.grad_norm > 0, old.grad_norm, gradient)
    of_delta = sums._replace(delta_grad=over(delta_grad, old_scale), delta_x=over(delta_x, old_scale))
    h = over(inner_product(of_delta, options.s_decay, over(d, x)), size)
    seen = minimum(gradient, SURPRISE * size)
    recent = 2 / (old.steps + 2)  # means in which step j weighs about as j
    some = gradient > 0  # without a gradient there is nothing to learn from
    grad_norm = where(some, size + recent * (seen - size), size)

    counted = where(old_m > 0, minimum(abs(h), SURPRISE * old_m), abs(h))
    m, v = maximum(old_m, counted), old_v + counted * counted
    typical = where(old_r > 0, where(some, old_r + recent * (counted - old_r), old_r), counted)
    now = sqrt(v + CAUTION * m * m)
    then = sqrt(old_v + CAUTION * old_m * old_m)
    then = where(then > 0, then, now)
    surprise = over(abs(h), then)
    record = (h > 0) & (surprise >= RECORD)

    # An h that is no record is measured by all that is known. If h < 0, S rises: by less, the more the gradient exceeds
    # its mean. If h > 0, S falls: by less, the longer the run, since late in a run x mostly hovers. Where the lr falls,
    # the rule tolerates a part of the hovering: the schedule will undo it. h = 0 says nothing, and S stays.
    peak = maximum(old.peak, lr)
    share = over(lr, peak)
    patient = sqrt(over(PATIENCE, old.steps + PATIENCE))
    downhill = minimum(over(size, gradient), 1.0)
    tolerated = where(h == 0, 0.0, hovering(patient, share) * typical)
    move = over(where(h > 0, patient * counted, -downhill * counted) - tolerated, now)
    # A record is measured by what was known when the bet was made: so a bad one is cut.
    move = where(record, over(counted, then), move)
    scale = where(begun, old_scale * exp(-share * move), first)
    scale = maximum(scale, least)

    # x goes on by S·u, whatever S does; only a record draws it back.
    forget = negated(begun) | replaced
    back = where(record, minimum(over(scale, old_scale), 1.0), 1.0)
    # At the highest lr so far Δ is a mean over the past. On the way down it forgets nothing more, except what an edit,
    # such as a constraint, has taken back of d: there the gradient may point on for ever, and x cannot follow.
    fade = where(share < 1, 1.0, ((old.steps + 2) / (old.steps + 3)) ** MEMORY)
    left = where(same & (sums.left_sq > 0) & negated(replaced), sqrt(maximum(sums.left_sq, 0.0)), 0.0)
    edited = where(left > 0, minimum(over(d, left), 1.0), 1.0)
    fade = fade * edited * edited
    wild = surprise >= SURPRISE
    follow = where(wild, 0.0, scale)
    none, one = 0 * old.steps, 0 * old.steps + 1
    new = old._replace(
        m=_alone(m),
        v=_alone(v),
        r=_alone(typical),
        s=_alone(none),
        h=h,
        scale=scale,
        delta_norm=delta_norm,
        moved=d,
        x_norm=x,
        update_norm=update_norm,
        grad_norm=grad_norm,
        keep=where(forget, none, back),
        fade=fade,
        outliers=old.outliers + wild,
        peak=peak,
    )
    return new, Motion(
        x_delta=where(forget, none, back - 1),
        x_update=follow,
        slot_delta=where(forget, one, (1 - fade) * back),
        slot_update=(1 - fade) * follow,
    )


def _alone(value: Value) -> Any:
    """The value as [1]."""
    return value.view(1) if isinstance(value, Tensor) else [value]
