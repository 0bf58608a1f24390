"""Ready callbacks: ``manic.Mechanic.metrics()`` in the logs of the frameworks, which are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from manic.mechanic import mechanic_in


def tensorboard(writer: Any, tag: str = "mechanic") -> Callable[[dict[str, Any]], None]:
    """A ``log_func`` that writes every figure to TensorBoard as ``tag/NAME``.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or what else has its ``add_scalar``.
        tag: the section.
    """

    def write(data: dict[str, Any]) -> None:
        for name, value in data.items():
            if name not in ("iter_count", "s"):  # the step, and another name of the scale
                writer.add_scalar(f"{tag}/{name}", value, data["iter_count"])

    return write


def lightning() -> Any:
    """A Lightning ``Callback``: the figures go to the Trainer's loggers as ``mechanic/NAME`` every
    ``log_every_n_steps``, and the first group's ``effective_lr`` to the progress bar.

    Raises:
        ImportError: Lightning is not installed.
    """
    try:
        base: Any = import_module("lightning.pytorch").Callback
    except ImportError:
        base = import_module("pytorch_lightning").Callback  # its other name

    class MechanicCallback(base):  # type: ignore[misc]
        logged = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
            step = trainer.global_step
            if step == self.logged or step % trainer.log_every_n_steps:
                return
            self.logged = step
            mechanics = filter(None, map(mechanic_in, trainer.optimizers))
            for i, mechanic in enumerate(mechanics):
                found = mechanic.metrics()
                tag = "mechanic" if i == 0 else f"mechanic{i}"
                pl_module.log_dict({f"{tag}/{name}": value for name, value in found.items()}, logger=True)
                if i == 0:
                    lr = next(value for name, value in found.items() if name.startswith("effective_lr"))
                    pl_module.log("effective_lr", lr, prog_bar=True, logger=False)

    return MechanicCallback()


def transformers() -> Any:
    """A ``TrainerCallback`` of Transformers: in what the Trainer logs, ``learning_rate`` is the effective one, and the
    figures are there as ``mechanic/NAME``.

    A Trainer calls its reporters (``report_to``) before the callbacks that it is given. For them to see it too, put it
    in front: ``trainer.callback_handler.callbacks.insert(0, manic.callbacks.transformers())``.

    Raises:
        ImportError: Transformers is not installed.
    """
    base: Any = import_module("transformers").TrainerCallback

    class MechanicCallback(base):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kept: Any) -> None:
            mechanic = mechanic_in(kept.get("optimizer"))
            if mechanic is None or "learning_rate" not in logs:  # the logs of an evaluation, or of the end
                return
            new = {f"mechanic/{name}": value for name, value in mechanic.metrics().items()}
            # Not metrics' own effective_lr: the schedule has been stepped since.
            new["learning_rate"] = logs["learning_rate"] * mechanic.scale.reshape(-1)[0].item()
            for target in (logs, *state.log_history[-1:]):
                target.update(new)

    return MechanicCallback()
