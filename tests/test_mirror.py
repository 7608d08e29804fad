"""mirror: the Hub's API over a folder, judged by its own client and by the official one."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import components
import pytest
from conftest import Program, missing
from hub import FaultHub
from hypothesis import given
from hypothesis import strategies as st

import hfship


@pytest.fixture
def mirror(model: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of hfship's own mirror over a folder with org/tiny."""
    folder = tmp_path / "models" / "org"
    folder.mkdir(parents=True)
    (folder / "tiny").symlink_to(model)
    reporter = hfship.Reporter(progress="none", verbosity=-1)
    with hfship.MirrorServer(("127.0.0.1", 0), hfship.Library(folder.parent), reporter) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.url
        server.shutdown()


def get(
    url: str, method: str = "GET", data: Optional[bytes] = None, **headers: str
) -> Tuple[int, Dict[str, str], bytes]:
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as exc:
        return exc.code, dict(exc.headers), exc.read()


# path -> (status, header, value)
ANSWERS: Dict[str, Tuple[int, str, str]] = {
    "/api/models/org/tiny": (200, "Content-Type", "application/json; charset=utf-8"),
    "/api/models/org/tiny/revision/main": (200, "Content-Type", "application/json; charset=utf-8"),
    "/api/models/ORG/Tiny/revision/main": (200, "Content-Type", "application/json; charset=utf-8"),
    "/api/models/org/tiny/refs": (200, "Content-Type", "application/json; charset=utf-8"),
    "/api/models/org/tiny/treesize/main": (200, "Content-Type", "application/json; charset=utf-8"),
    "/api/models/org/nothing/revision/main": (404, "X-Error-Code", "RepoNotFound"),
    "/api/datasets/org/tiny/revision/main": (404, "X-Error-Code", "RepoNotFound"),
    "/api/models/org/tiny/revision/v9": (404, "X-Error-Code", "RevisionNotFound"),
    "/org/tiny/resolve/v9/config.json": (404, "X-Error-Code", "RevisionNotFound"),
    "/org/tiny/resolve/main/nothing": (404, "X-Error-Code", "EntryNotFound"),
    "/org/tiny/resolve/main/../../../etc/passwd": (404, "X-Error-Code", "EntryNotFound"),
    "/org/tiny/resolve/main/%2e%2e/%2e%2e/etc/passwd": (404, "X-Error-Code", "EntryNotFound"),
    "/org/tiny/resolve/main/config.json": (200, "Accept-Ranges", "bytes"),
    "/etc/passwd": (404, "X-Error-Code", "EntryNotFound"),
}


@pytest.mark.parametrize("path", ANSWERS)
def test_answers(path: str, mirror: str) -> None:
    status, header, value = ANSWERS[path]
    got, headers, _ = get(mirror + path)
    assert got == status and headers.get(header) == value


def test_tree_pages_hold_every_file_once(mirror: str, model: Path) -> None:
    url: Optional[str] = f"{mirror}/api/models/org/tiny/tree/main?recursive=true&limit=2"
    seen = []
    while url:
        _, headers, body = get(url)
        seen += [entry["path"] for entry in json.loads(body)]
        url = hfship.next_page(headers.get("Link", ""))
    assert seen == sorted(path.name for path in model.iterdir())


@pytest.mark.parametrize(
    "wanted, status, expected",
    [
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=5-9", 206, slice(5, 10)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=0-1,3-4", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=99999999999-", 416, slice(0, 0)),
    ],
)
def test_ranges(wanted: str, status: int, expected: slice, mirror: str, model: Path) -> None:
    content = (model / "config.json").read_bytes()
    got, headers, body = get(f"{mirror}/org/tiny/resolve/main/config.json", Range=wanted)
    assert (got, body) == (status, content[expected])
    if got == 206:
        first, last = headers["Content-Range"].split(" ")[1].split("/")[0].split("-")
        assert content[int(first) : int(last) + 1] == body and headers["Content-Range"].endswith(f"/{len(content)}")


def test_head_and_conditional_range(mirror: str, model: Path) -> None:
    url = f"{mirror}/org/tiny/resolve/main/config.json"
    status, headers, body = get(url, "HEAD")
    assert (status, body, int(headers["Content-Length"])) == (200, b"", (model / "config.json").stat().st_size)
    assert get(url, Range="bytes=0-3", **{"If-Range": headers["ETag"]})[0] == 206
    assert get(url, Range="bytes=0-3", **{"If-Range": '"other"'})[0] == 200


def test_paths_info(mirror: str) -> None:
    status, _, body = get(f"{mirror}/api/models/org/tiny/paths-info/main", "POST", b"paths=config.json&paths=none")
    assert status == 200 and [entry["path"] for entry in json.loads(body)] == ["config.json"]


def test_many_clients_at_once(mirror: str, model: Path) -> None:
    """200 connections in the same moment: all served, all right."""
    content = (model / "tokenizer.json").read_bytes()
    with ThreadPoolExecutor(200) as pool:
        bodies = list(pool.map(lambda _: get(f"{mirror}/org/tiny/resolve/main/tokenizer.json")[2], range(200)))
    assert bodies == [content] * 200


def test_port_taken(hfship: Program, mirror: str, tmp_path: Path) -> None:
    port = mirror.rpartition(":")[2]
    done = hfship("mirror", tmp_path / "models", "--port", port, code=9)
    assert f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


def test_missing_folder(hfship: Program, tmp_path: Path) -> None:
    assert "no folder" in hfship("mirror", tmp_path / "nothing", code=5).stderr


@given(
    st.one_of(st.none(), st.text(max_size=20), st.from_regex(r"bytes=\d{0,3}-\d{0,3}", fullmatch=True)),
    st.integers(0, 50),
)
def test_byte_range_is_inside_the_file(header: Any, size: int) -> None:
    try:
        span = hfship.parse_byte_range(header, size)
    except ValueError:
        return
    assert span is None or 0 <= span[0] < span[1] <= size


# -- the official client as judge


@pytest.fixture(scope="session")
def hf() -> Path:
    program = components.path("hf")
    if program is None:
        missing("the hf client (python3 tests/components.py install hf)")
    return Path(str(program))


def run_hf(hf: Path, url: str, home: Path, *args: Any) -> subprocess.CompletedProcess[str]:
    """The official client with a home of its own; Xet off, as the mirror serves plain HTTP."""
    env = {"HF_ENDPOINT": url, "HOME": str(home), "HF_HOME": str(home / "hf"), "PATH": os.environ["PATH"]}
    env.update({"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"})
    return subprocess.run([str(hf), *map(str, args)], env=env, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.real
def test_hf_downloads_from_our_mirror_byte_for_byte(hf: Path, mirror: str, model: Path, tmp_path: Path) -> None:
    run_hf(hf, mirror, tmp_path, "download", "org/tiny", "--local-dir", tmp_path / "out")
    for path, _ in hfship.content_files(model):
        assert (tmp_path / "out" / path).read_bytes() == (model / path).read_bytes()


@pytest.mark.real
def test_hf_finds_nothing_to_do_after_our_fetch(
    hf: Path, pyz: Program, hub: FaultHub, model: Path, tmp_path: Path
) -> None:
    hub.add(model)
    pyz("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    hub.forget()
    run_hf(hf, hub.url, tmp_path, "download", "org/tiny", "--local-dir", tmp_path / "tiny")
    assert hub.traffic.body_bytes == 0
    assert not [method for method, path, _ in hub.traffic.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.real
def test_we_adopt_what_hf_downloaded(hf: Path, pyz: Program, hub: FaultHub, model: Path, tmp_path: Path) -> None:
    """Its files are hashed before they are believed: `hf` itself checks no hash."""
    hub.add(model)
    hub.faults.flip_at, hub.faults.flip_times = 1000, 1
    run_hf(hf, hub.url, tmp_path, "download", "org/tiny", "--local-dir", tmp_path / "tiny")  # exits 0, damaged
    hub.forget()
    pyz("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    assert 0 < hub.traffic.body_bytes < sum(path.stat().st_size for path in model.iterdir())
    for path, _ in hfship.content_files(model):
        assert (tmp_path / "tiny" / path).read_bytes() == (model / path).read_bytes()
