"""The global sums of a model that is spread over processes: the one place that talks to torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_reduce(sums: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The sums over all ranks of `process_group`, in place; None: this process holds all parameters.

    One collective, to be called on every rank in every step, on ranks without gradients too.
    """
    if process_group is not None:
        import torch.distributed as dist

        dist.all_reduce(sums, group=process_group)
    return sums
