"""Resume, bit for bit: a new process, a new model, torch.load(weights_only=True)."""

from __future__ import annotations

import copy
import itertools
import linecache
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resuming
import torch
from resuming import SAVED_AT, STEPS, Case, Run, cases, laid_open, optimizers, same
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import Problem, flat

from manic import Mechanic, diagnostics
from manic.checkpoint.record import sealed
from manic.parameters import SLOT
from manic.run import Run as Inner
from manic.sweeps.kernels import name_for
from manic.sweeps.native import Native


@pytest.mark.parametrize("optimizer", sorted(optimizers()))
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step", "ignore:ASGD keeps a copy:UserWarning")
def test_a_new_process_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    checkpoints: dict[Any, Any] = {}
    whole = {}
    for case in cases(optimizer):
        run = Run(case, seed=0)
        for t in run.train(range(STEPS)):
            if t in SAVED_AT:
                checkpoints[case.name, t] = copy.deepcopy(run.state())
        whole[case.name] = run
        assert run.mechanic.scale > 0, case.name
        for at in (0, 1):
            saved = checkpoints[case.name, at]["model"]
            assert not torch.equal(flat(saved), flat(run.parameters)), f"{case.name} did not move"
    torch.save(checkpoints, tmp_path / "checkpoints.pt")
    command = [sys.executable, resuming.__file__, optimizer, tmp_path / "checkpoints.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True)

    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 24 * 3
    for (name, at), (parameters, scale) in results.items():
        for resumed, uninterrupted in zip(parameters, whole[name].parameters, strict=True):
            assert torch.equal(resumed, uninterrupted), f"{name} saved at step {at}"
        assert torch.equal(scale, whole[name].mechanic.scale)


@pytest.mark.parametrize(
    ("drop", "variant", "dtype"),
    [
        *((drop, "scale_free", torch.float32) for drop in ("mechanic_state", "mechanic_scheduler", "momentum_buffer")),
        ("mechanic_ref", "scale_free", torch.float32),
        ("mechanic_delta", "paper", torch.float32),
        *(("mechanic_rest", variant, d) for variant in SLOT for d in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_the_matrix_sees_what_is_lost(drop: str, variant: str, dtype: torch.dtype) -> None:
    """Bitwise equality is no accident of these runs: each part of the state that is zeroed changes the end."""
    run = Run(Case("SGD", "cosine", variant, dtype), seed=0)
    state: dict[str, Any] = {}
    for t in run.train(range(STEPS)):
        if t == 25:
            state = copy.deepcopy(run.state())
            state["mechanic"] = laid_open(state["mechanic"])
    for group in state["mechanic"]["param_groups"]:
        if drop == "mechanic_state":
            group[drop].zero_()
        if drop == "mechanic_scheduler":
            group[drop][0]["last_epoch"] = 0
    for values in state["mechanic"]["state"].values():
        if drop in values:
            values[drop].zero_()
    again = Run(run.case, seed=1)
    again.load(state)
    list(again.train(range(25, STEPS)))
    assert not torch.equal(flat(again.parameters), flat(run.parameters))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduler", ["none", "cosine", "sequential"])
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.filterwarnings(
    "ignore:Seems like `optimizer.step"
)  # torch's, of any scheduler copied before its first step
def test_deepcopy_and_pickle_of_a_live_mechanic(way: str, scheduler: str) -> None:
    for at in SAVED_AT:
        run = Run(next(c for c in cases("AdamW") if c.scheduler == scheduler), seed=0)
        list(run.train(range(at)))
        twin = copy.deepcopy(run) if way == "deepcopy" else pickle.loads(pickle.dumps(run))
        assert twin.mechanic.param_groups[0]["params"][0] is twin.parameters[0]
        for each in (run, twin):
            list(each.train(range(at, STEPS)))
        assert torch.equal(flat(run.parameters), flat(twin.parameters))
        assert twin.mechanic.scale > 0
        assert (
            twin.mechanic.state[twin.parameters[0]]["mechanic_ref"]
            is not run.mechanic.state[run.parameters[0]]["mechanic_ref"]
        )


def test_a_copy_with_a_scheduler_on_the_wrapper(problem: Problem) -> None:
    """The scheduler patches `step` on the instance; the patch must not travel."""
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.SGD(parameters, lr=1.0))
    torch.optim.lr_scheduler.ExponentialLR(mechanic, gamma=0.9)
    problem.train(parameters, mechanic, 3)
    twin, other = copy.deepcopy((mechanic, parameters))
    before = flat(parameters).detach()
    problem.train(other, twin, range(3, 6))
    assert torch.equal(flat(parameters), before), "the copy stepped the original"
    assert not torch.equal(flat(other), before)


def test_hooks_do_not_travel_as_in_torch(problem: Problem) -> None:
    mechanic = Mechanic(torch.optim.SGD(problem.parameters(), lr=1.0))
    mechanic.register_step_post_hook(lambda *_: None)
    mechanic.register_state_dict_pre_hook(lambda *_: None)
    twin = pickle.loads(pickle.dumps(mechanic))
    assert not twin._optimizer_step_post_hooks
    assert not twin._optimizer_state_dict_pre_hooks
    twin.step()


def test_loading_copies(trained: Any, problem: Problem) -> None:
    _, mechanic = trained()
    _, other = trained(steps=0)
    state = copy.deepcopy(mechanic.state_dict())
    other.load_state_dict(state)
    kept = copy.deepcopy(state)
    problem.train(other.param_groups[0]["params"], other, 3)
    assert torch.equal(state["state"][0]["mechanic_ref"], kept["state"][0]["mechanic_ref"])
    assert torch.equal(state["param_groups"][0]["mechanic_state"], kept["param_groups"][0]["mechanic_state"])


def test_state_dict_copies_no_tensor(trained: Any) -> None:
    parameters, mechanic = trained()
    state = mechanic.state_dict()
    for i, p in enumerate(parameters):
        for key, value in mechanic.state[p].items():
            assert state["state"][i][key] is value


def test_load_state_dict_of_ones_own_state_before_any_step_changes_nothing(problem: Problem) -> None:
    """Accelerate does this in prepare()."""
    ends = []
    for reload in (False, True):
        parameters = problem.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        mechanic = Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20))
        if reload:
            mechanic.load_state_dict(mechanic.state_dict())
        problem.train(parameters, mechanic, 20)
        ends.append(flat(parameters))
    assert torch.equal(*ends)


def test_per_group_resumes(problem: Problem, tmp_path: Path) -> None:
    def build() -> tuple[Any, Mechanic]:
        parameters = problem.parameters()
        return parameters, Mechanic(torch.optim.AdamW([{"params": [p]} for p in parameters], lr=0.1), per_group=True)

    parameters, mechanic = build()
    problem.train(parameters, mechanic, 10)
    torch.save([parameters, mechanic.state_dict()], tmp_path / "checkpoint.pt")
    problem.train(parameters, mechanic, range(10, 20))

    others, other = build()
    values, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    other.load_state_dict(state)
    assert other.scale[0] != other.scale[1]
    problem.train(others, other, range(10, 20))
    assert torch.equal(flat(others), flat(parameters))
    assert torch.equal(other.scale, mechanic.scale)


def test_groups_share_one_state_again_after_loading(problem: Problem) -> None:
    parameters = problem.parameters()
    mechanic = Mechanic(torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1))
    mechanic.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    first, second = mechanic.param_groups
    assert first["mechanic_state"] is second["mechanic_state"]
    assert first["mechanic_step"] is second["mechanic_step"]


@pytest.mark.filterwarnings("ignore:the checkpoint was written under other options")  # its sweeps
def test_map_location(trained: Any, tmp_path: Path) -> None:
    """A checkpoint whose tensors were all mapped elsewhere comes back to the devices of the live objects."""
    _, mechanic = trained()
    torch.save(mechanic.state_dict(), tmp_path / "checkpoint.pt")
    parameters = [torch.nn.Parameter(p.detach().to("meta")) for p in mechanic.param_groups[0]["params"]]
    other = Mechanic(torch.optim.AdamW(parameters, lr=1.0))
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True, map_location="cpu"))
    assert {value.device.type for p in parameters for key, value in other.state[p].items() if key != "step"} == {"meta"}
    assert other.param_groups[0]["mechanic_state"].device.type == "meta"


@pytest.mark.parametrize("variant", SLOT)
def test_a_checkpoint_of_a_model_of_another_dtype_is_refused(variant: str, trained: Any) -> None:
    """The digits that bfloat16 cannot hold are in the one and not in the other."""
    states = {d: trained(dtype=d, variant=variant)[1].state_dict() for d in (torch.float32, torch.bfloat16)}
    for one, two in itertools.permutations(states):
        _, other = trained(steps=0, dtype=two, variant=variant)
        with pytest.raises(ValueError, match="was it saved with parameters of another dtype"):
            other.load_state_dict(copy.deepcopy(states[one]))


@pytest.mark.parametrize(("dtype", "rest"), [(torch.bfloat16, torch.int16), (torch.float16, torch.float32)], ids=str)
def test_slot_and_rest_come_back_to_the_bit(dtype: torch.dtype, rest: torch.dtype, trained: Any) -> None:
    """torch itself would cast them to the dtype of the parameter."""
    mechanics = [trained(steps=steps, dtype=dtype)[1] for steps in (30, 0)]
    mechanics[1].load_state_dict(copy.deepcopy(mechanics[0].state_dict()))
    theirs, ours = (next(iter(one.state.values())) for one in mechanics)
    assert (ours["exp_avg"].dtype, ours["mechanic_ref"].dtype, ours["mechanic_rest"].dtype) == (
        dtype,
        torch.float32,
        rest,
    )
    assert theirs["mechanic_rest"].count_nonzero() > 0
    assert all(torch.equal(ours[key], theirs[key]) for key in ("mechanic_ref", "mechanic_rest"))


def test_strides_follow_the_live_parameter(problem: Problem) -> None:
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    mechanic = Mechanic(torch.optim.SGD([p], lr=0.1))
    p.grad = torch.ones_like(p)
    mechanic.step()
    state = copy.deepcopy(mechanic.state_dict())
    state["state"][0] = {key: value.contiguous() for key, value in state["state"][0].items()}
    mechanic.load_state_dict(state)
    assert mechanic.state[p]["mechanic_ref"].stride() == p.stride()


# ---------------------------------------------------------------- what does not fit


def snapshot(parameters: Any, mechanic: Mechanic) -> Any:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in mechanic.param_groups]
    schedule = mechanic.scheduler and mechanic.scheduler.state_dict()
    return copy.deepcopy([groups, list(mechanic.state.values()), list(parameters), schedule])


def breakages() -> dict[str, Any]:
    def edit(function: Any) -> Any:
        def apply(state: dict[str, Any]) -> dict[str, Any]:
            function(state)
            return state

        return apply

    group = lambda state: state["param_groups"][0]  # noqa: E731
    options = lambda state: group(state)["mechanic_options"][0]  # noqa: E731
    return {
        "no optimizer state": (lambda state: {"model": state}, "^this is no optimizer state"),
        "not a dict": (lambda state: {"state": 3, "param_groups": state["param_groups"]}, "no optimizer state"),
        "unknown format": (edit(lambda s: options(s).update(format=4)), "format 4, .* reads format 3 and older"),
        "no format": (edit(lambda s: options(s).pop("format")), "format None"),
        "other base": (edit(lambda s: options(s).update(base="SGD")), "around SGD, this one is around AdamW"),
        "other scheduler": (edit(lambda s: options(s).update(scheduler="OneCycleLR")), "OneCycleLR.*CosineAnnealingLR"),
        "bad option": (edit(lambda s: options(s).update(betas=[])), "betas"),
        "unknown option": (edit(lambda s: options(s).update(color="red")), "color"),
        "no base lr": (edit(lambda s: options(s).pop("base_lr")), "base_lr"),
        "more groups": (edit(lambda s: s["param_groups"].append(group(s))), "2 param groups, the optimizer has 1"),
        "fewer parameters": (edit(lambda s: group(s)["params"].pop()), "1 parameters in the checkpoint and 2"),
        "half a tuner": (edit(lambda s: group(s).pop("mechanic_step")), "mechanic_step"),
        "short accumulators": (
            edit(lambda s: group(s).update(mechanic_state=group(s)["mechanic_state"][:-1])),
            r"mechanic_state of param group 0 must be .* \(22,\), got \(21,\)",
        ),
        "text for a tensor": (edit(lambda s: group(s).update(mechanic_step="3")), "got str"),
        "other shape": (
            edit(lambda s: s["state"][1].update(mechanic_ref=torch.zeros(3))),
            r"mechanic_ref of parameter 1 is \(3,\) .*the parameter is \(4,\)",
        ),
        "Δ for x_ref": (
            edit(lambda s: s["state"][0].update(mechanic_delta=s["state"][0].pop("mechanic_ref"))),
            "has no 'mechanic_ref' for 8 of the 12 elements that had a gradient then",
        ),
        "a rest too many": (
            edit(lambda s: s["state"][0].update(mechanic_rest=torch.zeros(2, 4, dtype=torch.int16))),
            "parameters of another dtype",
        ),
        "complex": (edit(lambda s: s["state"][0].update(mechanic_ref=torch.zeros(2, 4) * 1j)), "complex64"),
        "text for options": (edit(lambda s: group(s).update(mechanic_options="3")), "options are broken: '3'"),
        "no list of groups": (lambda state: {**state, "param_groups": 3}, "no optimizer state"),
        "tuner not finite": (
            edit(lambda s: group(s)["mechanic_state"].index_fill_(0, torch.tensor(5), float("nan"))),
            "mechanic_state of param group 0 has values .* not finite",
        ),
        "step not finite": (edit(lambda s: group(s)["mechanic_step"].fill_(float("inf"))), "mechanic_step .*finite"),
        "x_ref not finite": (
            edit(lambda s: s["state"][1]["mechanic_ref"][2:].fill_(float("inf"))),
            "mechanic_ref of parameter 1 has values .* not finite",
        ),
        "no x_ref anywhere": (
            edit(lambda s: [values.pop("mechanic_ref") for values in s["state"].values()]),
            "of step 10, but has no 'mechanic_ref' for 12 of the 12 elements",
        ),
        "state of a stranger": (edit(lambda s: s["state"].update({7: s["state"][0]})), "state of parameter 7"),
        "base state of one missing": (
            edit(lambda s: s["state"][1].pop("exp_avg_sq")),
            "no 'exp_avg_sq' for parameter 1",
        ),
        "scheduler state": (edit(lambda s: group(s).update(mechanic_scheduler=[1])), None),
        "other base shape": (
            edit(lambda s: s["state"][0].update(exp_avg=torch.zeros(8))),
            r"exp_avg of parameter 0 is \(8,\) .*the parameter is \(2, 4\)",
        ),
        "other optimizer's group": (edit(lambda s: group(s).pop("betas")), "has no 'betas'"),
        "base state": (edit(lambda s: group(s).pop("lr") and s["state"].update({0: 3})), None),
    }


@pytest.mark.parametrize("breakage", breakages())
def test_a_checkpoint_that_does_not_fit_is_refused_whole(breakage: str, problem: Problem) -> None:
    def build(steps: int) -> tuple[Any, Mechanic]:
        parameters = problem.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        mechanic = Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30))
        problem.train(parameters, mechanic, steps)
        return parameters, mechanic

    change, message = breakages()[breakage]
    state = change(copy.deepcopy(build(10)[1].state_dict()))
    parameters, mechanic = build(5)
    before = snapshot(parameters, mechanic)
    with pytest.raises(Exception if message is None else ValueError, match=message):
        mechanic.load_state_dict(state)
    assert same(snapshot(parameters, mechanic), before)
    twins, twin = build(5)
    for p, m in ((parameters, mechanic), (twins, twin)):
        problem.train(p, m, range(5, 10))
    assert torch.equal(flat(parameters), flat(twins)), "the refused load left something behind"


def test_a_failure_after_everything_was_loaded_is_undone(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanics = []
    for steps in (10, 5):
        parameters = problem.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        mechanics.append(Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)))
        problem.train(parameters, mechanics[-1], steps)
    before = snapshot(parameters, mechanics[1])

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Inner, "_settle", fail)
    state_dict = laid_open(copy.deepcopy(mechanics[0].state_dict()))
    state_dict["param_groups"][0]["mechanic_scheduler"][0]["more"] = 1
    with pytest.raises(MemoryError):
        mechanics[1].load_state_dict(state_dict)
    assert same(snapshot(parameters, mechanics[1]), before)
    assert not hasattr(mechanics[1].scheduler, "more")
    assert mechanics[1].scheduler.last_epoch == 5


def test_plain_checkpoints_that_do_not_fit_are_refused(problem: Problem) -> None:
    others = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(4))]
    plain, sgd = torch.optim.AdamW(others), torch.optim.SGD(others, lr=0.1)
    for p in others:
        p.grad = torch.ones_like(p)
    plain.step()
    mechanic = Mechanic(torch.optim.AdamW(problem.parameters()))
    with pytest.raises(ValueError, match=r"exp_avg.* of parameter 0 is \(3, 3\)"):
        mechanic.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="has no 'betas'"):
        mechanic.load_state_dict(sgd.state_dict())
    assert not any(mechanic.state.values())


def test_warnings_point_at_the_callers_line(trained: Any, problem: Problem) -> None:
    _, mechanic = trained(steps=0)
    plain = torch.optim.AdamW(problem.parameters())
    with pytest.warns(UserWarning, match="nothing of a Mechanic") as record:
        mechanic.load_state_dict(plain.state_dict())
    assert record[0].filename == __file__


def test_a_warning_for_a_caller_without_a_name(trained: Any, problem: Problem) -> None:
    _, mechanic = trained(steps=0)
    state_dict = torch.optim.AdamW(problem.parameters()).state_dict()
    with pytest.warns(UserWarning, match="nothing of a Mechanic"):
        exec("load(state_dict)", {"load": mechanic.load_state_dict, "state_dict": state_dict, "__builtins__": {}})


def test_a_warning_that_no_user_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that torch has started, say: it names the line that warns."""
    monkeypatch.setattr(diagnostics, "callers", lambda: ["manic.diagnostics", "torch.optim"])
    with pytest.warns(UserWarning, match="nobody") as record:
        diagnostics.warn("nobody")
    assert "warnings.warn(" in linecache.getline(record[0].filename, record[0].lineno)


def mixed() -> tuple[list[torch.nn.Parameter], Mechanic]:
    """14 elements, 6 of them complex; stepped once."""
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=d)) for n, d in ((4, None), (6, torch.complex64), (4, None))]
    mechanic = Mechanic(torch.optim.SGD(parameters))
    for p in parameters:
        p.grad = torch.ones_like(p)
    mechanic.step()
    return parameters, mechanic


def test_what_was_trained_may_be_left_out_only_where_it_is_frozen() -> None:
    """DCP leaves out what needs no gradient, and the last step was about it nevertheless."""
    _, mechanic = mixed()
    parameters, other = mixed()
    other.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    lacking = copy.deepcopy(mechanic.state_dict())
    del lacking["state"][0]
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        other.load_state_dict(lacking)
    assert str(refused.value) == (
        "the checkpoint is of step 1, but has no 'mechanic_ref' for 4 of the 14 elements that had a gradient then. "
        "torch.distributed.checkpoint loads what it is asked for: ask with the Mechanic itself, "
        "dcp.load({'mechanic': mechanic}), or with get_state_dict, while no gradients are there, and not frozen"
    )
    parameters[0].requires_grad_(False)
    other.load_state_dict(lacking)
    assert set(other.state) == set(parameters[1:])


def test_a_step_is_tried_with_sparse_gradients_where_the_base_takes_no_others() -> None:
    """SparseAdam takes sparse gradients only."""
    parameters = [torch.nn.Parameter(torch.ones(5, 2)) for _ in range(2)]
    mechanic = Mechanic(torch.optim.SparseAdam(parameters))
    for p in parameters:
        p.grad = torch.ones_like(p).to_sparse(1)
    mechanic.step()
    for change, says in (
        (lambda values: values.pop("exp_avg"), "no 'exp_avg' for parameter 1"),
        (lambda values: values.update(exp_avg=torch.ones(5, 3)), r"exp_avg of parameter 1 is \(5, 3\)"),
    ):
        state_dict = copy.deepcopy(mechanic.state_dict())
        change(state_dict["state"][1])
        with pytest.raises(ValueError, match=says):
            mechanic.load_state_dict(state_dict)


def test_what_is_loaded_is_a_copy_unless_it_is_there_already(trained: Any) -> None:
    _, mechanic = trained(torch.optim.AdamW, 3)
    state_dict = copy.deepcopy(mechanic.state_dict())
    own = [values["mechanic_ref"] for values in state_dict["state"].values()]
    for group in state_dict["param_groups"]:
        own += [group["mechanic_step"], group["mechanic_state"]]
    _, other = trained(torch.optim.AdamW, 1)
    other.load_state_dict(state_dict)
    before = copy.deepcopy(other.state_dict())
    for tensor in own:
        tensor.fill_(7)
    assert same(other.state_dict(), before)

    # DCP loads into the tensors of the state dict, which are the live ones.
    live = {p: values["mechanic_ref"] for p, values in other.state.items()}
    other.load_state_dict(other.state_dict())
    for p, ref in live.items():
        assert other.state[p]["mechanic_ref"] is ref


def test_scalars_of_the_base_keep_their_digits() -> None:
    """torch casts them to the dtype of the parameter."""
    mechanics = []
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        mechanics.append(Mechanic(torch.optim.NAdam([p])))
        p.grad = torch.ones_like(p)
        mechanics[-1].step()
    first, second = mechanics
    (values,) = first.state.values()
    values["mu_product"].fill_(0.123456789)
    state_dict = copy.deepcopy(first.state_dict())
    state_dict["state"]["of nobody"] = 3  # which torch takes over as it is
    second.load_state_dict(state_dict)
    loaded = second.state.pop(p)
    assert torch.equal(loaded["mu_product"], torch.tensor(0.123456789))
    assert loaded["mu_product"] is not state_dict["state"][0]["mu_product"]
    assert loaded["exp_avg"].dtype == torch.bfloat16
    assert dict(second.state) == {"of nobody": 3}


def test_counts_of_steps(problem: Problem) -> None:
    """Those that were skipped are in what the log counts; of any dtype."""
    mechanics = []
    for log_every in (0, 5):
        parameters, seen = problem.parameters(), []
        mechanics.append(Mechanic(torch.optim.AdamW(parameters), log_every=log_every, log_func=seen.append))
    first, second = mechanics
    parameters = [p for group in first.param_groups for p in group["params"]]
    problem.train(parameters, first, 5)
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    first.step(), first.step()
    assert first.skipped == 2
    state_dict = copy.deepcopy(first.state_dict())
    for group in state_dict["param_groups"]:
        group["mechanic_step"] = group["mechanic_step"].double()
    second.load_state_dict(state_dict)
    assert second.param_groups[0]["mechanic_step"].dtype == torch.float32
    problem.train([p for group in second.param_groups for p in group["params"]], second, 5)
    assert [data["iter_count"] for data in seen] == [10]


def test_what_is_loaded_of_a_schedule_is_a_copy() -> None:
    """A function in it may keep a list, to which it adds."""

    class Remembering:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __call__(self, epoch: int) -> float:
            self.seen.append(epoch)
            return 0.5**epoch

    def build() -> tuple[torch.nn.Parameter, Mechanic]:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([p], lr=0.1)
        return p, Mechanic(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, Remembering()))

    given = copy.deepcopy(build()[1].state_dict())
    (p, mechanic), before = build(), copy.deepcopy(given)
    mechanic.load_state_dict(given)
    p.grad = torch.ones_like(p)
    mechanic.step()
    assert same(given, before)
    assert mechanic.scheduler is not None
    assert len(mechanic.scheduler.state_dict()["lr_lambdas"][0]["seen"]) == 2


def test_an_option_that_the_constructor_does_not_take_is_not_left_open(problem: Problem) -> None:
    """None is as good as unset where the constructor says None. (AdamW sets decoupled_weight_decay itself.)"""

    class Heavy(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr, momentum=0.9)

    given, mechanic = (
        Mechanic(Heavy(problem.parameters(), 0.1)).state_dict(),
        Mechanic(Heavy(problem.parameters(), 0.1)),
    )
    given["param_groups"][0]["momentum"] = None
    with pytest.raises(ValueError, match=r"momentum of param group 0 is None in the checkpoint, 0\.9 here"):
        mechanic.load_state_dict(given)


def test_a_scheduler_on_one_side_only(trained: Any, problem: Problem) -> None:
    _, plain = trained(torch.optim.AdamW, 3)
    optimizer = torch.optim.AdamW(problem.parameters())
    scheduled = Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9))
    scheduled_state, plain_state = (copy.deepcopy(one.state_dict()) for one in (scheduled, plain))
    with pytest.warns(UserWarning, match="options: it has no scheduler, so CosineAnnealingLR stays as it is$"):
        scheduled.load_state_dict(plain_state)
    with pytest.warns(UserWarning, match="its scheduler CosineAnnealingLR is left out, since this Mechanic has none$"):
        plain.load_state_dict(scheduled_state)


def two_groups(problem: Problem) -> Mechanic:
    """Around AdamW, with a schedule; stepped."""
    parameters = problem.parameters()
    optimizer = torch.optim.AdamW([{"params": [p], "foreach": True} for p in parameters], lr=0.1)
    mechanic = Mechanic(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30))
    problem.train(parameters, mechanic, 3)
    return mechanic


def as_dcp_leaves_it(state: dict[Any, Any]) -> None:
    """What is no tensor, under the number as a string."""
    state["1"] = {"step": state[1].pop("step")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, one, other, options, plan: options.update(base_lr=0.0), None),
        (lambda s, one, other, options, plan: options.update(base_lr=-1.0), "base_lr = -1.0 must be >= 0 and finite"),
        (lambda s, one, other, options, plan: options.update(base_lr=float("inf")), "base_lr = inf must be"),
        (lambda s, one, other, options, plan: other.update(mechanic_step=one["mechanic_step"].half()), None),
        (lambda s, one, other, options, plan: other.update(mechanic_state=one["mechanic_state"].float()), None),
        (
            lambda s, one, other, options, plan: other.update(mechanic_state=-other["mechanic_state"]),
            "mechanic_state of param group 1 differs from that of group 0, and they share one scale",
        ),
        (
            lambda s, one, other, options, plan: one.pop("mechanic_scheduler"),
            "the checkpoint has a CosineAnnealingLR, and no 'mechanic_scheduler'",
        ),
        *(
            (
                lambda s, one, other, options, plan, broken=broken: one.update(mechanic_scheduler=broken),
                "the checkpoint's state of the scheduler is broken: ",
            )
            for broken in ({0: {}}, [{}, 3], [3], {}, b"", b"PK", sealed([3]), sealed({})[:-9])
        ),
        (lambda s, one, other, options, plan: plan.update(T_max="x"), "T_max of CosineAnnealingLR is 'x' in the"),
        (lambda s, one, other, options, plan: as_dcp_leaves_it(s["state"]), None),
        (lambda s, one, other, options, plan: other.update(foreach=None), None),
        *(
            (
                lambda s, one, other, options, plan, name=name, broken=broken: other.update({name: broken}),
                f"{name} of param group 1 is {broken!r} in the checkpoint, {here!r} here",
            )
            for name, broken, here in (
                *(("foreach", "x", True), ("weight_decay", "x", 0.01), ("weight_decay", None, 0.01)),
                *(("initial_lr", float("inf"), 0.1), ("initial_lr", None, 0.1)),
            )
        ),
        (
            lambda s, one, other, options, plan: other.pop("initial_lr"),
            "param group 1 of the checkpoint has no 'initial_lr', which its scheduler needs",
        ),
        (
            lambda s, one, other, options, plan: other.update(params=one["params"]),
            "the param groups of the checkpoint have a parameter twice: [0, 0]",
        ),
        (
            lambda s, one, other, options, plan: s["state"].update({0: 3}),
            "the state of parameter 0 is 3 in the checkpoint, and must be a dict",
        ),
        (
            lambda s, one, other, options, plan: s["state"][0].update(mechanic_delta=s["state"][0]["mechanic_ref"]),
            None,  # torch has merged in the slot of another variant
        ),
    ],
)
def test_what_is_said_of_a_checkpoint(change: Any, says: str | None, problem: Problem) -> None:
    state_dict = laid_open(copy.deepcopy(two_groups(problem).state_dict()))
    one, other = state_dict["param_groups"]
    change(state_dict, one, other, one["mechanic_options"][0], one["mechanic_scheduler"][0])
    mechanic = two_groups(problem)
    if says is None:
        mechanic.load_state_dict(state_dict)
    else:
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            mechanic.load_state_dict(state_dict)
        assert says in str(refused.value)


def test_the_state_of_a_scheduler_is_copied(problem: Problem) -> None:
    state_dict, mechanic = laid_open(copy.deepcopy(two_groups(problem).state_dict())), two_groups(problem)
    mechanic.load_state_dict(state_dict)
    state_dict["param_groups"][0]["mechanic_scheduler"][0]["base_lrs"][0] = 9.0
    assert mechanic.scheduler is not None
    assert mechanic.scheduler.base_lrs == [0.1, 0.1]


def test_what_is_left_of_a_mechanic_is_a_plain_optimizers(problem: Problem) -> None:
    state_dict = copy.deepcopy(two_groups(problem).state_dict())
    for group in state_dict["param_groups"]:
        for key in [key for key in group if key.startswith("mechanic_")]:
            del group[key]
    mechanic = two_groups(problem)
    with pytest.warns(UserWarning, match="nothing of a Mechanic"):
        mechanic.load_state_dict(state_dict)
    assert mechanic.scale == 0
    assert all(torch.equal(values["mechanic_ref"], p) for p, values in mechanic.state.items())  # it begins here


def test_options_that_do_not_work(trained: Any) -> None:
    _, mechanic = trained(torch.optim.AdamW, 3)
    state_dict = copy.deepcopy(mechanic.state_dict())
    state_dict["param_groups"][0]["betas"] = (0.9, 1.0)
    with pytest.raises(
        ValueError, match="AdamW cannot step parameter 0 with the options and the state in the checkpoint: Invalid beta"
    ):
        mechanic.load_state_dict(state_dict)


def test_a_load_is_no_step_for_a_hook(trained: Any) -> None:
    """Options are tried out with a step of a stand-in, which is nobody's business."""
    _, mechanic = trained(torch.optim.AdamW, 3)
    base, calls = mechanic.base_optimizer, []
    own, every = base.register_step_pre_hook, register_optimizer_step_pre_hook
    handles = [own(lambda *_: calls.append("own")), every(lambda *_: calls.append("every"))]
    try:
        mechanic.load_state_dict(copy.deepcopy(mechanic.state_dict()))
        assert not calls
        for p in mechanic.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        mechanic.step()
        assert {"own", "every"} <= set(calls)
    finally:
        for handle in handles:
            handle.remove()


def test_a_checkpoint_says_which_sweeps_took_its_steps(trained: Any, recwarn: pytest.WarningsRecorder) -> None:
    """And a Mechanic whose steps run in others warns, keeps its own name for the next checkpoint, and goes on."""
    saved = trained()[1].state_dict()
    (written,) = saved["param_groups"][0]["mechanic_options"]
    assert written["sweeps"] == Native.name
    assert name_for(torch.device("meta")) == "eager meta"
    resumed = trained(steps=0)[1]
    resumed.load_state_dict(saved)
    assert len(recwarn) == 0
    for group in saved["param_groups"]:
        group["mechanic_options"] = ({**written, "sweeps": "eager cpu"},)
    resumed = trained(steps=0)[1]
    with pytest.warns(UserWarning, match="the eager cpu sweeps, and yours run in the C"):
        resumed.load_state_dict(saved)
    assert resumed.state_dict()["param_groups"][0]["mechanic_options"][0]["sweeps"] == Native.name


def test_options_follow_the_checkpoint_and_differences_are_named(trained: Any, problem: Problem) -> None:
    options = {"variant": "paper", "betas": (0.9, 0.99), "s_init": 1e-3}
    parameters, mechanic = trained(torch.optim.AdamW, 10, **options)
    others, other = trained(torch.optim.AdamW, 3)
    with pytest.warns(UserWarning, match="under other options") as record:
        other.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    text = str(record[0].message)
    assert "variant = 'paper' replaces 'scale_free'" in text
    assert "betas = (0.9, 0.99) replaces (0.9, 0.99, 0.999" in text
    assert "s_init = 0.001 replaces None" in text
    assert "s_decay" not in text
    with torch.no_grad():
        for p, q in zip(others, parameters, strict=True):
            p.copy_(q)
    for p, m in ((parameters, mechanic), (others, other)):
        problem.train(p, m, range(10, 20))
    assert torch.equal(flat(parameters), flat(others))


@pytest.mark.parametrize("saved", [False, True])
def test_a_scheduler_on_one_side_alone_is_named(saved: bool, problem: Problem) -> None:
    def build(scheduled: bool) -> Mechanic:
        optimizer = torch.optim.AdamW(problem.parameters(), lr=0.1)
        return Mechanic(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduled else None)

    mechanic = build(not saved)
    with pytest.warns(UserWarning, match="scheduler"):
        mechanic.load_state_dict(build(saved).state_dict())


def test_other_settings_of_the_scheduler_are_named(problem: Problem) -> None:
    """Whoever makes a run longer must know that its T_max stays: the lr would rise again after it."""

    def build(steps: int, warmup: int) -> Mechanic:
        optimizer = torch.optim.AdamW(problem.parameters(), lr=0.1)
        parts = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        ]
        return Mechanic(optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[warmup]))

    saved = build(100, 10).state_dict()
    with pytest.warns(UserWarning, match="under other options") as record:
        build(200, 20).load_state_dict(copy.deepcopy(saved))
    notes = str(record[0].message).partition(": ")[2].split("; ")
    assert sorted(notes) == [
        "T_max = 100 replaces 200 in CosineAnnealingLR",
        "milestones = [10] replaces [20] in SequentialLR",
        "total_iters = 10 replaces 20 in LinearLR",
    ]
    mechanic = build(100, 10)
    mechanic.step()
    mechanic.load_state_dict(saved)  # filterwarnings = error: where it stands is no setting


@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:the checkpoint was written under other options")
def test_what_cannot_go_on_is_found_in_a_scheduler_of_others(problem: Problem) -> None:
    def build() -> Mechanic:
        optimizer = torch.optim.AdamW(problem.parameters(), lr=0.1)
        parts = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9) for _ in range(2)]
        return Mechanic(optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2]))

    mechanic = build()
    problem.train([p for group in mechanic.param_groups for p in group["params"]], mechanic, 5)
    saved, other = laid_open(copy.deepcopy(mechanic.state_dict())), build()
    before = copy.deepcopy(other.state_dict())
    for group in saved["param_groups"]:
        group["mechanic_scheduler"][0]["_schedulers"][1]["T_max"] = 0
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        other.load_state_dict(saved)
    assert same(other.state_dict(), before)


def test_a_scheduler_that_counts_is_asked_for_nothing_that_stays(problem: Problem) -> None:
    """Whether what was loaded works is tried out, which must not be a step of its own."""

    class Counting(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            self.asked = getattr(self, "asked", 0) + 1
            for group in self.optimizer.param_groups:
                group["weight_decay"] += 0.5
            return [0.1 / self.asked for _ in self.optimizer.param_groups]

    optimizer = torch.optim.AdamW(problem.parameters(), lr=0.1)
    mechanic = Mechanic(optimizer, Counting(optimizer))
    mechanic.step()
    before = copy.deepcopy(mechanic.state_dict())
    mechanic.load_state_dict(copy.deepcopy(before))
    assert same(mechanic.state_dict(), before)


def test_a_plain_checkpoint_loads_and_the_tuner_starts_afresh(problem: Problem) -> None:
    parameters = problem.parameters()
    plain = torch.optim.AdamW(parameters, lr=0.1)
    problem.train(parameters, plain, 10)

    others = problem.parameters()
    mechanic = Mechanic(torch.optim.AdamW(others, lr=3.0))
    problem.train(others, mechanic, 10)
    with pytest.warns(
        UserWarning, match="has nothing of a Mechanic in it: the state of AdamW is loaded, and the tuner"
    ):
        mechanic.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert mechanic.scale == 0
    assert mechanic.param_groups[0]["lr"] == 0.1
    assert torch.equal(mechanic.state[others[0]]["exp_avg"], plain.state[parameters[0]]["exp_avg"])
    assert torch.equal(mechanic.state[others[0]]["mechanic_ref"], others[0])  # it begins here
    problem.train(others, mechanic, 20)
    assert mechanic.scale > 0


def test_a_mechanic_checkpoint_loads_into_the_plain_optimizer(trained: Any, problem: Problem) -> None:
    """Not the way back that is meant, but it must not fail: torch ignores the extra keys."""
    _, mechanic = trained()
    plain = torch.optim.AdamW(problem.parameters(), lr=1.0)
    plain.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    assert plain.param_groups[0]["lr"] == 1e-3
