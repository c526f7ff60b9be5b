"""The public Python interface: checkpoints that know themselves, images as they come."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from samples import ROUNDING

from dn_detr import Detector
from dn_detr.datasets.shape_drawing import CLASSES
from dn_detr.detector import to_pixels
from dn_detr.errors import InputError


@pytest.fixture(scope="module")
def detector(trained):
    return Detector.from_checkpoint(trained / "model_final.pth", threshold=0, device="cpu")


@pytest.fixture(scope="module")
def pictures(trained):
    """Paths of the four pictures of the test set, whose sizes differ."""
    config = yaml.safe_load((trained / "config.yaml").read_text())
    return sorted(Path(config["DATASETS"]["COCO_FORMAT"][1][2]).iterdir())


def assert_same(found, expected):
    side = np.abs(expected.boxes_xyxy_px).max()
    np.testing.assert_allclose(
        found.boxes_xyxy_px, expected.boxes_xyxy_px, atol=ROUNDING * side, rtol=0
    )
    np.testing.assert_allclose(found.scores, expected.scores, atol=ROUNDING, rtol=0)
    assert found.labels.tolist() == expected.labels.tolist()


# ------------------------------------------------------------------------------- what it returns


def test_a_detector_finds_what_the_evaluation_found(detector, trained, pictures):
    results = json.loads((trained / "inference/coco_instances_results.json").read_text())
    results = [entry for entry in results if entry["image_id"] == results[0]["image_id"]]
    found = min(detector(pictures), key=lambda f: abs(f.scores[0] - results[0]["score"]))
    assert len(found) == len(results) == 10
    for i, entry in enumerate(results):
        left, top, width, height = entry["bbox"]
        np.testing.assert_allclose(
            found.boxes_xyxy_px[i], [left, top, left + width, top + height], atol=1e-2
        )
        assert found.labels[i] == entry["category_id"] - 1
        assert found.class_names[i] == CLASSES[entry["category_id"] - 1]


def test_a_list_of_unequal_images_gives_what_its_images_give_one_by_one(detector, pictures):
    sizes = [(90, 60), (60, 90), (90, 60), (48, 48)]
    images = [Image.open(p).resize(s) for p, s in zip(pictures, sizes, strict=True)]
    together = detector(images)
    assert len(together) == 4
    for image, found in zip(images, together, strict=True):
        assert_same(found, detector(image))
    for found, expected in zip(detector(images, batch_size=1), together, strict=True):
        assert_same(found, expected)


@pytest.mark.usefixtures("pictures")
def test_images_of_one_size_go_through_the_network_together(detector, monkeypatch):
    batches, forward = [], detector.model.forward

    def counted(samples):
        batches.append(len(samples))
        return forward(samples)

    monkeypatch.setattr(detector.model, "forward", counted)
    images = [Image.new("RGB", size) for size in [(9, 6)] * 3 + [(5, 5)] + [(9, 6)] * 2]
    detector(images, batch_size=4)
    assert sorted(batches) == [1, 1, 4]


def test_every_kind_of_image_gives_the_same(detector, pictures):
    path = pictures[0]
    image = Image.open(path)
    pixels = np.asarray(image.convert("RGB"))
    expected = detector(path)
    for found in (
        detector(str(path)),
        detector(image),
        detector(pixels, channel_order="RGB"),
        detector(pixels[:, :, ::-1], channel_order="BGR"),
    ):
        assert_same(found, expected)
    assert isinstance(detector((path,)), list)
    assert detector([]) == []


def test_the_threshold_cuts_the_list_where_scores_fall_below_it(detector, trained, pictures):
    every = detector(pictures[0])
    threshold = float(every.scores[3])
    kept = detector(pictures[0], threshold=threshold)
    assert 4 <= len(kept) == int((every.scores >= threshold).sum()) < len(every)
    assert kept.class_names == every.class_names[: len(kept)]
    strict = Detector.from_checkpoint(trained / "model_final.pth", threshold=1, device="cpu")
    assert len(strict(pictures[0])) == 0 and strict(pictures[0]).boxes_xyxy_px.shape == (0, 4)


def test_images_are_turned_as_their_exif_orientation_says(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.putpixel((5, 0), (255, 0, 0))
    exif = image.getexif()
    exif[274] = 6  # a quarter turn clockwise: the right upper corner becomes the right lower one
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = to_pixels(tmp_path / "turned.png", "RGB")
    assert pixels.shape == (6, 4, 3) and pixels[5, 3].tolist() == [255, 0, 0]


# --------------------------------------------------------------------- what a checkpoint remembers


def test_a_checkpoint_holds_its_classes_and_configuration_as_plain_types(trained):
    about = torch.load(trained / "model_final.pth", weights_only=True)["detector"]
    assert about["class_names"] == list(CLASSES)
    assert "METHOD: dab_deformable" in about["config"] and "NUM_CLASSES: 6" in about["config"]


@pytest.fixture
def old(trained, tmp_path):
    """The same weights in a file that says nothing of itself."""
    state = torch.load(trained / "model_final.pth")["model"]
    torch.save({"model": state}, tmp_path / "old.pth")
    return tmp_path / "old.pth"


def test_an_old_checkpoint_works_with_its_configuration_file(detector, trained, old, pictures):
    config = trained / "config.yaml"
    again = Detector.from_checkpoint(old, config_file=config, threshold=0, device="cpu")
    assert again.class_names == list(CLASSES)
    assert_same(again(pictures[0]), detector(pictures[0]))
    named = Detector.from_checkpoint(old, config_file=config, class_names=list("abcdef"))
    assert named.class_names == list("abcdef")


def test_options_go_on_top_of_the_saved_configuration(trained, pictures):
    few = Detector.from_checkpoint(
        trained / "model_final.pth", opts=["TEST.DETECTIONS_PER_IMAGE", 3], threshold=0
    )
    assert len(few(pictures[0])) == 3


def test_mistakes_are_said_in_one_sentence(trained, old, tmp_path):
    final, config = trained / "model_final.pth", trained / "config.yaml"
    (tmp_path / "text.pth").write_text("no weights")
    for arguments, words in [
        ({"path": tmp_path / "none.pth"}, "there is no checkpoint"),
        ({"path": tmp_path / "text.pth"}, "cannot be loaded as a checkpoint"),
        ({"path": old}, "holds no configuration: pass the config file"),
        ({"path": old, "config_file": tmp_path / "none.yaml"}, "no configuration .*none.yaml"),
        ({"path": old, "config_file": config, "class_names": ["a"]}, "has 6 classes .* but 1 "),
        ({"path": final, "opts": ["MODEL.NONE", 1]}, "Non-existent"),
        ({"path": final, "opts": ["MODEL.DN_DETR.DECODER_LAYERS", 1]}, "another model"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            Detector.from_checkpoint(**arguments)
        assert "\n" not in str(caught.value)


def test_what_is_no_image_is_refused(detector, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    pixels = np.zeros((4, 4, 3), np.uint8)
    for image, order, words in [
        (tmp_path / "none.png", None, "does not exist"),
        (tmp_path / "text.png", None, "cannot be read .unknown image format"),
        (pixels, None, "need their channel order"),
        (pixels, "rgb", "need their channel order"),
        (pixels[0], "RGB", r"must be uint8 \[height, width, 3\], got uint8 \[4, 3\]"),
        (pixels / 255, "RGB", "got float64"),
        (3, None, "got int"),
    ]:
        with pytest.raises(ValueError, match=words):
            detector(image, channel_order=order)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 50"):
        detector(pixels, channel_order="RGB", threshold=50)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        detector([], batch_size=0)


def test_without_detectron2_the_package_imports_and_the_detector_says_what_it_needs():
    code = (
        "import sys\nsys.modules['detectron2'] = None\nimport dn_detr\n"
        "try:\n    dn_detr.Detector\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "needs Detectron2 (" in done.stdout and "): run `python -m dn_detr.install" in done.stdout
    ), done.stderr


def test_long_thin_images_and_16_bits_are_detected_in(detector, tmp_path):
    for size in ((3000, 1), (2, 2000)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        found = detector(tmp_path / "a.png")
        assert (found.boxes_xyxy_px <= [*size, *size]).all() and np.isfinite(found.scores).all()
    values = np.random.default_rng(0).integers(65536, size=(40, 60)).astype(np.uint16)
    deep = Image.fromarray(values)
    assert_same(detector(deep), detector(Image.fromarray((values >> 8).astype(np.uint8))))
