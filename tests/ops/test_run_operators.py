"""dev/run_operators.py, which compute-sanitizer runs on a GPU, at a few of its sizes on the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dn_detr.ops.extension import KERNELS

pytestmark = pytest.mark.skipif(not KERNELS, reason="dn_detr._C is not built")


@pytest.fixture
def script():
    path = Path(__file__).resolve().parents[2] / "dev" / "run_operators.py"
    spec = importlib.util.spec_from_file_location("run_operators", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DTYPES, module.SIZES = module.DTYPES[:2], module.SIZES[:2]
    return module


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_plain_twins_are_never_asked_to_be_deterministic(script, monkeypatch, is_deterministic):
    """PyTorch's `grid_sample` has no deterministic backward on a GPU: it would end the program."""
    grid_sample, modes = torch.nn.functional.grid_sample, []

    def watched(*args, **kwargs):
        sampled = grid_sample(*args, **kwargs)
        sampled.register_hook(lambda _: modes.append(torch.are_deterministic_algorithms_enabled()))
        return sampled

    monkeypatch.setattr(torch.nn.functional, "grid_sample", watched)
    script.run_sampling("cpu", is_deterministic)
    script.run_deformable_attention("cpu", is_deterministic)
    assert modes and not any(modes)
    assert not torch.are_deterministic_algorithms_enabled()


def test_samples_keep_away_from_whole_cells(script):
    """There another device's rounding gives another gradient."""
    for dtype in script.DTYPES:
        for shapes in script.LEVELS:
            for size in script.SIZES:
                (_, locations, _), _ = script.sampling_inputs("cpu", dtype, shapes, size)
                sizes = torch.tensor([(w, h) for h, w in shapes]).view(-1, 1, 2)
                cells = locations.detach().double() * sizes - 0.5
                assert ((cells - cells.round()).abs() > 1e-3).all()
