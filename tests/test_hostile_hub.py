"""fetch from a Hub, a mirror or a CDN that means harm: an end with its reason, soon, and little memory."""

from __future__ import annotations

import itertools
import json
import re
import resource
import time
from hashlib import sha256
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Union

import pytest

from conftest import Program, program
from hfship.commands.run import main
from support.network import RawServer, answer

CONTENT = b"\x01\x02\x03\x04" * 500_000  # two requests of a connection, or one
COMMIT = "c" * 40
ENTRY = {
    "type": "file",
    "path": "w.safetensors",
    "size": len(CONTENT),
    "oid": "a" * 40,
    "lfs": {"oid": sha256(CONTENT).hexdigest(), "size": len(CONTENT)},
}
NINES = "9" * 5000

Answer = Union[bytes, Iterable[bytes]]


class OddHub(RawServer):
    """A Hub of one repository with one file, written by hand, whose answers can be replaced.

    `odd` maps a part of the path to an answer, or to what makes one of the head of the request.
    """

    def __init__(self, **odd: Union[Answer, Callable[[str], Answer]]) -> None:
        self.odd = odd
        super().__init__(self.answer_to)

    def answer_to(self, head: str) -> Answer:
        path = head.split()[1]
        for part, odd in self.odd.items():
            if f"/{part}/" in path:
                return odd(head) if callable(odd) else odd
        return self.right(head)

    def right(self, head: str) -> bytes:
        path = head.split()[1]
        if "/revision/" in path:
            return answer_json({"id": "org/tiny", "sha": COMMIT})
        if "/tree/" in path:
            return answer_json([ENTRY])
        return part_of(head)


def answer_json(value: Any, **headers: str) -> bytes:
    return answer(json.dumps(value).encode(), Content_Type="application/json", **headers)


def part_of(head: str, **headers: str) -> bytes:
    """The range of the file that was asked for."""
    asked = re.search(r"(?i)range: bytes=(\d+)-(\d+)", head)
    assert asked
    start, last = int(asked[1]), int(asked[2])
    body = CONTENT[start : last + 1]
    headers = {"Content_Range": f"bytes {start}-{last}/{len(CONTENT)}", **headers}
    return answer(body, "206 Partial Content", **headers)


def dripping(data: bytes, seconds: float = 0.2) -> Iterator[bytes]:
    for number in range(len(data)):
        yield data[number : number + 1]
        time.sleep(seconds)


def endless_pages(entries: Callable[[int], List[Any]]) -> Callable[[str], bytes]:
    """Pages that each have a next one."""
    numbers = itertools.count(1)

    def page(head: str) -> bytes:
        number = next(numbers)
        path = head.split()[1].partition("?")[0]
        return answer_json(entries(number), Link=f'<{path}?cursor={number}>; rel="next"')

    return page


def file_entry(path: str, **more: Any) -> Dict[str, Any]:
    return {"type": "file", "path": path, "size": 1, "oid": "a" * 40, **more}


# name -> (answers, exit code, words of the error)
HOSTILE: Dict[str, Any] = {
    "429 with Retry-After of years": (
        {"revision": answer(b"", "429 Too Many", Retry_After="999999999")}, 8, "takes no requests"
    ),
    "503 with Retry-After of years": (
        {"revision": answer(b"", "503 Busy", Retry_After="99999999")}, 8, "takes no requests"
    ),
    "503 until the year 9999": (
        {"revision": answer(b"", "503 Busy", Retry_After="Fri, 31 Dec 9999 23:59:59 GMT")},
        8, "takes no requests for >999d",
    ),
    "429 with RateLimit of years": (
        {"revision": answer(b"", "429 Too Many", RateLimit='"api";r=0;t=999999999')},
        8, "takes no requests",
    ),
    "429 for a file, for years": (
        {"resolve": answer(b"", "429 Too Many", Retry_After="999999999")}, 8, "takes no requests"
    ),
    "the same page again and again": (
        {"tree": endless_pages(lambda _: [file_entry("a")])}, 6, "never ends"
    ),
    "empty pages without end": ({"tree": endless_pages(lambda _: [])}, 6, "never ends"),
    "a Link header of 60 kB": (
        {"tree": answer_json([ENTRY], Link="<" * 60_000)}, 6, "Link header of 60000"
    ),
    "a Link header of 6 MB": (
        {"tree": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + (b"Link: " + b"<" * 60_000 + b"\r\n") * 90 + b"\r\n[]"},
        8, "of headers",
    ),
    "headers without end": (
        {"revision": itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X: y\r\n"))},
        8, "cannot be reached",
    ),
    "a header line without end": (
        {"revision": itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"y" * 4096))},
        8, "cannot be reached",
    ),
    "nested": ({"revision": answer(b"[" * 500_000)}, 8, "like a Hub"),
    "nested in an error": (
        {"revision": answer(b'{"error":' * 200_000, "404 Not Found")}, 5, "was not found"
    ),
    "a size of 5,000 digits": (
        {"tree": answer(json.dumps([ENTRY]).replace(str(len(CONTENT)), NINES).encode())},
        8, "like a Hub",
    ),
    "a size of 400 digits": (
        {"tree": answer(json.dumps([ENTRY]).replace(str(len(CONTENT)), "9" * 400).encode())},
        6, "cannot be used",
    ),
    "a size without end": (
        {"tree": answer(json.dumps([ENTRY]).replace(str(len(CONTENT)), "1e999").encode())},
        8, "like a Hub",
    ),
    "63 MB of {}": ({"tree": b"".join([answer(b"[" + b"{}," * (21 << 20) + b"{}]")])}, 8, "like a Hub"),
    "an answer without end": (
        {"revision": lambda _: itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n["], itertools.repeat(b"1," * 50_000))},
        8, "too large to be a Hub's",
    ),
    "negative chunks": (
        {"revision": lambda _: itertools.chain(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n"], itertools.repeat(b"1," * 50_000))},
        8, "",
    ),
    "a chunk size without end": (
        {"revision": lambda _: itertools.chain(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1" * 50_000))},
        8, "cannot be reached",
    ),
    "an X-Linked-Size of 5,000 digits": (
        {"resolve": answer(b"", "302 Found", Location="/there/", X_Linked_Size=NINES)},
        6, "is not what",
    ),
    "an escape in an error": (
        {"revision": answer(b"", "403 Forbidden", X_Error_Message="\x1b[2Jno\x9b0m")},
        4, "?[2Jno",
    ),
    "an id of megabytes": (
        {"revision": answer_json({"id": "a/" + "b" * 3_000_000, "sha": COMMIT})}, 8, "like a Hub"
    ),
    "a path of 100,000 segments": (
        {"tree": answer_json([file_entry("/".join(["a"] * 100_000))])}, 6, "cannot be used"
    ),
    "a redirect with a blank": (
        {"revision": answer(b"", "302 Found", Location="http://h/a b")}, 8, "no address"
    ),
    "a redirect to no host": (
        {"revision": answer(b"", "302 Found", Location="https:///x")}, 8, "no address"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_hub(name: str, tmp_path: Path) -> None:
    odd, code, words = HOSTILE[name]
    hfship = program("source", tmp_path / "home")
    with OddHub(**odd) as hub:
        began = time.monotonic()
        done = fetch(hfship, hub.url, tmp_path, code)
        seconds = time.monotonic() - began
    shown = done.stderr[-1000:]
    assert words in done.stderr and "next" in done.stderr, shown
    assert len(done.stderr) < 5000 and "\x1b" not in done.stderr, shown
    print(f"{seconds:.1f} s")


def fetch(hfship: Program, url: str, folder: Path, code: int, *more: str) -> Any:
    """Run fetch with at most 1 GB of memory, as a process that would take more is ended."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))

    return hfship(
        "fetch", "org/tiny", "--endpoint", url, "-o", folder / "out", "-j", "4", *more,
        code=code, timeout=110, preexec_fn=limit,
    )  # fmt: skip


# name -> answers that are odd, and right
ODD: Dict[str, Any] = {
    "signed until infinity": ("Expires=inf&Signature=x", {}),
    "signed until no number": ("Expires=nan&Signature=x", {}),
    "signed for 5,000 digits": (f"X-Amz-Expires={NINES}&Signature=x", {}),
    "signed before time began": ("X-Amz-Date=00010101T000000Z&X-Amz-Expires=1&Signature=x", {}),
    "a very long query": ("&".join(f"a{n}=1" for n in range(500)), {}),
    "an ETag with a line break": ("Signature=x", {"ETag": '"a"\r\n "b"'}),
    "an ETag of 60 kB": ("Signature=x", {"ETag": f'"{"a" * 60_000}"'}),
    "a Retry-After that nobody asked for": ("Signature=x", {"Retry_After": "999999999"}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_right(name: str, tmp_path: Path) -> None:
    query, headers = ODD[name]

    def cdn(head: str) -> bytes:
        return part_of(head, **headers)

    with OddHub(resolve=answer(b"", "302 Found", Location=f"/there/w?{query}"), there=cdn) as hub:
        fetch(program("source", tmp_path / "home"), hub.url, tmp_path, 0, "-v")
    assert (tmp_path / "out" / "tiny" / "w.safetensors").read_bytes() == CONTENT


CHUNKED: Dict[str, Callable[[bytes], bytes]] = {
    "in chunks": lambda body: b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
    "in small chunks": lambda body: (
        b"".join(
            b"%x;x=y\r\n%b\r\n" % (len(body[n : n + 70_000]), body[n : n + 70_000])
            for n in range(0, len(body), 70_000)
        )
        + b"0\r\nTrailer: x\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_a_range_in_chunks(name: str, tmp_path: Path) -> None:
    def chunked(head: str) -> bytes:
        top, _, body = part_of(head).partition(b"\r\n\r\n")
        top = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", top)
        return top + b"\r\n\r\n" + CHUNKED[name](body)

    with OddHub(resolve=chunked) as hub:
        fetch(program("source", tmp_path / "home"), hub.url, tmp_path, 0)
    assert (tmp_path / "out" / "tiny" / "w.safetensors").read_bytes() == CONTENT


# -- sources that hardly send anything


def slowly(head: str) -> Iterator[bytes]:
    """The range, a byte in a fifth of a second."""
    yield from dripping(part_of(head))


def slow_body(head: str) -> Iterator[bytes]:
    top, end, body = part_of(head).partition(b"\r\n\r\n")
    yield top + end
    yield from dripping(body)


def slow_chunks(head: str) -> Iterator[bytes]:
    top, end, body = part_of(head).partition(b"\r\n\r\n")
    yield re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", top) + end
    for number in range(len(body)):
        yield b"1\r\n" + body[number : number + 1] + b"\r\n"
        time.sleep(0.2)


def slow_chunk_size(head: str) -> Iterator[bytes]:
    top, end, _ = part_of(head).partition(b"\r\n\r\n")
    yield re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", top) + end
    yield from dripping(b"0" * 10_000)


def silent(_: str) -> Iterator[bytes]:
    time.sleep(5)
    yield b""


def silent_after_a_while(head: str) -> Iterator[bytes]:
    yield part_of(head)[:100_000]
    time.sleep(5)


def a_byte_and_no_more(head: str) -> bytes:
    top, end, body = part_of(head).partition(b"\r\n\r\n")
    return top + end + body[:1]


def busy(_: str) -> bytes:
    return answer(b"", "429 Too Many", Retry_After="500")


def busy_for_years(_: str) -> bytes:
    return answer(b"", "503 Busy", Retry_After="999999999")


DRIPS: Dict[str, Callable[[str], Answer]] = {
    one.__name__: one
    for one in (
        slowly,
        slow_body,
        slow_chunks,
        slow_chunk_size,
        silent,
        silent_after_a_while,
        a_byte_and_no_more,
        busy,
        busy_for_years,
    )
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same limits, in seconds that a test can wait for."""
    monkeypatch.setattr("hfship.hub.session.HEAD_S", 1.0)
    monkeypatch.setattr("hfship.hub.transport.API_ANSWER_S", 1.0)
    monkeypatch.setattr("hfship.hub.ranges.TRICKLE_S", 1.0)
    monkeypatch.setattr("hfship.hub.reader.READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr("hfship.hub.session.READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr("hfship.hub.retry.FIRST_WAIT_S", 0.06)
    for name in ("HOME", "HFSHIP_LOG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.mark.parametrize("name", DRIPS)
def test_the_next_source_is_asked(name: str, impatient: None, tmp_path: Path) -> None:
    """A mirror that drips, or wants to be left alone, costs seconds; the Hub brings the file."""
    with OddHub() as hub, RawServer(DRIPS[name]) as mirror:
        began = time.monotonic()
        words = ["fetch", "org/tiny", "--endpoint", hub.url, "--mirror", mirror.url]
        assert main([*words, "-o", str(tmp_path / "out"), "-j", "4"]) == 0
        assert time.monotonic() - began < 30 and mirror.heads
    assert (tmp_path / "out" / "tiny" / "w.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["slowly", "slow_body", "slow_chunk_size", "a_byte_and_no_more"])
def test_a_hub_that_drips_ends_the_run(
    name: str, impatient: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bytes are no progress: each attempt would bring some, for weeks."""
    with OddHub(resolve=DRIPS[name]) as hub:
        words = ["fetch", "org/tiny", "--endpoint", hub.url, "-o", str(tmp_path / "out")]
        assert main([*words, "-j", "2"]) == 8
    assert "w.safetensors does not get on" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["revision", "tree"])
def test_a_list_that_drips_ends_the_run(
    part: str, impatient: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = answer(b" " * 10_000, Content_Type="application/json")
    top, end, body = whole.partition(b"\r\n\r\n")

    def drip(_: str) -> Iterator[bytes]:
        yield top + end
        yield from dripping(body)

    with OddHub(**{part: drip}) as hub:
        words = ["fetch", "org/tiny", "--endpoint", hub.url, "-o", str(tmp_path / "out")]
        assert main(words) == 8
    said = capsys.readouterr().err
    assert "cannot be reached" in said and "127.0.0.1: Read timed out" in said


def test_a_rate_that_the_operator_wants_is_no_drip(impatient: None, tmp_path: Path) -> None:
    words = ["fetch", "org/tiny", "-o", str(tmp_path / "out"), "--limit-rate", "500000"]
    with OddHub() as hub:
        assert main([*words, "--endpoint", hub.url, "-j", "1"]) == 0
