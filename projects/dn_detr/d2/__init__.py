"""The Detectron2 side: configuration, meta-architecture, data, training. Importing it registers the
meta-architectures and the synthetic dataset.
"""

import warnings

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"dn_detr.d2 needs Detectron2 ({error}): run `python -m dn_detr.install_detectron2`, which "
        "installs the tested one"
    ) from error

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, uses what torch 2.14 warns of.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    from dn_detr.d2.config.defaults import add_dn_detr_config
    from dn_detr.d2.data.catalog import register_shapes
    from dn_detr.d2.modeling import faster_rcnn, meta_arch, resnet, timm_torchvision  # noqa: F401  (registering)

register_shapes()

__all__ = ["add_dn_detr_config"]
