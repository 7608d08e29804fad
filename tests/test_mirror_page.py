"""The mirror at / (a page for browsers, JSON for programs), and as a service: in the background, at boot, with a bar."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program, free_port
from hfship.base.manifest import Source
from hfship.ops import mirror_repo
from hfship.ops.catalogue import RepoCatalogue
from hfship.ops.jobs import read_job
from hfship.ops.mirror_page import overview_page
from hfship.ops.mirror_repo import MirrorRepo
from hfship.ops.page import wants_page
from support.make_model import make_model


class Page(HTMLParser):
    """What a browser makes of a page: its elements, with their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: List[str] = []
        self.texts: List[Tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1], data.strip()))

    def all(self, tag: str) -> List[str]:
        return [text for one, text in self.texts if one == tag]


def a_repo(name: str, license: str = "", repo_type: str = "model") -> MirrorRepo:
    source = Source(
        "https://hub",
        name,
        "main",
        name,
        "c" * 40,
        license,
        False,
        "2026-01-31T04:05:06Z",
        repo_type,
    )
    return MirrorRepo(source, Path("/x"), {}, {})


def test_the_page_has_models_with_commits_and_how_to_use_them() -> None:
    repos = [a_repo("org/d", "mit", "dataset"), a_repo("org/m")]
    text = overview_page(
        "http://gpu1:8090", repos, {"half": "/m/half is not complete"}, True, False
    )
    page = Page(text)
    assert page.all("h1") == ["Models at http://gpu1:8090"]
    assert {"org/d (dataset)", "org/m", "mit", "2026-01-31"} <= set(page.all("td"))
    assert page.all("code") == ["c" * 12] * 2 and f'title="{"c" * 40}"' in text
    (usage,) = page.all("pre")
    assert "HF_ENDPOINT=http://gpu1:8090" in usage and "HF_TOKEN=" in usage
    assert "hf download org/m\n" in usage and "vllm serve org/m" in usage
    assert page.all("li") == ["/m/half is not complete"] and "still looking" in text
    alone = overview_page("u", [], {}, False, True)
    assert "No whole model is here yet" in alone and "HF_TOKEN" not in alone and "<li>" not in alone


NASTY = st.text(max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", '"><img src=x onerror=1>', "&lt;", "\ud800", "</td></table>"]
)


@given(NASTY, NASTY, NASTY)
def test_nothing_of_a_name_becomes_part_of_the_page(name: str, license: str, why: str) -> None:
    text = overview_page("http://h", [a_repo(name, license)], {"x": why}, False, True)
    plain = overview_page("http://h", [a_repo("n", "l")], {"x": "w"}, False, True)
    assert Page(text).tags == Page(plain).tags
    text.encode()


@pytest.mark.parametrize(
    "accept, page",
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("TEXT/HTML", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("application/text/html-not", False),
    ],
)
def test_who_gets_a_page(accept: str, page: bool) -> None:
    assert wants_page(accept) is page


# ---- as a service


@pytest.fixture
def site(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "site/org").mkdir(parents=True)
    (tmp_path / "site/org/tiny").symlink_to(model)
    return tmp_path / "site"


def until(true: Callable[[], Any]) -> Any:
    for _ in range(400):
        try:
            found = true()
        except (OSError, ValueError, http.client.HTTPException):
            found = None
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("did not come")


def ask(url: str, accept: str) -> Tuple[str, str]:
    """The kind, and the body, of what is at /."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", "/", headers={"Accept": accept})
    answer = connection.getresponse()
    body = answer.read().decode()
    assert answer.status == 200 and answer.getheader("Vary") == "Accept"
    return str(answer.getheader("Content-Type")), body


@pytest.fixture
def background(pyz: Program, site: Path) -> Iterator[Dict[str, Any]]:
    """A mirror in the background: its row, and its address."""
    port = free_port()
    started = json.loads(pyz("mirror", site, "--port", port, "--background", "--json").stdout)
    url = f"http://127.0.0.1:{port}"
    until(lambda: ask(url, "*/*"))
    yield {**started, "url": url, "port": port}
    pyz("stop", started["job"], code=None)


def test_a_mirror_in_the_background_is_a_job(
    background: Dict[str, Any], pyz: Program, site: Path
) -> None:
    assert background["job"] == "mirror-site"
    kind, body = ask(background["url"], "text/html,*/*")
    assert kind.startswith("text/html") and "org/tiny" in Page(body).all("td")
    kind, body = ask(background["url"], "*/*")
    (model,) = json.loads(body)["models"]
    assert kind.startswith("application/json") and json.loads(body)["repos"] == ["org/tiny"]
    assert model["repo"] == "org/tiny" and model["files"] > 3 and model["bytes"] > 1e6
    assert len(model["commit"]) == 40
    assert re.search(r"(?m)^mirror-site +serving", pyz("watch", "--once").stdout)
    assert "use it with: HF_ENDPOINT=" in pyz("logs", "mirror-site").stdout
    again = pyz("mirror", site, "--port", background["port"], "--background", code=9)
    assert "cannot listen" in again.stderr
    assert "stopped mirror-site" in pyz("stop", "mirror-site").stdout
    until(lambda: read_job(pyz.home / "logs/hfship/mirror-site.json").state == "done")


def test_a_mirror_that_a_reboot_ended_is_resumed(background: Dict[str, Any], pyz: Program) -> None:
    record = pyz.home / "logs/hfship/mirror-site.json"
    os.kill(read_job(record).record.pid, signal.SIGTERM)
    until(lambda: read_job(record).state == "interrupted")
    assert pyz("watch", "--resume-all").stdout == "resumed mirror-site\n"
    assert until(lambda: ask(background["url"], "*/*"))


def test_install_prints_a_unit_with_the_options_of_the_call(
    pyz: Program, site: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret_token1\n")
    words = ["mirror", "site", "--host", "0.0.0.0", "--port", "9999", "--token-file", "token"]
    said = pyz(*words, "--install", cwd=tmp_path, env={"PATH": "/nowhere"}).stdout
    (start,) = re.findall(r"ExecStart=(.*)", said)
    expected = f"mirror {site} --host 0.0.0.0 --port 9999 --token-file {tmp_path / 'token'}"
    assert start.endswith(expected) and "secret_token1" not in said
    assert "/etc/systemd/system/hfship-mirror.service" in said and "Restart=on-failure" in said
    assert not list((pyz.home / "logs").rglob("*.json")), "it is no job"
    done = pyz("mirror", site, "--install", env={"HFSHIP_MIRROR_TOKEN": "secret_token1"}, code=2)
    assert "--token-file FILE" in done.stderr and "secret_token1" not in done.stderr


def test_hashing_is_shown_and_what_was_read_is_kept(pyz: Program, tmp_path: Path) -> None:
    make_model(tmp_path / "site/org/big", size_mb=80, shards=2)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    seen = []
    for _ in range(2):
        process = pyz.start(
            "mirror", tmp_path / "site", "--port", 0, "--progress", "json", env=environment
        )
        assert process.stdout and process.stderr
        assert "org/big" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        events = [json.loads(line) for line in said.splitlines()]
        seen.append([one for one in events if one["event"] == "progress" and one["final"]])
    ((event,), again) = seen
    assert event["stage"] == "hashing org/big" and event["done"] == event["total"] > 64 << 20
    assert not again, "the second start reads nothing"


def test_small_models_are_read_without_a_bar(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").symlink_to(model)
    shown: List[Tuple[str, int]] = []

    def progress(name: str, size: int) -> Any:
        shown.append((name, size))
        return mirror_repo.no_progress(name, size)

    assert RepoCatalogue(tmp_path, progress=progress).repos() and not shown
    monkeypatch.setattr(mirror_repo, "SHOWN_READ", 1000)
    assert RepoCatalogue(tmp_path, progress=progress).repos()
    assert [name for name, _ in shown] == ["m"] and shown[0][1] > 1e6
