"""Pickles that are made to be read in two ways: what Python imports, the walk has found, or it says that it cannot read.

Programs of opcodes are drawn, mostly those that push texts, keep and fetch them in the memo, and import; and pickles that
Python wrote are changed. Both of Python's unpicklers run them, with an import that only writes down its name.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
from typing import Any, List

from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.conftest import fuzzed
from hfship.base.checkpoints import look_for_pickles
from hfship.base.pickles import ALLOWED

WORDS = (
    "builtins",
    "set",
    "collections",
    "OrderedDict",
    "os",
    "system",
    "torch",
    "Size",
    "x.y",
    "",
    "n\n",
)
PLAIN = b"(0)12NQR]}aesbtudl\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"


def _unicode(word: str) -> st.SearchStrategy[bytes]:
    text = word.encode()
    line = word.replace("\n", "\\u000a").encode()
    return st.sampled_from(
        [
            b"\x8c" + bytes([len(text)]) + text,
            b"X" + struct.pack("<I", len(text)) + text,
            b"\x8d" + struct.pack("<Q", len(text)) + text,
            b"V" + line + b"\n",
            b"U" + bytes([len(text)]) + text,
            b"S'" + b"".join(b"\\x%02x" % byte for byte in text) + b"'\n",
        ]
    )


numbers = st.integers(0, 4)
digits = st.sampled_from(
    ["%d", "0%d", " %d", "+%d", "%d ", "0_%d", "000000000000000000000%d", "-%d", "%d0"]
)
opcodes = st.one_of(
    st.sampled_from(WORDS).flatmap(_unicode),
    st.sampled_from([bytes([code]) for code in PLAIN]),
    st.builds(
        lambda code, number: code + bytes([number]), st.sampled_from([b"h", b"q", b"K"]), numbers
    ),
    st.builds(
        lambda code, number: code + struct.pack("<I", number),
        st.sampled_from([b"j", b"r"]),
        numbers,
    ),
    st.builds(
        lambda code, form, number: code + (form % number).encode() + b"\n",
        st.sampled_from([b"g", b"p"]),
        digits,
        numbers,
    ),
    st.builds(
        lambda code, module, name: code + f"{module}\n{name}\n".encode(),
        st.sampled_from([b"c", b"i"]),
        st.sampled_from(WORDS),
        st.sampled_from(WORDS),
    ),
    st.sampled_from(
        [
            b"\x95" + struct.pack("<Q", 4),
            b"\x82\x01",
            b"Px\n",
            b"B\x01\0\0\0x",
            b"I01\n",
            b"\x97",
            b"\x98",
        ]
    ),
)
programs = st.builds(
    lambda version, program: b"\x80" + bytes([version]) + b"".join(program) + b".",
    st.integers(0, 5),
    st.lists(opcodes, max_size=24),
)


class _Names:
    """What an unpickler imports, written down: nothing is imported, and what is called is harmless."""

    met: List[str]

    def find_class(self, module: str, name: str) -> Any:
        self.met.append(f"{module}.{name}")
        return list

    def persistent_load(self, _: Any) -> Any:
        return None


class _OfC(_Names, pickle.Unpickler):
    pass


class _OfPython(_Names, pickle._Unpickler):  # type: ignore[name-defined, misc]
    pass


def require_told(program: bytes) -> None:
    found = look_for_pickles(io.BufferedReader(io.BytesIO(program)), len(program), ".pkl")
    assert found
    for kind in (_OfC, _OfPython):
        unpickler = kind(io.BytesIO(program))
        unpickler.met = []
        with contextlib.suppress(Exception):  # most of them are no pickles
            unpickler.load()
        strange = {
            name for name in unpickler.met if tuple(name.rpartition(".")[::2]) not in ALLOWED
        }
        told = {name.encode("ascii").decode("unicode_escape") for name in found.imports}
        assert strange <= told or found.problem, (found.says(), strange)


@given(programs)
@example(b"\x80\x04\x8c\x08builtinsq\x01q\x010\x8c\x02os\x940h\x01\x8c\x03set\x93.")
@example(b"\x80\x04\x8c\x08builtinsp0\n0\x8c\x02osp1\n0g000000000000000000001\n\x8c\x03set\x93.")
@example(b"\x80\x00\x95\x04" + bytes(7) + b"cbuiltins\nset\n.")
@fuzzed(examples=400)
def test_what_a_program_imports_is_told(program: bytes) -> None:
    require_told(program)


WRITTEN = [
    pickle.dumps([{"a": {1, 2}, "b": ["c", b"d" * 300]}, "os", "os", complex(1, 2), dict], protocol)
    for protocol in range(6)
]


@given(
    st.sampled_from(WRITTEN),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from([b"", *(bytes([c]) for c in PLAIN), b"q\x00", b"h\x01"])), max_size=4),
)  # fmt: skip
@fuzzed(examples=150)
def test_what_a_changed_pickle_imports_is_told(content: bytes, changes: Any) -> None:
    for at, length, new in changes:
        content = content[:at] + new + content[at + length :]
    if b"r" not in content and b"j" not in content:  # large places of the memo are allocated
        require_told(content)
