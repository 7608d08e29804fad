"""`watch`: which jobs it shows, how often it looks, and what goes on after a reboot."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.base.report import Reporter
from hfship.commands import watch
from hfship.commands.results import FailedResult
from hfship.commands.run import guarded, run_line
from hfship.commands.watch import PLAIN_INTERVAL_S
from hfship.ops import watch as looks
from hfship.ops.jobs import RECORD_INTERVAL_S, new_record, write_job


@pytest.mark.parametrize(
    "terminal, as_json, interval, expected",
    [
        (True, False, None, ("on_screen", RECORD_INTERVAL_S)),
        (True, False, 3.0, ("on_screen", 3.0)),
        (False, False, None, ("in_lines", PLAIN_INTERVAL_S)),
        (False, False, 3.0, ("in_lines", 3.0)),
        (True, True, 3.0, ("in_lines", 3.0)),
    ],
)
def test_how_often_it_looks(
    terminal: bool, as_json: bool, interval: Optional[float], expected: Any, monkeypatch: Any
) -> None:
    seen = []
    monkeypatch.setattr(looks, "watch_on_screen", lambda *told: seen.append(("on_screen", told[1])))
    monkeypatch.setattr(looks, "watch_in_lines", lambda *told: seen.append(("in_lines", told[1])))
    monkeypatch.setattr(watch, "_require_known", lambda _: None)
    args = SimpleNamespace(all=False, jobs=[], json=as_json, interval=interval, once=False)
    reporter = SimpleNamespace(out=SimpleNamespace(isatty=lambda: terminal))
    context: Any = SimpleNamespace(args=args, reporter=reporter)
    watch.show_jobs(context)
    assert seen == [expected]


class Desk:
    """A folder with the jobs fetch-a and pack-b, and what was said of them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.shown: List[Any] = []
        for name in ("LOG", "MODELS", "DEPLOY"):
            monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(root / name.lower()))
        monkeypatch.setenv("HOME", str(root))
        monkeypatch.setattr("hfship.ops.jobs.OTHER_LOGS", str(root / "home/*/logs"))
        (root / "log").mkdir()
        for name in ("fetch-a", "pack-b"):
            write_job(root / "log", new_record(name, name.split("-"), False, {}))

    def run(self, *words: str) -> Tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        reporter = Reporter("plain", 0, out, err, as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line(["watch", *words], reporter))
        return code, out.getvalue(), err.getvalue()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


@pytest.mark.parametrize("words, jobs", [([], ["fetch-a", "pack-b"]), (["pack-b"], ["pack-b"])])
def test_the_jobs_that_are_named_are_shown(words: List[str], jobs: List[str], desk: Desk) -> None:
    code, out, _ = desk.run("--json", *words)
    assert code == 0 and sorted(row["name"] for row in json.loads(out)) == jobs
    code, out, _ = desk.run("--once", "--all", *words)
    assert code == 0 and [name in out for name in ("fetch-a", "pack-b")] == [
        name in jobs for name in ("fetch-a", "pack-b")
    ]


def test_files_that_are_no_records_are_told_once(desk: Desk) -> None:
    (desk.root / "log/torn.json").write_text("{")
    code, _, err = desk.run("--json")
    assert code == 0 and err.count("torn.json") == 1


def test_of_a_job_that_nobody_has_the_others_are_named(desk: Desk) -> None:
    code, _, err = desk.run("--once", "fetch-b")
    assert code == 5 and "no such job: fetch-b" in err and "hfship watch --once" in err
    assert "fetch-a" in err and "pack-b" in err
    for path in (desk.root / "log").iterdir():
        path.unlink()
    assert "jobs: none" in desk.run("--once", "fetch-b")[2]


@pytest.mark.parametrize("words, with_older", [([], False), (["--all"], True), (["pack-b"], True)])
def test_older_jobs_are_shown_where_they_are_asked_for(
    words: List[str], with_older: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []

    def lines(jobs: Any, now: float, width: int, height: int, older: bool) -> List[str]:
        asked.append((width, height, older))
        return ["one", "two"]

    monkeypatch.setattr(looks, "watch_lines", lines)
    monkeypatch.setenv("COLUMNS", "77")
    assert desk.run("--once", *words)[1] == "one\ntwo\n"
    assert asked == [(77, 1000, with_older)]


RESUMED = SimpleNamespace(text=lambda: "resumed", json=lambda: {"state": "resumed"})
FAILED = FailedResult(HostError("no python"), "pack-b")


@pytest.mark.parametrize(
    "results, code, said",
    [
        ([], 0, "nothing to resume"),
        ([RESUMED], 0, ""),
        ([RESUMED, FAILED], 3, "resumed 1 of 2 jobs"),
        ([FAILED], 3, "resumed 0 of 1 job"),
    ],
    ids=["none", "one", "some", "failed"],
)
def test_what_was_interrupted_is_resumed(
    results: List[Any], code: int, said: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: List[List[str]] = []

    def resume(jobs: Any, _: Reporter) -> List[Any]:
        names.append(sorted(job.label for job in jobs))
        return results

    monkeypatch.setattr("hfship.ops.background.resume_jobs", resume)
    done, _, err = desk.run("--resume-all")
    assert (done, names) == (code, [["fetch-a", "pack-b"]])
    assert said in err and ("resume" in err) == bool(said)


def test_it_is_installed_with_the_folder_of_its_records(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: List[Any] = []
    monkeypatch.setattr(
        "hfship.commands.installing.install_or_print", lambda _, service: made.append(service) or 0
    )
    monkeypatch.setattr(watch, "own_file", lambda: "/x/hfship.pyz")
    assert desk.run("--install")[0] == 0
    [service] = made
    words = [sys.executable, "/x/hfship.pyz", "watch", "--resume-all", "--log-dir"]
    assert list(service.argv) == [*words, str(desk.root / "log")]
    assert service.name == "hfship-resume" and not service.stays


@pytest.mark.parametrize("words, did", [(["--site"], "site"), (["--site", "--install"], "site")])
def test_a_site_is_shown_elsewhere(
    words: List[str], did: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.commands.site.watch_site", lambda _: desk.shown.append("site") or 0)
    assert desk.run(*words)[0] == 0 and desk.shown == [did]
