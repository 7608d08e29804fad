# SPDX-License-Identifier: Apache-2.0
"""restore.py, the second member of an archive with planes, for a far side without hfship.

Owns the format of planes, of which these programs are a part: never changed by a byte.
docs/formats.md says the same in full.

If restore.py, one of RESTORE_PYS to the byte, is the second member of an archive, then every weight
PATH is a member PATH.planes. It has a block for every 2 MiB of PATH (4 MiB in early archives, as
restore.py tells), the last maybe shorter, and each block is a frame of its own:

  width planes   the last bytes of all elements of `width` bytes, then all bytes before those, ...
  rest           the bytes that do not fill an element
  width          one byte: 1, 2 or 4

The exponents of floats come to lie side by side and compress; their mantissas, which do not, are
stored by zstd.
"""

from __future__ import annotations

RESTORE_SUFFIX = ".incomplete"  # of a file while restore.py joins it
PLANES_BLOCK = 2 << 20  # bytes of a file in one block of planes

# Part of the format: never changed. A backslash at the end of a line is none of its bytes: it goes
# on in the next line.
_WITHOUT_CHECK = b'''\
"""Makes PATH of every PATH.planes, and proves all files: python3 NAME/.hfship/restore.py \
(needs Python 3, no more).

PATH.planes is a row of blocks, one for 2 MiB of PATH. A block is: for elements of 1, 2 \
or 4 bytes the last bytes of
all elements, then the bytes before those, and so on; the bytes that fill no element; one byte, \
the element's size.
"""
import hashlib
import json
import os
import sys

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def blocks(path, size):
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(size), b""):
            yield block


def join(planes):
    width = planes[-1]
    count = (len(planes) - 1) // width
    block = bytearray(planes[:-1])
    for number in range(width):
        block[width - 1 - number : count * width : width] = \
planes[number * count : (number + 1) * count]
    return block


def restore(path):
    with open(path + ".incomplete", "wb") as target:
        for block in blocks(path + ".planes", (2 << 20) + 1):
            target.write(join(block))
    os.rename(path + ".incomplete", path)
    os.remove(path + ".planes")


wrong = []
with open(os.path.join(FOLDER, ".hfship", "manifest.json"), "rb") as stream:
    files = json.loads(stream.read().decode("utf-8"))["files"]
for entry in files:
    path = os.path.join(FOLDER, entry["path"])
    if os.path.exists(path + ".planes"):
        restore(path)
    digest = hashlib.sha256()
    for block in blocks(path, 1 << 20) if os.path.exists(path) else ():
        digest.update(block)
    if digest.hexdigest() != entry["sha256"]:
        wrong.append(entry["path"])
print("%d files, %d wrong or missing %s" % (len(files), len(wrong), " ".join(wrong)))
sys.exit(1 if wrong else 0)
'''

# What hfship 0.1.0 did not look at: a path or a link that leads out of the folder.
_CHECK = b"""\
def is_inside(path):
    root = os.path.realpath(FOLDER)
    straight = os.path.join(root, *path.split("/"))
    ends = ("", ".planes", ".incomplete")
    return all(os.path.realpath(os.path.join(root, path) + end) == straight + end for end in ends)


"""
_CHECKED = b"""\
for entry in files:
    if not is_inside(entry["path"]):
        wrong.append(entry["path"])
        continue
"""
RESTORE_PY = _WITHOUT_CHECK.replace(b"wrong = []\n", _CHECK + b"wrong = []\n").replace(
    b"for entry in files:\n", _CHECKED
)

# Bytes of a file in one block of planes, by the program in the archive.
RESTORE_PYS = {
    RESTORE_PY: PLANES_BLOCK,
    _WITHOUT_CHECK: PLANES_BLOCK,
    _WITHOUT_CHECK.replace(b"2 MiB", b"4 MiB").replace(b"(2 <<", b"(4 <<"): 4 << 20,
}
