"""The fenced blocks and commands of the documents, and how a test tries each command."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tiny import read_by

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CELL = re.compile(r"\| `((?:python|torchrun|make|dn-detr) [^`|]+)` \|")
"""A cell of a table that holds a command and nothing else."""

RUN = (
    "python train_net.py",
    "python -m dn_detr.install_detectron2",
    "dn-detr check",
    "dn-detr eval",
    "dn-detr info",
    "dn-detr plot",
    "dn-detr predict",
    "dn-detr split",
    "dn-detr train",
    "dn-detr visualize detections",
)
"""Programs that run, made small by `reduced`, in the folder of the fixture `world`."""

PARSED = {
    "python benchmarks/auxiliary_queries.py": "tests/benchmarks run it",
    "python benchmarks/denoising_queries.py": "tests/benchmarks run it",
    "python benchmarks/ms_deform_attn.py": "tests/benchmarks run it",
    "python benchmarks/train_step.py": "tests/benchmarks run it",
    "python examples/plain_pytorch.py": "trains for minutes",
    "dn-detr benchmark": "tests/cli run it",
    "dn-detr convert": "needs weights of others and other formats; tests/conversion and d2 run it",
    "dn-detr export": "takes a minute; tests/d2/test_export.py runs its parts",
    "dn-detr visualize": "tests/d2 run it",
    "python tools/evaluate_prompts.py": "tests/d2/test_prompts.py runs it",
    "python tools/make_teacher_boxes.py": "tests/d2 run it",
    "python tools/replay_not_finite.py": "needs a training that failed; tests/d2 run it",
    "python tools/run_exported.py": "needs an exported file; tests/d2/test_export.py runs it",
    "python tools/train_all_quick.py": "trains for an hour",
    "python -m pytest": "tests within a test",
    "torchrun": "starts processes; tests/d2/test_distributed.py does",
}
"""Programs whose command lines are only parsed, and why. Configurations and keys must exist."""

NOT_TRIED = {
    "dn-detr weights": "needs a network; tests/d2/test_convert_file.py runs it",
    "make": "make demo and make test are the commands of this repository's own checks",
    "pip": "installs",
    "export": "sets a variable of the shell",
}
"""Commands that are not tried, and why."""

NOT_RUN = (
    "webcam",
    "MODEL.WEIGHTS detrex-",
    "configs/backbones/",
    "coco_2017_train",
    "--num-machines",
    "@ema",
    "TEST.INSTABILITY",
    "configs/quick/teach_dn_deformable",
    "INPUT.SCHEDULE",
    "output/all_quick/backbone.pth",
    "configs/*.yaml",
    "dn-detr train --resume",
)
"""Command lines of RUN that need a camera, a network, timm, teachers, the backbone of an earlier
comparison, or the full number of iterations of a schedule."""


@dataclass(frozen=True)
class Command:
    """One command of a document, its lines joined."""

    document: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.text[:90]}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def begins_with(self, programs) -> str | None:
        return next((p for p in programs if self.text.startswith(f"{p} ") or self.text == p), None)


def blocks(document: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return [text for name, text in BLOCK.findall(document.read_text()) if name == language]


def commands() -> list[Command]:
    """Every command in a bash block or in a cell of a table of a document."""
    found = []
    for document in DOCUMENTS:
        for block in (*blocks(document, "bash"), *CELL.findall(document.read_text())):
            for line in block.replace("\\\n", " ").splitlines():
                text = " ".join(line.split())
                if text and not text.startswith("#"):
                    found.append(Command(str(document.relative_to(ROOT)), text))
    return list(dict.fromkeys(found))


def reduced(words: list[str], tiny: list[str]) -> list[str]:
    """The words of a command, made small: no GPU, quick configurations, then the options `tiny`.

    The placeholders KEY and VALUE are left out.
    """
    small = []
    for word in words:
        if word == "dn_deformable":
            word = "configs/dn_deformable.yaml"
        if word.startswith("configs/") and not word.startswith("configs/quick/"):
            word = word.replace("configs/", "configs/quick/")
        small.append(word)
    if "--num-gpus" in small:
        small[small.index("--num-gpus") + 1] = "0"
    if "--epochs" in small:
        small[small.index("--epochs") + 1] = "0.5"
    small = [word for word in small if word not in ("KEY", "VALUE", "...", "[KEY", "VALUE]")]
    file = next((word for word in small if word.startswith("configs/")), None)
    opts = small[small.index("--config-file") + 2 :] if "--config-file" in small else []
    opts = [word for word in opts if not word.startswith("--")]
    return small + (read_by(ROOT / file, tiny, opts) if file else tiny)
