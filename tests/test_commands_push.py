# SPDX-License-Identifier: Apache-2.0
"""`push`: what it makes of its words, what is pushed in which order, and what comes next there; with
a far side, and a registry, that are played. test_push.py and test_registry_push.py have real ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from hfship.archive.custody import CUSTODY
from hfship.base.errors import HfshipError
from hfship.base.manifest import Manifest
from hfship.base.report import Reporter
from hfship.base.values import replace
from hfship.commands import push_registry
from hfship.commands.push import limit_bps
from hfship.commands.push_registry import RegistryPush
from hfship.commands.run import guarded, run_line
from hfship.hub.registry_protocol import parse_reference
from hfship.ops.model_forms import Pushable
from hfship.ops.push import PUSH_JOBS, PushedFile, PushResult
from hfship.ops.registry_push import known_blob
from support import archives as a


class Said(io.StringIO):
    """What is said, to a terminal or to none."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


class Played:
    """A machine with the packed models m and n, and what became of a push."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.packages, self.transfer = root / "packages", root / "transfer"
        self.pushes: List[Tuple[Any, ...]] = []
        self.asked: List[bool] = []
        self.sent = 7

    @contextlib.contextmanager
    def connected(self, to: Any, may_ask: bool, _: Reporter) -> Iterator[Any]:
        self.asked.append(may_ask)
        yield to

    def push(
        self, to: Any, files: Sequence[Any], jobs: int, limit: int, reporter: Reporter
    ) -> PushResult:
        names = [file.name for file in files]
        contents = {file.name: file.path.read_bytes() for file in files}
        self.pushes.append((to, names, jobs, limit, reporter, contents))
        return PushResult(to, tuple(PushedFile(file, self.sent) for file in files), 1.0)

    def run(self, *words: str, terminal: bool = False) -> Tuple[int, str, str]:
        """(exit code, result, what was said); what comes next is in `next`."""
        self.pushes, self.asked = [], []
        out, err = io.StringIO(), Said()
        err.terminal = terminal
        reporter = Reporter("plain", 0, out, err, as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line(["push", *words], reporter))
        self.next = list(reporter.run.next_words)
        return code, out.getvalue(), err.getvalue()


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played(tmp_path)
    for name in ("MODELS", "PACKAGE", "TRANSFER", "LOG", "DEPLOY", "SITE_MODELS"):
        folder = {"PACKAGE": made.packages}.get(name, tmp_path / name.lower())
        monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    a.make_model(tmp_path / "models/m", a.SMALL)
    a.pack(tmp_path / "models/m", made.packages)
    a.make_model(tmp_path / "models/n", {"w": a.noise(6000)})
    a.pack(tmp_path / "models/n", tmp_path / "n", frame_size=1000, split=4000)
    for path in (tmp_path / "n").iterdir():
        shutil.move(str(path), made.packages / path.name)
    (tmp_path / "n").rmdir()
    monkeypatch.setattr("hfship.ops.destination.connected", made.connected)
    monkeypatch.setattr("hfship.ops.push.push", made.push)
    return made


def test_archives_go_with_what_lies_beside_them(played: Played) -> None:
    code, out, said = played.run("m", "n", "ops@far:/in", "-p", "3", "-i", "~/k", "--json")
    assert code == 0, said
    [(to, names, jobs, limit, _, _)] = played.pushes
    assert sorted(names) == sorted(path.name for path in played.packages.iterdir())
    assert (str(to), jobs, limit) == ("ops@far:/in", PUSH_JOBS, 0)
    assert "-p" in to.ssh and to.ssh[-1] == str(played.root / "k")
    [row] = json.loads(out)
    assert row["to"] == "ops@far:/in" and len(row["files"]) == len(names)


def test_how_many_at_once_and_how_fast(played: Played) -> None:
    assert played.run("m", "far:/in", "-j", "5", "--bwlimit", "100")[0] == 0
    [(_, _, jobs, limit, _, _)] = played.pushes
    assert (jobs, limit) == (5, 102_400)
    assert [limit_bps(text) for text in (None, "", "2M", "1")] == [0, 0, 2_000_000, 1024]


@pytest.mark.parametrize("stdin, stderr", [(True, True), (True, False), (False, True)])
def test_a_passphrase_is_asked_for_where_somebody_can_answer(
    stdin: bool, stderr: bool, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: stdin if fd == 0 else stderr)
    assert played.run("m", "far:/in", terminal=stderr)[0] == 0
    assert played.asked == [stdin and stderr]


# Words: what comes next.
NEXT: List[Tuple[List[str], List[str]]] = [
    (["m", "far:/in"], ["ssh", "far", "hfship unpack /in/m.tar.zst"]),
    (["m", "n", "ops@far:/in x"], ["ssh", "ops@far", "hfship unpack '/in x/m.tar.zst' '/in x/n.tar.zst'"]),
    (["n", "far:/in", "-p", "3", "-i", "/k", "--ssh-option", "A=b"],
     ["ssh", "-o", "A=b", "-p", "3", "-i", "/k", "far", "hfship unpack /in/n.tar.zst"]),
    (["m", "./packages"], ["hfship", "verify", "HERE/packages/m.tar.zst"]),
    (["m", "n", "./disk"], ["hfship", "verify", "HERE/disk/m.tar.zst", "HERE/disk/n.tar.zst"]),
]  # fmt: skip


@pytest.mark.parametrize("words, step", NEXT)
def test_what_comes_next(words: List[str], step: List[str], played: Played) -> None:
    assert played.run(*words)[0] == 0
    assert played.next == [word.replace("HERE", str(played.root)) for word in step]


def test_the_program_that_travels_along_is_what_unpacks_there(played: Played) -> None:
    (played.packages / "hfship.pyz").write_bytes(b"x")
    assert played.run("m", "far:/in")[0] == 0
    assert played.next == ["ssh", "far", "python3 /in/hfship.pyz unpack /in/m.tar.zst"]


# -- what is noted of it


def custody_of(played: Played, model: str) -> Path:
    """A log of custody beside an archive."""
    path = played.packages / f"{model}.tar.zst{CUSTODY}"
    path.touch()
    return path


def test_a_push_is_noted_in_logs_of_custody_which_go_once_more(played: Played) -> None:
    log = custody_of(played, "m")
    assert played.run("m", "n", "far:/in", "--bwlimit", "2M")[0] == 0
    first, again = played.pushes
    assert log.name in first[1] and first[5][log.name] == b""
    to, names, jobs, limit, reporter, contents = again
    assert (to, names, jobs, limit) == (first[0], [log.name], 1, 2_000_000)
    assert not reporter.err.isatty() and reporter is not first[4]
    [line] = contents[log.name].splitlines()
    noted = json.loads(line)
    assert noted["event"] == "pushed" and log.read_bytes() == contents[log.name]
    sizes = sum(len(content) for content in first[5].values())
    assert noted["details"] == {"to": "far:/in", "bytes": sizes}
    assert len(played.next) == 3


def test_what_cannot_be_opened_and_what_nobody_wants_noted_is_not(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = custody_of(played, "n")
    part = played.packages / "n.tar.zst.0001"
    content = part.read_bytes()
    part.unlink()
    assert played.run("n", "far:/in")[0] == 0
    assert len(played.pushes) == 1 and log.read_bytes() == b""
    # and of those that come behind it the log is
    other = custody_of(played, "m")
    assert played.run("n", "m", "far:/in")[0] == 0
    assert len(played.pushes) == 2 and other.read_bytes() and not log.read_bytes()
    part.write_bytes(content)
    (played.root / "models.toml").write_text("[policy]\ncustody = false\n")
    monkeypatch.setenv("HFSHIP_MODELS_FILE", str(played.root / "models.toml"))
    assert played.run("n", "far:/in")[0] == 0
    assert len(played.pushes) == 1 and log.read_bytes() == b""


# -- which archives


def test_of_a_name_the_first_archive_is_pushed_and_others_are_named(played: Played) -> None:
    shutil.copytree(played.packages, played.transfer)
    code, _, said = played.run("m", "far:/in")
    assert code == 0 and f"m: {played.packages}/m.tar.zst, not {played.transfer}/m.tar.zst" in said
    [(_, names, *_)] = played.pushes
    assert names.count("m.tar.zst") == 1
    for word in (str(played.transfer), str(played.transfer / "m.tar.zst")):
        code, _, said = played.run(word, "far:/in")
        assert code == 0 and "name these" not in said
    monkey = played.root / "sub"
    shutil.move(str(played.transfer), monkey)
    code, _, said = played.run("sub", "far:/in")
    assert code == 0 and "name these" not in said, "a folder of this name means all that is in it"
    assert {"m.tar.zst", "n.tar.zst.0001"} <= {*played.pushes[0][1]}


@pytest.mark.parametrize(
    "word, step",
    [
        ("o", "hfship pack o"),
        ("p", "give a path, or pack it first"),
        ("N2", "give a path, or pack it first"),
    ],
)
def test_of_what_is_not_packed_it_is_said_how(word: str, step: str, played: Played) -> None:
    a.make_model(played.root / "models/o", a.SMALL)
    code, _, said = played.run(word, "far:/in")
    assert code == 5 and f"no archive {word}" in said and step in said and played.pushes == []


@pytest.mark.parametrize(
    "words, said",
    [
        (["m"], "no target is given"),
        (["m", "n"], "no target is given"),
        (["m", "nowhere"], "nowhere is no destination"),
        (["far:/in"], "m"),
        (["m", "far:/in", "--bwlimit", "fast"], "fast"),
        (["m", "-i", "k", "--hosts"], "--port, --identity and --ssh-option"),
        (["m", "-p", "1", "--on", "h"], "--port, --identity and --ssh-option"),
    ],
)
def test_what_makes_no_sense_together(words: List[str], said: str, played: Played) -> None:
    code, _, told = played.run(*words)
    assert code == 2 and said in told and played.pushes == []


# -- into a registry


ARTIFACT = Pushable("artifact", (known_blob(b"abc"), known_blob(b"de")), b"{1}", "type/a")
IMAGE = Pushable("image", (known_blob(b"fghi"),), b"{2}", "type/i")


class Registry:
    """A registry that notes what it is sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forms: Any = [ARTIFACT, IMAGE]
        self.did: List[Any] = []
        self.hashed: List[Any] = []
        monkeypatch.setattr("hfship.ops.model_forms.forms_of", self.forms_of)
        monkeypatch.setattr(push_registry, "registry_client", self.client)
        monkeypatch.setattr("hfship.ops.registry_push.BlobPush", self.blob_push)
        monkeypatch.setattr("hfship.ops.registry_push.put_manifest", self.put)

    def forms_of(self, folder: Path, manifest: Manifest, form: str, count: Any) -> Any:
        self.hashed.append((folder, manifest.name, form, count.__self__.total))
        count(1)
        if isinstance(self.forms, HfshipError):
            raise self.forms
        return self.forms

    def client(self, reference: Any, context: Any, stop: Any, jobs: int) -> str:
        assert not stop.is_set()
        return f"{reference.name} by {jobs}"

    def blob_push(self, client: str, folder: Path, stage: Any, stop: Any) -> Any:
        assert not stop.is_set() and folder.name == "m"

        class Push:
            def push(_, blob: Any) -> int:
                self.did.append((client, blob.digest))
                stage.add(blob.size)
                return blob.size if self.sends else 0

        return Push()

    sends = True

    def put(self, client: str, manifest: bytes, kind: str) -> None:
        self.did.append((client, manifest, kind))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(monkeypatch)


TO = "docker://r.example/org/m:v1"


def test_both_forms_of_a_model_go_each_under_its_tag(played: Played, registry: Registry) -> None:
    code, out, said = played.run("m", TO, "-j", "3", "--json")
    assert code == 0, said
    name = "r.example/org/m:v1"
    assert registry.did == [
        *((f"{name} by 3", blob.digest) for blob in ARTIFACT.blobs),
        (f"{name} by 3", b"{1}", "type/a"),
        (f"{name}-image by 3", IMAGE.blobs[0].digest),
        (f"{name}-image by 3", b"{2}", "type/i"),
    ]
    first, second = json.loads(out)
    assert first.pop("seconds") >= 0 and second.pop("seconds") < 60
    assert first == {
        "schema": "hfship-push/1",
        "name": "m",
        "to": name,
        "form": "artifact",
        "digest": ARTIFACT.digest,
        "blobs": 2,
        "bytes": 5,
        "bytes_sent": 5,
    }
    assert second["to"] == f"{name}-image" and second["bytes"] == second["bytes_sent"] == 4
    size = sum(map(len, a.SMALL.values()))
    assert registry.hashed == [(played.root / "models/m", "m", "both", size)]


def test_one_form_goes_under_the_tag_itself(played: Played, registry: Registry) -> None:
    registry.forms, registry.sends = [IMAGE], False
    code, out, _ = played.run("m", TO, "--form", "image")
    assert code == 0 and registry.did[0][0] == f"r.example/org/m:v1 by {PUSH_JOBS}"
    assert "all was there already" in out


@pytest.mark.parametrize(
    "form, image, size",
    [("both", False, 8), ("image", False, 8), ("artifact", False, 0), ("both", True, 0)],
)
def test_what_is_read_for_the_sums_of_layers(
    form: str, image: bool, size: int, tmp_path: Path
) -> None:
    manifest: Any = a.make_model(tmp_path / "m", {"w": b"12345678"})
    if image:
        manifest = replace(manifest, image=object())
    assert push_registry._hashed(manifest, form) == size


@pytest.mark.parametrize(
    "sent, how",
    [(0, "2 blobs, 5 B; all was there already"), (3, "2 blobs, 5 B; 3 B sent in 2.0 s")],
)
def test_what_a_registry_holds_now(sent: int, how: str) -> None:
    done = RegistryPush(parse_reference(TO), ARTIFACT, "m", sent, 2.0)
    assert done.text() == f"r.example/org/m:v1@{ARTIFACT.digest[:19]}: m as artifact, {how}"
    assert replace(done, seconds=1.234).json()["seconds"] == 1.23


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["m", "n"], 2, f"hfship push NAME {TO}"),
        ([], 2, f"hfship push NAME {TO}"),
        (["x"], 5, "x was not found"),
        (["bare"], 2, "has no manifest, so nothing proves it"),
    ],
)
def test_what_a_registry_is_not_sent(
    words: List[str], code: int, said: str, played: Played, registry: Registry
) -> None:
    (played.root / "models/bare").mkdir()
    done, _, told = played.run(*words, TO)
    assert (done, registry.did) == (code, []) and said in told
    assert registry.hashed == []


def test_a_reference_that_is_none_is_refused(played: Played, registry: Registry) -> None:
    found: Dict[str, Any] = {"code": played.run("m", "docker://")[0], "did": registry.did}
    assert found == {"code": 2, "did": []}
