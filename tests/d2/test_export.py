"""Exported graphs give what the model gives, at batches and sizes that were not traced.

Few methods run by default; `-m slow` runs the others in all formats (minutes), and -s prints the
table of docs/export.md.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from tiny import read_by
from torch import nn
from torch.nn import functional as F

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.export import exporter, graphs
from dn_detr.errors import InputError
from dn_detr.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript")))

needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxruntime or onnxscript is missing")

BY_DEFAULT = {("detr", "torch-export")}
"""ONNX by default: the runner's test."""

NAMES = [*METHODS, "faster_rcnn_fpn"]

CASES = [
    pytest.param(
        method,
        kind,
        marks=[
            *([] if (method, kind) in BY_DEFAULT else [pytest.mark.slow]),
            *([needs_onnx] if kind == "onnx" else []),
        ],
    )
    for method in NAMES
    for kind in exporter.FORMATS
    if (method, kind) != ("faster_rcnn_fpn", "torch-export")  # refused
]

SMALL = """
    MODEL.DEVICE cpu  MODEL.BACKBONE.NAME build_strided_convolutions  MODEL.DN_DETR.NUM_CLASSES 3
    MODEL.DN_DETR.CHANNELS 16  MODEL.DN_DETR.NUM_HEADS 2  MODEL.DN_DETR.NUM_QUERIES 9
    MODEL.DN_DETR.FEED_FORWARD_DIM 16  MODEL.DN_DETR.ENCODER_LAYERS 1
    MODEL.DN_DETR.DECODER_LAYERS 2  TEST.DETECTIONS_PER_IMAGE 12
    INPUT.MIN_SIZE_TEST 96  INPUT.MAX_SIZE_TEST 160
""".split()


SMALL_REGIONS = """
    MODEL.BACKBONE.NAME build_strided_pyramid  MODEL.FPN.OUT_CHANNELS 8
    MODEL.ROI_BOX_HEAD.FC_DIM 16  MODEL.RPN.PRE_NMS_TOPK_TEST 100  MODEL.RPN.POST_NMS_TOPK_TEST 30
    INPUT.MIN_SIZE_TEST 128
""".split()


class StridedConvolutions(Backbone):
    """The smallest backbone with three or four features: exporting takes time for each layer."""

    def __init__(self, strides: dict[str, int]):
        super().__init__()
        self.strides = strides
        coarser = [1, *strides.values()]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(8 if fine > 1 else 3, 8, kernel_size=coarse // fine, stride=coarse // fine)
            for fine, coarse in zip(coarser, strides.values(), strict=False)
        )

    def forward(self, x):
        features = {}
        for name, convolution in zip(self.strides, self.convolutions, strict=True):
            x = features[name] = convolution(x).relu()
        return features

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in self.strides.items()}


if "build_strided_convolutions" not in BACKBONE_REGISTRY:

    @BACKBONE_REGISTRY.register()
    def build_strided_convolutions(cfg, _input_shape):
        strides = {"res2": 4} if cfg.MODEL.MASK_ON else {}
        return StridedConvolutions({**strides, "res3": 8, "res4": 16, "res5": 32})

    @BACKBONE_REGISTRY.register()
    def build_strided_pyramid(cfg, _input_shape):
        strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
        channels = cfg.MODEL.FPN.OUT_CHANNELS
        return FPN(
            StridedConvolutions(strides), list(strides), channels, top_block=LastLevelMaxPool()
        )


def small_model(method: str, *opts):
    """The method with random weights everywhere: zero-initialised heads would hide differences."""
    regions = SMALL_REGIONS if "rcnn" in method else []
    config_file = str(ROOT / "configs" / "quick" / f"{method}.yaml")
    cfg = read_config(config_file, [*read_by(config_file, SMALL, opts), *regions, *opts])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model, cfg


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method, kind", CASES)
def test_an_exported_method_finds_what_the_model_finds(method, kind, tmp_path):
    model, cfg = small_model(method)
    about = exporter.metadata(cfg, ["a", "b", "c"], model)
    path = tmp_path / f"model{exporter.FORMATS[kind]}"
    differences = exporter.export(model, path, kind, about)
    worst = [f"{d.worst:.1e} ({d.num_compared})" for d in differences]
    print(f"\n| {method} | {kind} | {' | '.join(worst)} |")
    for difference in differences:
        assert difference.num_compared >= 5
        assert difference.worst < 1e-4
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------- the graph


@torch.no_grad()
@pytest.mark.parametrize("method", ["detr", "mask2former", "mask_dino"])
def test_the_graph_of_a_method_is_its_inference(method):
    """Two images of one canvas, one of them smaller; masks enlarged as docs/export.md says."""
    model, _ = small_model(method)
    images, sizes = exporter.example(2, 128, 160)
    boxes, scores, labels, *masks = graphs.graph_of(model)(images, sizes)
    samples = [
        {"image": image[:, :height, :width]}
        for image, (height, width) in zip(images, sizes.tolist(), strict=True)
    ]
    for index, answer in enumerate(model(samples)):
        found = answer["instances"]
        height, width = found.image_size
        assert torch.equal(labels[index], found.pred_classes)
        torch.testing.assert_close(scores[index], found.scores)
        pixels = boxes[index] * torch.tensor([width, height, width, height])
        torch.testing.assert_close(pixels, found.pred_boxes.tensor, atol=1e-3, rtol=0)
        assert len(masks) == found.has("pred_masks")
        for logits in masks:
            assert logits.shape == (2, 12, 32, 40)
            fine = F.interpolate(logits, (128, 160), mode="bilinear")[index, :, :height, :width]
            is_sure = fine.abs() > 1e-4
            assert torch.equal((fine > 0)[is_sure], found.pred_masks[is_sure])
            assert found.pred_masks.any() and not found.pred_masks.all()


REGIONS = {
    "as configured": (),
    "sigmoid": ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
    "few detections": ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.7),
    "small regions left out": ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 12),
}


@torch.no_grad()
@pytest.mark.parametrize("options", REGIONS.values(), ids=REGIONS)
def test_the_graph_of_faster_rcnn_finds_what_detectron2_finds(options):
    """On the smallest canvas too, whose coarsest level has fewer anchors than are asked for."""
    model, _ = small_model("faster_rcnn_fpn", *options)
    for size in ((3, 128, 192), (1, 64, 64)):
        difference = exporter.compare(model, graphs.graph_of(model), exporter.example(*size))
        assert difference.worst < 1e-5 and difference.num_compared >= 1


@torch.no_grad()
def test_the_graph_of_faster_rcnn_gives_zeros_where_nothing_is_found():
    model, _ = small_model("faster_rcnn_fpn", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    boxes, scores, labels = graphs.graph_of(model)(*exporter.example(2, 64, 128))
    assert boxes.shape == (2, 12, 4) and labels.shape == (2, 12)
    assert not (boxes.any() or scores.any() or labels.any())


def test_a_faster_rcnn_has_one_format(tmp_path):
    model, _ = small_model("faster_rcnn_fpn")
    with pytest.raises(InputError, match="cannot be exported to torch-export.*use --format onnx"):
        exporter.export(model, tmp_path / "model.pt2", "torch-export", {})


def test_a_faster_rcnn_with_masks_is_refused():
    model, _ = small_model("faster_rcnn_fpn")
    model.roi_heads.mask_on = True
    with pytest.raises(InputError, match="with masks or keypoints cannot be exported"):
        graphs.graph_of(model)


# ----------------------------------------------------------------------------------- the comparison


@pytest.fixture(scope="module")
def model():
    return small_model("detr")[0]


@torch.no_grad()
def changed(model, change):
    """A function like an exported graph, whose outputs are changed."""
    return lambda *inputs: change(*graphs.graph_of(model)(*inputs))


def test_a_model_agrees_with_itself(model):
    exact = changed(model, lambda *outputs: outputs)
    assert all(d.scores == d.boxes == 0 and d.masks is None for d in exporter.check(model, exact))


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda boxes, scores, labels: (boxes, scores + 0.01, labels), "at most 1.0e-02"),
        (lambda boxes, scores, labels: (boxes + 0.002, scores, labels), "boxes by 2.0e-03"),
        (lambda boxes, scores, labels: (boxes, scores, labels + 1), "boxes by inf"),
        (lambda boxes, scores, labels: (boxes * torch.nan, scores, labels), "boxes by nan"),
    ],
    ids=["scores", "boxes", "labels", "not a number"],
)
def test_what_differs_is_refused(model, change, what):
    with pytest.raises(InputError, match=f"is not kept: 1 x 192x96: scores differ.*{what}"):
        exporter.check(model, changed(model, change))


def test_masks_that_differ_are_refused():
    model, _ = small_model("mask2former")
    fainter = changed(model, lambda *outputs: (*outputs[:3], outputs[3] - 0.5))
    with pytest.raises(InputError, match="scores differ by at most 0.0e.*masks by 1.2e-01, over"):
        exporter.check(model, fainter)  # sigmoid falls by up to tanh(0.5 / 4) = 0.124


def test_detections_of_equal_score_may_come_in_any_order(model, monkeypatch):
    boxes = torch.rand(1, 4, 4)
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
    labels = torch.tensor([[0, 1, 1, 2]])
    monkeypatch.setattr(exporter, "detections_of", lambda *_: (boxes, scores, labels))
    order = [0, 2, 1, 3]
    swapped = lambda *_inputs: (boxes[:, order], scores, labels)  # noqa: E731
    inputs = (torch.zeros(1, 3, 32, 64), None)
    wanted = exporter.Difference((1, 32, 64), 0.0, 0.0, None, 3)
    assert exporter.compare(model, swapped, inputs) == wanted


def test_a_mask_is_compared_with_that_of_the_nearest_box(monkeypatch):
    """Of two detections of equal score and label in another order, with one and the same box."""
    boxes = torch.rand(1, 1, 4).expand(1, 3, 4)
    scores, labels = torch.tensor([[0.5, 0.5, 0.1]]), torch.zeros(1, 3, dtype=torch.int64)
    masks = torch.randn(1, 3, 2, 2)
    monkeypatch.setattr(exporter, "detections_of", lambda *_: (boxes, scores, labels, masks))
    swapped = lambda *_inputs: (boxes, scores, labels, masks[:, [1, 0, 2]])  # noqa: E731
    inputs = (torch.zeros(1, 3, 32, 64), None)
    wanted = exporter.Difference((1, 32, 64), 0.0, 0.0, 0.0, 2)
    assert exporter.compare(None, swapped, inputs) == wanted


@torch.no_grad()
def test_what_stands_beside_an_image_changes_nothing(model):
    images, sizes = exporter.example(2, 128, 160)
    scribbled = images.clone()
    height, width = sizes[1].tolist()
    scribbled[1, :, height:], scribbled[1, :, :, width:] = torch.nan, 1e9
    detect = graphs.graph_of(model)
    for got, wanted in zip(detect(scribbled, sizes), detect(images, sizes), strict=True):
        assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------------- the programs


@pytest.fixture(scope="module")
def runner():
    """tools/run_exported.py as a module."""
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("runner", ROOT / "tools" / "run_exported.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method",
    [
        "dino",  # has it all: deformable attention, proposals, empty slots
        pytest.param("mask2former", marks=pytest.mark.slow),
        pytest.param("faster_rcnn_fpn", marks=pytest.mark.slow),
    ],
)
def test_the_runner_finds_what_the_model_finds_without_torch(method, runner, tmp_path):
    """On an image of a size that needs no padding, after resizing."""
    import onnx
    import onnxruntime
    from PIL import Image

    model, cfg = small_model(method)
    about = exporter.metadata(cfg, ["a", "b", "c"], model)
    exporter.export(model, tmp_path / "model.onnx", "onnx", about)
    size = (cfg.INPUT.MIN_SIZE_TEST, 128)
    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert {node.domain for node in nodes} == {""}  # operators of the standard
    assert "CastLike" not in {node.op_type for node in nodes}  # not every runtime has it
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'dn_detr.d2', 'detectron2']));"
    )
    script = ROOT / "tools" / "run_exported.py"
    code = f"{blocked} import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    arguments = ["model.onnx", "picture.png", "--output", "drawn", "--confidence-threshold", "0"]
    printed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Image.open(tmp_path / "drawn" / "picture.png").size == size[::-1]
    with torch.no_grad():
        found = model([{"image": pixels.permute(2, 0, 1)}])[0]["instances"]
    lines = printed.splitlines()
    assert lines[0] == f"picture.png: {len(found)} found" and len(found) > 0
    for line, score, label, box in zip(
        lines[1:], found.scores, found.pred_classes, found.pred_boxes.tensor, strict=True
    ):
        name, their_score, _, *sides = line.split()
        assert name == "abc"[label] and abs(float(their_score) - score) < 0.006
        assert torch.allclose(torch.tensor([float(s) for s in sides]), box, atol=0.06)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    again = runner.detect(session, about, Image.open(tmp_path / "picture.png"), 0)
    for index, detection in enumerate(again):
        if method != "mask2former":
            assert detection.mask is None
        else:
            wanted = found.pred_masks[index].numpy()
            assert (detection.mask != wanted).mean() < 0.001


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


@pytest.mark.parametrize("wanted, share", [((90, 70), 1e-9), ((213, 151), 0.01)])
def test_the_runner_enlarges_masks_as_the_model_does(runner, wanted, share):
    """An image of 90 x 70 on a canvas of 128 x 96, in its own size to the pixel; in another, the
    model interpolates twice."""
    logits = torch.randn(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(logits, (96, 128), mode="bilinear")[..., :70, :90]
    expected = F.interpolate(fine, wanted[::-1], mode="bilinear")[0, 0] > 0
    mask = runner.enlarge(logits[0, 0].numpy(), [70, 90], (96, 128), wanted)
    assert mask.shape == wanted[::-1]
    assert (mask != expected.numpy()).mean() <= share


def test_the_runner_draws_masks_in_the_colour_of_their_class(runner):
    from PIL import Image

    mask = np.zeros((90, 90), bool)
    mask[40:80, 40:80] = True
    found = [runner.Found("b", 0.9, [10, 10, 85, 85], mask)]
    drawn = np.asarray(runner.draw(Image.new("RGB", (90, 90)), found, ["a", "b"])).astype(int)
    assert drawn[60, 30].max() == 0 and drawn[60, 60].max() > 80
    assert abs(drawn[60, 60] - drawn[60, 10] * 110 / 255).max() <= 1  # as the box, but fainter


def test_the_runner_leaves_out_places_without_a_detection(runner):
    """Of Faster R-CNN, which finds fewer objects in some images: their score is 0."""
    from PIL import Image

    class Session:
        def run(self, _names, _feed):
            boxes = np.zeros((1, 2, 4), np.float32)
            return boxes, np.array([[0.5, 0]], np.float32), np.array([[1, 0]])

    about = {**ABOUT, "class_names": ["a", "b"]}
    (found,) = runner.detect(Session(), about, Image.new("RGB", (96, 96)), threshold=0)
    assert found.name == "b" and found.score == 0.5 and found.mask is None


def test_metadata_say_how_to_feed_the_model():
    model, cfg = small_model("detr")
    about = json.loads(json.dumps(exporter.metadata(cfg, ["a", "b"], model)))
    assert about["class_names"] == ["a", "b"] and about["channel_order"] == "RGB"
    assert about["pixel_mean"] == [123.675, 116.280, 103.530]
    assert (about["shorter_side"], about["longest_side"]) == (96, 160)
    assert about["side_step"] == 32 and about["masks"] is None


@pytest.mark.parametrize(
    "method, side_step, masks", [("mask_dino", 32, True), ("faster_rcnn_fpn", 64, False)]
)
def test_metadata_say_what_differs_from_method_to_page(method, side_step, masks):
    model, cfg = small_model(method)
    about = exporter.metadata(cfg, ["a", "b", "c"], model)
    assert about["side_step"] == side_step and about["method"] == method.removesuffix("_fpn")
    assert (about["masks"] == exporter.MASKS) if masks else (about["masks"] is None)
