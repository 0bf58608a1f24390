"""The parameters of a step, in the groups in which the sweeps take them, and the two passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo

from manic.parameters import Layout, ParamState, column, local, wide
from manic.sweeps import eager
from manic.sweeps.base import Kernels, Memory, discard_eagerly
from manic.tuner import Sums

# The first five columns of the sums are what the pieces yield.
X_SQ, ENTERED_SQ, NUMEL, MEMBERS = map(Sums._fields.index, ("x_sq", "entered_sq", "numel", "members"))


@dataclass
class Group:
    """Parameters that the sweeps take together: alike in layout, learned scale, dtypes and device."""

    states: list[ParamState]
    kernels: Kernels | None = None  # None: the eager pieces
    memory: Memory | None = None  # of the kernels

    def __post_init__(self) -> None:
        self.index = self.states[0].index  # which learned scale
        self.numel = sum(slot.numel() for slot in column(self.states, "slot"))  # of this process's elements
        self.members = sum(state.member for state in self.states)
        if self.kernels is not None:
            self.memory = Memory(self.states, self.kernels.piece)


Job = tuple[Group, eager.Piece | None]  # None: the kernels take the whole group


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
        kernels: Callable[[torch.device], Kernels | None] = lambda _: None,
    ) -> None:
        self.states, self.difference = states, difference
        self.active: dict[Layout, list[Group]] = {layout: [] for layout in layouts}
        for group in grouped(states, kernels):
            self.active[group.states[0].layout].append(group)
        self._by_hand = [state for group in self._groups() if group.kernels is None for state in group.states]
        self._at: tuple[int, eager.Write | None] | None = None  # in the middle of a move: jobs done, and what is next
        self._updates: dict[int, Tensor] = {}  # ‖u‖² by job

    def _groups(self) -> Iterator[Group]:
        for groups in self.active.values():
            yield from groups

    @disable_dynamo
    def measure(self, like: Tensor) -> list[tuple[Layout, Tensor]]:
        """Sum up what h needs, at x_t, and put x_t aside.

        Args:
            like: [k], one for each learned scale, of the dtype and on the device that the sums are to have.

        Returns:
            every layout with this process's sums of it: [k, 9], columns as in ``manic.tuner.Sums``. The last one,
            ‖u‖² of the last step, is for the caller to fill in.
        """
        self._at, self._updates = None, {}
        eager.put_aside(self._by_hand)
        found = []
        for layout, groups in self.active.items():
            sums = like.new_zeros(len(like), len(Sums._fields))
            for group in groups:
                if group.kernels is None or group.memory is None:
                    table = eager.measure(group.states, self.difference)
                else:
                    group.memory.moved.value = 0
                    table = group.kernels.measure(group.states, self.difference, group.memory)
                _add(sums, group, table)
            found.append((layout, sums))
        return found

    @disable_dynamo
    def discard(self, counts: Tensor) -> None:
        """The gradients become 0 where `counts`, [k] bool, is False; no host has to know where that is."""
        for group in self._groups():
            counted = counts[group.index].to(group.states[0].slot.device)
            if group.kernels is None or group.memory is None:
                discard_eagerly(group.states, counted)
            else:
                group.kernels.discard(group.states, counted, group.memory)

    @disable_dynamo
    def update_sq(self, like: Tensor) -> dict[Layout, Tensor]:
        """‖u_t‖² by layout, as ``move()`` returns it, while x_t + u_t is in the parameters. `like`: [k]."""
        totals = {layout: like.new_zeros(len(like)) for layout in self.active}
        for group, piece in self._jobs():
            if piece is None:
                assert group.kernels is not None
                assert group.memory is not None
                group.kernels.update_sq(group.states, group.memory)
                found = group.memory.update_sq.sum()
            else:
                found = eager.square(eager.update(piece))
            totals[group.states[0].layout][group.index] += found.to(like)
        return totals

    @property
    def moving(self) -> bool:
        """Whether a move has begun, so that the only way out is to complete it."""
        return self._at is not None

    @disable_dynamo
    def move(self, motion: Tensor) -> dict[Layout, Tensor]:
        """Take x and the slots to where they belong, now that the base has put x_t + u_t into the parameters.

        A call that follows an interrupted one completes it.

        Args:
            motion: [k, 4], as in ``manic.tuner.Motion``, for each learned scale.

        Returns:
            ‖u_t‖² of this process's parameters by layout: [k], of the dtype and on the device of `motion`.
        """
        found: dict[Layout, dict[int, list[Tensor]]] = {layout: {} for layout in self.active}
        if self._at is None:
            self._at = 0, None
        for at, (group, piece) in enumerate(self._jobs()):
            if at >= self._at[0]:
                self._carry_out(at, group, piece, as_wanted(motion, group.states[0]))
            sums = found[group.states[0].layout].setdefault(group.index, [])
            sums.append(self._updates[at] if piece is not None else group.memory.update_sq.sum())  # type: ignore[union-attr]
        totals = {}
        for layout, by_index in found.items():
            totals[layout] = motion.new_zeros(len(motion))
            for index, values in by_index.items():
                totals[layout][index] = torch.stack([value.to(motion) for value in values]).sum()
        return totals

    def _jobs(self) -> Iterator[Job]:
        """The same jobs in the same order, however often one asks in a step."""
        for group in self._groups():
            if group.kernels is not None and group.memory is not None:
                if not group.memory.elsewhere(group.states):
                    yield group, None
                    continue
                group.memory.show(group.states)
                together = [[state] for state in group.states]
            else:
                together = [group.states]
            for states in together:
                for piece in eager.pieces(states):
                    yield group, piece

    def _carry_out(self, at: int, group: Group, piece: eager.Piece | None, motion: Tensor) -> None:
        """One job. It may be interrupted anywhere, and called again: each attribute is set in one go."""
        assert self._at is not None
        if piece is None:
            assert group.kernels is not None
            assert group.memory is not None
            if not group.memory.moved.value:
                group.kernels.move(group.states, self.difference, motion, group.memory)
        else:
            if self._at[1] is None:
                write, self._updates[at] = eager.move(piece, self.difference, motion)
                self._at = at, write
            self._at[1].carry_out()  # type: ignore[union-attr]
        self._at = at + 1, None

    @disable_dynamo
    def restore(self) -> None:
        """Put x_t back into the parameters."""
        for group in self._groups():
            if group.memory is not None:
                group.memory.show(group.states)
        params = [local(state.param.detach()) for state in self.states]
        copies = [state.copy for state in self.states if state.copy is not None]
        if params:
            torch._foreach_copy_(params, copies)

    def release(self) -> None:
        """The end of a step: let go of the gradients, and of x_t where memory is not worth keeping."""
        self._at, self._updates = None, {}
        for state in self.states:
            state.grad = None
            if state.copy is not None and state.copy.device.type != "cpu":
                state.copy = None
        for group in self._groups():
            if group.memory is not None:
                group.memory.release()


def _add(sums: Tensor, group: Group, table: Tensor) -> None:
    """The sums of pieces, [pieces, 5], to those of the learned scale, and what is known of the group beside them."""
    first, index = group.states[0], group.index
    found = table.to(sums.dtype).sum(0).to(sums.device)
    sums[index, 0] += first.sign * found[0]
    sums[index, 1:5] += found[1:]
    if first.entering:
        sums[index, ENTERED_SQ] += found[X_SQ]
    sums[index, NUMEL] += group.numel
    sums[index, MEMBERS] += group.members


def grouped(
    states: Sequence[ParamState], kernels: Callable[[torch.device], Kernels | None] = lambda _: None
) -> list[Group]:
    """Parameters that `kernels` of their device can take, all of a kind together; of the others the large ones for
    themselves, and small ones of a kind in groups of at most PACKED elements."""
    alone: list[list[ParamState]] = []
    small: list[list[ParamState]] = []
    unfilled: dict[tuple[Any, ...], tuple[list[ParamState], int]] = {}  # the last of each kind, and its room
    fast: dict[tuple[Any, ...], list[ParamState]] = {}
    able: dict[torch.device, Kernels | None] = {}
    for state in states:
        if state.grad is None or state.grad.is_sparse or state.slot.is_complex():
            alone.append([state])
            continue
        param, grad, slot = map(local, (state.param, state.grad, state.slot))
        device, dtype, numel = slot.device, param.dtype, slot.numel()
        kind = state.index, state.sign, state.entering, state.layout, device, dtype, grad.dtype, slot.dtype
        if device not in able:
            able[device] = kernels(device)
        here = able[device]
        others = [slot] if state.rest is None else [slot, local(state.rest)]
        if here is not None and dtype in here.dtypes and slot.dtype == wide(dtype) and _alike(param, grad, *others):
            fast.setdefault(kind, []).append(state)
        elif numel > eager.SMALL or numel == 0:  # torch 2.6 cannot take empty tensors apart
            alone.append([state])
        else:
            group, room = unfilled.get(kind, ([], 0))
            if numel > room:
                group, room = [], eager.PACKED
                small.append(group)
            group.append(state)
            unfilled[kind] = group, room - numel
    return [Group(group) for group in alone + small] + [Group(group, able[kind[4]]) for kind, group in fast.items()]


def _alike(x: Tensor, g: Tensor, *others: Tensor) -> bool:
    """Whether the elements of all are dense in memory and in the same order, and x and g are of one dtype."""
    if x.dtype != g.dtype or g.is_neg() or not all(t.shape == x.shape for t in (g, *others)):
        return False
    if all(t.is_contiguous() for t in (x, g, *others)):
        return True
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return all(t.permute(order).is_contiguous() for t in (x, g, *others))


def as_wanted(values: Tensor, state: ParamState) -> Tensor:
    """Of [k, …] for every learned scale that of a parameter, in the dtype and on the device of its slot."""
    return values[state.index].to(device=state.slot.device, dtype=state.slot.dtype.to_real())
