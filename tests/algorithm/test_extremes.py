"""Numbers at the edge of what floating point holds, and counts that nobody would try by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import Problem, flat

from manic import Mechanic
from manic.algorithm import tune
from manic.parameters import ParamState
from manic.sweeps.eager import PIECE, Group
from manic.sweeps.native import Native
from manic.tuner import Options, Sums, TunerState

TARGET = torch.linspace(-1, 2, 5)
BASES: dict[str, Any] = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.1),
}
OPTIONS: list[dict[str, Any]] = [{}, {"variant": "paper", "s_init": 1e-2}]


def run(base: str, options: dict[str, Any], dtype: torch.dtype, factors: Iterator[float], start: float = 1.0) -> Any:
    """mean square to TARGET, its gradient times a factor: the parameter, the Mechanic."""
    p = nn.Parameter(torch.full((5,), start, dtype=dtype))
    mechanic = Mechanic(BASES[base]([p]), **options)
    for factor in factors:
        p.grad = factor * (p.detach() - TARGET.to(dtype))
        mechanic.step()
    return p, mechanic


def check(p: Tensor, mechanic: Mechanic) -> None:
    """Everything is finite, and a checkpoint of it loads."""
    state = copy.deepcopy(mechanic.state_dict())
    assert p.isfinite().all()
    assert all(value.isfinite().all() for values in state["state"].values() for value in values.values())
    assert state["param_groups"][0]["mechanic_state"].isfinite().all()
    mechanic.load_state_dict(state)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1e-38, 1e-19, 1e18, 1e38])
def test_gradients_of_any_size(factor: float, dtype: torch.dtype, base: str, options: dict[str, Any]) -> None:
    """All of them, the first five, five in the middle; parameters that are 0 among them."""
    for start, first, last in ((0.0, 0, 40), (1.0, 0, 5), (1.0, 25, 30)):
        p, mechanic = run(base, options, dtype, (factor if first <= t < last else 1.0 for t in range(40)), start)
        check(p, mechanic)
        if dtype == torch.float32 and factor == 1e38 and first == 0:
            assert mechanic.skipped >= last, "a square that is infinite counted"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("factor", [1e-38, 1e-6, 1e6, 1e38])
def test_a_few_gradients_of_another_size_are_survived(factor: float, base: str) -> None:
    p, _ = run(base, {}, torch.float32, (factor if 30 <= t < 35 else 1.0 for t in range(300)))
    assert (p - TARGET).abs().max() < 0.1


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("factor", [1e-3, 10.0])
def test_a_run_that_goes_on_long_after_it_has_converged(factor: float, base: str) -> None:
    """S falls to its floor there. (Where Δ is recomputed, that floor was once put in after Δ had been stretched for the
    fall: x - x_ref grew by a ninth in every step.)"""
    p, mechanic = run(base, {}, torch.float32, (factor if t < 5 else 1.0 for t in range(800)))
    check(p, mechanic)
    assert (p - TARGET).abs().max() < 0.2


@pytest.mark.parametrize("variant", ["scale_free", "paper"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_start_of_1e_30_grows_out_of_it(base: str, variant: str) -> None:
    options = {"variant": variant, "s_init": 1e-30}
    p, mechanic = run(base, options, torch.float64, (1.0 for _ in range(1000)))
    check(p, mechanic)
    assert (p - TARGET).abs().max() < 0.3


@pytest.mark.parametrize("variant", ["scale_free", "paper"])
def test_betas_at_the_ends_are_the_equations(variant: str, problem: Problem) -> None:
    betas, x = (0.0, 1 - 1e-7, 1.0), torch.tensor(problem.start, dtype=torch.float64)
    options: dict[str, Any] = {"variant": variant, "betas": betas, "s_init": 1e-3}
    parameters = problem.parameters(torch.float64)
    mechanic = Mechanic(SGD(parameters, lr=1.0), **options)
    wanted = oracle.mechanic(x.tolist(), problem.gradient, oracle.sgd(1.0), lambda t: 1.0, 60, **options)
    for t, (expected, scale) in enumerate(wanted):
        problem.train(parameters, mechanic, range(t, t + 1))
        torch.testing.assert_close(flat(parameters).detach(), torch.tensor(expected).double(), rtol=1e-7, atol=1e-7)
        assert mechanic.scale.item() == pytest.approx(scale, rel=1e-6)
    assert (flat(parameters) - x).norm() > 0.1


def test_parameters_of_one_element_and_of_none(problem: Problem) -> None:
    """Each element a parameter by itself, among empty ones, is the same run."""
    runs = []
    for split in (False, True):
        parameters = problem.parameters(torch.float64)
        if split:
            parameters = [nn.Parameter(x.reshape(())) for x in flat(parameters).detach()]
        empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
        mechanic = Mechanic(AdamW([*parameters, empty], lr=0.1))
        for t in range(30):
            mechanic.zero_grad()
            (problem.loss(parameters, t) + empty.sum()).backward()
            mechanic.step()
        runs.append(flat(parameters).detach())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


def test_ten_thousand_tensors_are_as_one() -> None:
    target = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = []
    for count in (10_000, 1):
        parameters = [nn.Parameter(torch.zeros(10_000 // count, dtype=torch.float64)) for _ in range(count)]
        mechanic = Mechanic(SGD(parameters, lr=0.1))
        for _ in range(8):
            for p, wanted in zip(parameters, target.chunk(count), strict=True):
                p.grad = p.detach() - wanted
            mechanic.step()
        runs.append(torch.cat([*(p.detach() for p in parameters), mechanic.scale[None]]))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)
    assert runs[0].abs().max() > 1e-3


def test_all_frozen_then_not(problem: Problem) -> None:
    parameters, twins = problem.parameters(), problem.parameters()
    mechanic, twin = Mechanic(AdamW(parameters)), Mechanic(AdamW(twins))
    for p in parameters:
        p.requires_grad_(False)
    for _ in range(3):
        mechanic.step()
    for p in parameters:
        p.requires_grad_(True)
    problem.train(parameters, mechanic, 20)
    problem.train(twins, twin, 20)
    # The three steps count as steps of the mean that Δ is, in which no update was.
    assert not mechanic.skipped
    assert mechanic.scale > 0
    assert (flat(parameters) - flat(twins)).norm() < 0.5 * (flat(twins) - flat(problem.parameters())).norm()


# ---------------------------------------------------------------------- 2^31 elements

MANY = 2**31 + 7


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_pieces_of_a_tensor_of_2_31_elements(device: str) -> None:
    """They are views: of a tensor without memory, and of one element that is shown as many."""
    t = torch.empty(MANY, device="meta") if device == "meta" else torch.zeros(1).expand(MANY)
    begin = 0
    for piece in Group([ParamState(t, None, 1.0, 0, t)], True, [t]).pieces():
        for part in (piece.param, piece.slot, piece.before):
            assert part.storage_offset() == (begin if device == "meta" else 0)
            assert 0 < part.numel() <= PIECE
        begin += piece.param.numel()
    assert begin == MANY


def test_the_table_of_the_kernels_for_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "piece", 1024)
    p = torch.empty(MANY, device="meta", dtype=torch.bfloat16)
    rest = torch.empty(MANY, device="meta", dtype=torch.int16)
    table = Native([ParamState(p, p, 1.0, 0, torch.empty(MANY, device="meta"), rest)], True)
    count, *columns = table._offsets.T
    assert count.sum() == MANY
    begin = count.cumsum(0) - count
    for offsets, size in zip(columns, (2, 2, 4, 2, 2), strict=True):  # x, g, slot, x_t, rest
        assert torch.equal(offsets, size * begin)
    assert columns[2][-1] > 2**32


# ---------------------------------------------------------------------- 1e7 steps of the scalar half


def steps_of(flat: Tensor, noise: Tensor, betas: Tensor, lr: Tensor, ok: Tensor) -> Tensor:
    """Steps of a world in which the best S is 1: ⟨Δ,g⟩ has the sign of log S, and noise; ‖Δ‖ and ‖u‖ are about 1."""
    one, zero = torch.ones_like(lr), torch.zeros_like(lr)
    for value in noise:
        old = TunerState.unpack(flat, len(betas))
        scale, entered = old.scale, torch.where(old.steps > 0, zero, one)
        pull = scale.clamp_min(1e-30).log().tanh() + 0.5 * value
        moved = (scale * (1 + 0.1 * value)).square()
        sums = Sums(scale * pull, zero, one + 0.1 * value, one, moved, entered, 10 * one, zero, one, -one)
        flat = tune(old, sums, ok, betas, Options(), 1.0, lr)[0].pack()
    return flat


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_the_scalar_half_over_many_steps_does_not_drift(request: pytest.FixtureRequest) -> None:
    """float32 against float64; 2,000 steps, or 10,000,000 with --every (some 40 minutes)."""
    every = request.config.getoption("--every")
    block, blocks = (20, 500_000) if every else (20, 100)
    advance = torch.compile(steps_of, fullgraph=True, dynamic=False) if every else steps_of
    generator = torch.Generator().manual_seed(0)
    states = []
    for dtype in (torch.float64, torch.float32):
        betas, lr = torch.ones(1, dtype=dtype), torch.ones((), dtype=dtype)
        states.append([torch.zeros(TunerState.size(1), dtype=dtype), betas, lr])
    gaps, scales = [], []
    for t in range(blocks):
        noise = torch.randn(block, generator=generator, dtype=torch.float64).clamp(-3, 3)
        for state in states:
            flat, betas, lr = state
            state[0] = advance(flat, noise.to(flat.dtype), betas, lr, torch.tensor(True))
        if t % 100 == 99:
            exact, rounded = (TunerState.unpack(state[0], 1) for state in states)
            scales.append(exact.scale.item())
            gaps.append(abs(math.log(rounded.scale.item() / scales[-1])))
            assert exact.steps == rounded.steps == (t + 1) * block
    assert all(state[0].isfinite().all() for state in states)
    assert max(gaps) < 1e-2, max(gaps)
    assert 0.1 < sorted(scales)[len(scales) // 2] < 10
