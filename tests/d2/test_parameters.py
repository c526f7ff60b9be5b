"""Names of parameters, their learning rate and weight decay are those of parameters.txt.

A checkpoint is read by these names: whoever changes one raises `checkpoint.FORMAT` and writes the
file anew (`python tests/d2/test_parameters.py`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from detectron2.modeling import build_model

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.solver.optimizer import build_optimizer

LIST = Path(__file__).with_name("parameters.txt")
CONFIGS = Path(__file__).resolve().parents[2] / "configs/quick"
NAMES = sorted(path.stem for path in CONFIGS.glob("[a-z]*.yaml"))


def parameters_of(name: str) -> set[tuple[str, str]]:
    """(name with # for numbers, "learning rate, weight decay") of each parameter but the backbone's
    own, by the numbers of the configuration."""
    cfg = read_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    rates = {
        parameter: f"{group['lr'] / cfg.SOLVER.BASE_LR:g}, {group['weight_decay']:g}"
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    return {
        (re.sub(r"\.\d+(?=\.|$)", ".#", name), rates[parameter])
        for name, parameter in model.named_parameters()
        if parameter in rates and not re.match(r"backbone\.(bottom_up\.)?(stem|res\d)", name)
    }


def listed() -> str:
    configs = defaultdict(list)
    for name in NAMES:
        for parameter in parameters_of(name):
            configs[parameter].append(name)
    lines = ["# parameter: learning-rate factor, weight decay: configurations of configs/quick"]
    for (parameter, rate), names in sorted(configs.items()):
        which = "all" if names == NAMES else " ".join(names)
        lines.append(f"{parameter}: {rate}: {which}")
    return "\n".join(lines) + "\n"


def test_every_parameter_has_its_name_learning_rate_and_weight_decay():
    assert listed() == LIST.read_text()


if __name__ == "__main__":
    LIST.write_text(listed())
