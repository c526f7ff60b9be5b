"""Assembles a method with its content, auxiliary queries and hyper-parameters."""

from __future__ import annotations

from dn_detr.auxiliary.box_prompts import BoxPrompting, RandomBoxPrompts
from dn_detr.auxiliary.denoising import Denoising, DenoisingQueries, MaskDenoisingQueries
from dn_detr.auxiliary.extra_queries import GroupQueries, HybridMatching, HybridQueries
from dn_detr.layers.query_content import QueryContent
from dn_detr.losses.loss_config import LossConfig
from dn_detr.methods import METHODS, config_class, make_config
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import ModelConfig
from dn_detr.models.published import set_as_published

__all__ = [
    "BoxPrompting",
    "Denoising",
    "HybridMatching",
    "LossConfig",
    "build_model",
    "make_config",
]


def build_model(
    method: str,
    config: ModelConfig,
    *,
    in_channels: list[int],
    strides: list[int],
    denoising: Denoising | None = None,
    num_groups: int = 1,
    hybrid: HybridMatching | None = None,
    prompts: BoxPrompting | None = None,
) -> DETR:
    """Build the core of a detector: (features, padding, targets=None) -> Predictions.

    Auxiliary queries combine, except groups with hybrid matching.

    Args:
        method: a name in `dn_detr.methods.METHODS`.
        config: of the method's own class (`make_config`).
        in_channels: channels of the backbone's features, fine to coarse.
        strides: their strides in pixels.
        denoising: None trains without denoising.
        num_groups: of Group DETR; 1: none.
        hybrid: one-to-many branch of H-DETR.
        prompts: trains with given objects, so that the detector can be prompted.

    Raises:
        ValueError: if the arguments make no model.
    """
    kind = config_class(method)
    if not isinstance(config, kind):
        raise ValueError(f"config of {method} must be a {kind.__name__}, got {config}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if num_groups > 1 and hybrid is not None:
        raise ValueError(
            "groups and hybrid matching exclude each other: both match every object several times, "
            f"among extra queries of their own; got {num_groups} groups and {hybrid}"
        )
    content = QueryContent(
        channels=config.channels,
        num_classes=config.num_classes,
        has_labels=denoising is not None or prompts is not None,
        has_indicator=True,
    )
    model: DETR = METHODS[method](config, in_channels, strides, content)
    design = model.query_design
    if denoising is not None:
        if design.starts_from_masks and config.as_published:
            raise ValueError(
                f"{method} with denoising has no published code: as_published must be False"
            )
        if design.starts_from_masks and denoising.contrastive:
            raise ValueError(
                f"{method} is denoised by shifted masks; contrastive noise, which moves the "
                f"sides of boxes, has no meaning there"
            )
        denoise = MaskDenoisingQueries if design.starts_from_masks else DenoisingQueries
        model.auxiliary.append(
            denoise(
                denoising,
                num_classes=config.num_classes,
                trains_empty=not design.content.has_indicator,
            )
        )
    if prompts is not None:
        if model.mask_head is not None:
            raise ValueError(f"{method} predicts masks: only boxes can be given, not masks")
        if denoising is not None and config.as_published:
            raise ValueError("box prompts need as_published False, which hides empty queries")
        model.auxiliary.append(RandomBoxPrompts(prompts, num_classes=config.num_classes))
    if num_groups > 1:
        model.auxiliary.append(
            GroupQueries(query_design=design, num_queries=config.num_queries, num_groups=num_groups)
        )
    if hybrid is not None:
        model.auxiliary.append(HybridQueries(hybrid, query_design=design))
    set_as_published(model, config.as_published)
    return model
