# SPDX-License-Identifier: Apache-2.0
"""What a look of the watchdog tells the gateway, and its units; test_watchdog.py has engines."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import Exit, HostError, UsageError
from hfship.commands import repairing
from hfship.serve.status import DOWN, HUNG, LATE, LOST_GPU


class Told:
    """A context whose reporter and gateway note what they are told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **args: Any) -> None:
        self.said: List[str] = []
        self.args = argparse.Namespace(**args)
        self.settings = SimpleNamespace(deploy_dir=folder)
        self.reporter: Any = SimpleNamespace(
            warn=lambda text: self.said.append(f"warn: {text}"),
            error=lambda exc: self.said.append(f"error: {exc.what}"),
            show=self.said.append,
            result=self.said.append,
        )
        self.knows = True
        monkeypatch.setattr("hfship.commands.repairing.send_elsewhere", self.send_elsewhere)
        monkeypatch.setattr("hfship.commands.repairing.bring_back", self.bring_back)

    def send_elsewhere(self, folder: Path, name: str) -> bool:
        self.said.append(f"elsewhere {folder.name} {name}")
        if name == "odd":
            raise HostError("the gateway is odd", "", "")
        return self.knows

    def bring_back(self, folder: Path, name: str) -> None:
        self.said.append(f"back {folder.name} {name}")


def deployment(name: str = "m", network: str = "") -> Any:
    return SimpleNamespace(plan=SimpleNamespace(name=name, network=network))


@pytest.mark.parametrize("fault", [HUNG, LATE, LOST_GPU, DOWN, "", "other"])
@pytest.mark.parametrize("knows", [True, False])
def test_the_gateway_leaves_what_hangs_and_takes_back_what_works(
    fault: str, knows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Any = Told(tmp_path, monkeypatch)
    told.knows = knows
    repairing.tell_gateway(told, deployment(), SimpleNamespace(fault=fault))  # type: ignore[arg-type]
    expected = []
    if fault in (HUNG, LATE, LOST_GPU):
        expected = ["elsewhere _gateway m"]
        expected += ["warn: m: the gateway sends its clients elsewhere"] if knows else []
    elif not fault:
        expected = ["back _gateway m"]
    assert told.said == expected


def test_what_the_gateway_cannot_be_told_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Any = Told(tmp_path, monkeypatch)
    hung: Any = SimpleNamespace(fault=HUNG)
    repairing.tell_gateway(told, deployment("odd"), hung)
    assert told.said == ["elsewhere _gateway odd", "error: the gateway is odd"]


@pytest.mark.parametrize(
    ("stays", "scope", "names", "when"),
    [
        (False, [], ["hfship-repair.service", "hfship-repair.timer"], "* * * * *"),
        (True, ["--user"], ["hfship-repair.service"], "@reboot"),
    ],
)
def test_a_watchdog_looks_each_minute_or_stays(
    stays: bool, scope: List[str], names: List[str], when: str
) -> None:
    units = repairing.units_of(["/h x", "50%", "$a"], stays, "default.target")
    assert [name.replace(repairing.UNIT, "hfship-repair") for name in units] == names
    service = units[f"{repairing.UNIT}.service"]
    assert "ExecStart='/h x' 50%% '$$a'\n" in service
    assert ("Restart=always" in service) is stays
    assert ("WantedBy=default.target" in service) is stays
    assert ("SuccessExitStatus=3 9" in service) is not stays
    text = repairing.install_text(units, Path("/u"), scope, ["/h x", "50%"])
    lines = text.splitlines()
    *_, last = units
    assert lines[1] == f"#   systemctl {' '.join([*scope, 'enable', '--now', last])}"
    assert lines[-1] == f"{when} '/h x' 50\\%"
    assert [line for line in lines if line.startswith("# /u/")] == [f"# /u/{one}" for one in units]


@pytest.mark.parametrize(
    ("gateway", "root", "words"),
    [
        (None, True, "status --repair --quiet m"),
        (object(), False, "status --repair --every 1 m"),
    ],
)
@pytest.mark.parametrize("yes", [False, True])
def test_it_is_printed_or_installed(
    gateway: Any, root: bool, words: str, yes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Any = Told(tmp_path, monkeypatch, repair=True, yes=yes, names=["m"])
    enabled: List[Any] = []
    patched: Dict[str, Any] = {
        "read_gateway": lambda _: gateway,
        "systemd_answers": lambda _: True,
        "enable_unit": lambda *words: enabled.append(words),
        "SYSTEM_UNITS": tmp_path / "system",
        "home_path": lambda _: tmp_path / "user",
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.commands.repairing.{name}", value)
    monkeypatch.setattr("hfship.commands.repairing.os.geteuid", lambda: 0 if root else 7)
    assert repairing.install_repair(told) == Exit.OK
    folder = tmp_path / ("system" if root else "user")
    scope = [] if root else ["--user"]
    last = f"{repairing.UNIT}.{'timer' if gateway is None else 'service'}"
    if yes:
        assert told.said == [f"installed and enabled {folder / last}"]
        assert enabled == [(last, folder / last, True, scope)]
        text = (folder / f"{repairing.UNIT}.service").read_text()
    else:
        (text,) = told.said
        assert enabled == [] and not folder.exists()
    assert f"HFSHIP_DEPLOY_DIR={tmp_path}" in text and words in text
    assert ("WantedBy=default.target" in text) is (not root)


def test_without_a_systemd_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Any = Told(tmp_path, monkeypatch, repair=False, yes=True, names=[])
    with pytest.raises(UsageError, match="--install needs --repair"):
        repairing.install_repair(told)
    told.args.repair = True
    monkeypatch.setattr("hfship.commands.repairing.systemd_answers", lambda _: False)
    with pytest.raises(HostError, match="systemd runs no units"):
        repairing.install_repair(told)
    assert told.said == []


STATUS = SimpleNamespace(fault="", state="healthy", note="up", repair="")


@pytest.mark.parametrize(
    ("waited", "fault", "asked"), [(False, HUNG, 0), (True, HUNG, 1), (False, DOWN, 1)]
)
@pytest.mark.parametrize("network", ["", "hfship"])
def test_what_another_may_have_mended_is_looked_at_again(
    waited: bool,
    fault: str,
    asked: int,
    network: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: Any = Told(tmp_path, monkeypatch, hang_after=60, grace=5)
    looks: List[Any] = []
    graces: List[float] = []

    def repair(_: Any, status: Any, policy: Any, reporter: Any) -> Any:
        graces.append(policy.grace_s)
        return SimpleNamespace(action="restarted", why="hung")

    monkeypatch.setattr(
        "hfship.commands.repairing.lock_within", lambda *_: contextlib.nullcontext(waited)
    )
    monkeypatch.setattr("hfship.commands.repairing.replace", lambda _, **changes: changes)
    monkeypatch.setattr("hfship.serve.watchdog.repair", repair)
    monkeypatch.setattr(
        "hfship.serve.status.deployment_status", lambda *words: looks.append(words) or STATUS
    )
    status: Any = SimpleNamespace(fault=fault, note="")
    made: Any = repairing._repaired(told, deployment(network=network), status)
    assert len(looks) == asked and graces == [5]
    assert made == {"state": "loading", "repair": "restarted", "note": "restarted: it was hung"}
    assert told.said == (["back _gateway m"] if network else [])
