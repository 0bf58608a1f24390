"""Random programs over a live Mechanic: whatever a training script may do, in any order, against float64 by hand."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from resuming import same
from torch import Tensor, nn

from manic import Mechanic

BETAS, S_INIT, DECAY, LR, MOMENTUM, GAMMA = (0.9, 0.999), 1e-2, 0.01, 0.1, 0.9, 0.99
SHAPES = [(2, 3), (4,), ()]
KINDS = ["usual", "usual", "usual", "zero", "none", "huge"]
BAD = st.tuples(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 4), st.integers(0, 5))


def over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


class ByHand:
    """Both variants around SGD with momentum, parameter by parameter, in lists of floats.

    Every parameter has one slot y, from its first step on: Δ in "paper", x_ref in "scale_free".
    """

    def __init__(self, variant: str, s_init: float | None) -> None:
        self.variant, self.s_init = variant, s_init
        self.unit = 1.0 if variant == "paper" else LR  # what is divided out of the lr
        self.x: list[list[float]] = []
        self.slot: list[list[float] | None] = []
        self.buffer: list[list[float]] = []
        self.lr: list[float] = []
        n = len(BETAS)
        self.m, self.v, self.r, self.s = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
        self.skipped, self.learned, self.frozen = 0, 0, False
        self.scale = 0.0  # S, in units of its own
        self.ref_sq, self.peak = 0.0, 0.0  # ‖x_ref‖²; the largest lr
        self.size = 0.0  # the mean ‖g‖
        self.largest, self.update, self.left = 0.0, 0.0, 0.0  # ‖u‖, the largest and the last; ‖d‖ after the last
        self.members: set[int] = set()  # the parameters that had a gradient in the last step
        self.steps, self.moved, self.x_norm, self.keep, self.fade = 0, 0.0, 0.0, 0.0, 0.0
        self.outliers, self.replaced = 0, 0
        # Of each parameter: the largest of what its x, and of what its slot, was added up from.
        self.span: list[float] = []
        self.reach: list[float] = []

    def add(self, values: list[float], lr: float) -> None:
        self.x.append(values)
        self.slot.append(None)
        self.buffer.append([])
        self.lr.append(lr)
        self.peak = max(self.peak, lr / self.unit) if self.peak else 0.0  # a late group is no warm-up
        self.span.append(0.0)
        self.reach.append(0.0)
        self.edit(len(self.x) - 1, values)

    def edit(self, i: int, values: list[float]) -> None:
        """The slot stays: the edit is a part of d from now on in "scale_free", and x_ref shifts in "paper"."""
        self.x[i] = values
        self.span[i] = max(self.span[i], *map(abs, values))

    def step(self, gradients: list[list[float] | None]) -> None:
        taking = {i: g for i, g in enumerate(gradients) if g is not None}
        if not all(math.isfinite(value) for g in taking.values() for value in g):
            self.skipped += 1
            return
        moved: dict[int, list[float]] = {}
        a, s, e, f = 0.0, self.scale, 0.0, 0.0
        outliers = self.outliers
        if not self.frozen:
            self.learned += any(value != 0 for g in taking.values() for value in g)
            for i in taking:
                moved[i] = self.enter(i)
            learn = self.paper if self.variant == "paper" else self.scale_free
            a, s, e, f = learn(taking, moved)
        squares = []
        for i, g in taking.items():
            x, slot, buffer = self.x[i], self.slot[i], self.buffer[i]
            g = [0.0] * len(g) if self.outliers > outliers else g  # so that momentum does not keep it
            self.buffer[i] = [MOMENTUM * b + gi for b, gi in zip(buffer, g, strict=True)] if buffer else list(g)
            u = [-self.lr[i] / self.unit * b for b in self.buffer[i]]
            squares += [ui**2 for ui in u]
            d = moved.get(i, [0.0] * len(x))
            self.x[i] = [xi + a * di + s * ui for xi, di, ui in zip(x, d, u, strict=True)]
            self.span[i] = max(self.span[i], *(abs(s * ui) for ui in u), *(abs(a * di) for di in d))
            self.span[i] = max(self.span[i], *map(abs, self.x[i]))
            if slot is not None and not self.frozen:
                # Where it takes x it is x, to the last digit: y + (x - y) is not, if y was far away.
                left = x if e == 1 else [yi + e * di for yi, di in zip(slot, d, strict=True)]
                self.slot[i] = [yi + f * ui for yi, ui in zip(left, u, strict=True)]
                self.reach[i] = max(self.reach[i], *(abs(f * ui) for ui in u), *(abs(e * di) for di in d))
                self.reach[i] = max(self.reach[i], *map(abs, slot))
        self.update = math.sqrt(math.fsum(squares))
        if not self.frozen and self.variant == "scale_free":
            pairs = [(x, y) for i in taking for x, y in zip(self.x[i], self.slot[i] or [], strict=True)]
            self.left = math.sqrt(math.fsum((x - y) ** 2 for x, y in pairs))
        self.lr = [GAMMA * lr for lr in self.lr]

    def enter(self, i: int) -> list[float]:
        """d of a parameter that has a gradient, and its slot where that is its first."""
        slot = self.slot[i]
        if slot is None:
            slot = self.slot[i] = [0.0] * len(self.x[i]) if self.variant == "paper" else list(self.x[i])
            self.ref_sq += math.fsum(value**2 for value in self.x[i])
        if self.variant == "paper":
            return list(slot)
        self.span[i] = max(self.span[i], *map(abs, slot))
        return [xi - yi for xi, yi in zip(self.x[i], slot, strict=True)]

    def sums(
        self, taking: dict[int, list[float]], moved: dict[int, list[float]]
    ) -> tuple[float, float, float, float, float]:
        """⟨d,g⟩, ⟨d,x⟩, ‖g‖, ‖x‖, ‖d‖."""
        g = [value for g in taking.values() for value in g]
        x = [value for i in taking for value in self.x[i]]
        d = [value for d in moved.values() for value in d]
        pairs = [(d, g), (d, x), (g, g), (x, x), (d, d)]
        delta_grad, delta_x, *squares = (math.fsum(p * q for p, q in zip(a, b, strict=True)) for a, b in pairs)
        g_norm, x_norm, d_norm = map(math.sqrt, squares)
        return delta_grad, delta_x, g_norm, x_norm, d_norm

    def paper(self, taking: dict[int, list[float]], moved: dict[int, list[float]]) -> tuple[float, float, float, float]:
        before = self.scale
        delta_grad, delta_x, g_norm, x_norm, _ = self.sums(taking, moved)
        h = delta_grad + DECAY * before * over(g_norm, x_norm) * delta_x
        for i, beta in enumerate(BETAS):
            self.m[i] = max(beta * self.m[i], abs(h))
            self.v[i] = beta**2 * self.v[i] + h**2
            self.r[i] = max(0.0, beta * self.r[i] - self.s[i] * h)
            self.s[i] = ((self.s_init or 1e-8) / len(BETAS) * self.m[i] + self.r[i]) / (math.sqrt(self.v[i]) + 1e-8)
        self.scale = math.fsum(self.s)
        return self.scale - before, self.scale, 0.0, 1.0

    def scale_free(
        self, taking: dict[int, list[float]], moved: dict[int, list[float]]
    ) -> tuple[float, float, float, float]:
        delta_grad, delta_x, g_norm, x_norm, d_norm = self.sums(taking, moved)
        lr = max(self.lr) / self.unit

        # Whether somebody has replaced the weights: they are further away than an update takes them.
        same, self.members = set(taking) == self.members, set(taking)
        growth = abs(over(d_norm, self.fade) - self.keep * self.moved)
        shift = abs(x_norm - self.x_norm) - (1 - self.keep) * self.moved
        bound = 3 * self.scale * self.update + 1e-5 * (x_norm + d_norm)
        replaced = same and self.scale > 0 and max(growth, shift) > bound
        self.x_norm = x_norm
        rest = min(1.0, d_norm / self.left) if same and self.left and not replaced else 1.0  # of d, after an edit
        if replaced:
            self.replaced += 1
            delta_grad = delta_x = d_norm = 0.0
        self.moved = d_norm

        # An lr that rises is a change of unit.
        leap = max(1.0, over(lr, self.peak))
        m, v, before, last = leap * self.m[0], leap**2 * self.v[0], self.scale / leap, leap * self.update
        self.largest *= leap
        if not replaced and (same or self.largest == 0):
            self.largest = max(self.largest, over(growth, before))
        self.largest = self.largest or last  # S starts in the step after the first update
        whole = over(1 + math.sqrt(self.ref_sq), self.largest)
        first = 1e-3 * whole if self.s_init is None or not whole else max(self.s_init * self.unit, 1e-6 * whole)

        self.size = self.size or g_norm
        pulled = delta_grad + DECAY * over(d_norm, x_norm) * over(g_norm, x_norm) * delta_x
        h = over(over(pulled, before), self.size)
        seen = min(g_norm, 2 * self.size)
        calm = min(1.0, over(self.size, g_norm))
        recent = 2 / (self.steps + 2) if g_norm > 0 else 0.0  # no gradient says nothing
        self.size += recent * (seen - self.size)
        usual = min(abs(h), 2 * m) if m else abs(h)
        then = math.sqrt(v + 4 * m**2)
        m, v = max(m, usual), v + usual**2
        now = math.sqrt(v + 4 * m**2)
        typical = leap * self.r[0]
        typical = typical + recent * (usual - typical) if typical else usual
        self.m, self.v, self.r = [m], [v], [typical]
        surprise = over(abs(h), then or now)
        record = h > 0 and surprise >= 0.5
        self.peak = max(self.peak, lr)
        share = over(lr, self.peak)
        patience = math.sqrt(100 / (self.steps + 100))
        by = -patience * usual if h > 0 else calm * usual
        by = over(by + math.sqrt(patience * (1 - share)) * typical, now) if h else 0.0
        if record:
            by = -over(usual, then or now)
        self.scale = max(before * math.exp(share * by) if before else first, 1e-6 * whole)

        self.fade = rest**2 * (1.0 if share < 1 else ((self.steps + 2) / (self.steps + 3)) ** 0.25)
        self.steps += 1
        self.outliers += surprise >= 2
        follow = 0.0 if surprise >= 2 else self.scale
        if before == 0 or replaced:  # x_ref takes x
            self.keep, a, e = 0.0, 0.0, 1.0
        else:
            self.keep = min(self.scale / before, 1.0) if record else 1.0
            a, e = self.keep - 1, (1 - self.fade) * self.keep
        return a, follow, e, (1 - self.fade) * follow


class Program(RuleBasedStateMachine):
    """The live objects, and the same by hand."""

    variant = "paper"
    starts: ClassVar[list[float | None]] = [S_INIT]  # the first scale
    end = "learning"  # in which it surely ends; it may in the others
    learned: ClassVar[list[int]] = []  # in how many steps each program has learned
    taken: ClassVar[Counter[str]] = Counter()  # steps of all programs, by what they were taken with; and what happened

    def __init__(self) -> None:
        super().__init__()
        self.unwrapped = False

    @initialize(
        seed=st.integers(0, 1000),
        usual=st.sampled_from([10, 20, 30, 0]),
        settles=st.integers(10, 30),
        huge=st.sampled_from([False, False, True]),
        start=st.integers(0, 1),
    )
    def begin(self, seed: int, usual: int, settles: int, huge: bool, start: int) -> None:
        """`usual`: steps to begin with. `settles`: after how many learned steps it may freeze. `huge`: with gradients
        of 1e12, which leave few digits of what was before. `start`: which of the first scales."""
        self.settles, self.huge = settles, huge
        self.s_init = self.starts[start % len(self.starts)]
        self.oracle = ByHand(self.variant, self.s_init)
        self.random = torch.Generator().manual_seed(seed)
        self.parameters = [nn.Parameter(self.draw(shape)) for shape in SHAPES]
        for p in self.parameters:
            self.oracle.add(p.flatten().tolist(), LR)
        optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM)
        self.wrap(optimizer)
        self.steps(usual, False)

    def teardown(self) -> None:
        self.learned.append(self.oracle.learned)
        self.taken.update({"replaced": self.oracle.replaced, "outliers": self.oracle.outliers})

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
        self.optimizer: Any = Mechanic(
            optimizer, self.schedule, variant=self.variant, betas=BETAS, s_decay=DECAY, s_init=self.s_init
        )

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    # ------------------------------------------------------------------ what a script may do

    @rule(count=st.integers(1, 5), closure=st.booleans())
    def steps(self, count: int, closure: bool) -> None:
        self.settle()
        for _ in range(count):
            self.take([self.draw(tuple(p.shape)) for p in self.parameters], closure)

    @rule(
        kinds=st.lists(st.sampled_from(KINDS), min_size=5, max_size=5),
        count=st.integers(1, 5),
        bad=st.lists(BAD, max_size=2),
        at=st.integers(0, 4),
        closure=st.booleans(),
    )
    def step(self, kinds: list[str], count: int, bad: list[tuple[float, int, int]], at: int, closure: bool) -> None:
        """A few steps, the first of which may have huge gradients, and one of which others that are not finite."""
        self.settle()
        for t in range(count):
            gradients: list[Tensor | None] = []
            for p, kind in zip(self.parameters, kinds, strict=False):
                size = {"zero": 0.0, "huge": 1e12 if self.huge and t == 0 else 1.0}.get(kind, 1.0)
                gradients.append(None if kind == "none" else self.draw(tuple(p.shape)) * size)
            # Once it is settled they are the base's own concern.
            for value, i, element in bad if t == at % count and not self.settled else []:
                g = gradients[i % len(gradients)]
                if g is not None:
                    g.view(-1)[element % g.numel()] = value
            self.take(gradients, closure)

    def settle(self) -> None:
        """Once it may, and is to: so that this is not left to chance."""
        if self.oracle.learned >= self.settles and not self.settled and self.end != "learning":
            self.freeze() if self.end == "frozen" else self.unwrap()

    @property
    def settled(self) -> bool:
        return self.unwrapped or self.oracle.frozen

    def take(self, gradients: list[Tensor | None], closure: bool) -> None:
        self.taken["unwrapped" if self.unwrapped else "frozen" if self.oracle.frozen else "learning"] += 1
        gradients = [g if p.requires_grad else None for p, g in zip(self.parameters, gradients, strict=True)]

        def put() -> float:
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = None if g is None else g.clone()
            return 1.5

        if closure:
            for p in self.parameters:
                p.grad = None
            assert self.optimizer.step(put) == 1.5
        else:
            put()
            self.optimizer.step()
        if self.unwrapped:
            self.schedule.step()
        self.oracle.step([None if g is None else g.flatten().tolist() for g in gradients])

    @rule(
        which=st.integers(0, 4),
        by=st.floats(-2, 2),
        size=st.sampled_from([1.0, 1e-2, 1e-4]),
        between=st.booleans(),
    )
    def edit(self, which: int, by: float, size: float, between: bool) -> None:
        """A large one replaces the weights, and a small one is like an update. `between`: two steps of the usual."""
        if between:
            self.steps(1, False)
        i = which % len(self.parameters)
        with torch.no_grad():
            self.parameters[i].add_(by * size)
        self.oracle.edit(i, self.parameters[i].flatten().tolist())
        self.taken["edited"] += 1
        if between:
            self.steps(1, False)

    @rule(which=st.integers(0, 4))
    def stop_or_go(self, which: int) -> None:
        p = self.parameters[which % len(self.parameters)]
        p.requires_grad_(not p.requires_grad)

    @precondition(lambda self: len(self.parameters) < 5)
    @rule(shape=st.sampled_from(SHAPES))
    def add_group(self, shape: tuple[int, ...]) -> None:
        p = nn.Parameter(self.draw(shape))
        # A scheduler of torch is built for as many groups as there were: the new one keeps its lr.
        self.optimizer.add_param_group({"params": [p], "lr": 0.05, "initial_lr": 0.05})
        self.schedule.base_lrs.append(0.05)
        self.parameters.append(p)
        folded = self.oracle.scale / self.oracle.unit if self.unwrapped else 1.0  # into lrs of before
        self.oracle.add(p.flatten().tolist(), 0.05 / folded)

    @rule(factor=st.floats(0.5, 2))
    def change_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        self.oracle.lr = [lr * factor for lr in self.oracle.lr]

    @rule(none=st.booleans())
    def zero_grad(self, none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=none)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how: str) -> None:
        whole = [self.parameters, self.optimizer, self.schedule]
        whole = copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))
        self.parameters, self.optimizer, self.schedule = whole
        if not self.unwrapped:
            self.schedule = self.optimizer.scheduler

    @rule(live=st.booleans())
    def save_and_load(self, live: bool) -> None:
        """Into the live objects, or into new ones, that have other values."""
        file = io.BytesIO()
        torch.save(
            [[p.detach() for p in self.parameters], self.optimizer.state_dict(), self.schedule.state_dict()], file
        )
        file.seek(0)
        values, state, schedule = torch.load(file, weights_only=True)
        if live:
            self.optimizer.load_state_dict(state)
            return
        trainable = [p.requires_grad for p in self.parameters]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        self.parameters = [nn.Parameter(torch.zeros_like(value)) for value in values]
        rest = iter(self.parameters)
        groups = [{"params": [next(rest) for _ in range(size)]} for size in sizes]
        optimizer = torch.optim.SGD(groups, lr=7.0, momentum=MOMENTUM)
        if self.unwrapped:
            self.optimizer, self.schedule = optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
            self.schedule.load_state_dict(schedule)
        else:
            self.wrap(optimizer)
        self.optimizer.load_state_dict(state)
        for p, value, wanted in zip(self.parameters, values, trainable, strict=True):
            p.requires_grad_(wanted)
            p.data.copy_(value)

    @precondition(lambda self: not self.unwrapped and self.oracle.learned >= self.settles)
    @rule()
    def freeze(self) -> None:
        self.optimizer.freeze()
        self.oracle.frozen = True

    @precondition(lambda self: not self.unwrapped and self.oracle.learned >= self.settles)
    @rule()
    def unwrap(self) -> None:
        self.optimizer = self.optimizer.unwrap()
        self.oracle.frozen = self.unwrapped = True

    # ------------------------------------------------------------------ what holds after each of them

    @invariant()
    def it_is_as_by_hand(self) -> None:
        for p, wanted, span in zip(self.parameters, self.oracle.x, self.oracle.span, strict=True):
            gap = (p.detach().flatten() - torch.tensor(wanted, dtype=torch.float64)).abs().max()
            assert gap <= 1e-9 * span
        if self.unwrapped:
            return
        assert float(self.optimizer.skipped) == self.oracle.skipped
        scale = float(self.optimizer.scale) * self.oracle.unit
        assert math.isclose(scale, self.oracle.scale, rel_tol=1e-7, abs_tol=1e-300)

    @invariant()
    def it_is_finite(self) -> None:
        assert all(bool(p.isfinite().all()) for p in self.parameters)
        for values in self.optimizer.state.values():
            assert all(bool(value.isfinite().all()) for value in values.values() if isinstance(value, Tensor))

    @invariant()
    def there_is_one_slot_and_it_is_as_by_hand(self) -> None:
        name = "mechanic_delta" if self.variant == "paper" else "mechanic_ref"
        for p, wanted, reach in zip(self.parameters, self.oracle.slot, self.oracle.reach, strict=True):
            found = {key: value for key, value in self.optimizer.state.get(p, {}).items() if key.startswith("mechanic")}
            if wanted is None or self.oracle.frozen:
                # A checkpoint of before the first step has the state that this one will create.
                assert not found or self.optimizer.param_groups[0]["mechanic_step"] == 0
            else:
                assert found.keys() == {name}
                gap = (found[name].flatten() - torch.tensor(wanted, dtype=torch.float64)).abs().max()
                assert gap <= 1e-9 * reach

    @invariant()
    def the_state_dict_round_trips(self) -> None:
        """Into a copy that has gone on. (Not into the live one, which would forget what it keeps from step to step.)"""
        before = copy.deepcopy(self.optimizer.state_dict())
        parameters, optimizer = copy.deepcopy([self.parameters, self.optimizer])
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not same(optimizer.state_dict(), before)
        optimizer.load_state_dict(copy.deepcopy(before))
        assert same(optimizer.state_dict(), before)
        assert same(self.optimizer.state_dict(), before)


class ScaleFree(Program):
    """The default variant."""

    variant = "scale_free"
    starts: ClassVar[list[float | None]] = [None, S_INIT]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [Program, ScaleFree])
@pytest.mark.parametrize("end", ["learning", "frozen", "unwrapped"])
def test_random_programs(
    program: Any, end: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(program, "end", end)
    monkeypatch.setattr(program, "learned", [])
    monkeypatch.setattr(program, "taken", Counter())
    every = request.config.getoption("--every")
    run_state_machine_as_test(
        program,
        settings=settings(
            max_examples=350 if every else 20,
            stateful_step_count=30,
            deadline=None,
            derandomize=not every,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Most programs learn, and some go on as they end.
    assert sum(n >= 10 for n in program.learned) > len(program.learned) / 3
    assert program.taken[end] > len(program.learned) / 2
    if program is ScaleFree and end == "learning":
        assert program.taken["replaced"] > 0
        assert program.taken["outliers"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("program", [Program, ScaleFree])
def test_a_program_that_surely_has_it_all(program: Any, start: int) -> None:
    """Edits of every size, parameters that sit out and come back, a late group, and an lr that leaps."""
    state = program()
    state.begin(seed=3, usual=0, settles=1000, huge=False, start=start)

    def check(replaced: bool = False) -> None:
        state.it_is_as_by_hand()
        state.there_is_one_slot_and_it_is_as_by_hand()
        nonlocal count
        count += replaced and program is ScaleFree
        assert state.oracle.replaced == count

    # While S may still be 0, one sits out, with its first update in the slot, and another is edited.
    count = 0
    state.step(["usual", "usual", "none"], 1, [], 0, False)
    state.edit(0, 1e-3, 1.0, False)
    state.step(["usual", "none", "usual"], 1, [], 0, False)
    check()
    for _ in range(5):  # steps that count, and after each of them one that does not
        state.step(["usual"] * 5, 2, [(math.nan, 0, 0)], 1, False)
    state.step(["usual"] * 5, 5, [], 0, False)
    check()
    for size in (1e-6, 1.0, 1e-6, 1.0):
        state.edit(1, 2.0, size, True)
        check(replaced=size == 1.0)
    # Nobody can tell where other parameters had a gradient in the step before.
    state.step(["usual", "none", "usual"], 3, [], 0, False)
    state.edit(0, 2.0, 1.0, False)
    state.step(["usual", "usual", "none"], 3, [], 0, False)
    state.edit(0, 2.0, 1.0, False)
    state.step(["usual"] * 5, 1, [], 0, False)
    check()
    state.add_group((4,))
    state.edit(3, 1.0, 1.0, False)  # before its first step
    state.step(["usual"] * 5, 1, [], 0, False)
    state.step(["usual", "usual", "usual", "none"], 2, [], 0, False)
    state.edit(3, 1.0, 1.0, False)  # and while it sits out
    state.step(["usual", "usual", "usual", "none"], 2, [], 0, False)
    state.step(["usual"] * 5, 2, [], 0, False)
    check()
    state.step(["usual"] * 5, 2, [(math.nan, 0, 0)], 0, False)
    check()
    # A step that does not count lies between the edit and the next one that does.
    state.edit(0, 2.0, 1.0, False)
    state.step(["usual"] * 5, 2, [(math.nan, 0, 0)], 0, False)
    check(replaced=True)
    for _ in range(5):
        state.change_lr(2.0)
    state.step(["usual"] * 5, 10, [], 0, False)
    check()
    assert state.oracle.skipped == 7
