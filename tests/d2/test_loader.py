import gc
import itertools
import multiprocessing
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer

from dn_detr.d2.data.loader import TrainLoader
from dn_detr.errors import InputError


def noisy_mapper(record):
    """A mapper that uses every global generator."""
    return {
        "image_id": record,
        "python": random.random(),
        "numpy": np.random.rand(),
        "torch": torch.rand(()).item(),
    }


def make_loader(size=7, batch_size=4, **changes):
    arguments = {"mapper": noisy_mapper, "batch_size": batch_size, "seed": 5, **changes}
    return TrainLoader(list(range(size)), **arguments)


def batches(loader, count):
    return list(itertools.islice(iter(loader), count))


def test_stream_is_the_same_with_and_without_workers():
    expected = batches(make_loader(num_workers=0), 6)
    assert batches(make_loader(num_workers=2), 6) == expected
    assert batches(make_loader(num_workers=3), 6) == expected
    assert batches(make_loader(seed=6), 6) != expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_stream_equals_the_uninterrupted_one(num_workers):
    expected = batches(make_loader(), 9)
    for first in (1, 4):
        loader = make_loader(num_workers=num_workers)
        loader.set_start_iteration(first)
        assert batches(loader, 9 - first) == expected[first:]


def test_augmentation_differs_between_epochs_and_images():
    samples = [sample for batch in batches(make_loader(), 14) for sample in batch]
    for key in ("python", "numpy", "torch"):
        assert len({sample[key] for sample in samples}) == len(samples)


def test_every_epoch_visits_every_image_once_in_another_order():
    samples = [sample["image_id"] for batch in batches(make_loader(), 14) for sample in batch]
    epochs = [samples[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_ranks_share_the_batch_of_one_process():
    whole = batches(make_loader(), 8)
    ranks = [batches(make_loader(rank=rank, world_size=2), 8) for rank in range(2)]
    assert all(len(batch) == 2 for batch in ranks[0])
    assert [first + second for first, second in zip(*ranks, strict=False)] == whole


def test_batches_may_be_larger_than_the_dataset():
    (batch,) = batches(make_loader(size=3, batch_size=8), 1)
    assert sorted(Counter(sample["image_id"] for sample in batch).values()) == [2, 3, 3]


def test_loading_leaves_the_random_numbers_of_the_main_process_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(make_loader(num_workers=0), 3)
    batches(make_loader(num_workers=1), 3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_start_iteration_set_after_the_trainer_was_built_counts():
    expected = batches(make_loader(), 5)
    loader = make_loader()
    trainer = SimpleTrainer(torch.nn.Linear(1, 1), loader, optimizer=None)
    loader.set_start_iteration(3)
    assert next(trainer._data_loader_iter) == expected[3]
    assert next(trainer._data_loader_iter) == expected[4]


def test_batch_size_must_fit_the_number_of_processes():
    with pytest.raises(InputError, match="got 4 images for 3 processes"):
        make_loader(world_size=3)
    with pytest.raises(ValueError, match="at least one image"):
        make_loader(size=0)


def failing_mapper(record):
    raise InputError(f"image {record} cannot be read: replace it.")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_input_errors_come_out_of_workers_as_one_sentence(num_workers):
    with pytest.raises(InputError) as caught:
        batches(make_loader(mapper=failing_mapper, num_workers=num_workers), 1)
    assert str(caught.value).startswith("image ") and str(caught.value).endswith("replace it.")
    assert "\n" not in str(caught.value)


def test_workers_end_at_once_after_an_input_error():
    start = time.perf_counter()
    with pytest.raises(InputError):
        batches(make_loader(mapper=failing_mapper, num_workers=2), 1)
    gc.collect()
    assert multiprocessing.active_children() == []
    assert time.perf_counter() - start < 4
