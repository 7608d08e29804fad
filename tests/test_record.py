# SPDX-License-Identifier: Apache-2.0
"""What a control host remembers of a site: written, read back, and refused where it is none."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from hfship.base.errors import HostError, IntegrityError
from hfship.site.record import SiteRecord, read_record, write_record

RECORD = SiteRecord(
    {"m": "sk-secret"}, {"m": ("a", "b"), "m.2": ("c",)}, {"m": "10.0.0.1:8000"}, ("a", "c")
)


def test_what_is_remembered_is_read_back(tmp_path: Path) -> None:
    assert read_record(tmp_path) == SiteRecord()
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    path = tmp_path / "_site/site.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.parent.stat().st_mode & 0o007 == 0
    assert "sk-secret" not in repr(RECORD) and "10.0.0.1" in repr(RECORD)


def test_a_record_from_before_gateways_had_hosts_is_read(tmp_path: Path) -> None:
    change(tmp_path, "gateways", None)
    assert read_record(tmp_path) == SiteRecord(RECORD.keys, RECORD.places, RECORD.addresses)


def change(folder: Path, name: str, value: Any) -> None:
    """Write a record with another value of a field, or without it."""
    write_record(folder, RECORD)
    path = folder / "_site/site.json"
    fields = json.loads(path.read_text())
    del fields[name]
    if value is not None:
        fields[name] = value
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", None),
        ("format", "hfship-site-record/2"),
        ("keys", None),
        ("keys", ["m"]),
        ("keys", {"m": "a b"}),
        ("places", {"m": 7}),
        ("addresses", "a"),
        ("gateways", 7),
    ],
)
def test_a_record_that_is_none_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    change(tmp_path, name, value)
    with pytest.raises(IntegrityError, match="site.json cannot be read") as caught:
        read_record(tmp_path)
    assert "move" in caught.value.next_step


def test_a_record_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    (tmp_path / "_site/site.json").write_text('{"format": ')
    with pytest.raises(IntegrityError):
        read_record(tmp_path)


def test_a_record_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    (tmp_path / "_site/site.json").chmod(0o666)
    with pytest.raises(HostError):
        read_record(tmp_path)
