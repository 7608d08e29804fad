# SPDX-License-Identifier: Apache-2.0
"""The tar stream of an archive, proven as it passes, and the sinks that its files go to.

Owns the proof: a file by its SHA-256, all other bytes by what the manifest implies. Promises: a
sink is told that a file is complete only after that file was proven. Never: touches a disk itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING, Callable, Iterable, List, NamedTuple, Optional, Union

if TYPE_CHECKING:
    from hfship.archive.frames import Buffer
    from hfship.archive.layout import Segment
    from hfship.base.manifest import FileEntry


class Sink:
    """Where the files of a tar stream go. This one keeps nothing: for those who only check."""

    keeps = False  # whether it has anything to do when a file is complete, or cannot be

    def begin(self, entry: FileEntry) -> None:
        """The content of a file starts."""

    def write(
        self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]
    ) -> None:
        """Content of a file that has begun, at an offset in it. Called by any worker."""

    def read(self, entry: FileEntry, offset: int, size: int) -> bytes:
        """Content of a file that an earlier run wrote."""
        raise NotImplementedError

    def checkpoint(self, entry: FileEntry, size: int) -> None:
        """The first `size` bytes of a file are all written: a killed run resumes from there."""

    def finish(self, entry: FileEntry) -> None:
        """The file is complete, and proven."""

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        """The file cannot be completed: its bytes are `lost`, or not those of the manifest."""

    def release(self, entry: FileEntry) -> None:
        """This process has no more to do with the file."""


class FileOutcome(NamedTuple):
    """How a file ended in a worker: `proven`, or abandoned because bytes are `lost` or wrong."""

    entry: FileEntry
    proven: bool
    lost: bool = False

    def pass_on(self, sink: Sink) -> None:
        """Tell a sink in the process that leads the workers."""
        if self.proven:
            sink.finish(self.entry)
        else:
            sink.abandon(self.entry, self.lost)


class RecordingSink(Sink):
    """The sink of a worker: content goes straight to `sink`, but how files end is recorded in
    `outcomes`, for the process that leads the workers to act on."""

    keeps = True

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.outcomes: List[FileOutcome] = []

    def begin(self, entry: FileEntry) -> None:
        self._sink.begin(entry)

    def write(
        self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]
    ) -> None:
        self._sink.write(entry, offset, content)

    def release(self, entry: FileEntry) -> None:
        self._sink.release(entry)

    def finish(self, entry: FileEntry) -> None:
        self.release(entry)
        outcome = FileOutcome(entry, proven=True)
        self.outcomes.append(outcome)

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        self.release(entry)
        outcome = FileOutcome(entry, proven=False, lost=lost)
        self.outcomes.append(outcome)


class StreamCheck:
    """Follows consecutive segments of the tar stream and proves them.

    `report` is called with each segment that is wrong, and what is wrong with it. Without `write`
    the files are begun and written by somebody else, and only proven here.
    """

    def __init__(
        self,
        segments: Iterable[Segment],
        sink: Sink,
        report: Callable[[Segment, str], None],
        write: bool = True,
    ) -> None:
        self._left = deque(segments)
        self._sink = sink
        self._report = report
        self._write = write
        # Of the segment at hand: the bytes seen, whether all of them are there and right.
        self._seen = 0
        self._intact = True
        self._digest = hashlib.sha256()

    def feed(self, content: Optional[Buffer], length: int) -> None:
        """The next `length` bytes of the stream; None when they are lost, which is reported by
        whoever lost them. Planes come joined, one block at a time."""
        at = 0
        while self._left:
            segment = self._left[0]
            size = min(segment.size - self._seen, length - at)
            if segment.size and not size:
                return
            if not self._seen:
                self._begin(segment)
            if content is None:
                self._intact = False
            else:
                self._check(segment, memoryview(content)[at : at + size])
            at += size
            self._seen += size
            if self._seen == segment.size:
                self._end(segment, lost=content is None)

    def _begin(self, segment: Segment) -> None:
        self._intact = True
        self._digest = hashlib.sha256()
        if segment.entry and self._write:
            self._sink.begin(segment.entry)

    def _check(self, segment: Segment, view: memoryview) -> None:
        if segment.entry is None:
            expected = segment.known[self._seen : self._seen + len(view)]
            if expected != view:
                self._intact = False
                self._report(segment, "differs from what the manifest implies")
            return

        self._digest.update(view)
        if self._write:
            start = segment.start + self._seen
            offset, _ = segment.file_range(start, segment.stop)
            self._sink.write(segment.entry, offset, view)

    def _end(self, segment: Segment, lost: bool) -> None:
        self._left.popleft()
        self._seen = 0
        if segment.entry is None:
            return

        found = self._digest.hexdigest()
        if lost or not self._intact:
            self._sink.abandon(segment.entry, lost=True)
        elif found == segment.entry.sha256:
            self._sink.finish(segment.entry)
        else:
            self._report(segment, f"has SHA-256 {found}, the manifest says {segment.entry.sha256}")
            self._sink.abandon(segment.entry, lost=False)
