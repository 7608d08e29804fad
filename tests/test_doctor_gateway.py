# SPDX-License-Identifier: Apache-2.0
"""What doctor says of a gateway and of monitoring, and where it says nothing, with a docker that is
played; test_doctor_site.py has real certificates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HfshipError, HostError
from hfship.ops import doctor_gateway as room
from hfship.ops.probe import Finding, Probe, ProbeWarning
from hfship.site.monitoring_run import monitoring_folder
from hfship.site.store import GATEWAY_FILE, gateway_folder


@pytest.mark.parametrize(
    ("gateway", "haproxy", "monitoring", "prometheus", "checks"),
    [
        (False, False, False, False, []),
        (True, False, False, False, ["gateway", "certificate"]),
        (False, True, False, False, ["gateway"]),
        (False, False, True, False, ["monitoring"]),
        (False, False, False, True, ["monitoring"]),
        (True, True, True, True, ["gateway", "certificate", "monitoring"]),
    ],
)
def test_what_a_host_has_is_looked_at(
    gateway: bool,
    haproxy: bool,
    monitoring: bool,
    prometheus: bool,
    checks: List[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: List[Any] = []
    probed: List[Any] = []

    def run(probe: Probe, reporter: Any) -> Finding:
        assert reporter == "reporter"
        return Finding(probe.check, "ok", f"{probe.limit_s:.0f} {probe.work()}")

    def note(what: str) -> Any:
        return lambda *given: probed.append((what, *given)) or what

    monkeypatch.setattr(Probe, "run", run)
    monkeypatch.setattr(room, "docker", lambda *words: asked.append(words) or "listing")
    monkeypatch.setattr(room, "haproxy_images", lambda text: haproxy and text == "listing")
    wanted = ("listing", "prometheus")
    monkeypatch.setattr(room, "newest_image", lambda *given: prometheus and given == wanted)
    monkeypatch.setattr(room, "probe_gateway_image", note("g"))
    monkeypatch.setattr(room, "probe_certificate", note("c"))
    monkeypatch.setattr(room, "probe_monitoring", note("m"))
    folder = gateway_folder(tmp_path)
    folder.mkdir(parents=True)
    if gateway:
        (folder / GATEWAY_FILE).touch()
    if monitoring:
        monitoring_folder(tmp_path).mkdir(parents=True)
    settings: Any = SimpleNamespace(deploy_dir=tmp_path)
    reporter: Any = "reporter"
    found = list(room.gateway_findings(settings, reporter))
    assert [one.check for one in found] == checks
    said = {"gateway": "60 g", "certificate": "5 c", "monitoring": "5 m"}
    assert [one.text for one in found] == [said[check] for check in checks]
    given = {"gateway": ("g",), "certificate": ("c", folder), "monitoring": ("m", "listing")}
    assert probed == [given[check] for check in checks]
    assert asked == [(["image", "ls", "--format", "{{json .}}"], "list images")]


def test_where_docker_does_not_answer_its_row_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> str:
        raise HostError("no docker", "", "")

    monkeypatch.setattr(room, "docker", refuse)
    settings: Any = SimpleNamespace(deploy_dir=tmp_path)
    reporter: Any = None
    assert list(room.gateway_findings(settings, reporter)) == []


def said(work: Any, *given: Any) -> str:
    """What a probe says: its text, or `STATE: TEXT | STEP`."""
    try:
        return str(work(*given))
    except ProbeWarning as exc:
        return f"warn: {exc.text} | {exc.next_step}"
    except HfshipError as exc:
        return f"fail: {exc.what} | {exc.next_step}"


@pytest.mark.parametrize(
    ("warning", "expected"),
    [
        ("", "haproxy:3.4: HAProxy 3.4.1"),
        ("it is old", "warn: it is old | hfship fetch docker://haproxy:3.4     # connected side"),
    ],
)
def test_the_image_of_a_gateway(
    warning: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = SimpleNamespace(reference="haproxy:3.4", version=(3, 4, 1))
    found = {"": image}
    monkeypatch.setattr(room, "find_image", lambda asked: found[asked])
    monkeypatch.setattr(room, "image_warning", lambda one: warning if one is image else "?")
    assert said(room.probe_gateway_image) == expected


RENEW = "renew it, then: hfship serve --models FILE"


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        (None, "the gateway has none, or there is no openssl to read it"),
        (90.4, "that of the gateway is good for 90 days"),
        (30.0, "that of the gateway is good for 30 days"),
        (29.0, f"warn: that of the gateway ends in 29 days | {RENEW}"),
        (0.6, f"warn: that of the gateway ends in 1 days | {RENEW}"),
        (0.0, f"fail: that of the gateway ended 0 days ago | {RENEW}"),
        (-3.2, f"fail: that of the gateway ended 3 days ago | {RENEW}"),
    ],
)
def test_how_long_the_certificate_is_good(
    days: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {tmp_path: days}
    monkeypatch.setattr(room, "certificate_days", lambda folder: known[folder])
    expected = expected.replace("-0 days", "0 days")
    assert said(room.probe_certificate, tmp_path).replace("-0 days", "0 days") == expected


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (
            {"prometheus": "p:1", "grafana": "g:1", "alertmanager": "a:1", "node-exporter": "n:1"},
            "p:1, g:1, a:1, n:1",
        ),
        ({"prometheus": "p:1", "grafana": "g:1"}, "p:1, g:1"),
        (
            {"prometheus": "p:1", "node-exporter": "n:1"},
            "warn: p:1, n:1; no Grafana: figures and alerts without dashboards"
            " | hfship fetch docker://grafana/grafana     # connected side",
        ),
        (
            {"grafana": "g:1"},
            "fail: docker has no image of Prometheus"
            " | hfship fetch docker://prom/prometheus     # connected side",
        ),
    ],
)
def test_the_images_of_monitoring(
    images: Dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newest(listing: str, name: str) -> str:
        assert listing == "listing"
        return images.get(name, "")

    monkeypatch.setattr(room, "newest_image", newest)
    assert said(room.probe_monitoring, "listing") == expected
