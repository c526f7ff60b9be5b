"""Dense O2O as a training sees it: what follows from seed, position and iteration."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dn_detr.d2.data.augmentation_schedule import DenseO2O, Schedule, build_dense_o2o
from dn_detr.d2.data.loader import TrainLoader, build_train_loader
from dn_detr.d2.data.mixup import mix_batch
from dn_detr.d2.data.summary import check_datasets
from dn_detr.errors import InputError

BOTH = ("INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.SIZE", 40, "INPUT.MIXUP.ENABLED", True)
CERTAIN = ("INPUT.MOSAIC.PROBABILITY", 1.0, "INPUT.MIXUP.PROBABILITY", 1.0)


def batches(loader, count, first=0):
    loader.set_start_iteration(first)
    return list(itertools.islice(iter(loader), count))


def assert_equal(found, expected):
    """Of lists of batches: same images, same objects."""
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert one["image_id"] == other["image_id"]
        assert torch.equal(one["image"], other["image"])
        boxes = [sample["instances"].gt_boxes.tensor for sample in (one, other)]
        assert torch.equal(*boxes)
        assert torch.equal(one["instances"].gt_classes, other["instances"].gt_classes)
        if one["instances"].has("gt_masks"):
            assert torch.equal(*(s["instances"].gt_masks.tensor for s in (one, other)))


@pytest.mark.parametrize("has_masks", [False, True])
def test_a_resumed_stream_equals_the_uninterrupted_one_with_any_number_of_workers(
    tiny_config, has_masks
):
    cfg = tiny_config(*BOTH, "SOLVER.IMS_PER_BATCH", 3)
    cfg.MODEL.MASK_ON = has_masks
    expected = batches(build_train_loader(cfg), 8)
    names = [str(sample["image_id"]) for batch in expected for sample in batch]
    for sign in "+&":  # there are mosaics, mixed images, and neither
        assert 4 < sum(sign in name for name in names) < 20
    cfg.DATALOADER.NUM_WORKERS = 2
    assert_equal(batches(build_train_loader(cfg), 5, first=3), expected[3:])


def test_mixed_batches_are_mixtures_of_what_the_same_training_without_mixing_sees(tiny_config):
    cfg = tiny_config(*BOTH, *CERTAIN, "SOLVER.IMS_PER_BATCH", 3)
    mixed = batches(build_train_loader(cfg), 2)
    dense = build_dense_o2o(cfg)
    cfg.INPUT.MIXUP.ENABLED = False
    single = batches(build_train_loader(cfg), 2)
    for iteration, batch in enumerate(single):
        share = dense.share(iteration, seed=cfg.SEED, first_position=3 * iteration)
        assert 0.45 <= share <= 0.55
        assert_equal([mix_batch(batch, share, (124, 116, 104))], [mixed[iteration]])
    counts = [[len(sample["instances"]) for sample in batch] for batch in (single[0], mixed[0])]
    assert counts[1] == [counts[0][i] + counts[0][i - 1] for i in range(3)]


def test_images_that_are_no_mosaics_are_augmented_as_without_any(tiny_config):
    cfg = tiny_config("SOLVER.IMS_PER_BATCH", 4)
    expected = batches(build_train_loader(cfg), 4)
    cfg.INPUT.MOSAIC.ENABLED, cfg.INPUT.MOSAIC.SIZE = True, 40
    found = batches(build_train_loader(cfg), 4)
    is_single = [["+" not in str(s["image_id"]) for s in batch] for batch in found]
    assert 4 < sum(map(sum, is_single)) < 12
    for one, other, chosen in zip(found, expected, is_single, strict=True):
        assert_equal([itertools.compress(one, chosen)], [itertools.compress(other, chosen)])


# ------------------------------------------------------------------------------------ schedule


def name_mapper(name):
    return lambda record: {"image_id": record, "made_by": name}


class NamedMosaic:
    def __call__(self, records):
        return {"image_id": records[0], "made_by": "mosaic", "records": records}


def make_dense(schedule, *, mosaic=1.0, mixup=1.0):
    return DenseO2O(
        schedule=schedule,
        calm=name_mapper("calm"),
        mosaic=NamedMosaic(),
        mosaic_probability=mosaic,
        blend=(0.45, 0.55),
        mixup_probability=mixup,
        fill=(0, 0, 0),
    )


def test_the_schedule_switches_by_iteration_on_every_rank_alike(monkeypatch):
    monkeypatch.setattr(
        "dn_detr.d2.data.augmentation_schedule.mix_batch",
        lambda samples, *_: [{**s, "mixed": 1} for s in samples],
    )
    for rank in range(2):
        loader = TrainLoader(
            list(range(7)),
            mapper=name_mapper("full"),
            dense=make_dense(Schedule(2, 5, 7)),
            batch_size=4,
            seed=3,
            rank=rank,
            world_size=2,
        )
        seen = batches(loader, 9)
        kinds = [{sample["made_by"] for sample in batch} for batch in seen]
        assert kinds == [{"calm"}] * 2 + [{"mosaic"}] * 3 + [{"full"}] * 2 + [{"calm"}] * 2
        is_mixed = [["mixed" in sample for sample in batch] for batch in seen]
        assert is_mixed == [[2 <= iteration < 5] * 2 for iteration in range(9)]
        resumed = batches(loader, 4, first=4)
        assert resumed == seen[4:8]


def test_without_a_schedule_everything_is_on_from_beginning_to_end():
    schedule = Schedule()
    for iteration in (0, 1, 10**9):
        assert schedule.is_dense(iteration) and not schedule.is_calm(iteration)


def test_the_shares_of_mosaics_and_mixtures_are_those_of_the_configuration():
    dense = make_dense(Schedule(100, 600, 900), mosaic=0.5, mixup=0.3)
    partners = [
        [dense.partners(i, 50, seed=1, position=4 * i + k) for k in range(4)] for i in range(1000)
    ]
    shares = [dense.share(i, seed=1, first_position=4 * i) for i in range(1000)]
    is_mosaic = np.array([[p is not None for p in batch] for batch in partners])
    is_mixed = np.array([share is not None for share in shares])
    assert not is_mosaic[:100].any() and not is_mosaic[600:].any()
    assert not is_mixed[:100].any() and not is_mixed[600:].any()
    # Three standard deviations of 2000 and of 500 draws.
    assert is_mosaic[100:600].mean() == pytest.approx(0.5, abs=0.034)
    assert is_mixed[100:600].mean() == pytest.approx(0.3, abs=0.062)
    drawn = [share for share in shares if share is not None]
    assert 0.45 <= min(drawn) < 0.46 and 0.54 < max(drawn) <= 0.55
    chosen = np.array([p for batch in partners for p in batch if p is not None])
    assert chosen.shape[1] == 3 and set(chosen.ravel()) == set(range(50))
    assert abs(np.corrcoef(chosen.T)[0, 1]) < 0.1
    assert dense.describe(1000).splitlines() == [
        "augmentation by iteration",
        "  iterations 0 to 99: no crops, mosaics or mixed images",
        "  iterations 100 to 599: 50.0% mosaics, 30.0% mixed",
        "  iterations 600 to 899: no mosaics or mixed images",
        "  iterations 900 to 999: no crops, mosaics or mixed images",
        "  of all images: 25.0% mosaics, 15.0% mixed",
    ]


def test_before_and_behind_the_schedule_images_are_not_cropped(tiny_config):
    cfg = tiny_config("INPUT.CROP.ENABLED", True, "INPUT.SCHEDULE", "[1, 1, 2]")
    dense = build_dense_o2o(cfg)
    assert dense.mosaic is None and dense.blend is None
    loader = build_train_loader(cfg)
    assert len(loader.mapper.augmentations.augs[-1].other.augs) == 3
    assert [type(a).__name__ for a in dense.calm.augmentations.augs] == [
        "RandomFlip",
        "ResizeShortestEdge",
    ]
    assert "no mosaics or mixed images" in dense.describe(3)


def test_by_default_nothing_is_mixed(tiny_config):
    assert build_dense_o2o(tiny_config()) is None


# ------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_dense_batch_trains_with_noise_of_its_own_for_each_image(tiny_config, precision):
    cfg = tiny_config(*BOTH, *CERTAIN, "SOLVER.IMS_PER_BATCH", 4)
    cfg.MODEL.DN_DETR.LOSS.KIND = "mal"
    (batch,) = batches(build_train_loader(cfg), 1)
    model = build_model(cfg)
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        keys = model.make_batch(batch, with_targets=True).targets.noise_seeds.tolist()
        losses = model(batch)
    assert len(set(keys)) == 4
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.SCHEDULE", "[0, 2, 4]"], r"after SOLVER.MAX_ITER 3, got \[0, 2, 4\]"),
        (["INPUT.SCHEDULE", "[2, 1, 3]"], "three increasing iterations"),
        (["INPUT.SCHEDULE", "[0, 2]"], "three increasing iterations"),
        (["INPUT.SCHEDULE", "[1, 1, 3]", "INPUT.MIXUP.ENABLED", True], "leaves no iteration to"),
        (["INPUT.MIXUP.ENABLED", True, "SOLVER.IMS_PER_BATCH", 1], "gives each process 1"),
        (["INPUT.MIXUP.ENABLED", True, "INPUT.MIXUP.BLEND", "(0.9, 0.1)"], "two increasing values"),
        (["INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.PROBABILITY", 1.5], "got 1.5"),
        (["INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.SCALE", "(0.0, 1.0)"], "increasing factors"),
        (["INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.SIZE", 0], "a positive SIZE"),
        (["INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.MIN_VISIBLE", 1.0], "MIN_VISIBLE must be"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_images_are_read(tiny_config, opts, message):
    cfg = tiny_config(*opts)
    with pytest.raises(InputError, match=message):
        check_datasets(cfg)
    with pytest.raises(InputError, match=message):
        build_train_loader(cfg)
    check_datasets(cfg, eval_only=True)  # an evaluation does not care
