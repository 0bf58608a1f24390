"""The algorithm against the float64 plain-Python oracle, and the variants against their promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from conftest import Problem, cosine, flat, gap
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic, sweeps
from manic.storage import DELTA, REF, Slot, column, layout_of, local, shards, signature, slots

STEPS = 200
WILD = 60  # the step whose gradient is, where that is asked for


class Sign(torch.optim.Optimizer):
    """The custom optimizer of oracle.sign, with an option that torch's optimizers do not have."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "power": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign() * p.abs() ** group["power"])


BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[], oracle.Update]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.5), lambda: oracle.sgd(0.5)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda: oracle.sgd(0.1, 0.9)),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda: oracle.sgd(0.1, 0.9, nesterov=True),
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1), lambda: oracle.adamw(0.1, 0.1)),
    "custom": (lambda p: Sign(p, lr=0.1), lambda: oracle.sign(0.1)),
}


def run_both(
    problem: Problem,
    base: str,
    dtype: torch.dtype,
    scheduled: bool | Callable[[int], float],
    unit: float = 1.0,
    wild: float = 1.0,
    **options: Any,
) -> tuple[float, float]:
    """Gap of the parameters and relative gap of the scale after STEPS, Mechanic against the oracle.

    `unit`: the base lr, where the oracle's base works at 1/unit of it and its scale is unit times as large.
    `wild`: what one of the gradients is multiplied with.
    """
    build, update = BASES[base]
    factor = scheduled if callable(scheduled) else cosine(STEPS) if scheduled else lambda t: 1.0
    parameters = problem.parameters(dtype)
    optimizer = build(parameters)
    mechanic = Mechanic(optimizer, LambdaLR(optimizer, factor) if scheduled else None, **options)
    problem.train(parameters, mechanic, WILD)
    for p in parameters:
        p.register_hook(lambda grad: grad * wild if mechanic.param_groups[0]["mechanic_step"] == WILD else grad)
    problem.train(parameters, mechanic, range(WILD, STEPS))

    def gradient(x: list[float], t: int) -> list[float]:
        return [g * (wild if t == WILD else 1) for g in problem.gradient(x, t)]

    start = flat(problem.parameters(dtype)).tolist()
    trace = oracle.mechanic(start, gradient, update(), lambda t: factor(t) / unit, STEPS, **options)
    *_, (x, scale) = trace
    assert scale > 1e-4, "the scale never started: the comparison would be vacuous"
    return gap(flat(parameters).detach(), x, start), abs(mechanic.scale.item() * unit - scale) / scale


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "cosine"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_paper_is_algorithm_1(
    problem: Problem, base: str, scheduled: bool, dtype: torch.dtype, tolerance: float
) -> None:
    parameters_gap, scale_gap = run_both(problem, base, dtype, scheduled, variant="paper", s_init=1e-4)
    assert parameters_gap < tolerance
    assert scale_gap < tolerance * 10


def test_paper_with_all_defaults_is_algorithm_1(problem: Problem) -> None:
    parameters_gap, _ = run_both(problem, "momentum", torch.float64, False, variant="paper")
    assert parameters_gap < 1e-10


@pytest.mark.parametrize(
    "options", [{"betas": (0.0, 0.5, 1.0)}, {"s_decay": 0.5}, {"eps": 0.1}, {"s_init": 0.01}], ids=str
)
def test_every_option_is_the_papers(problem: Problem, options: dict[str, Any]) -> None:
    options = {"s_init": 1e-4, **options}
    parameters_gap, _ = run_both(problem, "sgd", torch.float64, True, variant="paper", **options)
    assert parameters_gap < 1e-10


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "cosine"])
@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1), ("custom", 0.1)])
def test_scale_free_is_its_own_equations(problem: Problem, base: str, unit: float, scheduled: bool) -> None:
    parameters_gap, scale_gap = run_both(problem, base, torch.float64, scheduled, unit, variant="scale_free")
    assert parameters_gap < 1e-10
    assert scale_gap < 1e-9


@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1)])
def test_an_lr_that_leaps_is_its_own_equations(problem: Problem, base: str, unit: float) -> None:
    def leaping(t: int) -> float:
        return 1e-6 if t < 3 else 1e-2 if t < 40 else 1.0

    parameters_gap, scale_gap = run_both(problem, base, torch.float64, leaping, unit, variant="scale_free")
    assert parameters_gap < 1e-9
    assert scale_gap < 1e-9


@pytest.mark.parametrize("wild", [-1e4, 1e4], ids=["up", "down"])
@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1)])
def test_a_wild_gradient_is_its_own_equations(problem: Problem, base: str, unit: float, wild: float) -> None:
    parameters_gap, scale_gap = run_both(problem, base, torch.float64, True, unit, wild, variant="scale_free")
    assert parameters_gap < 1e-10
    assert scale_gap < 1e-9


@pytest.mark.parametrize("store_delta", [True, False], ids=["stored", "recomputed"])
def test_a_wild_gradient_is_not_followed(problem: Problem, store_delta: bool) -> None:
    """It pointed up the hill that was climbed down: x goes back towards x_ref, and the base has seen zeros."""
    parameters = problem.parameters(torch.float64)
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), store_delta=store_delta)
    problem.train(parameters, mechanic, WILD)
    refs = [mechanic.state[p]["mechanic_ref"].clone() for p in parameters]
    deltas = [(p - ref) / mechanic.scale for p, ref in zip(parameters, refs, strict=True)]
    scale = mechanic.scale.clone()
    problem.loss(parameters, WILD).backward()
    for p, delta in zip(parameters, deltas, strict=True):
        p.grad.add_(1e4 * delta)
    mechanic.step()
    assert mechanic.scale == pytest.approx(scale.item() * math.exp(-3))
    assert not any(p.grad.any() for p in parameters)
    for p, ref, delta in zip(parameters, refs, deltas, strict=True):
        new = mechanic.state[p]["mechanic_ref"]
        torch.testing.assert_close(p.detach(), ref + mechanic.scale * delta / 0.9)
        assert (new - ref).norm() < 0.1 * (p - ref).norm()


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["numbers", "tensors"])
@pytest.mark.parametrize("per_group", [False, True])
def test_the_lr_is_falling_where_that_of_every_group_is(problem: Problem, per_group: bool, kind: Any) -> None:
    """By the group with the highest lr; with per_group each by its own. The base lr does not enter."""
    parameters = problem.parameters()
    groups = [{"params": [p], "lr": kind(lr)} for p, lr in zip(parameters, (1e-3, 3e-3), strict=True)]
    mechanic = Mechanic(torch.optim.AdamW(groups), per_group=per_group)

    def fades() -> list[bool]:
        return (mechanic._read("fade") < 1).tolist()

    problem.train(parameters, mechanic, 5)
    assert fades() == [True] * (1 + per_group)
    mechanic.param_groups[0]["lr"] /= 2
    problem.train(parameters, mechanic, 2)
    assert fades() == ([False, True] if per_group else [True])
    mechanic.param_groups[1]["lr"] = mechanic.param_groups[1]["lr"] / 2
    problem.train(parameters, mechanic, 2)
    assert fades() == [False] * (1 + per_group)
    assert mechanic._read("peak").tolist() == pytest.approx([1 / 3, 1.0] if per_group else [1.0])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_lower_lr_is_not_made_up_for(problem: Problem, base: str) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(INVARIANT[base](parameters, 1e-3))
    problem.train(parameters, mechanic, 200)
    for group in mechanic.param_groups:
        group["lr"] *= 0.01
    lowered = mechanic.effective_lr()[0]
    problem.train(parameters, mechanic, 400)
    assert mechanic.effective_lr()[0] == pytest.approx(lowered, rel=0.5)


def test_the_oracle_is_sensitive(problem: Problem) -> None:
    """The comparisons above can fail: another λ is seen at once."""
    start = problem.start
    *_, (x, _) = oracle.mechanic(start, problem.gradient, oracle.sgd(0.5), lambda t: 1.0, STEPS, s_decay=0.02)
    *_, (y, _) = oracle.mechanic(start, problem.gradient, oracle.sgd(0.5), lambda t: 1.0, STEPS, s_decay=0.01)
    assert gap(x, y, start) > 1e-5


INVARIANT = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    # Their updates are not proportional to lr: they work as at lr = 1, whatever the base lr.
    "rprop": lambda p, lr: torch.optim.Rprop(p, lr=lr),
    "asgd": lambda p, lr: torch.optim.ASGD(p, lr=lr),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
}


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "cosine"])
@pytest.mark.parametrize("base", INVARIANT)
def test_scale_free_gives_the_same_run_at_every_base_lr(problem: Problem, base: str, scheduled: bool) -> None:
    ends, learned = {}, {}
    for lr in (1e-8, 1e-4, 1.0, 1e4):
        parameters = problem.parameters()
        optimizer = INVARIANT[base](parameters, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS) if scheduled else None
        mechanic = Mechanic(optimizer, schedule)
        problem.train(parameters, mechanic, STEPS - 1)
        ends[lr], learned[lr] = flat(parameters).detach(), mechanic.effective_lr()[0]
    for lr, end in ends.items():
        assert gap(end, ends[1.0], problem.start) < 1e-3
        assert learned[lr] == pytest.approx(learned[1.0], rel=1e-3)
        assert learned[lr] > 0


def test_paper_depends_on_the_base_lr(problem: Problem) -> None:
    """What the test above would show of a wrapper without the variant."""
    ends = []
    for lr in (1e-4, 1.0):
        parameters = problem.parameters()
        problem.train(parameters, Mechanic(INVARIANT["adamw"](parameters, lr), variant="paper"), STEPS)
        ends.append(flat(parameters).detach())
    assert gap(ends[0], ends[1], problem.start) > 1e-2


def test_the_ratios_of_the_groups_lrs_are_kept(problem: Problem) -> None:
    """SGD with groups at 3·lr and lr is SGD at lr whose first half sees, in the base alone, 3 times its gradient."""
    ends = []
    for lrs, factor in (((3e-5, 1e-5), 1.0), ((1e-5, 1e-5), 3.0)):
        parameters = problem.parameters(torch.float64)
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, lrs, strict=True)]
        mechanic = Mechanic(torch.optim.SGD(groups), s_init=10.0)

        def multiply(*_: Any, parameters: Any = parameters, factor: float = factor) -> None:
            parameters[0].grad.mul_(factor)

        mechanic.base_optimizer.register_step_pre_hook(multiply)
        problem.train(parameters, mechanic, 100)
        ends.append(flat(parameters).detach())
    assert gap(*ends, problem.start) < 1e-9


def test_effective_lr_is_group_lr_times_scale(trained: Any) -> None:
    _, mechanic = trained(lr=1e-3)
    mechanic.param_groups[0]["lr"] = 0.5
    assert mechanic.effective_lr() == [0.5 * mechanic.scale.item()]
    assert mechanic.scale.item() > 1e-6


@pytest.mark.parametrize("variant", ["paper", "scale_free"])
def test_per_group_is_one_mechanic_per_group(problem: Problem, variant: str) -> None:
    options = {"variant": variant, "s_init": 1e-3}
    together, apart = problem.parameters(torch.float64), problem.parameters(torch.float64)
    one = Mechanic(torch.optim.AdamW([{"params": [p]} for p in together], lr=0.1), per_group=True, **options)
    two = [Mechanic(torch.optim.AdamW([p], lr=0.1), **options) for p in apart]
    for t in range(100):
        problem.loss(together, t).backward()
        problem.loss(apart, t).backward()
        for optimizer in (one, *two):
            optimizer.step()
            optimizer.zero_grad()
    assert one.scale.shape == (2,)
    assert one.scale.tolist() == pytest.approx([mechanic.scale.item() for mechanic in two])
    assert one.scale[0] != one.scale[1]
    assert gap(flat(together).detach(), flat(apart).detach(), problem.start) < 1e-10


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_recomputed_delta_starts_and_follows_the_stored_one(problem: Problem, base: str) -> None:
    losses = []
    for store_delta in (True, False):
        parameters = problem.parameters()
        mechanic = Mechanic(INVARIANT[base](parameters, 1e-3), store_delta=store_delta)
        problem.train(parameters, mechanic, 400)
        losses.append(sum(problem.loss(parameters, t).item() for t in range(4)))
        assert mechanic.scale > 0
        assert ("mechanic_delta" in mechanic.state[parameters[0]]) == store_delta
    start = sum(problem.loss(problem.parameters(), t).item() for t in range(4))
    assert losses[0] < 0.3 * start
    assert losses[1] - losses[0] < 0.05 * (start - losses[0])


def test_recomputed_delta_starts_when_the_schedule_starts_at_zero(problem: Problem) -> None:
    parameters = problem.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    mechanic = Mechanic(optimizer, LambdaLR(optimizer, lambda t: min(1.0, t / 20)), store_delta=False)
    problem.train(parameters, mechanic, 60)
    assert mechanic.scale > 0
    gap(flat(parameters).detach(), flat(parameters).detach(), problem.start)  # it moved


# ---------------------------------------------------------------- the sweeps


def slot(n: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Slot:
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    ref, delta = p.to(torch.promote_types(dtype, torch.float32)), torch.zeros(n)
    return Slot(**{"param": nn.Parameter(p), "grad": g, "sign": 1.0, "index": 0, "ref": ref, "delta": delta, **changes})


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.linspace(1, 2, 8), torch.int64),
        (torch.linspace(1, 2, 10)[2:], torch.int64),
        (torch.linspace(1, 2, 8, dtype=torch.float64), torch.int64),
        (torch.linspace(1, 2, 8, dtype=torch.bfloat16), torch.int64),
        # what is not whole words of 64 bits, end to end and from the start
        (torch.linspace(1, 2, 7), torch.int32),
        (torch.linspace(1, 2, 9)[1:], torch.int32),
        (torch.linspace(1, 2, 16)[::2], torch.int32),
        (torch.linspace(1, 2, 8).view(2, 4).T, torch.int32),
        (torch.linspace(1, 2, 8).view(2, 4), torch.int32),
        (torch.linspace(1, 2, 6, dtype=torch.bfloat16), torch.int16),
        (torch.linspace(1, 2, 8, dtype=torch.float64).view(2, 4).T, torch.int64),
    ],
    ids=str,
)
def test_the_sum_of_the_bits(x: torch.Tensor, words: torch.dtype) -> None:
    row = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1)
    weighted, bits = sweeps._checksums(x, row)
    assert torch.equal(bits, x.contiguous().view(-1).view(words).sum())
    assert not torch.equal(weighted, sweeps._checksums(x, row.flip(0))[0])  # the order counts


def test_what_counts_of_an_update() -> None:
    given = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -2.0])
    for counts, wanted in ((None, [0, 0, 0, 1e38, -2]), (True, [0, 0, 0, 1e38, -2]), (False, [0] * 5)):
        update = given.clone()
        found = sweeps._finite(update, None if counts is None else torch.tensor(counts))
        assert found is update
        assert torch.equal(found, torch.tensor(wanted, dtype=torch.float32))


def test_small_tensors_are_taken_together() -> None:
    """As many as fill PACKED, and not one element more; large and empty ones are alone."""
    sizes = [sweeps.SMALL] * 5 + [sweeps.SMALL + 1, 0, 1]
    groups = sweeps.grouped([slot(n) for n in sizes])
    found = sorted([one.param.numel() for one in group.slots] for group in groups)
    assert found == [[0], [sweeps.SMALL, 1], [sweeps.SMALL] * 4, [sweeps.SMALL + 1]]
    assert sorted(group.numel for group in groups) == sorted(map(sum, found))
    assert 4 * sweeps.SMALL == sweeps.PACKED


def test_sums_by_learned_scale() -> None:
    """The number of elements, and ‖u‖² of what is recomputed: over all parameters of a scale."""
    groups = sweeps.grouped([slot(n, delta=None, index=i) for n, i in ((3, 0), (4, 0), (20_000, 1))])
    sums = sweeps.measure(groups, torch.zeros(2, dtype=torch.float64), {})
    assert sums[:, sweeps.NUMEL].tolist() == [7, 20_000]
    for group in groups:
        for one in group.slots:
            one.param.data += 2.0
    update_sq, _ = sweeps.move(groups, sweeps.still(torch.ones(2, dtype=torch.float64)), None, {})
    assert update_sq.tolist() == pytest.approx([4 * 7, 4 * 20_000], rel=1e-5)


def test_a_recomputed_delta_is_held_while_its_scale_changes() -> None:
    """x_ref moves instead. Where S was 0, so was Δ."""
    x = torch.tensor([[3.0, -1.0, 2.0]])
    sat_out = [slot(1, param=nn.Parameter(x.clone()), ref=torch.ones(1, 3), delta=None, index=i) for i in (0, 1)]
    before, after = torch.tensor([0.5, 0.0]), torch.tensor([2.0, 4.0])
    sweeps.hold(sat_out, before, after)
    delta = torch.tensor([[4.0, -4.0, 2.0]])  # (x - 1) / 0.5
    assert torch.equal(sat_out[0].ref + 2 * delta, x)
    assert torch.equal(sat_out[1].ref, x)
    assert all(torch.equal(one.param, x) for one in sat_out)


def test_which_parameters_take_part() -> None:
    """Those that have a gradient or had one; what never had one stands in nobody's way."""
    never, now, sits_out = (nn.Parameter(torch.ones(2)) for _ in range(3))
    now.grad = torch.ones(2)
    state = {sits_out: {REF: torch.zeros(2), DELTA: torch.ones(2)}}
    groups = [{"params": [never, now]}, {"params": [never, sits_out], "maximize": True}]
    for per_group in (True, False):
        one, other = slots(groups, state, store_delta=True, per_group=per_group)
        assert (one.param is now, one.grad is now.grad, one.sign, one.index, one.entering) == (True, True, 1, 0, True)
        assert torch.equal(one.ref, now)
        assert torch.equal(one.delta, torch.zeros(2))
        assert (other.param is sits_out, other.grad, other.sign, other.entering) == (True, None, -1, False)
        assert other.index == (1 if per_group else 0)
        assert other.ref is state[sits_out][REF]
        assert other.delta is state[sits_out][DELTA]


def test_a_gradient_that_is_placed_otherwise() -> None:
    """It follows its parameter. (DTensors themselves: nox -s distributed.)"""

    class Placed:
        device_mesh, shape = None, torch.Size([2])

        def __init__(self, *placements: Any, grad: Any = None) -> None:
            self.placements, self.grad = placements, grad

        def redistribute(self, placements: Any) -> Any:
            return "moved", placements

    alike = Placed(Shard(0))
    for grad, wanted in ((Placed(Replicate()), ("moved", (Shard(0),))), (alike, alike), (None, None)):
        p = Placed(Shard(0), grad=grad)
        (one,) = slots([{"params": [p]}], {p: {REF: torch.ones(2)}}, store_delta=True, per_group=False)
        assert one.grad == wanted
        assert one.layout == (None, (True,))


@pytest.mark.parametrize(
    "change",
    [
        lambda p, state: setattr(p, "grad", None),
        lambda p, state: setattr(p, "grad", p.grad.to_sparse()),
        lambda p, state: setattr(p, "grad", p.grad.t().contiguous().t()),
        lambda p, state: setattr(p, "grad", torch._neg_view(p.grad)),
        lambda p, state: setattr(p, "data", p.data.t().contiguous().t()),
        lambda p, state: state[p].update({REF: torch.ones(2, 3)}),
        lambda p, state: state[p].update({DELTA: torch.ones(2, 3)}),
        lambda p, state: state.pop(p),
        lambda p, state: state[p].clear(),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_decides_how_parameters_are_taken_together(change: Any, which: int) -> None:
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    state = {p: {REF: torch.zeros(2, 3), DELTA: torch.zeros(2, 3)} for p in parameters}
    state_before = [dict(entries) for entries in state.values()]  # what is replaced lives on, and so do the ids
    found = []
    for i in range(3):
        for p in parameters:
            p.grad = torch.full((2, 3), float(i))
        if i == 2:
            change(parameters[which], state)
        found.append(signature(parameters, state))
    assert found[0] == found[1]
    assert found[1] != found[2]
    assert len(state_before) == 2


def test_a_sparse_gradient_is_no_expanded_one() -> None:
    """Both say that their strides are 0."""
    p, found = nn.Parameter(torch.ones(2, 3)), []
    for grad in (torch.ones(()).expand(2, 3), torch.ones(2, 3).to_sparse()):
        p.grad = grad
        assert p.grad.stride() == (0, 0)
        found.append(signature([p], {}))
    assert found[0] != found[1]


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)], ids=str)
def test_other_parameters_are_taken_otherwise(other: torch.Tensor) -> None:
    p, q, r = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    pair = signature([p, q], {})
    assert pair == signature([p, q], {})
    assert pair not in (signature([q, p], {}), signature([p], {}), signature([p, r], {}))
    q.data = other
    assert pair != signature([p, q], {})
    assert signature([p, torch.ones(2)], {}) is not None
    other_class = torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {}))
    assert signature([p, other_class], {}) is None  # who knows what it is made of


def test_over_how_many_processes_a_parameter_is_cut() -> None:
    """By its mesh's sizes where a dimension shards. (DTensors themselves: nox -s distributed.)"""
    mesh = SimpleNamespace(size=lambda i: (2, 3, 5)[i])
    p = SimpleNamespace(device_mesh=mesh, placements=[Replicate(), Shard(0), Shard(1)])
    assert layout_of(p) == (mesh, (False, True, True))
    assert (shards(layout_of(p)), shards(layout_of(torch.ones(3)))) == (15, 1)
    plain = torch.ones(3)
    placed: Any = SimpleNamespace(to_local=lambda: plain)
    assert local(placed) is local(plain) is plain
    assert column([slot(1, ref=placed, layout=layout_of(p))] * 2, "ref") == [plain, plain]
    assert column([slot(1, ref=placed)], "ref") == [placed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_elements_keep_their_digits(dtype: torch.dtype) -> None:
    """10 million squares, as exactly as the worst torch.dot of a piece, which is more or less by processor."""
    one = slot(10_000_000, dtype)
    sums = sweeps.measure(sweeps.grouped([one]), torch.zeros(1, dtype=torch.float64), {})[0]
    for values, found in ((one.param.detach(), sums[3]), (one.grad, sums[2])):
        assert values is not None
        pieces = values.float().split(sweeps.PIECE)
        exact = [piece.double().square().sum().item() for piece in pieces]
        worst = max(abs(torch.dot(piece, piece).item() / total - 1) for piece, total in zip(pieces, exact, strict=True))
        assert abs(found.item() / sum(exact) - 1) <= worst < 1e-4


def test_pieces_are_added_up_in_float64() -> None:
    """A piece of 1e8 and 40 of 1: in float32 the ones would be lost."""
    p = torch.cat([torch.full((1,), 1e4), torch.zeros(sweeps.PIECE - 1), *[torch.eye(1, sweeps.PIECE)[0]] * 40])
    one = slot(1, param=nn.Parameter(p), grad=p, ref=p.clone(), delta=torch.zeros_like(p))
    assert sweeps.measure(sweeps.grouped([one]), torch.zeros(1, dtype=torch.float64), {})[0][3].item() == 1e8 + 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "recomputed"])
def test_sums_of_a_sparse_gradient_are_those_of_a_dense_one(dtype: torch.dtype, stored: bool) -> None:
    """Of several pieces, a large and a small one among them, so that float32 would not do for their sum.

    To 1e-5: so exact is a float32 dot of these in whatever order a processor adds up.
    """
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.arange(0, 500, 2)
    values = torch.zeros(250, 300, dtype=dtype)
    values[0, 0], values.view(-1)[sweeps.PIECE + 1 :] = 2**13, 1
    dense = torch.zeros_like(x).index_copy_(0, rows, values)
    delta = torch.linspace(1, 2, x.numel()).view_as(x)
    sums = []
    for g in (dense, torch.sparse_coo_tensor(rows[None], values, x.shape, check_invariants=True)):
        ref = x.float() - delta / 2 + stored  # which shows where Δ is not recomputed
        one = slot(1, param=nn.Parameter(x), grad=g, ref=ref, delta=delta if stored else None)
        sums.append(sweeps.measure(sweeps.grouped([one]), torch.full((1,), 0.5, dtype=torch.float64), {})[0])
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=0)
    assert sums[1][2].item() == 2**26 + values.numel() - sweeps.PIECE - 1 == 2**26 + 9463
    assert sums[1][0].item() == pytest.approx(
        (delta * dense.float()).double().sum().item(), rel=1e-5 if stored else 1e-2
    )


@pytest.mark.parametrize(
    ("shape", "piece"),
    [((512, 1024), (256, 256)), ((1024, 512), (256, 256)), ((2, 8, 8, 4096), (2, 8, 8, 512)), ((256, 256), (256, 256))],
    ids=str,
)
def test_tensors_that_lie_in_different_orders_are_cut_alike_along_the_longest_dimension(
    shape: tuple[int, ...], piece: tuple[int, ...]
) -> None:
    x = torch.zeros(shape)
    other = torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1])
    pieces = list(sweeps._pieces(x, None, other))
    assert len(pieces) == x.numel() // sweeps.PIECE
    assert {a.shape for a, _, _ in pieces} == {piece}
    for a, none, b in pieces:
        assert (none, a.shape) == (None, b.shape)
        a += 1
        b += a
    assert bool((x == 1).all() and (other == 1).all())


def test_pieces_of_what_is_small_or_not_dense() -> None:
    assert list(sweeps._pieces(torch.zeros(0, 3))) == []
    assert [piece[0].shape for piece in sweeps._pieces(torch.zeros(()))] == [(1,)]
    every_other = torch.zeros(2 * sweeps.PIECE + 10)[::2]
    assert [piece[0].numel() for piece in sweeps._pieces(every_other)] == [sweeps.PIECE, 5]


@pytest.mark.parametrize("other", ["g", "ref", "delta"])
def test_what_may_go_through_one_kernel_together(other: str) -> None:
    """All dense and in one order, whichever; x and g of one dtype; no view that is negated."""

    def alike(make: Callable[[], torch.Tensor], odd: torch.Tensor) -> bool:
        tensors = {name: make() for name in ("x", "g", "ref", "delta")} | {other: odd}
        return sweeps._alike(**tensors)

    x = torch.zeros(4, 6)
    assert alike(lambda: x, x)
    assert alike(lambda: torch.zeros(6, 4).t(), torch.zeros(6, 4).t())
    assert not alike(lambda: x, torch.zeros(6, 4).t())
    assert not alike(lambda: torch.zeros(6, 4).t(), x)
    assert not alike(lambda: x, torch.zeros(4, 12)[:, ::2])
    assert not alike(lambda: x, torch.zeros(24))
    assert alike(lambda: x, x.double()) == (other != "g")
    if other == "g":
        assert not alike(lambda: x, torch._neg_view(x))


def test_a_recomputed_delta_is_zero_where_the_scale_is() -> None:
    x, ref = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])
    assert sweeps._recomputed(x, ref, torch.tensor(0.0)).tolist() == [0, 0]
    assert sweeps._recomputed(x, ref, torch.tensor(0.5)).tolist() == [2, 0]


@pytest.mark.parametrize("counts", [None, True, False])
def test_moves_where_delta_is_recomputed(counts: bool | None) -> None:
    """In several pieces: ‖u‖² is theirs together; and what does not count leaves x to the bit."""
    x = torch.randn(sweeps.PIECE + 9, generator=torch.Generator().manual_seed(0))
    one = slot(1, param=nn.Parameter(x.clone()), grad=x, ref=x - 0.1, delta=None)
    groups, scale = sweeps.grouped([one]), torch.full((1,), 0.3, dtype=torch.float64)
    sweeps.measure(groups, scale, {})
    with torch.no_grad():
        one.param += 2
    counted = None if counts is None else torch.tensor([counts])
    update_sq, _ = sweeps.move(groups, sweeps.still(scale), counted, {})
    if counts is False:
        assert update_sq.item() == 0
        assert torch.equal(one.param, x)
    else:
        assert update_sq.item() == pytest.approx(4 * x.numel(), rel=1e-5)  # a dot of 64 Ki, in whatever order
        torch.testing.assert_close(one.param.detach(), x + 0.3 * 2)


def test_no_block_is_larger_than_128_ki(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    dot = torch.dot
    monkeypatch.setattr(torch, "dot", lambda a, b: sizes.append(a.numel()) or dot(a, b))
    wide = torch.randn(400, 3000).t()  # a transposed view: neither flat nor cut along dimension 0
    for p in (torch.randn(300_001), torch.randn(8, 3, 200, 200).to(memory_format=torch.channels_last), wide):
        one = slot(1, param=nn.Parameter(p), grad=torch.ones_like(p), ref=p.clone(), delta=torch.zeros_like(p))
        sums = sweeps.measure(sweeps.grouped([one]), torch.zeros(1, dtype=torch.float64), {})[0]
        assert sums[2].item() == p.numel()
    assert max(sizes) <= 128 * 1024


class Watch(TorchDispatchMode):
    """Notes what reads a value from the host: item(), bool(), and shapes that hang on values."""

    READS = ("local_scalar_dense", "aten.equal", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.READS):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"variant": "paper"}, {"store_delta": False}, {"per_group": True}], ids=str)
def test_step_reads_two_flags_in_host_memory(trained: Any, problem: Problem, options: dict[str, Any]) -> None:
    parameters, mechanic = trained(torch.optim.SGD, 5, **options)
    problem.loss(parameters, 5).backward()
    with Watch() as watch:
        mechanic.step()
    reads = ["aten.equal.default"] * ("store_delta" not in options) + ["aten.nonzero.default"]
    assert sorted(set(watch.reads)) == reads, "only whether somebody edited x, and whether the step counts; on the CPU"
    with Watch() as watch:
        mechanic.scale.sum().item()
    assert len(watch.reads) == 1, "the watch sees a read when there is one"


@pytest.mark.parametrize("options", [{}, {"variant": "paper"}, {"store_delta": False}, {"per_group": True}], ids=str)
def test_step_reads_nothing_back_from_a_device(options: dict[str, Any]) -> None:
    """On the meta device there is nothing to read: any look at a value raises."""
    parameters = [nn.Parameter(torch.empty(5, 3, device="meta")), nn.Parameter(torch.empty(4, device="meta"))]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1, momentum=0.9)
    mechanic = Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10), **options)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.empty_like(p)
        mechanic.step()
    assert mechanic.scale.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        mechanic.effective_lr()


def test_the_accumulators_live_on_the_device_that_was_asked_for() -> None:
    p = nn.Parameter(torch.ones(3))
    mechanic = Mechanic(torch.optim.SGD([p], lr=0.1), device="meta")
    assert mechanic.param_groups[0]["mechanic_state"].device.type == "meta"
    assert mechanic.scale.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_dtypes_of_the_state(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(4, dtype=torch.float32).to(dtype))
    mechanic = Mechanic(torch.optim.SGD([p], lr=0.1))
    for _ in range(3):
        p.grad = torch.ones_like(p)
        mechanic.step()
    wide = {torch.float64: torch.float64, torch.complex64: torch.complex64}.get(dtype, torch.float32)
    assert {mechanic.state[p][key].dtype for key in ("mechanic_ref", "mechanic_delta")} == {wide}
    assert mechanic.scale.dtype == torch.float64
    assert math.isfinite(mechanic.scale.item())


def test_float32_would_not_hold_the_betas() -> None:
    """Why the accumulators are float64: in float32 the slowest one would decay by 1 % too fast."""
    assert abs((1 - torch.tensor(0.999999, dtype=torch.float32).double().item()) / 1e-6 - 1) > 0.01
    p = nn.Parameter(torch.ones(3))
    assert Mechanic(torch.optim.SGD([p], lr=0.1))._betas[-1].item() == 0.999999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[200_001], [64, 1, 7, 300], [9_000, 30, 200_000]], ids=str)
def test_the_smallest_edit_of_one_element_is_seen_and_without_edits_nobody_looks(
    sizes: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last digit of one element is lost in <Δ,x> and in ‖x‖², but not in the checksum of the bits."""
    looks = []
    anchor = sweeps._anchor
    monkeypatch.setattr(sweeps, "_anchor", lambda *given: looks.append(given) or anchor(*given))
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    mechanic = Mechanic(torch.optim.AdamW(parameters, lr=1e-3))

    def step() -> int:
        looks.clear()
        for p in parameters:
            p.grad = p.detach().clone()
        mechanic.step()
        return len(looks)

    assert [step() for _ in range(6)] == [1, 0, 0, 0, 0, 0]
    p = parameters[0]
    with torch.no_grad():
        p[-1] = torch.nextafter(p[-1], torch.tensor(9.0, dtype=dtype))
    assert [step(), step()] == [1, 0]
    words = 8 // p.element_size()  # an exchange of whole words leaves the sum of the bits as it is
    p.data[: 2 * words] = p.data[: 2 * words].roll(words)
    assert [step(), step()] == [1, 0]


def test_what_was_left_of_one_parameter_says_nothing_of_its_twin() -> None:
    """Equal x and Δ, but x_ref of the twin, which sat out while S changed, must give way."""
    one, twin = (slot(10, ref=torch.zeros(10)) for _ in range(2))
    scale = torch.ones(1, dtype=torch.float64)
    _, carried = sweeps.move(sweeps.grouped([one]), sweeps.still(scale), None, {})
    twin.param.data.copy_(one.param)
    twin.delta.copy_(one.delta)
    refs = one.ref.clone(), twin.ref.clone()
    sweeps.measure(sweeps.grouped([one]), scale, carried)
    sweeps.measure(sweeps.grouped([twin]), 2 * scale, carried)
    assert torch.equal(one.ref, refs[0])
    torch.testing.assert_close(twin.ref, twin.param.detach() - 2 * twin.delta)
    assert not torch.equal(twin.ref, refs[1])


def test_putting_many_small_tensors_together_looks_at_each_a_few_times() -> None:
    looks = 0

    class Watched(Slot):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "ref"
            return super().__getattribute__(name)

    watched = [Watched(*(vars(slot(1))[name] for name in ("param", "grad", "sign", "index", "ref", "delta")))] * 1000
    (group,) = sweeps.grouped(watched)
    assert len(group.slots) == group.numel == 1000
    assert looks < 10 * 1000
