"""Five small tasks on real data that is there without a download: scikit-learn's bundled sets, Python's own text.

They are chosen for being different (convex, regression, convolution, attention, recurrence), not for suiting anybody.
Everything random goes by the seed: the first weights and the batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import chargpt

Data = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Data], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, a loss and batches."""

    model: Callable[[], nn.Module]
    loss: Loss
    batch: Callable[[int], Data]  # by seed, from the training part
    validation: Callable[[], list[Data]]  # always the same
    steps: int  # of a short run

    def start(self, seed: int) -> nn.Module:
        """The model with the first weights of that seed."""
        torch.manual_seed(seed)
        return self.model()

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Mean loss over the validation part; inf where it is not a number."""
        value = float(torch.stack([self.loss(model, data) for data in self.validation()]).mean())
        return value if value == value else float("inf")


@cache
def bundled(name: str) -> tuple[Data, Data]:
    """A set of scikit-learn's, shuffled, standardised by its training part, which is four fifths of it."""
    from sklearn import datasets

    x, y = (torch.from_numpy(a) for a in getattr(datasets, f"load_{name}")(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, cut = x[order].float(), y[order], len(x) * 4 // 5
    if name == "digits":
        x = x / 16
    else:
        x, y = ((t.float() - t[:cut].float().mean(0)) / t[:cut].float().std(0) for t in (x, y))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def sample(name: str, size: int, seed: int) -> Data:
    x, y = bundled(name)[0]
    rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(seed))
    return x[rows], y[rows]


def text(seed: int, *, part: int = 0) -> Data:
    characters = chargpt.batch(chargpt.corpus()[part], seed)
    return characters[:, :-1], characters[:, 1:]


def output(model: nn.Module, x: Tensor) -> Tensor:
    """In float32, of inputs in the model's dtype."""
    return model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x).float()


def cross_entropy(model: nn.Module, data: Data) -> Tensor:
    return F.cross_entropy(output(model, data[0]).flatten(0, -2), data[1].flatten())


def squared_error(model: nn.Module, data: Data) -> Tensor:
    return F.mse_loss(output(model, data[0]).squeeze(-1), data[1])


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class CharLSTM(nn.Module):
    """[batch, time] characters to [batch, time, vocabulary] logits."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(chargpt.VOCABULARY), width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, len(chargpt.VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


digits, diabetes = (lambda: [bundled("digits")[1]]), (lambda: [bundled("diabetes")[1]])


def pages() -> list[Data]:
    return [text(seed, part=1) for seed in range(16)]


TASKS = {
    "logreg": Task(partial(nn.Linear, 64, 10), cross_entropy, partial(sample, "digits", 64), digits, 400),
    "MLP": Task(mlp, squared_error, partial(sample, "diabetes", 64), diabetes, 300),
    "CNN": Task(cnn, cross_entropy, partial(sample, "digits", 64), digits, 300),
    "GPT": Task(chargpt.CharGPT, cross_entropy, text, pages, 300),
    "LSTM": Task(CharLSTM, cross_entropy, text, pages, 300),
    "GPT long": Task(chargpt.CharGPT, cross_entropy, text, pages, 1500),
}
