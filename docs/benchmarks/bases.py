"""Every optimizer of torch and of pytorch_optimizer in a Mechanic: python docs/benchmarks/bases.py

Each one trains a small network three times: alone, in a Mechanic, and in a Mechanic that is saved and loaded in the
middle, into a new network, through a file that is read with weights_only=True; and once more through
torch.distributed.checkpoint. It passes if the loss falls, and if both resumed runs end at the same bits as the one that
was not interrupted. The table has those that do not pass, and how they fare alone, at their default lr:
what fails alone too is not the Mechanic's fault.
"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions as Options
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from manic import Mechanic

STEPS, SAVED_AT = 120, 60
FALLS = 0.7  # of the first loss: a run that ends above has not trained
Wrap = Callable[[Optimizer], Any]


def classes() -> Iterator[tuple[str, Any]]:
    """The optimizers of torch, then those of pytorch_optimizer that torch has not, by name."""
    found = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    ours = {name: kind for name, kind in found.items() if issubclass(kind, Optimizer) and kind is not Optimizer}
    yield from sorted(ours.items())
    try:
        import pytorch_optimizer as others
    except ImportError:
        print("pytorch_optimizer is not installed: torch's own only", file=sys.stderr)
        return
    kinds = {kind.__name__: kind for kind in map(others.load_optimizer, others.get_supported_optimizers())}
    yield from sorted((name, kind) for name, kind in kinds.items() if name not in ours)


def network(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16, bias), nn.Tanh(), nn.Linear(16, 4, bias))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 6, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3], x[:, 4] - x[:, 5]], 1)


def built(kind: Any, model: nn.Module) -> Optimizer:
    """At its default lr, or at 0.01 where it has none; one that wants to be told so may orthogonalize."""
    try:
        return kind(model.parameters())
    except TypeError:
        return kind(model.parameters(), lr=0.01)
    except RuntimeError:
        return kind([{"params": list(model.parameters()), "use_muon": True}])


def train(model: nn.Module, optimizer: Any, steps: range) -> float:
    """Train, and return the mean loss of the last ten steps."""
    losses = []
    for step in steps:
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        torch.manual_seed(step)  # some optimizers draw random numbers
        losses.append(float(optimizer.step(closure)))
    return sum(losses[-10:]) / len(losses[-10:])


def by_file(model: nn.Module, optimizer: Any, fresh: nn.Module, other: Any) -> None:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])


def by_names(model: nn.Module, optimizer: Any, fresh: nn.Module, other: Any) -> None:
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        each.zero_grad()
    for flat in (False, True):
        options = Options(flatten_optimizer_state_dict=flat)
        set_optimizer_state_dict(
            fresh, other, get_optimizer_state_dict(model, optimizer, options=options), options=options
        )


def fault(kind: Any, wrap: Wrap, bias: bool = True) -> tuple[str, str]:
    """What fails, and how; "": nothing does. And the loss at the beginning and at the end."""
    what, losses = "cannot be built", ""
    try:
        model = network(bias)
        optimizer = wrap(built(kind, model))
        what = "does not train"
        first = train(model, optimizer, range(1))
        train(model, optimizer, range(1, SAVED_AT))
        one = network(bias)
        whole = wrap(built(kind, one))
        last = train(one, whole, range(STEPS))
        losses = f"{first:.2f} to {last:.2f}"
        for what, carry in (("does not resume", by_file), ("does not pass torch.distributed.checkpoint", by_names)):
            fresh = network(bias)
            other = wrap(built(kind, fresh))
            carry(model, optimizer, fresh, other)
            train(fresh, other, range(SAVED_AT, STEPS))
            if not all(map(torch.equal, fresh.parameters(), one.parameters())):
                return f"{what}: ends at other bits", losses
            if isinstance(whole, Mechanic) and not last < FALLS * first:
                return "does not train", losses
    except Exception as error:
        if "--trace" in sys.argv:
            traceback.print_exc()
        said = (str(error).strip().splitlines() or [""])[0]
        if bias and ("2D" in said or "2-dimensional" in said):  # for matrices only
            return fault(kind, wrap, bias=False)
        return f"{what}: {type(error).__name__}: {said[:90]}", losses
    return "", losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of classes; default: all")
    parser.add_argument("--out", type=Path, default=Path("out/bases"), help="folder of the table")
    parser.add_argument("--trace", action="store_true", help="show where an exception came from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = ["| optimizer | of | in a Mechanic | loss | alone | loss |", "|---" * 6 + "|"]
    count = passed = 0
    for name, kind in classes():
        if args.names and name not in args.names:
            continue
        count += 1
        found, losses = fault(kind, Mechanic)
        if found:
            alone, its_losses = fault(kind, lambda base: base)
            row = (name, kind.__module__.partition(".")[0], found, losses, alone or "passes", its_losses)
            rows.append("| " + " | ".join(each.replace("|", "\\|") for each in row) + " |")
            print(rows[-1], flush=True)
        passed += not found
    text = f"{passed} of {count} pass.\n\n" + "\n".join(rows) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text.splitlines()[0]} {args.out / 'table.md'}")


if __name__ == "__main__":
    main()
