# SPDX-License-Identifier: Apache-2.0
"""What lies beside archives on a medium: hfship.pyz itself and READ-ME-FIRST.txt.

A person with the medium and nothing else can verify and unpack with it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from hfship.base.files import atomic_write
from hfship.base.pyz import own_content
from hfship.base.reading import read_small

if TYPE_CHECKING:
    from hfship.base.report import Reporter

SIDECARS_SIZE = 8 << 20  # bytes kept free on each medium for these files and the sums

# A backslash at the end of a line is not in the text: it goes on in the next line.
READ_ME_FIRST = """\
These files carry Hugging Face models. NAME.tar.zst is a model; \
NAME.tar.zst.0001, .0002, ... are one cut in parts.

With hfship.pyz, which lies beside them and needs Python 3.8 or later, \
nothing to install and no network:

    python3 hfship.pyz verify NAME.tar.zst            proves every byte, names what to copy again
    python3 hfship.pyz unpack NAME.tar.zst -o DIR     restores and verifies DIR/NAME
    (also of parts; verify NAME.tar.zst.0001 reads that part alone)

Without it:

    sha256sum -c NAME.tar.zst.sha256                  checks what was copied \
(--ignore-missing: one medium of several)
    tar --zstd -xf NAME.tar.zst                       a whole file
    cat NAME.tar.zst.0* | tar --zstd -x               parts
    python3 NAME/.hfship/restore.py                   if that left *.planes files: makes the \
model's files of them
    NAME/.hfship/manifest.json                        then lists the SHA-256 of every file
    NAME/.hfship/delta.json                           if there, lists files to take from \
an older version on site
"""


def write_sidecars(folder: Path, reporter: Reporter) -> None:
    """Put hfship.pyz and READ-ME-FIRST.txt into a folder, unless they are there as they should be.

    Raises DiskError.
    """
    _write_if_different(folder / "READ-ME-FIRST.txt", READ_ME_FIRST.encode())
    own = own_content()  # as it was started: by now the file may be gone, or another one
    if own:
        _write_if_different(folder / "hfship.pyz", own, 0o755)
    else:
        reporter.detail("hfship runs from source: no hfship.pyz is put beside the archive")


def _write_if_different(path: Path, content: bytes, mode: Optional[int] = None) -> None:
    with contextlib.suppress(OSError):
        if read_small(path, len(content)) == content:
            return
    atomic_write(path, content, mode)
