"""The project's jobs: `nox -l` lists them, `nox -s demo` runs the main one, `nox -s tests` passes the tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint", "types"]
nox.options.default_venv_backend = "virtualenv"

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"  # one torch for all: an open range may fetch gigabytes of CUDA
TESTS = ("pytest", "pytest-cov", "pytest-xdist", "hypothesis")
EXTRAS = ("matplotlib", "numpy", "triton; sys_platform == 'linux'")  # what some of the tests need
ALONE = "not (agreement or distributed or frameworks)"  # the others have sessions of their own

# Pythons and torches that are tried beside those of the constraints; the first torch is the oldest that is promised.
VERSIONS = (("3.11", "2.6.0"), ("3.11", "2.9.1"), ("3.10", "2.13.0"), ("3.12", "2.13.0"), ("3.13", "2.13.0"))


def install(session: nox.Session, *packages: str) -> None:
    session.install("-c", str(CONSTRAINTS), *packages)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Pytest from a folder of its own: what is tested is the installed package, not the source tree."""
    session.chdir(session.create_tmp())
    configuration = ROOT / "pyproject.toml"
    command = ("python", "-m", "pytest", "-c", str(configuration), "--rootdir", str(ROOT), *arguments)
    session.run(*command, env={"OMP_NUM_THREADS": "1"})


def environment(session: nox.Session, place: Path) -> str:
    """A clean environment beside the session's own; its Python."""
    session.run("python", "-m", "venv", "--clear", str(place))
    return str(place / ("Scripts" if os.name == "nt" else "bin") / "python")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, against the installed wheel, with branch coverage."""
    install(session, ".", *TESTS, *EXTRAS)
    coverage = (
        "--cov",
        "manic",
        "--cov-branch",
        "--cov-config",
        str(ROOT / "pyproject.toml"),
        "--cov-fail-under",
        "95",
    )
    default = ("-n", "2", "-m", ALONE, "--cov-report", "term-missing", *coverage, str(ROOT / "tests"))
    pytest(session, *(session.posargs or default))


@nox.session
@nox.parametrize("python,torch", VERSIONS)
def versions(session: nox.Session, torch: str) -> None:
    """The tests with another Python and another torch: `nox -s "versions(python='3.11', torch='2.6.0')"`. Downloads
    gigabytes where pip finds no build for the CPU."""
    session.install(f"torch=={torch}", ".", *TESTS, *EXTRAS)
    pytest(session, *(session.posargs or ("-n", "2", "-m", ALONE, str(ROOT / "tests"))))


@nox.session
def exchange(session: nox.Session) -> None:
    """Checkpoints that the oldest torch writes and the newest loads, and the other way round."""
    out = Path(session.create_tmp()).resolve()
    script = str(ROOT / "tests" / "support" / "exchange.py")
    pythons = {torch: environment(session, out / torch) for torch in (VERSIONS[0][1], VERSIONS[-1][1])}
    for torch, python in pythons.items():
        session.run(python, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy", str(ROOT), external=True)
        session.run(python, script, "write", str(out / f"by-{torch}"), external=True)
    for torch, python in zip(pythons, reversed(pythons.values()), strict=True):
        session.run(python, script, "read", str(out / f"by-{torch}"), external=True)


@nox.session
def soak(session: nox.Session) -> None:
    """Tests that try to break it, whole: 200 kills, all broken checkpoints, 2,000 random programs, 10,000,000 steps."""
    install(session, ".", *TESTS)
    files = (
        "checkpoint/test_killed.py",
        "checkpoint/test_hostile.py",
        "system/test_programs.py",
        "algorithm/test_extremes.py",
        "system/test_leaks.py",
        "optimizer/test_whole_steps.py",
    )
    paths = [str(ROOT / "tests" / file) for file in files]
    pytest(session, "-n", "2", "--every", "--junitxml", "soak.xml", *paths, *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Mutation testing of the scalar half, the sweeps and the checkpoint. It takes hours, and goes on where it was
    killed; `nox -s mutants -- tuner` takes one file."""
    install(session, "torch", *TESTS, "numpy", "cmake", "ninja", "mutmut==3.8.1")
    sweeps, place = ROOT / "src" / "manic" / "sweeps", session.create_tmp()
    for step in (["-S", str(sweeps), "-B", place, "-G", "Ninja"], ["--build", place], ["--install", place]):
        session.run("cmake", *step)  # the libraries come to lie beside their source
    script = ROOT / "tests" / "support" / "mutants.py"
    session.run("python", str(script), str(ROOT / "out" / "mutants"), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    install(session, ".", "mypy", "nox")
    session.run("mypy", env={"MYPYPATH": str(ROOT / "src")})


@nox.session
def agreement(session: nox.Session) -> None:
    """Live against the authors' packages, mechanic-pytorch and optax."""
    install(session, ".", "pytest", "hypothesis", "mechanic-pytorch", "optax")
    pytest(session, "-m", "agreement", str(ROOT / "tests" / "algorithm" / "test_agreement.py"), *session.posargs)


@nox.session
def distributed(session: nox.Session) -> None:
    """FSDP2, HSDP, DDP, FSDP1, pipeline stages and their checkpoints, with 2 and 4 processes on the CPU."""
    install(session, ".", *TESTS, "numpy")
    pytest(session, "-m", "distributed", str(ROOT / "tests"), *session.posargs)


@nox.session
def frameworks(session: nox.Session) -> None:
    """Real training, save, resume and logs in Lightning, Transformers, Accelerate and TensorBoard."""
    tools = ("lightning", "jsonargparse[signatures]", "transformers", "accelerate", "tensorboard", "hydra-core")
    install(session, ".", *TESTS, *tools)
    pytest(session, "-m", "frameworks", str(ROOT / "tests"), *session.posargs)


@nox.session
def elastic(session: nox.Session) -> None:
    """torchrun loses a worker, restarts, and goes on from the last checkpoint; a table and a picture."""
    install(session, ".[demo]", "numpy")
    out = ROOT / "out" / "elastic"
    session.run("python", str(ROOT / "docs" / "examples" / "elastic.py"), "--out", str(out), *session.posargs)


@nox.session
def job(session: nox.Session) -> None:
    """A job of 10,000 steps that is killed 20 times, and one that moves between 1, 2 and 4 processes: two hours."""
    install(session, ".[demo]", "numpy")
    script = str(ROOT / "tests" / "support" / "long_job.py")
    session.run("python", script, str(ROOT / "out" / "job"), *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job: a character GPT at three base learning rates, killed and resumed; a table and a picture."""
    install(session, ".[demo]")
    out = ROOT / "out" / "demo"
    session.run("python", str(ROOT / "docs" / "examples" / "demo.py"), "--out", str(out), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time, memory and exactness beside the peers; tables, JSON and a bar chart in out/bench. Wants a quiet machine.

    `nox -s bench -- quick` runs every script on little and without the peers, to see that they run.
    """
    peers = ("mechanic-pytorch", "prodigyopt", "schedulefree", "optax")
    install(session, ".[demo]", "numpy", *(() if "quick" in session.posargs else peers))
    out = ROOT / "out" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    quick = {
        "step_time": ["--rounds", "2", "--cases", "500 small", "--threads", "1"],
        "end_to_end": ["--rounds", "2", "--layers", "2", "--width", "64"],
        "memory": ["--numel", "1000000"],
        "sums": ["--numel", "1000000"],
        "checkpoint_bytes": ["--numel", "1000000"],
    }
    for name, few in quick.items():
        json = [] if name == "checkpoint_bytes" else ["--json", str(out / f"{name}.json")]
        script = str(ROOT / "docs" / "benchmarks" / f"{name}.py")
        session.run("python", script, *json, *(few if "quick" in session.posargs else []))
    if "quick" in session.posargs:
        script = str(ROOT / "docs" / "benchmarks" / "gpu.py")
        session.run("python", script, "--dry", "--json", str(out / "gpu.json"))
    session.run("python", str(ROOT / "docs" / "benchmarks" / "report.py"), str(out))


@nox.session
def quality(session: nox.Session) -> None:
    """How far from the best hand-tuned lr, beside the peers: tables and a figure in out/quality. It takes hours, and
    goes on where it was killed.

    `nox -s quality -- --quick` takes minutes, and fails where loose bounds do not hold.
    """
    peers = (
        *("mechanic-pytorch", "optax", "dadaptation", "dog-optimizer"),
        *("prodigyopt", "prodigy-plus-schedule-free", "schedulefree"),
    )
    install(session, ".[demo]", "numpy", "scikit-learn", *(() if "--quick" in session.posargs else peers))
    out = ROOT / "out" / "quality"
    session.run("python", str(ROOT / "docs" / "benchmarks" / "quality.py"), "--out", str(out), *session.posargs)


@nox.session
def bases(session: nox.Session) -> None:
    """Every optimizer of torch and of pytorch_optimizer in a Mechanic: trains, resumes bit for bit; out/bases."""
    install(session, ".", "numpy", "pytorch_optimizer")
    out = ROOT / "out" / "bases"
    session.run("python", str(ROOT / "docs" / "benchmarks" / "bases.py"), "--out", str(out), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in out/site. Strict: a link, an anchor or a page that is missing fails.

    `nox -s docs -- look` takes pictures of its pages, wide and narrow, with the Chromium that is on the PATH.
    """
    install(session, "mkdocs-material", "mkdocstrings[python]", "ruff")  # the API is read, not imported
    session.run("mkdocs", "build", env={"NO_MKDOCS_2_WARNING": "1"})
    if "look" in session.posargs:
        site, pictures = ROOT / "out" / "site", ROOT / "out" / "pictures"
        pictures.mkdir(exist_ok=True)
        quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
        for page in sorted(site.glob("*.html")):
            for name, size in (("wide", "1400,2200"), ("narrow", "500,2200")):
                shot = f"--screenshot={pictures / f'{page.stem}-{name}.png'}"
                session.run(
                    "chromium", *quiet, f"--window-size={size}", shot, page.as_uri(), external=True, silent=True
                )


CHECK = """
import manic, sys, torch, warnings, importlib.resources
from manic.sweeps.native import native

p = torch.nn.Parameter(torch.ones(3))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    m = manic.Mechanic(torch.optim.SGD([p], lr=1e-9))
    for _ in range(9):
        (p ** 2).sum().backward()
        m.step()
        m.zero_grad()
assert m.scale > 0
assert importlib.resources.files(manic).joinpath("py.typed").is_file()
fast = sys.argv[1] == "fast"
assert (native() is not None) == fast
assert ["Install a C++ compiler" in str(warning.message) for warning in told] == ([] if fast else [True])
print(manic.__version__, sys.argv[1], float(m.scale))
"""


@nox.session
def build(session: nox.Session) -> None:
    """Sdist, the wheel that is built of it, and the one that comes about without a C++ compiler. Both train, each in a
    clean environment."""
    install(session, "build")
    out = Path(session.create_tmp()).resolve()
    shutil.rmtree(out / "dist", ignore_errors=True)
    for kind, arguments, env in (("fast", [], {}), ("slow", ["--wheel"], {"CXX": str(out / "no-such-compiler")})):
        folder = out / "dist" / kind
        session.run("python", "-m", "build", "--outdir", str(folder), *arguments, str(ROOT), env=env)
        (wheel,) = folder.glob("manic-*.whl")
        assert wheel.name.endswith("-py3-none-any.whl") == (kind == "slow"), wheel
        python = environment(session, out / kind)
        session.run(python, "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), str(wheel), external=True)
        session.run(python, "-c", CHECK, kind, external=True)
