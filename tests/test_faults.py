"""Archives under fire: every byte flipped, every cut, hostile frames."""

import shutil
import struct
import zlib

import pytest

from hfship.archive.frames import PZSTD_HEADER, PZSTD_MAGIC, Frame, encode_tail
from hfship.archive.opening import open_archive
from hfship.archive.unpack import UnpackOptions, unpack_archive
from hfship.archive.verify import verify_archive
from hfship.base.errors import IntegrityError, NotFoundError
from hfship.base.manifest import read_manifest
from support import archives as a


def form_of(kind, tmp_path):
    """A small archive with planes, or a delta, or both: its files, and the folder a delta is based on."""
    base = {"old": b"old " * 200}
    a.make_model(tmp_path / "base" / "m", base)
    files = {**base, "config.json": b'{"a": 1}', "w": bytes(1 << 20)}
    a.make_model(tmp_path / "m", files)
    since = read_manifest(tmp_path / "base" / "m") if "delta" in kind else None
    profile = "smallest" if "planes" in kind else "standard"
    return (
        a.pack(tmp_path / "m", tmp_path / "out", profile=profile, since=since),
        tmp_path / "base" / "m",
        files,
    )


def unpack(files, out, base):
    options = UnpackOptions(base=base, jobs=2)
    return unpack_archive(open_archive(files), out, options, a.QUIET)


@pytest.mark.parametrize("kind", ["planes", "delta", "planes and delta"])
def test_every_flipped_byte_of_every_form_is_found(kind, tmp_path):
    files, base, content = form_of(kind, tmp_path)
    for offset in range(files.path.stat().st_size):
        with a.flipped(files.path, offset, 1 << offset % 8):
            damages = a.verify(files)
            assert [
                d
                for d in damages
                if d.offset is not None and d.offset <= offset < d.offset + d.size
            ], offset
            assert verify_archive(open_archive(files), 1, a.QUIET, quick=True)
            if offset % 5 == 0:
                with pytest.raises((IntegrityError, NotFoundError)):
                    unpack(files, tmp_path / "un", base)
                assert not (tmp_path / "un/m").exists()
                shutil.rmtree(tmp_path / "un", ignore_errors=True)
    unpack(files, tmp_path / "un", base)
    assert a.tree(tmp_path / "un/m") == content


@pytest.mark.parametrize("kind", ["planes", "delta"])
def test_every_cut_of_every_form_is_found(kind, tmp_path):
    files, base, _ = form_of(kind, tmp_path)
    whole = files.path.read_bytes()
    for size in range(len(whole)):
        files.path.write_bytes(whole[:size])
        assert a.verify(files), size
        if size % 7 == 0:
            with pytest.raises((IntegrityError, NotFoundError)):
                unpack(files, tmp_path / "un", base)


def bomb(content_size, declared):
    """A frame that holds more than it declares: one block of zeros, over and over."""
    blocks = b"".join(
        (1 << 3 * 0 | 1 << 1 | min(128 << 10, 1 << 17) << 3).to_bytes(3, "little") + b"\0"
        for _ in range(content_size >> 17)
    )
    last = (1 | 1 << 1 | 0 << 3).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd" + bytes([0b10100000]) + struct.pack("<I", declared) + blocks + last


@pytest.mark.parametrize("declared", [100, 1 << 20, 64 << 20, (64 << 20) + 1, 0xFFFFFFFF])
def test_frames_that_grow_or_claim_too_much_are_refused(declared, tmp_path):
    frame = bomb(1 << 30, declared)
    unit = PZSTD_HEADER.pack(PZSTD_MAGIC, 4, len(frame)) + frame
    path = tmp_path / "m.tar.zst"
    path.write_bytes(
        unit
        + encode_tail(
            [Frame(0, len(unit), 0, min(declared, 64 << 20), zlib.crc32(unit))], [len(unit)]
        )
    )
    assert a.verify(a.files_in(tmp_path))
    path.write_bytes(unit)
    assert a.verify(a.files_in(tmp_path))
