"""Hook with DN-DETR's training diagnostics: matching instability and anchor distance."""

from __future__ import annotations

import logging

import numpy as np
import torch
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader, Subset

from dn_detr.analysis.matching_instability import (
    anchor_target_distances,
    largest_distances,
    last_matches,
    matching_instability,
)
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.mapper import DetrMapper
from dn_detr.d2.engine.milestones import AfterEvaluation
from dn_detr.errors import BadImage
from dn_detr.losses.matcher import assign

logger = logging.getLogger(__name__)


class MatchingInstruments(AfterEvaluation):
    """Match queries with the objects of some images after every evaluation.

    The event storage gets:
      - "matching/instability": queries per image whose match changed since the last evaluation
        (2203.01305, sec. 3.1). Absent at the first evaluation and for proposals, whose queries
        differ between evaluations.
      - "matching/anchor_distance" and "matching/anchor_distance_100": mean of all, and of the 100
        largest, L1 distances between the initial reference of a query and its object (sec. 3.2;
        2203.03605). Absent for methods whose queries have no initial reference.

    Args:
        model: Model without DistributedDataParallel.
        loader: Images of this process, one at a time, as (index, samples).
    """

    def __init__(self, model: nn.Module, loader: DataLoader):
        self.model = model
        self.loader = loader
        self.matches: torch.Tensor | None = None

    def after_evaluation(self):
        matches, distances = self.measure()
        scalars = {}
        if matches is not None and self.matches is not None:
            if self.matches.shape == matches.shape:
                scalars["instability"] = matching_instability(self.matches, matches)
            else:
                logger.warning("the images or queries changed: no matching instability this time")
        self.matches = matches
        if distances.numel():
            scalars["anchor_distance"] = distances.mean()
            scalars["anchor_distance_100"] = largest_distances(distances, 100)
        scalars = {f"matching/{name}": float(value) for name, value in scalars.items()}
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        logger.info("  ".join(f"{name}: {value:.4g}" for name, value in scalars.items()))

    @torch.no_grad()
    def measure(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Match the images of all processes.

        Returns:
            The object of every query [images, Q] int64, -1 for none (None if queries are
            proposals); and the anchor distances [N] of all N matched queries. Equal on all ranks.
        """
        found, distances = {}, []
        model = self.model
        with inference_context(model):
            for index, samples in self.loader:
                if not samples:
                    continue
                predictions = model.predict(model.make_batch(samples))
                targets = model.make_batch(samples, with_targets=True).targets
                part = predictions.of("match")
                match = assign(part, targets, model.costs)["match"]
                if part.references[0] is not None:
                    distances.append(
                        anchor_target_distances(part.references[0], targets, match).cpu()
                    )
                if predictions.proposals is None:
                    found[index] = last_matches(match)[0].cpu()
        gathered = comm.all_gather((found, distances))
        found = {index: row for part, _ in gathered for index, row in part.items()}
        distances = [row for _, part in gathered for row in part]
        matches = torch.stack([found[index] for index in sorted(found)]) if found else None
        return matches, torch.cat(distances) if distances else torch.zeros(0)

    def state_dict(self) -> dict:
        return {} if self.matches is None else {"matches": self.matches}

    def load_state_dict(self, state: dict) -> None:
        self.matches = state["matches"]


class _Indexed(torch.utils.data.Dataset):
    """Samples with their indices in the dataset; none of an image that cannot be used."""

    def __init__(self, dataset, indices, mapper):
        self.dataset = Subset(dataset, indices)
        self.indices = indices
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, list[dict]]:
        try:
            return self.indices[position], [self.mapper(self.dataset[position])]
        except BadImage:  # the evaluation has named it
            return self.indices[position], []


def build_instruments(cfg, model: nn.Module) -> MatchingInstruments | None:
    """Build the hook of TEST.INSTABILITY for the first dataset of DATASETS.TEST; None if off."""
    node = cfg.TEST.INSTABILITY
    if not node.ENABLED or not cfg.DATASETS.TEST:
        return None
    dataset = dataset_dicts.load(
        cfg.DATASETS.TEST[0], check=cfg.DATASETS.CHECK, with_masks=cfg.MODEL.MASK_ON
    ).records
    num_images = min(node.NUM_IMAGES or len(dataset), len(dataset))
    indices = np.linspace(0, len(dataset) - 1, num_images).round().astype(int).tolist()
    mapper = DetrMapper(**{**DetrMapper.from_config(cfg, False), "with_instances": True})
    loader = DataLoader(
        _Indexed(dataset, indices[comm.get_rank() :: comm.get_world_size()], mapper),
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return MatchingInstruments(model, loader)
