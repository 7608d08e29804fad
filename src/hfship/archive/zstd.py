# SPDX-License-Identifier: Apache-2.0
"""zstd: frames from one of several libraries.

Owns the choice of the library, and one interface to all. libzstd comes from the first of these that
works; HFSHIP_ZSTD=NAME allows only that one:

  memfd      zstandard's C backend, carried in hfship.pyz, loaded from sealed memory: nothing is
             written anywhere
  cache      the same from a private folder, where the host refuses to run code from memory
             (SELinux, no /proc)
  installed  the host's zstandard; only from source, in place of the carried one
  stdlib     compression.zstd, from Python 3.14 on: nothing is carried for those
  system     the distribution's libzstd.so.1, through ctypes

Promises: all make and take the same frames (RFC 8878), with content size and checksum; a frame that
is damaged cannot make us allocate more than its table says. Never: runs code from a place where
others can write.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.machinery
import os
import stat
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, Union

from hfship.base.errors import DiskError, HostError, UsageError
from hfship.base.files import atomic_write, sha256_file, write_all
from hfship.base.pyz import damaged_entry, own_build, own_entry, own_file

# Bytes of content in a frame. Larger gains < 0.01 % on weights, smaller costs seek table. Models
# of 512 GiB and more get larger ones, as their tables would take too much memory.
FRAME_SIZE = 2 << 20

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

# linux/fcntl.h; Python below 3.9 has no names for them.
_F_ADD_SEALS = 1033
_ALL_SEALS = 0xF  # no write, no growing, no shrinking, no further seal

# ZSTD_cParameter (zstd.h) by the names that zstandard and compression.zstd use.
_ZSTD_PARAMETERS = {
    "compression_level": 100,
    "window_log": 101,
    "hash_log": 102,
    "chain_log": 103,
    "search_log": 104,
    "min_match": 105,
    "target_length": 106,
    "strategy": 107,
    "content_size_flag": 200,
    "checksum_flag": 201,
}


class ZstdError(Exception):
    """A frame that does not decode to exactly what was asked for."""


# -- the header of a frame


class FrameDescriptor(NamedTuple):
    """What the first byte of a frame's header tells: the bytes of the fields behind it, in their
    order, and of the `checksum` behind the last block; 0 for what is not there."""

    window: int
    dictionary: int
    content_size: int
    checksum: int

    @property
    def fields(self) -> int:
        """Bytes of the header behind the descriptor."""
        return self.window + self.dictionary + self.content_size


def parse_descriptor(descriptor: int) -> FrameDescriptor:
    """The byte behind the magic number of a frame (RFC 8878 §3.1.1.1.1).

    >>> parse_descriptor(0x24)
    FrameDescriptor(window=0, dictionary=0, content_size=1, checksum=4)
    """
    single_segment = descriptor >> 5 & 1  # then there is no window, but always a content size
    has_checksum = descriptor >> 2 & 1
    content_sizes = (single_segment, 2, 4, 8)
    dictionaries = (0, 1, 2, 4)
    return FrameDescriptor(
        window=1 - single_segment,
        dictionary=dictionaries[descriptor & 3],
        content_size=content_sizes[descriptor >> 6],
        checksum=4 * has_checksum,
    )


def declared_size(frame: Union[bytes, memoryview]) -> Optional[int]:
    """The content size in a frame's header; None when it is no zstd frame or does not say.

    >>> declared_size(bytes.fromhex("28b52ffd 24 03 190000 616263 9fe87352"))
    3
    """
    if len(frame) < 6 or bytes(frame[:4]) != ZSTD_MAGIC:
        return None

    descriptor = parse_descriptor(frame[4])
    width = descriptor.content_size
    stop = 5 + descriptor.fields
    field = bytes(frame[stop - width : stop])
    if not width or len(field) < width:
        return None

    size = int.from_bytes(field, "little")
    if width == 2:
        size += 256  # what fits into one byte has a field of one (RFC 8878 §3.1.1.1.4)
    return size


# -- one interface to all libraries


class Zstd:
    """One way to reach libzstd. `name` says which library, `origin` where it was loaded from.

    The callables it makes hold library state: never shared by threads.
    """

    errors: Tuple[Type[Exception], ...] = (ZstdError,)

    def __init__(self, name: str, origin: str) -> None:
        self.name = name
        self.origin = origin

    def compressor(
        self, level: int, **parameters: int
    ) -> Callable[[Union[bytes, memoryview]], bytes]:
        """content -> one independent frame with content size and checksum.

        `parameters` are libzstd's own (window_log, hash_log, chain_log, search_log, min_match,
        target_length, strategy); 0 leaves one to the level.
        """
        raise NotImplementedError

    def decompressor(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        """(frame, content size) -> content. Raises ZstdError unless it is exactly one whole frame
        of that size."""
        decode = self._decoder()

        def decompress(frame: Union[bytes, memoryview], size: int) -> bytes:
            # Before the library sees it: a damaged header must not make it allocate what it claims.
            declared = declared_size(frame)
            if declared != size:
                raise ZstdError(f"the frame declares {declared} bytes instead of {size}")
            content = decode(frame, size)
            if len(content) != size:
                raise ZstdError(f"the frame holds {len(content)} bytes instead of {size}")
            return content

        return decompress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        """The library's part of `decompressor`, for frames whose header declares the right size."""
        raise NotImplementedError

    def piecewise(self) -> Callable[[bytes], bytes]:
        """Decodes one frame of any program: the next bytes of the frame, cut between blocks ->
        their content. Raises one of `errors`."""
        raise NotImplementedError


class _Zstandard(Zstd):
    """The zstandard package, or its C backend alone."""

    def __init__(self, module: Any, origin: str) -> None:
        library = ".".join(map(str, module.ZSTD_VERSION))
        super().__init__(f"zstandard {module.__version__} (libzstd {library})", origin)
        self._module = module
        self.errors = (module.ZstdError,)

    def compressor(
        self, level: int, **parameters: int
    ) -> Callable[[Union[bytes, memoryview]], bytes]:
        options = self._module.ZstdCompressionParameters(
            compression_level=level, write_checksum=1, write_content_size=1, **parameters
        )
        compress: Callable[[Union[bytes, memoryview]], bytes]
        compress = self._module.ZstdCompressor(compression_params=options).compress
        return compress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        decoder = self._module.ZstdDecompressor()

        def decode(frame: Union[bytes, memoryview], size: int) -> bytes:
            try:
                if size:
                    content: bytes = decoder.decompress(
                        frame, max_output_size=size, allow_extra_data=False
                    )
                    return content
                # decompress() believes a header that says 0 without reading on.
                stream = decoder.decompressobj()
                content = stream.decompress(frame)
                whole = stream.eof and not stream.unused_data
            except self._module.ZstdError as exc:
                raise ZstdError(str(exc)) from exc

            if not whole:
                raise ZstdError("not exactly one whole frame")

            return content

        return decode

    def piecewise(self) -> Callable[[bytes], bytes]:
        decode: Callable[[bytes], bytes] = (
            self._module.ZstdDecompressor().decompressobj().decompress
        )
        return decode


class _StdlibZstd(Zstd):
    """compression.zstd of Python 3.14."""

    def __init__(self, module: Any) -> None:
        super().__init__(
            f"compression.zstd (libzstd {module.zstd_version})", "Python's standard library"
        )
        self._module = module
        self.errors = (module.ZstdError, EOFError)

    def compressor(
        self, level: int, **parameters: int
    ) -> Callable[[Union[bytes, memoryview]], bytes]:
        wanted = {
            "compression_level": level,
            "checksum_flag": 1,
            "content_size_flag": 1,
            **parameters,
        }
        names = self._module.CompressionParameter
        options = {names[name]: value for name, value in wanted.items()}
        stream = self._module.ZstdCompressor(options=options)

        def compress(content: Union[bytes, memoryview]) -> bytes:
            frame: bytes = stream.compress(content, stream.FLUSH_FRAME)
            return frame

        return compress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        def decode(frame: Union[bytes, memoryview], size: int) -> bytes:
            stream = self._module.ZstdDecompressor()  # one per frame: it cannot start anew
            try:
                content: bytes = stream.decompress(frame, max_length=size + 1)
            except (self._module.ZstdError, EOFError) as exc:
                raise ZstdError(str(exc)) from exc

            if not stream.eof or stream.unused_data:
                raise ZstdError("not exactly one whole frame")

            return content

        return decode

    def piecewise(self) -> Callable[[bytes], bytes]:
        decode: Callable[[bytes], bytes] = self._module.ZstdDecompressor().decompress
        return decode


class _SystemZstd(Zstd):
    """libzstd.so.1 through ctypes, which lets other threads run meanwhile. Its API is stable since
    1.4.0 (zstd.h)."""

    def __init__(self, ctypes: Any) -> None:
        self._ctypes = ctypes
        self._library = ctypes.CDLL("libzstd.so.1")
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        functions: Sequence[Tuple[str, Any, List[Any]]] = (
            ("ZSTD_versionString", ctypes.c_char_p, []),
            ("ZSTD_isError", ctypes.c_uint, [size]),
            ("ZSTD_getErrorName", ctypes.c_char_p, [size]),
            ("ZSTD_createCCtx", pointer, []),
            ("ZSTD_freeCCtx", size, [pointer]),
            ("ZSTD_CCtx_setParameter", size, [pointer, integer, integer]),
            ("ZSTD_compressBound", size, [size]),
            ("ZSTD_compress2", size, [pointer, pointer, size, ctypes.c_char_p, size]),
            ("ZSTD_createDCtx", pointer, []),
            ("ZSTD_freeDCtx", size, [pointer]),
            ("ZSTD_findFrameCompressedSize", size, [ctypes.c_char_p, size]),
            ("ZSTD_decompressDCtx", size, [pointer, pointer, size, ctypes.c_char_p, size]),
            ("ZSTD_decompressStream", size, [pointer, pointer, pointer]),
        )
        for name, result, arguments in functions:
            function = getattr(self._library, name)
            function.restype = result
            function.argtypes = arguments

        version = self._library.ZSTD_versionString().decode()
        super().__init__(f"libzstd {version}", "libzstd.so.1 of this system")

    def _checked(self, result: int) -> int:
        """What a function returned. Raises ZstdError if that is an error."""
        if self._library.ZSTD_isError(result):
            raise ZstdError(self._library.ZSTD_getErrorName(result).decode())
        return result

    def compressor(
        self, level: int, **parameters: int
    ) -> Callable[[Union[bytes, memoryview]], bytes]:
        library = self._library
        context = library.ZSTD_createCCtx()
        wanted = {
            "compression_level": level,
            "checksum_flag": 1,
            "content_size_flag": 1,
            **parameters,
        }
        for name, value in wanted.items():
            number = _ZSTD_PARAMETERS[name]
            self._checked(library.ZSTD_CCtx_setParameter(context, number, value))

        def compress(content: Union[bytes, memoryview]) -> bytes:
            source = bytes(content)  # ctypes cannot point into a read-only memoryview
            most = library.ZSTD_compressBound(len(source))
            target = self._ctypes.create_string_buffer(most)
            size = library.ZSTD_compress2(context, target, most, source, len(source))
            frame: bytes = self._ctypes.string_at(target, self._checked(size))
            return frame

        weakref.finalize(compress, library.ZSTD_freeCCtx, context)
        return compress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        library = self._library
        context = library.ZSTD_createDCtx()

        def decode(frame: Union[bytes, memoryview], size: int) -> bytes:
            source = bytes(frame)
            # ZSTD_decompressDCtx would go on into further and skippable frames.
            frame_size = library.ZSTD_findFrameCompressedSize(source, len(source))
            if self._checked(frame_size) != len(source):
                raise ZstdError("not exactly one whole frame")

            target = self._ctypes.create_string_buffer(max(size, 1))
            found = library.ZSTD_decompressDCtx(context, target, size, source, len(source))
            content: bytes = self._ctypes.string_at(target, self._checked(found))
            return content

        weakref.finalize(decode, library.ZSTD_freeDCtx, context)
        return decode

    def piecewise(self) -> Callable[[bytes], bytes]:
        library = self._library
        ctypes = self._ctypes
        context = library.ZSTD_createDCtx()
        target = ctypes.create_string_buffer(FRAME_SIZE)
        three_sizes = ctypes.c_size_t * 3  # ZSTD_inBuffer, ZSTD_outBuffer: address, size, position

        def decode(pieces: bytes) -> bytes:
            source = ctypes.create_string_buffer(pieces, len(pieces))
            given = three_sizes(ctypes.addressof(source), len(pieces), 0)
            content = bytearray()
            while True:
                made = three_sizes(ctypes.addressof(target), len(target), 0)
                self._checked(library.ZSTD_decompressStream(context, made, given))
                made_size = made[2]
                content += memoryview(target)[:made_size]
                # With room left in the target, the library has no more to give for this source.
                if given[2] == len(pieces) and made_size < len(target):
                    return bytes(content)

        weakref.finalize(decode, library.ZSTD_freeDCtx, context)
        return decode


# -- the libraries


def _carried_backend() -> Tuple[bytes, str]:
    """(zstandard's C backend for this Python and machine, its SHA-256), checked. Raises ImportError
    if it is not carried."""
    entries = own_build().get("entries")
    if entries is None:
        raise ImportError("hfship runs from source")

    # As in ".cpython-311-x86_64-linux-gnu.so": version, free threading, machine and C library.
    abi = importlib.machinery.EXTENSION_SUFFIXES[0][1:-3]
    name = f"native/{abi}/backend_c.so"
    if name not in entries:
        raise ImportError(f"hfship carries no zstandard for {abi}")

    image = own_entry(name)
    if hashlib.sha256(image).hexdigest() != entries[name]:
        raise damaged_entry(name, "its SHA-256 is not the one it was built with")

    return image, entries[name]


def _load_extension(path: str) -> Any:
    """The C backend at `path`, under a name of our own: a zstandard that the host imports is
    neither used nor hurt."""
    name = "hfship.backend_c"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=path)
    module = loader.create_module(spec)
    loader.exec_module(module)
    return module


def _zstd_from_memfd() -> Zstd:
    image, _ = _carried_backend()
    if not hasattr(os, "memfd_create"):
        raise ImportError("this Python was built without memfd_create")

    fd = os.memfd_create("hfship-zstd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_all(fd, image)
        fcntl.fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
        module = _load_extension(f"/proc/self/fd/{fd}")
        return _Zstandard(module, "hfship.pyz, in memory")
    finally:
        os.close(fd)  # the mapping stays


def _zstd_from_cache() -> Zstd:
    image, digest = _carried_backend()
    refused = []
    for folder in _cache_folders():
        path = folder / f"backend_c-{digest}.so"
        try:
            _require_private(folder)
            if not path.is_file() or sha256_file(path) != digest:
                atomic_write(path, image, 0o600)
            module = _load_extension(str(path))
            return _Zstandard(module, f"hfship.pyz, by way of {path}")
        except (OSError, ImportError, DiskError) as exc:
            refused.append(f"{folder}: {exc}")

    raise ImportError("; ".join(refused))


def _cache_folders() -> List[Path]:
    """Where compiled code may lie, best first."""
    folders = []
    chosen = os.environ.get("HFSHIP_CACHE")
    if chosen:
        folders.append(Path(chosen))
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(of_user):  # a user without a home has none
        folders.append(Path(of_user) / "hfship")
    folders.append(own_file().with_name(".hfship-cache"))
    return folders


def _require_private(folder: Path) -> None:
    """Create `folder` for ourselves alone, or raise PermissionError when others could put code
    there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "not a folder but a link", str(folder))
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        why = "others can write there (chmod go-w, or set HFSHIP_CACHE)"
        raise PermissionError(errno.EPERM, why, str(folder))


def _zstd_installed() -> Zstd:
    if own_build():
        raise ImportError("only used when hfship.py runs from source")
    module = importlib.import_module("zstandard")
    return _Zstandard(module, os.path.dirname(module.__file__ or ""))


def _zstd_from_stdlib() -> Zstd:
    return _StdlibZstd(importlib.import_module("compression.zstd"))


def _zstd_from_system() -> Zstd:
    return _SystemZstd(importlib.import_module("ctypes"))


ZSTD_BACKENDS: Mapping[str, Callable[[], Zstd]] = {
    "memfd": _zstd_from_memfd,
    "cache": _zstd_from_cache,
    "installed": _zstd_installed,
    "stdlib": _zstd_from_stdlib,
    "system": _zstd_from_system,
}


def load_zstd() -> Zstd:
    """The first zstd backend that works, loaded once. Raises HostError that names what was tried,
    UsageError for an HFSHIP_ZSTD that is none."""
    return _first_that_works(os.environ.get("HFSHIP_ZSTD", ""))


@lru_cache(maxsize=None)
def _first_that_works(forced: str) -> Zstd:
    """load_zstd, with what HFSHIP_ZSTD names."""
    names = list(ZSTD_BACKENDS)
    next_step = "install the system's zstd library (libzstd1, libzstd or zstd)"
    if forced:
        if forced not in ZSTD_BACKENDS:
            what = f"HFSHIP_ZSTD={forced} is no zstd backend"
            raise UsageError(what, "", f"use one of {', '.join(names)}")
        names = [forced]
        next_step = "unset HFSHIP_ZSTD"

    tried = []
    for name in names:
        try:
            return ZSTD_BACKENDS[name]()
        except (ImportError, OSError, AttributeError) as exc:
            # AttributeError: a libzstd before 1.4 lacks a function.
            tried.append(f"{name:<9}  {exc}")

    raise HostError(
        "no zstd library can be used",
        "\n".join(tried),
        f"{next_step}, or use Python 3.14 or newer",
    )
