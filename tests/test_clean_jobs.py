# SPDX-License-Identifier: Apache-2.0
"""`clean --jobs`: which records go, what is said, and what is removed."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import Exit, UsageError
from hfship.commands import clean_jobs
from hfship.ops.jobs import Job, JobRecord

NOW, DAY_S = 1_000_000.0, 86400.0


class Site:
    """Jobs that ended two days ago, one an hour ago; of some the log is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.removed: List[str] = []
        self.gone: List[str] = []
        self.said: List[str] = []
        self.json: Dict[str, Any] = {}
        states = {"new": "done", "done": "done", "resumable": "interrupted", "failed": "failed"}
        self.jobs = []
        for name, state in states.items():
            age_s = 3600.0 if name == "new" else 2 * DAY_S
            record = JobRecord(name=name, updated_at=NOW - age_s, exit_code=6)
            self.jobs.append(Job(record, folder, 0, state))
            (folder / f"{name}.log").write_text("x" * 100)

    def files(self, job: Job) -> List[Path]:
        return [job.log, job.folder / f"{job.record.name}.json"]  # which is not there

    def remove(self, job: Job) -> bool:
        if job.record.name in self.gone:
            raise FileNotFoundError
        self.removed.append(job.record.name)
        return True

    def clean(self, **args: Any) -> Exit:
        given = {"older_than": DAY_S, "json": False, "dry_run": False, "yes": True, **args}
        reporter = SimpleNamespace(
            result=self.said.append, info=self.said.append, result_json=self.json.update
        )
        settings = SimpleNamespace(log_dir=self.folder)
        context: Any = SimpleNamespace(
            args=argparse.Namespace(**given), settings=settings, reporter=reporter
        )
        return clean_jobs.clean_jobs(context)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setattr("hfship.ops.jobs.our_ended_jobs", {tmp_path: made.jobs}.get)
    monkeypatch.setattr("hfship.ops.jobs.job_files", made.files)
    monkeypatch.setattr("hfship.ops.jobs.remove_job", made.remove)
    monkeypatch.setattr("hfship.commands.clean_jobs.time.time", lambda: NOW)
    return made


def test_old_jobs_go_and_those_that_can_be_resumed_stay(site: Site) -> None:
    assert site.clean() == Exit.OK
    assert site.removed == ["done", "failed"]
    kept, table, removed = site.said
    assert (
        kept == "kept: resumable: hfship watch --resume-all goes on with what ran in the background"
    )
    assert "records and logs of jobs" in table and str(site.folder) in table
    assert removed == "removed 2 jobs, freed 200 B"


@pytest.mark.parametrize(
    ("age_s", "names"), [(0.0, ["new", "done", "failed"]), (2 * DAY_S, ["done", "failed"])]
)
def test_the_age_is_that_of_the_end(age_s: float, names: List[str], site: Site) -> None:
    site.clean(older_than=age_s)
    assert site.removed == names


def test_what_goes_for_programs(site: Site) -> None:
    assert site.clean(json=True) == Exit.OK
    going, waiting = site.json["leftovers"]
    assert (going["files"], going["bytes"], going["kept"]) == (4, 200, None)
    assert going["paths"][0] == str(site.folder / "done.log")
    assert (waiting["files"], waiting["bytes"], waiting["kept"]) == (2, 100, "can be resumed")
    assert {name: site.json[name] for name in ("bytes", "removed", "freed")} == {
        "bytes": 200,
        "removed": 2,
        "freed": 200,
    }
    assert site.said == []


def test_one_that_somebody_else_removed_is_not_counted(site: Site) -> None:
    site.gone = ["done"]
    site.clean(json=True)
    assert (site.removed, site.json["removed"]) == (["failed"], 1)


@pytest.mark.parametrize("args", [{"dry_run": True}, {"yes": False}, {"older_than": 9 * DAY_S}])
def test_nothing_goes_unless_it_is_wanted(args: Dict[str, Any], site: Site) -> None:
    if "yes" in args:
        with pytest.raises(UsageError, match="nothing was removed"):
            site.clean(**args)
    else:
        assert site.clean(**args) == Exit.OK
        assert "would free 200 B" in site.said or site.said == ["nothing to clean"]
        site.clean(json=True, **args)
        assert (site.json["removed"], site.json["freed"]) == (0, 0)
        assert len(site.json["leftovers"]) == (2 if "dry_run" in args else 0)
    assert site.removed == []
