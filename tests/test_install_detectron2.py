"""Where Detectron2 comes from, and that nothing else than its own files is taken from others."""

import hashlib
import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dn_detr import install_detectron2 as chooser

VERSION_FILE = b'version_of = None\n__version__ = "0.6"'
FILES = {
    "detectron2/__init__.py": VERSION_FILE.replace(b"0.6", b"0.7.2"),
    "detectron2/engine/loop.py": b"steps = 1\n",
    "detectron2/model_zoo/configs/a.yaml": b"A: 1\n",
    chooser.LICENCE: b"Apache License\n",
}
OTHERS = {
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": b"not a library: must not be taken",
    "detectron2/unknown.py": b"raise SystemExit\n",
    "../escaped.py": b"raise SystemExit\n",
    "sal_detectron2-0.7.2.dist-info/METADATA": b"Name: sal-detectron2\n",
}


@pytest.fixture
def wheel_of(tmp_path, monkeypatch):
    """Writes a wheel with some files changed, and the manifest of the unchanged ones."""

    def wheel_of(**changes):
        path = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**FILES, **OTHERS, **changes.get("files", {})}.items():
                if data is not None:
                    place = chooser.WHEELS_LICENCE if name == chooser.LICENCE else name
                    archive.writestr(place, data)
        manifest = tmp_path / "manifest.txt"
        blobs = {n: chooser.git_blob(chooser.as_detectron2s(n, data)) for n, data in FILES.items()}
        blobs.update(changes.get("manifest", {}))
        manifest.write_text("".join(f"{blob} {name}\n" for name, blob in blobs.items()))
        monkeypatch.setattr(chooser, "MANIFEST", manifest)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(chooser, "WHEEL_SHA256", digest)
        return path

    return wheel_of


def not_found(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """No network: `reaches` says whether git gets an answer, `broken` for which arguments pip
    fails; calls of both are kept. Detectron2 is not installed."""

    class World:
        reaches, broken, wheel = True, (), None
        git, pip = [], []

    world = World()

    def run(command, **_options):
        world.git = [*world.git, command]
        if not world.reaches:
            raise subprocess.CalledProcessError(128, command, stderr="fatal: no route\nto host")

    def call(command, env):
        arguments = command[4:]
        world.pip = [*world.pip, arguments]
        assert env["FORCE_CUDA"] == "0"
        if arguments[0] == "download" and world.wheel:
            folder = arguments[arguments.index("--dest") + 1]
            requirements = arguments[arguments.index("--requirement") + 1]
            text = Path(requirements).read_text()
            assert text == f"{chooser.WHEEL} --hash=sha256:{chooser.WHEEL_SHA256}\n"
            (tmp_path / "downloaded").mkdir(exist_ok=True)
            (chooser.Path(folder) / world.wheel.name).write_bytes(world.wheel.read_bytes())
        return int(any(word in " ".join(arguments) for word in world.broken))

    monkeypatch.setattr(chooser.subprocess, "run", run)
    monkeypatch.setattr(chooser.subprocess, "call", call)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        chooser.importlib.util, "find_spec", lambda n: None if n == "detectron2" else real(n)
    )
    monkeypatch.setattr(chooser.metadata, "distribution", not_found)
    monkeypatch.setattr(sys, "argv", ["install_detectron2"])
    monkeypatch.delenv("DETECTRON2", raising=False)
    return world


def installed(world) -> list[str]:
    """What pip was asked to install with the installed torch."""
    return [
        a[a.index("--no-build-isolation") + 1] for a in world.pip if "--no-build-isolation" in a
    ]


# ------------------------------------------------------------------------------ the order


def test_github_at_the_tested_commit_comes_first(world, capsys):
    chooser.main()
    assert installed(world) == [chooser.GITHUB] and len(world.git) == 1
    assert re.search(r"detectron2\.git@[0-9a-f]{40}$", chooser.GITHUB)
    assert "from GitHub, at the tested commit" in capsys.readouterr().out


def test_a_source_of_the_users_own_is_taken_and_nothing_else_asked(world, monkeypatch):
    monkeypatch.setenv("DETECTRON2", "/my/detectron2")
    chooser.main()
    assert installed(world) == ["/my/detectron2"] and not world.git


def test_without_github_it_is_asked_twice_and_then_the_wheels_files_are_taken(
    world, wheel_of, capsys
):
    world.reaches, world.wheel = False, wheel_of()
    chooser.main()
    assert len(world.git) == 2
    (wheel,) = installed(world)
    assert wheel.endswith(f"detectron2-{chooser.LOCAL_VERSION}-py3-none-any.whl")
    said = capsys.readouterr().out
    assert "GitHub cannot be reached (fatal: no route to host)" in said
    assert "DETECTRON2=github disables this" in said


def test_a_build_that_fails_falls_back_too(world, wheel_of):
    world.broken, world.wheel = ("git+https",), wheel_of()
    chooser.main()
    assert len(installed(world)) == 2


def test_the_wheel_can_be_forbidden(world, wheel_of, monkeypatch):
    world.reaches, world.wheel = False, wheel_of()
    monkeypatch.setenv("DETECTRON2", "github")
    with pytest.raises(
        SystemExit, match="GitHub cannot be reached.*DETECTRON2=github allows no other"
    ):
        chooser.main()
    assert not world.pip


def test_where_nothing_is_reached_one_sentence_says_what_to_do(world):
    world.reaches, world.broken = False, ("download",)
    with pytest.raises(SystemExit) as ended:
        chooser.main()
    sentence = ended.value.code
    assert sentence.startswith("install_detectron2: GitHub cannot be reached")
    assert f"copy Detectron2 at commit {chooser.COMMIT[:8]} to this machine" in sentence
    assert "\n" not in sentence


def is_installed(monkeypatch, version: str, origin: dict | None) -> None:
    """Detectron2 is there, and this is what pip has written down of it."""

    class Found:
        def read_text(self, _name):
            return None if origin is None else json.dumps(origin)

    Found.version = version
    monkeypatch.setattr(chooser.metadata, "distribution", lambda name: Found())
    has_package(monkeypatch, "/site-packages/detectron2/__init__.py")


def has_package(monkeypatch, origin: str | None) -> None:
    spec = SimpleNamespace(origin=origin)
    monkeypatch.setattr(chooser.importlib.util, "find_spec", lambda name: spec)


def of_commit(commit: str, url: str = chooser.REPOSITORY) -> dict:
    return {"url": url, "vcs_info": {"commit_id": commit}}


FROM_PYPI = (chooser.LOCAL_VERSION, {"url": "file:///folder/x.whl", "archive_info": {}})
OF_THE_USER = ("0.6", of_commit("1" * 40, "https://elsewhere"))


@pytest.mark.parametrize(
    ("version", "origin", "source", "stays"),
    [
        ("0.6", of_commit(chooser.COMMIT), "", True),
        ("0.6", of_commit(chooser.COMMIT), "github", True),
        ("0.6", of_commit("1" * 40), "", False),  # it was the tested one once
        (*OF_THE_USER, "", True),
        (*OF_THE_USER, "github", False),
        ("0.6", None, "", True),
        (*FROM_PYPI, "", False),
        (*FROM_PYPI, "github", False),
    ],
)
def test_of_what_is_installed_the_tested_one_stays_and_that_of_the_user(
    world, monkeypatch, capsys, version, origin, source, stays
):
    is_installed(monkeypatch, version, origin)
    monkeypatch.setenv("DETECTRON2", source)
    chooser.main()
    assert ("already installed" in capsys.readouterr().out) == stays
    assert len(world.git) == (not stays)
    forced = [arguments for arguments in world.pip if "--force-reinstall" in arguments]
    assert len(forced) == (not stays)
    assert all(chooser.GITHUB in arguments and "--no-deps" in arguments for arguments in forced)


@pytest.mark.parametrize("origin", [None, "/site-packages/detectron2/__init__.py"])
def test_a_bare_folder_or_an_interrupted_installation_is_no_detectron2(world, monkeypatch, origin):
    """Neither has metadata; a folder without __init__.py in the current directory has no origin."""
    has_package(monkeypatch, origin)
    chooser.main()
    assert installed(world) == [chooser.GITHUB]
    assert not any("--force-reinstall" in arguments for arguments in world.pip)


def test_without_github_an_interrupted_installation_is_replaced(world, wheel_of, monkeypatch):
    has_package(monkeypatch, "/site-packages/detectron2/__init__.py")
    world.reaches, world.wheel = False, wheel_of()
    chooser.main()
    assert len(installed(world)) == 1


def test_detectron2_on_pythonpath_stays(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", f":/elsewhere:{tmp_path}")
    has_package(monkeypatch, str(tmp_path / "detectron2" / "__init__.py"))
    chooser.main()
    assert not installed(world) and not world.git


@pytest.mark.parametrize("package", [None, SimpleNamespace(origin=None)])
def test_metadata_without_the_package_is_reinstalled_by_force(world, monkeypatch, package):
    is_installed(monkeypatch, "0.6", of_commit(chooser.COMMIT))
    monkeypatch.setattr(
        chooser.importlib.util, "find_spec", lambda n: package if n == "detectron2" else object()
    )
    chooser.main()
    (forced,) = [arguments for arguments in world.pip if "--force-reinstall" in arguments]
    assert chooser.GITHUB in forced


def test_what_an_installed_detectron2_lacks_is_installed(world, monkeypatch):
    is_installed(monkeypatch, "0.6", of_commit(chooser.COMMIT))
    chooser.main()
    (arguments,) = world.pip
    assert {*chooser.REQUIREMENTS, *chooser.UNDECLARED} < set(arguments)


def test_without_github_the_installed_one_is_not_replaced_by_files_from_pypi(
    world, monkeypatch, capsys
):
    is_installed(monkeypatch, "0.6", of_commit("1" * 40))
    world.reaches = False
    chooser.main()
    assert not installed(world) and not any(a[0] == "download" for a in world.pip)
    assert "The installed Detectron2 is kept" in capsys.readouterr().out


def test_it_needs_what_detectron2_itself_declares():
    if f"commit {chooser.COMMIT[:8]}" not in chooser.describe():
        pytest.skip("Detectron2 is not installed at the tested commit")
    declared = [r for r in importlib.metadata.requires("detectron2") if ";" not in r]
    names = {re.match(r"[\w-]+", r)[0].lower() for r in declared}
    assert {re.match(r"[\w-]+", r)[0].lower() for r in chooser.REQUIREMENTS} == names - {"black"}


def test_torch_comes_before_detectron2(world, monkeypatch):
    monkeypatch.setattr(chooser.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit, match="torch is missing: run `pip install torch torchvision`"):
        chooser.main()
    assert not world.pip


# ------------------------------------------------------------------------------ the files


def test_only_the_manifests_files_get_into_the_wheel_that_is_installed(wheel_of, tmp_path):
    made = chooser.build_wheel(wheel_of(), tmp_path)
    with zipfile.ZipFile(made) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    info = f"detectron2-{chooser.LOCAL_VERSION}.dist-info"
    described = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    assert content.keys() == {*FILES, *described}
    assert content["detectron2/__init__.py"] == VERSION_FILE
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(made)], check=True)
    (found,) = importlib.metadata.distributions(path=[str(target)])
    assert (found.name, found.version) == ("detectron2", chooser.LOCAL_VERSION)
    files = {str(file) for file in found.files if "dist-info" not in str(file)}
    assert {file for file in files if not file.endswith(".pyc")} == {*FILES}
    assert found.metadata["License"] == "Apache-2.0"
    assert (target / chooser.LICENCE).read_bytes() == b"Apache License\n"
    assert any(requirement.startswith("fvcore") for requirement in found.requires)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"files": {"detectron2/engine/loop.py": b"steps = 2\n"}},
            "detectron2/engine/loop.py in .* is not Detectron2's file",
        ),
        (
            {"files": {"detectron2/__init__.py": FILES["detectron2/__init__.py"] + b"\nx = 1"}},
            "detectron2/__init__.py in .* is not Detectron2's file",
        ),
        ({"files": {"detectron2/engine/loop.py": None}}, "lacks detectron2/engine/loop.py"),
        ({"manifest": {"detectron2/_C.so": "0" * 40}}, "lists detectron2/_C.so, which is no"),
        ({"manifest": {"../escaped.py": "0" * 40}}, "lists ../escaped.py, which is no Python"),
        (
            {"manifest": {"detectron2/../../escaped.py": "0" * 40}},
            "lists detectron2/../../escaped.py, which is no Python",
        ),
    ],
)
def test_a_file_that_is_not_detectron2s_own_is_refused(wheel_of, changes, sentence):
    with pytest.raises(chooser.Failed, match=sentence):
        chooser.checked_files(wheel_of(**changes))


def test_a_wheel_of_another_content_is_refused(world, wheel_of):
    world.reaches, world.wheel = False, wheel_of()
    world.wheel.write_bytes(world.wheel.read_bytes() + b"more")
    with pytest.raises(SystemExit, match="has the sha256 [0-9a-f]{64} instead of"):
        chooser.main()
    assert not installed(world)


def test_the_files_alone_can_be_had(world, wheel_of, monkeypatch, tmp_path):
    world.wheel = wheel_of()
    monkeypatch.setattr(sys, "argv", ["install_detectron2", "--files", str(tmp_path / "files")])
    chooser.main()
    written = [p for p in (tmp_path / "files").rglob("*") if p.is_file()]
    assert {str(path.relative_to(tmp_path / "files")) for path in written} == {*FILES}
    assert not installed(world)


@pytest.fixture
def write_files(world, wheel_of, monkeypatch, tmp_path):
    """Writes the files of a wheel into the folder `files`; returns the sentence that ends it."""
    world.wheel = wheel_of()
    monkeypatch.setattr(sys, "argv", ["install_detectron2", "--files", str(tmp_path / "files")])

    def write_files() -> str:
        with pytest.raises(SystemExit) as ended:
            chooser.main()
        assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
        return ended.value.code

    return write_files


def test_files_cannot_go_into_a_file(write_files, tmp_path):
    (tmp_path / "files").write_text("")
    assert "the files cannot be written: " in write_files()


def test_files_go_neither_among_older_ones_nor_through_a_link(write_files, tmp_path):
    package = tmp_path / "files" / "detectron2"
    package.mkdir(parents=True)
    (package / "old.py").write_text("")
    assert f"{package} exists already: remove it" in write_files()
    package.rename(tmp_path / "elsewhere")
    package.symlink_to(tmp_path / "elsewhere")
    assert f"{package} exists already: remove it" in write_files()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["old.py"]


def test_files_are_not_written_where_github_is_asked_for(write_files, world, monkeypatch):
    monkeypatch.setenv("DETECTRON2", "github")
    assert "DETECTRON2=github forbids them" in write_files()
    assert not world.pip


def has_a_bad_crc(wheel: bytes) -> bytes:
    return wheel.replace(b"steps = 1", b"steps = 2")


@pytest.mark.parametrize("damage", [has_a_bad_crc, lambda wheel: b"no zip", lambda wheel: b""])
def test_a_damaged_wheel_is_refused_in_one_sentence(write_files, world, monkeypatch, damage):
    damaged = damage(world.wheel.read_bytes())
    world.wheel.write_bytes(damaged)
    monkeypatch.setattr(chooser, "WHEEL_SHA256", hashlib.sha256(damaged).hexdigest())
    assert f"{world.wheel.name} is damaged: " in write_files()


@pytest.mark.parametrize("module", ["info", "install_detectron2"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_printed_and_nothing_is_done(module, option):
    """The one refused --help, the other ignored it."""
    command = [sys.executable, "-m", f"dn_detr.{module}", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert f"python -m dn_detr.{module}" in done.stdout
    assert "GPU" not in done.stdout and "$ pip" not in done.stdout


def test_the_manifest_names_python_files_of_detectron2_alone():
    manifest = chooser.read_manifest()
    assert len(manifest) > 300 and chooser.VERSION_FILE in manifest
    assert all(re.fullmatch("[0-9a-f]{40}", blob) for blob in manifest.values())
    assert chooser.LICENCE in manifest
    assert all(name.endswith((".py", ".yaml")) for name in manifest if name != chooser.LICENCE)
    # Git's name of an empty file, which is one of them.
    assert chooser.git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


# ------------------------------------------------------------------------ what is installed


@pytest.mark.parametrize(
    ("version", "origin", "expected"),
    [
        (chooser.LOCAL_VERSION, None, "without compiled operators"),
        (
            "0.6",
            {"url": chooser.REPOSITORY, "vcs_info": {"commit_id": chooser.COMMIT}},
            f"commit {chooser.COMMIT[:8]} of {chooser.REPOSITORY}, the tested one",
        ),
        (
            "0.6",
            {"url": "https://elsewhere", "vcs_info": {"commit_id": "1" * 40}},
            f"commit 11111111 of https://elsewhere, tested is {chooser.COMMIT[:8]}",
        ),
        ("0.6", {"url": "file:///my/detectron2"}, "0.6 from file:///my/detectron2"),
        ("0.6", None, "0.6 from an index"),
    ],
)
def test_the_installed_one_is_described(monkeypatch, version, origin, expected):
    class Found:
        def read_text(self, _name):
            return None if origin is None else json.dumps(origin)

    Found.version = version
    monkeypatch.setattr(chooser.metadata, "distribution", lambda _name: Found())
    assert expected in chooser.describe()
