# SPDX-License-Identifier: Apache-2.0
"""What the verbs note in the log of custody.

Promises: the log of an archive or folder that cannot be written, on a medium that is read-only say,
ends no command: it is said. Nothing is noted where [policy] custody = false.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, List, Mapping, Sequence

from hfship.base.values import dataclass
from hfship.commands.admission import site_policy

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest
    from hfship.base.policy import Policy
    from hfship.base.report import Reporter
    from hfship.commands.context import Context
    from hfship.ops.scan import Scan

Details = Mapping[str, Any]
NO_DETAILS: Details = MappingProxyType({})


def recorder_of(context: Context) -> Recorder:
    """Who notes what a command did."""
    return Recorder(site_policy(context), context.reporter)


@dataclass(frozen=True)
class Recorder:
    """Notes events of models, named as in `archive.custody`, where the policy of the site wants it.

    `details` are what the event has beside the model; `key` is the fingerprint of who signed.
    """

    policy: Policy
    reporter: Reporter

    def note_in_folder(
        self,
        folder: Path,
        event: str,
        manifest: Manifest,
        details: Details = NO_DETAILS,
        key: str = "",
    ) -> bool:
        """Note what was done in the log of a model folder; whether that could be done."""
        from hfship.archive.custody import CUSTODY_PATH

        return self._note(folder, CUSTODY_PATH, event, manifest, details, key)

    def note_beside(
        self,
        files: ArchiveFiles,
        event: str,
        manifest: Manifest,
        details: Details = NO_DETAILS,
        key: str = "",
    ) -> None:
        """Note what was done in the log beside an archive."""
        from hfship.archive.custody import CUSTODY
        from hfship.archive.files import STDIN

        if files.name != STDIN:
            self._note(files.folder, files.name + CUSTODY, event, manifest, details, key)

    def _note(
        self, folder: Path, path: str, event: str, manifest: Manifest, details: Details, key: str
    ) -> bool:
        from hfship.archive.custody import add_line, event_of

        if not self.policy.custody:
            return False
        try:
            add_line(folder, path, event_of(event, manifest, key, details))
        except OSError as exc:
            self.reporter.detail(f"{folder / path}: {event} is not noted: {exc.strerror}")
            return False
        return True

    def carry_to_archive(
        self,
        folder: Path,
        targets: Sequence[Path],
        archive: str,
        manifest: Manifest,
        details: Details,
    ) -> None:
        """Note that a folder was packed, in its log, and put that beside the archive in each
        target."""
        from hfship.archive.custody import CUSTODY, event_of, log_in, next_line, who
        from hfship.base.files import atomic_write
        from hfship.base.text import utc_exact

        if not self.policy.custody:
            return
        noted = self.note_in_folder(folder, "packed", manifest, details)
        try:
            log = log_in(folder)
        except OSError as exc:
            self.reporter.warn(f"{folder}: its log of custody cannot be read: {exc.strerror}")
            log = b""
        if not noted:  # nobody may write there
            event = event_of("packed", manifest, "", details)
            log += next_line(log, event, utc_exact(), *who())
        for target in targets:
            atomic_write(target / (archive + CUSTODY), log)

    def carry_to_folder(
        self, files: ArchiveFiles, folder: Path, manifest: Manifest, details: Details
    ) -> None:
        """Put the log beside an archive into the folder that was made of it, and note
        that there."""
        from hfship.archive.custody import log_beside, read_chain, take_along
        from hfship.archive.files import STDIN

        if not self.policy.custody:
            return
        try:
            if files.name != STDIN:
                log = log_beside(files)
                problems = read_chain(log).problems
                if problems:
                    self.reporter.warn(f"{files.name}: its log of custody is broken: {problems[0]}")
                take_along(folder, log)
        except OSError as exc:
            self.reporter.warn(f"{files.name}: its log of custody cannot be read: {exc.strerror}")
        self.note_in_folder(folder, "unpacked", manifest, details)

    def scan(self, folder: Path) -> List[Scan]:
        """Run the scanners that the policy names on a folder. Raises IntegrityError where one
        refuses it, HostError."""
        if not self.policy.scan:
            return []
        from hfship.ops.scan import scan

        return [scan(command, folder, self.reporter) for command in self.policy.scan]

    def note_scans(self, folder: Path, scans: Sequence[Scan], manifest: Manifest) -> None:
        """Note in the log of a model folder what scanners said of it here."""
        for one in scans:
            self.note_in_folder(folder, "scanned", manifest, one.details())
