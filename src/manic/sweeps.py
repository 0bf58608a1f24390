"""The two passes over memory: measure (the sums that h needs) and move (Δ takes in u, x = x_ref + S·Δ).

Both go through the elements in cache-sized pieces: stretches of a large tensor, or small tensors end to end, so that
there is more to do about a piece than to say. A piece is worked on in the dtype of x_ref (float32, or float64 for
float64 parameters), and the sums of the pieces are added up in the dtype of the tuner (float64). Where there are
kernels for them (kernels.py), dense parameters go there, all of one kind at once; what is here does for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo

from manic.kernels import Kernels, Memory, discard_eagerly
from manic.storage import Layout, Slot, column, local, wide
from manic.tuner import Sums

end_to_end: Any = torch._utils._flatten_dense_tensors
apart: Any = torch._utils._unflatten_dense_tensors

# The first five columns of the sums are what one piece yields; the others come from elsewhere.
DELTA_X, GRAD_SQ, X_SQ = map(Sums._fields.index, ("delta_x", "grad_sq", "x_sq"))
ENTERED_SQ, NUMEL = map(Sums._fields.index, ("entered_sq", "numel"))

PIECE = 64 * 1024  # elements: some float32 pieces fit in a core's L2 cache, and a float32 sum keeps its digits
SMALL = PIECE // 8  # elements up to which tensors are laid end to end, in copies
PACKED = PIECE // 2  # elements of such a piece: with those of the piece before it that is a megabyte of copies

Key = tuple[int, torch.device, torch.dtype]  # which learned scale; where, and in which dtype, the sums are

# What the last move left of x, by the parameters' identity and order. Of eager pieces: <weights,x>, which sees an
# exchange of elements, and the sum of the bits, which sees a change in any one; 0-d each; on the CPU only. And what
# kernels keep.
Identity = tuple[int, ...]
Carried = dict[Identity, Memory | dict[Key, list[Tensor]]]


class Group(NamedTuple):
    """Parameters that the sweeps take together: alike in layout, learned scale, dtypes and device."""

    slots: list[Slot]
    numel: int
    kernels: Kernels | None = None  # None: the eager pieces
    identity: Identity = ()

    @property
    def layout(self) -> Layout:
        return self.slots[0].layout


class Run(NamedTuple):
    """One tensor in pieces, or several small ones as one piece."""

    slots: list[Slot]  # whose elements these are
    pieces: list[tuple[Any, ...]]  # x, g, x_ref, Δ and x_t (Slot.x), complex ones as real pairs; None: not wanted

    @property
    def key(self) -> Key:
        ref = self.slots[0].ref
        return self.slots[0].index, ref.device, ref.dtype.to_real()

    def scale(self, scales: Tensor) -> Tensor:
        """What is given for every learned scale, [k, …], for that of these elements, as they want it."""
        return _as_wanted(scales, self.slots[0])

    def put(self, name: str, values: Tensor, place: Tensor) -> None:
        """Write what was worked out for "param", "ref" or "delta" to `place`, or where `place` was copied from."""
        if len(self.slots) > 1:
            targets = column(self.slots, name)
            torch._foreach_copy_(targets, apart(values, targets))
        elif values is not place:
            place.copy_(values)


@disable_dynamo
def measure(groups: Sequence[Group], scales: Tensor, carried: Carried) -> Tensor:
    """One pass over x, g and Δ: the sums of every learned scale.

    An element that does not stand at x_ref + S·Δ was moved by somebody else (an edit, or it sat out while S
    changed): its x_ref is shifted so that x stays. On the CPU, and in kernels, every element is looked at only if x is
    not, by two checksums, what the last ``move()`` left. Where Δ is recomputed an edit cannot be told from an update;
    there x_t is noted for ``move()``.

    Args:
        groups: the parameters with a gradient, as ``grouped()`` puts them together.
        scales: [k], S of each learned scale as of the last ``move()``.
        carried: what the last ``move()`` returned; empty where it is not known.

    Returns:
        [k, 8], columns as in ``manic.tuner.Sums``, dtype and device of `scales`. The last one, ‖u_{t-1}‖², is
        for the caller to fill in: ``move()`` knew it.
    """
    sums = scales.new_zeros(len(scales), len(Sums._fields))
    for group in groups:
        if group.kernels is not None:
            table = group.kernels.measure(group.slots, _as_wanted(scales, group.slots[0]), _memory(group, carried))
            _add(sums, group.slots[0], table)
    _measure_eagerly([group.slots for group in groups if group.kernels is None], scales, carried, sums)
    for group in groups:
        sums[group.slots[0].index, NUMEL] += group.numel
    return sums


def _memory(group: Group, carried: Carried) -> Memory:
    """What the kernels of a group keep; new where nothing is carried."""
    assert group.kernels is not None
    memory = carried.get(group.identity)
    if not isinstance(memory, Memory):
        memory = carried[group.identity] = Memory(group.slots, group.kernels.piece)
    return memory


def _add(sums: Tensor, slot: Slot, table: Tensor) -> None:
    """The sums of pieces, [pieces, 5], to those of the learned scale."""
    found = table.to(sums.dtype).sum(0).to(sums.device)
    sums[slot.index, 0] += slot.sign * found[0]
    sums[slot.index, 1:5] += found[1:]
    if slot.entering:
        sums[slot.index, ENTERED_SQ] += found[X_SQ]


def _measure_eagerly(groups: Sequence[list[Slot]], scales: Tensor, carried: Carried, sums: Tensor) -> None:
    slots = [slot for group in groups for slot in group]
    for slot in slots:
        if slot.delta is None:
            slot.x = slot.param.clone()
    found: dict[tuple[Key, float, bool], tuple[Slot, list[Tensor]]] = {}
    seen: dict[Key, list[Tensor]] = {}
    for run in _runs(groups, "grad", "delta"):
        slot = run.slots[0]
        _, values = found.setdefault((run.key, slot.sign, slot.entering), (slot, []))
        values += _measure(run, run.scale(scales), seen.setdefault(run.key, []))
    if not _as_left(slots, seen, carried):
        _anchor(groups, scales)
    for slot, values in found.values():
        if values:
            _add(sums, slot, torch.stack(values).view(-1, 5))
    for slot in slots:
        if slot.grad is not None and slot.grad.is_sparse:
            _add(sums, slot, _measure_rows(slot, _as_wanted(scales, slot)))


def _measure(run: Run, scale: Tensor, seen: list[Tensor]) -> list[Tensor]:
    """Piece after piece: <Δ,g>, <Δ,x>, ‖g‖², ‖x‖², ‖Δ‖², 0-d each; and what `carried` is to be compared with."""
    values: list[Tensor] = []
    zero, dtype = scale.new_zeros(()), scale.dtype
    for stored, g, ref, delta, _ in run.pieces:
        wide_x = stored.to(dtype)
        x, d = _row(wide_x), _row(_recomputed(wide_x, ref, scale) if delta is None else delta)
        delta_grad = grad_sq = zero
        if g is not None:
            g = _row(g.to(dtype))
            delta_grad, grad_sq = torch.dot(d, g), torch.dot(g, g)
        values += (delta_grad, torch.dot(d, x), grad_sq, torch.dot(x, x), torch.dot(d, d))
        if delta is not None:
            seen += _checksums(stored, x)
    return values


def _measure_rows(slot: Slot, scale: Tensor) -> Tensor:
    """What the rows that a sparse gradient stores add to <Δ,g> and ‖g‖²: [1, 5]."""
    grad = slot.grad.coalesce()  # type: ignore[union-attr]
    rows = tuple(grad.indices())
    delta = slot.delta[rows] if slot.delta is not None else _recomputed(slot.param[rows], slot.ref[rows], scale)
    sums = delta.new_zeros(1, 5, dtype=torch.float64)
    for g, d in _pieces(grad.values(), delta):
        g, d = _row(g.to(d.dtype)), _row(d)
        sums[0, 0] += torch.dot(d, g)
        sums[0, GRAD_SQ] += torch.dot(g, g)
    return sums


def _checksums(x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
    """<weights,x>, and the sum of x's bits, int64; nothing where comparing would stall a device. `row`: x again."""
    if x.device.type != "cpu":
        return ()
    size = x.element_size()
    even = x.dim() == 1 and x.is_contiguous() and x.numel() * size % 8 == x.storage_offset() * size % 8 == 0
    words = torch.int64 if even else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return torch.dot(row, _weights(row.dtype)[: len(row)]), x.view(words).sum()


@lru_cache
def _weights(dtype: torch.dtype) -> Tensor:
    """As many as a piece has elements, no two alike."""
    return torch.randn(PIECE, generator=torch.Generator("cpu").manual_seed(0), dtype=dtype, device="cpu")


def _as_left(slots: Sequence[Slot], seen: dict[Key, list[Tensor]], carried: Carried) -> bool:
    """Whether x is what the last ``move()`` left."""
    left = carried.get(_identity(slots))
    if not isinstance(left, dict) or left.keys() != seen.keys():
        return False
    pairs = [(values[i::2], left[key][i::2]) for key, values in seen.items() for i in (0, 1)]
    return all(len(now) == len(then) > 0 and torch.equal(torch.stack(now), torch.stack(then)) for now, then in pairs)


def _anchor(groups: Sequence[list[Slot]], scales: Tensor) -> None:
    """Shift x_ref where x is not x_ref + S·Δ."""
    for run in _runs([group for group in groups if group[0].delta is not None], "ref", "delta"):
        scale = run.scale(scales)
        for x, _, ref, delta, _ in run.pieces:
            shifted = x != torch.addcmul(ref, delta, scale).to(x.dtype)
            run.put("ref", torch.where(shifted, x.to(ref.dtype) - delta * scale, ref), ref)


@disable_dynamo
def move(groups: Sequence[Group], motion: Tensor, counts: Tensor | None, carried: Carried) -> tuple[Tensor, Carried]:
    """One pass over x, Δ and x_ref after the base step.

        d       = keep·Δ_t + u_t
        Δ_{t+1} = fade·d
        x_ref  += S_{t+1}·(1 - fade)·d
        x_{t+1} = x_ref + S_{t+1}·Δ_{t+1}          keep = fade = 1: Algorithm 1

    What the base did is read off the parameters: u_t = x - x_t, and x_t is where the last ``move()`` put it.

    Args:
        groups: the parameters with a gradient, as ``measure()`` left them.
        motion: [k, 4], S_t, S_{t+1}, keep and fade of each learned scale.
        counts: [k] bool. False: u_t is taken to be 0, whatever the base did. None: all are known to be true.
        carried: what ``measure()`` was given.

    Returns:
        [k], ‖u_t‖² over the parameters whose Δ is recomputed; and what the next ``measure()`` is to find.
    """
    carries: Carried = {}
    eager = [group.slots for group in groups if group.kernels is None]
    for group in groups:
        if group.kernels is not None:
            memory = carries[group.identity] = _memory(group, carried)
            memory.known = not memory.elsewhere(group.slots)
            if memory.known:
                by = _as_wanted(motion, group.slots[0])
                group.kernels.move(group.slots, by, _counts(counts, group.slots[0]), memory)
            else:
                eager += [[slot] for slot in group.slots]
    update_sq, left = _move_eagerly(eager, motion, counts)
    carries[_identity([slot for slots in eager for slot in slots])] = left
    return update_sq, carries


def still(scales: Tensor) -> Tensor:
    """The motion that leaves everything where it is: [k, 4] for scales [k]."""
    ones = torch.ones_like(scales)
    return torch.stack([scales, scales, ones, ones], 1)


def _move_eagerly(
    groups: Sequence[list[Slot]], motion: Tensor, counts: Tensor | None
) -> tuple[Tensor, dict[Key, list[Tensor]]]:
    update_sq = motion.new_zeros(len(motion))
    left: dict[Key, list[Tensor]] = {}
    for run in _runs(groups, "ref", "delta"):
        by = run.scale(motion)
        counted = _counts(counts, run.slots[0])
        if run.slots[0].delta is None:
            update_sq[run.slots[0].index] += _move_recomputed(run, by, counted).to(update_sq)
        else:
            _move(run, by, counted, left.setdefault(run.key, []))
    return update_sq, left


def _move(run: Run, motion: Tensor, counts: Tensor | None, left: list[Tensor]) -> None:
    """Piece after piece; to `left` is added what tells where x now is."""
    here, there, keep, fade = motion
    follow = there * (1 - fade)
    scratch = None
    for x, _, ref, delta, _ in run.pieces:
        if scratch is None or scratch.shape != ref.shape:
            scratch = torch.empty_like(ref)
        torch.addcmul(ref, delta, here, out=scratch)  # x_t
        if x.dtype == ref.dtype:
            torch.sub(x, scratch, out=scratch)
        else:
            rounded = scratch.to(x.dtype)
            scratch.copy_(x).sub_(rounded)
        delta.mul_(keep).add_(_finite(scratch, counts))
        ref.addcmul_(delta, follow)
        delta.mul_(fade)
        if x.dtype == ref.dtype:
            new = torch.addcmul(ref, delta, there, out=x)
        else:
            new = torch.addcmul(ref, delta, there).to(x.dtype)
        run.put("param", new, x)
        run.put("ref", ref, ref)
        run.put("delta", delta, delta)
        if new.device.type == "cpu":
            left += _checksums(new, _row(new.to(ref.dtype)))


def _move_recomputed(run: Run, motion: Tensor, counts: Tensor | None) -> Tensor:
    """The same where Δ is not stored: ‖u_t‖²."""
    here, there, keep, fade = motion
    update_sq = torch.zeros_like(here)
    for x, _, ref, _, before in run.pieces:
        update = _finite(x - before, counts)
        delta = _recomputed(before, ref, here).mul_(keep).add_(update)
        ref.addcmul_(delta, there * (1 - fade))
        new = torch.addcmul(ref, delta.mul_(fade), there)
        x.copy_(new if counts is None else torch.where(counts | (here != there), new, before))
        row = _row(update)
        update_sq += torch.dot(row, row)
    return update_sq


def _finite(update: Tensor, counts: Tensor | None) -> Tensor:
    """In place: an update that is not finite (0/0 in the base, say) is none, and none is one that does not count."""
    update.nan_to_num_(0.0, 0.0, 0.0)
    return update if counts is None else update.mul_(counts)


@disable_dynamo
def discard(groups: Sequence[Group], counts: Tensor, carried: Carried) -> None:
    """The gradients become 0 where `counts`, [k] bool, is False; no host has to know where that is."""
    for group in groups:
        counted = _counts(counts, group.slots[0])
        assert counted is not None
        if group.kernels is not None:
            group.kernels.discard(group.slots, counted, _memory(group, carried))
        else:
            discard_eagerly(group.slots, counted)


def hold(slots: Sequence[Slot], before: Tensor, after: Tensor) -> None:
    """Keep x and the recomputed Δ of parameters that sit out while S changes: x_ref moves instead."""
    for run in _runs([[slot] for slot in slots]):
        ratio = run.scale(after) / run.scale(before)
        for x, _, ref, _, _ in run.pieces:
            ref.copy_(torch.where(ratio.isfinite(), x - ratio * (x - ref), x))


def _recomputed(x: Tensor, ref: Tensor, scale: Tensor) -> Tensor:
    """Δ = (x - x_ref) / S, and 0 where S is 0."""
    return torch.where(scale > 0, (x - ref) / scale, 0)


def _row(t: Tensor) -> Tensor:
    """In one dimension, and where no sum of it depends on the address: a resumed process may have it elsewhere."""
    row = t if t.dim() == 1 else t.reshape(-1)
    return row if row.data_ptr() % 64 == 0 else row.clone()


def grouped(slots: Sequence[Slot], kernels: Callable[[torch.device], Kernels | None] = lambda _: None) -> list[Group]:
    """Parameters that `kernels` of their device can take, all of a kind together; of the others the large ones for
    themselves, and small ones of a kind in groups of at most PACKED elements."""
    alone: list[list[Slot]] = []
    small: list[list[Slot]] = []
    unfilled: dict[tuple[Any, ...], tuple[list[Slot], int]] = {}  # the last of each kind, and what it has room for
    fast: dict[tuple[Any, ...], list[Slot]] = {}
    able: dict[torch.device, Kernels | None] = {}
    for slot in slots:
        if slot.delta is None or slot.grad is None or slot.grad.is_sparse or slot.ref.is_complex():
            alone.append([slot])
            continue
        param, grad, ref, delta = map(local, (slot.param, slot.grad, slot.ref, slot.delta))
        device, dtype, numel = ref.device, param.dtype, ref.numel()
        kind = slot.index, slot.sign, slot.entering, slot.layout, device, dtype, grad.dtype
        if device not in able:
            able[device] = kernels(device)
        here = able[device]
        known = ref.dtype == delta.dtype == wide(dtype)
        if here is not None and dtype in here.dtypes and known and _alike(param, grad, ref, delta):
            fast.setdefault(kind, []).append(slot)
        elif numel > SMALL or numel == 0:  # torch 2.6 cannot take empty tensors apart
            alone.append([slot])
        else:
            group, room = unfilled.get(kind, ([], 0))
            if numel > room:
                group, room = [], PACKED
                small.append(group)
            group.append(slot)
            unfilled[kind] = group, room - numel
    return [Group(group, _numel(group)) for group in alone + small] + [
        Group(group, _numel(group), able[kind[4]], (*_identity(group), *_sizes(group))) for kind, group in fast.items()
    ]


def _numel(slots: Sequence[Slot]) -> int:
    return sum(ref.numel() for ref in column(slots, "ref"))


def _sizes(slots: Sequence[Slot]) -> Identity:
    """What the tables of kernels are made of."""
    return *(ref.numel() for ref in column(slots, "ref")), slots[0].param.element_size(), slots[0].ref.element_size()


def _alike(x: Tensor, g: Tensor, ref: Tensor, delta: Tensor) -> bool:
    """Whether the elements of all are dense in memory and in the same order, and x and g are of one dtype."""
    if x.dtype != g.dtype or not x.shape == g.shape == ref.shape == delta.shape or g.is_neg():
        return False
    if x.is_contiguous() and g.is_contiguous() and ref.is_contiguous() and delta.is_contiguous():
        return True
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return all(t.permute(order).is_contiguous() for t in (x, g, ref, delta))


def _runs(groups: Sequence[list[Slot]], *wanted: str) -> Iterator[Run]:
    """All elements; in the same pieces whenever they are the same slots.

    Args:
        groups: as ``grouped()`` puts them together.
        wanted: what is needed of them beside x: "grad" (None, where it is sparse), "ref", "delta". (A tensor that is
            not packed with others comes with all but "grad" in any case.)
    """
    for group in groups:
        slot = group[0]
        if len(group) > 1:
            columns = {name: column(group, name) for name in ("param", *wanted)}
            flat = {name: end_to_end(tensors) for name, tensors in columns.items()}
            yield Run(group, [(flat["param"], flat.get("grad"), flat.get("ref"), flat.get("delta"), None)])
        else:
            grad = slot.grad if "grad" in wanted and slot.grad is not None and not slot.grad.is_sparse else None
            yield Run(group, list(_pieces(slot.param, grad, slot.ref, slot.delta, slot.x)))


def _identity(slots: Sequence[Slot]) -> Identity:
    return tuple([id(slot.param) for slot in slots])


def _as_wanted(scales: Tensor, slot: Slot) -> Tensor:
    """Of [k, …] for every learned scale that of a parameter, in the dtype and on the device of its x_ref."""
    return scales[slot.index].to(device=slot.ref.device, dtype=slot.ref.dtype.to_real())


def _counts(counts: Tensor | None, slot: Slot) -> Tensor | None:
    """Of [k] for every learned scale that of a parameter, on the device of its x_ref. None stays None."""
    return None if counts is None else counts[slot.index].to(slot.ref.device)


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors of one shape (or None) as tuples of views of at most PIECE elements; complex ones as real pairs.

    In memory order where all of them are dense and laid out alike (channels_last among them), else cut along
    the longest dimension until the pieces are small.
    """
    views = [None if t is None else _real(local(t.detach())) for t in tensors]
    first = views[0]
    assert first is not None
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    flat = [None if t is None else t.permute(order) for t in views]
    if all(t is None or t.is_contiguous() for t in flat):
        flat = [None if t is None else t.view(-1) for t in flat]
    yield from _cut(flat)


def _cut(views: list[Any]) -> Iterator[tuple[Any, ...]]:
    first = views[0]
    if first.numel() > PIECE:
        longest = max(range(first.dim()), key=lambda d: first.shape[d])
        size = PIECE if first.dim() == 1 else -(-first.shape[longest] // 2)
        count = -(-first.shape[longest] // size)
        columns = [[None] * count if t is None else t.split(size, longest) for t in views]
        if first.dim() == 1:
            yield from zip(*columns, strict=True)
        else:
            for piece in zip(*columns, strict=True):
                yield from _cut(list(piece))
    elif first.numel() > 0:
        yield tuple(views)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
