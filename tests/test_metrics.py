"""status --format prometheus: the names of the metrics, their form, and promtool's word on both."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, Program
from hfship.ops.jobs import Job, JobRecord
from hfship.ops.metrics import (
    FAMILIES,
    Disk,
    Hardware,
    Sample,
    escaped,
    metrics_text,
    read_disks,
)
from hfship.serve.status import DeploymentStatus
from support import components
from test_serve import Site, site  # noqa: F401

HEALTHY = DeploymentStatus(
    "Qwen3-8B", "healthy", "vllm_Qwen3-8B", "i", "u", 8000, (), uptime=60, answer=0.25, restarts=2
)


def a_job(name: str, state: str, uid: int = -1, **fields: Any) -> Job:
    record = JobRecord(name=name, command=name.partition("-")[0], updated_at=1000.4, **fields)
    return Job(record, Path("/x"), os.geteuid() if uid < 0 else uid, state)


def lines_of(text: str) -> List[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


# what there is -> lines that are in the text, and words that are not
CASES: Dict[str, Any] = {
    "nothing": (((), (), ()), ['hfship_jobs{state="failed"} 0'], ["deployment", "disk"]),
    "healthy": (
        ((HEALTHY,), (), ()),
        [
            'hfship_deployment_state{name="Qwen3-8B",state="healthy"} 1',
            'hfship_deployment_state{name="Qwen3-8B",state="down"} 0',
            'hfship_deployment_answer_seconds{name="Qwen3-8B"} 0.25',
            'hfship_deployment_uptime_seconds{name="Qwen3-8B"} 60',
            'hfship_deployment_restarts_total{name="Qwen3-8B"} 2',
        ],
        [],
    ),
    "down": (
        ((replace(HEALTHY, state="down", uptime=None, answer=None, restarts=None),), (), ()),
        ['hfship_deployment_state{name="Qwen3-8B",state="down"} 1'],
        ["answer_seconds", "uptime", "restarts"],
    ),
    "a state that is new": (
        ((replace(HEALTHY, state="hung"),), (), ()),
        ['hfship_deployment_state{name="Qwen3-8B",state="hung"} 1'],
        [],
    ),
    "running": (
        ((), (a_job("fetch-m", "running", done=5, total=10, rate=2.5),), ()),
        [
            'hfship_jobs{state="running"} 1',
            'hfship_job_done_bytes{job="fetch-m",command="fetch"} 5',
            'hfship_job_expected_bytes{job="fetch-m",command="fetch"} 10',
            'hfship_job_bytes_per_second{job="fetch-m",command="fetch"} 2.5',
        ],
        ["exit_code", "ended"],
    ),
    "not in bytes": (((), (a_job("fetch-m", "running", unit="files"),), ()), [], ["_bytes"]),
    "ended": (
        ((), (a_job("fetch-m", "failed", exit_code=6), a_job("pack-m", "interrupted")), ()),
        [
            'hfship_job_exit_code{job="fetch-m",command="fetch"} 6',
            'hfship_job_ended_timestamp_seconds{job="fetch-m",command="fetch"} 1000',
            'hfship_jobs{state="interrupted"} 1',
        ],
        ['hfship_job_exit_code{job="pack-m"', "_bytes"],
    ),
    "disks": (
        ((), (), (Disk("models", Path("/data/m"), 10**13 + 1, 2 * 10**13),)),
        ['hfship_disk_free_bytes{purpose="models",folder="/data/m"} 10000000000001'],
        [],
    ),
    "hardware": (
        ((), (), (), Hardware(13.257, (("0", 0), ("1", 79)))),
        [
            "hfship_certificate_days 13.26",
            'hfship_gpu_xid{gpu="1"} 79',
            'hfship_gpu_xid{gpu="0"} 0',
        ],
        [],
    ),
    "no hardware": (((), (), (), Hardware()), [], ["hfship_certificate_days", "hfship_gpu_xid"]),
    "twice the same": (((HEALTHY, HEALTHY), (), ()), [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written(case: str) -> None:
    given_values, there, absent = CASES[case]
    text = metrics_text(*given_values)
    lines = lines_of(text)
    assert set(there) <= set(lines), text
    assert not [word for word in absent if any(word in line for line in lines)], text
    keys = [line.rpartition(" ")[0] for line in lines]
    assert len(keys) == len(set(keys)), "no two samples have the same labels"


def test_each_family_has_its_help_before_its_samples_and_once() -> None:
    text = metrics_text((HEALTHY,), (a_job("a-b", "running"), a_job("c", "done", exit_code=0)), ())
    seen: List[str] = []
    for line in text.splitlines():
        name = line.split()[2] if line.startswith("#") else re.split(r"[{ ]", line)[0]
        if not seen or seen[-1] != name:
            seen.append(name)
    assert len(seen) == len(set(seen)) and set(seen) <= set(FAMILIES)
    assert text.count("# HELP") == text.count("# TYPE") == len(seen)


@given(st.text(max_size=30))
def test_any_name_is_one_line_and_is_read_back(name: str) -> None:
    written = escaped(name)
    assert "\n" not in written
    back = re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], written)
    assert back == name.encode("utf-8", "replace").decode()
    assert Sample("hfship_jobs", 1, (("state", name),)).line().count("\n") == 0


def promtool(text: str) -> str:
    """The exit code of promtool, and what it says of metrics."""
    command = [components.require("prometheus") / "promtool", "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return f"{done.returncode} {done.stdout}{done.stderr}".strip()


STATES = st.sampled_from(["running", "failed", "done", "interrupted"])


@pytest.mark.real
@settings(max_examples=8)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=20), STATES), max_size=4))
def test_promtool_finds_nothing_to_say(names: List[Any]) -> None:
    jobs = [a_job(name, state, exit_code=1, done=7, rate=1e13) for name, state in names]
    deployments = [replace(HEALTHY, name=name) for name, _ in names]
    text = metrics_text(deployments, jobs, (Disk("logs", Path("/a b"), 1, 2),))
    assert promtool(text) == "0", text


@pytest.mark.real
def test_promtool_reads_what_the_program_writes(
    site: Site,  # noqa: F811
    tmp_path: Path,
) -> None:
    site("serve", "m")
    out = tmp_path / "hfship.prom"
    assert site("status", "--format", "prometheus", "-o", out).stdout == ""
    text = out.read_text()
    assert promtool(text) == "0" and 'state="healthy"} 1' in text
    assert 'hfship_job_exit_code{job="serve-m",command="serve"} 0' in text
    assert 'hfship_disk_free_bytes{purpose="deployments"' in text
    assert stat.S_IMODE(out.stat().st_mode) == 0o644, "node exporter is another user"
    down = site("status", "--format", "prometheus", play="down")
    assert 'state="unknown"} 1' in down.stdout, "the metric says so, and cron is told of no failure"
    site("stop", "m")


def test_what_does_not_go_together_is_refused(pyz: Program, tmp_path: Path) -> None:
    assert "-o is for" in pyz("status", "-o", tmp_path / "x", code=2).stderr
    done = pyz("status", "--json", "--format", "prometheus", code=2)
    assert "two formats" in done.stderr
    told = pyz("status", "--format", "prometheus").stdout
    assert re.search(r'^hfship_info\{version="[^"]+"\} 1$', told, re.MULTILINE)
    done = pyz("status", "--format", "prometheus", "-o", tmp_path / "no/x", code=7)
    assert "cannot write" in done.stderr


def test_the_names_are_documented() -> None:
    documented = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in documented] == []


def test_the_room_of_each_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purposes = ("models", "package", "transfer", "site_models", "deploy", "log")
    folders = {f"{purpose}_dir": tmp_path / purpose for purpose in purposes}
    for purpose in purposes[1:]:
        (tmp_path / purpose).mkdir()
    room = SimpleNamespace(f_bavail=5, f_bfree=6, f_blocks=7, f_frsize=4096, f_bsize=1)
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        real(path)  # raises for what is not there
        return room

    monkeypatch.setattr(os, "statvfs", statvfs)
    names = ("packages", "transfer", "site_models", "deployments", "logs")
    found = read_disks(SimpleNamespace(**folders))  # type: ignore[arg-type]
    expected = []
    for name, purpose in zip(names, purposes[1:]):
        expected.append(Disk(name, tmp_path / purpose, 5 * 4096, 7 * 4096))
    assert found == expected


def test_disks_and_hardware_have_their_labels() -> None:
    disk = Disk("models", Path("/m"), 5, 7)
    text = metrics_text((), (), (disk,), Hardware(12.346, (("0", 79), ("1", 0))))
    assert lines_of(text)[-5:] == [
        'hfship_disk_free_bytes{purpose="models",folder="/m"} 5',
        'hfship_disk_size_bytes{purpose="models",folder="/m"} 7',
        "hfship_certificate_days 12.35",
        'hfship_gpu_xid{gpu="0"} 79',
        'hfship_gpu_xid{gpu="1"} 0',
    ]
