# SPDX-License-Identifier: Apache-2.0
"""`doctor`: which side is looked at, in which order, and what of it is the exit code; test_doctor.py has
a Hub."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.report import Reporter
from hfship.commands.run import guarded, run_line

AT = "hfship.ops.doctor"


class Probe:
    """A probe that notes when it starts, and when it is waited for."""

    def __init__(self, doctor: Doctor, name: str) -> None:
        self.doctor, self.name = doctor, name

    def start(self) -> Probe:
        self.doctor.did.append(f"start {self.name}")
        return self

    def result(self, reporter: Reporter) -> str:
        assert reporter is self.doctor.reporter
        self.doctor.did.append(f"wait {self.name}")
        return self.name


class Doctor:
    """What was looked at."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.did: List[Any] = []
        self.found: List[str] = []
        for name in ("MODELS", "PACKAGE", "LOG", "DEPLOY"):
            monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(root / name.lower()))
        monkeypatch.setenv("HOME", str(root))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(f"{AT}.python_probe", lambda far: Probe(self, f"python {far}"))
        monkeypatch.setattr(f"{AT}.disk_probes", lambda all_: [Probe(self, f.name) for f in all_])
        monkeypatch.setattr(f"{AT}.program_probes", lambda far: [Probe(self, f"rsync {far}")])
        monkeypatch.setattr(f"{AT}_site.site_findings", self.site)
        monkeypatch.setattr(f"{AT}_hub.HubDoctor", self.hub)
        monkeypatch.setattr("hfship.ops.probe.Diagnosis", self.diagnosis)
        monkeypatch.setattr("hfship.site.facts.own_facts", lambda all_: {"at": all_.log_dir.name})
        monkeypatch.setattr(
            "hfship.commands.hosts.diagnose_hosts", lambda _: self.did.append("hosts") or 3
        )

    def site(self, settings: Any, reporter: Reporter) -> List[str]:
        assert settings.log_dir == self.root / "log" and reporter is self.reporter
        self.did.append("site")
        return ["on site"]

    def hub(self, settings: Any, repo: Any, mirrors: Any, reporter: Reporter) -> Any:
        assert settings.log_dir == self.root / "log" and reporter is self.reporter
        self.did.append((repo, list(mirrors)))
        return SimpleNamespace(findings=lambda: iter(["hub"]))

    def diagnosis(self, found: List[str]) -> Any:
        self.found = found
        return SimpleNamespace(text=lambda: "TEXT", json=lambda: {"a": 1}, exit_code=5)

    def run(self, *words: str) -> Any:
        self.did, self.found = [], []
        out = io.StringIO()
        as_json = "--json" in words
        self.reporter = Reporter("none", 0, out, io.StringIO(), as_json=as_json)
        code, _ = guarded(self.reporter, lambda: run_line(["doctor", *words], self.reporter))
        return code, out.getvalue()


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    return Doctor(tmp_path, monkeypatch)


CONNECTED = ["hub", "python False", "models", "package", "rsync False"]
OFFLINE = ["python True", "on site", "rsync True"]


@pytest.mark.parametrize(
    "words, env, found",
    [
        ([], "", CONNECTED),
        ([], "0", CONNECTED),
        ([], "1", OFFLINE),
        (["--offline"], "", OFFLINE),
        (["--offline", "--json"], "0", OFFLINE),
    ],
)
def test_the_side_that_is_looked_at(
    words: List[str], env: str, found: List[str], doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if env:
        monkeypatch.setenv("HF_HUB_OFFLINE", env)
    code, out = doctor.run(*words)
    assert code == 5 and doctor.found == found
    if "--json" in words:
        assert json.loads(out)["a"] == 1
    else:
        assert out == "TEXT\n"


@pytest.mark.parametrize("offline", [False, True])
def test_all_that_can_be_looked_at_at_once_is(offline: bool, doctor: Doctor) -> None:
    """Of this machine; the network, which may wait, meanwhile."""
    doctor.run(*(["--offline"] if offline else []))
    starts = [did for did in doctor.did if str(did).startswith("start")]
    assert doctor.did[: len(starts)] == starts and len(starts) == (2 if offline else 4)
    assert doctor.did[len(starts)] == ("site" if offline else (None, []))


@pytest.mark.parametrize(
    "words, asked",
    [
        (["org/m"], (("org/m", None), [])),
        (["org/m@v1"], (("org/m", "v1"), [])),
        (["--mirror", "https://a", "--mirror", "https://b"], (None, ["https://a", "https://b"])),
    ],
)
def test_a_repository_and_mirrors_are_asked_for(
    words: List[str], asked: Any, doctor: Doctor
) -> None:
    doctor.run(*words)
    assert asked in doctor.did


def test_a_repository_is_not_looked_for_offline(doctor: Doctor) -> None:
    assert doctor.run("--offline", "org/m")[0] == 2 and doctor.did == []
    assert doctor.run("no repo")[0] == 2 and doctor.did == []


def test_a_python_that_is_too_old_asks_no_hub(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.hub.session.OLDEST_PYTHON", (99,))
    doctor.run()
    assert doctor.found == CONNECTED[1:]


def test_one_folder_for_all_is_looked_at_once(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFSHIP_PACKAGE_DIR", str(doctor.root / "models"))
    doctor.run()
    assert doctor.found.count("models") == 1


@pytest.mark.parametrize(
    "words, code, said, did",
    [
        (["--facts"], 0, {"at": "log"}, []),
        (["--facts", "--hosts"], 0, {"at": "log"}, []),
        (["--hosts"], 3, None, ["hosts"]),
        (["--on", "h"], 3, None, ["hosts"]),
    ],
)
def test_facts_and_hosts_are_for_other_hosts(
    words: List[str], code: int, said: Optional[Dict[str, str]], did: List[str], doctor: Doctor
) -> None:
    done, out = doctor.run(*words)
    assert (done, doctor.did, doctor.found) == (code, did, [])
    if said is None:
        assert out == ""
    else:
        assert said.items() <= json.loads(out).items()
