"""A dataset folder as one argument: every layout gives the same data, and the same split again."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import dataset_folders as folders
import pytest

from dn_detr.datasets import split
from dn_detr.datasets.folder import RECORD, read_folder
from dn_detr.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def boxes(json_file, images) -> dict:
    """image name -> [(class name, box)]; every image must exist."""
    content = json.loads(Path(json_file).read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert sorted(set(names.values()) - {"cells"}) == folders.NAMES  # Roboflow's super-category
    found = {}
    for entry in content["images"]:
        assert (Path(images) / entry["file_name"]).is_file()
        found[Path(entry["file_name"]).stem] = [
            (names[a["category_id"]], *a["bbox"])
            for a in content["annotations"]
            if a["image_id"] == entry["id"]
        ]
    return found


def expected(names) -> dict:
    return {
        n: [(folders.NAMES[c], *map(pytest.approx, box)) for c, *box in folders.BOXES[n]]
        for n in names
    }


@pytest.mark.parametrize("layout", folders.WITH_SPLITS, ids=lambda f: f.__name__)
def test_every_layout_with_splits_is_recognised(layout, tmp_path):
    root = tmp_path / "test" / "cells"  # a folder above says nothing
    layout(root)
    found = read_folder(root)
    assert list(found.files) == ["train", "val", "test"]
    for key, files in found.files.items():
        assert boxes(*files) == expected(folders.SPLITS[key])
    assert "train 3, val 2, test 1" in found.sentence
    assert not (root / RECORD).exists()


@pytest.mark.parametrize("layout", folders.WITHOUT_SPLITS, ids=lambda f: f.__name__)
def test_every_layout_without_splits_is_divided_and_the_split_stays(layout, tmp_path, cache):
    root = tmp_path / "cells"
    layout(root)
    found = read_folder(root)
    parts = {key: boxes(*files) for key, files in found.files.items()}
    assert sorted(parts) == ["train", "val"] and str(root / RECORD) in found.sentence
    assert parts["train"] | parts["val"] == expected(folders.BOXES)
    for part in parts.values():  # stratified: both classes in both
        assert {b[0] for found in part.values() for b in found} == set(folders.NAMES)
    shutil.rmtree(cache)
    shutil.copytree(root, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / RECORD).unlink()
    for again in (root, tmp_path / "elsewhere"):  # by the record, by the seed
        files = read_folder(again).files
        assert {key: boxes(*files[key]) for key in files} == parts


def test_a_written_split_is_obeyed_and_new_images_are_added(tmp_path):
    root = tmp_path / "cells"
    folders.kangaroo(root)
    (root / "annots/f.xml").unlink()
    (root / "images/f.jpg").unlink()
    names = [f"images/{n}.jpg" for n in "abcde"]
    (root / RECORD).write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    assert set(boxes(*read_folder(root).files["val"])) == set("bcde")
    folders.image(root / "images/f.jpg")
    folders.text(root / "annots/f.xml", folders.xml("f"))
    found = read_folder(root).files
    assert set(boxes(*found["train"])) == set("af")
    assert "images/f.jpg" in json.loads((root / RECORD).read_text())["train"]
    for content, words in [("{", "cannot be read"), ('{"train": 1, "val": []}', "cannot be read")]:
        (root / RECORD).write_text(content)
        with pytest.raises(InputError, match=words):
            read_folder(root)


def test_a_split_of_data_on_a_read_only_disk_is_kept_in_the_cache(tmp_path, cache, monkeypatch):
    folders.kangaroo(tmp_path / "cells")
    write = split.write_whole

    def refuse(path, text):
        if path.is_relative_to(tmp_path / "cells"):
            raise PermissionError("read-only")
        write(path, text)

    monkeypatch.setattr(split, "write_whole", refuse)
    found = read_folder(tmp_path / "cells")
    assert not (tmp_path / "cells" / RECORD).exists() and str(cache) in found.sentence
    assert read_folder(tmp_path / "cells") == found


def test_every_class_gets_its_share_of_a_split():
    classes = {f"{i}": {0} for i in range(80)}
    classes |= {f"rare{i}": {0, 1} for i in range(10)} | {"x": {0, 2}, "y": {3}, "z": {3}}
    classes |= {f"empty{i}": set() for i in range(20)}
    val = split.choose(classes)
    count = lambda label: sum(label in classes[name] for name in val)  # noqa: E731
    assert (count(0), count(1), count(2), count(3)) == (18, 2, 0, 1)
    assert sum(not classes[name] for name in val) == 4
    assert split.choose(dict(reversed(classes.items()))) == val


def test_changed_files_are_read_again_and_unchanged_ones_are_not(tmp_path, monkeypatch):
    root = tmp_path / "cells"
    folders.yolo_of_roboflow(root)
    first = read_folder(root)
    with monkeypatch.context() as patch:
        patch.setattr("dn_detr.datasets.yolo.from_pairs", None)
        assert read_folder(root) == first
    label = root / "train/labels/a.txt"
    folders.text(label, folders.yolo_lines("b") + "\n")
    assert boxes(*read_folder(root).files["train"])["a"] == expected("b")["b"]


def test_where_guessing_fails_folders_and_patterns_choose(tmp_path):
    root = tmp_path / "cells"
    folders.own_coco(root)
    for name in "abc":  # another form of the same images
        folders.text(root / "xml" / f"{name}.xml", folders.xml(name))
        folders.image(root / "small" / f"{name}.jpg")
    folders.text(root / "annotations/instances_masks_train.json", folders.coco("ab"))
    with pytest.raises(
        InputError, match="holds COCO and Pascal VOC: choose by DATASETS.ANNOTATIONS"
    ):
        read_folder(root)
    found = read_folder(root, annotations="annotations")
    assert boxes(*found.files["train"]) == expected("abc")
    assert found.files["train"][1] == str(root / "train2017")  # not `small`
    found = read_folder(root, annotations="annotations/instances_masks_*.json", images="small")
    assert found.files["train"][1] == str(root / "small")
    found = read_folder(root, annotations=str(root / "xml"), images="small")
    assert found.files["train"][1] == str(root) and "Pascal VOC" in found.sentence
    for key in ("images", "annotations"):
        with pytest.raises(InputError, match=rf"DATASETS.{key.upper()} \(--{key}\) is 'none'"):
            read_folder(root, **{key: "none"})


def test_text_files_in_a_folder_of_any_name_are_yolos_where_they_are_named(tmp_path):
    folders.text(tmp_path / "cells/classes.txt", "\n".join(folders.NAMES))
    for name in folders.BOXES:
        folders.image(tmp_path / "cells/pictures" / f"{name}.jpg")
        folders.text(tmp_path / "cells/boxes" / f"{name}.txt", folders.yolo_lines(name))
    with pytest.raises(InputError, match="is no dataset that is known"):
        read_folder(tmp_path / "cells")
    found = {
        name: box
        for files in read_folder(tmp_path / "cells", annotations="boxes").files.values()
        for name, box in boxes(*files).items()
    }
    assert found == expected(folders.BOXES)


def test_folders_without_a_dataset_get_one_sentence_of_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        read_folder(tmp_path / "none")
    (tmp_path / "cells").mkdir()
    words = "among 0 images and 0 files .*COCO.*data.yaml.*xml files of Pascal VOC"
    with pytest.raises(InputError, match=words) as caught:
        read_folder(tmp_path / "cells")
    assert "\n" not in str(caught.value)
    folders.image(tmp_path / "cells/a.jpg")
    folders.text(tmp_path / "cells/a.txt", folders.yolo_lines("a"))
    with pytest.raises(InputError, match="no class names: add a data.yaml"):
        read_folder(tmp_path / "cells")


def damaged(root, file, old, new):
    path = root / file
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("layout", "file", "old", "new", "words"),
    [
        (folders.kangaroo, "annots/a.xml", "</annotation>", "", "a.xml is not valid XML"),
        (folders.kangaroo, "annots/a.xml", "<width>60", "<width>61", "but its image has 60x40"),
        (folders.own_coco, "annotations/instances_val2017.json", "}]", "}", "is not valid JSON"),
        (folders.one_coco_file, "result.json", '"id": 7', '"id": [7]', "cannot be divided"),
        (folders.yolo_of_roboflow, "data.yaml", "valid/", "gone/", "val is '../gone/images'"),
        (folders.yolo_of_roboflow, "data.yaml", "nc: 2", "kpt_shape: [4, 3]", "keypoints"),
        (folders.yolo_of_roboflow, "data.yaml", "names: [", "names: {[", "is not valid YAML"),
        (
            folders.yolo_of_roboflow,
            "train/labels/a.txt",
            "0 ",
            "9 ",
            "a.txt, line 1: the class must",
        ),
        (
            folders.voc2007,
            "VOCdevkit/VOC2007/ImageSets/Main/train.txt",
            "a\n",
            "z\n",
            "lists 'z', which has no xml",
        ),
    ],
)
def test_damage_is_a_sentence_with_its_file(layout, file, old, new, words, tmp_path):
    layout(tmp_path / "cells")
    damaged(tmp_path / "cells", file, old, new)
    with pytest.raises(InputError, match=words):
        read_folder(tmp_path / "cells")


def test_boxes_that_start_at_zero_are_distances_from_the_corner(tmp_path):
    folders.kangaroo(tmp_path / "cells")
    damaged(tmp_path / "cells", "annots/a.xml", "<xmin>6<", "<xmin>0<")
    found = read_folder(tmp_path / "cells")
    assert "pixels counted from 0" in found.sentence
    every = {k: b for files in found.files.values() for k, b in boxes(*files).items()}
    assert every["a"][0][1] == 0 and every["b"][0][1] == 7


def test_a_test_set_without_images_and_one_without_annotations_are_passed_over(tmp_path):
    folders.yolo_of_roboflow(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/test")
    found = read_folder(tmp_path / "a")
    assert list(found.files) == ["train", "val"] and "no images there" in found.sentence
    folders.voc2007(tmp_path / "b")
    lists = tmp_path / "b/VOCdevkit/VOC2007/ImageSets/Main"
    folders.text(lists / "trainval.txt", "a\nb\nc\nd\ne\n")
    (lists / "train.txt").unlink()
    folders.text(lists / "test.txt", "x\ny\n")
    found = read_folder(tmp_path / "b")
    assert boxes(*found.files["train"]) == expected("abc") and "test" not in found.files


def test_links_are_followed_and_cycles_end(tmp_path):
    folders.kangaroo(tmp_path / "real")
    (tmp_path / "cells").mkdir()
    for name in ("images", "annots"):
        os.symlink(tmp_path / "real" / name, tmp_path / "cells" / name)
    os.symlink(tmp_path / "cells", tmp_path / "cells" / "loop")
    (tmp_path / "cells/.hidden.xml").write_text("<annotation>")
    assert "train 4, val 2" in read_folder(tmp_path / "cells").sentence


@pytest.mark.parametrize("special", ["fifo", "device", "dangling link"])
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (folders.own_coco, "annotations/instances_train2017.json"),
        (folders.yolo_of_ultralytics, "data.yaml"),
        (folders.yolo_of_ultralytics, "labels/train/a.txt"),
        (folders.voc2007, "VOCdevkit/VOC2007/Annotations/a.xml"),
        (folders.voc2007, "VOCdevkit/VOC2007/ImageSets/Main/train.txt"),
    ],
)
def test_files_that_never_end_or_lead_nowhere_are_refused(layout, name, special, tmp_path):
    layout(tmp_path / "cells")
    path = tmp_path / "cells" / name
    path.unlink()
    if special == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if special == "device" else "nowhere")
    with pytest.raises(InputError, match=f"{path.name} (is not a regular file|cannot be read: No)"):
        read_folder(tmp_path / "cells")


@pytest.mark.parametrize("encoding", ["utf-32", "cp932", "none"])
def test_an_encoding_that_xml_does_not_know_is_one_sentence(encoding, tmp_path):
    folders.kangaroo(tmp_path / "cells")
    path = tmp_path / "cells/annots/a.xml"
    path.write_text(f'<?xml version="1.0" encoding="{encoding}"?>{path.read_text()}')
    with pytest.raises(InputError, match="a.xml is not valid XML: .*encoding"):
        read_folder(tmp_path / "cells")


def test_annotations_that_are_null_are_none(tmp_path):
    folders.coco_of_one_image_folder(tmp_path / "cells")
    path = tmp_path / "cells/annotations/test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": None}))
    assert read_folder(tmp_path / "cells").files["test"][1] == str(tmp_path / "cells/images")


def test_converted_data_are_removed_beyond_a_size(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("dn_detr.datasets.cache.MOST_BYTES", 20_000)
    folders.yolo_of_ultralytics(tmp_path / "cells")
    for number in range(30):  # each change is converted anew, to about 2 kB
        folders.text(tmp_path / "cells/labels/train/a.txt", folders.yolo_lines("a") + "\n" * number)
        found = read_folder(tmp_path / "cells")
    assert all(Path(json_file).is_file() for json_file, _ in found.files.values())
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert 10_000 < size <= 20_000


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 5000 + ".yaml"])
def test_names_that_no_file_can_have_name_no_folder(name):
    with pytest.raises(InputError, match="there is no folder 'x|there is no folder 'a"):
        read_folder(name)


SCRAPS = (
    b"null",
    b"[]",
    b"{}",
    b"1e400",
    b'"x"',
    b"-1",
    b"true",
    b"[[[]]]",
    b"\xff\xfe",
    b"",
    b"9" * 400,
)
TOKEN = re.compile(rb'"[^"]*"|-?\d+\.?\d*|\{|\[|names|train')


@pytest.mark.parametrize("seed", range(200))
def test_any_damage_is_read_or_refused_in_one_line(seed, tmp_path):
    draw = random.Random(seed)
    draw.choice([*folders.WITH_SPLITS, *folders.WITHOUT_SPLITS])(tmp_path / "cells")
    files = sorted(p for p in (tmp_path / "cells").rglob("*.*") if p.suffix != ".jpg")
    for path in draw.choices(files, k=2):
        content = path.read_bytes()
        start, end = draw.choice([m.span() for m in TOKEN.finditer(content)] or [(0, 0)])
        path.write_bytes(content[:start] + draw.choice(SCRAPS) + content[end:])
    try:
        found = read_folder(tmp_path / "cells")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(Path(json_file).is_file() for json_file, _ in found.files.values())
