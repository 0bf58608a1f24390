"""Live against the authors' implementations, where their formulas are the paper's; docs/algorithm.md says where.

mechanic-pytorch: m_0 = 1e-6 makes S_2 = 1e-6·s_init/ε where the paper has 0, so ε is 1 here and h is lifted far
above it by an objective of 1e6 times the size; its norms are taken after the base step, so λ is 0.
optax: s_1 = s_init makes S_2 = s_init, so s_init is tiny; it bounds h by ±m_{t-1} in the reward and lets the
reward go below 0, so the gradients shrink fast enough that |h| never grows, and keep their sign.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import Problem, flat, gap

from manic import Mechanic

pytestmark = pytest.mark.agreement
STEPS = 100

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5e-6}),
    "momentum": (torch.optim.SGD, {"lr": 0.1e-6, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("base", BASES)
def test_mechanic_pytorch(problem: Problem, base: str) -> None:
    authors = pytest.importorskip("mechanic_pytorch")
    cls, options = BASES[base]
    ours, theirs = problem.parameters(torch.float64), problem.parameters(torch.float64)
    tuner = {"s_decay": 0.0, "s_init": 1e-3, "eps": 1.0, "store_delta": True}
    one = Mechanic(cls(ours, **options), variant="paper", **tuner)
    two = authors.mechanize(cls, **tuner)(theirs, **options)
    for t in range(STEPS):
        for parameters, optimizer in ((ours, one), (theirs, two)):
            optimizer.zero_grad()
            (1e6 * problem.loss(parameters, t)).backward()
            optimizer.step()
    scale = float(two.state["_mechanic"]["s"].sum())
    assert one.scale.item() == pytest.approx(scale, rel=1e-3)  # their accumulators are float32
    assert gap(flat(ours).detach(), flat(theirs).detach(), problem.start) < 1e-3


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("s_decay", [0.0, 0.01])
def test_optax(problem: Problem, base: str, s_decay: float) -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    jax.config.update("jax_enable_x64", True)
    start, s_init, eps = problem.start, 1e-6, 1e-13
    inner = {"sgd": optax.sgd(0.5), "adam": optax.adam(0.1)}[base]
    transform = optax.contrib.mechanize(inner, weight_decay=s_decay, s_init=s_init, eps=eps)
    x = jax.numpy.array(start, dtype=jax.numpy.float64)
    state = transform.init(x)
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = {"sgd": torch.optim.SGD([p], lr=0.5), "adam": torch.optim.Adam([p], lr=0.1)}[base]
    mechanic = Mechanic(optimizer, variant="paper", s_decay=s_decay, s_init=s_init, eps=eps)
    for t in range(30):
        gradient = [0.4**t * (1 + i / 10) for i in range(len(start))]
        update, state = transform.update(jax.numpy.array(gradient), state, x)
        x = optax.apply_updates(x, update)
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        mechanic.step()
        if t >= 2:
            assert mechanic.scale.item() == pytest.approx(float(state.s.sum()), rel=1e-6)
    moved = (p.detach() - torch.tensor(start, dtype=torch.float64)).abs().max().item()
    assert moved > s_init
    assert (p.detach() - torch.tensor(x.tolist(), dtype=torch.float64)).abs().max().item() < 1e-5 * moved
    assert mechanic.scale > 1.5 * s_init, "the reward never came in"
