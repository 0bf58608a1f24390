"""Memory stays flat: over many steps, over saving and loading, over Mechanics that come and go."""

from __future__ import annotations

import gc
import io
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manic import Mechanic

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="reads the size of the process from /proc")


def build(**options: Any) -> tuple[list[nn.Parameter], Mechanic]:
    parameters = [nn.Parameter(torch.ones(7, 5)) for _ in range(20)]
    base = torch.optim.AdamW(parameters, lr=0.1)
    mechanic = Mechanic(base, torch.optim.lr_scheduler.LambdaLR(base, lambda t: 1 / (1 + t / 1000)), **options)
    return parameters, mechanic


def step(parameters: list[nn.Parameter], mechanic: Mechanic) -> None:
    for p in parameters:
        p.grad = 0.1 * p.detach()
    mechanic.step()
    mechanic.zero_grad()


def size() -> tuple[int, int, int]:
    """Python objects, blocks of memory that Python holds, bytes of the process."""
    gc.collect()
    pages = int(STATM.read_text().split()[1])
    return len(gc.get_objects()), sys.getallocatedblocks(), os.sysconf("SC_PAGE_SIZE") * pages


def grown(action: Callable[[], None], count: int) -> str:
    """What has grown; nothing: ""."""
    objects, blocks, resident = size()
    for _ in range(count):
        action()
    now = size()
    if now[0] - objects >= count / 10:
        return "Python objects"
    if now[1] - blocks >= 1000 + count / 10:
        return "blocks of memory"
    return "bytes" if now[2] - resident >= 3 * 2**20 + 100 * count else ""  # the smallest tensor has some 200


def stays_flat(action: Callable[[], None], count: int) -> None:
    """What leaks grows every time; caches do at first, and a heap that other tests have left in pieces does once."""
    for _ in range(min(count, 500)):
        action()
    for _ in range(3):
        found = grown(action, count)
        if not found:
            return
    pytest.fail(found)


def steps(**options: Any) -> Callable[[], None]:
    run = build(**options)
    return lambda: step(*run)


def save_and_load() -> Callable[[], None]:
    run = build()
    step(*run)

    def action() -> None:
        step(*run)
        file = io.BytesIO()
        torch.save(run[1].state_dict(), file)
        file.seek(0)
        run[1].load_state_dict(torch.load(file, weights_only=True))

    return action


def come_and_go() -> None:
    run = build()
    for _ in range(3):
        step(*run)
    run[1].unwrap()


def refused() -> Callable[[], None]:
    parameters, mechanic = build()
    step(parameters, mechanic)
    state = mechanic.state_dict()
    state["param_groups"][0]["mechanic_state"].fill_(torch.nan)

    def action() -> None:
        with pytest.raises(ValueError, match="not finite"):
            mechanic.load_state_dict(state)

    return action


@pytest.mark.parametrize(
    "options",
    [{}, {"per_group": True, "log_every": 1, "log_func": id}, {"variant": "paper"}],
    ids=["default", "logged", "paper"],
)
@pytest.mark.parametrize("kind", ["eager", "native"])
def test_many_steps(
    options: dict[str, Any], kind: str, sweeps: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    """300 in the quick tests, 10,000 with --every."""
    sweeps(kind)
    stays_flat(steps(**options), 10_000 if request.config.getoption("--every") else 300)


@pytest.mark.parametrize("what", [save_and_load, lambda: come_and_go, refused], ids=["loaded", "unwrapped", "refused"])
def test_many_checkpoints_and_mechanics(what: Any, request: pytest.FixtureRequest) -> None:
    """60 in the quick tests, 1,000 with --every."""
    stays_flat(what(), 1_000 if request.config.getoption("--every") else 60)


def grow(pages: mmap.mmap) -> None:
    """Not by malloc, which may have room left that other tests have freed."""
    pages.resize(len(pages) + 2**21)
    pages[-(2**21) :] = b"1" * 2**21


@pytest.mark.parametrize(
    ("keep", "count", "seen"),
    [
        (lambda heap: heap.append([]), 3000, "Python objects"),
        (lambda heap: heap.append(bytes(64)), 3000, "blocks of memory"),  # which the garbage collector does not know
        (lambda heap: grow(heap[0]), 20, "bytes"),  # which Python does not know
    ],
    ids=["objects", "blocks", "native memory"],
)
def test_what_is_kept_is_seen(keep: Callable[[list[Any]], Any], count: int, seen: str) -> None:
    heap: list[Any] = [mmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)]
    with pytest.raises(pytest.fail.Exception, match=f"^{seen}"):
        stays_flat(lambda: keep(heap), count)
