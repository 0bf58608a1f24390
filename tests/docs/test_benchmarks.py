"""The scripts behind the figures in the docs run, and the bounds that the docs name hold."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contenders
import memory
import pytest
import quality
import sums
import torch
from checkpoint_bytes import measure


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_costs_no_more_than_the_wrappers_own_tensors(tmp_path: Path) -> None:
    numel = 600_000
    plain, tuned = (measure(numel, tuned, tmp_path / str(tuned)) for tuned in (False, True))
    more = {name: [(b - a) / numel for a, b in zip(plain[name], tuned[name], strict=True)] for name in plain}
    assert more.pop("state_dict()") == pytest.approx([0, 0], abs=0.01)
    assert more.pop("get_optimizer_state_dict, dcp.save") == pytest.approx([0, 0], abs=0.01)
    assert more.pop("load_state_dict()") == pytest.approx([4, 4], abs=0.05)  # x_ref, float32
    assert more.pop("dcp.load, set_optimizer_state_dict") == pytest.approx([4, 4], abs=0.05)
    assert not more


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tensors", [4, 400], ids=["large", "small"])
@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32, 4), (torch.bfloat16, 6), (torch.float16, 8)], ids=["f32", "bf16", "f16"]
)
@pytest.mark.parametrize("name", ["manic", "manic, eager"])
def test_one_float32_value_per_parameter_and_the_digits_that_it_cannot_hold(
    name: str, dtype: torch.dtype, kept: int, tensors: int
) -> None:
    """In the state; beside it x_t, which stays in memory on the CPU. And next to nothing in a step."""
    numel = 2_000_000
    ((_, build, _),) = contenders.installed([name])
    plain_state, plain, _ = memory.measure(contenders.adamw, numel, tensors, dtype)
    state, persistent, transient = memory.measure(build, numel, tensors, dtype)
    assert state - plain_state == kept * numel
    assert (persistent - plain) / numel == pytest.approx(kept + dtype.itemsize, abs=0.05)
    assert transient < 0.1 * numel + 2**20


def test_frozen_it_holds_nothing() -> None:
    numel = 2_000_000
    ((_, build, _),) = contenders.installed(["manic, frozen"])
    plain_state, plain, _ = memory.measure(contenders.adamw, numel, 40, torch.float32)
    state, persistent, transient = memory.measure(build, numel, 40, torch.float32)
    assert state == plain_state
    assert persistent - plain < 2**10
    assert transient < 2**10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_keep_their_digits(dtype: torch.dtype) -> None:
    """A million elements add up as exactly as this processor's torch.dot does 64 Ki of them."""
    errors = sums.errors(10**6, dtype)
    assert errors["manic, eager"] <= errors["torch.dot, 64 Ki"]
    assert errors["manic"] < 3e-6  # whose order of adding up is our own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_pieces_sums_lose_their_digits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a dot adds up one element after the other, in float32, which is the same on every processor."""
    numpy = pytest.importorskip("numpy")
    monkeypatch.setattr(torch, "dot", lambda a, b: torch.from_numpy(numpy.add.accumulate((a * b).numpy()))[-1])
    errors = sums.errors(10**6, dtype)
    assert errors["manic, eager"] <= errors["torch.dot, 64 Ki"]
    assert errors["manic, eager"] < errors["one torch.dot"] / 2


def test_the_report_is_made_of_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import report

    figures = {"ratio": 2.0, "low": 1.9, "high": 2.1, "plain_ms": 3.0}
    names = ("control", *report.BARS)
    results = [{"case": case, "threads": 1, "contender": name, **figures} for case in ("a", "b") for name in names]
    results[0]["floor"] = results[len(names)]["floor"] = 1.5
    text = report.step_time(results)
    assert "| floor, 1 thread(s) | 1.5 | 1.5 |" in text
    assert text.count("| 2.00 | 2.00 |") == len(names)
    report.chart(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


# ---------------------------------------------------------------------- quality


def row(contender: str, lr: float, seed: int, final: float, initial: float = 5.0, curve: str = "") -> dict[str, Any]:
    run = quality.Run("logreg", "SGD", "constant", contender, lr, seed, 10)
    return {**asdict(run), "initial": initial, "final": final, "curve": curve}


def test_excess_goes_by_seed_and_by_the_lr_that_other_seeds_have_chosen(tmp_path: Path) -> None:
    choice = {0.1: (2.0, 2.0, 2.0), 1.0: (1.0, 1.5, 1.2), 10.0: (0.1, math.inf, 9.0)}  # the last is worse than nothing
    rows = [row("tuned", lr, seed, final) for lr, found in choice.items() for seed, final in enumerate(found)]
    (best,) = quality.winners(rows).values()
    assert best.lr == 1.0
    rows += [row("tuned", 1.0, 3, 1.0), row("tuned", 1.0, 4, 2.0), row("tuned", 10.0, 3, 0.1)]
    rows += [row("manic", 1e-8, 4, 2.6), row("manic", 1e-8, 3, 1.4), row("manic", 100.0, 3, math.inf)]
    found = quality.excess(rows)
    ((few,), (broken,)) = found["manic", 1e-8].values(), found["manic", 100.0].values()
    assert few == pytest.approx([0.1, 0.2])
    assert broken == [1.0]
    assert quality.spread(found, "manic") == pytest.approx(0.9)
    assert "| manic | 1e-08 | 1 | 0.150, 0.150 |  | 0 |" in quality.table(found)


def test_a_cell_tries_every_second_lr_then_the_neighbours_of_the_best() -> None:
    (cell,) = quality.cells(["GPT long"], ["AdamW"], quick=False)
    every_second = quality.grid("AdamW")[::2]
    tried: list[dict[str, Any]] = []
    lrs = []
    for _ in range(4):
        for run in quality.search([cell], tried, quick=False):
            if run not in [quality.of(row) for row in tried]:
                lrs += [run.lr] if run.seed == 0 else []
                tried.append({**asdict(run), "initial": 5.0, "final": abs(math.log(run.lr / 1.1e-2)), "curve": ""})
    assert lrs == [*every_second, 1e-2, 1e-1]
    (long,) = quality.cells(["GPT 10000"], ["AdamW"], quick=False)[:1]
    assert [run.lr for run in quality.search([long], [], quick=False)] == every_second[1:4]


def test_a_run_arrives_when_its_training_loss_is_that_of_the_tuned_run_at_its_end() -> None:
    rows = [row("tuned", 0.1, seed, 2.0, curve="9 5 3") for seed in range(4)]
    rows += [row("manic", quality.USUAL, 3, 2.0, curve="9 3 1"), row("manic", 1.0, 3, 2.0, curve="9 4 4")]
    found = quality.arrivals(rows)
    assert [*found["manic", quality.USUAL].values()] == [[2 / quality.WINDOWS]]
    assert [*found["manic", 1.0].values()] == [[math.inf]]
    assert "| short | manic | 1 | 0.000, 0.000 |  | 0.10, 0.10 |" in quality.by_family(quality.excess(rows), found)


def test_what_is_wrong_with_a_quick_run() -> None:
    """A cell above its bound, a mean above the bound of all, a base lr that matters, and a cell that was not scored."""
    cells = {(*cell, "10"): [0.03] for cell in quality.QUICK}
    worst = ("logreg, batch 1", "SGD", "constant", "10")
    found = {("manic", 1e-8): {worst: [0.03]}, ("manic", quality.USUAL): cells}
    assert list(quality.quick_check(found)) == []
    bad = {**cells, worst: [0.2501]}
    (fault,) = quality.quick_check({**found, ("manic", 1e-8): {worst: [0.2501]}, ("manic", quality.USUAL): bad})
    assert fault == "manic: e 0.250 on logreg, batch 1, SGD, constant (at most 0.1)"
    *above, mean, spread = quality.quick_check({**found, ("manic", quality.USUAL): {key: [0.09] for key in cells}})
    assert len(above) == sum(bound < 0.09 for bound in quality.QUICK.values())
    assert mean == "manic: mean e 0.090 (at most 0.05)"
    assert spread == "manic: the base lr changes e by 0.060 (at most 0.02)"
    (fault,) = quality.quick_check({("manic", quality.USUAL): {worst: [0.0]}})
    assert fault == f"1 cells were scored, not the {len(quality.QUICK)} of QUICK"
    assert "| noise | dev | logreg, batch 1 | SGD, constant | 0.030, 0.030 |" in quality.by_cell(found)


def test_a_csv_that_was_cut_is_read_up_to_there(tmp_path: Path) -> None:
    path, rows = tmp_path / "runs.csv", [row("tuned", 0.1, seed, 2.0) for seed in range(3)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert quality.read(path) == rows
    path.write_text(path.read_text()[:-2])
    assert quality.read(path) == rows[:2]
    with path.open("a", newline="") as file:
        csv.DictWriter(file, rows[0].keys()).writerow(rows[2])
    assert quality.read(path) == rows


def test_lion_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    lion, m, x = quality.Lion([p], lr=0.1), torch.zeros(2), p.detach().clone()
    for g in torch.tensor([[1.0, -3.0], [-20.0, 1.0]]):
        p.grad = g.clone()
        lion.step()
        x -= 0.1 * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(p.detach(), x)
