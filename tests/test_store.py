# SPDX-License-Identifier: Apache-2.0
"""What the gateway keeps in files: read as it was written, and refused where it is not what it
should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HostError, IntegrityError
from hfship.site import store as room
from hfship.site.terms import AccessKey, Gateway, GatewayModel, Replica

KEYS = (
    AccessKey("alice", "1" * 64, ("m", "n"), 60, 2, 99, "2026-01-01", True, True),
    AccessKey("böb-2", "2" * 64),
)
GATEWAY = Gateway(
    (
        GatewayModel(
            "m",
            ("m", "org/m"),
            (Replica("m", "vllm_m:8000"), Replica("m.2", "[::1]:8001", True)),
            "prefix",
            "on-demand",
        ),
        GatewayModel("n", ("n",), ()),
    ),
    (3, 4),
    tls_bind=":8443",
    https_port=443,
    max_body=7,
    timeout_s=8,
)
RIGHTS: Dict[str, Dict[str, Any]] = {
    "alice": {"models": ("m",), "rate": 5, "ops": True},
    "bob": {"models": ("*",)},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = room.gateway_folder(tmp_path / "deploy")
    made.mkdir(parents=True, mode=0o750)
    return made


def test_the_folder_of_the_gateway_is_no_deployment(tmp_path: Path) -> None:
    assert room.gateway_folder(tmp_path) == tmp_path / "_gateway"


def test_keys_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = room.gateway_folder(tmp_path)
    names = [key for key in KEYS if room.KEY_NAME.match(key.name)]
    room.write_keys(folder, names)
    assert room.read_keys(folder) == tuple(names)
    path = folder / "keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["format"] == "hfship-keys/1"
    assert path.read_text().endswith("}\n")


def test_rights_are_read_as_they_were_written(folder: Path) -> None:
    room.write_rights(folder, RIGHTS)
    assert room.read_rights(folder) == RIGHTS
    assert json.loads((folder / "rights.json").read_text())["format"] == "hfship-rights/1"
    assert (folder / "rights.json").stat().st_mode & 0o777 == 0o600
    (folder / "rights.json").write_text('{"format": "hfship-rights/1", "rights": {"x": {"a": 1}}}')
    assert room.read_rights(folder) == {"x": {"models": ("*",)}}


def test_the_gateway_is_read_as_it_was_written(folder: Path) -> None:
    (folder / "gateway.json").write_text(room.gateway_text(GATEWAY))
    assert room.read_gateway(folder) == GATEWAY
    value = json.loads(room.gateway_text(GATEWAY))
    assert value["format"] == "hfship-gateway/1" and value["version"] == [3, 4]


READERS: Dict[str, Any] = {
    "keys.json": (room.read_keys, ()),
    "rights.json": (room.read_rights, {}),
    "gateway.json": (room.read_gateway, None),
}
GOOD: Dict[str, Dict[str, Any]] = {
    "keys.json": {"format": "hfship-keys/1", "keys": [{"name": "a", "sha256": "1" * 64}]},
    "rights.json": {"format": "hfship-rights/1", "rights": {"a": {}}},
    "gateway.json": {"format": "hfship-gateway/1", "version": [3, 4], "models": []},
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_not_there_is_nothing(name: str, folder: Path) -> None:
    read, nothing = READERS[name]
    assert read(folder) == nothing
    (folder / name).write_text(json.dumps(GOOD[name]))
    assert read(folder) != nothing


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"format": "hfship-x/9"}', "FORMAT ALONE", "LISTS"]
)
def test_what_is_broken_is_told_with_the_way_out(name: str, text: str, folder: Path) -> None:
    form = GOOD[name]["format"]
    text = text.replace("FORMAT ALONE", json.dumps({"format": form}))
    text = text.replace(
        "LISTS",
        json.dumps({"format": form, "keys": [[]], "rights": [1], "models": [3], "version": [1, 2]}),
    )
    (folder / name).write_text(text)
    with pytest.raises(IntegrityError) as told:
        READERS[name][0](folder)
    path = folder / name
    assert told.value.what == f"{path} is not valid"
    assert told.value.next_step == (
        f"restore {path} from a copy; without it, hfship serve --models FILE makes it anew"
    )
    if "x/9" in text:
        assert told.value.why == f"ValueError: format is 'hfship-x/9', this hfship reads {form}"


@pytest.mark.parametrize(
    "change",
    [
        {"version": [3]},
        {"version": [3, 4, 5]},
        {"version": "3.4"},
        {"version": ["x", 4]},
        {"models": [{"name": "m", "names": [], "replicas": None}]},
        {"models": [{"name": "m", "names": []}]},
        {"models": [{"name": 5, "names": [], "replicas": []}]},
        {"timeout_s": "x"},
    ],
)
def test_a_gateway_with_a_field_that_is_none(change: Dict[str, Any], folder: Path) -> None:
    (folder / "gateway.json").write_text(json.dumps({**GOOD["gateway.json"], **change}))
    with pytest.raises(IntegrityError):
        room.read_gateway(folder)


@pytest.mark.parametrize(
    "key",
    [
        {"name": "a", "sha256": "1" * 63},
        {"name": "a", "sha256": "G" * 64},
        {"name": "a b", "sha256": "1" * 64},
        {"name": "", "sha256": "1" * 64},
        {"name": "a"},
        {"sha256": "1" * 64},
        {"name": "a", "sha256": "1" * 64, "rate": "x"},
    ],
)
def test_a_key_that_is_none_opens_nothing(key: Dict[str, Any], folder: Path) -> None:
    good = GOOD["keys.json"]["keys"]
    (folder / "keys.json").write_text(json.dumps({**GOOD["keys.json"], "keys": [*good, key]}))
    with pytest.raises(IntegrityError):
        room.read_keys(folder)


# -- files


def test_only_files_that_differ_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: List[Any] = []
    real = room.write_below
    monkeypatch.setattr(
        room, "write_below", lambda *given: (written.append(given[1:]), real(*given))
    )
    texts = {"a": "1", "maps/b": "ü"}
    assert room.write_files(folder, texts, 0o640) == ["a", "maps/b"]
    assert written == [("_gateway/a", "1", 0o640), ("_gateway/maps/b", "ü", 0o640)]
    assert room.write_files(folder, texts, 0o640) == []
    assert room.write_files(folder, {**texts, "maps/b": "2"}, 0o640) == ["maps/b"]
    assert (folder / "maps/b").read_text() == "2" and len(written) == 3


def test_maps_are_written_where_haproxy_reads_them(folder: Path) -> None:
    maps: Any = {"keys": {"a": "1"}, "models": {}}
    names = room.write_maps(folder, maps)
    assert names == [room.map_path("keys"), room.map_path("models")]
    assert (folder / names[0]).read_text() == room.map_text({"a": "1"})
    assert (folder / names[0]).stat().st_mode & 0o777 == 0o600
    assert room.write_maps(folder, maps) == []


def test_what_others_may_write_is_not_taken_over(folder: Path) -> None:
    (folder / "keys.json").write_text(json.dumps(GOOD["keys.json"]))
    (folder / "keys.json").chmod(0o666)
    with pytest.raises(HostError):
        room.read_keys(folder)
