"""``python -m manic inspect CHECKPOINT ...``: what the Mechanics in checkpoints have learned.

CHECKPOINT is a file of ``torch.save`` or a folder of ``torch.distributed.checkpoint``. Exit code: 0; 1 if one could not
be read or has no Mechanic, which one line on stderr explains; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from manic import __version__
from manic.checkpoint.inspection import Found, inspect
from manic.tuner import TunerState


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m manic", description="The learning-rate tuner's command line.")
    parser.add_argument("--version", action="version", version=f"manic {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="what the Mechanics in checkpoints have learned")
    command.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="file or DCP folder")
    command.add_argument("--json", action="store_true", help="print JSON: a list with one entry for each Mechanic")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw scale and effective lr against step")
    args = parser.parse_args(arguments)

    found: list[tuple[Path, Found]] = []
    faults: list[str] = []
    for path in args.checkpoints:
        try:
            found += [(path, one) for one in inspect(path)]
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if args.json:
        print(json.dumps([{"path": str(path), **one.as_dict()} for path, one in found], indent=2))
    elif found:
        print("\n\n".join(text(path, one) for path, one in found))
    if args.plot and found:
        try:
            plot([one for _, one in found], args.plot)
        except ImportError as error:
            faults.append(f"no plot: {error} (it takes matplotlib: pip install manic[plot])")
        except (OSError, ValueError) as error:  # a folder that is not there, a format that matplotlib does not know
            faults.append(f"no plot: {error}")
    for fault in faults:
        print("manic:", fault.partition("\n")[0], file=sys.stderr)
    return 1 if faults else 0


def text(path: Path, found: Found) -> str:
    """A Mechanic of a checkpoint, for people."""
    look, record = found.look, found.record
    kinds = record.base, record.scheduler, look.options.variant, f"format {found.format}", "frozen" * record.frozen
    lines = [
        f"{path}{found.where and ': '}{found.where} ({', '.join(filter(None, kinds))})",
        f"  step          {look.step}, of which {look.tuners[0].skipped:.0f} skipped",
    ]
    for name, lr, best, scale in zip(look.names, look.effective_lrs, look.highest_lrs, look.scales, strict=True):
        lines += [f"  group {name}"] if len(look.names) > 1 else []
        ended = f" (the schedule is at 0; at the highest lr so far it is {best:.4g})" if lr == 0 < best else ""
        lines += [f"  scale         {scale:.4g}", f"  effective lr  {lr:.4g}{ended}"]
    for owner, tuner in zip(look.owners, look.tuners, strict=True):
        lines.append(f"  accumulators{owner and ' of group '}{owner}: h {tuner.h:.3g}, outliers {tuner.outliers:.0f}")
        fields = dict(zip(TunerState._fields[:4], tuner[:4], strict=True))
        known = {"beta": look.options.memories} if look.options.variant == "paper" else {}
        columns = known | {name: field.tolist() for name, field in fields.items() if field.any()}
        lines.append("    " + " ".join(f"{name:>10}" for name in columns))
        for row in zip(*columns.values(), strict=True):
            lines.append("    " + " ".join(f"{value:>10.6g}" for value in row))
    sizes = ", ".join(f"{name} {size:,} B" for name, size in found.sizes.items() if size)
    lines.append(f"  {found.tensors} tensors of {found.numel:,} elements in all; {sizes}")
    return "\n".join(lines)


def plot(found: Sequence[Found], path: Path) -> None:
    """Scale and effective lr of every param group against the step, by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float, float]]] = {}
    places = {one.where for one in found}
    for one in found:
        look = one.look
        for name, lr, scale in zip(look.names, look.effective_lrs, look.scales, strict=True):
            label = " ".join([*([one.where] if len(places) > 1 else []), *([name] if len(look.names) > 1 else [])])
            lines.setdefault(label, []).append((look.step, scale, lr))
    figure = Figure(figsize=(10, 4), layout="constrained")
    for i, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("scale", "effective lr"), strict=True)):
        for label, points in lines.items():
            steps, *values = zip(*sorted(points), strict=True)
            axes.plot(steps, values[i], marker="o", markersize=3, label=label)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        heights = [point[1 + i] for points in lines.values() for point in points]
        if 0 < 100 * min(heights) < max(heights):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    if len(lines) > 1:
        figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
