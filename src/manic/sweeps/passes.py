"""The parameters of a step, in the groups in which the sweeps take them, and the two passes over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo

from manic.parameters import Layout, ParamState, local, wide
from manic.sweeps.base import Table
from manic.sweeps.eager import Group
from manic.tuner import Sums

# The first five columns of the sums are what the pieces yield.
X_SQ, ENTERED_SQ, NUMEL, MEMBERS = map(Sums._fields.index, ("x_sq", "entered_sq", "numel", "members"))

Choice = Callable[[torch.device], type[Table] | None]


class Passes:
    """The two passes of a step over the parameters that have a gradient.

    One object serves many steps, as long as nothing changes in how the parameters are taken together.

    Args:
        states: the parameters that have a gradient.
        layouts: every layout of the model, in the order in which all ranks know them.
        difference: the slot is x_ref, and d = x - x_ref. False: the slot is Δ, which is d.
        kernels: what there is for the tensors of a device; None: the eager pieces.
    """

    def __init__(
        self,
        states: list[ParamState],
        layouts: Sequence[Layout] = (None,),
        difference: bool = True,
        kernels: Choice = lambda _: None,
    ) -> None:
        self.states, self._layouts = states, layouts
        self.groups = grouped(states, difference, kernels)
        self.moving = False  # whether a move has begun, so that the only way out is to complete it

    @disable_dynamo
    def measure(self, like: Tensor) -> list[tuple[Layout, Tensor]]:
        """Sum up what h needs, at x_t, and put x_t aside.

        Args:
            like: [k], one for each learned scale, of the dtype and on the device that the sums are to have.

        Returns:
            every layout with this process's sums of it: [k, 10], columns as in ``manic.tuner.Sums``. The last two,
            about the last step, are for the caller to fill in.
        """
        self.moving = False
        sums = {layout: like.new_zeros(len(like), len(Sums._fields)) for layout in self._layouts}
        for group in self.groups:
            found = group.measure().to(like.dtype).sum(0).to(like.device)
            row = sums[group.first.layout][group.first.index]
            row[0] += group.first.sign * found[0]
            row[1:5] += found[1:]
            if group.first.entering:
                row[ENTERED_SQ] += found[X_SQ]
            row[NUMEL] += group.numel
            row[MEMBERS] += group.members
        return list(sums.items())

    @disable_dynamo
    def discard(self, counts: Tensor) -> None:
        """The gradients become 0 where `counts`, [k] bool, is False; no host has to know where that is."""
        for group in self.groups:
            group.discard(counts[group.first.index].to(group.first.slot.device))

    @disable_dynamo
    def move(self, motion: Tensor) -> dict[Layout, Tensor]:
        """Take x and the slots to where they belong, now that the base has put x_t + u_t into the parameters.

        A call that follows an interrupted one completes it.

        Args:
            motion: [k, 4], as in ``manic.tuner.Motion``, for each learned scale.

        Returns:
            ‖u_t‖², and ‖d‖² of where x is left, of this process's parameters by layout: [k, 2], of the dtype and on the
            device of `motion`.
        """
        self.moving = True
        totals = {layout: motion.new_zeros(len(motion), 2) for layout in self._layouts}
        for group in self.groups:
            index, slot = group.first.index, group.first.slot
            parts = group.move(motion[index].to(device=slot.device, dtype=slot.dtype.to_real()))
            if parts:
                totals[group.first.layout][index] += torch.stack(parts).to(motion.dtype).sum(0).to(motion.device)
        return totals

    @disable_dynamo
    def restore(self) -> None:
        """Put x_t back into the parameters."""
        for group in self.groups:
            group.restore()

    def release(self) -> None:
        """The end of a step: let go of the gradients, and of x_t where memory is not worth keeping."""
        self.moving = False
        for group in self.groups:
            group.release()


def grouped(states: Sequence[ParamState], difference: bool = True, kernels: Choice = lambda _: None) -> list[Group]:
    """The parameters of a kind together: in a table, if `kernels` of their device can take them. Those with a sparse
    gradient each by itself."""
    alone: list[Group] = []
    tables: dict[Any, tuple[type[Group], list[ParamState]]] = {}
    for state in states:
        assert state.grad is not None
        param, grad, slot = map(local, (state.param, state.grad, state.slot))
        if grad.is_sparse:
            alone.append(Group([state], difference))
            continue
        others = [slot] if state.rest is None else [slot, local(state.rest)]
        here = None if slot.is_complex() else kernels(slot.device)
        fits = here is not None and param.dtype in here.dtypes and slot.dtype == wide(param.dtype)
        take = here if here is not None and fits and _alike(param, grad, *others) else Group
        learned = state.index, state.sign, state.entering, state.layout
        kind = take, learned, slot.device, param.dtype, slot.dtype, grad.dtype
        tables.setdefault(kind, (take, []))[1].append(state)
    return [*alone, *(take(group, difference) for take, group in tables.values())]


def _alike(x: Tensor, g: Tensor, *others: Tensor) -> bool:
    """Whether the elements of all are dense in memory and in the same order, and x and g are of one dtype."""
    if x.dtype != g.dtype or g.is_neg() or not all(t.shape == x.shape for t in (g, *others)):
        return False
    if all(t.is_contiguous() for t in (x, g, *others)):
        return True
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return all(t.permute(order).is_contiguous() for t in (x, g, *others))
