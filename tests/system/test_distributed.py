"""Sharded runs and their checkpoints. The jobs of all tests run first, in a few processes; each test judges its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ranks
import torch

from manic.tuner import TunerState

pytestmark = pytest.mark.distributed


class Job(NamedTuple):
    """A scenario of ranks.py, on that many processes."""

    world: int
    scenario: str
    arguments: tuple[str, ...]


# kind, processes, collectives per step, and the step at which one rank alone sees a NaN (not where it is a replica)
SPREAD = [("fsdp", 2, 1, 5), ("mixed", 2, 1, 5), ("hsdp", 4, 1, -1), ("ddp", 2, 0, -1), ("fsdp1", 2, 1, 5)]

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
FORMS = [("adamw", "float32"), ("sgd", "float32"), ("adagrad", "float32"), ("adamw", "bfloat16"), ("adamw", "float16")]
FORMS += [("chain", "float32")]
MODES = ["nested", "flat", "stateful"]
DCP = [(*route, "adamw", "float32", mode) for route in ROUTES for mode in MODES]
DCP += [(("fsdp", 2), ("fsdp", 2), *form, mode) for form in FORMS[1:] for mode in MODES]
# FSDP1 leaves no mark on its parameters: only torch's own functions can put them together.
DCP += [((kind, 2), (kind, 2), *FORMS[0], mode) for kind in ("fsdp1", "fsdp1-flat") for mode in MODES[:2]]
WHOLE = [("fsdp", "fsdp", dtype) for dtype in ("float32", "bfloat16", "float16")]
WHOLE += [("fsdp", "fsdp1", "float32"), ("fsdp1", "fsdp", "float32")]
WHOLE += [(source, target, "bfloat16") for source in ("plain", "ddp", "fsdp") for target in ("ddp", "fsdp")][:-1]
SETTLED = [(("fsdp", 2), ("fsdp", 2)), (("fsdp", 2), ("plain", 1)), (("plain", 1), ("fsdp", 4))]
HOW = ["native", "eager", "paper"]
REHEARSED = [("plain", 1, "bfloat16"), ("plain", 1, "float32"), ("fsdp", 2, "float32")]


def run(kind: str, world: int, how: str, broken_at: int) -> Job:
    return Job(world, "run", (kind, how, str(broken_at)))


def rehearsal(kind: str, world: int, dtype: str, base: str) -> Job:
    return Job(world, "rehearsal", (kind, base, dtype))


def saved(source: tuple[str, int], base: str, dtype: str, route: str) -> Job:
    kind, world = source
    return Job(world, "save", (kind, base, dtype, route, f"{kind}-{world}-{base}-{dtype}-{route}"))


def loaded(source: tuple[str, int], target: tuple[str, int], base: str, dtype: str, route: str) -> Job:
    return Job(target[1], "load", (target[0], base, dtype, route, saved(source, base, dtype, route).arguments[-1]))


def pipeline(world: int) -> Job:
    return Job(world, "pipeline", ("20", f"pipeline-{world}"))


def settle(source: tuple[str, int], how: str) -> Job:
    return Job(source[1], "settle", (source[0], how, f"{source[0]}-{source[1]}-{how}"))


def settled(source: tuple[str, int], target: tuple[str, int], how: str) -> Job:
    return Job(target[1], "settled", (target[0], how, settle(source, how).arguments[-1]))


def whole(source: str, target: str, dtype: str) -> Job:
    return Job(2, "whole_states", (source, target, dtype))


REFUSED = Job(2, "refused", ("refused",))
STAGES = [
    [
        *(run("plain", 1, how, broken) for how in HOW for broken in (-1, 5)),
        *(run(kind, world, how, broken) for kind, world, _, broken in SPREAD for how in HOW),
        *(rehearsal(*case, base) for case in REHEARSED for base in ("sgd", "adamw", "adagrad")),
        *(saved(source, base, dtype, mode) for source, _, base, dtype, mode in DCP),
        *(settle(source, how) for source, _ in SETTLED for how in ("frozen", "unwrapped")),
        *(whole(*case) for case in WHOLE),
        *(pipeline(world) for world in (1, 2)),
        REFUSED,
    ],
    [
        *(loaded(*case) for case in DCP),
        *(settled(*case, how) for case in SETTLED for how in ("frozen", "unwrapped")),
    ],  # in other processes than those that saved
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], list[dict[str, Any]]]:
    """result(job): what every rank returned."""
    root = tmp_path_factory.mktemp("ranks")
    places: dict[Job, Path] = {}
    for stage, jobs in enumerate(STAGES):
        for world in (1, 2, 4):
            folder = root / f"{stage}-{world}"
            folder.mkdir()
            mine = [job for job in dict.fromkeys(jobs) if job.world == world]
            places.update({job: folder / str(number) for number, job in enumerate(mine)})
            (folder / "jobs.json").write_text(
                json.dumps([[number, job.scenario, *job.arguments] for number, job in enumerate(mine)])
            )
            launch(world, folder, root)

    def of(job: Job) -> list[dict[str, Any]]:
        files = [places[job].with_name(f"{places[job].name}-{rank}.pt") for rank in range(job.world)]
        if not all(file.exists() for file in files):
            logs = [places[job].with_name(f"log-{rank}").read_text()[-1500:] for rank in range(job.world)]
            pytest.fail("\n\n".join([f"{job}, or one before it, failed", *logs]))
        return [torch.load(file, weights_only=True) for file in files]

    return of


def launch(world: int, folder: Path, cwd: Path) -> None:
    """All ranks, until they end, or one of them fails, or nothing can be expected of them any more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ranks.__file__]
    rest = [str(world), str(folder)]
    workers = []
    for rank in range(world):
        with (folder / f"log-{rank}").open("w") as log:
            words = [*command, str(rank), *rest]
            workers.append(subprocess.Popen(words, env=environment, cwd=cwd, stdout=log, stderr=log))
    deadline = time.monotonic() + 400
    try:
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            if any(worker.poll() for worker in workers):
                time.sleep(5)
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()


def gap(one: dict[str, Any], two: dict[str, Any]) -> float:
    assert one.keys() == two.keys()
    return max((one[key].double() - two[key].double()).abs().max().item() for key in one)


def identical(one: dict[str, Any], two: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, torch.Tensor):
            return bool(a == b)
        bits = torch.int16 if a.dtype == torch.bfloat16 else a.dtype  # a rest may look like NaN
        return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))

    return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)


KEPT = {
    "float32": {"mechanic_ref": torch.float32},
    "bfloat16": {"mechanic_ref": torch.float32, "mechanic_rest": torch.bfloat16},
    "float16": {"mechanic_ref": torch.float32, "mechanic_rest": torch.float32},
}


def kept_dtypes(state: dict[str, Any]) -> dict[str, torch.dtype]:
    """What is kept of ours for one parameter. (A rest of int16 is seen as bfloat16, since no backend sends int16.)"""
    start = "first.weight."
    return {k.removeprefix(start): v.dtype for k, v in state.items() if k.startswith(f"{start}mechanic_")}


SCALE, SKIPPED = (TunerState._fields.index(name) - len(TunerState._fields) for name in ("scale", "skipped"))


@pytest.mark.parametrize(("kind", "world", "collectives", "broken_at"), SPREAD, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_a_sharded_run_is_the_run_of_one_process(
    result: Any, kind: str, world: int, collectives: int, broken_at: int, how: str
) -> None:
    """Global sums with uneven and empty shards, unused parameters, and a NaN that one rank alone sees."""
    (alone,) = result(run("plain", 1, how, broken_at))
    results = result(run(kind, world, how, broken_at))
    assert alone["tuner"][SCALE] > 1e-3, "the scale never started"
    for one in results:
        assert len(one["collectives"]) == collectives, "one all-reduce per step"
        assert gap(one["parameters"], alone["parameters"]) < 1e-5
        ours, theirs = (each["tuner"][:-2] for each in (one, results[0]))  # the last two are a rank's own shares
        assert torch.equal(ours, theirs), "the ranks drift apart"
        torch.testing.assert_close(one["tuner"][SCALE], alone["tuner"][SCALE], rtol=1e-5, atol=0.0)
        assert one["tuner"][SKIPPED] == (broken_at > 0)


def test_pipeline_stages_are_one_model(result: Any) -> None:
    """process_group=: real stages, a NaN that the last one alone sees, saved and resumed half-way."""
    (alone,), results = result(pipeline(1)), result(pipeline(2))
    assert alone["tuner"][SCALE] > 1e-3
    for one in results:
        assert len(one["collectives"]) == 1
        torch.testing.assert_close(one["tuner"][SCALE], alone["tuner"][SCALE], rtol=1e-5, atol=0.0)
        assert one["tuner"][SKIPPED] == alone["tuner"][SKIPPED] == 1
    parts = [p for one in results for p in one["parameters"]]
    assert gap(dict(enumerate(parts)), dict(enumerate(alone["parameters"]))) < 1e-5


@pytest.mark.parametrize("base", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize("case", REHEARSED, ids=str)
def test_a_checkpoint_before_the_first_step_corrupts_nothing(result: Any, case: Any, base: str) -> None:
    for one in result(rehearsal(*case, base)):
        assert identical(one["rehearsed"], one["parameters"])
        assert identical(one["loaded"], one["parameters"])


@pytest.mark.parametrize(("source", "target", "base", "dtype", "mode"), DCP, ids=str)
def test_dcp_from_one_topology_to_another(
    result: Any, source: Any, target: Any, base: str, dtype: str, mode: str
) -> None:
    before = result(saved(source, base, dtype, mode))[0]
    for after in result(loaded(source, target, base, dtype, mode)):
        assert identical(after["saved"], before["saved"]), "the state is not what was saved"
        assert kept_dtypes(after["saved"]) == KEPT[dtype]
        assert gap(after["parameters"], before["parameters"]) < 1e-6
        if source == target:
            assert identical(after["parameters"], before["parameters"])
            assert identical(after["state"], before["state"])


@pytest.mark.parametrize(("source", "target"), SETTLED, ids=str)
def test_a_frozen_or_unwrapped_run_goes_on_in_any_topology(result: Any, source: Any, target: Any) -> None:
    """The plain optimizer as the frozen Mechanic, and each of them from its checkpoint as the run that it is of."""
    kept = {how: result(settle(source, how))[0]["parameters"] for how in ("frozen", "unwrapped")}
    assert gap(kept["frozen"], kept["unwrapped"]) < 1e-6
    for how, parameters in kept.items():
        for after in result(settled(source, target, how)):
            assert gap(after["parameters"], parameters) < 1e-6
            if source == target:
                assert identical(after["parameters"], parameters)


@pytest.mark.parametrize(("source", "target", "dtype"), WHOLE, ids=str)
def test_full_state_dicts_offloaded_and_broadcast(result: Any, source: str, target: str, dtype: str) -> None:
    for one in result(whole(source, target, dtype)):
        assert identical(one["saved"], one["loaded"])
        assert kept_dtypes(one["loaded"]) == KEPT[dtype]
        assert gap(one["resumed"], one["parameters"]) < 1e-6
        if source == target:
            assert identical(one["resumed"], one["parameters"])


MESSAGES = {
    "other base": "the checkpoint is of a Mechanic around AdamW, this one is around Adam",
    "missing keys": "Missing key in checkpoint state_dict: optimizer.state.first.weight.",
    "groups": "mechanic.state.1.exp_avg",
    "cut": "CheckpointException",
    "cut, stateful": "CheckpointException",
    "torn": "CheckpointException",
    "no folder": "CheckpointException",
    "plain into sharded": "is cut over 1 processes in the checkpoint, the parameter over 2",
    "poisoned on one rank": "ValueError",
    "another topology": "the parameter is (7, 5)",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_does_not_fit_is_refused_on_every_rank(result: Any, case: str) -> None:
    """Before the first step, and in a run that is under way: an error here and there, and nothing has changed."""
    results = result(REFUSED)
    mine = [name for name in results[0] if name.startswith(f"{case} at")]
    assert mine
    for name in mine:
        for one in results:
            assert MESSAGES[case] in one[name]["message"]
            assert one[name]["intact"]
        if case == "poisoned on one rank":
            assert "on another rank" in results[0][name]["message"]
            assert "mechanic_ref of parameter 0 has values" in results[1][name]["message"]
