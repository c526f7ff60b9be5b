"""One reader of ground truth: any ids, bounded numbers, outlines, the cache, and one truth."""

import ast
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from coco_files import forget, make_content, write
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from fuzz_data import fuzz

from dn_detr.d2.data import array_cache, dataset_dicts
from dn_detr.d2.data.catalog import register_coco_format
from dn_detr.d2.data.ground_truth import NO_SIZE, fit_boxes, read_coco
from dn_detr.d2.data.loader import build_train_loader
from dn_detr.d2.evaluation.coco_evaluator import IMPLEMENTATIONS, Evaluator
from dn_detr.d2.modeling.instances import noise_seed
from dn_detr.errors import InputError


@pytest.fixture(autouse=True)
def clean_catalogs():
    yield
    forget("pets", "own")


def loaded(folder, content, *, with_masks=False, text=None):
    """Write and load a dataset, without its images."""
    forget("pets")
    (folder / "a.json").write_bytes(json.dumps(content).encode() if text is None else text)
    register_coco_format(["pets", str(folder / "a.json"), str(folder / "images")])
    return dataset_dicts.load_annotations("pets", with_masks=with_masks)


def with_outlines(outline) -> dict:
    """The content of a file whose boxes have an outline, the first of them this one."""
    content = make_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    content["annotations"][0]["segmentation"] = outline
    return content


# ----------------------------------------------------------------------------------------- any ids


def renumbered(content, image_id, annotation_id=lambda i: i):
    content = json.loads(json.dumps(content))
    for image in content["images"]:
        image["id"] = image_id(image["id"])
    for annotation in content["annotations"]:
        annotation["id"] = annotation_id(annotation["id"])
        annotation["image_id"] = image_id(annotation["image_id"])
    return content


IDS = {
    "1..n": lambda i: i - 9,
    "0..n": lambda i: i - 10,
    "negative": lambda i: i - 1000,
    "above 2^53": lambda i: 2**53 + i,
    "above 2^64": lambda i: 2**64 + i,
    "text": lambda i: f"image é {i}",
}


def without(*keys):
    def change(content):
        for key in keys:
            content.pop(key, None)
        for annotation in content["annotations"]:
            for key in keys:
                annotation.pop(key, None)

    return change


def metrics(folder, content, implementation) -> dict:
    """Metrics of the same detections, by index of the image; checks the ids that are written."""
    data = loaded(folder, content)
    evaluator = Evaluator("pets", output_dir=str(folder), implementation=implementation)
    evaluator.reset()
    rng = np.random.default_rng(0)
    for record in data.records:
        boxes = [a["bbox"] for a in record["annotations"] if not a["iscrowd"]]
        boxes = np.array([*boxes, [1, 2, 20, 30]]) + rng.uniform(0, 3, (len(boxes) + 1, 4))
        instances = Instances((40, 60))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.from_numpy(rng.uniform(0, 1, len(boxes)))
        instances.pred_classes = torch.arange(len(boxes)) % 2
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": instances}])
    found = evaluator.evaluate()["bbox"]
    written = json.loads((folder / "coco_instances_results.json").read_text())
    assert {r["image_id"] for r in written} == {image["id"] for image in content["images"]}
    assert {r["category_id"] for r in written} == {3, 7}
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_same_detections_give_the_same_ap_whatever_the_ids_and_whatever_is_missing(
    tmp_path, implementation
):
    """Areas are those of the boxes, so that files without them are the same dataset."""
    if implementation == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval")
    content = make_content()
    content["info"] = {"year": 2026}
    content["annotations"] = [a for a in content["annotations"] if a["id"] not in (3, 5)]
    for annotation in content["annotations"]:
        annotation["area"] = annotation["bbox"][2] * abs(annotation["bbox"][3])
    expected = metrics(tmp_path, content, implementation)
    assert 5 < expected["AP"] < 95
    for name, image_id in IDS.items():
        for annotation_id in (lambda i: i - 1, lambda i: -i, lambda i: f"a{i}"):
            other = renumbered(content, image_id, annotation_id)
            assert metrics(tmp_path, other, implementation) == pytest.approx(
                expected, nan_ok=True
            ), name
    for keys in (("info",), ("area",), ("iscrowd",), ("id",), ("info", "area", "iscrowd")):
        other = json.loads(json.dumps(content))
        change = without(*keys)
        change(other)
        assert metrics(tmp_path, other, implementation) == pytest.approx(expected, nan_ok=True)


def test_the_noise_of_an_image_follows_from_the_users_id(tmp_path):
    """Of an int as ever; adding an image changes no other's."""
    content = make_content()
    for image_id in IDS.values():
        records = loaded(tmp_path, renumbered(content, image_id)).records
        wanted = [image_id(i) for i in (10, 11, 12, 13)]
        assert [record["image_id"] for record in records] == wanted
        assert len({noise_seed(1, 2, i) for i in wanted}) == 4
    more = make_content()
    more["images"].insert(0, {**more["images"][0], "id": 3})
    ids = [record["image_id"] for record in loaded(tmp_path, more).records]
    assert ids == [3, 10, 11, 12, 13]
    assert noise_seed(1, 2, 10) == noise_seed(1, 2, "10")


# ------------------------------------------------------------------------------- numbers and texts


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1e400", "annotations\\[0\\].bbox\\[0\\] .*: number out of range"),
        ("1e300", "expected float <="),
        ("9" * 400, "number out of range"),
        ("9" * 9000, "number out of range"),
        ("NaN", "NaN and Infinity are no numbers"),
        ("-Infinity", "NaN and Infinity are no numbers"),
        ('"5"', "expected float, got str"),
        ("true", "expected float, got bool"),
        ("[" * 100_000 + "]" * 100_000, "expected float, got array"),
    ],
)
def test_numbers_are_bounded(tmp_path, value, words):
    """1e400 was a traceback, "[" * 100,000 a RecursionError."""
    text = json.dumps(make_content()).replace("[5.0, 5.0, 20.0", f"[{value}, 5.0, 20.0")
    with pytest.raises(InputError, match=words):
        loaded(tmp_path, None, text=text.encode())


def test_nesting_is_bounded_also_where_nothing_is_read(tmp_path):
    text = json.dumps(make_content() | {"info": 0}).replace('"info": 0', f'"info": {"[" * 99999}')
    with pytest.raises(InputError, match="nested too deeply"):
        loaded(tmp_path, None, text=text.encode())


def test_a_byte_order_mark_and_windows_line_ends_are_accepted_and_the_locale_is_ignored(tmp_path):
    content = make_content()
    content["categories"][0]["name"] = "犬"
    text = json.dumps(content, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    truth = loaded(tmp_path, None, text=text.encode("utf-8-sig")).truth
    assert truth.class_names == ["cat", "犬"] and len(truth.labels) == 4
    for data in (text.encode("utf-16"), text.replace("犬", "é").encode("latin-1")):
        with pytest.raises(InputError, match="a.json: it is not "):
            loaded(tmp_path, None, text=data)


def test_a_pipe_is_no_annotation_file(tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be read: it is not a regular file"):
        read_coco(str(tmp_path / "a.json"))
    with pytest.raises(InputError, match="cannot be read"):
        read_coco("a\0.json")


def test_backslashes_in_file_names_are_understood(tmp_path):
    content = make_content()
    paths = write(tmp_path, content)
    for image in content["images"]:
        image["file_name"] = f"..\\images\\{image['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_format(["pets", *paths])
    records = dataset_dicts.load("pets").records
    assert records[0]["file_name"] == f"{paths[1]}/../images/10.png"


def test_messages_are_one_bounded_line(tmp_path):
    content = make_content()
    content["annotations"][0]["image_id"] = "a\nb\x1b[31m‮" + "x" * 5000
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, content)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 400
    assert "annotations[0]" in message and message.endswith("is not in 'images'.")


# ------------------------------------------------------------------------------------------- boxes


def test_what_is_an_object_is_the_same_for_training_report_and_evaluation(tmp_path):
    data = loaded(tmp_path, make_content())
    trained = [a for record in data.records for a in record["annotations"]]
    coco = data.truth.to_coco()
    assert len(trained) == len(coco.anns) == 4  # three of seven were dropped, and are counted
    assert [finding.count for finding in data.truth.findings()] == [2, 1, 1]
    evaluated = [a["bbox"] for a in coco.dataset["annotations"]]
    assert evaluated[-1] == [50, 30, 10, 10] and trained[-1]["bbox"] == [50, 30, 60, 40]
    assert coco.dataset["annotations"][-1]["area"] == 100  # of what is inside, not the file's 1
    assert data.num_objects.sum() == sum(not a["iscrowd"] for a in trained)


def test_boxes_within_rounding_of_the_border_stay_as_they_are_for_the_evaluation():
    sizes = np.array([[60.0, 40.0]])
    boxes, faults = fit_boxes(np.array([[50.0, 30, 10.05, 10]]), sizes)
    assert faults[0] > NO_SIZE and boxes.tolist() == [[50, 30, 10.05, 10]]
    _, faults = fit_boxes(np.array([[500.0, 3, 1e-5, 5]]), sizes * 10)
    assert faults[0] == NO_SIZE  # in single precision 500 + 1e-5 is 500


def test_faults_of_an_earlier_file_are_not_found_in_a_changed_one(tmp_path):
    content = make_content()
    assert len(loaded(tmp_path, content).truth.labels) == 4
    content["annotations"][0]["bbox"][2] = 0.0
    assert len(loaded(tmp_path, content).truth.labels) == 3


# ---------------------------------------------------------------------------------------- outlines

RLE = {"size": [40, 60], "counts": [100, 50, 2250]}

BAD_OUTLINES = [
    ([[]], "must have a polygon of at least 3 points"),
    ([[1, 1, 5, 5]], "must have a polygon of at least 3 points"),
    ([], "is missing, but MODEL.MASK_ON needs one"),
    (None, "is missing, but MODEL.MASK_ON needs one"),
    ([1, 1, 5, 1, 5, 5], r"segmentation: \[0\] .*: expected array, got int"),
    ([[1, 1, 5, 1, 5, 5, 7]], "odd number of coordinates, 7"),
    ([[1, 1, 5, 1, 5, 1e9]], "far outside its image of 60x40 pixels"),
    ([[1, 1, 5, 1, 5, -100]], "far outside its image of 60x40 pixels"),
    ([["1", 1, 5, 1, 5, 5]], "expected float, got str"),
    ({**RLE, "size": [60, 40]}, "is for 40x60 pixels, .*its image has 60x40"),
    ({**RLE, "counts": [100, 50, 2251]}, "is no run-length code of all pixels"),
    ({**RLE, "counts": [-100, 50, 2450]}, "expected int >= 0"),
    ({**RLE, "counts": []}, "is no run-length code of all pixels"),
    ({**RLE, "counts": "oooo"}, "is no run-length code of all pixels"),
    ({**RLE, "counts": ""}, "is no run-length code of all pixels"),
    ({"counts": [1]}, "required field size"),
    ("a", "expected .*, got str"),
]


@pytest.mark.parametrize(("outline", "words"), BAD_OUTLINES)
def test_outlines_are_checked_where_masks_are_trained_and_only_there(tmp_path, outline, words):
    """`[[]]` cost a box detector its box, 1e9 made pycocotools fill 36 GiB, a flat list crashed."""
    content = with_outlines(outline)
    boxes = loaded(tmp_path, content).truth
    assert len(boxes.labels) == 4
    with pytest.raises(InputError, match=words) as caught:
        loaded(tmp_path, content, with_masks=True)
    assert "annotations[0].segmentation" in str(caught.value)


def test_run_lengths_are_decoded_as_by_pycocotools(tmp_path):
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((40, 60)) < share)
        code = coco_mask.encode(mask.astype(np.uint8))
        outline = {"size": [40, 60], "counts": code["counts"].decode()}
        records = loaded(tmp_path, with_outlines(outline), with_masks=True).records
        got = coco_mask.decode(records[0]["annotations"][0]["segmentation"])
        np.testing.assert_array_equal(got, mask)


def test_a_missing_area_is_that_of_the_mask_or_else_of_the_box(tmp_path):
    content = with_outlines(RLE)
    for annotation in content["annotations"]:
        del annotation["area"]
    assert loaded(tmp_path, content).truth.areas[0] == 20 * 10
    assert loaded(tmp_path, content, with_masks=True).truth.areas[0] == 50
    triangle = with_outlines([[2, 2, 10, 2, 10, 10], [1, 1]])  # and a remainder
    del triangle["annotations"][0]["area"]
    data = loaded(tmp_path, triangle, with_masks=True)
    assert data.truth.areas[0] == pytest.approx(32, abs=5)
    assert data.records[0]["annotations"][0]["segmentation"] == [[2, 2, 10, 2, 10, 10]]


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture
def small_files_are_kept(monkeypatch, tmp_path):
    """The folder of the cache, in which files of any size are kept."""
    monkeypatch.setattr(array_cache, "SMALL", 0)
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(ours, theirs) -> bool:
    for name, value in vars(ours).items():
        other = getattr(theirs, name)
        if name == "key":
            continue
        if hasattr(value, "data") and hasattr(value, "ends"):
            np.testing.assert_array_equal(value.data, other.data)
            value, other = value.ends, other.ends
        np.testing.assert_array_equal(value, other)
    return True


@pytest.mark.usefixtures("small_files_are_kept")
def test_what_comes_from_the_cache_is_what_was_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(with_outlines(RLE)))
    os.utime(path, (1e9, 1e9))
    first = read_coco(str(path))
    monkeypatch.setattr("dn_detr.d2.data.ground_truth.judge", None)  # nothing is judged again
    again = read_coco(str(path))
    assert same(first, again) and again.key == first.key
    empty = tmp_path / "b.json"
    monkeypatch.undo()
    empty.write_text(json.dumps({**make_content(), "annotations": []}))
    array_cache.SMALL, small = 0, array_cache.SMALL
    try:
        assert len(read_coco(str(empty)).labels) == len(read_coco(str(empty)).labels) == 0
    finally:
        array_cache.SMALL = small


def test_a_changed_file_of_the_same_size_is_read_again(small_files_are_kept, tmp_path):
    path = tmp_path / "a.json"
    for name in ("dog", "god", "dog"):
        content = make_content()
        content["categories"][0]["name"] = name
        path.write_text(json.dumps(content))
        assert read_coco(str(path)).class_names == ["cat", name]
    assert len(list(small_files_are_kept.glob("*.pt"))) == 2


def test_a_broken_or_read_only_cache_is_no_error(small_files_are_kept, tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(make_content()))
    first = read_coco(str(path))
    (kept,) = small_files_are_kept.glob("*.pt")
    data = kept.read_bytes()
    kept.unlink()  # it is mapped into memory
    kept.write_bytes(data[:500])
    assert same(first, read_coco(str(path))) and "is broken and made again" in caplog.text
    assert same(first, read_coco(str(path)))
    for entry in small_files_are_kept.iterdir():
        entry.unlink()
    small_files_are_kept.rmdir()
    small_files_are_kept.write_text("no folder")
    assert same(first, read_coco(str(path))) and "are not kept in" in caplog.text


def test_arrays_that_were_not_used_for_longest_are_removed_beyond_a_size(
    small_files_are_kept, tmp_path, monkeypatch
):
    truths = {}
    for name in ("a", "b", "c"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**make_content(), "info": name}))
        truths[name] = read_coco(str(path))
        [found] = [p for p in small_files_are_kept.glob("*.pt") if p.stem == truths[name].key]
        os.utime(found, (len(truths), len(truths)))
        size = found.stat().st_size
    read_coco(str(tmp_path / "a.json"))  # used again
    monkeypatch.setattr("dn_detr.datasets.cache.MOST_BYTES", int(3.5 * size))
    (tmp_path / "d.json").write_text(json.dumps({**make_content(), "info": "d"}))
    read_coco(str(tmp_path / "d.json"))
    left = {path.stem for path in small_files_are_kept.glob("*.pt")}
    assert len(left) == 3 and left == {p.stem for p in small_files_are_kept.glob("*.lock")}
    assert truths["b"].key not in left
    np.testing.assert_array_equal(truths["b"].boxes, truths["a"].boxes)  # removed, but mapped


def _read_in_process(path, folder, barrier, queue):
    os.environ["DN_DETR_CACHE"] = folder
    array_cache.SMALL = 0
    barrier.wait()
    truth = read_coco(path)
    queue.put((truth.boxes.tolist(), truth.class_names))


def test_processes_on_one_cold_cache_do_not_break_each_other(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(make_content()))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    folder = str(tmp_path / "cache")
    arguments = (str(path), folder, barrier, queue)
    processes = [context.Process(target=_read_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(answer == found[0] for answer in found) and len(found[0][0]) == 4
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2  # with the lock, nothing unfinished


# ------------------------------------------------------------------- a Detectron2 user's own things


def test_a_dataset_without_json_is_evaluated_on_what_it_was_trained_on(tmp_path):
    """Detectron2 would write the dicts into a file, with the boxes that training drops."""
    box = {"bbox": [1, 2, 20, 20], "bbox_mode": 0, "category_id": 1}
    dicts = [
        {"file_name": f"{i}.png", "image_id": f"i{i}", "width": 60, "height": 40} for i in range(3)
    ]
    dicts[1]["annotations"] = [box, {**box, "bbox": [5, 5, 5, 9]}]
    DatasetCatalog.register("own", lambda: dicts)
    MetadataCatalog.get("own").thing_classes = ["cat", "dog"]
    evaluator = Evaluator("own", output_dir=str(tmp_path))
    evaluator.reset()
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2, 20, 20]]))
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([1])
    evaluator.process([{"image_id": "i1"}], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP-dog"] == pytest.approx(100)
    assert not list(tmp_path.glob("*coco_format*"))
    evaluator.process([{"image_id": "none"}], [{"instances": instances}])
    with pytest.raises(InputError, match="has the image_id 'none', which is not in the dataset"):
        evaluator.evaluate()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda _: None, "gives for '.*.jpg' no dict but None"),
        (lambda s: {**s, "image": None}, "no 'image', a tensor"),
        (
            lambda s: {k: v for k, v in s.items() if k != "instances"},
            "no 'instances' with gt_boxes",
        ),
        (lambda s: _with(s, "gt_boxes", Boxes(torch.full((1, 4), torch.nan))), "not finite or"),
        (lambda s: _with(s, "gt_boxes", Boxes(torch.ones(1, 4))), "have no size"),
        (lambda s: _with(s, "gt_classes", torch.tensor([9])), r"classes outside \[0, 6\): \[9\]"),
    ],
)
def test_samples_of_a_mapper_of_the_users_are_checked(tiny_config, spoil, words):
    from dn_detr.d2.data.mapper import DetrMapper

    cfg = tiny_config("DATALOADER.NUM_WORKERS", 0)
    ours = DetrMapper(cfg, True)
    assert next(iter(build_train_loader(cfg, lambda record: ours(record))))
    with pytest.raises(InputError, match=words):
        next(iter(build_train_loader(cfg, lambda record: spoil(ours(record)))))


def _with(sample, name, value):
    instances = Instances(sample["instances"].image_size)
    instances.gt_boxes = Boxes(torch.tensor([[1.0, 2, 3, 4]]))
    instances.gt_classes = torch.tensor([0])
    instances.set(name, value)
    return {**sample, "instances": instances}


def test_detectron2_and_pycocotools_do_not_read_the_file(run, monkeypatch, tiny_data, tmp_path):
    """A whole training with evaluation; both were called on the user's file."""

    def fail(*_, **__):
        raise AssertionError("the annotation file was read a second time")

    monkeypatch.setattr("detectron2.data.datasets.coco.load_coco_json", fail)
    monkeypatch.setattr("pycocotools.coco.COCO.__init__", _only_in_memory)
    run("SOLVER.MAX_ITER", 1)
    (name, json_file, images), _ = ast.literal_eval(tiny_data[1])
    assert len(dataset_dicts.load(name).records) == 10
    assert (tmp_path / "run/inference/coco_instances_results.json").is_file()


def _only_in_memory(self, annotation_file=None):
    assert annotation_file is None
    self.dataset, self.anns, self.cats, self.imgs = {}, {}, {}, {}
    self.imgToAnns, self.catToImgs = {}, {}


# ------------------------------------------------------------------------------------------ fuzzer


def test_no_broken_input_gets_through():
    """A share of what `make fuzz` runs."""
    counts, faults = fuzz(0, 300, 1, ["boxes", "masks", "results", "teacher"])
    assert not faults and sum(counts.values()) == 300
    assert min(counts["boxes", "read"], counts["masks", "read"], counts["teacher", "read"]) > 3
