"""Broken checkpoints: each either loads as it says, and the run goes on, or a ValueError tells why and nothing changed.

Every value of valid checkpoints is deleted, retyped, reshaped, made NaN, exchanged for its neighbours; their files are
cut, and have bytes flipped.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import itertools
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import format1
import pytest
import torch
from killed import recipe
from resuming import laid_open
from torch import Tensor, nn

from manic import Mechanic
from manic.checkpoint.inspection import inspect
from manic.tuner import Options

SCHEDULERS = torch.optim.lr_scheduler


class Case(NamedTuple):
    """A run whose checkpoint is broken."""

    base: str
    options: dict[str, Any]  # of the base
    mechanic: dict[str, Any]
    scheduler: str = "none"
    groups: int = 1
    dtype: torch.dtype = torch.float32
    frozen: bool = False

    def __str__(self) -> str:
        words = [self.base, self.scheduler, *map(str, self.mechanic.values()), str(self.dtype).removeprefix("torch.")]
        return "-".join([*words, *(["frozen"] if self.frozen else [])])


CASES = [
    Case("AdamW", {"amsgrad": True}, {}, "cosine", groups=2),
    Case("AdamW", {"lr": 1.0}, {"per_group": True}, "sequential", groups=2),
    Case("SGD", {"momentum": 0.9}, {}, "onecycle"),
    Case("SGD", {}, {}, "multistep", dtype=torch.float16),
    Case("Adagrad", {}, {"variant": "paper", "s_init": 0.1}),
    Case("NAdam", {}, {}, "lambda", dtype=torch.bfloat16),
    Case("RMSprop", {"centered": True}, {}, "cosine", frozen=True),
]


def build(case: Case, seed: int) -> tuple[list[nn.Parameter], Mechanic]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 3), (3,), (3, 3), ()]
    parameters = [nn.Parameter(torch.randn(s, generator=generator).to(case.dtype)) for s in shapes]
    groups = [{"params": parameters[i :: case.groups]} for i in range(case.groups)]
    base = getattr(torch.optim, case.base)(groups, **{"lr": 0.1, **case.options})
    schedule = {
        "none": lambda: None,
        "cosine": lambda: SCHEDULERS.CosineAnnealingLR(base, T_max=40),
        "onecycle": lambda: SCHEDULERS.OneCycleLR(base, max_lr=0.1, total_steps=40),
        "multistep": lambda: SCHEDULERS.MultiStepLR(base, [3, 30]),
        "lambda": lambda: SCHEDULERS.LambdaLR(base, lambda t: 1 / (1 + t)),
        "sequential": lambda: SCHEDULERS.SequentialLR(
            base,
            [SCHEDULERS.LinearLR(base, total_iters=4), SCHEDULERS.CosineAnnealingLR(base, T_max=30)],
            milestones=[4],
        ),
    }[case.scheduler]()
    return parameters, Mechanic(base, schedule, **case.mechanic)


def train(parameters: list[nn.Parameter], mechanic: Mechanic, steps: range) -> None:
    for t in steps:
        for i, p in enumerate(parameters):
            p.grad = (p.detach().float() - math.sin(t + i)).to(p.dtype)
        mechanic.step()


def trained(case: Case, seed: int, steps: int) -> tuple[list[nn.Parameter], Mechanic]:
    parameters, mechanic = build(case, seed)
    train(parameters, mechanic, range(steps))
    if case.frozen and steps:
        mechanic.freeze()
    return parameters, mechanic


def equal(a: Any, b: Any) -> bool:
    """To the bit, types included; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.is_sparse or a.is_meta or (a.layout, a.device) != (b.layout, b.device):
            return (a.layout, a.device, a.dtype, a.shape) == (b.layout, b.device, b.dtype, b.shape)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a checkpoint, from the outside in."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


GONE = object()


def get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same with something else, or nothing, in one place."""
    if not path:
        return new
    inner = put(value[path[0]], path[1:], new)
    if isinstance(value, dict):
        return {k: inner if k == path[0] else v for k, v in value.items() if k != path[0] or inner is not GONE}
    return type(value)([inner if i == path[0] else v for i, v in enumerate(value) if i != path[0] or inner is not GONE])


def broken(value: Any) -> Iterator[Any]:
    """What might stand in its place."""
    yield from (GONE, None, "junk", -1, 1e30, math.nan, math.inf, True, [], {}, (1.5, 2.5), b"\0", torch.ones(()))
    yield from (torch.full((2,), math.nan), {"a": 1}, [[]], 10**30, 1j, object)
    if isinstance(value, Tensor):
        yield from (value[None], value.reshape(-1)[:-1], value.flatten(), value.new_zeros(0), value.new_zeros(7, 2))
        real = value if value.is_floating_point() else value.float()
        yield from (torch.full_like(real, math.nan), torch.full_like(real, math.inf), value.to(torch.complex64))
        yield from (value.to(torch.int64), value.bool(), value.to("meta"), value.to_sparse(), value.tolist())
        one = real.clone()
        one.view(-1)[-1:] = math.nan
        yield one
    if isinstance(value, dict):
        yield from ({**value, "more": 1}, {str(k): v for k, v in value.items()}, list(value.items()))
        yield {k: list(value.values())[i - 1] for i, k in enumerate(value)}  # turned by one
    if isinstance(value, list | tuple) and value:
        yield from (value[:-1], [*value, value[0]], value[::-1], dict(enumerate(value)))


def variations(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every place of a checkpoint with something else in it, and exchanged with a neighbour."""
    for path in paths(state):
        for new in broken(get(state, path)):
            yield f"{path} = {'nothing' if new is GONE else repr(new)}", put(state, path, new)
    for parent in [(), *paths(state)]:
        inner = get(state, parent)
        if isinstance(inner, dict):
            for a, b in itertools.combinations(inner, 2):
                yield f"{parent}: {a!r} <-> {b!r}", put(state, parent, {**inner, a: inner[b], b: inner[a]})
    for value in (None, 1, [], "junk", {}, torch.ones(2)):
        yield repr(value), value


def snapshot(parameters: list[nn.Parameter], mechanic: Mechanic) -> Any:
    attributes = {key: value for key, value in vars(mechanic).items() if key.startswith("_") and "hooks" not in key}
    plain = {key: value for key, value in attributes.items() if isinstance(value, int | float | str | bool | None)}
    return copy.deepcopy(
        [[p.detach() for p in parameters], mechanic.state_dict(), plain, [dict(g) for g in mechanic.param_groups]]
    )


def comes_back(given: Any, found: Any, default: Any = None) -> bool:
    """Whether what was loaded is what was given, in the dtype that it has here, and by default where nothing was."""
    if isinstance(given, Tensor) and isinstance(found, Tensor):
        return equal(given.to(found.dtype), found)
    if isinstance(given, dict) and isinstance(found, dict):
        given = {**given, **{key: found[key] for key in found if key == "lr_lambdas"}}  # functions, which have no state
        default = default if isinstance(default, dict) else {}
        given = {**{key: default[key] for key in default.keys() & found.keys()}, **given}
        return given.keys() == found.keys() and all(comes_back(v, found[k], default.get(k)) for k, v in given.items())
    if isinstance(given, list | tuple) and isinstance(found, list | tuple):
        default = default if isinstance(default, list | tuple) and len(default) == len(given) else [None] * len(given)
        return len(given) == len(found) and all(map(comes_back, given, found, default))
    if isinstance(given, int | float) and isinstance(found, float | Tensor):
        return equal(found.new_tensor(float(given)) if isinstance(found, Tensor) else float(given), found)
    return bool(given == found)


RECORDS = "mechanic_options", "mechanic_scheduler", "mechanic_step"  # that all groups share
FIXED = "params", "decoupled_weight_decay"  # numbered anew; what torch's AdamW, where it is true, never lets go of
FLAGS = "amsgrad", "centered", "fused"  # which torch takes to be off in the checkpoints of versions that had none


def wanted(given: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What a state dict that is accepted comes back as, but for dtypes and what is missing in it."""
    groups, live = given["param_groups"], before["param_groups"]
    number = {key: n for n, key in enumerate(itertools.chain(*(group["params"] for group in groups)))}
    number |= {str(key): n for key, n in number.items()}  # DCP's are strings
    state = {number.get(key, key): values for key, values in dict(given["state"]).items()}
    # The first group speaks for all of them. Without a scheduler in the checkpoint the one that is here stays.
    one = {key: groups[0][key] for key in RECORDS if key in groups[0]}
    if "mechanic_options" in one:
        ours = live[0]["mechanic_options"][0]["sweeps"]  # it says by which sweeps the next steps will be taken
        one["mechanic_options"] = ({**one["mechanic_options"][0], "sweeps": ours},)
    if "mechanic_options" in one and one["mechanic_options"][0]["scheduler"] is None:
        one |= {key: live[0][key] for key in ("mechanic_scheduler",) if key in live[0]}
        options = {**one["mechanic_options"][0], "scheduler": live[0]["mechanic_options"][0]["scheduler"]}
        one["mechanic_options"] = (options,)
    fixed = [{key: group[key] for key in FIXED if group.get(key)} for group in live]
    return {
        "state": state,
        "param_groups": [{**group, **one, **ours} for group, ours in zip(groups, fixed, strict=True)],
    }


def of_the_base(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without what a Mechanic puts there."""

    def base(values: Any) -> Any:
        return {k: v for k, v in values.items() if "mechanic_" not in str(k)} if isinstance(values, dict) else values

    return {
        "state": {k: base(v) for k, v in state["state"].items()},
        "param_groups": [*map(base, state["param_groups"])],
    }


def is_loaded(given: dict[str, Any], found: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a Mechanic has taken in what it was given, and nothing stays of what it was before."""
    given = wanted(given, before)
    if not any("mechanic_state" in group for group in given["param_groups"]):  # then the tuner starts afresh
        given, found = of_the_base(given), of_the_base(found)
    given, found = ({**one, "state": {k: v for k, v in one["state"].items() if v != {}}} for one in (given, found))
    options = {"mechanic_options": (dataclasses.asdict(Options()),)}
    off = [{key: group[key] for key in FLAGS if not group.get(key, True)} for group in found["param_groups"]]
    defaults = [{**group, **flags, **options} for group, flags in zip(before["param_groups"], off, strict=True)]
    return comes_back(given["state"], found["state"]) and comes_back(
        given["param_groups"], found["param_groups"], defaults
    )


def is_lost(state: dict[str, Any]) -> bool:
    """Whether a frozen run, whose steps are the base's alone, is past help: an lr without measure; centered RMSprop,
    where the square of the mean is more than the mean of the squares, or no more is left of them than rounding."""
    if not state["param_groups"][0].get("mechanic_options", [{}])[0].get("frozen"):
        return False
    groups, values = state["param_groups"], [v for v in dict(state["state"]).values() if isinstance(v, dict)]
    below = [v["grad_avg"].square() > v["square_avg"] for v in values if "grad_avg" in v]
    return any(float(g["lr"]) >= 1e30 or g.get("alpha", 1) < 1e-6 for g in groups) or any(bool(b.any()) for b in below)


def attempt(case: Case, state: Any, steps: int) -> str:
    """What is wrong with the way in which a Mechanic that has taken so many steps receives it; "": nothing."""
    parameters, mechanic = trained(case, 1, steps)
    before = snapshot(parameters, mechanic)
    given = copy.deepcopy(state)  # torch takes its tensors for its own, and they would be trained
    try:
        mechanic.load_state_dict(given)
    except ValueError as error:
        if not equal(snapshot(parameters, mechanic), before):
            return f"half loaded, with {error!r}"
        train(parameters, mechanic, range(steps, steps + 2))
        others, other = trained(case, 1, steps)
        train(others, other, range(steps, steps + 2))
        same = equal(snapshot(parameters, mechanic), snapshot(others, other))
        return "" if same else f"goes on otherwise, after {error!r}"
    except Exception as error:
        return f"{error!r}"
    if not equal(state, given):
        return "it changed what it was given"
    if not is_loaded(state, *map(laid_open, (mechanic.state_dict(), before[1]))):
        return "it says that it is loaded, and holds other values"
    try:
        train(parameters, mechanic, range(20, 22))
    except Exception as error:
        # A schedule that is at its end, as it says, and which torch has a clear word for.
        schedule: Any = mechanic.scheduler
        over = case.scheduler == "onecycle" and schedule.last_epoch > schedule.total_steps
        return "" if over and "Tried to step" in str(error) else f"loaded, and then {error!r}"
    finite = all(bool(p.isfinite().all()) for p in parameters) and bool(mechanic.scale.isfinite().all())
    return "" if finite or is_lost(state) else "loaded, and then it is not finite"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_whole_one_is_loaded_exactly(case: Case, steps: int) -> None:
    """And the run goes on as the one that was saved."""
    parameters, mechanic = trained(case, 0, 5)
    others, other = trained(case, 1, steps)
    saved = copy.deepcopy([[p.detach() for p in parameters], mechanic.state_dict()])
    assert not equal(other.state_dict(), saved[1])
    other.load_state_dict(copy.deepcopy(saved[1]))
    assert equal(other.state_dict(), saved[1])
    for p, value in zip(others, saved[0], strict=True):
        p.data.copy_(value)
    for t in range(5, 12):
        train(parameters, mechanic, range(t, t + 1))
        train(others, other, range(t, t + 1))
        assert equal(snapshot(others, other), snapshot(parameters, mechanic))
    assert not equal([p.detach() for p in parameters], saved[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_anything_else_in_any_place_of_a_state_dict(
    case: Case, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """One in 25 in the quick tests; all of them, 18 000, with --every."""
    source = laid_open(trained(case, 0, 5)[1].state_dict())
    whole = copy.deepcopy(source)
    every = request.config.getoption("--every")
    found = []
    for number, (what, state) in enumerate(itertools.islice(variations(source), 0, None, 1 if every else 25)):
        fault = attempt(case, state, steps=4 * (number % 2))
        found += [f"{what}: {fault}"] if fault else []
    record_property("cases", number + 1)
    assert equal(source, whole)
    assert not found, "\n".join([f"{len(found)} of {number + 1}", *found[:20]])


@pytest.mark.filterwarnings("ignore")
def test_anything_else_in_any_place_of_a_state_dict_of_format_1(request: pytest.FixtureRequest) -> None:
    """One in 25 in the quick tests. (What a whole one becomes, test_format1.py compares.)"""
    name = "scale_free-bfloat16"
    source = torch.load(format1.FOLDER / f"{name}.pt", weights_only=True)["mechanic"]
    found, loaded = [], 0
    every = request.config.getoption("--every")
    for number, (what, state) in enumerate(itertools.islice(variations(source), 0, None, 1 if every else 25)):
        run, given = format1.Run(format1.CASES[name]), copy.deepcopy(state)
        run.train(range(4 * (number % 2)))
        before = snapshot(run.parameters, run.mechanic)
        try:
            run.mechanic.load_state_dict(given)
            loaded += 1
        except ValueError as error:
            found += [] if equal(snapshot(run.parameters, run.mechanic), before) else [f"{what}: half, {error!r}"]
            continue
        except Exception as error:
            found.append(f"{what}: {error!r}")
            continue
        found += [] if equal(state, given) else [f"{what}: it changed what it was given"]
        run.train(range(25, 27))
        finite = all(bool(t.isfinite().all()) for t in (*run.parameters, run.mechanic.scale))
        found += [] if finite else [f"{what}: loaded, and then it is not finite"]
    assert 0 < loaded < number
    assert not found, "\n".join([f"{len(found)} of {number + 1}", *found[:20]])


# ---------------------------------------------------------------------- files


read = recipe()["load"]  # of docs/checkpoints.md


def test_an_entry_that_is_marked_as_a_folder_is_found(tmp_path: Path) -> None:
    """torch takes it for one, and hands out memory that nobody wrote; its checksum is right."""
    path = tmp_path / "checkpoint.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    for _ in range(8):  # the external attributes of all entries
        data[entry + 38] |= 0x10
        entry = data.find(b"PK\x01\x02", entry + 1)
        if entry < 0:
            break
    path.write_bytes(data)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    with pytest.raises(ValueError, match="damaged"):
        read(path)


def test_files_that_are_cut_or_have_bytes_flipped(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Either it cannot be read, or what is read is what was written."""
    path = tmp_path / "checkpoint.pt"
    state = trained(CASES[0], 0, 5)[1].state_dict()
    torch.save(state, path)
    whole = path.read_bytes()
    random = Random(0)
    refused = 0
    count = 3000 if request.config.getoption("--every") else 300
    for number in range(count):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[random.randrange(len(data)) :]
        elif number % 3 == 1:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        else:
            start = random.randrange(len(data))
            data[start : start + 64] = random.randbytes(64)
        path.write_bytes(data)
        try:
            found = read(path)
        except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error):
            refused += 1
            continue
        assert equal(found, state)
        parameters, mechanic = trained(CASES[0], 1, 4)
        mechanic.load_state_dict(found)
        train(parameters, mechanic, range(5, 7))
    assert count * 0.5 < refused < count


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.exploded = True",)


@pytest.mark.parametrize("where", ["state", "param_groups", "more"])
def test_no_code_is_run(tmp_path: Path, where: str) -> None:
    state = {**trained(CASES[0], 0, 5)[1].state_dict(), "more": 1, where: Bomb()}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        read(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not safe to load"):
        inspect(tmp_path / "checkpoint.pt")
    assert not hasattr(builtins, "exploded")
