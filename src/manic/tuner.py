"""The scalar half of Algorithm 1 (arXiv 2306.00144): from a few global sums to the next scale.

Everything here is a pure function of 0-d and [n] tensors, n = len(betas), and stays on their device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
PAPER_S_INIT = 1e-8

# "scale_free": all without a unit.
START = 1e-3  # the first update moves x by this fraction of 1 + ‖x_ref‖, as DoG starts
FLOOR = 1e-6  # and none by less than this
DIGITS = 1e-4  # nor by less than this where Δ is recomputed from x
CAUTION = 4.0  # how much the largest |h| weighs beside the sum of squares: S grows by less than 1.6 in a step
SURPRISE = 2.0  # |h| and ‖g‖ are remembered up to so many times the largest, or the mean, of before
FALL = 3.0  # log S falls by no more in one step
SLACK = 0.9  # a fall of S by no more than this factor in a step does not draw x back
WILD = 2.0  # an |h| so many times what all of before add up to is a wreck's, or a bad batch's: no update follows it
LEAP = 10.0  # an lr that rises by more in one step is a change of unit for all that was before it
PEAK = 0.99  # below this part of its highest so far the lr is taken to be on its way down


@dataclass(frozen=True)
class Options:
    """What the tuner was asked to do; travels in every checkpoint. Fields as in ``manic.Mechanic``."""

    variant: str = "scale_free"
    betas: tuple[float, ...] = DEFAULT_BETAS
    s_decay: float = 0.01
    s_init: float | None = None
    eps: float = 1e-8
    store_delta: bool = True
    per_group: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("scale_free", "paper"):
            raise ValueError(f'variant must be "scale_free" or "paper", not {self.variant!r}')
        if not isinstance(self.betas, Sequence) or isinstance(self.betas, str) or len(self.betas) == 0:
            raise ValueError(f"betas must be a non-empty sequence of numbers in [0, 1], not {self.betas!r}")
        object.__setattr__(self, "betas", tuple(_number("betas", beta) for beta in self.betas))
        if not all(0 <= beta <= 1 for beta in self.betas):
            raise ValueError(f"every beta must lie in [0, 1], got {self.betas!r}")
        if _number("s_decay", self.s_decay) < 0:
            raise ValueError(f"s_decay must be >= 0, got {self.s_decay!r}; use 0 to switch the decay off")
        if self.s_init is not None and _number("s_init", self.s_init) <= 0:
            raise ValueError(f"s_init must be > 0, got {self.s_init!r}; use None for the variant's own start")
        for name in ("store_delta", "per_group"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if _number("eps", self.eps) <= 0:
            raise ValueError(f"eps must be > 0, got {self.eps!r}")
        for name in ("s_decay", "s_init", "eps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


class Sums(NamedTuple):
    """The sums over all elements that one step needs, at x_t with the raw gradient g_t: 0-d tensors."""

    delta_grad: Tensor  # <Δ_t, g_t>, with the sign of the minimised objective
    delta_x: Tensor  # <Δ_t, x_t>
    grad_sq: Tensor  # ‖g_t‖²
    x_sq: Tensor  # ‖x_t‖²
    delta_sq: Tensor  # ‖Δ_t‖²
    entered_sq: Tensor  # ‖x_t‖² of the parameters that get their x_ref in this step
    numel: Tensor  # how many elements have a gradient
    update_sq: Tensor  # ‖u_{t-1}‖², where Δ is recomputed; else 0


class Tuner(NamedTuple):
    """The state of one learned scale, float64 (float32 on devices without float64)."""

    m: Tensor  # [n] running maximum of |h|
    v: Tensor  # [n] running sum of h²
    r: Tensor  # [n] reward: what the bets have won so far, >= 0; 0 in "scale_free"
    s: Tensor  # [n] the scales; Σ s multiplies Δ; 0 in "scale_free"
    h: Tensor  # []  h of the last step that counted
    scale: Tensor  # []  S: parameters stand at x_ref + S·Δ
    delta_norm: Tensor  # []  ‖Δ‖ at the last step, over the elements that had a gradient
    numel: Tensor  # []  their number
    update_norm: Tensor  # []  U, the largest change of ‖Δ‖ in one step so far: the size of an update
    ref_sq: Tensor  # []  ‖x_ref‖²
    skipped: Tensor  # []  steps skipped because a gradient was not finite
    steps: Tensor  # []  steps that counted
    grad_norm: Tensor  # []  mean of ‖g‖ over the steps, the later ones weighing more; "scale_free"
    keep: Tensor  # []  what was kept of Δ before the last update was added: 1 in "paper"
    fade: Tensor  # []  and after: 1 in "paper"
    outliers: Tensor  # []  steps whose h was out of all proportion, so that no update followed; 0 in "paper"
    peak: Tensor  # []  the largest lr so far, over the base lr; "scale_free"
    update_sq: Tensor  # []  ‖u‖² of the last step over this process's parameters, where Δ is recomputed

    @staticmethod
    def size(n: int) -> int:
        """Elements of the flat form for n betas."""
        return 4 * n + 14

    @staticmethod
    def unpack(flat: Tensor, n: int) -> Tuner:
        """Views of a flat [4n + 14] tensor."""
        return Tuner(*flat[: 4 * n].view(4, n), *flat[4 * n :])

    def pack(self) -> Tensor:
        """The inverse of ``unpack()``, as a new tensor."""
        return torch.cat([*self[:4], torch.stack(self[4:])])


def tune(old: Tuner, sums: Sums, ok: Tensor, betas: Tensor, options: Options, unit: float, lr: Tensor) -> Tuner:
    """One step of the tuner: Algorithm 1 from h_t to s_{t+1}.

    Args:
        old: the state after the last step.
        sums: the global sums at x_t.
        ok: 0-d bool. False: the sums are not finite, and the state stays, but for one more skipped step and the
            norm of the parameters that entered.
        betas: ``options.betas`` as a [n] tensor on the state's device.
        options: variant, s_decay, s_init, eps, store_delta.
        unit: the base lr that "scale_free" divides out of Δ; ``options.s_init`` is in the user's units.
        lr: 0-d, the lr of this step over the base lr.
    """
    was, old, sums, leap = old, *_in_new_units(old, sums, lr)
    delta_norm = torch.where(sums.delta_sq > 0, sums.delta_sq.sqrt(), old.delta_norm)
    # ‖u‖ is at least this. Two norms are compared over the same elements, or (once) to know the size of an update at
    # all. Where Δ is recomputed the first Δ is lost, S being 0 until that size is known: there ‖u‖ itself tells.
    change = (_over(delta_norm, old.fade) - old.keep * old.delta_norm).abs()
    grown = torch.maximum(old.update_norm, change)
    update_norm = torch.where((sums.numel == old.numel) | (old.update_norm == 0), grown, old.update_norm)
    update_norm = torch.where(update_norm > 0, update_norm, sums.update_sq.sqrt())
    ref_sq = old.ref_sq + torch.where(torch.isfinite(sums.entered_sq), sums.entered_sq, 0)
    whole = _over(1 + ref_sq.sqrt(), update_norm)  # the scale at which an update is as large as x; 0 before the first

    # x - x_ref is all that remembers a recomputed Δ: a scale of 0 would lose it, and a tiny one its digits.
    least = torch.zeros_like(whole) if options.store_delta else DIGITS * whole

    if options.variant == "paper":
        new = _paper(old, sums, betas, options)
        new = new._replace(scale=torch.maximum(new.scale, least))
    else:
        first = START * whole if options.s_init is None else whole.new_full((), options.s_init * unit)
        least = torch.maximum(least, torch.minimum(FLOOR * whole, first))
        new = _scale_free(old, sums, betas, options, first, least, delta_norm, lr)
    new = new._replace(delta_norm=delta_norm / leap, keep=new.keep * leap)  # Δ is still to be brought to the new unit
    new = new._replace(numel=sums.numel, update_norm=update_norm, steps=old.steps + 1)
    kept = Tuner(*(torch.where(ok, a, b) for a, b in zip(new, was, strict=True)))
    return kept._replace(ref_sq=ref_sq, skipped=old.skipped + ~ok)


def _in_new_units(old: Tuner, sums: Sums, lr: Tensor) -> tuple[Tuner, Sums, Tensor]:
    """State and sums as if Δ had been larger and S smaller by the factor that is returned: 1, unless the lr leaps.

    A warm-up may begin at 1e-8 of the lr. An S that suits such updates is 1e8 times too large for those that follow.
    """
    leap = (_over(lr, old.peak) / LEAP).clamp_min(1)
    old = old._replace(
        m=old.m * leap,
        v=old.v * leap.square(),
        scale=old.scale / leap,
        delta_norm=old.delta_norm * leap,
        update_norm=old.update_norm * leap,
    )
    sums = sums._replace(
        delta_grad=sums.delta_grad * leap,
        delta_x=sums.delta_x * leap,
        delta_sq=sums.delta_sq * leap.square(),
        update_sq=sums.update_sq * leap.square(),
    )
    return old, sums, leap


def _h(sums: Sums, s_decay: float, weight: Tensor) -> Tensor:
    """⟨Δ, g + λ·weight·(‖g‖/‖x‖)·x⟩"""
    return sums.delta_grad + s_decay * weight * _over(sums.grad_sq, sums.x_sq).sqrt() * sums.delta_x


def _paper(old: Tuner, sums: Sums, betas: Tensor, options: Options) -> Tuner:
    """Algorithm 1."""
    largest = torch.finfo(betas.dtype).max ** 0.4  # so that the sum of squares stays finite while a run diverges
    h = _h(sums, options.s_decay, old.s.sum()).clamp(-largest, largest)
    m = torch.maximum(betas * old.m, h.abs())
    v = betas.square() * old.v + h.square()
    r = (betas * old.r - old.s * h).clamp_min(0)
    wealth = (options.s_init or PAPER_S_INIT) / betas.numel() * m + r
    s = _over(wealth, v.sqrt() + options.eps)
    one = torch.ones_like(h)
    return old._replace(m=m, v=v, r=r, s=s, h=h, scale=s.sum(), keep=one, fade=one)


def _scale_free(
    old: Tuner,
    sums: Sums,
    betas: Tensor,
    options: Options,
    first: Tensor,
    least: Tensor,
    delta_norm: Tensor,
    lr: Tensor,
) -> Tuner:
    """The log of S goes down the gradient h, in steps of h over its size so far: docs/algorithm.md.

    `first`, `least`: where S starts, and what it does not fall below.
    """
    gradient = sums.grad_sq.sqrt()
    size = torch.where(old.grad_norm > 0, old.grad_norm, gradient)
    moved = _over(old.scale * delta_norm, sums.x_sq.sqrt())  # ‖x - x_ref‖ / ‖x‖
    h = _over(_h(sums, options.s_decay, moved), size)
    grad_norm = size + 2 / (old.steps + 2) * (torch.minimum(gradient, SURPRISE * size) - size)

    top = old.m.max()
    usual = torch.where(top > 0, torch.minimum(h.abs(), SURPRISE * top), h.abs())
    m = torch.maximum(betas * old.m, usual)
    v = betas.square() * old.v + usual.square()
    # A gain is measured by all that is known, a loss by what was known when the bet was made: so a bad one is cut.
    now = (v + CAUTION * m.square()).sqrt()
    then = (old.v + CAUTION * old.m.square()).sqrt()
    gain = _over(usual, now).mean()
    surprise = _over(h.abs(), torch.where(then > 0, then, now)).mean()

    # A schedule on its way down is to be followed, not made up for: S moves less, and Δ forgets nothing more.
    peak = torch.maximum(old.peak, lr)
    share = _over(lr, peak)
    scale = torch.where(old.scale > 0, old.scale, first)
    scale = scale * (share * torch.where(h < 0, gain, -surprise.clamp_max(FALL))).exp()
    scale = torch.maximum(scale, least)

    # A rise of S is for updates to come, and so is a gentle fall: x goes on by S·u. A steep fall draws x back.
    ratio = _over(scale, old.scale)
    keep = _over((ratio / SLACK).clamp_max(1), ratio)
    outliers = old.outliers + (surprise >= WILD)
    # At the peak Δ is a mean over the past, in which step t weighs as much as t.
    fade = torch.where(share < PEAK, 1, (old.steps + 2) / (old.steps + 3))
    zero = torch.zeros_like(old.m)
    return old._replace(
        m=m,
        v=v,
        r=zero,
        s=zero,
        h=h,
        scale=scale,
        grad_norm=grad_norm,
        keep=keep,
        fade=fade,
        outliers=outliers,
        peak=peak,
    )


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0)
