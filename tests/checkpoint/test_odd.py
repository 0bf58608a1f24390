"""Checkpoints of runs that are a little out of the ordinary, and the forms that torch's get_state_dict gives them."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from resuming import same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler
from training import Problem, flat, pulled

from manic import Mechanic, chain
from manic.checkpoint.inspection import inspect

ignore = pytest.mark.filterwarnings(
    "ignore:The epoch parameter in `scheduler.step", "ignore:torch.distributed is", "ignore:TypedStorage is deprecated"
)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process, which full_state_dict wants."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: nn.Module, m: Any, steps: int) -> None:
    x = torch.linspace(-1, 1, 24).view(8, 3)
    for _ in range(steps):
        (model(x) - 1).square().mean().backward()
        m.step()
        m.zero_grad()


def build(schedule: Callable[[Any], Any] = lambda base: None, **options: Any) -> tuple[nn.Module, Mechanic]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    base = AdamW(model.parameters(), lr=0.01)
    return model, Mechanic(base, schedule(base), **options)


class Odd(LRScheduler):
    """Keeps what torch's schedulers do not."""

    def __init__(self, optimizer: Any) -> None:
        self.seen: set[int] = set()
        self.phase: Any = {"name": "warm"}
        self.grows: list[Any] = []
        self.never = float("nan")
        self.later: Any = 0.0
        self.weights = [torch.ones(2), torch.ones(2)]
        self.root = 1j
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.seen.add(self.last_epoch)
        self.grows = [*self.grows, self.last_epoch]
        self.phase = {"name": "warm"} if self.last_epoch < 3 else {"at": 3}
        self.later = None if self.last_epoch < 3 else float("inf")
        return [lr / (1 + len(self.seen)) for lr in self.base_lrs]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "multistep": lambda o: schedulers.MultiStepLR(o, [2, 6]),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=4), schedulers.MultiStepLR(o, [3, 6])], [6]
    ),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "odd": Odd,
}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FORMS = {
    "file": None,
    "full": FULL,
    "broadcast": FULL,
    "offloaded": StateDictOptions(cpu_offload=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


@ignore
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_on_in_every_form(schedule: str, form: str) -> None:
    """get_state_dict takes dicts, lists and tuples apart, makes strings of numbers, and refuses sets."""
    model, m = build(SCHEDULES[schedule])
    train(model, m, 4)
    options = FORMS[form]
    if options is None:
        saved: Any = model.state_dict(), m.state_dict()
    else:
        saved = get_state_dict(model, m, options=options)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    of_model, of_mechanic = torch.load(file, weights_only=True)
    other, n = build(SCHEDULES[schedule])
    if options is None:
        other.load_state_dict(of_model)
        n.load_state_dict(of_mechanic)
    else:
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        how = spread if form == "broadcast" else options
        set_state_dict(other, n, model_state_dict=of_model, optim_state_dict=of_mechanic, options=how)
    for one in ((model, m), (other, n)):
        train(*one, 4)
    assert same(m.state_dict(), n.state_dict())
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    if schedule == "multistep":
        assert n.scheduler.milestones == Counter([2, 6])


@ignore
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("full", [False, True])
def test_the_state_of_the_plain_optimizer_loads_in_every_form(full: bool, tmp_path: Path) -> None:
    """With full_state_dict torch merges it into the state that we create before the first step."""
    model, _ = build()
    plain = AdamW(model.parameters(), lr=0.01)
    train(model, plain, 5)
    options = StateDictOptions(full_state_dict=full)
    of_model, of_optimizer = get_state_dict(model, plain, options=options)
    other, m = build()
    with pytest.warns(UserWarning, match="nothing of a Mechanic in it"):
        set_state_dict(other, m, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    whole = get_state_dict(other, m)
    dcp.save(dict(zip("mo", whole, strict=True)), checkpoint_id=tmp_path / "dcp")
    train(other, m, 1)
    assert m.state[other.weight]["step"] == 6
    last, n = build()
    state = dict(zip("mo", get_state_dict(last, n), strict=True))
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    set_state_dict(last, n, model_state_dict=state["m"], optim_state_dict=state["o"])
    train(last, n, 1)
    assert n.state[last.weight]["step"] == 6


@ignore
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("variant", ["paper", "frozen"])
def test_another_kind_of_state_loads_into_a_fresh_mechanic(variant: str) -> None:
    """With full_state_dict it comes with the slots that the fresh one has."""
    model, m = build(**({"variant": "paper", "s_init": 1e-2} if variant == "paper" else {}))
    train(model, m, 20)
    if variant == "frozen":
        m.freeze()
    options = StateDictOptions(full_state_dict=True)
    of_model, of_mechanic = copy.deepcopy(get_state_dict(model, m, options=options))
    other, n = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_state_dict(other, n, model_state_dict=of_model, optim_state_dict=of_mechanic, options=options)
    for one in ((model, m), (other, n)):
        train(*one, 4)
    assert same(m.state_dict()["state"], n.state_dict()["state"])
    assert all(map(torch.equal, model.parameters(), other.parameters()))


# ---------------------------------------------------------------------- refused


def test_a_refused_load_leaves_the_groups_of_a_chain_in_their_order() -> None:
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (3, 4, 5))
    sgd = SGD([a], lr=0.1)
    both = chain(sgd, AdamW([b], lr=0.1))
    assert len(both.param_groups) == 2
    sgd.add_param_group({"params": [c]})
    m = Mechanic(both, schedulers.LambdaLR(both, [lambda t: 1.0, lambda t: 0.1, lambda t: 0.01]))
    pulled(b, m, 3)
    bad = copy.deepcopy(m.state_dict())
    del bad["state"][1]["step"]
    before = [(group["params"], group["lr"]) for group in m.param_groups]
    with pytest.raises(ValueError, match="step"):
        m.load_state_dict(bad)
    after = [(group["params"], group["lr"]) for group in m.param_groups]
    assert [lr for _, lr in after] == [lr for _, lr in before]
    assert [params[0] is other[0] for (params, _), (other, _) in zip(before, after, strict=True)] == [True] * 3


class Heard(LRScheduler):
    """An attribute that the training loop holds too; and one that weights_only does not admit."""

    def __init__(self, optimizer: Any, losses: dict[str, float]) -> None:
        self.losses, self.window = losses, deque([1.0], 3)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [lr * self.losses["last"] for lr in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.window = deque(state_dict.pop("window"), 3)
        super().load_state_dict(state_dict)


@pytest.mark.filterwarnings("ignore:the checkpoint leaves out 'window'")
def test_a_refused_load_leaves_the_objects_of_a_schedule_where_they_were() -> None:
    losses = {"last": 1.0}
    model, m = build(lambda base: Heard(base, losses))
    train(model, m, 2)
    with pytest.raises(ValueError, match="0 param groups"):
        m.load_state_dict({"state": {}, "param_groups": []})
    losses["last"] = 0.5
    train(model, m, 1)
    assert m.scheduler.losses is losses
    assert m.param_groups[0]["lr"] == 0.005
    m.load_state_dict(copy.deepcopy(m.state_dict()))  # the window, which it leaves out, stays as it is
    assert m.scheduler.window == deque([1.0], 3)


# ---------------------------------------------------------------------- accepted


@pytest.mark.parametrize("of", ["plain", "mechanic"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: schedulers.OneCycleLR(o, 0.01, total_steps=20),
        lambda o: schedulers.LinearLR(o, total_iters=5),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
    ],
    ids=["onecycle", "linear", "swa"],
)
@ignore
def test_a_checkpoint_without_a_schedule_leaves_the_one_that_is_here(schedule: Any, of: str) -> None:
    model, m = build()
    if of == "plain":
        plain = AdamW(model.parameters(), lr=0.01)
        train(model, plain, 3)
        saved = plain.state_dict()
    else:
        train(model, m, 3)
        saved = m.state_dict()
    other, n = build(schedule)
    last, alone = build(schedule)
    with pytest.warns(UserWarning, match=r"no scheduler, so|nothing of a Mechanic"):
        n.load_state_dict(saved)
    for _ in range(8):
        train(other, n, 1)
        train(last, alone, 1)
        assert n.param_groups[0]["lr"] == alone.param_groups[0]["lr"]


def test_momentum_that_began_in_mid_run(problem: Problem) -> None:
    """SGD creates its buffer when there is momentum for the first time."""
    parameters = problem.parameters()
    m = Mechanic(SGD(parameters, lr=0.1))
    problem.train(parameters, m, 10)
    m.param_groups[0]["momentum"] = 0.9
    others = problem.parameters()
    n = Mechanic(SGD(others, lr=0.1))
    n.load_state_dict(copy.deepcopy(m.state_dict()))
    for q, p in zip(others, parameters, strict=True):
        q.data.copy_(p.data)
    for one in ((parameters, m), (others, n)):
        problem.train(*one, range(10, 15))
    assert torch.equal(flat(parameters), flat(others))
    saved = m.state_dict()
    lost = copy.deepcopy(saved)
    del lost["state"][0]["momentum_buffer"]
    with pytest.raises(ValueError, match="no 'momentum_buffer' for parameter 0"):
        n.load_state_dict(lost)


@pytest.mark.parametrize("what", ["one", "all", "group"])
def test_state_that_the_user_has_taken_out(what: str, problem: Problem) -> None:
    """It is not missing in the checkpoint that is written then."""
    parameters = problem.parameters()
    m = Mechanic(AdamW([{"params": [p]} for p in parameters], lr=1e-3))
    problem.train(parameters, m, 20)
    if what == "all":
        m.state.clear()
    else:
        m.state.pop(parameters[1])
    if what == "group":
        del m.param_groups[1], parameters[1]
    saved = copy.deepcopy(m.state_dict())
    n = Mechanic(AdamW([{"params": [nn.Parameter(p.detach().clone())]} for p in parameters], lr=1e-3))
    n.load_state_dict(saved)
    assert torch.equal(n.scale, m.scale)
    if what == "one":
        del saved["state"][0]
        with pytest.raises(ValueError, match="its 'state' is empty"):
            n.load_state_dict(saved)


def test_a_base_whose_hook_copies_its_state_dict(problem: Problem) -> None:
    parameters = problem.parameters()
    base = AdamW(parameters, lr=1e-3)
    base.register_state_dict_post_hook(lambda _, state_dict: copy.deepcopy(state_dict))
    m = Mechanic(base)
    problem.train(parameters, m, 5)
    saved = m.state_dict()
    problem.train(parameters, m, range(5, 10))
    m.load_state_dict(saved)
    assert m.param_groups[0]["mechanic_step"] == 5


def test_numbers_of_numpy_inside_a_setting(problem: Problem) -> None:
    m = Mechanic(AdamW(problem.parameters(), lr=1e-3, betas=(numpy.float64(0.9), 0.99)))
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["betas"] == (0.9, 0.99)


def test_what_the_user_does_to_a_state_dict_stays_there(problem: Problem) -> None:
    m = Mechanic(AdamW(problem.parameters(), lr=1e-3))
    m.state_dict()["param_groups"][0]["mechanic_options"][0].clear()
    assert m.state_dict()["param_groups"][0]["mechanic_options"][0]["format"] == 3


@ignore
def test_a_log_begins_with_the_first_step() -> None:
    """Not with the step of zeros by which get_state_dict makes an optimizer create its state."""
    told: list[Any] = []
    model, m = build(log_func=told.append, log_every=2)
    get_state_dict(model, m)
    assert told == []
    train(model, m, 4)
    assert [one["iter_count"] for one in told] == [2, 4]


# ---------------------------------------------------------------------- inspect


def test_inspect_counts_groups_as_metrics_does(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
    m = Mechanic(AdamW([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.01, 0.01, 0.05), strict=True)]))
    for p in parameters:
        pulled(p, m, 5)
    torch.save(([torch.ones(3)], m.state_dict()), tmp_path / "tuple.pt")
    (found,) = inspect(tmp_path / "tuple.pt")
    assert found.as_dict().items() >= m.metrics().items()


@ignore
def test_inspect_knows_a_submodule_called_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"state": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))})
    m = Mechanic(AdamW(model.parameters(), lr=0.01))
    train(nn.Sequential(*model["state"]), m, 3)
    for options in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        _, state = get_state_dict(model, m, options=options)
        torch.save({"optimizer": state}, tmp_path / "checkpoint.pt")
        (found,) = inspect(tmp_path / "checkpoint.pt")
        assert (found.tensors, found.numel) == (4, 21)
        assert found.sizes["x_ref"] == 84
