# SPDX-License-Identifier: Apache-2.0
"""What a site says beside its replicas: GPUs, alerts that fire in Prometheus, the certificate.

Promises: each is asked for a second or two at most, and what does not answer is left out.
"""

from __future__ import annotations

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import HfshipError
from hfship.base.text import human_bytes
from hfship.base.values import dataclass
from hfship.serve.deployments import read_own
from hfship.serve.docker import ask_nvidia_smi
from hfship.serve.engine import Heartbeat, read_heartbeat
from hfship.serve.terms import Plan
from hfship.site.gateway_run import days_left
from hfship.site.monitoring import COMPOSE_FILE
from hfship.site.terms import CERTIFICATE_FILE

ALERTS_TIMEOUT_S = 2.0
_MOST_ASKED = 16  # replicas at a time
_ANSWER = 1 << 22  # bytes of an answer that are read
_GPU_FIELDS = "index,name,utilization.gpu,memory.used,memory.total,temperature.gpu"
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}


@dataclass(frozen=True)
class GpuRow:
    """A GPU now; None for what it does not tell. Memory in bytes, the load from 0 to 1."""

    gpu: str
    name: str
    load: Optional[float]
    memory_used: Optional[int]
    memory_total: Optional[int]
    celsius: Optional[float]

    def cells(self) -> Dict[str, str]:
        """The row for people."""
        memory = "-"
        if self.memory_used is not None and self.memory_total:
            memory = f"{human_bytes(self.memory_used)} of {human_bytes(self.memory_total)}"
        return {
            "gpu": self.gpu,
            "name": self.name,
            "load": _shown(self.load, "{:.0%}"),
            "memory": memory,
            "temp": _shown(self.celsius, "{:.0f} C"),
        }


GPU_COLUMNS = ("gpu", "name", "load", "memory", "temp")


def _shown(value: Optional[float], form: str) -> str:
    if value is None:
        return "-"
    return form.format(value)


def parse_gpus(text: str) -> Tuple[GpuRow, ...]:
    """The GPUs in what nvidia-smi says to _GPU_FIELDS, as csv without header and units.

    >>> parse_gpus("0, NVIDIA H200, 97, 1, 2, [N/A]")[0].cells()["load"]
    '97%'
    """
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6 or not cells[0].isdecimal():
            continue
        load, used, total, celsius = (_number(cell) for cell in cells[2:])
        row = GpuRow(
            gpu=cells[0],
            name=cells[1],
            load=None if load is None else load / 100,
            memory_used=_bytes(used),
            memory_total=_bytes(total),
            celsius=celsius,
        )
        rows.append(row)
    return tuple(rows)


def _number(cell: str) -> Optional[float]:
    with contextlib.suppress(ValueError):
        return float(cell)
    return None


def _bytes(mebibytes: Optional[float]) -> Optional[int]:
    if mebibytes is None:
        return None
    return int(mebibytes) << 20


def read_gpus() -> Tuple[GpuRow, ...]:
    """The GPUs of this host; none where nvidia-smi says nothing."""
    return parse_gpus(ask_nvidia_smi(f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"))


def read_heartbeats(plans: Mapping[str, Plan], timeout_s: float) -> Dict[str, Optional[Heartbeat]]:
    """The heartbeats of several engines, all asked at the same time; None for one that says
    nothing."""
    if not plans:
        return {}
    names: List[str] = list(plans)
    with ThreadPoolExecutor(_MOST_ASKED) as pool:
        found = pool.map(lambda name: read_heartbeat(plans[name], timeout_s), names)
        return dict(zip(names, found))


# -- alerts


def prometheus_address(compose: str) -> Tuple[str, int]:
    """Where the Prometheus of a compose file of ours answers on this machine; ("", 0) for none.

    >>> prometheus_address('ports: ["0.0.0.0:9091:9090"]')
    ('127.0.0.1', 9091)
    """
    match = re.search(r"([0-9.]+|\[[0-9a-f:]+\]):(\d+):9090\b", compose)
    if match is None:
        return "", 0
    host = _LOOPBACK.get(match[1], match[1].strip("[]"))
    return host, int(match[2])


def firing(answer: Any) -> List[str]:
    """The alerts that fire, in what Prometheus says at /api/v1/alerts, each in a line.

    >>> labels = {"alertname": "ModelDown", "severity": "critical"}
    >>> alert = {"state": "firing", "labels": labels, "annotations": {"summary": "m is down"}}
    >>> firing({"data": {"alerts": [alert, {"state": "pending"}]}})
    ['ModelDown (critical): m is down']
    """
    lines = []
    for alert in answer["data"]["alerts"]:
        if alert["state"] != "firing":
            continue
        labels = alert["labels"]
        said = alert.get("annotations", {}).get("summary", "")
        lines.append(f"{labels['alertname']} ({labels.get('severity', '-')}): {said}")
    return sorted(set(lines))


def read_alerts(monitoring: Path) -> List[str]:
    """The alerts that fire in the Prometheus of a site; none where it does not answer."""
    try:
        compose = read_own(monitoring, COMPOSE_FILE) or b""
        host, port = prometheus_address(compose.decode("utf-8", "replace"))
        if not port:
            return []
        answer = _get(host, port, "/api/v1/alerts")
        return firing(json.loads(answer))
    except (OSError, HTTPException, HfshipError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _get(host: str, port: int, path: str) -> bytes:
    """The body of an answer; no proxy comes between. Raises OSError, HTTPException."""
    connection = HTTPConnection(host, port, timeout=ALERTS_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read(_ANSWER)


# -- the certificate


def certificate_days(gateway: Path) -> Optional[float]:
    """Days until the certificate of the gateway ends, None where it has none."""
    path = gateway / CERTIFICATE_FILE
    if not path.exists():
        return None
    return days_left(str(path))


def certificate_trouble(days: Optional[float], least: float = 14.0) -> Sequence[str]:
    """A line where the certificate ends within so many days.

    >>> certificate_trouble(None), certificate_trouble(3.2)
    ((), ['the certificate ends in 3 days: renew it, then hfship serve --models FILE'])
    """
    if days is None or days >= least:
        return ()
    when = f"ends in {days:.0f} days"
    if days < 0:
        when = f"ended {-days:.0f} days ago"
    return [f"the certificate {when}: renew it, then hfship serve --models FILE"]
