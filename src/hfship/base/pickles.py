# SPDX-License-Identifier: Apache-2.0
"""What a pickle would import, read without loading it.

Owns a walk over the opcodes of pickles (Python's pickletools describes them), which keeps of the
machine that they drive only what tells the names of imports: texts, the memo and the marks. Names
that weights need are on a list; all others are reported. The list is that of torch's own loader
for weights (torch/_weights_only_unpickler.py, torch 2.13).

Promises: nothing is imported, called or built; memory and time are bounded whatever the file says:
an argument of 4 GB is passed over, not read. A name that is not written down in the pickle, but
made while it is loaded, makes it one that cannot be read. Never: calls a pickle safe.
"""

from __future__ import annotations

import codecs
import pickletools
import sys
from typing import BinaryIO, Callable, Dict, FrozenSet, Iterator, List, Optional, Tuple

from hfship.base.values import dataclass

MOST_OPCODES = (
    30_000_000  # of a file: the vocabulary of a tokenizer has a million, and half a minute
)
MOST_VALUES = 1 << 22  # on the stack of a pickle at a time
MOST_TEXTS = 1 << 17  # that the memo is asked for
MOST_IMPORTS = 100  # that are named
LONGEST_NAME = 200  # characters of a module, or of what is imported of it
MOST_MARKS = 1 << 16  # in each other
_LONGEST_NUMBER = 20  # digits of a place in the memo
_LONGEST_LINE = 1 << 16  # bytes of a line that is kept; longer ones are passed over
_NO_FRAME = sys.maxsize
_TOO_LONG = b"." * (LONGEST_NAME + 1)  # stands for an argument that is too long for a name

_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")[:10]  # 0x1950a86a20f9469cfc6c of torch/serialization
TORCH_PICKLES = 5  # of torch's format before 1.6, in front of its storages

_KINDS = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat"
_TENSORS = [f"{kind}{what}" for kind in _KINDS.split() for what in ("Storage", "Tensor")]
_OF_TORCH = """
    QInt32Storage QInt8Storage QUInt2x4Storage QUInt4x2Storage QUInt8Storage Size Tensor device
    _tensor._rebuild_from_type_v2 _utils._rebuild_device_tensor_from_cpu_tensor
    _utils._rebuild_device_tensor_from_numpy _utils._rebuild_meta_tensor_no_storage
    _utils._rebuild_nested_tensor _utils._rebuild_parameter
    _utils._rebuild_parameter_with_state _utils._rebuild_qtensor _utils._rebuild_sparse_tensor
    _utils._rebuild_tensor _utils._rebuild_tensor_v2 _utils._rebuild_tensor_v3
    _utils._rebuild_wrapper_subclass nn.parameter.Parameter serialization._get_layout
    storage.TypedStorage storage.UntypedStorage per_channel_affine
    per_channel_affine_float_qparams per_channel_symmetric per_tensor_affine per_tensor_symmetric
    bfloat16 bits16 bits1x8 bits2x4 bits4x2 bits8 bool complex128 complex32 complex64 float16
    float32 float4_e2m1fn_x2 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
    float8_e8m0fnu int1 int2 int3 int4 int5 int6 int7 int8 int16 int32 int64 qint32 qint8
    quint2x4 quint4x2 quint8 uint1 uint2 uint3 uint4 uint5 uint6 uint7 uint8 uint16 uint32 uint64
"""
_OTHERS = """
    _codecs.encode collections.Counter collections.OrderedDict
    builtins.bytearray builtins.complex builtins.set
    __builtin__.bytearray __builtin__.complex __builtin__.set
"""


def _allowed() -> Iterator[Tuple[str, str]]:
    """What weights import, as (module, name)."""
    names = [*_OTHERS.split(), *(f"torch.{name}" for name in _OF_TORCH.split())]
    for device in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"):
        names += [f"{device}.{name}" for name in _TENSORS]
    for name in names:
        module, _, attribute = name.rpartition(".")
        yield module, attribute


ALLOWED: FrozenSet[Tuple[str, str]] = frozenset(_allowed())


class Unreadable(ValueError):
    """Why a pickle, or what it lies in, cannot be read, for people."""


@dataclass(frozen=True)
class Found:
    """What was found of pickles: imports that are not those of weights, in the order of the file,
    and why they could not be read to their end ("": they were)."""

    imports: Tuple[str, ...] = ()
    problem: str = ""

    def says(self) -> str:
        """`weights only`, `imports NAME, ...`, `cannot be read: WHY`, or the last two.

        >>> Found().says(), Found(("os.system",), "it is cut").says()
        ('weights only', 'imports os.system; cannot be read to its end: it is cut')
        """
        if not self.imports and not self.problem:
            return "weights only"
        if not self.imports:
            return f"cannot be read: {self.problem}"
        shown = list(self.imports[:5])
        if len(self.imports) > len(shown):
            shown.append(f"and {len(self.imports) - len(shown)} more")
        text = "imports " + ", ".join(shown)
        if self.problem:
            text += f"; cannot be read to its end: {self.problem}"
        return text


@dataclass
class Budget:
    """What is left for a file, whatever lies in it: opcodes, and bytes that are unpacked."""

    opcodes: int = MOST_OPCODES
    unpacked: int = 2 << 30


# -- opcodes


@dataclass(frozen=True)
class _Step:
    """An opcode: `size` are the bytes of its argument, or as pickletools tells that these vary;
    how many values it takes from the stack, also those down to a mark, and leaves there."""

    name: str
    size: int
    pops: int
    to_mark: bool
    pushed: Tuple[None, ...]
    act: Callable[[PickleWalk, _Step, bytes], None]


def _generic(walk: PickleWalk, step: _Step, _: bytes) -> None:
    """An opcode that has nothing to do with names."""
    if step.to_mark:
        walk.pop_mark()
    stack = walk.stack
    if step.pops:
        if len(stack) < step.pops:
            raise Unreadable("it takes more values than there are")
        del stack[-step.pops :]
    stack.extend(step.pushed)


def _push_text(walk: PickleWalk, step: _Step, argument: bytes) -> None:
    text = _text_of(step.name, argument)
    walk.stack.append(text)


def _text_of(opcode: str, argument: bytes) -> Optional[str]:
    """A text that may be a name; None for one that is too long for it, or no text."""
    try:
        if opcode == "STRING":
            argument = codecs.escape_decode(argument.strip()[1:-1])[0]
            text = argument.decode("latin-1")
        elif opcode == "UNICODE":
            text = argument.decode("raw-unicode-escape")
        elif "UNICODE" in opcode:
            text = argument.decode("utf-8", "surrogatepass")
        else:
            text = argument.decode("latin-1")
    except ValueError:
        return None
    if len(text) > LONGEST_NAME:
        return None
    return text


def _mark(walk: PickleWalk, _: _Step, __: bytes) -> None:
    walk.under.append(walk.stack)
    values = len(walk.stack)
    walk.values_under += values + 1
    walk.stack = []
    walk.require_bounds()


def _pop(walk: PickleWalk, _: _Step, __: bytes) -> None:
    if walk.stack:
        walk.stack.pop()
    else:
        walk.pop_mark()


def _dup(walk: PickleWalk, _: _Step, __: bytes) -> None:
    value = walk.top()
    walk.stack.append(value)


def _put(walk: PickleWalk, step: _Step, argument: bytes) -> None:
    number = _memo_number(step, argument)
    if step.name == "MEMOIZE":
        number = walk.next_in_memo()
    else:
        walk.note_number(number)
    walk.memo_size += 1
    text = walk.top()
    if text is None or len(walk.memo) >= MOST_TEXTS:
        walk.memo.pop(number, None)
    else:
        walk.memo[number] = text


def _get(walk: PickleWalk, step: _Step, argument: bytes) -> None:
    number = _memo_number(step, argument)
    text = walk.memo.get(number)
    walk.stack.append(text)


def _memo_number(step: _Step, argument: bytes) -> int:
    if step.size != pickletools.UP_TO_NEWLINE:
        return int.from_bytes(argument, "little")
    if not argument.isdigit() or len(argument) > _LONGEST_NUMBER:
        raise Unreadable("a number of its memo is none")
    return int(argument)


def _global(walk: PickleWalk, step: _Step, argument: bytes) -> None:
    line = walk.line()
    if step.name == "INST":
        walk.pop_mark()

    module = argument.decode("utf-8", "replace")
    name = line.decode("utf-8", "replace")
    walk.imported(module, name)
    walk.stack.append(None)


def _stack_global(walk: PickleWalk, _: _Step, __: bytes) -> None:
    name = walk.top()
    module = walk.top(below=1)
    if name is None or module is None:
        raise Unreadable("it makes names of imports while it is loaded")

    del walk.stack[-2:]
    walk.imported(module, name)
    walk.stack.append(None)


def _extension(walk: PickleWalk, _: _Step, argument: bytes) -> None:
    number = int.from_bytes(argument, "little")
    name = f"extension {number}"
    walk.imported("copyreg", name)
    walk.stack.append(None)


def _frame(walk: PickleWalk, _: _Step, argument: bytes) -> None:
    length = int.from_bytes(argument, "little")
    walk.begin_frame(length)


def _whole_number(walk: PickleWalk, _: _Step, argument: bytes) -> None:
    if argument == _MAGIC:
        walk.is_torch = True
    walk.stack.append(None)


_ACTS: Dict[str, Callable[[PickleWalk, _Step, bytes], None]] = {
    "MARK": _mark,
    "POP": _pop,
    "DUP": _dup,
    "GLOBAL": _global,
    "INST": _global,
    "STACK_GLOBAL": _stack_global,
    "FRAME": _frame,
    "LONG1": _whole_number,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push_text),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push_text),
}
# Bytes of the length in front of an argument, by what pickletools calls it.
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _step_of(opcode: pickletools.OpcodeInfo) -> _Step:
    """What an opcode does to the stack, from pickletools' description of it."""
    size = 0
    if opcode.arg:
        size = opcode.arg.n

    before = list(opcode.stack_before)
    mark = pickletools.markobject
    to_mark = mark in before
    if to_mark:
        at = before.index(mark)
        before = before[:at]
    pushed = tuple(None for _ in opcode.stack_after)
    act = _ACTS.get(opcode.name, _generic)
    return _Step(opcode.name, size, len(before), to_mark, pushed, act)


_STEPS: Dict[bytes, _Step] = {
    opcode.code.encode("latin-1"): _step_of(opcode) for opcode in pickletools.opcodes
}


# -- the walk


class PickleWalk:
    """The walk over one pickle after another of a stream, which has `size` bytes."""

    def __init__(self, stream: BinaryIO, size: int, budget: Budget) -> None:
        self._stream = stream
        self._size = size
        self._budget = budget
        self.stack: List[Optional[str]] = []  # since the last mark; None: no text
        self.under: List[List[Optional[str]]] = []  # what is below each mark
        self.values_under = 0
        self.memo: Dict[int, str] = {}  # the texts in it
        self.memo_size = 0
        self.memo_in_order = True  # each place was given once, in order
        self.is_torch = False  # torch's format before 1.6
        self.names: Dict[Tuple[str, str], None] = {}  # all imports, in their order
        self.latest: List[Tuple[str, str]] = []  # those of the last pickle
        self._done = 0  # bytes of this pickle that were passed
        self._frame_stop = _NO_FRAME  # and what they are where its frame ends

    def one(self) -> None:
        """Walk over one pickle. Raises Unreadable."""
        self.stack, self.under, self.memo = [], [], {}
        self.values_under = self.memo_size = self._done = 0
        self.memo_in_order = True
        self.latest = []
        self._frame_stop = _NO_FRAME
        read = self._stream.read
        left = self._budget.opcodes
        try:
            for number in range(left):
                left -= 1
                step = _STEPS.get(read(1))
                self._done += 1
                if step is None:
                    raise Unreadable(self._no_opcode())
                argument = b""
                if step.size:
                    argument = self._argument(step)
                step.act(self, step, argument)
                if self._done >= self._frame_stop:
                    self._end_frame()
                if step.name == "STOP":
                    self._require_no_frame()
                    return
                if not number & 0xFFFF:
                    self.require_bounds()
        finally:
            self._budget.opcodes = left
        raise Unreadable(f"it has more than {MOST_OPCODES:,} opcodes")

    def imported(self, module: str, name: str) -> None:
        """Note an import."""
        if len(module) > LONGEST_NAME or len(name) > LONGEST_NAME:
            raise Unreadable("it imports a name that is too long for one")
        found = (module, name)
        if found in self.names:
            if found not in self.latest:
                self.latest.append(found)
            return

        most = MOST_IMPORTS + len(ALLOWED)
        if len(self.names) >= most:
            raise Unreadable(f"it imports more than {MOST_IMPORTS} things")
        self.names[found] = None
        self.latest.append(found)

    def top(self, below: int = 0) -> Optional[str]:
        """The value on top of the stack, or so many below it. Raises Unreadable."""
        if len(self.stack) <= below:
            raise Unreadable("it takes more values than there are")
        at = -1 - below
        return self.stack[at]

    def begin_frame(self, length: int) -> None:
        """Begin a frame of so many bytes, as a whole read at once by whoever loads the pickle.
        Raises Unreadable within another one."""
        self._require_no_frame()
        self._frame_stop = self._done + length

    def _end_frame(self) -> None:
        """Raise Unreadable for an opcode that goes on behind the frame it began in: Python's C code
        forgets its first bytes then, and takes other names from what follows."""
        if self._done > self._frame_stop:
            raise Unreadable("an opcode is not within its frame")
        self._frame_stop = _NO_FRAME

    def _require_no_frame(self) -> None:
        if self._frame_stop != _NO_FRAME:
            raise Unreadable("a frame is longer than what it holds")

    def note_number(self, number: int) -> None:
        """Note a place of the memo that is given by its number."""
        if number != self.memo_size:
            self.memo_in_order = False

    def next_in_memo(self) -> int:
        """The place of the memo that is given without a number: as Python has it, how many there
        are. Raises Unreadable behind numbers that were not in order, which no pickler mixes: how
        many of them were the same is not kept."""
        if not self.memo_in_order:
            raise Unreadable("it numbers its memo in two ways")
        return self.memo_size

    def pop_mark(self) -> None:
        """Forget what is above the last mark. Raises Unreadable."""
        if not self.under:
            raise Unreadable("it takes more values than there are")
        self.stack = self.under.pop()
        values = len(self.stack)
        self.values_under -= values + 1

    def require_bounds(self) -> None:
        """Raise Unreadable for more values than a pickle can need at a time."""
        values = len(self.stack) + self.values_under
        if values > MOST_VALUES or len(self.under) > MOST_MARKS:
            raise Unreadable(f"it needs more than {MOST_VALUES:,} values at a time")

    def line(self) -> bytes:
        """The rest of a line, without its end; _TOO_LONG for what is. Raises Unreadable."""
        line = self._stream.readline(_LONGEST_LINE)
        self._done += len(line)
        is_long = False
        while not line.endswith(b"\n"):
            if len(line) < _LONGEST_LINE:
                raise Unreadable("it is cut within an opcode")
            is_long = True
            line = self._stream.readline(_LONGEST_LINE)
            self._done += len(line)
        if is_long:
            return _TOO_LONG
        return line[:-1]

    def at_end(self) -> bool:
        """Whether the stream ends here."""
        position = self._stream.tell()
        return position >= self._size

    def skip(self, count: int) -> None:
        """Pass over bytes. Raises Unreadable where there are fewer."""
        position = self._stream.tell()
        stop = position + count
        if count < 0 or stop > self._size:
            raise Unreadable("it is cut within an opcode")
        self._stream.seek(count, 1)
        self._done += count

    def take(self, count: int) -> bytes:
        """So many bytes. Raises Unreadable where there are fewer."""
        taken = self._stream.read(count)
        if len(taken) < count:
            raise Unreadable("it is cut within an opcode")
        self._done += count
        return taken

    def _argument(self, step: _Step) -> bytes:
        """The argument of an opcode; _TOO_LONG for what is. Raises Unreadable."""
        if step.size > 0:
            return self.take(step.size)
        if step.size == pickletools.UP_TO_NEWLINE:
            return self.line()
        width = _LENGTHS[step.size]
        length = int.from_bytes(self.take(width), "little")
        if length <= 4 * LONGEST_NAME:
            return self.take(length)
        self.skip(length)
        return _TOO_LONG

    def _no_opcode(self) -> str:
        at = self._stream.tell()
        if at >= self._size:
            return "it is cut: there is no end of the pickle"
        before = at - 1
        return f"byte {before:,} is no opcode of a pickle"


def found_of(walk: PickleWalk, problem: str = "") -> Found:
    """What a walk has found so far."""
    strange = [name for name in walk.names if name not in ALLOWED]
    names = [".".join(name).encode("unicode_escape").decode() for name in strange]
    return Found(tuple(names[:MOST_IMPORTS]), problem)
