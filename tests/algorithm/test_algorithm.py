"""The algorithm against the float64 plain-Python oracle, and the variants against their promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from comparing import BASES, STEPS, WILD, run_both
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from training import Problem, flat, gap

from manic import Mechanic
from manic.parameters import (
    DELTA,
    REF,
    REST,
    SLOT,
    ParamState,
    collect,
    column,
    layout_of,
    local,
    shards,
    signature,
    split,
)
from manic.sweeps import eager
from manic.sweeps.passes import ENTERED_SQ, MEMBERS, NUMEL, Passes, _alike
from manic.tuner import Sums


@pytest.mark.usefixtures("both_sweeps")
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


@pytest.mark.usefixtures("both_sweeps")
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "cosine"])
@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1), ("custom", 0.1)])
def test_scale_free_is_its_own_equations(problem: Problem, base: str, unit: float, scheduled: bool) -> None:
    arguments = problem, base, torch.float64, scheduled, unit
    assert run_both(*arguments, variant="scale_free")[0] < 1e-10
    # Where the lr goes to 0 rounding in S grows a thousandfold, and moves x no more: S is compared half way.
    assert run_both(*arguments, variant="scale_free", steps=STEPS // 2)[1] < 1e-9


@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1)])
def test_an_lr_that_leaps_is_its_own_equations(problem: Problem, base: str, unit: float) -> None:
    def leaping(t: int) -> float:
        return 1e-6 if t < 3 else 1e-2 if t < 40 else 1.0

    parameters_gap, scale_gap = run_both(problem, base, torch.float64, leaping, unit, variant="scale_free")
    assert parameters_gap < 1e-9
    assert scale_gap < 1e-9


@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1)])
@pytest.mark.parametrize("lowest", [-0.02, -3.0])
def test_an_lr_below_0_is_its_own_equations(problem: Problem, base: str, unit: float, lowest: float) -> None:
    """As where a job runs beyond the end of a schedule. Then an update goes uphill."""

    def falling(t: int) -> float:
        return max(1 - t / 50, lowest)

    arguments = problem, base, torch.float64, falling, unit
    assert run_both(*arguments, variant="scale_free", steps=80)[0] < 1e-9


@pytest.mark.parametrize("wild", [-1e4, 1e4], ids=["up", "down"])
@pytest.mark.parametrize(("base", "unit"), [("sgd", 0.5), ("momentum", 0.1), ("adamw", 0.1)])
def test_a_wild_gradient_is_its_own_equations(problem: Problem, base: str, unit: float, wild: float) -> None:
    parameters_gap, scale_gap = run_both(problem, base, torch.float64, True, unit, wild, variant="scale_free")
    assert parameters_gap < 1e-10
    assert scale_gap < 1e-9


def test_a_wild_gradient_is_not_followed(problem: Problem) -> None:
    """It pointed up the hill that was climbed down: x goes back towards x_ref, and the base has seen zeros."""
    parameters = problem.parameters(torch.float64)
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    problem.train(parameters, mechanic, WILD)
    refs = [mechanic.state[p]["mechanic_ref"].clone() for p in parameters]
    deltas = [(p - ref) / mechanic.scale for p, ref in zip(parameters, refs, strict=True)]
    scale = mechanic.scale.clone()
    problem.loss(parameters, WILD).backward()
    for p, delta in zip(parameters, deltas, strict=True):
        p.grad.add_(1e4 * delta)
    mechanic.step()
    assert 0.2 * scale < mechanic.scale < 0.6 * scale
    back = (mechanic.scale / scale).item()
    assert not any(p.grad.any() for p in parameters)
    for p, ref, delta in zip(parameters, refs, deltas, strict=True):
        new = mechanic.state[p]["mechanic_ref"]
        torch.testing.assert_close(p.detach(), ref + back * scale * delta)
        assert (new - ref).norm() < 0.1 * (p - ref).norm()


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["numbers", "tensors"])
@pytest.mark.parametrize("per_group", [False, True])
def test_the_lr_is_falling_where_that_of_every_group_is(problem: Problem, per_group: bool, kind: Any) -> None:
    """By the group with the highest lr; with per_group each by its own. The base lr does not enter."""
    parameters = problem.parameters()
    groups = [{"params": [p], "lr": kind(lr)} for p, lr in zip(parameters, (1e-3, 3e-3), strict=True)]
    mechanic = Mechanic(torch.optim.AdamW(groups), per_group=per_group)

    def fades() -> list[bool]:
        return (mechanic._run.read("fade") < 1).tolist()

    problem.train(parameters, mechanic, 5)
    assert fades() == [True] * (1 + per_group)
    mechanic.param_groups[0]["lr"] /= 2
    problem.train(parameters, mechanic, 2)
    assert fades() == ([False, True] if per_group else [True])
    mechanic.param_groups[1]["lr"] = mechanic.param_groups[1]["lr"] / 2
    problem.train(parameters, mechanic, 2)
    assert fades() == [False] * (1 + per_group)
    assert mechanic._run.read("peak").tolist() == pytest.approx([1 / 3, 1.0] if per_group else [1.0])


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
@pytest.mark.filterwarnings("ignore:ASGD keeps a copy:UserWarning")
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
def test_a_run_starts_in_the_step_after_the_first_update(problem: Problem, base: str) -> None:
    """By 1e-3·(1 + ‖x_ref‖), or by s_init, but at least by 1e-6·(1 + ‖x_ref‖), if that update is as large."""
    for warm, options in ((1, {}), (4, {}), (1, {"s_init": 1e-3}), (1, {"s_init": 1e-9})):
        parameters = problem.parameters(torch.float64)
        optimizer = INVARIANT[base](parameters, 1e-2)
        mechanic = Mechanic(optimizer, LambdaLR(optimizer, lambda t, warm=warm: float(t + 1 >= warm)), **options)
        start = flat(parameters).detach().clone()
        problem.train(parameters, mechanic, warm)
        assert torch.equal(flat(parameters), start)
        assert mechanic.scale == 0
        problem.train(parameters, mechanic, range(warm, warm + 1))
        assert mechanic.scale > 0
        assert not torch.equal(flat(parameters), start)
        alone = problem.parameters(torch.float64)
        plain = INVARIANT[base](alone, 0.0)
        problem.train(alone, plain, warm - 1)
        plain.param_groups[0]["lr"] = 1e-2
        problem.train(alone, plain, range(warm - 1, warm))
        first = mechanic.scale * (flat(alone).detach() - start).norm() / (1 + start.norm())
        if options.get("s_init") == 1e-3:
            assert mechanic.scale.item() == pytest.approx(1e-3)
        else:
            assert first.item() == pytest.approx(1e-6 if options else 1e-3)


# ---------------------------------------------------------------- the sweeps


def a_state(n: int, dtype: torch.dtype = torch.float32, **changes: Any) -> ParamState:
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    rest = torch.zeros(n, dtype=torch.int16) if dtype == torch.bfloat16 else None
    given = {"param": nn.Parameter(p), "grad": g, "sign": 1.0, "index": 0, "slot": torch.zeros(n), "rest": rest}
    return ParamState(**given | changes)


def sums_of(*states: ParamState, difference: bool = True, scales: int = 1) -> torch.Tensor:
    ((_, sums),) = Passes([*states], difference=difference).measure(torch.zeros(scales, dtype=torch.float64))
    return sums


def test_what_counts_of_an_update() -> None:
    given = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -2.0])
    one = a_state(5, param=nn.Parameter(given.clone()))
    eager.Group([one], True, [torch.zeros(5)]).move(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert one.param.tolist() == pytest.approx([0, 0, 0, 1e38, -2])


def test_sums_by_learned_scale() -> None:
    """Over all parameters of a scale; what is maximized counts the other way in <d,g> alone."""
    kinds = ((3, 0, 1.0, False), (4, 0, -1.0, True), (20_000, 1, -1.0, False))
    states = [a_state(n, index=i, sign=sign, entering=new, member=float(n)) for n, i, sign, new in kinds]
    sums = sums_of(*states, scales=2)
    assert sums[:, NUMEL].tolist() == sums[:, MEMBERS].tolist() == [7, 20_000]
    alone = [sums_of(a_state(n))[0] for n, *_ in kinds]
    torch.testing.assert_close(sums[0, 0], alone[0][0] - alone[1][0])
    torch.testing.assert_close(sums[0, 1:5], alone[0][1:5] + alone[1][1:5])
    assert sums[:, ENTERED_SQ].tolist() == [alone[1][Sums._fields.index("x_sq")], 0]
    assert sums[1, 0] == -alone[2][0]
    assert torch.equal(sums[1, 1:5], alone[2][1:5])


def test_which_parameters_take_part() -> None:
    """Those that have a gradient; each is known again by its place among all."""
    never, now, stays = (nn.Parameter(torch.ones(2).bfloat16()) for _ in range(3))
    now.grad, stays.grad = torch.ones(2).bfloat16(), torch.ones(2).bfloat16()
    members = set()
    for variant, slot in SLOT.items():
        kept = {slot: torch.zeros(2), REST: torch.ones(2, dtype=torch.int16)}
        state = {stays: kept, never: {slot: torch.zeros(2)}}
        groups = [{"params": [never, now]}, {"params": [never, stays], "maximize": True}]
        for per_group in (True, False):
            one, other = collect(groups, state, variant, per_group=per_group)
            assert (one.param is now, one.grad is now.grad, one.sign, one.index) == (True, True, 1, 0)
            assert one.entering
            assert torch.equal(one.slot, torch.full((2,), float(variant == "scale_free")))
            assert torch.equal(one.rest, torch.zeros(2, dtype=torch.int16))
            assert (other.param is stays, other.sign, other.entering) == (True, -1, False)
            assert other.index == (1 if per_group else 0)
            assert other.slot is kept[slot]
            assert other.rest is kept[REST]
            members |= {one.member, other.member}
    assert len(members) == 2
    assert state == {stays: kept, never: state[never]}


def test_no_two_sets_of_parameters_have_the_same_members() -> None:
    """A multiple of the place, modulo 2^32, did: places 1 and 2 had the sum of place 3."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(14)]
    for p in params:
        p.grad = torch.ones(1)
    members = [state.member for state in collect([{"params": params}], {}, "scale_free", per_group=False)]
    sums = {sum(some) for n in range(15) for some in itertools.combinations(members, n)}
    assert len(sums) == 2**14


@pytest.mark.parametrize("variant", ["paper", "scale_free"])
def test_a_parameter_that_has_no_gradient_keeps_x_and_its_slot(problem: Problem, variant: str) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.1), variant=variant)
    problem.train(parameters, mechanic, 20)
    kept = [t.clone() for t in (parameters[1], mechanic.state[parameters[1]][SLOT[variant]], mechanic.scale)]
    for t in range(20):
        mechanic.zero_grad()
        problem.loss(parameters, t).backward()
        parameters[1].grad = None
        mechanic.step()
    assert mechanic.scale != kept[-1]
    assert torch.equal(parameters[1], kept[0])
    assert torch.equal(mechanic.state[parameters[1]][SLOT[variant]], kept[1])


def test_a_gradient_that_is_placed_otherwise() -> None:
    """It follows its parameter. (DTensors themselves: nox -s distributed.)"""

    class Placed:
        device_mesh, shape, dtype = None, torch.Size([2]), torch.float32

        def __init__(self, *placements: Any, grad: Any = None) -> None:
            self.placements, self.grad = placements, grad

        def redistribute(self, placements: Any) -> Any:
            return "moved", placements

    alike = Placed(Shard(0))
    for grad, wanted in ((Placed(Replicate()), ("moved", (Shard(0),))), (alike, alike)):
        p = Placed(Shard(0), grad=grad)
        (one,) = collect([{"params": [p]}], {p: {REF: torch.ones(2)}}, "scale_free", per_group=False)
        assert one.grad == wanted
        assert one.layout == (None, (True,))


def seen(parameters: list[Any], state: Any) -> Any:
    return signature(parameters, [p.grad for p in parameters], state)


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
        lambda p, state: state[p].update({REST: torch.ones(2, 3)}),
        lambda p, state: state.pop(p),
        lambda p, state: state[p].clear(),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_decides_how_parameters_are_taken_together(change: Any, which: int) -> None:
    parameters = [nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)) for _ in range(2)]
    state = {p: {key: torch.zeros(2, 3) for key in (REF, DELTA, REST)} for p in parameters}
    state_before = [dict(entries) for entries in state.values()]  # what is replaced lives on, and so do the ids
    found = []
    for i in range(3):
        for p in parameters:
            p.grad = torch.full((2, 3), float(i), dtype=torch.bfloat16)
        if i == 2:
            change(parameters[which], state)
        found.append(seen(parameters, state))
    assert found[0] == found[1]
    assert found[1] != found[2]
    assert len(state_before) == 2


def test_a_sparse_gradient_is_no_expanded_one() -> None:
    """Both say that their strides are 0."""
    p, found = nn.Parameter(torch.ones(2, 3)), []
    for grad in (torch.ones(()).expand(2, 3), torch.ones(2, 3).to_sparse()):
        p.grad = grad
        assert p.grad.stride() == (0, 0)
        found.append(seen([p], {}))
    assert found[0] != found[1]


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)], ids=str)
def test_other_parameters_are_taken_otherwise(other: torch.Tensor) -> None:
    p, q, r = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    pair = seen([p, q], {})
    assert pair == seen([p, q], {})
    assert pair not in (seen([q, p], {}), seen([p], {}), seen([p, r], {}))
    q.data = other
    assert pair != seen([p, q], {})
    assert seen([p, torch.ones(2)], {}) is not None
    other_class = torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {}))
    assert seen([p, other_class], {}) is None  # who knows what it is made of


def test_over_how_many_processes_a_parameter_is_cut() -> None:
    """By its mesh's sizes where a dimension shards. (DTensors themselves: nox -s distributed.)"""
    mesh = SimpleNamespace(size=lambda i: (2, 3, 5)[i])
    p = SimpleNamespace(device_mesh=mesh, placements=[Replicate(), Shard(0), Shard(1)])
    assert layout_of(p) == (mesh, (False, True, True))
    assert (shards(layout_of(p)), shards(layout_of(torch.ones(3)))) == (15, 1)
    plain = torch.ones(3)
    placed: Any = SimpleNamespace(to_local=lambda: plain)
    assert local(placed) is local(plain) is plain
    assert column([a_state(1, slot=placed, layout=layout_of(p))] * 2, "slot") == [plain, plain]
    assert column([a_state(1, slot=placed)], "slot") == [placed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_elements_keep_their_digits(dtype: torch.dtype) -> None:
    """10 million squares, as exactly as the worst torch.dot of a piece, which is more or less by processor."""
    one = a_state(10_000_000, dtype)
    sums = sums_of(one)[0]
    for values, found in ((one.param.detach(), sums[3]), (one.grad, sums[2])):
        assert values is not None
        pieces = values.float().split(eager.PIECE)
        exact = [piece.double().square().sum().item() for piece in pieces]
        worst = max(abs(torch.dot(piece, piece).item() / total - 1) for piece, total in zip(pieces, exact, strict=True))
        assert abs(found.item() / sum(exact) - 1) <= worst < 1e-4


def test_pieces_are_added_up_in_float64() -> None:
    """A piece of 1e8 and 40 of 1: in float32 the ones would be lost."""
    p = torch.cat([torch.full((1,), 1e4), torch.zeros(eager.PIECE - 1), *[torch.eye(1, eager.PIECE)[0]] * 40])
    assert sums_of(a_state(1, param=nn.Parameter(p), grad=p, slot=p.clone()))[0, 3].item() == 1e8 + 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("difference", [True, False], ids=["x_ref kept", "delta kept"])
def test_sums_of_a_sparse_gradient_are_those_of_a_dense_one(dtype: torch.dtype, difference: bool) -> None:
    """Of several pieces, a large and a small one among them, so that float32 would not do for their sum.

    To 1e-5: so exact is a float32 dot of these in whatever order a processor adds up.
    """
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    stored, rest = split(x, dtype)
    rows = torch.arange(0, 500, 2)
    values = torch.zeros(250, 300, dtype=dtype)
    values[0, 0], values.view(-1)[eager.PIECE + 1 :] = 2**13, 1
    dense = torch.zeros_like(stored).index_copy_(0, rows, values)
    delta = torch.linspace(1, 2, x.numel()).view_as(x)
    slot = x - delta if difference else delta
    sums = [
        sums_of(a_state(1, param=nn.Parameter(stored), grad=g, slot=slot, rest=rest), difference=difference)[0]
        for g in (dense, torch.sparse_coo_tensor(rows[None], values, x.shape, check_invariants=True))
    ]
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=0)
    assert sums[1][2].item() == 2**26 + values.numel() - eager.PIECE - 1 == 2**26 + 9463
    assert sums[1][0].item() == pytest.approx((delta * dense.float()).double().sum().item(), rel=1e-5)


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
    pieces = list(eager.Group([a_state(1, param=nn.Parameter(x), grad=None, slot=other)], True, [x]).pieces())
    assert len(pieces) == x.numel() // eager.PIECE
    assert {one.param.shape for one in pieces} == {piece}
    for one in pieces:
        assert (one.grad, one.rest, one.param.shape) == (None, None, one.slot.shape)
        one.param.add_(1)
        one.slot.add_(one.param)
    assert bool((x == 1).all() and (other == 1).all())


def test_pieces_of_what_is_small_or_not_dense() -> None:
    def sizes(t: torch.Tensor) -> list[torch.Size]:
        return [piece.param.shape for piece in eager.Group([a_state(1, param=t, grad=t, slot=t)], True, [t]).pieces()]

    assert sizes(torch.zeros(0, 3)) == []
    assert sizes(torch.zeros(())) == [(1,)]
    assert sizes(torch.zeros(2 * eager.PIECE + 10)[::2]) == [(eager.PIECE,), (5,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_parameters_go_through_the_sweeps_together(dtype: torch.dtype) -> None:
    """And end at the bits at which they end one by one. A large piece goes alone."""
    sizes = (3, eager.TOGETHER - 5, 4, 0, eager.PIECE + 100, 7, 1)
    motion, runs = torch.tensor([-0.25, 0.5, 0.125, 0.375]), []
    for together in (True, False):
        states = [a_state(n, dtype) for n in sizes]
        for state in states:
            state.slot = torch.linspace(-1, 1, state.slot.numel()).view_as(state.slot)
        groups = [eager.Group(states, True)] if together else [eager.Group([state], True) for state in states]
        if together:
            groups[0].measure()
            counts = [[piece.param.numel() for piece in batch] for batch in groups[0].batches()]
            assert counts == [[3, eager.TOGETHER - 5], [4], [eager.PIECE], [100, 7, 1]]
        sums = torch.cat([group.measure() for group in groups]).double().sum(0)
        for state in states:
            state.param.detach().add_(state.param.detach().roll(1), alpha=0.125)
        found = torch.stack([part for group in groups for part in group.move(motion)]).double().sum(0)
        runs.append((sums, found, [t for one in states for t in (one.param, one.slot, one.rest) if t is not None]))
    for one, two in zip(*[tensors for _, _, tensors in runs], strict=True):
        assert torch.equal(one, two)
    for one, two in zip(runs[0][:2], runs[1][:2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


@pytest.mark.parametrize("other", ["g", "slot", "rest"])
def test_what_may_go_through_one_kernel_together(other: str) -> None:
    """All dense and in one order, whichever; x and g of one dtype; no view that is negated."""

    def alike(make: Callable[[], torch.Tensor], odd: torch.Tensor) -> bool:
        tensors = {name: make() for name in ("x", "g", "slot", "rest")} | {other: odd}
        return _alike(*tensors.values())

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


def test_no_block_is_larger_than_128_ki(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    dot = torch.dot
    monkeypatch.setattr(torch, "dot", lambda a, b: sizes.append(a.numel()) or dot(a, b))
    wide = torch.randn(400, 3000).t()  # a transposed view: neither flat nor cut along dimension 0
    for p in (torch.randn(300_001), torch.randn(8, 3, 200, 200).to(memory_format=torch.channels_last), wide):
        one = a_state(1, param=nn.Parameter(p), grad=torch.ones_like(p), slot=p.clone())
        assert sums_of(one)[0, 2].item() == p.numel()
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


@pytest.mark.parametrize("options", [{}, {"variant": "paper"}, {"per_group": True}], ids=str)
def test_step_reads_one_flag_in_host_memory(trained: Any, problem: Problem, options: dict[str, Any]) -> None:
    parameters, mechanic = trained(torch.optim.SGD, 5, **options)
    problem.loss(parameters, 5).backward()
    with Watch() as watch:
        mechanic.step()
    assert set(watch.reads) == {"aten.nonzero.default"}, "only whether the step counts; on the CPU"
    with Watch() as watch:
        mechanic.scale.sum().item()
    assert len(watch.reads) == 1, "the watch sees a read when there is one"


@pytest.mark.parametrize("options", [{}, {"variant": "paper"}, {"per_group": True}], ids=str)
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


@pytest.mark.parametrize("variant", ["paper", "scale_free"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_dtypes_of_the_state(dtype: torch.dtype, variant: str) -> None:
    """One slot, in float32 or better; and what bfloat16 and float16 cannot hold of x."""
    p = nn.Parameter(torch.randn(4, dtype=torch.float32).to(dtype))
    mechanic = Mechanic(torch.optim.SGD([p], lr=0.1), variant=variant)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        mechanic.step()
    slot = {torch.float64: torch.float64, torch.complex64: torch.complex64}.get(dtype, torch.float32)
    rest = {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(dtype)
    found = {key: t.dtype for key, t in mechanic.state[p].items() if key.startswith("mechanic")}
    assert found == {SLOT[variant]: slot} | ({} if rest is None else {REST: rest})
    assert mechanic.scale.dtype == torch.float64
    assert 0 < mechanic.scale.item() < math.inf


def test_float32_would_not_hold_the_betas() -> None:
    """Why the accumulators are float64: in float32 the slowest one would decay by 1 % too fast."""
    assert abs((1 - torch.tensor(0.999999, dtype=torch.float32).double().item()) / 1e-6 - 1) > 0.01
    p = nn.Parameter(torch.ones(3))
    assert Mechanic(torch.optim.SGD([p], lr=0.1), variant="paper")._run._mode._betas[-1].item() == 0.999999
