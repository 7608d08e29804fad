# SPDX-License-Identifier: Apache-2.0
"""A delivery: the archives of a model and of the image that serves it, as one.

Owns NAME.bundle.json, which says what belongs together, models.toml and READ-ME-FIRST.txt beside
it, with the commands of that very delivery. The archives stay what they are: each is proven, cut,
repaired and resumed by itself, and the image goes from its own straight into docker.

Format hfship-bundle/1, UTF-8 JSON, keys sorted, one space of indentation, newline at the end:
  {"format": "hfship-bundle/1", "name": NAME,
   "items": [{"kind": "image", "name", "archive", "version", "reference"},
             {"kind": "model", "name", "archive", "version", "reference"}]}
in the order in which they are unpacked. `archive` is the name of a file beside it, or what comes
before the numbers of its parts; `version` the commit, or the digest without "sha256:"; `reference`
what docker calls the image, or the repository of the model ("" where there is none).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence, Tuple

from hfship.archive.files import SUFFIX
from hfship.archive.versions import version_of
from hfship.base.errors import IntegrityError, NotFoundError, UsageError
from hfship.base.files import atomic_write, disk_errors
from hfship.base.manifest import make_manifest
from hfship.base.reading import parse_json, read_small
from hfship.base.text import human_bytes
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest

BUNDLE_FORMAT = "hfship-bundle/1"
BUNDLE_SUFFIX = ".bundle.json"
MODELS_FILE = "models.toml"
PROGRAM = "python3 hfship.pyz"
KINDS = ("image", "model")
_MOST_ITEMS = 1000
_FAULTS = (ValueError, KeyError, TypeError, AttributeError, UsageError)


@dataclass(frozen=True)
class BundleItem:
    """An archive of a delivery; see above. For people: `size` in bytes, 0 where not known, and the
    licence of a model with the terms of a gated one, "" where nothing is known."""

    kind: str
    name: str
    archive: str
    version: str
    reference: str
    size: int = 0
    licence: str = ""


@dataclass(frozen=True)
class Bundle:
    """What belongs together."""

    name: str
    items: Tuple[BundleItem, ...]

    @property
    def images(self) -> List[BundleItem]:
        """Those that go into docker."""
        return self._of_kind("image")

    @property
    def models(self) -> List[BundleItem]:
        """Those that are served."""
        return self._of_kind("model")

    def _of_kind(self, kind: str) -> List[BundleItem]:
        found = []
        for item in self.items:
            if item.kind == kind:
                found.append(item)
        return found

    def text(self) -> str:
        """The canonical text."""
        rows = []
        for item in self.items:
            row = dict(vars(item))
            row.pop("size")
            row.pop("licence")
            rows.append(row)
        value = {
            "format": BUNDLE_FORMAT,
            "name": self.name,
            "items": rows,
        }
        return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


def bundle_item(manifest: Manifest, archive: str, size: int) -> BundleItem:
    """The item for an archive with this manifest."""
    version = version_of(manifest)
    kind = "model"
    reference = version.repo
    if manifest.image:
        kind = "image"
        reference = manifest.image.name
    licence = manifest.licence_text
    return BundleItem(kind, manifest.name, archive, version.id, reference, size, licence)


def read_bundle(path: Path) -> Bundle:
    """The delivery that a file describes. Raises NotFoundError, IntegrityError, DiskError."""
    with disk_errors("read", path):
        try:
            content = read_small(path)
        except FileNotFoundError as exc:
            raise NotFoundError(f"there is no {path}", "", "hfship list") from exc
    try:
        return _bundle_in(parse_json(content))
    except _FAULTS as exc:
        what = f"{path} does not describe a delivery"
        raise IntegrityError(what, str(exc)[:300], "copy it again") from exc


def _bundle_in(value: Any) -> Bundle:
    written = value["format"]
    if written != BUNDLE_FORMAT:
        raise ValueError(f"format is {written!r}, this hfship reads {BUNDLE_FORMAT}")
    items = []
    for row in value["items"][:_MOST_ITEMS]:
        item = _item_in(row)
        items.append(item)
    name = str(value["name"])
    make_manifest(name, ())  # refuses what cannot be a name
    return Bundle(name, tuple(items))


def _item_in(row: Any) -> BundleItem:
    texts = [row[key] for key in ("kind", "name", "archive", "version", "reference")]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("an item has something that is no text")
    kind, name, archive, version, reference = texts
    if kind not in KINDS:
        raise ValueError(f"it has a {kind!r}, which this hfship does not know")
    make_manifest(name, ())
    if "/" in archive or not archive.endswith(SUFFIX):
        raise ValueError(f"{archive!r} is no archive beside it")
    return BundleItem(kind, name, archive, version, reference)


def bundles_at(place: Path) -> List[Path]:
    """The files of deliveries that a path means: the file itself, or those in a folder."""
    if place.name.endswith(BUNDLE_SUFFIX):
        return [place]
    if place.is_dir():
        return sorted(place.glob(f"*{BUNDLE_SUFFIX}"))
    return []


def archives_meant(words: Sequence[str]) -> List[str]:
    """The words of a command, with the archives of a delivery in its place. Raises as
    `read_bundle`.

    >>> archives_meant(["m.tar.zst", "NAME"])
    ['m.tar.zst', 'NAME']
    """
    found: List[str] = []
    for word in words:
        if not word.endswith(BUNDLE_SUFFIX):
            found.append(word)
            continue
        path = Path(word)
        for item in read_bundle(path).items:
            archive = path.parent / item.archive
            found.append(str(archive))
    return list(dict.fromkeys(found))


def write_bundle(folder: Path, bundle: Bundle) -> Path:
    """Put NAME.bundle.json beside the archives. Raises DiskError."""
    path = folder / f"{bundle.name}{BUNDLE_SUFFIX}"
    atomic_write(path, bundle.text())
    return path


# -- for who has the medium and nothing else


def models_text(bundles: Sequence[Bundle]) -> str:
    """A models file of the models of some deliveries, each with its image."""
    lines = ["# Made by hfship pack --with-image: hfship serve --models models.toml"]
    for bundle in bundles:
        image = ""
        for item in bundle.images:
            image = item.reference
        for item in bundle.models:
            repo = item.reference or item.name
            lines += [
                "",
                "[[model]]",
                f'repo = "{repo}"',
                f'name = "{item.name}"',
            ]
            if image:
                lines += ["[model.serve]", f'image = "{image}"']
    return "\n".join(lines) + "\n"


def read_me_text(bundles: Sequence[Bundle]) -> str:
    """What is in these deliveries, and the commands for them."""
    archives: Dict[str, BundleItem] = {}
    for bundle in bundles:
        for item in bundle.items:
            archives[item.archive] = item

    words = [shlex.quote(archive) for archive in archives]
    return "\n".join(
        [
            "THIS DELIVERY",
            "",
            *map(_contents_line, archives.values()),
            "",
            "From this folder, with Python 3.8 or later, docker, and no network:",
            "",
            f"    {PROGRAM} verify {' '.join(words)}",
            "        proves every byte, and names what to copy again",
            *_serve_lines(bundles),
            "",
            "Step by step:",
            "",
            *_step_lines(archives),
            "",
            "",
            "",
        ]
    )


def _contents_line(item: BundleItem) -> str:
    title = item.reference or item.name
    version = item.version[:12]
    line = f"    {item.archive}: {item.kind} {title}"
    line += f" at {version}"
    if item.size:
        size = human_bytes(item.size)
        line += f", {size}"
    if item.licence:
        line += f", licence {item.licence}"
    return line


def _serve_lines(bundles: Sequence[Bundle]) -> List[str]:
    lines = []
    for bundle in bundles:
        name = f"{bundle.name}{BUNDLE_SUFFIX}"
        word = shlex.quote(name)
        lines.append(f"    {PROGRAM} serve {word}")
        lines.append("        image into docker, model into its folder, then waits for an answer")
    return lines


def _step_lines(archives: Mapping[str, BundleItem]) -> List[str]:
    lines = []
    for archive in archives:
        word = shlex.quote(archive)
        lines.append(f"    {PROGRAM} unpack {word}")
    for item in archives.values():
        if item.kind == "model":
            lines.append(f"    {PROGRAM} serve {item.name}")
    return lines
