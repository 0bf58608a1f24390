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

from manic import Mechanic, sweeps
from manic.tuner import Tuner

BETAS, S_INIT, DECAY, MOMENTUM, GAMMA = (0.9, 0.999), 1e-2, 0.01, 0.9, 0.99
SHAPES = [(2, 3), (4,), ()]
KINDS = ["usual", "usual", "usual", "zero", "none", "huge"]
BAD = st.tuples(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 4), st.integers(0, 5))


class ByHand:
    """Algorithm 1 around SGD with momentum, parameter by parameter, in lists of floats."""

    def __init__(self) -> None:
        self.x: list[list[float]] = []
        self.delta: list[list[float]] = []
        self.buffer: list[list[float]] = []
        self.lr: list[float] = []
        n = len(BETAS)
        self.m, self.v, self.r, self.s = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
        self.skipped, self.learned, self.frozen = 0, 0, False
        self.span: list[float] = []  # of each parameter: the largest of what its x was added up from

    def add(self, values: list[float], lr: float) -> None:
        self.x.append(values)
        self.delta.append([0.0] * len(values))
        self.buffer.append([])
        self.lr.append(lr)
        self.span.append(0.0)
        self.edit(len(self.x) - 1, values)

    def edit(self, i: int, values: list[float]) -> None:
        self.x[i] = values
        self.span[i] = max(self.span[i], *map(abs, values))

    def step(self, gradients: list[list[float] | None]) -> None:
        scale = math.fsum(self.s)
        taking = [(i, g) for i, g in enumerate(gradients) if g is not None]
        if not all(map(math.isfinite, (value for _, g in taking for value in g))):
            self.skipped += 1
            return
        if not self.frozen:
            self.learned += any(value != 0 for _, g in taking for value in g)
            g_norm = math.sqrt(math.fsum(value**2 for _, g in taking for value in g))
            x_norm = math.sqrt(math.fsum(value**2 for i, _ in taking for value in self.x[i]))
            pull = DECAY * scale * g_norm / x_norm if x_norm else 0.0
            h = math.fsum(
                d * (gi + pull * xi) for i, g in taking for d, gi, xi in zip(self.delta[i], g, self.x[i], strict=True)
            )
            for i, beta in enumerate(BETAS):
                self.m[i] = max(beta * self.m[i], abs(h))
                self.v[i] = beta**2 * self.v[i] + h**2
                self.r[i] = max(0.0, beta * self.r[i] - self.s[i] * h)
                self.s[i] = (S_INIT / len(BETAS) * self.m[i] + self.r[i]) / (math.sqrt(self.v[i]) + 1e-8)
        total = math.fsum(self.s)
        for i, g in taking:
            ref = [xi - scale * d for xi, d in zip(self.x[i], self.delta[i], strict=True)]
            old = self.buffer[i]
            self.buffer[i] = [MOMENTUM * b + gi for b, gi in zip(old, g, strict=True)] if old else list(g)
            self.delta[i] = [d - self.lr[i] * b for d, b in zip(self.delta[i], self.buffer[i], strict=True)]
            self.x[i] = [r + total * d for r, d in zip(ref, self.delta[i], strict=True)]
            self.span[i] = max(self.span[i], *(abs(total * d) for d in self.delta[i]), *map(abs, [*ref, *self.x[i]]))
        self.lr = [GAMMA * lr for lr in self.lr]


class Program(RuleBasedStateMachine):
    """The live objects, and the same by hand."""

    variant = "paper"
    end = "learning"  # in which it surely ends; it may in the others
    learned: ClassVar[list[int]] = []  # in how many steps each program has learned
    taken: ClassVar[Counter[str]] = Counter()  # steps of all programs, by what they were taken with

    def __init__(self) -> None:
        super().__init__()
        self.oracle, self.unwrapped = ByHand(), False
        self.took_part: set[int] = set()  # in the last step, and not edited since

    @initialize(
        seed=st.integers(0, 1000),
        usual=st.sampled_from([10, 20, 30, 0]),
        settles=st.integers(10, 30),
        huge=st.sampled_from([False, False, True]),
    )
    def begin(self, seed: int, usual: int, settles: int, huge: bool) -> None:
        """`usual`: steps to begin with. `settles`: after how many learned steps it may freeze. `huge`: with gradients
        of 1e12, which leave few digits of what was before."""
        self.settles, self.huge = settles, huge
        self.random = torch.Generator().manual_seed(seed)
        self.parameters = [nn.Parameter(self.draw(shape)) for shape in SHAPES]
        for p in self.parameters:
            self.oracle.add(p.flatten().tolist(), 0.1)
        optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=MOMENTUM)
        self.wrap(optimizer)
        self.steps(usual, False)

    def teardown(self) -> None:
        self.learned.append(self.oracle.learned)

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
        self.optimizer: Any = Mechanic(
            optimizer, self.schedule, variant=self.variant, betas=BETAS, s_decay=DECAY, s_init=S_INIT
        )

    def tuner(self) -> Tuner:
        return Tuner.unpack(self.optimizer.param_groups[0]["mechanic_state"].clone(), len(BETAS))

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
        if all(g is None or bool(g.isfinite().all()) for g in gradients):
            self.took_part = {i for i, g in enumerate(gradients) if g is not None}

    @rule(which=st.integers(0, 4), by=st.floats(-2, 2))
    def edit(self, which: int, by: float) -> None:
        i = which % len(self.parameters)
        with torch.no_grad():
            self.parameters[i].add_(by)
        self.oracle.edit(i, self.parameters[i].flatten().tolist())
        self.took_part.discard(i)

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
        folded = math.fsum(self.oracle.s) if self.unwrapped and self.variant == "paper" else 1.0  # into lrs of before
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
        if not self.unwrapped:
            assert float(self.optimizer.skipped) == self.oracle.skipped
        if self.variant != "paper":
            return
        for p, wanted, span in zip(self.parameters, self.oracle.x, self.oracle.span, strict=True):
            gap = (p.detach().flatten() - torch.tensor(wanted, dtype=torch.float64)).abs().max()
            assert gap <= 1e-9 * span
        if not self.unwrapped:
            assert math.isclose(float(self.optimizer.scale), math.fsum(self.oracle.s), rel_tol=1e-7, abs_tol=1e-300)

    @invariant()
    def it_is_finite(self) -> None:
        assert all(bool(p.isfinite().all()) for p in self.parameters)
        for values in self.optimizer.state.values():
            assert all(bool(value.isfinite().all()) for value in values.values() if isinstance(value, Tensor))

    @invariant()
    def parameters_stand_at_ref_plus_scale_times_delta(self) -> None:
        if self.unwrapped or self.oracle.frozen:
            return
        scale = self.tuner().scale
        assert bool(scale.isfinite())
        for p in [self.parameters[i] for i in self.took_part]:
            ref, delta = (self.optimizer.state[p][f"mechanic_{name}"] for name in ("ref", "delta"))
            span = max(float(t.abs().max()) for t in (p.detach(), ref, scale * delta))
            assert (p.detach() - ref - scale * delta).abs().max() <= 1e-12 * span

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
    """The default variant. Its scale is taken as it is found, and x after each step worked out from it by hand."""

    variant = "scale_free"

    def take(self, gradients: list[Tensor | None], closure: bool) -> None:
        groups, states = self.optimizer.param_groups, self.optimizer.state
        lrs = [group["lr"] / (1.0 if self.unwrapped else 0.1) for group in groups for _ in group["params"]]
        before = copy.deepcopy([(p.detach(), states.get(p, {}).get("mechanic_delta")) for p in self.parameters])
        old = None if self.unwrapped else self.tuner()
        super().take(gradients, closure)
        new = None if self.unwrapped else self.tuner()
        for p, lr, (x, delta) in zip(self.parameters, lrs, before, strict=True):
            wanted, span = x, x.abs()
            if p.grad is not None and (new is None or new.skipped == old.skipped):
                u = -lr * states[p]["momentum_buffer"]
                here, there, keep = (1.0, 1.0, 1.0) if new is None else (old.scale, new.scale, new.keep)
                u = u if new is None or new.outliers == old.outliers else torch.zeros_like(u)
                delta = torch.zeros_like(x) if delta is None else delta
                terms = [x, -here * delta, there * keep * delta, there * u]
                wanted, span = sum(terms), torch.stack([*terms, there * x]).abs()
            assert (p.detach() - wanted).abs().max() <= 1e-11 * span.max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [Program, ScaleFree])
@pytest.mark.parametrize("end", ["learning", "frozen", "unwrapped"])
def test_random_programs(
    program: Any, end: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    answers: list[bool] = []
    as_left = sweeps._as_left

    def watched(*args: Any) -> bool:
        answers.append(as_left(*args))
        return answers[-1]

    monkeypatch.setattr(sweeps, "_as_left", watched)
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
    # Most programs learn, and some go on as they end; most steps find everything as the last one left it.
    assert sum(n >= 10 for n in program.learned) > len(program.learned) / 3
    assert program.taken[end] > len(program.learned) / 2
    assert answers.count(True) > program.taken["learning"] / 2
