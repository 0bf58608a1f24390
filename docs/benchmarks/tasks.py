"""Small tasks on real data that is there without a download: scikit-learn's bundled sets, Python's own text.

They are chosen for being different, not for suiting anybody. Each belongs to a family of uses. In every family but the
first, the law of the scale may be chosen on the tasks marked "dev", and not on those marked "report". The seed decides
everything random: the first weights and the batches.
"""

from __future__ import annotations

import math
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
    steps: int  # of a run
    family: str = "short"
    part: str = "report"  # "dev": the law may be chosen on it
    cells: tuple[tuple[str, str], ...] = ()  # base and schedule; empty: all of the first family

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
    elif not y.is_floating_point():
        x = (x - x[:cut].mean(0)) / x[:cut].std(0)
    else:
        x, y = ((t.float() - t[:cut].float().mean(0)) / t[:cut].float().std(0) for t in (x, y))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def sample(name: str, size: int, seed: int) -> Data:
    return rows_of(bundled(name)[0], size, seed)


def rows_of(data: Data, size: int, seed: int) -> Data:
    x, y = data
    rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(seed))
    return x[rows], y[rows]


def text(seed: int, *, part: int = 0, source: Callable[[], Data] = chargpt.corpus) -> Data:
    characters = chargpt.batch(source()[part], seed)
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


def pages(source: Callable[[], Data] = chargpt.corpus) -> list[Data]:
    return [text(seed, part=1, source=source) for seed in range(16)]


# ---------------------------------------------------------------------- fine-tuning


def fitted(model: nn.Module, loss: Loss, batches: Callable[[int], Data], steps: int) -> dict[str, Tensor]:
    """The weights after a training run with AdamW at 3e-3, warm-up and cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = chargpt.warmup_cosine(optimizer, steps, steps // 10)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches(step)).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


def pretrained(model: Callable[[], nn.Module], weights: Callable[[], dict[str, Tensor]]) -> nn.Module:
    """A model that has learned something else. The random numbers of what follows do not depend on the pretraining."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = weights()
    fresh = model()
    fresh.load_state_dict(kept)
    return fresh


@cache
def of_code() -> dict[str, Tensor]:
    """A character GPT that was trained on the code of the standard library."""
    return fitted(chargpt.CharGPT(), cross_entropy, text, 800)


@cache
def prose() -> tuple[Tensor, Tensor]:
    """Training and validation text of Python's language reference, as it lies in the standard library."""
    from pydoc_data.topics import topics

    return chargpt.divided(chargpt.indices("".join(topics.values())))


prose_batch, chapters = partial(text, source=prose), partial(pages, prose)


def half(high: bool, part: int = 0) -> Data:
    """The digits 5 to 9, or 0 to 4, as classes 0 to 4."""
    x, y = bundled("digits")[part]
    return x[(y > 4) == high], y[(y > 4) == high] % 5


def half_batch(high: bool, seed: int) -> Data:
    return rows_of(half(high), 64, seed)


@cache
def of_low_digits(model: Callable[[], nn.Module]) -> dict[str, Tensor]:
    return fitted(model(), cross_entropy, partial(half_batch, False), 300)


def high_digits() -> list[Data]:
    return [half(True, 1)]


class LoRA(nn.Module):
    """A linear layer that stays, and a product of two thin matrices that learns."""

    def __init__(self, linear: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.linear, self.factor = linear.requires_grad_(False), alpha / rank
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.factor * self.up(self.down(x))


def adapted(model: nn.Module) -> nn.Module:
    """Every linear layer with a LoRA; the rest stays."""
    model.requires_grad_(False)
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRA(module))
    return model


def tuned_gpt() -> nn.Module:
    return pretrained(chargpt.CharGPT, of_code)


def wide_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def with_a_new_head(model: Callable[[], nn.Sequential], *, thin: bool) -> nn.Module:
    """A net that knows the digits 0 to 4, and a new last layer for the others; `thin`: the rest learns by LoRA."""
    body = pretrained(model, partial(of_low_digits, model))
    layers = list((adapted(body) if thin else body).children())
    return nn.Sequential(*layers[:-1], nn.Linear(model()[-1].in_features, 5))


# ---------------------------------------------------------------------- noise


def noised(seed: int, *, part: int = 0, size: int = 64) -> Data:
    """Digits with noise of a random level, the level, and the noise, which is to be predicted (diffusion)."""
    generator = torch.Generator().manual_seed(seed)
    x = bundled("digits")[part][0]
    x = 2 * x[torch.randint(len(x), (size,), generator=generator)] - 1
    angle = torch.rand(size, 1, generator=generator) * math.pi / 2
    noise = torch.randn(x.shape, generator=generator)
    return torch.cat([angle.cos() * x + angle.sin() * noise, angle], 1), noise


def noised_pages() -> list[Data]:
    return [noised(seed, part=1, size=256) for seed in range(4)]


class Denoiser(nn.Module):
    """[batch, 64 + 1] pixels and level to [batch, 64] noise; with convolutions, or without."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        self.convolutions = convolutions
        if convolutions:
            layers = [nn.Conv2d(9, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU()]
            self.body = nn.Sequential(*layers, nn.Conv2d(32, 1, 3, padding=1))
        else:
            layers = [nn.Linear(72, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
            self.body = nn.Sequential(*layers, nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        waves = [f(k * x[:, 64:]) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
        level = torch.cat(waves, 1)
        if not self.convolutions:
            return self.body(torch.cat([x[:, :64], level], 1))
        planes = [x[:, :64].view(-1, 1, 8, 8), level[:, :, None, None].expand(-1, -1, 8, 8)]
        return self.body(torch.cat(planes, 1)).flatten(1)


# ---------------------------------------------------------------------- deep, and sparse


def deep(inputs: int, outputs: int) -> nn.Module:
    """Seven layers with ReLU in torch's default initialisation, whose first gradients are tiny."""
    hidden = [layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), *hidden, nn.Linear(64, outputs))


class Trigrams(nn.Module):
    """[batch, time] characters to logits of the next, by a table with a row for three characters in a row."""

    ROWS = 20_000

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(self.ROWS, 16, sparse=sparse)
        self.head = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, len(chargpt.VOCABULARY)))

    def forward(self, x: Tensor) -> Tensor:
        before = [F.pad(x, (k, 0))[:, : x.shape[1]] for k in range(3)]
        row = (before[0] + 97 * before[1] + 97**2 * before[2]) % self.ROWS
        return self.head(self.table(row))


WHOLE = (("AdamW", "cosine"), ("AdamW", "linear"), ("momentum", "constant"))
BOTH = (("AdamW", "constant"), ("AdamW", "cosine"))
ALONE = (("SGD", "constant"), ("momentum", "cosine"), ("AdamW", "cosine"))
MATRICES = (("Muon + AdamW", "constant"), ("Muon + AdamW", "cosine"))

TASKS = {
    "logreg": Task(partial(nn.Linear, 64, 10), cross_entropy, partial(sample, "digits", 64), digits, 400),
    "MLP": Task(mlp, squared_error, partial(sample, "diabetes", 64), diabetes, 300),
    "CNN": Task(cnn, cross_entropy, partial(sample, "digits", 64), digits, 300),
    "GPT": Task(chargpt.CharGPT, cross_entropy, text, pages, 300),
    "LSTM": Task(CharLSTM, cross_entropy, text, pages, 300),
    **{
        f"{name} {steps}": Task(model, cross_entropy, text, pages, steps, "horizon", part, BOTH)
        for name, model, part in (("GPT", chargpt.CharGPT, "dev"), ("LSTM", CharLSTM, "report"))
        for steps in ((1000, 3000, 10_000) if part == "dev" else (3000,))
    },
    "tune GPT": Task(tuned_gpt, cross_entropy, prose_batch, chapters, 300, "fine-tuning", "dev", WHOLE),
    "tune CNN": Task(
        *(partial(with_a_new_head, cnn, thin=False), cross_entropy, partial(half_batch, True), high_digits),
        *(200, "fine-tuning", "report", WHOLE),
    ),
    "LoRA GPT": Task(lambda: adapted(tuned_gpt()), cross_entropy, prose_batch, chapters, 300, "LoRA", "dev", BOTH),
    "LoRA MLP": Task(
        *(partial(with_a_new_head, wide_mlp, thin=True), cross_entropy, partial(half_batch, True), high_digits),
        *(200, "LoRA", "report", BOTH),
    ),
    "diffusion MLP": Task(partial(Denoiser, False), squared_error, noised, noised_pages, 1500, "noise", "dev", BOTH),
    "diffusion CNN": Task(partial(Denoiser, True), squared_error, noised, noised_pages, 1000, "noise", "report", BOTH),
    "logreg, batch 1": Task(
        *(partial(nn.Linear, 64, 10), cross_entropy, partial(sample, "digits", 1), digits, 1500, "noise", "dev"),
        (("SGD", "constant"), ("SGD", "cosine")),
    ),
    "MLP, batch 1": Task(
        *(mlp, squared_error, partial(sample, "diabetes", 1), diabetes, 1500, "noise", "report"),
        (("momentum", "constant"), ("AdamW", "cosine")),
    ),
    "7 layers": Task(
        partial(deep, 64, 10), cross_entropy, partial(sample, "digits", 64), digits, 600, "deep", "dev", ALONE
    ),
    "7 layers, cells": Task(
        *(partial(deep, 30, 2), cross_entropy, partial(sample, "breast_cancer", 64)),
        *(lambda: [bundled("breast_cancer")[1]], 600, "deep", "report", ALONE),
    ),
    "trigrams": Task(
        *(partial(Trigrams, sparse=False), cross_entropy, text, pages, 500, "sparse", "dev"),
        (("AdamW", "cosine"), ("Adagrad", "constant")),
    ),
    "trigrams, sparse": Task(
        *(partial(Trigrams, sparse=True), cross_entropy, text, pages, 500, "sparse", "report"),
        (("SGD", "constant"), ("Adagrad", "constant")),
    ),
    "hybrid GPT": Task(chargpt.CharGPT, cross_entropy, text, pages, 500, "hybrid", "dev", MATRICES),
    "hybrid MLP": Task(
        mlp, squared_error, partial(sample, "diabetes", 64), diabetes, 300, "hybrid", "report", MATRICES
    ),
}
