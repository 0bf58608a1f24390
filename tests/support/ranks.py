"""One rank of distributed runs, on CPU with gloo: python ranks.py RANK WORLD FOLDER

FOLDER/jobs.json lists what to run, one after another: [number, scenario, *arguments]. Every rank leaves
FOLDER/<number>-<rank>.pt. Every rank sees the same batch, so that a run is the same on any number of ranks up to
rounding.
"""

from __future__ import annotations

import copy
import json
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic, algorithm, chain

SAVED_AT, STEPS = 10, 30
BASES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "chain": lambda p: chain(
        torch.optim.SGD([q for q in p if q.ndim == 2], lr=2e-2, momentum=0.9),  # torch's Muon fails on sharded ones
        torch.optim.AdamW([q for q in p if q.ndim != 2], lr=1e-3),
    ),
}


def free_port() -> int:
    """A port that nobody listens on at this moment, for processes that are to meet there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


class Net(nn.Module):
    """Odd sizes (uneven shards), a bias of 1 element (an empty shard) and a layer that is never used.

    That one is frozen where a checkpoint is taken: torch refuses one in which a trainable parameter has no state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(5, 7), nn.Linear(7, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Run:
    """A model that is plain, or spread in one of torch's ways, with its Mechanic."""

    def __init__(
        self,
        kind: str,
        base: str = "adamw",
        seed: int = 0,
        dtype: str = "float32",
        frozen: bool = True,
        groups: int = 1,
        wrapped: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.net: nn.Module = Net().to(getattr(torch, dtype))
        self.net.unused.requires_grad_(not frozen)
        if kind == "fsdp1-flat":
            del self.net.unused  # what is frozen cannot be in one flat parameter with the rest
        self.model = self.net
        world, rank = dist.get_world_size(), dist.get_rank()
        if kind == "fsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (world,)))
        elif kind == "hsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard")))
        elif kind == "mixed":
            fully_shard(self.net.first, mesh=init_device_mesh("cpu", (world,)))
        elif kind == "ddp":
            self.model = DistributedDataParallel(self.net, find_unused_parameters=True)
        elif kind in ("fsdp1", "fsdp1-flat"):
            spread: dict[str, Any] = {
                "device_mesh": init_device_mesh("cpu", (world,)),
                "device_id": torch.device("cpu"),
            }
            self.model = FullyShardedDataParallel(self.net, use_orig_params=kind == "fsdp1", **spread)
            options["process_group"] = dist.group.WORLD
        self.kind = kind
        parameters = list(self.model.parameters())
        if groups > 1:
            parameters = [{"params": parameters[i::groups]} for i in range(groups)]  # type: ignore[misc]
        optimizer = BASES[base](parameters)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        self.mechanic: Any = Mechanic(optimizer, self.schedule, **options) if wrapped else optimizer
        self.last = rank == world - 1

    def train(self, steps: range, broken_at: int = -1) -> None:
        dtype = next(self.net.parameters()).dtype
        for t in steps:
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t)).to(dtype)
            self.mechanic.zero_grad()
            (self.model(x) - x.sum(1, keepdim=True)).float().square().mean().backward()
            if t == broken_at and self.last:
                gradient: Any = next(p.grad for p in self.net.parameters() if p.grad is not None and p.grad.numel())
                getattr(gradient, "_local_tensor", gradient).view(-1)[0] = float("nan")
            self.mechanic.step()
            if not isinstance(self.mechanic, Mechanic):
                self.schedule.step()

    def parameters(self) -> dict[str, Tensor]:
        whole_ones = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        return {name: p.detach().clone() for name, p in whole_ones.items()}

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep, whole. (What is frozen, torch leaves out.)"""
        self.mechanic.zero_grad()
        options = StateDictOptions(full_state_dict=True)
        state = get_optimizer_state_dict(self.model, self.mechanic, options=options)["state"]
        group = self.mechanic.param_groups[0]
        return {
            "tuner": group["mechanic_state"][:-2].clone(),  # the last two are a rank's own shares
            "step": group["mechanic_step"].clone(),
            "epoch": self.schedule.last_epoch,
            "lr": group["lr"],
            **{
                f"{name}.{key}": value.clone()
                for name, values in state.items()
                for key, value in values.items()
                if not name.startswith("unused")
            },
        }

    def here(self) -> list[Tensor]:
        """What lies on this rank: parameters, state and tuner."""
        tensors = [p.detach() for p in self.net.parameters()]
        tensors += [value for p in self.model.parameters() for value in self.mechanic.state.get(p, {}).values()]
        tensors.append(self.mechanic.param_groups[0]["mechanic_state"])
        return [local(t).clone() for t in tensors]


def local(t: Any) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


class Collectives(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("reduce", "gather", "broadcast", "all_to_all")) and "c10d" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run(kind: str, how: str, broken_at: str) -> dict[str, Any]:
    """A whole run; on the way, the collectives of one step."""
    # Unused parameters have no gradient. (FSDP1 gives them one of zeros: there they are frozen.)
    options: dict[str, Any] = {"variant": "paper", "s_init": 1e-2} if how == "paper" else {}
    one = Run(kind, frozen=kind == "fsdp1", **options)
    with patch.object(algorithm, "kernels_for", algorithm.kernels_for if how != "eager" else lambda _: None):
        one.train(range(STEPS - 1), broken_at=int(broken_at))
        x = torch.ones(8, 5)
        one.mechanic.zero_grad()
        one.model(x).float().square().mean().backward()
        with Collectives() as collectives:
            one.mechanic.step()
        tuner = one.mechanic.param_groups[0]["mechanic_state"]
        return {"parameters": one.parameters(), "tuner": tuner, "collectives": collectives.names}


def pipeline(broken_at: str, checkpoint: str) -> dict[str, Any]:
    """Two stages, one on each rank; half-way each is saved under a name of its own, and resumed by a new one."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, world = dist.get_rank(), dist.get_world_size()
    collectives: list[str] = []
    for lives in (range(SAVED_AT), range(SAVED_AT, STEPS)):
        torch.manual_seed(0)
        parts = [nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 1)]
        stages = parts[rank : rank + 1] if world == 2 else parts
        parameters = [p for part in stages for p in part.parameters()]
        group = dist.group.WORLD if world == 2 else None
        mechanic = Mechanic(torch.optim.AdamW(parameters, lr=1e-3), process_group=group)
        mine: Any = {f"model {rank}": nn.ParameterList(parameters), f"mechanic {rank}": mechanic}
        if lives.start > 0:
            dcp.load(mine, checkpoint_id=checkpoint)
        schedule = ScheduleGPipe(PipelineStage(stages[0], rank, world, torch.device("cpu")), 2, F.mse_loss)
        for t in lives:
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t))
            y = x.sum(1, keepdim=True)
            mechanic.zero_grad()
            if world == 1:
                F.mse_loss(parts[1](parts[0](x)), y).backward()
            elif rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=y)
            if t == int(broken_at) and rank == world - 1:
                parameters[-1].grad[0] = float("nan")  # type: ignore[index]
            with Collectives() as counted:
                mechanic.step()
            collectives = counted.names
        mechanic.zero_grad()
        if lives.start == 0:
            dcp.save(mine, checkpoint_id=checkpoint)
    tuner = mechanic.param_groups[0]["mechanic_state"]
    return {"parameters": [p.detach() for p in parameters], "tuner": tuner, "collectives": collectives}


def rehearsal(kind: str, base: str, dtype: str) -> dict[str, Any]:
    """A checkpoint is taken before the first step, of two kinds; then a run as if nothing had been."""
    one = Run(kind, base, seed=1, dtype=dtype)
    get_optimizer_state_dict(one.model, one.mechanic)
    assert one.schedule.last_epoch == 0
    assert one.mechanic.param_groups[0]["mechanic_step"] == 0
    # Weights that come after it are where the run starts, on the same object and in one that loads the checkpoint.
    other = Run(kind, base, seed=2, dtype=dtype)
    set_optimizer_state_dict(
        other.model, other.mechanic, copy.deepcopy(get_optimizer_state_dict(one.model, one.mechanic))
    )
    fresh = Run(kind, base, dtype=dtype)
    weights = copy.deepcopy(get_model_state_dict(fresh.model))
    results = []
    for each in (one, other, fresh):
        set_model_state_dict(each.model, weights)
        each.train(range(STEPS))
        results.append(each.parameters())
    return {"rehearsed": results[0], "loaded": results[1], "parameters": results[2]}


def write(one: Run, route: str, checkpoint: str) -> None:
    """The checkpoint of a run, by one of the routes of docs/checkpoints.md."""
    one.mechanic.zero_grad()
    if route == "stateful":
        dcp.save({"model": get_model_state_dict(one.model), "mechanic": one.mechanic}, checkpoint_id=checkpoint)
        return
    options = StateDictOptions(flatten_optimizer_state_dict=route == "flat")
    model, optimizer = get_state_dict(one.model, one.mechanic, options=options)
    dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=checkpoint).result()


def read(one: Run, route: str, checkpoint: str) -> None:
    if route == "stateful":
        model = get_model_state_dict(one.model)
        dcp.load({"model": model, "mechanic": one.mechanic}, checkpoint_id=checkpoint)
        set_model_state_dict(one.model, model)
        return
    options = StateDictOptions(flatten_optimizer_state_dict=route == "flat")
    model, optimizer = get_state_dict(one.model, one.mechanic, options=options)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=checkpoint)
    model, optimizer = state["model"], state["optimizer"]
    set_state_dict(one.model, one.mechanic, model_state_dict=model, optim_state_dict=optimizer, options=options)


def save(kind: str, base: str, dtype: str, route: str, checkpoint: str) -> dict[str, Any]:
    one = Run(kind, base, dtype=dtype)
    one.train(range(SAVED_AT))
    write(one, route, checkpoint)
    saved = one.state()
    one.train(range(SAVED_AT, STEPS))
    return {"saved": saved, "parameters": one.parameters(), "state": one.state()}


def load(kind: str, base: str, dtype: str, route: str, checkpoint: str) -> dict[str, Any]:
    one = Run(kind, base, seed=1, dtype=dtype)
    read(one, route, checkpoint)
    saved = one.state()
    one.train(range(SAVED_AT, STEPS))
    return {"saved": saved, "parameters": one.parameters(), "state": one.state()}


def settle(kind: str, how: str, checkpoint: str) -> dict[str, Any]:
    """A run whose scale is frozen half-way, or folded into the plain optimizer, and its checkpoint of that moment."""
    one = Run(kind)
    one.train(range(SAVED_AT))
    if how == "unwrapped":
        one.mechanic = one.mechanic.unwrap()
        dcp.save({"schedule": one.schedule}, checkpoint_id=f"{checkpoint}-schedule")
    else:
        one.mechanic.freeze()
    write(one, "nested", checkpoint)
    one.train(range(SAVED_AT, STEPS))
    return {"parameters": one.parameters()}


def settled(kind: str, how: str, checkpoint: str) -> dict[str, Any]:
    one = Run(kind, seed=1, wrapped=how != "unwrapped")
    if how == "unwrapped":
        dcp.load({"schedule": one.schedule}, checkpoint_id=f"{checkpoint}-schedule")
    else:
        one.mechanic.freeze()
    read(one, "nested", checkpoint)
    one.train(range(SAVED_AT, STEPS))
    return {"parameters": one.parameters()}


def whole_states(source: str, target: str, dtype: str) -> dict[str, Any]:
    """full_state_dict (+ cpu_offload, where torch can), loaded with broadcast_from_rank0, or from all ranks."""
    one = Run(source, "adamw", dtype=dtype)
    one.train(range(SAVED_AT))
    one.mechanic.zero_grad()
    # With FSDP1, torch 2.13 crashes in its own state_dict on the CPU; and it wants the state on every rank.
    offload = not (source + target).count("fsdp1") and source != "plain"
    gather = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    model = copy.deepcopy(get_model_state_dict(one.model, options=StateDictOptions(full_state_dict=True)))
    optimizer = copy.deepcopy(get_optimizer_state_dict(one.model, one.mechanic, options=gather))
    saved = one.state()
    one.train(range(SAVED_AT, STEPS))

    other = Run(target, "adamw", seed=1, dtype=dtype)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=offload)
    if spread.broadcast_from_rank0 and dist.get_rank() > 0:
        model, optimizer = {}, {}
    set_model_state_dict(other.model, model, options=spread)
    set_optimizer_state_dict(other.model, other.mechanic, optimizer, options=spread)
    loaded = other.state()
    other.train(range(SAVED_AT, STEPS))
    return {"saved": saved, "loaded": loaded, "parameters": one.parameters(), "resumed": other.parameters()}


def refused(checkpoint: str) -> dict[str, Any]:
    """Checkpoints that do not fit: for each, the error on this rank, and whether the live run goes on untouched."""
    rank, world = dist.get_rank(), dist.get_world_size()
    good = Run("fsdp")
    good.train(range(SAVED_AT))
    for route in ("nested", "stateful"):
        write(good, route, f"{checkpoint}-{route}")
    other = Run("fsdp", "sgd")
    other.train(range(SAVED_AT))
    write(other, "nested", f"{checkpoint}-sgd")
    dist.barrier()
    if rank == 0:
        for route in ("nested", "stateful"):
            shutil.copytree(f"{checkpoint}-{route}", f"{checkpoint}-{route}-cut")
            file = Path(f"{checkpoint}-{route}-cut", "__1_0.distcp")
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
        shutil.copytree(f"{checkpoint}-nested", f"{checkpoint}-torn")
        Path(f"{checkpoint}-torn", ".metadata").write_bytes(b"torn")
    dist.barrier()
    whole_state = get_optimizer_state_dict(good.model, good.mechanic, options=StateDictOptions(full_state_dict=True))
    whole_state = copy.deepcopy(whole_state)

    def poisoned(one: Run) -> None:
        state = copy.deepcopy(good.mechanic.state_dict())
        if rank == world - 1:
            local(state["state"][0]["mechanic_ref"]).fill_(float("nan"))
        one.mechanic.load_state_dict(state)

    def alone(one: Run) -> None:
        state = copy.deepcopy(good.mechanic.state_dict())
        for values in state["state"].values():
            values.update({key: local(value) for key, value in values.items()})
        one.mechanic.load_state_dict(state)

    # What is attempted, and the options of the Run that it is attempted on.
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "other base": (lambda one: read(one, "nested", f"{checkpoint}-nested"), {"base": "adam"}),
        "missing keys": (lambda one: read(one, "nested", f"{checkpoint}-sgd"), {}),
        "groups": (lambda one: read(one, "stateful", f"{checkpoint}-stateful"), {"groups": 2}),
        "cut": (lambda one: read(one, "nested", f"{checkpoint}-nested-cut"), {}),
        "cut, stateful": (lambda one: read(one, "stateful", f"{checkpoint}-stateful-cut"), {}),
        "torn": (lambda one: read(one, "nested", f"{checkpoint}-torn"), {}),
        "no folder": (lambda one: read(one, "stateful", f"{checkpoint}-nowhere"), {}),
        "plain into sharded": (lambda one: set_optimizer_state_dict(one.model, one.mechanic, whole_state), {}),
        "poisoned on one rank": (poisoned, {}),
        "another topology": (alone, {}),
    }
    results = {}
    untouched: dict[str, list[Tensor]] = {}
    for name, (attempt, options) in cases.items():
        if str(options) not in untouched:
            twin = Run("fsdp", seed=1, **options)
            twin.train(range(STEPS))
            untouched[str(options)] = twin.here()
        # A run that has not begun is as good as new. One that is under way keeps every bit, unless dcp.load, which
        # writes in place, has read well until the file turned out to be cut, or the base to be another one.
        for steps in (0,) if name.startswith(("cut", "other base")) else (0, SAVED_AT):
            one = Run("fsdp", seed=1, **options)
            one.train(range(steps))
            one.mechanic.zero_grad()
            message, before, weights = "", one.here(), copy.deepcopy(get_model_state_dict(one.model))
            try:
                attempt(one)
            except BaseException as error:  # torch's CheckpointException is one
                message = f"{type(error).__name__}: {error}"
            intact = steps == 0 or equal(before, one.here())
            set_model_state_dict(one.model, weights)  # into the model dcp.load writes in place as well
            one.train(range(steps, STEPS))
            results[f"{name} at {steps}"] = {
                "message": message,
                "intact": intact and equal(one.here(), untouched[str(options)]),
            }
    return results


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def main(rank: str, world: str, folder: str) -> None:
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", "(?s).*(Mechanic|tuner|something else|format 1)")  # what manic complains of
    torch.set_num_threads(1)
    rendezvous = f"file://{Path(folder).absolute() / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=int(rank), world_size=int(world))
    for number, scenario, *arguments in json.loads(Path(folder, "jobs.json").read_text()):
        result = globals()[scenario](*arguments)
        torch.save(result, Path(folder, f"{number}-{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
