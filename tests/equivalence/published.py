"""The authors' models and optimizers in the published size, as their programs make them."""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import itertools
import runpy
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn

from dn_detr.conversion.convert_weights import convert

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Published:
    """What a configuration of ours has as its model.

    Args:
        repository: name of the checkout.
        options: of its main.py, as its README or script gives them; of a program of Detectron2: its
            configuration file.
        num_classes: rows of the class heads, without "no object".
    """

    repository: str
    options: str = ""
    num_classes: int = 91


DENOISED = "--use_dn --transformer_activation relu -m"
TWO_STAGE = "--with_box_refine --two_stage"
PUBLISHED = {
    "detr": Published("detr"),
    "conditional_detr": Published("ConditionalDETR"),
    "group_conditional_detr": Published("GroupDETR", "--group_detr 11"),
    "anchor_detr": Published("AnchorDETR"),
    # A column more than there are classes, which no object ever has.
    "smca": Published("SMCA-DETR", "--num_queries 300 --dynamic_scale type3", num_classes=92),
    "dab_detr": Published("DAB-DETR", "-m dab_detr"),
    "dn_detr": Published("DN-DETR", "--use_dn -m dn_dab_detr"),
    "dab_deformable": Published("DAB-DETR", "--transformer_activation relu -m dab_deformable_detr"),
    "dn_deformable": Published("DN-DETR", f"{DENOISED} dn_dab_deformable_detr"),
    "dn_deformable_encoder_only": Published(
        "DN-DETR", f"{DENOISED} dn_dab_deformable_detr_deformable_encoder_only --num_patterns 3"
    ),
    "deformable_detr": Published("Deformable-DETR"),
    "deformable_detr_refine": Published("Deformable-DETR", "--with_box_refine"),
    "deformable_detr_two_stage": Published("Deformable-DETR", TWO_STAGE),
    "h_deformable": Published(
        "H-Deformable-DETR",
        f"{TWO_STAGE} --dim_feedforward 2048 --num_queries_one2one 300 --num_queries_one2many 1500 "
        "--dropout 0 --mixed_selection --look_forward_twice",
    ),
    "dino": Published("DINO", "config/DINO/DINO_4scale.py"),
    "mask2former": Published(
        "Mask2Former",
        "configs/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
        num_classes=80,
    ),
    "mask_dino": Published(
        "MaskDINO",
        "configs/coco/instance-segmentation/maskdino_R50_bs16_50ep_3s_dowsample1_2048.yaml",
        num_classes=80,
    ),
}


class Authors:
    """The program of a checkout: builds its model with new starting values, and its optimizer.

    Args:
        load: imports a module of the checkout by name (fixture `authors`).
    """

    def __init__(self, published: Published, load, monkeypatch):
        resnet = torchvision.models.resnet50

        def without_weights(**options):
            return resnet(**{**options, "pretrained": False})

        monkeypatch.setattr(torchvision.models, "resnet50", without_weights)
        self.published = published
        self.is_detectron2s = published.options.endswith(".yaml")
        if self.is_detectron2s:
            self.package = load(
                {"Mask2Former": "mask2former"}.get(published.repository, "maskdino")
            )
            self.folder = Path(self.package.__file__).parents[1]
            self.cfg = self._config()
            return
        self.main = load("main")
        self.folder = Path(self.main.__file__).parent
        parser = argparse.ArgumentParser(parents=[self.main.get_args_parser()])
        if published.options.endswith(".py"):
            file = published.options
            self.args = parser.parse_args(["--config_file", file])
            for name, value in runpy.run_path(str(self.folder / file)).items():
                if not name.startswith("_"):
                    setattr(self.args, name, value)
        else:
            options = published.options.split()
            options += ["--coco_path", "."]
            self.args = parser.parse_args(options)
        self.args.device = "cpu"

    def _config(self):
        from detectron2.config import get_cfg
        from detectron2.projects.deeplab import add_deeplab_config

        cfg = get_cfg()
        add_deeplab_config(cfg)
        name = "maskformer2" if hasattr(self.package, "add_maskformer2_config") else "maskdino"
        getattr(self.package, f"add_{name}_config")(cfg)
        cfg.merge_from_file(str(self.folder / self.published.options))
        cfg.MODEL.DEVICE = "cpu"
        return cfg

    def model(self) -> nn.Module:
        if self.is_detectron2s:
            from detectron2.modeling import build_model

            return build_model(self.cfg)
        for name in ("build_model_main", "build_model"):
            if hasattr(self.main, name):
                return getattr(self.main, name)(self.args)[0]
        raise AssertionError("their main.py builds no model")

    def largest_norm(self) -> float:
        """To which their program clips the norm of all gradients."""
        if self.is_detectron2s:
            clip = self.cfg.SOLVER.CLIP_GRADIENTS
            assert clip.ENABLED and clip.CLIP_TYPE == "full_model" and clip.NORM_TYPE == 2
            return clip.CLIP_VALUE
        return self.args.clip_max_norm

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Run the statements of their program that build the optimizer."""
        if self.is_detectron2s:
            from detectron2.solver.build import maybe_add_gradient_clipping

            tree = ast.parse((self.folder / "train_net.py").read_text())
            (build,) = (
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.name == "build_optimizer"
            )
            build.decorator_list = []
            names = {
                **{name: getattr(typing, name) for name in ("Any", "Dict", "List", "Set")},
                **{"torch": torch, "copy": copy, "itertools": itertools},
                "maybe_add_gradient_clipping": maybe_add_gradient_clipping,
            }
            run([build], names)
            return names["build_optimizer"](None, self.cfg, model)
        (program,) = ast.parse(inspect.getsource(self.main.main)).body
        first = next(i for i, node in enumerate(program.body) if "param_dicts" in assigned(node))
        last = next(i for i, node in enumerate(program.body) if "optimizer" in assigned(node))
        statements = [node for node in program.body if isinstance(node, ast.FunctionDef)]
        statements += program.body[first : last + 1]
        names = {**vars(self.main), "model_without_ddp": model, "args": self.args}
        run(statements, names)
        return names["optimizer"]


def assigned(node: ast.stmt) -> set[str]:
    """Names that a statement assigns."""
    return {
        name.id
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }


def run(statements: list[ast.stmt], names: dict) -> None:
    exec(compile(ast.Module(statements, type_ignores=[]), "<their program>", "exec"), names)


def our_config(name: str, num_classes: int):
    """configs/<name>.yaml on a CPU."""
    from dn_detr.d2.config.defaults import read_config

    options = ["MODEL.DEVICE", "cpu", "MODEL.DN_DETR.NUM_CLASSES", num_classes]
    return read_config(str(ROOT / "configs" / f"{name}.yaml"), options)


def under_our_names(method: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The converter's result; the groups of Group DETR, whose files have no table, are split."""
    extra = {}
    if method == "conditional_detr":
        first, *others = state["query_embed.weight"].split(300)
        state = {**state, "query_embed.weight": first}
        extra = {f"core.auxiliary.0.learned.{i}.position": rows for i, rows in enumerate(others)}
    return {**convert(state, method)[0], **extra}
