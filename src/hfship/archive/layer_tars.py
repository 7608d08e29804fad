# SPDX-License-Identifier: Apache-2.0
"""Models whose layers in a registry are archives, as KitOps writes them and modctl may.

Owns what is made of layers that were fetched: tars, plain or compressed by gzip or zstd, whose
names are those of the model's files, and files that are a layer each. Promises: a layer counts only
if the bytes that were unpacked are those of its digest; the model appears under its name when all
of them were. Never: follows or makes a link; writes a file outside the model's folder, or two of
the same name.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Callable, Iterator, Sequence, cast

from hfship.archive.files import ArchiveFiles
from hfship.archive.streams import read_pieces
from hfship.archive.unpack_foreign import ForeignModel, restore_files
from hfship.archive.work_folder import (
    locked_tree,
    publish_folder,
    remove_leftovers,
    work_folder_of,
)
from hfship.base.content import check_relative_path, never_content
from hfship.base.errors import IntegrityError
from hfship.base.files import atomic_write
from hfship.base.manifest import MANIFEST_PATH, FileEntry, make_manifest
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest, Source


@dataclass(frozen=True)
class Layer:
    """A layer that was fetched: its blob, which is called by its SHA-256 (hex), and the path of the
    file that it is; "" for a tar."""

    blob: Path
    file: str = ""

    @property
    def sha256(self) -> str:
        """What it has to be."""
        return self.blob.name


class _HashedFile:
    """A file that is read from its beginning to its end, and hashed on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        piece = self._stream.read(size)
        self._digest.update(piece)
        return piece

    def require(self, layer: Layer) -> None:
        """Read the rest. Raises IntegrityError for another content than the layer's."""
        while self.read(1 << 20):
            pass
        if self._digest.hexdigest() != layer.sha256:
            what = f"{layer.blob} is not what its digest says"
            why = "it changed after it was fetched"
            raise IntegrityError(what, why, "fetch it again")


class _LayerTar(ForeignModel):
    """The tar of a layer, whose names are those of the model's files."""

    def _inside(self, path: str) -> str:
        if path and not never_content(path):
            check_relative_path(path)
        return path


class _Layers(ForeignModel):
    """The files of all layers, one after the other."""

    def __init__(self, layers: Sequence[Layer], name: str) -> None:
        self.archive = ArchiveFiles(Path(), name, {})
        self._layers = layers
        self._content: Callable[[], Iterator[bytes]] = lambda: iter(())

    def files(self, some: bool = False) -> Iterator[FileEntry]:
        """The files, without their SHA-256; see ForeignModel."""
        for layer in self._layers:
            blob = layer.blob
            with blob.open("rb") as stream:
                hashed = _HashedFile(stream)
                if layer.file:
                    status = os.fstat(stream.fileno())
                    size = status.st_size
                    self._content = _content_of(hashed, size)
                    entry = FileEntry(layer.file, size, "")
                    yield entry
                else:
                    files = ArchiveFiles(blob.parent, blob.name, {})
                    tar = _LayerTar(files, cast("IO[bytes]", hashed))
                    self._content = tar.content
                    yield from tar.files(some)
                hashed.require(layer)

    def content(self) -> Iterator[bytes]:
        """The content of the file at hand."""
        return self._content()


def _content_of(stream: _HashedFile, size: int) -> Callable[[], Iterator[bytes]]:
    def content() -> Iterator[bytes]:
        return read_pieces(cast("IO[bytes]", stream), size)

    return content


def restore_layers(
    layers: Sequence[Layer],
    target: Path,
    source: Source,
    accept: Callable[[Path, Manifest], Manifest],
) -> Manifest:
    """Restore a model of its layers, and write its manifest as `accept` returns it.

    Raises IntegrityError for layers that are damaged, or hold what is no file of a model;
    DiskError, and what `accept` raises.
    """
    name = target.name
    model = _Layers(layers, name)
    work = work_folder_of(target)
    with locked_tree(work) as (tree, lock):
        remove_leftovers(work, make_manifest(name, ()))
        entries = restore_files(model, model.files(), tree, ())
        in_order = sorted(entries, key=lambda entry: entry.path.encode())
        manifest = accept(work, make_manifest(name, in_order, source))
        tree.remove_work_files()
        atomic_write(work / MANIFEST_PATH, manifest.to_json())
        tree.sync()
        lock.remove()
        publish_folder(work, target)
    return manifest
