"""YOLO's and Pascal VOC's formats as COCO format: exact, and refused where they are not in it."""

import json
import random

import pytest
from PIL import Image

from dn_detr.datasets.voc import from_voc
from dn_detr.datasets.yolo import from_yolo, read_class_names
from dn_detr.errors import InputError

XML = """<annotation><filename>{name}.jpg</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>
<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"""


def boxes_by_image(content) -> dict:
    """file name -> [(class name, x, y, width, height, iscrowd)]"""
    names = {c["id"]: c["name"] for c in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    found = {name: [] for name in files.values()}
    for a in content["annotations"]:
        entry = (names[a["category_id"]], *a["bbox"], a.get("iscrowd", 0))
        found[files[a["image_id"]]].append(entry)
    return found


# -------------------------------------------------------------------------------------------- YOLO


@pytest.fixture
def yolo(tmp_path):
    """Two images of 200x100 pixels; yolo(text) converts them with these lines for the first."""
    for name in ("a.png", "sub/b.png"):
        path = tmp_path / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(path)

    def write(text, name="a.txt"):
        path = tmp_path / "labels" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return from_yolo(tmp_path / "images" / "train", ["cat", "dog"])

    return write


def test_yolo_boxes_become_pixels(yolo):
    content = yolo("1 0.5 0.5 0.25 0.5\n\n0 0.05 0.1 0.1 0.2\n")
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert content["images"][1] == {"id": 2, "file_name": "sub/b.png", "width": 200, "height": 100}
    assert boxes_by_image(content) == {
        "a.png": [("dog", 75, 25, 50, 50, 0), ("cat", 0, 0, 20, 20, 0)],
        "sub/b.png": [],
    }
    assert [a["area"] for a in content["annotations"]] == [2500, 400]


def test_sizes_are_those_of_the_image_as_it_is_looked_at(yolo, tmp_path):
    image = Image.new("RGB", (200, 100))
    exif = image.getexif()
    exif[274] = 6  # a quarter turn
    image.save(tmp_path / "images/train/a.png", exif=exif)
    content = yolo("0 0.5 0.5 0.2 0.1")
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (100, 200)
    assert content["annotations"][0]["bbox"] == pytest.approx([40, 90, 20, 20])


def test_yolo_outlines_become_polygons_with_their_box_and_area(yolo):
    (annotation,) = yolo("0 0.1 0.1 0.3 0.1 0.3 0.5")["annotations"]
    assert annotation["segmentation"] == [pytest.approx([20, 10, 60, 10, 60, 50])]
    assert annotation["bbox"] == pytest.approx([20, 10, 40, 40])
    assert annotation["area"] == pytest.approx(800)  # half of the box


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0.5 0.5 0.1", "a.txt, line 1: expected a class and 4 numbers .* got 4 numbers"),
        ("0 .5 .5 .1 .1\n2 .5 .5 .1 .1", "line 2: the class must be 0 to 1, got 2"),
        ("-1 .5 .5 .1 .1", "the class must be 0 to 1, got -1"),
        ("0.5 .5 .5 .1 .1", "the class must be 0 to 1, got 0.5"),
        ("0 100 50 50 50", "fractions of the image in .0, 1., not pixels"),
        ("0 nan 0.5 0.1 0.1", "fractions of the image"),
        ("cat 0.5 0.5 0.1 0.1", "expected numbers, got 'cat 0.5"),
    ],
)
def test_lines_that_are_not_yolos_are_refused_with_their_place(yolo, text, words):
    with pytest.raises(InputError, match=words):
        yolo(text)


def test_yolo_folders_that_do_not_fit_are_refused(yolo, tmp_path):
    with pytest.raises(InputError, match="1 text files .* have no image, .*c.txt"):
        yolo("", name="c.txt")
    (tmp_path / "labels/train/c.txt").unlink()
    yolo("", name="classes.txt")  # annotation programs leave it there
    Image.new("RGB", (9, 9)).save(tmp_path / "images/train/a.jpg")
    with pytest.raises(InputError, match="belongs to two images"):
        yolo("")
    with pytest.raises(InputError, match="there is no image folder"):
        from_yolo(tmp_path / "none", ["cat"])
    with pytest.raises(InputError, match="with text files: specify it"):
        from_yolo(tmp_path / "images" / "train", ["cat"], tmp_path / "none")


def test_class_names_come_from_yaml_or_text(tmp_path):
    for name, text in [
        ("a.yaml", "train: x\nnames: [cat, dog]"),
        ("b.yml", "names:\n  0: cat\n  1: dog"),
        ("c.txt", "cat\ndog\n\n"),
    ]:
        (tmp_path / name).write_text(text)
        assert read_class_names(tmp_path / name) == ["cat", "dog"]
    for name, text, words in [
        ("d.yaml", "names: {1: cat, 2: dog}", "must have 'names'"),
        ("d2.yaml", "names: {0: cat, a: dog}", "must have 'names'"),
        ("e.yaml", "nc: 2", "must have 'names'"),
        ("f.yaml", "names: [", "not valid YAML"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            read_class_names(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt")


# --------------------------------------------------------------------------------------------- VOC


def write_voc(folder, images, *, first_pixel=1):
    """images: name -> (width, height, [(label, x, y, width, height, difficult)])."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for name, (width, height, objects) in images.items():
        entries = [
            OBJECT.format(
                label=label,
                difficult=difficult,
                x0=x + first_pixel,
                y0=y + first_pixel,
                x1=x + w,
                y1=y + h,
            )
            for label, x, y, w, h, difficult in objects
        ]
        text = XML.format(name=name, width=width, height=height, objects="".join(entries))
        (folder / "Annotations" / f"{name}.xml").write_text(text)


@pytest.fixture
def voc(tmp_path):
    """The two images of VOC form: a cat and a difficult dog, and nothing."""
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (50, 40)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    objects = [("dog", 0, 0, 50, 40, 0), ("cat", 10, 5, 20, 10, 1)]
    write_voc(tmp_path, {"a": (50, 40, objects), "b": (50, 40, [])})
    return tmp_path


def test_voc_counts_pixels_from_one_and_includes_the_last(voc):
    assert "<xmin>1</xmin>" in (voc / "Annotations/a.xml").read_text()
    content = from_voc(voc)
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert boxes_by_image(content) == {
        "a.jpg": [("dog", 0, 0, 50, 40, 0), ("cat", 10, 5, 20, 10, 1)],
        "b.jpg": [],
    }


def test_a_split_of_voc_has_the_classes_of_all(voc):
    (voc / "ImageSets/Main/val.txt").write_text("b 1\n")
    content = from_voc(voc, split="val")
    assert [i["file_name"] for i in content["images"]] == ["b.jpg"]
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    (voc / "ImageSets/Main/bad.txt").write_text("c\n")
    for split, words in [("bad", "lists 'c', which has no file"), ("none", "cannot be read")]:
        with pytest.raises(InputError, match=words):
            from_voc(voc, split=split)


def test_distances_from_the_corner_are_taken_as_they_are_where_it_is_said(voc):
    write_voc(voc, {"a": (50, 40, [("cat", 0, 5, 20, 10, 0)])}, first_pixel=0)
    with pytest.raises(InputError, match="starts at 0, .* use --first-pixel 0"):
        from_voc(voc)
    assert boxes_by_image(from_voc(voc, first_pixel=0))["a.jpg"] == [("cat", 0, 5, 20, 10, 0)]


def test_what_is_not_voc_is_refused(voc):
    good = (voc / "Annotations/a.xml").read_text()
    for text, words in [
        (good[:-20], "a.xml is not valid XML"),
        (good.replace("<xmin>1</xmin>", "<xmin>one</xmin>"), "<xmin> must be a number, got 'one'"),
        (good.replace("<xmin>1</xmin>", ""), "a <bndbox> has no <xmin>"),
        (good.replace("bndbox>", "box>"), "an <object> has no <bndbox>"),
        (good.replace("<width>50", "<width>40"), "a size of 40x40 pixels, but its image has 50x40"),
    ]:
        (voc / "Annotations/a.xml").write_text(text)
        with pytest.raises(InputError, match=words):
            from_voc(voc)
    (voc / "Annotations/a.xml").write_text(good)
    with pytest.raises(InputError, match="the class 'dog', which is not in the class names"):
        from_voc(voc, class_names=["cat"])
    (voc / "JPEGImages/a.jpg").unlink()
    with pytest.raises(InputError, match="has no image 'a'"):
        from_voc(voc)
    with pytest.raises(InputError, match="must contain the folders"):
        from_voc(voc / "JPEGImages")


# --------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def cells(real_data, tmp_path_factory):
    """BCCD's validation set: its content and the folder of its images alone."""
    content = json.loads((real_data / "bccd/annotations/instances_val.json").read_text())
    folder = tmp_path_factory.mktemp("cells")
    for image in content["images"]:
        source = real_data / "bccd/images" / image["file_name"]
        (folder / image["file_name"]).symlink_to(source)
    return content, folder


def assert_equal(found: dict, expected: dict, tolerance: float):
    assert set(found) == set(expected)
    for name, boxes in expected.items():
        assert [box[0] for box in found[name]] == [box[0] for box in boxes]
        for ours, theirs in zip(found[name], boxes, strict=True):
            assert ours[1:] == pytest.approx(theirs[1:], abs=tolerance)


def test_bccd_survives_yolo_and_back(cells, tmp_path):
    content, images = cells
    expected = boxes_by_image(content)
    names = [c["name"] for c in content["categories"]]
    for image in content["images"]:
        width, height = image["width"], image["height"]
        lines = [
            f"{names.index(n)} {(x + w / 2) / width!r} {(y + h / 2) / height!r} "
            f"{w / width!r} {h / height!r}"
            for n, x, y, w, h, _ in expected[image["file_name"]]
        ]
        (tmp_path / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    found = boxes_by_image(from_yolo(images, names, tmp_path))
    assert sum(map(len, found.values())) == len(content["annotations"]) > 900
    assert_equal(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("first_pixel", [0, 1])
def test_bccd_survives_voc_and_back(cells, tmp_path, first_pixel):
    content, images = cells
    expected = boxes_by_image(content)
    names = [c["name"] for c in content["categories"]]
    (tmp_path / "JPEGImages").symlink_to(images)
    shuffled = random.Random(0).sample(content["images"], len(content["images"]))
    write_voc(
        tmp_path,
        {
            image["file_name"].removesuffix(".jpg"): (
                image["width"],
                image["height"],
                expected[image["file_name"]],
            )
            for image in shuffled
        },
        first_pixel=first_pixel,
    )
    found = boxes_by_image(from_voc(tmp_path, class_names=names, first_pixel=first_pixel))
    assert_equal(found, expected, tolerance=0)
