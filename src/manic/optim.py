"""Every optimizer of ``torch.optim`` by its own name, in a Mechanic: for what names a class by its dotted path.

    manic.optim.AdamW(model.parameters(), lr=1e-3, mechanic={"per_group": True})

is ``Mechanic(torch.optim.AdamW(model.parameters(), lr=1e-3), per_group=True)``. An optimizer class from elsewhere:
``mechanize(TheClass)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from manic.mechanic import Mechanic


class Mechanized(Mechanic):
    """A Mechanic that builds its base optimizer.

    Args:
        args: as the base optimizer takes them.
        mechanic: keyword arguments of ``manic.Mechanic``, such as ``{"per_group": True}``. None: its defaults.
        options: keyword arguments of the base optimizer.

    Raises:
        TypeError: `mechanic` is no mapping, or has a key that is no argument of ``Mechanic``.
        ValueError: as the base optimizer and ``Mechanic`` raise it.
    """

    base: ClassVar[type[Optimizer]]

    def __init__(self, *args: Any, mechanic: Mapping[str, Any] | None = None, **options: Any) -> None:
        if mechanic is not None and not isinstance(mechanic, Mapping):
            raise TypeError(
                f"mechanic takes a dict of Mechanic's arguments, such as {{'per_group': True}}, got {mechanic!r}"
            )
        super().__init__(self.base(*args, **options), **(mechanic or {}))

    def __init_subclass__(cls, **kept: Any) -> None:
        """Show people and configuration tools the base's arguments, and ours."""
        super().__init_subclass__(**kept)

        def init(self: Mechanized, *args: Any, **options: Any) -> None:
            Mechanized.__init__(self, *args, **options)

        base = inspect.signature(cls.base.__init__)
        ours = inspect.Parameter("mechanic", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=dict | None)
        init.__signature__ = base.replace(parameters=[*base.parameters.values(), ours])  # type: ignore[attr-defined]
        cls.__init__ = init  # type: ignore[method-assign]
        cls.__doc__ = f"``torch.optim.{cls.__name__}`` in a Mechanic, whose arguments `mechanic` takes as a dict."


class Adadelta(Mechanized):
    base = torch.optim.Adadelta


class Adafactor(Mechanized):
    base = torch.optim.Adafactor


class Adagrad(Mechanized):
    base = torch.optim.Adagrad


class Adam(Mechanized):
    base = torch.optim.Adam


class Adamax(Mechanized):
    base = torch.optim.Adamax


class AdamW(Mechanized):
    base = torch.optim.AdamW


class ASGD(Mechanized):
    base = torch.optim.ASGD


class LBFGS(Mechanized):
    base = torch.optim.LBFGS


class NAdam(Mechanized):
    base = torch.optim.NAdam


class RAdam(Mechanized):
    base = torch.optim.RAdam


class RMSprop(Mechanized):
    base = torch.optim.RMSprop


class Rprop(Mechanized):
    base = torch.optim.Rprop


class SGD(Mechanized):
    base = torch.optim.SGD


class SparseAdam(Mechanized):
    base = torch.optim.SparseAdam


if hasattr(torch.optim, "Muon"):  # from torch 2.9 on

    class Muon(Mechanized):
        base = torch.optim.Muon
