"""The catalogue of published weights, and downloads from a local server."""

from __future__ import annotations

import hashlib
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from weights_server import serving

from dn_detr.conversion import published_weights
from dn_detr.conversion.published_weights import catalogue, check_hash, fetch, find_weights
from dn_detr.conversion.tables import TABLES
from dn_detr.errors import InputError

CONTENT = random.Random(0).randbytes(3_000_000)
HASH = hashlib.sha256(CONTENT).hexdigest()[:8]
PATH = f"/detr-{HASH}.pth"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path))
    with serving() as server:
        server.files = {PATH: CONTENT}
        yield server


def published_at(address: str):
    return replace(catalogue()["detr-r50"], address=address)


def cached(tmp_path):
    return tmp_path / "published" / "detr-r50.pth"


def test_a_file_is_fetched_once(server, tmp_path):
    weights = published_at(server.address(PATH))
    assert fetch(weights) == cached(tmp_path) and cached(tmp_path).read_bytes() == CONTENT
    assert fetch(weights).read_bytes() == CONTENT
    assert server.ranges == [None]
    assert os.listdir(tmp_path / "published") == ["detr-r50.pth"]


def test_an_interrupted_download_goes_on_where_it_ended(server, tmp_path):
    weights = published_at(server.address(PATH))
    server.cut = 1_000_000
    with pytest.raises(InputError, match="ended after 1000000 of 3000000 bytes.*try again"):
        fetch(weights)
    assert not cached(tmp_path).exists()
    server.cut = None
    assert fetch(weights).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-"]


def test_a_server_that_sends_no_parts_sends_all(server):
    weights = published_at(server.address(PATH))
    server.cut, server.knows_ranges = 1_000_000, False
    with pytest.raises(InputError, match="ended after"):
        fetch(weights)
    server.cut = None
    assert fetch(weights).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [3_000_000, 3_500_000])
def test_a_part_as_long_as_the_file_is_fetched_anew(server, tmp_path, size):
    """Its server has nothing to send behind it, and answers with an error."""
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "detr-r50.pth.part").write_bytes(bytes(size))
    assert fetch(published_at(server.address(PATH))).read_bytes() == CONTENT


def test_a_file_with_another_hash_than_published_is_refused(server, tmp_path):
    path = "/detr-0000000a.pth"
    server.files[path] = CONTENT
    with pytest.raises(InputError, match=f"begins with {HASH} and should begin with 0000000a"):
        fetch(published_at(server.address(path)))
    assert not list((tmp_path / "published").iterdir())  # so that a second try fetches it anew
    cached(tmp_path).write_bytes(b"put here by hand")
    with pytest.raises(InputError, match="Remove the file if it is there"):
        fetch(published_at(server.address(PATH)))


def test_a_missing_file_is_one_sentence_with_the_place_to_put_it(server, tmp_path):
    with pytest.raises(InputError, match="404: Not Found") as caught:
        fetch(published_at(server.address("/gone.pth")))
    assert str(cached(tmp_path)) in str(caught.value)
    assert not list((tmp_path / "published").iterdir())


def test_without_a_network_the_file_can_be_put_there_by_hand(server):
    weights = published_at(server.address(PATH))
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="cannot be fetched") as caught:
        fetch(weights)
    place = re.search(r"put it at (\S+) and try again", str(caught.value))[1]
    with open(place, "wb") as file:
        file.write(CONTENT)
    assert str(fetch(weights)) == place


def test_what_lies_behind_a_page_is_downloaded_by_hand_with_any_suffix(server, tmp_path):
    weights = catalogue()["conditional-detr-r50-hugging-face"]
    with pytest.raises(InputError, match="is for a browser.*huggingface.co/microsoft") as caught:
        fetch(weights)
    assert f"{tmp_path}/published/{weights.name}.pth" in str(caught.value)
    (tmp_path / "published").mkdir()
    file = tmp_path / "published" / f"{weights.name}.safetensors"
    file.write_bytes(b"from a browser")
    assert fetch(weights) == file
    assert server.ranges == []


def test_a_misspelt_name_names_similar_ones():
    with pytest.raises(InputError, match="did you mean .*dn-detr-r50-dc5"):
        find_weights("dn-detr-r50-d")
    with pytest.raises(InputError, match="`dn-detr weights` lists them"):
        find_weights("?")


def test_every_address_has_its_source_and_what_can_be_converted_a_table():
    for weights in catalogue().values():
        assert weights.address.startswith("https://"), weights.name
        assert re.fullmatch("[0-9a-f]{40}", weights.commit) and weights.licence and weights.file
        assert re.fullmatch(r"[\w.-]+", weights.name)  # part of a file name
        assert not weights.config or weights.method in TABLES, weights.name
    text = Path(published_weights.__file__).with_suffix(".toml").read_text()
    assert text.count("{ name = ") == len(catalogue())  # no name twice


def test_a_hash_in_an_address_is_that_of_the_file(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights")
    begin = hashlib.sha256(b"weights").hexdigest()[:8]
    check_hash(f"https://example.org/resnet-{begin}.pth", str(tmp_path / "a.pth"))
    check_hash("https://example.org/resnet.pth", str(tmp_path / "a.pth"))
    check_hash("https://example.org/resnet-20261126.pth", str(tmp_path / "a.pth"))  # a date
