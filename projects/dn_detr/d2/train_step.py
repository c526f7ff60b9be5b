"""One training iteration: Detectron2's SimpleTrainer with mixed precision on any device, one copy
of all losses to the host instead of one each, and random numbers that follow from the iteration."""

from __future__ import annotations

import math
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from dn_detr.errors import InputError
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
            raise InputError(
                f"SOLVER.AMP.PRECISION must be one of {list(PRECISIONS)}, got {precision!r}."
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
            try:
                losses = self.model(data)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}, {self.whereabouts(data)}") from error
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()
        self.report(losses, data, data_time)
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def report(self, losses: dict, data: list[dict], data_time: float) -> None:
        """Put the losses, averaged over the ranks, into the event storage.

        FloatingPointError on every rank if one is not finite, before the optimizer has used its
        gradients.
        """
        names = list(losses)
        own = torch.stack([losses[name].detach().float() for name in names])
        own = torch.cat((own, own.new_full((1,), data_time)))
        mean = own.clone()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(mean)
            mean /= comm.get_world_size()
        own, (*mean, data_time) = torch.stack((own, mean)).tolist()
        losses = dict(zip(names, mean, strict=True))
        if not all(map(math.isfinite, mean)):
            where = self.whereabouts(data)
            if all(map(math.isfinite, own)):
                where = f"in iteration {self.iter}, but not from rank {comm.get_rank()}"
            broken = [name for name, value in losses.items() if not math.isfinite(value)]
            raise FloatingPointError(
                f"not finite: {', '.join(broken)}, {where}; all losses: {losses}"
            )
        storage = get_event_storage()
        storage.put_scalar("data_time", data_time)
        storage.put_scalar("total_loss", sum(losses.values()))
        storage.put_scalars(**losses)
        storage.put_scalars(**summarize(losses))

    def whereabouts(self, data: list[dict]) -> str:
        """Iteration and images of this rank's batch, for messages."""
        images = [sample.get("image_id", sample.get("file_name")) for sample in data]
        return f"in iteration {self.iter}, from the images {images} of rank {comm.get_rank()}"

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise InputError(
                f"the optimizer of this checkpoint does not fit this configuration: {error}."
            ) from error
        if state_dict["grad_scaler"]:  # empty if it was saved in another precision
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
