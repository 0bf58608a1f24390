"""Parameters that somebody edits between steps: what holds them in bounds, and what replaces them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from resuming import same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from training import Problem, flat

from manic import Mechanic

Loss = Callable[[Tensor], Tensor]  # of the rows with these numbers
Task = tuple[list[nn.Parameter], Loss]
Edit = Callable[[list[nn.Parameter]], object]  # of the parameters, in place

ROWS = 1024  # of every data set
LRS = (3e-3, 1e-2, 3e-2)  # AdamW's best one is among them on each task here; it is run at all of them
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def net(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def run(task: Task, optimizer: Any, steps: range | int, edit: Edit = lambda _: None, every: int = 1) -> None:
    """Trains on 32 rows a step, which depend on the number of the step alone; edits after every so many steps."""
    parameters, loss = task
    for t in steps if isinstance(steps, range) else range(steps):
        optimizer.zero_grad()
        loss(torch.randint(ROWS, (32,), generator=torch.Generator().manual_seed(t))).backward()
        optimizer.step()
        if (t + 1) % every == 0:
            with torch.no_grad():
                edit(parameters)


@torch.no_grad()
def value(task: Task) -> float:
    return task[1](torch.arange(ROWS)).item()


def beside_adamw(
    build: Callable[[], Task],
    steps: int,
    edit: Callable[[list[nn.Parameter]], Edit] = lambda _: lambda _: None,
    every: int = 1,
    lrs: tuple[float, ...] = LRS,
) -> tuple[float, float, float, float]:
    """What a Mechanic ends at, and AdamW at its best lr: loss and lr of the one, loss and lr of the other."""

    def end(lr: float, wrap: Callable[[Any], Any]) -> tuple[float, Any]:
        torch.manual_seed(0)
        task = build()
        optimizer = wrap(AdamW(task[0], lr=lr))
        run(task, optimizer, steps, edit(task[0]), every)
        return value(task), optimizer

    best, lr = min((end(lr, lambda base: base)[0], lr) for lr in lrs)
    loss, mechanic = end(1e-3, Mechanic)
    return loss, mechanic.effective_lr()[0], best, lr


# ---------------------------------------------------------------------- constraints


def contrastive() -> Task:
    """Two linear towers and a temperature, which wants to rise above its bound."""
    z = torch.randn(ROWS, 6)
    image, text = (torch.tanh(z @ torch.randn(6, 16)) + 0.05 * torch.randn(ROWS, 16) for _ in range(2))
    a, b, temperature = nn.Linear(16, 8), nn.Linear(16, 8), nn.Parameter(torch.tensor(math.log(10)))

    def loss(i: Tensor) -> Tensor:
        logits = temperature.exp() * F.normalize(a(image[i]), dim=1) @ F.normalize(b(text[i]), dim=1).T
        n = torch.arange(len(i))
        return (F.cross_entropy(logits, n) + F.cross_entropy(logits.T, n)) / 2

    return [*a.parameters(), *b.parameters(), temperature], loss


def regression(truth: Tensor) -> Task:
    """Least squares for a matrix that the constraint does not quite admit."""
    x = torch.randn(ROWS, len(truth))
    y = x @ truth + 0.1 * torch.randn(ROWS, truth.shape[1])
    w = nn.Parameter(0.1 * torch.randn_like(truth))
    return [w], lambda i: (x[i] @ w - y[i]).square().mean()


def critic() -> Task:
    """Tells two distributions apart, as that of a WGAN. 0.4 more than it can reach: a loss above 0."""
    real, fake, f = torch.randn(ROWS, 4) + 0.3, 1.2 * torch.randn(ROWS, 4), net(4, 16, 16, 1)
    return list(f.parameters()), lambda i: 0.4 + f(fake[i]).mean() - f(real[i]).mean()


SHAPE = (24, 4)
MASK = torch.arange(96).view(SHAPE) % 10 < 7
CONSTRAINTS: dict[str, tuple[Callable[[], Task], Edit]] = {
    "temperature": (contrastive, lambda ps: ps[-1].clamp_(0, math.log(10))),
    "non-negative": (lambda: regression(torch.randn(SHAPE) + 0.5), lambda ps: ps[0].clamp_(min=0)),
    "box": (lambda: regression(1.2 * torch.rand(SHAPE) - 0.6), lambda ps: ps[0].clamp_(-0.5, 0.5)),
    "unit rows": (
        lambda: regression(1.1 * F.normalize(torch.randn(SHAPE))),
        lambda ps: ps[0].copy_(F.normalize(ps[0])),
    ),
    "max-norm rows": (lambda: regression(torch.randn(SHAPE) / 2), lambda ps: ps[0].renorm_(2, 0, 1)),
    "mask": (lambda: regression(torch.randn(SHAPE) * torch.where(MASK, 1, 0.1)), lambda ps: ps[0].mul_(MASK)),
    "critic": (critic, lambda ps: [p.clamp_(-0.1, 0.1) for p in ps]),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_is_enforced_after_every_step(name: str) -> None:
    """The gradient pushes against the bound for ever. What the constraint takes back must not count as won."""
    build, enforce = CONSTRAINTS[name]

    @torch.no_grad()
    def begin(parameters: list[nn.Parameter]) -> Edit:
        enforce(parameters)
        return enforce

    loss, lr, best, best_lr = beside_adamw(build, 400, begin)
    assert 0 < loss < 2 * best
    assert lr < 5 * best_lr, "the scale runs away"


@pytest.mark.parametrize("falling", [False, True], ids=["at the highest lr", "below it"])
def test_x_ref_follows_what_an_edit_takes_back(falling: bool) -> None:
    """By 1 - r², where ‖d‖ is r times what the step had left. After a step without an edit, by little or nothing."""
    ends = []
    for r in (1.0, 0.9):
        p, mechanic = towards(torch.float64)
        mechanic.param_groups[0]["lr"] *= 0.5 if falling else 1
        ref = mechanic.state[p]["mechanic_ref"].clone()
        with torch.no_grad():
            p.copy_(ref + r * (p - ref))
        p.grad = p.detach() - torch.tensor(TARGET, dtype=torch.float64)
        mechanic.step()
        kept = (p.detach() - mechanic.state[p]["mechanic_ref"]).norm() / (p.detach() - ref).norm()
        ends.append(kept.item())
    steps = int(mechanic.param_groups[0]["mechanic_step"]) - 1
    plain = 1.0 if falling else ((steps + 2) / (steps + 3)) ** 0.25
    assert ends == pytest.approx([plain, 0.81 * plain], rel=1e-3)  # but for the grid


# ---------------------------------------------------------------------- replaced


def smooth(dtype: torch.dtype = torch.float32) -> Task:
    """A small network on three smooth functions."""
    x = torch.randn(ROWS, 8)
    y = torch.stack([x[:, 0] * x[:, 1], (2 * x[:, 2]).sin() + x[:, 3], x[:, 4:].norm(dim=1)], 1)
    f, x = net(8, 32, 3).to(dtype), x.to(dtype)
    return list(f.parameters()), lambda i: (f(x[i]).float() - y[i]).square().mean()


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, x in zip(parameters, values, strict=True):
        p.copy_(x)


def refs(mechanic: Mechanic, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [mechanic.state[p]["mechanic_ref"].clone() for p in parameters]


def stayed(before: Tensor, after: Tensor, way: Tensor, steps: int) -> bool:
    """Whether x_ref has gone after x by its share of the way alone: one part in `steps` of what x is away, or has gone.

    Twice that, for the rounding of it all.
    """
    return bool((after - before).norm() <= 2 / steps * way.norm())


@DTYPES
def test_each_fold_begins_anew(dtype: torch.dtype) -> None:
    """The initial weights are loaded into the same model, and the optimizer is kept: only the scale goes on."""
    torch.manual_seed(0)
    task = smooth(dtype)
    mechanic = Mechanic(AdamW(task[0], lr=1e-3))
    start, initial, lrs = copies(task[0]), value(task), []
    for fold in range(4):
        put(task[0], start)
        run(task, mechanic, range(250 * fold, 250 * fold + 1))
        assert 0.75 * initial < value(task) < 1.25 * initial
        run(task, mechanic, range(250 * fold + 1, 250 * fold + 250))
        assert value(task) < 0.15 * initial
        lrs += mechanic.effective_lr()
    assert max(lrs) < 5 * min(lrs)


@DTYPES
def test_a_fold_may_end_at_any_time(dtype: torch.dtype) -> None:
    """Also where the initial weights are just as far from x_ref as the last ones, on its other side."""
    torch.manual_seed(0)
    task = smooth(dtype)
    mechanic = Mechanic(AdamW(task[0], lr=1e-3))
    start, t = copies(task[0]), 0
    for length in (40, 80, 120, 160, 200):
        run(task, mechanic, range(t, t + length))
        lr, t = mechanic.effective_lr()[0], t + length
        put(task[0], start)
        run(task, mechanic, range(t, t + 1))
        gone = max((p - x).abs().max().item() for p, x in zip(task[0], start, strict=True))
        assert gone < 4 * lr + torch.finfo(dtype).eps, f"x goes towards the old x_ref, after {length} steps"
        assert lr / 2 < mechanic.effective_lr()[0] < 2 * lr


@DTYPES
@pytest.mark.parametrize("how", ["fresh", "rollback", "merge"])
def test_replaced_weights_are_where_x_ref_begins_anew(how: str, dtype: torch.dtype) -> None:
    """All of them are others at once: x_ref takes them, the scale stays, and the step that follows is one step.

    "fresh": those of another seed. "rollback": those of 50 steps ago, after a spike. "merge": the mean with those that
    another run has come to.
    """
    torch.manual_seed(0)
    task = smooth(dtype)
    parameters, loss = task
    start, fresh = copies(parameters), copies(smooth(dtype)[0])
    run(task, AdamW(parameters, lr=1e-2), range(1000, 1150))
    other = copies(parameters)
    put(parameters, start)
    mechanic = Mechanic(AdamW(parameters, lr=1e-3))
    run(task, mechanic, 200)
    earlier = copies(parameters)
    run(task, mechanic, range(200, 250))
    if how == "rollback":
        run((parameters, lambda i: 30 * loss(i.flip(0) // 2)), mechanic, range(250, 253))
    merged = [(p.detach() + x) / 2 for p, x in zip(parameters, other, strict=True)]
    new = {"fresh": fresh, "rollback": earlier, "merge": merged}[how]

    put(parameters, new)
    scale, before, digits = mechanic.scale, value(task), torch.finfo(dtype).eps
    run(task, mechanic, range(253, 254))
    lr = mechanic.effective_lr()[0]
    assert torch.equal(mechanic.scale, scale), "where the old weights were moved to says nothing of the new ones"
    for p, x, ref in zip(parameters, new, refs(mechanic, parameters), strict=True):
        step = (p.detach() - x).float().abs()
        assert 0 < step.max() < 4 * lr + digits, "an element moves by about lr"
        assert ((ref - x).abs() <= 0.1 * step + digits * x.abs()).all(), "x_ref is not where the new weights are"
    assert value(task) < 1.3 * before
    run(task, mechanic, range(254, 420))
    assert value(task) < 0.9 * before


@DTYPES
def test_a_small_edit_leaves_x_ref_where_it_is(dtype: torch.dtype) -> None:
    """Half a step in some direction: it counts as movement, and the run goes on from there."""
    torch.manual_seed(0)
    task = smooth(dtype)
    parameters = task[0]
    mechanic = Mechanic(AdamW(parameters, lr=1e-3))
    run(task, mechanic, 99)
    last = copies(parameters)
    run(task, mechanic, range(99, 100))
    with torch.no_grad():
        for p, x in zip(parameters, last, strict=True):
            p.add_(torch.randn_like(p).sign() * (p - x).abs().mean() / 2)
    before, x = refs(mechanic, parameters), copies(parameters)
    scale = mechanic.scale
    run(task, mechanic, range(100, 101))
    assert not torch.equal(mechanic.scale, scale)
    d, after, gone = flat(x) - flat(before), flat(refs(mechanic, parameters)), flat(parameters).detach() - flat(x)
    assert d.norm() > 2 * gone.norm() > 0
    assert stayed(flat(before), after, d.abs() + gone.abs(), 100)
    loss = value(task)
    run(task, mechanic, range(101, 250))
    assert value(task) < 0.7 * loss


# ---------------------------------------------------------------------- swapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["scale_free", "paper"])
def test_ema_weights_come_and_go_without_a_trace(variant: str, dtype: torch.dtype, problem: Problem) -> None:
    """They are swapped in for an evaluation and out again, by copies and through `p.data`."""
    runs = []
    for swaps in (False, True):
        parameters = problem.parameters(dtype)
        options = {"variant": "paper", "s_init": 1e-2} if variant == "paper" else {}
        mechanic = Mechanic(AdamW(parameters, lr=1e-3 if variant == "scale_free" else 1.0), **options)
        start = flat(parameters).detach().clone()
        mean = copies(parameters)
        for t in range(60):
            problem.train(parameters, mechanic, range(t, t + 1))
            for e, p in zip(mean, parameters, strict=True):
                e.lerp_(p.detach(), 0.1)
            if not swaps or t % 3:
                continue
            own, tensors = copies(parameters), [p.data for p in parameters]
            if t % 2:
                put(parameters, mean)
            else:
                for p, e in zip(parameters, mean, strict=True):
                    p.data = e.clone()
            problem.loss(parameters, t)
            if t % 2:
                put(parameters, own)
            else:
                for p, x in zip(parameters, tensors, strict=True):
                    p.data = x
        assert (flat(parameters) - start).abs().max() > 0.1
        runs.append((parameters, mechanic.state_dict()))
    assert torch.equal(flat(runs[0][0]), flat(runs[1][0]))
    assert same(runs[0][1], runs[1][1])


# ---------------------------------------------------------------------- put somewhere


def exact(p: Tensor, rest: Tensor | None) -> list[float]:
    """x as the step sees it. Of a bfloat16 parameter the magnitude goes on in `rest`, as that of a float32."""
    if rest is None:
        return [float(v) for v in p.double().tolist()]
    bits = p.detach().view(torch.int16).int()
    magnitude = (((bits & 0x7FFF) << 16) + rest.int()).clamp_min(0)
    return [float(v) for v in torch.where(bits < 0, -1.0, 1.0).mul(magnitude.view(torch.float32)).double().tolist()]


START, TARGET = [0.3, -0.7, 1.1, 0.9, -0.2, 0.6], [1.7, 0.9, -1.2, 0.8, -2.1, 2.2]


def towards(dtype: torch.dtype, **options: Any) -> tuple[nn.Parameter, Mechanic]:
    """A parameter that SGD has brought some of the way, and that was then rounded to a grid of 2^-14.

    x + u, u a power of two, is exact there. For bfloat16 parameters, which have fewer digits, the grid is 2^-6.
    """
    p = nn.Parameter(torch.tensor(START, dtype=dtype))
    mechanic = Mechanic(SGD([p], lr=1.0), **options)
    for _ in range(12):
        p.grad = p.detach() - torch.tensor(TARGET, dtype=dtype)
        mechanic.step()
    with torch.no_grad():
        grid = 2.0**14 if dtype != torch.bfloat16 else 2.0**6
        p.copy_((p.detach() * grid).round() / grid)
    return p, mechanic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_begins_where_x_was_put(dtype: torch.dtype) -> None:
    """While S rises nothing is drawn back: x + S·u to the bit, and x to the bit where nothing has a gradient."""
    p, mechanic = towards(dtype)
    x, ref, before = exact(p, None), exact(mechanic.state[p]["mechanic_ref"], None), mechanic.scale
    g = [math.copysign(0.5, start - target) for start, target in zip(START, TARGET, strict=True)]
    g[2] = g[3] = 0.0
    p.grad = torch.tensor(g, dtype=dtype)
    mechanic.step()
    s = mechanic.scale
    assert s > before
    assert sum((a - b) ** 2 for a, b in zip(x, ref, strict=True)) > float(s) ** 2, "one step away from x_ref"
    wanted = [xi - s.to(dtype).item() * gi for xi, gi in zip(x, g, strict=True)]
    assert torch.equal(p, torch.tensor(wanted, dtype=dtype))
    assert exact(p, None)[2:4] == x[2:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", ["scale_free", "paper"])
@pytest.mark.parametrize("way", ["on", "back"])
def test_the_step_after_an_edit_by_hand(way: str, variant: str, dtype: torch.dtype) -> None:
    """x + a·d + S'·u in plain Python, u that of SGD.

    "scale_free": d = x - x_ref, with the edit in it, and x is drawn back by a = S'/S - 1 where that is an overshoot.
    "paper": d = Δ, without the edit, and a = S' - S.
    """
    free = variant == "scale_free"
    p, mechanic = towards(dtype, **({} if free else {"variant": "paper", "s_init": 0.1, "eps": 0.1}))
    coarse = dtype == torch.bfloat16
    unit = 2.0**16 if coarse and free else 1.0  # how much larger u is than that of SGD at its lr, and S smaller
    before = float(mechanic.scale) / unit
    x = exact(p, mechanic.state[p]["mechanic_rest"] if coarse else None)
    slot = exact(mechanic.state[p]["mechanic_ref" if free else "mechanic_delta"], None)
    d = [xi - ri for xi, ri in zip(x, slot, strict=True)] if free else slot
    grad = p.detach() - torch.tensor(TARGET, dtype=dtype) if way == "on" else torch.tensor(d, dtype=dtype)
    p.grad = grad if way == "on" else 8 * grad / grad.norm()
    u = (torch.add(p.detach(), p.grad, alpha=-unit).double() - p.detach().double()).tolist()
    mechanic.step()

    s = float(mechanic.scale) / unit
    assert (s > before) == (way == "on")
    a = min(s / before, 1) - 1 if free else s - before
    assert (a < -0.01) == (way == "back"), "so steep a fall draws x back"
    got = exact(p, mechanic.state[p]["mechanic_rest"] if coarse else None)
    step = max(abs(s * ui) for ui in u)
    digits = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-3 * step}[dtype]
    for new, xi, di, ui in zip(got, x, d, u, strict=True):
        assert abs(new - (xi + a * di + s * ui)) < digits


# ---------------------------------------------------------------------- others who move them


@DTYPES
@pytest.mark.parametrize("trunk", [False, True])
def test_heads_that_take_turns_are_not_replaced(trunk: bool, dtype: torch.dtype) -> None:
    """Two of equal size, one of which is to go much further than the other. The one without a gradient waits."""
    torch.manual_seed(0)
    heads = [nn.Parameter(torch.zeros(50, dtype=dtype)) for _ in range(2 + trunk)]
    targets = [3 + torch.randn(50), 0.05 * torch.randn(50), torch.randn(50)]
    mechanic = Mechanic(SGD(heads, lr=1.0))
    travelled, away = [0.0, 0.0], 0
    for t in range(200):
        which = t % 2
        head, other = heads[which], heads[1 - which]
        mechanic.zero_grad()
        for i in (which, *range(2, len(heads))):
            (heads[i].float() - targets[i]).square().sum().backward()
        waits = other.detach().clone(), *(refs(mechanic, [other]) if t > 3 else [])
        x, before = head.detach().float().clone(), refs(mechanic, [head])[0] if t > 1 else None
        mechanic.step()
        assert same((other.detach(), *(refs(mechanic, [other]) if t > 3 else [])), waits)
        step = head.detach().float() - x
        travelled[which] += step.norm().item()
        if t < 4:
            continue
        d, digits = x - before, 2 * torch.finfo(dtype).eps * x.abs()
        after = refs(mechanic, [head])[0]
        assert stayed(before, after, d.abs() + step.abs() + digits, t + 1)
        assert (head.detach().float() - after).norm() <= 1.01 * travelled[which] + digits.norm(), "x was never there"
        away += bool(d.norm() > 3 * step.norm())
    assert away > 50, "heads that are reset would be but one step away"
    for head, target in zip(heads, targets, strict=False):
        torch.testing.assert_close(head.detach().float(), target, rtol=0.02, atol=0.02)


def test_heads_that_take_turns_on_one_trunk() -> None:
    """They learn as with AdamW at its best lr."""

    def build() -> Task:
        x = torch.randn(ROWS, 8)
        targets = x[:, 0] * x[:, 1], 3 * (2 * x[:, 2]).sin() + x[:, 3]
        trunk, heads = nn.Sequential(nn.Linear(8, 32), nn.Tanh()), [nn.Linear(32, 1) for _ in range(2)]
        calls = [0]

        def loss(i: Tensor) -> Tensor:
            outputs = [head(trunk(x[i]))[:, 0] for head in heads]
            losses = [(y - target[i]).square().mean() for y, target in zip(outputs, targets, strict=True)]
            if not torch.is_grad_enabled():
                return sum(losses, torch.zeros(()))
            calls[0] += 1
            return losses[calls[0] % 2]

        return [*trunk.parameters(), *(p for head in heads for p in head.parameters())], loss

    loss, lr, best, best_lr = beside_adamw(build, 400)
    assert loss < 2 * best
    assert lr < 5 * best_lr


def test_lookahead_around() -> None:
    """Every five steps the weights go half of the way back to where they were five steps ago."""

    def lookahead(parameters: list[nn.Parameter]) -> Edit:
        slow = copies(parameters)

        def edit(fast: list[nn.Parameter]) -> None:
            for s, p in zip(slow, fast, strict=True):
                p.copy_(s.lerp_(p, 0.5))

        return edit

    lrs = (1e-2, 3e-2, 1e-1)  # half of each way is taken back
    loss, lr, best, best_lr = beside_adamw(lambda: regression(torch.randn(SHAPE)), 500, lookahead, every=5, lrs=lrs)
    assert loss < 2 * best
    assert lr < 10 * best_lr
