"""A detector with box prompts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import ROUNDING, losses_in

from dn_detr import Detector
from dn_detr.detector import BoxPrompts, DetectedObjects
from dn_detr.errors import InputError

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))


@pytest.fixture(scope="module")
def prompted(train_tiny, tmp_path_factory):
    """The folder of a training that was also resumed from its second iteration."""
    folder = tmp_path_factory.mktemp("prompts")
    options = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    config_file = QUICK / "prompted_dn_deformable.yaml"
    train_tiny(folder, *options, config_file=config_file)
    losses = losses_in(folder)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    train_tiny(folder, *options, config_file=config_file, flags=["--resume"])
    assert [line["iteration"] for line in losses] == [0, 1, 2, 3]
    assert losses_in(folder) == losses and sum(line["loss_prompt"] for line in losses) > 0
    return folder


@pytest.fixture(scope="module")
def detector(prompted):
    return Detector.from_checkpoint(prompted / "model_final.pth", threshold=0, device="cpu")


def test_known_objects_come_first_as_they_were_given(detector):
    boxes = [[10, 5, 40, 50], [30, 20, 95, 58]]  # the second one reaches over the border
    alone = detector(PICTURE)
    found = detector(PICTURE, prompts=BoxPrompts(boxes, ["star", None]))
    assert len(found) == 2 + len(alone)
    assert found.boxes_xyxy_px[:2].tolist() == boxes
    assert found.class_names[0] == "star" and found.scores[0] == 1 and 0 < found.scores[1] < 1
    assert found.labels[0] == detector.class_names.index("star")
    assert not np.array_equal(found.scores[2:], alone.scores)  # the others have seen them


def test_nothing_known_changes_nothing(detector):
    alone, told = detector(PICTURE), detector(PICTURE, prompts=BoxPrompts([]))
    same = {"atol": ROUNDING, "rtol": 0}
    np.testing.assert_allclose(told.scores, alone.scores, **same)
    np.testing.assert_allclose(told.boxes_xyxy_px / 100, alone.boxes_xyxy_px / 100, **same)


def test_of_a_list_each_image_has_its_own(detector):
    prompts = BoxPrompts([[10, 5, 40, 50]], ["star"])
    first, second = detector([PICTURE, PICTURE], prompts=[None, prompts])
    same = {"atol": ROUNDING, "rtol": 0}
    np.testing.assert_allclose(first.scores, detector(PICTURE).scores, **same)
    np.testing.assert_allclose(second.scores, detector(PICTURE, prompts=prompts).scores, **same)


@pytest.mark.parametrize(
    ("boxes", "names", "sentence"),
    [
        ([[1, 2, 3]], None, r"must be \[N, 4\], left, top, right, bottom, got \[1, 3\]"),
        ([[9, 2, 3, 8]], None, "left < right and top < bottom"),
        ([[1, 2, np.nan, 8]], None, "left < right and top < bottom"),
        ([[1, 2, 3, 8]], ["star", "ring"], "1 box prompts, but 2 class names"),
        ([[1, 2, 3, 8]], ["dog"], "classes this detector was not trained on: dog"),
        ([[100, 2, 120, 8]], ["star"], "must lie in the image"),
    ],
)
def test_known_objects_that_cannot_be_used_are_refused_in_one_sentence(
    detector, boxes, names, sentence
):
    with pytest.raises(InputError, match=sentence):
        detector(PICTURE, prompts=BoxPrompts(boxes, names))


@pytest.mark.usefixtures("trained")
def test_detectors_that_cannot_be_told_say_why(tiny_config):
    from detectron2.modeling import build_model

    def told(*opts, name=None, **file):
        model = build_model(tiny_config(*opts, **file)).eval()
        sizes = {"min_size": 64, "max_size": 96, "input_format": "RGB"}
        detector = Detector(model, class_names=["a"] * 5 + ["star"], **sizes)
        detector(PICTURE, prompts=BoxPrompts([[10, 5, 40, 50]], [name]))

    told(name="star")  # trained with denoising: it has label embeddings
    for sentence, arguments in {
        "a class name need a detector trained with MODEL.DN_DETR.BOX_PROMPTS": {},
        "this model is a DenoisingRCNN": {"config_file": QUICK / "faster_rcnn_fpn.yaml"},
        "this one finds masks": {"config_file": QUICK / "dn_mask2former.yaml"},
        "need label embeddings": {"config_file": QUICK / "dab_deformable.yaml"},
    }.items():
        with pytest.raises(InputError, match=sentence):
            told(**arguments)


# ------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def evaluate_prompts(tool):
    return tool("evaluate_prompts")


def test_the_best_detection_of_each_given_object_is_left_out(evaluate_prompts):
    """IoU of [0, 0, 10, 10] with [0, 0, 10, 6] is 0.6, with [0, 0, 10, 4] 0.4."""
    boxes = np.array([[0, 0, 10, 4], [0, 0, 10, 6], [0, 0, 10, 10], [0, 0, 10, 10]], np.float32)
    found = DetectedObjects(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 1, 1, 2]), [])
    given, labels = np.array([[0, 0, 10, 10.0]]), np.array([1])
    assert evaluate_prompts.without_given(found, given, labels) == [0, 2, 3]
    assert evaluate_prompts.without_given(found, given[:0], labels[:0]) == [0, 1, 2, 3]


def test_the_tool_compares_ap_with_and_without_prompts(
    evaluate_prompts,
    prompted,
    capsys,
    monkeypatch,  # noqa: ARG001
):
    evaluate_prompts.main(
        ["MODEL.WEIGHTS", str(prompted / "model_final.pth"), "MODEL.DEVICE", "cpu"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "tiny_val: 4 images" in lines[-5] and lines[-2].startswith("| without prompts |")
    assert lines[-1].startswith("| with prompts |")


def test_a_perfect_detector_has_ap_100_with_and_without_prompts(evaluate_prompts, tmp_path):
    """A detector that returns only its prompts has AP 0."""
    records = []
    for image in range(3):
        path = tmp_path / f"{image}.png"
        PICTURE.save(path)
        boxes = [[5, 5, 20, 20], [30, 10, 15, 40], [50, 5, 30, 30], [60, 40, 20, 15]]
        objects = [
            {"bbox": box, "bbox_mode": 1, "category_id": (image + i) % 2}
            for i, box in enumerate(boxes)
        ]
        size = {"height": 60, "width": 90}
        records.append({"file_name": str(path), "annotations": objects, **size})

    class Oracle:
        class_names = ["a", "b"]

        def __init__(self, finds_others):
            self.finds_others = finds_others

        def __call__(self, path, threshold, prompts):  # noqa: ARG002 - passed by name
            objects = records[int(Path(path).stem)]["annotations"]
            x, y, w, h = np.array([one["bbox"] for one in objects], np.float32).T
            boxes, labels = np.stack((x, y, x + w, y + h), 1), [o["category_id"] for o in objects]
            if prompts is not None:
                told = prompts.boxes_xyxy_px.tolist()
                rest = [i for i, box in enumerate(boxes.tolist()) if box not in told]
                rest = rest if self.finds_others else []
                boxes = np.concatenate((prompts.boxes_xyxy_px, boxes[rest]))
                named = [self.class_names.index(name) for name in prompts.class_names]
                labels = [*named, *(labels[i] for i in rest)]
            return DetectedObjects(boxes, np.ones(len(boxes)), np.array(labels), [])

    metrics, given, others = evaluate_prompts.evaluate(Oracle(True), records, share=0.5, seed=0)
    assert (given, others) == (6, 6)
    assert metrics["with prompts"]["AP"] == metrics["without prompts"]["AP"] == pytest.approx(100)
    metrics, _, _ = evaluate_prompts.evaluate(Oracle(False), records, share=0.5, seed=0)
    assert metrics["with prompts"]["AP"] == 0 and metrics["without prompts"]["AP"] == pytest.approx(
        100
    )
