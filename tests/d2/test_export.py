"""Exported graphs give what the model gives, at batches and sizes that were not traced.

Two pages run by default; `-m slow` runs the others in all formats (minutes), and with -s prints the
table of docs/export.md.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from dn_detr.d2 import export
from dn_detr.d2.config import read_config
from dn_detr.errors import InputError
from dn_detr.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript")))

needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxruntime or onnxscript is missing")

BY_DEFAULT = {("detr", "torch-export")}
"""ONNX by default: the runner's test."""

WITH_MASKS = {"mask2former", "mask_dino"}

CASES = [
    pytest.param(
        method,
        kind,
        marks=[
            *([] if (method, kind) in BY_DEFAULT else [pytest.mark.slow]),
            *([needs_onnx] if kind == "onnx" else []),
        ],
    )
    for method in METHODS
    if method not in ("mask2former", "mask_dino")  # refused, see test_masks.py
    for kind in export.FORMATS
]

SMALL = """
    MODEL.DEVICE cpu  MODEL.BACKBONE.NAME build_strided_convolutions  MODEL.DN_DETR.NUM_CLASSES 3
    MODEL.DN_DETR.CHANNELS 16  MODEL.DN_DETR.NUM_HEADS 2  MODEL.DN_DETR.NUM_QUERIES 9
    MODEL.DN_DETR.FEED_FORWARD_DIM 16  MODEL.DN_DETR.ENCODER_LAYERS 1
    MODEL.DN_DETR.DECODER_LAYERS 2  TEST.DETECTIONS_PER_IMAGE 12
    INPUT.MIN_SIZE_TEST 96  INPUT.MAX_SIZE_TEST 160
""".split()


class StridedConvolutions(Backbone):
    """The smallest backbone with three features: exporting graphs takes time for each layer."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inside, 8, kernel_size=stride, stride=stride)
            for inside, stride in ((3, 8), (8, 2), (8, 2))
        )

    def forward(self, x):
        features = {}
        for name, convolution in zip(("res3", "res4", "res5"), self.convolutions, strict=True):
            x = features[name] = convolution(x).relu()
        return features

    def output_shape(self):
        names = zip(("res3", "res4", "res5"), (8, 16, 32), strict=True)
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in names}


if "build_strided_convolutions" not in BACKBONE_REGISTRY:

    @BACKBONE_REGISTRY.register()
    def build_strided_convolutions(cfg, input_shape):
        return StridedConvolutions()


def small_model(method: str):
    """The page with random weights everywhere: zero-initialised heads would hide differences."""
    cfg = read_config(str(ROOT / "configs" / "quick" / f"{method}.yaml"), SMALL)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model, cfg


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method, kind", CASES)
def test_an_exported_page_finds_what_the_model_finds(method, kind, tmp_path):
    model, cfg = small_model(method)
    about = export.metadata(cfg, ["a", "b", "c"])
    path = tmp_path / f"model{export.FORMATS[kind]}"
    differences = export.export(model, path, kind, about)
    worst = [f"{max(d.scores, d.boxes):.1e} ({d.num_compared})" for d in differences]
    print(f"\n| {method} | {kind} | {' | '.join(worst)} |")
    for difference in differences:
        assert difference.num_compared >= 5
        assert max(difference.scores, difference.boxes) < 1e-4
    assert list(tmp_path.iterdir()) == [path]


def test_detectors_of_masks_are_refused(tmp_path):
    model = SimpleNamespace(has_masks=True)
    with pytest.raises(InputError, match="a detector of masks cannot be exported"):
        export.export(model, tmp_path / "model.onnx", "onnx", {})


# ----------------------------------------------------------------------------------- the comparison


@pytest.fixture(scope="module")
def model():
    return small_model("detr")[0]


@torch.no_grad()
def changed(model, change):
    """A function like an exported graph, whose outputs are changed."""
    return lambda *inputs: change(*export.Detect(model)(*inputs))


def test_a_model_agrees_with_itself(model):
    exact = changed(model, lambda *outputs: outputs)
    assert all(d.scores == d.boxes == 0 for d in export.check(model, exact))


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda boxes, scores, labels: (boxes, scores + 0.01, labels), "scores by 1.0e-02"),
        (lambda boxes, scores, labels: (boxes + 0.002, scores, labels), "boxes by 2.0e-03"),
        (lambda boxes, scores, labels: (boxes, scores, labels + 1), "boxes by inf"),
        (lambda boxes, scores, labels: (boxes * torch.nan, scores, labels), "boxes by nan"),
    ],
    ids=["scores", "boxes", "labels", "not a number"],
)
def test_what_differs_is_refused(model, change, what):
    with pytest.raises(InputError, match=f"differs from the model on 1 images.*{what}"):
        export.check(model, changed(model, change))


def test_detections_of_equal_score_may_come_in_any_order(model, monkeypatch):
    boxes = torch.rand(1, 4, 4)
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
    labels = torch.tensor([[0, 1, 1, 2]])
    monkeypatch.setattr(export.Detect, "forward", lambda self, *inputs: (boxes, scores, labels))
    order = [0, 2, 1, 3]
    swapped = lambda *inputs: (boxes[:, order], scores, labels)  # noqa: E731
    assert export.compare(model, swapped, ()) == export.Difference(0.0, 0.0, 3)


@torch.no_grad()
def test_what_stands_beside_an_image_changes_nothing(model):
    images, sizes = export.example(2, 128, 160)
    scribbled = images.clone()
    height, width = sizes[1].tolist()
    scribbled[1, :, height:], scribbled[1, :, :, width:] = torch.nan, 1e9
    detect = export.Detect(model)
    for got, wanted in zip(detect(scribbled, sizes), detect(images, sizes), strict=True):
        assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------------- the programs


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_the_runner_finds_what_the_model_finds_without_this_project(tmp_path):
    """DINO has it all: deformable attention, proposals, empty slots. On an image of a size that needs
    no padding, after resizing."""
    import onnx
    from PIL import Image

    model, cfg = small_model("dino")
    export.export(model, tmp_path / "model.onnx", "onnx", export.metadata(cfg, ["a", "b", "c"]))
    pixels = torch.randint(256, (96, 128, 3), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert {node.domain for node in nodes} == {""}  # operators of the standard
    assert "CastLike" not in {node.op_type for node in nodes}  # not every runtime has it
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'dn_detr', 'detectron2']));"
    script = ROOT / "tools" / "run_exported.py"
    code = f"{blocked} import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    arguments = ["model.onnx", "picture.png", "--output", "drawn", "--confidence-threshold", "0"]
    printed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Image.open(tmp_path / "drawn" / "picture.png").size == (128, 96)
    with torch.no_grad():
        found = model([{"image": pixels.permute(2, 0, 1)}])[0]["instances"]
    lines = printed.splitlines()
    assert lines[0] == f"picture.png: {len(found)} found"
    for line, score, label, box in zip(
        lines[1:], found.scores, found.pred_classes, found.pred_boxes.tensor, strict=True
    ):
        name, their_score, _, *sides = line.split()
        assert name == "abc"[label] and abs(float(their_score) - score) < 0.006
        assert torch.allclose(torch.tensor([float(s) for s in sides]), box, atol=0.06)


@pytest.fixture(scope="module")
def runner():
    """tools/run_exported.py as a module."""
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("runner", ROOT / "tools" / "run_exported.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ABOUT = {
    "channel_order": "RGB",
    "shorter_side": 80,
    "longest_side": 133,
    "side_step": 32,
    "smallest_side": 96,
}


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (500, 200), (33, 34), (81, 79), (133, 81)]
)
def test_the_runner_resizes_as_detectron2_does(runner, size):
    width, height = size
    wanted = ResizeShortestEdge.get_output_shape(height, width, 80, 133)
    assert runner.new_size(width, height, ABOUT) == wanted[::-1]


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_runner_puts_an_image_at_the_top_left_of_its_canvas(runner, order):
    from PIL import Image

    image = Image.new("RGB", (80, 80), (10, 20, 30))
    canvas, sizes = runner.prepare(image, {**ABOUT, "channel_order": order})
    assert canvas.shape == (1, 3, 96, 96) and sizes.tolist() == [[80, 80]]
    values = [10, 20, 30] if order == "RGB" else [30, 20, 10]
    assert (canvas[0, :, :80, :80] == torch.tensor(values).view(3, 1, 1).numpy()).all()
    assert (canvas[0, :, 80:] == 0).all() and (canvas[0, :, :, 80:] == 0).all()


def test_metadata_say_how_to_feed_the_model():
    cfg = small_model("detr")[1]
    about = json.loads(json.dumps(export.metadata(cfg, ["a", "b"])))
    assert about["class_names"] == ["a", "b"] and about["channel_order"] == "RGB"
    assert about["pixel_mean"] == [123.675, 116.280, 103.530]
    assert (about["shorter_side"], about["longest_side"]) == (96, 160)
