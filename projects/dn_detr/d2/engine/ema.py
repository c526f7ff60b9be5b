"""Exponential moving average of the weights, saved and evaluated with the model."""

from __future__ import annotations

import copy
import math

import torch
from detectron2.engine import HookBase
from torch import nn

from dn_detr.errors import InputError

KEY = "ema"
"""Its key in a checkpoint, and the prefix of its metrics."""


class MovingAverage:
    """A copy of a model whose weights are an exponential moving average of the model's.

    Update u has the decay decay * (1 - exp(-u / warmup)). Running statistics of norms are averaged
    like weights; counters are copied.

    Args:
        model: Model to copy.
        decay: Final decay, in [0, 1).
        warmup: Warm-up in updates; 0 uses `decay` from the start.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: float):
        if not 0 <= decay < 1 or warmup < 0:
            raise InputError(
                "SOLVER.EMA.DECAY must be in [0, 1) and SOLVER.EMA.WARMUP at least 0, got "
                f"{decay} and {warmup}."
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the weights of `model`."""
        self.updates += 1
        warm = -math.expm1(-self.updates / self.warmup) if self.warmup else 1.0
        self._lerp(model, 1 - self.decay * warm)

    @torch.no_grad()
    def start_from(self, model: nn.Module) -> None:
        """Copy the weights of `model`."""
        self._lerp(model, 1.0)

    def _lerp(self, model: nn.Module, weight: float) -> None:
        own, others = _tensors(self.model), _tensors(model)
        torch._foreach_lerp_(
            [value for value in own if value.is_floating_point()],
            [value for value in others if value.is_floating_point()],
            weight,
        )
        for value, other in zip(own, others, strict=True):
            if not value.is_floating_point():
                value.copy_(other)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


class FollowWeights(HookBase):
    """Update a moving average after every iteration; a new one starts from the loaded weights.

    Args:
        average: Average to update.
        model: Trained model, without DistributedDataParallel.
    """

    def __init__(self, average: MovingAverage, model: nn.Module):
        self.average = average
        self.model = model

    def before_train(self):
        if self.average.updates == 0:
            self.average.start_from(self.model)

    def after_step(self):
        self.average.update(self.model)
