"""Properties that hold for any input, found by hypothesis."""

from __future__ import annotations

import copy
import math
from typing import Any

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training import flat

from manic import Mechanic
from manic.algorithm import tune
from manic.tuner import Options, Sums, TunerState

settings.register_profile("manic", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("manic")

SCALAR = {"dtype": torch.float64}
LR = torch.tensor(1.0, **SCALAR)
FINITE = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def scales(h: list[float], options: Options) -> list[float]:
    """S after each step of the tuner, fed h as ⟨d,g⟩; ‖g‖ scales with h, as both do with the loss."""
    betas = torch.tensor(options.memories, **SCALAR)
    state, trace = TunerState.unpack(torch.zeros(TunerState.size(len(betas)), **SCALAR), len(betas)), []
    for t, value in enumerate(h):
        size = torch.tensor(1.0 if t else 0.0, **SCALAR)
        sums = Sums(
            *(torch.tensor(x, **SCALAR) for x in (value, 0.1, abs(value), 2.0)),
            size,
            1 - size,
            5 * size,
            size,
            -LR,
            -LR,
        )  # the last two: the last step is not known, so that no edit is seen
        state, _ = tune(state, sums, torch.tensor(True), betas, options, 1.0, LR)
        trace.append(state.scale.item())
    return trace


@given(st.lists(FINITE, min_size=2, max_size=20), st.floats(1e-3, 1e3), st.sampled_from(["paper", "scale_free"]))
def test_the_scale_does_not_depend_on_the_scale_of_the_loss(h: list[float], c: float, variant: str) -> None:
    """h → c·h leaves s unchanged as ε → 0."""
    options = Options(variant=variant, eps=1e-200, s_decay=0.0)
    one, two = scales(h, options), scales([c * value for value in h], options)
    for a, b in zip(one, two, strict=True):
        assert math.isclose(a, b, rel_tol=1e-9)
    assert all(map(math.isfinite, one))


@given(st.lists(FINITE, min_size=1, max_size=30), st.integers(0, 29))
def test_a_skipped_step_leaves_the_tuner(h: list[float], at: int) -> None:
    """Put anywhere, sums that are not finite change the count and nothing else."""
    options = Options()
    betas = torch.tensor(options.memories, **SCALAR)
    ends = []
    for skip in (False, True):
        flat_state = torch.zeros(TunerState.size(len(betas)), **SCALAR)
        for t, value in enumerate(h):
            state = TunerState.unpack(flat_state, len(betas))
            if skip and t == at % len(h):
                broken = Sums(*(torch.tensor(math.nan, **SCALAR),) * len(Sums._fields))
                state, motion = tune(state, broken, torch.tensor(False), betas, options, 1.0, LR)
                assert not any(motion)
            sums = Sums(*(torch.tensor(x, **SCALAR) for x in (value, 0.1, 1.0, 2.0, t, 1.0, 5.0, 3.0, 1.0, 1.0)))
            state, _ = tune(state, sums, torch.tensor(True), betas, options, 1.0, LR)
            flat_state = state.pack()
        ends.append(TunerState.unpack(flat_state, len(betas)))
    assert ends[1].skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1]._replace(skipped=ends[0].skipped), strict=True))


def gradients(shapes: list[tuple[int, ...]], t: int, x: list[Tensor], seed: int) -> list[Tensor]:
    """The gradient of Σ cosh-like wells around random points that change with t."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    noise = [0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [(value.double() - 1 + n).tanh() for value, n in zip(x, noise, strict=True)]


@st.composite
def layouts(draw: Any) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes of parameters, and for each the number of its group."""
    shape = st.lists(st.integers(1, 4), max_size=3).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=5))
    return shapes, draw(st.lists(st.integers(0, 2), min_size=len(shapes), max_size=len(shapes)))


@given(layouts(), st.randoms(use_true_random=False), st.sampled_from(["paper", "scale_free"]))
def test_order_and_groups_of_the_parameters_do_not_matter(
    layout: tuple[list[tuple[int, ...]], list[int]], random: Any, variant: str
) -> None:
    shapes, numbers = layout
    order = random.sample(range(len(shapes)), len(shapes))
    ends = []
    for grouped in (False, True):
        parameters = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
        if grouped:
            chosen = {n: [parameters[i] for i in order if numbers[i] == n] for n in set(numbers)}
            groups: Any = [{"params": members} for members in chosen.values()]
        else:
            groups = parameters
        mechanic = Mechanic(torch.optim.SGD(groups, lr=0.5, momentum=0.9), variant=variant, s_init=1e-2)
        for t in range(12):
            for p, g in zip(parameters, gradients(shapes, t, parameters, 0), strict=True):
                p.grad = g
            mechanic.step()
        ends.append((flat(parameters).detach(), mechanic.scale.item()))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-8, atol=1e-10)
    assert math.isclose(ends[0][1], ends[1][1], rel_tol=1e-8)
    assert ends[0][0].abs().max() > 1e-4


@given(
    layouts(),
    st.integers(0, 12),
    st.sampled_from(["paper", "scale_free"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_resume_at_any_step_is_exact(
    layout: tuple[list[tuple[int, ...]], list[int]], at: int, variant: str, dtype: torch.dtype
) -> None:
    shapes, _ = layout

    def build(values: list[Tensor]) -> tuple[list[nn.Parameter], Mechanic]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        return parameters, Mechanic(optimizer, schedule, variant=variant, s_init=1e-2)

    def train(parameters: list[nn.Parameter], mechanic: Mechanic, steps: range) -> None:
        for t in steps:
            for p, g in zip(parameters, gradients(shapes, t, parameters, 1), strict=True):
                p.grad = g.to(p.dtype)
            mechanic.step()

    parameters, mechanic = build([torch.zeros(s, dtype=dtype) for s in shapes])
    train(parameters, mechanic, range(at))
    others, other = build([p.detach() for p in parameters])
    other.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    train(parameters, mechanic, range(at, 13))
    train(others, other, range(at, 13))
    assert torch.equal(flat(parameters), flat(others))
    assert torch.equal(mechanic.scale, other.scale)
    assert flat(parameters).abs().max() > 0


@given(
    layouts(),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(["paper", "scale_free"]),
    st.floats(1e-3, 10.0),
    st.lists(st.floats(0, 1), min_size=1, max_size=7),
    st.floats(0, 1),
)
def test_random_shapes_and_options_against_the_oracle(
    layout: tuple[list[tuple[int, ...]], list[int]],
    dtype: torch.dtype,
    variant: str,
    lr: float,
    betas: list[float],
    s_decay: float,
) -> None:
    shapes, _ = layout
    options: dict[str, Any] = {"variant": variant, "betas": tuple(betas), "s_decay": s_decay}
    if variant == "paper":
        options["s_init"] = 1e-2
    start = [torch.full(s, 0.1, dtype=dtype) for s in shapes]

    def gradient(x: list[float], t: int) -> list[float]:
        values, position = [], 0
        for s in shapes:
            values.append(torch.tensor(x[position : position + math.prod(s)], dtype=torch.float64).view(s))
            position += math.prod(s)
        return flat(gradients(shapes, t, values, 2)).tolist()

    base_lr = lr if variant == "paper" else 1.0
    *_, (x, scale) = oracle.mechanic(
        flat(start).tolist(), gradient, oracle.sgd(base_lr, 0.9), lambda t: 1.0, 10, **options
    )
    parameters = [nn.Parameter(value.clone()) for value in start]
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=lr, momentum=0.9), **options)
    for t in range(10):
        for p, g in zip(parameters, gradients(shapes, t, parameters, 2), strict=True):
            p.grad = g.to(dtype)
        mechanic.step()
    wanted = torch.tensor(x, dtype=torch.float64)
    moved = (wanted - flat(start)).abs().max().item()
    digits = 1e-11 if dtype == torch.float64 else 1e-5
    assert (flat(parameters).detach() - wanted).abs().max().item() < digits * (1 + moved)
    unit = lr if variant == "scale_free" else 1.0
    assert math.isclose(mechanic.scale.item() * unit, scale, rel_tol=1e3 * digits)
