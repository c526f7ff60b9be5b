"""A batch computed in parts is the batch computed at once."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from samples import sample

from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.modeling.images import pad_images
from dn_detr.d2.solver.optimizer import build_optimizer

FROZEN = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("MODEL.RESNETS.NORM", "FrozenBN"),
)


def unequal_batch() -> list[dict]:
    """Unequal in size and in objects: one image has none, and the first part has few."""
    sizes = [(64, 96, 1), (96, 64, 0), (64, 64, 5), (32, 96, 2)]
    return [sample(i, n, height=h, width=w) for i, (h, w, n) in enumerate(sizes)]


def gradients_and_losses(cfg, num_parts, batch=None):
    """In float64, where a sum in another order differs by far less than a fault would. Box heads
    that start at zero give queries one and the same box, whose matching is a tie that rounding
    decides: so nothing starts at zero here."""
    torch.manual_seed(0)
    model = build_model(cfg).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    step = TrainStep(
        model,
        [unequal_batch() if batch is None else batch],
        build_optimizer(cfg, model),
        precision=None,
        seed=0,
        num_parts=num_parts,
    )
    step.iter = 3
    with EventStorage(start_iter=3) as storage:
        step.run_step()
        losses = {name: value for name, (value, _) in storage.latest().items()}
    del losses["data_time"]
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, losses


def check_equal(parts, losses_of_parts, whole, losses):
    """Losses are reported in float32: a sum of four has an error below 4 / 2**24 = 2.4e-7.
    Gradients are float64, whose rounding is 1e-16: 1e-10 of the largest one leaves subpackage for a
    million sums, and is far below what any weight has that learns."""
    assert losses_of_parts == pytest.approx(losses, rel=1e-6, abs=1e-9)
    assert parts.keys() == whole.keys()
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        error, scale = (parts[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-6 * scale + 1e-10 * largest, name


@pytest.mark.parametrize(
    "opts",
    [
        (),
        # As many groups as fit: their number follows from the fullest image of the whole batch.
        ("MODEL.DN_DETR.DENOISING.NUM_GROUPS", 0, "MODEL.DN_DETR.DENOISING.MAX_OBJECTS", 12),
        ("MODEL.DN_DETR.METHOD", "dab_detr", "MODEL.DN_DETR.PAD_OBJECTS_TO", 4),
    ],
)
def test_parts_have_the_losses_and_gradients_of_the_whole(tiny_config, opts):
    cfg = tiny_config(*FROZEN, *opts)
    whole, losses = gradients_and_losses(cfg, 1)
    for num_parts in (2, 4):
        parts, losses_of_parts = gradients_and_losses(cfg, num_parts)
        check_equal(parts, losses_of_parts, whole, losses)


def test_parts_of_samples_without_image_id_have_the_noise_of_the_whole(tiny_config):
    batch = unequal_batch()
    for one in batch:
        del one["image_id"]
    (parts, losses_of_parts), (whole, losses) = (
        gradients_and_losses(tiny_config(*FROZEN), num_parts, batch) for num_parts in (4, 1)
    )
    check_equal(parts, losses_of_parts, whole, losses)


def test_a_part_is_padded_like_the_whole():
    images = torch.ones(3, 32, 32)
    padded, padding = pad_images([images], 32, height=40, width=70)
    assert padded.shape == (1, 3, 64, 96)
    assert padded.sum() == images.sum() and (padded[..., :32, :32] == 1).all()
    assert padding.sum() == 64 * 96 - 32 * 32 and not padding[:, :32, :32].any()


def test_a_training_in_parts_says_how_many_images_it_learns_from(run, tmp_path):
    run("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2, "SOLVER.MAX_ITER", 2)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "4 images for each step of the optimizer: 1 x 4 (processes x images), 2 at a time" in log


def test_parts_of_unequal_size_are_refused(run):
    with pytest.raises(SystemExit, match="SOLVER.ACCUMULATE must divide the 4 images .*, got 3"):
        run("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 3)


def test_losses_that_are_means_over_the_batch_are_refused(run):
    with pytest.raises(SystemExit, match="SOLVER.ACCUMULATE needs MODEL.DN_DETR.LOSS.KIND 'focal'"):
        run("SOLVER.ACCUMULATE", 2, "MODEL.DN_DETR.LOSS.KIND", "softmax")
