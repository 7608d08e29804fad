"""The manifest, and what is content of a model folder."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.base.card import Card
from hfship.base.content import (
    check_distinct_paths,
    check_relative_path,
    content_files,
    folder_content,
)
from hfship.base.errors import DiskError, IncompleteError, IntegrityError
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import (
    Declared,
    FileEntry,
    Source,
    make_manifest,
    parse_manifest,
    require_finished,
    write_manifest,
)

entries = st.builds(
    FileEntry,
    st.from_regex(r"[a-zA-Z0-9_ü-]{1,8}(/[a-z.]{3,8}){0,2}", fullmatch=True),
    st.integers(0, 2**50),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)


@pytest.mark.parametrize(
    "path, why",
    [
        ("", "unsafe"),
        ("/etc/passwd", "unsafe"),
        ("a//b", "unsafe"),
        ("a/", "unsafe"),
        ("./a", "unsafe"),
        ("a/../b", "unsafe"),
        ("a\\b", "unsafe"),
        ("C:a", "unsafe"),
        ("a\nb", "unsafe"),
        ("a\x7f", "unsafe"),
        ("a\udcff", "cannot be stored"),
        ("a/" + "ü" * 128, "cannot be stored"),
        (".hfship/manifest.json", "reserved"),
        (".HFSHIP", "reserved"),
        ("a/.hfship", "never part"),
        (".git/config", "never part"),
        ("a/.GIT/x", "never part"),
        ("git~1", "never part"),
        (".ssh/authorized_keys", "never part"),
        (".svn.", "never part"),
        (".gitattributes", ""),
        (".github/x", ""),
        (".DS_Store", ""),
        (".cache/huggingface/download/x.metadata", ""),
        ("x.incomplete", ""),
        ("ab:c", ""),
        ("..a/b..", ""),
        ("a/" + "ü" * 127 + "x", ""),
    ],
)
def test_only_paths_that_stay_in_their_folder_everywhere_are_taken(path: str, why: str) -> None:
    if not why:
        check_relative_path(path)
        return
    with pytest.raises(ValueError, match=why):
        check_relative_path(path)


@given(st.lists(entries, max_size=8, unique_by=lambda entry: entry.path))
def test_manifest_survives_its_text(files: List[Any]) -> None:
    try:
        check_distinct_paths(entry.path for entry in files)
        for entry in files:
            check_relative_path(entry.path)
    except ValueError:
        return
    manifest = make_manifest("m", files)
    assert parse_manifest(manifest.to_json(), "here") == manifest
    assert parse_manifest(manifest.to_json(), "here").to_json() == manifest.to_json()


SOURCE = {
    "endpoint": "https://hub",
    "repo": "a/b",
    "revision": "main",
    "resolved_repo": "a/b",
    "commit": "0" * 40,
}


WRONG_SOURCES: List[Dict[str, Any]] = [
    {"repo": "--trust-remote-code"},
    {"repo": 7},
    {"resolved_repo": "../../x?y"},
    {"commit": "0" * 40 + "\r\nSet-Cookie: x"},
    {"commit": "0" * 40 + "\n"},
    {"repo_type": "planet"},
    {"license": ["mit"]},
    {"revision": "v\x1b[2J"},
    {"gated": None},
]


A_FILE = {"path": "f", "size": 1, "sha256": hashlib.sha256(b"a").hexdigest()}


GOOD = {
    "format": "hfship-manifest/1",
    "name": "m",
    "source": None,
    "files": [{"path": "a", "size": 1, "sha256": "0" * 64}],
    "totals": {"files": 1, "bytes": 1},
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "hfship-manifest/2"},
        {"name": "../m"},
        {"files": [{"path": "../a", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": -1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": True, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 63}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 64}] * 2},
        {"files": [{"path": p, "size": 1, "sha256": "0" * 64} for p in ("a", "a/b")]},
        {"files": None},
        {"source": {"surprise": 1}},
        {"files": [{"path": "a", "size": 2**63, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": 1.0, "sha256": "0" * 64}]},
        *({"left_out": one} for one in (-1, True, "1", 2**63)),
        *({name: {}} for name in ("left_out_paths", "partial", "faults", "declared")),
        *({name: [one]} for name in ("left_out_paths", "partial", "faults") for one in (7, "\x1b")),
        *({"declared": one} for one in ("", "x", [7], [{"path": 7}], [{"says": "\x1b"}])),
        *({"card": one} for one in ([], "x", {"terms": 7}, {"terms": "\x1b"})),
        {"kind": "dataset"},
        {"kind": "image"},
        {"name": "evil\n"},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 64 + "\n"}]},
        *({"source": {**SOURCE, **change}} for change in WRONG_SOURCES),
    ],
)
def test_a_lying_manifest_is_refused(change: Dict[str, Any]) -> None:
    parse_manifest(json.dumps({**GOOD, "source": SOURCE}), "here")
    with pytest.raises(IntegrityError):
        parse_manifest(json.dumps({**GOOD, **change}), "here")


def test_what_may_be_left_out_of_a_manifest() -> None:
    plain = make_manifest("m", [FileEntry("a", 1, "0" * 64)])
    assert parse_manifest(json.dumps(GOOD), "here") == plain
    assert parse_manifest(json.dumps({**GOOD, "unproven": "yes"}), "here") == plain
    largest = {
        "files": [{"path": "a", "size": 2**63 - 1, "sha256": "0" * 64}],
        "left_out": 2**63 - 1,
    }
    found = parse_manifest(json.dumps({**GOOD, **largest, "kind": "model"}), "here")
    assert found.size == found.left_out == 2**63 - 1


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        (".hfship/partial", True),
        (".hfship/verified.jsonl", True),
        (".hfship/lease", True),
        (".cache/huggingface/download/sub/x.incomplete", True),
        (".cache/huggingface/download/x.metadata", False),
        ("", False),
    ],
)
def test_a_folder_under_way_is_not_taken_for_a_model(
    trace: str, told: bool, tmp_path: Path
) -> None:
    if trace:
        (tmp_path / trace).parent.mkdir(parents=True)
        (tmp_path / trace).touch()
    if told:
        with pytest.raises(IncompleteError) as refused:
            require_finished(tmp_path)
        assert refused.value.what == f"{tmp_path} is not complete yet"
        assert refused.value.why == f"there is {tmp_path / trace}"
    else:
        require_finished(tmp_path)
    write_manifest(tmp_path, make_manifest("m", []))
    require_finished(tmp_path)


def test_a_deep_manifest_is_refused() -> None:
    with pytest.raises(IntegrityError):
        parse_manifest("[" * 100_000, "here")


@given(st.binary(max_size=200))
def test_garbage_is_no_manifest(text: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse_manifest(text, "here")


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DiskError, match="secret: permission denied"):
        content_files(tmp_path)


def test_content_leaves_out_what_is_not_the_model(tmp_path: Path) -> None:
    content = [".DS_Store", ".cache/huggingface/run.sh", ".github/x", "a/b", "c", "d.incomplete"]
    note = ".cache/huggingface/download/c.metadata"
    never = ["a/.svn/x", ".git/z", ".GIT", "b/.hfship/x"]
    for path in (*content, *never, note, ".hfship/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    found = folder_content(tmp_path)
    assert [path for path, _ in found.files] == [*content, "link"]
    assert found.never == (".GIT", ".git", "a/.svn", "b/.hfship")
    listed = frozenset([note, "c"])
    assert {path for path, _ in content_files(tmp_path, listed)} == {*content, "link", note}
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(IntegrityError, match="not a file"):
        content_files(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a//b",
        "../a",
        "a/../b",
        "a/.",
        "a\\b",
        "C:x",
        "\\\\host\\x",
        "a\0b",
        "a\nb",
        ".hfship/x",
        ".HFSHIP/x",
        "x" * 256,
    ],
)
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError):
        check_relative_path(path)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, ""),
        ({"partial": ("b",)}, "; partial: 1 file of weights that its index names not in it (b)"),
        ({"faults": ("w: cut short",)}, "; packed by force: w: cut short"),
    ],
)
def test_what_is_to_be_known_besides_is_said_in_one_sentence(
    fields: Dict[str, Any], said: str
) -> None:
    manifest = make_manifest("m", [FileEntry("a", 1, "0" * 64)])
    assert replace(manifest, **fields).caveats == said


def test_an_image_keeps_what_is_known_of_it() -> None:
    digest = "sha256:" + "0" * 64
    facts = ImageFacts("site/vllm:1", digest, digest, digest, (digest,), "linux/amd64")
    manifest = make_manifest("vllm_1", [FileEntry("oci-layout", 1, "0" * 64)])
    text = replace(manifest, image=facts).to_json()
    assert parse_manifest(text, "m").image == facts
    with pytest.raises(IntegrityError) as refused:
        parse_manifest(text.replace('"image",', '"chart",', 1), "m")
    assert "of the kind 'chart'" in refused.value.why


# field -> what it holds, and what stands in the text for it
TOLD: Dict[str, Any] = {
    "unproven": (True, {"unproven": True}),
    "left_out": (2, {"left_out": 2}),
    "left_out_paths": (("a", "b"), {"left_out_paths": ["a", "b"]}),
    "partial": (("w",), {"partial": ["w"]}),
    "faults": (("x",), {"faults": ["x"]}),
    "card": (Card(license="mit"), {"card": {"license": "mit"}}),
    "declared": (
        (Declared("a.py", "code", "says", "allowed"),),
        {"declared": [{"path": "a.py", "kind": "code", "says": "says", "outcome": "allowed"}]},
    ),
}


@pytest.mark.parametrize("field", ["", *TOLD])
def test_what_there_is_nothing_to_tell_of_is_not_in_the_text(field: str) -> None:
    value, text = TOLD.get(field, (None, {}))
    manifest = make_manifest("m", [FileEntry("a", 3, "0" * 64)])
    if field:
        manifest = replace(manifest, **{field: value})
    assert json.loads(manifest.to_json()) == {
        "format": "hfship-manifest/1",
        "name": "m",
        "source": None,
        "files": [{"path": "a", "size": 3, "sha256": "0" * 64}],
        "totals": {"files": 1, "bytes": 3},
        **text,
    }


def test_everything_that_a_manifest_tells_is_read_back() -> None:
    fields = {
        "unproven": True,
        "left_out": 2,
        "left_out_paths": ("x.bin", "y.bin"),
        "partial": ("z.safetensors",),
        "card": Card("mit", "n", "l", ("o/base",), "accepted"),
        "source": Source(**SOURCE),
    }
    manifest = replace(make_manifest("m", [FileEntry("a", 1, "5e" * 32)]), **fields)
    value = json.loads(manifest.to_json())
    assert parse_manifest(manifest.to_json(), "here") == manifest
    assert {name: value.pop(name) for name in ("unproven", "left_out", "partial")} == {
        "unproven": True,
        "left_out": 2,
        "partial": ["z.safetensors"],
    }
    assert value.pop("left_out_paths") == ["x.bin", "y.bin"]
    assert value.pop("card")["terms"] == "accepted"
    assert value == {
        "format": "hfship-manifest/1",
        "name": "m",
        "source": vars(Source(**SOURCE)),
        "files": [{"path": "a", "size": 1, "sha256": "5e" * 32}],
        "totals": {"files": 1, "bytes": 1},
    }
    plain = make_manifest("m", [FileEntry("a", 1, "5e" * 32)])
    assert set(json.loads(plain.to_json())) == {"format", "name", "source", "files", "totals"}


@pytest.mark.parametrize("reference", [7, None, [], "x"])
def test_a_manifest_of_a_strange_image_is_refused(reference: object) -> None:
    """And is no traceback."""
    value = json.loads(make_manifest("m", []).to_json())
    facts = ImageFacts("a:1", *(3 * ["sha256:" + "0" * 64]), ("sha256:" + "1" * 64,), "linux/amd64")
    image = {**facts.json(), "reference": reference}
    with pytest.raises(IntegrityError):
        parse_manifest(json.dumps({**value, "kind": "image", "image": image}), "here")


def test_the_text_of_a_manifest_is_always_the_same() -> None:
    """A line for each value, keys in order: packing a model again gives the same archive."""
    files = [FileEntry("\u00e9", 2, "1" * 64), FileEntry("a", 1, "0" * 64)]
    assert make_manifest("m", files).to_json() == (
        "{\n"
        ' "files": [\n'
        f'  {{\n   "path": "a",\n   "sha256": "{"0" * 64}",\n   "size": 1\n  }},\n'
        f'  {{\n   "path": "\u00e9",\n   "sha256": "{"1" * 64}",\n   "size": 2\n  }}\n'
        " ],\n"
        ' "format": "hfship-manifest/1",\n'
        ' "name": "m",\n'
        ' "source": null,\n'
        ' "totals": {\n  "bytes": 3,\n  "files": 2\n }\n'
        "}\n"
    )


def test_a_manifest_that_cannot_be_read_is_told_with_its_reason() -> None:
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(json.dumps({**GOOD, "format": "x" * 900}), "here")
    error = caught.value
    assert error.what == "here is not a valid manifest"
    assert error.why.startswith("ValueError: format is 'xxx") and len(error.why) == 500
    assert error.next_step == "fetch or copy the model again"
