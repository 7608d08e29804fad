"""Every way to libzstd makes frames that every other one reads, and refuses whatever is not exactly one whole frame."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import itertools
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hfship.archive import zstd as room
from hfship.archive.zstd import (
    ZSTD_BACKENDS,
    ZSTD_MAGIC,
    Zstd,
    ZstdError,
    _first_that_works,
    _StdlibZstd,
    declared_size,
    load_zstd,
)
from hfship.base.errors import HfshipError, HostError, UsageError

PLANES = {
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
    "strategy": 1,
}
NOISE = random.Random(7).randbytes(300_000)
CONTENTS = {
    "nothing": b"",
    "one byte": b"x",
    "255": bytes(255),
    "256": b"ab" * 128,
    "65791": NOISE[:65791],
    "65792": (b"weights " * 8224),
    "noise": NOISE,
    "text": b"the quick brown fox " * 50_000,
    "4 MiB": NOISE[:65536] * 64,
}


def _installed() -> Zstd:
    return ZSTD_BACKENDS["installed"]()


def _stdlib() -> Zstd:
    try:
        return ZSTD_BACKENDS["stdlib"]()
    except ImportError:
        # The same code as compression.zstd, published for older Pythons by its author.
        return _StdlibZstd(importlib.import_module("backports.zstd"))


def _system() -> Zstd:
    return ZSTD_BACKENDS["system"]()


BACKENDS = {"zstandard": _installed, "stdlib": _stdlib, "system": _system}


@functools.lru_cache(maxsize=None)
def backend(name: str) -> Zstd:
    try:
        return BACKENDS[name]()
    except (ImportError, OSError) as exc:
        return pytest.skip(f"no {name} here: {exc}")


@pytest.fixture(params=BACKENDS)
def zstd(request: pytest.FixtureRequest) -> Zstd:
    return backend(request.param)


@pytest.mark.parametrize("writer, reader", list(itertools.product(BACKENDS, BACKENDS)))
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_each_reads_what_each_writes(writer: str, reader: str, content: bytes) -> None:
    decompress = backend(reader).decompressor()
    for level, parameters in ((1, {}), (3, {}), (-5, {}), (1, PLANES)):
        compress = backend(writer).compressor(level, **parameters)
        for _ in range(2):  # a compressor is used again and again
            frame = compress(memoryview(content))
            assert declared_size(frame) == len(content)
            assert frame[4] & 4, "no checksum"
            assert decompress(memoryview(frame), len(content)) == content


def test_equal_libraries_make_equal_frames() -> None:
    """The archive must not depend on the road to the library; on its version it may."""
    frames: dict = {}
    for name in BACKENDS:
        library = backend(name)
        version = library.name.rsplit("libzstd ", 1)[1].rstrip(")")
        for level, parameters in ((1, {}), (19, {}), (1, PLANES)):
            frame = library.compressor(level, **parameters)(CONTENTS["text"])
            assert frames.setdefault((version, level, bool(parameters)), frame) == frame


def skippable(payload: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, len(payload)) + payload


def undeclared(frame: bytes) -> bytes:
    """The frame with a window descriptor where its one-byte content size was."""
    assert frame[4] >> 5 == 1
    return frame[:4] + bytes([frame[4] & 0x1F, 0x38]) + frame[6:]


EMPTY = bytes.fromhex("28b52ffd 24 00 010000 99e9d851")


def spoiled(frame: bytes, other: bytes) -> dict:
    """What is not exactly one whole frame, made of one that is and of another."""
    return {
        "empty": b"",
        "magic only": frame[:4],
        "header only": frame[:6],
        "last byte missing": frame[:-1],
        "checksum missing": frame[:-4],
        "byte behind": frame + b"\0",
        "two frames": frame + other,
        "the same frame twice": frame * 2,
        "empty frame behind": frame + EMPTY,
        "empty frame before": EMPTY + frame,
        "skippable behind": frame + skippable(b"abcd"),
        "skippable before": skippable(b"abcd") + frame,
        "skippable alone": skippable(frame),
        "magic number behind": frame + ZSTD_MAGIC,
        "another frame": other,
        "wrong checksum": frame[:-1] + bytes([frame[-1] ^ 1]),
        "no zstd": b"\x1f\x8b" + frame[2:],
        "reserved bit": frame[:4] + bytes([frame[4] | 8]) + frame[5:],
        "dictionary wanted": frame[:4] + bytes([frame[4] | 1]) + frame[5:6] + b"\1" + frame[6:],
    }


@pytest.mark.parametrize("fault", spoiled(bytes(20), b""))
@pytest.mark.parametrize(
    "content", [b"", b"x", b"abc" * 60, NOISE[:5000]], ids=["nothing", "one byte", "text", "noise"]
)
def test_whatever_is_not_one_whole_frame_is_refused(zstd: Zstd, content: bytes, fault: str) -> None:
    compress, decompress = zstd.compressor(1), zstd.decompressor()
    frame = compress(content)
    with pytest.raises(ZstdError):
        decompress(spoiled(frame, compress(b"something else" + content))[fault], len(content))
    assert decompress(frame, len(content)) == content, "usable after an error"


@pytest.mark.parametrize("off_by", [-1, 1, 256, -10])
def test_another_size_is_refused(zstd: Zstd, off_by: int) -> None:
    frame = zstd.compressor(1)(bytes(1000))
    with pytest.raises(ZstdError):
        zstd.decompressor()(frame, 1000 + off_by)


def test_a_frame_that_declares_no_size_is_refused(zstd: Zstd) -> None:
    frame = undeclared(zstd.compressor(1)(b"abc" * 60))
    assert declared_size(frame) is None
    with pytest.raises(ZstdError):
        zstd.decompressor()(frame, 180)


def test_a_frame_without_checksum_is_read(zstd: Zstd) -> None:
    """Foreign frames may have none; ours always do."""
    frame = zstd.compressor(1)(b"abc" * 60)
    bare = frame[:4] + bytes([frame[4] & ~4]) + frame[5:-4]
    assert zstd.decompressor()(bare, 180) == b"abc" * 60


@pytest.mark.parametrize("content", [b"", b"abc" * 60], ids=["nothing", "text"])
def test_no_cut_and_no_flipped_bit_gives_other_bytes(zstd: Zstd, content: bytes) -> None:
    frame, decompress = zstd.compressor(1)(content), zstd.decompressor()
    for size in range(len(frame)):
        with pytest.raises(ZstdError):
            decompress(frame[:size], len(content))
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert decompress(bytes(damaged), len(content)) == content, (
                bit
            )  # RFC 8878: one header bit is unused
        except ZstdError:
            pass


@settings(max_examples=200)
@given(content=st.binary(max_size=3000), data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
def test_damage_never_passes(name: str, content: bytes, data: st.DataObject) -> None:
    frame = bytearray(backend(name).compressor(1)(content))
    start = data.draw(st.integers(0, len(frame)))
    stop = data.draw(st.integers(start, len(frame)))
    frame[start:stop] = data.draw(st.binary(max_size=20))
    try:
        assert backend(name).decompressor()(bytes(frame), len(content)) == content
    except ZstdError:
        pass


@given(frame=st.binary(max_size=40))
def test_declared_size_takes_any_bytes(frame: bytes) -> None:
    for candidate in (frame, ZSTD_MAGIC + frame):
        size = declared_size(candidate)
        assert size is None or size >= 0


def test_threads_with_their_own_callables_do_not_meet(zstd: Zstd) -> None:
    failures = []

    def work(seed: int) -> None:
        compress, decompress = zstd.compressor(1), zstd.decompressor()
        for turn in range(40):
            content = NOISE[seed * 1000 : seed * 1000 + 50_000 + turn]
            if decompress(compress(content), len(content)) != content:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_contexts_of_the_system_library_are_freed() -> None:
    zstd = backend("system")

    def resident_kib() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024

    def use() -> None:
        zstd.decompressor()(zstd.compressor(1)(NOISE), len(NOISE))

    for _ in range(20):
        use()
    before = resident_kib()
    for _ in range(200):  # one context is larger than 500 KiB
        use()
    assert resident_kib() - before < 20_000


def test_without_any_zstd_the_error_names_everything_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str):
        def load() -> Zstd:
            raise ImportError(f"no {name} at all")

        return load

    monkeypatch.setattr(
        "hfship.archive.zstd.ZSTD_BACKENDS", {name: absent(name) for name in ZSTD_BACKENDS}
    )
    monkeypatch.delenv("HFSHIP_ZSTD", raising=False)
    _first_that_works.cache_clear()
    with pytest.raises(HostError) as caught:
        load_zstd()
    for name in ZSTD_BACKENDS:
        assert f"no {name} at all" in caught.value.why
    assert "libzstd1" in caught.value.next_step and "3.14" in caught.value.next_step


@pytest.mark.parametrize("forced, error", [("nonsense", UsageError), ("memfd", HostError)])
def test_a_forced_backend_is_the_only_one_tried(
    monkeypatch: pytest.MonkeyPatch, forced: str, error: type
) -> None:
    monkeypatch.setenv("HFSHIP_ZSTD", forced)  # from source there is nothing to load into a memfd
    with pytest.raises(error) as caught:
        load_zstd()
    assert "system" not in caught.value.why


# -- where compiled code may lie


@pytest.mark.parametrize(
    ("env", "places"),
    [
        ({"HOME": "/h"}, ["/h/.cache/hfship"]),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, ["/x/hfship"]),
        ({"HOME": "/h", "HFSHIP_CACHE": "/c"}, ["/c", "/h/.cache/hfship"]),
        ({"HOME": "relative"}, []),
    ],
)
def test_where_compiled_code_may_lie(
    env: Dict[str, str], places: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HFSHIP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(room, "own_file", lambda: Path("/media/hfship.pyz"))
    found = [str(folder) for folder in room._cache_folders()]
    assert found == [*places, "/media/.hfship-cache"]


@pytest.mark.parametrize(
    ("mode", "kind", "fits"),
    [
        (0o700, "folder", True),
        (0o755, "folder", True),
        (0o775, "folder", False),
        (0o702, "folder", False),
        (0o700, "link", False),
        (0o700, "of another", False),
        (0o700, "nothing", True),
    ],
)
def test_only_a_folder_of_our_own_holds_compiled_code(
    mode: int, kind: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "far/cache"
    if kind != "nothing":
        folder.mkdir(parents=True)
        folder.chmod(mode)
    if kind == "link":
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    if kind == "of another":
        monkeypatch.setattr(room.os, "geteuid", lambda: folder.stat().st_uid + 1)
    if fits:
        room._require_private(folder)
        assert kind != "nothing" or folder.stat().st_mode & 0o777 == 0o700
    else:
        with pytest.raises(PermissionError):
            room._require_private(folder)


class Carried:
    """A library that hfship carries, and what is loaded of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image = b"image"
        self.digest = hashlib.sha256(self.image).hexdigest()
        self.loaded: List[Any] = []
        self.fails: Optional[Exception] = None
        monkeypatch.setattr(room, "_carried_backend", lambda: (self.image, self.digest))
        monkeypatch.setattr(room, "_load_extension", self.load)
        monkeypatch.setattr(room, "_Zstandard", lambda module, source: (module, source))

    def load(self, path: str) -> str:
        """What lies there."""
        self.loaded.append((path, Path(path).read_bytes()))
        if self.fails:
            raise self.fails
        return "module"


def test_a_library_is_loaded_from_memory_where_nobody_can_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carried = Carried(monkeypatch)
    sealed: List[Any] = []
    monkeypatch.setattr(room.fcntl, "fcntl", lambda *words: sealed.append(words[1:]))
    assert room._zstd_from_memfd() == ("module", "hfship.pyz, in memory")
    ((path, content),) = carried.loaded
    assert content == b"image" and sealed == [(room._F_ADD_SEALS, room._ALL_SEALS)]
    assert not os.path.exists(path), "the descriptor is closed"
    monkeypatch.delattr(room.os, "memfd_create")
    with pytest.raises(ImportError, match="without memfd_create"):
        room._zstd_from_memfd()


def test_a_library_is_loaded_from_the_first_place_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = Carried(monkeypatch)
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setattr(room, "_cache_folders", lambda: [shared, own])
    path = own / f"backend_c-{carried.digest}.so"
    for content in (None, b"changed", b"image"):
        if content is not None:
            path.write_bytes(content)
        assert room._zstd_from_cache() == ("module", f"hfship.pyz, by way of {path}")
        assert carried.loaded[-1] == (str(path), b"image")
    assert path.stat().st_mode & 0o777 == 0o600 and not list(shared.iterdir())
    carried.fails = ImportError("another machine")
    with pytest.raises(ImportError) as told:
        room._zstd_from_cache()
    assert "others can write there" in str(told.value)
    assert f"; {own}: another machine" in str(told.value)


# -- headers, by the words of another reader of them


@pytest.mark.parametrize("descriptor", [one for one in range(256) if not one & 8])
def test_every_descriptor_is_read_as_libzstd_reads_it(descriptor: int) -> None:
    """Bit 3 is reserved: libzstd refuses it. Of the fields behind it each byte is another one."""
    found = room.parse_descriptor(descriptor)
    frame = ZSTD_MAGIC + bytes([descriptor]) + bytes(range(1, 20))
    if found.window:
        frame = frame[:5] + b"\x10" + frame[6:]
    assert zstandard.frame_header_size(frame) == 5 + found.fields
    told = zstandard.get_frame_parameters(frame)
    assert found.checksum == 4 * told.has_checksum
    start = 5 + found.window
    dictionary = int.from_bytes(frame[start : start + found.dictionary], "little")
    assert told.dict_id == dictionary
    unknown = zstandard.CONTENTSIZE_UNKNOWN
    size = declared_size(frame)
    assert told.content_size == (unknown if size is None else size)
    if size is not None:
        stop = 5 + found.fields
        assert declared_size(frame[:stop]) == size and declared_size(frame[: stop - 1]) is None


@pytest.mark.parametrize(
    "frame", [b"", ZSTD_MAGIC, ZSTD_MAGIC + b"\x24", b"x" * 20, b"\x50\x2a\x4d\x18" + bytes(20)]
)
def test_what_is_no_frame_declares_nothing(frame: bytes) -> None:
    assert declared_size(frame) is None


# -- what is carried


SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
CARRIED = f"native/{SUFFIX[1:-3]}/backend_c.so"


def test_a_carried_library_is_the_one_that_was_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    built: Dict[str, Any] = {"entries": {CARRIED: digest}}
    images = {CARRIED: b"image"}
    monkeypatch.setattr(room, "own_build", lambda: built)
    monkeypatch.setattr(room, "own_entry", images.__getitem__)
    assert room._carried_backend() == (b"image", digest)
    images[CARRIED] = b"other"
    with pytest.raises(HfshipError, match="is damaged") as told:
        room._carried_backend()
    assert "its SHA-256 is not the one" in told.value.why
    built["entries"] = {}
    with pytest.raises(ImportError, match=f"carries no zstandard for {SUFFIX[1:-3]}"):
        room._carried_backend()
    built.clear()
    with pytest.raises(ImportError, match="runs from source"):
        room._carried_backend()


def test_a_built_file_does_not_take_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room._zstd_installed().origin.endswith("zstandard")
    monkeypatch.setattr(room, "own_build", lambda: {"entries": {}})
    with pytest.raises(ImportError, match="from source"):
        room._zstd_installed()


@pytest.mark.parametrize(
    ("works", "forced", "found"),
    [
        ("installed system", "", "installed"),
        ("system", "", "system"),
        ("memfd system", "system", "system"),
        ("memfd", "system", ""),
    ],
)
def test_the_first_library_that_works_is_taken(
    works: str, forced: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = itertools.cycle([ImportError, OSError, AttributeError])

    def loads(name: str) -> Any:
        def load() -> str:
            if name in works.split():
                return name
            raise next(errors)(f"no {name}")

        return load

    monkeypatch.setattr(room, "ZSTD_BACKENDS", {name: loads(name) for name in ZSTD_BACKENDS})
    _first_that_works.cache_clear()
    try:
        if found:
            assert _first_that_works(forced) == found
            return
        with pytest.raises(HostError) as told:
            _first_that_works(forced)
        assert told.value.why == "system     no system"
        assert told.value.next_step.startswith("unset HFSHIP_ZSTD")
    finally:
        _first_that_works.cache_clear()


# -- frames in pieces


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_frame_is_decoded_in_pieces(zstd: Zstd, content: bytes) -> None:
    """Of any size, cut anywhere: what is held back comes with the next piece."""
    frame = zstd.compressor(3)(content)
    for size in (len(frame), 1 + len(frame) // 2, 70_000):
        decode = zstd.piecewise()
        pieces = [frame[at : at + size] for at in range(0, len(frame), size)]
        assert b"".join(decode(piece) for piece in pieces) == content
    with pytest.raises(zstd.errors):
        zstd.piecewise()(b"no frame at all")
