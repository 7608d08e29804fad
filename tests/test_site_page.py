"""The page of a site: what is on it, and who sees it through a real HAProxy."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from conftest import Program, free_port, program
from hfship.ops.site_page import site_page
from hfship.site.admin import KeyUse
from hfship.site.overview import ReplicaRow, SiteView
from hfship.site.readings import GpuRow
from hfship.site.store import gateway_text
from hfship.site.terms import GatewayModel, Replica
from support.engine import start_engine
from support.gateways import RunningGateway, key_named, make_gateway

ROW = ReplicaRow("m", "m<b>", "active", "UP", True, 2, 3, 1, 40.0, 0.5)
GPU = GpuRow("0", "NVIDIA H200", 0.97, 1 << 30, 2 << 30, None)
VIEW = SiteView("up", (ROW,), (KeyUse("alice", 1, 2, 3),), ("m: <i>",), (GPU,), ("Down: m",))


def test_a_page_has_all_of_the_site_as_text() -> None:
    text = site_page(VIEW, "now")
    for said in (
        "m&lt;b&gt;",
        "m: &lt;i&gt;",
        "97%",
        "1.1 GB of 2.1 GB",
        "Down: m",
        "alice (1 now",
    ):
        assert said in text, said
    assert "<script" not in text and "requests: 3 running, 1 waiting; 40 tokens/s" in text
    assert "GPUs" not in site_page(replace(VIEW, gpus=()), "now")


@pytest.fixture(scope="module", params=["haproxy-2.6", "haproxy-3.4"])
def site(request: Any) -> Iterator[RunningGateway]:
    """A gateway before an engine, and the page served beside it."""
    home = Path(tempfile.mkdtemp(prefix="hfship-"))  # short, for the path of a socket
    hfship = program("source", home)
    engine = start_engine(free_port(), "m")
    model = GatewayModel("m", ("m",), (Replica("m", f"127.0.0.1:{engine.port}"),))
    keys = [key_named("bob"), key_named("ops", models=("none",), ops=True)]
    gateway = make_gateway(request.param, home / "deploy/_gateway", [model], keys, free_port())
    gateway.start()
    (gateway.folder / "gateway.json").write_text(gateway_text(gateway.gateway))
    gateway.hfship = hfship  # type: ignore[attr-defined]
    try:
        yield gateway
    finally:
        gateway.end()
        engine.kill()
        shutil.rmtree(home)


@pytest.fixture
def page(site: RunningGateway) -> Iterator[subprocess.Popen[bytes]]:
    """The page, served."""
    hfship: Program = site.hfship  # type: ignore[attr-defined]
    process = hfship.start("watch", "--site", "--page")
    for _ in range(100):
        if site.ask("GET", "/ops", key="ops").status == 200:
            break
        time.sleep(0.1)
    yield process
    process.terminate()
    process.wait(20)


def basic(secret: str) -> Dict[str, str]:
    login = base64.b64encode(f"anyone:{secret}".encode()).decode()
    return {"Authorization": f"Basic {login}"}


WHO = [
    ("nobody", {}, 401),
    ("a stranger", basic("sk-x"), 401),
    ("a key without the right", basic("sk-bob"), 403),
    ("a key with it, as browsers send it", basic("sk-ops"), 200),
    ("the same, as programs send it", {"Authorization": "Bearer sk-ops"}, 200),
]


def test_who_sees_the_page(site: RunningGateway, page: Any) -> None:
    for who, headers, status in WHO:
        reply = site.ask("GET", "/ops?x=1", None, "", headers)
        assert reply.status == status, who
        if status == 401:
            assert reply.headers["www-authenticate"] == 'Basic realm="hfship"'
    browser = {**basic("sk-ops"), "Accept": "text/html"}
    shown = site.ask("GET", "/ops", None, "", browser)
    assert b"<td>UP</td>" in shown.body and "refresh" in shown.headers
    view = site.ask("GET", "/ops", key="ops").json
    assert view["schema"] == "hfship-site/1" and view["replicas"][0]["serves"]
    assert site.ask("POST", "/ops", {}, key="ops").status == 405
    for path in ("/ops/", "/ops/x", "//ops", "/%6fps", "/ops%2f"):
        assert site.ask("GET", path, key="ops").status == 404, path
    # The right to the page is none to a model, nor does a password open one.
    assert site.chat("m", key="ops").code == "model_not_found"
    assert site.ask("GET", "/v1/models", None, "", basic("sk-bob")).status == 401
    again = site.hfship("watch", "--site", "--page", code=9)  # type: ignore[attr-defined]
    assert "served already" in again.stderr


def test_a_page_that_nobody_serves_is_said(site: RunningGateway) -> None:
    reply = site.ask("GET", "/ops", key="ops")
    assert (reply.status, reply.code) == (503, "no_page")
    assert "watch --site --page" in json.dumps(reply.json)
