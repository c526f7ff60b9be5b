"""What comparisons with the authors' code of the Deformable DETR family share."""

from __future__ import annotations

from argparse import Namespace

from peers import GivenFeatures
from tiny import config_of

from dn_detr.build import build_model

NUMBERS = {"num_classes": 91, "num_queries": 11, "feed_forward_dim": 64, "encoder_layers": 2}
ARGS = Namespace(
    hidden_dim=256,
    dropout=0.0,
    nheads=8,
    num_queries=11,
    dim_feedforward=64,
    enc_layers=2,
    dec_layers=6,
    num_feature_levels=4,
    dec_n_points=4,
    enc_n_points=4,
    two_stage=False,
    position_embedding="sine",
    pe_temperatureH=20,
    pe_temperatureW=20,
)


class GivenPyramid(GivenFeatures):
    """In place of their backbone: three features that are already there."""

    def __init__(self, nested, features, padding, position):
        super().__init__(nested, features, padding, position)
        self.num_channels = [feature.shape[1] for feature in features]
        self.strides = [8, 16, 32]

    def __getitem__(self, index):
        return self.position


def use_fallback(load, ops, monkeypatch):
    """Let their attention operator run their own code in plain PyTorch, in package `ops`."""
    function = load(f"{ops}.functions.ms_deform_attn_func")

    def apply(value, shapes, _starts, locations, weights, _step):
        return function.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    monkeypatch.setattr(function.MSDeformAttnFunction, "apply", apply)


def our_model(method, config=None, **auxiliary):
    return build_model(
        method,
        config_of(method, **{**NUMBERS, **(config or {})}),
        in_channels=[8, 16, 24],
        strides=[8, 16, 32],
        **auxiliary,
    )
