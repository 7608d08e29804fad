# SPDX-License-Identifier: Apache-2.0
"""What is sent of a blob and of a manifest, with answers that are written here: chunks, one PUT, what
an earlier run left, and how much is told as done. test_registry_push.py has servers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple, Type

import pytest

from hfship.base.errors import AuthError, HfshipError, IntegrityError, NetworkError
from hfship.base.files import CHUNK
from hfship.base.progress import Stage
from hfship.hub.registry_protocol import ACCEPT, OCI_MANIFEST, digest_of
from hfship.ops import registry_push as room
from hfship.ops.registry_push import (
    NO_CHUNKS,
    PUSH_RETRY,
    Blob,
    BlobPush,
    Body,
    Stretch,
    file_blob,
    hashed_blob,
    known_blob,
    put_manifest,
    read_stretch,
)
from support.scripted import Scripted, ScriptedRegistry

HOST = ScriptedRegistry.url
CONTENT = b"0123456789"
BLOB = known_blob(CONTENT)
HEAD = f"{HOST}/v2/org/app/blobs/{BLOB.digest}"
BEGIN = f"{HOST}/v2/org/app/blobs/uploads/"
SUM = f"digest={BLOB.digest.replace(':', '%3A')}"
NOTES = ".hfship/push"

GONE: Scripted = (404, {}, b"")
THERE: Scripted = (200, {}, b"")
MADE: Scripted = (201, {}, b"")
BROKEN: Scripted = (500, {}, b"")


def begun(location: str = "/up/1") -> Scripted:
    return (202, {"Location": location}, b"")


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK_SIZE", 4)


class Pushed(ScriptedRegistry):
    """A push of BLOB to a registry that answers so."""

    def __init__(self, folder: Path, *answers: Scripted) -> None:
        super().__init__(*answers)
        self.folder = folder
        self.stage = Stage("push", len(CONTENT))
        self.push = BlobPush(self.client, folder, self.stage, self.stop)

    def run(self, blob: Blob = BLOB) -> int:
        """The bytes that were sent; all of the blob is done then, and nothing is noted."""
        sent = self.push.push(blob)
        assert self.stage.done == blob.size and not self.session.answers
        assert not (self.folder / NOTES).exists() and not self.session.unread
        return sent

    @property
    def told(self) -> List[Tuple[str, str, Any]]:
        """Method, address and body of each request."""
        return [(one.method, one.url, one.body) for one in self.session.sent]

    @property
    def ranges(self) -> List[str]:
        """Which bytes the chunks were."""
        sent = self.session.sent
        return [one.headers["Content-Range"] for one in sent if one.method == "PATCH"]


def note(folder: Path, text: str) -> None:
    """What an earlier run left of BLOB."""
    where = hashlib.sha1(f"{HOST}/org/app {BLOB.digest}".encode()).hexdigest()
    (folder / NOTES).mkdir(parents=True)
    (folder / NOTES / f"{where}.json").write_text(text)


# -- what is sent


def test_a_blob_that_is_there_is_not_sent(tmp_path: Path) -> None:
    pushed = Pushed(tmp_path, THERE)
    assert pushed.run() == 0 and pushed.told == [("HEAD", HEAD, None)]


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/up/1", f"{HOST}/up/1?{SUM}"),
        ("/up/1?state=x", f"{HOST}/up/1?state=x&{SUM}"),
        ("https://other.example/up", f"https://other.example/up?{SUM}"),
    ],
)
def test_a_small_blob_goes_in_one_put(
    location: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHUNK_SIZE", len(CONTENT))
    pushed = Pushed(tmp_path, GONE, begun(location), MADE)
    assert pushed.run() == len(CONTENT)
    assert pushed.told[1:] == [("POST", BEGIN, b""), ("PUT", url, CONTENT)]
    assert pushed.session.sent[-1].headers["Content-Type"] == "application/octet-stream"


def test_a_large_blob_goes_in_chunks_each_to_where_the_last_one_led(tmp_path: Path) -> None:
    pushed = Pushed(
        tmp_path, GONE, begun(), begun("/up/2"), (202, {}, b""), begun("https://r.example/4"), MADE
    )
    assert pushed.run() == len(CONTENT)
    assert pushed.told[2:] == [
        ("PATCH", f"{HOST}/up/1", b"0123"),
        ("PATCH", f"{HOST}/up/2", b"4567"),
        ("PATCH", f"{HOST}/up/2", b"89"),
        ("PUT", f"{HOST}/4?{SUM}", b""),
    ]
    assert pushed.ranges == ["0-3", "4-7", "8-9"]
    assert pushed.session.sent[2].headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize("status", NO_CHUNKS)
def test_where_no_chunks_are_taken_the_blob_goes_whole(status: int, tmp_path: Path) -> None:
    no: Scripted = (status, {}, b"no")
    pushed = Pushed(tmp_path, GONE, begun(), begun("/up/1"), no, begun("/new"), MADE)
    assert pushed.run() == 4 + len(CONTENT), "the first chunk went for nothing"
    assert pushed.told[-2:] == [("POST", BEGIN, b""), ("PUT", f"{HOST}/new?{SUM}", CONTENT)]


# -- after faults


def test_an_upload_goes_on_behind_the_last_chunk(tmp_path: Path) -> None:
    held: Scripted = (204, {"Range": "0-3", "Location": "/up/3"}, b"")
    pushed = Pushed(
        tmp_path, GONE, begun(), begun("/up/2"), BROKEN, GONE, held, begun(), begun(), MADE
    )
    assert pushed.run() == len(CONTENT)
    assert pushed.told[5] == ("GET", f"{HOST}/up/2", None)
    assert pushed.told[6] == ("PATCH", f"{HOST}/up/3", b"4567")
    assert pushed.ranges == ["0-3", "4-7", "4-7", "8-9"] and len(pushed.stop.waits) == 1


@pytest.mark.parametrize(
    ("answer", "at", "where"),
    [
        ((204, {"Range": "0-7"}, b""), 8, "old"),
        ((204, {"Range": "0-0"}, b""), 1, "old"),
        ((204, {"Range": "bytes=0-7", "Location": "other"}, b""), 8, "other"),
        ((204, {"Range": "0-9"}, b""), 10, "old"),
        ((204, {"Range": "0-10"}, b""), 0, "up/1"),
        ((204, {}, b""), 0, "up/1"),
        ((200, {"Range": "0-7"}, b""), 0, "up/1"),
        ((404, {"Range": "0-7"}, b"no"), 0, "up/1"),
    ],
)
def test_what_an_earlier_run_sent_is_not_sent_again(
    answer: Scripted, at: int, where: str, tmp_path: Path
) -> None:
    note(tmp_path, json.dumps({"location": f"{HOST}/old"}))
    chunks = [(202, {}, b"")] * ((len(CONTENT) - at + 3) // 4)
    begins = [] if at else [begun()]
    pushed = Pushed(tmp_path, GONE, answer, *begins, *chunks, MADE)
    assert pushed.run() == len(CONTENT) - at
    assert pushed.told[1] == ("GET", f"{HOST}/old", None)
    assert pushed.told[-1] == ("PUT", f"{HOST}/{where}?{SUM}", b"")
    assert pushed.ranges[:1] == ([f"{at}-{min(at + 3, 9)}"] if at < 10 else [])


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"location": "https://other.example/up"}),
        json.dumps({"location": "http://r.example/up"}),
        json.dumps({"location": 7}),
        "{}",
        "[]",
        "torn",
    ],
)
def test_a_note_that_leads_elsewhere_is_not_followed(text: str, tmp_path: Path) -> None:
    note(tmp_path, text)
    pushed = Pushed(tmp_path, GONE, begun(), *[(202, {}, b"")] * 3, MADE)
    assert pushed.run() == len(CONTENT) and pushed.told[1][0] == "POST"


def test_a_note_is_for_one_blob_of_one_repository(tmp_path: Path) -> None:
    faults = [BROKEN] * PUSH_RETRY.attempts
    with pytest.raises(NetworkError, match="does not take"):
        Pushed(tmp_path, GONE, begun(), begun("/up/2"), *faults).run()
    (noted,) = (tmp_path / NOTES).iterdir()
    name = hashlib.sha1(f"{HOST}/org/app {BLOB.digest}".encode()).hexdigest()
    assert noted.name == f"{name}.json"
    assert json.loads(noted.read_text()) == {"location": f"{HOST}/up/2"}


def test_a_registry_that_is_busy_keeps_what_it_has(tmp_path: Path) -> None:
    note(tmp_path, json.dumps({"location": f"{HOST}/old"}))
    held: Scripted = (204, {"Range": "0-9"}, b"")
    assert Pushed(tmp_path, GONE, BROKEN, GONE, held, MADE).run() == 0


def test_a_put_that_broke_off_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHUNK_SIZE", len(CONTENT))
    pushed = Pushed(tmp_path, GONE, begun(), BROKEN, GONE, begun(), MADE)
    assert pushed.run() == 2 * len(CONTENT)
    pushed = Pushed(tmp_path, GONE, begun(), BROKEN, THERE)
    assert pushed.run() == len(CONTENT)


def test_patience_ends_where_nothing_gets_on(tmp_path: Path) -> None:
    pushed = Pushed(tmp_path, *[BROKEN] * PUSH_RETRY.attempts)
    with pytest.raises(NetworkError) as told:
        pushed.run()
    assert told.value.what == f"r.example does not take {BLOB.digest}"
    assert "answered 500" in told.value.why and "not sent again" in told.value.next_step
    assert len(pushed.stop.waits) == PUSH_RETRY.attempts - 1


def test_patience_is_renewed_by_each_chunk(tmp_path: Path) -> None:
    faults = [BROKEN] * (PUSH_RETRY.attempts - 2)  # of the HEADs

    def held(last: int) -> Scripted:
        return (204, {"Range": f"0-{last}"}, b"")

    answers = [GONE, begun(), begun(), BROKEN, *faults, GONE, held(3), begun(), BROKEN]
    answers += [*faults, GONE, held(7), begun(), MADE]
    assert Pushed(tmp_path, *answers).run() == len(CONTENT)


def test_a_chunk_that_is_sent_again_and_again_renews_no_patience(tmp_path: Path) -> None:
    """As where nothing can be noted in the folder."""
    (tmp_path / ".hfship").write_text("no folder")
    answers = [GONE, begun(), begun(), BROKEN] * (PUSH_RETRY.attempts + 1)
    with pytest.raises(NetworkError, match="does not take"):
        Pushed(tmp_path, *answers[:-4], GONE).run()


@pytest.mark.parametrize(
    ("answers", "error", "what"),
    [
        ([GONE, (403, {}, b"")], AuthError, "wants a login for a push to r.example/org/app:1"),
        ([GONE, (200, {}, b"")], NetworkError, "answers with an error for a push to"),
        ([GONE, begun(), (403, {}, b"")], AuthError, "wants a login for a push to"),
        ([GONE, begun(), (201, {}, b"")], NetworkError, "answers with an error"),
        ([GONE, begun(), *[begun()] * 3, (202, {}, b"")], NetworkError, "answers with an error"),
        ([GONE, begun(), *[begun()] * 3, (400, {}, b"DIGEST_INVALID")], IntegrityError, ""),
        ([GONE, begun(), *[begun()] * 3, (400, {}, b"SIZE")], NetworkError, "with an error"),
        ([GONE, begun(), *[begun()] * 3, (418, {}, b"DIGEST")], NetworkError, "with an error"),
    ],
)
def test_what_a_registry_refuses_ends_the_push(
    answers: List[Scripted], error: Type[HfshipError], what: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as told:
        Pushed(tmp_path, *answers).run()
    assert what in told.value.what


def test_a_file_that_is_not_what_its_manifest_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    blob = file_blob("w", len(CONTENT), "0" * 64)
    refused: Scripted = (400, {}, b"DIGEST_INVALID")
    with pytest.raises(IntegrityError) as told:
        Pushed(tmp_path, GONE, begun(), *[begun()] * 3, refused).run(blob)
    assert told.value.what == f"{tmp_path}/w is not what its manifest says"
    assert told.value.next_step == f"hfship verify {tmp_path}"


# -- blobs


def test_blobs_of_bytes_and_of_files(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    known = known_blob(CONTENT)
    assert known.digest == digest_of(CONTENT) and known.size == len(CONTENT)
    assert known.read(tmp_path, 0, 99) == CONTENT
    file = file_blob("w", len(CONTENT), known.digest[7:])
    assert file.digest == known.digest and file.size == len(CONTENT)
    assert file.read(tmp_path, 2, 3) == b"234"


MIXED = (Stretch(3, b"abc"), Stretch(0), Stretch(4, path="w"), Stretch(2, b"yz"))


@pytest.mark.parametrize("offset", range(10))
@pytest.mark.parametrize("size", [0, 1, 4, 9, 99])
def test_a_blob_is_read_across_its_stretches(offset: int, size: int, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    blob = Blob("", 9, MIXED)
    assert blob.read(tmp_path, offset, size) == b"abc0123yz"[offset : offset + size]


def test_a_blob_is_hashed_as_it_is_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * (CHUNK // 256) + b"end"
    (tmp_path / "w").write_bytes(content)
    counted: List[int] = []
    stretches = (Stretch(len(content), path="w"), Stretch(2, b"yz"))
    blob = hashed_blob(tmp_path, stretches, counted.append)
    assert blob == Blob(digest_of(content + b"yz"), len(content) + 2, stretches)
    assert counted == [CHUNK, 3, 2]


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    assert read_stretch(tmp_path, Stretch(99, path="w"), 8, 2) == b"89"
    with pytest.raises(IntegrityError, match="is not what its manifest says"):
        read_stretch(tmp_path, Stretch(99, path="w"), 8, 3)


def test_a_body_is_read_in_pieces(tmp_path: Path) -> None:
    counted: List[int] = []
    large = known_blob(bytes(CHUNK + 1))
    body = Body(large, tmp_path, counted.append)
    assert len(body) == CHUNK + 1
    assert len(body.read(10)) == 10 and len(body.read(0)) == CHUNK - 9 and body.read() == b""
    assert counted == [10, CHUNK - 9, 0]
    body = Body(large, tmp_path, counted.append)
    assert len(body.read(2 * CHUNK)) == CHUNK and len(body.read(-1)) == 1


# -- manifests

TEXT = b"{}"
TAG = f"{HOST}/v2/org/app/manifests/1"


def kept(digest: str) -> Scripted:
    return (200, {"Docker-Content-Digest": digest} if digest else {}, b"")


@pytest.mark.parametrize("answer", [kept(digest_of(TEXT)), kept(""), GONE])
@pytest.mark.parametrize("made", [200, 201])
def test_a_manifest_is_put_and_read_back(made: int, answer: Scripted) -> None:
    asked = ScriptedRegistry((503, {"Retry-After": "7"}, b""), (made, {}, b"x"), answer)
    assert put_manifest(asked.client, TEXT, OCI_MANIFEST) == digest_of(TEXT)
    (_, put, head) = asked.session.sent
    assert (put.method, put.url, put.body) == ("PUT", TAG, TEXT)
    assert put.headers["Content-Type"] == OCI_MANIFEST
    assert (head.method, head.url, head.headers["Accept"]) == ("HEAD", TAG, ACCEPT)
    assert asked.stop.waits == [7.0] and asked.session.unread == 0


REFUSED: Dict[str, Any] = {
    "kept as another": ([MADE, kept("sha256:0")], IntegrityError, "keeps another manifest"),
    "no login": ([(401, {}, b"")], AuthError, "wants a login for a push to r.example/org/app:1"),
    "accepted": ([(202, {}, b"")], NetworkError, "answers with an error for a push to"),
    "too many": ([BROKEN] * 6, NetworkError, "cannot be reached"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_that_is_not_kept_is_told(name: str) -> None:
    answers, error, what = REFUSED[name]
    with pytest.raises(error) as told:
        put_manifest(ScriptedRegistry(*answers).client, TEXT, OCI_MANIFEST)
    assert what in told.value.what
