"""process_group=: two processes that hold one parameter each are one Mechanic over both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from manic import Mechanic

pytestmark = pytest.mark.distributed
STEPS = 40


def train(parameters: list[nn.Parameter], mechanic: Mechanic, broken_at: int) -> None:
    for t in range(STEPS):
        mechanic.zero_grad()
        for p in parameters:
            (p - 1).cosh().log().sum().backward()
        if t == broken_at:
            parameters[-1].grad[0] = float("nan")  # on the last rank alone
        mechanic.step()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 0, n, dtype=torch.float64)) for n in (5, 3)]


def main(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    mine = parameters()[rank : rank + 1]
    mechanic = Mechanic(torch.optim.SGD(mine, lr=1.0), process_group=dist.group.WORLD)
    train(mine, mechanic, broken_at=10 if rank == 1 else -1)
    torch.save([mine[0].detach(), mechanic.scale, mechanic.skipped], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    whole = parameters()
    mechanic = Mechanic(torch.optim.SGD(whole, lr=1.0))
    train(whole, mechanic, broken_at=10)
    for rank, p in enumerate(whole):
        value, scale, skipped = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(value, p.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scale, mechanic.scale, rtol=1e-9, atol=0.0)
        assert skipped == 1
    assert mechanic.scale > 1e-3


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
