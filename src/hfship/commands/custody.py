# SPDX-License-Identifier: Apache-2.0
"""`hfship custody`: who did what with a model, in which order, and whether that log is whole.

A signature of a role carries the SHA-256 of the line that was the last one when it was made
(archive/custody.py). Here it is looked whether that line is in the log still: so what was written
anew, or cut off before a signature, is told. With a folder of keys (HFSHIP_KEYS) a signature that
it does not trust tells nothing; without one all are taken as they are, and called unproven.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

from hfship.base.errors import Exit, HfshipError, IntegrityError, NotFoundError, error_fields
from hfship.base.files import disk_errors
from hfship.base.text import human_bytes, printable, table, utc_exact
from hfship.base.values import dataclass
from hfship.commands.admission import site_policy
from hfship.commands.results import exit_of_list, print_results

if TYPE_CHECKING:
    from hfship.archive.approval import Approval
    from hfship.archive.custody import Chain, Line
    from hfship.archive.files import ArchiveFiles
    from hfship.base.policy import Policy
    from hfship.commands.context import Context


def custody_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship custody`."""
    what = "archive or any part of it, model folder, or NAME"
    parser.add_argument("targets", nargs="*", metavar="ARCHIVE|DIR|NAME", help=what)


@dataclass(frozen=True)
class SignedLine:
    """A signature that carries a line of the log: its file, role and key, the number of that line
    (0: it is not in the log), whether the signature is proven, and why it counts for nothing."""

    bundle: str
    role: str
    key: str
    line: int
    proven: bool = False
    problem: str = ""

    def text(self) -> str:
        """`signed up to line 3 by security (keys/kim.pem)`, and what is to be said of it."""
        who = f"{self.role} ({self.key})"
        if self.problem:
            return f"{self.bundle} counts for nothing: {self.problem}"
        if not self.line:
            return f"{self.bundle}: {who} signed a line that is not in this log"
        said = f"signed up to line {self.line} by {who}"
        if not self.proven:
            said += ", unproven: HFSHIP_KEYS names no folder of keys"
        return said

    def json(self) -> Dict[str, Any]:
        """A row of "signatures" in docs/json.md, "custody"."""
        return {
            "bundle": self.bundle,
            "role": self.role,
            "key": self.key,
            "line": self.line,
            "proven": self.proven,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class CustodyLog:
    """A log of custody, the signatures that carry lines of it, and what is wrong with it."""

    path: Path
    chain: Chain
    signatures: Sequence[SignedLine] = ()
    error: Optional[IntegrityError] = None

    def text(self) -> str:
        """A line for each event, then whether the chain is whole."""
        rows = [_row_of(line) for line in self.chain.lines]
        shown = table(rows, ["", "when", "what", "who", "key", "about"])
        count = len(self.chain.lines)
        verdict = f"{self.path}: {count} lines, each bound to the one before"
        if self.error:
            verdict = f"{self.path}: broken"
        signed = [one.text() for one in self.signatures if one.line or one.problem]
        return "\n".join([shown, *signed, verdict])

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "custody"."""
        error = None
        if self.error:
            error = error_fields(self.error)
        return {
            "path": str(self.path),
            "ok": error is None,
            "error": error,
            "head": self.chain.head,
            "signatures": [one.json() for one in self.signatures],
            "lines": [dict(line.fields, problem=line.problem) for line in self.chain.lines],
        }


def _row_of(line: Line) -> List[str]:
    fields = line.fields
    if not fields:
        return [str(line.number), "?", "no entry", "", "", ""]
    who = f"{fields['user']}@{fields['host']}"
    at = fields["at"][:19].replace("T", " ") + "Z"
    cells = [at, fields["event"], who, fields["key"][:12], _about(fields)]
    return [str(line.number), *(printable(str(cell)) for cell in cells)]


def _about(fields: Mapping[str, Any]) -> str:
    """The details of an event, in one line."""
    details = fields.get("details")
    if not isinstance(details, dict):
        return ""
    texts = []
    for name, value in details.items():
        if name in _LEFT_OUT or value in (False, ""):
            continue
        if value is True:
            texts.append(name)
        else:
            shown = _SHOWN.get(name, str)(value)
            texts.append(f"{name} {shown}")

    text = ", ".join(texts)
    return text[:200]


def _short(value: object) -> str:
    """A commit for people."""
    return str(value)[:12]


def _size(value: object) -> str:
    """Bytes for people."""
    if isinstance(value, int):
        return human_bytes(value)
    return str(value)


# Details that only --json shows, and those that people read in another form.
_LEFT_OUT = frozenset(["endpoint", "proof", "seconds", "signature", "words"])
_SHOWN: Mapping[str, Callable[[object], str]] = {"commit": _short, "bytes": _size}


def cmd_custody(context: Context) -> Exit:
    """Show the logs of custody that are named, and check them."""
    results = print_results(context, _logs(context))
    errors = [result.error for result in results if result.error]
    for error in errors:
        context.reporter.error(error)
    codes = [error.code for error in errors]
    return exit_of_list(codes)


@dataclass(frozen=True)
class _Place:
    """Where a log lies: its path, what reads it, the SHA-256 of the manifest that is there ("":
    unknown), and the signatures there."""

    path: Path
    read: Callable[[], bytes]
    manifest: str
    bundles: Sequence[Path]


def _logs(context: Context) -> Iterator[CustodyLog]:
    """The logs of what is named. Raises NotFoundError, DiskError, UsageError for the folder of
    keys."""
    policy = site_policy(context)
    for target in context.args.targets:
        for place in _places_of(target, context):
            with disk_errors("read", place.path):
                content = place.read()

            if not content:
                why = "nothing was noted, [policy] custody = false, or it was left behind"
                raise NotFoundError(f"there is no log of custody at {place.path}", why, "")
            yield _checked_log(place, content, policy)


def _places_of(target: str, context: Context) -> Iterator[_Place]:
    """The places that a word means; a folder before archives."""
    from hfship.archive.approval import bundles_beside, bundles_in
    from hfship.archive.custody import CUSTODY, CUSTODY_PATH, log_beside, log_in
    from hfship.archive.files import find_archives, is_archive_name
    from hfship.commands.names import archive_word, find_folder, find_model

    settings = context.settings
    places = [settings.package_dir, settings.transfer_dir]
    folder = None
    if not is_archive_name(target):
        folder = find_folder(target, [settings.site_models_dir, settings.models_dir])
    archives: List[ArchiveFiles] = []
    if folder is None:
        archives = find_archives(archive_word(target, places), places)

    for files in archives:
        path = files.folder / (files.name + CUSTODY)
        read = partial(log_beside, files)
        yield _Place(path, read, _manifest_in(files), bundles_beside(files))
    if not archives:
        found = folder or find_model(target, settings, places)
        path = found / CUSTODY_PATH
        yield _Place(path, partial(log_in, found), _manifest_of(found), bundles_in(found))


def _manifest_of(folder: Path) -> str:
    from hfship.archive.custody import event_of
    from hfship.base.manifest import read_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        return ""
    return event_of("", manifest).manifest


def _manifest_in(files: ArchiveFiles) -> str:
    """SHA-256 of the manifest in an archive; "" where it cannot be read."""
    from hfship.archive.custody import event_of
    from hfship.archive.opening import open_archive

    try:
        manifest = open_archive(files).manifest
    except IntegrityError:
        return ""
    if manifest is None:
        return ""
    return event_of("", manifest).manifest


def _checked_log(place: _Place, content: bytes, policy: Policy) -> CustodyLog:
    """A log, and the error of one that is broken, whose last line is of another manifest, or that
    lacks a line which somebody signed."""
    from hfship.archive.custody import read_chain

    chain = read_chain(content)
    signatures = _signed_lines(place, chain, policy)
    problems = chain.problems
    last = chain.lines[-1].fields
    if place.manifest and last and last["manifest"] != place.manifest:
        problems.append("its last line is of another version of the model than lies there")
    problems += [one.text() for one in signatures if not one.line and not one.problem]
    if not problems:
        return CustodyLog(place.path, chain, signatures)
    what = f"the log of custody {place.path} is broken"
    why = "\n".join(problems[:20])
    step = "compare it with a copy that travelled another way; what is missing nobody can tell"
    return CustodyLog(place.path, chain, signatures, IntegrityError(what, why, step))


def _signed_lines(place: _Place, chain: Chain, policy: Policy) -> List[SignedLine]:
    """The lines that signatures of what lies there carry. Raises UsageError for the folder of
    keys."""
    from hfship.archive.approval import find_approvals
    from hfship.archive.signature import bundle_facts

    approvals: Dict[str, Approval] = {}
    if policy.keys:
        found = find_approvals(place.bundles, policy, utc_exact()[:10])
        approvals = {one.bundle: one for one in found.found}
    numbers = {line.sha256: line.number for line in chain.lines}
    rows: List[SignedLine] = []
    for path in place.bundles:
        try:
            fingerprint, signed = bundle_facts(path)
        except (ValueError, OSError, HfshipError):  # `verify` tells what is wrong with it
            continue
        if not signed.custody or place.manifest not in ("", signed.manifest):
            continue
        key, problem = f"key {fingerprint[:12]}", ""
        approval = approvals.get(path.name)
        if approval:
            key, problem = approval.key, approval.problem
        line = numbers.get(signed.custody, 0)
        role = printable(signed.role)
        row = SignedLine(
            path.name,
            role,
            printable(key),
            line,
            bool(approval),
            problem,
        )
        rows.append(row)
    return rows
