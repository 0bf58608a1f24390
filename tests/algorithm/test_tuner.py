"""One step of the scalar half from any state, every field of it, against the same in plain Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manic.algorithm import tune
from manic.tuner import Motion, Options, Sums, TunerState

N = 3
POSITIVE = st.floats(1e-6, 1e6)
ANY = POSITIVE | st.just(0.0) | POSITIVE.map(lambda x: -x)
SIZE = POSITIVE | st.just(0.0)
SEVERAL = st.lists(SIZE, min_size=N, max_size=N)
COUNT = st.integers(0, 10**6).map(float)
MEMBERS = st.sampled_from([3.0, 11.0])
STATES = st.fixed_dictionaries(
    {"m": SEVERAL, "v": SEVERAL, "r": SEVERAL, "s": SEVERAL, "h": ANY, "scale": SIZE, "delta_norm": SIZE}
    | {"moved": SIZE, "x_norm": SIZE, "members": MEMBERS, "numel": st.sampled_from([5.0, 7.0])}
    | {"update_norm": SIZE | st.just(1.0)}
    | {
        "ref_sq": SIZE,
        "skipped": COUNT,
        "steps": COUNT,
        "grad_norm": SIZE,
        "keep": st.floats(0.1, 1) | st.just(0.0),
    }
    | {"fade": st.floats(0.1, 1) | st.just(0.0), "outliers": COUNT, "peak": SIZE}
    | {"update_sq": SIZE | st.just(-1.0), "left_sq": SIZE | st.just(-1.0)}
)
SUMS = st.fixed_dictionaries(
    {"delta_grad": ANY, "delta_x": ANY, "grad_sq": SIZE, "x_sq": SIZE, "delta_sq": SIZE, "entered_sq": SIZE}
    | {"numel": st.sampled_from([5.0, 7.0]), "members": MEMBERS, "update_sq": SIZE | st.just(-1.0)}
    | {"left_sq": SIZE | st.just(-1.0)}
)
OPTIONS = st.fixed_dictionaries(
    {"variant": st.sampled_from(["paper", "scale_free"]), "s_init": st.none() | POSITIVE}
    | {"betas": st.lists(st.floats(0, 1), min_size=N, max_size=N).map(tuple), "s_decay": st.floats(0, 1)}
    | {"eps": st.sampled_from([1e-8, 0.1])}
)
State = dict[str, Any]


def over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def by_hand(
    old: State, sums: dict[str, float], o: dict[str, Any], unit: float, lr: float
) -> tuple[State, dict[str, float]]:
    """The state after a step that counts, and the motion of x and of the slot."""
    new = {**old, "ref_sq": old["ref_sq"] + sums["entered_sq"], "steps": old["steps"] + 1}
    new |= {"numel": sums["numel"], "members": sums["members"]}
    return (paper if o["variant"] == "paper" else scale_free)(old, new, sums, o, unit, lr)


def paper(
    old: State, new: State, sums: dict[str, float], o: dict[str, Any], unit: float, lr: float
) -> tuple[State, dict[str, float]]:
    """Algorithm 1. The slot is Δ. Neither the unit nor the lr counts."""
    norm, gradient, x = math.sqrt(sums["delta_sq"]), math.sqrt(sums["grad_sq"]), math.sqrt(sums["x_sq"])
    if sums["members"] == old["members"] or old["update_norm"] == 0:
        new["update_norm"] = max(old["update_norm"], abs(norm - old["moved"]))
    h = sums["delta_grad"] + o["s_decay"] * sum(old["s"]) * over(gradient, x) * sums["delta_x"]
    bet = (1e-8 if o["s_init"] is None else o["s_init"]) / N
    new["x_norm"] = x
    m = [max(beta * mi, abs(h)) for beta, mi in zip(o["betas"], old["m"], strict=True)]
    v = [beta**2 * vi + h**2 for beta, vi in zip(o["betas"], old["v"], strict=True)]
    r = [max(0.0, beta * ri - si * h) for beta, ri, si in zip(o["betas"], old["r"], old["s"], strict=True)]
    s = [(bet * mi + ri) / (math.sqrt(vi) + o["eps"]) for mi, ri, vi in zip(m, r, v, strict=True)]
    new |= {"m": m, "v": v, "r": r, "s": s, "h": h, "scale": sum(s), "delta_norm": norm, "moved": norm}
    motion = {"x_delta": sum(s) - old["scale"], "x_update": sum(s), "slot_delta": 0.0, "slot_update": 1.0}
    return {**new, "keep": 1.0, "fade": 1.0}, motion


def scale_free(
    old: State, new: State, sums: dict[str, float], o: dict[str, Any], unit: float, lr: float
) -> tuple[State, dict[str, float]]:
    """The slot is x_ref, and d = x - x_ref is what x has been moved."""
    gradient, x, moved = math.sqrt(sums["grad_sq"]), math.sqrt(sums["x_sq"]), math.sqrt(sums["delta_sq"])
    delta_grad, delta_x = sums["delta_grad"], sums["delta_x"]

    # Weights that were replaced have moved further than updates move them. Nothing of d counts then.
    same = sums["members"] == old["members"]
    growth = abs(over(moved, old["fade"]) - old["keep"] * old["moved"])
    replaced = False
    if same and old["scale"] > 0 and sums["update_sq"] >= 0:
        shift = abs(x - old["x_norm"]) - (1 - old["keep"]) * old["moved"]
        replaced = max(growth, shift) > 3 * old["scale"] * math.sqrt(sums["update_sq"]) + 1e-5 * (x + moved)
    new["x_norm"] = x
    # What an edit has taken back of d counts in Δ no more.
    left = math.sqrt(max(sums["left_sq"], 0.0))
    rest = min(1.0, moved / left) if left and same and not replaced else 1.0
    if replaced:
        delta_grad = delta_x = moved = 0.0

    # A higher lr: all that is in units of Δ, in the new one. d has no unit.
    leap = max(1.0, over(lr, old["peak"]))
    m, v, typical = leap * old["m"][0], leap**2 * old["v"][0], leap * old["r"][0]
    scale = old["scale"] / leap
    last = leap * math.sqrt(max(sums["update_sq"], 0.0))
    delta_grad, delta_x = over(delta_grad, scale), over(delta_x, scale)

    # The size of an update, and of x in such updates.
    largest = leap * old["update_norm"]
    if (same or largest == 0) and not replaced:
        largest = max(largest, over(growth, scale))
    largest = largest or last
    whole = over(1 + math.sqrt(new["ref_sq"]), largest)

    least = 1e-6 * whole
    first = 1e-3 * whole if o["s_init"] is None or not whole else max(o["s_init"] * unit, least)
    size = old["grad_norm"] or gradient
    h = over(delta_grad + o["s_decay"] * over(moved, x) * over(gradient, x) * delta_x, size)
    seen = min(gradient, 2 * size)
    recent = 2 / (old["steps"] + 2) if gradient > 0 else 0.0
    new["grad_norm"] = size + recent * (seen - size)
    usual = min(abs(h), 2 * m) if m else abs(h)
    then = math.sqrt(v + 4 * m**2)
    m, v = max(m, usual), v + usual**2
    typical = typical + recent * (usual - typical) if typical else usual
    now = math.sqrt(v + 4 * m**2)
    surprise = over(abs(h), then or now)
    record = h > 0 and surprise >= 0.5

    # Where the schedule goes down, a part of what is usual is tolerated.
    peak = max(old["peak"], lr)
    share = over(lr, peak)
    patience = math.sqrt(100 / (old["steps"] + 100))
    fall = patience * usual if h > 0 else -min(over(size, gradient), 1.0) * usual
    fall = over(fall - math.sqrt(patience * (1 - share)) * typical, now) if h else 0.0
    if record:
        fall = over(usual, then or now)
    there = max(scale * math.exp(-share * fall) if scale > 0 else first, least)

    # x follows the update. A record draws it back along d, by as much as S falls.
    outlier = surprise >= 2
    follow = 0.0 if outlier else there
    forget = scale == 0 or replaced
    keep = 0.0 if forget else min(there / scale, 1.0) if record else 1.0
    fade = rest**2 * (1.0 if share < 1 else ((old["steps"] + 2) / (old["steps"] + 3)) ** 0.25)
    new |= {"m": [m], "v": [v], "r": [typical], "s": [0.0], "h": h, "scale": there, "peak": peak}
    new |= {"delta_norm": over(moved, scale), "moved": moved, "update_norm": largest, "keep": keep, "fade": fade}
    new["outliers"] = old["outliers"] + outlier
    motion = {"x_delta": 0.0 if forget else keep - 1, "x_update": follow}
    motion["slot_delta"] = 1.0 if forget else (1 - fade) * keep
    motion["slot_update"] = (1 - fade) * follow
    return new, motion


Step = tuple[State, dict[str, float]]


def by_both(old: State, sums: dict[str, float], options: dict[str, Any], unit: float, lr: float) -> list[Step]:
    """In tensors, and where the host computes in Python's numbers, in these."""
    numbers = (False, True) if options["variant"] == "scale_free" else (False,)
    return [by_torch(old, sums, options, unit, lr, numbers=one) for one in numbers]


def by_torch(
    old: State,
    sums: dict[str, float],
    options: dict[str, Any],
    unit: float,
    lr: float,
    ok: bool = True,
    numbers: bool = False,
) -> Step:
    def tensor(value: Any) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64)

    state = TunerState(**{name: tensor(value) for name, value in old.items()})
    state = TunerState.unpack(state.pack(), len(Options(**options).memories))
    betas = tensor(options["betas"])
    if numbers:
        state = TunerState.on_host(state.pack())
        found, factors = tune(state, Sums(**sums), ok, betas, Options(**options), unit, lr)
        new, motion = found.on(betas), Motion(*map(tensor, factors))
    else:
        totals = Sums(**{name: tensor(value) for name, value in sums.items()})
        new, motion = tune(state, totals, torch.tensor(ok), betas, Options(**options), unit, tensor(lr))
    assert {tuple(value.shape) for value in motion} == {()}
    return tuple({name: value.tolist() for name, value in found._asdict().items()} for found in (new, motion))


def fitted(old: State, options: dict[str, Any]) -> State:
    """Without the accumulators that a variant does not have."""
    n = len(Options(**options).memories)
    return {name: value[:n] if name in "mvrs" else value for name, value in old.items()}


def close(got: State, wanted: State, size: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12 * size), name


START = {name: [0.0] * N if name in "mvrs" else 0.0 for name in TunerState._fields}
NO_SUMS = dict.fromkeys(Sums._fields, 0.0)
STILL = dict.fromkeys(Motion._fields, 0.0)
PLAIN: dict[str, Any] = {"variant": "scale_free", "s_init": None, "betas": (1.0,) * N, "s_decay": 0.0, "eps": 1e-8}
# S is 1, an update was 1, x was moved by 3, and the same parameters have a gradient.
UNDER_WAY: State = {**START, "scale": 1.0, "moved": 3.0, "x_norm": 2.0, "keep": 1.0, "fade": 1.0, "update_norm": 1.0}
UNDER_WAY |= {"grad_norm": 1.0, "peak": 1.0, "members": 3.0, "numel": 5.0, "m": [1.0] * N, "v": [4.0] * N}
UNDER_WAY |= {"steps": 4.0, "r": [0.5] * N}
ONE_STEP = {**NO_SUMS, "grad_sq": 1.0, "x_sq": 4.0, "delta_grad": 0.25, "delta_x": 0.5, "update_sq": 1.0}
ONE_STEP |= {"members": 3.0, "numel": 5.0}


def beyond(limit: float) -> dict[str, float]:
    """Sums with an x that is as far from x_ref as UNDER_WAY, and the bound of what counts as replaced, allow: d² where
    D - 3 is `limit` times 3 + 1e-5·(2 + D)."""
    d = (3 + limit * (3 + 2e-5)) / (1 - limit * 1e-5)
    return {**ONE_STEP, "delta_sq": d**2}


def test_the_fields() -> None:
    """The order is that of what is stored, and of what the sweeps fill in."""
    scalars = "h scale delta_norm moved x_norm members numel update_norm ref_sq skipped steps grad_norm keep fade"
    assert TunerState._fields == (*"mvrs", *scalars.split(), "outliers", "peak", "update_sq", "left_sq")
    assert Sums._fields == (
        *("delta_grad", "delta_x", "grad_sq", "x_sq", "delta_sq", "entered_sq", "numel", "members", "update_sq"),
        "left_sq",
    )
    assert Motion._fields == ("x_delta", "x_update", "slot_delta", "slot_update")
    assert TunerState.size(N) == 4 * N + 18 == sum(len(value) if name in "mvrs" else 1 for name, value in START.items())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(STATES, SUMS, OPTIONS, POSITIVE, SIZE)
@example(START, {**NO_SUMS, "grad_sq": 4.0, "x_sq": 9.0, "entered_sq": 9.0, "numel": 5.0}, PLAIN, 1.0, 1.0)
# At the bounds: h that is just wild, h that is just a record.
@example({**UNDER_WAY, "m": [1.5] * N, "v": [16.0] * N}, {**ONE_STEP, "delta_grad": 10.0}, PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "m": [1.5] * N, "v": [16.0] * N}, {**ONE_STEP, "delta_grad": 2.5}, PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "m": [1.5] * N, "v": [16.0] * N}, {**ONE_STEP, "delta_grad": 2.4}, PLAIN, 1.0, 1.0)
# Below the highest lr so far: as much of hovering is tolerated as is usual, by the mean of |h|.
@example(UNDER_WAY, {**ONE_STEP, "delta_grad": 0.5}, PLAIN, 1.0, 0.25)
@example({**UNDER_WAY, "r": [0.0] * N}, {**ONE_STEP, "delta_grad": 0.5}, PLAIN, 1.0, 0.25)
@example(UNDER_WAY, {**ONE_STEP, "delta_grad": -0.5}, PLAIN, 1.0, 0.0)
# Less of it late in a run. A gradient above the mean makes a rise smaller.
@example({**UNDER_WAY, "steps": 1e4}, {**ONE_STEP, "delta_grad": 0.5}, PLAIN, 1.0, 0.25)
@example(UNDER_WAY, {**ONE_STEP, "delta_grad": -0.5, "grad_sq": 9.0}, PLAIN, 1.0, 1.0)
# An lr that rises, where ⟨Δ,x⟩ counts.
@example({**UNDER_WAY, "peak": 0.1}, ONE_STEP, PLAIN, 1.0, 1.0)
@example(
    {**START, "peak": 0.01, "scale": 2.0, "moved": 6.0, "update_norm": 2.0, "keep": 1.0, "fade": 1.0},
    {**NO_SUMS, "delta_x": 2.0, "delta_sq": 9.0, "grad_sq": 4.0, "x_sq": 16.0, "delta_grad": 1.0},
    {**PLAIN, "s_decay": 0.5},
    1.0,
    1.0,
)
# S is 0, and d is an edit. With an lr that rises, and with an S that was asked for.
@example({**START, "fade": 2 / 3, "steps": 1.0, "peak": 1.0, "members": 3.0}, beyond(0.5), PLAIN, 1.0, 1.0)
@example({**START, "fade": 2 / 3, "steps": 1.0, "peak": 0.01, "members": 3.0}, beyond(9.0), PLAIN, 1.0, 1.0)
@example({**START, "fade": 1.0, "steps": 1.0, "members": 11.0}, beyond(1.0), {**PLAIN, "s_init": 0.1}, 0.5, 0.0)
@example({**START, "fade": 2 / 3, "steps": 1.0, "members": 3.0}, beyond(0.5), {**PLAIN, "s_decay": 0.5}, 1.0, 1.0)
# An edit that took a third of d back, one of other parameters, and one of unknown size; at the highest lr, and below.
@example(UNDER_WAY, {**beyond(0.5), "left_sq": 81.0}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(0.5), "left_sq": 81.0}, PLAIN, 1.0, 0.5)
@example(UNDER_WAY, {**beyond(0.5), "left_sq": 81.0, "members": 11.0}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(0.5), "left_sq": -1.0}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(1.5), "left_sq": 81.0}, PLAIN, 1.0, 1.0)
# Weights that were just replaced, and weights that were just not: with x and d, and without, where all is exact.
@example(UNDER_WAY, beyond(1 - 1e-12), PLAIN, 1.0, 1.0)
@example(UNDER_WAY, beyond(1 + 1e-12), PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**ONE_STEP, "x_sq": 0.0}, PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "moved": math.nextafter(3.0, 4.0)}, {**ONE_STEP, "x_sq": 0.0}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(0.0), "update_sq": 0.0}, {**PLAIN, "s_decay": 0.5}, 1.0, 1.0)
# They are told by S as it was before the lr rose: the last update was followed with that.
@example({**UNDER_WAY, "peak": 0.01}, beyond(0.5), PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "peak": 0.01}, beyond(1.5), PLAIN, 1.0, 1.0)
# They cannot be told where other parameters have a gradient now, or where nobody knows the last update.
@example({**UNDER_WAY, "x_norm": 9.0}, ONE_STEP | {"delta_sq": 9.0}, PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "x_norm": 9.0, "keep": 0.5}, ONE_STEP | {"delta_sq": 2.25}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(9.0), "members": 11.0}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(9.0), "update_sq": -1.0}, PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "update_norm": 0.0}, {**beyond(9.0), "members": 11.0}, PLAIN, 1.0, 1.0)
# As many elements, but of other parameters.
@example({**UNDER_WAY, "members": 11.0}, {**beyond(0.5), "numel": 5.0}, PLAIN, 1.0, 1.0)
# An outlier, which draws x back, and one while S is 0.
@example(UNDER_WAY, {**beyond(0.5), "delta_grad": 1e3}, PLAIN, 1.0, 1.0)
@example(UNDER_WAY, {**beyond(0.5), "delta_grad": -1e3}, PLAIN, 1.0, 1.0)
@example({**UNDER_WAY, "scale": 0.0, "moved": 0.0}, {**ONE_STEP, "delta_grad": 1e3, "members": 11.0}, PLAIN, 1.0, 1.0)
# A gentle fall of S, after which x is not drawn back.
@example(UNDER_WAY, {**beyond(0.5), "delta_grad": 0.05}, PLAIN, 1.0, 0.5)
def test_every_field(old: State, sums: dict[str, float], options: dict[str, Any], unit: float, lr: float) -> None:
    old = fitted(old, options)
    if options["variant"] == "paper":
        # What it never has otherwise: it takes no note of the lr, and keeps all of Δ.
        old = {**old, "peak": 0.0, "keep": 1.0, "fade": 1.0, "scale": sum(old["s"])}
    wanted, motion = by_hand(old, sums, options, unit, lr)
    # Differences of what is alike are as exact as that is.
    size = max(1.0, *wanted["r"], wanted["update_norm"], wanted["delta_norm"] / (old["fade"] or 1), old["scale"])
    for got, moves in by_both(old, sums, options, unit, lr):
        close(got, wanted, size)
        close(moves, motion, size if options["variant"] == "paper" else 1.0)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("limit", [1 - 1e-12, 1 + 1e-12], ids=["just not", "just"])
def test_weights_that_were_replaced(limit: float, numbers: bool) -> None:
    """x_ref takes x. What was learned stays but for what it forgets in a step: h is 0, and so is Δ."""
    replaced = limit > 1
    new, motion = by_torch(fitted(UNDER_WAY, PLAIN), beyond(limit), PLAIN, 1.0, 1.0, numbers=numbers)
    assert (new["moved"] == new["delta_norm"] == new["h"] == new["keep"] == 0) == replaced
    assert (new["update_norm"] == 1) == replaced  # growth is 3 updates
    assert (new["scale"] == 1) == replaced
    assert (motion["slot_delta"] == 1) == replaced
    if replaced:
        assert motion["x_delta"] == 0
        assert motion["x_update"] == 1
        assert motion["slot_update"] == pytest.approx(1 - (6 / 7) ** 0.25)


def test_paper_takes_no_weights_for_replaced() -> None:
    options = {**PLAIN, "variant": "paper"}
    far, farther = (by_torch({**UNDER_WAY, "peak": 0.0}, beyond(limit), options, 1.0, 1.0) for limit in (0.5, 50.0))
    assert far[0]["moved"] > 3
    assert farther[0]["moved"] > 100
    for name in ("h", "scale", "keep", "fade"):
        assert far[0][name] == farther[0][name]
    assert far[1] == farther[1]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(STATES, SUMS, OPTIONS, POSITIVE, SIZE)
def test_a_step_that_does_not_count(
    old: State, sums: dict[str, float], options: dict[str, Any], unit: float, lr: float
) -> None:
    """Only the norm of what entered is taken in, if it is finite itself. Nothing moves."""
    old = fitted(old, options)
    for entered in (sums["entered_sq"], math.inf, math.nan):
        for broken in (math.inf, math.nan):
            gone = {**sums, "grad_sq": broken, "delta_grad": broken, "entered_sq": entered}
            for numbers in (False, True) if options["variant"] == "scale_free" else (False,):
                got, motion = by_torch(old, gone, options, unit, lr, ok=False, numbers=numbers)
                ref_sq = old["ref_sq"] + (entered if math.isfinite(entered) else 0)
                close(got, {**old, "ref_sq": ref_sq, "skipped": old["skipped"] + 1}, 0.0)
                assert motion == STILL


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_paper_s_squares_stay_finite(dtype: torch.dtype, sign: int) -> None:
    """h is held where its square, of which there will be many, is far from the end of the format."""
    state = TunerState.unpack(torch.zeros(TunerState.size(1), dtype=dtype), 1)
    sums = Sums(*(torch.tensor(x, dtype=dtype) for x in (sign * torch.finfo(dtype).max, 0, 1, 1, 1, 0, 5, 3, 0, 0)))
    one = torch.ones(1, dtype=dtype)
    new, motion = tune(state, sums, torch.tensor(True), one, Options(variant="paper", betas=(1.0,)), 1.0, one[0])
    assert all(value.isfinite().all() for value in (*new, *motion))
    assert sign * new.h == pytest.approx(torch.finfo(dtype).max ** 0.4)


EXTREMES = [0.0, 1e-320, 1e-200, 1.0, 1e200, 1e308, math.inf, math.nan]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), st.booleans())
def test_numbers_end_where_tensors_do_however_extreme(data: st.DataObject, ok: bool) -> None:
    """Nothing raises where tensors would be infinite or NaN."""
    some = st.sampled_from(EXTREMES) | SIZE
    old = {name: [data.draw(some)] if name in "mvrs" else data.draw(some) for name in TunerState._fields}
    sums = {name: data.draw(some | some.map(lambda x: -x)) for name in Sums._fields}
    lr = data.draw(SIZE)
    one, two = (by_torch(old, sums, PLAIN, 1.0, lr, ok=ok, numbers=numbers) for numbers in (False, True))
    for found, wanted in zip(two, one, strict=True):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-300, nan_ok=True), name
