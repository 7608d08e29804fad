# SPDX-License-Identifier: Apache-2.0
"""`status --site` and `watch --site`: what is shown where, and until when; test_overview.py has a site."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List, Tuple

import pytest

from hfship.base.errors import Exit, NotFoundError, UsageError
from hfship.commands import site as room
from hfship.commands.site import exit_of_site
from hfship.serve.terms import Plan
from hfship.site.overview import SiteView

WELL = SiteView("up", (), (), ())
VIEWS: List[Tuple[SiteView, Exit]] = [
    (WELL, Exit.OK),
    (SiteView("up", (), (), ("m: only the standby answers",)), Exit.INCOMPLETE),
    (SiteView("up", (), (), (), alerts=("Down: m",)), Exit.INCOMPLETE),
    (SiteView("up", (), (), ("n: set aside", "m: its clients get 503")), Exit.HOST),
    (SiteView("down", (), (), ()), Exit.HOST),
]


@pytest.mark.parametrize(("view", "code"), VIEWS)
def test_how_a_site_is(view: SiteView, code: Exit) -> None:
    assert exit_of_site(view) == code


class Out:
    """A terminal, or none."""

    def __init__(self, tty: bool) -> None:
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def fileno(self) -> int:
        return 7


class Site:
    """Views one after the other; then somebody interrupts, or presses q."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.views = [VIEWS[1][0], WELL]
        self.slept: List[float] = []
        self.said: List[Any] = []
        self.keys = ["x", "q"]

    def context(self, tty: bool = False, **args: Any) -> Any:
        given = {"once": False, "json": False, "interval": 0.0, "site": True, "install": False}
        reporter = SimpleNamespace(
            out=Out(tty),
            width=100,
            show=self.said.append,
            info=self.said.append,
            result_of=lambda *both: self.said.append(both),
        )
        settings = SimpleNamespace(deploy_dir=self.folder)
        return SimpleNamespace(
            args=argparse.Namespace(**{**given, **args}), settings=settings, reporter=reporter
        )

    def read(self, deploy_dir: Path, plans: Any) -> SiteView:
        assert deploy_dir == self.folder and plans == {"m": Plan(name="m")}
        return self.views.pop(0)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if not self.views:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def screen(self, _: Any) -> Iterator[Callable[[float], str]]:
        self.said.append("screen")

        def key(seconds: float) -> str:
            self.slept.append(seconds)
            return self.keys.pop(0)

        yield key
        self.said.append("as before")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    deployments = [SimpleNamespace(plan=Plan(name="m"))]
    monkeypatch.setattr(room, "list_deployments", lambda *_: (deployments, {}))
    monkeypatch.setattr(room, "read_site", made.read)
    monkeypatch.setattr(room, "utc", lambda: "NOW")
    monkeypatch.setattr(room, "time", SimpleNamespace(sleep=made.sleep))
    monkeypatch.setattr("hfship.ops.watch.full_screen", made.screen)
    return made


def test_a_status_is_one_view(site: Site) -> None:
    view = site.views[0]
    assert room.show_site(site.context()) == Exit.INCOMPLETE
    assert site.said == [(view.text(100), view.json())]


@pytest.mark.parametrize("args", [{"once": True}, {"json": True}, {"once": True, "interval": 3.0}])
def test_once_is_a_status(args: Any, site: Site) -> None:
    assert room.watch_site(site.context(tty=True, **args)) == Exit.INCOMPLETE
    assert len(site.views) == 1 and site.slept == []


@pytest.mark.parametrize(("interval", "pace"), [(0.0, room.PLAIN_INTERVAL_S), (7.0, 7.0)])
def test_into_a_file_go_views_until_ctrl_c(interval: float, pace: float, site: Site) -> None:
    first, second = site.views
    assert room.watch_site(site.context(interval=interval)) == Exit.OK
    assert site.said == [f"NOW {first.text(100)}\n", f"NOW {second.text(100)}\n"]
    assert site.slept == [pace, pace]


@pytest.mark.parametrize("tty", [True, False])
def test_for_programs_a_view_is_a_line(tty: bool, site: Site) -> None:
    site.views = [SiteView("up", (), (), ("ü\n",)), WELL]
    first, second = site.views
    assert room.watch_site(site.context(tty, json=True, interval=2.0)) == Exit.OK
    assert [json.loads(line) for line in site.said] == [first.json(), second.json()]
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in site.said)
    assert "ü" in site.said[0]


@pytest.mark.parametrize(
    ("size", "lines", "width"), [((60, 5), 4, 60), ((0, 0), 79, 80), ((20, 5), 4, 20)]
)
def test_on_a_terminal_it_is_one_screen_until_q(
    size: Tuple[int, int], lines: int, width: int, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminal_size(fd: int) -> os.terminal_size:
        assert fd == 7
        return os.terminal_size(size)

    def frame_text(rows: List[str], last: str, wide: int, high: int) -> str:
        assert (last, wide, high) == ("NOW   q quits", width, lines + 1)
        return "\n".join(rows)

    monkeypatch.setattr(room, "os", SimpleNamespace(get_terminal_size=terminal_size))
    monkeypatch.setattr("hfship.ops.watch.frame_text", frame_text)
    shown = ["\n".join(view.text(width).splitlines()) for view in site.views]
    assert room.watch_site(site.context(tty=True)) == Exit.OK
    assert site.said == ["screen", *shown, "as before"]
    assert site.slept == [room.SCREEN_INTERVAL_S] * 2
    site.views, site.keys = [WELL], ["q"]
    room.watch_site(site.context(tty=True, interval=9.0))
    assert site.slept[-1] == 9.0


# -- the page


def test_a_page_is_served_until_interrupted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = site.views
    log: List[Any] = []

    @contextlib.contextmanager
    def server(folder: Path, look: Callable[[], SiteView], reporter: Any) -> Iterator[str]:
        log.append((folder, look()))
        yield "server"
        log.append("closed")

    def serve(served: str, is_background: bool) -> None:
        log.append((served, is_background))

    monkeypatch.setattr("hfship.ops.site_page.PageServer", server)
    monkeypatch.setattr("hfship.commands.mirror.serve_until_interrupted", serve)
    assert room.serve_page(site.context()) == Exit.OK
    assert log == [(site.folder / "_gateway", second), ("server", False), "closed"]
    assert site.said == [
        "the page is at /ops of the gateway, for keys of: hfship key add NAME --ops"
    ]
    assert first not in site.views, "it was looked at before"


def test_what_is_wrong_is_said_before_a_page_is_served(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> SiteView:
        raise NotFoundError("there is no gateway", "", "")

    monkeypatch.setattr(room, "read_site", read)
    with pytest.raises(NotFoundError):
        room.serve_page(site.context())
    with pytest.raises(UsageError, match="--page needs --site"):
        room.serve_page(site.context(site=False))
    assert site.said == []


def test_a_page_at_boot_is_a_service(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    found: List[Any] = []

    def install(_: Any, service: Any) -> Exit:
        found.append(service)
        return Exit.INCOMPLETE

    monkeypatch.setattr("hfship.commands.installing.install_or_print", install)
    assert room.serve_page(site.context(install=True)) == Exit.INCOMPLETE
    [service] = found
    assert (service.name, service.stays) == ("hfship-page", True)
    program, variable, python, pyz, *words = service.argv
    assert (program, variable) == ("/usr/bin/env", f"HFSHIP_DEPLOY_DIR={site.folder}")
    assert "python" in python and Path(pyz).is_absolute() and words == ["watch", "--site", "--page"]
