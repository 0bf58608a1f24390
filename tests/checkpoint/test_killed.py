"""A process that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import killed
import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_killed_and_resumed_again_and_again(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """8 times in the quick tests, 200 with --every; half of the kills are aimed at moments in which it writes."""
    kills = 200 if request.config.getoption("--every") else 8
    command = [sys.executable, killed.__file__, str(kills), str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    counts = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=3000).stdout)
    for name, count in counts.items():
        record_property(name, count)
    assert counts["kills"] == kills
    assert counts["while_writing"] > 0
    assert counts["runs"] > 0
    assert not any(counts[name] for name in ("unreadable", "steps_lost", "different", "failed")), counts
