# SPDX-License-Identifier: Apache-2.0
"""A line of the log of custody to the byte, and where logs lie; test_custody.py has commands."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.archive import custody as room
from hfship.archive.custody import (
    CUSTODY_PATH,
    FIRST,
    Event,
    add_line,
    event_of,
    log_beside,
    log_in,
    next_line,
    read_chain,
    take_along,
)
from hfship.base.manifest import FileEntry, make_manifest

EVENT = Event("packed", "mödel", "ab" * 32, "SHA256:x", {"bytes": 3, "new": True})
AT = "2026-01-01T00:00:00Z"


def test_a_line_to_the_byte() -> None:
    """As the head of the room describes it, and docs/formats.md."""
    first = next_line(b"", EVENT, AT, "kim", "host")
    text = (
        '{"at":"2026-01-01T00:00:00Z","details":{"bytes":3,"new":true},"event":"packed",'
        f'"host":"host","key":"SHA256:x","manifest":"{"ab" * 32}","model":"mödel","n":1,'
        f'"previous":"{FIRST}","user":"kim"}}\n'
    )
    assert first == text.encode()
    second = json.loads(next_line(first, EVENT, AT, "kim", "host"))
    assert (second["n"], second["previous"]) == (2, hashlib.sha256(first).hexdigest())


def test_a_chain_tells_its_lines() -> None:
    content = next_line(b"", EVENT, AT, "kim", "host")
    content += next_line(content, EVENT, AT, "kim", "host")
    chain = read_chain(content)
    rows = content.splitlines(keepends=True)
    assert [line.number for line in chain.lines] == [1, 2]
    assert [line.sha256 for line in chain.lines] == [
        hashlib.sha256(row).hexdigest() for row in rows
    ]
    assert chain.lines[1].fields == json.loads(rows[1]) and not chain.cut
    assert chain.head == chain.lines[1].sha256 and read_chain(b"").head == FIRST
    assert read_chain(b"").lines == ()


def test_what_is_broken_is_noted_with_the_next_line() -> None:
    whole = next_line(b"", EVENT, AT, "kim", "host")
    cut = whole[:-4]
    line = next_line(cut, EVENT, AT, "kim", "host")
    assert line.startswith(b"\n{"), "the torn line gets its end first"
    fields = json.loads(line)
    assert fields["broken"] == "line 1: it is no entry; the last line was cut" and fields["n"] == 2
    chain = read_chain(cut + line)
    assert [one.problem for one in chain.lines] == ["it is no entry", ""]
    assert chain.problems == [
        "line 1: it is no entry",
        "line 2 tells: line 1: it is no entry; the last line was cut",
    ]
    many = json.loads(next_line(b"a\nb\nc\nd\n", EVENT, AT, "kim", "host"))
    assert many["broken"].count("it is no entry") == 3, "the first few"
    assert "broken" not in json.loads(next_line(whole, EVENT, AT, "kim", "host"))


GOOD: Dict[str, Any] = json.loads(next_line(b"", EVENT, AT, "kim", "host"))


@pytest.mark.parametrize("name", [*room._TEXTS, "n"])
@pytest.mark.parametrize("value", [None, 7.5, ["x"]])
def test_a_line_without_a_field_is_no_entry(name: str, value: Any) -> None:
    fields = {**GOOD, name: value}
    (line,) = read_chain(json.dumps(fields).encode() + b"\n").lines
    assert (line.problem, line.fields) == ("it is no entry", {})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"n": 2}, "it says that it is line 2"),
        ({"previous": "1" * 64}, "it is not the first one: what was before it is missing"),
        ({"more": 1}, ""),
    ],
)
def test_what_is_wrong_with_a_first_line(changes: Dict[str, Any], problem: str) -> None:
    (line,) = read_chain(json.dumps({**GOOD, **changes}).encode() + b"\n").lines
    assert line.problem == problem


def test_an_event_names_the_model_and_its_manifest() -> None:
    manifest = make_manifest("m", [FileEntry("w", 1, "1" * 64)])
    sha256 = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    assert event_of("packed", manifest) == Event("packed", "m", sha256, "", {})
    details = {"bytes": 1}
    assert event_of("signed", manifest, "K", details) == Event("signed", "m", sha256, "K", details)


def test_who_has_no_name_is_noted_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(number: int) -> Any:
        if number == 7:
            return SimpleNamespace(pw_name="k\x1bim")
        raise KeyError(number)

    monkeypatch.setattr(room, "host_name", lambda: "ho\x07st")
    monkeypatch.setattr(room, "pwd", SimpleNamespace(getpwuid=names))
    found: List[Any] = []
    for number in (7, 4711):
        monkeypatch.setattr(os, "getuid", lambda number=number: number)
        found.append(room.who())
    assert found[1][0] == "4711" and found[0][0] != "7"
    assert not any("\x1b" in user or "\x07" in host for user, host in found)


# -- files


def test_a_line_is_added_durably_with_who_and_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: List[int] = []
    locked: List[Any] = []
    sync, lock = os.fsync, room.fcntl.flock

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        sync(fd)

    def flock(fd: int, how: int) -> None:
        locked.append((os.fstat(fd).st_size, how))
        lock(fd, how)

    monkeypatch.setattr(room.os, "fsync", fsync)
    monkeypatch.setattr(room.fcntl, "flock", flock)
    monkeypatch.setattr(room, "utc_exact", lambda: AT)
    monkeypatch.setattr(room, "who", lambda: ("kim", "host"))
    expected = b""
    for _ in range(2):
        expected += next_line(expected, EVENT, AT, "kim", "host")
        assert add_line(tmp_path, "log", EVENT) == expected
    assert (tmp_path / "log").read_bytes() == expected
    half = len(expected.splitlines(keepends=True)[0])
    assert synced[-1] == len(expected) and half in synced
    assert locked == [(0, room.fcntl.LOCK_EX), (half, room.fcntl.LOCK_EX)]


def test_a_log_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LARGEST_LOG", 10)
    (tmp_path / ".hfship").mkdir()
    (tmp_path / CUSTODY_PATH).write_bytes(b"x" * 10)
    assert log_in(tmp_path) == b"x" * 10
    (tmp_path / CUSTODY_PATH).write_bytes(b"x" * 11)
    files: Any = SimpleNamespace(name=".hfship/custody", folder=tmp_path)
    with pytest.raises(OSError):
        log_in(tmp_path)
    monkeypatch.setattr(room, "CUSTODY", ".jsonl")
    with pytest.raises(OSError):
        log_beside(files)
    with pytest.raises(OSError):
        add_line(tmp_path, CUSTODY_PATH, EVENT)
    assert (tmp_path / CUSTODY_PATH).read_bytes() == b"x" * 11


def test_where_logs_lie(tmp_path: Path) -> None:
    files: Any = SimpleNamespace(name="m.tar.zst", folder=tmp_path)
    assert log_in(tmp_path) == log_beside(files) == b""
    (tmp_path / "m.tar.zst.custody.jsonl").write_bytes(b"beside")
    (tmp_path / ".hfship").mkdir()
    (tmp_path / ".hfship/custody.jsonl").write_bytes(b"inside")
    assert (log_in(tmp_path), log_beside(files)) == (b"inside", b"beside")


@pytest.mark.parametrize(
    ("present", "brought", "left"),
    [
        (b"", b"a\n", b"a\n"),
        (b"", b"", b""),
        (b"a\n", b"", b"a\n"),
        (b"a\nb\n", b"a\n", b"a\nb\n"),
        (b"a\n", b"a\nb\n", b"a\nb\n"),
        (b"x\n", b"a\n", b"a\n"),
    ],
)
def test_a_log_that_came_along_is_put_into_the_model(
    present: bytes, brought: bytes, left: bytes, tmp_path: Path
) -> None:
    (tmp_path / ".hfship").mkdir()
    if present:
        (tmp_path / CUSTODY_PATH).write_bytes(present)
    take_along(tmp_path, brought)
    assert log_in(tmp_path) == left
    assert (tmp_path / CUSTODY_PATH).exists() == bool(left)
