"""The rule of ``variant="scale_free"``, the default: the same run at every base lr (docs/algorithm.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from manic.tuner import Motion, Options, Sums, TunerState, growth, inner_product, largest_update, over

# All without a unit.
START = 1e-3  # the first update moves x by this fraction of 1 + ‖x_ref‖, as DoG starts
FLOOR = 1e-6  # and none by less than this
CAUTION = 4.0  # how much the largest |h| weighs beside the sum of squares: S grows by less than 1.6 in a step
SURPRISE = 2.0  # |h| and ‖g‖ are remembered up to so many times the largest, or the mean, of before
FALL = 3.0  # log S falls by no more in one step
SLACK = 0.9  # a fall of S by no more than this factor in a step does not draw x back
WILD = 2.0  # an |h| so many times what all of before add up to is a wreck's, or a bad batch's: no update follows it
LEAP = 10.0  # an lr that rises by more in one step is a change of unit for all that was before it
PEAK = 0.99  # below this part of its highest so far the lr is taken to be on its way down
REPLACED = 3.0  # a change of ‖x − x_ref‖ or ‖x‖ by more than so many updates: the weights were replaced
ROUNDING = 1e-5  # and by more than this, beside ‖x‖ and ‖x − x_ref‖


def scale_free(
    old: TunerState, sums: Sums, betas: Tensor, options: Options, unit: float, lr: Tensor
) -> tuple[TunerState, Motion]:
    """The log of S goes down the gradient h, in steps of h over its size so far: docs/algorithm.md."""
    # Weights that were replaced: all that is known of d is of no use, and x_ref takes x.
    begun = old.scale > 0
    change, same = growth(old, sums)
    x, d = sums.x_sq.sqrt(), sums.delta_sq.sqrt()
    last_update = sums.update_sq.clamp_min(0).sqrt()
    usual = REPLACED * old.scale * last_update + ROUNDING * (x + d)
    shift = (x - old.x_norm).abs() - (1 - old.keep) * old.moved  # but for how far x was drawn back
    replaced = begun & same & (sums.update_sq >= 0) & (torch.maximum(change, shift) > usual)
    d, delta_grad, delta_x = (torch.where(replaced, 0, value) for value in (d, sums.delta_grad, sums.delta_x))

    # Where the lr leaps all of before is taken to a larger unit, as if updates had been larger and S smaller. A warm-up
    # may begin at 1e-8 of the lr. An S that suits such updates is 1e8 times too large for those that follow.
    leap = (over(lr, old.peak) / LEAP).clamp_min(1)
    old_m, old_v, old_scale = old.m * leap, old.v * leap.square(), old.scale / leap
    delta_norm = over(d, old_scale)
    change = torch.where(replaced, 0, change)
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
    grad_norm = size + 2 / (old.steps + 2) * (torch.minimum(gradient, SURPRISE * size) - size)

    top = old_m.max()
    counted = torch.where(top > 0, torch.minimum(h.abs(), SURPRISE * top), h.abs())
    m = torch.maximum(betas * old_m, counted)
    v = betas.square() * old_v + counted.square()
    # A gain is measured by all that is known, a loss by what was known when the bet was made: so a bad one is cut.
    now = (v + CAUTION * m.square()).sqrt()
    then = (old_v + CAUTION * old_m.square()).sqrt()
    gain = over(counted, now).mean()
    surprise = over(h.abs(), torch.where(then > 0, then, now)).mean()

    # A schedule on its way down is to be followed, not made up for: S moves less, and Δ forgets nothing more.
    peak = torch.maximum(old.peak, lr)
    share = over(lr, peak)
    scale = torch.where(begun, old_scale, first)
    scale = scale * (share * torch.where(h < 0, gain, -surprise.clamp_max(FALL))).exp()
    scale = torch.maximum(scale, least)

    # A rise of S is for updates to come, and so is a gentle fall: x goes on by S·u. A steep fall draws x back.
    forget = ~begun | replaced
    back = (over(scale, old_scale) / SLACK).clamp_max(1)
    # At the peak Δ is a mean over the past, in which step t weighs as much as t.
    fade = torch.where(share < PEAK, 1, (old.steps + 2) / (old.steps + 3))
    wild = surprise >= WILD
    follow = torch.where(wild, 0, scale)
    zero, none = torch.zeros_like(old.m), torch.zeros_like(h)
    new = old._replace(
        m=m,
        v=v,
        r=zero,
        s=zero,
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
