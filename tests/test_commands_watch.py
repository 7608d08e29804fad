"""How often `watch` looks: what is asked for, or what suits where it shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional

import pytest

from hfship.commands import watch
from hfship.commands.watch import PLAIN_INTERVAL_S
from hfship.ops import watch as looks
from hfship.ops.jobs import RECORD_INTERVAL_S


@pytest.mark.parametrize(
    "terminal, json, interval, expected",
    [
        (True, False, None, ("on_screen", RECORD_INTERVAL_S)),
        (True, False, 3.0, ("on_screen", 3.0)),
        (False, False, None, ("in_lines", PLAIN_INTERVAL_S)),
        (False, False, 3.0, ("in_lines", 3.0)),
        (True, True, 3.0, ("in_lines", 3.0)),
    ],
)
def test_how_often_it_looks(
    terminal: bool, json: bool, interval: Optional[float], expected: Any, monkeypatch: Any
) -> None:
    seen = []
    monkeypatch.setattr(looks, "watch_on_screen", lambda *told: seen.append(("on_screen", told[1])))
    monkeypatch.setattr(looks, "watch_in_lines", lambda *told: seen.append(("in_lines", told[1])))
    monkeypatch.setattr(watch, "_require_known", lambda _: None)
    args = SimpleNamespace(all=False, jobs=[], json=json, interval=interval, once=False)
    reporter = SimpleNamespace(out=SimpleNamespace(isatty=lambda: terminal))
    context: Any = SimpleNamespace(args=args, reporter=reporter)
    watch.show_jobs(context)
    assert seen == [expected]
