# SPDX-License-Identifier: Apache-2.0
"""What a site says beside its replicas, from what nvidia-smi, engines, Prometheus and openssl say."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.serve.engine import Heartbeat
from hfship.serve.terms import Plan
from hfship.site import readings
from hfship.site.monitoring import COMPOSE_FILE
from hfship.site.readings import GpuRow, certificate_trouble, parse_gpus, prometheus_address
from hfship.site.terms import CERTIFICATE_FILE

MIB = 1 << 20

# -- GPUs

# A line of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`: memory in MiB, the load in percent.
LINES: List[Tuple[str, Sequence[GpuRow]]] = [
    ("0, NVIDIA H200, 97, 3, 4, 61", [GpuRow("0", "NVIDIA H200", 0.97, 3 * MIB, 4 * MIB, 61.0)]),
    ("12, A, 0, 0, 4, 7", [GpuRow("12", "A", 0.0, 0, 4 * MIB, 7.0)]),
    ("1, A, [N/A], [N/A], [N/A], [N/A]", [GpuRow("1", "A", None, None, None, None)]),
    ("1, A, 1, 2, 3", []),
    ("1, A, 1, 2, 3, 4, 5", []),
    ("No devices were found", []),
    ("x, A, 1, 2, 3, 4", []),
    ("", []),
]


@pytest.mark.parametrize(("line", "rows"), LINES)
def test_a_line_of_nvidia_smi(line: str, rows: Sequence[GpuRow]) -> None:
    assert parse_gpus(line) == tuple(rows)


def test_of_several_lines_the_good_ones_are_read() -> None:
    found = parse_gpus(
        "0, A, 1, 2, 3, 4\nUnable to determine the device handle\n1, B, 1, 2, 3, 4\n"
    )
    assert [(row.gpu, row.name) for row in found] == [("0", "A"), ("1", "B")]


def test_nvidia_smi_is_asked_for_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_nvidia_smi(query: str, form: str) -> str:
        assert form == "--format=csv,noheader,nounits"
        option, _, fields = query.partition("=")
        assert option == "--query-gpu"
        values = {
            "index": "0",
            "name": "H200",
            "utilization.gpu": "50",
            "memory.used": "1",
            "memory.total": "2",
            "temperature.gpu": "40",
        }
        return ", ".join(values[field] for field in fields.split(","))

    monkeypatch.setattr("hfship.site.readings.ask_nvidia_smi", ask_nvidia_smi)
    assert readings.read_gpus() == (GpuRow("0", "H200", 0.5, MIB, 2 * MIB, 40.0),)


SHOWN: List[Tuple[GpuRow, Dict[str, str]]] = [
    (
        GpuRow("3", "H200", 0.126, 10**9, 2 * 10**9, 60.6),
        {"gpu": "3", "name": "H200", "load": "13%", "memory": "1.0 GB of 2.0 GB", "temp": "61 C"},
    ),
    (
        GpuRow("3", "H200", 0.0, 0, 2 * 10**9, 0.0),
        {"load": "0%", "memory": "0 B of 2.0 GB", "temp": "0 C"},
    ),
    (
        GpuRow("3", "H200", None, None, 2 * 10**9, None),
        {"load": "-", "memory": "-", "temp": "-"},
    ),
    (GpuRow("3", "H200", None, 10**9, None, None), {"memory": "-"}),
]


@pytest.mark.parametrize(("row", "cells"), SHOWN)
def test_a_row_for_people(row: GpuRow, cells: Dict[str, str]) -> None:
    shown = row.cells()
    assert {name: shown[name] for name in cells} == cells
    assert tuple(shown) == readings.GPU_COLUMNS


# -- engines


def test_all_engines_are_asked_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers only when all are being asked."""
    together = threading.Barrier(3)

    def read_heartbeat(plan: Plan, timeout_s: float) -> Optional[Heartbeat]:
        together.wait(30)
        return None if plan.name == "b" else Heartbeat(timeout_s, plan.port)

    monkeypatch.setattr("hfship.site.readings.read_heartbeat", read_heartbeat)
    plans = {name: Plan(name=name, port=port) for port, name in enumerate("abc")}
    found = readings.read_heartbeats(plans, 2.5)
    assert found == {"a": Heartbeat(2.5, 0), "b": None, "c": Heartbeat(2.5, 2)}
    assert readings.read_heartbeats({}, 2.5) == {}


# -- alerts

ADDRESSES: List[Tuple[str, Tuple[str, int]]] = [
    ('ports: ["127.0.0.1:9090:9090"]', ("127.0.0.1", 9090)),
    ('ports: ["0.0.0.0:9091:9090"]', ("127.0.0.1", 9091)),
    ('ports: ["[::]:9091:9090"]', ("::1", 9091)),
    ('ports: ["[2001:db8::1]:9091:9090"]', ("2001:db8::1", 9091)),
    ('ports: ["10.0.0.1:9091:3000"]', ("", 0)),
    ('ports: ["10.0.0.1:9091:90901"]', ("", 0)),
    ("services: {}", ("", 0)),
]


@pytest.mark.parametrize(("compose", "address"), ADDRESSES)
def test_where_prometheus_answers(compose: str, address: Tuple[str, int]) -> None:
    assert prometheus_address(compose) == address


def alerts_of(*names: str) -> bytes:
    alerts = [{"state": "firing", "labels": {"alertname": name}} for name in names]
    return json.dumps({"data": {"alerts": alerts}}).encode()


class Prometheus(HTTPServer):
    """Answers every path but the one that is asked for with nothing."""

    answer = b""
    asked: List[str]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server: Any = self.server
            server.asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.answer)

        def log_message(self, *_: Any) -> None:
            pass

    with Prometheus(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        compose = f'ports: ["127.0.0.1:{server.server_port}:9090"]\n'
        (tmp_path / COMPOSE_FILE).write_text(compose)
        yield server
        server.shutdown()
        thread.join()


ANSWERS: List[Tuple[bytes, List[str]]] = [
    (alerts_of("b", "a"), ["a (-): ", "b (-): "]),
    (alerts_of(), []),
    (b"not found", []),
    (b"[]", []),
    (b"{}", []),
    (b'{"data": {"alerts": [7]}}', []),
    (b'{"data": {"alerts": [{"state": "firing", "labels": {}}]}}', []),
    (b'{"data": {"alerts": [{"state": "firing", "labels": "x"}]}}', []),
    (b'{"data": {"alerts": [{"state": "firing", "labels": {}, "annotations": 7}]}}', []),
]


@pytest.mark.parametrize(("answer", "lines"), ANSWERS)
def test_prometheus_is_asked_what_fires(
    answer: bytes, lines: List[str], prometheus: Prometheus, tmp_path: Path
) -> None:
    prometheus.answer = answer
    assert readings.read_alerts(tmp_path) == lines
    assert prometheus.asked == ["/api/v1/alerts"]


def test_of_an_endless_answer_only_so_much_is_read(
    prometheus: Prometheus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prometheus.answer = alerts_of("a")
    monkeypatch.setattr(readings, "_ANSWER", len(prometheus.answer) - 1)
    assert readings.read_alerts(tmp_path) == []


def test_no_prometheus_fires_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []

    def get(*words: Any) -> bytes:
        asked.append(words)
        raise ConnectionRefusedError

    monkeypatch.setattr(readings, "_get", get)
    assert readings.read_alerts(tmp_path / "none") == readings.read_alerts(tmp_path) == []
    (tmp_path / COMPOSE_FILE).write_text("services: {}\n")
    assert readings.read_alerts(tmp_path) == [] and asked == []
    (tmp_path / COMPOSE_FILE).write_bytes(b'# \xff\nports: ["127.0.0.1:1:9090"]\n')
    assert readings.read_alerts(tmp_path) == []
    assert asked == [("127.0.0.1", 1, "/api/v1/alerts")]

    def read_own(*_: Any) -> bytes:
        raise HostError("not ours", "", "")

    monkeypatch.setattr(readings, "read_own", read_own)
    assert readings.read_alerts(tmp_path) == []


# -- the certificate


def test_the_days_of_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / CERTIFICATE_FILE
    monkeypatch.setattr(readings, "days_left", {str(path): 7.5}.get)
    assert readings.certificate_days(tmp_path) is None
    path.touch()
    assert readings.certificate_days(tmp_path) == 7.5


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (None, ""),
        (14.0, ""),
        (13.6, "ends in 14 days"),
        (0.0, "ends in 0 days"),
        (-2.2, "ended 2 days ago"),
    ],
)
def test_a_certificate_that_ends_soon_is_said(days: Optional[float], said: str) -> None:
    lines = certificate_trouble(days)
    assert [said in line for line in lines] == ([True] if said else [])
