"""A promise on the task of the demo: bfloat16 parameters."""

from __future__ import annotations

from functools import cache

import chargpt
import torch

from manic import Mechanic

STEPS = 150


@cache
def final_loss(dtype: torch.dtype = torch.float32) -> float:
    """Validation loss of the demo's GPT after STEPS at base lr 1e-3."""
    torch.manual_seed(0)
    model = chargpt.CharGPT().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mechanic = Mechanic(optimizer, chargpt.warmup_cosine(optimizer, STEPS, STEPS // 10))
    for step in range(STEPS):
        mechanic.zero_grad()
        chargpt.loss_of(model, chargpt.batch(chargpt.corpus()[0], step)).backward()
        mechanic.step()
    return float(chargpt.validation_loss(model))


def test_the_task_is_learned() -> None:
    """Without the wrapper's work the loss stays at that of a uniform guess, ln 96 = 4.56."""
    assert final_loss() < 3.0


def test_bfloat16_parameters_reach_the_loss_of_float32() -> None:
    assert final_loss(torch.bfloat16) < 1.02 * final_loss()
