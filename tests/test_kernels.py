"""The sweeps below Python, against the eager ones, float64 sums and the oracle: C++, and Triton (on a machine without
CUDA in Triton's interpreter, and compiled for GPUs that need not be there)."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Problem, flat, gap
from test_algorithm import run_both
from torch import Tensor, nn

from manic import Mechanic, kernels, mechanic, sweeps
from manic.kernels import Kernels, Memory
from manic.storage import Slot
from manic.tuner import Options, Sums, Tuner, tune

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def _triton() -> Kernels:
    # Older interpreters stumble over NumPy 2.4, and over integers that wrap around. On a GPU any version does.
    pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")
    from manic.triton_kernels import Triton

    return Triton()


@pytest.fixture(params=["native", "triton"])
def below(request: Any) -> tuple[Kernels, torch.device]:
    """Kernels, and a device for their tensors."""
    if request.param == "native":
        return kernels.native(), torch.device("cpu")
    return _triton(), torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def using(k: Kernels | None, on_host: bool = True) -> Iterator[None]:
    """Every Mechanic sweeps with k; with `on_host` False nothing is known to the host, as if on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanic, "kernels_for", lambda *_, **__: k)
        if not on_host:
            patch.setattr(mechanic, "_on_host", lambda _: False)
        yield


def shapes(piece: int) -> list[Tensor]:
    """Contiguous, channels_last, transposed; smaller and larger than a piece; an odd address; nothing."""
    torch.manual_seed(0)
    odd = torch.randn(1000)[1:].view(-1)
    sizes = (1, 15, 16, 17, 4097, piece - 1, piece, piece + 17, 2 * piece + 4096)
    others = torch.randn(5, 3, 7, 9).to(memory_format=torch.channels_last), torch.randn(40, 30).t(), odd, torch.randn(0)
    return [*map(torch.randn, sizes), *others]


def a_slot(values: Tensor, dtype: torch.dtype, device: torch.device, scale: float) -> Slot:
    """x somewhere, Δ and g at random, x_ref so that x stands at x_ref + S·Δ. Strides and offset are kept."""
    wide = torch.promote_types(dtype, torch.float32)

    def like(source: Tensor, to: torch.dtype) -> Tensor:
        target = torch.empty_strided(values.shape, values.stride(), dtype=to, device=device)
        return target.copy_(source)

    delta = like(torch.randn(values.shape), wide)
    ref = like(values, wide)
    x = torch.addcmul(ref, delta, torch.tensor(scale, dtype=wide, device=device)).to(dtype)
    if values.storage_offset():  # an address that no vector load may use
        x = torch.cat([x.new_zeros(1), x])[1:]
    return Slot(nn.Parameter(x), like(torch.randn(values.shape), dtype), 1.0, 0, ref, delta)


def stepped(k: Kernels, one: Slot) -> tuple[Tensor, Memory]:
    """A step in which nothing moves, at S = 0.5: S, and what the kernels keep after it."""
    motion = torch.tensor([0.5, 0.5, 1, 1], dtype=one.ref.dtype, device=one.ref.device)
    memory = Memory([one], k.piece)
    k.measure([one], motion[0], memory)
    k.move([one], motion, None, memory)
    memory.known = True
    return motion[0], memory


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_of_every_shape_is_the_eager_one(below: tuple[Kernels, torch.device], dtype: torch.dtype) -> None:
    k, device = below
    motion = torch.tensor([[0.3, 0.7, 0.8, 0.75]], dtype=torch.float64, device=device)
    here, there = motion[:, 0], motion[:, 1]
    ends = []
    for which in (k, None):
        slots = [a_slot(t, dtype, device, 0.3) for t in shapes(k.piece)]
        groups = sweeps.grouped(slots, lambda _, which=which: which)
        assert [group.kernels for group in groups] == [which] * len(groups)
        carried: sweeps.Carried = {}
        sums = [sweeps.measure(groups, here, carried)[0]]
        for i, slot in enumerate(slots):
            slot.param.data += 0.01 * torch.randn(slot.param.shape).to(slot.param) * (i + 1)
        _, carried = sweeps.move(groups, motion, None, carried)
        assert all(carried[group.identity].known for group in groups if group.kernels is not None)
        refs = [slot.ref.clone() for slot in slots]
        sums.append(sweeps.measure(groups, there, carried)[0])
        assert all(map(torch.equal, refs, [slot.ref for slot in slots])), "nobody edited anything"
        ends.append((slots, sums))
        torch.manual_seed(0)
    (got, got_sums), (wanted, wanted_sums) = ends
    exact = k is not None and isinstance(k, kernels.Native)
    for a, b in zip(got, wanted, strict=True):
        for name in ("param", "ref", "delta"):
            x, y = getattr(a, name).detach(), getattr(b, name).detach()
            if exact:  # every operation is rounded as torch rounds it
                assert torch.equal(x, y), name
            else:  # the interpreter has no fused multiply-add: now and then bfloat16 is rounded the other way
                torch.testing.assert_close(x, y, rtol=1e-6, atol=2**-5 if dtype == torch.bfloat16 else 1e-6)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
    close = 1e-2 if dtype == torch.bfloat16 and not exact else 1e-5
    torch.testing.assert_close(torch.stack(got_sums), torch.stack(wanted_sums), rtol=close, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sums_are_those_of_float64(below: tuple[Kernels, torch.device], dtype: torch.dtype) -> None:
    k, device = below
    for values in shapes(k.piece):
        slot = a_slot(values, dtype, device, 0.3)
        scale = torch.tensor(0.3, dtype=slot.ref.dtype, device=device)
        found = k.measure([slot], scale, Memory([slot], k.piece)).sum(0)
        x, g, delta = (t.detach().double() for t in (slot.param, slot.grad, slot.delta))
        pairs = (delta, g), (delta, x), (g, g), (x, x), (delta, delta)
        wanted = torch.stack([(a * b).sum() for a, b in pairs])
        size = torch.stack([a.norm() * b.norm() for a, b in pairs])
        assert ((found - wanted).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_a_run_is_the_oracles(
    below: tuple[Kernels, torch.device], problem: Problem, base: str, dtype: torch.dtype, tolerance: float
) -> None:
    with using(below[0]):
        parameters_gap, scale_gap = run_both(problem, base, dtype, True, unit=0.1, variant="scale_free")
    assert parameters_gap < tolerance
    # At the end of a cosine nothing pulls S any more, and rounding moves it: eagerly by 3e-4, and 2e-11 in float64.
    assert scale_gap < (1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_edit_of_one_element_is_seen_in_its_piece(
    below: tuple[Kernels, torch.device], dtype: torch.dtype
) -> None:
    """x_ref gives way under that element alone; and nobody looks where nothing was edited."""
    k, device = below
    torch.manual_seed(0)
    one = a_slot(torch.randn(2 * k.piece + 33), dtype, device, 0.5)
    assert one.delta is not None
    one.ref[-1], one.delta[-1] = 0, 2 * one.param[-1].detach()  # so that x_ref can hold the last digit of x
    scale, memory = stepped(k, one)
    before = one.ref.clone()
    one.ref[5] += 100  # x does not stand where it should, but nobody edited x: nobody looks
    k.measure([one], scale, memory)
    assert one.ref[5] == before[5] + 100
    one.ref.copy_(before)
    with torch.no_grad():
        last = one.param[-1]
        one.param[-1] = torch.nextafter(last, torch.full_like(last, math.inf))
        one.param[3], one.param[4] = one.param[4].clone(), one.param[3].clone()  # the sum of the bits stays
    k.measure([one], scale, memory)
    shifted = (one.ref != before).nonzero().flatten().tolist()
    assert shifted == [3, 4, 2 * k.piece + 32]
    wanted = one.param.detach().to(one.ref.dtype) - 0.5 * one.delta
    torch.testing.assert_close(one.ref[shifted], wanted[shifted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [1, 16, 256, 4096])
def test_an_exchange_of_elements_that_never_moved_is_seen(
    below: tuple[Kernels, torch.device], dtype: torch.dtype, apart: int
) -> None:
    """Where Δ is 0 only the places of the bits can tell: also of powers of two, whose bits end in many zeros, and of x
    and -x."""
    k, device = below
    torch.manual_seed(0)
    other = torch.arange(9000) // apart % 2
    for values in (torch.randn(9000), 1.0 + other, 0.5 - other):
        one = a_slot(values, dtype, device, 0.5)
        assert one.delta is not None
        one.delta.zero_()
        one.ref.copy_(values)
        one.param.data.copy_(values)
        scale, memory = stepped(k, one)
        with torch.no_grad():
            one.param[[7, 7 + apart]] = one.param[[7 + apart, 7]]
        shifted = [7, 7 + apart]
        assert not torch.equal(one.ref[shifted], one.param[shifted].to(one.ref.dtype))
        k.measure([one], scale, memory)
        assert torch.equal(one.ref[shifted], one.param[shifted].to(one.ref.dtype))


def test_an_update_that_is_not_finite_stays_out_and_a_step_that_does_not_count_is_undone(
    below: tuple[Kernels, torch.device],
) -> None:
    k, device = below
    torch.manual_seed(0)
    one = a_slot(torch.randn(3000), torch.float32, device, 0.5)
    assert one.delta is not None
    motion = torch.tensor([0.5, 0.5, 1, 1], device=device)
    memory = Memory([one], k.piece)
    k.measure([one], motion[0], memory)
    k.move([one], motion, None, memory)
    before = [t.detach().clone() for t in (one.param, one.delta)]
    one.param.data += 1
    k.move([one], motion, torch.zeros((), dtype=torch.bool, device=device), memory)
    assert all(map(torch.equal, before, (one.param, one.delta)))
    one.param.data += 1
    one.param.data[7], one.param.data[8] = math.nan, math.inf
    k.move([one], motion, torch.ones((), dtype=torch.bool, device=device), memory)
    kept = torch.zeros(3000, dtype=torch.bool, device=device)
    kept[7:9] = True
    torch.testing.assert_close(one.delta, torch.where(kept, before[1], before[1] + 1))
    assert one.param.isfinite().all()


def test_gradients_are_discarded_only_in_a_step_that_does_not_count(below: tuple[Kernels, torch.device]) -> None:
    k, device = below
    slots = [a_slot(t, torch.float32, device, 0.5) for t in shapes(k.piece)]
    memory, grads = Memory(slots, k.piece), [slot.grad.clone() for slot in slots if slot.grad is not None]
    k.discard(slots, torch.ones((), dtype=torch.bool, device=device), memory)
    assert all(map(torch.equal, grads, [slot.grad for slot in slots]))
    k.discard(slots, torch.zeros((), dtype=torch.bool, device=device), memory)
    assert all(not slot.grad.any() for slot in slots if slot.grad is not None)


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
        torch.testing.assert_close(flat(parameters).detach(), before[0])
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
        (groups,) = m._plan.active.values()  # type: ignore[union-attr]
        swept = [slot.param for group in groups if group.kernels is not None for slot in group.slots]
        half = which is not None and torch.float16 in which.dtypes
        assert [any(p is q for q in swept) for p in parameters] == [which is not None, False, False, False, half]
        return [p.detach() for p in parameters]

    for a, b in zip(run(k), run(None), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_swept_apart_keeps_its_own_memory(below: tuple[Kernels, torch.device]) -> None:
    """Two dtypes, more than a piece of one: tables and marks are those of each."""
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


def test_two_runs_give_the_same_bits_on_any_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n)) for n in (200_001, 7, 64, 90_000)]
        m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3, fused=True))
        m.compile()
        count = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            for _ in range(10):
                for p in parameters:
                    p.grad = p.detach().sin()
                m.step()
        finally:
            torch.set_num_threads(count)
        return [*(p.detach() for p in parameters), m.scale]

    first = run(1)
    assert first[-1] > 0
    for threads in (1, 2, 3):
        assert all(map(torch.equal, first, run(threads)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_compiled_run_is_the_eager_one_and_resumes_bitwise(
    problem: Problem, tmp_path: Path, dtype: torch.dtype
) -> None:
    def build() -> tuple[list[nn.Parameter], Mechanic]:
        parameters = problem.parameters(dtype)
        m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3))
        m.compile()
        assert m.compile() is None
        return parameters, m

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
    twin = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    assert [t._compiled for t in twin] == [True, True]
    problem.train(resumed, loaded, range(30, 60))
    assert torch.equal(flat(parameters), flat(resumed))

    if dtype == torch.float64:  # 60 steps in float32 make much of the last digit of a sum
        eager = problem.parameters(dtype)
        problem.train(eager, Mechanic(torch.optim.AdamW(eager, lr=1e-3)), 60)
        assert gap(flat(resumed).detach(), flat(eager).detach(), problem.start) < 1e-12


def test_compile_uses_the_kernels_and_nothing_is_compiled_unasked(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3))
    problem.train(parameters, m, 3)

    def kinds() -> list[Any]:
        assert m._plan is not None
        return [type(group.kernels) for groups in m._plan.active.values() for group in groups]

    assert kinds() == [type(None)]
    m.compile()
    problem.train(parameters, m, 1)
    assert kinds() == [kernels.Native]


@pytest.mark.filterwarnings("ignore")  # torch 2.6 has its own words on such a compiler
def test_without_a_compiler_compile_says_so_and_the_run_goes_on(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr(kernels, "native", kernels.native.__wrapped__)
    monkeypatch.setattr(mechanic, "native", kernels.native)
    parameters = problem.parameters()
    m = Mechanic(torch.optim.AdamW(parameters, lr=1e-3))
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler .* and ninja"):
        m.compile()
    problem.train(parameters, m, 12)
    assert m.scale > 0


def test_a_process_that_is_killed_while_it_compiles_stops_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from manic.kernels import native; native()"]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    victim = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.o")) + list(tmp_path.rglob("lock")):  # it has begun
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not list(tmp_path.rglob("*.so"))
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert len(list(tmp_path.glob("manic/*.so"))) == 1


def test_triton_that_does_not_run_is_replaced_by_the_eager_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = type(_triton())
    monkeypatch.setattr(kernels, "triton", kernels.triton.__wrapped__)
    assert isinstance(kernels.triton(torch.device("cpu")), Kernels)

    def fail(*_: Any) -> Tensor:
        raise OSError("no C compiler")

    with monkeypatch.context() as patch:
        patch.setattr(broken, "measure", fail)
        with pytest.warns(UserWarning, match="do not run on cpu.*no C compiler"):
            assert kernels.triton(torch.device("cpu")) is None
    with monkeypatch.context() as patch:
        patch.setattr(broken, "move", lambda *_: None)
        with pytest.warns(UserWarning, match="wrong results"):
            assert kernels.triton(torch.device("cpu")) is None


COMPILE = """
import torch, triton, warnings
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from manic import triton_kernels as k

warnings.simplefilter("ignore")
for dtype, (X, W, BITS) in k.TYPES.items():
    w = "*fp64" if dtype == torch.float64 else "*fp32"
    types, common = {"X": X, "W": W}, {"BITS": BITS, "ALIGNED": True, "BLOCK": k.BLOCK}
    measure = {"table": "*i64", "scale": w, "left": "*i64", "sums": "*fp64"}
    move = {"table": "*i64", "motion": w, "ok": "*i1", "left": "*i64"}
    jobs = [
        (k._measure, measure, {**types, **common, "KNOWN": True}),
        (k._measure, measure, {**types, **common, "KNOWN": False}),
        (k._move, move, {**types, **common, "LARGEST": torch.finfo(torch.float32).max}),
        (k._move, {**move, "ok": "constexpr"}, {**types, **common, "LARGEST": 1e38, "ok": None}),
        (k._discard, {"table": "*i64", "ok": "*i1"}, {**types, "BLOCK": k.BLOCK}),
    ]
    for kernel, pointers, constants in jobs:
        source = ASTSource(kernel, {**pointers, **dict.fromkeys(constants, "constexpr")}, constants)
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        wide = done.asm["ptx"].count(".v4." if dtype != torch.float64 else ".v2.")
        print(kernel.__name__, dtype, wide, len(done.asm["cubin"]))
        assert kernel is k._discard or wide >= 6  # 16 bytes at a time, where the addresses allow it
"""


def test_the_triton_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """No GPU is needed for that. It finds what the interpreter lets pass, such as a loop that changes a type."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiled_scalar_half_is_the_eager_one() -> None:
    """What compile() asks for on a device; here by way of C++."""
    options, n = Options(), 6
    betas = torch.tensor(options.betas, dtype=torch.float64)
    eager = fused = Tuner.unpack(torch.zeros(Tuner.size(n), dtype=torch.float64), n)
    generator = torch.Generator().manual_seed(0)
    for t in range(30):
        sums = Sums(*torch.randn(len(Sums._fields), dtype=torch.float64, generator=generator).abs())
        sums = sums._replace(delta_grad=-sums.delta_grad if t % 2 else sums.delta_grad)
        ok = torch.tensor(t % 7 != 3)
        lr = torch.tensor(1.0 if t < 20 else 0.5, dtype=torch.float64)
        with torch.no_grad():
            eager = tune(eager, sums, ok, betas, options, 0.1, lr)
            fused = kernels.compiled_tune()(fused, sums, ok, betas, options, 0.1, lr)
    assert eager.scale > 0
    assert eager.skipped == 4
    for a, b in zip(eager, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["eager", "native"])
def test_what_was_worked_out_once_is_not_used_where_it_does_not_hold(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between steps gradients come, go and turn sparse, memory is laid out anew, state vanishes, a group maximizes, a
    parameter is added: the same run, bit for bit, as one that works everything out in every step."""

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(6, 5)) for _ in range(4)]
        m = Mechanic(torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1))
        if kind == "native":
            m.compile()
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
    monkeypatch.setattr(mechanic, "signature", lambda *_: None)
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
