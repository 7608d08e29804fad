"""mirror: the Hub's API over a folder, judged by its own client and by the official one."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program, missing
from hfship.base.content import content_files
from hfship.base.files import sha256_file
from hfship.base.manifest import FileEntry, Source, make_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.base.settings import Token
from hfship.hub.protocol import next_page
from hfship.ops.catalogue import RepoCatalogue, model_folders
from hfship.ops.http_request import parse_byte_range
from hfship.ops.hub_api import parse_question, tree_paths
from hfship.ops.mirror import MirrorServer
from hfship.ops.mirror_repo import read_proof
from support import components
from support.hub import FaultHub
from support.make_model import make_model
from support.network import Certificate, make_certificate


@pytest.fixture
def mirror(model: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of hfship's own mirror over a folder with org/tiny."""
    folder = tmp_path / "models" / "org"
    folder.mkdir(parents=True)
    (folder / "tiny").symlink_to(model)
    reporter = Reporter(progress="none", verbosity=-1)
    with MirrorServer(("127.0.0.1", 0), RepoCatalogue(folder.parent), reporter) as server:
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


@pytest.mark.parametrize(
    "path, status",
    [
        ("/api/models/org/tiny/revision/x%0d%0aSet-Cookie:%20a=b", 404),
        ("/api/models/org/tiny/revision/%E4%B8%AD", 404),
        ("/org/tiny/resolve/main/%E4%B8%AD%0d%0aSet-Cookie:%20a=b", 404),
        ("/api/models/org/tiny/tree/main?limit=0", 200),
        ("/api/models/org/tiny/tree/main?limit=%C2%B2&cursor=%C2%B2", 200),
        ("/api/models?limit=%C2%B2", 200),
        ("/api/models/org/tiny/tree/main?limit=" + "9" * 5000, 200),
    ],
)
def test_odd_requests_get_plain_answers(path: str, status: int, mirror: str) -> None:
    code, headers, body = get(mirror + path)
    assert code == status and body and "Set-Cookie" not in headers and "Link" not in headers


@pytest.mark.parametrize("host", ["evil;rel=next", "a,b", "evil'", ""])
def test_links_lead_back_to_the_mirror(host: str, mirror: str) -> None:
    """Also for a Host that is one by the letter, but nothing to put into a header."""
    _, headers, _ = get(f"{mirror}/api/models/org/tiny/tree/main?limit=1", Host=host)
    assert headers["Link"].startswith(f"<{mirror}/")


def test_a_host_that_is_none_is_no_request(mirror: str) -> None:
    url = f"{mirror}/api/models/org/tiny/tree/main?limit=1"
    status, headers, _ = get(url, Host='evil>; rel="next", <http://x')
    assert status == 400 and "Link" not in headers


@pytest.mark.parametrize(
    "scheme, base", [("", "http"), ("https", "https"), ("http", "http"), ("ftp", "http")]
)
def test_links_lead_where_the_client_came_from(scheme: str, base: str, mirror: str) -> None:
    url = f"{mirror}/api/models/org/tiny/tree/main?limit=1"
    _, headers, _ = get(url, Host="models.site:8090", **{"X-Forwarded-Proto": scheme})
    assert headers["Link"].startswith(f"<{base}://models.site:8090/api/models/org/tiny/tree/main?")


@pytest.mark.parametrize(
    "prefix, base",
    [
        ("/hub", "/hub"),
        ("/a/b-c.d/", "/a/b-c.d"),
        ("/", ""),
        ("hub", ""),
        ("//evil.site", ""),
        ("/../x", "/../x"),
        ('/x>; rel="next", <http://evil', ""),
        ("/a, /b", ""),
    ],
)
def test_links_lead_through_the_path_of_a_proxy(prefix: str, base: str, mirror: str) -> None:
    url = f"{mirror}/api/models/org/tiny/tree/main?limit=1"
    _, headers, _ = get(url, Host="site", **{"X-Forwarded-Prefix": prefix})
    assert headers["Link"].startswith(f"<http://site{base}/api/models/org/tiny/tree/main?")


@pytest.mark.parametrize(
    "path, expected",
    [
        ("m", ("m", "revision", "main", "")),
        ("org/m", ("org/m", "revision", "main", "")),
        ("m/tree/v1/sub/x", ("m", "tree", "v1", "sub/x")),
        ("org/m/tree/v1/sub/x", ("org/m", "tree", "v1", "sub/x")),
        ("m/refs", ("m", "refs", "main", "")),
        ("org/m/paths-info/v1", ("org/m", "paths-info", "v1", "")),
        ("org/m/x/tree", ("org/m/x/tree", "revision", "main", "")),
    ],
)
def test_what_is_asked_about_a_repository(path: str, expected: Tuple[str, ...]) -> None:
    assert parse_question(path.split("/")) == expected


def test_hashes_of_large_files_are_in_every_list(mirror: str, model: Path) -> None:
    """Of small ones a git blob, of large ones and of weights the SHA-256 and size."""
    tree = json.loads(get(f"{mirror}/api/models/org/tiny/tree/main?recursive=1")[2])
    info = json.loads(get(f"{mirror}/api/models/org/tiny/revision/main?blobs=1")[2])
    listed = {entry["path"]: entry for entry in tree}
    siblings = {entry["rfilename"]: entry for entry in info["siblings"]}
    for path in (path.name for path in model.glob("*.safetensors")):
        size, sha256 = (model / path).stat().st_size, sha256_file(model / path)
        assert listed[path]["lfs"] == {"oid": sha256, "size": size, "pointerSize": 134}
        assert siblings[path]["lfs"] == {"sha256": sha256, "size": size, "pointerSize": 134}
    assert "lfs" not in listed["config.json"] and "lfs" not in siblings["config.json"]
    assert siblings["config.json"]["blobId"] == listed["config.json"]["oid"]


def test_a_folder_is_looked_through_once_while_that_is_fresh(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "org/tiny", model)
    scans: List[Path] = []
    real = model_folders
    monkeypatch.setattr(
        "hfship.ops.catalogue.model_folders", lambda root: (scans.append(root), real(root))[1]
    )
    monkeypatch.setattr("hfship.ops.catalogue.RESCAN_S", 3600.0)
    catalogue = RepoCatalogue(tmp_path)
    assert [len(catalogue.index()) for _ in range(3)] == [1, 1, 1] and len(scans) == 1
    catalogue.forget()
    catalogue.index()
    assert len(scans) == 2


def test_tree_pages_hold_every_file_once(mirror: str, model: Path) -> None:
    url: Optional[str] = f"{mirror}/api/models/org/tiny/tree/main?recursive=true&limit=2"
    seen = []
    while url:
        _, headers, body = get(url)
        seen += [entry["path"] for entry in json.loads(body)]
        url = next_page(headers.get("Link", ""))
    assert seen == [path for path, _ in content_files(model)]


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
        assert content[int(first) : int(last) + 1] == body and headers["Content-Range"].endswith(
            f"/{len(content)}"
        )


def test_head_and_conditional_range(mirror: str, model: Path) -> None:
    url = f"{mirror}/org/tiny/resolve/main/config.json"
    status, headers, body = get(url, "HEAD")
    assert (status, body, int(headers["Content-Length"])) == (
        200,
        b"",
        (model / "config.json").stat().st_size,
    )
    assert get(url, Range="bytes=0-3", **{"If-Range": headers["ETag"]})[0] == 206
    assert get(url, Range="bytes=0-3", **{"If-Range": '"other"'})[0] == 200


def test_paths_info(mirror: str) -> None:
    status, _, body = get(
        f"{mirror}/api/models/org/tiny/paths-info/main", "POST", b"paths=config.json&paths=none"
    )
    assert status == 200 and [entry["path"] for entry in json.loads(body)] == ["config.json"]


def test_port_taken(hfship: Program, mirror: str, tmp_path: Path) -> None:
    port = mirror.rpartition(":")[2]
    done = hfship("mirror", tmp_path / "models", "--port", port, code=9)
    assert f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--port", "99999"], 2, "not a port"),
        (["--port", "-1"], 2, "--port"),
        (["--host", ""], 2, "--host is empty"),
        (["--host", "no such host"], 9, "cannot listen"),
        (["--host", "\udcff"], 9, "cannot listen"),
        (["--access-log", "/proc/nothing/log"], 7, "give --access-log another FILE"),
    ],
)
def test_what_cannot_be_opened_is_said_at_once(
    options: List[str], code: int, words: str, hfship: Program, tmp_path: Path
) -> None:
    assert words in hfship("mirror", tmp_path, *options, code=code).stderr


def test_missing_folder(hfship: Program, tmp_path: Path) -> None:
    assert "no folder" in hfship("mirror", tmp_path / "nothing", code=5).stderr


@given(
    st.one_of(
        st.none(), st.text(max_size=20), st.from_regex(r"bytes=\d{0,3}-\d{0,3}", fullmatch=True)
    ),
    st.integers(0, 50),
)
def test_byte_range_is_inside_the_file(header: Any, size: int) -> None:
    try:
        span = parse_byte_range(header, size)
    except ValueError:
        return
    assert span is None or 0 <= span[0] < span[1] <= size


# -- what is served, and what is not


class Mirror:
    """`hfship mirror` as an operator starts it."""

    def __init__(self, hfship: Program, folder: Path, *options: Any, **environment: str) -> None:
        self.process = hfship.start(
            "mirror", folder, "--port", 0, *options, env=environment, start_new_session=True
        )
        assert self.process.stdout and self.process.stderr
        self.said = self.process.stdout.readline()
        assert self.said, self.process.stderr.read()
        self.url = next(word.rstrip(":") for word in self.said.split() if word.startswith("http"))

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> Tuple[int, str]:
        """SIGTERM, as from systemd and docker: the exit code and what was said."""
        self.process.terminate()
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


def wait_until(condition: Callable[[], Any], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def publish(root: Path, folder: str, model: Path, source: Optional[Dict[str, str]] = None) -> Path:
    """A copy of a model below `root`, with a manifest as `fetch` writes it when `source` says where it came from."""
    target = root / folder
    shutil.copytree(
        model, target, ignore=shutil.ignore_patterns(".hfship")
    )  # another test may have packed it
    if source is not None:
        where = {
            "endpoint": "https://hub",
            "revision": "main",
            "resolved_repo": source["repo"],
            **source,
        }
        entries = [
            FileEntry(path, size, sha256_file(target / path))
            for path, size in content_files(target)
        ]
        write_manifest(target, make_manifest(target.name, entries, Source(**where)))
    return target


TINY = {"repo": "org/tiny", "commit": "a" * 40}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Same size, other bytes, later than the manifest: another revision is on its way in."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (time.time() + 5, time.time() + 5))


# what happened to a folder with a manifest or without -> why it is not served
UNFIT: Dict[str, Tuple[bool, Callable[[Path], Any], str]] = {
    "a file is missing": (True, lambda f: (f / "config.json").unlink(), "config.json missing"),
    "a file is shorter": (True, lambda f: cut(f / "config.json"), "config.json differs"),
    "another revision comes in": (True, lambda f: flip(f / "config.json"), "config.json differs"),
    "the manifest is damaged": (
        True,
        lambda f: (f / ".hfship/manifest.json").write_text("{"),
        "not a valid manifest",
    ),
    "hf is at work": (
        False,
        lambda f: (
            (f / ".cache/huggingface/download").mkdir(parents=True),
            (f / ".cache/huggingface/download/x.incomplete").touch(),
        ),
        "not complete yet",
    ),
    "fetch is at work": (
        False,
        lambda f: (f / ".hfship/partial").mkdir(parents=True),
        "not complete yet",
    ),
    "a shard is missing": (
        False,
        lambda f: next(f.glob("*-00002-of-*")).unlink(),
        "-00002-of-00002.safetensors missing",
    ),
    "unpack is at work": (False, lambda f: f.rename(f.with_name("tiny~incomplete")), "no file"),
    "a link leads nowhere": (False, lambda f: (f / "x").symlink_to("/nowhere"), "dangling link"),
    "nothing has come yet": (
        False,
        lambda f: (shutil.rmtree(f), (f / ".hfship").mkdir(parents=True)),
        "no file",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_is_not_whole_is_not_served_and_the_list_says_why(
    case: str, model: Path, tmp_path: Path
) -> None:
    with_manifest, harm, words = UNFIT[case]
    publish(tmp_path, "org/good", model)
    harm(publish(tmp_path, "org/tiny", model, TINY if with_manifest else None))
    said: List[str] = []
    catalogue = RepoCatalogue(tmp_path, said.append)
    assert [repo.repo for repo in catalogue.repos()] == ["org/good"]
    assert [words in why for why in catalogue.left_out.values()] == [True], catalogue.left_out
    assert len([line for line in said if words in line]) == 1


def test_a_folder_that_was_refused_for_its_hash_is_not_hashed_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(publish(tmp_path, "tiny", model, TINY) / "config.json")
    hashed: List[str] = []
    monkeypatch.setattr("hfship.ops.catalogue.RESCAN_S", 0.0)
    monkeypatch.setattr(
        "hfship.ops.mirror_repo.read_proof",
        lambda folder, path, *count: (hashed.append(path), read_proof(folder, path, *count))[1],
    )
    catalogue = RepoCatalogue(tmp_path)
    for _ in range(3):
        assert not catalogue.repos()
    assert hashed.count("config.json") == 1 and len(set(hashed)) == len(hashed)
    assert len(catalogue.left_out) == 1


def test_models_appear_and_vanish_while_the_mirror_runs(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    root.mkdir()
    with Mirror(hfship, root) as mirror:
        assert "nothing yet" in mirror.said
        assert get(f"{mirror.url}/api/models/org/tiny")[0] == 404
        folder = publish(root, "org/tiny", model, TINY)
        wait_until(lambda: get(f"{mirror.url}/api/models/org/tiny")[0] == 200)
        (folder / "config.json").unlink()
        wait_until(lambda: get(f"{mirror.url}/api/models/org/tiny")[0] == 404)
        why = get(f"{mirror.url}/api/models/org/tiny")[1]["X-Error-Message"]
        assert "config.json missing" in why and "config.json missing" in get(mirror.url)[2].decode()
        code, said = mirror.stop()
    assert code == 0 and "new: org/tiny" in said and "not served" in said


def test_folders_of_one_repository_are_its_revisions(model: Path, tmp_path: Path) -> None:
    old = {"repo": "org/tiny", "commit": "1" * 40, "fetched_at": "2026-01-01T00:00:00Z"}
    new = {"repo": "org/tiny", "commit": "2" * 40, "fetched_at": "2026-02-01T00:00:00Z"}
    tag = {
        "repo": "org/was",
        "resolved_repo": "org/tiny",
        "commit": "3" * 40,
        "revision": "v1.0",
        "fetched_at": "2026-03-01",
    }
    for name, source in (("tiny-old", old), ("tiny", new), ("tiny-v1", tag)):
        publish(tmp_path, name, model, source)
    publish(tmp_path, "org/tiny", model)  # nobody knows where this one comes from
    catalogue = RepoCatalogue(tmp_path)

    def commit(revision: str, repo: str = "org/tiny") -> str:
        found = catalogue.find("model", repo, revision)
        return found.commit if found else ""

    assert [commit("main"), commit("v1.0"), commit("1" * 40), commit("1" * 7)] == [
        c * 40 for c in "2311"
    ]
    assert [commit("111"), commit("v2"), commit("main", "org/nothing")] == ["", "", ""]
    assert commit("v1.0", "org/was") == "3" * 40 and len(catalogue.repos()) == 1
    with served(catalogue) as url:
        refs = json.loads(get(f"{url}/api/models/org/tiny/refs")[2])
        assert {b["name"]: b["targetCommit"] for b in refs["branches"]} == {
            "main": "2" * 40,
            "v1.0": "3" * 40,
        }
        assert (
            get(f"{url}/org/tiny/resolve/v1.0/config.json", "HEAD")[1]["X-Repo-Commit"] == "3" * 40
        )


def test_the_more_complete_of_two_equal_revisions_is_served(model: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(model, some, ignore=shutil.ignore_patterns("tokenizer.json"))
    publish(tmp_path / "site", "a", some, TINY)
    publish(tmp_path / "site", "b", model, TINY)
    publish(tmp_path / "site", "c", some, TINY)
    repo = RepoCatalogue(tmp_path / "site").find("model", "org/tiny")
    assert repo and "tokenizer.json" in repo.files
    assert tree_paths(repo, "", True) is tree_paths(repo, "", True), "made once for all pages"


@pytest.mark.parametrize(
    ("below", "recursive", "paths"),
    [
        ("", False, "a b c.txt"),
        ("", True, "a a/b a/b/c a/b/c/1.txt a/b/c/2.txt a/d.txt b b/1.txt c.txt"),
        ("a", False, "a/b a/d.txt"),
        ("a", True, "a/b a/b/c a/b/c/1.txt a/b/c/2.txt a/d.txt"),
        ("a/b/c", False, "a/b/c/1.txt a/b/c/2.txt"),
        ("a/b/c/1.txt", False, ""),
        ("a/", False, ""),
        ("none", True, ""),
    ],
)
def test_a_tree_shows_one_level_or_all(below: str, recursive: bool, paths: str) -> None:
    files = ["a/b/c/1.txt", "a/b/c/2.txt", "a/d.txt", "b/1.txt", "c.txt"]

    class Repo:
        """Of a repository, what a tree is made of."""

        def __init__(self) -> None:
            self.files = dict.fromkeys(files)

    repo: Any = Repo()
    assert tree_paths(repo, below, recursive) == paths.split()


@pytest.mark.parametrize(
    "folder, source", [("datasets/org/sums", None), ("x", {"repo_type": "dataset"})]
)
def test_datasets(folder: str, source: Optional[Dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "made/data").mkdir(parents=True)
    (tmp_path / "made/data/train.csv").write_text("a,b\n1,2\n")
    publish(
        tmp_path / "site",
        folder,
        tmp_path / "made",
        source and {**source, "repo": "org/sums", "commit": "c" * 40},
    )
    with served(RepoCatalogue(tmp_path / "site")) as url:
        assert json.loads(get(f"{url}/api/datasets")[2])[0]["id"] == "org/sums"
        assert get(f"{url}/datasets/org/sums/resolve/main/data/train.csv")[2] == b"a,b\n1,2\n"
        assert (
            json.loads(get(f"{url}/api/datasets/org/sums/tree/main/data")[2])[0]["path"]
            == "data/train.csv"
        )
        assert (
            get(f"{url}/api/datasets/org/sums/tree/main/nothing")[1]["X-Error-Code"]
            == "EntryNotFound"
        )
        assert get(f"{url}/api/models/org/sums")[1]["X-Error-Code"] == "RepoNotFound"
        assert get(f"{url}/api/models")[2] == b"[]"


@pytest.mark.parametrize(
    "query, expected",
    [
        ("", ["org/tiny"]),
        ("?search=TIN", ["org/tiny"]),
        ("?author=org", ["org/tiny"]),
        ("?author=x", []),
        ("?limit=0", []),
    ],
)
def test_list_of_models(query: str, expected: List[str], mirror: str) -> None:
    assert [info["id"] for info in json.loads(get(f"{mirror}/api/models{query}")[2])] == expected


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/api/repos/create", "/api/models/org/tiny/commit/main", "/org/tiny/resolve/main/x"]
)
def test_nothing_can_be_written(method: str, path: str, mirror: str) -> None:
    status, headers, _ = get(mirror + path, method, b'{"name": "x"}')
    assert status == 403 and "read-only" in headers["X-Error-Message"]


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b"\xff", b'{"paths": 3}', b'{"paths": ["config.json"]}']
)
def test_paths_info_takes_json_and_garbage(body: bytes, mirror: str) -> None:
    kind = {"Content-Type": "application/json"}
    status, _, answer = get(f"{mirror}/api/models/org/tiny/paths-info/main", "POST", body, **kind)
    assert status == 200 and len(json.loads(answer)) == (b"config" in body)


# -- token, TLS, log, many clients, stop


@contextlib.contextmanager
def served(catalogue: Any, **options: Any) -> Iterator[str]:
    """The URL of a mirror in this process."""
    reporter = Reporter(progress="none", verbosity=-1)
    with MirrorServer(("127.0.0.1", 0), catalogue, reporter, **options) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        SERVERS[server.url] = server
        yield server.url
        server.shutdown()


SERVERS: Dict[str, MirrorServer] = {}


def mirror_of(url: str) -> MirrorServer:
    """The mirror of this process that listens there."""
    return SERVERS[url]


@pytest.mark.parametrize(
    "path, given, status, said",
    [
        ("/api/models/org/tiny", "Bearer secret-of-the-site", 200, None),
        ("/org/tiny/resolve/main/config.json", "Bearer secret-of-the-site", 200, None),
        ("/api/whoami-v2", "Bearer secret-of-the-site", 200, None),
        ("/api/models/org/tiny", "", 401, "Invalid username or password."),
        ("/", "", 401, "Invalid username or password."),
        (
            "/org/tiny/resolve/main/config.json",
            "Bearer secret-of-the-sit",
            401,
            "Invalid credentials in Authorization header",
        ),
        (
            "/api/models/org/tiny",
            "secret-of-the-site",
            401,
            "Invalid credentials in Authorization header",
        ),
        ("/health", "", 200, None),
        # As browsers send it: base64 of USER:PASSWORD.
        ("/", "Basic a2ltOnNlY3JldC1vZi10aGUtc2l0ZQ==", 200, None),
        ("/", "Basic OnNlY3JldC1vZi10aGUtc2l0ZQ==", 200, None),
        ("/", "Basic c2VjcmV0LW9mLXRoZS1zaXRl", 401, "Invalid credentials in Authorization header"),
        ("/", "Basic !", 401, "Invalid credentials in Authorization header"),
        ("/", "Bearer ", 401, "Invalid credentials in Authorization header"),
    ],
)
def test_token(
    path: str, given: str, status: int, said: Optional[str], model: Path, tmp_path: Path
) -> None:
    publish(tmp_path, "org/tiny", model)
    token = Token("secret-of-the-site", "test")
    with served(RepoCatalogue(tmp_path), token=token) as url:
        got, headers, _ = get(url + path, **({"Authorization": given} if given else {}))
    assert (got, headers.get("X-Error-Message")) == (status, said)


def test_a_browser_without_the_token_is_asked_for_it(model: Path, tmp_path: Path) -> None:
    """It gets a page that says how to get in, with nothing of the models; programs get JSON."""
    publish(tmp_path, "org/tiny", model)
    accept = {"Accept": "text/html,*/*;q=0.8"}
    with served(RepoCatalogue(tmp_path), token=Token("secret-of-the-site", "test")) as url:
        status, headers, page = get(f"{url}/org/tiny", **accept)
        assert (status, headers["Content-Type"]) == (401, "text/html; charset=utf-8")
        assert (
            headers["WWW-Authenticate"].startswith("Basic ")
            and "default-src 'none'" in (headers["Content-Security-Policy"])
        )
        assert b"password, which is the token" in page and b"tiny" not in page
        assert f"HF_ENDPOINT={url}".encode() in page and b"secret" not in page
        status, headers, body = get(f"{url}/", Accept="*/*")
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer") and body[:1] == b"{"
        given = {"Authorization": "Basic a2ltOnNlY3JldC1vZi10aGUtc2l0ZQ=="}
        status, _, page = get(f"{url}/", **accept, **given)
        assert status == 200 and b"org/tiny" in page and b"secret-of-the-site" not in page


def test_token_comes_from_file_or_environment_and_never_reaches_the_log(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    publish(tmp_path / "models", "org/tiny", model)
    (tmp_path / "token").write_text("secret-of-the-site\n")
    log = tmp_path / "access.log"
    auth = {
        "Authorization": "Bearer secret-of-the-site",
        "User-Agent": 'a "b" secret-of-the-site\t\x1b[31m',
    }
    for options, env in (
        (["--token-file", tmp_path / "token"], {}),
        ([], {"HFSHIP_MIRROR_TOKEN": "secret-of-the-site"}),
    ):
        with Mirror(
            hfship, tmp_path / "models", *options, "-v", "--access-log", log, **env
        ) as mirror:
            assert get(f"{mirror.url}/api/models/org/tiny")[0] == 401
            assert get(f"{mirror.url}/api/models/org/tiny?t=secret-of-the-site", **auth)[0] == 200
            _, said = mirror.stop()
        assert "secret-of-the-site" not in said + mirror.said
    assert "secret-of-the-site" not in log.read_text() and "\x1b" not in log.read_text()
    assert hfship("mirror", tmp_path, "--token-file", tmp_path / "none", code=4).stderr


COMBINED = r'127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d \+0000\] "(\w+) (\S+) HTTP/1\.1" (\d+) (\d+) "-" "([^"]*)"\n'


def test_access_log_is_in_the_combined_format_and_survives_rotation(
    mirror_log: Tuple[str, Path], model: Path
) -> None:
    url, log = mirror_log
    size = (model / "config.json").stat().st_size
    for number, headers in enumerate(
        ({}, {"Range": "bytes=1-4"}), 1
    ):  # a line comes after its answer
        get(f"{url}/org/tiny/resolve/main/config.json", **headers)
        wait_until(lambda: log.exists() and log.read_text().count("\n") == number)  # noqa: B023 - used at once
    log.rename(log.with_name("old"))
    get(f"{url}/org/tiny/resolve/main/nothing", "HEAD")
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    old = re.findall(COMBINED, log.with_name("old").read_text())
    assert [line[2:4] for line in old] == [("200", str(size)), ("206", "4")] and "urllib" in old[0][
        4
    ]
    assert re.fullmatch(COMBINED, log.read_text()).groups()[:4] == (
        "HEAD",
        "/org/tiny/resolve/main/nothing",
        "404",
        "0",
    )


def test_an_access_log_that_cannot_be_written_fails_no_client_and_is_said_once(
    model: Path, tmp_path: Path
) -> None:
    """A pipe that nobody reads is not waited for."""
    publish(tmp_path / "models", "org/tiny", model)
    log = tmp_path / "access.log"
    os.mkfifo(log)
    said: List[str] = []
    with served(RepoCatalogue(tmp_path / "models"), access_log=log) as url:
        mirror_of(url).reporter.warn = said.append  # type: ignore[method-assign]
        for _ in range(3):
            assert get(f"{url}/api/models/org/tiny")[0] == 200
        wait_until(lambda: said)
        log.unlink()
        assert get(f"{url}/health")[0] == 200
        wait_until(lambda: log.exists() and "/health" in log.read_text())
    assert len(said) == 1 and str(log) in said[0]


@pytest.mark.parametrize("plant", ["file", "link"])
def test_an_access_log_of_another_user_is_not_appended_to(
    plant: str, hfship: Program, model: Path, tmp_path: Path
) -> None:
    if os.geteuid():
        missing("root, to make a file of another user")
    publish(tmp_path / "models", "org/tiny", model)
    log, theirs = tmp_path / "access.log", tmp_path / "theirs"
    theirs.write_text("theirs")
    if plant == "link":
        log.symlink_to(theirs)
    else:
        theirs.rename(log)
        theirs = log
    os.chown(log, 12345, 12345, follow_symlinks=False)
    done = hfship("mirror", tmp_path / "models", "--access-log", log, code=7)
    assert "another user" in done.stderr and theirs.read_text() == "theirs"


@pytest.fixture
def mirror_log(model: Path, tmp_path: Path) -> Iterator[Tuple[str, Path]]:
    publish(tmp_path / "models", "org/tiny", model)
    log = tmp_path / "access.log"
    with served(RepoCatalogue(tmp_path / "models"), access_log=log) as url:
        yield url, log


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    if shutil.which("openssl") is None:
        missing("openssl")
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_tls(hfship: Program, certificate: Certificate, model: Path, tmp_path: Path) -> None:
    """Ranges and whole files are right, pages link to https, and a client that says nothing holds up nobody."""
    cert, key, _ = certificate
    shard = next(model.glob("*.safetensors"))
    publish(tmp_path / "models", "org/tiny", model)
    context = ssl.create_default_context(cafile=str(cert))
    with Mirror(hfship, tmp_path / "models", "--tls-cert", cert, "--tls-key", key) as mirror:
        assert mirror.url.startswith("https://")
        silent = socket.create_connection(("127.0.0.1", int(mirror.url.rpartition(":")[2])))
        url = f"{mirror.url}/org/tiny/resolve/main/{shard.name}"
        with urllib.request.urlopen(url, context=context, timeout=30) as answer:
            assert answer.read() == shard.read_bytes()
        part = urllib.request.Request(url, headers={"Range": "bytes=1000-2000999"})
        with urllib.request.urlopen(part, context=context, timeout=30) as answer:
            assert answer.status == 206 and answer.read() == shard.read_bytes()[1000:2001000]
        page = f"{mirror.url}/api/models/org/tiny/tree/main?limit=1"
        with urllib.request.urlopen(page, context=context, timeout=30) as answer:
            assert answer.headers["Link"].startswith(f"<{mirror.url}/api/")
        silent.close()
        assert mirror.stop()[0] == 0


@pytest.mark.parametrize(
    "cert, key, words",
    [("none", "none", "none"), ("key", "", "--tls-cert"), ("", "key", "--tls-cert")],
)
def test_tls_files_that_do_not_fit(
    cert: str, key: str, words: str, hfship: Program, certificate: Certificate, tmp_path: Path
) -> None:
    files = {"none": tmp_path / "none", "key": certificate[1]}
    options = [
        word
        for flag, name in (("--tls-cert", cert), ("--tls-key", key))
        if name
        for word in (flag, files[name])
    ]
    assert words in hfship("mirror", tmp_path, *options, code=2).stderr


def test_ipv6_and_any_address(hfship: Program, model: Path, tmp_path: Path) -> None:
    publish(tmp_path / "models", "org/tiny", model)
    for host, words in (("::1", "http://[::1]:"), ("0.0.0.0", "http://0.0.0.0:")):
        with Mirror(hfship, tmp_path / "models", "--host", host) as mirror:
            assert (
                words in mirror.said
                and get(mirror.url.replace("0.0.0.0", "127.0.0.1") + "/health")[0] == 200
            )
            _, said = mirror.stop()
        assert "HF_ENDPOINT=http://0.0.0.0" not in said  # nobody can connect to that from elsewhere


@pytest.mark.parametrize("kind", ["plain", "TLS"])
def test_500_clients_at_once(
    pyz: Program, kind: str, certificate: Certificate, model: Path, tmp_path: Path
) -> None:
    """500 connections are open before the first asks; the mirror was started under the usual limit of 1024 files."""
    publish(tmp_path / "models", "org/tiny", model)
    content = (model / "tokenizer.json").read_bytes()
    options = ["--tls-cert", certificate[0], "--tls-key", certificate[1]] if kind == "TLS" else []
    pyz.argv[:0] = ["sh", "-c", 'ulimit -S -n 1024; exec "$@"', "sh"]
    context = ssl.create_default_context(cafile=str(certificate[0]))
    start = threading.Barrier(500)
    with Mirror(pyz, tmp_path / "models", *options) as mirror:
        port = int(mirror.url.rpartition(":")[2])

        def fetch(_: int) -> bytes:
            connection = (
                http.client.HTTPSConnection("127.0.0.1", port, timeout=120, context=context)
                if options
                else (http.client.HTTPConnection("127.0.0.1", port, timeout=120))
            )
            connection.connect()
            start.wait(120)
            connection.request("GET", "/org/tiny/resolve/main/tokenizer.json")
            body = connection.getresponse().read()
            connection.close()
            return body

        with ThreadPoolExecutor(500) as pool:
            bodies = list(pool.map(fetch, range(500)))
        assert bodies == [content] * 500
        assert mirror.stop()[0] == 0


def test_a_stopped_mirror_finishes_what_it_is_sending(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    """SIGTERM while a client reads slowly: nobody new gets in, the client gets every byte, the exit code is 0."""
    folder = publish(tmp_path / "models", "org/tiny", model)
    (folder / "big.bin").write_bytes(os.urandom(1 << 20) * 24)
    with Mirror(hfship, tmp_path / "models") as mirror:
        address = ("127.0.0.1", int(mirror.url.rpartition(":")[2]))
        client = http.client.HTTPConnection(*address, timeout=60)
        client.request("GET", "/org/tiny/resolve/main/big.bin")
        answer = client.getresponse()
        body = answer.read(1000)
        mirror.process.terminate()

        def refused() -> bool:
            try:
                socket.create_connection(address, timeout=5).close()
                return False
            except ConnectionError:  # refused, or reset while it stood in the queue
                return True

        wait_until(refused)
        assert mirror.process.poll() is None
        body += answer.read()
        _, said = mirror.process.communicate(timeout=30)
    assert body == (folder / "big.bin").read_bytes() and mirror.process.returncode == 0
    assert "stopping when 1 answers are sent" in said


def test_ctrl_c_on_an_idle_mirror_ends_it_though_clients_keep_connections(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    publish(tmp_path / "models", "org/tiny", model)
    with Mirror(hfship, tmp_path / "models") as mirror:
        client = http.client.HTTPConnection("127.0.0.1", int(mirror.url.rpartition(":")[2]))
        client.request("GET", "/health")
        client.getresponse().read()
        mirror.process.send_signal(signal.SIGINT)
        assert mirror.process.wait(20) == 0
        client.close()


# -- the official client as judge


@pytest.fixture(scope="session")
def hf() -> Path:
    return components.require("hf")


def run_hf(
    hf: Path, url: str, home: Path, *args: Any, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The official client with a home of its own; Xet off, as the mirror serves plain HTTP."""
    env = {
        "HF_ENDPOINT": url,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "PATH": os.environ["PATH"],
    }
    env.update(
        {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1", **environment}
    )
    done = subprocess.run(
        [str(hf), *map(str, args)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.real
def test_hf_downloads_from_our_mirror_byte_for_byte(
    hf: Path, mirror: str, model: Path, tmp_path: Path
) -> None:
    run_hf(hf, mirror, tmp_path, "download", "org/tiny", "--local-dir", tmp_path / "out")
    for path, _ in content_files(model):
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
    assert not [
        method
        for method, path, _ in hub.traffic.requests
        if method == "GET" and "/resolve/" in path
    ]


@pytest.mark.real
def test_we_adopt_what_hf_downloaded(
    hf: Path, pyz: Program, hub: FaultHub, model: Path, tmp_path: Path
) -> None:
    """Its files are hashed before they are believed: `hf` itself checks no hash."""
    hub.add(model)
    hub.faults.flip_at, hub.faults.flip_times = 1000, 1
    run_hf(
        hf, hub.url, tmp_path, "download", "org/tiny", "--local-dir", tmp_path / "tiny"
    )  # exits 0, damaged
    hub.forget()
    pyz("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    assert 0 < hub.traffic.body_bytes < sum(path.stat().st_size for path in model.iterdir())
    for path, _ in content_files(model):
        assert (tmp_path / "tiny" / path).read_bytes() == (model / path).read_bytes()


@pytest.mark.real
def test_hf_lists_datasets_revisions_and_who_it_is(hf: Path, model: Path, tmp_path: Path) -> None:
    publish(tmp_path / "site", "tiny", model, {**TINY, "revision": "v1.0"})
    publish(tmp_path / "site", "datasets/org/sums", model)
    with served(RepoCatalogue(tmp_path / "site"), token=Token("hf_abcdefgh", "test")) as url:

        def ask(*args: Any) -> str:
            return run_hf(hf, url, tmp_path, *args, HF_TOKEN="hf_abcdefgh").stdout

        assert "org/tiny" in ask("models", "ls", "--search", "tiny", "-q") and '"a' in ask(
            "models", "info", "org/tiny"
        )
        assert "mirror" in ask("auth", "whoami")
        ask("download", "org/sums", "--repo-type", "dataset", "--local-dir", tmp_path / "sums")
        for revision in ("v1.0", "a" * 40, "main"):
            folder = Path(
                re.sub(
                    "^path=", "", ask("download", "org/tiny", "--revision", revision).split()[-1]
                )
            )
            assert (
                folder.name == "a" * 40
                and (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
            )
    assert (tmp_path / "sums/config.json").read_bytes() == (model / "config.json").read_bytes()


# what hf is asked -> its own words
REFUSALS: Dict[str, Tuple[List[str], str, str]] = {
    "no token": (["download", "org/tiny"], "", "authenticated"),
    "wrong token": (
        ["download", "org/tiny"],
        "hf_wrongtoken",
        "Invalid credentials in Authorization header",
    ),
    "no repository": (["download", "org/nothing"], "hf_abcdefgh", "not found"),
    "no revision": (["download", "org/tiny", "--revision", "v9"], "hf_abcdefgh", "Revision"),
    "no file": (["download", "org/tiny", "nothing.txt"], "hf_abcdefgh", "nothing.txt"),
    "upload": (["upload", "org/tiny", __file__], "hf_abcdefgh", "read-only"),
    "new repository": (["repos", "create", "org/new"], "hf_abcdefgh", "read-only"),
}


@pytest.mark.real
@pytest.mark.parametrize("case", REFUSALS)
def test_hf_understands_what_it_is_refused(
    case: str, hf: Path, model: Path, tmp_path: Path
) -> None:
    args, token, words = REFUSALS[case]
    publish(tmp_path / "site", "tiny", model, TINY)
    with served(RepoCatalogue(tmp_path / "site"), token=Token("hf_abcdefgh", "test")) as url:
        done = run_hf(hf, url, tmp_path, *args, code=1, **({"HF_TOKEN": token} if token else {}))
    said = done.stdout + done.stderr
    assert words in said and "Traceback" not in said, said


@pytest.mark.real
def test_olah_caches_our_mirror(hf: Path, model: Path, tmp_path: Path) -> None:
    """hf -> olah -> our mirror: the bytes are right, and the second client costs our mirror none."""
    publish(tmp_path / "site", "tiny", model, TINY)
    sent: List[str] = []
    with served(RepoCatalogue(tmp_path / "site"), access_log=tmp_path / "log") as url:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"hf": urlsplit(url).netloc, "mirror": f"127.0.0.1:{port}"}
        argv = [
            str(components.require("olah")),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--repos-path",
            "cache",
        ]
        for name, netloc in options.items():
            argv += [
                f"--{name}-scheme",
                "http",
                f"--{name}-netloc",
                netloc,
                f"--{name}-lfs-netloc",
                netloc,
            ]
        with (tmp_path / "olah.log").open("w") as log:
            olah = subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_until(
                lambda: olah.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)) == 0
            )
            for client in ("first", "second"):
                (tmp_path / client).mkdir()
                proxy = f"http://127.0.0.1:{port}"
                run_hf(
                    hf,
                    proxy,
                    tmp_path / client,
                    "download",
                    "org/tiny",
                    "--local-dir",
                    tmp_path / client / "out",
                )
                for path, _ in content_files(model):
                    assert (tmp_path / client / "out" / path).read_bytes() == (
                        model / path
                    ).read_bytes()
                sent.append((tmp_path / "log").read_text())
        finally:
            olah.terminate()
            olah.wait(30)
    shards = r'"GET \S+\.safetensors HTTP/1.1" 20'
    assert re.search(shards, sent[0]) and not re.search(shards, sent[1][len(sent[0]) :])


IN_THE_CONTAINER = """
mkdir -p /tmp/run; cd /tmp/run
python3 -c "
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained('org/tiny')('hello', return_tensors='pt').input_ids
model = AutoModelForCausalLM.from_pretrained('org/tiny')
print('transformers:', model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] - ids.shape[1], 'tokens')
"
vllm serve org/tiny --dtype float32 --port 8111 --max-model-len 256 --max-num-seqs 2 >vllm.log 2>&1 &
for i in $(seq 90); do curl -sf 127.0.0.1:8111/health && break; kill -0 $! || break; sleep 1; done
body='{"model": "org/tiny", "prompt": "hello", "max_tokens": 4}'
curl -sf 127.0.0.1:8111/v1/completions -H 'Content-Type: application/json' -d "$body" || grep -E "ERROR|Error" vllm.log
"""


@pytest.mark.alone
@pytest.mark.real
@pytest.mark.slow
def test_transformers_and_vllm_load_a_model_by_its_id(pyz: Program, tmp_path: Path) -> None:
    """Both run in the vLLM image, in a network that has nothing but our mirror, which asks for a token."""
    components.require("vllm-image")
    make_model(tmp_path / "made", size_mb=3, shards=2)
    publish(tmp_path / "site", "tiny", tmp_path / "made", TINY)
    (tmp_path / "token").write_text("hf_abcdefgh")
    (tmp_path / "inside.sh").write_text(IN_THE_CONTAINER)
    mirror = [
        *pyz.argv,
        "mirror",
        tmp_path / "site",
        "--port",
        8110,
        "--token-file",
        tmp_path / "token",
    ]
    mirror += ["--access-log", tmp_path / "log"]
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:8110",
        "HF_TOKEN": "hf_abcdefgh",
        "HF_HUB_DISABLE_XET": "1",
    }
    docker = [
        "docker",
        "run",
        "--rm",
        "--pull",
        "never",
        "--network",
        "host",
        "--shm-size",
        "1g",
        "--entrypoint",
        "sh",
    ]
    docker += [word for key, value in env.items() for word in ("-e", f"{key}={value}")]
    docker += ["-v", f"{tmp_path}/inside.sh:/inside.sh:ro", components.VLLM_IMAGE, "/inside.sh"]
    script = f"{shlex.join(map(str, mirror))} & trap 'kill $!' EXIT; sleep 1; {shlex.join(docker)}"
    argv = components.with_docker_argv(["sh", "-euc", script])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    log = (tmp_path / "log").read_text()
    assert "transformers: 4 tokens" in done.stdout, done.stdout + done.stderr + log
    assert '"text_completion"' in done.stdout and '"model":"org/tiny"' in done.stdout, (
        done.stdout + done.stderr + log
    )
    assert log.count("/resolve/") and not re.search(r'HTTP/1.1" 5\d\d', log)
