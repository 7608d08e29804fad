# SPDX-License-Identifier: Apache-2.0
"""What each opcode leaves on the stack and in the memo of a walk; test_checkpoints.py has files."""

from __future__ import annotations

import io
from typing import Any, Dict, List, Sequence

import pytest

from hfship.base.pickles import Budget, Found, PickleWalk, Unreadable, found_of

Z = b"\x8c\x01z"  # a text that lies below, and is left there by all


def walked(program: bytes) -> PickleWalk:
    walk = PickleWalk(io.BytesIO(program), len(program), Budget())
    walk.one()
    return walk


@pytest.mark.parametrize(
    ("program", "left", "memo", "imports"),
    [
        (b"cos\nset\n.", ["z"], {}, ["os.set"]),
        (b"(ios\nset\n.", ["z"], {}, ["os.set"]),
        (b"(\x8c\x01aios\nset\n.", ["z"], {}, ["os.set"]),
        (b"\x8c\x02os\x8c\x03set\x93.", ["z"], {}, ["os.set"]),
        (
            b"\x8c\x02os\x8c\x03set\x930\x8c\x02io\x8c\x04open\x93.",
            ["z"],
            {},
            ["os.set", "io.open"],
        ),
        (b"cos\nset\n0cos\nset\n.", ["z"], {}, ["os.set"]),
        (b"\x82\x01.", ["z"], {}, ["copyreg.extension 1"]),
        (b"\x83\x01\x02.", ["z"], {}, ["copyreg.extension 513"]),
        (b"\x84\x01\x00\x00\x00.", ["z"], {}, ["copyreg.extension 1"]),
        (b"(\x8c\x01a1\x8c\x01b.", ["z"], {}, []),
        (b"(K\x01K\x02t.", ["z"], {}, []),
        (b"\x8c\x01a2.", ["z", "a"], {}, []),
        (b"\x8c\x01aq\x050h\x05.", ["z"], {5: "a"}, []),
        (b"\x8c\x01ar\x05\x00\x00\x000j\x05\x00\x00\x00.", ["z"], {5: "a"}, []),
        (b"\x8c\x01ap7\n0g7\n.", ["z"], {7: "a"}, []),
        (b"\x8c\x01a\x94\x8c\x01b\x94h\x00.", ["z", "a", "b"], {0: "a", 1: "b"}, []),
        (b"\x8c\x01aq\x00K\x01q\x00h\x00.", ["z", "a", None], {}, []),  # no text any more
        (
            b"\x8c\x02osq\x000\x8c\x03setq\x010h\x00h\x01\x93.",
            ["z"],
            {0: "os", 1: "set"},
            ["os.set"],
        ),
    ],
)
def test_what_an_opcode_does(
    program: bytes, left: List[Any], memo: Dict[int, str], imports: Sequence[str]
) -> None:
    walk = walked(Z + program)
    assert (walk.stack, walk.under, walk.memo) == (left, [], memo)
    assert found_of(walk) == Found(tuple(imports))


@pytest.mark.parametrize(
    "program",
    [
        b"K\x01\x8c\x03set\x93.",  # a name that is no text
        b"\x8c\x02osK\x01\x93.",
        b"\x8c\x03set\x93.",  # none
        b"0.",  # nothing to drop
        b"1.",  # no mark
        b"t.",
        b"gx\n.",
        b"g" + b"1" * 100 + b"\n.",
        b"K\x01",  # no end
        b"",
        b"\xff",
    ],
)
def test_what_cannot_be_read_is_told(program: bytes) -> None:
    with pytest.raises(Unreadable):
        walked(program)


@pytest.mark.parametrize(
    ("imports", "problem", "says"),
    [
        ([], "", "weights only"),
        ([], "it is cut", "cannot be read: it is cut"),
        (["a.b"], "", "imports a.b"),
        (["a.b", "c.d"], "it is cut", "imports a.b, c.d; cannot be read to its end: it is cut"),
        (list("abcde"), "", "imports a, b, c, d, e"),
        (list("abcdefg"), "", "imports a, b, c, d, e, and 2 more"),
    ],
)
def test_what_is_said_of_it(imports: List[str], problem: str, says: str) -> None:
    assert Found(tuple(imports), problem).says() == says
