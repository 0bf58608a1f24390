"""manic.optim: the optimizers of torch.optim by their own names, in a Mechanic."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import manic.optim
from manic import Mechanic, is_mechanized

NAMES = sorted(
    name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)
)
NAMES.remove("Optimizer")
NAMES.remove("LBFGS")  # which a Mechanic refuses
NEEDED = {"Muon": {"momentum": 0.9}, "SGD": {"momentum": 0.9}}  # an argument, to see that it arrives


def trained(build: Callable[..., Any], name: str, steps: range, model: Any = None) -> tuple[Any, Any]:
    """A model of two matrices after these steps, and its Mechanic."""
    if model is None:
        torch.manual_seed(0)
        sparse = name == "SparseAdam"
        model = torch.nn.Sequential(torch.nn.Embedding(8, 4, sparse=sparse), torch.nn.Linear(4, 3, bias=False))
        mechanic = build(model[:1].parameters() if sparse else model.parameters(), lr=0.01, **NEEDED.get(name, {}))
    else:
        model, mechanic = model
    for step in steps:
        indices = torch.randint(8, (16,), generator=torch.Generator().manual_seed(step))

        def closure(indices: Any = indices) -> Any:
            mechanic.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(indices), indices % 3)
            loss.backward()
            return loss

        mechanic.step(closure)
    return model, mechanic


def same(one: Any, two: Any) -> bool:
    return all(map(torch.equal, one[0].parameters(), two[0].parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*sparse:UserWarning", "ignore:ASGD keeps a copy:UserWarning")
def test_it_is_the_optimizer_of_that_name_in_a_mechanic(name: str) -> None:
    options = {"s_decay": 0.5, "per_group": True}
    ours, theirs = getattr(manic.optim, name), getattr(torch.optim, name)

    def one(params: Any, **base: Any) -> Any:
        return ours(params, mechanic=options, **base)

    def two(params: Any, **base: Any) -> Any:
        return Mechanic(theirs(params, **base), **options)

    results = [trained(build, name, range(12)) for build in (one, two, ours)]
    assert type(results[0][1].base_optimizer) is theirs
    assert is_mechanized(results[0][1])
    assert results[0][1].scale.shape == (1,)
    assert results[0][1].scale > 0
    assert results[2][1].scale.shape == (), "without `mechanic` the options are the defaults"
    assert same(results[0], results[1])
    copies = [copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))]
    for again in [of(results[0]) for of in copies]:
        assert type(again[1]) is ours
        trained(one, name, range(12, 16), again)
        trained(two, name, range(12, 16), loaded := copy.deepcopy(results[1]))
        assert same(again, loaded)


def test_checkpoints_do_not_tell_the_two_apart() -> None:
    model, mechanic = trained(manic.optim.AdamW, "AdamW", range(10))
    fresh = copy.deepcopy(model)
    other = Mechanic(torch.optim.AdamW(fresh.parameters(), lr=0.01))
    other.load_state_dict(copy.deepcopy(mechanic.state_dict()))
    for pair in ((model, mechanic), (fresh, other)):
        trained(Mechanic, "AdamW", range(10, 20), pair)
    assert same((model,), (fresh,))


def test_a_trainer_that_names_a_class() -> None:
    path = "manic.optim.SGD"
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, Optimizer)
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, mechanic={"s_init": 1e-3})
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "s_init=0.001" in repr(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_shown(name: str) -> None:
    shown = inspect.signature(getattr(manic.optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    assert list(shown) == [*theirs, "mechanic"]
    assert all(shown[key] == theirs[key] for key in theirs)
    assert name in getattr(manic.optim, name).__doc__


def test_the_names_are_written_out() -> None:
    """So that editors and type checkers, which run nothing, see them."""
    tree = ast.parse(Path(manic.optim.__file__).read_text())
    written = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert written >= set(NAMES)
    assert set(dir(manic.optim)) >= set(NAMES)


def test_wrong_arguments() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"mechanic takes a dict .* 'per_group'"):
        manic.optim.AdamW([p], mechanic="per_group")
    with pytest.raises(TypeError, match="per_grup"):
        manic.optim.AdamW([p], mechanic={"per_grup": True})
    with pytest.raises(TypeError, match="lrr"):
        manic.optim.AdamW([p], lrr=0.1)
    with pytest.raises(ValueError, match="s_decay"):
        manic.optim.AdamW([p], mechanic={"s_decay": -1})
