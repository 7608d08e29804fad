# SPDX-License-Identifier: Apache-2.0
"""`status --format`: what goes together, and where the metrics go; test_metrics.py has what they say."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional, Tuple

import pytest

from hfship.base.errors import Exit, UsageError
from hfship.commands.status_formats import print_metrics, require_format

GIVEN: List[Tuple[str, str, bool, Optional[str]]] = [
    ("", "", True, None),
    ("prometheus", "", False, None),
    ("prometheus", "x.prom", False, None),
    ("", "x.prom", False, "-o is for --format prometheus"),
    ("json", "x.prom", False, "-o is for --format prometheus"),
    ("prometheus", "", True, "are two formats"),
]


@pytest.mark.parametrize(("form", "output", "as_json", "said"), GIVEN)
def test_what_goes_together(form: str, output: str, as_json: bool, said: Optional[str]) -> None:
    args = SimpleNamespace(format=form, output=output, json=as_json)
    context: Any = SimpleNamespace(args=args)
    if said is None:
        require_format(context)
    else:
        with pytest.raises(UsageError, match=said):
            require_format(context)


@pytest.mark.parametrize("to_file", [True, False])
def test_metrics_go_to_a_file_or_are_shown(
    to_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states are in them, so that the exit code tells of none."""
    monkeypatch.setattr("hfship.ops.jobs.read_jobs", lambda folders: f"jobs {folders}")
    monkeypatch.setattr("hfship.ops.metrics.read_disks", lambda _: "disks")
    monkeypatch.setattr("hfship.serve.xid.read_xids", lambda: "xids")
    monkeypatch.setattr("hfship.ops.metrics.Hardware", lambda *words: words)
    monkeypatch.setattr("hfship.ops.metrics.metrics_text", lambda *words: f"{words}\n")
    monkeypatch.setattr(
        "hfship.site.readings.certificate_days", {tmp_path / "deploy/_gateway": 7.5}.get
    )
    shown: List[str] = []
    path = tmp_path / "x.prom"
    args = SimpleNamespace(format="prometheus", output=path if to_file else None, json=False)
    settings = SimpleNamespace(log_dir="logs", deploy_dir=tmp_path / "deploy")
    reporter = SimpleNamespace(show=shown.append)
    context: Any = SimpleNamespace(args=args, settings=settings, reporter=reporter)
    assert print_metrics(context, lambda asked: [asked is context]) is Exit.OK  # type: ignore[list-item]
    text = f"{([True], 'jobs ' + str(['logs']), 'disks', (7.5, 'xids'))}\n"
    if to_file:
        assert path.read_text() == text and shown == []
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, "node_exporter is another user"
    else:
        assert shown == [text]
    args.output, args.format = path, ""
    with pytest.raises(UsageError):
        print_metrics(context, lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
