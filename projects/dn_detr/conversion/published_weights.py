"""The catalogue of published weights, `published_weights.toml`, and downloads from it."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from dn_detr.datasets.cache import cache_folder
from dn_detr.errors import InputError

SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".safetensors")
"""Of the files that `safe_load` reads; other addresses are pages for a browser."""

SECONDS = 30
"""How long a server may be silent."""


@dataclass(frozen=True)
class PublishedWeights:
    """A file that others publish; nothing about it was tried here.

    name: What users call it.
    method: Key of `conversion.tables.TABLES`.
    ap: AP on COCO val2017, as published.
    address: Of the file, or of a page where it is downloaded by hand.
    repository, commit, file: Where the address is published.
    licence: SPDX name.
    config: Configuration of the detector; "" if it cannot be converted.
    options: KEY, VALUE, ... that distinguish it from this configuration.
    """

    name: str
    method: str
    ap: str
    address: str
    repository: str
    commit: str
    file: str
    licence: str
    config: str = ""
    options: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """Suffix of the file; "" where the address is a page."""
        suffix = os.path.splitext(self.address)[1]
        return suffix if suffix in SUFFIXES else ""


@cache
def catalogue() -> dict[str, PublishedWeights]:
    """Read the catalogue: name -> weights."""
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {
        entry["name"]: PublishedWeights(
            **{**source, **entry, "options": tuple(entry.get("options", ()))}
        )
        for source in content["source"]
        for entry in source.pop("weights")
    }


def find_weights(name: str) -> PublishedWeights:
    """Return the entry `name` of the catalogue; an InputError names similar ones."""
    if name in catalogue():
        return catalogue()[name]
    similar = [known for known in catalogue() if name in known][:5]
    similar = similar or difflib.get_close_matches(name, catalogue(), n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "`dn-detr weights` lists them."
    raise InputError(f"there are no published weights {name!r}: {hint}")


def published_hash(address: str) -> str:
    """Return the beginning of the sha256 that an address ends in, as in torch.hub; "" if none.

    A number without letters counts as a date, except in PyTorch's own addresses.
    """
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", address)
    if match is None or (match[1].isdigit() and "://download.pytorch.org/" not in address):
        return ""
    return match[1]


def check_hash(address: str, filename: str | Path) -> None:
    """Raise an InputError if the sha256 of a file is not that of `published_hash`."""
    expected = published_hash(address)
    with open(filename, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise InputError(
            f"{filename}, fetched from {address}, is damaged: its sha256 begins with {found[:8]} "
            f"and should begin with {expected}. Remove the file if it is there, and try again."
        )


def fetch(weights: PublishedWeights) -> Path:
    """Return the published file in the cache folder, downloaded unless it is there.

    Raises:
        InputError: If it is damaged or cannot be downloaded; says where to put it by hand.
    """
    folder = cache_folder() / "published"
    files = [folder / f"{weights.name}{suffix}" for suffix in SUFFIXES]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        path = folder / f"{weights.name}{weights.format or '.pth'}"
        by_hand = (
            f"download the file of {weights.name} from {weights.address} in another way, put it at "
            f"{path}{'' if weights.format else ' (or with its own suffix)'} and try again"
        )
        if not weights.format:
            raise InputError(f"this address is for a browser: {by_hand}.")
        try:
            download(weights.address, path)
        except (OSError, HTTPException) as error:
            raise InputError(
                f"{weights.address} cannot be fetched ({error}): try again, which goes on with "
                f"what has come, or {by_hand}.",
                longest=1000,
            ) from error
    check_hash(weights.address, path)
    return path


def download(address: str, path: Path) -> None:
    """Download a file with a progress bar; what is in "<path>.part" is not fetched again.

    Raises:
        InputError: If its hash is not that of its address.
        OSError, HTTPException: If it cannot be reached, written or does not come whole.
    """
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:
            raise
        part.unlink()  # nothing lies behind it: it is whole, or of another file
        return download(address, path)
    with answer:
        resumes = answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        done = done if resumes else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        bar = tqdm(desc=path.name, total=total, initial=done, unit="B", unit_scale=True)
        with part.open("ab" if resumes else "wb") as file, bar:
            while block := answer.read(1 << 20):
                bar.update(file.write(block))
            size = file.tell()
    if total not in (None, size):
        raise OSError(f"the connection ended after {size} of {total} bytes")
    try:
        check_hash(address, part)
    except InputError:
        part.unlink()  # so that another try does not go on with it
        raise
    os.replace(part, path)
