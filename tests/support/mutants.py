"""Mutation testing of the scalar half, the sweeps and the checkpoint: `nox -s mutants`.

mutmut changes one thing at a time in a copy of the package, and some test must notice. What no test notices is printed
and fails, unless it is explained below; so does an explanation of nothing.

    python tests/support/mutants.py out/mutants [tuner ...]
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What is changed together, and the tests that are to notice. Each has a folder of its own.
PLAN: dict[str, tuple[list[str], list[str]]] = {
    "tuner": (
        ["tuner", "scale_free", "algorithm"],
        ["tuner", "algorithm", "properties", "errors", "edits", "whole_steps", "usage"],
    ),
    "sweeps": (
        ["sweeps/eager", "sweeps/passes", "sweeps/base", "parameters"],
        [
            "algorithm",
            "properties",
            "usage",
            "conventions",
            "kernels",
            "unwrap",
            "places",
            "bases",
            "interrupted",
            "errors",
            "edits",
            "whole_steps",
        ],
    ),
    "checkpoint": (
        ["checkpoint/loading", "checkpoint/validation", "checkpoint/record", "checkpoint/older", "schedules", "run"],
        [
            "validation",
            "resume",
            "stateful",
            "hostile",
            "unwrap",
            "freeze",
            "errors",
            "loading",
            "bases",
            "interrupted",
            "older",
        ],
    ),
}
# Slow ones, with processes or Triton's interpreter; and what wants threads, or no frames of mutmut's.
WITHOUT = "new_process or without_manic or killed or fork or triton or same_run or number_of_threads or callers_line"

# What hypothesis finds is enough; a minute of making it smaller is not wanted.
FIRST = """
from hypothesis import Phase, settings

settings.register_profile("first", phases=[Phase.explicit, Phase.generate])
settings.load_profile("first")
"""

# Of what lives, name and diff (a pattern, in which a dot stands for a line's end, too): why. It does what the original
# does, or only what is not run here could tell. Empty since the source was rebuilt: not run over it yet.
EXPLAINED: dict[str, str] = {}
NOTICED = (1, 3, -6, -11)  # pytest's exit code: a test failed; pytest itself failed; crashes. (-9: somebody killed it.)


def files_of(tests: list[str]) -> list[Path]:
    """Where these tests are, in whichever folder."""
    places = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    return [places[f"test_{name}"] for name in tests]


def prepare(place: Path, files: list[str], tests: list[str]) -> None:
    """A copy to work on."""
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, place / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", place)
    for path in (place / "src" / "manic").rglob("*.py"):  # mutmut leaves what is decorated alone
        path.write_text(re.sub(r"\n *@disable_dynamo(?=\n)", "", path.read_text()))
    conftest = place / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + FIRST)
    alone = "not (agreement or distributed or frameworks)"
    config = {
        "source_paths": ["src"],
        "only_mutate": [f"src/manic/{name}.py" for name in files],
        "also_copy": ["docs", "README.md"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", alone, "-k", f"not ({WITHOUT})"],
        "pytest_add_cli_args_test_selection": [str(path.relative_to(ROOT)) for path in files_of(tests)],
        "timeout_multiplier": 1.5,
        "timeout_constant": 60.0,
    }
    lines = [f"{key} = {value!r}" for key, value in config.items()]
    (place / "pyproject.toml").write_text("\n".join([(ROOT / "pyproject.toml").read_text(), "[tool.mutmut]", *lines]))


def fingerprint(files: list[str], tests: list[str]) -> str:
    """Of all that decides what is noticed: the package, the tests and what they import, what is said above."""
    found = hashlib.sha256(repr((files, tests, WITHOUT, FIRST)).encode())
    sources = [path for path in (ROOT / "src" / "manic").rglob("*") if path.is_file()]
    helpers = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith(("test_", "mutants"))]
    for path in sorted([*sources, *helpers, *files_of(tests)]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def mutmut(place: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=place, stdout=subprocess.PIPE, text=True, check=True).stdout


def results(place: Path) -> dict[str, int | None]:
    """What became of each mutant: pytest's exit code; None: not tried."""
    files = (place / "mutants" / "src" / "manic").rglob("*.meta")
    return {name: code for file in files for name, code in json.loads(file.read_text())["exit_code_by_key"].items()}


def living(place: Path) -> dict[str, str]:
    """Name and diff of what nobody has noticed."""
    names = [name for name, code in results(place).items() if code not in NOTICED]
    return {name: "\n".join([name, *mutmut(place, "show", name).splitlines()[3:]]) for name in names}


def reasons(text: str) -> list[str]:
    return [pattern for pattern in EXPLAINED if re.search(pattern, text, re.DOTALL)]


def run(place: Path, files: list[str], tests: list[str]) -> None:
    """Goes on where it was killed, and tries again what lived; but all anew where a test or the package has changed."""
    mark, now = place / "fingerprint", fingerprint(files, tests)
    if not mark.exists() or mark.read_text() != now:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        mark.write_text(now)
    tried = (place / "mutants").exists()
    prepare(place, files, tests)
    command = [sys.executable, "-m", "mutmut", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, env=environment, check=True)
    if tried and (again := [name for name, text in living(place).items() if not reasons(text)]):
        subprocess.run([*command, *again], cwd=place, env=environment, check=True)


def main() -> None:
    wrong, used = [], set()
    for name in sys.argv[2:] or PLAN:
        place = Path(sys.argv[1]).resolve() / name
        run(place, *PLAN[name])
        lived = living(place)
        wrong += [text for text in lived.values() if not reasons(text)]
        used.update(*map(reasons, lived.values()))
        sys.stdout.write(f"{name}: {len(lived)} of {len(results(place))} live\n")
    if wrong:
        wrong.append(f"{len(wrong)} live, and are not explained")
    if not sys.argv[2:]:
        wrong += [f"this explains nothing: {pattern}" for pattern in EXPLAINED if pattern not in used]
    if wrong:
        sys.exit("\n\n".join(wrong))


if __name__ == "__main__":
    main()
