"""Trains as the authors do: with their parser, builders, optimizer and training loop."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import runpy
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

WIDTHS = {"res2": 8, "res3": 8, "res4": 16, "res5": 24}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TinyBackbone(Backbone):
    """A convolution for each stage, in place of both sides' ResNet."""

    def __init__(self):
        super().__init__()
        for name, width in WIDTHS.items():
            self.add_module(name, nn.Conv2d(3, width, STRIDES[name], stride=STRIDES[name]))

    def forward(self, images):
        return {name: stage(images) for name, stage in self.named_children()}

    def output_shape(self):
        return {name: ShapeSpec(channels=c, stride=STRIDES[name]) for name, c in WIDTHS.items()}


class TheirBackbone(TinyBackbone):
    """The same with the interface of DETR's `Backbone`: nested tensors in and out."""

    def __init__(self, nested, stages: list[str], as_list: bool):
        super().__init__()
        self.nested, self.stages, self.as_list = nested, stages, as_list
        self.num_channels = [WIDTHS[name] for name in stages]
        self.strides = [STRIDES[name] for name in stages]

    def forward(self, samples):
        features = super().forward(samples.tensors)
        found = {}
        for index, name in enumerate(self.stages):
            size = features[name].shape[-2:]
            mask = nn.functional.interpolate(samples.mask[None].double(), size=size)[0].bool()
            found[str(index)] = self.nested(features[name], mask)
        return list(found.values()) if self.as_list else found


def statements_of_main(main, names: set[str]) -> ast.Module:
    """The statements of main() in their main.py that bind one of `names`, in their order."""
    body = ast.parse(inspect.getsource(main.main)).body[0].body
    kept = []
    for statement in body:
        bound = {getattr(statement, "name", None)}
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
        if bound & names:
            kept.append(statement)
    return ast.Module(kept, type_ignores=[])


@dataclass
class Official:
    """Their model, criterion and optimizer, and a function that trains it for one step.

    Attributes:
        step: batch -> {name: weighted loss}.
        detect: batch -> for each image boxes xyxy in pixels, scores, labels and masks.
        matched: of the last step, for each call of their matcher the (queries, objects) of images.
        backbone: prefix of the parameters of the tiny backbone.
    """

    model: nn.Module
    step: callable
    detect: callable
    matched: list
    backbone: str = "backbone.0"
    is_detectron2: bool = False

    @property
    def resnet(self) -> str | None:
        """The name of a ResNet in its place, for the converter; None: it is Detectron2's."""
        return None if self.is_detectron2 else f"{self.backbone}.body"


def remember_matches(matcher, matched: list) -> None:
    """Append what every call of their matcher finds to `matched`."""

    def keep(_module, _inputs, found):
        matched.append([(torch.as_tensor(q), torch.as_tensor(o)) for q, o in found])

    matcher.register_forward_hook(keep)


def parse(main, command: str) -> Namespace:
    """Their arguments from a command line, on a CPU."""
    return main.get_args_parser().parse_args([*command.split(), "--device", "cpu"])


def with_config(args: Namespace, path: Path, **changes) -> Namespace:
    """DINO's arguments are those of the command line and of a Python file."""
    values = {}
    bases = runpy.run_path(str(path))["_base_"]
    for file in (*(path.parent / base for base in bases), path):
        values |= {k: v for k, v in runpy.run_path(str(file)).items() if not k.startswith("_")}
    return Namespace(**{**vars(args), **values, **changes})


def build(load, builder: str, args: Namespace, stages: list[str], monkeypatch):
    """Model, criterion and postprocessors by their own `builder` ("module:function") on the tiny
    backbone."""
    name, function = builder.split(":")
    module = load(name)
    package = name.rpartition(".")[0]
    backbones = load(f"{package}.backbone")
    nested = load("util.misc").NestedTensor

    def build_backbone(args):
        is_joined = hasattr(backbones, "Joiner")
        body = TheirBackbone(nested, stages, as_list=not is_joined)
        if not is_joined:
            return body
        position = load(f"{package}.position_encoding").build_position_encoding(args)
        joined = backbones.Joiner(body, position)
        joined.num_channels = body.num_channels if len(stages) > 1 else body.num_channels[0]
        return joined

    monkeypatch.setattr(module, "build_backbone", build_backbone)
    return getattr(module, function)(args)


def detr_like(load, builder, args, stages, monkeypatch, **loop) -> Official:
    """One of the repositories that grew from DETR's. loop: arguments of their train_one_epoch."""
    main, engine = load("main"), load("engine")
    model, criterion, postprocessors = build(load, builder, args, stages, monkeypatch)
    values = {**vars(main), "args": args, "model_without_ddp": model, "criterion": criterion}
    code = statements_of_main(main, {"match_name_keywords", "param_dicts", "optimizer"})
    exec(compile(code, main.__file__, "exec"), values)  # noqa: S102
    if hasattr(engine, "data_prefetcher"):  # theirs needs a GPU, unless it is told otherwise
        original = engine.data_prefetcher
        monkeypatch.setattr(
            engine, "data_prefetcher", lambda *given, prefetch: original(*given, prefetch=False)
        )
    matched = []
    remember_matches(criterion.matcher, matched)
    computed = {}
    criterion.register_forward_hook(lambda _m, _i, losses: computed.update(losses))
    collate = load("util.misc").nested_tensor_from_tensor_list
    accepted = inspect.signature(engine.train_one_epoch).parameters
    loop = {n: v for n, v in {"args": args, **loop}.items() if n in accepted}

    def step(batch):
        matched.clear()
        values["optimizer"].zero_grad()  # DAB-DETR's loop forgets it, except with --amp
        with contextlib.redirect_stdout(io.StringIO()):
            logged = engine.train_one_epoch(
                model,
                criterion,
                [(collate(batch.images), batch.their_targets())],
                values["optimizer"],
                torch.device("cpu"),
                0,
                args.clip_max_norm,
                **loop,
            )
        if "loss_ce" in logged:
            return logged
        weights = criterion.weight_dict  # Anchor DETR's loop logs their sum only
        return {n: float(v) * weights[n] for n, v in computed.items() if n in weights}

    def detect(batch):
        """Run their evaluation, without COCO's."""
        evaluator, found = mock.MagicMock(), {}
        evaluator.update = found.update
        monkeypatch.setattr(engine, "CocoEvaluator", lambda *_a, **_b: evaluator)
        object.__setattr__(model, "module", model)  # some expect several processes
        accepted = inspect.signature(engine.evaluate).parameters
        targets = batch.their_targets()
        for number, target in enumerate(targets):
            target |= {"image_id": torch.tensor(number), "orig_size": target["size"]}
        with contextlib.redirect_stdout(io.StringIO()):
            engine.evaluate(
                model,
                criterion,
                postprocessors,
                [(collate(batch.images), targets)],
                None,
                torch.device("cpu"),
                "",
                **({"args": args} if "args" in accepted else {}),
            )
        return [found[number] for number, _ in enumerate(targets)]

    is_joined = isinstance(model.backbone, nn.Sequential)
    return Official(model, step, detect, matched, "backbone.0" if is_joined else "backbone")


def detectron2_like(load, config: Path, names: str, changes: dict) -> Official:
    """Mask2Former or Mask DINO, by the Trainer of their train_net.py.

    names: package:add_config; changes: keys of their configuration that differ from the file.
    """
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config

    package, _, add_config = names.partition(":")
    trainer = load("train_net").Trainer
    cfg = get_cfg()
    add_deeplab_config(cfg)
    getattr(load(package), add_config)(cfg)
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_tiny_backbone"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [1.0] * 3
    cfg.merge_from_list([part for pair in changes.items() for part in pair])
    model = build_model(cfg).train()
    optimizer = trainer.build_optimizer(cfg, model)
    matched: list = []
    remember_matches(model.criterion.matcher, matched)

    def step(batch):
        matched.clear()
        samples = batch.samples()
        for sample in samples:  # their mappers make tensors
            masks = sample["instances"].gt_masks.tensor
            sample["instances"].remove("gt_masks")
            sample["instances"].gt_masks = masks
        losses = model(samples)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return {name: float(value) for name, value in losses.items()}

    def detect(batch):
        found = [output["instances"] for output in model.eval()(batch.samples())]
        return [
            {
                "boxes": one.pred_boxes.tensor,
                "scores": one.scores,
                "labels": one.pred_classes,
                "masks": one.pred_masks,
            }
            for one in found
        ]

    return Official(model, step, detect, matched, "backbone", is_detectron2=True)
