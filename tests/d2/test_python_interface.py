"""`dn_detr` in Python: train, evaluate, detections as pictures, json and supervision."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

import dn_detr
from dn_detr import DetectedObjects, Detector, InputError


@pytest.fixture(scope="module")
def detector(trained):
    return Detector(trained / "model_final.pth", threshold=0.0, device="cpu")


def test_every_name_of_the_interface_exists():
    assert all(getattr(dn_detr, name) for name in dn_detr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dn_detr.trian


def test_training_in_python_gives_the_detector(arguments, tmp_path):
    command = arguments()
    opts = command[command.index("OUTPUT_DIR") + 2 :]
    pairs = {k.replace(".", "__"): v for k, v in zip(opts[::2], opts[1::2], strict=True)}
    pairs.pop("SOLVER__MAX_ITER")
    options = {"output": tmp_path / "out", "epochs": 0.4, "num_gpus": 0}
    for _ in range(2):  # twice in one process, as in a notebook
        found = dn_detr.train("quick/dn_deformable", overwrite=True, **options, **pairs)
    assert found.weights == str(tmp_path / "out/model_final.pth")
    lines = (tmp_path / "out/log.txt").read_text().splitlines()
    assert sum("iter 1/2" in line for line in lines) == 1
    assert "Detector('" in repr(found) and "6 classes: ellipse, rectangle" in repr(found)
    with pytest.raises(InputError, match="did you mean SOLVER.MAX_ITER"):
        dn_detr.train("quick/dn_deformable", SOLVER__MAXITER=3, num_gpus=0)


def test_evaluation_in_python_is_that_of_the_command(detector, run, trained, tmp_path):
    metrics = detector.evaluate(output=str(tmp_path / "python"))
    run("MODEL.WEIGHTS", trained / "model_final.pth", flags=["--eval-only"], output="command")
    results = [
        json.loads((tmp_path / folder / "inference/coco_instances_results.json").read_text())
        for folder in ("python", "command")
    ]
    assert results[0] == results[1] and set(metrics["bbox"]) > {"AP", "AP50"}


def test_detections_are_drawn_and_saved(detector, tmp_path):
    path = tmp_path / "a.png"
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).save(path)
    found = detector(str(path))
    assert len(found) == 10 and found.image_size == (60, 90)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    again = detector([pixels[:, :, ::-1]], channel_order="BGR")[0]
    assert np.array_equal(found.draw(), again.draw()) and found.draw().shape == (480, 720, 3)
    for name in ("b.png", "new/b.json", "b.txt"):
        found.save(tmp_path / name)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), found.draw())
    assert json.loads((tmp_path / "new/b.json").read_text()) == found.to_json()
    assert len((tmp_path / "b.txt").read_text().splitlines()) == 10
    with pytest.raises(InputError, match="is the image itself"):
        found.save(path)


def test_detections_are_readable_and_have_coco_results():
    boxes = np.array([[1, 2, 5, 9], [0, 0, 2, 2]], np.float32)
    masks = np.zeros((2, 10, 10), bool)
    masks[0, 2:9, 1:5] = True
    scores = np.array([0.9, 0.3], np.float32)
    found = DetectedObjects(boxes, scores, np.array([3, 0]), ["dog", "cat"], masks)
    assert repr(found) == "DetectedObjects(1 dog, 1 cat, scores 0.30 to 0.90)"
    first = found.to_json()[0]
    assert first["bbox"] == [1, 2, 4, 7] and first["category_id"] == 4
    from pycocotools import mask

    assert mask.decode(first["segmentation"]).sum() == 28
    json.dumps(found.to_json())
    for ask in (found.draw, found.to_yolo):
        with pytest.raises(InputError, match="do not know"):
            ask()


def test_supervision_gets_detections_or_its_absence_is_said(monkeypatch):
    empty = np.zeros((0, 4), np.float32)
    found = DetectedObjects(empty, np.zeros(0), np.zeros(0, int), [])
    assert repr(found) == "DetectedObjects(nothing)"
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="pip install supervision"):
        found.to_supervision()
    module = types.SimpleNamespace(Detections=lambda **given: given)
    monkeypatch.setitem(sys.modules, "supervision", module)
    assert found.to_supervision()["xyxy"] is empty
