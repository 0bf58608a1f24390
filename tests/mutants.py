"""Mutation testing of the scalar half, the sweeps and the checkpoint: `nox -s mutants`.

mutmut changes one thing at a time in a copy of the package, and some test must notice. What no test notices is printed
and fails, unless it is explained below; so does an explanation of nothing.

    python tests/mutants.py out/mutants [tuner ...]
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

ROOT = Path(__file__).parents[1]

# What is changed together, and the tests that are to notice. Each has a folder of its own.
PLAN: dict[str, tuple[list[str], list[str]]] = {
    "tuner": (["tuner"], ["tuner", "algorithm", "properties", "errors"]),
    "sweeps": (
        ["sweeps", "storage"],
        ["algorithm", "properties", "usage", "conventions", "kernels", "unwrap", "found"],
    ),
    "checkpoint": (
        ["checkpoint", "fit", "schedules"],
        ["fit", "resume", "stateful", "hostile", "unwrap", "freeze", "errors", "found"],
    ),
}
# Slow ones, with processes, compilers or Triton's interpreter; and what wants threads, or no frames of mutmut's.
WITHOUT = "new_process or without_manic or killed or compile or triton or same_run or number_of_threads or callers_line"

# What hypothesis finds is enough; a minute of making it smaller is not wanted.
FIRST = """
from hypothesis import Phase, settings

settings.register_profile("first", phases=[Phase.explicit, Phase.generate])
settings.load_profile("first")
"""

# Of what lives, name and diff: why. It does what the original does, or only what is not run here could tell. Each is of
# one place in one function, so that it explains nothing that a test would notice. A dot stands for a line's end, too.
EXPLAINED = {
    r"^manic\.(tuner\.x_tune|sweeps\.x__cut|schedules\.x_fold|fit\.x_by_id|checkpoint\.x__(try_schedule|load_tuner)"
    r"|fit\.x_(_check_groups|read_record|_check_schedule|_check_whole))__.*"
    r"\n-([^\n]*), strict=True(\)[^\n]*)\n\+\4, (strict=(None|False))?\5(\n|$)": "what is zipped is of one length",
    r"^manic\.schedules\.x_(fold|differences)__.*\n-([^\n]*), strict=False(\)[^\n]*)\n\+\2, (strict=None)?\3(\n|$)": (
        "which is the default"
    ),
    r"^manic\.tuner\.x__scale_free__.*\+ +scale = [^\n]* torch\.where\(h <= 0, gain": "both are 0 there",
    r"^manic\.sweeps\.x__add__.*\.sum\(0\)\.to\(None\)": "the sums and the pieces are on one device here",
    r"^manic\.sweeps\.x__anchor__.* x\.to\(None\) - delta \* scale": "x - S·Δ takes Δ's dtype, the wider",
    r"^manic\.sweeps\.x__move_eagerly__.*\)\.to\(None\)": "+= keeps the dtype of the sum; one device",
    r"^manic\.sweeps\.x__as_wanted__.*\.to\((device=None, )?dtype=slot": "all is on one device here",
    r"^manic\.sweeps\.x__counts__.*\]\.to\(None\)": "all is on one device here",
    r"^manic\.checkpoint\.x__load_base__.* value\.to\((device=None, )?copy=True\)": "all is on one device here",
    r"^manic\.checkpoint\.x__load_tuner__.*\.to\((None, )?torch\.float32, copy=True\)": "all is on one device here",
    r"^manic\.sweeps\.x__measure_rows__.*\.new_zeros\(2, 5": "another 0 in a sum",
    r"^manic\.sweeps\.x__move__.*\n\+ +if x\.dtype != ref\.dtype:\n +new = ": "the same x, with a copy more or less",
    r"^manic\.sweeps\.x__move__.*there, (out=None)?\)(\n|$)": "the same x, with a copy more",
    r"^manic\.sweeps\.x__finite__.*\.nan_to_num_\(None, 0\.0, 0\.0\)": "which stands for 0",
    r"^manic\.sweeps\.x_discard__.*\.discard\(group\.slots, counted, None\)": "for Triton, not run here",
    r"^manic\.sweeps\.x__row__.* if \(t\.dim\(\) == 1\) and False else": "the same, with a view of all of it",
    r"^manic\.sweeps\.x__row__.*\+ +return row if \(?row\.data_ptr\(\) (/ 64|% 65|% 64 == 1|% 64 == 0\) and False)": (
        "the same, with a copy more"
    ),
    r'^manic\.fit\.x__check_groups__.*"default", 1\) is None': "no more None than 0 is",
    r"^manic\.fit\.x__first_state__.*range\(3\)": "a third step uses no other options than the second",
    r'^manic\.fit\.x__first_state__.*"__wrapped__", (None)?\)': "torch wraps every step",
    r"^manic\.checkpoint\.x__load_tuner__.*\n- +continue\n\+ +break": "without x_ref there is no Δ",
    r"^manic\.checkpoint\.x_unpack__.* copy\.copy\(scheduler": "a load replaces what is in it, changing nothing",
    r"^manic\.checkpoint\.x_unpack__.*anywhere\([^\n]* layouts, (None, mechanic\.|mechanic\.process_group, None)": (
        "one process has no other ranks"
    ),
    r'(?i)^manic\.checkpoint\.x_unpack__.*\n- +"(the checkpoint does not [^\n"]*)"\n\+ +(None|"(XX)?\1(XX)?")\n': (
        "one process has no other ranks"
    ),
    r"^manic\.checkpoint\.x_warn__.*\+ +callers = \[name\.(rpartition|partition\(\"XX|partition\(\"\.\"\)\[1\])": (
        "test_warnings_point_at_the_callers_line"
    ),
    r"^manic\.checkpoint\.x_warn__.*\+ +warnings\.warn\(message, (\)|stacklevel=1 -|[^\n]* if name in INSIDE\))": (
        "test_warnings_point_at_the_callers_line"
    ),
    r"^manic\.checkpoint\.x__callers__.*\._getframe\(2\)": "test_warnings_point_at_the_callers_line",
    r'^manic\.checkpoint\.x__callers__.*\.get\("__name__", "XXXX"\)': "a name like no other, either",
}
NOTICED = (1, 3, -6, -11)  # pytest's exit code: a test failed; pytest itself failed; crashes. (-9: somebody killed it.)


def prepare(place: Path, files: list[str], tests: list[str]) -> None:
    """A copy to work on."""
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, place / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", place)
    # mutmut leaves what is decorated alone.
    sweeps = place / "src" / "manic" / "sweeps.py"
    sweeps.write_text(sweeps.read_text().replace("\n@disable_dynamo\n", "\n"))
    conftest = place / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + FIRST)
    alone = "not (agreement or distributed or frameworks)"
    config = {
        "source_paths": ["src"],
        "only_mutate": [f"src/manic/{name}.py" for name in files],
        "also_copy": ["docs", "README.md"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", alone, "-k", f"not ({WITHOUT})"],
        "pytest_add_cli_args_test_selection": [f"tests/test_{name}.py" for name in tests],
        "timeout_multiplier": 1.5,
        "timeout_constant": 60.0,
    }
    lines = [f"{key} = {value!r}" for key, value in config.items()]
    (place / "pyproject.toml").write_text("\n".join([(ROOT / "pyproject.toml").read_text(), "[tool.mutmut]", *lines]))


def fingerprint(files: list[str], tests: list[str]) -> str:
    """Of all that decides what is noticed: the package, the tests and what they import, what is said above."""
    found = hashlib.sha256(repr((files, tests, WITHOUT, FIRST)).encode())
    sources = [path for path in (ROOT / "src" / "manic").iterdir() if path.is_file()]
    helpers = [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith(("test_", "mutants"))]
    for path in sorted([*sources, *helpers, *(ROOT / "tests" / f"test_{name}.py" for name in tests)]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def mutmut(place: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=place, stdout=subprocess.PIPE, text=True, check=True).stdout


def results(place: Path) -> dict[str, int | None]:
    """What became of each mutant: pytest's exit code; None: not tried."""
    files = (place / "mutants" / "src" / "manic").glob("*.meta")
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
