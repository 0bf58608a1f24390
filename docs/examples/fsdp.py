"""FSDP2 training with Mechanic that goes on after the loss of a worker, on any number of processes.

    torchrun --nproc-per-node 2 docs/examples/fsdp.py --steps 120 --out out/fsdp

on GPUs (nccl) where each process of a machine has its own, else on the CPU (gloo). After a kill the same command, with
the same or another number of processes, goes on from the newest checkpoint in OUT, a folder that all processes see.
torchrun can also start the processes again by itself (elastic.py kills one, and compares):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --max-restarts 3 --nproc-per-node 2 docs/examples/fsdp.py
"""

# mypy: disable-error-code="attr-defined, import-untyped, no-untyped-call"
from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from chargpt import CharGPT, batch, corpus, loss_of, warmup_cosine
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from manic import Mechanic

BATCH = 16  # of all processes together, however many there are

warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing here changes in place


def join_group() -> torch.device:
    """Join the processes that torchrun has started; returns the device of this one."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= here:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def build(steps: int, device: torch.device) -> tuple[nn.Module, Mechanic]:
    torch.manual_seed(0)  # the same weights on every rank, before each keeps its shard of them
    model = CharGPT().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, Mechanic(optimizer, warmup_cosine(optimizer, steps, warmup=steps // 10))


def state_of(model: nn.Module, mechanic: Mechanic) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, mechanic)
    return {"model": model_state, "optimizer": optimizer_state}


def complete(out: Path) -> dict[int, Path]:
    """The checkpoints in `out` by their step."""
    return {int(path.name.removeprefix("step-")): path for path in out.glob("step-*")}


def save(model: nn.Module, mechanic: Mechanic, step: int, out: Path) -> None:
    """Write the checkpoint of `step`. Whenever the job is killed, one that is whole stays, and only such are found.

    Hence the order: all ranks write into a folder of another name; when all are through, rank 0 renames it, which
    happens wholly or not at all; only then do the older ones go.
    """
    partial = out / "partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a job killed while it wrote
    dist.barrier()
    dcp.save(state_of(model, mechanic), checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        older = complete(out).values()
        partial.rename(out / f"step-{step}")
        for path in older:
            shutil.rmtree(path)


def resume(model: nn.Module, mechanic: Mechanic, out: Path) -> int:
    """Go on from the newest checkpoint, if there is one; returns the step to begin with."""
    newest = [max(complete(out), default=0)]
    dist.broadcast_object_list(newest)  # rank 0's word counts: not every rank need see the same in `out`
    if newest[0] > 0:
        state = state_of(model, mechanic)  # what to load into
        dcp.load(state, checkpoint_id=out / f"step-{newest[0]}")
        set_state_dict(model, mechanic, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return newest[0]


def train(steps: int, every: int, out: Path, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model, mechanic = build(steps, device)
    start = resume(model, mechanic, out)
    text = corpus()[0]
    with tqdm(range(start, steps), initial=start, total=steps, disable=None if rank == 0 else True) as bar:
        for step in bar:
            # A function of the step alone: a resumed run sees the same data. (One with dropout would also have to
            # seed each step, or keep the generators' states.)
            part = batch(text, step, BATCH)[rank::world].to(device)
            # FSDP takes the mean over ranks; the factor makes that the mean over the batch if it does not split evenly.
            loss = loss_of(model, part) * (len(part) * world / BATCH)
            loss.backward()
            scale, lr = float(mechanic.scale), mechanic.effective_lr()[0]
            mechanic.step()
            mechanic.zero_grad()  # before a checkpoint: get_state_dict expects no gradients
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                with (out / "history.jsonl").open("a") as file:
                    record = {"step": step, "loss": mean.item(), "scale": scale, "effective_lr": lr}
                    file.write(json.dumps(record) + "\n")
                bar.set_postfix(loss=f"{mean.item():.3f}", scale=f"{scale:.2e}", effective_lr=f"{lr:.2e}")
            if (step + 1) % every == 0:
                save(model, mechanic, step + 1, out)

    # Every rank takes part in the gathering; only rank 0 gets the result.
    parameters = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(parameters, out / "final.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="steps of the whole run (default: 120)")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp"), help="folder of the results (default: out/fsdp)")
    args = parser.parse_args()
    if args.steps < 1 or args.every < 1:
        parser.error("--steps and --every must be at least 1")
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 docs/examples/fsdp.py")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        # Else the new processes may find the addresses of the dead ones in torchrun's store, and wait for them.
        parser.error("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment; see --help")
    if int(os.environ["WORLD_SIZE"]) > BATCH:
        parser.error(f"a global batch of {BATCH} is enough for {BATCH} processes at most")

    device = join_group()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"rank{dist.get_rank()}.pid").write_text(str(os.getpid()))  # for elastic.py, which kills one
    train(args.steps, args.every, args.out, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
