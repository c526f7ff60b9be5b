"""Class names in plots and drawings: any script, and nothing that matplotlib or HTML interprets."""

import ast
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from coco_files import forget
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from test_evaluation import dataset, ground_truth, metrics_of  # noqa: F401  (a fixture)

from dn_detr.d2.evaluation import curves
from dn_detr.d2.evaluation.coco_evaluator import Evaluator
from dn_detr.d2.inference import plot_text
from dn_detr.d2.inference.visualization import draw_boxes, draw_found, draw_record, draw_styled

CAT, DOG = "\u732b", "\u72ac"


@pytest.fixture
def fonts(monkeypatch):
    """install(characters) installs a font with a filled square for each; nothing else is known."""
    known = list(font_manager.fontManager.ttflist)
    monkeypatch.setattr(
        font_manager.fontManager, "ttflist", [e for e in known if "DejaVu Sans" in e.name]
    )

    def reset():
        plot_text._FONT_OF.clear()
        plot_text._TOLD.clear()
        plot_text._installed_fonts.cache_clear()

    def install(path, characters):
        pen = TTGlyphPen(None)
        for i, point in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
            (pen.lineTo if i else pen.moveTo)(point)
        pen.closePath()
        font = FontBuilder(1000, isTTF=True)
        names = [".notdef", *(f"g{ord(c)}" for c in characters)]
        font.setupGlyphOrder(names)
        font.setupCharacterMap({ord(c): f"g{ord(c)}" for c in characters})
        font.setupGlyf(dict.fromkeys(names, pen.glyph()))
        font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        font.setupHorizontalHeader(ascent=900, descent=-100)
        font.setupNameTable({"familyName": "Test Han", "styleName": "Regular"})
        font.setupOS2(usWeightClass=400)
        font.setupPost()
        font.save(path)
        font_manager.fontManager.addfont(path)
        reset()

    reset()
    yield install
    reset()


def drawings(name) -> list[np.ndarray]:
    """A class name in everything that draws boxes."""
    image, box = np.zeros((300, 300, 3), np.uint8), [20.0, 60.0, 200.0, 200.0]
    found = SimpleNamespace(
        class_names=[name],
        labels=np.array([3]),
        scores=np.array([0.5]),
        boxes_xyxy_px=np.array([box]),
        masks=None,
    )
    record = {"annotations": [{"bbox": box, "bbox_mode": 0, "category_id": 0}]}
    return [draw_found(image, found), draw_record(image, record, [name])]


LITERAL = ["$", "$$", "a$x_{$", "$\\frac{$", "$x_{", r"\$", "<b>&amp;", "_x", "%", "^"]


@pytest.mark.parametrize("name", LITERAL)
def test_names_are_drawn_literally(name):
    drawings(name)
    boxes = np.array([[20.0, 60, 200, 200]])
    image = np.zeros((300, 300, 3), np.uint8)
    draw_boxes(image, boxes, [name], ["red"])
    draw_styled(image, boxes, captions=[name], colors=["red"], line_styles=["-"])


def test_two_dollars_are_drawn_as_two_dollars():
    """Not as the formula between them: "$xx$" is as wide as "SxxS", not as "xx"."""
    image = np.zeros((300, 300, 3), np.uint8)

    def width(text):
        drawn = draw_boxes(image, [[0, 100, 20, 120]], [text], ["red"])
        return (drawn.max(2) > 100).any(0).nonzero()[0].max()

    assert width("$xxxx$") > width("xxxx") + 3


def test_names_are_drawn_in_a_font_that_has_their_letters(fonts, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    fonts(tmp_path / "han.ttf", [CAT])
    assert plot_text.class_label(f"a{CAT}", 0) == f"a{CAT}" and not caplog.records
    assert plot_text.families([f"a{CAT}"])[-1] == "Test Han"
    assert plot_text.families(["plain"]) == ["sans-serif"]
    drawings(CAT)  # a missing glyph would be a warning, which is an error in tests


def test_names_that_no_font_has_are_drawn_as_numbers_said_once(fonts, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    fonts(tmp_path / "han.ttf", [CAT])
    for _ in range(2):
        assert plot_text.class_label(DOG, 3) == "class 3"
        assert plot_text.class_label(CAT + DOG, 4) == "class 4"
    (told,) = [r.message for r in caplog.records]
    assert "'\u72ac'" in told and "'class 3'" in told and "install a font" in told
    found, _ = drawings(DOG)
    assert (found == drawings("class 3")[0]).all()
    assert (found != drawings("class 4")[0]).any()


@pytest.mark.usefixtures("fonts")
def test_invisible_characters_need_no_font():
    assert plot_text.class_label("a\u200b b\u200d", 1) == "a\u200b b\u200d"


NAMES = ["a$x$", "<script>$", f"{CAT}", "_hidden"]


@pytest.mark.usefixtures("fonts")
def test_the_report_shows_any_names(dataset, tmp_path):  # noqa: F811
    coco = ground_truth([(1, k, 20 + 40 * k, 20, 30, 30, 0) for k in range(3)])
    for category, name in zip(coco.dataset["categories"], NAMES, strict=False):
        category["name"] = name
    coco.createIndex()
    evaluator = Evaluator(dataset(coco), output_dir=str(tmp_path), writes_report=True)
    metrics_of(evaluator, {1: ([[20, 20, 50, 50], [60, 20, 90, 50]], [0.9, 0.8], [0, 2])})
    folder = tmp_path / "report_pets"
    page = (folder / "report.html").read_text()
    assert "&lt;script&gt;$" in page and "<script>" not in page and CAT in page
    assert "a$x$" in json.loads((folder / "report.json").read_text())["classes"]
    for picture in ("curves.png", "confusion.png"):
        assert Image.open(folder / picture).width > 200


def test_several_test_sets_have_folders_and_panels_of_their_own(run, tmp_path, tiny_data):
    entries = ast.literal_eval(tiny_data[1])
    copy = ["tiny_again", *entries[0][1:]]
    run(
        *("DATASETS.COCO_FORMAT", str([*entries, copy]), "TEST.REPORT", True),
        *("DATASETS.TEST", "('tiny_val', 'tiny_again')"),
    )
    forget("tiny_again")
    for name, num_images in (("tiny_val", 4), ("tiny_again", 10)):
        folder = tmp_path / "run/inference" / name
        results = json.loads((folder / "coco_instances_results.json").read_text())
        assert len({result["image_id"] for result in results}) == num_images
        report = json.loads((folder / f"report_{name}/report.json").read_text())
        assert report["num_images"] == num_images
    entries = curves.read_metrics(tmp_path / "run")
    assert curves.test_sets(entries) == ["tiny_again/", "tiny_val/"]
    figure = curves.draw({"$run$": entries})
    titles = {axes.get_title(): len(axes.lines) for axes in figure.axes}
    assert titles == {"training losses": 3, "validation tiny_val": 2, "validation tiny_again": 2}


@pytest.mark.parametrize("prefix", ["", "a/", "ema/"])
def test_one_test_set_keeps_its_panel(prefix):
    entries = {9: {"iteration": 9, "bbox/AP": 1.0, f"{prefix}bbox/AP": 2.0}}
    expected = ["", "a/"] if prefix == "a/" else [""]
    assert curves.test_sets(entries) == expected
