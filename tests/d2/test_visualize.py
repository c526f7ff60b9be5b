"""The command visualize: drawings show what training and model work with."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dn_detr.auxiliary.denoising import DenoisingQueries
from dn_detr.cli.main import main
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.inference import draw_data, draw_layers
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.errors import InputError


@pytest.mark.parametrize("is_contrastive", [False, True])
def test_the_noise_that_is_drawn_is_the_noise_of_the_training(tiny_config, is_contrastive):
    cfg = tiny_config("MODEL.DN_DETR.DENOISING.CONTRASTIVE", is_contrastive)
    model = Trainer.build_model(cfg).train()
    (auxiliary,) = (a for a in model.core.auxiliary if isinstance(a, DenoisingQueries))
    seen = []
    auxiliary.register_forward_hook(lambda _module, _args, queries: seen.append(queries))
    number, batch = next(draw_data.batches(cfg, iteration=5))
    model(batch, iteration=number)
    targets = model.make_batch(batch, iteration=number, with_targets=True).targets
    assert number == 5
    noised, _ = auxiliary.noise(targets, num_matched=1, mask_dtype=torch.float32)
    segment = next(s for s in seen[0].segments if s.name == "dn")
    assert torch.equal(noised.assignment, segment.assignment)
    assert torch.equal(noised.is_empty, segment.is_empty)
    reference = seen[0].state.reference[:, : segment.size]
    there = ~noised.is_empty
    torch.testing.assert_close(noised.boxes[there], reference[there], atol=2e-3, rtol=0)
    assert bool((noised.assignment[there] < 0).any()) == is_contrastive


@pytest.mark.parametrize("source", ["annotations", "batches", "denoising"])
def test_every_source_gives_pictures(trained, tmp_path, source):
    few = ["--output", str(tmp_path), "--num-images", "2", "--iteration", "3"]
    main(["visualize", source, str(trained / "config.yaml"), *few])
    pictures = sorted(tmp_path.iterdir())
    assert len(pictures) == 2 and all(p.name.startswith(source) for p in pictures)
    for picture in pictures:
        assert np.asarray(Image.open(picture)).std() > 10


@pytest.mark.parametrize("source", ["annotations", "augmented"])
def test_masks_are_drawn_where_they_are_trained_on(tiny_config, source):
    draw = {
        "annotations": draw_data.annotations,
        "augmented": lambda cfg: draw_data.augmented(cfg, 0),
    }[source]
    cfg, pictures = tiny_config(), []
    for has_masks in (False, True):
        cfg.MODEL.MASK_ON = has_masks
        name, picture = next(draw(cfg))
        pictures.append(picture.astype(int))
    changed = (np.abs(pictures[1] - pictures[0]).max(-1) > 30).mean()
    assert 0.01 < changed < 0.7


def test_the_schedule_is_counted_and_drawn(trained, tmp_path, capsys):
    config = [str(trained / "config.yaml"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="dn-detr visualize: .*has no INPUT.SCHEDULE"):
        main(["visualize", "schedule", *config])
    changed = ["SOLVER.MAX_ITER", "40", "INPUT.SCHEDULE", "[10, 20, 30]"]
    changed += ["INPUT.MOSAIC.ENABLED", "True", "INPUT.MOSAIC.PROBABILITY", "1.0"]
    changed += ["INPUT.MIXUP.ENABLED", "True", "INPUT.MIXUP.PROBABILITY", "0.0"]
    main(["visualize", "schedule", *config, *changed])
    printed = capsys.readouterr().out
    assert "iterations 10 to 19: 100.0% mosaics\n" in printed
    assert "  mosaics: 25.0% of all images\n  mixed: 0.0% of all images\n" in printed
    assert np.asarray(Image.open(tmp_path / "schedule_shares.png")).std() > 10


def test_the_drawn_shares_are_those_of_the_training(tiny_config):
    cfg = tiny_config("INPUT.MOSAIC.ENABLED", True, "INPUT.MIXUP.ENABLED", True)
    loader = Trainer.build_train_loader(cfg)
    shares = draw_data.dense_shares(loader, np.arange(6, 12))
    for i, (_, batch) in zip(range(6), draw_data.batches(cfg, 6), strict=False):
        names = [str(sample["image_id"]) for sample in batch]
        assert shares["mixed"][i] == ("&" in names[0])
        own = [name.split("&")[0] for name in names]
        assert shares["mosaics"][i] == np.mean(["+" in name for name in own])


def test_without_denoising_there_is_none_to_see(trained, tmp_path):
    config = [str(trained / "config.yaml"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="dn-detr visualize: .*trains without denoising"):
        main(["visualize", "denoising", *config, "MODEL.DN_DETR.DENOISING.ENABLED", "False"])


def test_a_teachers_boxes_are_drawn_beside_the_objects(tiny_config, tmp_path):
    """As many boxes more, as many coloured pixels more."""
    cfg = tiny_config("MODEL.DN_DETR.TEACH.ENABLED", True)
    (name,) = cfg.DATASETS.TRAIN
    coloured = []
    for count in (1, 4):
        boxes = [
            {"image_id": image, "category_id": 1, "bbox": [9 + 20 * i, 9, 12, 40], "score": 0.5}
            for image in range(1, 11)
            for i in range(count)
        ]
        cfg.DATASETS.TEACHER_BOXES = [[name, str(tmp_path / f"{count}.json")]]
        (tmp_path / f"{count}.json").write_text(json.dumps(boxes))
        _, picture = next(draw_data.taught(cfg, 0))
        coloured.append(picture.astype(int))
    assert (np.abs(coloured[1] - coloured[0]).max(-1) > 30).mean() > 0.002
    cfg.MODEL.DN_DETR.TEACH.ENABLED = False
    with pytest.raises(InputError, match="trains without teachers"):
        next(draw_data.taught(cfg, 0))


def test_the_layers_of_a_checkpoint_are_drawn_for_a_picture(trained, tmp_path):
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).save(tmp_path / "a.png")
    weights = ["--weights", str(trained / "model_final.pth")]
    output = tmp_path / "new" / "layers.png"
    main(
        [
            "visualize",
            "layers",
            "--input",
            str(tmp_path / "a.png"),
            "--output",
            str(output),
            *weights,
        ]
    )
    picture = Image.open(output)
    assert picture.width == 2 * 320  # two decoder layers
    with pytest.raises(SystemExit, match="dn-detr visualize: the image 'none.png' does not exist"):
        main(["visualize", "layers", "--input", "none.png", *weights])


def test_a_method_that_looks_in_a_way_unknown_here_says_so(trained):
    saved = load_detector(str(trained / "model_final.pth"))
    for layer in saved.model.core.decoder.layers:
        layer.cross_attention.forward = lambda content, *others: content
    with pytest.raises(InputError, match="no cross-attention"):
        draw_layers.look(saved, np.zeros((60, 90, 3), np.uint8))
