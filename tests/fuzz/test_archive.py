"""Archives, tars and manifests as an attacker makes them: never a hang, never much memory, never a traceback, and never
a file outside, or one that the manifest does not list."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import Program
from fuzz.conftest import fuzzed
from hfship.archive.files import SUM_LINE, ArchiveFiles, find_archives
from hfship.archive.frames import (
    TABLE_END,
    TABLE_ENTRY,
    TABLE_FOOTER,
    unit_header,
)
from hfship.archive.layout import _pax_record, _ustar, padding, tar_header
from hfship.archive.opening import open_archive
from hfship.archive.reader import ForeignArchive
from hfship.archive.unpack import UnpackOptions, unpack_archive
from hfship.archive.unpack_foreign import ForeignModel, unpack_foreign
from hfship.archive.verify import verify_archive
from hfship.archive.zstd import load_zstd
from hfship.base.errors import HfshipError, IntegrityError
from hfship.base.manifest import parse_manifest
from support import archives as a

END = bytes(1024)
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


# -- pieces of archives


def entry(path: str = "a", size: Any = 0, sha256: str = EMPTY) -> Dict[str, Any]:
    return {"path": path, "size": size, "sha256": sha256}


def manifest(*files: Dict[str, Any], **fields: Any) -> bytes:
    value = {"format": "hfship-manifest/1", "name": "m", "source": None, "files": list(files)}
    return json.dumps({**value, **fields}).encode()


def member(path: str, content: bytes) -> bytes:
    return tar_header(path, len(content)) + content + padding(len(content))


def block(size: bytes, kind: bytes = b"0", name: bytes = b"m/a") -> bytes:
    """A tar header with the bytes of a size as they are given."""
    header = bytearray(_ustar(name, 0, kind))
    header[124 : 124 + len(size)] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(*records: Tuple[str, str], kind: bytes = b"x") -> bytes:
    text = b"".join(_pax_record(key, value) for key, value in records)
    return _ustar(b"././@PaxHeader", len(text), kind) + text + padding(len(text))


def packed(*members: Tuple[str, bytes]) -> bytes:
    return b"".join(member(path, content) for path, content in members) + END


def of_manifest(text: bytes) -> bytes:
    return packed(("m/.hfship/manifest.json", text))


def of_delta(text: bytes) -> bytes:
    return packed(("m/.hfship/manifest.json", manifest(entry())), ("m/.hfship/delta.json", text))


def compressed(content: bytes) -> bytes:
    return load_zstd().compressor(1)(content)


def rle_frame(size: int) -> bytes:
    """A frame of zeros, in blocks of 4 bytes for 128 KiB each."""
    frame = bytearray(b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little"))
    for left in range(size, 0, -(128 << 10)):
        length = min(left, 128 << 10)
        frame += (length << 3 | 2 | (left == length)).to_bytes(3, "little") + b"\0"
    return bytes(frame)


def in_unit(frame: bytes, claimed: int = 0) -> bytes:
    return unit_header(claimed or len(frame)) + frame


# -- read them all


def read_all(files: ArchiveFiles, out: Path) -> None:
    """Verify and unpack what may be an archive of ours or of another program. Raises HfshipError."""
    for _ in range(2):
        try:
            archive = open_archive(files)
        except ForeignArchive as exc:
            unpack_foreign(ForeignModel(files, exc.stream), out, UnpackOptions(jobs=1, force=True))
            return
        verify_archive(archive, 1, a.QUIET)
        unpack_archive(archive, out, UnpackOptions(jobs=1, force=True), a.QUIET)


def survives(path: Path, folder: Path) -> None:
    """What is refused is refused with an error of ours, and nothing is written but below m and its like."""
    out = folder / "out"
    before = {one for one in folder.iterdir() if one.name != "out"}
    try:
        read_all(ArchiveFiles(path.parent, path.name, {}), out)
    except HfshipError as exc:
        assert exc.text()
    assert {one for one in folder.iterdir() if one.name != "out"} == before
    assert not [one for one in out.rglob("*") if one.is_symlink()]
    shutil.rmtree(out, ignore_errors=True)


# -- a table: what was found, and its neighbours

MANIFESTS = {
    "100,000 folders": lambda: manifest(entry("/".join("a" * 100_000))),
    "20 of 100,000 folders": lambda: manifest(
        *(entry("/".join([str(n), *"a" * 100_000])) for n in range(20))
    ),
    "a path of 5,000 bytes": lambda: manifest(entry("/".join(["a" * 100] * 50))),
    "size 10^400": lambda: manifest(entry(size=10**400)),
    "size 2^63": lambda: manifest(entry(size=2**63)),
    "size -1": lambda: manifest(entry(size=-1)),
    "size 1e400": lambda: manifest(entry()).replace(b'"size": 0', b'"size": 1e400'),
    "size of a million digits": lambda: manifest(entry()).replace(
        b'"size": 0', b'"size": ' + b"9" * 10**6
    ),
    "left_out 10^400": lambda: manifest(entry(), left_out=10**400),
    "nested": lambda: b"[" * 300_000,
    "nested inside": lambda: manifest(x=0).replace(
        b'"x": 0', b'"x": ' + b"[" * 10**5 + b"]" * 10**5
    ),
    "many objects": lambda: b"[" + b"{}," * (20 << 20) + b"0]",
    "UTF-16": lambda: manifest(entry()).decode().encode("utf-16"),
}
DELTAS = {
    "nested": lambda: b"[" * 200_000,
    "nested inside": lambda: (
        b'{"format": "hfship-delta/1", "absent": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    ),
    "many": lambda: b'{"absent": [' + b"{}," * (15 << 20) + b"0]}",
    "10^400": lambda: b'{"format": "hfship-delta/1", "absent": [1' + b"0" * 400 + b"]}",
    "digits": lambda: b'{"absent": [' + b"9" * (4 << 20) + b"]}",
    "null": lambda: b"null",
}
SIZES = (
    b"-0000001000",
    b"-7777777777",
    b"+0000000005",
    b"0_00000_005",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"",
    b"zzz",
    b"77777777777",
)
TARS = {
    "a million records": lambda: pax(*((f"k{n}", "") for n in range(70_000))),
    "many headers": lambda: b"".join(
        pax(*((f"{m}-{n}", "") for n in range(900))) for m in range(2000)
    ),
    "endless headers": lambda: pax(("a", "b")) * 200_000,
    "global headers": lambda: pax(("a", "b"), kind=b"g") * 200_000,
    "size of digits": lambda: pax(("size", "9" * 10**6)),
    "size 10^400": lambda: pax(("size", "1" + "0" * 400)),
    "size 10^22": lambda: pax(("size", "1" + "0" * 22)),
    "size -5": lambda: pax(("size", "-5")),
    "size 1_0": lambda: pax(("size", "1_0")),
    "500,000 folders": lambda: pax(("path", "m/" + "a/" * 500_000 + "b")),
    "a long name": lambda: pax(("path", "m/" + "a" * 10**6)),
    "a long GNU name": lambda: _ustar(b"././@LongLink", 1 << 20, b"L") + b"a/" * (1 << 19),
    "many deep paths": lambda: b"".join(
        member(f"m/{n}/" + "a/" * 90 + "b", b"") for n in range(20)
    ),
}
FILES: Dict[str, Callable[[], bytes]] = {
    "a frame of 64 MiB": lambda: in_unit(rle_frame(64 << 20)),
    "many of these": lambda: in_unit(rle_frame(64 << 20)) * 50,
    "a unit that claims 4 GB": lambda: in_unit(rle_frame(1 << 20), 2**32 - 1),
    "a frame that claims 4 GB": lambda: b"\x28\xb5\x2f\xfd\xa0" + b"\xff" * 4 + rle_frame(1 << 20)[9:],
    "a window of 2 GB": lambda: b"\x28\xb5\x2f\xfd\x00\xa8" + rle_frame(1 << 20)[9:],
    "a skippable frame of 4 GB": lambda: b"\x50\x2a\x4d\x18" + b"\xff" * 4,
    "tables of 38 GB": lambda: bytes(200) + TABLE_ENTRY.pack(2**32 - 1, 0) + TABLE_FOOTER.pack(2**32 - 1, 0, TABLE_END),
    "zeros behind a gzip": lambda: gzip.compress(member("m/a", b"x") + END) + bytes(100 << 20),
    "an endless gzip name": lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * (8 << 20),
    "a gzip bomb": lambda: gzip.compress(member("m/a", b"x") + bytes(400 << 20)),
}  # fmt: skip


def cases() -> Dict[str, Callable[[], bytes]]:
    """What is in the file, by name."""
    found: Dict[str, Callable[[], bytes]] = dict(FILES)
    for name, text in MANIFESTS.items():
        found[f"manifest: {name}"] = lambda text=text: compressed(of_manifest(text()))
    for name, text in DELTAS.items():
        found[f"delta: {name}"] = lambda text=text: compressed(of_delta(text()))
    for name, headers in TARS.items():
        found[f"tar: {name}"] = lambda headers=headers: compressed(
            headers() + member("m/a", b"x") + END
        )
    for size in SIZES:
        for kind in (b"0", b"x", b"g", b"L", b"5"):
            stream = block(size, kind) + bytes(2048)
            found[f"tar size {size!r} of {kind!r}"] = lambda stream=stream: compressed(stream)
    return found


ALL = cases()


@pytest.mark.parametrize(
    "form, name",
    [
        *(("foreign", name) for name in ALL),
        *(("sealed", name) for name in ALL if name not in FILES),  # these are no tar streams
    ],
)
@pytest.mark.timeout(60)
def test_an_archive_that_is_made_to_harm_is_refused_in_time_and_memory(
    form: str, name: str, tmp_path: Path
) -> None:
    content = ALL[name]()
    path = tmp_path / "m.tar.zst"
    path.write_bytes(content)
    if form == "sealed":  # with frames and tables of ours
        stream = load_zstd().piecewise()(content)
        a.seal(stream, path, frame_size=1 << 20)
    with memory_of_1_gib():
        survives(path, tmp_path)


class memory_of_1_gib:
    """Within, no more than 1 GiB of address space beyond what is in use."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
@pytest.mark.parametrize(
    "name", ["m.tar.zst", "m.tar.zst.0001", "m.tar.zst.0002", "m.tar.zst.sha256"]
)
def test_what_is_no_file_is_not_waited_for(
    kind: str, name: str, tmp_path: Path, pyz: Program
) -> None:
    medium = tmp_path / "medium"
    a.make_model(tmp_path / "m", a.SMALL)
    a.pack(tmp_path / "m", medium)
    if name.endswith("2"):
        (medium / "m.tar.zst").rename(medium / "m.tar.zst.0001")
    elif not name.endswith("sha256"):
        (medium / "m.tar.zst").unlink()
    if name.endswith("sha256"):
        (medium / name).unlink()
    a.no_file(medium / name, kind)
    for command in (["verify", medium], ["unpack", medium / "m.tar.zst", "-o", tmp_path / "out"]):
        done = pyz(*command, code=None, timeout=60)
        assert done.returncode in (0, 2, 5, 6, 7), done.stderr


@pytest.mark.parametrize("number", ["0002", "99999999", "999999999", "9999999999999", "9" * 200])
def test_parts_of_any_number_are_looked_for_no_longer_than_needed(
    number: str, tmp_path: Path, pyz: Program
) -> None:
    (tmp_path / "m.tar.zst.0001").write_bytes(b"x" * 100)
    (tmp_path / f"m.tar.zst.{number}").write_bytes(b"x" * 100)
    done = pyz("verify", tmp_path, code=None, timeout=60)
    assert done.returncode == 6 and len(done.stderr) < 3000, done.stderr


def test_lines_of_sums_are_found_in_time() -> None:
    line = ("0" * 64 + "  ") * 50_000
    assert not SUM_LINE.findall(line + "/\n")


# -- generators


@given(
    JSON
    | st.fixed_dictionaries(
        {"format": st.just("hfship-manifest/1"), "name": JSON, "files": JSON},
        optional={"source": JSON, "unproven": JSON, "left_out": JSON},
    )
)
@fuzzed(examples=200)
def test_manifest_of_any_shape_is_read_or_refused(value: object) -> None:
    try:
        parse_manifest(json.dumps(value), "it")
    except IntegrityError:
        pass


NAMES = st.sampled_from(
    [
        "m/a",
        "m/b/c",
        "m",
        "m/",
        "../x",
        "/x",
        "m/../x",
        "m/a/b",
        "n/a",
        "m/.git/config",
        "m/.hfship/lock",
        "m/é",
        "m/" + "x" * 150,
        "m/.hfship/manifest.json",
    ]
)
KINDS = st.sampled_from(
    [b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V"]
)
FIELDS = st.sampled_from(SIZES) | st.integers(0, 5000).map(lambda size: b"%011o\0" % size)
RECORDS = st.lists(
    st.tuples(
        st.sampled_from(["path", "size", "GNU.sparse.size", "mtime", "a=b", ""]),
        NAMES | st.integers(-5, 10**30).map(str) | st.text(max_size=5),
    ),
    max_size=4,
)


@st.composite
def tars(draw: Callable[..., Any]) -> bytes:
    """Tar streams of members as no program writes them."""
    stream = b""
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            stream += pax(*draw(RECORDS), kind=draw(st.sampled_from([b"x", b"g"])))
        content = draw(st.binary(max_size=600))
        name = draw(NAMES)
        if draw(st.booleans()):
            stream += member(name, content)
        else:
            stream += block(draw(FIELDS), draw(KINDS), name.encode()[:100]) + content
            stream += padding(len(content)) * draw(st.integers(0, 1))
    return stream + END[: draw(st.sampled_from([0, 512, 1024]))]


@st.composite
def streams(draw: Callable[..., Any]) -> bytes:
    """Streams that begin as those of ours do, with a manifest that may be right."""
    files: List[Dict[str, Any]] = []
    members = b""
    for name in draw(
        st.lists(st.sampled_from(["a", "b/c", "../x", "d", ".git/config"]), max_size=4)
    ):
        content = draw(st.binary(max_size=40))
        size = draw(st.just(len(content)) | st.integers(-1, 2**70))
        files.append(entry(name, size))
        members += member(f"m/{name}", content)
    text = manifest(
        *files,
        **draw(st.dictionaries(st.sampled_from(["left_out", "name", "x"]), JSON, max_size=1)),
    )
    first = member("m/.hfship/manifest.json", text)
    delta = b""
    if draw(st.booleans()):
        delta = member("m/.hfship/delta.json", json.dumps(draw(JSON)).encode())
    return first + delta + members + END


@given(tars() | streams(), st.sampled_from(["zstd", "gzip", "plain", "sealed"]))
@example(block(b"-0000001000", b"x"), "sealed")
@fuzzed(examples=250)
def test_tars_as_no_program_writes_them(tmp_path: Path, stream: bytes, form: str) -> None:
    path = tmp_path / "m.tar.zst"
    if form == "sealed":
        a.seal(stream, path, frame_size=700)
    else:
        how: Dict[str, Callable[[bytes], bytes]] = {
            "zstd": compressed,
            "gzip": gzip.compress,
            "plain": bytes,
        }
        path.write_bytes(how[form](stream))
    survives(path, tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sound")
    a.make_model(folder / "m", a.SMALL)
    return a.pack(folder / "m", folder / "out").path.read_bytes()


@given(st.data())
@fuzzed(examples=150)
def test_an_archive_with_bytes_changed_or_lost(
    tmp_path: Path, sound: bytes, data: st.DataObject
) -> None:
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "drop", "repeat", "set"]))
        if how == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "set":
            content[at : at + 4] = data.draw(
                st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
            )
        elif how == "cut":
            del content[at:]
        elif how == "drop":
            del content[at : at + data.draw(st.integers(1, 50))]
        else:
            content[at:at] = content[at : at + data.draw(st.integers(1, 50))]
        if not content:
            break
    path = tmp_path / "m.tar.zst"
    path.write_bytes(content)
    survives(path, tmp_path)


@given(
    st.lists(
        st.from_regex(r"m\.tar\.zst(\.[0-9]{0,14}|\.sha256)?", fullmatch=True),
        min_size=1,
        max_size=4,
    )
)
@fuzzed(examples=60)
def test_parts_by_any_names(tmp_path: Path, sound: bytes, names: List[str]) -> None:
    folder = tmp_path / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).write_bytes(sound[number * 300 :])
    for files in find_archives(str(folder), []):
        try:
            read_all(files, tmp_path / "out")
        except HfshipError as exc:
            assert len(exc.text()) < 5000
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
