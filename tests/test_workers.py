"""workers end with us, tell what went wrong, and share frames so that every lane is taken in its order."""

import errno
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT
from hfship.archive.opening import open_archive
from hfship.archive.unpack import UnpackOptions, unpack_archive
from hfship.archive.verify import verify_archive
from hfship.base import workers as room
from hfship.base.errors import DiskError, HostError, IntegrityError, NoRoomError
from hfship.base.files import disk_error
from hfship.base.workers import FORK_SIZE, Done, Outcome, Workers, default_jobs
from support import archives as a


def fail(kind):
    if kind == "disk":
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as exc:
            raise disk_error(exc, "write", ROOT) from exc
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {
        "memory": MemoryError,
        "interrupt": KeyboardInterrupt,
        "damage": IntegrityError,
        "bug": ZeroDivisionError,
    }[kind]("what")


def test_that_the_disk_is_full_is_told_by_a_worker_to_its_parent():
    """Or complete parts would stay on a disk that is full."""
    with Workers(1, lambda _, kind: fail(kind)) as workers, pytest.raises(NoRoomError):
        list(workers.map(["disk"]))


@pytest.mark.parametrize(
    "kind, error, says",
    [
        ("disk", DiskError, "the disk is full"),
        ("damage", IntegrityError, "what"),
        ("memory", HostError, "got no more memory"),
        ("killed", HostError, "ended by SIGKILL"),
        ("interrupt", KeyboardInterrupt, "what"),
        ("bug", ZeroDivisionError, "what"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_raised_here(kind, error, says):
    with pytest.raises(error, match=says) as raised, Workers(
        2, lambda _, what: fail(what)
    ) as workers:
        pids = workers._pids[:]
        workers.map([kind])
    if kind == "disk":
        assert raised.value.__cause__.errno == errno.ENOSPC and raised.value.next_step
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_order_and_progress_is_told(count):
    told = []

    def work(count, number):
        count(number)
        return number * number

    with Workers(count, work, told.append) as workers:
        assert workers.map(range(50)) == [n * n for n in range(50)]
    assert sum(told) == sum(range(50))


class Unsendable(Exception):
    def __reduce__(self):
        raise TypeError("cannot be sent")


def test_an_error_that_cannot_be_sent_is_told_all_the_same():
    def work(_, what):
        raise Unsendable(what)

    with pytest.raises(RuntimeError, match="Unsendable"), Workers(2, work) as workers:
        workers.map(["x"])


def test_each_thread_of_a_few_processes_works_for_its_own_link():
    def work(tell, number):
        tell(number)
        return os.getpid(), threading.get_ident(), number

    told = []
    with Workers(6, work, told.append, 2) as workers:
        found = [workers.call(worker, worker) for worker in range(6)]
    assert [number for *_, number in found] == told == list(range(6))
    assert (
        len({pid for pid, *_ in found}) == 2
        and len({(pid, thread) for pid, thread, _ in found}) == 6
    )


def test_links_of_workers_that_were_are_closed():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    most = descriptors() + 30
    for _ in range(12):
        workers = Workers(8, lambda _, number: number)
        workers.itself = workers  # who is in a circle waits for the collector
        with workers:
            workers.map([1, 2, 3])
    assert descriptors() < most


def test_who_ignores_the_end_of_children_may_have_workers():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Workers(2, lambda _, number: number) as workers:
            assert workers.map([1, 2]) == [1, 2]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_ctrl_c_while_workers_are_forked_waits_and_is_not_lost(monkeypatch):
    fork = os.fork

    def interrupted_fork():
        pid = fork()
        if pid:
            os.kill(os.getpid(), signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", interrupted_fork)
    workers = Workers(2, print)
    with pytest.raises(KeyboardInterrupt), workers:
        pytest.fail("the workers were given out")
    assert len(workers._pids) == 2
    for pid in workers._pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_process_can_be_started(monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(HostError, match="cannot start a worker"), Workers(2, print):
        pass


@pytest.fixture
def large(tmp_path):
    a.make_model(
        tmp_path / "m", {"w1.bin": a.noise(40 << 20), "w2.bin": a.noise(9 << 20, 2), **a.SMALL}
    )
    return tmp_path / "m"


@pytest.mark.parametrize("profile", ["standard", "smallest"])
def test_more_workers_than_files_give_the_same_bytes_and_find_the_same_damage(
    profile, large, tmp_path
):
    files = [
        a.pack(large, tmp_path / f"out{jobs}", jobs=jobs, profile=profile) for jobs in (1, 2, 7, 16)
    ]
    assert len({f.path.read_bytes() for f in files}) == 1
    archive = open_archive(files[0])
    assert verify_archive(archive, 7, a.QUIET) == []
    with a.flipped(files[0].path, archive.frames[4].offset + 99), a.flipped(
        files[0].path, archive.frames[7].offset + 1
    ):
        found = [verify_archive(archive, jobs, a.QUIET) for jobs in (1, 2, 7)]
        assert len(found[0]) == 2 and found[0] == found[1] == found[2]
    unpack_archive(archive, tmp_path / "un", UnpackOptions(jobs=7), a.QUIET)
    assert a.tree(tmp_path / "un/m") == a.tree(large)


def test_a_file_that_ends_with_a_checkpoint_is_restored(tmp_path, monkeypatch):
    monkeypatch.setattr("hfship.archive.check.FLUSH_SIZE", 8 << 20)
    a.make_model(tmp_path / "m", {"w.bin": a.noise(16 << 20)})
    a.unpack(a.pack(tmp_path / "m", tmp_path / "out"), tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == a.tree(tmp_path / "m")


def workers_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("command", ["pack", "verify", "unpack"])
@pytest.mark.parametrize(
    "victim, sent, code",
    [("parent", 9, -9), ("worker", 9, 9), ("group", 2, 130), ("group", 15, 130)],
)
def test_no_worker_outlives_its_parent_and_none_dies_unnoticed(
    command, victim, sent, code, large, tmp_path
):
    files = a.pack(large, tmp_path / "in", split=16_000_000)
    argv = {
        "pack": ["pack", large, "-o", tmp_path / "out", "--split", "16M"],
        "verify": ["verify", tmp_path / "in"],
        "unpack": ["unpack", files.path, "-o", tmp_path / "un"],
    }[command]
    argv = [sys.executable, ROOT / "hfship.py", *argv, "-j", "3"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(pids := workers_of(process.pid)) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    if victim == "group":
        os.killpg(process.pid, sent)
    else:
        os.kill(process.pid if victim == "parent" else pids[1], sent)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said and (victim != "worker" or "ended by SIGKILL" in said)
    deadline = time.monotonic() + 2
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if command == "pack":
        subprocess.run(
            ["sha256sum", "-c", "--quiet", "m.tar.zst.sha256"], check=True, cwd=tmp_path / "out"
        )
    if command == "unpack":
        assert a.tree(tmp_path / "un/m") == a.tree(large)


@pytest.mark.skipif(not hasattr(gc, "get_freeze_count"), reason="a Python without gc.freeze")
def test_what_was_kept_from_workers_is_collected_again():
    before = gc.get_freeze_count()
    with Workers(1, lambda _, number: number) as workers:
        assert workers.map([1]) == [1]
        assert gc.get_freeze_count() == before


def test_there_is_a_worker_for_each_core_that_we_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", {0: {1, 5, 7}, os.getpid(): {1, 5, 7}}.get)
    assert default_jobs() == 3


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_worker_has_one_task_in_hand_and_one_that_waits(count):
    """And says whether it is idle: who has none to do gets the first."""
    asked = []
    left = list(range(7))

    def next_task(worker, idle):
        asked.append((worker, idle))
        return (left.pop(0), "x") if left else None

    with Workers(count, lambda _, number, word: f"{number}{word}") as workers:
        done = list(workers.run(next_task))
        assert not workers.busy
    results = sorted((one.task, one.result) for one in done)
    assert results == [((n, "x"), f"{n}x") for n in range(7)]
    assert {one.worker for one in done} <= set(range(max(count, 1)))
    first = [(worker, idle) for worker in range(max(count, 1)) for idle in (True, False)]
    assert asked[: len(first)] == first


def test_a_task_is_under_way_until_its_result_is_taken():
    for count in (0, 1):
        with Workers(count, lambda _, number: number + 1) as workers:
            assert not workers.busy
            workers.send(0, 7)
            assert workers.busy
            assert workers.receive() == Done(0, (7,), 8)
            assert not workers.busy
            if count:
                assert workers.call(0, 1) == 2 and not workers.busy


def test_a_worker_that_ends_by_itself_is_told_with_its_status():
    with pytest.raises(HostError, match="a worker was ended by status 3") as caught, Workers(
        1, lambda _, status: os._exit(status)
    ) as workers:
        workers.map([3])
    assert caught.value.why == "where memory is short, the kernel does so"
    assert "-j 1 needs least memory" in caught.value.next_step


def test_who_ignores_the_end_of_children_does_not_know_what_ended_a_worker():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(HostError, match="ended by us"), Workers(
            1, lambda _, status: os._exit(status)
        ) as workers:
            workers.map([3])
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_signals_of_a_terminal_are_for_the_parent():
    def handlers(_, number):
        return [signal.getsignal(one) for one in room.ENDING_SIGNALS], number

    with Workers(1, handlers) as workers:
        assert workers.call(0, 1) == ([signal.SIG_IGN] * 3, 1)


@pytest.mark.parametrize(
    "cause, kept",
    [(OSError(5, "x"), True), (RuntimeError("x"), True), (ValueError("x"), False), (None, False)],
)
def test_the_cause_of_an_error_comes_along_where_it_can(cause, kept):
    def work(_, number):
        raise IntegrityError(f"what {number}") from cause

    outcome = Workers(0, work)._outcome_of((7,), print)
    assert type(outcome.error) is IntegrityError and outcome.error.what == "what 7"
    assert outcome.cause is (cause if kept else None) and outcome.result is None


def test_a_bug_is_told_with_the_place_where_it_was():
    outcome = Workers(0, lambda _, number: 1 // number)._outcome_of((0,), print)
    assert type(outcome.error) is ZeroDivisionError
    assert "test_workers.py" in str(outcome.cause)
    assert Workers(0, lambda count, number: count(number))._outcome_of((2,), abs) == Outcome(
        result=2
    )


def test_messages_come_whole_however_they_are_cut():
    ours, theirs = socket.socketpair()
    link = room._Link(ours)
    messages = ["x" * 70_000, None, {"a": 1}]
    sent = b""
    for message in messages:
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        sent += len(content).to_bytes(4, "big") + content
    received = []
    for start in range(0, len(sent), 997):
        link._received += sent[start : start + 997]
        while link.has_message:
            received.append(link.receive())
    assert received == messages and not link._received
    writer = threading.Thread(target=room._Link(theirs).send, args=(messages[0],))
    writer.start()
    assert link.receive() == messages[0]
    writer.join()
    theirs.close()
    with pytest.raises(EOFError):
        link.receive()
    link.close()
    assert ours.fileno() == -1


def test_the_memory_of_a_frame_is_kept_for_the_next(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *words: asked.append(words))
    monkeypatch.setattr(room, "libc", lambda: library)
    room._tune_malloc()
    assert asked == [(-3, FORK_SIZE), (-1, 8 * FORK_SIZE)]
    for other in (None, SimpleNamespace()):
        monkeypatch.setattr(room, "libc", lambda other=other: other)
        room._tune_malloc()


def test_what_is_there_at_a_fork_is_not_collected_by_a_worker():
    frozen = []
    before = gc.get_freeze_count()
    with pytest.raises(KeyError), room._no_collection():
        frozen.append(gc.get_freeze_count())
        raise KeyError
    assert frozen[0] > before and gc.get_freeze_count() == 0


def test_no_descriptor_and_no_process_is_left():
    before = set(os.listdir("/proc/self/fd"))
    with Workers(3, lambda _, number: number) as workers:
        assert workers.map([1, 2]) == [1, 2]
        pids = list(workers._pids)
    del workers
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
