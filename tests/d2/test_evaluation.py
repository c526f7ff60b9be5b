"""AP by every implementation, and the numbers that stand behind it, against brute force."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import forget
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr.cli.main import main
from dn_detr.d2.data.catalog import register_coco_format
from dn_detr.d2.evaluation.coco_evaluator import (
    IMPLEMENTATIONS,
    Evaluator,
    build_evaluator,
    coco_eval_class,
    evaluate,
)
from dn_detr.d2.evaluation.error_analysis import Curve, analyse, images_at
from dn_detr.d2.evaluation.results import evaluate_results
from dn_detr.datasets.shape_drawing import CLASSES
from dn_detr.errors import InputError

NAMES = ("cat", "dog", "owl")


def ground_truth(objects, num_images=1, first_id=1, size=200) -> COCO:
    """objects: (image from 1 on, class from 0 on, x, y, width, height, iscrowd)."""
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1}.png", "width": size, "height": size}
            for i in range(num_images)
        ],
        "categories": [{"id": 10 * k + 3, "name": name} for k, name in enumerate(NAMES)],
        "annotations": [
            {
                "id": first_id + number,
                "image_id": image,
                "category_id": 10 * label + 3,
                "bbox": [float(v) for v in box],
                "area": float(box[2] * box[3]),
                "iscrowd": crowd,
            }
            for number, (image, label, *box, crowd) in enumerate(objects)
        ],
    }
    coco.createIndex()
    return coco


def results(found) -> list[dict]:
    """found: (image, class, x, y, width, height, score)."""
    return [
        {"image_id": i, "category_id": 10 * k + 3, "bbox": list(map(float, box)), "score": score}
        for i, k, *box, score in found
    ]


def random_case(seed: int, num_images: int = 12, num_results: int = 130):
    """Objects, some of them crowds, and results of which half are near one; scores repeat."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(1, num_images + 1):
        mine = []
        for _ in range(rng.integers(0, 12)):
            box = (*rng.uniform(0, 120, 2), *rng.uniform(3, 110, 2))
            mine.append((image, int(rng.integers(3)), *box, int(rng.random() < 0.1)))
        for _ in range(num_results):
            box, label = rng.uniform(2, 100, 4), int(rng.integers(3))
            if mine and rng.random() < 0.5:
                near = mine[rng.integers(len(mine))]
                box, label = np.abs(np.array(near[2:6]) + rng.normal(0, 4, 4)) + 0.1, near[1]
            found.append((image, label, *box, float(rng.integers(40)) / 40))
        objects += mine
    return ground_truth(objects, num_images), results(found)


# ---------------------------------------------------------------------------------------------- AP


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("limit", "seed"), [(100, 0), (100, 1), (300, 2)])
def test_all_implementations_agree_with_pycocotools(implementation, limit, seed):
    if implementation == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval")
    coco, found = random_case(seed, num_results=40 if limit == 100 else 330)
    reference = COCOeval(coco, coco.loadRes(found), "bbox")
    reference.params.maxDets = [1, 10, limit]
    reference.evaluate()
    reference.accumulate()
    evaluated = evaluate(
        coco, found, "bbox", max_detections=limit, coco_eval=coco_eval_class(implementation)
    )
    for name in ("precision", "recall", "scores"):
        theirs = np.asarray(evaluated.eval[name]).reshape(reference.eval[name].shape)
        np.testing.assert_allclose(theirs, reference.eval[name], rtol=0, atol=1e-12)
    if limit == 100:
        reference.summarize()
        np.testing.assert_allclose(evaluated.stats, reference.stats, rtol=0, atol=1e-12)
    assert 0.1 < evaluated.stats[0] < 0.9


def test_an_unknown_implementation_is_refused():
    with pytest.raises(InputError, match="TEST.COCO_EVAL must be one of detectron2, py"):
        coco_eval_class("fast")


@pytest.fixture
def dataset(tmp_path):
    """register(coco) -> the name of a dataset of these annotations, whose images are black."""

    def register(coco):
        (tmp_path / "images").mkdir(exist_ok=True)
        for image in coco.dataset["images"]:
            Image.new("RGB", (image["width"],) * 2).save(tmp_path / "images" / image["file_name"])
        (tmp_path / "a.json").write_text(json.dumps(coco.dataset))
        register_coco_format([["pets", str(tmp_path / "a.json"), str(tmp_path / "images")]])
        DatasetCatalog.get("pets")  # sets the metadata, as loading does
        return "pets"

    yield register
    forget("pets")


def metrics_of(evaluator: Evaluator, found: dict) -> dict:
    """found: image id -> boxes xyxy, scores, classes from 0 on."""
    evaluator.reset()
    for image, (boxes, scores, labels) in found.items():
        instances = Instances((200, 200))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.tensor(scores)
        instances.pred_classes = torch.tensor(labels)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize(("limit", "expected"), [(100, 100 * 2 / 3), (150, 100)])
def test_more_than_a_hundred_objects_count_where_more_detections_are_asked_for(
    dataset, tmp_path, limit, expected
):
    places = [(13 * (i % 15), 19 * (i // 15)) for i in range(150)]
    coco = ground_truth([(1, 1, x, y, 10, 15, 0) for x, y in places])
    evaluator = Evaluator(dataset(coco), output_dir=str(tmp_path), max_detections=limit)
    boxes = [[x, y, x + 10, y + 15] for x, y in places]
    metrics = metrics_of(evaluator, {1: (boxes, np.linspace(1, 0.5, 150).tolist(), [1] * 150)})
    assert metrics["bbox"]["AP"] == pytest.approx(expected, abs=1)
    assert metrics["bbox"]["AP-dog"] == metrics["bbox"]["AP"]


def test_the_configuration_asks_for_all_detections_of_an_image(tiny_config):
    for detections, limit, expected in [(10, 0, 100), (300, 0, 300), (300, 100, 100)]:
        cfg = tiny_config("TEST.DETECTIONS_PER_IMAGE", detections, "TEST.COCO_LIMIT", limit)
        assert build_evaluator(cfg, "tiny_val").max_detections == expected


@pytest.mark.usefixtures("tiny_data")
def test_results_of_a_dataset_whose_name_is_a_path_stay_in_the_output_folder(tmp_path, tiny_config):
    cfg, val = tiny_config(), MetadataCatalog.get("tiny_val")
    names = ["../up", "/abs/val.json", "a/b"]
    register_coco_format([[name, val.json_file, val.image_root] for name in names])
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path / "run"), tuple(names)
    for name in names:
        build_evaluator(cfg, name)
    assert [path.parent for path in tmp_path.glob("*/*/*")] == [tmp_path / "run/inference"] * 3
    assert {p.name for p in (tmp_path / "run/inference").iterdir()} == {
        name.replace("/", "%2F") for name in names
    }
    forget(*names)


def test_an_annotation_with_the_id_zero_is_found_like_any_other(dataset, tmp_path):
    coco = ground_truth([(1, 0, 10, 10, 50, 50, 0)], first_id=0)
    evaluator = Evaluator(dataset(coco), output_dir=str(tmp_path))
    assert metrics_of(evaluator, {1: ([[10, 10, 60, 60]], [0.9], [0])})["bbox"][
        "AP"
    ] == pytest.approx(100)


def test_classes_of_the_model_are_found_in_the_dataset_by_their_names(dataset, tmp_path):
    """The model calls 0 what the dataset calls 1, and has a class that the dataset has not."""
    coco = ground_truth([(1, 1, 10, 10, 50, 50, 0), (1, 0, 100, 100, 50, 50, 0)])
    evaluator = Evaluator(
        dataset(coco), output_dir=str(tmp_path), model_classes=["dog", "eel", "cat"]
    )
    boxes = [[10, 10, 60, 60], [10, 10, 60, 60], [100, 100, 150, 150]]
    metrics = metrics_of(evaluator, {1: (boxes, [0.8, 0.9, 0.7], [0, 1, 2])})
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [entry["category_id"] for entry in found] == [13, 3]


def test_a_checkpoint_is_evaluated_on_any_dataset_that_has_some_of_its_classes(
    run_command, trained, tiny_data, tmp_path
):
    """Without a configuration file, and on the classes 2 and 1 of six, in that order."""
    _, val = ast.literal_eval(tiny_data[1])
    content = json.loads(Path(val[1]).read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    content["categories"] = [{"id": 1, "name": names[3]}, {"id": 2, "name": names[2]}]
    renumbered = {3: 1, 2: 2}
    content["annotations"] = [
        {**a, "category_id": renumbered[a["category_id"]]}
        for a in content["annotations"]
        if a["category_id"] in renumbered
    ]
    (tmp_path / "two.json").write_text(json.dumps(content))
    command_line = [
        *("--num-gpus", "0", "--eval-only", "OUTPUT_DIR", str(tmp_path / "run")),
        *("MODEL.WEIGHTS", str(trained / "model_final.pth"), "DATASETS.TEST", "('two',)"),
        *("DATASETS.COCO_FORMAT", str([["two", str(tmp_path / "two.json"), val[2]]])),
    ]
    run_command(command_line)
    forget("two")
    found = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    every = json.loads((trained / "inference/coco_instances_results.json").read_text())
    expected = [
        (e["image_id"], renumbered[e["category_id"]], pytest.approx(e["score"]))
        for e in every
        if e["category_id"] in renumbered
    ]
    assert [(e["image_id"], e["category_id"], e["score"]) for e in found] == expected
    renamed = [*CLASSES]
    renamed[2], renamed[1] = "eel", "emu"
    content["categories"] = [{"id": 1, "name": "eel"}, {"id": 2, "name": "emu"}]
    (tmp_path / "two.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the model knows none of the classes of the dataset"):
        run_command(command_line)
    forget("two")
    run_command([*command_line, "MODEL.DN_DETR.CLASS_NAMES", str(renamed)])
    forget("two")
    again = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert again == found


# --------------------------------------------------------------------------- thresholds, confusions


def test_the_best_threshold_of_a_curve_drawn_by_hand():
    """Right, wrong, right, wrong: F1 is 2/3, 1/2, 4/5, 2/3 with two objects."""
    coco = ground_truth([(1, 0, 0, 0, 50, 50, 0), (1, 0, 100, 100, 50, 50, 0)])
    found = results(
        [
            (1, 0, 0, 0, 50, 50, 0.9),
            (1, 0, 0, 100, 50, 50, 0.8),
            (1, 0, 100, 100, 50, 50, 0.7),
            (1, 0, 100, 0, 50, 50, 0.6),
        ]
    )
    cat, dog, _ = analyse(evaluate(coco, found, "bbox"), found).classes
    np.testing.assert_allclose(cat.curve.precision, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(cat.curve.recall, [1 / 2, 1 / 2, 1, 1])
    np.testing.assert_allclose(cat.curve.f1, [2 / 3, 1 / 2, 4 / 5, 2 / 3])
    best = cat.curve.best()
    assert (best.threshold, best.recall) == (0.7, 1) and best.f1 == pytest.approx(0.8)
    assert dog.curve.best() is None and np.isnan(dog.ap)


def by_brute_force(coco, found, category, threshold) -> tuple[int, int, int]:
    """(right, wrong, objects) of a class at a threshold, by plain loops over its definition."""
    right = wrong = objects = 0
    for image in coco.imgs:
        truth = [a for a in coco.imgToAnns[image] if a["category_id"] == category]
        objects += sum(not a["iscrowd"] for a in truth)
        free = [a for a in truth if not a["iscrowd"]]
        mine = [r for r in found if r["image_id"] == image and r["category_id"] == category]
        for result in sorted(mine, key=lambda r: -r["score"]):
            if result["score"] < threshold:
                continue
            overlaps = [iou(result["bbox"], a["bbox"]) for a in free]
            if overlaps and max(overlaps) >= 0.5:
                free.pop(int(np.argmax(overlaps)))
                right += 1
            elif not any(inside(result["bbox"], a["bbox"]) >= 0.5 for a in truth if a["iscrowd"]):
                wrong += 1
    return right, wrong, objects


def shared(a, b) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def iou(a, b) -> float:
    return shared(a, b) / (a[2] * a[3] + b[2] * b[3] - shared(a, b))


def inside(a, crowd) -> float:
    return shared(a, crowd) / (a[2] * a[3])


def test_curves_are_those_of_plain_loops():
    coco, found = random_case(3, num_images=6, num_results=25)
    classes = analyse(evaluate(coco, found, "bbox"), found).classes
    for category, result in zip((3, 13, 23), classes, strict=True):
        curve = result.curve
        assert (np.diff(curve.thresholds) < 0).all()
        for i in range(0, len(curve.thresholds), 5):
            right, wrong, objects = by_brute_force(coco, found, category, curve.thresholds[i])
            assert curve.num_objects == objects
            assert curve.precision[i] == pytest.approx(right / max(right + wrong, 1))
            assert curve.recall[i] == pytest.approx(right / objects)


def test_confusions_counted_by_hand():
    """A found cat, a dog taken for an owl, a missed owl, a crowd of dogs, and a cat in thin air."""
    coco = ground_truth(
        [
            (1, 0, 0, 0, 40, 40, 0),
            (1, 1, 100, 0, 40, 40, 0),
            (1, 2, 0, 100, 40, 40, 0),
            (2, 1, 0, 0, 100, 100, 1),
        ],
        num_images=3,
    )
    found = results(
        [
            (1, 0, 0, 0, 40, 40, 0.9),
            (1, 2, 100, 0, 40, 40, 0.9),
            (2, 1, 10, 10, 20, 20, 0.9),
            (3, 0, 50, 50, 40, 40, 0.9),
            (1, 2, 0, 100, 40, 40, 0.1),
        ]
    )
    analysis = analyse(evaluate(coco, found, "bbox"), found)
    expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert analysis.threshold == pytest.approx(0.1)  # with the hesitant owl F1 is best
    assert analysis.confusion.tolist() == expected
    images = images_at(coco, found, threshold=0.5, image_ids=[1, 2, 3])
    counts = [
        (len(i.correct), len(i.confused), len(i.extra), len(i.missed), i.num_errors) for i in images
    ]
    assert counts == [(1, 1, 0, 1, 2), (0, 0, 0, 0, 0), (0, 0, 1, 0, 1)]
    assert [i.image["id"] for i in analysis.images] == [1, 3, 2]
    nothing = images_at(coco, found, threshold=1, image_ids=[1, 2, 3])
    assert [len(image.missed) for image in nothing] == [3, 0, 0]


def test_every_object_and_detection_stands_in_the_confusion_matrix_once():
    coco, found = random_case(5)
    analysis = analyse(evaluate(coco, found, "bbox"), found)
    objects = [a["category_id"] for a in coco.dataset["annotations"] if not a["iscrowd"]]
    assert analysis.confusion.sum(axis=1)[:-1].tolist() == [objects.count(c) for c in (3, 13, 23)]
    above = [r["category_id"] for r in found if r["score"] >= analysis.threshold]
    columns = analysis.confusion.sum(axis=0)[:-1].tolist()
    assert all(n <= above.count(c) for n, c in zip(columns, (3, 13, 23), strict=True))
    assert sum(columns) > 0.8 * len(above)  # the others lie on crowds


def test_ties_are_taken_together():
    curve = Curve(np.array([0.5]), np.array([0.5]), np.array([1.0]), 1)
    coco = ground_truth([(1, 0, 0, 0, 50, 50, 0)])
    found = results([(1, 0, 0, 0, 50, 50, 0.5), (1, 0, 100, 100, 50, 50, 0.5)])
    cat = analyse(evaluate(coco, found, "bbox"), found).classes[0].curve
    assert cat.best() == curve.best()


# ------------------------------------------------------------------------------------------- report


def test_the_report_holds_everything_itself(dataset, tmp_path):
    coco = ground_truth([(1, 0, 20, 20, 60, 60, 0), (2, 1, 20, 20, 60, 60, 0)], num_images=2)
    name = dataset(coco)
    evaluator = Evaluator(name, output_dir=str(tmp_path), writes_report=True)
    metrics = metrics_of(
        evaluator, {1: ([[20, 20, 80, 80], [100, 100, 150, 150]], [0.9, 0.9], [0, 1])}
    )
    folder = tmp_path / "report_pets"
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["AP"] == pytest.approx(metrics["bbox"]["AP"]) == 50
    assert report["classes"]["cat"]["best"] == pytest.approx(
        {"threshold": 0.9, "precision": 1, "recall": 1, "f1": 1}
    )
    assert report["classes"]["owl"]["AP"] is None and report["classes"]["owl"]["best"] is None
    assert report["worst_images"][0]["file_name"] in ("1.png", "2.png")
    page = (folder / "report.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 4 and all(source.startswith("data:image/") for source in sources)
    assert "1 missed" in page and "1 without an object" in page and "http" not in page
    for picture in ("curves.png", "confusion.png"):
        assert Image.open(folder / picture).width > 200


def test_evaluation_alone_writes_the_report_where_it_is_switched_on(run, trained, tmp_path):
    run(
        *("MODEL.WEIGHTS", trained / "model_final.pth", "TEST.REPORT", True),
        flags=["--eval-only"],
    )
    folder = tmp_path / "run/inference/report_tiny_val"
    assert json.loads((folder / "report.json").read_text())["num_images"] == 4
    assert (folder / "report.html").is_file()


def test_results_of_any_detector_are_evaluated(dataset, tmp_path, capsys):
    coco = ground_truth([(1, 0, 20, 20, 60, 60, 0)])
    dataset(coco)
    good = results([(1, 0, 20, 20, 60, 60, 0.5)])
    (tmp_path / "r.json").write_text(json.dumps(good))
    source = ["--coco", str(tmp_path / "a.json"), str(tmp_path / "images")]
    output = ["--output", str(tmp_path / "report")]
    main(["eval", *source, "--results", str(tmp_path / "r.json"), *output])
    assert "report.html" in capsys.readouterr().out
    assert json.loads((tmp_path / "report/report.json").read_text())["metrics"][
        "AP"
    ] == pytest.approx(100)
    for content, words in [
        ([], "must hold a list of at least one result"),
        ([{**good[0], "image_id": 9}], "has the image_id 9, which is not in .*a.json"),
        ([{**good[0], "category_id": 1}], "has the category_id 1"),
        ([{"image_id": 1}], r"\[0\] is not as in COCO format: .* required field category_id"),
        ([{**good[0], "bbox": [1, 2, 3, float("nan")]}], "NaN and Infinity are no numbers"),
        ([{**good[0], "bbox": [1, 2, -3, 4]}], "the bbox of result 0 must be .x, y, width"),
        ([{**good[0], "score": "1"}], r"\[0\].score .*: expected float, got str"),
    ]:
        (tmp_path / "r.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=f"dn-detr eval: .*{words}"):
            main(["eval", *source, "--results", str(tmp_path / "r.json"), *output])
    (tmp_path / "r.json").write_text(json.dumps([*good, {**good[0], "bbox": [1e8, 1, 1e9, 1e9]}]))
    main(["eval", *source, "--results", str(tmp_path / "r.json"), *output])  # and can be drawn
    file = str(tmp_path / "r.json")
    with pytest.raises(InputError, match="the limit of detections must be at least 1, got -1"):
        evaluate_results(file, output[1], coco=source[1:], limit=-1)
    with pytest.raises(SystemExit, match="the folder of the report cannot be made"):
        main(["eval", *source, "--results", file, "--output", file])
    with pytest.raises(SystemExit, match="there is no result file none.json"):
        main(["eval", *source, "--results", "none.json", *output])
    with pytest.raises(SystemExit, match="there is no dataset 'none'"):
        main(["eval", "--dataset", "none", "--results", "none.json", *output])
