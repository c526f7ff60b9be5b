"""One training iteration: Detectron2's SimpleTrainer with mixed precision on any device, one copy
of all losses to the host instead of one each, and random numbers that follow from the iteration."""

from __future__ import annotations

import math
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from dn_detr.losses.criterion import summarize

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainStep(SimpleTrainer):
    """Runs one iteration; see `SimpleTrainer`.

    precision: "bfloat16", "float16" (with loss scaling) or None for float32. seed: random numbers
    drawn on the device (dropout) are seeded by (seed, iteration, rank), so that a resumed training
    draws the same.
    """

    def __init__(self, model, data_loader, optimizer, *, precision: str | None, seed: int):
        super().__init__(model, data_loader, optimizer)
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(
                f"SOLVER.AMP.PRECISION must be one of {list(PRECISIONS)}, got {precision!r}"
            )
        self.precision = PRECISIONS.get(precision)
        self.seed = seed
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16
        )

    def run_step(self):
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        torch.manual_seed(hash((self.seed, self.iter, comm.get_rank())) & 0x7FFFFFFF)
        with torch.autocast(
            self.device.type, dtype=self.precision, enabled=self.precision is not None
        ):
            losses = self.model(data)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.report(losses, data, data_time)
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def report(self, losses: dict, data: list[dict], data_time: float) -> None:
        """Put the losses, averaged over the ranks, into the event storage.

        FloatingPointError if one is not finite, before the optimizer has used its gradients.
        """
        names = list(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        values = torch.cat((values, values.new_tensor([data_time])))
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        *values, data_time = values.tolist()
        losses = dict(zip(names, values, strict=True))
        broken = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if broken:
            images = [sample.get("image_id", sample.get("file_name")) for sample in data]
            raise FloatingPointError(
                f"loss is not finite in iteration {self.iter}, on images {images} of rank "
                f"{comm.get_rank()}: {broken}; all losses: {losses}"
            )
        storage = get_event_storage()
        storage.put_scalar("data_time", data_time)
        storage.put_scalar("total_loss", sum(losses.values()))
        storage.put_scalars(**losses)
        storage.put_scalars(**summarize(losses))

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
