"""Say what is installed, how large configurations are, or what weights hold.

    dn-detr info
    dn-detr info dn_detr dino --size 800x1333 800x1066
    dn-detr info dn_detr --flow
    dn-detr info output/cells/model_best.pth
    dn-detr info torchvision/swin_t timm/convnext_tiny --size 640x640

Sizes are counted without running or downloading anything. A multiply-add is one operation, as in
the papers. --annotations averages over the first 100 images of COCO val2017, as they do.
Activations are the outputs of convolutions and linear layers. Faster R-CNN is counted with its
maximum number of proposals, without proposal selection and RoI pooling.
"""

from __future__ import annotations

import argparse

from dn_detr.cli.common import at_least, height_and_width

WEIGHTS = (".pth", ".pt", ".pkl", ".safetensors")
BACKBONES = ("torchvision/", "timm/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="configurations, checkpoints or backbones"
    )
    parser.add_argument(
        "--size", nargs="+", type=height_and_width, default=[(800, 1333)], metavar="HEIGHTxWIDTH"
    )
    parser.add_argument("--annotations", help="json file: also average over its first images")
    parser.add_argument("--num-images", type=at_least(1), default=100, help="of --annotations")
    parser.add_argument("--flow", action="store_true", help="outputs and cost of each part as well")


def run(args: argparse.Namespace) -> None:
    """Print what is asked for."""
    if not args.names:
        from dn_detr.info import report

        print(report())
        return
    from dn_detr.d2.inference.saved_detector import summary_of
    from dn_detr.d2.modeling.model_size import print_backbones, print_table

    kinds: dict[str, list[str]] = {"weights": [], "backbones": [], "configs": []}
    for name in args.names:
        kind = "backbones" if name.startswith(BACKBONES) else "configs"
        kinds["weights" if name.endswith(WEIGHTS) else kind].append(name)
    for path in kinds["weights"]:
        print(summary_of(path))
    if kinds["backbones"]:
        print_backbones(kinds["backbones"], args.size)
    if configs := kinds["configs"]:
        print_table(
            configs,
            sizes=args.size,
            annotations=args.annotations,
            num_images=args.num_images,
            flow=args.flow,
        )
