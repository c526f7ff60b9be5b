"""Image files that cannot be used: what a training, an evaluation and the check make of them."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import forget, make_content, write
from detectron2.data import MetadataCatalog
from PIL import Image

from dn_detr.cli.main import main
from dn_detr.d2.data import image_check
from dn_detr.d2.data.augmentation_schedule import DenseO2O, Schedule
from dn_detr.d2.data.image_check import check_image_files, equal_files, find_faults
from dn_detr.d2.data.loader import TrainLoader, build_test_loader
from dn_detr.d2.data.mapper import DetrMapper
from dn_detr.d2.data.mosaic import Mosaic
from dn_detr.d2.evaluation.coco_evaluator import build_evaluator
from dn_detr.datasets.shapes import generate
from dn_detr.errors import InputError

BAD = (2, 5)  # of ten images


@pytest.fixture
def records(tmp_path):
    """Ten records; files of two are cut off."""
    made = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.effect_noise((40, 30), 50 + i).convert("RGB").save(path)
        if i in BAD:
            path.write_bytes(path.read_bytes()[:500])
        box = {"bbox": [1, 2, 20, 20], "bbox_mode": 0, "category_id": 0}
        size = {"width": 40, "height": 30}
        made.append({"file_name": str(path), "image_id": i, "annotations": [box], **size})
    return made


def stream(records, count=20, start=0, **changes):
    """The image ids and pixels of the first samples of a training."""
    mapper = DetrMapper(augmentations=[], image_format="RGB", with_instances=True)
    options = {"mapper": mapper, "batch_size": 2, "seed": 3, "max_bad_images": 2, **changes}
    loader = TrainLoader(records, **options)
    loader.set_start_iteration(start)
    batches = list(itertools.islice(iter(loader), count - start))
    return [(sample["image_id"], sample["image"].sum().item()) for b in batches for sample in b]


# -------------------------------------------------------------------------------------- training


def test_bad_training_images_are_an_error_unless_they_are_skipped(records):
    with pytest.raises(InputError, match=r"[25].png' cannot be read"):
        stream(records, max_bad_images=None)
    ids = [image_id for image_id, _ in stream(records)]
    assert set(ids) == set(range(10)) - set(BAD)


def test_another_image_takes_their_place_and_all_others_keep_theirs(records, tmp_path):
    with_replacements = [image_id for image_id, _ in stream(records)]
    for i in BAD:
        Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / f"{i}.png")
    undamaged = [image_id for image_id, _ in stream(records)]
    for ours, theirs in zip(with_replacements, undamaged, strict=True):
        assert ours == theirs or theirs in BAD
    taken = {theirs: ours for ours, theirs in zip(with_replacements, undamaged, strict=True)}
    assert with_replacements == [taken[theirs] for theirs in undamaged]  # always the same one


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_training_continues_with_the_same_replacements(records, num_workers):
    expected = stream(records)
    for start in (1, 7, 13):
        assert stream(records, start=start, num_workers=num_workers) == expected[2 * start :]


def test_replacements_are_named_once(records, caplog):
    stream(records, count=40)
    named = [record.getMessage().split("'")[1] for record in caplog.records]
    assert sorted(named) == [records[i]["file_name"] for i in BAD]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_the_maximum_ends_the_training(records, num_workers):
    with pytest.raises(
        InputError, match=r"2 of 10 training images .*MAX_BAD_IMAGES is 1: .*[25].png'"
    ):
        stream(records, max_bad_images=1, num_workers=num_workers)


def test_images_that_are_all_bad_end_the_training(records):
    with pytest.raises(InputError, match="2 of 2 training images cannot be used"):
        stream([records[i] for i in BAD], max_bad_images=5)


def test_mosaics_are_made_of_readable_images(records):
    dense = DenseO2O(
        schedule=Schedule(),
        calm=None,
        mosaic=Mosaic(
            size=32, min_visible=0.1, fill=(0, 0, 0), augmentations=[], image_format="RGB"
        ),
        mosaic_probability=1.0,
        blend=None,
        mixup_probability=0,
        fill=(0, 0, 0),
    )
    found = stream(records, dense=dense)
    assert {int(i) for ids, _ in found for i in ids.split("+")} == set(range(10)) - set(BAD)
    assert stream(records, dense=dense, start=9) == found[18:]


def test_an_unknown_value_is_refused(tiny_config):
    from dn_detr.d2.data.loader import build_train_loader

    with pytest.raises(InputError, match="BAD_IMAGES must be 'stop' or 'skip', got 'ignore'"):
        build_train_loader(tiny_config("DATALOADER.BAD_IMAGES", "ignore"))


# ------------------------------------------------------------------------------------ evaluation


@pytest.fixture
def damaged(tmp_path):
    """Options for a training and an evaluation set with a damaged image each, and their names."""
    entries, names = [], []
    for split, count in (("train", 6), ("val", 4)):
        folder = generate(tmp_path / "data", split, num_images=count, seed=1)
        name = sorted((folder / "images").iterdir())[1]
        buffer = io.BytesIO()
        Image.open(name).save(buffer, "png")
        content = bytearray(buffer.getvalue())
        content[len(content) // 2] ^= 0xFF  # neither header nor end show it
        name.write_bytes(content)
        names.append(name)
        entries.append([f"damaged_{split}", str(folder / "annotations.json"), str(name.parent)])
    yield (
        [
            *("DATASETS.COCO_FORMAT", str(entries), "DATASETS.TRAIN", "('damaged_train',)"),
            *("DATASETS.TEST", "('damaged_val',)", "TEST.EVAL_PERIOD", 2),
            *("DATALOADER.BAD_IMAGES", "skip"),
        ],
        names,
    )
    forget("damaged_train", "damaged_val")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_goes_on_to_its_end_and_names_what_it_could_not_read(
    run, damaged, tmp_path, num_workers
):
    options, (train, val) = damaged
    options += ["TEST.REPORT", True, "TEST.INSTABILITY.ENABLED", True, "SOLVER.MAX_ITER", 8]
    run(*options, "DATALOADER.NUM_WORKERS", num_workers, "TEST.EVAL_PERIOD", 4)
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count(f"trains on another image from here on: the image '{train}'") == 1
    assert log.count("1 images of damaged_val count as without detections:") == 2  # evaluations
    assert f"the image '{val}' cannot be read" in log
    metrics = (tmp_path / "run/metrics.json").read_text()
    assert "bbox/AP" in metrics and "matching/anchor_distance" in metrics


def test_an_unreadable_image_counts_as_one_without_detections(damaged, tiny_config, tmp_path):
    """A model that gives back the ground truth misses the objects of that image only."""
    from detectron2.structures import Instances

    from dn_detr.d2.data import dataset_dicts

    options, (_, val) = damaged
    cfg = tiny_config(*options)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    truth = {r["image_id"]: r for r in dataset_dicts.load("damaged_val").records}
    evaluator = build_evaluator(cfg, "damaged_val")
    evaluator.reset()
    objects = missed = 0
    for (sample,) in build_test_loader(cfg, "damaged_val"):
        record = truth[sample["image_id"]]
        is_bad = record["file_name"] == str(val)
        assert ("unreadable" in sample) == is_bad and sample["image"].dtype == torch.uint8
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = _boxes(record)
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.ones(len(found.pred_classes))
        objects, missed = objects + len(found), missed + is_bad * len(found)
        evaluator.process([sample], [{"instances": found}])
    evaluator.evaluate()
    results = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert 0 < missed < objects and len(results) == objects - missed


def _boxes(record):
    from detectron2.structures import Boxes

    return Boxes(torch.tensor([a["bbox"] for a in record["annotations"]]))


# ------------------------------------------------------------------------------ before a training


def test_damaged_validation_images_are_a_warning_and_training_images_an_error(records, caplog):
    options = {"bad_images": "stop", "most": 5}
    with pytest.raises(InputError, match=r"2 of the 10 images of the dataset 'a' .*2.png'"):
        check_image_files(records, "a", **options)
    check_image_files(records, "a", **options, is_for_training=False)
    check_image_files(records, "a", **{**options, "bad_images": "skip"})
    texts = [record.getMessage() for record in caplog.records]
    assert all("2.png'" in text and "5.png'" in text for text in texts) and len(texts) == 2


def test_too_many_or_only_bad_images_are_an_error_in_any_case(records):
    for part, most in ((records, 1), ([records[i] for i in BAD], 5)):
        with pytest.raises(InputError, match="cannot be used"):
            check_image_files(part, "a", bad_images="skip", most=most, is_for_training=False)


def test_sound_images_are_remembered_until_they_change(records, tmp_path, monkeypatch):
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    assert set(find_faults(records)) == set(BAD)
    checked = []
    check = image_check.fault_of
    monkeypatch.setattr(image_check, "fault_of", lambda job: checked.append(job) or check(job))
    assert set(find_faults(records)) == set(BAD)
    assert sorted(Path(path).stem for path, *_ in checked) == [str(i) for i in BAD]
    Path(records[0]["file_name"]).write_text("changed")
    records[1] = {**records[1], "width": 41}
    assert set(find_faults(records)) == {0, 1, *BAD}


def test_decoding_finds_more_than_headers_do_and_is_remembered_apart(records):
    path = Path(records[0]["file_name"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert set(find_faults(records)) == set(BAD)
    for _ in range(2):
        assert set(find_faults(records, decodes=True)) == {0, *BAD}
    assert set(find_faults(records)) == set(BAD)


@pytest.mark.parametrize("spoil", ["folder", "file"])
def test_a_cache_that_cannot_be_used_only_costs_time(records, tmp_path, monkeypatch, spoil):
    cache = tmp_path / "cache"
    monkeypatch.setenv("DN_DETR_CACHE", str(cache))
    if spoil == "folder":
        cache.write_text("no folder")
    else:
        cache.mkdir()
        (cache / "images.sqlite").write_text("no database" * 1000)
    for _ in range(2):
        assert set(find_faults(records)) == set(BAD)


def _find(records, cache, results):
    os.environ["DN_DETR_CACHE"] = cache
    results.put(sorted(find_faults(records)))


def test_two_processes_share_a_cold_cache(records, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (records, str(tmp_path / "cache"), results)
    processes = [context.Process(target=_find, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [sorted(BAD)] * 4
    for process in processes:
        process.join()


def test_a_fifo_among_the_images_is_a_fault_and_no_hang(records):
    os.remove(records[0]["file_name"])
    os.mkfifo(records[0]["file_name"])
    assert "is not a regular file" in find_faults(records)[0]


def test_a_start_waits_a_bounded_time_and_a_thread_names_what_it_finds_later(
    records, monkeypatch, caplog
):
    go_on, check = threading.Event(), image_check.fault_of
    last = records[max(BAD)]["file_name"]

    def slow(job):
        if job[0] == last:
            go_on.wait(60)
        return check(job)

    monkeypatch.setattr(image_check, "fault_of", slow)
    monkeypatch.setattr(image_check, "WAIT", 2.0)
    monkeypatch.setattr(image_check, "_CHUNK", 1)
    caplog.set_level(logging.INFO)
    check_image_files(records, "a", bad_images="skip", most=5)
    assert "are checked while the run goes on" in caplog.text and last not in caplog.text
    go_on.set()
    for _ in range(100):
        if "are checked: done" in caplog.text:
            break
        time.sleep(0.05)
    assert f"dataset 'a': the image '{last}' cannot be read" in caplog.text
    go_on.clear()
    with pytest.raises(InputError, match="1 of the 10 images"):  # what was found by then
        check_image_files(records, "a", bad_images="stop", most=5)
    go_on.set()


def test_a_run_ends_without_waiting_for_a_check():
    """Also where the check waits for a file system that does not answer."""
    program = (
        "import sys, time, logging\nfrom dn_detr.d2.data import image_check\n"
        "image_check.fault_of = lambda job: time.sleep(100)\nimage_check.WAIT = 0.2\n"
        "records = [{'file_name': str(i)} for i in range(20000)]\n"
        "image_check.check_image_files(records, 'a', bad_images='stop', most=1)\nprint('trained')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "trained\n" and ended.stderr == ""


def test_the_oldest_checks_are_forgotten_and_only_those_of_the_folder_are_read(
    records, tmp_path, monkeypatch
):
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_check, "MOST_REMEMBERED", 5)
    find_faults(records)
    with sqlite3.connect(tmp_path / "cache/images.sqlite") as database:
        names = [os.path.basename(path) for (path,) in database.execute("SELECT path FROM sound")]
    sound = [f"{i}.png".encode() for i in range(10) if i not in BAD]
    assert sorted(names) == sound[-5:]


# ------------------------------------------------------------------------------------- the tool


def test_the_tool_names_every_fault_and_decodes_on_request(tmp_path, capsys):
    json_file, images = write(tmp_path, make_content())
    path = Path(images) / "12.png"
    Image.effect_noise((60, 40), 50).convert("RGB").save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    main(["check", "--coco", json_file, images])
    assert "fault:" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"1 of 4 images cannot be used: .*12.png"):
        main(["check", "--coco", json_file, images, "--decode"])
    assert f"fault: the image '{path}' cannot be read" in capsys.readouterr().out
    forget(json_file)


def test_the_tool_finds_equal_images_within_and_between_datasets(tmp_path, capsys):
    paths = []
    for name in ("a", "b"):
        paths += [write(tmp_path / name, make_content())]
    for i, (_, images) in enumerate(paths):
        for number in (10, 11, 12, 13):
            pixels = np.full((40, 60, 3), 10 * number + i, np.uint8)
            Image.fromarray(pixels).save(Path(images) / f"{number}.png")
    first, second = Path(paths[0][1]), Path(paths[1][1])
    (first / "11.png").write_bytes((first / "10.png").read_bytes())
    (second / "13.png").write_bytes((first / "12.png").read_bytes())
    main(["check"] + [x for json_file, images in paths for x in ("--coco", json_file, images)])
    printed = capsys.readouterr().out
    names = [json_file for json_file, _ in paths]
    assert (
        f"dataset {names[0]}: 1 images are equal to others of it: {first / '11.png'} = " in printed
    )
    assert f"dataset {names[1]}: 1 images are equal to images of {names[0]}: " in printed
    forget(*names)


def test_files_are_equal_by_content_not_by_size(tmp_path):
    large = np.random.default_rng(0).bytes(50_000)
    contents = [large, large, b"x" + large[1:], large[:-1] + b"x", b"a", b"b", b"a"]
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_bytes(content)
    paths = [str(tmp_path / str(i)) for i in range(len(contents))] + [str(tmp_path / "none")]
    assert sorted(equal_files([*paths, paths[2]])) == [[0, 1], [2, 8], [4, 6]]


def test_validation_images_that_are_training_images_are_said_at_the_start(
    tiny_config, tmp_path, caplog
):
    from dn_detr.d2.data.summary import check_datasets

    json_file, images = write(tmp_path, make_content())
    cfg = tiny_config()
    entries = [["same_train", json_file, images], ["same_val", json_file, images]]
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = entries, ("same_train",)
    cfg.DATASETS.TEST = ("same_val",)
    from dn_detr.d2.data.catalog import register_coco_format

    register_coco_format(entries)
    with caplog.at_level(logging.WARNING):
        check_datasets(cfg)
    assert "dataset same_val: 4 images are equal to images of same_train" in caplog.text
    assert MetadataCatalog.get("same_val").json_file == json_file
    forget("same_train", "same_val")
