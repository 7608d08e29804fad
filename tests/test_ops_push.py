# SPDX-License-Identifier: Apache-2.0
"""What push asks the far side, sends and proves, with a far side that is played; test_push.py has real
ones."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from hfship.base.errors import DiskError, HostError, IntegrityError, NotFoundError, UsageError
from hfship.base.processes import Completed
from hfship.base.progress import Stage
from hfship.base.values import replace
from hfship.ops import push as room
from hfship.ops.destination import Destination, patience_for
from hfship.ops.push import (
    NO_FILE,
    SEND_DIFFERENCES,
    SEND_THE_REST,
    FarFile,
    Push,
    PushedFile,
    PushFile,
    PushResult,
)

FAR = Destination("me@gpu1", "/data", ("ssh", "-p", "22"))
FILE = PushFile(Path("/here/it's m"), 1000, "a" * 64)
OTHER = PushFile(Path("/here/n"), 500, "b" * 64)
OK = Completed(0, "", "")


class Line:
    """Stands for Destination.run and follow_program: notes what is asked, and answers in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scripts: List[Tuple[str, Any, int]] = []
        self.sent: List[Tuple[List[str], float]] = []
        self.answers: List[Completed] = []
        self.outcomes: List[Tuple[List[str], Completed]] = []
        monkeypatch.setattr(Destination, "run", self._run)
        monkeypatch.setattr(room, "follow_program", self._follow)

    def _run(self, script: str, stop: Any, size: int = 0) -> Completed:
        self.scripts.append((script, stop, size))
        return self.answers.pop(0)

    def _follow(self, argv: List[str], stop: Any, on_line: Any, patience_s: float) -> Completed:
        assert not stop.is_set()
        self.sent.append((argv, patience_s))
        lines, done = self.outcomes.pop(0)
        for line in lines:
            on_line(line)
        return done


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    made = Line(monkeypatch)
    yield made
    assert not made.answers and not made.outcomes, "not all was asked"


def push_of(*files: PushFile, to: Destination = FAR, options: Sequence[str] = ()) -> Any:
    stage = Stage("push", sum(file.size for file in files))
    return Push(to, files, stage, threading.Event(), 2, options)


# -- what is there


PROBED = "at /mnt/data\nroom /dev/sda1 900 100 {room} 12% /mnt\n"


def test_what_is_there_is_asked_once_for_all_files(line: Line) -> None:
    line.answers = [Completed(0, PROBED.format(room=9) + "has 1000 8 it's m\nhas 7 8 n", "")]
    run = push_of(FILE, OTHER)
    run.prepare()
    ((script, stop, size),) = line.scripts
    assert stop is run._stop and size == 0
    assert "mkdir -p -- /data && cd -- /data" in script
    assert shlex.join(["it's m", "n"]) in script
    assert shlex.join(["it's m.incomplete", "n.incomplete"]) in script
    assert run._to.folder == "/mnt/data", "links on the way are followed once"
    assert run._there == {"it's m": FarFile(1000, 4096), "n": FarFile(7, 4096)}


@pytest.mark.parametrize(
    "answer",
    [
        Completed(0, "rsync: not found\nat /data", ""),
        Completed(73, "at /data\ncannot write there", ""),
        Completed(0, "choose", ""),
    ],
)
def test_what_is_no_answer_to_the_probe_is_an_error(answer: Completed, line: Line) -> None:
    line.answers = [answer]
    run = push_of(FILE)
    with pytest.raises((HostError, DiskError)) as caught:
        run.prepare()
    expected = FAR.error(answer)
    assert (type(caught.value), caught.value.what) == (type(expected), expected.what)


@pytest.mark.parametrize(("room_kib", "fits"), [(2, True), (1, False)])
def test_the_rest_must_have_room(room_kib: int, fits: bool, line: Line) -> None:
    """1500 bytes are to come, less the 476 that are there: 1024."""
    line.answers = [Completed(0, PROBED.format(room=room_kib - 1) + "has 476 1 n.incomplete", "")]
    run = push_of(FILE, OTHER)
    if fits:
        run.prepare()
        return
    with pytest.raises(DiskError) as caught:
        run.prepare()
    free, missing = "0 B", "1.0 kB"
    assert caught.value.what == f"cannot push: me@gpu1:/mnt/data has {free} free, {missing} needed"
    assert caught.value.why == f"{missing} are missing"


@pytest.mark.parametrize("host", ["", "me@gpu1"])
def test_a_disk_of_this_machine_must_take_the_largest_file(
    host: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(room, "require_room", lambda *given: asked.append(given))
    line.answers = [Completed(0, PROBED.format(room=9), "")]
    push_of(OTHER, FILE, to=Destination(host, "/data", FAR.ssh)).prepare()
    step = "hfship pack --split fat32, then push again"
    assert asked == ([] if host else [(Path("/mnt/data"), 0, 1000, "push", step)])


# -- a file

RIGHT, WRONG = Completed(0, "", ""), Completed(1, "'it'\"'\"'s m': FAILED", "")
SENT = (["       1000 100%  1.0MB/s  0:00:00", "Literal data: 600 bytes"], OK)
PARTLY = (["Literal data: 600 bytes"], Completed(23, "rsync: failed to set times\nmore", ""))


@pytest.mark.parametrize(
    ("there", "answers", "outcomes", "options", "sent", "complaint"),
    [
        # whole and right: nothing is sent
        ({"m": FarFile(1000, 4096)}, [RIGHT], [], [], 0, ""),
        # whole and wrong: the differences
        ({"m": FarFile(1000, 4096)}, [WRONG, RIGHT], [SENT], [SEND_DIFFERENCES], 600, ""),
        # another one of that name, which is not looked at
        ({"m": FarFile(999, 4096)}, [RIGHT], [SENT], [SEND_DIFFERENCES], 600, ""),
        # nothing, or a part of it
        ({}, [RIGHT], [SENT], [SEND_THE_REST], 600, ""),
        ({"m.incomplete": FarFile(400, 4096)}, [RIGHT], [SENT], [SEND_THE_REST], 600, ""),
        # all of it, and more
        ({"m.incomplete": FarFile(1000, 4096)}, [RIGHT], [SENT], [SEND_DIFFERENCES], 600, ""),
        # the first attempt arrives wrong
        ({}, [WRONG, RIGHT], [SENT, SENT], [SEND_THE_REST, SEND_DIFFERENCES], 1200, ""),
        # times that could not be set
        ({}, [RIGHT], [PARTLY], [SEND_THE_REST], 600, "rsync: failed to set times"),
    ],
)
def test_how_a_file_gets_there(
    there: Dict[str, FarFile],
    answers: List[Completed],
    outcomes: List[Any],
    options: List[Any],
    sent: int,
    complaint: str,
    line: Line,
) -> None:
    run = push_of(FILE, options=["--bwlimit=7"])
    run._there = {f"it's {name}": one for name, one in there.items()}
    line.answers, line.outcomes = list(answers), list(outcomes)
    assert run.bring(FILE) == PushedFile(FILE, sent, complaint)
    always = ["rsync", "--times", "--info=progress2,stats2", "--no-h"]
    last = ["-s", "-e", "ssh -p 22", "/here/it's m", "me@gpu1:/data/it's m.incomplete"]
    assert [argv for argv, _ in line.sent] == [
        [*always, *one, "--bwlimit=7", *last] for one in options
    ]
    assert all(patience == patience_for(1000) for _, patience in line.sent)
    assert run._stage.done == 1000, "counted once"
    skipped = 1000 if not outcomes else there.get("m.incomplete", NO_FILE).size
    assert run._stage.skipped == (skipped if skipped < 1000 or not outcomes else 0)
    assert run._line._value == 2


def test_what_arrives_wrong_twice_is_an_error(line: Line) -> None:
    line.answers, line.outcomes = [WRONG, WRONG], [SENT, SENT]
    run = push_of(FILE)
    with pytest.raises(IntegrityError, match="it's m arrives damaged at me@gpu1:/data") as caught:
        run.bring(FILE)
    assert caught.value.why == f"its SHA-256 is not {'a' * 64}"
    assert caught.value.next_step == "hfship verify /here/it's m, then look at the disk there"
    assert run._stage.done == 0


def test_what_arrives_partly_and_wrong_is_what_failed(line: Line) -> None:
    line.answers, line.outcomes = [WRONG], [PARTLY]
    with pytest.raises(HostError, match="ended with 23"):
        push_of(FILE).bring(FILE)


def test_an_rsync_that_fails_ends_it(line: Line) -> None:
    line.outcomes = [([], Completed(12, "connection unexpectedly closed", ""))]
    run = push_of(FILE)
    with pytest.raises(Exception, match="the connection to me@gpu1"):
        run.bring(FILE)
    assert run._line._value == 2


def test_a_proof_that_fails_is_not_taken_for_a_wrong_file(line: Line) -> None:
    answer = Completed(74, "no sha256sum and no python3 there", "")
    line.answers, line.outcomes = [answer], [SENT]
    with pytest.raises(HostError) as caught:
        push_of(FILE).bring(FILE)
    assert caught.value.what == FAR.error(answer).what
    line.answers = [answer]
    run = push_of(FILE)
    run._there = {FILE.name: FarFile(1000, 4096)}
    with pytest.raises(HostError):
        run.bring(FILE)
    assert line.scripts[-1][1:] == (run._stop, 1000), "a large file takes its time"


def test_on_a_disk_of_this_machine_there_is_no_ssh(line: Line) -> None:
    line.answers, line.outcomes = [RIGHT], [SENT]
    push_of(FILE, to=Destination("", "/data")).bring(FILE)
    ((argv, _),) = line.sent
    assert argv[-2:] == ["/here/it's m", "/data/it's m.incomplete"] and "-e" not in argv


# -- the script that proves


@pytest.mark.parametrize(
    ("named", "content", "code", "left"),
    [
        (True, b"right", 0, {"x": b"right"}),
        (True, b"wrong", 1, {"x.incomplete": b"wrong"}),
        (False, b"right", 0, {"x": b"right"}),
        (False, b"wrong", 1, {"x.incomplete": b"wrong"}),
    ],
)
def test_a_file_has_its_name_when_it_is_proven(
    named: bool,
    content: bytes,
    code: int,
    left: Dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(self: Destination, script: str, stop: Any, size: int) -> Completed:
        assert (self.folder, size) == (str(tmp_path), 5) and not stop.is_set()
        done = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == code
        return Completed(done.returncode, done.stdout, done.stderr)

    monkeypatch.setattr(Destination, "run", run)
    file = PushFile(Path("/here/x"), 5, hashlib.sha256(b"right").hexdigest())
    name = file.name if named else file.partial_name
    (tmp_path / name).write_bytes(content)
    run_ = push_of(file, to=Destination("", str(tmp_path)))
    assert run_._is_proven(file, name) == (code == 0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("named", [True, False])
def test_no_file_is_moved_into_a_folder_of_its_name(named: bool, tmp_path: Path) -> None:
    file = PushFile(Path("/here/x"), 5, hashlib.sha256(b"right").hexdigest())
    found, other = (file.name, file.partial_name) if named else (file.partial_name, file.name)
    (tmp_path / found).write_bytes(b"wrong" if named else b"right")
    (tmp_path / other).mkdir()
    run = push_of(file, to=Destination("", str(tmp_path)))
    if named:  # it is wrong as it is, and keeps the name
        assert run._is_proven(file, found) is False and (tmp_path / found).read_bytes() == b"wrong"
    else:
        with pytest.raises(DiskError, match="a folder or a link is where a file belongs"):
            run._is_proven(file, found)
    assert not list((tmp_path / other).iterdir())


# -- which files


def archive_at(folder: Path, **fields: Any) -> Any:
    """An archive of two parts, with their sums."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"m.tar.zst.000{number}" for number in (1, 2)]
    for path in paths:
        path.write_bytes(path.name.encode())
    sums = {path.name: str(number) * 64 for number, path in enumerate(paths, start=1)}
    values = {
        "name": "m.tar.zst",
        "folder": folder,
        "paths": paths,
        "sums": folder / "m.tar.zst.sha256",
        "listed": lambda: sums,
    }
    return SimpleNamespace(**{**values, **fields})


def test_what_travels_beside_an_archive_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_at(tmp_path)
    names = [
        "m.tar.zst.sha256",
        "sig.bundle",
        f"m.tar.zst{room.BOM}",
        f"m.tar.zst{room.BOM}{room.SIGNATURE}",
        f"m.tar.zst{room.CUSTODY}",
        "hfship.pyz",
        "READ-ME-FIRST.txt",
        f"m{room.BUNDLE_SUFFIX}",
        room.MODELS_FILE,
    ]
    monkeypatch.setattr(room, "bundles_beside", lambda files: [files.folder / "sig.bundle"])
    reporter: Any = SimpleNamespace(warn=pytest.fail)
    parts = ["m.tar.zst.0001", "m.tar.zst.0002"]
    assert [one.name for one in room.files_to_push([archive], reporter)] == parts
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.txt").write_text("x")
    found = room.files_to_push([archive, archive], reporter)
    assert [one.name for one in found] == [*names, *parts]
    assert found[-1] == PushFile(tmp_path / parts[1], 14, "2" * 64)
    first = hashlib.sha256(names[0].encode()).hexdigest()
    assert found[0] == PushFile(tmp_path / names[0], len(names[0]), first)
    assert found[0].partial_name == "m.tar.zst.sha256.incomplete"


def test_a_file_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"12")
    monkeypatch.chdir(tmp_path)
    assert room.push_file(Path("x"), {"x": "f" * 64}) == PushFile(tmp_path / "x", 2, "f" * 64)


def test_two_files_of_one_name_are_pushed_one_by_one(tmp_path: Path) -> None:
    reporter: Any = None
    one, other = archive_at(tmp_path / "a"), archive_at(tmp_path / "b")
    assert len(room.files_to_push([one, other], reporter)) == 2
    changed = {**one.listed(), "m.tar.zst.0002": "3" * 64}
    other = archive_at(tmp_path / "b", listed=lambda: changed)
    with pytest.raises(UsageError, match="two different files are called m.tar.zst.0002"):
        room.files_to_push([one, other], reporter)


def test_files_without_a_sum_and_sums_without_a_file_are_told(tmp_path: Path) -> None:
    warned: List[str] = []
    reporter: Any = SimpleNamespace(warn=warned.append)
    one = archive_at(tmp_path)
    more = {**one.listed(), "m.tar.zst.0004": "4" * 64, "m.tar.zst.0003": "3" * 64}
    room.files_to_push([archive_at(tmp_path, listed=lambda: more)], reporter)
    assert warned == ["m.tar.zst: not here, and not pushed: m.tar.zst.0003, m.tar.zst.0004"]
    fewer = {"m.tar.zst.0001": "1" * 64}
    with pytest.raises(NotFoundError) as caught:
        room.files_to_push([archive_at(tmp_path, listed=lambda: fewer)], reporter)
    assert caught.value.what == f"{tmp_path}/m.tar.zst.sha256 has no sum of m.tar.zst.0002"
    assert caught.value.next_step == ("hfship pack --force m, or copy m.tar.zst.sha256 beside it")


# -- all of it


class Told:
    """A reporter: its stage, its clock, its warnings."""

    def __init__(self) -> None:
        self.warned: List[str] = []
        self.clocks: List[Any] = []
        self.stages: List[Any] = []


def reporter_of(told: Told) -> Any:
    @contextlib.contextmanager
    def stage(name: str, size: int) -> Any:
        made = Stage(name, size)
        told.stages.append(made)
        yield made

    @contextlib.contextmanager
    def clock(*given: Any) -> Any:
        told.clocks.append(given)
        yield

    return SimpleNamespace(stage=stage, clock=clock, warn=told.warned.append)


def test_all_files_are_brought_and_the_first_complaint_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told()
    made: List[Any] = []
    complaints = {FILE: "", OTHER: "times"}

    class Played(Push):
        def prepare(self) -> None:
            made.append(self)
            assert told.clocks[-1:] == [("looking at me@gpu1:/data", room.ANSWER_S)]

        def bring(self, file: PushFile) -> PushedFile:
            assert not self._stop.is_set()
            return PushedFile(file, 5, complaints[file])

    restarted: List[int] = []
    monkeypatch.setattr(Stage, "restart_clock", lambda _: restarted.append(len(made)))
    monkeypatch.setattr(room, "Push", Played)
    files = [FILE, OTHER]
    result = room.push(FAR, files, 3, 60_000_000, reporter_of(told))
    assert result.to == FAR and result.files == (PushedFile(FILE, 5), PushedFile(OTHER, 5, "times"))
    assert restarted == [1], "the speed is that of what is sent"
    (run,) = made
    assert run._options == ["--bwlimit=58593"] and run._line._value == 1
    assert [stage.total for stage in told.stages] == [1500]
    assert told.warned == ["times; every SHA-256 there is right, so all has arrived"]
    complaints[FILE] = "modes"
    room.push(FAR, files, 3, 0, reporter_of(told))
    assert told.warned[1:] == ["modes; every SHA-256 there is right, so all has arrived"]
    assert made[1]._options == [] and made[1]._line._value == 3


def test_what_fails_ends_what_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: List[bool] = []
    begun = threading.Event()

    class Played(Push):
        def prepare(self) -> None:
            pass

        def bring(self, file: PushFile) -> PushedFile:
            if file is FILE:
                assert begun.wait(60)
                raise IntegrityError("damaged", "", "")
            begun.set()
            ended.append(self._stop.wait(60))
            return PushedFile(file, 0)

    monkeypatch.setattr(room, "Push", Played)
    with pytest.raises(IntegrityError, match="damaged"):
        room.push(FAR, [FILE, OTHER], 2, 0, reporter_of(Told()))
    assert ended == [True]


@pytest.mark.parametrize(
    ("jobs", "limit", "streams", "options"),
    [
        (4, 0, 4, []),
        (4, 39_999_999, 1, ["--bwlimit=39062"]),
        (4, 80_000_000, 2, ["--bwlimit=39062"]),
        (2, 900_000_000, 2, ["--bwlimit=439453"]),
        (4, 10, 1, ["--bwlimit=1"]),
    ],
)
def test_a_limit_is_shared(jobs: int, limit: int, streams: int, options: List[str]) -> None:
    assert room.streams_of(jobs, limit) == (streams, options)


@pytest.mark.parametrize(
    ("sent", "ends"),
    [
        ([0, 0], "checked there, 1.5 kB were there already"),
        ([1000, 500], "checked there, sent 1.5 kB in 3.0 s (500 B/s)"),
        ([600, 0], "sent 600 B in 3.0 s (200 B/s), 900 B were there already"),
        ([1000, 900], "sent 1.9 kB in 3.0 s (633 B/s)"),
    ],
)
def test_what_is_said_of_a_push(sent: List[int], ends: str) -> None:
    files = (PushedFile(FILE, sent[0]), PushedFile(OTHER, sent[1], "times"))
    result = PushResult(FAR, files, 3.0)
    assert result.text().startswith("pushed to me@gpu1:/data: 2 files, 1.5 kB, SHA-256 of every")
    assert result.text().endswith(ends)
    assert replace(result, seconds=3.456).json() == {
        "to": "me@gpu1:/data",
        "bytes": 1500,
        "bytes_sent": sum(sent),
        "seconds": 3.46,
        "files": [
            {"name": "it's m", "size": 1000, "sha256": "a" * 64, "sent": sent[0]},
            {"name": "n", "size": 500, "sha256": "b" * 64, "sent": sent[1]},
        ],
    }
