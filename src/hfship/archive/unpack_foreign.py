# SPDX-License-Identifier: Apache-2.0
"""Models in archives of other programs, restored and proven as far as a manifest reaches.

Owns what is made of a tar stream that hfship did not write: which of its files belong to a model,
and the manifest on arrival. Promises: without a manifest in it, the model is marked as unproven;
with one, it is restored only if it is what that says. Never: follows or makes a link; writes a file
outside the model's folder, or two of the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import zlib
from itertools import chain, tee
from typing import IO, TYPE_CHECKING, Callable, Iterable, Iterator, List, Sequence, Set

from hfship.archive.files import STDIN
from hfship.archive.foreign import LARGEST_SKIPPED, ZstdContent, gzip_content, tar_members
from hfship.archive.frames import LARGEST_FRAME
from hfship.archive.stream_check import Sink
from hfship.archive.streams import read_pieces, stream_of
from hfship.archive.tree import FolderSink, Journal, Tree
from hfship.archive.unpack import (
    Unpacked,
    UnpackOptions,
    matches_any,
    matching_files,
    target_folder,
)
from hfship.archive.verify import require_sums
from hfship.archive.work_folder import (
    locked_tree,
    publish_folder,
    remove_leftovers,
    work_folder_of,
)
from hfship.base.content import check_relative_path, is_note, never_content
from hfship.base.errors import IncompleteError, IntegrityError, NotFoundError, UsageError
from hfship.base.filenames import ignores_case
from hfship.base.files import CHUNK, atomic_write, require_room
from hfship.base.manifest import (
    MANIFEST_PATH,
    FileEntry,
    make_manifest,
    parse_manifest,
)
from hfship.base.text import counted, human_bytes, shorten
from hfship.base.values import replace

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest

# Compression by the first two bytes: a zstd frame, or a skippable one before it (RFC 8878), or gzip
# (RFC 1952); anything else is taken for a plain tar stream.
_COMPRESSIONS = {b"\x28\xb5": "zstd", b"\x50\x2a": "zstd", b"\x1f\x8b": "gzip"}
LARGEST_NAMES = 32 << 20  # characters of all paths in an archive, and of the folders in these
_HUB_CACHE = re.compile(r"([^/]+/)?models--")  # a folder of huggingface_hub's cache


class ForeignModel:
    """A model in a tar stream of another program, plain or compressed by zstd or gzip.

    While `files` runs, `root` becomes the folder in the stream that is the model ("" if its files
    lie in none), and `text` the manifest, if one comes.
    """

    def __init__(self, archive: ArchiveFiles, stream: IO[bytes]) -> None:
        self.archive = archive
        self.root = ""
        self.text = b""
        self._unread = 0  # bytes of the file at hand
        # The stream may be a pipe: what is looked at here has to come again.
        pieces = iter(lambda: stream.read(CHUNK), b"")
        head, whole = tee(pieces)
        magic = stream_of(head).read(2)
        self._compression = _COMPRESSIONS.get(magic, "")
        self._zstd = ZstdContent(stream_of(whole))
        self._stream: IO[bytes] = stream_of(whole)
        if self._compression == "zstd":
            self._stream = stream_of(self._zstd)
        elif self._compression == "gzip":
            self._stream = stream_of(gzip_content(self._stream))

    @property
    def checksums(self) -> str:
        """Which checksums would have shown damage on the way, as the end of a sentence."""
        if not self._compression:
            return "it has no checksum"
        unchecked = self._zstd.unchecked
        if self._compression == "zstd" and unchecked:
            return f"{unchecked} of its zstd frames have no checksum"
        return f"its {self._compression} checksums hold"

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        where = "standard input" if self.archive.name == STDIN else self.archive.path
        what = f"{where} was not made by hfship, and cannot be unpacked"
        try:
            yield
        except EOFError as exc:
            kind = IncompleteError if self.archive.name == STDIN else IntegrityError
            raise kind(what, str(exc), "copy or send it again") from exc
        except (ValueError, OSError, zlib.error) as exc:
            step = (
                "copy it again\nor pack it again, without links: "
                "tar -h --hard-dereference --zstd -cf NAME.tar.zst DIR"
            )
            raise IntegrityError(what, str(exc), step) from exc

    def files(self, some: bool = False) -> Iterator[FileEntry]:
        """The files of the model as they come, without their SHA-256.

        The `content` of one is to be read before the next; what is left of it is passed over.
        Raises IntegrityError for what is damaged or refused, or holds no file; IncompleteError for
        a pipe that ends too early. What is never content is refused, too, unless only `some` files
        were asked for.
        """
        found = 0
        with self._errors():
            members = tar_members(self._stream)
            for number, (path, size, is_folder) in enumerate(members):
                self._unread = size
                path = _plain_path(path)
                if number == 0 and (is_folder or "/" in path):
                    self.root, _, _ = path.partition("/")
                inside = self._inside(path)
                if inside == MANIFEST_PATH and size <= LARGEST_FRAME:
                    self.text = b"".join(self.content())
                elif not is_folder and self._is_content(inside, some):
                    found += 1
                    yield FileEntry(inside, size, "")
                self._pass_over()
            if not found:
                raise ValueError("it holds no files")
            self._require_end()

    def _inside(self, path: str) -> str:
        """Path in the folder of the model. Raises ValueError for what lies outside of it."""
        if _HUB_CACHE.match(path):
            raise ValueError(
                "it holds huggingface_hub's cache, not a model's folder: "
                "pack models--*/snapshots/COMMIT"
            )

        if not path:  # the folder in which tar was called
            return ""
        if not never_content(path):
            check_relative_path(path)
        if not self.root:
            return path

        root, _, inside = path.partition("/")
        if root != self.root:
            raise ValueError(
                f"{path!r} lies beside {self.root!r}: it is not the folder of one model"
            )

        return inside

    def _is_content(self, inside: str, some: bool) -> bool:
        """Whether a file in the folder of the model is one of the model. Raises IntegrityError for
        what is never content."""
        if not inside or is_note(inside):
            return False
        if not never_content(inside):
            return True
        if some:
            return False
        raise IntegrityError(
            f"{self.archive.path} holds {inside}, which is never part of a model",
            "it may hold programs that run by themselves, or keys",
            "pack it again without it: tar --exclude=.git -h --zstd -cf NAME.tar.zst DIR\n"
            "or name what is to be unpacked: --only GLOB",
        )

    def content(self) -> Iterator[bytes]:
        """What is left of the file at hand, in pieces. Raises as `files` does."""
        size = self._unread
        self._unread = 0
        with self._errors():
            yield from read_pieces(self._stream, size)

    def _pass_over(self) -> None:
        for _ in self.content():
            pass

    def _require_end(self) -> None:
        """Raise ValueError if anything but zeros follows the tar stream, or too many of these."""
        for _ in range(LARGEST_SKIPPED // CHUNK):
            piece = self._stream.read(CHUNK)
            if not piece:
                return
            if any(piece):
                raise ValueError("something follows the end of the tar stream")
        raise ValueError("it has no end: only zeros follow")


def _plain_path(path: str) -> str:
    """A path of a tar member without `./` before it and `/` behind it.

    >>> [_plain_path(path) for path in ("./m/config.json", "././m/", ".", "a/./b")]
    ['m/config.json', 'm', '', 'a/./b']
    """
    return re.sub(r"^(\./)+|^\.$", "", path.rstrip("/"))


def unpack_foreign(foreign: ForeignModel, out: Path, options: UnpackOptions) -> Unpacked:
    """Restore a model that another program packed, and make its manifest.

    The model is marked as unproven, unless it brings a manifest. Raises UsageError for a folder
    that must not be replaced, IntegrityError, IncompleteError, DiskError.
    """
    started = time.monotonic()
    files = foreign.files(some=bool(options.only))
    first = next(files)  # there is one, else it raises; now the root is known
    require_sums(foreign.archive)  # not before: what is no archive can have any size
    file_stem = foreign.archive.name.split(".tar")[0]
    name = options.name or foreign.root or file_stem
    target = target_folder(out, name)
    if target.is_symlink() or (target.exists() and not options.force):
        raise UsageError(
            f"{target} is there already",
            "",
            "remove it, give --name, or replace a folder with --force",
        )

    work = work_folder_of(target)
    with locked_tree(work) as (tree, lock):
        remove_leftovers(work, make_manifest(name, ()))
        all_files = chain([first], files)
        entries = restore_files(foreign, all_files, tree, options.only)
        manifest = _manifest_on_arrival(foreign, name, entries, options.only)
        tree.remove_work_files()
        options.accept(work, manifest)
        atomic_write(work / MANIFEST_PATH, manifest.to_json())
        tree.sync()
        lock.remove()
        publish_folder(work, target)

    return Unpacked(
        folder=target,
        manifest=manifest,
        written=len(entries),
        seconds=time.monotonic() - started,
    )


def restore_files(
    foreign: ForeignModel, files: Iterable[FileEntry], tree: Tree, only: Sequence[str]
) -> List[FileEntry]:
    """Write the files that are asked for; returns them with their SHA-256. Raises IntegrityError
    for a path that comes twice."""
    fold: Callable[[str], str] = str
    if ignores_case(tree.root):
        fold = str.casefold
    journal = Journal(tree)
    sink = FolderSink(tree, frozenset(), journal, {}, reserve=False)
    try:
        wanted = _fitting(files, tree, only)
        return list(_receive(foreign, wanted, sink, fold))
    finally:
        sink.close()
        journal.close(remove=True)


def _fitting(files: Iterable[FileEntry], tree: Tree, only: Sequence[str]) -> Iterator[FileEntry]:
    """The files that are asked for, each after a look whether there is room for it."""
    step = "free space, or choose another folder with -o DIR"
    for entry in files:
        if only and not matches_any(entry.path, only):
            continue
        what = f"unpack {entry.path}"
        require_room(tree.root, entry.size, entry.size, what, step)
        yield entry


def _receive(
    foreign: ForeignModel,
    files: Iterable[FileEntry],
    sink: Sink,
    fold: Callable[[str], str] = str,
) -> Iterator[FileEntry]:
    """Pass files that come on to a sink; yields them with their SHA-256.

    `fold` makes those paths equal that the filesystem of the sink takes for the same. Raises
    IntegrityError for a path that comes twice, or is also a folder.
    """
    paths = _PathsThatCame()
    for entry in files:
        if not paths.add(fold(entry.path)):
            raise IntegrityError(
                f"{foreign.archive.path} has {entry.path} twice, "
                "also as a folder, or in another case",
                "one would replace the other",
                "pack it again",
            )
        if paths.size > LARGEST_NAMES:
            what = f"{foreign.archive.path} has more names than a model can have"
            raise IntegrityError(what, f"they have more than {human_bytes(LARGEST_NAMES)}")
        digest = hashlib.sha256()
        offset = 0
        sink.begin(entry)
        for piece in foreign.content():
            digest.update(piece)
            sink.write(entry, offset, piece)
            offset += len(piece)
        sink.finish(entry)
        yield replace(entry, sha256=digest.hexdigest())


class _PathsThatCame:
    """Paths of files, none of which is another one or its folder; `size` characters are held."""

    def __init__(self) -> None:
        # Paths, and with a "/" at the end the folders they lie in.
        self._seen: Set[str] = set()
        self.size = 0

    def add(self, path: str) -> bool:
        """Take the next one, unless it is in the way of an earlier one."""
        if path in self._seen or path + "/" in self._seen:
            return False

        self._hold(path)
        folder = path.rpartition("/")[0]
        while folder and folder + "/" not in self._seen:
            if folder in self._seen:
                return False
            self._hold(folder + "/")
            folder = folder.rpartition("/")[0]
        return True

    def _hold(self, path: str) -> None:
        self._seen.add(path)
        self.size += len(path)


def verify_foreign(foreign: ForeignModel) -> str:
    """Read an archive of another program to its end, and say what that proves.

    Raises IntegrityError, IncompleteError.
    """
    files = foreign.files()
    entries = list(_receive(foreign, files, Sink()))
    manifest = _manifest_on_arrival(foreign, "NAME", entries, ())
    proof = "; as the manifest in it says"
    if manifest.unproven:
        proof = f"{manifest.caveats}, only {foreign.checksums}"
    count = counted(len(manifest.files), "file")
    size = human_bytes(manifest.size)
    return f"{count}, {size}, not made by hfship{proof}"


def _manifest_on_arrival(
    foreign: ForeignModel, name: str, entries: Sequence[FileEntry], only: Sequence[str]
) -> Manifest:
    """The manifest of what came: the one that came with it, if that is right, else an unproven one.

    Raises IntegrityError if the files are not what the manifest that came says; NotFoundError.
    """
    if not entries:
        raise NotFoundError(
            f"no file of {foreign.archive.path} matches {', '.join(only)}",
            "",
            "give another --only",
        )

    made = replace(make_manifest(name, entries), unproven=True)
    if not foreign.text:
        return made

    brought = parse_manifest(foreign.text, f"the manifest in {foreign.archive.path}")
    listed = matching_files(brought, only or ["*"])
    wrong = {entry.path for entry in set(listed.files) ^ set(made.files)}
    if wrong:
        raise IntegrityError(
            f"{foreign.archive.path} is not what the manifest in it says",
            f"wrong, missing or not listed: {shorten(sorted(wrong))}",
            "copy it again, or pack it again: hfship pack DIR",
        )

    return listed
