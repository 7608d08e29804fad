"""Hubs that are not the Hub: mirrors that send on, repositories managers with a path and a login, and what they leave out."""

from __future__ import annotations

import json
import re
import shlex
from hashlib import sha1
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from conftest import Program, program, without_times
from hfship.hub.protocol import redirect_target
from hfship.hub.session import netrc_login
from support.network import RawServer, answer
from test_hostile_hub import COMMIT, CONTENT, ENTRY, OddHub, answer_json, part_of

TOKEN = "hf_" + "T" * 34


@pytest.fixture
def hfship(tmp_path: Path) -> Program:
    return program("source", tmp_path / "home")


def fetch(hfship: Program, url: str, folder: Path, code: int = 0, *more: str, **env: str) -> Any:
    return hfship(
        "fetch", "org/tiny", "--endpoint", url, "-o", folder / "out", "-j", "4", *more,
        code=code, timeout=60, env=env,
    )  # fmt: skip


def came(folder: Path) -> bool:
    return (folder / "out" / "tiny" / "w.safetensors").read_bytes() == CONTENT


def redirect(to: str, status: str = "307 Temporary Redirect") -> bytes:
    return answer(b"", status, Location=to)


# -- sent on to another host


@pytest.mark.parametrize("status", ["307 Temporary Redirect", "308 Permanent Redirect"])
@pytest.mark.parametrize("part", ["revision", "tree", "resolve"])
@pytest.mark.parametrize("refusal", ["401 Unauthorized", "403 Forbidden"])
def test_another_host_gets_no_token_and_that_is_said(
    refusal: str, part: str, status: str, hfship: Program, tmp_path: Path
) -> None:
    """With few requests, exit code 4, and the command that asks that host itself."""
    with RawServer(lambda _: answer(b"", refusal, X_Error_Code="GatedRepo")) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        with OddHub(**{part: lambda head: redirect(elsewhere + head.split()[1], status)}) as hub:
            done = fetch(hfship, hub.url, tmp_path, 4, HF_TOKEN=TOKEN)
    assert f"{hub.url} sends on to localhost, which gets no token" in done.stderr
    assert f"hfship fetch org/tiny --endpoint {elsewhere}" in done.stderr
    assert len(other.heads) <= 4 and all("Authorization" not in head for head in other.heads)
    assert "has no access" not in done.stderr


def test_another_host_that_answers_is_as_good(hfship: Program, tmp_path: Path) -> None:
    with OddHub() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        with RawServer(lambda head: redirect(elsewhere + head.split()[1])) as hub:
            fetch(hfship, hub.url, tmp_path, HF_TOKEN=TOKEN)
    assert came(tmp_path) and all("Authorization" not in head for head in other.heads)


# status of a CDN on a fresh signature -> exit code, words
REFUSALS: Dict[str, Tuple[int, str]] = {
    "401 Unauthorized": (4, "localhost refuses the address that 127.0.0.1 signed for w.safetensors"),
    "403 Forbidden": (4, "localhost refuses the address that 127.0.0.1 signed for w.safetensors"),
    "404 Not Found": (5, "localhost, to which 127.0.0.1 leads, does not have w.safetensors"),
    "410 Gone": (5, "does not have w.safetensors"),
    "400 Bad Request": (8, "localhost answers 400 for w.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("status", REFUSALS)
def test_a_fresh_signature_that_is_refused_is_no_fault_of_the_network(
    status: str, hfship: Program, tmp_path: Path
) -> None:
    code, words = REFUSALS[status]
    with RawServer(lambda _: answer(b"<html>", status)) as cdn:
        signed = f"http://localhost:{cdn.port}/w?Expires=9999999999&Signature=hunter22"
        with OddHub(resolve=redirect(signed, "302 Found")) as hub:
            done = fetch(hfship, hub.url, tmp_path, code)
    assert words in done.stderr and "hunter22" not in done.stderr
    if code != 5:
        assert f"doctor org/tiny --endpoint {hub.url}" in done.stderr
    assert len(cdn.heads) <= 4, "and it is asked a few times only"


@pytest.mark.parametrize("kind", ["text/html", "text/html; charset=utf-8", "TEXT/HTML"])
@pytest.mark.parametrize("where", ["the Hub", "its CDN"])
def test_a_page_in_the_place_of_a_file_is_called_that(
    where: str, kind: str, hfship: Program, tmp_path: Path
) -> None:
    page = answer(b"<html>log in</html>", Content_Type=kind)
    with RawServer(lambda _: page) as cdn:
        resolve = redirect(f"{cdn.url}/w?Signature=x") if where == "its CDN" else page
        with OddHub(resolve=resolve) as hub:
            done = fetch(hfship, hub.url, tmp_path, 8)
    assert f"127.0.0.1 sends {kind} instead of w.safetensors" in done.stderr
    assert len(hub.heads) <= 8


def test_a_file_that_is_a_page_is_fetched(hfship: Program, tmp_path: Path) -> None:
    page = b"<html>a model</html>"
    blob = sha1(b"blob %d\0" % len(page) + page).hexdigest()
    entry = {"type": "file", "path": "index.html", "size": len(page), "oid": blob}
    whole = answer(page, Content_Type="text/html")
    with OddHub(tree=answer_json([entry]), resolve=whole) as hub:
        fetch(hfship, hub.url, tmp_path)
    assert (tmp_path / "out" / "tiny" / "index.html").read_bytes() == page


ODD_ANSWERS: Dict[str, bytes] = {
    "another length": answer(b"x" * 5, Content_Type="application/octet-stream"),
    "another range": answer(b"x", "206 Partial", Content_Range="bytes 0-0/1"),
    "compressed": answer(b"x", "206 Partial", Content_Encoding="gzip"),
    "nothing": b"",
    "half": part_of("range: bytes=0-99")[:-1],
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_what_keeps_a_file_from_coming_names_file_and_host(
    name: str, hfship: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from hfship.commands.run import main

    monkeypatch.setattr("hfship.hub.retry.FIRST_WAIT_S", 0.06)
    monkeypatch.setenv("HFSHIP_LOG_DIR", str(tmp_path / "log"))
    with OddHub(resolve=ODD_ANSWERS[name]) as hub:
        words = ["fetch", "org/tiny", "--endpoint", hub.url, "-o", str(tmp_path / "out")]
        assert main([*words, "-j", "1"]) == 8
    (error,) = [
        line
        for line in without_times(capsys.readouterr().err).splitlines()
        if line.startswith("hfship:")
    ]
    assert "w.safetensors" in error and "127.0.0.1" in error, error
    assert name != "another length" or "application/octet-stream" in error


# -- below a path

# (endpoint, asked, Location) -> where it leads
PATHS: List[Tuple[str, str, str, str]] = [
    ("http://h/hub", "/hub/a/b/resolve/x", "/api/cache/y", "http://h/hub/api/cache/y"),
    ("http://h/hub", "/hub/a/b/resolve/x", "/hub/api/y", "http://h/hub/api/y"),
    ("http://h/a/b", "/a/b/m/resolve/x", "/a/c/y", "http://h/a/c/y"),
    ("http://h/hub", "/hub/a/b/resolve/x", "y", "http://h/hub/a/b/resolve/y"),
    ("http://h/hub", "/hub/a/b/resolve/x", "../y?q=/z", "http://h/hub/a/b/y?q=/z"),
    ("http://h/hub", "/hub/a/b/resolve/x", "//cdn/y", "http://cdn/y"),
    ("http://h/hub", "/hub/a/b/resolve/x", "http://h/y", "http://h/y"),
    ("http://h", "/a/b/resolve/x", "/y", "http://h/y"),
    ("http://h/hub", "/hub/a/b/resolve/x", "/hubs/y", "http://h/hub/hubs/y"),
]


@pytest.mark.parametrize("endpoint, asked, location, leads_to", PATHS)
def test_a_relative_redirect_keeps_the_path_of_the_endpoint(
    endpoint: str, asked: str, location: str, leads_to: str
) -> None:
    assert redirect_target(f"http://h{asked}", location, endpoint) == leads_to


def test_a_hub_below_a_path(hfship: Program, tmp_path: Path) -> None:
    """A proxy gave it the path; the Hub behind it does not know, and redirects to its own root."""

    def proxied(head: str) -> bytes:
        path = head.split()[1]
        if not path.startswith("/sites/hub/"):
            return answer(b"", "404 Not Found")
        if "/resolve/" in path:
            return redirect("/api/resolve-cache/w")
        return OddHub.right(hub, head)

    with OddHub() as hub, RawServer(proxied) as proxy:
        fetch(hfship, f"{proxy.url}/sites/hub", tmp_path)
    assert came(tmp_path)


# -- Artifactory, Nexus and the like


def needs_login(right: Callable[[str], bytes], login: str) -> Callable[[str], bytes]:
    def guarded(head: str) -> bytes:
        if f"Authorization: Basic {login}" in head:
            return right(head)
        return answer(b"", "401 Unauthorized", WWW_Authenticate='Basic realm="Artifactory"')

    return guarded


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": TOKEN}], ids=["no token", "token"])
def test_a_login_of_netrc_is_shown_to_the_endpoint_that_asks(
    token: Dict[str, str], hfship: Program, tmp_path: Path
) -> None:
    netrc = hfship.home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login bob password hunter22\n")
    netrc.chmod(0o600)
    hub = OddHub()
    with RawServer(needs_login(hub.right, "Ym9iOmh1bnRlcjIy")) as manager:
        done = fetch(hfship, f"{manager.url}/api/huggingfaceml/hf", tmp_path, 0, "-v", **token)
    assert came(tmp_path) and "hunter22" not in done.stderr + done.stdout
    assert not list(hfship.home.rglob("*.json")) or "hunter22" not in "".join(
        path.read_text() for path in hfship.home.rglob("*.json")
    )


@pytest.mark.parametrize("lines", ["", "machine 127.0.0.1 login bob password wrong\n", "garbage"])
def test_a_login_that_is_missing_or_wrong_is_asked_for(
    lines: str, hfship: Program, tmp_path: Path
) -> None:
    (hfship.home / ".netrc").write_text(lines)
    (hfship.home / ".netrc").chmod(0o600)
    with RawServer(needs_login(lambda _: b"", "x")) as manager:
        done = fetch(hfship, manager.url, tmp_path, 4)
    assert "wants a user and a password" in done.stderr and len(manager.heads) <= 2
    assert "machine 127.0.0.1 login USER password PASSWORD" in done.stderr


NETRCS: Dict[str, Any] = {
    "a machine": ("machine hub login bob password pw12", ("bob", "pw12")),
    "the default": (
        "machine x login a password b\ndefault login bob password pw12",
        ("bob", "pw12"),
    ),
    "another machine": ("machine hub2 login bob password pw12", None),
    "no password": ("machine hub login bob", None),
    "garbage": ("\0\0 machine", None),
    "no UTF-8": (b"machine hub login b\xff password \xfe", None),
    "a folder": (None, None),
}


@pytest.mark.parametrize("name", NETRCS)
def test_what_a_netrc_says(name: str, tmp_path: Path) -> None:
    text, expected = NETRCS[name]
    netrc = tmp_path / "netrc"
    if text is None:
        netrc.mkdir()
    else:
        netrc.write_bytes(text if isinstance(text, bytes) else text.encode())
    login = netrc_login("hub", {"NETRC": str(netrc)})
    assert login == expected or (name == "no UTF-8" and login and login.user == "b\xff")
    assert netrc_login("hub", {"NETRC": "~nobody/nowhere"}) is None


def test_a_netrc_for_the_hub_is_not_shown_to_its_cdn(hfship: Program, tmp_path: Path) -> None:
    (hfship.home / ".netrc").write_text("default login bob password hunter22\n")
    (hfship.home / ".netrc").chmod(0o600)
    refusal = answer(b"", "401 Unauthorized", WWW_Authenticate="Basic")
    with RawServer(lambda _: refusal) as cdn, OddHub() as hub:
        hub.odd["resolve"] = redirect(f"http://localhost:{cdn.port}/w?Signature=x")
        fetch(hfship, hub.url, tmp_path, 4)
    assert not any("Authorization" in head for head in cdn.heads + hub.heads)


WITH_XET = {**ENTRY, "xetHash": "f" * 64}
SIBLING = {
    "rfilename": "w.safetensors",
    "size": ENTRY["size"],
    "blobId": "a" * 40,
    "lfs": {"sha256": ENTRY["lfs"]["oid"], "size": ENTRY["size"], "pointerSize": 134},  # type: ignore[index]
}
# what its listing says -> exit code, words
LISTINGS: Dict[str, Any] = {
    "an upstream's xetHash": ({"tree": answer_json([WITH_XET])}, 0, ""),
    "siblings and no tree": (
        {
            "tree": answer(b"", "404 Not Found"),
            "revision": answer_json({"id": "org/tiny", "sha": COMMIT, "siblings": [SIBLING]}),
        },
        0,
        "",
    ),
    "no hash": (
        {"tree": answer_json([{"type": "file", "path": "w.safetensors", "size": 5}])},
        6,
        "lists 1 file of org/tiny without a hash",
    ),
    "the hash of a pointer": (
        {"tree": answer_json([{**WITH_XET, "lfs": None}])},
        6,
        "without a hash",
    ),
    "names and no more": (
        {
            "tree": answer(b"", "404 Not Found"),
            "revision": answer_json(
                {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": "w"}]}
            ),
        },
        6,
        "nothing would prove w",
    ),
    "neither": ({"tree": answer(b"", "404 Not Found")}, 5, "was not found"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_fetch_works_wherever_the_listing_has_hashes(
    name: str, hfship: Program, tmp_path: Path
) -> None:
    """Without X-Repo-Commit and X-Linked-*, which OddHub never sends."""
    odd, code, words = LISTINGS[name]
    with OddHub(**odd) as hub:
        done = fetch(hfship, hub.url, tmp_path, code)
    assert words in done.stderr
    if not code:
        assert came(tmp_path)
        manifest = json.loads((tmp_path / "out/tiny/.hfship/manifest.json").read_text())
        assert manifest["source"]["commit"] == COMMIT


def test_sums_of_a_proxy_say_nothing(hfship: Program, tmp_path: Path) -> None:
    """An MD5 where the Hub has a SHA-256 is no sign of other bytes."""
    sums = {"X_Linked_Etag": f'"{"d" * 32}"', "X_Repo_Commit": "none", "ETag": f'"{"d" * 32}"'}
    with OddHub(
        resolve=answer(b"", "302 Found", Location="/there/w?Signature=x", **sums), there=part_of
    ) as hub:
        fetch(hfship, hub.url, tmp_path)
    assert came(tmp_path)


# -- commits that go away


def test_a_commit_that_goes_while_it_is_fetched(hfship: Program, tmp_path: Path) -> None:
    gone = answer(b"", "404 Not Found", X_Error_Code="RevisionNotFound")
    for part in ("tree", "resolve"):
        with OddHub(**{part: gone}) as hub:
            done = fetch(hfship, hub.url, tmp_path, 5)
        assert "commit cccccccccccc of org/tiny has gone while it was fetched" in done.stderr
        assert "force-push" in done.stderr


def test_only_what_is_wanted_needs_a_hash(hfship: Program, tmp_path: Path) -> None:
    """The command that is proposed fetches the rest."""
    unproven = {"type": "file", "path": "a b.md", "size": 5}
    with OddHub(tree=answer_json([ENTRY, unproven]), resolve=part_of) as hub:
        done = fetch(hfship, hub.url, tmp_path, 6)
        assert "lists 1 file of org/tiny without a hash" in done.stderr
        (rest,) = re.findall(r"to fetch the rest: hfship (fetch .*)", done.stderr)
        assert "--exclude 'a b.md'" in rest
        hfship(*shlex.split(rest), env={"HF_ENDPOINT": hub.url})
    assert came(tmp_path)


def test_a_site_without_hub_api_is_called_that(hfship: Program, tmp_path: Path) -> None:
    pages = ["https://www.modelscope.cn/models/Qwen/Qwen3-8B", "https://modelscope.cn/models/Qwen/Qwen3-8B/summary"]  # fmt: skip
    for page in pages:
        done = hfship("fetch", page, code=2)
        assert "modelscope.cn has no Hub API" in done.stderr
        assert "fetch Qwen/Qwen3-8B" in done.stderr
