"""Deployments that were stopped on purpose: what is noted of it."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest

from hfship.base.errors import HostError
from hfship.serve import stop
from hfship.serve.deployments import Deployment
from hfship.serve.stop import Stopped
from hfship.serve.terms import Plan


def test_who_asked_for_it_is_who_called_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name
    for by, expected in (("kim", "kim"), ("", own)):
        monkeypatch.setenv("SUDO_USER", by)
        assert stop._user() == expected


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, or where the directory service does not answer."""
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    assert stop._user() == "user 3999999999"


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    folder = tmp_path / "deploy/m"
    folder.mkdir(parents=True, mode=0o750)
    (folder / "plan.json").write_text("{}")
    return Deployment(folder, Plan(name="m"), "sk-1")


class Docker:
    """Notes what is asked of it; refuses if it shall."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.asked: List[Any] = []
        self.refuses = False
        self.log = "the end"
        self._folder = folder
        monkeypatch.setattr(stop, "docker", self._run)
        monkeypatch.setattr(stop, "compose", lambda one, *words: [one.plan.name, *words])
        monkeypatch.setattr(stop, "read_log", self._log)
        monkeypatch.setattr(stop, "utc", lambda: "2026-01-01T00:00:00Z")
        monkeypatch.setattr(stop, "_user", lambda: "kim")

    def _run(self, *given: Any) -> None:
        self.asked.append((*given, sorted(path.name for path in self._folder.iterdir())))
        if self.refuses:
            raise HostError("docker does not answer", "", "")

    def _log(self, name: str, lines: int) -> Any:
        self.asked.append((name, lines))
        return SimpleNamespace(text=self.log)


@pytest.mark.parametrize("log", ["the end", ""])
@pytest.mark.parametrize("refuses", [False, True])
def test_who_looks_meanwhile_sees_that_it_is_stopped_on_purpose(
    refuses: bool, log: str, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deployment.folder
    docker = Docker(monkeypatch, folder)
    docker.refuses, docker.log = refuses, log
    kept = ["last.log"] if log else []
    if refuses:
        with pytest.raises(HostError):
            stop.stop_deployment(deployment, remove=False)
    else:
        stop.stop_deployment(deployment, remove=False)
    assert docker.asked == [
        ("m", stop.LAST_LINES),
        (
            ["m", "down"],
            "stop m",
            stop.COMPOSE_TIMEOUT_S,
            "m",
            [*kept, "plan.json", "stopped.json"],
        ),
    ]
    found = stop.read_stopped(folder)
    if refuses:
        assert found is None, "it goes on, and is looked after as before"
    else:
        assert found == Stopped("2026-01-01T00:00:00Z", "kim")
        assert str(found) == "stopped 2026-01-01T00:00:00Z by kim"
        value = json.loads((folder / "stopped.json").read_text())
        assert value["format"] == "hfship-stopped/1"
        assert (folder / "stopped.json").stat().st_mode & 0o777 == 0o644
    assert stop.read_last_log(folder) == log
    if log:
        assert (folder / "last.log").stat().st_mode & 0o777 == 0o640
    if not refuses:
        stop.forget_stop(folder)
    stop.forget_stop(folder)
    assert stop.read_stopped(folder) is None


@pytest.mark.parametrize("refuses", [False, True])
def test_what_is_removed_leaves_nothing(
    refuses: bool, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deployment.folder
    (folder.parent / ".hfship").mkdir()
    docker = Docker(monkeypatch, folder)
    docker.refuses = refuses
    if refuses:
        (folder / "stopped.json").write_text("{}")
        with pytest.raises(HostError):
            stop.stop_deployment(deployment, remove=True)
        assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "stopped.json"]
        return
    stop.stop_deployment(deployment, remove=True)
    words = (["m", "down", "--volumes"], "stop m", stop.COMPOSE_TIMEOUT_S, "m", ["plan.json"])
    assert docker.asked == [words]
    assert not folder.exists() and list(folder.parent.iterdir()) == []
    assert folder.parent.is_dir()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"at": "then", "by": "ann"}', Stopped("then", "ann")),
        ('{"at": 5}', Stopped("5", "")),
        ("[]", Stopped("", "")),
        ("torn", Stopped("", "")),
        (None, None),
    ],
)
def test_a_mark_is_one_whatever_is_in_it(content: Any, found: Any, deployment: Deployment) -> None:
    if content is not None:
        (deployment.folder / "stopped.json").write_text(content)
    assert stop.read_stopped(deployment.folder) == found


def test_a_mark_that_cannot_be_read_is_none(deployment: Deployment) -> None:
    (deployment.folder / "stopped.json").symlink_to("/etc/hostname")
    assert stop.read_stopped(deployment.folder) is None
    (deployment.folder / "last.log").write_bytes(b"\xff\xfe end")
    assert stop.read_last_log(deployment.folder).endswith(" end")


def test_what_somebody_of_our_group_wrote_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(stop, "read_own", lambda *given, **more: asked.append((given, more)))
    assert stop.read_stopped(tmp_path) is None and stop.read_last_log(tmp_path) == ""
    assert asked == [
        ((tmp_path, "stopped.json"), {"of_others": True}),
        ((tmp_path, "last.log", stop.LAST_SIZE), {"of_others": True}),
    ]
