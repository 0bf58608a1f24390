"""The data of the scalar half of Algorithm 1 (arXiv 2306.00144): options, sums, state, and what a step does with them.

All of it is 0-d and [n] tensors, n = len(Options.memories), that stay on their device. Where that is the CPU,
"scale_free" computes with Python's numbers instead, since each operation on a tensor costs the host some microseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Value = Any  # a 0-d tensor, or a Python number

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

    delta_grad: Value  # <d,g>, with the sign of the minimised objective; d = x - x_ref, or Δ in "paper"
    delta_x: Value  # <d,x>
    grad_sq: Value  # ‖g‖²
    x_sq: Value  # ‖x‖²
    delta_sq: Value  # ‖d‖²
    entered_sq: Value  # ‖x‖² of the parameters that get their slot in this step
    numel: Value  # how many elements have a gradient
    members: Value  # which parameters have one: a sum of whole numbers, one for each of them
    update_sq: Value  # ‖u‖² of the last step; < 0: it is not known
    left_sq: Value  # ‖d‖² of where the last step left x; < 0: it is not known


class TunerState(NamedTuple):
    """The state of one learned scale, float64 (float32 on devices without float64)."""

    m: Value  # [n] running maximum of |h|
    v: Value  # [n] running sum of h²
    r: Value  # [n] reward: what the bets have won so far, >= 0; "scale_free": mean |h|, later steps weighing more
    s: Value  # [n] the scales; Σ s multiplies Δ; 0 in "scale_free"
    h: Value  # []  h of the last step that counted
    scale: Value  # []  S: Δ = d/S
    delta_norm: Value  # []  ‖Δ‖ when the last step began
    moved: Value  # []  ‖d‖ when the last step began; 0 where the weights had been replaced
    x_norm: Value  # []  ‖x‖ when the last step began
    members: Value  # []  which parameters had a gradient
    numel: Value  # []  how many elements they have
    update_norm: Value  # []  U, the largest change of ‖Δ‖ in one step so far: the size of an update
    ref_sq: Value  # []  ‖x‖² of all parameters, each at its first step
    skipped: Value  # []  steps skipped because a gradient was not finite
    steps: Value  # []  steps that counted
    grad_norm: Value  # []  mean of ‖g‖ over the steps, the later ones weighing more; "scale_free"
    keep: Value  # []  what was kept of d before the last update was added: 1 in "paper"
    fade: Value  # []  and after: 1 in "paper"
    outliers: Value  # []  steps whose h was out of all proportion, so that no update followed; 0 in "paper"
    peak: Value  # []  the largest lr so far, over the base lr; "scale_free"
    update_sq: Value  # []  ‖u‖² of the last step over this process's parameters; < 0: it is not known
    left_sq: Value  # []  ‖d‖² of where that step left them; < 0: it is not known

    @staticmethod
    def size(n: int) -> int:
        """Elements of the flat form for n accumulators."""
        return 4 * n + 18

    @staticmethod
    def unpack(flat: Tensor, n: int) -> TunerState:
        """Views of a flat [4n + 18] tensor."""
        return TunerState(*flat[: 4 * n].view(4, n), *flat[4 * n :])

    @staticmethod
    def on_host(flat: Tensor) -> TunerState:
        """As ``unpack()`` for n = 1, in Python's numbers; m, v, r and s in lists."""
        numbers = flat.tolist()
        return TunerState(*[[number] for number in numbers[:4]], *numbers[4:])

    @staticmethod
    def place(name: str) -> int:
        """Where a 0-d field is in the flat form: counted from its end, whatever n is."""
        return TunerState._fields.index(name) - len(TunerState._fields)

    def pack(self) -> Tensor:
        """The inverse of ``unpack()``, as a new tensor."""
        return torch.cat([*self[:4], torch.stack(self[4:])])

    def on(self, like: Tensor) -> TunerState:
        """The inverse of ``on_host()``, in the dtype and on the device of `like`."""
        numbers = [*[values[0] for values in self[:4]], *self[4:]]
        return TunerState.unpack(torch.tensor(numbers, dtype=like.dtype, device=like.device), 1)

    def in_unit(self, factor: float) -> TunerState:
        """The same state where every update is `factor` times as large as it was; "scale_free"."""
        larger = {name: getattr(self, name) * factor for name in ("m", "r", "h", "delta_norm", "update_norm", "peak")}
        squares = {"v": self.v * factor**2, "update_sq": self.update_sq * factor**2}
        return self._replace(**larger, **squares, scale=self.scale / factor)


class Motion(NamedTuple):
    """Where a step takes x and its slot y: x += x_delta·d + x_update·u and y += slot_delta·d + slot_update·u. 0-d."""

    x_delta: Value
    x_update: Value
    slot_delta: Value
    slot_update: Value


def inner_product(sums: Sums, s_decay: float, weight: Value) -> Value:
    """h = ⟨Δ, g + λ·weight·(‖g‖/‖x‖)·x⟩, if the sums are those of Δ."""
    return sums.delta_grad + s_decay * weight * sqrt(over(sums.grad_sq, sums.x_sq)) * sums.delta_x


def growth(old: TunerState, sums: Sums) -> tuple[Value, Value]:
    """By how much ‖d‖ has changed since the last step, but for what the tuner did to d itself; and whether the same
    parameters had a gradient then, without which this is no comparison."""
    return abs(over(sqrt(sums.delta_sq), old.fade) - old.keep * old.moved), sums.members == old.members


def largest_update(update_norm: Value, change: Value, same: Value) -> Value:
    """U. A change counts where it compares like with like, or (once) to know the size of an update at all."""
    return where(same | (update_norm == 0), maximum(update_norm, change), update_norm)


# ---------------------------------------------------------------------- arithmetic, of tensors and of numbers


def over(a: Value, b: Value) -> Value:
    """a / b for b >= 0, and 0 where b is 0."""
    if isinstance(b, Tensor):
        return torch.where(b > 0, a / b, 0)
    return a / b if b > 0 else 0.0


def where(condition: Value, a: Value, b: Value) -> Value:
    """a where the condition holds, else b."""
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def maximum(a: Value, b: Value) -> Value:
    """The larger of the two; NaN if one of them is."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp_min(b)
    return a if a > b or math.isnan(a) else b


def minimum(a: Value, b: Value) -> Value:
    """The smaller of the two; NaN if one of them is."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp_max(b)
    return a if a < b or math.isnan(a) else b


def sqrt(a: Value) -> Value:
    """The square root; NaN where a < 0."""
    if isinstance(a, Tensor):
        return a.sqrt()
    return math.sqrt(a) if a >= 0 else math.nan


def exp(a: Value) -> Value:
    """e^a; infinite where it overflows."""
    if isinstance(a, Tensor):
        return a.exp()
    return math.exp(a) if not a > 709 else math.inf


def negated(a: Value) -> Value:
    """Whether a does not hold."""
    return ~a if isinstance(a, Tensor) else not a


def finite(a: Value) -> Value:
    """Whether a is a number, and not infinite."""
    return torch.isfinite(a) if isinstance(a, Tensor) else math.isfinite(a)
