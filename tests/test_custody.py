"""The log of custody: its chain, what breaks it, and how it travels."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfship.archive.custody import CUSTODY_PATH, FIRST, Event, add_line, next_line, read_chain
from hfship.base.errors import IntegrityError
from hfship.base.manifest import read_manifest
from hfship.commands.custody import CustodyLog, SignedLine, _checked_log, _signed_lines
from hfship.commands.run import main
from support import archives as a
from test_approval import make_key

ON = {"HFSHIP_POLICY_CUSTODY": "true"}
EVENT = Event("packed", "m", "ab" * 32, "", {"bytes": 3})


def log(count):
    content = b""
    for number in range(count):
        content += next_line(content, EVENT, f"2026-01-0{number + 1}T00:00:00Z", "kim", "host")
    return content


def lines_of(content):
    return content.splitlines(keepends=True)


def forged(content):
    """The log, with another user in its second line."""
    rows = lines_of(content)
    rows[1] = rows[1].replace(b'"kim"', b'"eve"')
    return b"".join(rows)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (lambda log: log, []),
        (lambda _: b"", []),
        (lambda log: b"".join(lines_of(log)[1:]), ["line 1: it says that it is line 2", "line 2"]),
        (lambda log: b"".join(lines_of(log)[:-1]), []),  # nobody can tell: SECURITY.md says so
        (lambda log: b"".join(reversed(lines_of(log))), ["line 1: it says", "line 3: it says"]),
        (lambda log: log[:-1], ["the last line is cut"]),
        (lambda log: log[:-9], ["line 3: it is no entry", "the last line is cut"]),
        (forged, ["line 3: it was not written behind line 2"]),
        (lambda log: log.replace(b'"n":2', b'"n":5'), ["line 2: it says", "line 3"]),
        (lambda log: log.replace(FIRST.encode(), b"1" * 64), ["line 1: it is not the first", "line 2"]),
        (lambda log: log + b"\n", ["line 4: it is no entry"]),
        (lambda log: log + b"[" * 100_000 + b"\n", ["line 4: it is no entry"]),
        (lambda log: log + b'{"n": true}\n', ["line 4: it is no entry"]),
        (lambda _: b"\xff\xfe\n", ["line 1: it is no entry"]),
    ],
)  # fmt: skip
def test_what_was_done_to_a_log_is_told(change, problems):
    found = read_chain(change(log(3))).problems
    assert len(found) >= len(problems)
    assert bool(found) == bool(problems)
    for problem, said in zip(problems, [found[0], found[-1]] if found else []):
        assert said.startswith(problem)


def test_a_break_stays_told_behind_what_is_added_later():
    broken = forged(log(3))
    longer = broken + next_line(broken, EVENT, "2026-02-01T00:00:00Z", "kim", "host")
    chain = read_chain(longer)
    assert chain.problems[-1].startswith("line 4 tells: line 3: it was not written behind line 2")
    mended = b"".join(lines_of(longer)[3:])
    assert "tells" in "".join(read_chain(mended).problems)


def test_lines_of_many_writers_follow_each_other(tmp_path):
    children = []
    for _ in range(8):
        pid = os.fork()
        if not pid:
            for _ in range(5):
                add_line(tmp_path, "log.jsonl", EVENT)
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    chain = read_chain((tmp_path / "log.jsonl").read_bytes())
    assert len(chain.lines) == 40
    assert chain.problems == []


def test_a_link_or_pipe_in_its_place_is_not_written_to(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "log").symlink_to(other)
    with pytest.raises(OSError, match="symbolic link|not a file|Too many"):
        add_line(tmp_path, "log", EVENT)
    assert other.read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe|No such device"):
        add_line(tmp_path, "pipe", EVENT)


def events(path):
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_the_log_travels_beside_the_archive_and_never_in_it(tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    hfship("pack", tmp_path / "m", "-o", tmp_path / "without")
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env=ON)
    archive = tmp_path / "out/m.tar.zst"
    assert archive.read_bytes() == (tmp_path / "without/m.tar.zst").read_bytes()
    assert not list((tmp_path / "without").glob("*custody*"))
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env=ON)  # was there: nothing to note
    hfship("verify", archive, env=ON)
    hfship("push", archive, f"{tmp_path}/far/", env=ON)
    far = tmp_path / "far/m.tar.zst.custody.jsonl"
    assert events(far) == events(archive.with_name(far.name)) == ["packed", "verified", "pushed"]
    hfship("unpack", tmp_path / "far/m.tar.zst", "-o", tmp_path / "un", env=ON)
    inside = tmp_path / "un/m/.hfship/custody.jsonl"
    assert events(inside) == ["packed", "verified", "pushed", "unpacked"]
    hfship("unpack", tmp_path / "far/m.tar.zst", "-o", tmp_path / "un", env=ON)
    hfship("verify", tmp_path / "un/m", env=ON)
    assert events(inside)[-2:] == ["unpacked", "verified"]
    shown = hfship("custody", tmp_path / "un/m").stdout
    assert "5 lines, each bound to the one before" in shown
    (row,) = json.loads(hfship("custody", archive, "--json").stdout)
    assert row["ok"]
    assert row["lines"][-1]["details"]["to"].endswith("far")
    # A damaged file is written again: the history of the folder stays.
    (tmp_path / "un/m/config.json").write_text("changed")
    hfship("unpack", tmp_path / "far/m.tar.zst", "-o", tmp_path / "un", env=ON)
    assert events(inside)[-3:] == ["unpacked", "verified", "unpacked"]


def test_a_forged_log_is_told_and_kept(tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env=ON)
    archive = tmp_path / "out/m.tar.zst"
    hfship("verify", archive, env=ON)
    hfship("verify", archive, env=ON)
    beside = archive.with_name("m.tar.zst.custody.jsonl")
    beside.write_bytes(
        forged(beside.read_bytes()).replace(b'"event":"packed"', b'"event":"peeked"')
    )
    done = hfship("custody", archive, code=6)
    assert "line 2: it was not written behind line 1" in done.stderr
    assert "peeked" in done.stdout
    done = hfship("unpack", archive, "-o", tmp_path / "un", env=ON)
    assert "its log of custody is broken" in done.stderr
    assert "tells: line 2" in hfship("custody", tmp_path / "un/m", code=6).stderr


def test_what_a_signature_carries_has_to_be_in_the_log(tmp_path, hfship):
    """A log that was written anew has a chain of its own; who signed the old one is not in it."""
    a.make_model(tmp_path / "m", a.SMALL)
    key, public = make_key(tmp_path / "kim.pem")
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env=ON)
    archive = tmp_path / "out/m.tar.zst"
    hfship("sign", archive, "--key", key, "--as", "security", env=ON)
    said = hfship("custody", archive).stdout
    assert "signed up to line 1 by security (key " in said and "unproven" in said
    (tmp_path / "keys/security").mkdir(parents=True)
    shutil.copy(public, tmp_path / "keys/security/kim.pem")
    trusting = {"HFSHIP_KEYS": str(tmp_path / "keys")}
    (row,) = json.loads(hfship("custody", archive, "--json", env=trusting).stdout)
    (signature,) = row["signatures"]
    assert (signature["key"], signature["line"], signature["proven"]) == (
        "security/kim.pem",
        1,
        True,
    )

    beside = archive.with_name("m.tar.zst.custody.jsonl")
    manifest = json.loads(beside.read_text().splitlines()[0])["manifest"]
    anew = next_line(b"", Event("packed", "m", manifest), "2026-01-01T00:00:00Z", "eve", "host")
    beside.write_bytes(anew)
    for env in ({}, trusting):
        done = hfship("custody", archive, code=6, env=env)
        assert "signed a line that is not in this log" in done.stderr

    # A key that the site does not trust tells nothing, neither for the log nor against it.
    (tmp_path / "keys/security/kim.pem").unlink()
    said = hfship("custody", archive, env=trusting).stdout
    assert "counts for nothing: its key is not in the folder of keys" in said
    # The model folder that is made of it brings both along.
    hfship("unpack", archive, "-o", tmp_path / "un", env=ON)
    assert "not in this log" in hfship("custody", tmp_path / "un/m", code=6).stderr


def test_a_log_of_another_version_is_told(tmp_path, hfship):
    for name, files in (("one", a.SMALL), ("two", {**a.SMALL, "more": b"1"})):
        a.make_model(tmp_path / name / "m", files)
        hfship("pack", tmp_path / name / "m", "-o", tmp_path / f"out-{name}", env=ON)
    one, two = (tmp_path / f"out-{name}/m.tar.zst.custody.jsonl" for name in ("one", "two"))
    shutil.copy(one, two)
    done = hfship("custody", two.with_name("m.tar.zst"), code=6)
    assert "of another version of the model" in done.stderr


def test_no_log_and_no_place_for_one(tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out")
    assert "there is no log of custody" in hfship("custody", tmp_path / "m", code=5).stderr
    (tmp_path / "out/m.tar.zst.custody.jsonl").mkdir()
    hfship("verify", tmp_path / "out/m.tar.zst", env=ON)


# -- what `custody` shows


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        ({}, ""),
        ({"commit": "0123456789abcdef", "files": 3}, "commit 0123456789ab, files 3"),
        ({"bytes": 16_000_000_000, "to": "usb"}, "bytes 16.0 GB, to usb"),
        ({"bytes": "many"}, "bytes many"),
        ({"whole": True, "delta": False, "base": ""}, "whole"),
        ({"endpoint": "https://hub", "proof": "sum", "seconds": 3, "words": ["a"]}, ""),
        ({"signature": "x", "role": "security"}, "role security"),
        ({"note": "a\x1b[2Jb"}, "note a"),
        ({"note": "x" * 300}, "note " + "x" * 195),
    ],
)
def test_the_details_of_an_event_are_one_line(details, shown):
    event = Event("packed", "m", "ab" * 32, "cd" * 32, details)
    chain = read_chain(next_line(b"", event, "2026-01-02T03:04:05.6Z", "kim", "host"))
    _, row, verdict = CustodyLog(Path("/m/log"), chain).text().splitlines()
    words = f"1  2026-01-02 03:04:05Z  packed  kim@host  {'cd' * 6}  {shown}".rstrip()
    assert row.startswith(words) and "\x1b" not in row and len(row) <= len(words) + 20
    assert verdict == "/m/log: 1 lines, each bound to the one before"


def test_a_line_that_is_no_entry_has_its_row_and_its_problem():
    chain = read_chain(log(1) + b"junk\n")
    shown = CustodyLog(Path("/log"), chain, error=IntegrityError("broken", "", ""))
    assert "2  ?" in shown.text() and "no entry" in shown.text()
    assert shown.text().endswith("/log: broken")
    value = shown.json()
    assert not value["ok"] and value["head"] == chain.head
    assert [line["problem"] for line in value["lines"]] == ["", "it is no entry"]


@pytest.mark.parametrize(
    ("line", "proven", "problem", "said"),
    [
        (3, True, "", "signed up to line 3 by security (kim)"),
        (3, False, "", "signed up to line 3 by security (kim), unproven: HFSHIP_KEYS names no"),
        (0, True, "", "m.sig: security (kim) signed a line that is not in this log"),
        (3, True, "expired", "m.sig counts for nothing: expired"),
        (0, True, "expired", "m.sig counts for nothing: expired"),
    ],
)
def test_what_a_signature_says_of_a_log(line, proven, problem, said):
    signed = SignedLine("m.sig", "security", "kim", line, proven, problem)
    assert signed.text().startswith(said) and proven != ("unproven" in signed.text())
    shown = CustodyLog(Path("/log"), read_chain(log(3)), [signed]).text()
    assert (said in shown) == bool(line or problem), "a line that is missing is told as an error"


class Desk:
    """Somebody with a folder of models and one of archives, a model in both, and their logs."""

    def __init__(self, root, capsys):
        self.models, self.packages, self._capsys = root / "models", root / "packages", capsys
        a.make_model(self.models / "m", a.SMALL)
        self.archive = a.pack(self.models / "m", self.packages).path
        self.beside = self.packages / f"{self.archive.name}.custody.jsonl"
        self.inside = self.models / "m" / CUSTODY_PATH
        manifest = hashlib.sha256(read_manifest(self.models / "m").to_json().encode()).hexdigest()
        self.event = Event("packed", "m", manifest)
        self.write(self.beside, self.event)
        self.write(self.inside, self.event, self.event)

    def write(self, path, *events):
        content = b""
        for event in events:
            content += next_line(content, event, "2026-01-01T00:00:00Z", "kim", "host")
        path.write_bytes(content)

    def custody(self, *words):
        """(exit code, the logs that were shown, what was said of them)."""
        self._capsys.readouterr()
        code = main(["custody", "--json", *map(str, words)])
        said = self._capsys.readouterr()
        rows = json.loads(said.out or "[]")
        return code, [(row.get("path"), row.get("ok")) for row in rows], said.err


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    made = Desk(tmp_path, capsys)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HFSHIP_MODELS_DIR", str(made.models))
    monkeypatch.setenv("HFSHIP_SITE_MODELS_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("HFSHIP_PACKAGE_DIR", str(made.packages))
    monkeypatch.setenv("HFSHIP_TRANSFER_DIR", str(tmp_path / "transfer"))
    monkeypatch.chdir(tmp_path)
    return made


def test_a_name_means_the_folder_and_the_name_of_an_archive_the_archive(desk):
    inside, beside = (str(desk.inside), True), (str(desk.beside), True)
    assert desk.custody("m") == (0, [inside], "")
    assert desk.custody("m.tar.zst") == (0, [beside], "")
    assert desk.custody(desk.archive, desk.models / "m") == (0, [beside, inside], "")
    shutil.rmtree(desk.models / "m")
    assert desk.custody("m") == (0, [beside], "")


def test_a_log_of_another_version_is_broken_unless_nobody_knows_the_version(desk):
    desk.write(desk.beside, Event("packed", "m", "0" * 64))
    code, logs, said = desk.custody(desk.archive, "m")
    assert (code, logs) == (6, [(str(desk.beside), False), (str(desk.inside), True)])
    assert "its last line is of another version of the model than lies there" in said
    os.truncate(desk.archive, 100)  # of which the manifest cannot be read
    assert desk.custody(desk.archive)[:2] == (0, [(str(desk.beside), True)])


def test_earlier_lines_may_be_of_another_version(desk):
    desk.write(desk.inside, Event("fetched", "m", "0" * 64), desk.event)
    assert desk.custody("m")[0] == 0


def test_without_a_log_there_is_nothing_to_show(desk):
    desk.inside.unlink()
    code, _, said = desk.custody("m")
    assert code == 5 and f"there is no log of custody at {desk.inside}" in said


# -- what signatures say of a log


def bundle(monkeypatch, **signed):
    """Bundles by name: what each carries, or the error of reading it."""

    def bundle_facts(path):
        value = signed[path.name]
        if isinstance(value, Exception):
            raise value
        manifest, line = value
        return "f" * 64, SimpleNamespace(custody=line, manifest=manifest, role="sec\x1b")

    monkeypatch.setattr("hfship.archive.signature.bundle_facts", bundle_facts)
    return [Path("/there", name) for name in signed]


@pytest.mark.parametrize("keys", ["", "/keys"])
def test_signatures_of_what_lies_there_name_lines_of_the_log(keys, monkeypatch):
    chain = read_chain(log(2))
    first, second = (line.sha256 for line in chain.lines)
    bundles = bundle(
        monkeypatch,
        broken=ValueError("no bundle"),
        gone=OSError("gone"),
        odd=IntegrityError("odd", "", ""),
        plain=("m1", ""),
        other=("m2", first),
        one=("m1", first),
        two=("m1", second),
        lost=("m1", "9" * 64),
    )
    found = [
        SimpleNamespace(bundle="one", key="kim.pem", problem=""),
        SimpleNamespace(bundle="two", key="eve.pem", problem="its key is revoked"),
    ]

    def find_approvals(asked, policy, day):
        assert (asked, policy.keys, len(day)) == (bundles, "/keys", 10)
        return SimpleNamespace(found=found)

    monkeypatch.setattr("hfship.archive.approval.find_approvals", find_approvals)
    place = SimpleNamespace(path=Path("/l"), bundles=bundles, manifest="m1")
    rows = _signed_lines(place, chain, SimpleNamespace(keys=keys))
    short = "key " + "f" * 12
    assert "\x1b" not in rows[0].role
    assert [(row.bundle, row.key, row.line, row.proven, row.problem) for row in rows] == [
        ("one", "kim.pem" if keys else short, 1, bool(keys), ""),
        ("two", "eve.pem" if keys else short, 2, bool(keys), "its key is revoked" if keys else ""),
        ("lost", short, 0, False, ""),
    ]
    place.manifest = ""  # nobody knows what lies there
    names = [row.bundle for row in _signed_lines(place, chain, SimpleNamespace(keys=keys))]
    assert names == ["other", "one", "two", "lost"]


@pytest.mark.parametrize(
    ("line", "problem", "broken"),
    [
        ("9" * 64, "", True),
        ("9" * 64, "its key is revoked", False),
        (None, "", False),
        (None, "its key is revoked", False),
    ],
)
def test_a_line_that_was_signed_and_is_gone_breaks_the_log(line, problem, broken, monkeypatch):
    content = log(2)
    chain = read_chain(content)
    bundles = bundle(monkeypatch, one=("ab" * 32, line or chain.lines[0].sha256))
    found = [SimpleNamespace(bundle="one", key="kim.pem", problem=problem)]
    monkeypatch.setattr(
        "hfship.archive.approval.find_approvals", lambda *_: SimpleNamespace(found=found)
    )
    place = SimpleNamespace(path=Path("/l"), bundles=bundles, manifest="ab" * 32)
    told = _checked_log(place, content, SimpleNamespace(keys="/keys"))
    assert bool(told.error) == broken
    if broken:
        assert "one: sec" in told.error.why and "not in this log" in told.error.why
    assert [one.bundle for one in told.signatures] == ["one"]


def test_a_last_line_that_is_no_entry_breaks_the_log_by_itself():
    content = log(1) + b"odd\n"
    place = SimpleNamespace(path=Path("/l"), bundles=[], manifest="cd" * 32)
    told = _checked_log(place, content, SimpleNamespace(keys=""))
    assert "another version" not in told.error.why
