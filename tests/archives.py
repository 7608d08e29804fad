"""Models and archives for tests: small ones made in-process, and evil ones made by hand."""

import contextlib
import hashlib
import random
import tarfile
import zlib
from io import BytesIO, StringIO
from pathlib import Path

import hfship as h

QUIET = h.Reporter("none", -1, StringIO(), StringIO())


def noise(size, seed=0):
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def make_model(folder, files):
    """A model folder with its manifest. files: path -> bytes."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    entries = [h.FileEntry(p, len(c), hashlib.sha256(c).hexdigest()) for p, c in files.items()]
    manifest = h.make_manifest(folder.name, entries)
    h.write_manifest(folder, manifest)
    return manifest


SMALL = {"config.json": b'{"model_type": "tiny"}', "empty": b"", "sub/a.txt": b"hello " * 40, "sub/b.bin": noise(200)}
BIG = {**SMALL, "w1.safetensors": noise(5 << 20, 1), "w2.safetensors": bytes(2 << 20), "w3.safetensors": noise(1 << 20)}


def pack(model, out, **options):
    """Pack in-process; returns the archive's files."""
    plan = h.plan_pack(model, h.read_manifest(model), h.PackOptions(**{"jobs": 2, **options}))
    h.pack_model(plan, out, QUIET)
    return files_in(out)


def files_in(out):
    (files,) = h.archives_in(out)
    return files


def verify(files):
    """Damage found in an archive, or the error that opening it raises."""
    try:
        return h.verify_archive(h.open_archive(files), 2, QUIET)
    except h.IntegrityError as exc:
        return [h.Damage(f"{exc.what} {exc.why}")]


def unpack(files, out, force=False):
    return h.unpack_archive(h.open_archive(files), out, None, 2, force, QUIET)


def tree(folder):
    """path -> bytes of the files of a model."""
    return {p: (folder / p).read_bytes() for p, _ in h.content_files(folder)}


def seal(stream, path, frame_size=1000, cuts=None):
    """An archive with proper frames and tables around any tar stream: what an attacker could make."""
    compress = h.load_zstd().compressor(1)
    frames, units = [], []
    cuts = cuts or [*range(0, len(stream), frame_size), len(stream)]
    for start, stop in zip(cuts, cuts[1:]):
        content = stream[start:stop]
        units.append(h.encode_unit(content, compress))
        offset = sum(map(len, units[:-1]))
        frames.append(h.Frame(offset, len(units[-1]), start, len(content), zlib.crc32(units[-1])))
    data = b"".join(units)
    path.write_bytes(data + h.encode_tail(frames, [len(data)]))
    return h.ArchiveFiles(path.parent, path.name, {})


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
