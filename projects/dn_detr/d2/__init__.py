"""The Detectron2 side: configuration, meta-architecture, data, training. Importing it registers the
meta-architecture and the synthetic dataset."""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dn_detr.d2 needs Detectron2; install it at the tested commit with "
        'pip install --no-build-isolation -e ".[detectron2]"'
    ) from error

from dn_detr.d2 import meta_arch, shapes  # noqa: F401  (both register themselves)
from dn_detr.d2.config import add_dn_detr_config

__all__ = ["add_dn_detr_config"]
