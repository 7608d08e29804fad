"""Units of systemd and lines for cron: their text, line by line, and how they are installed."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest

from hfship.base.errors import DiskError, HostError
from hfship.base.processes import Completed
from hfship.ops import service as room
from hfship.ops.service import (
    Service,
    current_user,
    enable_unit,
    install_for_user,
    install_text,
    systemd_answers,
)

ONCE = Service("hfship-resume", "Resume jobs", ("/bin/hfship", "50%"), stays=False)
STAYS = Service("hfship-mirror", "Models", ("/bin/hfship", "mirror"), stays=True)
OF_ROOT = Service("hfship-mirror", "Models", ("/bin/hfship", "mirror"), stays=True, user="ops")

UNITS: Dict[str, Any] = {
    "once": (
        ONCE,
        """\
[Unit]
Description=Resume jobs
[Service]
Type=oneshot
RemainAfterExit=yes
SuccessExitStatus=3 130
ExecStartPre=/bin/sleep 60
ExecStart=/bin/hfship 50%%
[Install]
WantedBy=default.target
""",
        "@reboot sleep 60; /bin/hfship 50\\%",
    ),
    "stays": (
        STAYS,
        """\
[Unit]
Description=Models
[Service]
Type=simple
Restart=on-failure
RestartSec=10
SuccessExitStatus=3 130
ExecStart=/bin/hfship mirror
[Install]
WantedBy=default.target
""",
        "@reboot /bin/hfship mirror",
    ),
    "of root": (
        OF_ROOT,
        """\
[Unit]
Description=Models
Wants=network-online.target
After=network-online.target
[Service]
Type=simple
Restart=on-failure
RestartSec=10
SuccessExitStatus=3 130
User=ops
NoNewPrivileges=yes
ExecStart=/bin/hfship mirror
[Install]
WantedBy=multi-user.target
""",
        "@reboot /bin/hfship mirror",
    ),
}


@pytest.mark.parametrize("case", UNITS)
def test_a_unit_says_what_starts_when_and_for_whom(case: str) -> None:
    service, unit, cron = UNITS[case]
    assert service.unit() == unit and service.cron_line() == cron


@pytest.mark.parametrize(
    "service, place, commands",
    [
        (
            ONCE,
            "/h/.config/systemd/user/hfship-resume.service",
            "systemctl --user enable hfship-resume && loginctl enable-linger",
        ),
        (
            STAYS,
            "/h/.config/systemd/user/hfship-mirror.service",
            "systemctl --user enable --now hfship-mirror && loginctl enable-linger",
        ),
        (
            OF_ROOT,
            "/etc/systemd/system/hfship-mirror.service",
            "systemctl daemon-reload && systemctl enable --now hfship-mirror",
        ),
    ],
)
def test_how_to_install_it_by_hand(service: Service, place: str, commands: str) -> None:
    head, then, *_ = install_text(service, Path("/h")).splitlines()
    assert f" as {place}, " in head and then == f"#   {commands}"
    assert service.unit() in install_text(service, Path("/h"))


class Systemd:
    """Programs that write down what they are asked, and fail where it is said."""

    def __init__(self) -> None:
        self.asked: List[str] = []
        self.fails: Dict[str, Any] = {}

    def run(self, argv: Sequence[str], timeout_s: float = 0.0) -> Completed:
        assert timeout_s, "without a session it can hang"
        self.asked.append(" ".join(argv))
        for word, answer in self.fails.items():
            if word in argv:
                if isinstance(answer, Exception):
                    raise answer
                return answer
        return Completed(0, "", "")


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Systemd:
    played = Systemd()
    monkeypatch.setattr(room, "run_program", played.run)
    monkeypatch.setattr(room.shutil, "which", lambda name: f"/bin/{name}")
    return played


NO_BUS = Completed(1, "", " Failed to connect to bus\n")


@pytest.mark.parametrize(
    "answer, answers",
    [(None, True), (NO_BUS, False), (HostError("hangs", "", ""), False)],
)
def test_whether_systemd_runs_units(answer: Any, answers: bool, systemd: Systemd) -> None:
    if answer is not None:
        systemd.fails["show-environment"] = answer
    assert systemd_answers() == answers and systemd_answers(()) == answers
    assert systemd.asked == ["systemctl --user show-environment", "systemctl show-environment"]


def test_where_there_is_no_systemctl_nothing_is_asked(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "which", lambda _: None)
    assert not systemd_answers() and not systemd.asked


@pytest.mark.parametrize("word, asked", [("daemon-reload", 1), ("enable", 2)])
def test_what_systemd_refuses_is_told_with_the_command(
    word: str, asked: int, systemd: Systemd
) -> None:
    systemd.fails[word] = NO_BUS
    with pytest.raises(HostError, match=f"systemctl {word}.* ended with 1") as caught:
        enable_unit("x.timer", Path("/u"), now=True, scope=())
    assert caught.value.why == "Failed to connect to bus" and len(systemd.asked) == asked
    assert caught.value.next_step == "/u is there; run the command by hand"


@pytest.mark.parametrize("service, now", [(ONCE, ""), (STAYS, "--now ")])
@pytest.mark.parametrize("fault", [None, Completed(1, "", ""), HostError("no loginctl", "", "")])
def test_a_unit_is_installed_for_a_user(
    service: Service, now: str, fault: Any, systemd: Systemd, tmp_path: Path
) -> None:
    if fault is not None:
        systemd.fails["enable-linger"] = fault
    warnings: List[str] = []
    reporter: Any = type("Said", (), {"warn": staticmethod(warnings.append)})
    path = install_for_user(service, tmp_path, reporter)
    assert path == tmp_path / ".config/systemd/user" / service.file
    assert path.read_text() == service.unit()
    assert systemd.asked == [
        "systemctl --user daemon-reload",
        f"systemctl --user enable {now}{service.name}",
        f"loginctl enable-linger {current_user()}",
    ]
    assert len(warnings) == (fault is not None)
    assert all(
        f"until root runs: loginctl enable-linger {current_user()}" in one for one in warnings
    )


def test_a_home_that_cannot_be_written_is_told(systemd: Systemd, tmp_path: Path) -> None:
    (tmp_path / ".config").write_text("x")
    with pytest.raises(DiskError):
        install_for_user(ONCE, tmp_path, None)  # type: ignore[arg-type]
    assert not systemd.asked


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_user() == pwd.getpwuid(os.geteuid()).pw_name

    def unknown(_: int) -> Any:
        raise KeyError

    monkeypatch.setattr(room.pwd, "getpwuid", unknown)
    assert current_user() == str(os.geteuid())
