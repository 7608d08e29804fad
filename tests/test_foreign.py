"""archives that come through a pipe, and archives of other programs. What is safe from files is safe from there."""

import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from hfship.archive.files import STDIN, ArchiveFiles
from hfship.archive.foreign import BOMB_RATIO, ZstdContent, gzip_content
from hfship.archive.frames import SKIPPABLE_HEADER, encode_tail, tail_size
from hfship.archive.layout import _ustar, padding, tar_header
from hfship.archive.opening import open_archive
from hfship.archive.pack_plan import PROFILES
from hfship.archive.pipe import open_stream
from hfship.archive.reader import ForeignArchive
from hfship.archive.signature import sign_manifest
from hfship.archive.unpack import UnpackOptions, unpack_archive
from hfship.archive.unpack_foreign import ForeignModel, unpack_foreign, verify_foreign
from hfship.archive.zstd import ZSTD_MAGIC, load_zstd
from hfship.base.errors import DiskError, IncompleteError, IntegrityError
from hfship.base.manifest import UNPROVEN, make_manifest
from support import archives as a
from support.make_model import make_model

PIPE = ArchiveFiles(Path(), STDIN, {})


@pytest.fixture
def packed(tmp_path):
    """A few KB in many frames: the model's folder, and the bytes of its archive."""
    a.make_model(tmp_path / "m", a.SMALL)
    return tmp_path / "m", a.pack(
        tmp_path / "m", tmp_path / "whole", frame_size=900
    ).path.read_bytes()


def unpack_stream(data, out):
    """hfship unpack -, in-process."""
    try:
        return unpack_archive(open_stream(PIPE, BytesIO(data)), out, UnpackOptions(jobs=2), a.QUIET)
    except ForeignArchive as found:
        return unpack_foreign(ForeignModel(PIPE, found.stream), out, UnpackOptions(name="m"))


# -- our own archives through a pipe


@pytest.mark.parametrize("profile", PROFILES)
def test_parts_are_verified_and_unpacked_from_a_pipe(profile, tmp_path, hfship):
    a.make_model(tmp_path / "m", a.BIG)
    files = a.pack(tmp_path / "m", tmp_path / "out", split=4_600_000, profile=profile)
    data = b"".join(
        path.read_bytes() for path in sorted(files.folder.glob("m.tar.zst.*"))
    )  # the sums, too
    assert data.endswith(b"  m.tar.zst.0002\n") == (len(files.paths) == 2)
    for command in (
        ["verify", "-"],
        ["unpack", "-", "-o", tmp_path / "un"],
        ["unpack", "-", "-o", tmp_path / "un"],
    ):
        process = hfship.start(*command, stdin=subprocess.PIPE, text=False)
        said = b"".join(process.communicate(data)).decode()
        assert process.returncode == 0, said
    assert "there already and are intact" in said and a.tree(tmp_path / "un/m") == a.BIG
    hfship("verify", tmp_path / "un/m")


def test_every_flipped_byte_of_a_stream_is_found(packed, tmp_path):
    model, data = packed
    for offset in range(len(data)):
        harmed = data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :]
        try:
            unpack_stream(harmed, tmp_path / "un")
        except (IntegrityError, IncompleteError):
            assert not (tmp_path / "un/m").exists(), offset
        else:  # without an early header it is what another program could have made, and the manifest in it proves it
            assert a.tree(tmp_path / "un/m") == a.SMALL
            shutil.rmtree(tmp_path / "un/m")
    unpack_stream(data, tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == a.SMALL


def test_every_cut_of_a_stream_is_incomplete_and_resumes(packed, tmp_path):
    model, data = packed
    for size in range(len(data)):
        with pytest.raises(IncompleteError):
            unpack_stream(data[:size], tmp_path / "un")
        assert not (tmp_path / "un/m").exists(), size
    with pytest.raises(IntegrityError):
        unpack_stream(data + b"\0", tmp_path / "un")
    done = unpack_stream(data, tmp_path / "un")
    assert (
        done.written == 0 and a.tree(tmp_path / "un/m") == a.SMALL
    )  # all were kept from the last cuts


def test_the_tables_of_a_stream_have_to_be_of_its_frames(packed, tmp_path):
    """They are whole, and tell of another frame, of one more, or of one less."""
    _, data = packed
    frames = list(open_archive(a.files_in(tmp_path / "whole")).frames)
    units = data[: -tail_size(len(frames), 1)]
    assert data == units + encode_tail(frames, [len(units)])
    other, last = frames[2]._replace(crc=frames[2].crc ^ 1), frames[-1]
    more = last._replace(offset=last.offset + last.size, start=last.stop)
    for told, why in (
        ([*frames[:2], other, *frames[3:]], "frame 3, "),
        ([*frames, more], "frames are missing"),
        (frames[:-1], f"frame {len(frames)}, "),
    ):
        size = sum(frame.size for frame in told)
        with pytest.raises(IntegrityError) as refused:
            unpack_stream(units + encode_tail(told, [size]), tmp_path / "un")
        assert why in refused.value.text(), refused.value.text()
        assert not (tmp_path / "un/m").exists()


@pytest.mark.parametrize("chunk", [7, 8, 9, 10, 16, 1 << 20])
def test_gzip_is_read_in_pieces_of_any_size(chunk, monkeypatch):
    """Also where a piece ends one byte before the member does, or between two of them."""
    monkeypatch.setattr("hfship.archive.foreign.CHUNK", chunk)
    for size in range(40):
        content = a.noise(size)
        for packed in (gzip.compress(content), gzip.compress(content) + gzip.compress(b"x" * 30)):
            found = b"".join(gzip_content(BytesIO(packed)))
            assert found == gzip.decompress(packed)
            with pytest.raises(EOFError):
                b"".join(gzip_content(BytesIO(packed[:-1])))


def test_damage_in_a_stream_is_located_and_the_rest_kept(tmp_path, hfship):
    a.make_model(tmp_path / "m", a.BIG)
    files = a.pack(tmp_path / "m", tmp_path / "out")
    frame = open_archive(files).frames[1]
    data = bytearray(files.path.read_bytes())
    data[frame.offset + 5000] ^= 4
    for command, code in ((["verify"], 6), (["unpack", "-o", tmp_path / "un"], 6)):
        process = hfship.start(*command, "-", stdin=subprocess.PIPE, text=False)
        said = process.communicate(bytes(data))[1].decode()
        assert process.returncode == code and "frame 2" in said and "hits w1.safetensors" in said, (
            said
        )
        assert "send it again" in said
    process = hfship.start(
        "unpack", "-", "-o", tmp_path / "un", "--json", stdin=subprocess.PIPE, text=False
    )
    (row,) = json.loads(process.communicate(files.path.read_bytes())[0])
    assert row["written"] == 1 and a.tree(tmp_path / "un/m") == a.BIG


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_unpack_of_a_pipe_goes_on(number, tmp_path, hfship):
    a.make_model(tmp_path / "m", {f"w{i:02}.bin": a.noise(1 << 20, i) for i in range(24)})
    data = a.pack(tmp_path / "m", tmp_path / "out").path.read_bytes()
    process = hfship.start(
        "unpack", "-", "-o", tmp_path / "un", "-j", "2", stdin=subprocess.PIPE, text=False
    )
    process.stdin.write(data[: len(data) * 2 // 3])
    process.stdin.flush()
    while not (tmp_path / "un/m~incomplete/w00.bin").exists():
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    process.stdin.close()
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    process = hfship.start(
        "unpack", "-", "-o", tmp_path / "un", "--json", stdin=subprocess.PIPE, text=False
    )
    (row,) = json.loads(process.communicate(data)[0])
    assert row["written"] < 24 and a.tree(tmp_path / "un/m") == a.tree(tmp_path / "m")


def test_a_delta_comes_through_a_pipe(tmp_path, hfship):
    a.make_model(tmp_path / "old/m", {"a": b"a" * 50, "w": a.noise(1 << 20)})
    a.make_model(tmp_path / "new/m", {"a": b"b" * 50, "w": a.noise(1 << 20)})
    hfship("pack", tmp_path / "new/m", "-o", tmp_path / "out", "--since", tmp_path / "old/m")
    with (tmp_path / "out/m.delta.tar.zst").open("rb") as stream:
        hfship("unpack", "-", "-o", tmp_path / "un", "--base", tmp_path / "old/m", stdin=stream)
    assert a.tree(tmp_path / "un/m") == a.tree(tmp_path / "new/m")


@pytest.mark.parametrize(
    "data, arguments, code, says",
    [
        (b"", [], 3, "nothing came through the pipe"),
        (b"\0" * 20000, [], 6, "it holds no files"),
        (a.noise(20000), [], 6, "standard input was not made by hfship"),
        (b"", ["--consume"], 2, "--consume is for files"),
        (b"", ["--key", "/nowhere.pem"], 2, "no public key"),
    ],
)
def test_what_a_pipe_cannot_bring_is_said(data, arguments, code, says, tmp_path, hfship):
    process = hfship.start(
        "unpack", "-", "-o", tmp_path / "un", *arguments, stdin=subprocess.PIPE, text=False
    )
    said = process.communicate(data)[1].decode()
    assert process.returncode == code and says in said and "next" in said, said
    assert not list((tmp_path / "un").glob("*")) if (tmp_path / "un").exists() else True


# -- archives of other programs

FILES = {
    **a.SMALL,
    "w.bin": a.noise(3 << 20, 1),
    "sub/" + "x" * 130 + "é.txt": b"long",
    "zeros.bin": bytes(9 << 20),
}

WRITERS = {
    "tar --zstd": "tar --zstd -cf {out} m",
    "zstd -T0": "tar -cf - m | zstd -T0 -q > {out}",
    "zstd --long": "tar -cf - m | zstd -q --long=27 -9 > {out}",
    "pzstd": "tar -cf - m | pzstd -q -p 3 > {out}",
    "no checksums": "tar -cf - m | zstd -q --no-check > {out}",
    "posix": "tar --format=posix --zstd -cf {out} m",
    "gnu": "tar --format=gnu --zstd -cf {out} ./m",
    "two frames": "(tar -cf - m | head -c 1M | zstd -q; tar -cf - m | tail -c +1048577 | zstd -q) > {out}",
    "flat": "tar --zstd -C m -cf {out} .",
    "flat without dot": "cd m && tar --zstd -cf {out} [c-z]*",
    "plain tar": "tar -cf {out} m",
    "gzip": "tar -czf {out} m",
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """foreign(writer) -> an archive of FILES that other programs made."""
    root = tmp_path_factory.mktemp("foreign")
    a.make_model(root / "m", FILES)
    shutil.rmtree(root / "m/.hfship")

    def write(writer):
        for tool in ("tar", "zstd", "pzstd"):
            if not shutil.which(tool):
                missing(tool)
        out = root / writer.replace(" ", "-") / "m.tar.zst"
        out.parent.mkdir(exist_ok=True)
        subprocess.run(["bash", "-c", WRITERS[writer].format(out=out)], check=True, cwd=root)
        return out

    return write


def unpack_file(path, out, name=""):
    """hfship unpack PATH of another program's archive, in-process."""
    files = ArchiveFiles(path.parent, path.name, {})
    with pytest.raises(ForeignArchive) as found:
        open_archive(files)
    return unpack_foreign(ForeignModel(files, found.value.stream), out, UnpackOptions(name=name))


@pytest.mark.parametrize("writer", WRITERS)
def test_archives_of_other_programs_are_unpacked(writer, foreign, tmp_path):
    done = unpack_file(foreign(writer), tmp_path / "un")
    assert (
        done.manifest.unproven and done.folder == tmp_path / "un/m" and a.tree(done.folder) == FILES
    )
    unpack_stream(foreign(writer).read_bytes(), tmp_path / "piped")
    assert a.tree(tmp_path / "piped/m") == FILES
    said = verify_foreign(ForeignModel(PIPE, BytesIO(foreign(writer).read_bytes())))
    assert ("frames have no checksum" in said) == (writer == "no checksums") and UNPROVEN in said


def test_what_another_program_packed_is_marked_unproven(foreign, tmp_path, hfship):
    path = foreign("pzstd")
    said = hfship("verify", path).stdout
    assert "unproven: no sums came with it" in said and "not made by hfship" in said
    (row,) = json.loads(hfship("unpack", path, "-o", tmp_path / "un", "--json").stdout)
    assert row["unproven"] and a.tree(tmp_path / "un/m") == FILES
    assert "unproven" in hfship("verify", tmp_path / "un/m").stdout
    assert "is there already" in hfship("unpack", path, "-o", tmp_path / "un", code=2).stderr
    with path.open("rb") as stream:
        hfship("unpack", "-", "--name", "n", "-o", tmp_path / "un", stdin=stream)
    assert a.tree(tmp_path / "un/n") == FILES


@pytest.mark.parametrize("backend", ["installed", "system"])
def test_every_cut_and_flip_of_another_programs_archive_is_found(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("HFSHIP_ZSTD", backend)
    load_zstd()
    stream = a.tar_of([("m/a", b"a" * 700), ("m/b", a.noise(900))])
    half = len(stream) // 2
    frames = [load_zstd().compressor(3)(part) for part in (stream[:half], stream[half:])]
    skippable = SKIPPABLE_HEADER.pack(0x184D2A53, 5) + b"dummy"
    data = skippable + frames[0] + skippable + frames[1]
    for size in range(len(data)):
        with pytest.raises((IncompleteError, IntegrityError)):
            unpack_stream(data[:size], tmp_path / "un")
    harmless = {
        *range(len(skippable)),
        *range(len(skippable + frames[0]), len(skippable + frames[0] + skippable)),
    }
    for offset in sorted(set(range(len(data))) - harmless):
        harmed = data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :]
        try:
            unpack_stream(harmed, tmp_path / "un")
        except (IncompleteError, IntegrityError):
            assert not (tmp_path / "un/m").exists()
        else:  # some bits of a frame mean nothing: then the content is the same
            assert a.tree(tmp_path / "un/m") == {"a": b"a" * 700, "b": a.noise(900)}
            shutil.rmtree(tmp_path / "un/m")


def test_the_mark_travels_and_serve_tells_it(tmp_path, hfship):
    make_model(tmp_path / "other")
    subprocess.run(["tar", "--zstd", "-cf", "other.tar.zst", "other"], check=True, cwd=tmp_path)
    hfship("unpack", tmp_path / "other.tar.zst", "-o", tmp_path / "un")
    hfship("pack", tmp_path / "un/other", "-o", tmp_path / "again")
    assert "unproven" in hfship("verify", tmp_path / "again/other.tar.zst").stdout
    hfship("unpack", tmp_path / "again/other.tar.zst", "-o", tmp_path / "site")
    assert "unproven" in hfship("verify", tmp_path / "site/other").stdout
    said = hfship("serve", tmp_path / "site/other", "--plan", "--assume-gpus", "1x24GB", code=None)
    assert "unproven: no sums came with it" in said.stderr


@pytest.mark.parametrize("harm", [None, "content", "missing", "extra"])
def test_a_manifest_inside_proves_what_plain_tar_packed(harm, tmp_path, hfship):
    a.make_model(tmp_path / "m", FILES)
    if harm == "content":
        (tmp_path / "m/w.bin").write_bytes(a.noise(3 << 20, 2))
    elif harm == "missing":
        (tmp_path / "m/config.json").unlink()
    elif harm == "extra":
        (tmp_path / "m/more.txt").write_text("more")
    subprocess.run(["tar", "--zstd", "-cf", "x.tar.zst", "m"], check=True, cwd=tmp_path)
    code = 6 if harm else 0
    said = hfship("verify", tmp_path / "x.tar.zst", code=code)
    assert "unproven" not in said.stdout
    hfship("unpack", tmp_path / "x.tar.zst", "-o", tmp_path / "un", code=code)
    assert (tmp_path / "un/m").exists() == (not harm)
    if not harm:
        assert (tmp_path / "un/m/.hfship/manifest.json").read_bytes() == (
            tmp_path / "m/.hfship/manifest.json"
        ).read_bytes()


def test_sums_beside_another_programs_archive_are_proven(foreign, tmp_path, hfship):
    shutil.copy(foreign("tar --zstd"), tmp_path / "m.tar.zst")
    sums = subprocess.run(
        ["sha256sum", "m.tar.zst"], check=True, cwd=tmp_path, capture_output=True
    ).stdout
    (tmp_path / "m.tar.zst.sha256").write_bytes(sums)
    assert "as m.tar.zst.sha256 says" in hfship("verify", tmp_path / "m.tar.zst").stdout
    (tmp_path / "m.tar.zst.sha256").write_text("0" * 64 + "  m.tar.zst\n")
    for command in (["verify"], ["unpack", "-o", tmp_path / "un"]):
        assert "other than" in hfship(*command, tmp_path / "m.tar.zst", code=6).stderr
    assert not (tmp_path / "un").exists()


def test_a_key_keeps_out_what_no_signature_can_prove(foreign, tmp_path, hfship):
    shutil.copy(foreign("tar --zstd"), tmp_path / "m.tar.zst")
    for argv in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "k"],
        ["pkey", "-in", "k", "-pubout", "-out", "p"],
    ):
        subprocess.run(["openssl", *argv], check=True, cwd=tmp_path)
    for text in (None, sign_manifest(make_manifest("m", []), tmp_path / "k")):
        if text:
            (tmp_path / "m.tar.zst.sig").write_text(text)
        for command in (["verify"], ["unpack", "-o", tmp_path / "un"]):
            said = hfship(
                *command, tmp_path / "m.tar.zst", env={"HFSHIP_KEY": str(tmp_path / "p")}, code=6
            ).stderr
            assert "only for archives of hfship" in said or "m.tar.zst.sig is missing" in said
    assert not (tmp_path / "un").exists()


def test_a_link_in_the_place_of_the_model_is_neither_followed_nor_replaced(
    foreign, tmp_path, hfship
):
    (tmp_path / "un").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "un/m").symlink_to(tmp_path / "elsewhere")
    hfship("unpack", foreign("pzstd"), "-o", tmp_path / "un", "--force", code=2)
    assert (tmp_path / "un/m").is_symlink() and not list((tmp_path / "elsewhere").iterdir())


def test_only_what_is_asked_for_is_restored(foreign, tmp_path, hfship):
    hfship("unpack", foreign("pzstd"), "-o", tmp_path / "un", "--only", "*.json")
    assert list(a.tree(tmp_path / "un/m")) == ["config.json"]


def test_split_parts_of_other_programs_are_one_archive(foreign, tmp_path, hfship):
    subprocess.run(
        ["split", "-b", "900000", "-d", "-a", "4", foreign("pzstd"), tmp_path / "m.tar.zst."],
        check=True,
    )
    assert len(list(tmp_path.glob("m.tar.zst.*"))) >= 4
    hfship("unpack", tmp_path / "m.tar.zst.0000", "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == FILES
    (tmp_path / "m.tar.zst.0002").unlink()
    hfship("unpack", tmp_path / "m.tar.zst.0000", "-o", tmp_path / "un2", code=6)


# -- attacks: nothing of these may appear on the disk under a final name, nor anywhere outside


def member(name, kind=tarfile.REGTYPE, content=b"", link="", **pax):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, link, len(content), pax
    return info, content


def raw(name, size, kind=b"0"):
    """A header block with a size field as given."""
    block = bytearray(_ustar(name, 0, kind))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def gnu(members):
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, BytesIO(content))
    return stream.getvalue()


GOOD = member("m/good", content=b"good")
ATTACKS = {
    "dotdot": (a.tar_of([GOOD, member("m/../../evil", content=b"x")]), "unsafe path"),
    "dotdot first": (a.tar_of([member("../evil", content=b"x")]), "unsafe path"),
    "dotdot folder": (a.tar_of([GOOD, member("m/../../evil", tarfile.DIRTYPE)]), "unsafe path"),
    "absolute": (a.tar_of([member("/tmp/hfship-evil", content=b"x")]), "unsafe path"),
    "absolute later": (a.tar_of([GOOD, member("/tmp/hfship-evil", content=b"x")]), "unsafe path"),
    "dotdot in PAX": (a.tar_of([GOOD, member("m/x", content=b"x", path="m/../../evil")]), "unsafe path"),
    "backslash": (a.tar_of([GOOD, member("m/..\\evil", content=b"x")]), "unsafe path"),
    "drive": (a.tar_of([member("C:/evil", content=b"x")]), "unsafe path"),
    "work folder": (a.tar_of([GOOD, member("m/.HFSHIP/lock", content=b"x")]), "never part of a model"),
    "symlink": (a.tar_of([GOOD, member("m/x", tarfile.SYMTYPE, link="/etc")]), "'m/x' is a symbolic link"),
    "symlink then through it": (
        a.tar_of([member("m/x", tarfile.SYMTYPE, link="/tmp"), member("m/x/hfship-evil", content=b"x")]),
        "is a symbolic link",
    ),
    "hard link": (a.tar_of([GOOD, member("m/x", tarfile.LNKTYPE, link="/etc/passwd")]), "is a hard link"),
    "device": (a.tar_of([GOOD, member("m/x", tarfile.CHRTYPE)]), "is a device"),
    "block device": (a.tar_of([GOOD, member("m/x", tarfile.BLKTYPE)]), "is a device"),
    "pipe": (a.tar_of([GOOD, member("m/x", tarfile.FIFOTYPE)]), "is a named pipe"),
    "unknown kind": (a.tar_of([GOOD, member("m/x", b"V")]), "of an unknown kind"),
    "duplicate": (a.tar_of([GOOD, GOOD]), "has good twice"),
    "file then folder": (a.tar_of([GOOD, member("m/good/x", content=b"x")]), "has good/x twice"),
    "folder then file": (a.tar_of([member("m/x/y", content=b"x"), member("m/x", content=b"x")]), "has x twice"),
    "old sparse": (gnu([member("m/x", tarfile.GNUTYPE_SPARSE)]), "is a sparse file"),
    "PAX sparse": (a.tar_of([member("m/x", content=b"x", **{"GNU.sparse.size": "9" * 12})]), "is a sparse file"),
    "two models": (a.tar_of([GOOD, member("n/x", content=b"x")]), "lies beside"),
    "not UTF-8": (raw(b"m/\xff\xfe", b"00000000000\0") + bytes(1024), "not UTF-8"),
    "not UTF-8 in GNU": (raw(b"././@LongLink", b"00000000003\0", b"L") + b"m/\xff".ljust(512, b"\0"), "not UTF-8"),
    "control characters": (a.tar_of([member("m/a\x1b[2Jb", content=b"x")]), "unsafe path"),
    "name too long": (a.tar_of([member("m/" + "x" * 300, content=b"x")]), "cannot be stored"),
    "base256 of an exabyte": (raw(b"m/x", b"\x80" + bytes(4) + b"\x10" + bytes(6)) + bytes(512), "needed"),
    "negative base256": (raw(b"m/x", b"\xff" * 12) + bytes(512), "no file can have"),
    "PAX size of an exabyte": (a.tar_of([member("m/x", content=b"x", size="1" + "0" * 18)]), "needed"),
    "negative PAX size": (a.tar_of([member("m/x", content=b"x", size="-512")]), "no file can have"),
    "huge PAX header": (raw(b"x", b"77777777777\0", b"x") + bytes(9999), "header has"),
    "broken PAX header": (raw(b"x", b"00000000010\0", b"x") + b"9 path=\n".ljust(512, b"\0"), "PAX"),
    "wrong checksum": (raw(b"m/x", b"00000000000\0").replace(b"m/x", b"m/y") + bytes(1024), "header is damaged"),
    "data behind the end": (a.tar_of([GOOD]) + b"more", "something follows the end"),
    "cache of the Hub's client": (
        a.tar_of([member("models--org--n/snapshots/c/w", tarfile.SYMTYPE, link="../../blobs/1")]),
        "symbolic link",
    ),
    "the same in its folder": (a.tar_of([member("hub/models--org--n/blobs/1", content=b"x")]), "huggingface_hub's cache"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_by_tar_write_nothing(attack, tmp_path):
    stream, says = ATTACKS[attack]
    path = tmp_path / "deep" / "x.tar.zst"
    path.parent.mkdir()
    path.write_bytes(load_zstd().compressor(1)(stream))
    with pytest.raises((IntegrityError, DiskError)) as refusal:
        unpack_file(path, tmp_path / "deep" / "un")
    assert says in refusal.value.text(), refusal.value.text()
    left = [p for p in tmp_path.rglob("*") if p != path]
    assert not [p for p in left if p.is_symlink() or p.name in ("evil", "hfship-evil")]
    assert [p.name for p in (tmp_path / "deep" / "un").glob("*")] in ([], ["m~incomplete"])
    assert not os.path.lexists("/tmp/hfship-evil") and not os.path.lexists("/tmp/evil")


@pytest.mark.parametrize("attack", ["dotdot first", "symlink", "duplicate"])
def test_an_attack_ends_with_exit_code_6_and_a_next_step(attack, tmp_path, hfship):
    path = tmp_path / "x.tar.zst"
    path.write_bytes(load_zstd().compressor(1)(ATTACKS[attack][0]))
    for command in (["verify"], ["unpack", "-o", tmp_path / "un"]):
        said = hfship(*command, path, code=6).stderr
        assert ATTACKS[attack][1] in said and "  next  " in said
    assert not (tmp_path / "un/m").exists()


def test_names_that_differ_in_case_only_are_two_files_or_refused(tmp_path, monkeypatch, hfship):
    path = tmp_path / "m.tar.zst"
    path.write_bytes(load_zstd().compressor(1)(a.tar_of([("m/A", b"1"), ("m/a", b"2")])))
    hfship("unpack", path, "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == {"A": b"1", "a": b"2"}


def test_a_bomb_is_refused_before_it_fills_memory_or_disk(tmp_path, monkeypatch, hfship):
    compress = load_zstd().compressor(1)
    zeros = compress(bytes(64 << 20))
    path = tmp_path / "m.tar.zst"
    path.write_bytes(compress(tar_header("m/w.bin", 20 << 30)) + zeros * 320)  # 20 GB in 700 KB
    assert "grows more than 100 times" in hfship("verify", path, code=6).stderr
    monkeypatch.setattr("hfship.archive.foreign.BOMB_ALLOWANCE", 9 << 20)
    with pytest.raises(IntegrityError) as refusal:
        unpack_file(path, tmp_path / "un")
    assert "a bomb" in refusal.value.why
    assert (
        sum(p.stat().st_blocks for p in (tmp_path / "un").rglob("*") if p.is_file()) * 512
        < 80 << 20
    )


@pytest.mark.parametrize("beyond", [False, True])
def test_content_may_grow_to_its_bound_and_not_a_byte_beyond(beyond, monkeypatch):
    size = 3 << 20
    frame = load_zstd().compressor(1)(bytes(size))
    bound = BOMB_RATIO * (len(frame) - len(ZSTD_MAGIC))
    monkeypatch.setattr("hfship.archive.foreign.BOMB_ALLOWANCE", size - bound - beyond)
    content = ZstdContent(BytesIO(frame))
    if beyond:
        with pytest.raises(ValueError, match="a bomb"):
            list(content)
    else:
        assert sum(map(len, content)) == size


def test_a_window_larger_than_memory_allows_is_refused(tmp_path):
    frame = (
        b"\x28\xb5\x2f\xfd" + bytes([0b00000000, 31 - 10 << 3]) + b"\x01\x00\x00"
    )  # a window of 2 GiB
    with pytest.raises(IntegrityError, match="cannot be unpacked"):
        unpack_stream(frame, tmp_path / "un")


def test_a_pipe_that_is_cut_is_told_from_a_damaged_file(foreign, tmp_path, hfship):
    data = foreign("pzstd").read_bytes()[:-2000]
    (tmp_path / "m.tar.zst").write_bytes(data)
    hfship("unpack", tmp_path / "m.tar.zst", "-o", tmp_path / "un", code=6)
    process = hfship.start("unpack", "-", "-o", tmp_path / "un", stdin=subprocess.PIPE, text=False)
    assert "ends too early" in process.communicate(data)[1].decode() and process.returncode == 3
    assert not (tmp_path / "un/m").exists()


def test_other_compressions_are_refused_with_a_word(tmp_path, hfship):
    path = tmp_path / "m.tar.xz"
    path.write_bytes(lzma.compress(a.tar_of([GOOD])))
    assert "cannot be unpacked" in hfship("unpack", path, "-o", tmp_path / "un", code=6).stderr
    path.write_bytes(gzip.compress(a.tar_of([GOOD]))[:-3])
    hfship("unpack", path, "-o", tmp_path / "un", code=6)


@given(st.binary(max_size=700), st.integers(0, 3), st.booleans())
def test_no_bytes_crash_the_parsers(junk, blocks, framed):
    """Junk as a tar stream, behind a good member, in a PAX header, and as zstd: refused, or read to its end."""
    tar = a.tar_of([GOOD])[: 512 * blocks] + junk.ljust(1024, b"\0")
    pax = raw(b"x", b"%011o\0" % len(junk), b"x") + junk + padding(len(junk)) + bytes(1024)
    for stream in (
        junk,
        tar,
        pax,
        ZSTD_MAGIC + junk,
        load_zstd().compressor(1)(tar) if framed else pax,
    ):
        foreign = ForeignModel(ArchiveFiles(Path(), "x.tar.zst", {}), BytesIO(stream))
        try:
            assert (
                sum(len(piece) for _ in foreign.files() for piece in foreign.content())
                <= len(stream) + 1024
            )
        except IntegrityError:
            pass
