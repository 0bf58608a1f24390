"""Where in memory a tensor or an element of it lies makes no difference, and may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from resuming import same
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from training import Problem, flat

from manic import Mechanic
from manic.sweeps.native import Native


@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_where_in_memory_a_tensor_lies_makes_no_difference(where: str, dtype: torch.dtype) -> None:
    """A resumed process may have its gradients at other addresses: DDP with gradient_as_bucket_view."""

    def at(offset: int) -> torch.Tensor:
        return torch.empty(x0.numel() + 16, dtype=dtype)[offset:][: x0.numel()].view_as(x0)

    generator = torch.Generator().manual_seed(0)
    x0, target = (torch.randn(100, 100, dtype=dtype, generator=generator) for _ in range(2))
    ends = []
    for offset in (0, 1, 3):
        p = nn.Parameter(at(offset if where == "x" else 0).copy_(x0))
        m = Mechanic(AdamW([p], lr=1e-3))
        for _ in range(40):
            p.grad = at(offset if where == "g" else 0).copy_(p.detach() - target)
            m.step()
        ends.append([p.detach().clone(), m.scale])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    assert (ends[0][0] - x0).norm() > 1


@pytest.mark.parametrize("change", ["double", "bfloat16", "smaller"])
def test_natively_a_parameter_may_become_another(change: str, sweeps: Callable[[str], None]) -> None:
    """The tables of the C++ sweeps were those of before: they wrote past the end."""
    ends = []
    for kind in ("eager", "native"):
        sweeps(kind)
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(400_000))
        m = Mechanic(SGD([p], lr=1e-3))
        for t in range(6):
            if t == 2 and change == "smaller":
                p.grad, p.data = None, p.data[:10].clone()
                m.state.pop(p)
            elif t == 2:
                p.grad, p.data = None, getattr(p.data, change)()
            p.grad = p.detach().clone()
            m.step()
        ends.append([p.detach().double(), m.scale])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["Turned", "SGD"])
def test_natively_a_base_may_put_x_elsewhere(
    base: str, sweeps: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turned(Optimizer):
        """Works on the transpose, and leaves x with its strides."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    u = (p.grad.T / p.grad.norm()).contiguous().T
                    p.data = u.mul(-group["lr"]).add(p.data)

    moves: list[Any] = []
    real = Native.sweep
    monkeypatch.setattr(Native, "sweep", lambda *arguments: moves.append(real(*arguments)))
    ends = []
    for kind in ("eager", "native"):
        sweeps(kind)
        torch.manual_seed(0)
        start, target = torch.randn(7, 5), torch.randn(7, 5)
        p = nn.Parameter(start.clone())
        m = Mechanic(Turned([p], 1e-2) if base == "Turned" else SGD([p], 1e-2))
        for _ in range(12):
            p.grad = (p.detach() - target).contiguous()
            m.step()
        ends.append(p.detach())
    assert len(moves) == (0 if base == "Turned" else 12)
    assert ends[0].stride() == ends[1].stride() == ((1, 7) if base == "Turned" else (5, 1))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    assert (ends[0] - target).norm() < 0.95 * (start - target).norm()


def test_natively_with_another_default_device(problem: Problem) -> None:
    ends = []
    for device in ("cpu", "meta"):
        parameters = problem.parameters()
        m = Mechanic(SGD(parameters, lr=0.1))
        for t in range(10):
            m.zero_grad()
            problem.loss(parameters, t).backward()
            with torch.device(device):
                m.step()
        ends.append(flat(parameters).detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", ["eager", "native"])
def test_an_edit_that_exchanges_elements_which_never_moved(kind: str, sweeps: Callable[[str], None]) -> None:
    """Experts or words in another order: they stay where the user has put them."""
    sweeps(kind)
    e = nn.Embedding(1000, 16, _weight=torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)))
    m = Mechanic(SGD(e.parameters(), lr=1e-2))

    def step() -> None:
        m.zero_grad()
        (e(torch.arange(100)) - 1).square().mean().backward()
        m.step()

    for _ in range(10):
        step()
    with torch.no_grad():
        e.weight[[500, 501]] = e.weight[[501, 500]]
    wanted = e.weight.detach()[500:].clone()
    step()
    assert torch.equal(e.weight[500:], wanted)
