"""python -m manic inspect: files of torch.save and DCP folders, for people and as JSON."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import format1
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import Problem

from manic import Mechanic, __version__
from manic.__main__ import main
from manic.checkpoint.inspection import inspect

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


class Run:
    """Two named groups, a cosine, some steps, one of them skipped."""

    def __init__(self, problem: Problem, **options: Any) -> None:
        self.problem, self.parameters = problem, problem.parameters()
        groups = [{"params": [p], "name": name} for p, name in zip(self.parameters, ("body", "head"), strict=True)]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.mechanic = Mechanic(optimizer, CosineAnnealingLR(optimizer, T_max=100), **options)
        self.train(0, 20)
        self.mechanic.zero_grad()
        problem.loss(self.parameters, 0).backward()
        self.parameters[0].grad[0, 0] = torch.nan
        self.mechanic.step()
        self.mechanic.zero_grad()

    def train(self, first: int, last: int) -> None:
        self.problem.train(self.parameters, self.mechanic, range(first, last))


def save(run: Run, route: str, path: Path) -> Path:
    model = nn.ParameterList(run.parameters)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    if route == "file":
        torch.save({"model": model.state_dict(), "optimizers": [run.mechanic.state_dict()]}, path)
    elif route == "alone":
        torch.save(run.mechanic.state_dict(), path)
    elif route == "Stateful":
        dcp.save({"model": model, "mechanic": run.mechanic}, checkpoint_id=path)
    elif route == "state_dict":
        dcp.save({"optim": get_optimizer_state_dict(model, run.mechanic)}, checkpoint_id=path)
    else:
        dcp.save(get_optimizer_state_dict(model, run.mechanic, options=flat), checkpoint_id=path)
    return path


WHERE = {"file": "optimizers.0", "alone": "", "Stateful": "mechanic", "state_dict": "optim", "flattened": ""}


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("route", WHERE)
def test_json_says_what_the_live_one_says(
    route: str, per_group: bool, problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(problem, per_group=per_group)
    path = save(run, route, tmp_path / "checkpoint")
    assert main(["inspect", "--json", str(path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["path"], found["where"], found["format"]) == (str(path), WHERE[route], 3)
    assert (found["base"], found["scheduler"]) == ("AdamW", "CosineAnnealingLR")
    assert (found["step"], found["skipped"], found["frozen"]) == (21, 1, False)
    live = run.mechanic.metrics()
    assert {name: found[name] for name in live} == live
    assert found["options"]["per_group"] == per_group
    assert len(found["accumulators"]) == 1 + per_group
    state = run.mechanic.param_groups[-1]["mechanic_state"]
    last = found["accumulators"][-1]
    assert (last["beta"], last["m"], last["v"]) == (1.0, state[0].item(), state[1].item())
    assert last.get("group") == ("head" if per_group else None)
    assert found["bytes"] == {"x_ref": 48, "delta": 0, "rest": 0, "base": 104}
    assert (found["tensors"], found["numel"]) == (2, 12)


@pytest.mark.parametrize("variant", ["scale_free", "paper"])
@pytest.mark.parametrize(("dtype", "rest"), [(torch.float64, 0), (torch.bfloat16, 24), (torch.float16, 48)], ids=str)
def test_one_slot_and_the_rest(variant: Any, dtype: torch.dtype, rest: int, tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(12, dtype=dtype))
    mechanic = Mechanic(torch.optim.SGD([p], lr=0.01), variant=variant)
    p.grad = torch.ones_like(p)
    mechanic.step()
    torch.save(mechanic.state_dict(), tmp_path / "checkpoint.pt")
    assert main(["inspect", str(tmp_path / "checkpoint.pt")]) == 0
    (found,) = inspect(tmp_path / "checkpoint.pt")
    slot = 96 if dtype == torch.float64 else 48
    sizes = {"x_ref": slot * (variant == "scale_free"), "delta": slot * (variant == "paper"), "rest": rest, "base": 0}
    assert found.sizes == sizes


def test_a_checkpoint_of_format_1(capsys: pytest.CaptureFixture[str]) -> None:
    path = format1.FOLDER / "scale_free.pt"
    assert main(["inspect", "--json", str(path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    saved = torch.load(path, weights_only=True)["mechanic"]["param_groups"][0]
    assert (found["format"], found["step"]) == (1, int(saved["mechanic_step"]))
    assert found["scale"] == float(saved["mechanic_state"][25]) / saved["mechanic_options"][0]["unit"]
    assert found["bytes"]["x_ref"] == found["bytes"]["delta"] == 4 * found["numel"] > 0


def test_what_people_see(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(problem, per_group=True)
    run.mechanic.freeze()
    path = save(run, "file", tmp_path / "checkpoint.pt")
    assert main(["inspect", str(path)]) == 0
    seen = capsys.readouterr().out
    first, second = (f"{lr:.4g}" for lr in run.mechanic.effective_lr())
    for text in ("AdamW, CosineAnnealingLR, scale_free, format 3, frozen", "21, of which 1 skipped", "group head"):
        assert text in seen
    assert f"effective lr  {first}\n" in seen
    assert f"effective lr  {second}\n" in seen
    assert seen.count("             m          v          r\n") == 2, "no column of which every row is 0"
    assert "2 tensors of 12 elements in all; base 104 B" in seen


def test_what_people_see_of_the_paper(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(Run(problem, variant="paper"), "file", tmp_path / "checkpoint.pt")
    assert main(["inspect", str(path)]) == 0
    seen = capsys.readouterr().out
    assert "          beta          m          v          r          s\n" in seen
    assert "      0.999999 " in seen


def test_a_schedule_that_has_ended_at_0(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = problem.parameters()
    base = torch.optim.AdamW(parameters, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda t: min((t + 1) / 10, 1 - t / 30))
    mechanic = Mechanic(base, schedule)
    problem.train(parameters, mechanic, 30)
    torch.save(mechanic.state_dict(), tmp_path / "checkpoint.pt")
    assert main(["inspect", str(tmp_path / "checkpoint.pt")]) == 0
    highest = 0.5 * max(min((t + 1) / 10, 1 - t / 30) for t in range(30)) * float(mechanic.scale)
    assert f"effective lr  0 (the schedule is at 0; at the highest lr so far it is {highest:.4g})\n" in (
        capsys.readouterr().out
    )


def test_two_mechanics_in_one_checkpoint(problem: Problem, tmp_path: Path) -> None:
    one, two = Run(problem), Run(problem, variant="paper")
    torch.save({"g": one.mechanic.state_dict(), "d": two.mechanic.state_dict()}, tmp_path / "gan.pt")
    found = inspect(tmp_path / "gan.pt")
    assert [(f.where, f.look.options.variant) for f in found] == [("g", "scale_free"), ("d", "paper")]


def test_a_plot_over_the_checkpoints_of_a_run(problem: Problem, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, paths = Run(problem, per_group=True), []
    for t in range(20, 60, 10):
        run.train(t, t + 10)
        paths.append(save(run, "file", tmp_path / f"{t}.pt"))
    assert main(["inspect", *map(str, paths), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert main(["inspect", str(paths[0]), "--plot", str(tmp_path / "nowhere" / "plot.png")]) == 1
    assert main(["inspect", str(paths[0]), "--plot", str(tmp_path / "plot.xyz")]) == 1


# ---------------------------------------------------------------------- what is none, or broken


def broken(case: str, run: Run, path: Path) -> Path:
    """A path that no Mechanic can be read from."""
    if case == "empty folder":
        path.mkdir()
    elif case == "folder of files":  # Transformers and Accelerate
        path.mkdir()
        save(run, "file", path / "optimizer.pt")
    elif case in ("text", "empty"):
        path.write_text("the lr is 1e-3\n" * (case == "text"))
    elif case == "plain":
        torch.save({"optimizer": torch.optim.AdamW(run.parameters).state_dict()}, path)
    elif case == "numbers":
        torch.save([1, 2], path)
    elif case == "truncated":
        path.write_bytes(save(run, "file", path).read_bytes()[:-200])
    elif case == "format":
        state = run.mechanic.state_dict()
        state["param_groups"][0]["mechanic_options"] = ({"format": 4},)
        torch.save(state, path)
    elif case == "no options":
        state = run.mechanic.state_dict()
        del state["param_groups"][1]["mechanic_options"]
        torch.save(state, path)
    elif case == "metadata":
        save(run, "Stateful", path)
        (path / ".metadata").write_bytes(pickle.dumps(Evil(path.parent / "ran")))
    elif case == "entry":
        save(run, "Stateful", path)
        for file in path.glob("*.distcp"):
            file.write_bytes(b"x" * file.stat().st_size)
    elif case == "evil":
        torch.save({"x": Evil(path.parent / "ran")}, path)
    return path


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "No such file"),
        ("empty folder", "a folder without .metadata\n"),
        ("folder of files", "a folder without .metadata (is it one of ['optimizer.pt'] in it?)\n"),
        ("text", "no checkpoint"),
        ("empty", "no checkpoint"),
        ("plain", "no Mechanic in this checkpoint"),
        ("numbers", "no Mechanic in this checkpoint"),
        ("truncated", "a damaged one"),
        ("format", "format 4, and this version of manic reads format 3 and older ones"),
        ("no options", "param group 1 of the checkpoint has no 'mechanic_options'"),
        ("metadata", "not safe to load"),
        ("entry", "no checkpoint"),
        ("evil", "not safe to load"),
    ],
)
def test_one_clear_line(
    case: str, message: str, problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(problem)
    good, bad = save(run, "file", tmp_path / "good.pt"), broken(case, run, tmp_path / "bad.pt")
    assert main(["inspect", str(bad), str(good), "--json"]) == 1
    out, error = capsys.readouterr()
    assert len(json.loads(out)) == 1, "the others are shown"
    assert error.count("\n") == 1
    assert error.startswith(f"manic: {bad}: ")
    assert message in error
    assert not (tmp_path / "ran").exists(), "it was run"


def test_an_entry_outside_the_folder_is_not_read(problem: Problem, tmp_path: Path) -> None:
    path = save(Run(problem), "Stateful", tmp_path / "checkpoint")
    metadata = (path / ".metadata").read_bytes()
    assert b"\x0c__0_0.distcp" in metadata
    (path / ".metadata").write_bytes(metadata.replace(b"\x0c__0_0.distcp", b"\x0c../_0.distcp"))
    with pytest.raises(ValueError, match="outside the folder"):
        inspect(path)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "manic", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"manic {__version__}\n"
    for arguments, code in ((["--version"], 0), (["inspect", "--help"], 0), ([], 2), (["inspect"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert __version__ in capsys.readouterr().out


def test_a_reader_that_has_seen_enough(problem: Problem, tmp_path: Path) -> None:
    path = save(Run(problem), "alone", tmp_path / "checkpoint.pt")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "manic", "inspect", str(path)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")
