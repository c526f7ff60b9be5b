import pytest
from coco_files import forget, make_content, write
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.data.catalog import (
    class_names,
    dataset_names,
    prepare,
    register_coco_format,
    resolve_num_classes,
    with_num_classes,
)
from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.errors import InputError


@pytest.fixture(autouse=True)
def clean_catalogs():
    yield
    forget("made_up", "other", "own")


def test_a_dataset_is_registered_by_name_and_paths(tmp_path):
    entry = ["made_up", *write(tmp_path, make_content())]
    register_coco_format([entry])
    register_coco_format([tuple(entry)])
    register_coco_format(entry)
    assert class_names("made_up") == ["cat", "dog"]
    assert len(DatasetCatalog.get("made_up")) == 4
    assert MetadataCatalog.get("made_up").thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}


def test_a_taken_name_is_refused():
    register_coco_format([["made_up", "a.json", "images"]])
    with pytest.raises(InputError, match="but a.json and images have it already: choose another"):
        register_coco_format([["made_up", "b.json", "images"]])
    with pytest.raises(InputError, match="'coco_2017_val'"):
        register_coco_format([["coco_2017_val", "b.json", "images"]])


@pytest.mark.parametrize("entry", ["a.json", ["a", "b"], ["a", "b", 3], ["a", "b", ""], None])
def test_entries_of_another_form_are_refused(entry):
    with pytest.raises(InputError, match=r"must be a list of \[name, json file, image folder\]"):
        register_coco_format([entry])


def test_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    register_coco_format([["made_up", "~/a.json", "~/images"]])
    assert MetadataCatalog.get("made_up").json_file == "/home/someone/a.json"


def test_number_of_classes_comes_from_the_dataset_or_must_agree_with_it(tmp_path):
    register_coco_format([["made_up", *write(tmp_path, make_content())]])
    assert resolve_num_classes(0, ["made_up"]) == 2
    assert resolve_num_classes(2, ["made_up"]) == 2
    with pytest.raises(InputError) as caught:
        resolve_num_classes(80, ["made_up"])
    assert str(caught.value) == (
        "MODEL.DN_DETR.NUM_CLASSES is 80, but the dataset 'made_up' has 2 classes: "
        "set it to 2, or to 0 to take it from the dataset."
    )


def test_all_datasets_of_a_run_must_have_the_same_classes(tmp_path):
    content = make_content()
    register_coco_format([["made_up", *write(tmp_path / "a", content)]])
    content["categories"][0]["name"] = "wolf"
    register_coco_format([["other", *write(tmp_path / "b", content)]])
    with pytest.raises(InputError, match="class 1 is 'dog' in the first and 'wolf' in the second"):
        resolve_num_classes(0, ["made_up", "other"])
    with pytest.raises(InputError, match="the first has 2 and the second 80|class 0 is 'cat'"):
        resolve_num_classes(0, ["made_up", "coco_2017_val"])


def test_a_file_of_other_classes_than_its_name_promises_is_refused(tmp_path):
    """It was a bare AssertionError of Detectron2's metadata."""
    json_file, images = write(tmp_path, make_content())
    register_coco_instances("made_up", {"thing_classes": ["cat", "cow"]}, json_file, images)
    with pytest.raises(InputError, match="other classes .* class 1 is 'cow' .* 'dog' in the sec"):
        load_annotations("made_up")
    forget("made_up")
    register_coco_instances("made_up", {"thing_classes": ["cat", "dog"]}, json_file, images)
    assert len(load_annotations("made_up").records) == 4


def test_unknown_datasets_get_a_hint():
    with pytest.raises(
        InputError, match="no dataset 'coco_2017_trian': did you mean 'coco_2017_train'"
    ):
        class_names("coco_2017_trian")
    with pytest.raises(InputError, match="register it by DATASETS.COCO_FORMAT"):
        class_names("zzzzzz")


def test_a_dataset_of_the_user_s_own_needs_class_names():
    DatasetCatalog.register("own", list)
    with pytest.raises(InputError, match="'own' has no class names"):
        class_names("own")

    def load():
        MetadataCatalog.get("own").thing_classes = ["x"]
        return []

    DatasetCatalog.remove("own")
    DatasetCatalog.register("own", load)
    assert class_names("own") == ["x"]


def test_prepare_resolves_the_configuration(tmp_path):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    with pytest.raises(InputError, match="DATASETS.TRAIN is empty"):
        prepare(cfg)
    with pytest.raises(InputError, match="DATASETS.TEST is empty"):
        prepare(cfg, eval_only=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val", "shapes_train")
    assert dataset_names(cfg) == ["shapes_train", "shapes_val"]
    assert dataset_names(cfg, eval_only=True) == ["shapes_val", "shapes_train"]
    prepare(cfg)
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 6
    cfg.DATASETS.COCO_FORMAT = [["made_up", *write(tmp_path, make_content())]]
    cfg.DATASETS.TEST, cfg.MODEL.DN_DETR.NUM_CLASSES = ("made_up",), 0
    prepare(cfg, eval_only=True)
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 2


def test_a_model_alone_takes_its_classes_from_datasets_that_are_not_registered(tmp_path):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.DATASETS.TRAIN = ("shapes_train",)
    forget("shapes_train")
    assert with_num_classes(cfg).MODEL.DN_DETR.NUM_CLASSES == 6
    cfg.DATASETS.COCO_FORMAT = [["made_up", *write(tmp_path, make_content())]]
    cfg.DATASETS.TRAIN = ("made_up",)
    assert with_num_classes(cfg).MODEL.DN_DETR.NUM_CLASSES == 2
