"""Parameters, GFLOPs and activations of configurations, counted on tensors without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dn_detr.d2.config.defaults import default_config, read_config
from dn_detr.d2.config.files import configs_folder, find_config
from dn_detr.d2.data.ground_truth import read_coco
from dn_detr.d2.modeling.faster_rcnn import DenoisingRCNN
from dn_detr.d2.modeling.timm_torchvision import build_named_backbone
from dn_detr.models.detection_transformer import DETR

PUBLISHED = {
    "dab_detr": (44, 94),
    "dab_detr_dc5": (44, 202),
    "dn_detr": (44, 94),
    "dn_detr_r101": (63, 174),
    "dn_detr_dc5": (44, 202),
    "dn_detr_dc5_r101": (63, 282),
    "conditional_detr": (44, 90),
    "dab_deformable_encoder_only": (48, 195),
    "dn_deformable_encoder_only": (48, 195),
    "faster_rcnn_fpn": (42, 180),
}
"""Parameters (M) and GFLOPs: 2203.01305, tables 1 and 4; 2108.06152 and 2005.12872, table 1."""

LINEAR = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
}
"""What convolutions and linear layers come down to."""


def count_deformable(value, shapes, valid, reference, offsets, logits, *rest, **more) -> int:
    """Count multiply-adds of deformable attention: 4 corners and a weight per channel and sample.

    Arguments are shapes.
    """
    return 2 * product(logits) * value[-1] * 5


def count_sampling(value, shapes, locations, weights, *rest, **more) -> int:
    """Count the operator without computing locations and weights."""
    return 2 * product(weights) * value[-1] * 5


def count_grid_sample(*rest, out_shape, **more) -> int:
    """Count the PyTorch implementation, which applies weights separately."""
    return 2 * product(out_shape) * 5


def count_attention(query, key, value, *rest, **more) -> int:
    """Count the two matrix products of scaled_dot_product_attention. Arguments are shapes."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def product(sizes) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def counts() -> dict:
    """Return counting functions of operators that PyTorch does not count."""
    ours = {"deformable_attention": count_deformable, "ms_deform_attn": count_sampling}
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
        torch.ops.aten.grid_sampler_2d: count_grid_sample,
        **{
            getattr(torch.ops.dn_detr, name): count
            for name, count in ours.items()
            if hasattr(torch.ops.dn_detr, name)
        },
    }


class Activations(TorchDispatchMode):
    """Counts output elements of convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in LINEAR:
            self.total += out.numel()
        return out


@dataclass
class Part:
    """Outputs and cost of one part of the model."""

    name: str
    outputs: str
    gflops: float
    activations: float  # millions


@dataclass
class Inference:
    """The inference of one image."""

    gflops: float = 0.0
    activations: float = 0.0  # millions
    parts: list[Part] = field(default_factory=list)


def build(config_file: str, opts: list[str] = ()) -> nn.Module:
    """Build the detector of a configuration with tensors without data."""
    cfg = read_config(config_file, list(opts))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = False
    cfg.MODEL.DN_DETR.NUM_CLASSES = cfg.MODEL.DN_DETR.NUM_CLASSES or 80
    with FakeTensorMode():
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).eval()


def parameters(model: nn.Module) -> tuple[float, float]:
    """Return millions of parameters and of trained parameters, without training-only parts."""
    kept = [p for name, p in model.named_parameters() if "auxiliary." not in name]
    return tuple(sum(p.numel() for p in some) / 1e6 for some in (kept, filter(is_trained, kept)))


def is_trained(parameter: Tensor) -> bool:
    """Whether a parameter, of any shape, is trained."""
    return parameter.requires_grad


def backbone_row(name: str, sizes: list[tuple[int, int]]) -> str:
    """Return a row of the table of backbones, by their name in MODEL.DN_DETR.BACKBONE."""
    cfg = default_config()
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.DN_DETR.BACKBONE = 0, name
    cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = False
    counted = []
    try:
        backbone = build_named_backbone(cfg, ShapeSpec(channels=3)).eval().requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for height, width in sizes:
                with FlopCounterMode(display=False, custom_mapping=counts()) as flops:
                    backbone(torch.zeros(1, 3, height, width))
                counted.append(f"{flops.get_total_flops() / 2e9:.1f}")
    except ValueError as error:
        return f"| `{name}` | refused: {error} |" + " |" * (1 + len(sizes))
    features = ", ".join(f"{key} {one.channels}" for key, one in backbone.output_shape().items())
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    return f"| `{name}` | {features} | {millions:.1f} | {' | '.join(counted)} |"


def infer(model: nn.Module, height: int, width: int) -> Inference:
    """Count the inference of one image of this size, part by part."""
    step = max(1, model.backbone.size_divisibility)  # Detectron2 pads images to a multiple of it
    height, width = (-(-side // step) * step for side in (height, width))
    result = Inference()
    flops = FlopCounterMode(display=False, custom_mapping=counts())
    activations = Activations()

    def enter(name: str, value) -> None:
        gflops, millions = flops.get_total_flops() / 2e9, activations.total / 1e6
        result.parts.append(
            Part(
                name,
                describe(value),
                gflops - result.gflops,
                millions - result.activations,
            )
        )
        result.gflops, result.activations = gflops, millions

    trained = list(filter(is_trained, model.parameters()))
    for parameter in trained:  # the counter cannot track learned rows that go into a module
        parameter.requires_grad_(False)
    mode = next(model.parameters()).fake_mode
    with mode, flops, activations:
        features = model.backbone(torch.zeros(1, 3, height, width))
        enter("backbone", features)
        if isinstance(model, DenoisingRCNN):
            find_regions(model, features, enter)
        else:
            padding = torch.zeros(1, height, width, dtype=torch.bool)
            decode(model.core, [features[name] for name in model.in_features], padding, enter)
    for parameter in trained:
        parameter.requires_grad_(True)
    return result


def decode(core: DETR, features: list[Tensor], padding: Tensor, enter: Callable) -> None:
    """Run the inference of a method; enter(name, value) is called after every part.

    Features are [1, C, H, W] each, padding [1, height, width].
    """
    hooks = [
        getattr(core, name).register_forward_hook(lambda _m, _x, out, name=name: enter(name, out))
        for name in ("neck", "flatten", "encoder", "decoder")
    ]
    hooks.append(
        core.decoder.register_forward_pre_hook(lambda _m, inputs: enter("queries", inputs[0]))
    )
    core(features, padding)
    for hook in hooks:
        hook.remove()


def find_regions(model: DenoisingRCNN, features: dict[str, Tensor], enter: Callable) -> None:
    """Run that of Faster R-CNN, except what depends on the image."""
    proposer, heads = model.proposal_generator, model.roi_heads
    logits, deltas = proposer.rpn_head([features[name] for name in proposer.in_features])
    enter("proposals", {"logits": tuple(logits), "deltas": tuple(deltas)})
    side, channels = heads.box_pooler.output_size, features[heads.box_in_features[0]].shape[1]
    regions = torch.zeros(proposer.post_nms_topk[False], channels, *side)
    logits, deltas = heads.box_predictor(heads.box_head(regions))
    enter("regions", {"logits": logits, "deltas": deltas})


def describe(value) -> str:
    """Return names and shapes of the tensors of a value or dict, e.g. "tokens 1x100x256"."""
    if isinstance(value, dict):
        parts = list(value.items())
    else:
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
    texts = []
    for name, part in parts:
        if isinstance(part, Tensor):
            texts.append(f"{name} {shape(part)}")
        elif is_dataclass(part):
            texts.append(describe(part))
        elif isinstance(part, tuple) and part and all(isinstance(p, Tensor) for p in part):
            shapes = Counter(map(shape, part))
            times = (f"{count} of {one}" if count > 1 else one for one, count in shapes.items())
            texts.append(f"{name} {', '.join(times)}")
    return "; ".join(texts)


def shape(x: Tensor) -> str:
    """Return the shape of a tensor of any shape as text, e.g. "1x100x256"."""
    return "x".join(map(str, x.shape))


def test_sizes(annotations: str, num_images: int) -> Counter:
    """Return (height, width) -> number of images, for the first images of a COCO json file.

    Resized as in the published evaluations: shorter side 800, longer at most 1333.
    """
    sizes = Counter()
    for width, height in read_coco(annotations).sizes[:num_images].tolist():
        sides = height, width
        scale = min(800 / min(sides), 1333 / max(sides))
        sizes[tuple(int(side * scale + 0.5) for side in sides)] += 1
    return sizes


def mean(model: nn.Module, sizes: Counter) -> Inference:
    """Return mean GFLOPs and activations over images of these sizes."""
    result = Inference()
    for (height, width), count in sizes.items():
        one = infer(model, height, width)
        result.gflops += one.gflops * count / sizes.total()
        result.activations += one.activations * count / sizes.total()
    return result


def print_table(
    configs: list[str],
    *,
    sizes: Sequence[tuple[int, int]],
    annotations: str | None = None,
    num_images: int = 100,
    flow: bool = False,
) -> None:
    """Print a table with a row for each configuration, as it is ready.

    Args:
        configs: Names or paths; those of bases are left out.
        sizes: Heights and widths of images.
        annotations: json file in COCO format, to average over its first `num_images` as well.
        num_images: See `annotations`.
        flow: Whether outputs and cost of each part follow.
    """
    asked = {f"{height}x{width}": Counter({(height, width): 1}) for height, width in sizes}
    if annotations:
        asked[f"the first {num_images} images"] = test_sizes(annotations, num_images)
    titles = [f"{what} at {name}" for name in asked for what in ("GFLOPs", "activations (M)")]
    print("| configuration | parameters (M) | trained (M) |", " | ".join(titles), "| published |")
    print("|---|---|---|" + "---|" * len(titles) + "---|")
    for file in configs:
        path, folder = Path(find_config(file)).resolve(), configs_folder().resolve()
        if path.name.startswith("Base"):
            continue
        is_own = path.is_relative_to(folder)  # "quick/dino" is not "dino"
        name = path.relative_to(folder).with_suffix("").as_posix() if is_own else file
        model = build(file)
        found = [mean(model, sizes) for sizes in asked.values()]
        cells = [f"{millions:.1f}" for millions in parameters(model)]
        cells += [f"{x:.1f}" for one in found for x in (one.gflops, one.activations)]
        cells.append("{}M / {}".format(*PUBLISHED[name]) if name in PUBLISHED else "")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
        for height, width in sizes if flow else ():
            print(f"\n| {height}x{width}: part | outputs | GFLOPs | activations (M) |")
            print("|---|---|---|---|")
            for part in infer(model, height, width).parts:
                print(
                    f"| {part.name} | {part.outputs} | {part.gflops:.2f} | {part.activations:.2f} |"
                )


def print_backbones(names: list[str], sizes: Sequence[tuple[int, int]]) -> None:
    """Print a table with a row for each backbone alone, such as "torchvision/swin_t"."""
    columns = [f"GFLOPs at {height}x{width}" for height, width in sizes]
    print("| backbone | features and channels | parameters (M) |", " | ".join(columns), "|")
    print("|---|---|---|" + "---|" * len(columns))
    for name in names:
        print(backbone_row(name, sizes), flush=True)
