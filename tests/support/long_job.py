"""A long job that is killed and moved: python tests/support/long_job.py OUT [--steps 10000] [--kills 20]

A character GPT in bfloat16 under FSDP2: AdamW, cosine schedule, two micro-batches per step, clipping, a checkpoint
every 100 steps.

1. The job runs to its end on 1, on 2 and on 4 processes.
2. On 2 processes it is killed (SIGKILL to all) at random moments, and starts again. It must end with the same bits.
3. It begins on 1 process and is killed, continues on 2 and is killed, and ends on 4. It must end where the others
   ended, within CLOSE of the distance that they moved.

Every process computes the gradient of the whole batch, so that the gradients do not depend on the number of processes.
Only the order in which manic and the clipping add up over the processes depends on it.
"""

# mypy: disable-error-code="attr-defined, import-untyped, no-untyped-call"
from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "examples"))
EVERY = 100  # steps between two checkpoints
BATCH, MICRO = 8, 2  # windows in a micro-batch, micro-batches in a step
NORM = 1.0  # to which the gradients are clipped
CLOSE = 1e-6


def work(out: Path, steps: int) -> None:
    """One of the processes."""
    import fsdp
    import torch.distributed as dist
    from chargpt import batch, corpus, loss_of, warmup_cosine
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from manic import Mechanic

    torch.set_num_threads(1)
    fsdp.join_group()
    model = initial()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mechanic = Mechanic(optimizer, warmup_cosine(optimizer, steps, warmup=steps // 10))
    parameters = list(model.parameters())
    begin = fsdp.resume(model, mechanic, out)
    text = corpus()[0]
    for step in range(begin, steps):
        for micro in range(MICRO):
            (loss_of(model, batch(text, MICRO * step + micro, BATCH)) / MICRO).backward()
        # In float64: clip_grad_norm_ adds up norms in bfloat16, where the order decides over the third digit.
        grads = [p.grad.to_local() for p in parameters]
        squares = torch.stack([g.double().square().sum() for g in grads]).sum()
        dist.all_reduce(squares)
        for g in grads:
            g.mul_(min(1.0, NORM / float(squares.sqrt())))
        mechanic.step()
        mechanic.zero_grad()
        if (step + 1) % EVERY == 0:
            fsdp.save(model, mechanic, step + 1, out)
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(found, out / "final.partial")
        (out / "final.partial").rename(out / "final.pt")
    dist.barrier()
    os._exit(0)  # torch sometimes aborts while it takes down its threads


def start(out: Path, steps: int, processes: int) -> subprocess.Popen[bytes]:
    """The job on so many processes, in a session of its own."""
    out.mkdir(parents=True, exist_ok=True)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (out / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *torchrun, __file__, str(out), "--steps", str(steps), "--worker"],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def initial() -> nn.Module:
    """The model, before it is cut into shards."""
    from chargpt import CharGPT

    torch.manual_seed(0)
    model: nn.Module = CharGPT(layers=1, width=32, heads=2).to(torch.bfloat16)
    return model


def flat(state: dict[str, Tensor]) -> Tensor:
    """All parameters of a state dict, float64."""
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])


def newest(out: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in out.glob("step-*")), default=0)


def lead(out: Path, steps: int, plan: list[tuple[int, int]], dice: random.Random) -> dict[str, Tensor]:
    """Run the job to its end.

    Args:
        out: its folder.
        steps: how many it has in all.
        plan: on how many processes each life begins, and how many steps its newest checkpoint must have before it is
            killed; the last one lives.

    Returns:
        the parameters at its end.
    """
    began, deaths = time.monotonic(), []
    for processes, least in plan[:-1]:
        job = start(out, steps, processes)
        while newest(out) < least and job.poll() is None:
            time.sleep(0.05)
        time.sleep(dice.random() * 5)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        deaths.append(newest(out))
    job = start(out, steps, plan[-1][0])
    if job.wait() != 0:
        raise SystemExit(f"{out.name}: ended with {job.returncode}, see {out / 'log.txt'}")
    print(f"{out.name}: {time.monotonic() - began:.0f} s, killed after the checkpoints of steps {deaths}", flush=True)
    found: dict[str, Tensor] = torch.load(out / "final.pt", weights_only=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.out, args.steps)
        return
    dice, last = random.Random(0), args.steps // EVERY
    shutil.rmtree(args.out, ignore_errors=True)
    whole = {n: lead(args.out / f"whole-{n}", args.steps, [(n, 0)], dice) for n in (1, 2, 4)}
    deaths = sorted(EVERY * dice.randrange(1, last) for _ in range(args.kills))
    killed = lead(args.out / "killed-2", args.steps, [*((2, at) for at in deaths), (2, args.steps)], dice)
    third = EVERY * (last // 3)
    moved = lead(args.out / "moved-1-2-4", args.steps, [(1, third), (2, 2 * third), (4, args.steps)], dice)
    way = (flat(whole[2]) - flat(initial().state_dict())).norm().item()
    print(f"the run on 2 processes moved by {way:.3g}")
    gaps = {
        "killed on 2, whole on 2": (killed, whole[2]),
        "whole on 1, whole on 2": (whole[1], whole[2]),
        "whole on 4, whole on 2": (whole[4], whole[2]),
        "moved from 1 over 2 to 4, whole on 2": (moved, whole[2]),
    }
    found = {name: (flat(a) - flat(b)).norm().item() / way for name, (a, b) in gaps.items()}
    for name, gap in found.items():
        print(f"{name}: {gap:.1e} of that apart")
    if not way > 1 or next(iter(found.values())) != 0 or max(found.values()) > CLOSE:
        raise SystemExit(f"the first must be 0, and none more than {CLOSE}")


if __name__ == "__main__":
    main()
