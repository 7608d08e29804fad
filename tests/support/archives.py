"""Models and archives for tests: small ones made in-process, and evil ones made by hand."""

import contextlib
import hashlib
import json
import os
import random
import tarfile
import zlib
from io import BytesIO, StringIO
from pathlib import Path

from hfship.archive.damage import Damage
from hfship.archive.files import ArchiveFiles, archives_in
from hfship.archive.frames import Frame, encode_tail, encode_unit
from hfship.archive.opening import open_archive
from hfship.archive.pack import pack_model
from hfship.archive.pack_plan import PackOptions, plan_pack
from hfship.archive.unpack import UnpackOptions, unpack_archive
from hfship.archive.verify import verify_archive
from hfship.archive.zstd import load_zstd
from hfship.base.content import content_files
from hfship.base.errors import IntegrityError
from hfship.base.manifest import (
    FileEntry,
    make_manifest,
    read_manifest,
    write_manifest,
)
from hfship.base.report import Reporter

QUIET = Reporter("none", -1, StringIO(), StringIO())


def noise(size, seed=0):
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def tensors(content):
    """A file of safetensors that begins with a header in the place of the first bytes of `content`."""
    size = 120
    offsets = [0, len(content) - 8 - size]
    header = json.dumps({"w": {"dtype": "U8", "shape": offsets[1:], "data_offsets": offsets}})
    return size.to_bytes(8, "little") + header.ljust(size).encode() + content[8 + size :]


def make_model(folder, files):
    """A model folder with its manifest. files: path -> bytes."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    entries = [FileEntry(p, len(c), hashlib.sha256(c).hexdigest()) for p, c in files.items()]
    manifest = make_manifest(folder.name, entries)
    write_manifest(folder, manifest)
    return manifest


def no_file(path, kind):
    """Something at a path that no reader must wait for, or read to its end."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 4 << 40)


SMALL = {
    "config.json": b'{"model_type": "tiny"}',
    "empty": b"",
    "sub/a.txt": b"hello " * 40,
    "sub/b.bin": noise(200),
}
BIG = {
    **SMALL,
    "w1.safetensors": tensors(noise(5 << 20, 1)),
    "w2.safetensors": tensors(bytes(range(64)) * (1 << 15)),
    "w3.safetensors": tensors(noise(1 << 20)),
}


def pack(model, out, **options):
    """Pack in-process; returns the archive's files."""
    plan = plan_pack(model, read_manifest(model), PackOptions(**{"jobs": 2, **options}))
    pack_model(plan, out, QUIET)
    return files_in(out)


def files_in(out):
    (files,) = archives_in(out)
    return files


def verify(files):
    """Damage found in an archive, or the error that opening it raises."""
    try:
        return verify_archive(open_archive(files), 2, QUIET)
    except IntegrityError as exc:
        return [Damage(f"{exc.what} {exc.why}")]


def unpack(files, out, force=False):
    return unpack_archive(open_archive(files), out, UnpackOptions(force=force, jobs=2), QUIET)


def tree(folder):
    """path -> bytes of the files of a model."""
    return {p: (folder / p).read_bytes() for p, _ in content_files(folder)}


def seal(stream, path, frame_size=1000, cuts=None):
    """An archive with proper frames and tables around any tar stream: what an attacker could make."""
    compress = load_zstd().compressor(1)
    frames, units = [], []
    cuts = cuts or [*range(0, len(stream), frame_size), len(stream)]
    for start, stop in zip(cuts, cuts[1:]):
        content = stream[start:stop]
        units.append(encode_unit(content, compress))
        offset = sum(map(len, units[:-1]))
        frames.append(Frame(offset, len(units[-1]), start, len(content), zlib.crc32(units[-1])))
    data = b"".join(units)
    path.write_bytes(data + encode_tail(frames, [len(data)]))
    return ArchiveFiles(path.parent, path.name, {})


def tar_of(members):
    """A PAX tar of (TarInfo or name, bytes)."""
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return stream.getvalue()


@contextlib.contextmanager
def flipped(path, offset, mask=1):
    """The file with one byte changed, for a while."""
    with Path(path).open("r+b") as stream:
        stream.seek(offset)
        (old,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([old ^ mask]))
        stream.flush()
        yield
        stream.seek(offset)
        stream.write(bytes([old]))
