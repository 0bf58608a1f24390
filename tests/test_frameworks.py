"""Training, the framework's own checkpoint, a new process, resume: bit for bit the uninterrupted run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import frameworks
import pytest
import torch
from conftest import free_port
from test_readme import snippets

from manic import Mechanic

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs the frameworks: nox -s frameworks"),
]

RUNS = [
    *(("lightning", 1, variant) for variant in frameworks.VARIANTS["lightning"]),
    *(("trainer", 1, variant) for variant in frameworks.VARIANTS["trainer"]),
    *(("accelerate", world, variant) for world in (1, 2) for variant in frameworks.VARIANTS["accelerate"]),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """result(framework, processes, variant, what, rank); the first call runs all variants of the framework."""
    folders: dict[tuple[str, int], Path] = {}

    def of(framework: str, world: int, variant: str, what: str, rank: int) -> dict[str, Any]:
        if (framework, world) not in folders:
            folders[framework, world] = tmp_path_factory.mktemp(f"{framework}-{world}")
            for phases in (("whole", "save"), ("resume",)):
                start(framework, world, folders[framework, world], phases)
        return torch.load(folders[framework, world] / variant / f"{what}-{rank}.pt", weights_only=True)

    return of


def start(framework: str, world: int, folder: Path, phases: tuple[str, ...]) -> None:
    port = free_port()
    workers = []
    for rank in range(world):
        names: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**os.environ, **({key: str(value) for key, value in names.items()} if world > 1 else {})}
        command = [sys.executable, frameworks.__file__, framework, str(folder), *phases]
        workers.append(subprocess.Popen(command, env=environment))
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize(("framework", "world", "variant"), RUNS)
def test_resume(result: Any, framework: str, world: int, variant: str) -> None:
    for rank in range(world):
        whole, save, resume = (result(framework, world, variant, what, rank) for what in ("whole", "save", "resume"))
        assert whole["scale"] > 0
        assert whole["steps"] == resume["steps"] == frameworks.STEPS
        if framework != "trainer":  # which saves on its way to the end
            assert save["steps"] == frameworks.STEPS // 2
            assert not torch.equal(whole["parameters"][0], save["parameters"][0])
        for key in ("scale", "effective_lr"):
            assert torch.equal(whole[key], resume[key])
        for one, two in zip(whole["parameters"], resume["parameters"], strict=True):
            assert torch.equal(one, two)


def test_processes_agree(result: Any) -> None:
    """Two processes, each on half of every batch, are one run; their ranks hold the same."""
    for variant in frameworks.VARIANTS["accelerate"]:
        first, second = (result("accelerate", 2, variant, "whole", rank) for rank in range(2))
        assert torch.equal(first["scale"], second["scale"])
        for one, two in zip(first["parameters"], second["parameters"], strict=True):
            assert torch.equal(one, two)
    alone = result("accelerate", 1, "inside", "whole", 0)
    both = result("accelerate", 2, "inside", "whole", 0)
    torch.testing.assert_close(both["scale"], alone["scale"], rtol=1e-4, atol=0.0)


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network, steps = frameworks.Net(), 20
    namespace: dict[str, Any] = {
        "network": network,
        "model": network.body,
        "dataset": frameworks.Data(),
        "loader": torch.utils.data.DataLoader(torch.randn(8 * steps, 4), batch_size=8),
        "loss_of": lambda batch: (network.body(batch) - batch.sum(1, keepdim=True)).square().mean(),
        "steps": steps,
        "path": str(tmp_path / "runs"),
    }
    page = Path(__file__).parents[1] / "docs" / "frameworks.md"
    trained = []
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), namespace)
        for owner in (namespace.get("trainer"), namespace.get("mechanic")):
            optimizer = getattr(owner, "optimizers", [None])[0] or getattr(owner, "optimizer", owner)
            trained.append(getattr(optimizer, "optimizer", optimizer))
    mechanics = {id(each): each for each in trained if isinstance(each, Mechanic)}.values()
    assert [int(each.param_groups[0]["mechanic_step"]) for each in mechanics] == [steps] * 4
    assert all(each.scale > 0 for each in mechanics)
