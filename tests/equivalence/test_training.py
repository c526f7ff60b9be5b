"""Twenty optimizer steps beside the authors' code, in float64 on both sides.

Theirs: their parser with the published command line, their builders, the statements of their main()
that make the optimizer, and their training loop. Ours: the published configuration,
`DenoisingDETR`, `build_optimizer` and `TrainStep`. Both have the same weights, through the
converter, and the same batches; there is no dropout and no noise.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import check, compare_gradients, converted, under_their_names
from multiscale import use_fallback
from peers import NUM_POINTS, difference, randomize
from torch.nn.functional import interpolate

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from official import (
    Official,
    TinyBackbone,
    detectron2_like,
    detr_like,
    parse,
    with_config,
)

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.modeling import meta_arch
from dn_detr.d2.solver.optimizer import build_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 20
BOUND = 1e-8
"""Rounding, and what 20 steps make of it. (Norms without their weight decay: 2e-7.)"""


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(_cfg, _input_shape):
    return TinyBackbone()


@dataclass
class Batch:
    """Images [3, h, w], boxes [n, 4] cxcywh in [0, 1], labels [n] and masks [n, h, w]."""

    images: list
    boxes: list
    labels: list
    masks: list

    def their_targets(self):
        return [
            {"boxes": boxes, "labels": labels, "size": torch.tensor(image.shape[1:])}
            for boxes, labels, image in zip(self.boxes, self.labels, self.images, strict=True)
        ]

    def samples(self):
        """Detectron2's."""
        found = []
        for index, image in enumerate(self.images):
            height, width = image.shape[1:]
            instances = Instances((height, width))
            x, y, w, h = self.boxes[index].unbind(1)
            corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=1)
            instances.gt_boxes = Boxes(corners * torch.tensor([width, height, width, height]))
            instances.gt_classes = self.labels[index]
            instances.gt_masks = BitMasks(self.masks[index])
            found.append({"image": image, "instances": instances, "height": height, "width": width})
        return found


def make_batch(key: int, sizes, counts, num_classes: int) -> Batch:
    """A batch that follows from `key`, with one object as large as its image."""
    generator = torch.Generator().manual_seed(key)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    boxes = [rand(n, 4) * 0.4 + torch.tensor([0.3, 0.3, 0.05, 0.05]) for n in counts]
    boxes[0][0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    labels = [torch.randint(num_classes, (n,), generator=generator) for n in counts]
    masks = [
        interpolate(rand(1, n, h // 16, w // 16), (h, w), mode="bilinear")[0] > 0.5
        for n, (h, w) in zip(counts, sizes, strict=True)
    ]
    return Batch([rand(3, *size) * 2 - 1 for size in sizes], boxes, labels, masks)


PADDED = ((96, 128), (64, 96))
FULL = ((96, 128), (96, 128))


@dataclass
class Case:
    """One method.

    Attributes:
        config: our configuration, which is also the row of the table.
        build: (load, monkeypatch) -> theirs.
        settings: keys of MODEL.DN_DETR that differ from the configuration.
        patterns: our segment -> their key, with {} for loss_ce and the like.
        calls: our segments in the order of their matcher's calls: the last layer, then the others.
    """

    config: str
    repository: str
    build: Callable[..., Official]
    settings: dict
    patterns: dict = field(default_factory=lambda: {"match": "{}"})
    calls: tuple = ("match",)
    sizes: tuple = PADDED
    num_classes: int = 91
    split: Callable = lambda state: (state, {})


def our_config(case: Case):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{case.config}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_tiny_backbone"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [1.0] * 3
    node = cfg.MODEL.DN_DETR
    settings = {"NUM_CLASSES": case.num_classes, "DROPOUT": 0.0, **case.settings}
    settings |= {"DENOISING.BOX_NOISE": 0.0, "DENOISING.LABEL_NOISE": 0.0}
    settings["AS_PUBLISHED"] = True
    for key, value in settings.items():
        *path, leaf = key.split(".")
        target = node
        for part in path:
            target = target[part]
        target[leaf] = value
    return cfg


class Ours:
    """Our detector and its training step."""

    def __init__(self, case: Case, batches: list[Batch], monkeypatch):
        cfg = our_config(case)
        self.method = cfg.MODEL.DN_DETR.METHOD
        self.model = build_model(cfg)
        self.assignments = {}

        def assign(predictions, targets, costs, **options):
            found = original(predictions, targets, costs, **options)
            self.assignments = found
            return found

        original = meta_arch.assign
        monkeypatch.setattr(meta_arch, "assign", assign)
        loader = itertools.cycle([batch.samples() for batch in batches])
        optimizer = build_optimizer(cfg, self.model)
        self.trainer = TrainStep(self.model, loader, optimizer, precision=None, seed=0)

    def step(self, iteration: int) -> dict[str, float]:
        self.trainer.iter = iteration
        with EventStorage(iteration) as storage:
            self.trainer.run_step()
        found = {name: value for name, (value, _) in storage.latest().items()}
        return {n: v for n, v in found.items() if n.startswith("loss_") and n not in SUMMARIES}


SUMMARIES = {f"loss_{s}" for s in ("match", "dn", "enc", "hybrid", "group")}


def pairs(queries, objects, count):
    """The matches of one image, sorted; objects beyond `count` are repetitions."""
    return sorted(zip(queries.tolist(), (objects % max(1, count)).tolist(), strict=True))


def compare_matches(case: Case, ours: Ours, theirs: Official, batch: Batch) -> str:
    """Where the assignments differ, or ""."""
    calls = []
    for name in case.calls:
        layers = len(ours.assignments[name.partition("+")[0]].object_of)
        calls += [(name, layer) for layer in (layers - 1, *range(layers - 1))]
    assert len(calls) == len(theirs.matched), (len(calls), len(theirs.matched))
    for (name, layer), found in zip(calls, theirs.matched, strict=True):
        parts = [ours.assignments[part].object_of[layer] for part in name.split("+")]
        object_of = torch.cat(parts, dim=1)
        for image, (queries, objects) in enumerate(found):
            count = len(batch.labels[image])
            own = (object_of[image] >= 0).nonzero()[:, 0]
            if pairs(own, object_of[image][own], count) != pairs(queries, objects, count):
                return f"{name}, layer {layer}, image {image}"
    return ""


NUMBERS = {"NUM_QUERIES": 11, "FEED_FORWARD_DIM": 64, "ENCODER_LAYERS": 2}
SMALL = "--dim_feedforward 64 --enc_layers 2 --dropout 0"
QUERIES = f"{SMALL} --num_queries 11"
DENSE = {**NUMBERS, "DECODER_LAYERS": 3}
ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only"


def dense(builder, command="", small=QUERIES, **loop):
    """A method with one feature level."""

    def build(load, monkeypatch):
        args = parse(load("main"), f"{small} --dec_layers 3 {command}")
        return detr_like(load, builder, args, ["res5"], monkeypatch, **loop)

    return build


def deformable(builder, ops, command="", small=QUERIES, **loop):
    """A method with several feature levels."""

    def build(load, monkeypatch):
        use_fallback(load, ops, monkeypatch)
        args = parse(load("main"), f"{small} {command}")
        stages = ["res3", "res4", "res5"]
        return detr_like(load, builder, args, stages, monkeypatch, **loop)

    return build


def dino(load, monkeypatch):
    use_fallback(load, "models.dino.ops", monkeypatch)
    args = with_config(
        parse(load("main"), "-c none"),
        load.path / "config" / "DINO" / "DINO_4scale.py",
        num_queries=11,
        dim_feedforward=64,
        enc_layers=2,
        dn_box_noise_scale=0.0,
        dn_label_noise_ratio=0.0,
    )
    stages = ["res3", "res4", "res5"]
    return detr_like(load, "models.dino.dino:build_dino", args, stages, monkeypatch)


MASKS = {
    "NUM_QUERIES": 11,
    "FEED_FORWARD_DIM": 64,
    "ENCODER_LAYERS": 2,
    "DECODER_LAYERS": 3,
    "LOSS.MASK_POINTS": NUM_POINTS,
}


def mask2former(load, monkeypatch):
    use_fallback(load, "mask2former.modeling.pixel_decoder.ops", monkeypatch)
    changes = {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 11,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
        "MODEL.MASK_FORMER.DEC_LAYERS": 4,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": NUM_POINTS,
    }
    path = load.path / "configs/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
    return detectron2_like(load, path, "mask2former:add_maskformer2_config", changes)


def mask_dino(load, monkeypatch):
    use_fallback(load, "maskdino.modeling.pixel_decoder.ops", monkeypatch)
    changes = {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
        "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 64,
        "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 11,
        "MODEL.MaskDINO.DIM_FEEDFORWARD": 64,
        "MODEL.MaskDINO.DEC_LAYERS": 3,
        "MODEL.MaskDINO.TRAIN_NUM_POINTS": NUM_POINTS,
        "MODEL.MaskDINO.DN_NOISE_SCALE": 0.0,
    }
    path = load.path / "configs/coco/instance-segmentation"
    path = path / "maskdino_R50_bs16_50ep_3s_dowsample1_2048.yaml"
    return detectron2_like(load, path, "maskdino:add_maskdino_config", changes)


def groups_of_queries(state):
    """Group DETR: the first group is the model's own, the others are the auxiliary's."""
    first, *others = state["query_embed.weight"].split(11)
    names = [f"core.auxiliary.0.learned.{index}.position" for index in range(len(others))]
    return {**state, "query_embed.weight": first}, dict(zip(names, others, strict=True))


DN = "--use_dn --box_noise_scale 0 --label_noise_scale 0 --coco_path none"
DENOISED = {"match": "{}", "dn": "tgt_{}"}

CASES = [
    Case("detr", "detr", dense("models.detr:build"), DENSE),
    Case("conditional_detr", "ConditionalDETR", dense("models.conditional_detr:build"), DENSE),
    Case(
        "group_conditional_detr",
        "GroupDETR",
        dense("models.conditional_detr:build", "--group_detr 3"),
        {**DENSE, "NUM_GROUPS": 3},
        patterns={"match": "{}", "group": "{}"},
        calls=("match+group",),
        split=groups_of_queries,
    ),
    Case(
        "dab_detr",
        "DAB-DETR",
        dense("models.DAB_DETR.DABDETR:build_DABDETR", "--coco_path none -m dab_detr"),
        DENSE,
    ),
    Case(
        "dn_detr",
        "DN-DETR",
        dense("models.DN_DAB_DETR.DABDETR:build_DABDETR", f"-m dn_dab_detr {DN}"),
        DENSE,
        patterns=DENOISED,
    ),
    Case(
        "anchor_detr",
        "AnchorDETR",
        dense("models.anchor_detr:build", "--num_query_position 11", small=SMALL),
        DENSE,
        sizes=FULL,
    ),
    Case(
        "smca",
        "SMCA-DETR",
        dense("models.detr:build", "--dynamic_scale type3"),
        # Their heads have a column more than there are classes, which no object ever has.
        {**DENSE, "NUM_CLASSES": 92},
    ),
    Case(
        "deformable_detr",
        "Deformable-DETR",
        deformable("models.deformable_detr:build", "models.ops"),
        NUMBERS,
    ),
    Case(
        "deformable_detr_refine",
        "Deformable-DETR",
        deformable("models.deformable_detr:build", "models.ops", "--with_box_refine"),
        NUMBERS,
    ),
    Case(
        "deformable_detr_two_stage",
        "Deformable-DETR",
        deformable("models.deformable_detr:build", "models.ops", "--with_box_refine --two_stage"),
        NUMBERS,
        patterns={"match": "{}", "enc": "{}_enc"},
        calls=("match", "encoder/match"),
        sizes=FULL,
    ),
    Case(
        "h_deformable",
        "H-Deformable-DETR",
        deformable(
            "models.deformable_detr:build",
            "models.ops",
            "--with_box_refine --two_stage --mixed_selection --look_forward_twice --k_one2many 6"
            " --num_queries_one2one 300 --num_queries_one2many 40",
            small=SMALL,
            k_one2many=6,
        ),
        {**NUMBERS, "NUM_QUERIES": 300, "HYBRID.NUM_QUERIES": 40},
        patterns={"match": "{}", "hybrid": "{}_one2many", "enc": "{}_enc"},
        calls=("match", "encoder/match", "hybrid"),
        sizes=((160, 192), (160, 192)),
    ),
    Case(
        "dab_deformable",
        "DAB-DETR",
        deformable(
            "models.dab_deformable_detr.dab_deformable_detr:build_dab_deformable_detr",
            "models.dab_deformable_detr.ops",
            "--coco_path none -m dab_deformable_detr --transformer_activation relu",
        ),
        NUMBERS,
    ),
    Case(
        "dn_deformable",
        "DN-DETR",
        deformable(
            "models.dn_dab_deformable_detr.dab_deformable_detr:build_dab_deformable_detr",
            "models.dn_dab_deformable_detr.ops",
            f"-m dn_dab_deformable_detr --transformer_activation relu {DN}",
        ),
        NUMBERS,
        patterns=DENOISED,
    ),
    Case(
        "dn_deformable_encoder_only",
        "DN-DETR",
        deformable(
            f"models.{ENCODER_ONLY}.dabdeformabledetrv0:build_{ENCODER_ONLY[3:]}",
            f"models.{ENCODER_ONLY}.ops",
            f"-m {ENCODER_ONLY} --transformer_activation relu --num_patterns 3 --scalar 10 {DN}",
        ),
        NUMBERS,
        patterns=DENOISED,
    ),
    Case(
        "dino",
        "DINO",
        dino,
        NUMBERS,
        patterns={"match": "{}", "dn": "{}_dn", "enc": "{}_interm"},
        calls=("match", "encoder/match"),
    ),
    Case(
        "mask2former",
        "Mask2Former",
        mask2former,
        MASKS,
        sizes=((128, 160), (128, 160)),
        num_classes=7,
    ),
    Case(
        "mask_dino",
        "MaskDINO",
        mask_dino,
        MASKS,
        patterns={"match": "{}", "dn": "{}_dn", "enc": "{}_interm"},
        calls=("match", "encoder/match"),
        sizes=((128, 160), (128, 160)),
        num_classes=7,
    ),
]


def compare_step(case: Case, ours: Ours, theirs: Official, batch: Batch, iteration: int) -> dict:
    """Train both for one step and compare; returns the differences of the losses."""
    their_losses, our_losses = theirs.step(batch), ours.step(iteration)
    where = compare_matches(case, ours, theirs, batch)
    assert not where, f"step {iteration}: other assignments in {where}"
    together = under_their_names(our_losses, their_losses, case.patterns)
    trained = {n for n in their_losses if re.fullmatch("(tgt_)?loss_.*(?<!_unscaled)", n)}
    assert set(together) == trained, f"losses of one side only: {set(together) ^ trained}"
    return {
        key: abs(value - their_losses[key]) / max(abs(their_losses[key]), 1e-3)
        for key, value in together.items()
    }


def under_our_names(case: Case, ours: Ours, theirs: Official, state: dict) -> dict:
    renamed, others = case.split(state)
    core = converted(ours.method, renamed, backbone=theirs.resnet)
    backbone = {
        f"backbone.{name}": state[f"{theirs.backbone}.{name}"]
        for name in ours.model.backbone.state_dict()
    }
    return {**core, **others, **backbone}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config)
def test_detects_as_the_authors(request, authors, monkeypatch, case):
    """Their evaluation and ours, of images of unequal size; masks: of one with padding."""
    load = authors(case.repository)
    has_masks = case.config.startswith("mask")
    if has_masks:
        request.getfixturevalue("fixed_points")
    torch.manual_seed(0)
    theirs = case.build(load, monkeypatch)
    randomize(theirs.model)
    larger = {"h_deformable": ((160, 192), (96, 128))}  # as many tokens as queries
    sizes = ((90, 116),) if has_masks else larger.get(case.config, PADDED)
    batch = make_batch(1, sizes, (3, 5)[: len(sizes)], case.num_classes)
    ours = Ours(case, [batch], monkeypatch)
    ours.model.load_state_dict(under_our_names(case, ours, theirs, theirs.model.state_dict()))
    if case.config == "smca":  # theirs has as many detections as queries: 300
        ours.model.top_k = 11
    if has_masks:
        ours.model.top_k = theirs.model.test_topk_per_image = 40
    with torch.no_grad():
        expected = theirs.detect(batch)
        outputs = ours.model.eval()(batch.samples())
    found = {}
    for number, (output, one) in enumerate(zip(outputs, expected, strict=True)):
        detected, (height, width) = output["instances"], batch.images[number].shape[1:]
        assert len(detected) == len(one["scores"])
        order = one["scores"].argsort(descending=True)
        assert torch.equal(detected.pred_classes, one["labels"][order])
        found[f"scores {number}"] = difference(detected.scores, one["scores"][order])
        if case.config != "mask2former":  # theirs has no boxes
            limits = torch.tensor([width, height, width, height])
            boxes = one["boxes"][order].clamp(min=0).minimum(limits)
            found[f"boxes {number}"] = difference(detected.pred_boxes.tensor, boxes)
        if has_masks:
            assert torch.equal(detected.pred_masks, one["masks"][order].bool())
    check(case.config, "detections", found)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config)
def test_trains_as_the_authors(request, authors, monkeypatch, case):
    """The assignments are equal, and every loss and the norm of all gradients up to the bound."""
    load = authors(case.repository)
    if case.config.startswith("mask"):
        request.getfixturevalue("fixed_points")
    batches = [
        make_batch(1, case.sizes, (3, 5), case.num_classes),
        make_batch(2, case.sizes[::-1], (4, 2), case.num_classes),
    ]
    torch.manual_seed(0)
    theirs = case.build(load, monkeypatch)
    randomize(theirs.model)
    ours = Ours(case, batches, monkeypatch)
    to_ours = partial(under_our_names, case, ours, theirs)
    ours.model.load_state_dict(to_ours(theirs.model.state_dict()))
    norms = []

    def remembering(norm_of):
        def remember_norm(*args, **kwargs):
            norms.append(norm_of(*args, **kwargs))
            return norms[-1]

        return remember_norm

    for name in ("clip_grad_norm_", "get_total_norm"):  # theirs, ours
        norm_of = getattr(torch.nn.utils, name)
        monkeypatch.setattr(torch.nn.utils, name, remembering(norm_of))
    worst = {}
    for iteration in range(STEPS):
        batch = batches[iteration % len(batches)]
        found = compare_step(case, ours, theirs, batch, iteration)
        their_norm, our_norm = norms[-2:]
        found["norm of all gradients"] = abs(float(our_norm / their_norm) - 1)
        if iteration == 0:
            gradients = compare_gradients(ours.model, theirs.model, to_ours)
            check(case.config, "gradients", gradients)
        name = max(found, key=found.get)
        assert found[name] < BOUND, f"step {iteration}: {name} differs by {found[name]:.1e}"
        worst = {key: max(value, worst.get(key, 0.0)) for key, value in found.items()}
    check(case.config, "20 steps", worst, BOUND)
