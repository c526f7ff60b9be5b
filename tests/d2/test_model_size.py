"""Counts of the analysis against hand computations and against models that are really built."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from detectron2.modeling import build_model

from dn_detr.cli.main import main
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.modeling import model_size
from dn_detr.ops import pytorch_operators

ROOT = Path(__file__).resolve().parents[2]
QUICK = str(ROOT / "configs" / "quick" / "dn_deformable.yaml")
tool = vars(model_size)


@pytest.fixture(scope="module")
def model():
    return tool["build"](QUICK)


def test_parameters_are_those_of_the_model(model):
    cfg = read_config(QUICK, ["MODEL.DEVICE", "cpu", "MODEL.DN_DETR.NUM_CLASSES", 80])
    real = build_model(cfg)
    total, trained = tool["parameters"](model)
    assert total == sum(p.numel() for p in real.parameters()) / 1e6
    assert trained == sum(p.numel() for p in real.parameters() if p.requires_grad) / 1e6


def test_the_count_does_not_depend_on_which_operators_are_compiled(model):
    with pytorch_operators():
        plain = tool["infer"](model, 64, 96)
    compiled = tool["infer"](model, 64, 96)
    assert plain.gflops == compiled.gflops and plain.activations == compiled.activations


def test_deformable_attention_counts_five_operations_for_each_sampled_channel():
    # 2 images, 7 queries, 4 heads of 8 channels, 3 levels of 5 points.
    value, logits = (2, 100, 4, 8), (2, 7, 4, 15)
    one = tool["count_deformable"](value, None, None, None, None, logits)
    assert one == 2 * (2 * 7 * 4 * 15) * 8 * 5
    assert tool["count_sampling"](value, None, None, (2, 7, 4, 3, 5)) == one
    assert 3 * tool["count_grid_sample"](out_shape=(2 * 4, 8, 7, 5)) == one


def test_the_neck_costs_what_its_convolutions_cost(model):
    """1x1 convolutions of 64, 128 and 256 channels, and one of 3x3, to 96 channels."""
    parts = {part.name: part for part in tool["infer"](model, 128, 192).parts}
    assert list(parts) == ["backbone", "neck", "flatten", "encoder", "queries", "decoder"]
    assert "res3 1x64x16x24; res4 1x128x8x12; res5 1x256x4x6" in parts["backbone"].outputs
    cells = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    widths = [64, 128, 256, 9 * 256]
    operations = sum(n * width * 96 for n, width in zip(cells, widths, strict=True))
    assert parts["neck"].gflops == pytest.approx(operations / 1e9)
    assert parts["neck"].activations == pytest.approx(sum(cells) * 96 / 1e6)
    assert f"tokens 1x{sum(cells)}x96" in parts["encoder"].outputs


def test_faster_rcnn_is_counted_with_the_proposals_that_it_keeps():
    """100 regions of 64 channels and 7 x 7 cells, 256 wide, 81 logits and 80 boxes; the image is
    padded to 128 x 192."""
    model = tool["build"](str(ROOT / "configs" / "quick" / "dn_faster_rcnn_fpn.yaml"))
    parts = {part.name: part for part in tool["infer"](model, 100, 170).parts}
    assert list(parts) == ["backbone", "proposals", "regions"]
    operations = 100 * (64 * 7 * 7 * 256 + 256 * 256 + 256 * (81 + 320))
    assert parts["regions"].gflops == pytest.approx(operations / 1e9)
    assert "p2 1x64x32x48" in parts["backbone"].outputs


def test_the_average_is_over_the_sizes_of_the_images(model, tmp_path):
    images = [
        {"id": 3, "height": 9, "width": 9},
        {"id": 1, "height": 400, "width": 600},
        {"id": 2, "height": 300, "width": 900},
    ]
    images = [{**image, "file_name": "a.jpg"} for image in images]
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "some.json").write_text(json.dumps(content))
    sizes = tool["test_sizes"](str(tmp_path / "some.json"), 2)
    assert dict(sizes) == {(800, 1200): 1, (444, 1333): 1}
    small = tool["Counter"]({(64, 96): 1, (64, 128): 3})
    one, other = (tool["infer"](model, *size).gflops for size in small)
    assert tool["mean"](model, small).gflops == pytest.approx((one + 3 * other) / 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["configs/no.yaml"], "configs/no.yaml"),
        (
            [QUICK, "--annotations", "no.json"],
            "there is no annotation file no.json",
        ),
    ],
)
def test_files_that_do_not_exist_are_named_in_one_sentence(arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(["info", *arguments])
    assert caught.value.code.startswith("dn-detr info: ") and words in caught.value.code


def test_a_quick_configuration_is_not_taken_for_the_published_one(capsys, monkeypatch):
    monkeypatch.setitem(tool["PUBLISHED"], "dn_deformable", (48, 195))
    main(["info", "quick/dn_deformable", str(ROOT / "configs" / "quick" / "dino.yaml")])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0].startswith("| quick/dn_deformable |") and rows[0].endswith("|  |")
    assert rows[1].startswith("| quick/dino |")


def test_only_known_configurations_are_trained_side_by_side(monkeypatch, capsys):
    program = runpy.run_path(str(ROOT / "tools" / "train_all_quick.py"))
    monkeypatch.setattr(sys, "argv", ["train_all_quick.py", "--only", "dino", "nonsense"])
    with pytest.raises(SystemExit):
        program["main"]()
    assert "there is no nonsense, only [" in capsys.readouterr().err


def test_backbones_are_counted_alone_and_refused_ones_have_a_row():
    """Of torchvision's MobileNetV2: 2.22 M parameters before the classifier (1801.04381: 3.4 - 1.28
    with 1000 classes), and its counts grow with the area.
    """
    row = tool["backbone_row"]("torchvision/mobilenet_v2", [(224, 224), (448, 448)])
    name, features, millions, small, large = row.strip("| ").split(" | ")
    assert name == "`torchvision/mobilenet_v2`" and features.endswith("res5 1280")
    assert millions == "2.2" and small == "0.3" and large == "1.2"
    row = tool["backbone_row"]("torchvision/squeezenet1_1", [(224, 224)])
    assert row.count("|") == 5 and "refused: torchvision/squeezenet1_1 has no features" in row
