# SPDX-License-Identifier: Apache-2.0
"""What fetching models and images have in common: what is brought, what is said and noted of it, with
a Hub that is played. test_fetch.py has servers."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional, Tuple

import pytest

from hfship.archive.custody import CUSTODY_PATH
from hfship.base.errors import DiskError, HfshipError, IntegrityError, NotFoundError
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.commands import fetching
from hfship.commands.context import Context
from hfship.commands.fetch_image import note_image
from hfship.commands.fetching import (
    bring,
    fetch_missing,
    finish_model,
    raise_worst,
    report_speed,
    show_fetch_plans,
)
from hfship.commands.parser import parse_words
from support import archives as a

GONE, WRONG = NotFoundError("a is not there"), IntegrityError("b is wrong")
COMMIT = "0123456789abcdef" * 2 + "01234567"


class Told:
    """A context of `fetch`, and what was said in it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        args, given = parse_words(["fetch", "org/m", *words])
        reporter = Reporter("plain", 0, self.out, self.err, as_json="--json" in words)
        self.context = Context(args, load_settings({"HOME": str(folder)}), reporter, given)


def plan_of(folder: Path, *transfers: int, inodes: int = 1) -> Any:
    """A plan of the files w0, w1..., of these sizes, to fetch; `config.json` is here."""
    files = [
        SimpleNamespace(path=f"w{n}", size=size, etag=f"e{n}") for n, size in enumerate(transfers)
    ]
    source = SimpleNamespace(
        endpoint="https://hub", repo="org/m", resolved_repo="Org/M", commit=COMMIT
    )
    here = SimpleNamespace(path="config.json", size=3, etag="e")
    return SimpleNamespace(
        name=folder.name,
        folder=folder,
        wanted=[here, *files],
        present={"config.json": object()},
        transfers=[SimpleNamespace(remote=one) for one in files],
        new_inodes=inodes,
        snapshot=SimpleNamespace(source=source),
    )


# -- what is wrong


@pytest.mark.parametrize(
    "errors, raised",
    [([], None), ([GONE], GONE), ([GONE, WRONG], WRONG), ([WRONG, GONE], WRONG)],
)
def test_wrong_bytes_are_worse_than_none(
    errors: List[HfshipError], raised: Optional[HfshipError]
) -> None:
    if raised is None:
        raise_worst(errors)
        return
    with pytest.raises(HfshipError) as caught:
        raise_worst(errors)
    assert caught.value is raised


@pytest.mark.parametrize("came", [0, 5_000_000])
def test_what_is_missing_is_brought_and_its_speed_is_said(
    came: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(tmp_path, "-j", "3", "--limit-rate", "2M", "--mirror", "https://b")
    asked: List[Any] = []

    def fetched(*given: Any) -> Tuple[Any, int]:
        asked.append(given)
        return [], came

    times = iter((10.0, 12.0))
    monkeypatch.setattr("time.monotonic", lambda: next(times, 12.0))
    monkeypatch.setattr(fetching, "fetch_missing", fetched)
    plan, client, stop = plan_of(tmp_path / "m"), object(), object()
    bring(client, plan, tmp_path, stop, told.context)  # type: ignore[arg-type]
    monkeypatch.undo()
    [(*given, settings, args)] = asked
    assert given == [client, [plan], tmp_path, stop] and args is told.context.args
    assert (settings.connections, settings.limit_bps) == (3, 2_000_000)
    assert settings.mirrors == ("https://b",)
    assert ("fetched 5.0 MB in 2.0 s (2.5 MB/s)" in told.err.getvalue()) == bool(came)


@pytest.mark.parametrize("errors", [[], [GONE]])
def test_verify_brings_nothing(
    errors: List[HfshipError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, plan = Told(tmp_path, "--verify"), plan_of(tmp_path / "m", 7)
    looked: List[Any] = []
    monkeypatch.setattr(
        "hfship.hub.fetch.missing_or_wrong", lambda one: looked.append(one) or errors
    )
    monkeypatch.setattr(fetching, "fetch_missing", lambda *_: pytest.fail("something was fetched"))
    nobody: Any = None
    with pytest.raises(NotFoundError) if errors else contextlib.nullcontext():
        bring(nobody, plan, tmp_path, nobody, told.context)
    assert looked == [plan]


# -- room, before a byte comes


class Hub:
    """What is mended of plans, and what is asked of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: List[Any] = []
        self.full = ""
        monkeypatch.setattr("hfship.hub.fetch.about_one_of", self.about)
        monkeypatch.setattr("hfship.hub.fetch.mend_plan", self.mend)
        monkeypatch.setattr("hfship.hub.fetch.bytes_to_write", lambda plan: 100 + plan.new_inodes)
        monkeypatch.setattr("hfship.hub.fetch.fetch_files", self.fetch)
        monkeypatch.setattr(fetching, "require_room", lambda *given: self.room("room", *given))
        monkeypatch.setattr(fetching, "require_inodes", lambda *given: self.room("inodes", *given))

    def about(self, reporter: Any, name: str, number: int, count: int) -> Any:
        self.did.append(f"{name} {number}/{count} {reporter}")
        return contextlib.nullcontext()

    def mend(self, client: Any, plan: Any, root: Path, repair_only: bool) -> Any:
        self.did.append((plan.name, root.name, repair_only))
        return SimpleNamespace(**{**vars(plan), "transfers": plan.transfers[1:]})

    def room(self, what: str, root: Path, *given: Any) -> None:
        self.did.append((what, root.name, *given))
        if what == self.full:
            raise DiskError(f"no {what}")

    def fetch(self, client: Any, plans: Any, stop: Any, settings: Any, engine: str) -> int:
        self.did.append([plan.name for plan in plans] + [stop, settings, engine])
        return 9


@pytest.mark.parametrize("repair", [False, True])
def test_room_is_asked_for_what_cannot_be_mended(
    repair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    told = Told(tmp_path, *(["--repair"] if repair else []))
    plans = [plan_of(tmp_path / "m", 5, 7, 6, inodes=3), plan_of(tmp_path / "n", 9, inodes=4)]
    client: Any = SimpleNamespace(reporter="R")
    given: Any = ("stop", "settings")
    mended, came = fetch_missing(client, plans, tmp_path / "root", *given, told.context.args)
    assert came == 9 and [plan.name for plan in mended] == ["m", "n"]
    step = "choose another disk with -o"
    assert hub.did == [
        "m 1/2 R",
        ("m", "root", repair),
        "n 2/2 R",
        ("n", "root", repair),
        ("room", "root", 207, 7, "fetch", step),
        ("inodes", "root", 3, "fetch", step),
        ["m", "n", "stop", "settings", "own"],
    ]


@pytest.mark.parametrize("full", ["room", "inodes"])
def test_without_room_nothing_is_fetched(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    hub.full = full
    client: Any = SimpleNamespace(reporter="R")
    given: Any = ("stop", "settings")
    with pytest.raises(DiskError):
        fetch_missing(
            client, [plan_of(tmp_path / "m")], tmp_path, *given, Told(tmp_path).context.args
        )
    assert hub.did[-1][0] == full


def test_nothing_to_fetch_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    client: Any = SimpleNamespace(reporter="R")
    given: Any = ("stop", "settings")
    fetch_missing(client, [plan_of(tmp_path / "m")], tmp_path, *given, Told(tmp_path).context.args)
    assert [row[2:4] for row in hub.did if row[0] in ("room", "inodes")] == [(101, 0), (0, "fetch")]


# -- what is said


def test_a_speed_that_a_bar_has_said_goes_to_the_log_alone() -> None:
    said: List[str] = []
    for draws in (True, False):
        reporter: Any = SimpleNamespace(
            draws_bars=draws,
            log=lambda level, text: said.append(f"log {level} {text}"),
            info=lambda text: said.append(f"info {text}"),
        )
        report_speed(3_000_000, 1.5, reporter)
    text = "fetched 3.0 MB in 1.5 s (2.0 MB/s)"
    assert said == [f"log info {text}", f"info {text}"]


def test_a_plan_is_shown_file_by_file(tmp_path: Path) -> None:
    plans = [plan_of(tmp_path / "m", 5000, 7000), plan_of(tmp_path / "n")]
    told = Told(tmp_path, "--dry-run")
    show_fetch_plans(plans, told.context)
    shown = told.out.getvalue().splitlines()
    assert shown[0] == f"Org/M at {COMMIT} -> {tmp_path}/m"
    rows = [line.split() for line in shown[1:5]]
    assert rows == [
        ["file", "size", "state"],
        ["config.json", "3", "B", "here"],
        ["w0", "5.0", "kB", "missing"],
        ["w1", "7.0", "kB", "missing"],
    ]
    assert shown[5].startswith("2 of 3 files to fetch, 12.0 kB; ") and shown[5].endswith(" free")
    assert shown[-1].startswith("0 of 1 file to fetch, 0 B; ")

    told = Told(tmp_path, "--dry-run", "--json")
    show_fetch_plans(plans, told.context)
    rows = json.loads(told.out.getvalue())
    assert rows[1] == {
        "schema": "",
        "name": "m",
        "path": "w0",
        "size": 5000,
        "etag": "e0",
        "present": False,
    }
    assert [row["present"] for row in rows] == [True, False, False, True]


# -- what is noted


@pytest.mark.parametrize(
    "words, transfers, proof, noted",
    [
        ([], [5], "every file verified", True),
        ([], [], "verified earlier, nothing to fetch", False),
        (["--verify"], [], "every file verified", False),
    ],
)
def test_a_model_that_came_is_noted_in_its_folder(
    words: List[str],
    transfers: List[int],
    proof: str,
    noted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "m"
    manifest = a.make_model(folder, {"w": b"123"})
    accepted: List[Any] = []

    def finish(plan: Any, accept: Any) -> Any:
        return accept(folder, manifest)

    monkeypatch.setattr("hfship.hub.fetch.finish_fetch", finish)
    monkeypatch.setattr(fetching, "admit", lambda *given: accepted.append(given) or manifest)
    told = Told(tmp_path, *words)
    done = finish_model(plan_of(folder, *transfers), told.context)
    assert (done.name, done.repo, done.commit, done.folder) == ("m", "org/m", COMMIT, folder)
    assert (done.files, done.size, done.fetched_files, done.proof) == (1, 3, len(transfers), proof)
    [(place, admitted, policy, reporter)] = accepted
    assert (place, admitted, reporter) == (folder, manifest, told.context.reporter)
    assert policy.custody and (folder / CUSTODY_PATH).exists() == noted
    if noted:
        line = json.loads((folder / CUSTODY_PATH).read_text())
        assert line["event"] == "fetched" and line["details"] == {
            "endpoint": "https://hub",
            "repo": "Org/M",
            "commit": COMMIT,
            "files": 1,
            "proof": "SHA-256 or git blob id of the Hub, of what was written",
        }


def test_an_image_that_came_is_noted_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "app_1"
    manifest = a.make_model(folder, {"w": b"123"})
    facts = SimpleNamespace(reference="r.example/org/app:1", digest="sha256:0")
    plan: Any = SimpleNamespace(image=SimpleNamespace(facts=facts), files=plan_of(folder))
    note_image(plan, manifest, Told(tmp_path).context)
    line = json.loads((folder / CUSTODY_PATH).read_text())
    assert line["event"] == "fetched" and line["details"] == {
        "endpoint": "https://hub",
        "reference": "r.example/org/app:1",
        "digest": "sha256:0",
        "files": 1,
        "proof": "SHA-256 that the registry names blobs by, of what was written",
    }
