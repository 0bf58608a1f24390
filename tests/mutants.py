"""Mutation testing of the scalar half, the sweeps and the checkpoint: `nox -s mutants`.

mutmut changes one thing at a time in a copy of the package, and some test must notice. What no test notices is printed
and fails, unless it is explained below. It goes on where it was killed, and tries again what lived.

    python tests/mutants.py out/mutants [tuner ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What is changed together, and the tests that are to notice. Each has a folder of its own.
PLAN: dict[str, tuple[list[str], list[str]]] = {
    "tuner": (["tuner"], ["tuner", "algorithm", "properties", "errors"]),
    "sweeps": (["sweeps", "storage"], ["algorithm", "properties", "usage", "conventions", "kernels", "unwrap"]),
    "checkpoint": (
        ["checkpoint", "fit", "schedules"],
        ["fit", "resume", "stateful", "hostile", "unwrap", "freeze", "errors"],
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

# Of what lives, name and diff: why. It does what the original does, or only what is not run here could tell.
EXPLAINED = {
    r"-(.*), strict=\w+(\).*)\n\+\1, (strict=\w+)?\2$": "what is zipped is of one length already",
    r'(?i)-( +f?".*")\n\+\1$': "the case of a message",
    r'-( +f?")(.*)"\n\+\1XX\2XX"$': "the edges of a message",
    r"\+.* torch\.where\(h <= 0, gain": "the gain and the loss are 0 there",
    r"\+ +update\.nan_to_num_\(None, 0\.0, 0\.0\)": "which is 0",
    r"x__move__.*\n.*\n\+.*(x\.dtype != ref\.dtype:|there, (out=None)?\))$": "a copy more, and the same x",
    r"\+.*\.to\(((device=)?None(, )?)?((dtype|copy)=|torch\.float32, copy|\))": "here is one device; sums are wide",
    r"\+ +return tensors if \(slots\[0\]\.layout is None\) and False else": "the same, one by one",
    r"\+ +return torch\.dot\(a, b\) if \(a\.dim\(\) == 1\) and False else": "the same, with views of all of both",
    r"first_state__.*\n.*\n\+.*range\(3\)": "a third step uses no other options than the second",
    r'first_state__.*\n.*\n\+.*"__wrapped__", (None)?\)': "torch wraps every step",
    r"load_tuner__.*\n- +continue\n\+ +break$": "there is no Δ without x_ref, so nothing comes after it",
    r"load_base__.*\n.*\n\+.*(isinstance.* and False|XXstateXX|STATE)": "x_ref and Δ are replaced after it",
    r"unpack__.*\n.*\n\+ +schedule = .* copy\.copy\(": "a load replaces what is in it, and changes nothing there",
    r'unpack__(.*\n)*(.*anywhere\(|.*\n.*"the checkpoint does not fit on another)': "one process has no other ranks",
    r"measure_rows__.*\n.*\n\+.*new_zeros\(2, 5": "another 0 in a sum",
    r"\+ +group\.kernels\.discard\(group\.slots, counted, None\)": "only Triton's kernels use it: not run here",
    r"\+.*(name\.r?partition\(|stacklevel|warn\(message, \)|_getframe\(2\))": "test_warnings_point_at_the_callers_line",
    r'\+.*\.get\("__name__", "XXXX"\)': "a name like no other, either",
}


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


def mutmut(place: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=place, stdout=subprocess.PIPE, text=True, check=True).stdout


def results(place: Path) -> dict[str, str]:
    """What became of each mutant."""
    lines = mutmut(place, "results", "--all", "true").splitlines()
    return {name: status for name, _, status in (line.strip().partition(": ") for line in lines)}


def unexplained(place: Path) -> dict[str, str]:
    """The diffs of the mutants that live, and nobody has said why."""
    found = {}
    for name, status in results(place).items():
        if status not in ("killed", "segfault", "not checked"):
            diff = mutmut(place, "show", name).splitlines()
            text = "\n".join([name, *(line for line in diff if re.match(r"[-+](?!--|\+\+)", line))])
            if not any(re.search(pattern, text) for pattern in EXPLAINED):
                found[name] = text
    return found


def run(place: Path, files: list[str], tests: list[str]) -> None:
    tried = (place / "mutants").exists()
    place.mkdir(parents=True, exist_ok=True)
    prepare(place, files, tests)
    command = [sys.executable, "-m", "mutmut", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, env=environment, check=True)
    if tried and (lived := unexplained(place)):
        subprocess.run([*command, *lived], cwd=place, env=environment, check=True)


def main() -> None:
    living = []
    for name in sys.argv[2:] or PLAN:
        place = Path(sys.argv[1]).resolve() / name
        run(place, *PLAN[name])
        living += unexplained(place).values()
        sys.stdout.write(f"{name}: {dict(Counter(results(place).values()))}\n")
    if living:
        sys.exit("\n\n".join([*living, f"{len(living)} live, and are not explained"]))


if __name__ == "__main__":
    main()
