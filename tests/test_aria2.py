"""What aria2c is told, without aria2c."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest

from hfship.base.proxies import Proxies
from hfship.hub import aria2


@pytest.mark.parametrize(
    "connections, limit_bps, expected",
    [
        (0, 0, ["--split=16", "--max-connection-per-server=16"]),
        (4, 0, ["--split=4", "--max-connection-per-server=4"]),
        (99, 0, ["--split=16", "--max-connection-per-server=16"]),  # aria2c refuses more
        (1, 5e6, ["--split=1", "--max-overall-download-limit=5000000"]),
    ],
)
def test_aria2_opens_as_many_connections_as_it_may_and_is_asked_for(
    connections: int, limit_bps: float, expected: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: List[List[str]] = []
    monkeypatch.setattr(aria2, "run_program", lambda argv, *_, **__: ran.append(argv))
    settings: Any = SimpleNamespace(connections=connections, limit_bps=limit_bps)
    client: Any = SimpleNamespace(endpoint="https://hub", authorization="", proxies=Proxies({}))
    aria2.run_aria2(client, [], settings)
    assert set(expected) <= set(ran[0])
    limited = any("download-limit" in argument for argument in ran[0])
    assert limited == bool(limit_bps)


@pytest.mark.parametrize(
    "url, authorization, shown",
    [
        ("https://hub/org/m/resolve/main/w", "Bearer hf_1", True),
        ("https://hub/org/m/resolve/main/w", "", False),
        ("https://cdn/w?signature=1", "Bearer hf_1", False),
        ("http://hub/org/m/resolve/main/w", "Bearer hf_1", False),
    ],
)
def test_orders_show_the_token_to_the_hub_alone(url: str, authorization: str, shown: bool) -> None:
    transfer: Any = SimpleNamespace(work_file=Path("/m/.hfship/partial/1.part"))
    orders = aria2.aria2_orders([transfer], [url], "https://hub", authorization).splitlines()
    assert orders[:3] == [url, "  dir=/m/.hfship/partial", "  out=1.part"]
    assert orders[3:] == (["  header=Authorization: Bearer hf_1"] if shown else [])
