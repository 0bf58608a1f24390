"""The data of the scalar half of Algorithm 1 (arXiv 2306.00144): options, sums, state, and what a step does with them.

All of it is 0-d and [n] tensors, n = len(Options.memories), that stay on their device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


@dataclass(frozen=True)
class Options:
    """What the tuner was asked to do; travels in every checkpoint. Fields as in ``manic.Mechanic``."""

    variant: str = "scale_free"
    betas: tuple[float, ...] = DEFAULT_BETAS
    s_decay: float = 0.01
    s_init: float | None = None
    eps: float = 1e-8
    per_group: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("scale_free", "paper"):
            raise ValueError(f'variant must be "scale_free" or "paper", not {self.variant!r}')
        if not isinstance(self.betas, list | tuple) or len(self.betas) == 0:
            raise ValueError(f"betas must be a non-empty tuple of numbers in [0, 1], not {self.betas!r}")
        object.__setattr__(self, "betas", tuple(_number("betas", beta) for beta in self.betas))
        if not all(0 <= beta <= 1 for beta in self.betas):
            raise ValueError(f"every beta must lie in [0, 1], got {self.betas!r}")
        if _number("s_decay", self.s_decay) < 0:
            raise ValueError(f"s_decay must be >= 0, got {self.s_decay!r}; use 0 to switch the decay off")
        if self.s_init is not None and _number("s_init", self.s_init) <= 0:
            raise ValueError(f"s_init must be > 0, got {self.s_init!r}; use None for the variant's own start")
        if not isinstance(self.per_group, bool):
            raise ValueError(f"per_group must be a bool, got {self.per_group!r}")
        if _number("eps", self.eps) <= 0:
            raise ValueError(f"eps must be > 0, got {self.eps!r}")
        for name in ("s_decay", "s_init", "eps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def memories(self) -> tuple[float, ...]:
        """The decay of each accumulator: the betas in "paper"; "scale_free" has one, which forgets nothing."""
        return self.betas if self.variant == "paper" else (1.0,)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


class Sums(NamedTuple):
    """The sums over all parameters that have a gradient, at x_t with the raw gradient g_t: 0-d tensors."""

    delta_grad: Tensor  # <d,g>, with the sign of the minimised objective; d = x - x_ref, or Δ in "paper"
    delta_x: Tensor  # <d,x>
    grad_sq: Tensor  # ‖g‖²
    x_sq: Tensor  # ‖x‖²
    delta_sq: Tensor  # ‖d‖²
    entered_sq: Tensor  # ‖x‖² of the parameters that get their slot in this step
    numel: Tensor  # how many elements have a gradient
    members: Tensor  # which parameters have one: a sum of whole numbers, one for each of them
    update_sq: Tensor  # ‖u‖² of the last step; < 0: it is not known
    left_sq: Tensor  # ‖d‖² of where the last step left x; < 0: it is not known


class TunerState(NamedTuple):
    """The state of one learned scale, float64 (float32 on devices without float64)."""

    m: Tensor  # [n] running maximum of |h|
    v: Tensor  # [n] running sum of h²
    r: Tensor  # [n] reward: what the bets have won so far, >= 0; "scale_free": mean |h|, later steps weighing more
    s: Tensor  # [n] the scales; Σ s multiplies Δ; 0 in "scale_free"
    h: Tensor  # []  h of the last step that counted
    scale: Tensor  # []  S: Δ = d/S
    delta_norm: Tensor  # []  ‖Δ‖ when the last step began
    moved: Tensor  # []  ‖d‖ when the last step began; 0 where the weights had been replaced
    x_norm: Tensor  # []  ‖x‖ when the last step began
    members: Tensor  # []  which parameters had a gradient
    numel: Tensor  # []  how many elements they have
    update_norm: Tensor  # []  U, the largest change of ‖Δ‖ in one step so far: the size of an update
    ref_sq: Tensor  # []  ‖x‖² of all parameters, each at its first step
    skipped: Tensor  # []  steps skipped because a gradient was not finite
    steps: Tensor  # []  steps that counted
    grad_norm: Tensor  # []  mean of ‖g‖ over the steps, the later ones weighing more; "scale_free"
    keep: Tensor  # []  what was kept of d before the last update was added: 1 in "paper"
    fade: Tensor  # []  and after: 1 in "paper"
    outliers: Tensor  # []  steps whose h was out of all proportion, so that no update followed; 0 in "paper"
    peak: Tensor  # []  the largest lr so far, over the base lr; "scale_free"
    update_sq: Tensor  # []  ‖u‖² of the last step over this process's parameters; < 0: it is not known
    left_sq: Tensor  # []  ‖d‖² of where that step left them; < 0: it is not known

    @staticmethod
    def size(n: int) -> int:
        """Elements of the flat form for n accumulators."""
        return 4 * n + 18

    @staticmethod
    def unpack(flat: Tensor, n: int) -> TunerState:
        """Views of a flat [4n + 18] tensor."""
        return TunerState(*flat[: 4 * n].view(4, n), *flat[4 * n :])

    def pack(self) -> Tensor:
        """The inverse of ``unpack()``, as a new tensor."""
        return torch.cat([*self[:4], torch.stack(self[4:])])


class Motion(NamedTuple):
    """Where a step takes x and its slot y: x += x_delta·d + x_update·u and y += slot_delta·d + slot_update·u. 0-d."""

    x_delta: Tensor
    x_update: Tensor
    slot_delta: Tensor
    slot_update: Tensor


def inner_product(sums: Sums, s_decay: float, weight: Tensor) -> Tensor:
    """h = ⟨Δ, g + λ·weight·(‖g‖/‖x‖)·x⟩, if the sums are those of Δ."""
    return sums.delta_grad + s_decay * weight * over(sums.grad_sq, sums.x_sq).sqrt() * sums.delta_x


def growth(old: TunerState, sums: Sums) -> tuple[Tensor, Tensor]:
    """By how much ‖d‖ has changed since the last step, but for what the tuner did to d itself; and whether the same
    parameters had a gradient then, without which this is no comparison."""
    return (over(sums.delta_sq.sqrt(), old.fade) - old.keep * old.moved).abs(), sums.members == old.members


def largest_update(update_norm: Tensor, change: Tensor, same: Tensor) -> Tensor:
    """U. A change counts where it compares like with like, or (once) to know the size of an update at all."""
    return torch.where(same | (update_norm == 0), torch.maximum(update_norm, change), update_norm)


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0)
