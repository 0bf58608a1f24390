"""Several optimizers as one: `chain` alone, and inside a Mechanic."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from resuming import same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import manic
from manic import Mechanic, chain

# Muon came with torch 2.9.
MATRICES: Any = getattr(torch.optim, "Muon", torch.optim.RMSprop)
Optimizer = torch.optim.Optimizer


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def pair(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    """Muon for the matrices, AdamW in two groups for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": rest[:1]}, {"params": rest[1:], "lr": 1e-3}]
    return MATRICES(matrices, lr=2e-2), torch.optim.AdamW(groups, lr=3e-4)


def loss_of(model: nn.Module, t: int) -> torch.Tensor:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(t))
    return (model(x) - x[:, :4].sin()).square().mean()


def train(model: nn.Module, steps: range, *optimizers: Any) -> nn.Module:
    for t in steps:
        model.zero_grad()
        loss_of(model, t).backward()
        for one in optimizers:
            one.step()
    return model


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_chain_steps_as_its_optimizers_do() -> None:
    """With one schedule for all, a closure, and a group that one of them gets later."""
    model, other = net(), net()
    late, more = nn.Parameter(torch.ones(16, 4)), nn.Parameter(torch.ones(16, 4))
    muon, adamw = pair(model)
    schedules = [CosineAnnealingLR(one, T_max=20) for one in (muon, adamw)]
    train(model, range(10), muon, adamw, *schedules)
    both = pair(other)
    one = chain(*both)
    schedule = CosineAnnealingLR(one, T_max=20)
    train(other, range(5), one, schedule)
    for t in range(5, 10):

        def closure(t: int = t) -> torch.Tensor:
            one.zero_grad()
            loss = loss_of(other, t)
            loss.backward()
            return loss

        before = loss_of(other, t)
        assert torch.equal(one.step(closure), before)
        schedule.step()
    assert same(values(model), values(other))
    assert [group["lr"] for group in one.param_groups] == [g["lr"] for o in (muon, adamw) for g in o.param_groups]
    for parameter, optimizer in ((late, muon), (more, both[0])):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.add_param_group({"params": [parameter], "lr": 0.1})
    assert one.param_groups[-1]["params"][0] is more  # last, though Muon comes first: schedules count the groups
    muon.step(), adamw.step(), one.step()
    assert torch.equal(late, more)
    assert len(one.state) == len(muon.state) + len(adamw.state)
    one.zero_grad()
    assert more.grad is None
    assert all(p.grad is None for p in other.parameters())


def build(model: nn.Module, steps: int = 40, **options: Any) -> Mechanic:
    one = chain(*pair(model))
    return Mechanic(one, CosineAnnealingLR(one, T_max=steps), **options)


def plain(model: nn.Module) -> Any:
    return chain(*pair(model))


@pytest.mark.parametrize(
    "wrapped", [plain, build, lambda model: build(model, per_group=True)], ids=["chain", "one scale", "per group"]
)
def test_it_resumes_bit_for_bit(wrapped: Callable[[nn.Module], Any]) -> None:
    """From a file, in a new model that has taken other steps; and as a copy, and from a pickle."""
    model = net()
    one = wrapped(model)
    train(model, range(20), one)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": one.state_dict()}, file)
    copies = [copy.deepcopy((model, one)), pickle.loads(pickle.dumps((model, one)))]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(1)
    two = wrapped(other)
    train(other, range(50, 53), two)
    other.load_state_dict(saved["model"])
    two.load_state_dict(saved["optimizer"])
    assert same(one.state_dict(), two.state_dict())
    train(model, range(20, 40), one)
    for resumed, optimizer in [(other, two), *copies]:
        train(resumed, range(20, 40), optimizer)
        assert same(values(model), values(resumed))
        assert same(one.state_dict(), optimizer.state_dict())
    assert not same(values(model), values(net()))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("wrapped", [plain, build], ids=["chain", "Mechanic"])
def test_get_and_set_optimizer_state_dict(wrapped: Callable[[nn.Module], Any], flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = net(), net(1)
    one, two = wrapped(model), wrapped(other)
    train(model, range(20), one)
    state = copy.deepcopy(get_optimizer_state_dict(model, one, options=options))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, two, state, options=options)
    for resumed, optimizer in ((model, one), (other, two)):
        train(resumed, range(20, 30), optimizer)
    assert same(values(model), values(other))


def test_one_scale_keeps_the_ratio_of_the_lrs() -> None:
    mechanic = build(net())
    train(net(), range(1), mechanic)
    model = net()
    mechanic = build(model)
    train(model, range(20), mechanic)
    lrs = mechanic.effective_lr()
    assert mechanic.scale > 0
    assert lrs == pytest.approx([lrs[0], lrs[0] * 3e-4 / 2e-2, lrs[0] * 1e-3 / 2e-2])


def test_a_scale_for_each_group_is_two_mechanics() -> None:
    """Which have no schedule here, in float64: the base lrs are 10 and 1e-3, and the run is the same at any."""

    def both(model: nn.Module) -> tuple[Optimizer, Optimizer]:
        first, second = list(model.parameters())[:2], list(model.parameters())[2:]
        return torch.optim.SGD(first, lr=10.0, momentum=0.9), torch.optim.AdamW(second, lr=1e-3)

    models = [net().double() for _ in range(2)]
    mechanic = Mechanic(chain(*both(models[0])), per_group=True)
    mechanics = [Mechanic(one) for one in both(models[1])]
    for model, optimizers in zip(models, ([mechanic], mechanics), strict=True):
        for t in range(40):
            model.zero_grad()
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(t)).double()
            (model(x) - x[:, :4].sin()).square().mean().backward()
            for one in optimizers:
                one.step()
    start = values(net().double())
    for a, b, c in zip(values(models[0]), values(models[1]), start, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (a - c).abs().max()
    torch.testing.assert_close(mechanic.scale, torch.stack([one.scale for one in mechanics]), rtol=1e-8, atol=0)


def test_a_checkpoint_that_fits_one_of_them_alone_is_loaded_into_none() -> None:
    model, other = net(), net(1)
    one, two = build(model), build(other)
    train(model, range(5), one), train(other, range(3), two)
    broken = one.state_dict()
    number = broken["param_groups"][-1]["params"][0]
    broken["state"][number] = {**broken["state"][number], "exp_avg": torch.ones(3, 3)}
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(ValueError, match="exp_avg"):
        two.load_state_dict(broken)
    assert same(two.state_dict(), before)
    twin = net(1)
    three = build(twin)
    train(twin, range(3), three)
    for resumed, optimizer in ((other, two), (twin, three)):
        train(resumed, range(3, 6), optimizer)
    assert same(values(other), values(twin))


def test_a_checkpoint_of_another_chain_is_refused() -> None:
    model = net()
    saved = build(model).state_dict()
    parameters = list(model.parameters())
    one = chain(torch.optim.SGD(parameters[:3], lr=1.0), torch.optim.AdamW(parameters[3:4]), pair(net())[1])
    del one.optimizers[2]
    with pytest.raises(ValueError, match="param groups"):
        Mechanic(one).load_state_dict(saved)


def test_unwrap_gives_the_chain_back_with_the_learned_lrs() -> None:
    model = net()
    mechanic = build(model)
    train(model, range(20), mechanic)
    lrs = mechanic.effective_lr()
    schedule = mechanic.scheduler
    one = mechanic.unwrap()
    assert [group["lr"] for group in one.param_groups] == pytest.approx(lrs)
    train(model, range(20, 25), one, schedule)
    assert not any("mechanic" in key for group in one.param_groups for key in group)


def test_a_grad_scaler_steps_it_and_skips_it() -> None:
    models = [net(), net()]
    one, (muon, adamw) = chain(*pair(models[0])), pair(models[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(4):
        one.zero_grad()
        scaler.scale(loss_of(models[0], t)).backward()
        if t == 2:
            next(models[0].parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(one)
        scaler.update()
        if t != 2:
            train(models[1], range(t, t + 1), muon, adamw)
    for a, b in zip(values(models[0]), values(models[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_direct_steps_of_what_is_inside_are_warned_of() -> None:
    model = net()
    mechanic = build(model)
    train(model, range(3), mechanic)
    with pytest.warns(UserWarning, match=r"step\(\) was called, not the step\(\) of the Mechanic"):
        train(model, range(3, 4), mechanic.base_optimizer.optimizers[1])  # type: ignore[attr-defined]


def test_names_and_a_chain_of_chains() -> None:
    model = net()
    muon, adamw = pair(model)
    one = chain(chain(muon), adamw)
    assert one.optimizers == [muon, adamw]
    assert repr(Mechanic(one)).startswith(f"Mechanic around chain({type(muon).__name__}, AdamW) (")
    assert isinstance(one, Optimizer)
    assert manic.chain is chain
    LambdaLR(one, [lambda t: 1.0] * 3)


def test_what_cannot_be_chained() -> None:
    model = net()
    muon, adamw = pair(model)
    parameters = list(model.parameters())
    cases: list[tuple[list[Any], type[Exception], str]] = [
        ([], TypeError, "at least one"),
        ([torch.optim.AdamW], TypeError, "built already"),
        ([muon, torch.optim.SGD(parameters, lr=1.0)], ValueError, "give each parameter to one optimizer"),
        ([Mechanic(muon), adamw], ValueError, "wrap the chain"),
        ([torch.optim.LBFGS(parameters)], ValueError, "LBFGS"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            chain(*arguments)
    one = chain(*pair(net()))
    with pytest.raises(ValueError, match="add it to that one"):
        one.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="add it to that one"):
        Mechanic(one).add_param_group({"params": [nn.Parameter(torch.ones(2))]})
