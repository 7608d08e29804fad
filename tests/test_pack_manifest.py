# SPDX-License-Identifier: Apache-2.0
"""The manifest that pack makes or finds: what is looked at before, what is said, what is kept;
test_wholeness.py has what looks whole."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.archive import pack_manifest as room
from hfship.archive.pack_manifest import cached_manifest, manifest_to_pack, mismatch_error
from hfship.base.errors import DiskError, IncompleteError, IntegrityError, UsageError
from hfship.base.manifest import (
    FileEntry,
    Manifest,
    Source,
    make_manifest,
    read_manifest,
    write_manifest,
)
from hfship.base.report import Reporter
from hfship.base.values import replace
from support.stages import KeptStages

SOURCE = Source("https://huggingface.co", "org/m", "main", "org/m", "a" * 40)
TOKEN = b"token = hf_" + b"a1" * 17


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


FILES = {"config.json": b"{}", "sub/b.txt": b"text"}
ENTRIES = [FileEntry(path, len(content), sha256(content)) for path, content in FILES.items()]


class Model:
    """A folder, and what is said of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.err = io.StringIO()
        self.put()
        for path, content in FILES.items():
            self.write(path, content)

    def write(self, path: str, content: bytes) -> None:
        """A file."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)

    def put(self, **fields: Any) -> None:
        """Make the folder; with fields a manifest, too."""
        self.folder.mkdir(exist_ok=True)
        if fields:
            write_manifest(self.folder, replace(make_manifest("m", ENTRIES), **fields))

    def manifest(self, name: Any = None, **options: Any) -> Manifest:
        """What is packed."""
        reporter = Reporter("plain", 0, err=self.err)
        return manifest_to_pack(self.folder, name, 1, reporter, **options)

    @property
    def said(self) -> str:
        """All that was said."""
        return self.err.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "m")


# -- of a folder without one


@pytest.mark.parametrize("keep", [True, False])
def test_a_folder_without_a_manifest_gets_one(keep: bool, model: Model) -> None:
    seen: List[Manifest] = []

    def accept(manifest: Manifest) -> Manifest:
        seen.append(manifest)
        return replace(manifest, left_out=3)

    plain = make_manifest("m", ENTRIES)
    manifest = model.manifest(keep=keep, accept=accept)
    assert seen == [plain] and manifest == replace(plain, left_out=3)
    assert read_manifest(model.folder) == (manifest if keep else None)
    assert "has no manifest: hashing its files to make one" in model.said


def test_another_name_is_for_the_archive(model: Model) -> None:
    assert model.manifest("other").name == "other"
    kept = read_manifest(model.folder)
    assert kept and kept.name == "other", "it was made under that name"
    assert model.manifest("third").name == "third" and read_manifest(model.folder) == kept
    assert model.manifest() == kept
    with pytest.raises(UsageError):
        model.manifest("../x")


def test_private_files_stay_where_they_are(model: Model) -> None:
    model.write(".env", b"x")
    model.write(".ssh/id", b"x")
    assert [entry.path for entry in model.manifest().files] == list(FILES)
    assert "never packed: .ssh" in model.said
    assert "not in the manifest, so not packed: .env" in model.said


def test_a_folder_that_cannot_be_written_keeps_none(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise DiskError("cannot write there", "", "")

    monkeypatch.setattr(room, "write_manifest", full)
    assert model.manifest() == make_manifest("m", ENTRIES)
    assert "cannot write there: the manifest travels in the archive only" in model.said


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="holds no files"):
        manifest_to_pack(tmp_path / "m", None, 1, Reporter("none", -1))
    model = Model(tmp_path / "n")
    model.write(".hfship/lease", b"")
    with pytest.raises(IncompleteError):
        model.manifest()


INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'


def test_who_insists_packs_what_does_not_look_whole(model: Model) -> None:
    model.write("model.safetensors.index.json", INDEX)
    model.write("cut.safetensors", b"cut")
    with pytest.raises((IncompleteError, IntegrityError)) as told:
        model.manifest()
    assert told.value.next_step.endswith(f"hfship pack {model.folder} --force")
    manifest = model.manifest(force=True)
    assert manifest.partial == ("model-1.safetensors", "model-2.safetensors")
    assert len(manifest.faults) == 1 and "cut.safetensors" in manifest.faults[0]
    assert f"{model.folder}; partial: 2 files of weights" in model.said


# -- tokens


@pytest.mark.parametrize(
    ("content", "stops"),
    [
        (TOKEN, True),
        (b"api_org_" + b"b" * 34, True),
        (b"hf_" + b"x" * 34, False),
        (b"hf_" + b"X" * 34, False),
        (b"hf_" + b"x" * 33 + b"1", True),
        (b"hf_" + b"a" * 29, False),
        (b"hf_" + b"a" * 30, True),
        (b"self_hf_" + b"a" * 34, False),
        (TOKEN + b"\0", False),
        (TOKEN + b" " * ((1 << 20) - len(TOKEN)), True),
        (TOKEN + b" " * ((1 << 20) - len(TOKEN) + 1), False),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_token_is_not_given_away(content: bytes, stops: bool, model: Model) -> None:
    model.write("note.txt", content)
    if not stops:
        assert len(model.manifest(keep=False).files) == 3
        return
    with pytest.raises(UsageError) as told:
        model.manifest()
    assert told.value.what.startswith(f"{model.folder} holds a token of the Hub")
    assert told.value.why == "it stands in note.txt"
    assert told.value.next_step.endswith(f"if it is none: hfship pack {model.folder} --force")
    assert len(model.manifest(force=True).files) == 3


# -- of a folder with one


def test_a_manifest_that_is_there_stays_as_it_is(model: Model) -> None:
    model.put(source=SOURCE)
    model.write("extra", b"x")
    before = (model.folder / ".hfship/manifest.json").read_bytes()
    seen: List[Any] = []
    manifest = model.manifest(accept=lambda one: seen.append(one) or replace(one, left_out=3))
    assert manifest.source == SOURCE and manifest.left_out == 0 and seen == [manifest]
    assert (model.folder / ".hfship/manifest.json").read_bytes() == before
    assert "not in the manifest, so not packed: extra" in model.said


WRONG: Dict[str, Any] = {
    "missing": (lambda model: (model.folder / "sub/b.txt").unlink(), "sub/b.txt is missing"),
    "longer": (
        lambda model: model.write("sub/b.txt", b"longer"),
        "sub/b.txt has 6 bytes instead of 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("source", [SOURCE, None])
def test_files_are_as_large_as_the_manifest_says(name: str, source: Any, model: Model) -> None:
    change, why = WRONG[name]
    model.put(source=source)
    change(model)
    with pytest.raises(IntegrityError) as told:
        model.manifest(force=True)
    assert told.value.what == f"{model.folder} is not what its manifest says"
    assert told.value.why == why
    start = "hfship fetch org/m@" if source else "restore the file, or remove"
    assert told.value.next_step.startswith(start)
    assert told.value.next_step.endswith(", then pack again")
    many = mismatch_error(model.folder, make_manifest("m", []), [f"{n}" for n in range(30)])
    assert len(many.why.splitlines()) <= 21


def test_a_token_that_the_hub_published_is_told(model: Model) -> None:
    model.write("config.json", TOKEN)
    listed = [FileEntry("config.json", len(TOKEN), sha256(TOKEN)), ENTRIES[1]]
    model.put(source=SOURCE, files=tuple(listed))
    model.manifest()
    assert "a token of the Hub stands in config.json, as published" in model.said
    model.put(files=tuple(listed))
    with pytest.raises(UsageError, match="holds a token"):
        model.manifest()
    model.manifest(force=True)
    model.put(files=tuple(listed), faults=("x",))
    model.manifest()
    assert f"{model.folder}; packed by force: x" in model.said


def test_private_files_in_a_manifest_are_told(model: Model) -> None:
    model.write(".env", b"x")
    listed = (FileEntry(".env", 1, sha256(b"x")), *ENTRIES)
    model.put(files=listed)
    with pytest.raises(UsageError) as told:
        model.manifest()
    assert told.value.why == ".env"
    remove = f"rm {model.folder}/.env {model.folder}/.hfship/manifest.json"
    assert told.value.next_step == f"{remove}\nthen pack again, or give --force"
    assert model.manifest(force=True).files == listed
    model.put(files=listed, source=SOURCE)
    assert model.manifest().files == listed


# -- of huggingface_hub's cache


def cached(model: Model, **fields: Any) -> Any:
    values = {"folder": model.folder, "name": "m", "source": SOURCE, "coming": []}
    return SimpleNamespace(**{**values, **fields})


def test_a_commit_of_a_cache_is_packed_with_its_source(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "damaged_blobs", lambda *_: [])
    missing = {"given": ["w1", "w2"]}
    monkeypatch.setattr(room, "not_downloaded", lambda _, paths: missing["given"][: len(paths)])
    reporter = Reporter("plain", 0, err=model.err)
    found = cached_manifest(cached(model), None, 1, reporter)
    wanted = replace(
        make_manifest("m", ENTRIES), source=SOURCE, left_out=2, left_out_paths=("w1", "w2")
    )
    assert found == wanted and read_manifest(model.folder) is None
    assert cached_manifest(cached(model), "n", 1, reporter).name == "n"
    coming = [Path("/c/blobs/x.incomplete")]
    with pytest.raises(IncompleteError) as told:
        cached_manifest(cached(model, coming=coming), None, 1, reporter)
    assert told.value.why == "still to come: x.incomplete"
    assert told.value.next_step.startswith("hf download org/m\n")
    assert cached_manifest(cached(model, coming=coming), None, 1, reporter, force=True) == wanted
    model.write("cut.safetensors", b"cut")
    with pytest.raises((IncompleteError, IntegrityError)):
        cached_manifest(cached(model), None, 1, reporter)
    assert len(cached_manifest(cached(model), None, 1, reporter, force=True).faults) == 1


def test_damage_of_a_cache_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "damaged_blobs", lambda *_: ["a is wrong", "b is wrong"])
    with pytest.raises(IntegrityError) as told:
        cached_manifest(cached(model), None, 1, Reporter("none", -1))
    assert told.value.what == f"{model.folder} is damaged"
    assert told.value.why == "a is wrong\nb is wrong"
    assert told.value.next_step == "hf download --force-download org/m"


@pytest.mark.parametrize(
    ("fields", "looked"),
    [
        ({}, ["whole", "token"]),
        ({"faults": ("odd",)}, []),
        ({"partial": ("x",)}, []),
        ({"source": SOURCE}, []),
    ],
)
@pytest.mark.parametrize("force", [True, False])
def test_what_nobody_vouches_for_is_looked_at(
    fields: Dict[str, Any], looked: List[str], force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not once more what somebody insisted on."""
    asked: List[Any] = []
    sizes = {entry.path: entry.size for entry in ENTRIES}
    folder = Path("/models/m")
    monkeypatch.setattr(
        room, "_require_whole", lambda *given, **more: asked.append(("whole", given, more))
    )
    monkeypatch.setattr(
        room, "_require_no_token", lambda *given: asked.append(("token", given, {}))
    )
    monkeypatch.setattr(room, "_with_tokens", lambda *_: [])
    manifest = replace(make_manifest("m", ENTRIES), **fields)
    reporter: Any = None
    room._look_at_listed(folder, manifest, reporter, force)
    given = (folder, sizes, force)
    expected = [("whole", given, {"listed": True}), ("token", given, {})]
    assert asked == [one for one in expected if one[0] in looked]


def test_tokens_are_looked_for_in_all_small_texts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_TEXT_SIZE", 100)
    files = {
        "a": b" " * (101 - len(TOKEN)) + TOKEN,  # too large
        "b": TOKEN,
        "c": b" " * (100 - len(TOKEN)) + TOKEN,
        "d": b"\0" + TOKEN,
        "e": b"no token",
        "f": TOKEN.replace(b"hf_", b"api_org_"),
    }
    for path, content in files.items():
        model.write(path, content)
    sizes = {path: len(content) for path, content in files.items()}
    assert room._with_tokens(model.folder, sizes) == ["b", "c", "f"]


def test_files_are_hashed_with_their_size_as_the_total(model: Model) -> None:
    reporter: Any = KeptStages()
    sizes = {path: len(content) for path, content in FILES.items()}
    found = room._manifest_of_files(model.folder, sizes, "n", 1, reporter)
    assert found == make_manifest("n", ENTRIES)
    total = sum(sizes.values())
    assert reporter.shown == [("hash", total, total)]
    assert reporter.said == [f"{model.folder} has no manifest: hashing its files to make one"]
    with pytest.raises(UsageError):
        room._manifest_of_files(model.folder, sizes, "../n", 1, reporter)
    assert len(reporter.said) == 1, "a name that cannot be is told before"
