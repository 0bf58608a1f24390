"""The rule of ``variant="scale_free"``, the default: the same run at every base lr (docs/algorithm.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from manic.tuner import Motion, Options, Sums, TunerState, growth, inner_product, largest_update, over

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


def hovering(patient: Tensor, share: Tensor) -> Tensor:
    """The part of the usual |h| that is tolerated where the lr falls to `share` of the highest."""
    return (patient * (1 - share).clamp_min(0)).sqrt()


def scale_free(old: TunerState, sums: Sums, options: Options, unit: float, lr: Tensor) -> tuple[TunerState, Motion]:
    """The log of S goes down the gradient h, in steps of h over its size so far: docs/algorithm.md."""
    # Weights that were replaced: all that is known of d is of no use, and x_ref takes x.
    begun = old.scale > 0
    change, same = growth(old, sums)
    x, d = sums.x_sq.sqrt(), sums.delta_sq.sqrt()
    last_update = sums.update_sq.clamp_min(0).sqrt()
    usual = REPLACED * old.scale * last_update + ROUNDING * (x + d)
    shift = (x - old.x_norm).abs() - (1 - old.keep) * old.moved  # but for how far x was drawn back
    replaced = begun & same & (sums.update_sq >= 0) & (torch.maximum(change, shift) > usual)
    d, delta_grad, delta_x, change = (
        torch.where(replaced, 0, value) for value in (d, sums.delta_grad, sums.delta_x, change)
    )

    # A rising lr is a change of unit for all that was before. So in a warm-up S grows by what it sees, not by what it
    # makes up for, and has nothing to take back at the end.
    leap = over(lr, old.peak).clamp_min(1)
    old_m, old_v, old_r, old_scale = old.m[0] * leap, old.v[0] * leap.square(), old.r[0] * leap, old.scale / leap
    delta_norm = over(d, old_scale)
    update_norm = largest_update(old.update_norm * leap, over(change, old_scale), same)
    # S starts in the step after the first update, whose size is all that it needs.
    update_norm = torch.where(update_norm > 0, update_norm, last_update * leap)
    whole = over(1 + old.ref_sq.sqrt(), update_norm)  # the scale at which an update is as large as x; 0: not known
    least = FLOOR * whole  # d would not have the digits of a smaller step
    first = START * whole
    if options.s_init is not None:
        first = torch.where(whole > 0, least.clamp_min(options.s_init * unit), 0)

    gradient = sums.grad_sq.sqrt()
    size = torch.where(old.grad_norm > 0, old.grad_norm, gradient)
    of_delta = sums._replace(delta_grad=over(delta_grad, old_scale), delta_x=over(delta_x, old_scale))
    h = over(inner_product(of_delta, options.s_decay, over(d, x)), size)
    seen = torch.minimum(gradient, SURPRISE * size)
    recent = 2 / (old.steps + 2)  # means in which step j weighs about as j
    grad_norm = size + recent * (seen - size)

    counted = torch.where(old_m > 0, torch.minimum(h.abs(), SURPRISE * old_m), h.abs())
    m, v = torch.maximum(old_m, counted), old_v + counted.square()
    typical = torch.where(old_r > 0, old_r + recent * (counted - old_r), counted)
    now = (v + CAUTION * m.square()).sqrt()
    then = (old_v + CAUTION * old_m.square()).sqrt()
    then = torch.where(then > 0, then, now)
    surprise = over(h.abs(), then)
    record = (h > 0) & (surprise >= RECORD)

    # An h that is no record is measured by all that is known. If h < 0, S rises: by less, the more the gradient exceeds
    # its mean. If h > 0, S falls: by less, the longer the run, since late in a run x mostly hovers. Where the lr falls,
    # the rule tolerates a part of the hovering: the schedule will undo it.
    peak = torch.maximum(old.peak, lr)
    share = over(lr, peak)
    patient = (PATIENCE / (old.steps + PATIENCE)).sqrt()
    tolerated = hovering(patient, share) * typical
    worth = torch.where(h > 0, patient, over(size, gradient).clamp_max(1))
    move = over(worth * torch.sign(h) * counted - tolerated, now)
    # A record is measured by what was known when the bet was made: so a bad one is cut.
    move = torch.where(record, over(counted, then), move)
    scale = torch.where(begun, old_scale * (-share * move).exp(), first)
    scale = torch.maximum(scale, least)

    # x goes on by S·u, whatever S does; only a record draws it back.
    forget = ~begun | replaced
    back = torch.where(record, over(scale, old_scale).clamp_max(1), 1)
    # At the highest lr so far Δ is a mean over the past. On the way down it forgets nothing more, except what an edit,
    # such as a constraint, has taken back of d: there the gradient may point on for ever, and x cannot follow.
    fade = torch.where(share < 1, 1, ((old.steps + 2) / (old.steps + 3)) ** MEMORY)
    left = torch.where(same & (sums.left_sq > 0) & ~replaced, sums.left_sq.clamp_min(0).sqrt(), 0)
    fade = fade * torch.where(left > 0, over(d, left).clamp_max(1), 1).square()
    wild = surprise >= SURPRISE
    follow = torch.where(wild, 0, scale)
    none = torch.zeros_like(h)
    new = old._replace(
        m=m.view(1),
        v=v.view(1),
        r=typical.view(1),
        s=none.view(1),
        h=h,
        scale=scale,
        delta_norm=delta_norm,
        moved=d,
        x_norm=x,
        update_norm=update_norm,
        grad_norm=grad_norm,
        keep=torch.where(forget, none, back),
        fade=fade,
        outliers=old.outliers + wild,
        peak=peak,
    )
    return new, Motion(
        x_delta=torch.where(forget, none, back - 1),
        x_update=follow,
        slot_delta=torch.where(forget, torch.ones_like(h), (1 - fade) * back),
        slot_update=(1 - fade) * follow,
    )
