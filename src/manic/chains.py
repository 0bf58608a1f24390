"""Several optimizers over different parameters as one: Muon for the matrices and AdamW for the rest, say."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import chain as concatenated
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.optim import LBFGS, Optimizer

HOOKS = tuple(
    f"_optimizer_{of}_{when}_hooks" for of in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)


def prepare(optimizer: Any) -> None:
    """Do what ``Optimizer.__init__`` does, apart from building groups and state of its own."""
    for name in HOOKS:
        setattr(optimizer, name, OrderedDict())
    optimizer._patch_step_function()
    optimizer._warned_capturable_if_run_uncaptured = True


class Chain(Optimizer):
    """What ``chain()`` returns."""

    def __init__(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"chain takes optimizers that are built already, such as chain(Muon(matrices), AdamW(rest)), got "
                    f"{optimizer!r}"
                )
        self.optimizers = [one for optimizer in optimizers for one in members(optimizer)]
        if not self.optimizers:
            raise TypeError("chain takes at least one optimizer: chain(Muon(matrices), AdamW(rest))")
        seen: dict[Tensor, str] = {}
        for one in self.optimizers:
            name = type(one).__name__
            if hasattr(one, "base_optimizer"):
                raise ValueError(f"the {name} wraps an optimizer: chain the plain ones, and wrap the chain")
            if isinstance(one, LBFGS):
                raise ValueError(
                    "LBFGS evaluates the loss again and again in its step, so that it cannot be in a chain"
                )
            for p in params_of(one):
                if p in seen:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} is in both {seen[p]} and {name}: give each "
                        "parameter to one optimizer"
                    )
                seen[p] = name
        self._known: list[dict[str, Any]] = []
        self.defaults: dict[str, Any] = {}  # each optimizer has its own
        self.state = State(self.optimizers)  # type: ignore[assignment]
        prepare(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of all optimizers. One that was added later comes last, since schedulers count them."""
        live = list(concatenated.from_iterable(one.param_groups for one in self.optimizers))
        ours, theirs = set(map(id, self._known)), set(map(id, live))
        if ours != theirs:  # a new list: a load that fails puts the old one back
            known = [group for group in self._known if id(group) in theirs]
            self._known = known + [group for group in live if id(group) not in ours]
        return self._known

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimizer, in order.

        Args:
            closure: evaluates the model and returns the loss; called once, before the first of them.

        Returns:
            the closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one in self.optimizers:
            one.step()
        return loss

    @disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad()``."""
        for one in self.optimizers:
            one.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: a chain cannot tell which of its optimizers is meant.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{name_of(self)} cannot tell which optimizer is to step the param group: add it to that one, and the "
            "chain has it from then on"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "_known": self.param_groups, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when it is unpickled or copied; and by ``load_state_dict()``, or a user, with new groups or state."""
        if "optimizers" in state:
            vars(self).update(state, state=State(state["optimizers"]))
            prepare(self)
            return
        place = {id(group): i for i, group in enumerate(self.param_groups)}
        groups, saved = state.get("param_groups", self.param_groups), state.get("state", self.state)
        for one in self.optimizers:
            mine = [groups[place[id(group)]] for group in one.param_groups]
            params = list(concatenated.from_iterable(group["params"] for group in mine))
            kept = defaultdict(dict, {p: saved[p] for p in params if p in saved})
            one.__setstate__({"state": kept, "param_groups": mine})
        self._known = groups


class State(MutableMapping[Tensor, Any]):
    """The state of several optimizers, by parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._owner: dict[Tensor, Optimizer] = {}  # some of them had these when it was last looked for

    def _of(self, p: Any) -> Any:
        """The state dict of the optimizer that has p."""
        if p not in self._owner:
            self._owner = {q: one for one in self._optimizers for q in params_of(one)}
        return self._owner[p].state if p in self._owner else {}

    def __getitem__(self, p: Tensor) -> Any:
        return self._of(p)[p]

    def get(self, p: Tensor, default: Any = None) -> Any:
        """As ``dict.get()``: it adds nothing."""
        return self._of(p).get(p, default)

    def __contains__(self, p: object) -> bool:
        return p in self._of(p)

    def __setitem__(self, p: Tensor, values: Any) -> None:
        self._of(p)[p] = values

    def __delitem__(self, p: Tensor) -> None:
        del self._of(p)[p]

    def __iter__(self) -> Iterator[Tensor]:
        return concatenated.from_iterable(list(one.state) for one in self._optimizers)

    def __len__(self) -> int:
        return sum(len(one.state) for one in self._optimizers)


def chain(*optimizers: Optimizer) -> Chain:
    """Several optimizers over different parameters as one ``torch.optim.Optimizer``.

    ``param_groups`` are those of all of them, in order, and ``state`` is theirs. So one LR scheduler, one GradScaler,
    one state dict and one Mechanic serve them all. The optimizers stay usable by themselves.

    Args:
        optimizers: those that are built already. A chain among them counts as its own optimizers.

    Returns:
        the optimizer. Its attribute ``optimizers`` lists those that it is made of.

    Raises:
        TypeError: an argument is no optimizer instance, or there is none.
        ValueError: two of them have a parameter in common; one is a Mechanic; one needs a closure (LBFGS).
    """
    return Chain(*optimizers)


def members(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers of a chain; of any other, itself."""
    return optimizer.optimizers if isinstance(optimizer, Chain) else [optimizer]


def with_members(optimizer: Optimizer) -> list[Optimizer]:
    """A chain and its optimizers; any other alone."""
    return [optimizer, *members(optimizer)] if isinstance(optimizer, Chain) else [optimizer]


def owners(optimizer: Optimizer) -> list[Optimizer]:
    """For each param group the optimizer that it belongs to."""
    of = {id(group): one for one in members(optimizer) for group in one.param_groups}
    return [of[id(group)] for group in optimizer.param_groups]


def name_of(optimizer: Optimizer) -> str:
    """The name of its class, and of those that it is made of."""
    names = [type(one).__name__ for one in members(optimizer)]
    return f"chain({', '.join(names)})" if isinstance(optimizer, Chain) else names[0]


def params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of all its groups."""
    return concatenated.from_iterable(group["params"] for group in optimizer.param_groups)
