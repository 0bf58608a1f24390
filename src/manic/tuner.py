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
RELATIVE_START = 1e-4  # first bet of "scale_free": this fraction of 1 + ‖x_ref‖, per update


@dataclass(frozen=True)
class Options:
    """What the tuner was asked to do; travels in every checkpoint. Fields as in :class:`manic.Mechanic`."""

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
        if _number("eps", self.eps) <= 0:
            raise ValueError(f"eps must be > 0, got {self.eps!r}")


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
    r: Tensor  # [n] reward: what the bets have won so far, >= 0
    s: Tensor  # [n] the scales; Σ s multiplies Δ
    h: Tensor  # []  h of the last step that counted
    scale: Tensor  # []  S: parameters stand at x_ref + S·Δ
    delta_norm: Tensor  # []  ‖Δ‖ at the last step, over the elements that had a gradient
    numel: Tensor  # []  their number
    update_norm: Tensor  # []  U, the largest change of ‖Δ‖ in one step so far: the size of an update
    ref_sq: Tensor  # []  ‖x_ref‖²
    skipped: Tensor  # []  steps skipped because a gradient was not finite
    update_sq: Tensor  # []  ‖u‖² of the last step over this process's parameters, where Δ is recomputed

    @staticmethod
    def size(n: int) -> int:
        """Elements of the flat form for n betas."""
        return 4 * n + 8

    @staticmethod
    def unpack(flat: Tensor, n: int) -> Tuner:
        """Views of a flat [4n + 8] tensor."""
        return Tuner(*flat[: 4 * n].view(4, n), *flat[4 * n :])

    def pack(self) -> Tensor:
        """The inverse of :meth:`unpack`, as a new tensor."""
        return torch.cat([*self[:4], torch.stack(self[4:])])


def tune(old: Tuner, sums: Sums, ok: Tensor, betas: Tensor, options: Options, unit: float) -> Tuner:
    """One step of the tuner: Algorithm 1 from h_t to s_{t+1}.

    Args:
        old: the state after the last step.
        sums: the global sums at x_t.
        ok: 0-d bool. False: the sums are not finite, and the state stays, but for one more skipped step and the
            norm of the parameters that entered.
        betas: ``options.betas`` as a [n] tensor on the state's device.
        options: variant, s_decay, s_init, eps, store_delta.
        unit: the base lr that "scale_free" divides out of Δ; ``options.s_init`` is in the user's units.
    """
    n = betas.numel()
    delta_norm = torch.where(sums.delta_sq > 0, sums.delta_sq.sqrt(), old.delta_norm)
    # Two norms are compared over the same elements, or (once) to know the size of an update at all. Where Δ is
    # recomputed the first Δ is lost, S being 0 until that size is known: there ‖u‖ itself tells.
    grown = torch.maximum(old.update_norm, (delta_norm - old.delta_norm).abs())
    update_norm = torch.where((sums.numel == old.numel) | (old.update_norm == 0), grown, old.update_norm)
    update_norm = torch.where(update_norm > 0, update_norm, sums.update_sq.sqrt())
    ref_sq = old.ref_sq + torch.where(torch.isfinite(sums.entered_sq), sums.entered_sq, 0)
    start = _over(RELATIVE_START * (1 + ref_sq.sqrt()), update_norm)  # as DoG starts; 0 before the first update
    if options.variant == "paper":
        s_init = start.new_full((), options.s_init or PAPER_S_INIT)
        eps = options.eps
        decay = old.s.sum()
    else:
        s_init = start if options.s_init is None else start.new_full((), options.s_init * unit)
        eps = 0.0
        decay = _over(old.scale * delta_norm, sums.x_sq.sqrt())  # ‖x - x_ref‖ / ‖x‖

    h = sums.delta_grad + options.s_decay * decay * _over(sums.grad_sq, sums.x_sq).sqrt() * sums.delta_x
    m = torch.maximum(betas * old.m, h.abs())
    v = betas.square() * old.v + h.square()
    r = (betas * old.r - old.s * h).clamp_min(0)
    wealth = s_init / n * m + r
    s = _over(wealth, v.sqrt() + eps)

    scale = s.sum()
    if not options.store_delta:
        # x - x_ref is all that remembers Δ: a scale of 0 would lose it, and a tiny one its digits.
        scale = torch.maximum(scale, start)

    new = Tuner(m, v, r, s, h, scale, delta_norm, sums.numel, update_norm, ref_sq, old.skipped, old.update_sq)
    kept = [torch.where(ok, a, b) for a, b in zip(new, old, strict=True)]
    kept[-3:] = ref_sq, old.skipped + ~ok, old.update_sq
    return Tuner(*kept)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)
