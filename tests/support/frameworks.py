"""Training runs in a framework: python frameworks.py FRAMEWORK FOLDER WHAT..., WHAT among whole, save and resume

For every variant of it "whole" trains STEPS steps, "save" the first half and leaves the framework's own checkpoint,
"resume" goes on from that. Each writes FOLDER/VARIANT/WHAT-RANK.pt: parameters, scale and effective lr.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from manic import Mechanic, mechanize

STEPS = 24
VARIANTS = {
    "lightning": ("inside", "returned", "manual", "bf16", "clip", "accumulate"),
    "trainer": ("given", "class"),
    "accelerate": ("inside", "prepared"),
}
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


class Data(Dataset[Any]):
    """A fixed regression, in a fixed order."""

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x.sum(0, keepdim=True)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.body(x)
        return {"loss": F.mse_loss(output.float(), labels), "logits": output}


def optimizer_of(model: nn.Module, inside: bool, steps: int = STEPS) -> tuple[Mechanic, Any]:
    """A Mechanic, and the scheduler that the framework is to step: on the Mechanic, or none (it is inside)."""
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if inside:
        return Mechanic(base, torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=steps)), None
    mechanic = Mechanic(base)
    return mechanic, torch.optim.lr_scheduler.CosineAnnealingLR(mechanic, T_max=steps)


def lightning(variant: str, folder: Path, what: str) -> tuple[nn.Module, Mechanic]:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = variant != "manual"

        def training_step(self, _: Any, index: int) -> Any:
            # Lightning does not wind an ordinary DataLoader on to where it was: the step says what to train on.
            batch = torch.utils.data.default_collate([Data()[8 * self.trainer.global_step + i] for i in range(8)])
            loss = self.net(**batch)["loss"]
            if variant == "manual":
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            mechanic, schedule = optimizer_of(self, inside=variant != "returned")
            if schedule is None:
                return mechanic
            return {"optimizer": mechanic, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    options: dict[str, Any] = {
        "bf16": {"precision": "bf16-mixed"},
        "clip": {"gradient_clip_val": 0.1},
        "accumulate": {"accumulate_grad_batches": 2},
    }.get(variant, {})
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS // 2 if what == "save" else STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    checkpoint = folder / "lightning.ckpt"
    trainer.fit(module, DataLoader(range(1000)), ckpt_path=str(checkpoint) if what == "resume" else None)
    if what == "save":
        trainer.save_checkpoint(checkpoint)
    optimizer: Any = trainer.optimizers[0]
    return module.net, optimizer


def trainer(variant: str, folder: Path, what: str) -> tuple[nn.Module, Mechanic]:
    from transformers import Trainer, TrainingArguments

    class Plain(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=0.1,
        logging_strategy="no",
    )
    net = Net()
    options: dict[str, Any]
    if variant == "class":
        options = {"optimizer_cls_and_kwargs": (mechanize(torch.optim.AdamW), {"lr": 1e-3})}
    else:
        options = {"optimizers": optimizer_of(net, inside=False)}
    run = Plain(model=net, args=arguments, train_dataset=Data(), **options)
    checkpoint = folder / "trainer" / f"checkpoint-{STEPS // 2}"
    run.train(resume_from_checkpoint=str(checkpoint) if what == "resume" else None)
    optimizer: Any = run.optimizer
    return net, getattr(optimizer, "optimizer", optimizer)


def accelerate(variant: str, folder: Path, what: str) -> tuple[nn.Module, Mechanic]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Net()
    mechanic, schedule = optimizer_of(net, inside=variant == "inside")
    model, optimizer, loader = accelerator.prepare(net, mechanic, DataLoader(Data(), batch_size=8 // PROCESSES))
    if schedule is not None:
        schedule = accelerator.prepare(schedule)
    start = 0
    if what == "resume":
        accelerator.load_state(str(folder / "accelerate"))
        start = STEPS // 2
    for step, batch in enumerate(loader):
        if step < start:
            continue
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if what == "save" and step + 1 == STEPS // 2:
            accelerator.save_state(str(folder / "accelerate"))
            break
    return net, mechanic


def main(framework: str, folder: str, *phases: str) -> None:
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", "(?s).*(Mechanic|tuner|something else|format 1)")  # what manic complains of
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    run = {"lightning": lightning, "trainer": trainer, "accelerate": accelerate}[framework]
    for variant in VARIANTS[framework]:
        place = Path(folder, variant)
        place.mkdir(exist_ok=True)
        for what in phases:
            torch.manual_seed({"whole": 0, "save": 0, "resume": 1}[what])
            net, mechanic = run(variant, place, what)
            result = {"parameters": [p.detach() for p in net.parameters()], "scale": mechanic.scale}
            result["effective_lr"] = torch.tensor(mechanic.effective_lr())
            result["steps"] = mechanic.param_groups[0]["mechanic_step"]
            torch.save(result, place / f"{what}-{os.environ.get('RANK', 0)}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
