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
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.augmentation_schedule import DenseO2O, build_dense_o2o
from dn_detr.d2.data.catalog import class_names
from dn_detr.d2.data.mapper import DetrMapper, read_image
from dn_detr.d2.data.packing import about_open_files, allow_open_files, pack, unpack
from dn_detr.d2.data.records import CheckedMapper
from dn_detr.d2.data.teacher_boxes import WithTeacher, load_teacher_boxes, teacher_files
from dn_detr.d2.engine.endings import ignore_signals
from dn_detr.errors import BadImage, InputError

logger = logging.getLogger(__name__)

_ORDER, _AUGMENTATION, _REPLACEMENT = 0, 1, 4
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


class _Replacing(Dataset):
    """Records of a dataset, with other ones in the place of those whose image cannot be used.

    The other one follows from seed and index alone, not from when the fault was found. The worker
    processes share what they find.

    Args:
        dataset: Records by index.
        seed: Seed of the replacements.
        most: Most images that are replaced.
    """

    def __init__(self, dataset, *, seed: int, most: int):
        self.dataset = dataset
        self.seed = seed
        self.most = most
        self.is_bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.read: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([_REPLACEMENT, self.seed, index])
        while self.is_bad[index]:
            index = int(rng.integers(len(self)))
        self.read[index] = self.dataset[index]
        return self.read[index]

    def sample(self, make: Callable[[], dict]) -> dict:
        """Return make(), called again without the images that it could not use."""
        while True:
            self.read.clear()
            try:
                return make()
            except BadImage as error:
                self._drop(error)

    def _drop(self, error: BadImage) -> None:
        """Mark the images behind an error."""
        faults = {next(iter(self.read)): str(error)} if len(self.read) == 1 else {}
        for index, record in self.read.items() if not faults else ():  # of a mosaic
            try:
                read_image(dict(record), "RGB")
            except BadImage as fault:
                faults[index] = str(fault)
        if not faults:
            raise error
        for index, fault in faults.items():
            if not self.is_bad[index]:
                self.is_bad[index] = True
                logger.warning(f"trains on another image from here on: {fault}")
        count = int(self.is_bad.sum())
        if count > self.most or count == len(self):
            raise InputError(
                f"{count} of {len(self)} training images cannot be used, and "
                f"DATALOADER.MAX_BAD_IMAGES is {self.most}: {error}"
            )


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
        samples = [self._readable_sample(iteration, *place) for place in places]
        if self.dense is None:
            return samples
        return self.dense.batch(samples, iteration, seed=self.seed, first_position=first)

    def _readable_sample(self, *place: int) -> dict:
        if isinstance(self.dataset, _Replacing):
            return self.dataset.sample(lambda: self._sample(*place))
        return self._sample(*place)

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
        max_bad_images: Most images that cannot be used and are replaced by others; None: the first
            is an error.
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
        max_bad_images: int | None = None,
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
        self.max_bad_images = max_bad_images
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
        dataset = self.dataset
        if self.max_bad_images is not None:
            dataset = _Replacing(dataset, seed=self.seed, most=self.max_bad_images)
        loader = DataLoader(
            _Samples(
                dataset,
                mapper=self.mapper,
                dense=self.dense,
                batch_size=self.batch_size,
                seed=self.seed,
            ),
            batch_sampler=places,
            num_workers=self.num_workers,
            collate_fn=pack if self.num_workers else list,
            pin_memory=self.pin_memory,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # leaves the default generator to the model
        )
        allow_open_files(self.num_workers)
        with about_open_files(self.num_workers):
            iterator = iter(loader)
        return _without_lingering_workers(iterator, self.num_workers)


def _without_lingering_workers(iterator, num_workers: int):
    """Yield the batches of a DataLoader's iterator; end its workers at once after an InputError.

    The error's traceback would otherwise keep the iterator alive, and exiting would take another
    five seconds for every worker.
    """
    try:
        with about_open_files(num_workers):
            yield from (unpack(*batch) for batch in iterator) if num_workers else iterator
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
    if cfg.DATALOADER.BAD_IMAGES not in ("stop", "skip"):
        raise InputError(
            f"DATALOADER.BAD_IMAGES must be 'stop' or 'skip', got {cfg.DATALOADER.BAD_IMAGES!r}."
        )
    skips = cfg.DATALOADER.BAD_IMAGES == "skip"
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
        max_bad_images=cfg.DATALOADER.MAX_BAD_IMAGES if skips else None,
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


class _BlankIfUnreadable:
    """A mapper for evaluation that never fails at an image file.

    The sample of an image that cannot be used has a blank image and says why under "unreadable":
    the evaluator counts it as an image without detections.
    """

    def __init__(self, mapper, side: int):
        self.mapper = mapper
        self.side = side

    def __call__(self, record: dict) -> dict:
        try:
            return self.mapper(record)
        except BadImage as error:
            sample = {key: value for key, value in record.items() if key != "annotations"}
            blank = torch.zeros(3, self.side, self.side, dtype=torch.uint8)
            return {**sample, "image": blank, "unreadable": str(error)}


def build_test_loader(cfg, dataset_name: str, mapper=None) -> DataLoader:
    """Build Detectron2's test loader over the checked dataset, with one image per batch.

    Samples with the key "unreadable" stand for images that cannot be used.
    """
    allow_open_files(cfg.DATALOADER.NUM_WORKERS)
    loaded = dataset_dicts.load(
        dataset_name, check=cfg.DATASETS.CHECK, with_masks=cfg.MODEL.MASK_ON
    )
    return build_detection_test_loader(
        loaded.records,
        mapper=_BlankIfUnreadable(mapper or DetrMapper(cfg, False), cfg.INPUT.MIN_SIZE_TEST),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
