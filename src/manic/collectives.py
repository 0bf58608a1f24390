"""The global sums of a model that is spread over processes: the one place that talks to torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manic.parameters import Layout, shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def over_mesh(sums: Tensor, layout: Layout) -> Tensor:
    """The sums over all shards of the parameters of one layout; one all-reduce if a mesh dimension cuts them.

    Replicas (HSDP) count once. To be called on every rank in every step, on ranks without gradients too.
    """
    if layout is None or shards(layout) == 1:
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, cuts = layout
    placements = [Partial() if cut else Replicate() for cut in cuts]
    part = sums.to(mesh.device_type)
    return DTensor.from_local(part, mesh, placements, run_check=False).full_tensor().to(sums.device)


def over_group(sums: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The sums over all ranks of `process_group`, in place; None: this process has all sums.

    One collective, to be called on every rank in every step, on ranks without gradients too.
    """
    if process_group is not None:
        import torch.distributed as dist

        dist.all_reduce(sums, group=process_group)
    return sums


def anywhere(here: bool, layouts: Sequence[Layout], process_group: ProcessGroup | None, device: torch.device) -> bool:
    """Whether `here` is true on any process that has a part of the model; replicas of sharded tensors included.

    One collective per mesh and one for the group, to be called on every rank alike. Waits for the device.
    """
    meshes = dict.fromkeys(layout[0] for layout in layouts if layout is not None)
    if not meshes and process_group is None:
        return here
    count = torch.full((1,), float(here), device=device)
    for mesh in meshes:
        count = over_mesh(count, (mesh, (True,) * mesh.ndim))
    return bool(over_group(count, process_group) > 0)
