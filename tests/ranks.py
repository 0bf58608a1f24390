"""One rank of a distributed run, on CPU with gloo: python ranks.py SCENARIO RANK WORLD FOLDER ARGUMENTS...

Every rank sees the same batch, so that a run is the same on any number of ranks up to rounding.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

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
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic

SAVED_AT, STEPS = 10, 30
BASES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


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
        dtype: torch.dtype = torch.float32,
        frozen: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.net: nn.Module = Net().to(dtype)
        self.net.unused.requires_grad_(not frozen)
        world = dist.get_world_size()
        if kind == "fsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (world,)))
        elif kind == "hsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard")))
        elif kind == "mixed":
            fully_shard(self.net.first, mesh=init_device_mesh("cpu", (world,)))
        self.model = DistributedDataParallel(self.net, find_unused_parameters=True) if kind == "ddp" else self.net
        optimizer = BASES[base](self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        self.mechanic = Mechanic(optimizer, self.schedule, **options)

    def train(self, steps: range, broken_at: int = -1) -> None:
        for t in steps:
            generator = torch.Generator().manual_seed(t)
            x = torch.randn(8, 5, generator=generator).to(next(self.net.parameters()).dtype)
            self.mechanic.zero_grad()
            (self.model(x) - x.sum(1, keepdim=True)).float().square().mean().backward()
            if t == broken_at and dist.get_rank() == dist.get_world_size() - 1:
                gradient: Any = self.net.first.weight.grad
                getattr(gradient, "_local_tensor", gradient)[0, 0] = float("nan")
            self.mechanic.step()

    def parameters(self) -> dict[str, Tensor]:
        return {name: whole(p.detach()).clone() for name, p in self.net.named_parameters()}

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep, whole. (Flattened, torch leaves out what is frozen.)"""
        state, (group, *_) = self.mechanic.state, self.mechanic.param_groups
        return {
            "tuner": group["mechanic_state"].clone(),
            "step": group["mechanic_step"].clone(),
            "epoch": self.schedule.last_epoch,
            "lr": group["lr"],
            **{
                f"{name}.{key}": whole(value).clone()
                for name, p in self.net.named_parameters()
                if p.requires_grad
                for key, value in state.get(p, {}).items()
            },
        }


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


class Collectives(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("reduce", "gather", "broadcast", "all_to_all")) and "c10d" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run(out: Path, kind: str, store_delta: str, broken_at: str) -> None:
    """A whole run; on the way, the collectives of one step."""
    one = Run(kind, frozen=False, store_delta=store_delta == "True")
    one.train(range(STEPS - 1), broken_at=int(broken_at))
    x = torch.ones(8, 5)
    one.mechanic.zero_grad()
    one.model(x).float().square().mean().backward()
    with Collectives() as collectives:
        one.mechanic.step()
    parameters, state = one.parameters(), one.state()
    write(out, {"parameters": parameters, "state": state, "collectives": collectives.names})


def rehearsal(out: Path, kind: str, base: str, dtype: str) -> None:
    """A checkpoint is taken before the first step, of two kinds; then a run as if nothing had been."""
    one = Run(kind, base, seed=1, dtype=getattr(torch, dtype))
    get_optimizer_state_dict(one.model, one.mechanic)
    assert one.schedule.last_epoch == 0
    assert one.mechanic.param_groups[0]["mechanic_step"] == 0
    # Weights that come after it are where the run starts, on the same object and in one that loads the checkpoint.
    other = Run(kind, base, seed=2, dtype=getattr(torch, dtype))
    set_optimizer_state_dict(
        other.model, other.mechanic, copy.deepcopy(get_optimizer_state_dict(one.model, one.mechanic))
    )
    fresh = Run(kind, base, dtype=getattr(torch, dtype))
    weights = copy.deepcopy(get_model_state_dict(fresh.model))
    results = []
    for each in (one, other, fresh):
        set_model_state_dict(each.model, weights)
        each.train(range(STEPS))
        results.append(each.parameters())
    write(out, {"rehearsed": results[0], "loaded": results[1], "parameters": results[2]})


def save(out: Path, kind: str, base: str, flat: str, checkpoint: str) -> None:
    one = Run(kind, base)
    one.train(range(SAVED_AT))
    options = StateDictOptions(flatten_optimizer_state_dict=flat == "True")
    model, optimizer = get_state_dict(one.model, one.mechanic, options=options)
    future = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=checkpoint)
    future.result()
    saved = one.state()
    one.train(range(SAVED_AT, STEPS))
    write(out, {"saved": saved, "parameters": one.parameters(), "state": one.state()})


def load(out: Path, kind: str, base: str, flat: str, checkpoint: str) -> None:
    one = Run(kind, base, seed=1)
    options = StateDictOptions(flatten_optimizer_state_dict=flat == "True")
    model, optimizer = get_state_dict(one.model, one.mechanic, options=options)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        one.model, one.mechanic, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    saved = one.state()
    one.train(range(SAVED_AT, STEPS))
    write(out, {"saved": saved, "parameters": one.parameters(), "state": one.state()})


def whole_states(out: Path, kind: str, dtype: str) -> None:
    """full_state_dict + cpu_offload, loaded with broadcast_from_rank0; bfloat16 keeps its float32 state."""
    one = Run(kind, "adamw", dtype=getattr(torch, dtype))
    one.train(range(SAVED_AT))
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = (copy.deepcopy(state) for state in get_state_dict(one.model, one.mechanic, options=gather))
    saved = one.state()
    one.train(range(SAVED_AT, STEPS))

    other = Run(kind, "adamw", seed=1, dtype=getattr(torch, dtype))
    if dist.get_rank() > 0:
        model, optimizer = {}, {}
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other.model, model, options=spread)
    set_optimizer_state_dict(other.model, other.mechanic, optimizer, options=spread)
    loaded = other.state()
    other.train(range(SAVED_AT, STEPS))
    write(out, {"saved": saved, "loaded": loaded, "parameters": one.parameters(), "resumed": other.parameters()})


def write(out: Path, result: dict[str, Any]) -> None:
    torch.save(result, out / f"rank{dist.get_rank()}.pt")


def main(scenario: str, rank: str, world: str, folder: str, *arguments: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rendezvous = f"file://{Path(folder).absolute() / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=int(rank), world_size=int(world))
    globals()[scenario](Path(folder), *arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
