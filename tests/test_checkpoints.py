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

from hfship.base import pickles
from hfship.base.checkpoints import look_for_pickles
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
    from hfship.base import checkpoints

    small = checkpoints._Look(pickles.Budget(unpacked=1 << 18))
    with pytest.raises(pickles.Unreadable, match="unpacks to more"):
        checkpoints._look(small, io.BufferedReader(io.BytesIO(content)), len(content), ".pt", 0)
