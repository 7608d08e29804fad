"""What keys were used for, added up and kept when the log goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List

import pytest

from hfship.base.errors import IntegrityError
from hfship.site import usage
from hfship.site.usage import keep_usage, read_ledger


def lines(*numbers: int) -> List[str]:
    """The log's lines of these moments, one request of alice each, and what is none."""
    entry = json.dumps({"time": 9, "key": "alice", "status": 200, "in": 5, "out": 7, "ms": 1500})
    found = ["no container", "2026-01-31T04:05:05.000000000Z [NOTICE] started"]
    return found + [f"2026-01-31T04:05:06.{number:09}Z {entry}" for number in numbers]


def test_a_line_counts_once_and_stays_when_the_container_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deploy/_gateway"
    folder.mkdir(parents=True, mode=0o750)
    asked: List[str] = []
    log: List[str] = []

    def access_log(since: str = "") -> List[str]:
        asked.append(since)
        return log

    monkeypatch.setattr(usage, "access_log", access_log)
    assert keep_usage(folder).keys == {} and not (folder / "usage.json").exists()
    # Of the container: three requests; the same again, with one more; then a new one's first.
    for new, total in (
        (lines(1, 2, 3), 3),
        (lines(3, 4), 4),
        (lines(3, 4), 4),
        (lines(5), 5),
        (["Error: No such container"], 5),
    ):
        log[:] = new
        assert keep_usage(folder).keys["alice"].requests == total
    kept = read_ledger(folder).keys["alice"]
    assert (kept.bytes_in, kept.bytes_out, kept.seconds) == (25, 35, 7.5)
    assert asked[0] == "" and asked[-1] == "2026-01-31T04:05:06.000000005Z"
    assert (folder / "usage.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", '{"format": "x"}', '{"format": "hfship-usage/1"}'])
def test_a_file_that_is_none_is_refused_with_a_way_on(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "deploy/_gateway"
    folder.mkdir(parents=True, mode=0o750)
    (folder / "usage.json").write_text(text)
    with pytest.raises(IntegrityError) as refused:
        read_ledger(folder)
    assert "move" in refused.value.next_step
