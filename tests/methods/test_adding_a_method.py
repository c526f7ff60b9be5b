"""ARCHITECTURE.md says that a method and its name are all that a new method needs. Here is one."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from dn_detr.layers.position_encoding import SinePosition
from dn_detr.methods import METHODS
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import DeformableConfig
from dn_detr.models.multi_scale import decoder_layer, multi_scale_neck
from dn_detr.models.neck import Flatten
from dn_detr.models.prediction_heads import IterativeRefinement, shared_heads
from dn_detr.models.query_designs import BoxQueries
from dn_detr.models.query_positions import BoxPosition
from dn_detr.structures import Memory

TESTS = Path(__file__).resolve().parents[1]


class AddPosition(nn.Module):
    """The part of an encoder that this method keeps."""

    def forward(self, memory: Memory) -> Memory:
        return replace(memory, tokens=memory.tokens + memory.position)


def without_encoder(config: DeformableConfig, in_channels, strides, content) -> DETR:
    """A method nobody has published: anchor boxes that look straight at the neck's features."""
    c = config
    sines = SinePosition(channels=c.channels, temperature=20.0, cell_offset=0.0)
    return DETR(
        neck=multi_scale_neck(c, in_channels, strides),
        flatten=Flatten(position=sines, channels=c.channels, num_levels=c.num_levels),
        encoder=AddPosition(),
        query_design=BoxQueries(content=content, num_queries=c.num_queries, epsilon=c.epsilon),
        decoder=Decoder(
            layers=[decoder_layer(c) for _ in range(c.decoder_layers)],
            position=BoxPosition(channels=c.channels, scales_with_content=True),
            predictor=IterativeRefinement(
                heads=shared_heads(c),
                norm=nn.LayerNorm(c.channels),
                looks_forward_twice=True,
                epsilon=c.epsilon,
            ),
        ),
    )


def promises_of(file: str) -> list[tuple[str, dict]]:
    """Every test of `file` that takes a method, once for each of its other parameters."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, TESTS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared = module.pytestmark if isinstance(module.pytestmark, list) else [module.pytestmark]
    promises = []
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        cases = [{}]
        for mark in [*shared, *getattr(test, "pytestmark", [])]:
            argument, values = mark.args[:2]
            if argument != "method":
                cases = [{**case, argument: value} for case in cases for value in values]
        promises += [
            pytest.param(test, case, id="-".join([name, *map(str, case.values())]))
            for case in cases
        ]
    return promises


@pytest.mark.parametrize(
    "promise, arguments",
    [
        *promises_of("methods/test_all_methods.py"),
        *promises_of("auxiliary/test_segment_properties.py"),
    ],
)
def test_a_new_method_keeps_what_every_method_promises(promise, arguments, monkeypatch):
    monkeypatch.setitem(METHODS, "without_encoder", without_encoder)
    promise(method="without_encoder", **arguments)
