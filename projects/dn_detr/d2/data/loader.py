"""Data loaders. A resumed training continues with exactly the next samples.

The sample at position p of the training stream depends only on (seed, p): the image comes from a
permutation per epoch, drawn from (seed, epoch), and all random numbers of its augmentation, mosaic
included, from (seed, p). The mixing of a process's images depends on (seed, position of the first).
Iteration i of rank r reads per_rank positions from i * batch + r * per_rank, with any number of
workers.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.augmentation_schedule import DenseO2O, build_dense_o2o
from dn_detr.d2.data.catalog import class_names
from dn_detr.d2.data.mapper import DetrMapper
from dn_detr.d2.data.records import CheckedMapper
from dn_detr.d2.data.teacher_boxes import WithTeacher, load_teacher_boxes, teacher_files
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

_ORDER, _AUGMENTATION = 0, 1
"""First words of seeds; `augmentation_schedule` uses 2 and 3, so no two share random numbers."""


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of the images in one epoch, a permutation [size] int64 of range(size)."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(size)


@contextlib.contextmanager
def random_numbers_from(seed: int, position: int):
    """Seed the global generators of Python, numpy and torch (CPU) inside the context.

    Their states are restored at the end, so that loading in the main process does not change the
    model's random numbers.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([_AUGMENTATION, seed, position]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would reseed CUDA too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _Samples(Dataset):
    """Maps the (position, image index) pairs of a process's batch to its samples."""

    def __init__(self, dataset, *, mapper, dense: DenseO2O | None, batch_size: int, seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.dense = dense
        self.batch_size = batch_size
        self.seed = seed

    def __getitems__(self, places: list[tuple[int, int]]) -> list[dict]:
        first = places[0][0]
        iteration = first // self.batch_size
        samples = [self._sample(iteration, *place) for place in places]
        if self.dense is None:
            return samples
        return self.dense.batch(samples, iteration, seed=self.seed, first_position=first)

    def _sample(self, iteration: int, position: int, index: int) -> dict:
        with random_numbers_from(self.seed, position):
            if self.dense is None:
                return self.mapper(self.dataset[index])
            stream = {"seed": self.seed, "position": position}
            return self.dense.sample(self.mapper, self.dataset, index, iteration, **stream)


class _Places:
    """Endless batches of (position, image index) for one rank, from a first iteration on."""

    def __init__(self, *, size, batch_size, rank, world_size, seed, first_iteration):
        self.size = size
        self.per_rank = batch_size // world_size
        self.first_position = first_iteration * batch_size + rank * self.per_rank
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, epoch, order = self.first_position, None, None
        while True:
            batch = []
            for p in range(position, position + self.per_rank):
                if p // self.size != epoch:
                    epoch = p // self.size
                    order = epoch_order(self.seed, epoch, self.size)
                batch.append((p, int(order[p % self.size])))
            yield batch
            position += self.batch_size


class TrainLoader:
    """Endless lists of samples for this rank.

    Args:
        dataset: Records by index.
        mapper: Maps a record to a sample.
        batch_size: Samples of all ranks in an iteration.
        seed: Seed of order and augmentation.
        dense: Mosaics and mixed images, or None.
        num_workers: Worker processes; 0 loads in the main process.
        pin_memory: Whether to copy tensors to pinned memory.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        dataset,
        *,
        mapper,
        batch_size: int,
        seed: int,
        dense: DenseO2O | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(dataset) == 0:
            raise ValueError("the training dataset must have at least one image, got none")
        if batch_size < 1 or batch_size % world_size:
            raise InputError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of the number of processes, got "
                f"{batch_size} images for {world_size} processes."
            )
        self.dataset = dataset
        self.mapper = mapper
        self.batch_size = batch_size
        self.seed = seed
        self.dense = dense
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = 0

    def set_start_iteration(self, iteration: int) -> None:
        """Start the next iterator at this iteration; running iterators are not affected."""
        if iteration < 0:
            raise ValueError(f"iteration must be >= 0, got {iteration}")
        self.start_iteration = iteration

    def __iter__(self) -> Iterator[list[dict]]:
        places = _Places(
            size=len(self.dataset),
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            first_iteration=self.start_iteration,
        )
        loader = DataLoader(
            _Samples(
                self.dataset,
                mapper=self.mapper,
                dense=self.dense,
                batch_size=self.batch_size,
                seed=self.seed,
            ),
            batch_sampler=places,
            num_workers=self.num_workers,
            collate_fn=list,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # leaves the default generator to the model
        )
        return _without_lingering_workers(iter(loader))


def _without_lingering_workers(iterator):
    """Yield from a DataLoader's iterator and end its workers at once after an InputError.

    The error's traceback would otherwise keep the iterator alive, and exiting would take another
    five seconds for every worker.
    """
    try:
        yield from iterator
    except InputError as error:
        message = str(error)
        error.__traceback__ = None
    del iterator
    raise InputError(message)


def training_set(
    names, *, check: str, filters_empty: bool, with_masks: bool, teachers: dict[str, str]
):
    """Concatenate the records of training datasets.

    Args:
        names: Names of the datasets.
        check: DATASETS.CHECK.
        filters_empty: Whether to leave out images without objects.
        with_masks: Whether to keep segmentations.
        teachers: Dataset -> file of teacher boxes, which are added to its annotations.

    Raises:
        InputError: If a dataset has no objects.
    """
    parts = []
    for name in names:
        loaded = dataset_dicts.load(name, check=check, with_masks=with_masks)
        part = loaded.records
        if name in teachers:
            part = WithTeacher(part, load_teacher_boxes(loaded, teachers[name]).boxes)
        if filters_empty:
            part = Subset(part, np.flatnonzero(loaded.num_objects).tolist())
        if not loaded.num_objects.any():
            raise InputError(
                f"the training dataset {name!r} has no boxes, so there is nothing to learn from it."
            )
        parts.append(part)
    return ConcatDataset(parts)


def build_train_loader(cfg, mapper=None) -> TrainLoader:
    """Build the training loader of the calling process.

    Args:
        cfg: Configuration. A negative SEED draws a random one for all processes, and a resumed
            training then sees other samples.
        mapper: Custom mapper to use instead of `DetrMapper`, except in mosaics.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise InputError(
            "DATALOADER.SAMPLER_TRAIN must be 'TrainingSampler', the only one that continues "
            f"exactly after a resume, got {cfg.DATALOADER.SAMPLER_TRAIN!r}."
        )
    dataset = training_set(
        cfg.DATASETS.TRAIN,
        check=cfg.DATASETS.CHECK,
        filters_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        with_masks=cfg.MODEL.MASK_ON,
        teachers=teacher_files(cfg),
    )
    if mapper is not None:
        mapper = CheckedMapper(mapper, len(class_names(cfg.DATASETS.TRAIN[0])))
    loader = TrainLoader(
        dataset,
        mapper=DetrMapper(cfg, True) if mapper is None else mapper,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        dense=build_dense_o2o(cfg, mapper),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    logger.info(
        f"training on {len(dataset)} images, {loader.batch_size} per iteration: "
        f"{len(dataset) / loader.batch_size:.1f} iterations per epoch; seed {loader.seed}"
    )
    if loader.dense is not None:
        logger.info(loader.dense.describe(cfg.SOLVER.MAX_ITER))
    return loader


def build_test_loader(cfg, dataset_name: str, mapper=None) -> DataLoader:
    """Build Detectron2's test loader over the checked dataset, with one image per batch."""
    loaded = dataset_dicts.load(
        dataset_name, check=cfg.DATASETS.CHECK, with_masks=cfg.MODEL.MASK_ON
    )
    return build_detection_test_loader(
        loaded.records,
        mapper=DetrMapper(cfg, False) if mapper is None else mapper,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
