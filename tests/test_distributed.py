"""Sharded runs and their checkpoints: each scenario of ranks.py in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

pytestmark = pytest.mark.distributed
Ranks = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def launch(tmp_path: Path) -> Ranks:
    """launch(scenario, world, *arguments): what every rank wrote."""
    count = iter(range(100))

    def start(scenario: str, world: int, *arguments: object) -> list[dict[str, Any]]:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        command = [sys.executable, ranks.__file__, scenario]
        rest = [str(world), str(folder), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen([*command, str(rank), *rest], env=environment) for rank in range(world)]
        try:
            codes = [worker.wait(timeout=180) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert codes == [0] * world
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return start


def gap(one: dict[str, Any], two: dict[str, Any]) -> float:
    assert one.keys() == two.keys()
    return max((one[key].double() - two[key].double()).abs().max().item() for key in one)


def identical(one: dict[str, Any], two: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)


SPREAD = [("fsdp", 2, 1), ("mixed", 2, 1), ("hsdp", 4, 1), ("ddp", 2, 0)]


@pytest.mark.parametrize(("kind", "world", "collectives"), SPREAD, ids=str)
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_sharded_run_is_the_run_of_one_process(
    launch: Ranks, kind: str, world: int, collectives: int, store_delta: bool
) -> None:
    """Global sums with uneven and empty shards, unused parameters, and a NaN that one rank alone sees."""
    broken_at = -1 if kind in ("ddp", "hsdp") else 5  # replicas have the same gradients, or are broken themselves
    (alone,) = launch("run", 1, "plain", store_delta, broken_at)
    results = launch("run", world, kind, store_delta, broken_at)
    tuner = alone["state"]["tuner"]
    assert tuner[24 + 1] > 1e-3, "the scale never started"
    for result in results:
        assert len(result["collectives"]) == collectives, "one all-reduce per step"
        assert gap(result["parameters"], alone["parameters"]) < 1e-5
        ours, theirs = (each["state"]["tuner"][:-1] for each in (result, results[0]))  # the last is a rank's own share
        assert torch.equal(ours, theirs), "the ranks drift apart"
        torch.testing.assert_close(result["state"]["tuner"][25], tuner[25], rtol=1e-5, atol=0.0)
        assert result["state"]["tuner"][30] == (broken_at > 0), "skipped steps"


@pytest.mark.parametrize("base", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize(("kind", "world"), [("plain", 1), ("fsdp", 2)])
def test_a_checkpoint_before_the_first_step_corrupts_nothing(launch: Ranks, kind: str, world: int, base: str) -> None:
    for dtype in ("float32", "bfloat16") if kind == "plain" else ("float32",):
        for result in launch("rehearsal", world, kind, base, dtype):
            assert identical(result["rehearsed"], result["parameters"])
            assert identical(result["loaded"], result["parameters"])


ROUTES = [
    (("fsdp", 2), ("fsdp", 2)),
    (("plain", 1), ("fsdp", 2)),
    (("fsdp", 2), ("plain", 1)),
    (("fsdp", 2), ("fsdp", 4)),
    (("fsdp", 4), ("fsdp", 2)),
    (("hsdp", 4), ("fsdp", 2)),
    (("ddp", 2), ("fsdp", 2)),
    (("fsdp", 2), ("ddp", 2)),
    (("mixed", 2), ("plain", 1)),
    (("mixed", 2), ("mixed", 2)),
    (("hsdp", 4), ("hsdp", 4)),
]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("source", "target"), ROUTES, ids=str)
def test_dcp_from_one_topology_to_another(launch: Ranks, tmp_path: Path, source: Any, target: Any, flat: bool) -> None:
    bases = ("sgd", "adagrad", "adamw") if source == target == ("fsdp", 2) else ("adamw",)
    for base in bases:
        before = launch("save", source[1], source[0], base, flat, tmp_path / f"dcp-{base}")
        after = launch("load", target[1], target[0], base, flat, tmp_path / f"dcp-{base}")
        for result in after:
            assert identical(result["saved"], before[0]["saved"]), "the state is not what was saved"
            assert gap(result["parameters"], before[0]["parameters"]) < 1e-6
            if source == target:
                assert identical(result["parameters"], before[0]["parameters"])
                assert identical(result["state"], before[0]["state"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_state_dicts_offloaded_and_broadcast(launch: Ranks, dtype: str) -> None:
    for result in launch("whole_states", 2, "fsdp", dtype):
        assert identical(result["saved"], result["loaded"])
        assert result["loaded"]["first.weight.mechanic_ref"].dtype == torch.float32
        assert identical(result["resumed"], result["parameters"])
