# SPDX-License-Identifier: Apache-2.0
"""The file that runs: its entries, its build table, and the proof that it is as it was built.

Format of hfship.pyz: a line "#!/usr/bin/env python3", a line "# sha256 of all bytes after this
line: " with 64 hex digits, and a zip file that ends the file. Its entry hfship-build.json is the
build table: {"version", "entries": {name: SHA-256 in hex}} of all others, as build_zipapp.py put
them there.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Mapping, Optional

from hfship.base.errors import IntegrityError

if TYPE_CHECKING:
    from zipfile import ZipFile

BUILD_TABLE = "hfship-build.json"
COPY_AGAIN = "copy it again, and compare its SHA-256 with the published one"
# What holds `hfship`: hfship.pyz itself, or src/ of a checkout.
_ROOT = Path(__file__).absolute().parents[2]


def own_file() -> Path:
    """The file that runs: hfship.pyz, or the top of a checkout's sources."""
    # Not "is it a file": hfship.pyz may be gone by now, unmounted or replaced by another version.
    if _ROOT.is_dir():
        return _ROOT.parent / "hfship.py"
    return _ROOT


def own_content() -> bytes:
    """The bytes of the hfship.pyz that runs, whatever it is called, as they were when it started;
    b"" when hfship.py runs from source."""
    content: bytes = getattr(globals()["__loader__"], "content", b"")
    return content


def own_entry(name: str) -> bytes:
    """One entry of the hfship.pyz that runs, or a file below src/ of a checkout.

    Raises OSError when there is none, IntegrityError when it is damaged.
    """
    loader = globals()["__loader__"]
    try:
        content: bytes = loader.get_data(str(_ROOT / name))
        return content
    except (ImportError, EOFError, zlib.error) as exc:
        raise damaged_entry(name, f"{type(exc).__name__}: {exc}") from exc


def own_document(name: str) -> bytes:
    """A text of docs/, which travels in hfship.pyz. Raises OSError, IntegrityError."""
    if _ROOT.is_dir():
        return (_ROOT.parent / "docs" / name).read_bytes()
    return own_entry(f"docs/{name}")


def own_build() -> Mapping[str, Any]:
    """The build table of the hfship.pyz that runs; {} when hfship.py runs from source. Raises
    IntegrityError."""
    try:
        table = json.loads(own_entry(BUILD_TABLE))
        return {"version": str(table["version"]), "entries": dict(table["entries"])}
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError) as exc:
        raise damaged_entry(BUILD_TABLE, str(exc)) from exc


def damaged_entry(name: str, why: str) -> IntegrityError:
    """The error of an entry of the hfship.pyz that runs."""
    return IntegrityError(f"{own_file()} is damaged", f"{name}: {why}", COPY_AGAIN)


_SEAL = re.compile(
    rb"#!/usr/bin/env python3\n# sha256 of all bytes after this line: ([0-9a-f]{64})\n"
)


def entry_problems(path: Path) -> List[str]:
    """What differs between the entries of the hfship.pyz that runs and its build table; each is
    named.

    Raises OSError, ValueError and zipfile.BadZipFile for a file that is no zip.
    """
    import zipfile

    # The table's own bytes are proven by the seal.
    expected = {BUILD_TABLE: None, **own_build()["entries"]}
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        distinct = sorted(set(names))
        problems = [f"{name}: extra entry" for name in distinct if name not in expected]
        problems += [f"{name}: there twice" for name in distinct if names.count(name) > 1]
        for name, digest in expected.items():
            problem = "missing"
            if name in names:
                problem = _entry_problem(archive, name, digest)
            if problem:
                problems.append(f"{name}: {problem}")

    return problems


def _entry_problem(archive: ZipFile, name: str, digest: Optional[str]) -> str:
    """What is wrong with an entry; "" when it has the digest.

    It is read twice: by zipfile, which checks sizes and CRC, and by the loader that Python imports
    from. So a file which shows one program to zip tools and another to Python does not pass.
    """
    import zipfile

    try:
        contents = [archive.read(name), own_entry(name)]
    except IntegrityError as exc:
        return exc.why
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as exc:
        return str(exc)

    for content in contents:
        if digest and hashlib.sha256(content).hexdigest() != digest:
            return "changed"

    return ""


def verify_own_file(path: Path) -> str:
    """Prove that the hfship.pyz at `path`, the one that runs, is as it was built. Returns its
    SHA-256. Raises IntegrityError, OSError.

    The entries are proven by the build table, and every other byte (zip headers and directory, the
    table itself, anything put before or behind) by the seal in the second line. Whoever changes the
    file on purpose can change table and seal as well: against that only the published SHA-256 of
    the whole file helps.
    """
    import zipfile

    content = path.read_bytes()
    try:
        problems = entry_problems(path)
    except (OSError, zipfile.BadZipFile, ValueError) as exc:
        problems = [f"zip directory: {exc}"]

    if not problems and not _seal_holds(content):
        problems = ["zip headers, directory, or bytes before or behind the zip: changed"]
    if problems:
        raise IntegrityError(f"{path} is not as it was built", "\n".join(problems), COPY_AGAIN)

    return hashlib.sha256(content).hexdigest()


def _seal_holds(content: bytes) -> bool:
    seal = _SEAL.match(content)
    if not seal:
        return False
    sealed = hashlib.sha256(content[seal.end() :])
    return sealed.hexdigest() == seal[1].decode()
