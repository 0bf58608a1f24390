"""Which optimizers a Mechanic cannot wrap, and which only with a warning."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import ASGD, LBFGS, Adafactor, Optimizer, Rprop

from manic.chains import members, params_of, with_members
from manic.diagnostics import callers
from manic.parameters import KEPT, corner, local

UNPROPORTIONAL = (Rprop, ASGD, Adafactor)  # docs/bases.md explains
WATCHED = 8  # parameters of an optimizer that are compared with its state


def check_base(base: object) -> None:
    """Check that `base` can be wrapped.

    Raises:
        TypeError: it is no optimizer instance.
        ValueError: it is a Mechanic, or in one; or it goes wrong if its updates are scaled.
    """
    if isinstance(base, type):
        raise TypeError(
            f"Mechanic wraps an optimizer that is built already, not the class {base.__name__}: "
            f"Mechanic({base.__name__}(model.parameters(), lr=...)), or mechanize({base.__name__})(model.parameters())"
        )
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}")
    if any("mechanic_state" in group for group in base.param_groups):
        raise ValueError(
            f"this {type(base).__name__} has a Mechanic's state already: it is one, is inside one, or has loaded the "
            "checkpoint of one. Build a new plain optimizer, and wrap it once"
        )
    if any("zero_redundancy_optimizer" in name for name in callers()):
        raise ValueError(
            "in a ZeroRedundancyOptimizer each process would learn a scale of its own: use "
            "torch.distributed.fsdp.fully_shard, which shards the optimizer's state too, or wrap the plain optimizer"
        )
    for one in members(base):
        _check_kind(one)
    with suppress(AttributeError):  # of one that skips Optimizer.__init__; it trains, and says so when it is saved
        form = base.state_dict()
        if isinstance(form, dict) and {"state", "param_groups"} <= form.keys():
            return
        raise ValueError(
            f"state_dict() of {type(base).__name__} is not torch's dict of 'state' and 'param_groups', so that no "
            "checkpoint can hold it: combine plain optimizers with manic.chain(...), and wrap that"
        )


def _check_kind(one: Optimizer) -> None:
    names = [cls.__name__ for cls in type(one).__mro__]
    name = names[0]
    if any("schedulefree" in each.lower() for each in names):
        raise ValueError(
            f"{name} trains weights that it keeps in its own state, and a Mechanic cannot scale these, so that eval() "
            "would give wrong weights: wrap the plain optimizer (AdamW for AdamWScheduleFree), or use this one alone"
        )
    if "ZeroRedundancyOptimizer" in names:
        raise ValueError(
            f"{name} gives each process a part of the state, which the Mechanic's checkpoint cannot hold: use "
            "torch.distributed.fsdp.fully_shard, which shards the optimizer's state too, or wrap the plain optimizer"
        )
    if isinstance(one, LBFGS):
        raise ValueError(
            f"{name} finds the length of its steps itself, and computes the next from where it went, so that it "
            'diverges if a Mechanic scales them: use it alone, with line_search_fn="strong_wolfe"'
        )


def check_params(base: Optimizer) -> None:
    """Check that no parameter is given twice, and that each has its memory to itself, as plain numbers."""
    params = list(params_of(base))
    if len({id(p) for p in params}) < len(params):
        raise ValueError(
            "a param group has a parameter twice, and the optimizer would step it twice: give each once. parameters() "
            "of the whole model does so, with tied weights too"
        )
    places = []
    for p in [local(p).detach() for p in params]:
        if p.is_conj() or p.is_neg():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is a view that conjugates or negates what it reads, and a "
                "Mechanic cannot write through it: give nn.Parameter(view.resolve_conj().resolve_neg())"
            )
        dense = p.layout is torch.strided and type(p) is Tensor and not p.is_meta
        if dense and p.numel() and p.numel() == 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)):
            places.append((str(p.device), p.data_ptr(), p.nbytes, tuple(p.shape)))
    for (device, start, size, shape), (other, place, _, like) in pairwise(sorted(places)):
        if device == other and start <= place < start + size and start:
            raise ValueError(
                f"two parameters, of shapes {shape} and {like}, share memory, so that each step of one would move the "
                "other: tie weights by giving both modules the same nn.Parameter (a.weight = b.weight)"
            )


def hidden(base: Optimizer) -> Optimizer | None:
    """An optimizer inside `base` that steps groups of its own; None: there is none that can be found."""
    known = {id(group) for group in base.param_groups}
    for value in [value for one in members(base) for value in vars(one).values()]:
        found = list(value.values()) if isinstance(value, Mapping) else value
        for inner in found if isinstance(found, list | tuple) else [found]:
            if isinstance(inner, Optimizer) and any(id(group) not in known for group in inner.param_groups):
                return inner
    return None


class Look:
    """Look, in one step, for what a base does to the parameters that a Mechanic cannot know.

    It has hooks on the base until ``end()``: what the base's other hooks edit, they edit in the middle of the
    Mechanic's step, and a copy of the parameters that the base creates in its state stays where it is.

    Args:
        base: the optimizer, before the step.
    """

    def __init__(self, base: Optimizer) -> None:
        self.found: list[str] = []  # messages
        self._handles: list[Any] = []
        self._before: dict[Tensor, Tensor] = {}  # corners of some parameters
        self._sums: list[str] = []
        for one in with_members(base):
            pre, post = (getattr(one, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
            if pre is None or post is None or _capturing():
                continue
            edits = len(pre) > 1 or len(post) > 0  # one is the Mechanic's
            for hooks, register in ((pre, one.register_step_pre_hook), (post, one.register_step_post_hook)):
                for last in (False, True) if edits else ():
                    self._handles.append(register(self._compare if last else self._add_up))
                    hooks.move_to_end(self._handles[-1].id, last=last)
            if one in members(base):
                stepped = (p for p in params_of(one) if p.grad is not None and not p.is_meta)
                self._before |= islice(((p, c) for p in stepped if _varied(c := corner(p).clone())), WATCHED)
                self._handles.append(one.register_step_post_hook(self._search))

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _add_up(self, one: Optimizer, *_: object) -> None:
        """Before the other hooks: the sum of each parameter."""
        self._sums = [_sum(p) for p in params_of(one)]

    def _compare(self, one: Optimizer, *_: object) -> None:
        """After the other hooks."""
        if self._sums != [_sum(p) for p in params_of(one)]:
            self.found.append(
                f"a step hook of {type(one).__name__} edits the parameters in the middle of the Mechanic's step, where "
                "they are not those that you train: register it on the Mechanic"
            )

    def _search(self, one: Optimizer, *_: object) -> None:
        """At the end of the base's step."""
        for p in [p for p in params_of(one) if p in self._before]:
            before, after = self._before[p], corner(p)
            for key, value in one.state.get(p, {}).items():
                like = isinstance(value, Tensor) and value.shape == p.shape and key not in KEPT
                if like and type(local(value)) in (Tensor, Parameter) and value.layout is torch.strided:
                    kept = corner(value).to(before)
                    if torch.equal(kept, before) or torch.equal(kept, after):
                        self.found.append(
                            f"{type(one).__name__} keeps a copy of the parameters in its state, {key!r}, which the "
                            "Mechanic does not move with them. Whatever is computed from this copy is wrong: if the "
                            "optimizer itself does so, wrap one that keeps none"
                        )
                        return


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: then nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _sum(p: Tensor) -> str:
    return str(local(p).detach().sum(dtype=torch.promote_types(p.dtype, torch.float64)).item())


def _varied(t: Tensor) -> bool:
    """Whether the values differ: else other state may equal them by chance."""
    return t.numel() > 1 and bool((t != t.flatten()[0]).any())
