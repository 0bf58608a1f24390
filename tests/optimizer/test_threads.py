"""A Mechanic beside other threads and processes: what it gives is right, or it waits for the end of the step."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from resuming import same
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset
from training import Problem, flat, pulled

from manic import Mechanic

PATIENCE = 60.0  # seconds until a thread counts as stuck


def paused(base: torch.optim.Optimizer) -> tuple[threading.Event, threading.Event]:
    """The next step of `base` sets the first event when it has moved the parameters, and waits for the second."""
    inside, on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        handle.remove()
        inside.set()
        assert on.wait(PATIENCE)

    handle = base.register_step_post_hook(wait)
    return inside, on


ASK: dict[str, Callable[[Mechanic], Any]] = {
    "state_dict": lambda m: copy.deepcopy(m.state_dict()),
    "metrics": lambda m: m.metrics(),
    "effective_lr": lambda m: m.effective_lr(),
    "copy": lambda m: copy.deepcopy(m).state_dict(),
    "freeze": lambda m: (m.freeze(), m.state_dict())[1],
}


@pytest.mark.parametrize("ask", ASK)
def test_another_thread_waits_for_the_end_of_a_step(ask: str, problem: Problem) -> None:
    """In the middle of it, it would see x + u and the lr that the base works at."""
    (parameters, m), (others, twin) = runs = [(ps := problem.parameters(), Mechanic(AdamW(ps, lr=1e-3))) for _ in "12"]
    for run in runs:
        problem.train(*run, 20)
    inside, on = paused(m.base_optimizer)
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(problem.train, parameters, m, range(20, 21))
        assert inside.wait(PATIENCE)
        asked = pool.submit(ASK[ask], m)
        try:
            with pytest.raises(TimeoutError):
                asked.result(timeout=0.2)
        finally:
            on.set()
        training.result(PATIENCE)
        got = asked.result(PATIENCE)
    problem.train(others, twin, range(20, 21))
    assert torch.equal(flat(parameters), flat(others))
    assert same(got, ASK[ask](twin))


def test_a_load_in_another_thread_waits_for_the_end_of_a_step(problem: Problem) -> None:
    parameters = problem.parameters()
    m = Mechanic(AdamW(parameters, lr=1e-3))
    problem.train(parameters, m, 20)
    saved = copy.deepcopy(m.state_dict())
    inside, on = paused(m.base_optimizer)
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(problem.train, parameters, m, range(20, 21))
        assert inside.wait(PATIENCE)
        loading = pool.submit(m.load_state_dict, saved)
        on.set()
        training.result(PATIENCE)
        loading.result(PATIENCE)
    assert same(m.state_dict(), saved)


def test_who_watches_a_training_from_another_thread_changes_nothing(problem: Problem) -> None:
    ends = []
    for watched in (False, True):
        parameters = problem.parameters()
        m = Mechanic(AdamW(parameters, lr=1e-3))
        stop, seen = threading.Event(), []

        def watch(m: Mechanic = m, stop: threading.Event = stop, seen: list[Any] = seen) -> None:
            while not stop.is_set():
                seen.append(m.metrics())
                copy.deepcopy(m.state_dict())

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch) if watched else None
            problem.train(parameters, m, 300)
            stop.set()
            if watching is not None:
                watching.result(PATIENCE)
                assert len(seen) > 1
                assert all(one["effective_lr"] == 1e-3 * one["scale"] for one in seen)
        ends.append((flat(parameters).detach(), m.state_dict()))
    assert same(*ends)


def test_two_mechanics_in_two_threads(problem: Problem) -> None:
    """They share nothing: each ends where it ends alone."""

    def train(lr: float) -> Any:
        parameters = problem.parameters()
        m = Mechanic(AdamW(parameters, lr=lr))
        problem.train(parameters, m, 300)
        return [flat(parameters).detach(), m.state_dict()]

    lrs = (1e-3, 0.5)
    alone = [train(lr) for lr in lrs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, lrs))
    assert same(alone, together)


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((4,), float(i)).sin()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_loader_with_workers_that_start_between_steps(start: str) -> None:
    """New workers in every epoch: those that fork do it in a process that has stepped."""
    ends = []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        m = Mechanic(AdamW(model.parameters(), lr=1e-3))
        loader = DataLoader(
            Rows(), batch_size=8, num_workers=workers, multiprocessing_context=start if workers else None
        )
        for _ in range(3):
            for x in loader:
                m.zero_grad()
                (model(x) - x.flip(1)).square().mean().backward()
                m.step()
        ends.append([*(p.detach() for p in model.parameters()), m.scale])
    assert same(*ends)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_by_itself() -> None:
    """Its steps are those of the parent, and the parent notices nothing of them."""
    p = nn.Parameter(torch.ones(5))
    m = Mechanic(SGD([p], lr=0.1))
    pulled(p, m, 10)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        pulled(p, m, 10)
        os.write(writer, p.detach().numpy().tobytes())
        os._exit(0)
    os.close(writer)
    before = p.detach().clone()
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(p, before)
    pulled(p, m, 10)
    assert theirs == p.detach().numpy().tobytes()
