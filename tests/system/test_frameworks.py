"""Training, the framework's own checkpoint, a new process, resume: bit for bit the uninterrupted run."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import frameworks
import pytest
import torch
from pages import ROOT, snippets
from ranks import free_port

import manic.optim
from manic import Mechanic, callbacks

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs the frameworks: nox -s frameworks"),
]

RUNS = [
    *(("lightning", 1, variant) for variant in frameworks.VARIANTS["lightning"]),
    *(("trainer", 1, variant) for variant in frameworks.VARIANTS["trainer"]),
    *(("accelerate", world, variant) for world in (1, 2) for variant in frameworks.VARIANTS["accelerate"]),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """result(framework, processes, variant, what, rank); the first call runs all variants of the framework."""
    folders: dict[tuple[str, int], Path] = {}

    def of(framework: str, world: int, variant: str, what: str, rank: int) -> dict[str, Any]:
        if (framework, world) not in folders:
            folders[framework, world] = tmp_path_factory.mktemp(f"{framework}-{world}")
            for phases in (("whole", "save"), ("resume",)):
                start(framework, world, folders[framework, world], phases)
        return torch.load(folders[framework, world] / variant / f"{what}-{rank}.pt", weights_only=True)

    return of


def start(framework: str, world: int, folder: Path, phases: tuple[str, ...]) -> None:
    port = free_port()
    workers = []
    for rank in range(world):
        names: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**os.environ, **({key: str(value) for key, value in names.items()} if world > 1 else {})}
        command = [sys.executable, frameworks.__file__, framework, str(folder), *phases]
        workers.append(subprocess.Popen(command, env=environment))
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize(("framework", "world", "variant"), RUNS)
def test_resume(result: Any, framework: str, world: int, variant: str) -> None:
    for rank in range(world):
        whole, save, resume = (result(framework, world, variant, what, rank) for what in ("whole", "save", "resume"))
        assert whole["scale"] > 0
        assert whole["steps"] == resume["steps"] == frameworks.STEPS
        if framework != "trainer":  # which saves on its way to the end
            assert save["steps"] == frameworks.STEPS // 2
            assert not torch.equal(whole["parameters"][0], save["parameters"][0])
        for key in ("scale", "effective_lr"):
            assert torch.equal(whole[key], resume[key])
        for one, two in zip(whole["parameters"], resume["parameters"], strict=True):
            assert torch.equal(one, two)


def test_processes_agree(result: Any) -> None:
    """Two processes, each on half of every batch, are one run; their ranks hold the same."""
    for variant in frameworks.VARIANTS["accelerate"]:
        first, second = (result("accelerate", 2, variant, "whole", rank) for rank in range(2))
        assert torch.equal(first["scale"], second["scale"])
        for one, two in zip(first["parameters"], second["parameters"], strict=True):
            assert torch.equal(one, two)
    alone = result("accelerate", 1, "inside", "whole", 0)
    both = result("accelerate", 2, "inside", "whole", 0)
    torch.testing.assert_close(both["scale"], alone["scale"], rtol=1e-4, atol=0.0)


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network, steps = frameworks.Net(), 20
    namespace: dict[str, Any] = {
        "network": network,
        "model": network.body,
        "dataset": frameworks.Data(),
        "loader": torch.utils.data.DataLoader(torch.randn(8 * steps, 4), batch_size=8),
        "loss_of": lambda batch: (network.body(batch) - batch.sum(1, keepdim=True)).square().mean(),
        "steps": steps,
        "path": str(tmp_path / "runs"),
    }
    page = ROOT / "docs" / "frameworks.md"
    trained = []
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), namespace)
        for owner in (namespace.get("trainer"), namespace.get("mechanic")):
            optimizer = getattr(owner, "optimizers", [None])[0] or getattr(owner, "optimizer", owner)
            trained.append(getattr(optimizer, "optimizer", optimizer))
    mechanics = {id(each): each for each in trained if isinstance(each, Mechanic)}.values()
    assert [int(each.param_groups[0]["mechanic_step"]) for each in mechanics] == [*[steps] * 4, 0]
    assert all(each.scale > 0 for each in list(mechanics)[:4])


# ---------------------------------------------------------------------- configuration files

HYDRA, LIGHTNING = 0, 1  # the place of each on the page


def of_the_page(place: int) -> str:
    return snippets(ROOT / "docs" / "frameworks.md", "yaml")[place]


def check_built(optimizer: Any, steps: int) -> None:
    """That it is the optimizer of the page, and has learned in so many steps."""
    assert isinstance(optimizer, Mechanic)
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["initial_lr" if "initial_lr" in optimizer.param_groups[0] else "lr"] == 1e-3
    assert "per_group=True" in repr(optimizer)
    assert optimizer.param_groups[0]["mechanic_step"] == steps
    assert (optimizer.scale > 0).all()


def test_hydra_builds_it_by_its_name() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    net = frameworks.Net()
    optimizer = instantiate(OmegaConf.create(of_the_page(HYDRA)).optimizer, params=net.parameters())
    for i in range(20):
        net(**torch.utils.data.default_collate([frameworks.Data()[i]]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    check_built(optimizer, 20)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["file", "command line"])
def test_lightning_cli_builds_it_by_its_name(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning as pl
    from lightning.pytorch.cli import LightningCLI

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = frameworks.Net()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(**batch)["loss"]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(frameworks.Data(), batch_size=8)

    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(of_the_page(LIGHTNING))
    told = ["--config=config.yaml"]
    if by == "command line":
        told = ["--optimizer=manic.optim.AdamW", "--optimizer.lr=1e-3", "--optimizer.mechanic={per_group: true}"]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 1, "accelerator": "cpu", **quiet}
    cli = LightningCLI(Module, trainer_defaults=defaults, save_config_callback=None, args=["fit", *told])
    check_built(cli.trainer.optimizers[0], frameworks.STEPS)


def test_a_trainer_builds_it_from_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import Trainer, TrainingArguments

    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model=frameworks.Net(),
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=frameworks.STEPS, **quiet),
        train_dataset=frameworks.Data(),
        optimizer_cls_and_kwargs=(manic.optim.AdamW, {"lr": 1e-3, "mechanic": {"per_group": True}}),
    )
    trainer.train()
    check_built(trainer.optimizer.optimizer, frameworks.STEPS)  # Accelerate has wrapped it


# ---------------------------------------------------------------------- callbacks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_logs_the_metrics(accumulate: int, tmp_path: Path) -> None:
    import lightning as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = frameworks.Net()

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.net(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return frameworks.optimizer_of(self, inside=True)[0]

    bar: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            bar.append(trainer.progress_bar_metrics.get("effective_lr"))

    loader = torch.utils.data.DataLoader(frameworks.Data(), batch_size=8)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callbacks.lightning(), Watch()],
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=4,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader)
    (mechanic,) = trainer.optimizers
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["mechanic/scale"]]
    assert all(row["loss"] for row in rows)  # the user's own figures are in the same rows
    steps = frameworks.STEPS // accumulate
    assert [int(row["step"]) for row in rows] == list(range(3, steps, 4))  # as Lightning counts: from 0
    found = {name: float(rows[-1][f"mechanic/{name}"]) for name in mechanic.metrics()}
    assert found == pytest.approx(mechanic.metrics(), rel=1e-6)  # Lightning logs in float32
    assert bar[-1] == pytest.approx(mechanic.effective_lr()[0], rel=1e-6)
    assert mechanic.scale > 0


@pytest.mark.filterwarnings("ignore")
def test_trainer_logs_the_effective_lr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            self.seen.append(dict(logs))

    net, reporter = frameworks.Net(), Reporter()
    mechanic, schedule = frameworks.optimizer_of(net, inside=False)
    trainer = Trainer(
        model=net,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=frameworks.STEPS, logging_steps=4, report_to=[], use_cpu=True
        ),
        train_dataset=frameworks.Data(),
        optimizers=(mechanic, schedule),
        callbacks=[reporter],
    )
    trainer.callback_handler.callbacks.insert(0, callbacks.transformers())
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["step"] for entry in history] == list(range(4, frameworks.STEPS + 1, 4))
    for entry, seen in zip(history, reporter.seen, strict=False):  # the reporter sees the end as well
        share = 0.5 * (1 + math.cos(math.pi * (entry["step"] - 1) / frameworks.STEPS))
        assert entry["learning_rate"] > 0
        assert entry["learning_rate"] == pytest.approx(1e-3 * share * entry["mechanic/scale"], rel=1e-6)
        assert seen["learning_rate"] == entry["learning_rate"]
        assert seen["mechanic/skipped"] == 0
    metrics = mechanic.metrics()
    assert {name: history[-1][f"mechanic/{name}"] for name in metrics} == metrics


def test_trainer_with_a_scheduler_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built around what Accelerate has wrapped: told where there is one inside too, folded where it is given."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import Trainer, TrainingArguments

    for inside in (True, False):
        net = frameworks.Net()
        mechanic, _ = frameworks.optimizer_of(net, inside=inside)
        trainer = Trainer(
            model=net,
            args=TrainingArguments(
                output_dir=str(tmp_path), max_steps=frameworks.STEPS, report_to=[], use_cpu=True, disable_tqdm=True
            ),
            train_dataset=frameworks.Data(),
            optimizers=(mechanic, None),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        told = ["something else has set the lr" in str(warning.message) for warning in caught]
        assert sum(told) == inside
    scale, (lr,) = mechanic.scale.item(), trainer.lr_scheduler.base_lrs
    optimizer = mechanic.unwrap(trainer.lr_scheduler)
    assert trainer.lr_scheduler.base_lrs == [lr * scale]
    assert trainer.lr_scheduler.optimizer is optimizer


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_holds_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = frameworks.Net()
    with SummaryWriter(tmp_path) as writer:
        base = torch.optim.AdamW(net.parameters(), lr=1e-3)
        mechanic = Mechanic(base, log_func=callbacks.tensorboard(writer), log_every=10)
        for i in range(30):
            net(**torch.utils.data.default_collate([frameworks.Data()[i]]))["loss"].backward()
            mechanic.step()
            mechanic.zero_grad()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name, value in mechanic.metrics().items():
        scalars = events.Scalars(f"mechanic/{name}")
        assert [scalar.step for scalar in scalars] == [10, 20, 30]
        assert scalars[-1].value == pytest.approx(value, rel=1e-6)
    assert mechanic.scale > 0
