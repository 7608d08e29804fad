"""aria2c itself, and what servers try with it: other sources, peers, ports, hooks, more bytes than were asked for."""

from __future__ import annotations

import re
import shutil
import time
from hashlib import sha256
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import Program, missing, program
from support.network import RawServer, answer
from test_hostile_hub import CONTENT, ENTRY, Answer, OddHub, answer_json, part_of

pytestmark = pytest.mark.real
META = "application/metalink4+xml"


@pytest.fixture
def hfship(tmp_path: Path) -> Program:
    if not shutil.which("aria2c"):
        missing("aria2c")
    return program("source", tmp_path / "home")


def fetch(hfship: Program, url: str, folder: Path, code: int, **env: str) -> Any:
    return hfship(
        "fetch", "org/tiny", "--endpoint", url, "-o", folder / "out", "--engine", "aria2",
        code=code, timeout=100, env=env,
    )  # fmt: skip


def metalink(name: str, url: str) -> bytes:
    return (
        f'<?xml version="1.0"?><metalink xmlns="urn:ietf:params:xml:ns:metalink"><file name="{name}">'
        f"<size>5</size><url>{url}</url></file></metalink>"
    ).encode()


def torrent(tracker: str) -> bytes:
    name = b"d6:lengthi5e4:name6:planted12:piece lengthi16384e6:pieces20:" + b"x" * 20 + b"e"
    return f"d8:announce{len(tracker)}:{tracker}4:info".encode() + name + b"e"


def whole(body: bytes, **headers: str) -> Any:
    """A server of this file, ranges included."""

    def answer_to(head: str) -> bytes:
        asked = re.search(r"(?i)range: bytes=(\d+)-(\d*)", head)
        if not asked:
            return answer(body, **headers)
        start, stop = int(asked[1]), int(asked[2] or len(body) - 1) + 1
        there = {"Content_Range": f"bytes {start}-{stop - 1}/{len(body)}", **headers}
        return answer(body[start:stop], "206 Partial Content", **there)

    return answer_to


@pytest.mark.parametrize("kind", ["metalink", "torrent"])
@pytest.mark.parametrize("listed", ["as it is", "as something else"])
def test_what_comes_is_content_and_no_order(
    listed: str, kind: str, hfship: Program, tmp_path: Path
) -> None:
    """A metalink or a torrent is a file like others: right when the Hub lists it, wrong otherwise."""
    with RawServer(lambda _: answer(b"PLANT")) as planted:
        body, mime, path = metalink("planted", f"{planted.url}/p"), META, "w.meta4"
        if kind == "torrent":
            body, mime, path = torrent(f"{planted.url}/a"), "application/x-bittorrent", "w.torrent"
        body += b" " * (2_000_000 - len(body))
        entry: Dict[str, Any] = {**ENTRY, "path": path}
        if listed == "as it is":
            entry["lfs"] = {"oid": sha256(body).hexdigest(), "size": len(body)}
        with OddHub(tree=answer_json([entry]), resolve=whole(body, Content_Type=mime)) as hub:
            done = fetch(hfship, hub.url, tmp_path, 0 if listed == "as it is" else 6)
        assert not planted.heads and not list(tmp_path.rglob("planted*")), done.stderr
    if listed == "as it is":
        assert (tmp_path / "out" / "tiny" / path).read_bytes() == body
    else:
        assert "damaged through aria2c" in done.stderr


LENGTHS = {
    "more than was asked for": CONTENT + b"MORE",
    "less than was asked for": CONTENT[:-1],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_what_it_brought_is_compared_with_what_was_asked_for(
    name: str, hfship: Program, tmp_path: Path
) -> None:
    """A right beginning is not enough."""
    body = LENGTHS[name]

    def answer_to(head: str) -> bytes:
        if "aria2" in head or ("hfship" in head and "bytes=0-0" not in head):
            return bytes(whole(body)(head))
        return part_of(head)

    with OddHub(resolve=answer_to) as hub:
        done = fetch(hfship, hub.url, tmp_path, 6)
    assert f"it brought {len(body)} bytes of {len(CONTENT)}" in done.stderr
    assert not list((tmp_path / "out" / "tiny").glob("w*"))


def test_the_operators_own_configuration_and_logins_stay_out(
    hfship: Program, tmp_path: Path
) -> None:
    """aria2.conf may have hooks, and a netrc logins for hosts that a Hub redirects to."""
    conf = hfship.home / ".aria2" / "aria2.conf"
    conf.parent.mkdir()
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/hooked\n")
    hook.chmod(0o755)
    conf.write_text(f"on-download-complete={hook}\nenable-rpc=true\nrpc-listen-port=16800\n")
    (hfship.home / ".netrc").write_text("default login bob password hunter22\n")
    (hfship.home / ".netrc").chmod(0o600)
    with RawServer(whole(CONTENT)) as cdn:
        signed = answer(b"", "302 Found", Location=f"http://localhost:{cdn.port}/w?Signature=x")
        with OddHub(resolve=signed) as hub:
            fetch(hfship, hub.url, tmp_path, 0)
    assert not (tmp_path / "hooked").exists()
    assert cdn.heads and not any("Authorization" in head for head in cdn.heads)


def test_it_listens_nowhere(hfship: Program, tmp_path: Path) -> None:
    def slow(head: str) -> Answer:
        body: bytes = whole(CONTENT)(head)
        return body if "bytes=0-0" in head else slowly(body)

    def slowly(body: bytes) -> Any:
        for number in range(0, len(body), 100_000):
            yield body[number : number + 100_000]
            time.sleep(0.1)

    with OddHub(resolve=slow) as hub, hfship.start(
        "fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out", "--engine", "aria2"
    ) as process:  # fmt: skip
        seen: List[str] = []
        while process.poll() is None:
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                seen += listeners(command)
            time.sleep(0.2)
        assert process.returncode == 0, process.communicate()
    assert "aria2c" in seen and set(seen) == {"aria2c"}, seen


def listeners(command: Path) -> List[str]:
    """Of an aria2c of ours: its name, and the sockets of the Internet on which it listens."""
    found = []
    try:
        words = command.read_bytes().split(b"\0")
        if words[0] != b"aria2c":
            return []
        found.append("aria2c")
        inodes = {str(fd.readlink()) for fd in (command.parent / "fd").iterdir()}
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in (command.parent / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                listens = columns[3] == ("0A" if table.startswith("tcp") else "07")
                if listens and f"socket:[{columns[9]}]" in inodes:
                    found.append(f"{table} {columns[1]}")
    except OSError:
        pass  # it ended
    return found
