"""What users do to an optimizer, done to a Mechanic."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR
from training import Problem, Wrapped, flat, gap

from manic import Mechanic, is_mechanized, mechanize

VARIANTS: dict[str, dict[str, Any]] = {"scale_free": {}, "paper": {"variant": "paper", "s_init": 0.2}}
both = pytest.mark.parametrize("variant", VARIANTS)


def adamw(parameters: Any, **options: Any) -> Mechanic:
    return Mechanic(torch.optim.AdamW(parameters, lr=1e-3), **options)


def slot(mechanic: Mechanic, p: nn.Parameter) -> torch.Tensor:
    """A copy of x_ref, or of Δ."""
    kept = mechanic.state[p]
    return kept["mechanic_delta" if "mechanic_delta" in kept else "mechanic_ref"].clone()


def descend(mechanic: Mechanic) -> None:
    """The lr is on its way down from now on: so x_ref stays where it is."""
    for group in mechanic.param_groups:
        group["lr"] *= 0.9


# ---------------------------------------------------------------- closures


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_a_closure_is_called_once_with_gradients_enabled(problem: Problem, base: Any) -> None:
    ends = []
    for closed in (False, True):
        parameters = problem.parameters()
        mechanic = Mechanic(base(parameters, lr=0.1))
        for t in range(20):
            calls = []

            def closure(t: int = t, mechanic: Any = mechanic, parameters: Any = parameters, calls: Any = calls) -> Any:
                calls.append(torch.is_grad_enabled())
                mechanic.zero_grad()
                loss = problem.loss(parameters, t)
                loss.backward()
                return loss

            if closed:
                with torch.no_grad():
                    loss = mechanic.step(closure)
                assert calls == [True]
                assert loss.item() > 0
            else:
                closure()
                assert mechanic.step() is None
        ends.append(flat(parameters).detach())
    assert torch.equal(*ends)
    assert gap(ends[0], ends[0], problem.start) == 0


class Repeating(torch.optim.SGD):
    """Takes three steps in one, each at a gradient of its own."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        for last in (False, False, True):
            super().step()
            if not last:
                closure()
        return loss


def test_a_base_evaluates_its_closure_as_often_as_it_likes(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(Repeating(parameters, lr=0.1))
    rows, calls = torch.tensor(problem.rows), []

    def closure() -> torch.Tensor:
        calls.append(1)
        mechanic.zero_grad()
        loss = (rows @ flat(parameters) - torch.tensor(problem.targets)).square().mean()
        loss.backward()
        return loss

    first = mechanic.step(closure).item()
    assert len(calls) == 3  # as without the Mechanic: the first of them is the Mechanic's
    for _ in range(40):
        last = mechanic.step(closure)
    assert last < 0.5 * first


def test_grad_mode_survives_an_exception(problem: Problem) -> None:
    mechanic = adamw(problem.parameters())

    def closure() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mechanic.step(closure)
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- parameters that come and go


def test_a_parameter_without_gradient_stays_where_it_is(problem: Problem) -> None:
    parameters = [*problem.parameters(), nn.Parameter(torch.ones(3))]
    mechanic = adamw(parameters)
    problem.train(parameters[:2], mechanic, 10)
    assert torch.equal(parameters[2], torch.ones(3))
    assert parameters[2] not in mechanic.state


@both
def test_a_frozen_parameter_stays_and_goes_on_later(problem: Problem, variant: str) -> None:
    """Whatever S does meanwhile, x and its slot stay."""
    parameters = problem.parameters()
    mechanic = adamw(parameters, **VARIANTS[variant])
    problem.train(parameters, mechanic, 10)
    parameters[0].requires_grad_(False)
    frozen, others, scale = parameters[0].detach().clone(), parameters[1].detach().clone(), mechanic.scale.item()
    kept = slot(mechanic, parameters[0])
    problem.train(parameters, mechanic, range(10, 20))
    assert torch.equal(parameters[0], frozen)
    assert torch.equal(slot(mechanic, parameters[0]), kept)
    assert not torch.equal(parameters[1], others)
    assert mechanic.scale != scale
    parameters[0].requires_grad_(True)
    problem.train(parameters, mechanic, range(20, 21))
    step = (parameters[0] - frozen).abs().max()
    assert 0 < step < 20 * mechanic.effective_lr()[0], "it jumped to where x_ref + S·Δ had gone without it"


@both
def test_a_group_added_late_starts_from_its_value_then(problem: Problem, variant: str) -> None:
    parameters = problem.parameters()
    late = nn.Parameter(torch.full((3,), 5.0))
    mechanic = adamw(parameters, **VARIANTS[variant])
    problem.train(parameters, mechanic, 10)
    mechanic.add_param_group({"params": [late], "lr": 1e-2})
    with torch.no_grad():
        late.fill_(7.0)
    late.grad = torch.ones(3)
    mechanic.step()
    begun = 7 - late.detach()
    if variant == "scale_free":
        # x_ref is 7, and follows a little in the eleventh step.
        follows = 1 - (12 / 13) ** 0.25
        torch.testing.assert_close(7 - slot(mechanic, late), begun * follows, rtol=1e-3, atol=1e-6)
    else:
        torch.testing.assert_close(
            -slot(mechanic, late) * mechanic.scale, begun, rtol=1e-3, atol=1e-6, check_dtype=False
        )
    assert (begun > 0).all()
    assert mechanic.scale.dim() == 0
    assert mechanic.effective_lr()[1] == pytest.approx(10 * mechanic.effective_lr()[0])
    before = late.detach().clone()
    problem.train(parameters, mechanic, 2)
    late.grad = torch.ones(3)
    mechanic.step()
    assert (late < before).all()


def test_a_group_added_late_learns_its_own_scale_per_group(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = adamw(parameters[:1], per_group=True)
    problem.train(parameters, mechanic, 10)
    mechanic.add_param_group({"params": [parameters[1]]})
    assert mechanic.scale.tolist()[1] == 0
    first = mechanic.scale[0].item()
    problem.train(parameters, mechanic, 10)
    assert mechanic.scale[1] > 0
    assert mechanic.scale[0] != first


@both
@pytest.mark.parametrize("how", ["no_grad", "data"])
def test_weights_loaded_before_the_first_step_are_kept(problem: Problem, how: str, variant: str) -> None:
    parameters = problem.parameters()
    mechanic = adamw(parameters, **VARIANTS[variant])
    loaded = [torch.randn_like(p) for p in parameters]
    for p, value in zip(parameters, loaded, strict=True):
        if how == "data":
            p.data = value.clone()
        else:
            with torch.no_grad():
                p.copy_(value)
    problem.train(parameters, mechanic, 1)
    if variant == "scale_free":
        for p, value in zip(parameters, loaded, strict=True):  # x_ref follows in the first step
            torch.testing.assert_close(slot(mechanic, p), value.lerp(p.detach(), 1 - (2 / 3) ** 0.25))
    problem.train(parameters, mechanic, range(1, 5))
    for p, value in zip(parameters, loaded, strict=True):
        if variant == "paper":  # Δ is counted from there
            torch.testing.assert_close(p.detach(), value + mechanic.scale.float() * slot(mechanic, p))
        assert 0 < (p - value).abs().max() < 0.1


@both
@pytest.mark.parametrize("how", ["no_grad", "data", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_an_edit_between_steps_is_kept(
    problem: Problem, variant: str, how: str, dtype: torch.dtype, fused: bool
) -> None:
    """x is where the user has put it, and the slot stays: of x_ref the edit is movement, of Δ it is no part.

    `p.data` and fused optimizers do not move p._version. (What replaces the weights: test_edits.py.)
    """
    parameters = problem.parameters(dtype)
    mechanic = Mechanic(torch.optim.AdamW(parameters, lr=1e-3, fused=fused), **VARIANTS[variant])
    problem.train(parameters, mechanic, 20)
    descend(mechanic)
    problem.train(parameters, mechanic, range(20, 22))
    p, before = parameters[0], slot(mechanic, parameters[0])
    edited = torch.full((1, 4), 3.0, dtype=dtype)
    if variant == "scale_free":  # by less than what an update moves
        edited = p.detach()[:1] + mechanic.effective_lr()[0]
    if how == "no_grad":
        with torch.no_grad():
            p[:1].copy_(edited)
    elif how == "data":
        p.data[:1] = edited
    else:
        p.data = torch.cat([edited, p.data[1:]])
    x = p.detach().clone()
    problem.train(parameters, mechanic, range(22, 23))
    after = slot(mechanic, p)
    assert 0 < (p - x).abs().max() < 0.2, "the step did not start where x was put"
    if variant == "scale_free":
        assert torch.equal(after, before), "the edit went into x_ref"
    else:
        u = 2e-3 if dtype == torch.float32 else 2**-7  # or a digit of x
        assert (after - before).abs().max() < u, "the edit went into Δ"


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nobody_edits_and_x_ref_stays(problem: Problem, dtype: torch.dtype, variant: str) -> None:
    """The other side of the test above: 200 steps of rounding do not look like edits."""
    parameters = problem.parameters(dtype)
    start = [p.detach().clone() for p in parameters]
    mechanic = adamw(parameters, **VARIANTS[variant])
    problem.train(parameters, mechanic, 20)
    descend(mechanic)
    before = [slot(mechanic, p) for p in parameters]
    problem.train(parameters, mechanic, range(20, 200))
    for p, value, kept in zip(parameters, start, before, strict=True):
        assert not torch.equal(p, value)
        if variant == "scale_free":
            assert torch.equal(slot(mechanic, p), kept)
        else:
            exact = value.double() + mechanic.scale * slot(mechanic, p)
            torch.testing.assert_close(
                p.detach(), exact.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )


@both
def test_a_step_is_what_the_four_scalars_say(problem: Problem, variant: str) -> None:
    """x += a·d + s·u and y += e·d + f·u, of states of every kind that a run comes to."""
    parameters = problem.parameters(torch.float64)
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=1.0), **VARIANTS[variant])
    drawn_back, read = 0, mechanic._run.read
    for t in range(120):
        if t == 60:
            descend(mechanic)
        mechanic.zero_grad()
        problem.loss(parameters, t).backward()
        if t % 20 == 19:  # back along d, so that S falls
            for p in parameters:
                p.grad = p.detach() - slot(mechanic, p) if variant == "scale_free" else slot(mechanic, p)
        old = [(p.detach().clone(), slot(mechanic, p) if t else torch.zeros_like(p)) for p in parameters]
        updates, scale = [-mechanic.param_groups[0]["lr"] * p.grad for p in parameters], mechanic.scale
        wild = read("outliers")[0]
        mechanic.step()
        s = mechanic.scale
        if variant == "paper":
            a, e, f = s - scale, 0.0, 1.0
        else:
            back = s.item() / scale.item() if 0 < read("keep")[0] < 1 else 1.0
            fade = ((t + 2) / (t + 3)) ** 0.25 if t < 60 else 1.0
            a, e = back - 1, (1 - fade) * back
            s = torch.where(read("outliers")[0] > wild, 0, s)
            f = (1 - fade) * s
            drawn_back += back < 1
        for p, (x, y), u in zip(parameters, old, updates, strict=True):
            y = x if variant == "scale_free" and t == 0 else y
            d = x - y if variant == "scale_free" else y
            torch.testing.assert_close(p.detach(), x + a * d + s * u, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slot(mechanic, p), y + e * d + f * u, rtol=1e-12, atol=1e-12)
    assert s > 0
    assert drawn_back > 1 or variant == "paper"


# ---------------------------------------------------------------- kinds of tensors


def test_sparse_gradients_are_their_dense_selves() -> None:
    ends = []
    for sparse in (True, False):
        table = nn.Parameter(torch.linspace(-1, 1, 40).view(10, 4))
        mechanic = Mechanic(torch.optim.SGD([table], lr=1.0))
        for t in range(40):
            generator = torch.Generator().manual_seed(t)
            rows = torch.randint(10, (6,), generator=generator)  # with repeats: an uncoalesced gradient
            mechanic.zero_grad()
            (F.embedding(rows, table, sparse=sparse) - 0.3).square().sum().backward()
            mechanic.step()
        ends.append(table.detach().clone())
        assert mechanic.scale > 1e-4
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    ends = []
    for is_complex in (True, False):
        p = nn.Parameter(torch.view_as_complex(start.clone()) if is_complex else start.clone())
        mechanic = Mechanic(torch.optim.SGD([p], lr=1.0, momentum=0.9))
        for _ in range(60):
            mechanic.zero_grad()
            real = torch.view_as_real(p) if is_complex else p
            (real - target).cosh().log().sum().backward()
            mechanic.step()
        ends.append(torch.view_as_real(p.detach()) if is_complex else p.detach())
    assert gap(*ends, start) < 1e-9


def test_maximize_is_minimizing_the_opposite(problem: Problem) -> None:
    ends = []
    for maximize in (False, True):
        parameters = problem.parameters()
        mechanic = Mechanic(torch.optim.AdamW(parameters, lr=1e-3, maximize=maximize))
        for t in range(50):
            mechanic.zero_grad()
            loss = problem.loss(parameters, t)
            (-loss if maximize else loss).backward()
            mechanic.step()
        ends.append(flat(parameters).detach())
    assert gap(*ends, problem.start) < 1e-6


def test_mixed_dtypes_in_one_model(problem: Problem) -> None:
    parameters = problem.parameters(torch.float64)
    mixed = [
        nn.Parameter(p.detach().to(d, copy=True))
        for p, d in zip(parameters, (torch.float32, torch.float64), strict=True)
    ]
    one, two = adamw(parameters), adamw(mixed)
    for t in range(50):
        one.zero_grad(), two.zero_grad()
        problem.loss(parameters, t).backward()
        problem.loss([p.double() for p in mixed], t).backward()
        one.step(), two.step()
    assert gap(flat(p.detach().double() for p in mixed), flat(parameters).detach(), problem.start) < 1e-3


@both
def test_layouts(variant: str) -> None:
    """0-d, empty, transposed, strided with holes, channels_last: the same as one flat vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0, 3), (3, 4), (5,), (2, 3, 4, 2)]
    # In float64: what the order of sums changes in float32 grows on the way to the minimum.
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    odd = [
        values[0].clone(),
        values[1].clone(),
        values[2].t().contiguous().t(),
        torch.zeros(10, dtype=torch.float64)[::2].copy_(values[3]),
        values[4].to(memory_format=torch.channels_last),
    ]
    assert not odd[2].is_contiguous()
    assert odd[3].stride() == (2,)
    results = []
    for tensors in (values, odd):
        parameters = [nn.Parameter(t.clone() if tensors is values else t) for t in tensors]
        mechanic = Mechanic(torch.optim.SGD(parameters, lr=1.0, momentum=0.9), **VARIANTS[variant])
        for _ in range(30):
            mechanic.zero_grad()
            sum((p - 0.5).cosh().log().sum() for p in parameters).backward()
            mechanic.step()
        results.append((flat(p.detach() for p in parameters), mechanic.scale))
        assert [slot(mechanic, p).stride() for p in parameters] == [torch.empty_like(p).stride() for p in parameters]
    assert results[0][1] > 1e-3
    assert gap(results[0][0], results[1][0], flat(values)) < 1e-9


def test_taking_turns_does_not_look_like_large_updates() -> None:
    """U, the size of an update, is read off ‖Δ‖: over the same elements only."""
    large, small = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(10))
    mechanic = Mechanic(torch.optim.AdamW([large, small], lr=1.0))
    for t in range(100):
        mechanic.zero_grad()
        for p in (large, small) if t < 50 else ((large, small)[t % 2],):
            p.grad = p.detach() + 2
        mechanic.step()
    assert 0 < mechanic._run.read("update_norm") < 1.1 * 1010**0.5


@pytest.mark.parametrize("per_group", [False, True])
def test_a_group_added_behind_the_wrappers_back_is_taken_in(problem: Problem, per_group: bool) -> None:
    parameters = problem.parameters()
    mechanic = adamw(parameters[:1], per_group=per_group)
    problem.train(parameters, mechanic, 5)
    mechanic.base_optimizer.add_param_group({"params": [parameters[1]]})
    twin = copy.deepcopy(mechanic)
    assert "mechanic_options" in twin.state_dict()["param_groups"][1]
    problem.train(parameters, mechanic, range(5, 20))
    assert "mechanic_ref" in mechanic.state[parameters[1]]
    assert (mechanic.scale > 0).all()
    with_it = Mechanic(torch.optim.AdamW([{"params": [p]} for p in problem.parameters()], lr=1e-3), per_group=per_group)
    with_it.load_state_dict(copy.deepcopy(mechanic.state_dict()))


def test_a_load_behind_the_wrappers_back_starts_the_tuner_afresh(problem: Problem) -> None:
    parameters = problem.parameters()
    plain = torch.optim.AdamW(problem.parameters(), lr=1e-3)
    mechanic = adamw(parameters)
    problem.train(parameters, mechanic, 5)
    mechanic.base_optimizer.load_state_dict(plain.state_dict())
    others = copy.deepcopy(parameters)
    fresh = adamw(others)
    with pytest.warns(UserWarning, match="without the Mechanic"):
        problem.train(parameters, mechanic, 1)
    problem.train(others, fresh, 1)
    assert mechanic.scale == fresh.scale == 0
    for t in range(1, 20):
        problem.train(parameters, mechanic, range(t, t + 1))
        problem.train(others, fresh, range(t, t + 1))
        assert mechanic.scale == fresh.scale > 0
    assert torch.equal(flat(parameters), flat(others))


def test_two_mechanics_over_two_halves(problem: Problem) -> None:
    parameters = problem.parameters()
    halves = [adamw([p]) for p in parameters]
    for t in range(30):
        problem.loss(parameters, t).backward()
        for mechanic in halves:
            mechanic.step()
            mechanic.zero_grad()
    assert halves[0].scale != halves[1].scale
    assert all(mechanic.scale > 0 for mechanic in halves)


# ---------------------------------------------------------------- gradients: accumulated, clipped, scaled, broken


def test_accumulated_and_clipped_gradients_are_those_that_count(problem: Problem) -> None:
    parameters, others = problem.parameters(), problem.parameters()
    one, two = adamw(parameters), adamw(others)
    for t in range(30):
        one.zero_grad(), two.zero_grad()
        for _ in range(4):
            (problem.loss(parameters, t) / 4).backward()
        problem.loss(others, t).backward()
        for each in (parameters, others):
            nn.utils.clip_grad_norm_(each, 0.1)
        one.step(), two.step()
    assert gap(flat(parameters).detach(), flat(others).detach(), problem.start) < 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_and_skips(problem: Problem, fused: bool) -> None:
    """A step with an overflow is skipped whole, schedule and all; the rest is the run without a scaler."""
    parameters, others = problem.parameters(), problem.parameters()
    mechanics = []
    for each in (parameters, others):
        optimizer = torch.optim.AdamW(each, lr=1e-3, fused=fused)
        mechanics.append(Mechanic(optimizer, CosineAnnealingLR(optimizer, T_max=50)))
    one, two = mechanics
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(40):
        one.zero_grad()
        scaler.scale(problem.loss(parameters, t)).backward()
        if t == 20:
            parameters[0].grad[0, 0] = float("inf")
        scaler.step(one)
        scaler.update()
        if t != 20:
            two.zero_grad()
            problem.loss(others, t).backward()
            two.step()
    assert one.skipped == 0
    assert one.scheduler.last_epoch == two.scheduler.last_epoch == 39
    assert gap(flat(parameters).detach(), flat(others).detach(), problem.start) < 1e-3


@both
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_a_gradient_that_is_not_finite_is_as_if_the_step_had_not_been(
    problem: Problem, value: float, at: int, fused: bool, variant: str
) -> None:
    ends = []
    for broken in (False, True):
        parameters = problem.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
        mechanic = Mechanic(optimizer, CosineAnnealingLR(optimizer, T_max=40), **VARIANTS[variant])
        for t in range(40):
            if broken and t == at:
                problem.loss(parameters, t).backward()
                parameters[0].grad[0, 1] = value
                before = copy.deepcopy([*parameters, mechanic.scale])
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    mechanic.step()
                assert all(torch.equal(a, b) for a, b in zip(before, [*parameters, mechanic.scale], strict=True))
                assert mechanic.skipped == 1
            problem.train(parameters, mechanic, range(t, t + 1))
        ends.append(flat(parameters).detach())
        assert mechanic.skipped == broken
    assert torch.equal(*ends)


@both
@pytest.mark.parametrize("at", [0, 20])
def test_the_skip_that_does_not_look_at_the_flag(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, at: int, variant: str
) -> None:
    """What an accelerator does, where the host cannot know: run here on the CPU."""
    monkeypatch.setattr("manic.algorithm.known_false", lambda ok: False)
    monkeypatch.setattr("manic.algorithm.on_host", lambda ok: False)
    parameters = problem.parameters()
    mechanic = adamw(parameters, **VARIANTS[variant])
    problem.train(parameters, mechanic, at)
    problem.loss(parameters, at).backward()
    parameters[0].grad[0, 1] = float("nan")
    before = copy.deepcopy([*parameters, mechanic.scale])
    mechanic.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [*parameters, mechanic.scale], strict=True))
    assert mechanic.skipped == 1
    if at == 0:
        # What the base remembers of a step on zeros, and no more, tells this run from one without the break.
        others = problem.parameters()
        twin = adamw(others, **VARIANTS[variant])
        problem.loss(others, 0).backward()
        for p in others:
            p.grad.zero_()
        twin.base_optimizer.param_groups[0]["lr"] = 0.0
        twin._run.inside.stepping = True
        twin.base_optimizer.step()
        twin._run.inside.stepping = False
        twin.base_optimizer.param_groups[0]["lr"] = 1e-3
        problem.train(others, twin, 30)
        problem.train(parameters, mechanic, 30)
        assert torch.equal(flat(parameters), flat(others))
        assert torch.equal(mechanic.scale, twin.scale)
    problem.train(parameters, mechanic, range(at, 60))
    assert torch.isfinite(flat(parameters)).all()
    assert not torch.equal(flat(parameters), flat(before[:2]))
    assert mechanic.scale > 0


@both
def test_an_update_that_is_not_finite_moves_nothing(variant: str) -> None:
    """0/0 in the base, from a gradient that is finite: the published method loses the parameters for good."""
    p = nn.Parameter(torch.ones(4))
    mechanic = Mechanic(torch.optim.Adam([p], lr=0.1, eps=0.0), **VARIANTS[variant])
    for _ in range(20):
        p.grad = torch.cat([torch.zeros(1), 2 * p.detach()[1:]])
        mechanic.step()
    assert p[0] == 1
    assert (p[1:] < 0.999).all()
    assert mechanic.skipped == 0


def test_one_broken_group_skips_all_groups(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.AdamW([{"params": [p]} for p in parameters], lr=1.0), per_group=True)
    problem.train(parameters, mechanic, 10)
    before = copy.deepcopy([*parameters, mechanic.scale])
    problem.loss(parameters, 10).backward()
    parameters[1].grad[0] = float("nan")
    mechanic.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [*parameters, mechanic.scale], strict=True))


def test_steps_without_any_gradient_change_nothing(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = adamw(parameters)
    problem.train(parameters, mechanic, 10)
    before = copy.deepcopy([*parameters])
    scale = mechanic.scale.item()
    mechanic.zero_grad()
    for _ in range(5):
        mechanic.step()
    assert torch.equal(flat(before), flat(parameters))
    assert mechanic.scale.item() == pytest.approx(scale)


# ---------------------------------------------------------------- schedulers, hooks, compile, logs


@pytest.mark.parametrize("kind", [CosineAnnealingLR, ExponentialLR])
def test_a_scheduler_inside_on_the_base_and_on_the_wrapper_are_one(problem: Problem, kind: Any) -> None:
    argument = 30 if kind is CosineAnnealingLR else 0.9
    ends = []
    for where in ("inside", "base", "wrapper"):
        parameters = problem.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        schedule = kind(optimizer, argument) if where != "wrapper" else None
        mechanic = Mechanic(optimizer, schedule if where == "inside" else None)
        outer = {"inside": None, "base": schedule, "wrapper": kind(mechanic, argument) if where == "wrapper" else None}[
            where
        ]
        for t in range(30):
            problem.train(parameters, mechanic, range(t, t + 1))
            if outer:
                outer.step()
        ends.append(flat(parameters).detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_the_base_sees_its_schedule_and_nobody_sees_the_unit_lr_afterwards(problem: Problem) -> None:
    parameters = problem.parameters()
    optimizer = torch.optim.SGD([{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 5e-5}], lr=2e-4)
    mechanic = Mechanic(optimizer, ExponentialLR(optimizer, 0.5))
    seen = []
    optimizer.register_step_pre_hook(lambda base, *_: seen.append([group["lr"] for group in base.param_groups]))
    problem.train(parameters, mechanic, 3)
    assert seen == [[1.0, 0.25], [0.5, 0.125], [0.25, 0.0625]]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-4 / 8, 5e-5 / 8])


@both
@pytest.mark.parametrize("at", [0, 10])
def test_a_base_that_raises_leaves_everything_as_it_was(problem: Problem, at: int, variant: str) -> None:
    ends = []
    for broken in (False, True):
        parameters = problem.parameters()
        mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.5), **VARIANTS[variant])
        problem.train(parameters, mechanic, at)
        if broken:

            def interrupt(*_: Any) -> None:
                raise KeyboardInterrupt  # after the update

            handle = mechanic.base_optimizer.register_step_post_hook(interrupt)
            before = copy.deepcopy([*parameters, mechanic.param_groups[0]["mechanic_state"], mechanic.scale])
            for _ in range(3):
                problem.loss(parameters, at).backward()
                with pytest.raises(KeyboardInterrupt):
                    mechanic.step()
            handle.remove()
            after = [*parameters, mechanic.param_groups[0]["mechanic_state"], mechanic.scale]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert mechanic.param_groups[0]["lr"] == 0.5
            assert mechanic.param_groups[0]["mechanic_step"] == at
        problem.train(parameters, mechanic, range(at, 40))
        ends.append(flat(parameters).detach())
    assert torch.equal(*ends)
    assert gap(ends[0], ends[0], problem.start) == 0


def test_a_scheduler_that_raises_comes_after_the_step(problem: Problem) -> None:
    parameters = problem.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    mechanic = Mechanic(optimizer, schedule)
    problem.train(parameters, mechanic, 10)
    before = flat(parameters).detach()
    with pytest.raises(ValueError, match="10"):
        problem.train(parameters, mechanic, 1)
    assert 0 < (flat(parameters) - before).abs().max() < 0.1
    assert mechanic.param_groups[0]["mechanic_step"] == 11


def test_a_base_that_sets_its_own_lr(problem: Problem) -> None:
    class Decaying(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["lr"] *= 0.9

    parameters = problem.parameters()
    mechanic = Mechanic(Decaying(parameters, lr=0.1))
    problem.train(parameters, mechanic, 3)
    assert mechanic.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**3)


def test_a_warm_up_by_hand_from_zero_is_free_of_the_base_lr_too(problem: Problem) -> None:
    ends = []
    for lr in (1e-8, 1.0):
        parameters = problem.parameters()
        mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.0))
        for t in range(60):
            for group in mechanic.param_groups:
                group["lr"] = lr * min(1.0, t / 10)
            problem.train(parameters, mechanic, range(t, t + 1))
        ends.append(flat(parameters).detach())
    assert gap(*ends, problem.start) < 1e-4


def test_a_tensor_lr(problem: Problem) -> None:
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        parameters = problem.parameters()
        optimizer = torch.optim.SGD(parameters, lr=lr)
        mechanic = Mechanic(optimizer)
        problem.train(parameters, mechanic, 20)
        assert mechanic.param_groups[0]["lr"] is optimizer.param_groups[0]["lr"]
        assert float(mechanic.param_groups[0]["lr"]) == 0.1
        ends.append(flat(parameters).detach())
    assert gap(*ends, problem.start) < 1e-5


def test_an_lr_of_zero_everywhere_moves_nothing(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.0))
    problem.train(parameters, mechanic, 5)
    assert torch.equal(flat(parameters), flat(problem.parameters()))


def test_step_hooks_fire_once_each_in_order(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = adamw(parameters)
    order: list[str] = []
    mechanic.register_step_pre_hook(lambda *_: order.append("wrapper pre"))
    mechanic.register_step_post_hook(lambda *_: order.append("wrapper post"))
    mechanic.base_optimizer.register_step_pre_hook(lambda *_: order.append("base pre"))
    mechanic.base_optimizer.register_step_post_hook(lambda *_: order.append("base post"))
    problem.train(parameters, mechanic, 1)
    assert order == ["wrapper pre", "base pre", "base post", "wrapper post"]


def test_state_dict_hooks(problem: Problem) -> None:
    mechanic = adamw(problem.parameters())
    order: list[str] = []
    mechanic.register_state_dict_pre_hook(lambda _: order.append("save pre"))
    mechanic.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    mechanic.register_load_state_dict_pre_hook(lambda _, state: order.append(f"load pre {state.pop('extra')}"))
    mechanic.register_load_state_dict_post_hook(lambda _: order.append("load post"))
    mechanic.load_state_dict(mechanic.state_dict())
    assert order == ["save pre", "load pre 1", "load post"]


def test_a_compiled_model(problem: Problem) -> None:
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        mechanic = adamw(model.parameters())
        for t in range(20):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t))
            mechanic.zero_grad()
            (run(x) - x.sum(1, keepdim=True)).square().mean().backward()
            mechanic.step()
        ends.append(flat(model.parameters()).detach())
    torch.testing.assert_close(*ends)


def test_a_base_step_behind_the_wrappers_back_is_named_once_and_kept(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=0.1))
    problem.train(parameters, mechanic, 5)
    twin = copy.deepcopy(mechanic)
    problem.loss(parameters, 0).backward()
    with pytest.warns(UserWarning, match=r"SGD.step\(\) was called, not the step\(\) of the Mechanic"):
        mechanic.base_optimizer.step()
    moved = flat(parameters).detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mechanic.base_optimizer.step()
    with pytest.warns(UserWarning, match="not the step"):
        twin.base_optimizer.step()
    problem.train(parameters, mechanic, range(5, 6))
    assert (flat(parameters) - moved).abs().max() < 0.5


def test_log_func(problem: Problem) -> None:
    parameters = problem.parameters()
    seen: list[dict[str, Any]] = []
    mechanic = adamw(parameters, log_func=seen.append, log_every=5)
    problem.train(parameters, mechanic, 12)
    assert [data["iter_count"] for data in seen] == [5, 10]
    problem.train(parameters, mechanic, 3)
    assert seen[-1]["s"] == mechanic.scale.item() > 0
    assert isinstance(seen[-1]["s"], float)
    assert isinstance(seen[-1]["h"], float)
    assert seen[-1] == {"iter_count": 15, "s": mechanic.scale.item(), **mechanic.metrics()}


def test_log_goes_on_where_it_was_after_a_resume(problem: Problem) -> None:
    mechanics = []
    for steps in (7, 0):
        parameters = problem.parameters()
        seen: list[dict[str, Any]] = []
        mechanics.append(adamw(parameters, log_func=seen.append, log_every=5))
        problem.train(parameters, mechanics[-1], steps)
    mechanics[1].load_state_dict(copy.deepcopy(mechanics[0].state_dict()))
    problem.train(parameters, mechanics[1], 3)
    assert [data["iter_count"] for data in seen] == [10]


def test_log_of_groups_and_to_the_logger(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1), per_group=True, log_every=3)
    with caplog.at_level(logging.INFO, logger="manic"):
        problem.train(parameters, mechanic, 3)
    assert "step 3: scale/0 " in caplog.text


def test_mechanize_is_the_class_door(problem: Problem) -> None:
    parameters, others = problem.parameters(), problem.parameters()
    one = mechanize(torch.optim.SGD, variant="paper", s_init=1e-3)(parameters, lr=0.1, momentum=0.9)
    two = Mechanic(torch.optim.SGD(others, lr=0.1, momentum=0.9), variant="paper", s_init=1e-3)
    assert type(one) is Mechanic
    assert issubclass(mechanize(torch.optim.SGD), torch.optim.Optimizer), "what trainers ask of a class"
    assert is_mechanized(one)
    assert is_mechanized(two)
    assert not is_mechanized(two.base_optimizer)
    problem.train(parameters, one, 20)
    problem.train(others, two, 20)
    assert torch.equal(flat(parameters), flat(others))
    assert one.scale > 0


def test_the_wrapper_is_an_optimizer_with_the_bases_parts(problem: Problem) -> None:
    mechanic = adamw(problem.parameters())
    assert isinstance(mechanic, torch.optim.Optimizer)
    assert mechanic.param_groups is mechanic.base_optimizer.param_groups
    assert mechanic.state is mechanic.base_optimizer.state
    assert mechanic.defaults is mechanic.base_optimizer.defaults
    assert "Mechanic around AdamW" in repr(mechanic)
    assert "lr: 0.001" in repr(mechanic)
    assert "mechanic_state" not in repr(mechanic)
    state = type(mechanic.state)(dict)
    mechanic.state = state
    assert mechanic.base_optimizer.state is state
    groups = list(mechanic.param_groups)
    mechanic.param_groups = groups
    assert mechanic.base_optimizer.param_groups is groups
    defaults = dict(mechanic.defaults)
    mechanic.defaults = defaults
    assert mechanic.base_optimizer.defaults is defaults


def test_zero_grad(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = adamw(parameters)
    problem.loss(parameters, 0).backward()
    mechanic.zero_grad(set_to_none=False)
    assert parameters[0].grad is not None
    assert parameters[0].grad.abs().sum() == 0
    mechanic.zero_grad()
    assert parameters[0].grad is None


def test_a_scheduler_inside_that_somebody_else_steps_too_is_told_once(problem: Problem) -> None:
    parameters = problem.parameters()
    base = torch.optim.SGD(parameters, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=5)
    mechanic = Mechanic(base, schedule)
    problem.train(parameters, mechanic, 3)  # filterwarnings = error: nothing is said
    schedule.step()
    with pytest.warns(UserWarning, match="something else also steps the StepLR that you passed in"):
        mechanic.step()
    schedule.step()
    mechanic.step()
    mechanic.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    mechanic.step()


@pytest.mark.parametrize("around", [lambda mechanic: mechanic, Wrapped])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_scheduler_inside_and_one_outside_are_told_once(around: Any, tensor: bool, problem: Problem) -> None:
    parameters = problem.parameters()
    base = torch.optim.SGD(parameters, lr=torch.tensor(0.1) if tensor else 0.1)
    mechanic = Mechanic(base, torch.optim.lr_scheduler.StepLR(base, step_size=2))
    optimizer = around(mechanic)
    outside = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    problem.train(parameters, optimizer, 5)  # filterwarnings = error: of the inner one nothing is said
    outside.step()
    with pytest.warns(UserWarning, match="something else has set the lr, which the StepLR that you passed in"):
        optimizer.step()
    outside.step()
    optimizer.step()


def test_loading_a_group_and_compiling_are_not_somebody_else(problem: Problem) -> None:
    parameters = problem.parameters()
    base = torch.optim.SGD(parameters, lr=torch.tensor(0.1))
    mechanic = Mechanic(base, torch.optim.lr_scheduler.StepLR(base, step_size=2))
    problem.train(parameters, mechanic, 3)
    saved = copy.deepcopy(mechanic.state_dict())
    problem.train(parameters, mechanic, 2)
    mechanic.load_state_dict(saved)
    mechanic.step()
    mechanic.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.3, "initial_lr": 0.3})
    mechanic.scheduler.base_lrs.append(0.3)
    mechanic.step()
    twin = copy.deepcopy(mechanic)
    twin.step()
    mechanic.freeze()
    mechanic.step()


@pytest.mark.parametrize("base", ["SGD", "AdamW", "NAdam"])
def test_bfloat16_follows_updates_far_below_its_own_digits(base: str) -> None:
    """|g| is 2000 times smaller than |x|, of which bfloat16 keeps 8 bits: x + u is x at any lr about 1."""
    p, target = nn.Parameter(torch.ones(8, dtype=torch.bfloat16)), torch.linspace(0.5, 1.5, 8)
    mechanic = Mechanic(getattr(torch.optim, base)([p], lr=1e-2, weight_decay=0.0))
    for _ in range(100):
        p.grad = (1e-3 * (p.detach().float() - target)).bfloat16()
        mechanic.step()
    assert (p.detach().float() - target).abs().max() < 0.03


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("start", [1e-8, 1e-5, 1e-2])
def test_a_warmup_that_begins_next_to_nothing(base: str, start: float) -> None:
    """LinearLR refuses to begin at 0, so people write 1e-8: the scale that suits it must not meet the lr after it."""
    p = nn.Parameter(torch.ones(8))
    optimizer = getattr(torch.optim, base)([p], lr=1e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start, 1.0, total_iters=20)
    mechanic = Mechanic(optimizer, warmup)
    target, largest = torch.linspace(-1, 0.9, 8), 0.0  # a gradient of 0 from the start would be noise to AdamW
    for _ in range(100):
        p.grad = p.detach() - target
        largest = max(largest, float(p.grad.abs().max()))
        mechanic.step()
    assert largest < 4
    assert (p.detach() - target).abs().max() < 0.1
