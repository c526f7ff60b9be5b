"""Samples pass from worker processes in one buffer; too few open files are a sentence, no hang."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from samples import sample, with_teacher

from dn_detr.d2.data.loader import TrainLoader
from dn_detr.d2.data.packing import allow_open_files, pack, unpack
from dn_detr.errors import InputError


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, Instances):
        assert ours.image_size == theirs.image_size
        assert_equal(ours.get_fields(), theirs.get_fields())
    elif isinstance(theirs, (Boxes, BitMasks)):
        assert_equal(ours.tensor, theirs.tensor)
    elif isinstance(theirs, np.ndarray):
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


def test_samples_come_out_as_they_went_in():
    odd = {
        "turned": torch.arange(12, dtype=torch.float64).view(3, 4).T,
        "number": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "halves": torch.tensor([1.5, 2], dtype=torch.bfloat16),
        "array": np.arange(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    samples = [with_teacher(sample(1, 3), 5), sample(2, 0), odd]
    buffer, content = pack(samples)
    assert buffer.is_shared() and len(content) < 5000
    for ours, theirs in zip(unpack(buffer, content), samples, strict=True):
        assert_equal(ours, theirs)


def test_samples_are_views_of_the_buffer_apart_from_each_other():
    first, second = unpack(*pack([sample(1, 3), sample(2, 3)]))
    before = second["image"].clone()
    first["image"].fill_(7)
    assert torch.equal(second["image"], before)
    assert first["image"].untyped_storage().data_ptr() == (
        second["image"].untyped_storage().data_ptr()
    )


def noisy(record):
    return sample(record, record % 5)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_give_what_the_main_process_gives(num_workers):
    def first_batches(num_workers):
        loader = TrainLoader(
            list(range(20)), mapper=noisy, batch_size=5, seed=1, num_workers=num_workers
        )
        return [batch for _, batch in zip(range(6), loader, strict=False)]

    ours, theirs = first_batches(num_workers), first_batches(0)
    for batch, expected in zip(ours, theirs, strict=True):
        for one, other in zip(batch, expected, strict=True):
            assert_equal(one, other)


# ---------------------------------------------------------------------------------- open files

LOADS = """
import os, sys
sys.path.insert(0, {folder!r})
from samples import sample
from dn_detr.d2.data.loader import TrainLoader
from dn_detr.errors import InputError

loader = TrainLoader(
    list(range(64)), mapper=lambda i: sample(i, 3), batch_size=64, seed=0, num_workers={workers}
)
try:
    kept = [batch for _, batch in zip(range(8), loader)]
    print("loaded", len(kept), len(kept[0]))
except InputError as error:
    print(error)
sys.stdout.flush()
os._exit(0)  # waiting for the workers, which are ahead, takes seconds
"""


def loads(limits: str, workers: int) -> str:
    """What loading 64 images at a time says under these limits of open files."""
    code = LOADS.format(folder=str(Path(__file__).parent), workers=workers)
    command = ["bash", "-c", f'ulimit {limits} && exec "$0" -c "$1"', sys.executable, code]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("limits", "workers"), [("-Sn 1024", 8), ("-n 256", 8), ("-n 90", 2)])
def test_many_images_load_under_ordinary_and_low_limits(limits, workers):
    assert loads(limits, workers) == "loaded 8 64"


@pytest.mark.parametrize(("limit", "workers"), [(90, 8), (40, 2)])
def test_too_few_open_files_are_a_sentence(limit, workers):
    said = loads(f"-n {limit}", workers)
    assert said.startswith(f"the limit of {limit} open files (`ulimit -n`) is too low for ")
    assert f"DATALOADER.NUM_WORKERS {workers}: raise it" in said and "\n" not in said


@pytest.fixture
def limits():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_the_hard_one(limits):
    hard = limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    allow_open_files(2)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)


def mapper_without_files(_):
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_still_runs_out_of_files_says_so_and_blames_no_image(num_workers):
    loader = TrainLoader(
        [0, 1],
        mapper=mapper_without_files,
        batch_size=2,
        seed=0,
        num_workers=num_workers,
        max_bad_images=1,
    )
    with pytest.raises(InputError, match="open files .* is too low for DATALOADER.NUM_WORKERS"):
        next(iter(loader))
