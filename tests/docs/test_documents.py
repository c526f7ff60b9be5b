"""Commands of the documents run or are parsed, links resolve, quoted messages exist in the code.

`doc_commands.py` lists how each command is tried."""

import argparse
import ast
import importlib.util
import re
import runpy
import sys

import pytest
from doc_commands import DOCUMENTS, NOT_RUN, NOT_TRIED, PARSED, ROOT, RUN, blocks, commands

COMMANDS = commands()
RUNNING = [c for c in COMMANDS if c.begins_with(RUN) and not any(w in c.text for w in NOT_RUN)]
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
needs_detectron2 = pytest.mark.skipif(not HAS_DETECTRON2, reason="Detectron2 is not installed")


@pytest.fixture
def in_world(world, monkeypatch):
    monkeypatch.chdir(world.folder)
    return world


def test_every_command_is_of_a_known_kind():
    known = (*RUN, *PARSED, *NOT_TRIED)
    assert [str(c) for c in COMMANDS if not c.begins_with(known)] == []


def test_every_kind_is_still_in_a_document():
    assert [p for p in (*RUN, *PARSED) if not any(c.begins_with([p]) for c in COMMANDS)] == []


@needs_detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", RUNNING, ids=str)
def test_a_command_runs(command, in_world):
    in_world.run(command)


class Parsed(Exception):
    """Ends a program when its command line has been understood."""


@needs_detectron2
@pytest.mark.parametrize("command", COMMANDS, ids=str)
@pytest.mark.usefixtures("in_world")
def test_a_command_line_is_understood(command, monkeypatch):
    """By the program's own parser; configuration files must exist, and keys must be known."""
    from dn_detr.cli.main import parse
    from dn_detr.d2.config.defaults import read_config

    words = command.words
    if words[0] == "dn-detr":
        args = parse(words[1:])
        config = getattr(args, "config", None)
        if config and "*" not in config:
            read_config(config, list(getattr(args, "opts", ())))
        return
    if "python" not in words[0] and words[0] != "torchrun":
        pytest.skip(NOT_TRIED[command.begins_with(NOT_TRIED)])
    words = words[words.index("train_net.py") :] if words[0] == "torchrun" else words[1:]
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    is_module = words[0] == "-m"
    words = words[1:] if is_module else words
    words = [word for word in words if word not in ("KEY", "VALUE", "...", "[KEY", "VALUE]")]
    monkeypatch.setattr(sys, "argv", words)
    if is_module:
        importlib.import_module(words[0])
        return
    monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
    with pytest.raises(Parsed) as caught:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    args = caught.value.args[0]
    files = getattr(args, "config_file", None) or []
    for file in [files] if isinstance(files, str) else files:
        if "*" not in str(file):
            read_config(str(file), list(getattr(args, "opts", None) or []))


# ------------------------------------------------------------------------------------------ python

NOT_EXECUTED = {
    'InferenceSession("detector.onnx")': "needs an exported file",
    'torch.export.load("detector.pt2"': "needs an exported file",
    '"old.pth"': "needs checkpoints of others",
    "from transformers": "needs transformers; test_ms_deform_attn.py runs it",
}
"""Parts of the Python blocks that are only compiled, and why."""


@needs_detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda path: path.name
)
@pytest.mark.usefixtures("in_world")
def test_the_blocks_of_python_run_one_after_the_other(document):
    names = {}
    for text in blocks(document, "python"):
        code = compile(text, document.name, "exec")
        if not any(part in text for part in NOT_EXECUTED):
            exec(code, names)


# ------------------------------------------------------------------------------- links and messages

LINK = re.compile(r"\]\(([^)\s]+)\)")
LINKED = [*sorted(ROOT.glob("*.md")), *(d for d in DOCUMENTS if d.parent != ROOT)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", LINKED, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def texts_of_the_code() -> str:
    """All texts in the Python sources, adjacent ones joined, with … for what is put in."""
    texts = []
    sources = [*ROOT.glob("*.py"), *(ROOT / "projects").rglob("*.py"), *ROOT.glob("tools/*.py")]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_that_are_quoted_are_messages_of_the_code():
    said = texts_of_the_code()
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^> (.+)$", text, re.MULTILINE)
    assert len(quoted) > 10
    fragments = [part.strip(" '`") for line in quoted for part in line.split("…")]
    assert [part for part in fragments if part not in said] == []
