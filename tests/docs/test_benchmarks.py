"""The scripts behind the figures in the docs run, and the bounds that the docs name hold."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bases
import contenders
import gpu
import gpu_checks
import memory
import pytest
import quality
import sums
import torch
from checkpoint_bytes import measure

from manic import Mechanic
from manic.parameters import REST
from manic.sweeps.native import Native, native


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


# ---------------------------------------------------------------------- the GPU script

CPU = torch.device("cpu")


def test_the_gpu_script_goes_as_far_as_a_cpu_lets_it(tmp_path: Path) -> None:
    command = [sys.executable, gpu.__file__, "--dry", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = [[cell.strip() for cell in line.split(" | ")] for line in done.stdout.splitlines() if " | " in line]
    assert table.pop(0) == ["check or figure", "result", "goal", "ok"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["machine"] == contenders.machine(CPU) == done.stdout.splitlines()[0]
    assert [[row[key] for key in ("check", "result", "goal", "ok")] for row in written["results"]] == table
    assert [row[0] for row in table] == [check.name for check in gpu.checks(CPU)]
    assert [row[1] == "not on a CPU" for row in table] == [not check.on_cpu for check in gpu.checks(CPU)]
    judged = [row for row in table if row[3] == "yes"]
    assert len(judged) >= 12
    assert {row[3] for row in table if row not in judged} == {"-"}


class Wrong(Native):
    """Moves x by a thousandth too far."""

    def sweep(self, motion: torch.Tensor) -> None:
        super().sweep(1.001 * motion)


class Miscounting(Native):
    """Loses a tenth of ‖g‖²."""

    def measure(self) -> torch.Tensor:
        return super().measure() * torch.tensor([1, 1, 0.9, 1, 1])


@pytest.mark.parametrize(("kernels", "right"), [(Native, True), (Wrong, False), (Miscounting, False)])
def test_the_gpu_script_finds_wrong_kernels(
    kernels: type[Native], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native() is Native
    monkeypatch.setattr(gpu_checks, "kernels_of", lambda _: kernels)
    found = gpu_checks.kernels_beside_eager(CPU, torch.float32)
    assert found.reached is right
    assert (found.figures["value"] < 1e-6) is right


class Forgetful(gpu_checks.Training):
    """Loses the digits that bfloat16 cannot hold, and has random noise in its loss."""

    def train(self, start: int = 0, stop: int = 4) -> gpu_checks.Training:
        for t in range(start, stop):
            super().train(t, t + 1)
            for w in self.weights:
                self.mechanic.state[w].get(REST, torch.zeros(())).zero_()
        return self

    def loss(self, t: int) -> torch.Tensor:
        return (1 + 1e-3 * torch.rand(())) * super().loss(t)


def test_the_gpu_script_finds_runs_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gpu_checks, "Training", Forgetful)
        assert gpu_checks.two_runs(CPU, torch.float32) == gpu.Found("other bits", False)
        found = gpu_checks.bfloat16_beside_float32(CPU)
        assert (found.reached, found.figures["rest"]) == (False, 0)
    monkeypatch.setattr(gpu_checks, "STEPS", 78)  # which the new process does not know
    assert gpu_checks.resumed_run(CPU, torch.float32) == gpu.Found("other bits", False)


def test_the_gpu_script_says_what_failed_and_what_it_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> gpu.Found:
        raise RuntimeError("out of order\nsecond line")

    def slow() -> gpu.Found:
        monkeypatch.setattr(gpu, "BUDGET", -1.0)
        return gpu.Found("2.3", False, {"ratio": 2.3})

    def good() -> gpu.Found:
        return gpu.Found("same bits", True)

    made = [("first", good), ("raises", broken), ("slow", slow), ("late", good)]
    monkeypatch.setattr(gpu, "checks", lambda _: [gpu.Check(name, "goal", call) for name, call in made])
    path, threads = tmp_path / "gpu.json", torch.get_num_threads()
    try:
        assert gpu.main(["--dry", "--json", str(path)]) == 1
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())["results"]
    assert [(row["check"], row["ok"]) for row in results] == [
        ("first", "yes"), ("raises", "NO"), ("slow", "NO"), ("late", "skipped")
    ]  # fmt: skip
    out, err = capsys.readouterr()
    assert "RuntimeError: out of order " in out
    assert "in broken" in err
    assert out.splitlines()[-1] == "not as it should be: raises (NO); slow (NO); late (skipped)"
    pytest.importorskip("matplotlib")
    import report

    assert "| slow | 2.3 | goal | NO |" in report.gpu(results)


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
    (cell,) = quality.cells(["GPT 1000"], ["AdamW"], quick=False)[:1]
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


def test_a_quick_run_has_the_base_lr_that_it_judges_and_another() -> None:
    cells = quality.cells([task for task, _, _ in quality.QUICK], list(quality.BASES), quick=True)
    assert {run.lr for run in quality.planned(cells, ["manic"], quick=True)} == {1e-8, quality.USUAL}


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


class Unsaved(torch.optim.SGD):
    """Loses its momentum when it is saved."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "state": {}}


class Standing(torch.optim.SGD):
    """Does not move."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return closure()


@pytest.mark.filterwarnings("ignore")
def test_what_is_said_of_an_optimizer() -> None:
    def momentum(params: Any) -> Any:
        return Unsaved(params, lr=0.01, momentum=0.9)

    assert bases.fault(torch.optim.AdamW, Mechanic)[0] == ""
    if hasattr(torch.optim, "Muon"):
        assert bases.fault(torch.optim.Muon, Mechanic)[0] == "", "it takes matrices alone"
    assert bases.fault(momentum, lambda base: base)[0].startswith("does not resume: ")
    assert bases.fault(Standing, Mechanic)[0] == "does not train"
    assert bases.fault(torch.optim.LBFGS, Mechanic)[0].startswith("cannot be built: ValueError: LBFGS")
    assert "Mechanic" not in bases.fault(torch.optim.LBFGS, lambda base: base)[0]
