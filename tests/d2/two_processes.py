"""What each of two processes of test_distributed.py does; a spawned process can import it."""

import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from samples import sample, with_teacher

from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.engine.collective import raise_on_all_ranks, run_on_main_rank
from dn_detr.d2.engine.nonfinite_dump import NonFiniteDump
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.engine.trainer import Trainer, across_processes
from dn_detr.d2.modeling.batch import batch_stats
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError


def train_with_an_empty_rank(rank: int, folder: Path, cfg, *others) -> None:
    """Rank 0 has four objects and five boxes of a teacher, rank 1 none; then rank 1's loss breaks.
    Saves what it saw. Then one step of each of the other configurations."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    torch.manual_seed(rank)  # DistributedDataParallel must give both the weights of rank 0
    model = across_processes(build_model(cfg))
    batch = [sample(0, 3), sample(1, 1)] if rank == 0 else [sample(2, 0), sample(3, 0)]
    counts = (2, 3) if rank == 0 else (0, 0)
    batch = [with_teacher(one, m) for one, m in zip(batch, counts, strict=True)]
    step = TrainStep(
        model, [batch] * 3, build_optimizer(cfg, model), precision=None, seed=0, num_parts=2
    )
    whole = batch_stats(batch, torch.device("cpu"))
    seen = {"normalisers": (float(whole.num_objects), float(whole.num_teacher_boxes))}
    with EventStorage() as storage:
        for step.iter in range(2):
            step.run_step()
        seen["losses"] = {name: value for name, (value, _) in storage.latest().items()}
        seen["gradients"] = {
            name: parameter.grad.clone()
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad
        }
        seen["weights"] = {k: v.clone() for k, v in model.module.state_dict().items()}
        if rank == 1:
            model.module.criterion.terms["bbox"] = (infinite_in_the_first_layer, 1.0)
        try:
            step.run_step()
        except FloatingPointError as error:
            seen["error"] = str(error)
    torch.save(seen, folder / f"{rank}.pt")
    for number, other in enumerate(others):
        train_one_step(rank, folder / f"{number}_{rank}.pt", other)
    torch.distributed.destroy_process_group()


def train_one_step(rank: int, file: Path, cfg) -> None:
    """Save losses and gradients; rank 0 has three objects and three teacher boxes, rank 1 none."""
    model = across_processes(build_model(cfg))
    count = 0 if rank else 3
    batch = [with_teacher(sample(rank, count), count)]
    step = TrainStep(model, [batch], build_optimizer(cfg, model), precision=None, seed=0)
    step.iter = 0
    with EventStorage() as storage:
        step.run_step()
        losses = {name: v for name, (v, _) in storage.latest().items() if name.startswith("loss_")}
    trained = {name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}
    torch.save({"losses": losses, "gradients": trained}, file)


def meet_errors_of_one(rank: int, folder: Path, cfg) -> None:
    """Errors of one process, in four places; saves what each process raised."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)

    def fails_in(other: int) -> str:
        if rank == other:
            raise InputError(f"the file of {rank} is broken.")
        return f"read by {rank}"

    raised = [run_on_main_rank(lambda: f"read by {rank}"), raise_on_all_ranks(lambda: fails_in(2))]
    prepare(cfg)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    sys.modules["wandb"] = None  # not installed
    for attempt in (
        lambda: run_on_main_rank(lambda: fails_in(0)),
        lambda: raise_on_all_ranks(lambda: fails_in(1)),
        lambda: Trainer(cfg),
        lambda: train_until_an_image_is_broken(rank, cfg),
    ):
        try:
            attempt()
        except InputError as error:
            raised.append((type(error).__name__, str(error)))
    torch.save(raised, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def break_a_rank(rank: int, folder: Path, cfg) -> None:
    """Rank 1 alone meets NaN in its matching, then in its gradient; saves what each raised."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    raised = []
    for fault in ("image", "gradient"):
        model = across_processes(build_model(cfg))
        one = sample(rank, 2)
        if rank == 1 and fault == "image":
            one["image"] = torch.full(one["image"].shape, torch.nan)
        if rank == 1 and fault == "gradient":
            model.module.criterion.terms["bbox"] = (broken_only_in_its_derivative, 1.0)
        step = TrainStep(
            model,
            [[one]],
            build_optimizer(cfg, model),
            precision=None,
            seed=0,
            evidence=NonFiniteDump(str(folder), cfg.dump()),
        )
        step.iter = 0
        try:
            with EventStorage():
                step.run_step()
        except FloatingPointError as error:
            raised.append(str(error))
    torch.save(raised, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def broken_only_in_its_derivative(matched, _num_objects):
    of_layers = matched.boxes.flatten(1).sum(1).mul(0).sqrt()
    return of_layers[:, None].expand(-1, len(matched.sizes))


def train_until_an_image_is_broken(rank: int, cfg) -> None:
    """In the second iteration, for rank 1 alone."""

    def batches():
        yield [sample(rank, 1)]
        if rank == 1:
            raise InputError("an image of 1 is broken.")
        yield [sample(rank, 1)]

    model = across_processes(build_model(cfg))
    step = TrainStep(model, batches(), build_optimizer(cfg, model), precision=None, seed=0)
    with EventStorage():
        for step.iter in range(2):
            step.run_step()


def infinite_in_the_first_layer(matched, _num_objects):
    values = matched.logits.new_ones(matched.logits.shape[0], len(matched.sizes))
    values[0] = torch.inf
    return values
