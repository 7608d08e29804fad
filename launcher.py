# SPDX-License-Identifier: Apache-2.0
"""Start hfship from hfship.pyz, and from nothing else that the host's Python has installed.

build_zipapp.py fills in the two tables below and makes this file hfship_launcher.py of hfship.pyz.
Its __main__.py does nothing but call `run`: Python compiles the __main__ of a zip file twice.

    hfship.pyz -> in memory -> cached code, or sources compiled -> hfship.commands.run.main

What is promised:

- The file is read once, whole (5 MB, 1 ms), before any module of hfship is imported. The package,
  the vendored libraries, zstd for this Python and the certificates all come from that memory, here
  and in every process forked from here. From then on the file may be replaced or overwritten, and
  its medium unmounted: nothing of it is open and nothing is read from it again.
- The cache holds the code of all modules of the package and of the vendored ones, compiled from
  the very bytes of this file: their SHA-256 is part of the seal, so another version's cache, or an
  intact file's cache under a damaged one, is no hit. It is used only if it belongs to the user and
  nobody else may write to it. Whoever may write as the user may of course seal anything. The seal
  is that of a table with the SHA-256 of each module's code, which is proven when the module is
  imported: a start uses a third of them.
- Modules are unmarshalled, or compiled, when they are imported and no earlier.

Not promised: Python's standard library is imported from wherever Python lies. A command line that
hfship starts anew runs what is in the file by then, and `version --verify` proves the file on disk.
A file that is overwritten in the millisecond in which it is read counts as damaged.

Without a cache that can be written, each start compiles the modules that it imports. With one, the
first start compiles them all and writes before `main`: later there is no moment for it that a kill,
an os._exit or a forked worker does not spoil, and a few modules more cost little once.

The grammar is that of Python 2.7: a SyntaxError is no answer to the question which Python is
needed. Hence type comments, % and (object). Most imports stand in functions: until the host is shut
out, a module of its own could answer.
"""

import gc
import os
import signal
import sys

# Entries of the modules of hfship, and the packages and modules in vendor/.
MODULES = ()  # type: tuple[str, ...]
VENDORED = ()  # type: tuple[str, ...]
# What hfship and the vendored packages would pick up if a host has imported it.
OPTIONAL = (
    "hfship",
    "zstandard",
    "brotli",
    "brotlicffi",
    "h2",
    "OpenSSL",
)

TYPE_CHECKING = False  # typing itself costs milliseconds, and Python 2 has none
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec  # noqa: F401 - used in comments, as the next ones
    from types import CodeType, ModuleType  # noqa: F401
    from typing import Callable, NoReturn  # noqa: F401


def fail(code, what, why, next_step):
    # type: (int, str, str, str) -> NoReturn
    """End with an error as hfship itself words it."""
    sys.stderr.write("hfship: %s\n  why   %s\n  next  %s\n" % (what, why, next_step))
    sys.exit(code)


def check_python():
    # type: () -> None
    """End with one clear line where hfship's modules would be a SyntaxError."""
    if sys.version_info < (3, 8):
        version = "%d.%d.%d" % sys.version_info[:3]
        message = "hfship needs Python 3.8 or newer; this is %s (%s); "
        message += "next: python3.11 %s, or any other from 3.8 on\n"
        sys.stderr.write(message % (version, sys.executable, " ".join(sys.argv)))
        sys.exit(9)


# ---- the file in memory --------------------------------------------------------------


class Entry(object):
    """What the zip directory says of one entry (PKWARE APPNOTE 6.3.x, 4.3.12)."""

    def __init__(self, fields, shift):
        # type: (tuple[int, ...], int) -> None
        self.method, self.crc, self.stored_size = fields[:3]
        self.header = fields[-1] + shift  # offset of the local header


def read_directory(content):
    # type: (bytes) -> dict[str, Entry]
    """The entries of a zip file by name. Raises ValueError or struct.error if there is none."""
    import struct

    end = content.rindex(b"PK\5\6")  # end of central directory record, 4.3.16
    size, start = struct.unpack_from("<LL", content, end + 12)
    at = end - size
    shift = at - start  # bytes before the zip that it does not count
    record = struct.Struct("<10x H 4x LL 4x HHH 8x L")
    entries = {}
    while content.startswith(b"PK\1\2", at):
        fields = record.unpack_from(content, at)
        name_size, extra_size, comment_size = fields[3:6]
        name = content[at + 46 : at + 46 + name_size].decode("latin-1")
        entries[name] = Entry(fields, shift)
        at += 46 + name_size + extra_size + comment_size
    return entries


def module_name(entry):
    # type: (str) -> str
    """Full name of the module in an entry: "hfship/base/__init__.py" is hfship.base."""
    name = entry[: -len(".py")].replace("/", ".")
    return name[: -len(".__init__")] if name.endswith(".__init__") else name


class Codes(object):
    """Marshalled code of modules, one after the other, and where each is: (start, end, SHA-256)."""

    def __init__(self, table, content):
        # type: (dict[str, tuple[int, int, bytes]], bytes) -> None
        self.table = table
        self.content = content

    def code_of(self, entry):
        # type: (str) -> CodeType | None
        """The code of a module; None if it is not here, or not what it was."""
        import hashlib
        import marshal

        start, end, digest = self.table.get(entry, (0, 0, b""))
        content = self.content[start:end]
        if hashlib.sha256(content).digest() != digest:
            return None
        code = marshal.loads(content)  # type: CodeType
        return code


class Pyz(object):
    """hfship.pyz as it was when the program began, and the importer of the modules in it."""

    def __init__(self, path):
        # type: (str) -> None
        with open(path, "rb") as stream:
            self.content = stream.read()
        self.path = path
        self.entries = read_directory(self.content)
        self.modules = {module_name(entry): entry for entry in MODULES}
        for name in ("__main__", __name__):
            self.modules[name] = name + ".py"
        for entry in self.entries:
            folder, _, name = entry.partition("/")
            if folder == "vendor" and name.endswith(".py"):
                self.modules[module_name(name)] = entry
        # Those with a cached code: every module but __main__ and this one.
        self.kept = MODULES + tuple(
            sorted(entry for entry in self.modules.values() if entry.startswith("vendor/"))
        )
        self.codes = Codes({}, b"")

    # -- content of entries

    def stored(self, name):
        # type: (str) -> bytes
        """The bytes of an entry as they are in the file, mostly deflated. Raises ImportError."""
        entry = self.entries.get(name)
        if entry is None or not self.content.startswith(b"PK\3\4", entry.header):
            raise ImportError("%s: no such entry in %s" % (name, self.path), name="hfship")
        import struct

        name_size, extra_size = struct.unpack_from("<HH", self.content, entry.header + 26)
        start = entry.header + 30 + name_size + extra_size
        return self.content[start : start + entry.stored_size]

    def content_of(self, name):
        # type: (str) -> bytes
        """The content of an entry, proven by its CRC-32. Raises ImportError."""
        import zlib

        content = self.stored(name)
        entry = self.entries[name]
        damage = ""
        if entry.method == 8:
            try:
                content = zlib.decompress(content, -15)
            except zlib.error as exc:
                damage = str(exc)
        if not damage and zlib.crc32(content) != entry.crc:
            damage = "its CRC-32 is wrong"
        if damage:
            raise ImportError("%s of %s: %s" % (name, self.path, damage), name="hfship")
        return content

    def get_data(self, path):
        # type: (str) -> bytes
        """The content of the entry at `path`, as "/a/hfship.pyz/LICENSE".

        Raises OSError if there is no such entry, ImportError if it is damaged.
        """
        before = self.path + os.sep
        name = path[len(before) :] if path.startswith(before) else path
        if name not in self.entries:
            raise FileNotFoundError(2, "no such entry", path)
        return self.content_of(name)

    # -- modules: the protocols of importlib.abc.MetaPathFinder and InspectLoader

    def find_spec(self, name, *_):
        # type: (str, *object) -> ModuleSpec | None
        """Where a module of ours lies; None for all others.

        The __path__ of packages stays empty: what is not in our tables is not to be found on disk.
        """
        if name not in self.modules:
            return None
        from importlib.machinery import ModuleSpec

        spec = ModuleSpec(name, self, origin=self.get_filename(name))  # type: ignore[arg-type]
        if self.is_package(name):
            spec.submodule_search_locations = []
        spec.has_location = True
        return spec

    def create_module(self, spec):
        # type: (ModuleSpec) -> None
        """An ordinary module will do."""

    def exec_module(self, module):
        # type: (ModuleType) -> None
        """Run the code of a module."""
        exec(self.get_code(module.__name__), vars(module))

    def get_code(self, name):
        # type: (str) -> CodeType
        """The code of a module, from the cache or from its source."""
        entry = self.entry_of(name)
        return self.codes.code_of(entry) or self.compiled(entry)

    def compiled(self, entry):
        # type: (str) -> CodeType
        """The code of a module, compiled under a name that fits all copies of this file."""
        source = self.content_of(entry)
        return compile(source, "hfship.pyz/" + entry, "exec", dont_inherit=True)

    def get_source(self, name):
        # type: (str) -> str
        """The source of a module, for the lines of a traceback."""
        import importlib.util

        return importlib.util.decode_source(self.content_of(self.entry_of(name)))

    def get_filename(self, name):
        # type: (str) -> str
        """The __file__ of a module."""
        return os.path.join(self.path, *self.entry_of(name).split("/"))

    def is_package(self, name):
        # type: (str) -> bool
        """Whether a module has modules below it."""
        return self.entry_of(name).endswith("/__init__.py")

    def entry_of(self, name):
        # type: (str) -> str
        """The entry of a module. Raises ImportError."""
        if name not in self.modules:
            raise ImportError("%s has no module %s" % (self.path, name), name=name)
        return self.modules[name]

    def get_resource_reader(self, name):
        # type: (str) -> Resources | None
        """What importlib.resources asks for: certifi looks for its certificates so."""
        if not self.is_package(name):
            return None
        return Resources(self, self.entry_of(name)[: -len("__init__.py")])


class Resources(object):
    """The files beside the modules of a package: the protocol of importlib.abc.ResourceReader."""

    def __init__(self, pyz, folder):
        # type: (Pyz, str) -> None
        self.pyz = pyz
        self.folder = folder

    def open_resource(self, resource):
        # type: (str) -> object
        """A stream of the content of one file."""
        import io

        return io.BytesIO(self.pyz.get_data(self.folder + resource))

    def resource_path(self, resource):
        # type: (str) -> NoReturn
        """There is none: the file is in memory."""
        raise FileNotFoundError(2, "not on disk", resource)

    def is_resource(self, path):
        # type: (str) -> bool
        """Whether there is such a file."""
        return self.folder + path in self.pyz.entries

    def contents(self):
        # type: () -> list[str]
        """The names of all files."""
        inside = [n[len(self.folder) :] for n in self.pyz.entries if n.startswith(self.folder)]
        return [name for name in inside if "/" not in name]


# ---- nothing of the host's -----------------------------------------------------------


def is_standard_library(path):
    # type: (str) -> bool
    """Whether a sys.path entry belongs to Python itself; site-packages and PYTHONPATH do not."""
    home = os.path.dirname(os.__file__)
    name = os.path.basename(path)
    if path == home or path.startswith(home + os.sep):
        return "-packages" not in path[len(home) :]
    return name == "lib-dynload" or name == "python%d%d.zip" % sys.version_info[:2]


def shut_out_host():
    # type: () -> None
    """Import from the standard library only, whatever .pth files and sitecustomize did before."""
    sys.dont_write_bytecode = True
    sys.path[:] = [path for path in sys.path if is_standard_library(path)]
    # Editable installs answer imports from finders of their own.
    python_own = [f for f in sys.meta_path if is_frozen(getattr(f, "__module__", ""))]
    sys.meta_path[:] = python_own
    for name in list(sys.modules):
        if name.split(".")[0] in VENDORED + OPTIONAL:
            del sys.modules[name]


def is_frozen(module):
    # type: (object) -> bool
    """Whether a module is one of those that Python's import system is made of."""
    return str(module).startswith("_frozen_importlib")


# ---- the cache -----------------------------------------------------------------------


def cache_file():
    # type: () -> str
    """Where the code of hfship lies between two runs."""
    folder = os.environ.get("HFSHIP_CACHE")
    if not folder:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "hfship")
    return os.path.join(folder, "hfship.%s.bytecode" % sys.implementation.cache_tag)


def seal_of(pyz):
    # type: (Pyz) -> Callable[[bytes], bytes]
    """The seal of cached code: a SHA-256 of it, of the sources it is made from, and of the Python.

    The sources are taken as they are in the file: to read them is cheap, to inflate them is not.
    """
    import hashlib
    import importlib.util

    key = hashlib.sha256(importlib.util.MAGIC_NUMBER + b"%d" % sys.flags.optimize)
    for entry in pyz.kept:
        stored = pyz.stored(entry)
        key.update(b"%s %d\n" % (entry.encode("ascii"), len(stored)))
        key.update(stored)

    def seal(content):
        # type: (bytes) -> bytes
        sealed = key.copy()
        sealed.update(content)
        return sealed.digest()

    return seal


def cached(path, seal):
    # type: (str, Callable[[bytes], bytes]) -> Codes | None
    """The cached code. None unless it is of these sources, and nobody else could have put it there.

    In the file: the seal of the table, the table's size in 4 bytes, the table, the code.
    """
    import marshal

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as stream:
            status = os.fstat(fd)
            found = stream.read(32)
            table = stream.read(int.from_bytes(stream.read(4), "little"))
            content = stream.read()
    except OSError:
        return None
    private = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    if not private or found != seal(table):
        return None
    return Codes(marshal.loads(table), content)


def collected(pyz):
    # type: (Pyz) -> Codes
    """The code of all modules, compiled."""
    import hashlib
    import marshal

    table = {}
    content = bytearray()
    for entry in pyz.kept:
        code = marshal.dumps(pyz.compiled(entry))
        end = len(content) + len(code)
        table[entry] = (len(content), end, hashlib.sha256(code).digest())
        content += code
    return Codes(table, bytes(content))


def can_keep(path):
    # type: (str) -> bool
    """Whether a file can be put there; its folder is made."""
    if not os.path.isabs(path):  # a user without a home has none
        return False
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def keep(path, content):
    # type: (str, bytes) -> None
    """Put code into the cache. Where that cannot be done the next start takes as long as this."""
    temporary = "%s.%d.tmp" % (path, os.getpid())
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
    except OSError:
        pass


def load_codes(pyz, write):
    # type: (Pyz, bool) -> None
    """Give `pyz` the code of its modules: from the cache, or compiled for it if that is possible.

    Raises ImportError if a source is missing or damaged: better now than within the work.
    """
    import marshal

    path, seal = cache_file(), seal_of(pyz)
    codes = cached(path, seal)
    if codes is not None:
        pyz.codes = codes
    elif write and can_keep(path):
        pyz.codes = collected(pyz)
        table = marshal.dumps(pyz.codes.table)
        size = len(table).to_bytes(4, "little")
        keep(path, b"".join((seal(table), size, table, pyz.codes.content)))
    else:
        for entry in MODULES:
            pyz.content_of(entry)


# ---- the start -----------------------------------------------------------------------


def restart_in_utf8():
    # type: () -> None
    """Start once more, in Python's UTF-8 mode, where the locale is of another encoding: names on
    disk are UTF-8 whatever the locale, and everything can be said.

    With -X utf8, which holds under -E and -I, too, and which other programs do not inherit.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    try:
        with open("/proc/self/cmdline", "rb") as stream:  # as it was typed, byte for byte
            words = stream.read().split(b"\0")[:-1]
        os.execv(sys.executable, words[:1] + [b"-X", b"utf8"] + words[1:])
    except (OSError, ValueError):  # without /proc it has to do as it is
        pass


def load(path, write):
    # type: (str, bool) -> Callable[[], int]
    """hfship's `main`; from here on its modules come from the memory of this process alone."""
    import importlib

    pyz = Pyz(path)
    load_codes(pyz, write)
    sys.meta_path.insert(0, pyz)
    # Tracebacks show lines of this file as well: not those of whatever has replaced it.
    for name in ("__main__", __name__):
        module = sys.modules[name]
        module.__loader__ = pyz  # type: ignore[assignment]  # a loader by its methods
        if module.__spec__ is not None:
            module.__spec__.loader = pyz  # type: ignore[assignment]
    main = importlib.import_module("hfship.commands.run").main  # type: Callable[[], int]
    return main


def require_standard_library(exc):
    # type: (Exception) -> None
    """End if `exc` says that a module of Python itself is missing, as in a distribution's minimal
    Python."""
    missing = getattr(exc, "name", None) or "hfship"
    if isinstance(exc, ImportError) and missing.split(".")[0] not in ("hfship",) + VENDORED:
        next_step = "install Python's whole standard library"
        fail(9, "this Python lacks the module %s" % missing, str(exc), next_step)


def run():
    # type: () -> int
    """Start hfship; the result is the exit code."""
    check_python()
    gc.disable()  # until a command runs: what is imported stays
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until hfship runs, Ctrl-C ends this without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    restart_in_utf8()
    path = os.path.dirname(os.path.abspath(__file__))
    write = not sys.dont_write_bytecode
    shut_out_host()
    try:
        main = load(path, write)
    except Exception as exc:  # noqa: BLE001 - damage can look like anything
        require_standard_library(exc)
        why = "%s: %s" % (type(exc).__name__, exc)
        next_step = "compare its SHA-256 with the published one and copy it again"
        fail(6, "%s is damaged" % path, why, next_step)
    try:
        return main()
    except ImportError as exc:
        require_standard_library(exc)
        raise
