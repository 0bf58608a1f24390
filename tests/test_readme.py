"""Every Python snippet of the README and of docs/ runs, in order, in one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import manic

ROOT = Path(__file__).parent.parent


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


PAGES = [str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is what the snippet is about
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), namespace)
    mechanics = [value for value in namespace.values() if isinstance(value, manic.Mechanic)]
    assert any(mechanic.scale > 0 for mechanic in mechanics), "no snippet trained"


def test_the_readme_names_every_option() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = manic.Mechanic.__init__.__code__
    options = code.co_varnames[1 : 1 + code.co_argcount + code.co_kwonlyargcount - 1]
    assert "store_delta" in options
    for option in options:
        assert f"`{option}`" in readme, option


def test_the_version_stands_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert manic.__version__ not in project
    assert f"## {manic.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
