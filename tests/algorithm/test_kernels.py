"""The sweeps below Python, against the eager ones, float64 sums and the oracle: C++, and Triton (on a machine without
CUDA in Triton's interpreter, and compiled for GPUs that need not be there). And how the digits of x are kept."""

from __future__ import annotations

import copy
import math
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import BASES, run_both
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from training import Problem, cosine, flat, gap

import manic
from manic import Mechanic, algorithm, run
from manic.parameters import REST, RESTS, ParamState, join, split, wide
from manic.sweeps import eager, kernels
from manic.sweeps import native as native_module
from manic.sweeps.base import Table
from manic.sweeps.native import LEVELS, X86_64, Native, native
from manic.sweeps.passes import Passes

NATIVE = [torch.float32, torch.float64, torch.bfloat16]
ALL = [*NATIVE, torch.float16]
Kernels = type[Table]


def _triton() -> Kernels:
    # Older interpreters stumble over NumPy 2.4, and over integers that wrap around. On a GPU any version does.
    pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")
    from manic.sweeps.triton_kernels import Triton

    return Triton


def _below(name: str) -> tuple[Kernels, torch.device]:
    if name == "native":
        assert native() is Native, "build the libraries: see CONTRIBUTING.md"
        return Native, torch.device("cpu")
    return _triton(), torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["native", "triton"])
def below(request: Any) -> tuple[Kernels, torch.device]:
    """Kernels, and a device for their tensors."""
    return _below(request.param)


@pytest.fixture(
    params=[(name, dtype) for name, dtypes in (("native", NATIVE), ("triton", ALL)) for dtype in dtypes],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def kind(request: Any) -> tuple[Kernels, torch.device, torch.dtype]:
    """Kernels, a device for their tensors, and each dtype that they take."""
    k, device = _below(request.param[0])
    assert request.param[1] in k.dtypes
    return k, device, request.param[1]


either = pytest.mark.parametrize("difference", [True, False], ids=["x_ref kept", "delta kept"])


@contextmanager
def using(k: Kernels | None, on_host: bool = True) -> Iterator[None]:
    """Every Mechanic sweeps with k; with `on_host` False nothing is known to the host, as if on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "kernels_for", lambda _: k)
        if not on_host:
            for module in (algorithm, run):
                patch.setattr(module, "on_host", lambda _: False)
        yield


def swept_by(m: Mechanic) -> dict[Tensor, Kernels | None]:
    """What took each parameter in the last step."""
    _, passes = m._run._mode._passes  # type: ignore[union-attr, misc]
    return {state.param: took(group) for group in passes.groups for state in group.states}


def took(group: eager.Group) -> Kernels | None:
    return type(group) if isinstance(group, Table) else None


def shapes(piece: int) -> list[Tensor]:
    """Contiguous, channels_last, transposed; smaller and larger than a piece; nothing; an odd address."""
    torch.manual_seed(0)
    odd = torch.randn(1000)[1:].view(-1)
    sizes = (1, 15, 16, 17, 4097, piece - 1, piece, piece + 17, 2 * piece + 4096)
    others = torch.randn(5, 3, 7, 9).to(memory_format=torch.channels_last), torch.randn(40, 30).t(), torch.randn(0), odd
    return [*map(torch.randn, sizes), *others]


def a_state(values: Tensor, dtype: torch.dtype, device: torch.device, **changes: Any) -> ParamState:
    """x with all of its digits, g and the slot at random. Strides and offset are kept."""

    def like(source: Tensor, to: torch.dtype) -> Tensor:
        offset = values.storage_offset()
        room = torch.zeros(values.numel() + offset, dtype=to, device=device)
        return room.as_strided(values.shape, values.stride(), offset).copy_(source)

    param, rest = split(values.to(wide(dtype)), dtype)
    grad, slot = (torch.randn(values.shape) for _ in range(2))
    kept = None if rest is None else like(rest, RESTS[dtype])
    param, grad, slot = like(param, dtype), like(grad, dtype), like(slot, wide(dtype))
    return ParamState(
        **{"param": nn.Parameter(param), "grad": grad, "sign": 1.0, "index": 0, "slot": slot, "rest": kept} | changes
    )


def passes_of(states: list[ParamState], k: Kernels | None, difference: bool = True) -> Passes:
    """Passes that have seen x_t."""
    passes = Passes(states, difference=difference, kernels=lambda _: k)
    passes.measure(torch.zeros(2, dtype=torch.float64, device=states[0].slot.device))
    return passes


def motion_of(state: ParamState, *values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=state.slot.device)


def x_of(state: ParamState) -> Tensor:
    return join(state.param.detach(), state.rest, state.slot.dtype)


def bits(state: ParamState) -> list[Tensor]:
    """Of x, its slot and its rest, copied."""
    tensors = [state.param.detach(), state.slot, *([] if state.rest is None else [state.rest])]
    return [
        t.clone().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
        for t in tensors
    ]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# ---------------------------------------------------------------------- the digits of x


def patterns() -> Tensor:
    """Float32: bits at random, what lies around a tie, the smallest and the largest numbers, and what is none."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
    near = some[:300, None] // 2**16 * 2**16 + torch.tensor([0x7FFF, 0x8000, 0x8001])
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000])
    return torch.cat([some, near.flatten(), edges, edges - 2**31]).to(torch.int32).view(torch.float32)


def test_bfloat16_and_its_rest_hold_every_float32() -> None:
    x = patterns()
    stored, rest = split(x.clone(), torch.bfloat16)
    assert rest is not None
    assert (stored.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    back, number = join(stored, rest, torch.float32), ~x.isnan()
    assert torch.equal(back[number].view(torch.int32), x[number].view(torch.int32))
    assert back[~number].isnan().all()
    quiet = (x.view(torch.int32) & 0x7FC00000) == 0x7FC00000  # as every NaN that arithmetic yields
    assert stored[quiet].isnan().all()
    # The parameter is what rounding makes of x; the middle between two goes away from 0.
    middle = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(stored[number & ~middle], x[number & ~middle].to(torch.bfloat16))
    assert (stored[number & middle].abs() > x[number & middle].abs()).all()
    assert middle.sum() > 300


def test_float16_and_its_rest_hold_every_float32_in_its_range() -> None:
    x = patterns()
    stored, rest = split(x.clone(), torch.float16)
    assert rest is not None
    torch.testing.assert_close(stored, x.half(), rtol=0, atol=0, equal_nan=True)
    inside = stored.isfinite()
    assert inside.sum() > 60_000
    assert torch.equal(join(stored, rest, torch.float32)[inside].view(torch.int32) * 2, x[inside].view(torch.int32) * 2)
    torch.testing.assert_close(join(stored, rest, torch.float32)[~inside], stored[~inside].float(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_others_need_no_rest(dtype: torch.dtype) -> None:
    x = torch.randn(5).to(dtype)
    stored, rest = split(x, dtype)
    assert stored is x
    assert rest is None
    assert join(x, None, dtype) is x


def test_an_edit_leaves_no_more_than_a_rest() -> None:
    """Whatever the rest was: x is within half a digit of what was written. Beside a 0 or the least numbers, too."""
    rest = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for value in (0.0, -0.0, 2.0**-133, 1e-39, -3.0, 7e4, 1e38):
        x = join(torch.full((2**16,), value, dtype=torch.bfloat16), rest, torch.float32)
        written = torch.tensor(value, dtype=torch.bfloat16).float()
        assert ((x - written).abs() <= max(abs(value) * 2**-8, 2.0**-134)).all()
        assert (x.signbit() == written.signbit()).all()
    assert (join(torch.zeros(9, dtype=torch.bfloat16), rest[:9], torch.float32) == 0).all()
    assert join(torch.full((9,), math.nan, dtype=torch.bfloat16), rest[::7282], torch.float32).isnan().all()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # Triton's interpreter is NumPy
@either
def test_kernels_keep_every_bit(kind: tuple[Kernels, torch.device, torch.dtype], difference: bool) -> None:
    """Of all numbers, and of a 0 that an edit has put beside a rest."""
    k, device, dtype = kind
    x = patterns()
    if dtype != torch.float64:
        x = x[x.isfinite()]
    x = x[x.abs() < 6e4] if dtype == torch.float16 else x
    one = a_state(x[-20_000:], dtype, device)
    one.slot[::2] = 0
    if one.rest is not None:
        one.param[:500] = 0
        one.param[500:1000] = -0.0
    other = copy.deepcopy(one)
    before = x_of(one)
    for which, state in ((k, one), (None, other)):
        passes_of([state], which, difference).move(motion_of(one, [0, 0, 0, 0]))
    kept = before.isfinite()
    for a, b in zip(bits(one), bits(other), strict=True):
        assert torch.equal(a[kept], b[kept])
    assert torch.equal(x_of(one)[kept], before[kept])
    assert kept.sum() > 0.9 * len(kept)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # Triton's interpreter is NumPy
def test_what_leaves_the_range_of_float16_leaves_no_rest() -> None:
    k, device = _below("triton")
    for which in (k, None):
        one = a_state(torch.tensor([6e4, -6e4, 1.0]), torch.float16, device, slot=torch.zeros(3, device=device))
        passes_of([one], which).move(motion_of(one, [1, 0, 0, 0]))  # x becomes 2·x
        assert one.param.tolist() == [math.inf, -math.inf, 2]
        assert one.rest is not None
        assert one.rest.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- one step


@torch.no_grad()
@either
def test_one_step_of_every_shape_is_the_eager_one(
    kind: tuple[Kernels, torch.device, torch.dtype], difference: bool
) -> None:
    k, device, dtype = kind
    ends = []
    for which in (k, None):
        *even, odd = shapes(k.piece)
        states = [a_state(t, dtype, device) for t in even] + [a_state(odd, dtype, device, index=1)]
        passes = Passes(states, difference=difference, kernels=lambda _, which=which: which)
        assert set(map(took, passes.groups)) == {which}
        like = torch.zeros(2, dtype=torch.float64, device=device)
        for motion in ([0.3, 0.7, 0.8, 0.75], [-0.1, 0.5, 0.05, 0.2]), ([0.0, 0.2, 1.0, 0.1], [0.1, 0.0, 0.5, 1.0]):
            passes.measure(like)
            sizes, left = torch.zeros_like(like), torch.zeros_like(like)
            for i, state in enumerate(states):
                before = state.param.detach().to(state.slot.dtype, copy=True)
                state.param += 0.01 * torch.randn(state.param.shape).to(state.param) * (i + 1)
                sizes[state.index] += (state.param.to(before.dtype) - before).double().square().sum()
            found = passes.move(motion_of(states[0], *motion))[None]
            for state in states:
                d = x_of(state) - state.slot if difference else state.slot
                left[state.index] += d.double().square().sum()
            torch.testing.assert_close(found, torch.stack([sizes, left], 1), rtol=1e-5, atol=0)
            assert (found > 0).all()
        assert states[-1].param.data_ptr() % 16 != 0
        ends.append(states)
    for a, b in zip(*ends, strict=True):
        if k is Native:  # every operation is rounded as torch rounds it
            assert same(bits(a), bits(b))
        else:
            close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(x_of(a), x_of(b), **close)
            torch.testing.assert_close(a.slot, b.slot, **close)
            if a.rest is not None:  # the parameter is the nearest number to x, whatever x is
                assert all(map(torch.equal, split(x_of(a), dtype), (a.param, a.rest)))


@either
def test_the_sums_are_those_of_float64(kind: tuple[Kernels, torch.device, torch.dtype], difference: bool) -> None:
    k, device, dtype = kind
    for values in shapes(k.piece):
        one = a_state(values, dtype, device)
        table = k([one], difference)
        found = table.measure().sum(0)
        x, g, y = (t.detach().double() for t in (x_of(one), one.grad, one.slot))
        d = x - y if difference else y
        pairs = (d, g), (d, x), (g, g), (x, x), (d, d)
        wanted = torch.stack([(a * b).sum() for a, b in pairs])
        size = torch.stack([a.norm() * b.norm() for a, b in pairs])
        assert ((found - wanted).abs() <= (1e-12 if dtype == torch.float64 else 1e-6) * size).all()
        x = one.param.clone()
        one.param.data.zero_()
        table.restore()
        assert torch.equal(one.param, x)


@torch.no_grad()
def test_a_factor_of_1_gives_x_itself(kind: tuple[Kernels, torch.device, torch.dtype]) -> None:
    """x_ref + (x - x_ref) would have lost its digits."""
    k, device, dtype = kind
    for which in (k, None):
        one = a_state(torch.randn(5000), dtype, device)
        one.slot *= 1e12
        x, before = x_of(one).clone(), bits(one)
        assert not torch.equal(one.slot + (x - one.slot), x)
        passes_of([one], which).move(motion_of(one, [0, 0, 1, 0]))
        assert torch.equal(one.slot, x)
        assert torch.equal(bits(one)[0], before[0])
        assert torch.equal(x_of(one), x)


@torch.no_grad()
@either
def test_an_update_that_is_not_finite_stays_out_and_a_step_that_does_not_count_is_undone(
    kind: tuple[Kernels, torch.device, torch.dtype], difference: bool
) -> None:
    k, device, dtype = kind
    for which in (k, None):
        one = a_state(torch.randn(3000), dtype, device)
        before = bits(one)
        passes = passes_of([one], which, difference)
        one.param += 1
        one.param[7], one.param[8] = math.nan, math.inf
        passes.move(motion_of(one, [0, 0, 0, 0]))
        assert same(bits(one), before)

        x, y = x_of(one).clone(), one.slot.clone()
        passes = passes_of([one], which, difference)
        one.param.copy_(one.param + 1)
        u = one.param.to(x) - join(before[0].view(dtype), None, x.dtype)
        one.param[7], one.param[8], one.param[9] = math.nan, math.inf, -math.inf
        u[7:10] = 0
        found, _ = passes.move(motion_of(one, [0, 0.5, 0, 2]))[None][0]
        assert found.item() == pytest.approx(u.double().square().sum().item(), rel=1e-5)
        torch.testing.assert_close(x_of(one), x + 0.5 * u)
        torch.testing.assert_close(one.slot, y + 2 * u)


@torch.no_grad()
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_x_t_can_be_put_back(below: tuple[Kernels, torch.device], dtype: torch.dtype, replaced: bool) -> None:
    k, device = below
    for which in (k, None):
        states = [a_state(t, dtype, device) for t in shapes(k.piece)]
        before = [bits(state) for state in states]
        passes = passes_of(states, which)
        for state in states:
            state.param.mul_(3)
            if replaced:
                state.param.data = state.param.data.clone()
        passes.restore()
        assert not passes.moving
        assert all(map(same, map(bits, states), before))


class Late(BaseException):
    """Comes in the middle."""


@contextmanager
def interrupted(k: Kernels, n: int, when: str) -> Iterator[None]:
    """Raises at the n-th job that is carried out: before it, in the middle of it, or after it."""
    jobs, write, sweep = count(), torch._foreach_copy_, k.sweep

    def now(work: Any, *arguments: Any) -> None:
        hit = next(jobs) == n
        if hit and when == "before":
            raise Late
        if hit and when == "half" and work is write:
            write(arguments[0][:1], arguments[1][:1])
            raise Late
        work(*arguments)
        if hit:
            raise Late

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *arguments: now(write, *arguments))
        patch.setattr(k, "sweep", lambda *arguments: now(sweep, *arguments))
        yield


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "half", "after"])
@either
def test_a_move_that_is_interrupted_is_completed_by_the_next(
    below: tuple[Kernels, torch.device], difference: bool, when: str
) -> None:
    """With the same bits, wherever it was: kernels, several pieces of one tensor, a sparse gradient, x that the base
    has put elsewhere."""
    k, device = below

    def build() -> tuple[list[ParamState], Passes]:
        torch.manual_seed(0)
        dense = [a_state(torch.randn(n), dtype, device) for n in (9, 3000) for dtype in NATIVE]
        moved = a_state(torch.randn(700), torch.float32, device, index=1)
        cut = a_state(torch.randn(eager.PIECE + 100), torch.bfloat16, device)
        cut.grad = cut.grad.float()  # which kernels do not take
        rows = a_state(torch.randn(6, 4), torch.float32, device)
        rows.grad = rows.grad.to_sparse(1)
        states = [*dense, moved, cut, rows]
        passes = passes_of(states, k, difference)
        for state in states:
            state.param += 0.1 * torch.randn(state.param.shape).to(state.param)
        moved.param.data = moved.param.data.clone()
        return states, passes

    motion = [-0.1, 0.5, 0.7, 0.3], [0.0, 0.2, 0.4, 0.1]
    states, passes = build()
    whole = passes.move(motion_of(states[0], *motion))[None]
    wanted = [bits(state) for state in states]
    for n in count():
        states, passes = build()
        with interrupted(k, n, when):
            try:
                passes.move(motion_of(states[0], *motion))
                break
            except Late:
                assert passes.moving
        assert torch.equal(passes.move(motion_of(states[0], *motion))[None], whole)
        assert all(map(same, map(bits, states), wanted)), n
        passes.release()
        assert not passes.moving
    assert n == 3 + 1 + 2 + 1  # by dtype; elsewhere; two pieces; sparse


def test_a_table_of_which_the_making_was_interrupted_is_made_anew(below: tuple[Kernels, torch.device]) -> None:
    """The next step took that of before, which may show memory that is not there any more."""
    k, device = below
    one = a_state(torch.randn(3000), torch.float32, device)
    table = k([one], True)
    table.measure()
    one.grad = one.grad * 2
    made = table._offsets
    table._offsets = None
    with pytest.raises(AttributeError):
        table.measure()
    table._offsets = made
    assert torch.equal(table.measure(), k([one], True).measure())


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_run_is_the_oracles(below: tuple[Kernels, torch.device], problem: Problem, base: str) -> None:
    with using(below[0]):
        parameters_gap, scale_gap = run_both(problem, base, torch.float64, True, unit=0.1, variant="scale_free")
    assert parameters_gap < 1e-10
    assert scale_gap < 1e-10


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_is_the_eager_one(
    below: tuple[Kernels, torch.device], problem: Problem, base: str, dtype: torch.dtype
) -> None:
    """Which differs in the last digits of the sums. (The oracle's x - x_ref has digits that no float32 has.)

    bfloat16 is compared early: a last digit of x that turns a digit of the parameter changes the next gradient by 2^-9.
    """
    ends, steps = [], 40 if dtype == torch.bfloat16 else 200
    for k in (below[0], None):
        with using(k):
            parameters = problem.parameters(dtype)
            optimizer = BASES[base][0](parameters)
            m = Mechanic(optimizer, LambdaLR(optimizer, cosine(200)))
            problem.train(parameters, m, steps)
            assert set(swept_by(m).values()) == {k}
        x = [join(p.detach(), m.state[p].get(REST), torch.float32) for p in parameters]
        ends.append((flat(x), m.scale.item()))
    (x, scale), (wanted, wanted_scale) = ends
    assert gap(x, wanted, problem.start) < 1e-5
    # At the end of a cosine nothing pulls S any more, and rounding moves it.
    assert scale == pytest.approx(wanted_scale, rel=1e-3)


def test_gradients_are_discarded_only_in_a_step_that_does_not_count(below: tuple[Kernels, torch.device]) -> None:
    k, device = below
    states = [a_state(t, torch.float32, device) for t in shapes(k.piece)]
    table, grads = k(states, True), [state.grad.clone() for state in states]
    table.measure()
    table.discard(torch.ones((), dtype=torch.bool, device=device))
    assert all(map(torch.equal, grads, [state.grad for state in states]))
    table.discard(torch.zeros((), dtype=torch.bool, device=device))
    assert not any(state.grad.any() for state in states)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_step_with_nan_changes_nothing_but_the_count(
    below: tuple[Kernels, torch.device], problem: Problem, on_host: bool
) -> None:
    with using(below[0], on_host):
        parameters = problem.parameters()
        m = Mechanic(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))  # which moves on without a gradient
        problem.train(parameters, m, 12)
        before = flat(parameters).detach().clone(), m.scale
        problem.loss(parameters, 0).backward()
        assert parameters[0].grad is not None
        parameters[0].grad[0, 0] = math.nan
        m.step()
        assert torch.equal(flat(parameters), before[0])
        assert m.scale == before[1]
        assert m.skipped == 1
        problem.train(parameters, m, 5)
        assert m.scale != before[1]


@pytest.mark.parametrize("replaced", [False, True])
def test_what_kernels_cannot_take_goes_eagerly_beside_them(below: tuple[Kernels, torch.device], replaced: bool) -> None:
    """A complex parameter, a sparse gradient, gradients of another layout or dtype; x that the base puts elsewhere."""
    k, device = below

    def run(which: Kernels | None) -> list[Tensor]:
        torch.manual_seed(0)
        dense, turned = torch.randn(50, 3), torch.randn(6, 4).t()
        start = [dense, torch.randn(9, dtype=torch.complex64), torch.randn(20, 2), turned, torch.randn(8).half()]
        parameters = [nn.Parameter(t.to(device)) for t in start]
        m = Mechanic(torch.optim.SGD(parameters, lr=0.1))
        if replaced:
            m.base_optimizer.register_step_post_hook(
                lambda *_: setattr(parameters[0], "data", parameters[0].data.clone())
            )
        with using(which):
            for _ in range(8):
                for p in parameters:
                    p.grad = p.detach().clone()
                parameters[2].grad = parameters[2].detach().to_sparse(1)
                parameters[3].grad = parameters[3].detach().clone(memory_format=torch.contiguous_format)
                m.step()
        half = which if which is not None and torch.float16 in which.dtypes else None
        assert [swept_by(m)[p] for p in parameters] == [which, None, None, None, half]
        return [p.detach() for p in parameters]

    for a, b in zip(run(k), run(None), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_swept_apart_keeps_its_own_memory(below: tuple[Kernels, torch.device]) -> None:
    """Two dtypes, more than a piece of one: tables and x_t are those of each."""
    k, device = below

    def run(which: Kernels | None) -> list[Tensor]:
        torch.manual_seed(0)
        start = torch.randn(k.piece + 9), torch.randn(50, dtype=torch.float64)
        parameters = [nn.Parameter(t.to(device)) for t in start]
        m = Mechanic(torch.optim.SGD(parameters, lr=0.1))
        with using(which):
            for t in range(6):
                for p in parameters:
                    p.grad = p.detach().clone()
                if t == 3:
                    parameters[0].data[:9] += 1
                m.step()
        return [p.detach() for p in parameters]

    for a, b in zip(run(k), run(None), strict=True):
        torch.testing.assert_close(a, b)


def trained_on(threads: int) -> list[Tensor]:
    """The end of a short run: parameters and scale."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n)) for n in (200_001, 7, 64, 90_000)]
    m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3, fused=True))
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(10):
            for p in parameters:
                p.grad = p.detach().sin()
            m.step()
    finally:
        torch.set_num_threads(count)
    assert m.scale > 0
    assert set(swept_by(m).values()) == {Native}
    return [*(p.detach() for p in parameters), m.scale]


def test_two_runs_give_the_same_bits_on_any_number_of_threads() -> None:
    first = trained_on(1)
    for threads in (1, 2, 3, 40):
        assert same(first, trained_on(threads))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_the_native_sums_do_not_depend_on_how_a_tensor_is_cut(dtype: torch.dtype) -> None:
    """As processes cut it into shards: what the sums of floats would lose grows over a run, until nothing agrees."""
    torch.manual_seed(0)
    whole = a_state(torch.randn(150_001), dtype, torch.device("cpu"))
    fields = ("param", "grad", "slot", "rest")
    found = []
    for cuts in ([150_001], [75_001, 75_000], [40_000, 3, 0, 70_000, 39_998]):
        pieces = {name: getattr(whole, name).split(cuts) for name in fields if getattr(whole, name) is not None}
        shards = [
            replace(
                whole, **{name: nn.Parameter(t) if name == "param" else t for name, t in zip(pieces, some, strict=True)}
            )
            for some in zip(*pieces.values(), strict=True)
        ]
        passes = passes_of(shards, native())
        sums = passes.measure(torch.zeros(1, dtype=torch.float64))
        found.append(sum(part for _, part in sums)[0, :5])
    _, _, grad_sq, x_sq, delta_sq = found[0]
    size = torch.stack([delta_sq * grad_sq, delta_sq * x_sq, grad_sq**2, x_sq**2, delta_sq**2]).sqrt()
    for other in found[1:]:
        assert ((other - found[0]).abs() <= 1e-14 * size).all()


@pytest.mark.parametrize("sizes", [[], [0], [70_000] * 9, [3 * 2**16, 1, 1, 1], [1] * 200], ids=str)
def test_however_the_pieces_are_divided_none_is_left_out(sizes: list[int]) -> None:
    torch.manual_seed(0)
    states = [a_state(torch.randn(n), torch.float32, torch.device("cpu")) for n in sizes or [1]]
    table = Native(states, True)
    if not sizes:
        table.length = 0  # as on a rank that has no element
    count, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(table.measure())
    finally:
        torch.set_num_threads(count)
    assert found[0].shape == (sum(-(-n // Native.piece) for n in sizes), 5)
    assert (found[0][:, 2] > 0).all()  # ‖g‖²
    assert same(found, found[:1] * 4)


FORKED = """
import hashlib, os, sys, torch
from test_kernels import trained_on

def told():  # what a run ends with
    return hashlib.sha256(b"".join(t.numpy(force=True).tobytes() for t in trained_on(2))).hexdigest()

print(told(), flush=True)  # the threads of this process have run
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own runtime hangs after a fork
        torch.set_num_threads = lambda _: None
        torch.get_num_threads = lambda: 2
        print(told(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork_the_bits_are_the_same() -> None:
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "support", Path(manic.__file__).parents[1]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, "-c", FORKED], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 3
    assert len(set(done.stdout.split())) == 1


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_a_native_run_is_the_eager_one_and_resumes_bitwise(
    problem: Problem, tmp_path: Path, dtype: torch.dtype, sweeps: Callable[[str], None]
) -> None:
    def build() -> tuple[list[nn.Parameter], Mechanic]:
        parameters = problem.parameters(dtype)
        return parameters, Mechanic(torch.optim.AdamW(parameters, lr=1e-3))

    parameters, m = build()
    problem.train(parameters, m, 30)
    torch.save({"parameters": parameters, "mechanic": m.state_dict()}, tmp_path / "checkpoint.pt")
    problem.train(parameters, m, range(30, 60))

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed, loaded = build()
    with torch.no_grad():
        for p, saved in zip(resumed, checkpoint["parameters"], strict=True):
            p.copy_(saved)
    loaded.load_state_dict(checkpoint["mechanic"])
    problem.train(resumed, loaded, range(30, 60))
    assert set(swept_by(loaded).values()) == {Native}
    assert torch.equal(flat(parameters), flat(resumed))

    if dtype == torch.float64:  # 60 steps in float32 make much of the last digit of a sum
        sweeps("eager")
        others, m = build()
        problem.train(others, m, 60)
        assert set(swept_by(m).values()) == {None}
        assert gap(flat(resumed).detach(), flat(others).detach(), problem.start) < 1e-12


def test_the_library_is_that_of_the_instructions_that_torch_uses() -> None:
    """Every library in the package loads, or would on a newer processor; torch knows what this one can do."""
    folder = Path(manic.__file__).parent / "sweeps"
    found = {path.name for path in folder.glob("native-*.so")}
    here = platform.machine() in X86_64
    assert found == {f"native-{level}.so" for level in ([*LEVELS.values(), "x86-64-v2"] if here else ["baseline"])}
    code = "from manic.sweeps.native import native; print(native().library._name)"
    wanted = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "default": "x86-64-v2"} if here else {"default": "baseline"}
    best = torch.backends.cpu.get_cpu_capability()
    if best != "AVX512":
        wanted.pop("avx512", None)
    if best not in ("AVX512", "AVX2"):
        wanted.pop("avx2", None)
    for capability, level in wanted.items():
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(manic.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(folder / f"native-{level}.so")


@pytest.mark.parametrize("hidden", ["away", "broken"])
def test_without_a_library_a_mechanic_says_so_once_and_trains(
    hidden: str, problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if hidden == "broken":
        for level in (*LEVELS.values(), "x86-64-v2", "baseline"):
            (tmp_path / f"native-{level}.so").write_bytes(b"not a library")
    monkeypatch.setattr(native_module, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(kernels, "native", lru_cache(native.__wrapped__))
    parameters, others = problem.parameters(), problem.parameters()
    with pytest.warns(UserWarning, match=r"3 to 4 times as long. Install a C\+\+ compiler") as told:
        m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3))
    problem.train(parameters, m, 12)
    problem.train(others, Mechanic(torch.optim.SGD(others, lr=1e-3)), 3)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert told[0].filename == __file__  # the line that built it
    assert m.scale > 0
    assert set(swept_by(m).values()) == {None}


def test_triton_that_does_not_run_is_replaced_by_the_eager_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _triton()
    monkeypatch.setattr(kernels, "triton", kernels.triton.__wrapped__)
    assert kernels.triton(torch.device("cpu")) is broken

    def fail(*_: Any) -> Tensor:
        raise OSError("no C compiler")

    with monkeypatch.context() as patch:
        patch.setattr(broken, "measure", fail)
        with pytest.warns(UserWarning, match="do not run on cpu.*no C compiler"):
            assert kernels.triton(torch.device("cpu")) is None
    with monkeypatch.context() as patch:
        patch.setattr(broken, "sweep", lambda *_: None)
        with pytest.warns(UserWarning, match="wrong results"):
            assert kernels.triton(torch.device("cpu")) is None


COMPILE = """
import torch, triton, warnings
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from manic.sweeps import triton_kernels as k

warnings.simplefilter("ignore")
for dtype, x in k.TYPES.items():
    w = "*fp64" if dtype == torch.float64 else "*fp32"
    jobs = []
    for difference, aligned in ((True, True), (True, False), (False, True)):
        common = {"X": x, "BLOCK": k.BLOCK, "ALIGNED": aligned}
        both = {**common, "DIFFERENCE": difference}
        jobs += [
            (k._measure, {"table": "*i64", "sums": "*fp64"}, both),
            (k._move, {"table": "*i64", "found": "*fp64", "motion": w}, both),
        ]
        if difference:
            jobs.append((k._discard, {"table": "*i64", "counts": "*i1"}, common))
    for kernel, pointers, constants in jobs:
        source = ASTSource(kernel, {**pointers, **dict.fromkeys(constants, "constexpr")}, constants)
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        wide = done.asm["ptx"].count(".v4." if dtype != torch.float64 else ".v2.")
        print(kernel.__name__, dtype, wide, len(done.asm["cubin"]))
        if constants["ALIGNED"] and kernel is not k._discard:  # 16 bytes at a time, where the addresses allow it
            assert wide >= 6
"""


def test_the_triton_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """No GPU is needed for that. It finds what the interpreter lets pass, such as a loop that changes a type."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 4 * 8


@pytest.mark.usefixtures("both_sweeps")
def test_what_was_worked_out_once_is_not_used_where_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps gradients come, go and turn sparse, memory is laid out anew, state vanishes, a group maximizes, a
    parameter is added: the same run, bit for bit, as one that works everything out in every step."""

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(6, 5)) for _ in range(4)]
        m = Mechanic(torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1))
        seen = []

        def step(absent: int | None = None) -> None:
            for i, p in enumerate(q for group in m.param_groups for q in group["params"]):
                p.grad = None if i == absent else (p.detach() - 1).contiguous()
            if absent == -1:
                parameters[0].grad = parameters[0].grad.to_sparse(1)  # type: ignore[union-attr]
            m.step()
            seen.extend(p.detach().clone() for p in parameters)

        for _ in range(3):
            step()
        for absent in (0, 0, None, 2, -1, None):
            step(absent)
        parameters[1].data = parameters[1].data.t().contiguous().t()
        step(), step()
        del m.state[parameters[3]]
        step(), step()
        m.param_groups[1]["maximize"] = True
        step(), step()
        m.param_groups[1]["maximize"] = False
        parameters.append(nn.Parameter(torch.randn(3)))
        m.add_param_group({"params": parameters[-1:]})
        step(), step()
        m.load_state_dict(copy.deepcopy(m.state_dict()))
        step(), step()
        assert m.scale > 0
        return [*seen, m.scale]

    remembered = run()
    monkeypatch.setattr(algorithm, "signature", lambda *_: None)
    for a, b in zip(remembered, run(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_not_kept_alive(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3))
    problem.train(parameters, m, 3)
    grads = [weakref.ref(p.grad) for p in parameters]
    m.zero_grad()
    assert [grad() for grad in grads] == [None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs have no interpreter")
def test_a_captured_step_replays_as_the_eager_one() -> None:
    def build() -> tuple[list[nn.Parameter], Mechanic]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, device="cuda")) for n in (3, 5_000, 70_000)]
        lr = torch.tensor(1e-3, device="cuda")
        return parameters, Mechanic(torch.optim.AdamW(parameters, lr=lr, fused=True, capturable=True))

    def differentiate(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            p.grad.copy_(p.detach().sin()) if p.grad is not None else setattr(p, "grad", p.detach().sin())

    eager, m = build()
    for _ in range(23):
        differentiate(eager)
        m.step()
    captured, m = build()
    for _ in range(3):
        differentiate(captured)
        m.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        differentiate(captured)
        m.step()
    for _ in range(20):
        graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)
