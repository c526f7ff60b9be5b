"""DATASETS.FOLDER: from a bare folder to a first evaluation, and what a configuration may add."""

import json
from pathlib import Path

import dataset_folders as folders
import pytest
from coco_files import forget
from detectron2.data import MetadataCatalog

from dn_detr.cli.main import main
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.data.catalog import class_names, prepare, register_coco_format
from dn_detr.d2.data.dataset_dicts import load
from dn_detr.errors import InputError

QUICK = Path(__file__).resolve().parents[2] / "configs/quick/dn_deformable.yaml"
NAMES = [f"cells_{key}" for key in ("train", "val", "test")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    yield
    forget(*NAMES)


def prepared(config_file, *opts, eval_only=False):
    cfg = read_config(config_file, [str(opt) for opt in opts])
    prepare(cfg, eval_only)
    return cfg


@pytest.mark.parametrize(
    "layout", [*folders.WITH_SPLITS, *folders.WITHOUT_SPLITS], ids=lambda f: f.__name__
)
def test_every_layout_trains_to_its_first_evaluation(layout, run, tmp_path):
    layout(tmp_path / "cells")
    run("DATASETS.FOLDER", tmp_path / "cells")
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert "bbox/AP-red cell" in json.loads(lines[-1])
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count(f"{tmp_path / 'cells'} is ") == 1
    assert "trained on cells_train, tested on cells_val" in log
    assert "dataset cells_train (training)" in log


def test_a_saved_configuration_and_a_checkpoint_find_the_folder_again(run, tmp_path):
    folders.yolo_of_ultralytics(tmp_path / "cells")
    run("DATASETS.FOLDER", tmp_path / "cells")
    cfg = prepared(tmp_path / "run/config.yaml", "DATASETS.TEST", "('cells_test',)")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("cells_train",), ("cells_test",))
    assert [entry[0] for entry in cfg.DATASETS.COCO_FORMAT[-3:]] == NAMES  # each once
    assert len(cfg.DATASETS.COCO_FORMAT) == 2 + 3
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 2
    run(
        *("MODEL.WEIGHTS", tmp_path / "run/model_final.pth", "DATASETS.FOLDER", tmp_path / "cells"),
        *("DATASETS.TEST", "('cells_test', 'cells_val')"),
        flags=["--eval-only"],
        output="again",
    )
    for name, num_images in (("cells_test", 1), ("cells_val", 2)):
        file = tmp_path / "again/inference" / name / "coco_instances_results.json"
        assert len({result["image_id"] for result in json.loads(file.read_text())}) == num_images


def test_a_folder_with_only_a_test_set_can_only_be_evaluated(tmp_path):
    folders.roboflow_coco(tmp_path / "cells")
    for name in ("train", "valid"):
        (tmp_path / "cells" / name).rename(tmp_path / name)
    cfg = prepared(QUICK, "DATASETS.FOLDER", tmp_path / "cells", eval_only=True)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ("cells_test",))
    with pytest.raises(InputError, match="there is nothing to train on"):
        prepared(QUICK, "DATASETS.FOLDER", tmp_path / "cells")


def test_a_folder_stands_beside_other_datasets_and_may_be_a_data_yaml(tmp_path):
    folders.yolo_of_roboflow(tmp_path / "cells")
    other = ["other", str(tmp_path / "a.json"), str(tmp_path)]
    cfg = prepared(
        QUICK,
        *("DATASETS.FOLDER", tmp_path / "cells/data.yaml", "DATASETS.COCO_FORMAT", str(other)),
    )
    forget("other")
    assert [entry[0] for entry in cfg.DATASETS.COCO_FORMAT] == ["other", *NAMES]
    assert cfg.DATASETS.TEST == ("cells_val",)


def test_relative_and_absolute_paths_name_the_same_files(tmp_path, monkeypatch):
    folders.coco_of_one_image_folder(tmp_path / "cells")
    monkeypatch.chdir(tmp_path)
    register_coco_format(["cells_train", "cells/annotations/train.json", "cells/images"])
    prepared(QUICK, "DATASETS.FOLDER", "cells")
    with pytest.raises(InputError, match="choose another name"):
        register_coco_format(["cells_train", "cells/annotations/val.json", "cells/images"])


def categories_of(*json_files, **metadata) -> list[str]:
    """The classes of a run with these files."""
    entries = [[name, str(file), "."] for name, file in zip(NAMES, json_files, strict=False)]
    names = tuple(name for name, *_ in entries)
    register_coco_format(entries)
    MetadataCatalog.get(names[0]).set(**metadata)
    cfg = read_config(
        QUICK,
        ["DATASETS.COCO_FORMAT", str(entries), "DATASETS.TRAIN", str(names[:1]), "DATASETS.TEST"]
        + [str(names[1:])],
    )
    prepare(cfg)
    classes = class_names(names[0])
    assert [load(name).class_names for name in names] == [classes] * len(names)
    counts = dict(zip(classes, load(names[0]).class_counts, strict=True))
    assert counts.get("cells", 0) == 0 and counts["red cell"] + counts["white cell"] >= 2
    assert len(classes) == cfg.MODEL.DN_DETR.NUM_CLASSES
    forget(*names)
    return classes


def test_the_empty_super_category_of_roboflow_is_no_class_unless_it_has_objects(tmp_path):
    folders.roboflow_coco(tmp_path / "cells")
    train, val = (tmp_path / f"cells/{k}/_annotations.coco.json" for k in ("train", "valid"))
    cfg = prepared(QUICK, "DATASETS.FOLDER", tmp_path / "cells")
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 2
    assert "the super-category 'cells' has no objects" in load("cells_train").warnings[0]
    assert load("cells_train").truth.category_ids == [1, 2]  # results keep the user's ids
    forget(*NAMES)
    assert categories_of(train, val) == folders.NAMES
    everything = ["cells", *folders.NAMES]
    assert categories_of(train, val, thing_classes=everything) == everything  # the user's choice
    content = json.loads(val.read_text())
    content["annotations"][0]["category_id"] = 0
    val.write_text(json.dumps(content))
    assert categories_of(train, val) == everything
    content["annotations"][0]["category_id"] = 1
    content["categories"][2]["supercategory"] = "others"
    val.write_text(json.dumps(content))
    assert categories_of(val) == everything


def test_a_folder_is_checked_as_a_training_reads_it(tmp_path, capsys):
    folders.kangaroo(tmp_path / "cells")
    main(["check", "--data", str(tmp_path / "cells")])
    printed = capsys.readouterr().out
    assert "is Pascal VOC with images: train 4, val 2" in printed
    assert "dataset cells_train" in printed and "dataset cells_val" in printed
    forget(*NAMES)
    folders.yolo_of_ultralytics(tmp_path / "cells")
    with pytest.raises(SystemExit, match="holds YOLO .* and Pascal VOC: choose by"):
        main(["check", "--data", str(tmp_path / "cells")])
    main(["check", "--data", str(tmp_path / "cells"), "--annotations", "data.yaml"])
    assert "dataset cells_test" in capsys.readouterr().out  # all splits


def test_what_looks_wrong_is_said_at_the_start_of_a_training(run, tmp_path):
    folders.coco_of_one_image_folder(tmp_path / "cells")
    path = tmp_path / "cells/annotations/train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.1, 0.5, 0.5]
    content["annotations"].append({**content["annotations"][0], "id": 99})
    path.write_text(json.dumps(content))
    image = tmp_path / "cells/images/a.jpg"
    (tmp_path / "cells/images/d.jpg").write_bytes(image.read_bytes())
    run("DATASETS.FOLDER", tmp_path / "cells")
    log = (tmp_path / "run/log.txt").read_text()
    for words in (
        "dataset cells_train: all boxes lie between 0 and 1, as if divided by the image size",
        "dataset cells_train: 1 boxes repeat another of the same class in the same image: a.jpg",
        "dataset cells_val: 1 images are equal to images of cells_train: ",
    ):
        assert log.count(words) == 1, words


def test_a_folder_is_converted_by_the_same_code(tmp_path, capsys):
    folders.kangaroo(tmp_path / "cells")
    main(["convert", "folder", str(tmp_path / "cells"), "--output", str(tmp_path / "converted")])
    printed = capsys.readouterr().out
    assert "is Pascal VOC with images: train 4, val 2" in printed
    assert f"['my_val', '{tmp_path}/converted/val.json', '{tmp_path}/cells']" in printed
    content = json.loads((tmp_path / "converted/train.json").read_text())
    assert len(content["images"]) == 4 and len(content["categories"]) == 2
    with pytest.raises(SystemExit, match="dn-detr convert: .* is no dataset that is known"):
        main(["convert", "folder", str(tmp_path / "cells/images"), "--output", str(tmp_path)])
