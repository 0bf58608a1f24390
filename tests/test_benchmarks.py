"""The scripts behind the figures in the docs run, and the bounds that the docs name hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_bytes import measure


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_costs_no_more_than_the_wrappers_own_tensors(tmp_path: Path) -> None:
    numel = 600_000
    plain, tuned = (measure(numel, tuned, tmp_path / str(tuned)) for tuned in (False, True))
    more = {name: [(b - a) / numel for a, b in zip(plain[name], tuned[name], strict=True)] for name in plain}
    assert more.pop("state_dict()") == pytest.approx([0, 0], abs=0.01)
    assert more.pop("get_optimizer_state_dict, dcp.save") == pytest.approx([0, 0], abs=0.01)
    assert more.pop("load_state_dict()") == pytest.approx([8, 8], abs=0.05)  # x_ref and Δ, float32
    assert more.pop("dcp.load, set_optimizer_state_dict") == pytest.approx([8, 8], abs=0.05)
    assert not more
