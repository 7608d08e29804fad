"""Logs: what is in a line, and that a log which cannot be written stops nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base import eventlog
from hfship.base.below import Owner, Refused
from hfship.base.eventlog import EARLY_EVENTS, LOG_KEEP, EventLog, LogFile, event_line, open_log

EVENT = {"time": "T", "level": "info", "job": "fetch-m", "stage": "fetching", "message": "began"}


def event(message: str, **others: Any) -> Dict[str, Any]:
    return {**EVENT, "message": message, **others}


@pytest.mark.parametrize(
    "changed, text",
    [
        ({}, "T INFO    fetch-m fetching: began\n"),
        ({"job": "", "stage": ""}, "T INFO    - -: began\n"),
        ({"level": "warning", "message": "a\nb\x1b"}, "T WARNING fetch-m fetching: a | b?\n"),
        ({"rows": {}}, "T INFO    fetch-m fetching: began\n"),
        (
            {"rows": {"exit": "0", "next": "a\nb"}},
            "T INFO    fetch-m fetching: began: exit 0\n"
            "T INFO    fetch-m fetching: began: next a | b\n",
        ),
    ],
)
def test_an_event_is_a_line_or_one_for_each_row(changed: Dict[str, Any], text: str) -> None:
    assert event_line({**EVENT, **changed}) == text


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_has_the_event_or_its_text(form: str, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", form)
    told = event("m\u00e8 \x1b \udcff", total=7)
    assert log.write(told) == ""
    written = (tmp_path / "a.log").read_bytes()
    assert written.endswith(b"\n") and b"\x1b" not in written and b"\xc3\xa8" in written
    if form == "json":
        assert json.loads(written.replace(b"\\udcff", b"")) == {**told, "message": "m\u00e8 \x1b "}
    else:
        assert written == "T INFO    fetch-m fetching: m\u00e8 ? ?\n".encode()
    assert LogFile(tmp_path / "b.log").write(told) == ""
    assert (tmp_path / "b.log").read_text().startswith("T INFO")


def test_a_log_counts_what_it_lost_and_says_why_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(tmp_path / "a.log")
    write = os.write
    troubles: List[OSError] = []

    def refuse(fd: int, data: bytes) -> int:
        if troubles:
            raise troubles[0]
        return write(fd, data)

    monkeypatch.setattr(os, "write", refuse)
    for trouble, said in [(OSError(errno.ENOSPC, "full"), "full"), (OSError("of us"), "of us")]:
        troubles.append(trouble)
        assert [log.write(event(str(number))) for number in range(3)] == [said, "", ""]
        troubles.clear()
        assert [log.write(event("again", level="error")), log.write(event("more"))] == ["", ""]
    lines = (tmp_path / "a.log").read_text().splitlines()
    lost = "T WARNING fetch-m fetching: 3 lines before this one could not be written"
    again, more = "T ERROR   fetch-m fetching: again", "T INFO    fetch-m fetching: more"
    assert lines == [lost, again, more] * 2


def test_a_line_that_was_cut_is_written_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(tmp_path / "a.log")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: max(20, len(data) // 2)]))
    log.write(event("x"))
    assert (tmp_path / "a.log").read_text() == event_line(event("x"))


def test_a_log_turns_over_when_a_line_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is longer than a log gets one of its own, and a pipe never turns over."""
    size = len(event_line(event("0")))
    monkeypatch.setattr(eventlog, "LOG_SIZE", 2 * size)
    before = set(os.listdir("/proc/self/fd"))
    log = LogFile(tmp_path / "a.log")
    for number in range(2 * LOG_KEEP + 5):
        log.write(event(f"{number:x}"))
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1
    kept = {path.name: path.read_text().count("\n") for path in tmp_path.iterdir()}
    assert kept == {"a.log": 1, **{f"a.log.{number}": 2 for number in range(1, LOG_KEEP + 1)}}
    assert (tmp_path / "a.log").read_text() == event_line(event("c"))
    assert (tmp_path / "a.log.1").read_text().endswith(event_line(event("b")))
    assert (tmp_path / f"a.log.{LOG_KEEP}").read_text().endswith(event_line(event("5")))
    long = LogFile(tmp_path / "b.log")
    long.write(event("x" * 3 * size))
    assert not (tmp_path / "b.log.1").exists()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    pipe = LogFile(tmp_path / "pipe")
    for number in range(5):
        pipe.write(event(str(number)))
    assert os.read(reader, 10 * size).count(b"\n") == 5
    os.close(reader)
    assert not (tmp_path / "pipe.1").exists()


def test_a_log_that_was_there_goes_on_and_a_new_one_is_for_all_to_read(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        for number in range(2):
            LogFile(tmp_path / "a.log").write(event(str(number)))
    finally:
        os.umask(umask)
    assert (tmp_path / "a.log").read_text().count("\n") == 2
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("a.log")
    LogFile(tmp_path / "link").write(event("2"))
    assert (tmp_path / "a.log").read_text().count("\n") == 3


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        open_log(tmp_path / "pipe")


@pytest.mark.parametrize(
    "uid, owner, is_taken",
    [("root", 7, True), ("we", 7, True), ("another", 98765, True), ("another", 7, False)],
)
def test_a_log_of_another_user_is_not_written(
    uid: str, owner: int, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where what we make is his, too, as on NFS."""
    path = tmp_path / "a.log"
    path.touch()
    number = {"root": 0, "we": 4321, "another": 98765}[uid]
    mode = path.stat().st_mode
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    monkeypatch.setattr(os, "lstat", lambda _: SimpleNamespace(st_uid=number, st_mode=mode))
    monkeypatch.setattr(eventlog, "owner_in", lambda _: Owner(owner, 0, 0))
    if is_taken:
        os.close(open_log(path))
        return
    with pytest.raises(Refused, match="it belongs to another user"):
        open_log(path)


def test_what_became_a_link_since_it_was_looked_at_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").touch()
    status = os.lstat(tmp_path / "secret")
    (tmp_path / "a.log").symlink_to("secret")
    monkeypatch.setattr(os, "lstat", lambda _: status)
    with pytest.raises(OSError, match="symbolic"):
        open_log(tmp_path / "a.log")


def test_each_log_gets_all_events_and_the_early_ones_the_name_of_the_job(tmp_path: Path) -> None:
    logs = EventLog()
    for number in range(EARLY_EVENTS + 1):
        assert logs.write(event(str(number), job="")) == {}
    for name in ("a", "b"):
        logs.open(tmp_path / name, "text", "j")
    assert logs.write(event("last", job="k")) == {}
    for name in ("a", "b"):
        lines = (tmp_path / name).read_text().splitlines()
        assert len(lines) == EARLY_EVENTS + 1
        assert lines[0] == "T INFO    j fetching: 1" and lines[-1] == "T INFO    k fetching: last"


def test_which_log_cannot_be_written_is_told(tmp_path: Path) -> None:
    logs = EventLog()
    logs.open(tmp_path / "a", "json", "j")
    logs.open(Path("/dev/full"), "text", "j")
    assert logs.write(event("x")) == {Path("/dev/full"): "No space left on device"}
    assert logs.write(event("y")) == {}
    messages = [json.loads(line)["message"] for line in (tmp_path / "a").open()]
    assert messages == ["x", "y"]
