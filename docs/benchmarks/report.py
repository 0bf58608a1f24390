"""The tables of docs/performance.md and a bar chart, from what the other scripts have written: report.py FOLDER"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KINDS = ("state", "persistent", "transient")
BARS = ("manic", "manic, eager", "AdamWScheduleFree", "Prodigy", "mechanic-pytorch")
COLOURS = ("#0b6e4f", "#6bbf8f", "#b0b7c3", "#8a93a3", "#5b6474")


def table(corner: str, columns: list[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def names(results: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(result[key] for result in results))


def step_time(results: list[dict[str, Any]]) -> str:
    found = {(r["case"], r["threads"], r["contender"]): r for r in results}
    cases, rows = names(results, "case"), []
    for threads in sorted({r["threads"] for r in results}):
        control = [found[case, threads, "control"] for case in cases]
        rows.append((f"floor, {threads} thread(s)", [f"{r['floor']:.1f}" for r in control]))
        for name in names(results, "contender"):
            cells = [found.get((case, threads, name)) for case in cases]
            if all(cells):
                rows.append((f"{name}, {threads} thread(s)", [f"{r['ratio']:.2f}" for r in cells if r]))
        rows.append((f"plain step, ms, {threads} thread(s)", [f"{r['plain_ms']:.1f}" for r in control]))
    return table("step time / plain AdamW(fused)", cases, rows)


def memory(results: list[dict[str, Any]]) -> str:
    found = {(r["contender"], r["dtype"]): r for r in results}
    dtypes, rows = names(results, "dtype"), []
    for name in names(results, "contender"):
        cells = [found.get((name, dtype)) for dtype in dtypes]
        rows.append((name, [" / ".join(f"{r[kind]:.2f}" for kind in KINDS) if r else "–" for r in cells]))
    return table("bytes per parameter: state / held / transient", dtypes, rows)


def end_to_end(results: list[dict[str, Any]]) -> str:
    rows = [(r["contender"], [f"{r['ratio']:.3f}", f"{r['low']:.3f} … {r['high']:.3f}"]) for r in results]
    return table("whole training step / with plain AdamW", ["median", "quartiles"], rows)


def sums(results: list[dict[str, Any]]) -> str:
    found = {(r["how"], r["dtype"]): f"{r['error']:.0e}" for r in results}
    dtypes = names(results, "dtype")
    return table("relative error of ‖g‖²", dtypes, [(h, [found[h, d] for d in dtypes]) for h in names(results, "how")])


def gpu(results: list[dict[str, Any]]) -> str:
    rows = [(r["check"], [r["result"], r["goal"], r["ok"]]) for r in results]
    return table("check or figure", ["result", "goal", "ok"], rows)


def chart(results: list[dict[str, Any]], path: Path) -> None:
    """Step time on one thread: a group of bars per model, and where the floor is."""
    cases = names(results, "case")
    threads = min(r["threads"] for r in results)
    found = {(r["case"], r["contender"]): r for r in results if r["threads"] == threads}
    figure, axes = plt.subplots(figsize=(9, 4.2))
    width = 0.8 / len(BARS)
    for i, (name, colour) in enumerate(zip(BARS, COLOURS, strict=True)):
        if all((case, name) in found for case in cases):
            heights = [found[case, name]["ratio"] for case in cases]
            at = [c - 0.4 + (i + 0.5) * width for c in range(len(cases))]
            axes.bar(at, heights, 0.92 * width, color=colour, label=name)
            for x, height in zip(at, heights, strict=True):
                axes.annotate(f"{height:.1f}", (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    for c, case in enumerate(cases):
        line = [found[case, "control"]["floor"]] * 2
        axes.plot([c - 0.42, c + 0.42], line, color="#c1121f", lw=1.2, label=None if c else "floor: reading six words")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("step time / plain AdamW(fused)")
    axes.set_title(f"What a wrapped step costs ({threads} CPU thread, lower is better)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the .json files are, and the chart goes")
    folder = parser.parse_args().folder
    for make in (step_time, end_to_end, memory, sums, gpu):
        path = folder / f"{make.__name__}.json"
        if path.exists():
            data = json.loads(path.read_text())
            print(f"\n{make.__name__}: {data['machine']}\n\n{make(data['results'])}")
            if make is step_time:
                chart(data["results"], folder / "step_time.png")
                print(f"\nchart: {folder / 'step_time.png'}")


if __name__ == "__main__":
    main()
