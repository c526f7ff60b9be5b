"""A moving average of the weights: it follows the training, and is saved and evaluated beside it."""

from __future__ import annotations

import copy
import math

import torch
from detectron2.engine import HookBase
from torch import nn

from dn_detr.errors import InputError

KEY = "ema"
"""Where it stands in a checkpoint, and the prefix of its metrics."""


class MovingAverage:
    """A copy of `model` whose weights are an exponential moving average of the model's.

    At its update u it keeps the share decay * (1 - exp(-u / warmup)) of itself; warmup 0: decay
    from the beginning. Running statistics of norms are averaged like weights, counters copied.
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
        """Move towards the weights of `model`."""
        self.updates += 1
        warm = -math.expm1(-self.updates / self.warmup) if self.warmup else 1.0
        self._move(model, 1 - self.decay * warm)

    @torch.no_grad()
    def start_from(self, model: nn.Module) -> None:
        """Take over the weights of `model`, exactly."""
        self._move(model, 1.0)

    def _move(self, model: nn.Module, share: float) -> None:
        own, others = _tensors(self.model), _tensors(model)
        torch._foreach_lerp_(
            [value for value in own if value.is_floating_point()],
            [value for value in others if value.is_floating_point()],
            share,
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
    """Updates a moving average after every iteration; a new one starts from the loaded weights.

    model: the one that is trained, without DistributedDataParallel.
    """

    def __init__(self, average: MovingAverage, model: nn.Module):
        self.average = average
        self.model = model

    def before_train(self):
        if self.average.updates == 0:
            self.average.start_from(self.model)

    def after_step(self):
        self.average.update(self.model)
