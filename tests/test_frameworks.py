"""Training, the framework's own checkpoint, a new process, resume: bit for bit the uninterrupted run."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import frameworks
import pytest
import torch

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs the frameworks: nox -s frameworks"),
]

RUNS = [
    *(("lightning", variant) for variant in ("inside", "returned", "manual", "bf16", "clip", "accumulate")),
    ("trainer", "given"),
    ("trainer", "class"),
    ("accelerate", "inside"),
    ("accelerate", "prepared"),
]


@pytest.mark.parametrize(("framework", "variant"), RUNS)
def test_resume(framework: str, variant: str, tmp_path: Path) -> None:
    for what in ("whole", "save", "resume"):
        subprocess.run([sys.executable, frameworks.__file__, framework, variant, str(tmp_path), what], check=True)
    whole, save, resume = (
        torch.load(tmp_path / f"{what}.pt", weights_only=True) for what in ("whole", "save", "resume")
    )
    assert whole["scale"] > 0
    assert whole["steps"] == resume["steps"] == frameworks.STEPS
    if framework != "trainer":  # which saves on its way to the end
        assert save["steps"] == frameworks.STEPS // 2
        assert not torch.equal(whole["parameters"][0], save["parameters"][0])
    for key in ("scale", "effective_lr"):
        assert torch.equal(whole[key], resume[key])
    for one, two in zip(whole["parameters"], resume["parameters"], strict=True):
        assert torch.equal(one, two)
