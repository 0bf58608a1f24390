"""Random programs over a live Mechanic: whatever a training script may do, in any order, against float64 by hand."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from resuming import same
from torch import Tensor, nn

from manic import Mechanic
from manic.tuner import Tuner

BETAS, S_INIT, DECAY, MOMENTUM, GAMMA = (0.9, 0.999), 1e-2, 0.01, 0.9, 0.99
SHAPES = [(2, 3), (4,), ()]
KINDS = ["usual", "usual", "usual", "zero", "none", "huge", "nan", "inf"]


class ByHand:
    """Algorithm 1 around SGD with momentum, parameter by parameter, in lists of floats."""

    def __init__(self) -> None:
        self.x: list[list[float]] = []
        self.delta: list[list[float]] = []
        self.buffer: list[list[float]] = []
        self.lr: list[float] = []
        n = len(BETAS)
        self.m, self.v, self.r, self.s = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
        self.skipped, self.frozen, self.span = 0, False, 1.0

    def add(self, values: list[float], lr: float) -> None:
        self.x.append(values)
        self.delta.append([0.0] * len(values))
        self.buffer.append([])
        self.lr.append(lr)

    def step(self, gradients: list[list[float] | None]) -> None:
        scale = math.fsum(self.s)
        taking = [(i, g) for i, g in enumerate(gradients) if g is not None]
        if not all(map(math.isfinite, (value for _, g in taking for value in g))):
            self.skipped += 1
            return
        if not self.frozen:
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
            self.span = max([self.span, *(abs(total * d) for d in self.delta[i]), *map(abs, self.x[i])])
        self.lr = [GAMMA * lr for lr in self.lr]


class Program(RuleBasedStateMachine):
    """The live objects, and the same by hand ("paper"); "scale_free" is held to the invariants alone."""

    variant = "paper"

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.parameters = [nn.Parameter(self.draw(shape)) for shape in SHAPES]
        self.oracle = ByHand()
        for p in self.parameters:
            self.oracle.add(p.flatten().tolist(), 0.1)
        optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=MOMENTUM)
        self.wrap(optimizer)
        self.unwrapped = False
        self.took_part: set[int] = set()  # in the last step, and not edited since

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
        self.optimizer: Any = Mechanic(
            optimizer, self.schedule, variant=self.variant, betas=BETAS, s_decay=DECAY, s_init=S_INIT
        )

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    # ------------------------------------------------------------------ what a script may do

    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=5, max_size=5), closure=st.booleans())
    def step(self, kinds: list[str], closure: bool) -> None:
        settled = self.unwrapped or self.oracle.frozen
        fill = {"zero": 0.0, "nan": math.nan, "inf": -math.inf}
        gradients: list[Tensor | None] = []
        for p, kind in zip(self.parameters, [*kinds, *["usual"] * len(self.parameters)], strict=False):
            if settled and kind in ("nan", "inf"):
                kind = "usual"  # the base's own concern
            g = self.draw(tuple(p.shape)) * (1e12 if kind == "huge" else 1.0)
            if kind in fill and g.numel():
                g.view(-1)[-1 if kind != "zero" else slice(None)] = fill[kind]
            gradients.append(None if kind == "none" or not p.requires_grad else g)

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
        self.oracle.x[i] = self.parameters[i].flatten().tolist()
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

    @rule()
    def save_and_load(self) -> None:
        """Into new objects, that have other values."""
        file = io.BytesIO()
        torch.save(
            [[p.detach() for p in self.parameters], self.optimizer.state_dict(), self.schedule.state_dict()], file
        )
        file.seek(0)
        values, state, schedule = torch.load(file, weights_only=True)
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

    @precondition(lambda self: not self.unwrapped and float(self.optimizer.scale) > 0)
    @rule()
    def freeze(self) -> None:
        self.optimizer.freeze()
        self.oracle.frozen = True

    @precondition(lambda self: not self.unwrapped and float(self.optimizer.scale) > 0)
    @rule()
    def unwrap(self) -> None:
        self.optimizer = self.optimizer.unwrap()
        self.oracle.frozen = self.unwrapped = True

    # ------------------------------------------------------------------ what holds after each of them

    @invariant()
    def it_is_as_by_hand(self) -> None:
        if self.variant != "paper":
            return
        for p, wanted in zip(self.parameters, self.oracle.x, strict=True):
            gap = (p.detach().flatten() - torch.tensor(wanted, dtype=torch.float64)).abs().max()
            assert gap <= 1e-9 * self.oracle.span
        if not self.unwrapped:
            assert math.isclose(float(self.optimizer.scale), math.fsum(self.oracle.s), rel_tol=1e-7, abs_tol=1e-300)
            assert float(self.optimizer.skipped) == self.oracle.skipped

    @invariant()
    def it_is_finite(self) -> None:
        assert all(bool(p.isfinite().all()) for p in self.parameters)
        for values in self.optimizer.state.values():
            assert all(bool(value.isfinite().all()) for value in values.values() if isinstance(value, Tensor))

    @invariant()
    def parameters_stand_at_ref_plus_scale_times_delta(self) -> None:
        if self.unwrapped or self.oracle.frozen:
            return
        scale = Tuner.unpack(self.optimizer.param_groups[0]["mechanic_state"], len(BETAS)).scale
        assert bool(scale.isfinite())
        for p in [self.parameters[i] for i in self.took_part]:
            ref, delta = (self.optimizer.state[p][f"mechanic_{name}"] for name in ("ref", "delta"))
            span = max(float(t.abs().max()) for t in (p.detach(), ref, scale * delta))
            assert (p.detach() - ref - scale * delta).abs().max() <= 1e-12 * span

    @invariant()
    def the_state_dict_round_trips(self) -> None:
        state = self.optimizer.state_dict()
        before = copy.deepcopy(state)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        assert same(self.optimizer.state_dict(), before)


class ScaleFree(Program):
    """The default variant."""

    variant = "scale_free"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [Program, ScaleFree])
def test_random_programs(program: Any, request: pytest.FixtureRequest) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    every = request.config.getoption("--every")
    run_state_machine_as_test(
        program,
        settings=settings(
            max_examples=1000 if every else 40,
            stateful_step_count=30,
            deadline=None,
            derandomize=not every,
            suppress_health_check=list(HealthCheck),
        ),
    )
