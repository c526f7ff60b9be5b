"""One training iteration: Detectron2's SimpleTrainer with mixed precision on any device, one copy
of all losses to the host instead of one each, batches that are computed in parts, and random
numbers that follow from the iteration.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from dn_detr.d2.engine.collective import raise_on_all_ranks
from dn_detr.d2.engine.nonfinite_dump import NonFiniteDump
from dn_detr.d2.modeling.batch import BatchStats, batch_stats
from dn_detr.d2.modeling.instances import with_image_ids
from dn_detr.errors import InputError, NotFinite
from dn_detr.losses.criterion import summarize

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainStep(SimpleTrainer):
    """Runs one iteration; see `SimpleTrainer`.

    precision: "bfloat16", "float16" (with loss scaling) or None for float32. seed: random numbers
    drawn on the device (dropout) are seeded by (seed, iteration, rank), so that a resumed training
    draws the same. num_parts: the batch of this process is computed in so many parts, one after the
    other, with the gradients of the whole. evidence: keeps what reproduces a loss that is not
    finite. requests: what this process asks of all; `asked` is the sum over them in this iteration.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        precision: str | None,
        seed: int,
        num_parts: int = 1,
        evidence: NonFiniteDump | None = None,
        requests: Callable[[], list[float]] = list,
    ):
        super().__init__(model, data_loader, optimizer)
        if precision is not None and precision not in PRECISIONS:
            raise InputError(
                f"SOLVER.AMP.PRECISION must be one of {list(PRECISIONS)}, got {precision!r}."
            )
        self.precision = PRECISIONS.get(precision)
        self.seed = seed
        self.saved_seed: int | None = None  # that of the checkpoint which was resumed
        self.num_parts = num_parts
        self.evidence = evidence
        self.requests = requests
        self.asked: list[float] = []
        self.last_update = -1  # iteration whose update of the weights has begun
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16
        )

    def run_step(self):
        start = time.perf_counter()
        data = with_image_ids(raise_on_all_ranks(lambda: next(self._data_loader_iter)))
        data_time = time.perf_counter() - start

        torch.manual_seed(self.device_seed())
        stats = batch_stats(data, self.device, self.requests())
        self.optimizer.zero_grad()
        losses = self.backward(data, stats)
        self.after_backward()
        self.report(losses, data, stats, data_time)
        self.last_update = self.iter
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    @property
    def detector(self):
        """The model without what distributes it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def device_seed(self) -> int:
        """Where this process's random numbers of this iteration come from."""
        return hash((self.seed, self.iter, comm.get_rank())) & 0x7FFFFFFF

    def parts(self, data: list[dict]) -> list[list[dict]]:
        """The batch in `num_parts` equal parts."""
        size = len(data) // self.num_parts
        return [data[i * size : (i + 1) * size] for i in range(self.num_parts)]

    def autocast(self) -> torch.autocast:
        """Mixed precision, or none."""
        return torch.autocast(
            self.device.type, dtype=self.precision, enabled=self.precision is not None
        )

    def backward(self, data: list[dict], stats: BatchStats) -> dict[str, torch.Tensor]:
        """Add up the gradients of all parts of the batch; returns its losses."""
        losses: dict[str, torch.Tensor] = {}
        for index, part in enumerate(self.parts(data)):
            is_last = index == self.num_parts - 1
            wait = contextlib.nullcontext()
            if not is_last and isinstance(self.model, DistributedDataParallel):
                wait = self.model.no_sync()  # the processes add their gradients up once
            with wait:
                some = self.forward(part, stats, data)
                total = torch.stack(list(some.values())).sum()
                self.grad_scaler.scale(total).backward()
            for name, value in some.items():
                value = value.detach().float()
                losses[name] = losses[name] + value if name in losses else value
        return losses

    def forward(self, part: list[dict], stats: BatchStats, data: list[dict]) -> dict:
        """Losses of a part of the batch `data`; NotFinite where matching meets no finite
        numbers.
        """
        with self.autocast():
            try:
                return self.model(part, stats, iteration=self.iter)
            except FloatingPointError as error:
                raise NotFinite(
                    f"{error}, {self.whereabouts(part)}; {self.advice(data, stats)}"
                ) from error

    def report(self, losses: dict, data: list[dict], stats: BatchStats, data_time: float) -> None:
        """Put the losses, averaged over the ranks, into the event storage.

        NotFinite on every rank if one or the gradient is not finite, before the optimizer uses it.
        """
        names = [*losses, "grad_norm"]
        own = torch.stack([*losses.values(), self.gradient_norm()])
        own = torch.cat((own, own.new_full((1,), data_time)))
        mean = own.clone()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(mean)
            mean /= comm.get_world_size()
        asked = () if stats.requests is None else (stats.requests.to(mean),)
        on_host = torch.cat((own, mean, *asked)).tolist()
        own, mean = on_host[: len(own)], on_host[len(own) : 2 * len(own)]
        self.asked, data_time = on_host[2 * len(own) :], mean.pop()
        losses = dict(zip(names, mean, strict=True))
        broken = [name for name, value in losses.items() if not math.isfinite(value)]
        norm = losses.pop("grad_norm")
        if self.grad_scaler.is_enabled() and broken == ["grad_norm"]:
            broken = []  # gradient scaling skips such a step and takes a smaller scale
        if broken:
            is_own = not all(map(math.isfinite, own[: len(losses)]))
            if broken == ["grad_norm"]:  # the processes have mixed their gradients
                is_own = comm.get_world_size() == 1 or self.has_broken_gradient(data, stats)
            guilty = [rank for rank, is_bad in enumerate(comm.all_gather(is_own)) if is_bad]
            where = f"in iteration {self.iter}, from rank {', '.join(map(str, guilty))}"
            if is_own:
                where = f"{self.bad_matching(data, stats)}{self.whereabouts(data)}"
                where = f"{where}; {self.advice(data, stats)}"
            raise NotFinite(f"not finite: {', '.join(broken)}, {where}; all losses: {losses}")
        storage = get_event_storage()
        storage.put_scalars(data_time=data_time, grad_norm=norm)
        storage.put_scalar("total_loss", sum(losses.values()))
        storage.put_scalars(**losses)
        storage.put_scalars(**summarize(losses))

    def has_broken_gradient(self, data: list[dict], stats: BatchStats) -> bool:
        """Whether the gradients of this process alone are not finite; they are computed again."""
        torch.manual_seed(self.device_seed())
        parameters = [p for p in self.detector.parameters() if p.requires_grad]
        for part in self.parts(data):
            with self.autocast():
                losses = self.detector(part, stats, iteration=self.iter)
            total = torch.stack(list(losses.values())).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            if not all(g.isfinite().all() for g in gradients if g is not None):
                return True
        return False

    def bad_matching(self, data: list[dict], stats: BatchStats) -> str:
        """Where the matcher met numbers that are not finite: on a GPU the losses only show that it
        did. The forward passes are computed again, with the random numbers of before.
        """
        torch.manual_seed(self.device_seed())
        for index, part in enumerate(self.parts(data)):
            with self.autocast():
                sentence = self.detector.find_nonfinite(part, stats, self.iter)
            if sentence:
                which = f" (part {index} of {self.num_parts})" if self.num_parts > 1 else ""
                return f"{sentence}{which}, "
        return ""

    def gradient_norm(self) -> torch.Tensor:
        """Of all gradients together, before clipping, which does not compute it again; a scalar."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).float()
        if self.grad_scaler.is_enabled():
            norm = norm / self.grad_scaler.get_scale()
        self.optimizer.gradient_norm = norm
        return norm

    def whereabouts(self, data: list[dict]) -> str:
        """Iteration and images of this rank's batch, for messages."""
        images = [
            " ".join(str(sample[key]) for key in ("image_id", "file_name") if key in sample)
            for sample in data
        ]
        rank = comm.get_rank()
        return f"in iteration {self.iter}, from the images [{', '.join(images)}] of rank {rank}"

    def advice(self, data: list[dict], stats: BatchStats) -> str:
        """Keeps the evidence, and says where."""
        if self.evidence is None:
            return "a smaller learning rate or float32 may help"
        path = self.evidence.keep(
            self.detector,
            data,
            iteration=self.iter,
            rank=comm.get_rank(),
            seed=self.seed,
            device_seed=self.device_seed(),
            num_objects=float(stats.num_objects),
            num_teacher_boxes=float(stats.num_teacher_boxes),
            num_parts=self.num_parts,
        )
        return f"python tools/replay_not_finite.py {path} computes it again"

    def state_dict(self) -> dict:
        own = {"grad_scaler": self.grad_scaler.state_dict(), "seed": self.seed}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.saved_seed = state_dict.get("seed")
        if state_dict["grad_scaler"]:  # empty if it was saved in another precision
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
