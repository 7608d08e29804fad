"""What pickles would import, told without loading them: of real checkpoints, and of exploits."""

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from hfship.base import checkpoints, pickles
from hfship.base.checkpoints import PICKLE_SUFFIXES, look_for_pickles
from hfship.base.pickles import ALLOWED, Found
from support import torch_files


def look(content, suffix=".pkl"):
    """What is said of a file with this content; None where it has no pickles."""
    found = look_for_pickles(io.BufferedReader(io.BytesIO(content)), len(content), suffix)
    return found and found.says()


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory):
    """A folder of what torch writes, and what is said of each file."""
    folder = tmp_path_factory.mktemp("torch")
    return folder, torch_files.write_all(folder)


def test_what_torch_writes_is_read(of_torch):
    folder, said = of_torch
    wrong = {}
    for name, text in said.items():
        path = folder / name
        with path.open("rb") as stream:
            found = look_for_pickles(stream, path.stat().st_size, path.suffix)
        if not (found and found.says().startswith(text)):
            wrong[name] = found and found.says()
    assert not wrong
    assert len(said) > 20


def test_any_cut_of_what_torch_writes_is_told(of_torch):
    folder, _ = of_torch
    for name in ("zip2.pt", "old2.bin", "exploit.pt", "tar.pt", "tar_exploit.pt"):
        content = (folder / name).read_bytes()
        margin = 7000 if "tar" in name else 3000  # empty blocks
        for size in range(0, len(content) - 600, max(1, len(content) // 60)):
            said = look(content[:size], ".pt")
            # Bare numbers at the end of the older formats are not read.
            assert said is None or size > len(content) - margin or "cannot be read" in said, (
                name,
                size,
            )


def test_the_list_of_what_weights_import_is_that_of_torch(of_torch):
    theirs = set(json.loads((of_torch[0] / "allowed.json").read_text()))
    ours = {".".join(name) for name in ALLOWED}
    assert theirs <= ours
    others = [name for name in ours - theirs if not name.endswith(("Tensor", "Storage"))]
    assert sorted(others) == ["__builtin__.bytearray", "__builtin__.complex", "__builtin__.set"]


class Call:
    """An object that calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(word):
    """A push of a short text: SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(word)]) + word.encode()


P4 = b"\x80\x04"
RUN = b"(X\x04\x00\x00\x00trueR."  # what follows a function in an exploit; need not be right
EXPLOITS = {
    "os.system": (pickle.dumps(Call(os.system, "true"), 4), "imports posix.system"),
    "eval": (pickle.dumps(Call(eval, "1"), 2), "imports __builtin__.eval"),
    "exec in a list": (pickle.dumps([1, {"a": Call(exec, "1")}], 5), "imports builtins.exec"),
    "getattr": (pickle.dumps(Call(getattr, 1, "real")), "imports builtins.getattr"),
    "protocol 0": (b"cos\nsystem\n(S'true'\ntR.", "imports os.system"),
    "INST": (b"(S'true'\nios\nsystem\n.", "imports os.system"),
    "OBJ": (b"(cos\nsystem\nS'true'\no.", "imports os.system"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n)\x81.", "imports subprocess.Popen"),
    "a part of a module": (P4 + text("torch") + text("serialization.os.system") + b"\x93)R.",
                           "imports torch.serialization.os.system"),
    "names from the memo": (P4 + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93)R.",
                            "imports os.system"),
    "names doubled": (P4 + text("os") + b"2\x93)R.", "imports os.os"),
    "names behind a mark": (P4 + b"(" + text("os") + text("system") + b"\x93" + RUN[1:],
                            "imports os.system"),
    "a memo that is written over": (
        P4 + text("collections") + b"\x940" + text("os") + b"q\x000h\x00" + text("system") + b"\x93.",
        "imports os.system"),
    # Python's memo has one place for what is put twice: what follows without a number comes right behind it.
    "a memo that is counted wrong": (
        P4 + text("builtins") + b"q\x01q\x010" + text("os") + b"\x940" + b"h\x01" + text("set") + b"\x93.",
        "cannot be read: it numbers its memo in two ways"),
    "a memo with places left out": (
        P4 + text("os") + b"q\x050" + text("builtins") + b"\x940h\x01" + text("set") + b"\x93.",
        "cannot be read: it numbers its memo in two ways"),
    "a place of the memo with many digits": (
        P4 + text("builtins") + b"p0\n0" + text("os") + b"p1\n0g" + b"0" * 20 + b"1\n" + text("set") + b"\x93.",
        "cannot be read: a number of its memo is none"),
    "names with escapes": (b"\x80\x04V\\u006fs\nVsy\\u0073tem\n\x93.", "imports os.system"),
    "names in quotes with escapes": (b"S'\\x6fs'\nS'system'\n\x93.", "imports os.system"),
    "old texts": (b"\x80\x02U\x02osU\x06system\x93.", "imports os.system"),
    "an extension": (b"\x80\x02\x82\x07.", "imports copyreg.extension 7"),
    "an allowed name of another module": (P4 + text("builtins.x") + text("set") + b"\x93.",
                                          "imports builtins.x.set"),
    "a name with a line break": (P4 + text("o\ns") + text("a") + b"\x93.", r"imports o\ns.a"),
    "behind the first pickle": (pickle.dumps(1, 2) + pickle.dumps(Call(os.system, "x"), 2),
                                "imports posix.system"),
    "before a break": (b"cos\nsystem\n(S'true'\ntR\xff", "imports os.system; cannot be read to its"),
    "before a cut": (pickle.dumps(Call(os.system, "x" * 50), 4)[:-30], "imports posix.system; cannot"),
    "computed names": (P4 + b"cos\nname\n" + text("system") + b"\x93.",
                       "imports os.name; cannot be read to its end: it makes names"),
    "names from a tuple": (P4 + text("os") + b"\x85" + text("system") + b"\x93.",
                           "cannot be read: it makes names"),
    "torch.load in torch.load": (b"\x80\x02ctorch.storage\n_load_from_bytes\n" + RUN,
                                 "imports torch.storage._load_from_bytes"),
    "a name that goes on behind its frame": (b"\x80\x04\x95\x04" + bytes(7) + b"cbuiltins\nset\n.",
                                             "cannot be read: an opcode is not within its frame"),
    "a frame in a frame": (b"\x80\x04\x95\x20" + bytes(7) + b"\x95\x01" + bytes(7) + b"N.",
                           "cannot be read: a frame is longer"),
    "a second pickle in the frame of the first": (
        b"\x80\x04\x95\x10" + bytes(7) + b"N.cbuiltins\nset\n.cos\nsystem\n.", "cannot be read: a frame"),
    "runpy": (b"\x80\x02crunpy\n_run_code\n" + RUN, "imports runpy._run_code"),
    "pip": (b"\x80\x02cpip\nmain\n" + RUN, "imports pip.main"),
    "numpy": (b"\x80\x02cnumpy.testing._private.utils\nrunstring\n" + RUN, "imports numpy.testing"),
    "joblib": (b"\x80\x02cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}b" + b"\xff" * 40,
               "imports joblib.numpy_pickle.NumpyArrayWrapper; cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLOITS)
def test_exploits_are_named(name, monkeypatch):
    content, said = EXPLOITS[name]
    monkeypatch.setattr(os, "system", None)  # nothing is to be called
    for suffix in (".pkl", ".bin"):
        assert (look(content, suffix) or "").startswith(said)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_any_protocol(protocol):
    values = [1, -1, 2**70, 1.5, "a", "ä" * 300, b"b" * 300, None, True, (1, 2, 3, 4), [[]], {}, ()]
    assert look(pickle.dumps({"a": values, 2: values}, protocol)) == "weights only"


def test_every_opcode_is_walked_as_python_itself_does():
    """Random programs: what Python's own unpickler imports is found, or the file is not read."""
    import random

    random.seed(7)
    pushes = [
        text("os"),
        text("path"),
        b"K\x01",
        b"(",
        b"0",
        b"2",
        b"N",
        b"\x940",
        b"\x94",
        b"]",
        b"}",
    ]
    others = [
        b"\x85",
        b"\x86",
        b"t",
        b"h\x00",
        b"h\x01",
        b"q\x01",
        b"\x93",
        b"cos\ngetcwd\n",
        b"1",
        b"l",
    ]

    class Unpickler(pickle._Unpickler):
        def find_class(self, module, name):
            self.met.append(f"{module}.{name}")
            return list

    seen = 0
    for _ in range(4000):
        program = (
            b"\x80\x04" + b"".join(random.choices(pushes + others, k=random.randint(2, 14))) + b"."
        )
        unpickler = Unpickler(io.BytesIO(program))
        unpickler.met = []
        with contextlib.suppress(Exception):  # most of them are no pickles
            unpickler.load()
        found = look_for_pickles(io.BufferedReader(io.BytesIO(program)), len(program), ".pkl")
        seen += len(unpickler.met)
        for name in unpickler.met:
            assert name in found.imports or found.problem, program
    assert seen > 300


# -- what is made to cost memory or time, or to be read in two ways


def zipped(entries, **how):
    """A zip of some entries: name -> content."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **how) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


ONLY = pickle.dumps({"a": 1}, 2)
EVIL = pickle.dumps(Call(os.system, "true"), 2)
DEFLATED = {"compression": zipfile.ZIP_DEFLATED}


def flagged(content):
    """The zip with its entries marked as encrypted."""
    changed = bytearray(content)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        changed[changed.find(magic) + offset] |= 1
    return bytes(changed)


def array(descr, behind=b""):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + behind


def tar(*members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, kind in members:
            header = tarfile.TarInfo(name)
            header.size, header.type = len(content), kind
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


FILE = tarfile.REGTYPE
CASES = {
    "nothing": (b"", ".bin", None),
    "bare numbers": (b"\x00\x01\x02\x03" * 100, ".bin", None),
    "bare numbers that are called a pickle": (b"\x00\x01\x02\x03" * 100, ".pt", "cannot be read"),
    "GGUF": (b"GGUF" + b"\x03" * 100, ".bin", None),
    "text that is no pickle": (b"hello world\n" * 30, ".txt", None),
    "a pickle whatever it is called": (EVIL, ".txt", "imports posix.system"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 40, ".pkl", "cannot be read: it is compressed (gzip)"),
    "zlib": (b"x\x9c" + b"\0" * 40, ".joblib", "cannot be read: it is compressed (zlib)"),
    "a zip": (zipped([("a/data.pkl", ONLY), ("a/data/0", EVIL)]), ".bin", "weights only"),
    "a zip without pickles": (zipped([("a.txt", b"x")]), ".bin", None),
    "data/0 of another zip": (zipped([("a/data/0", EVIL)]), ".bin", "imports posix.system"),
    "packed": (zipped([("a/data.pkl", EVIL)], **DEFLATED), ".pt", "imports posix.system"),
    "one more pickle": (zipped([("a/data.pkl", ONLY), ("a/x", EVIL)]), ".pt", "imports posix.system"),
    "zip in zip": (zipped([("b.pt", zipped([("a/data.pkl", EVIL)]))]), ".pt", "imports posix.system"),
    "zip packed in zip": (zipped([("b", zipped([("a", ONLY)]))], **DEFLATED), ".pt", "cannot be read"),
    "zips without end": (
        zipped([("1", zipped([("2", zipped([("3", zipped([("4", EVIL)]))]))]))]), ".pt",
        "cannot be read: it has more than 3 zips in each other"),
    "two names": (zipped([("a/data.pkl", ONLY), ("A/data.pkl", ONLY)]), ".pt", "cannot be read: two"),
    "two names in one place": (
        zipped([("a/data.pkl", EVIL)]).replace(b"a/data.pkl", b"a/data.txt", 1), ".pt",
        "cannot be read: BadZipFile"),
    "encrypted": (flagged(zipped([("a/data.pkl", EVIL)])), ".pt", "cannot be read: an entry"),
    "a wrong sum": (
        zipped([("a/data.pkl", ONLY + b"0" * 90)], **DEFLATED).replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x63\0"),
        ".pt", "cannot be read"),
    "without its end": (zipped([("a/data.pkl", EVIL)])[:-30], ".pt", "cannot be read: it is a zip"),
    "numbers": (array("'<f4'", b"\0" * 4), ".npy", None),
    "objects": (array("'|O'", EVIL), ".npy", "imports posix.system"),
    "objects in a table": (array("[('a', '|O')]", EVIL), ".npy", "imports posix.system"),
    "a cut array": (array("'|O'")[:20], ".npy", "cannot be read: the header"),
    "objects in npz": (zipped([("a.npy", array("'|O'", EVIL))]), ".npz", "imports posix.system"),
    "a tar of torch": (tar(("pickle", EVIL, FILE)), ".pt", "imports posix.system"),
    "another tar": (tar(("readme", b"x", FILE)), ".pt", "cannot be read: it is a tar, and no"),
    "a tar with links": (tar(("pickle", b"", tarfile.SYMTYPE)), ".pt", "cannot be read: it is a tar"),
    "a cut tar": (tar(("pickle", b"x" * 9000, FILE))[:2000], ".pt", "cannot be read: it is a tar that"),
    "4 GB of bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 4 << 30) + b"x." * 9, ".pt", "cannot be read"),
    "negative bytes": (b"\x80\x02T\xff\xff\xff\xff.", ".pt", "cannot be read"),
    "a long name": (b"c" + b"a" * 300 + b"\nb\n.", ".pt", "cannot be read: it imports a name that"),
    "a name without end": (b"c" + b"a" * 200_000, ".pt", "cannot be read: it is cut"),
    "a line without end": (b"I" + b"1" * 200_000 + b"\n.", ".pt", "weights only"),
    "no memo": (b"pX\n.", ".pt", "cannot be read"),
    "values that are not there": (b"\x80\x02a.", ".pt", "cannot be read: it takes more values"),
    "a mark that is not there": (b"\x80\x02t.", ".pt", "cannot be read: it takes more values"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x5d\0\0", "lzma"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        *((b"\x78" + level, "zlib") for level in (b"\x01", b"\x5e", b"\x9c", b"\xda")),
    ],
)
def test_what_is_compressed_is_told(head, name):
    assert look(head + bytes(40)) == f"cannot be read: it is compressed ({name})"


# kind of a storage of torch before 1.6 -> bytes of its elements
WIDTHS = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool"), 1),
    "ComplexDouble": 16,
}


def storage(kind, elements=3, module="torch"):
    """A storage as torch.save wrote it: a pickle that names its kind, how many, and their bytes,
    which are no pickles."""
    numbers = b"\xff" * (elements * WIDTHS[kind])
    named = f"c{module}\n{kind}Storage\n.".encode()
    return named + struct.pack("<Q", elements) + numbers


def old_tar(storages=b"", tensors=b"", pickled=None):
    """A checkpoint of torch before 1.6."""
    members = [
        ("storages", pickle.dumps(1, 2) + storages),
        ("tensors", pickle.dumps(1, 2) + tensors),
    ]
    return tar(
        *((name, content, FILE) for name, content in [*members, ("pickle", pickled or ONLY)])
    )


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("elements", [0, 1, 7])
def test_numbers_between_old_pickles_are_passed_over(kind, elements):
    content = storage(kind, elements) + storage("Byte", 2)
    assert look(old_tar(content), ".pt") == "weights only"
    assert look(old_tar(content + EVIL), ".pt") == "imports posix.system"
    assert look(old_tar(content + pickle.dumps([], 2) + b"\xff" * 9), ".pt") == "weights only"


@pytest.mark.parametrize("dimensions", [0, 1, 4])
def test_shapes_between_old_pickles_are_passed_over(dimensions):
    # how many dimensions, as 4 bytes and 4 more; then sizes, strides, and where it begins
    tensor = (
        pickle.dumps(1, 2) + struct.pack("<I", dimensions) + b"\xff" * (4 + 16 * dimensions + 8)
    )
    assert look(old_tar(tensors=tensor + tensor), ".pt") == "weights only"
    assert look(old_tar(tensors=tensor + EVIL + b"\0" * 16), ".pt") == "imports posix.system"


def test_a_storage_of_another_module_has_no_numbers_behind_it():
    strange = storage("Float", module="os")
    assert look(old_tar(strange), ".pt").startswith("imports os.FloatStorage")


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_told(name):
    content, suffix, said = CASES[name]
    found = look(content, suffix)
    assert (found is None) if said is None else (found or "").startswith(said)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("marks", b"\x80\x02" + b"(" * 100_000),
        ("values", b"\x80\x02" + b"N" * 200_000),
        ("memo", b"\x80\x04" + b"".join(text(f"{n}") + b"\x940" for n in range(20_000)) + b"N."),
        ("names", b"".join(b"ca\nb%d\n" % n for n in range(10_000)) + b"."),
    ],
)
def test_memory_is_bounded(name, content, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_VALUES", 1 << 16)
    monkeypatch.setattr(pickles, "MOST_TEXTS", 1 << 10)
    stream = io.BufferedReader(io.BytesIO(content))
    tracemalloc.start()
    found = look_for_pickles(stream, len(content), ".pkl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20
    assert name == "memo" or "more than" in found.problem
    assert len(found.imports) <= pickles.MOST_IMPORTS


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_OPCODES", 1000)
    budget = pickles.Budget(1000)
    walk = pickles.PickleWalk(io.BufferedReader(io.BytesIO(b"N" * 5000)), 5000, budget)
    with pytest.raises(pickles.Unreadable, match="more than 1,000 opcodes"):
        walk.one()
    assert budget.opcodes == 0


def test_4_gb_that_are_there_are_passed_over(tmp_path):
    path = tmp_path / "large.pkl"
    with path.open("wb") as stream:
        stream.write(b"\x80\x04\x8e" + struct.pack("<Q", 5 << 30))
        stream.seek(5 << 30, 1)
        stream.write(b"cos\nsystem\n.")
    with path.open("rb") as stream:
        found = look_for_pickles(stream, path.stat().st_size, ".pkl")
    assert found == Found(("os.system",))


def test_a_bomb_is_not_unpacked():
    content = zipped([("a/data.pkl", b"\x80\x02" + b"N" * 300_000 + b".")], **DEFLATED)
    small = checkpoints._Look(pickles.Budget(unpacked=1 << 18))
    with pytest.raises(pickles.Unreadable, match="unpacks to more"):
        checkpoints._look(small, io.BufferedReader(io.BytesIO(content)), len(content), ".pt", 0)


def zip64(content, entries, size, record_at=None, magic=b"PK\x06\x06"):
    """A zip with an end in 64 bits before its end, which says how many entries there are."""
    at = content.rfind(b"PK\x05\x06")
    record = magic + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, entries, entries, size, 0)
    where = at if record_at is None else record_at
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, where, 1)
    return content[:at] + record + locator + content[at:]


@pytest.mark.parametrize(
    ("entries", "size", "changed", "said"),
    [
        (2, 120, {}, "imports"),
        (3, 1000, {}, "imports"),
        (4, 120, {}, "cannot be read: it is a zip of 4 entries"),
        (1 << 40, 120, {}, "cannot be read: it is a zip of 1,099,511,627,776 entries"),
        (2, 1001, {}, "cannot be read: it is a zip of 2 entries"),
        (2, 1 << 40, {}, "cannot be read: it is a zip of 2 entries"),
        (2, 120, {"record_at": 1}, "cannot be read: it is a zip whose end is not where it says"),
        (2, 120, {"record_at": 1 << 60}, "cannot be read: it is a zip whose end is not where"),
        (2, 120, {"magic": b"PK\x06\x05"}, "cannot be read: it is a zip whose end is not where"),
    ],
)
def test_the_directory_of_a_large_zip_is_looked_at_before_it_is_read(
    entries, size, changed, said, monkeypatch
):
    monkeypatch.setattr(checkpoints, "MOST_ENTRIES", 3)
    monkeypatch.setattr(checkpoints, "LARGEST_DIRECTORY", 1000)
    content = zipped([("a", EVIL), ("b", ONLY)])
    directory = checkpoints._directory_of(io.BytesIO(content), len(content))
    assert (directory.entries, directory.size) == (
        2,
        content.rfind(b"PK\x05\x06") - content.find(b"PK\x01\x02"),
    )
    found = look(zip64(content, entries, size, **changed), ".pt")
    assert found.startswith(said) or (said == "imports" and "BadZipFile" in found), found


@pytest.mark.parametrize(("most", "largest"), [(2, 1000), (1, 1000), (2, 93), (2, 94)])
def test_a_zip_has_no_more_entries_than_can_be_looked_at(most, largest, monkeypatch):
    """Two entries, of 47 bytes each in the directory."""
    monkeypatch.setattr(checkpoints, "MOST_ENTRIES", most)
    monkeypatch.setattr(checkpoints, "LARGEST_DIRECTORY", largest)
    found = look(zipped([("a", ONLY), ("b", ONLY)], **DEFLATED), ".pt")
    is_refused = most < 2 or largest < 94
    assert found == ("cannot be read: it is a zip of 2 entries" if is_refused else "weights only")


def test_a_comment_behind_a_zip_is_passed_over():
    for size in (1, 0xFFFF):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a", EVIL)
            archive.comment = b"c" * size
        assert look(stream.getvalue(), ".pt") == "imports posix.system"


def stored(name, content, extra=b"", size=None):
    """A zip of one entry that is stored as it is, with something behind its name."""
    stream = io.BytesIO()
    entry = zipfile.ZipInfo(name)
    entry.extra = extra
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(entry, content)
        if size is not None:
            entry.file_size = size
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "extra"), [("a", 0), ("a" * 300, 0), ("a", 300), ("a" * 600, 900)]
)
def test_an_entry_lies_behind_its_name_and_what_follows_that(name, extra):
    behind = b"\xfe\xca" + struct.pack("<H", extra) + b"\x80" * extra if extra else b""
    assert look(stored(name, EVIL, behind), ".pt") == "imports posix.system"


def test_an_entry_of_two_sizes_is_not_read():
    content = stored("a", EVIL, size=len(EVIL) + 1)
    assert look(content, ".pt").startswith("cannot be read: an entry of the zip has two sizes")


def test_code_in_a_zip_is_named_and_folders_are_none():
    entries = [
        ("a/", b""),
        ("a/x.PY", EVIL),
        ("\u00e9\n" + "y" * 200 + ".py", b"import os"),
        ("a/data.pkl", ONLY),
        ("z.pkl", EVIL),
    ]
    found = look_for_pickles(io.BytesIO(zipped(entries)), len(zipped(entries)), ".mar")
    named = "\\xe9\\n" + "y" * 94
    assert found.imports == ("code in a/x.PY", f"code in {named}", "posix.system")
    assert look(zipped([("b.pyc", b"x"), ("c.py.txt", b"x")]), ".pt") is None


@pytest.mark.parametrize(
    ("name", "is_storage"),
    [
        ("a/data/0", True),
        ("a/constants/17", True),
        ("data/0", True),
        ("a/data/0x", False),
        ("a/data/x", False),
        ("a/b/data/0", False),
        ("a/xdata/0", False),
    ],
)
def test_storages_lie_beside_the_pickle_of_torch(name, is_storage):
    """And are bare numbers; elsewhere anything may be a pickle."""
    for beside in ("a/data.pkl", "a/constants.pkl", "data.pkl"):
        said = look(zipped([(beside, ONLY), (name, EVIL)]), ".pt")
        assert said == ("weights only" if is_storage else "imports posix.system")
    for beside in ("a/b/data.pkl", "a/data.pkl.x", "a/mydata.pkl"):
        assert look(zipped([(beside, ONLY), (name, EVIL)]), ".pt") == "imports posix.system"


def numpy_array(version, behind):
    """An array of objects, whose header has its length in two bytes or, since version 2, in four."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(header)) + header + behind


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_array_of_objects_has_a_pickle_behind_its_header(version):
    assert look(numpy_array(version, ONLY), ".npy") == "weights only"
    assert look(numpy_array(version, EVIL), ".npy") == "imports posix.system"
    broken = look(numpy_array(version, b"cos\nsystem\n\xff"), ".npy")
    assert broken.startswith("imports os.system; cannot be read")
    assert look(numpy_array(version, b""), ".npy").startswith("cannot be read")


@pytest.mark.parametrize("descr", ["'O'", "'<O8'", "'|O'", '">O"', "'=O'"])
def test_objects_have_several_names(descr):
    assert look(array(descr, EVIL), ".npy") == "imports posix.system"
    assert look(array(f"[('o', {descr})]", EVIL), ".npy") == "imports posix.system"


def test_objects_are_no_part_of_another_name():
    assert look(array("[('Os', '<f4'), ('xO', '<i8')]", EVIL), ".npy") is None


@pytest.mark.parametrize("suffix", sorted(PICKLE_SUFFIXES))
def test_what_is_called_as_pickles_are_is_looked_into(suffix):
    """Also where it does not begin as they do today."""
    assert look(b"cos\nsystem\n.", suffix) == "imports os.system"
    assert look(b"cos\nsystem\n.", suffix + "x") is None
    assert look(b"", suffix) is None


@pytest.mark.parametrize(
    "head", [b"GGUF", b"ggml", b"lmgg", b"ggjt", b"tjgg", b"fmgg", b"\x89HDF\r\n", b"ONNX"]
)
def test_what_is_no_pickle_is_told_by_its_head(head):
    assert look(head + b"cos\nsystem\n.", ".bin") is None
    assert look(b"\0" + head, ".pt").startswith("cannot be read")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x04\xff", "cannot be read"),
        (b"\x80\x02\xff", "cannot be read"),
        (b"\x80\x05\xff", "cannot be read"),
        (b"\x80\x06\xff", None),
        (b"\x80\x01\xff", None),
        (b"PK\x03\x04", "cannot be read"),
        (b"\x1f\x8b\x08", "cannot be read"),
        (b"\x00\x01\x02\x03", None),
    ],
)
def test_a_bin_that_cannot_be_read_is_bare_numbers_if_nothing_says_otherwise(content, said):
    found = look(content, ".bin")
    assert (found or "").startswith(said or "") and (found is None) == (said is None)


def test_what_is_found_first_is_told():
    two = zipped([("a.pkl", EVIL), ("b.pkl", b"\x80\x02\xff"), ("c.pkl", b"x")])
    assert look(two, ".pt").startswith("imports posix.system; cannot be read to its end")
    seven = b"".join(pickle.dumps(number, 2) for number in range(7))
    assert look(seven + EVIL, ".pkl") == "imports posix.system"
    assert look(seven + b"\xff", ".pkl").startswith("cannot be read: behind its first 7: ")
    assert "behind" not in look(b"\x80\x02\xff", ".pkl")


def with_header(content, **fields):
    """The first member of a tar with other bytes in its header."""
    places = {"kind": slice(156, 157), "size": slice(124, 136)}
    changed = bytearray(content)
    for name, value in fields.items():
        changed[places[name]] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "imports posix.system"),
        ({"kind": b"\0"}, "imports posix.system"),
        ({"kind": b"5"}, "cannot be read: it is a tar with more than plain files"),
        ({"kind": b"L"}, "cannot be read: it is a tar with more than plain files"),
        ({"size": b"x" * 12}, "cannot be read: it is a tar with a size that is no number"),
        ({"size": b"\0" * 12}, "imports posix.system; cannot be read to its end: it is cut"),
        ({"size": b"77777777777\0"}, "cannot be read: it is a tar that is cut"),
    ],
)
def test_the_header_of_a_member_is_believed_where_it_can_be(fields, said):
    content = tar(("pickle", EVIL, FILE), ("tensors", b"", FILE))
    found = look(with_header(content, **fields), ".pt")
    assert found.startswith(said), found


def test_a_tar_is_read_to_its_end_and_members_to_theirs():
    """Behind the pickle of a member may lie anything that nobody loads."""
    beside = (("readme", b"x" * 512, FILE), ("sys_info", ONLY + b"\xff" * 9, FILE))
    assert look(tar(("pickle", ONLY + b"\xff" * 9, FILE), *beside), ".pt") == "weights only"
    assert look(tar(*beside, ("pickle", EVIL, FILE)), ".pt") == "imports posix.system"
    of_system = tar(("pickle", ONLY, FILE), ("sys_info", EVIL, FILE))
    assert look(of_system, ".pt") == "imports posix.system"
    broken = tar(("pickle", b"cos\nsystem\n\xff", FILE))
    assert look(broken, ".pt").startswith("imports os.system; cannot be read")
    whole = tar(("pickle", ONLY, FILE))
    ends = whole.find(ONLY) + len(ONLY)
    for size in (ends, 1024):
        assert look(whole[:size], ".pt") == "cannot be read: it is a tar that is cut"
    assert look(tar(*[("x", b"", FILE)] * 99, ("pickle", ONLY, FILE)), ".pt").endswith("is cut")
    assert look(tar(*[("x", b"", FILE)] * 98, ("pickle", ONLY, FILE)), ".pt") == "weights only"


def test_the_kind_of_a_storage_may_stand_behind_other_names():
    """And is one of torch, with a name that ends as storages do."""
    other = b"(ccollections\nOrderedDict\n" + storage("Float", 1)[: -len(struct.pack("<Q", 1)) - 4]
    listed = other[:-1] + b"l." + struct.pack("<Q", 1) + b"\xff" * 4
    assert look(old_tar(listed + EVIL), ".pt") == "imports posix.system"
    short = b"ctorch\nFloat\n." + b"\xff" * 20
    assert look(old_tar(short), ".pt") == "imports torch.Float"


def test_a_window_is_a_file_of_its_own():
    window = checkpoints._Window(io.BytesIO(b"0123456789"), 2, 5)
    assert window.readable() and window.seekable()
    assert window.read() == b"23456" and window.read() == b""
    for arguments, at, rest in [
        ((1,), 1, b"3456"),
        ((0, 0), 0, b"23456"),
        ((-2, 2), 3, b"56"),
        ((9,), 9, b""),
        ((-20, 2), 0, b"23456"),
    ]:
        assert window.seek(*arguments) == at
        assert window.read() == rest
    window.seek(1)
    assert window.read(2) == b"34" and window.seek(-1, 1) == 2 and window.read(1) == b"4"
