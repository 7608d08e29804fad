# SPDX-License-Identifier: Apache-2.0
"""The manifest.

Owns the contract that travels: which files a model has, their sizes and SHA-256, and where they
came from. It lies at NAME/.hfship/manifest.json, goes first into the archive and stays beside the
model. And what is content of a model folder, and which names can travel.

Format hfship-manifest/1, UTF-8 JSON, keys sorted, one space of indentation, newline at the end:
  {"format": "hfship-manifest/1", "name": NAME,
   "source": null | {"endpoint", "repo", "revision", "resolved_repo", "commit", "license", "gated",
                     "fetched_at", "repo_type"},
   "files": [{"path", "sha256", "size"}, ...]  sorted by the UTF-8 bytes of path,
   "totals": {"files": N, "bytes": N}}
`source` is null when the folder did not come through `fetch`: then nobody but the packer vouches
for the bytes. With "unproven": true nobody does: the model came in an archive of another program,
without sums. "card" has what the card of the model says, "declared" the files that can run code or
are large, with what the sender saw in them and decided: both are the sender's word, and no rule
believes them. "left_out": N says that these are not all files of the model: somebody chose to do
without N others, and "left_out_paths" lists those that are known. "partial" lists files of weights
that an index among the files names and that are not there, "faults" tells in words what was packed
with --force although it is no whole file. A container image has "kind": "image" and "image" with
what is told in base/imagefacts.py; its `source` has the repo_type "image", names with the host of
the registry, and for the commit the 64 hex digits of the digest that the tag meant.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import (
    Any,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Tuple,
    Union,
)

from hfship.base.card import Card, card_of, licence_of
from hfship.base.content import PARTIAL_DIR, check_distinct_paths, check_relative_path
from hfship.base.errors import IncompleteError, IntegrityError, UsageError
from hfship.base.files import (
    WORK_DIR,
    atomic_write,
    disk_errors,
    make_dir,
)
from hfship.base.imagefacts import KIND, REPOSITORY, ImageFacts, read_facts
from hfship.base.reading import LIST_SIZE, parse_json, read_below
from hfship.base.text import counted, shorten
from hfship.base.values import dataclass, replace

MANIFEST_FORMAT = "hfship-manifest/1"
MANIFEST_PATH = f"{WORK_DIR}/manifest.json"
_LONGEST_REASON = 500  # letters of what is wrong: it may quote the manifest
UNPROVEN = "unproven: no sums came with it"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_LARGEST_COUNT = 2**63 - 1  # bytes that a filesystem can hold in a file
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_REPO_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z", re.ASCII)
REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class FileEntry:
    """One file of a model: path relative to the model folder with '/', size in bytes, hex
    SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where a model came from, as the Hub says. `revision` is what was asked for, `resolved_repo`
    the repository's name today, `commit` 40 hex digits, `fetched_at` UTC in ISO 8601."""

    endpoint: str
    repo: str
    revision: str
    resolved_repo: str
    commit: str
    license: Optional[str] = None
    gated: Union[bool, str] = False
    fetched_at: str = ""
    repo_type: str = "model"


# What the fields of a Source may hold that are not always texts.
_SOURCE_TYPES: Mapping[str, Tuple[type, ...]] = {"license": (str, type(None)), "gated": (str, bool)}

_LISTS = ("left_out_paths", "partial", "faults")  # fields of a manifest that are lists of texts


@dataclass(frozen=True)
class Declared:
    """What the sender of a model said of one file: its kind, what was found in it, what was decided
    ("allowed", "reported"), by which rule, and the reason of an exception."""

    path: str
    kind: str
    says: str
    outcome: str
    rule: str = ""
    reason: str = ""

    def json(self) -> Dict[str, str]:
        """As it lies in a manifest; what is empty is left out."""
        fields = {}
        for name, value in vars(self).items():
            if value:
                fields[name] = value
        return fields


@dataclass(frozen=True)
class Manifest:
    """The files of one model and where they came from. `files` is sorted by the UTF-8 bytes of the
    path."""

    name: str
    files: Tuple[FileEntry, ...]
    source: Optional[Source] = None
    unproven: bool = False
    left_out: int = 0
    left_out_paths: Tuple[str, ...] = ()
    partial: Tuple[str, ...] = ()
    faults: Tuple[str, ...] = ()
    image: Optional[ImageFacts] = None  # of a container image
    card: Card = Card()
    declared: Tuple[Declared, ...] = ()

    @property
    def licence(self) -> str:
        """The name of its licence; "" where none is known."""
        told = None
        if self.source:
            told = self.source.license
        return licence_of(told, self.card)

    @property
    def licence_text(self) -> str:
        """Its licence for people, and whether the terms of a gated repository were accepted; ""
        where nothing is known."""
        told = [self.licence]
        if self.card.terms:
            told.append(f"terms {self.card.terms}")
        elif self.source and self.source.gated:
            told.append("gated")
        return ", ".join(filter(None, told))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def caveats(self) -> str:
        """What is to be said even when all files are as listed here; "" or "; ...", for the end of
        a sentence."""
        text = ""
        if self.unproven:
            text += f"; {UNPROVEN}"
        text += self.partial_text
        if self.faults:
            text += f"; packed by force: {shorten(self.faults, 3)}"
        return text + self._left_out_text()

    @property
    def partial_text(self) -> str:
        """Which weights are missing; "" or "; ...", for the end of a sentence."""
        if not self.partial:
            return ""
        files = counted(len(self.partial), "file")
        names = shorten(self.partial, 3)
        return f"; partial: {files} of weights that its index names not in it ({names})"

    def _left_out_text(self) -> str:
        if not self.left_out:
            return ""
        if len(self.left_out_paths) == self.left_out:
            return f"; left out: {shorten(self.left_out_paths, 3)}"
        others = counted(self.left_out, "other file")
        return f"; partial by choice: {others} of the model left out"

    def to_json(self) -> str:
        """The canonical text: equal manifests have equal bytes."""
        value: Dict[str, Any] = {
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "source": None,
            "files": [vars(entry) for entry in self.files],
            "totals": {"files": len(self.files), "bytes": self.size},
        }
        if self.source:
            value["source"] = vars(self.source)
        if self.unproven:
            value["unproven"] = True
        if self.left_out:
            value["left_out"] = self.left_out
        if self.image:
            value["kind"] = KIND
            value["image"] = self.image.json()
        for name in _LISTS:
            listed = getattr(self, name)
            if listed:
                value[name] = listed
        if self.card != Card():
            value["card"] = self.card.json()
        if self.declared:
            value["declared"] = [one.json() for one in self.declared]
        return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


def make_manifest(
    name: str, files: Iterable[FileEntry], source: Optional[Source] = None
) -> Manifest:
    """A manifest with its files in canonical order. Raises UsageError for a name that cannot be a
    folder."""
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} cannot be the name of a model",
            "names have letters, digits, '.', '_' and '-', and start with a letter or digit",
            "choose one with --name",
        )

    in_order = sorted(files, key=lambda entry: entry.path.encode("utf-8"))
    return Manifest(name, tuple(in_order), source)


def parse_manifest(text: Union[str, bytes], where: str) -> Manifest:
    """Read and check a manifest; `where` names it in errors.

    Everything a later step relies on is checked here: path safety, no duplicates, hash form, sizes.
    Raises IntegrityError.
    """
    try:
        value = parse_json(text)
        return _manifest_from_value(value)
    except (ValueError, KeyError, TypeError, UsageError) as exc:
        why = f"{type(exc).__name__}: {exc}"
        raise IntegrityError(
            f"{where} is not a valid manifest",
            why[:_LONGEST_REASON],
            "fetch or copy the model again",
        ) from exc


def _manifest_from_value(value: Any) -> Manifest:
    """The manifest in parsed JSON of any shape. Raises ValueError, KeyError, TypeError,
    UsageError."""
    written_format = value["format"]
    if written_format != MANIFEST_FORMAT:
        raise ValueError(f"format is {written_format!r}, this hfship reads {MANIFEST_FORMAT}")

    files = [_file_entry(item) for item in value["files"]]
    check_distinct_paths(entry.path for entry in files)
    source = None
    source_fields = value.get("source")
    if source_fields:
        source = Source(**source_fields)
        check_source(source)

    image = None
    if value.get("kind", "model") != "model":
        image = _image_in(value)

    left_out = value.get("left_out", 0)
    if not _is_count(left_out):
        raise ValueError(f"left_out is {left_out!r}")

    name = str(value["name"])
    manifest = make_manifest(name, files, source)
    return replace(
        manifest,
        unproven=value.get("unproven") is True,
        left_out=left_out,
        left_out_paths=_texts(value, "left_out_paths"),
        partial=_texts(value, "partial"),
        faults=_texts(value, "faults"),
        image=image,
        card=_card_in(value),
        declared=_declared_in(value),
    )


def _image_in(value: Any) -> ImageFacts:
    """The image that a manifest describes. Raises ValueError, KeyError, TypeError for what is of
    another kind."""
    kind = value["kind"]
    if kind != KIND:
        raise ValueError(f"it is of the kind {kind!r}, which this hfship does not know")
    return read_facts(value["image"])


def _card_in(value: Any) -> Card:
    """The card of a manifest; an empty one where it has none. Raises ValueError."""
    facts = value.get("card", {})
    if not isinstance(facts, dict):
        raise ValueError("card is not a table")

    terms = facts.get("terms", "")
    if not _is_text(terms):
        raise ValueError(f"terms of the card are {terms!r}")
    return replace(card_of(facts), terms=terms)


def _declared_in(value: Any) -> Tuple[Declared, ...]:
    """What the sender said of files. Raises ValueError, TypeError."""
    rows = value.get("declared", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("declared is not a list of tables")
    found = []
    for row in rows:
        texts = {name: row.get(name, "") for name in Declared.__dataclass_fields__}
        if not all(map(_is_text, texts.values())):
            raise ValueError("declared has what is no text")
        found.append(Declared(**texts))
    return tuple(found)


def _texts(value: Any, name: str) -> Tuple[str, ...]:
    """A field with texts that can be shown, none where it is not there. Raises ValueError."""
    texts = value.get(name, [])
    if not isinstance(texts, list) or not all(map(_is_text, texts)):
        raise ValueError(f"{name} is not a list of texts")
    return tuple(texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _file_entry(item: Any) -> FileEntry:
    path = str(item["path"])
    size = item["size"]
    sha256 = str(item["sha256"])
    check_relative_path(path)
    if not _is_count(size):
        raise ValueError(f"size of {path!r} is {size!r}")
    if not _SHA256.match(sha256):
        raise ValueError(f"sha256 of {path!r} is {sha256!r}")

    return FileEntry(path, size, sha256)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT  # True is an int too


def check_source(source: Source) -> None:
    """Raise ValueError unless a source can be shown, sent in a header, and be a word of vLLM's
    command line."""
    for name, value in vars(source).items():
        accepted = _SOURCE_TYPES.get(name, (str,))
        is_accepted = isinstance(value, accepted)
        if not is_accepted or not str(value).isprintable():
            raise ValueError(f"{name} of the source is {value!r}")

    kind = source.repo_type
    repo = source.repo
    resolved = source.resolved_repo
    commit = source.commit
    names, versions = _REPO_ID, _COMMIT
    if kind == KIND:
        names, versions = REPOSITORY, _SHA256
    usable = kind in (*REPO_TYPES, KIND) and names.match(repo) and names.match(resolved)
    if not usable or not versions.match(commit):
        raise ValueError(f"the source is {kind} {repo}, {resolved} at {commit}")


def read_manifest(folder: Path) -> Optional[Manifest]:
    """The manifest of a model folder; None when it has none. Raises IntegrityError, DiskError."""
    path = folder / MANIFEST_PATH
    with disk_errors("read", path):
        try:
            text = read_below(folder, MANIFEST_PATH, LIST_SIZE)
        except FileNotFoundError:
            return None
    return parse_manifest(text, str(path))


def listed_paths(manifest: Optional[Manifest]) -> FrozenSet[str]:
    """Paths of the files of a manifest; none without one."""
    if manifest is None:
        return frozenset()
    return frozenset(entry.path for entry in manifest.files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest beside its model, atomically. Raises DiskError."""
    make_dir(folder / WORK_DIR)
    atomic_write(folder / MANIFEST_PATH, manifest.to_json())


def require_finished(folder: Path) -> None:
    """Refuse a folder without manifest into which a fetch or unpack is still under way. Raises
    IncompleteError."""
    if (folder / MANIFEST_PATH).exists():
        return
    for trace in _traces_of_work(folder):
        what = f"{folder} is not complete yet"
        step = "run the fetch or unpack again until it ends with exit code 0"
        raise IncompleteError(what, f"there is {trace}", step)


def _traces_of_work(folder: Path) -> Iterator[Path]:
    """What a fetch, by us or by hf, or unpack that is not finished leaves in a folder."""
    for path in (PARTIAL_DIR, f"{WORK_DIR}/verified.jsonl", f"{WORK_DIR}/lease"):
        trace = folder / path
        if trace.exists():
            yield trace
    yield from folder.glob(".cache/huggingface/download/**/*.incomplete")  # of hf download


BRING_AGAIN = "fetch or unpack the model again"
