"""Data loaders. After a resume, that of training goes on with exactly the samples that were next.

The sample at position p of the training stream depends on (seed, p) alone: which image follows from
a permutation of each epoch, drawn from (seed, epoch), and every random number of its augmentation
from (seed, p), the other images of a mosaic too. Whether and how the images of a process are mixed
follows from (seed, position of the first). Iteration i of rank r takes positions
i * batch + r * per_rank and following, however many workers there are.
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
from dn_detr.d2.data.mapper import DetrMapper
from dn_detr.d2.data.teacher_boxes import WithTeacher, load_teacher_boxes, teacher_files
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

_ORDER, _AUGMENTATION = 0, 1
"""First words of seeds, beside those of `dense_o2o`: no two kinds share random numbers."""


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of all images in one epoch: a permutation of range(size)."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(size)


@contextlib.contextmanager
def random_numbers_from(seed: int, position: int):
    """Inside, the global generators of Python, numpy and torch (CPU) follow from the arguments.

    Outside they go on as if nothing had happened, so that loading in the main process leaves the
    model's random numbers alone.
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
    """The (position, image index) of a process's batch -> its samples."""

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
    """Endless batches of (position, image index) for one rank, from an iteration on."""

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
    """Endless lists of samples for this rank, `batch_size` on all ranks together.

    dataset: records by index; mapper: record -> sample; dense: mosaics and mixed images. Every
    iterator starts at the iteration last given to `set_start_iteration`, 0 at first; one that has
    begun is not affected by it.
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
        """Let the next iterator begin with the batch of this iteration."""
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
            generator=torch.Generator(),  # the default one belongs to the model
        )
        return _without_lingering_workers(iter(loader))


def _without_lingering_workers(iterator):
    """Yield from a DataLoader's iterator; after an InputError its workers end at once.

    As part of that error's traceback the iterator would live on, and leaving the program would
    take another five seconds for every worker.
    """
    try:
        yield from iterator
    except InputError as error:
        sentence = str(error)
        error.__traceback__ = None
    del iterator
    raise InputError(sentence)


def training_set(
    names, *, check: str, filters_empty: bool, with_masks: bool, teachers: dict[str, str]
):
    """The records of one or several datasets as one, without images without objects if so asked.

    teachers: dataset -> file of a teacher's boxes, which come among its annotations; empty: none.
    InputError where none of them has an object.
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
    """The training loader of a configuration, for the process that calls it.

    A mapper of one's own takes the place of `DetrMapper` in all iterations, but does not make mosaics.

    A negative SEED takes a random one, the same in all processes: then a resumed training sees
    other samples.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise InputError(
            "DATALOADER.SAMPLER_TRAIN must be 'TrainingSampler', the only one that can continue "
            f"exactly after a resume, got {cfg.DATALOADER.SAMPLER_TRAIN!r}."
        )
    dataset = training_set(
        cfg.DATASETS.TRAIN,
        check=cfg.DATASETS.CHECK,
        filters_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        with_masks=cfg.MODEL.MASK_ON,
        teachers=teacher_files(cfg),
    )
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
        f"training on {len(dataset)} images, {loader.batch_size} an iteration: "
        f"{len(dataset) / loader.batch_size:.1f} iterations an epoch; seed {loader.seed}"
    )
    if loader.dense is not None:
        logger.info(loader.dense.describe(cfg.SOLVER.MAX_ITER))
    return loader


def build_test_loader(cfg, dataset_name: str, mapper=None) -> DataLoader:
    """Detectron2's test loader, one image at a time, over the checked dataset."""
    loaded = dataset_dicts.load(
        dataset_name, check=cfg.DATASETS.CHECK, with_masks=cfg.MODEL.MASK_ON
    )
    return build_detection_test_loader(
        loaded.records,
        mapper=DetrMapper(cfg, False) if mapper is None else mapper,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
