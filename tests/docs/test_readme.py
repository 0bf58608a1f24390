"""Every Python snippet of the README and of docs/ runs, in order, in one namespace per page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, snippets
from ranks import free_port

import manic


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun says to a process that is alone."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def page(path: Path) -> Any:
    """The one on checkpoints runs in the session `distributed`: torch broadcasts with NumPy; manic needs none."""
    return pytest.param(path, id=path.name, marks=pytest.mark.distributed if path.name == "checkpoints.md" else ())


# frameworks.md runs where the frameworks are: test_frameworks.py.
PAGES = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if path.name != "frameworks.md"]


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize("path", [page(path) for path in PAGES if snippets(path)])
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    batches = [torch.randn(8, 4) for _ in range(20)]
    namespace: dict[str, Any] = {
        "model": model,
        "steps": len(batches),
        "loader": batches,
        "loss_of": lambda batch: (model(batch) - batch.sum(1, keepdim=True)).square().mean(),
        "path": str(tmp_path / "checkpoint.pt"),
    }
    steps, learned = [], False
    for snippet in snippets(path):
        exec(compile(snippet, str(path), "exec"), namespace)
        mechanic = namespace.get("mechanic")
        if mechanic is not None and "unwrapped" not in repr(mechanic):
            steps.append(int(mechanic.param_groups[0]["mechanic_step"]))
            learned = learned or bool((mechanic.scale > 0).all())
    if path.name == "checkpoints.md":  # a Mechanic that is built anew and not loaded would start to count at 0
        assert steps == [20, 40, 40, 20, 20, 40, 60, 80, 100, 0, 40]
    assert learned, "no snippet trained"


def test_the_page_of_the_api_names_every_option() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = manic.Mechanic.__init__.__code__
    options = code.co_varnames[1 : 1 + code.co_argcount + code.co_kwonlyargcount - 1]
    assert "store_delta" in options
    for option in options:
        assert f"`{option}`" in page, option


def test_the_version_stands_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert manic.__version__ not in project
    assert f"## {manic.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
