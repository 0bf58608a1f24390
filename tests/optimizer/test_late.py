"""What comes, or changes, after a Mechanic was built: groups, dtypes, gradients. And parameters that it cannot take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from resuming import same
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW
from training import Problem, flat, pulled

from manic import Mechanic


def noisy(p: nn.Parameter, t: int, target: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    return p.detach().float() - target + 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("every", [3, 10])
def test_steps_without_a_gradient_teach_nothing(every: int, per_group: bool) -> None:
    """A group that has a gradient in every k-th step only (GANs, several tasks) trains as with one in every step; so
    does a model whose gradient is exactly 0 in between."""
    ends = []
    for k in (1, every):
        p, other = nn.Parameter(torch.full((5,), 9.0)), nn.Parameter(torch.ones(3))
        groups = [{"params": [other]}, {"params": [p]}] if per_group else [{"params": [p]}]
        m = Mechanic(SGD(groups, lr=1e-2), per_group=per_group)
        for t in range(200 * k):
            other.grad = noisy(other, t)
            p.grad = None if per_group else torch.zeros_like(p)
            if t % k == 0:
                p.grad = noisy(p, t)
            m.step()
        ends.append((p.detach() - 2).norm().item())
    assert ends[0] < 0.3
    assert ends[1] < 0.4


def test_without_any_gradient_the_tuner_stays_as_it_is(problem: Problem) -> None:
    """But for the count of steps: below the highest lr as well, where the rule tolerates some h > 0."""
    parameters = problem.parameters()
    m = Mechanic(AdamW(parameters, lr=1e-3))
    problem.train(parameters, m, 30)
    m.param_groups[0]["lr"] = 5e-4
    problem.train(parameters, m, range(30, 40))
    scale, before = m.scale, m._run.read("grad_norm")
    m.zero_grad()
    for _ in range(100):
        m.step()
    assert torch.equal(m.scale, scale)
    assert torch.equal(m._run.read("grad_norm"), before)


@pytest.mark.parametrize("how", ["group", "model"])
def test_bfloat16_parameters_may_come_later(how: str) -> None:
    """x + u in bfloat16 has the digits of u only at a high lr, so that without it they would never move."""
    ends = []
    for late in (False, True):
        p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.full((4,), 9.0, dtype=torch.bfloat16))
        if how == "model" and late:
            q.data = q.data.float()
        m = Mechanic(SGD([p] if how == "group" and late else [p, q], lr=1e-2))
        if how == "group" and late:
            for t in range(10):
                p.grad = 1e-3 * noisy(p, t)
                m.step()
            scale = m.scale
            m.add_param_group({"params": [q]})
            m.state_dict()
            torch.testing.assert_close(m.scale, scale)  # in the user's units
        q.data = q.data.bfloat16()
        for t in range(100):
            p.grad, q.grad = 1e-3 * noisy(p, t), (1e-3 * noisy(q, 1000 + t)).bfloat16()
            m.step()
        ends.append((q.detach().float() - 2).norm().item())
    assert ends[0] < 0.5
    assert ends[1] < 0.5


def test_a_new_group_with_a_larger_lr_is_no_warm_up_of_the_others() -> None:
    found = []
    for lr in (None, 1e-3, 1e-1):
        p, q = nn.Parameter(torch.full((4,), 9.0)), nn.Parameter(torch.ones(3))
        m = Mechanic(SGD([p], lr=1e-3))
        pulled(p, m, 60)
        if lr is not None:
            m.add_param_group({"params": [q], "lr": lr})
        pulled(p, m)
        found.append((m.effective_lr()[0], p.detach().clone()))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("per_group", [True, False])
def test_a_group_without_an_lr_is_scaled_by_what_scale_says(per_group: bool) -> None:
    class Fixed(torch.optim.Optimizer):
        """Steps at 0.1, where a group has no lr."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_((group.get("lr") or 0.1) * p.grad)

    p, q = nn.Parameter(torch.full((4,), 9.0)), nn.Parameter(torch.full((3,), 9.0))
    groups: Any = [{"params": [p], "lr": 1e-3}, {"params": [q]}]
    m = Mechanic(Fixed(groups, {}), per_group=per_group)
    for t in range(30):
        before = q.detach().clone()
        p.grad, q.grad = noisy(p, t), noisy(q, t)
        m.step()
    moved = (before - q.detach()) / (0.1 * q.grad)
    scale = m.effective_lr()[1]  # of lr 1
    torch.testing.assert_close(moved, torch.full_like(moved, scale), rtol=1e-4, atol=0)
    if per_group:
        assert m.scale[1] == m.metrics()["scale/1"] == scale


def test_bfloat16_without_any_lr_is_scaled_by_what_scale_says() -> None:
    class Fixed(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad)

    p = nn.Parameter(torch.full((4,), 9.0, dtype=torch.bfloat16))
    m = Mechanic(Fixed([p], {}), s_init=0.5)
    pulled(p, m, 2)
    assert m.scale == 0.5


@pytest.mark.parametrize("base", [Adagrad, AdamW])
def test_x_ref_is_that_of_the_first_gradient(base: Any) -> None:
    """Not that of construction, where a base has its state from then on."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    m = Mechanic(base([p, q], lr=0.1))
    with torch.no_grad():
        q.fill_(100.0)  # pretrained weights come now
    pulled(p, m, 10)
    pulled(q, m, 1, 99.0)
    torch.testing.assert_close(m.state[q]["mechanic_ref"], torch.full((4,), 100.0), rtol=0.01, atol=0)


def test_parameters_that_share_memory_are_refused() -> None:
    """Each step of one would move the other by the scale once more."""
    p = nn.Parameter(torch.ones(4, 3))
    q = nn.Parameter(torch.ones(4, 3))
    q.data = p.data
    with pytest.raises(ValueError, match=r"share memory.*the same nn\.Parameter"):
        Mechanic(SGD([p, q], lr=0.1))
    whole = torch.ones(10)
    with pytest.raises(ValueError, match="share memory"):
        Mechanic(SGD([{"params": [nn.Parameter(whole[:6])]}, {"params": [nn.Parameter(whole[5:])]}], lr=0.1))
    m = Mechanic(SGD([nn.Parameter(whole[:6]), nn.Parameter(whole[6:]), nn.Parameter(torch.ones(0))], lr=0.1))
    with pytest.raises(ValueError, match="share memory"):
        m.add_param_group({"params": [nn.Parameter(whole[9:])]})
    assert len(m.param_groups) == 1
    square = torch.ones(4, 4)
    Mechanic(SGD([nn.Parameter(square[:, :2]), nn.Parameter(square[:, 2:])], lr=0.1))  # they have no element in common


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conj", "neg"])
def test_a_parameter_that_conjugates_what_it_reads_is_refused(view: Any) -> None:
    p = nn.Parameter(view(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"resolve_conj\(\)"):
        Mechanic(SGD([p], lr=0.1))


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("sweeping", ["native", "eager"])
@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_a_parameter_may_change_its_dtype(before: torch.dtype, after: torch.dtype, sweeping: str, sweeps: Any) -> None:
    """The digits that its old dtype could not hold are gone, and nothing else."""
    sweeps(sweeping)
    p = nn.Parameter(torch.full((5,), 9.0, dtype=before))
    m = Mechanic(SGD([p, nn.Parameter(torch.ones(2, dtype=torch.float16))], lr=1e-2))  # float16: the lr stays as it is
    pulled(p, m, 10)
    x = p.detach().clone()
    p.data = p.data.to(after)
    pulled(p, m)
    assert (p.detach().double() - 3).norm() <= (x.double() - 3).norm() * 1.01
    pulled(p, m, 30)
    assert (p.detach().double() - 3).norm() < 0.7 * (x.double() - 3).norm()
    kept = m.state_dict()["state"][0]
    assert kept["mechanic_ref"].dtype == torch.promote_types(after, torch.float32)
    assert kept.get("mechanic_rest", torch.empty(0)).dtype == {
        torch.bfloat16: torch.bfloat16,
        torch.float16: torch.float32,
    }.get(after, torch.float32)
    assert ("mechanic_rest" in kept) == (after in (torch.bfloat16, torch.float16))


def test_counts_are_exact_under_any_default_dtype(problem: Problem) -> None:
    """mechanic_step is float32, not the default of the moment: bfloat16 cannot count beyond 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = nn.Parameter(torch.ones(3, dtype=torch.float32))
        m = Mechanic(SGD([p], lr=1e-3))
    finally:
        torch.set_default_dtype(torch.float32)
    pulled(p, m, 300)
    assert m.param_groups[0]["mechanic_step"] == 300
    assert flat([p]).isfinite().all()
    assert copy.deepcopy(m.state_dict())["param_groups"][0]["mechanic_step"].dtype == torch.float32
