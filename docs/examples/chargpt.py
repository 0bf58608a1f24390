"""The task of the demo: a character GPT on the text of Python's own standard library. Nothing to download."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64


def indices(text: str) -> list[int]:
    """Indices into VOCABULARY; other characters are left out."""
    index = {character: i for i, character in enumerate(VOCABULARY)}
    return [index[c] for c in text if c in index]


def divided(found: list[int]) -> tuple[Tensor, Tensor]:
    """Training text, and a tenth for validation, int64."""
    text = torch.tensor(found)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


@cache
def corpus(size: int = 2_000_000) -> tuple[Tensor, Tensor]:
    """Training and validation text, as int64 indices into VOCABULARY."""
    found: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.extend(indices(path.read_text(encoding="utf-8", errors="ignore")))
        if len(found) >= size:
            break
    return divided(found[:size])


def batch(text: Tensor, seed: int, size: int = 16) -> Tensor:
    """[size, CONTEXT + 1] random windows. A function of the seed alone, so that a resumed run sees the same."""
    starts = torch.randint(len(text) - CONTEXT, (size,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[i : i + CONTEXT + 1] for i in starts.tolist()])


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class CharGPT(nn.Module):
    """[batch, time] characters to [batch, time, vocabulary] logits."""

    def __init__(self, layers: int = 2, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(VOCABULARY))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))


def loss_of(model: nn.Module, characters: Tensor) -> Tensor:
    """Mean cross entropy of the next character, in nats, float32."""
    return F.cross_entropy(model(characters[:, :-1]).float().flatten(0, 1), characters[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, batches: int = 16) -> float:
    """Mean over fixed batches of text that is not trained on."""
    text = corpus()[1]
    return sum(loss_of(model, batch(text, seed)).item() for seed in range(batches)) / batches


def warmup_factor(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear warm-up to 1, then half a cosine down to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return factor


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The same as a schedule of the optimizer's lr."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_factor(steps, warmup))
