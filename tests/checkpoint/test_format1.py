"""Checkpoints of format 1, which had x_ref and Δ for every parameter: this version loads them and goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from format1 import CASES, FOLDER, Case, Run
from resuming import same
from torch import Tensor
from training import flat

from manic.tuner import TunerState


class Bound(NamedTuple):
    """How far a run may end from "later"."""

    moved: float  # of the distance that the uninterrupted run moves after the checkpoint
    digits: float  # of the parameter itself
    scale: float  # of the scale


BOUNDS = {
    # One slot rounds otherwise than two. In 10 steps this grows to some 1e-15 of the distance, and no more.
    torch.float64: Bound(1e-9, 0, 1e-9),
    # 1e-6 to 3e-6 of the distance; 1e-5 where x_ref is off by 1e-6 of itself.
    torch.float32: Bound(1e-4, 0, 1e-4),
    # The float32 x agrees to 1e-6, and most of what is stored is the same bits. But an x that lies at the middle
    # between two stored values may become the other one. The next gradient then differs by a last digit, and the scale
    # by up to 9e-4 (bfloat16) or 4e-4 (float16). Two last digits leave room for one more such step.
    torch.bfloat16: Bound(1e-4, 2 * torch.finfo(torch.bfloat16).eps, 2e-3),
    torch.float16: Bound(1e-4, 2 * torch.finfo(torch.float16).eps, 1e-3),
}
LOW = (torch.bfloat16, torch.float16)
# These go on under another rule for the scale.
RULED = [name for name, case in CASES.items() if case.variant == "scale_free" and case.frozen_at is None]
FROM_FORMAT_1 = "ignore:.*format 1:UserWarning"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    return found


def slots(case: Case) -> dict[str, torch.dtype]:
    """The keys that a state dict of this format has for a parameter that has stepped."""
    if case.frozen_at is not None:
        return {}
    name = "mechanic_delta" if case.variant == "paper" else "mechanic_ref"
    rest = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
    return {
        name: torch.promote_types(case.dtype, torch.float32),
        **({"mechanic_rest": rest[case.dtype]} if case.dtype in rest else {}),
    }


def kept(run: Run) -> list[dict[str, torch.dtype]]:
    """What a run keeps for each parameter that has state."""
    state = run.mechanic.state_dict()["state"].values()
    return [{key: t.dtype for key, t in values.items() if key.startswith("mechanic_")} for values in state]


def check_end(run: Run, start: list[Tensor], saved: dict[str, Any]) -> None:
    """That a run which began at `start` ended at "later" and at its scale."""
    bound = BOUNDS[run.case.dtype]
    began, later, got = (flat(tensors).detach().double() for tensors in (start, saved["later"], run.parameters))
    moved = (later - began).abs().max().item()
    assert moved > 1e-3, "nothing moved: the comparison would be vacuous"
    torch.testing.assert_close(got, later, rtol=bound.digits, atol=bound.moved * moved)
    scale, wanted = torch.tensor(run.scale()), torch.tensor(saved["scale"])
    assert wanted.min() > 0
    torch.testing.assert_close(scale, wanted, rtol=bound.scale, atol=0)


def check_tuner(run: Run, saved: dict[str, Any]) -> None:
    """That "scale_free" has kept what it knew, in one accumulator."""
    for group, old in zip(run.mechanic.param_groups, saved["mechanic"]["param_groups"], strict=True):
        new, state = TunerState.unpack(group["mechanic_state"], 1), old["mechanic_state"]
        assert (new.m, new.v, new.s) == (state[:6].max(), state[6:12].max(), 0)
        assert new.r == (new.v / new.steps.clamp_min(1)).sqrt()
        assert (new.r > 0) == (new.steps > 1)
        for place, name in enumerate(
            ("h", "scale", "delta_norm", "numel", "update_norm", "ref_sq", "skipped", "steps")
        ):
            assert getattr(new, name) == state[24 + place]
        assert new.grad_norm == state[32]
        assert new.update_sq == new.left_sq == -1


def test_there_is_a_file_for_each_case() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.pt" for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_format_1_goes_on(name: str) -> None:
    case, saved = CASES[name], read(name)
    assert saved["mechanic"]["param_groups"][0]["mechanic_options"][0]["format"] == 1
    before, run = copy.deepcopy(saved), Run(case)
    with pytest.warns(UserWarning, match="format 1") as warned:
        run.load(saved)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert same(saved, before), "loading changed the checkpoint"
    assert all(map(torch.equal, run.parameters, saved["parameters"])), "loading moved the parameters"
    if name in RULED:
        check_tuner(run, saved)
    run.go_on()
    if name in RULED:
        began, goal, got = (flat(x).detach().double() for x in (saved["parameters"], run.targets, run.parameters))
        assert (goal - got).norm() < (goal - began).norm()
        assert (run.mechanic.scale > 0).all()
    else:
        check_end(run, saved["parameters"], saved)
    assert kept(run) == [slots(case)] * 2


@pytest.mark.parametrize("name", CASES)
def test_what_was_loaded_is_saved_in_this_format(name: str, tmp_path: Path) -> None:
    """It loads without the warning, which would be an error here, and goes on bit for bit."""
    case, first, second = CASES[name], Run(CASES[name]), Run(CASES[name])
    with pytest.warns(UserWarning, match="format 1"):
        first.load(read(name))
    torch.save(first.save(), tmp_path / "checkpoint.pt")
    again = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for group in again["mechanic"]["param_groups"]:
        assert group["mechanic_options"][0]["format"] == 3
        assert "store_delta" not in group["mechanic_options"][0]
    second.load(again)
    assert kept(second) == [slots(case)] * 2
    for run in (first, second):
        run.go_on()
    assert same(first.save(), second.save())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.store_delta and case.variant == "paper"])
def test_a_run_from_the_start_ends_where_that_of_format_1_ended(name: str) -> None:
    """One slot or two, the run is the same up to rounding. (A recomputed Δ lost its first update; a slot does not.)"""
    run = Run(CASES[name])
    start = [p.detach().clone() for p in run.parameters]
    run.train(range(run.case.saved_at))
    run.go_on()
    check_end(run, start, read(name))


# ---------------------------------------------------------------------- bfloat16 and float16


def master(run: Run, i: int) -> Tensor:
    """The float32 x of a parameter, from its stored value and the rest."""
    p = run.parameters[i].detach()
    rest: Tensor = run.mechanic.state_dict()["state"][i]["mechanic_rest"]
    if p.dtype == torch.float16:
        return p.float() + rest
    bits = (p.float().view(torch.int32) & 0x7FFFFFFF) + rest.view(torch.int16).int()
    return bits.clamp_min(0).view(torch.float32).copysign(p.float())


def x_of(saved: dict[str, Any], i: int) -> Tensor:
    """The float32 x of format 1: x_ref + S·Δ."""
    state, group = saved["mechanic"]["state"][i], saved["mechanic"]["param_groups"][0]
    scale = group["mechanic_state"][4 * len(group["mechanic_options"][0]["betas"]) + 1]
    x: Tensor = state["mechanic_ref"].double() + scale * state["mechanic_delta"].double()
    return x.float()


@pytest.mark.filterwarnings(FROM_FORMAT_1)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype in LOW])
def test_loading_keeps_the_float32_x(name: str) -> None:
    saved, run = read(name), Run(CASES[name])
    run.load(saved)
    for i in range(2):
        torch.testing.assert_close(master(run, i), x_of(saved, i))
    if CASES[name].saved_at > 1:
        assert not torch.equal(master(run, 0), run.parameters[0].float()), "all of it is in the stored value"


@pytest.mark.filterwarnings(FROM_FORMAT_1)
def test_an_x_in_the_middle_between_two_of_bfloat16() -> None:
    """torch stored the even one of the two. The rest is then 0x8000 beside the lower one, and int16 ends at 0x7fff."""
    saved, run = read("scale_free-bfloat16"), Run(CASES["scale_free-bfloat16"])
    middle = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, -1 - 3 * 2**-8])
    saved["mechanic"]["state"][1]["mechanic_ref"].copy_(middle)
    saved["mechanic"]["state"][1]["mechanic_delta"].zero_()
    saved["parameters"][1] = middle.bfloat16()
    assert saved["parameters"][1].tolist() == [1, -1, 1 + 2**-6, -1 - 2**-6]
    run.load(saved)
    torch.testing.assert_close(master(run, 1), middle)


# ---------------------------------------------------------------------- format 2 under older rules


def of_several(group: dict[str, Any]) -> None:
    """Gives a param group of "scale_free" six accumulators, as format 2 had them at first."""
    fields = TunerState.unpack(group["mechanic_state"], 1)._asdict()
    several = [fields.pop(name) * torch.linspace(0, 1, 6, dtype=torch.float64) for name in "mvrs"]
    fields.pop("left_sq")
    several[2].zero_()
    group["mechanic_state"] = torch.cat([*several, torch.stack(list(fields.values()))])


def with_the_smallest(group: dict[str, Any]) -> None:
    """Gives a param group of "scale_free" the smallest mean of ‖g‖, as format 2 had it then, and no mean of |h|."""
    state = group["mechanic_state"]
    at = TunerState._fields.index("keep")
    group["mechanic_state"] = torch.cat([state[:2], state[2:3] * 0, state[3:at], state[at - 1 : at], state[at:]])


@pytest.mark.parametrize(("older", "length"), [(of_several, 41), (with_the_smallest, 23)])
def test_a_checkpoint_of_an_older_rule_goes_on(older: Callable[[dict[str, Any]], None], length: int) -> None:
    case = Case(torch.float64)
    run, resumed = Run(case), Run(case)
    run.train(range(case.saved_at))
    saved = run.save()
    for group in saved["mechanic"]["param_groups"]:
        older(group)
        group["mechanic_options"] = ({**group["mechanic_options"][0], "format": 2},)
        assert group["mechanic_state"].shape == (length,)
    with pytest.warns(UserWarning, match=r"older version .* in format 2: .* a new rule for the scale") as warned:
        resumed.load(saved)
    assert len(warned) == 1
    for one in (run, resumed):
        one.go_on()
    torch.testing.assert_close(resumed.parameters, run.parameters, rtol=1e-9, atol=1e-12)
    assert resumed.scale() == pytest.approx(run.scale())


# ---------------------------------------------------------------------- the future


def test_a_format_of_the_future_is_refused() -> None:
    saved, run = read("scale_free"), Run(CASES["scale_free"])
    for group in saved["mechanic"]["param_groups"]:
        group["mechanic_options"][0]["format"] = 4
    before = run.save()
    with pytest.raises(ValueError, match="format 4"):
        run.mechanic.load_state_dict(saved["mechanic"])
    assert same(run.save(), before)
    run.train(range(3))
    assert math.isfinite(run.mechanic.scale.item())
