"""One step of the scalar half from any state, every field of it, against the same in plain Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manic.tuner import Options, Sums, Tuner, tune

N = 3
POSITIVE = st.floats(1e-6, 1e6)
ANY = POSITIVE | st.just(0.0) | POSITIVE.map(lambda x: -x)
SIZE = POSITIVE | st.just(0.0)
SEVERAL = st.lists(SIZE, min_size=N, max_size=N)
COUNT = st.integers(0, 10**6).map(float)
STATES = st.fixed_dictionaries(
    {"m": SEVERAL, "v": SEVERAL, "r": SEVERAL, "s": SEVERAL, "h": ANY, "scale": SIZE, "delta_norm": SIZE}
    | {"numel": st.sampled_from([5.0, 7.0]), "update_norm": SIZE | st.just(1.0), "ref_sq": SIZE, "skipped": COUNT}
    | {"steps": COUNT, "grad_norm": SIZE, "keep": st.floats(0.1, 1), "fade": st.floats(0.1, 1) | st.just(0.0)}
    | {"outliers": COUNT, "peak": SIZE, "update_sq": SIZE}
)
SUMS = st.fixed_dictionaries(
    {"delta_grad": ANY, "delta_x": ANY, "grad_sq": SIZE, "x_sq": SIZE, "delta_sq": SIZE, "entered_sq": SIZE}
    | {"numel": st.sampled_from([5.0, 7.0]), "update_sq": SIZE}
)
OPTIONS = st.fixed_dictionaries(
    {"variant": st.sampled_from(["paper", "scale_free"]), "s_init": st.none() | POSITIVE, "store_delta": st.booleans()}
    | {"betas": st.lists(st.floats(0, 1), min_size=N, max_size=N).map(tuple), "s_decay": st.floats(0, 1)}
    | {"eps": st.sampled_from([1e-8, 0.1])}
)


def over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def by_hand(old: dict[str, Any], sums: dict[str, float], o: dict[str, Any], unit: float, lr: float) -> dict[str, Any]:
    """The state after a step that counts."""
    # A leap of the lr: all that is in units of Δ, in the new one.
    leap = max(1.0, over(lr, old["peak"]) / 10)
    m, v, scale = [leap * x for x in old["m"]], [leap**2 * x for x in old["v"]], old["scale"] / leap
    norm_before, largest = leap * old["delta_norm"], leap * old["update_norm"]
    delta_grad, delta_x = leap * sums["delta_grad"], leap * sums["delta_x"]
    norm = leap * math.sqrt(sums["delta_sq"]) if sums["delta_sq"] else norm_before

    # The size of an update, and of x in such updates.
    if sums["numel"] == old["numel"] or largest == 0:
        largest = max(largest, abs(over(norm, old["fade"]) - old["keep"] * norm_before))
    if largest == 0:
        largest = leap * math.sqrt(sums["update_sq"])
    ref_sq = old["ref_sq"] + sums["entered_sq"]
    whole = over(1 + math.sqrt(ref_sq), largest)
    digits = 0.0 if o["store_delta"] else 1e-4 * whole

    gradient, x = math.sqrt(sums["grad_sq"]), math.sqrt(sums["x_sq"])
    new = {**old, "ref_sq": ref_sq, "numel": sums["numel"], "update_norm": largest, "steps": old["steps"] + 1}
    if o["variant"] == "paper":
        h = delta_grad + o["s_decay"] * sum(old["s"]) * over(gradient, x) * delta_x
        bet = (1e-8 if o["s_init"] is None else o["s_init"]) / N
        new["m"] = [max(beta * mi, abs(h)) for beta, mi in zip(o["betas"], m, strict=True)]
        new["v"] = [beta**2 * vi + h**2 for beta, vi in zip(o["betas"], v, strict=True)]
        new["r"] = [max(0.0, beta * ri - si * h) for beta, ri, si in zip(o["betas"], old["r"], old["s"], strict=True)]
        new["s"] = [
            (bet * mi + ri) / (math.sqrt(vi) + o["eps"])
            for mi, ri, vi in zip(new["m"], new["r"], new["v"], strict=True)
        ]
        return {**new, "h": h, "scale": max(sum(new["s"]), digits), "delta_norm": norm, "keep": 1.0, "fade": 1.0}

    first = 1e-3 * whole if o["s_init"] is None else o["s_init"] * unit
    least = max(digits, min(1e-6 * whole, first))
    size = old["grad_norm"] or gradient
    h = over(delta_grad + o["s_decay"] * over(scale * norm, x) * over(gradient, x) * delta_x, size)
    new["grad_norm"] = size + 2 / (old["steps"] + 2) * (min(gradient, 2 * size) - size)
    usual = min(abs(h), 2 * max(m)) if any(m) else abs(h)
    gain = surprise = 0.0
    for i, beta in enumerate(o["betas"]):
        then = math.sqrt(v[i] + 4 * m[i] ** 2)
        m[i], v[i] = max(beta * m[i], usual), beta**2 * v[i] + usual**2
        now = math.sqrt(v[i] + 4 * m[i] ** 2)
        gain += over(usual, now) / N
        surprise += over(abs(h), then or now) / N
    peak = max(old["peak"], lr)
    share = over(lr, peak)
    there = max((scale or first) * math.exp(share * (gain if h < 0 else -min(surprise, 3.0))), least)
    ratio = over(there, scale)
    return {
        **{**new, "m": m, "v": v, "r": [0.0] * N, "s": [0.0] * N, "h": h, "scale": there, "peak": peak},
        "delta_norm": norm / leap,
        "keep": over(min(ratio / 0.9, 1), ratio) * leap,
        "fade": 1.0 if share < 0.99 else (old["steps"] + 2) / (old["steps"] + 3),
        "outliers": old["outliers"] + (surprise >= 2),
    }


def by_torch(
    old: dict[str, Any], sums: dict[str, float], options: dict[str, Any], unit: float, lr: float, ok: bool = True
) -> dict[str, Any]:
    def tensor(value: Any) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64)

    state = Tuner(**{name: tensor(value) for name, value in old.items()})
    state = Tuner.unpack(state.pack(), N)
    totals = Sums(**{name: tensor(value) for name, value in sums.items()})
    new = tune(state, totals, torch.tensor(ok), tensor(options["betas"]), Options(**options), unit, tensor(lr))
    return {name: value.tolist() for name, value in new._asdict().items()}


def close(got: dict[str, Any], wanted: dict[str, Any], size: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12 * size), name


START = {name: [0.0] * N if name in "mvrs" else 0.0 for name in Tuner._fields}
NO_SUMS = dict.fromkeys(Sums._fields, 0.0)
PLAIN = {"variant": "scale_free", "s_init": None, "store_delta": True, "betas": (1.0,) * N, "s_decay": 0.0, "eps": 1e-8}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(STATES, SUMS, OPTIONS, POSITIVE, SIZE)
@example(START, {**NO_SUMS, "grad_sq": 4.0, "x_sq": 9.0, "entered_sq": 9.0, "numel": 5.0}, PLAIN, 1.0, 1.0)
# At the bounds: h that is just wild, an lr that just counts as the peak, a leap that is just none.
@example({**START, "m": [1.5] * N, "v": [16.0] * N}, {**NO_SUMS, "delta_grad": 10.0, "grad_sq": 1.0}, PLAIN, 1.0, 1.0)
@example({**START, "peak": 1.0, "scale": 1.0, "steps": 4.0}, {**NO_SUMS, "grad_sq": 1.0}, PLAIN, 1.0, 0.99)
# A leap where ⟨Δ,x⟩ counts, and one where only ‖u‖ tells the size of an update.
@example(
    {**START, "peak": 0.01, "scale": 2.0, "delta_norm": 3.0, "update_norm": 2.0, "keep": 1.0, "fade": 1.0},
    {**NO_SUMS, "delta_x": 2.0, "delta_sq": 9.0, "grad_sq": 4.0, "x_sq": 16.0, "delta_grad": 1.0},
    {**PLAIN, "s_decay": 0.5},
    1.0,
    1.0,
)
@example({**START, "peak": 0.01}, {**NO_SUMS, "grad_sq": 1.0, "update_sq": 9.0}, PLAIN, 1.0, 1.0)
@example({**START, "peak": 0.1, "scale": 1.0, "update_norm": 2.0}, {**NO_SUMS, "grad_sq": 1.0}, PLAIN, 1.0, 1.0)
def test_every_field(
    old: dict[str, Any], sums: dict[str, float], options: dict[str, Any], unit: float, lr: float
) -> None:
    if options["variant"] == "paper":
        old = {**old, "peak": 0.0}  # it takes no note of the lr
    wanted = by_hand(old, sums, options, unit, lr)
    got = by_torch(old, sums, options, unit, lr)
    # Differences of what is alike are as exact as that is.
    size = max(1.0, *wanted["r"], wanted["update_norm"], wanted["delta_norm"] / (old["fade"] or 1))
    close(got, wanted, size)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(STATES, SUMS, OPTIONS, POSITIVE, SIZE)
def test_a_step_that_does_not_count(
    old: dict[str, Any], sums: dict[str, float], options: dict[str, Any], unit: float, lr: float
) -> None:
    """Only the norm of what entered is taken in, if it is finite itself."""
    for entered in (sums["entered_sq"], math.inf, math.nan):
        got = by_torch(old, {**sums, "grad_sq": math.inf, "entered_sq": entered}, options, unit, lr, ok=False)
        ref_sq = old["ref_sq"] + (entered if math.isfinite(entered) else 0)
        close(got, {**old, "ref_sq": ref_sq, "skipped": old["skipped"] + 1}, 0.0)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_paper_s_squares_stay_finite(dtype: torch.dtype, sign: int) -> None:
    """h is held where its square, of which there will be many, is far from the end of the format."""
    state = Tuner.unpack(torch.zeros(Tuner.size(1), dtype=dtype), 1)
    sums = Sums(*(torch.tensor(x, dtype=dtype) for x in (sign * torch.finfo(dtype).max, 0, 1, 1, 1, 0, 5, 0)))
    one = torch.ones(1, dtype=dtype)
    new = tune(state, sums, torch.tensor(True), one, Options(variant="paper", betas=(1.0,)), 1.0, one[0])
    assert all(value.isfinite().all() for value in new)
    assert sign * new.h == pytest.approx(torch.finfo(dtype).max ** 0.4)
