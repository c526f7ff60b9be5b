"""The subpackages of the package: who may import whom, and what the core must not do.

The rules are read off the syntax trees of the sources, so that an import inside a function counts
as well; one more test runs the core where Detectron2 cannot be imported.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dn_detr

PACKAGE = Path(dn_detr.__file__).parent
MODULES = {
    ".".join((*path.relative_to(PACKAGE).parent.parts, path.stem)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Dotted name inside the package -> syntax tree; a folder's own file is <subpackage>.__init__."""

CORE = {
    "structures": {"errors"},
    "protocols": {"layers", "structures"},
    "ops": {"errors"},
    "layers": {"errors", "ops", "structures"},
    "models": {"errors", "layers", "ops", "protocols", "structures"},
    "methods": {"errors", "layers", "models", "structures"},
    "auxiliary": {"errors", "layers", "ops", "protocols", "structures"},
    "losses": {"errors", "layers", "ops", "protocols", "structures"},
    "analysis": {"errors", "structures"},
    "build": {"auxiliary", "errors", "layers", "losses", "methods", "models", "structures"},
}
"""Subpackage -> those it may import: plain PyTorch, with SciPy for the matching."""

OTHERS = {
    "__init__": set(),
    "errors": set(),
    "safe_yaml": set(),
    "info": {"errors", "install_detectron2", "ops"},
    "install_detectron2": set(),
    "datasets": {"errors", "safe_yaml"},
    "conversion": {"datasets", "errors"},
    "d2": {*CORE, "datasets", "errors", "conversion", "safe_yaml"},
    "detector": {"d2", "datasets", "errors"},
    "cli": {"d2", "datasets", "detector", "errors", "conversion", "info"},
    "__main__": {"cli"},
}

OUTSIDE = {
    **dict.fromkeys(CORE, {"numpy", "scipy", "torch"}),
    "ops": {"torch"},
    "info": {"torch"},
    "safe_yaml": {"yaml"},
    "datasets": {"numpy", "PIL", "yaml"},
    "conversion": {"numpy", "torch", "tqdm"},
    "detector": {"PIL", "detectron2", "numpy", "pycocotools", "supervision", "torch"},
}
"""Subpackage -> packages it may import beside the standard library; none if not named."""

TRACED = ("layers", "models", "methods", "auxiliary")
"""Subpackages whose code is compiled and exported, and must not wait for the device."""


def subpackage_of(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST):
    """Dotted names of everything that is imported; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_subpackages(tree: ast.AST):
    """Rooms of the package that are imported; `from dn_detr import __version__` is none."""
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "dn_detr" and len(parts) > 1 and not parts[1].startswith("__"):
            yield parts[1]


def test_every_subpackage_has_a_rule():
    assert {subpackage_of(module) for module in MODULES} <= {*CORE, *OTHERS}


@pytest.mark.parametrize("module", MODULES)
def test_subpackages_import_only_what_they_may(module):
    subpackage = subpackage_of(module)
    allowed = {**CORE, **OTHERS}[subpackage] | {subpackage}
    assert set(own_subpackages(MODULES[module])) <= allowed, module


@pytest.mark.parametrize("module", [m for m in MODULES if subpackage_of(m) != "d2"])
def test_only_the_detectron2_subpackage_imports_other_packages_than_its_table_says(module):
    packages = {name.split(".")[0] for name in imports(MODULES[module])}
    foreign = packages - set(sys.stdlib_module_names) - {"dn_detr"}
    assert foreign <= OUTSIDE.get(subpackage_of(module), set()), module


@pytest.mark.parametrize("module", [m for m in MODULES if subpackage_of(m) in CORE])
def test_the_core_neither_logs_nor_asks_for_other_processes(module):
    forbidden = ("argparse", "logging", "torch.distributed")
    assert not [n for n in imports(MODULES[module]) if n.startswith(forbidden)], module


def test_nobody_imports_the_programs_beside_the_package():
    programs = {"benchmarks", "examples", "setup", "tests", "tools", "train_net"}
    for module, tree in MODULES.items():
        assert programs.isdisjoint(name.split(".")[0] for name in imports(tree)), module


def test_methods_do_not_import_each_other():
    for module, tree in MODULES.items():
        if subpackage_of(module) == "methods" and module != "methods.__init__":
            assert "methods" not in set(own_subpackages(tree)), module


# --------------------------------------------------------------------- nothing asks the device


def called(node: ast.AST) -> str | None:
    """`f` of f(...), `.m` of x.m(...); None for everything else."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return f".{node.func.attr}"
    return node.func.id if isinstance(node.func, ast.Name) else None


@pytest.mark.parametrize("module", [m for m in MODULES if subpackage_of(m) in TRACED])
def test_nothing_copies_tensors_to_the_host_or_makes_sizes_into_tensors(module):
    forbidden = {".item", ".tolist", ".nonzero", ".numpy", ".cpu", ".new_tensor"}
    calls = [(called(n), n.lineno) for n in ast.walk(MODULES[module]) if called(n) in forbidden]
    assert not calls, f"{module}: {calls}"


def is_container(value: ast.AST) -> bool:
    """Whether an expression is a list, tuple or ModuleList by its own form."""
    containers = ("list", "tuple", "dict", "sorted", ".ModuleList", ".ModuleDict", ".ParameterList")
    displays = (ast.List, ast.Tuple, ast.ListComp, ast.Dict, ast.DictComp)
    return isinstance(value, displays) or called(value) in containers


def container_names(tree: ast.AST) -> set[str]:
    """Names (`x`, `self.x`) that are annotated or assigned as containers anywhere in the file."""
    kinds = ("list", "tuple", "dict", "Sequence", "Collection", "Mapping")
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            if ast.unparse(node.annotation).startswith(kinds):
                names.add(node.arg)
        elif isinstance(node, ast.AnnAssign):
            if ast.unparse(node.annotation).startswith(kinds):
                names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign) and is_container(node.value):
            names.update(map(ast.unparse, node.targets))
    return names


@pytest.mark.parametrize("module", [m for m in MODULES if subpackage_of(m) in TRACED])
def test_len_is_asked_of_lists_only(module):
    """The length of a tensor is a constant of an exported model: write x.shape[0]."""
    tree = MODULES[module]
    known = container_names(tree)
    asked = [ast.unparse(n.args[0]) for n in ast.walk(tree) if called(n) == "len"]
    assert set(asked) <= known, f"{module}: not known to be lists: {set(asked) - known}"


def test_the_rules_find_what_they_forbid():
    tree = ast.parse(
        "def f(x, y: list[int]):\n"
        "    from dn_detr.d2 import config\n"
        "    import dn_detr.losses.matcher as a\n"
        "    return len(x), len(y), x.item()"
    )
    assert set(own_subpackages(tree)) == {"d2", "losses"}
    assert [called(n) for n in ast.walk(tree) if called(n)].count("len") == 2
    assert container_names(tree) == {"y"}
    assert ".item" in [called(n) for n in ast.walk(tree)]


# ------------------------------------------------------------------------ without Detectron2

WITHOUT_DETECTRON2 = """
import sys
for name in ("detectron2", "fvcore", "pycocotools"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from tiny import tiny_features, tiny_model, tiny_padding, tiny_targets
from dn_detr.build import Denoising, LossConfig
from dn_detr.datasets import shapes
from dn_detr.losses.matcher import Costs, assign

model = tiny_model("dab_deformable", denoising=Denoising(num_groups=2))
targets = tiny_targets(2, 0)
predictions = model(tiny_features(2), tiny_padding([(96, 128), (64, 80)]), targets)
losses = LossConfig().criterion()(predictions, targets, assign(predictions, targets, Costs()), 2.0)
sum(losses.values()).backward()
assert all(value.isfinite() for value in losses.values())
try:
    import dn_detr.d2
except ImportError as error:
    print(error)
"""


def test_the_core_trains_where_detectron2_is_missing_and_its_subpackage_says_how_to_install_it():
    paths = [str(Path(__file__).parent), str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DETECTRON2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "needs Detectron2 (" in done.stdout and "): run `python -m dn_detr.install" in done.stdout
    )
    assert done.stdout.count("\n") == 1
