"""The Hub's protocol and sessions: addresses, waits, tokens, certificates, proxies."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple, Type

import pytest

from conftest import Program
from hfship.base.errors import AuthError, HfshipError, NetworkError, NotFoundError, UsageError
from hfship.base.manifest import Source
from hfship.base.report import Reporter
from hfship.base.settings import DEFAULT_ENDPOINT, Token, load_settings
from hfship.hub.answers import ERROR_RULES, endpoint_command, hub_error, rate_limit_wait
from hfship.hub.client import HubClient
from hfship.hub.gate import Gate, ParentProxy
from hfship.hub.protocol import MAX_REDIRECTS, parse_repo
from hfship.hub.retry import API_RETRY, RetryableError
from hfship.hub.transport import ApiAnswer
from support.folders import same_files
from support.hub import FaultHub
from support.network import make_certificate

# address from a browser -> what it means, or the command that is proposed
PAGES: Dict[str, Any] = {
    "https://huggingface.co/gpt2": ("gpt2", None),
    "https://huggingface.co/org/m/": ("org/m", None),
    "https://huggingface.co/org/m/tree/main?x=1#files": ("org/m", "main"),
    "https://huggingface.co/org/m/tree/refs%2Fpr%2F1": ("org/m", "refs/pr/1"),
    "https://huggingface.co/org/m/tree/feature%2Fx": ("org/m", "feature/x"),
    "https://huggingface.co/org/m/tree/a%2Fb%2Fc/": ("org/m", "a/b/c"),
    "https://hf.co/org/m/tree/a%2Fb/sub%20dir": "hfship fetch org/m@a/b --include 'sub dir/'",
    "https://huggingface.co/org%2Fm": ("org/m", None),
    "https://www.modelscope.cn/models/Qwen/Qwen3-8B": (
        "hfship fetch Qwen/Qwen3-8B (if huggingface.co has it, too)"
    ),
    "https://modelscope.cn/models/Qwen/Qwen3-8B/files": (
        "hfship fetch Qwen/Qwen3-8B (if huggingface.co has it, too)"
    ),
    "https://modelscope.ai/": "hfship fetch ORG/NAME (if huggingface.co has it, too)",
    "https://huggingface.co:99999/org/m": "give it as ORG/NAME",
    "https://[::1/org/m": "give it as ORG/NAME",
    "https://hf.co/org/m/blob/v1/sub/my%20file": "hfship fetch org/m@v1 --include 'sub/my file'",
    "https://huggingface.co/org/m/tree/main/sub": "hfship fetch org/m@main --include sub/",
    "https://huggingface.co/datasets/org/d": "hfship fetch org/d --repo-type dataset",
    "https://me:secret@mirror:8090/org/m": "hfship fetch org/m --endpoint https://mirror:8090",
    "https://hub.site/org/m/tree/main": ("org/m", "main"),
    "https://huggingface.co/org/m/discussions/1": "give the repository as ORG/NAME",
    "https://huggingface.co/": "give the repository as ORG/NAME",
    "https://huggingface.co/org/../m": "give the repository as ORG/NAME",
}


@pytest.mark.parametrize("url", PAGES)
def test_addresses_from_a_browser(url: str) -> None:
    if isinstance(PAGES[url], tuple):
        assert parse_repo(url, "https://hub.site") == PAGES[url]
        return
    with pytest.raises(UsageError) as refused:
        parse_repo(url, "https://hub.site")
    assert refused.value.next_step == PAGES[url] and "secret" not in refused.value.what


COMMIT = "0" * 40

# (status, code, message, commit asked for) -> (error, words of what happened)
ERROR_ANSWERS: Dict[Tuple[int, str, str, str], Tuple[Type[HfshipError], str]] = {
    (403, "GatedRepo", "", ""): (AuthError, "is gated"),
    (401, "GatedRepo", "Invalid credentials", ""): (AuthError, "is gated"),
    (403, "", "Access to model a/b is restricted", ""): (AuthError, "is gated"),
    (401, "", "Access to model a/b is Restricted", ""): (AuthError, "is gated"),
    (500, "", "is restricted", ""): (NetworkError, "answered with an error"),
    (401, "", "Invalid credentials in Authorization header", ""): (AuthError, "from env X"),
    (403, "", "Access to this resource is disabled.", ""): (AuthError, "is disabled"),
    (404, "RevisionNotFound", "", ""): (NotFoundError, "no revision 'v1'"),
    (404, "", "Invalid rev id: v1", ""): (NotFoundError, "no revision 'v1'"),
    (404, "RevisionNotFound", "", COMMIT): (NotFoundError, "commit 000000000000 of a/b has gone"),
    (404, "", "Invalid rev id: v1", COMMIT): (NotFoundError, "of a/b has gone while"),
    (404, "CommitNotFound", "", ""): (NotFoundError, "does not have the commit"),
    (401, "LoginWanted", "", ""): (AuthError, "wants a user and a password"),
    (404, "EntryNotFound", "", ""): (NotFoundError, "no Hub answers at https://hub"),
    (404, "EntryNotFound", "", COMMIT): (NotFoundError, "a file is missing"),
    (404, "RepoNotFound", "Repository not found", ""): (NotFoundError, "was not found"),
    (401, "", "Invalid username or password.", ""): (NotFoundError, "was not found"),
    (403, "", "no", ""): (AuthError, "is forbidden"),
    (416, "", "", COMMIT): (NetworkError, "answered with an error"),
}


@pytest.mark.parametrize("answer", ERROR_ANSWERS, ids=str)
def test_what_an_error_answer_means(answer: Tuple[int, str, str, str]) -> None:
    status, code, message, commit = answer
    source = Source("https://hub", "a/b", "v1", "a/b", commit)
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Request-Id": "r-1"}
    error = hub_error(status, headers, "", source, Token("secret", "env X"))
    kind, words = ERROR_ANSWERS[answer]
    assert type(error) is kind and words in error.what, error.what
    assert f"HTTP {status}" in error.why and "(request r-1)" in error.why and error.next_step


# body of an error answer -> the message in it
BODIES = {
    '{"error": "Repository not found"}': "Repository not found",
    '{"error_description": "Token expired", "error": "invalid_token"}': "Token expired",
    '{"errors": [{"code": "NAME_UNKNOWN", "message": "no such name"}]}': "no such name",
    '{"errors": [{"code": "NAME_UNKNOWN"}]}': "",
    '{"errors": ["first", "second"]}': "first",
    '{"errors": []}': "",
    '{"error": "a\\u001b[2Jb"}': "a?[2Jb",
    "<html>Not found</html>": "",
    "[1]": "",
    "{}": "",
    "": "",
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("request_id", ["X-Request-Id", "X-Amz-Cf-Id", ""])
def test_the_message_of_a_body_is_told_where_no_header_has_one(body: str, request_id: str) -> None:
    source = Source("https://hub", "a/b", "v1", "a/b", "")
    headers = {request_id: "r-1"} if request_id else {}
    message, about = BODIES[body], " (request r-1)" if request_id else ""
    error = hub_error(500, headers, body, source, None)
    assert f"HTTP 500  {message}".strip() + about in error.why, error.why
    assert ("request" in error.why) == bool(request_id)
    error = hub_error(500, {**headers, "X-Error-Message": "of the header"}, body, source, None)
    assert f"HTTP 500  of the header{about}" in error.why


@pytest.mark.parametrize(
    ("fields", "endpoint", "command"),
    [
        ({}, DEFAULT_ENDPOINT, "hfship fetch a/b"),
        ({}, "https://hub", "hfship fetch a/b --endpoint https://hub"),
        ({"repo_type": "dataset"}, DEFAULT_ENDPOINT, "hfship fetch a/b --repo-type dataset"),
        (
            {"repo_type": "dataset"},
            "https://hub",
            "hfship fetch a/b --repo-type dataset --endpoint https://hub",
        ),
    ],
)
def test_what_fetches_a_repository_as_it_is_now(
    fields: Dict[str, str], endpoint: str, command: str
) -> None:
    source = Source(endpoint, "a/b", "v1", "a/b", "", **fields)  # type: ignore[arg-type]
    assert endpoint_command(source, endpoint) == command
    looked = endpoint_command(source, endpoint, "verify")
    assert looked == command.replace("fetch", "verify").replace(" --repo-type dataset", "")


def test_every_rule_of_an_error_answer_is_used() -> None:
    used = set()
    for status, code, message, commit in ERROR_ANSWERS:
        matching = [r for r in ERROR_RULES if r.matches(status, code, message, bool(commit))]
        used.add(matching[0])
    assert used == set(ERROR_RULES)


# (revision asked for, commit known, status, headers) -> words of what happened
READ_OUT: Dict[str, Any] = {
    "a commit that is not there": (
        ("f" * 40, "", 404, {"X-Error-Code": "RevisionNotFound"}),
        "does not have the commit ffffffff",
    ),
    "a commit that went while it was fetched": (
        ("f" * 40, "f" * 40, 404, {"X-Error-Code": "RevisionNotFound"}),
        "does not have the commit ffffffff",
    ),
    "so says a mirror without codes": (
        ("f" * 40, "", 404, {"X-Error-Message": "Invalid rev id"}),
        "does not have the commit ffffffff",
    ),
    "a branch that was rewritten": (
        ("main", "f" * 40, 404, {"X-Error-Code": "RevisionNotFound"}),
        "commit ffffffffffff of a/b has gone while it was fetched",
    ),
    "a branch that is not there": (
        ("dev", "", 404, {"X-Error-Code": "RevisionNotFound"}),
        "no revision 'dev'",
    ),
    "basic auth": (
        ("main", "", 401, {"WWW-Authenticate": 'Basic realm="Artifactory Realm"'}),
        "https://hub wants a user and a password",
    ),
    "a file that is not there": (
        ("main", "f" * 40, 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "prev"}),
        "a file is missing",
    ),
}


@pytest.mark.parametrize("name", READ_OUT)
def test_what_is_read_out_of_an_error_answer(name: str) -> None:
    (revision, commit, status, headers), words = READ_OUT[name]
    source = Source("https://hub", "a/b", revision, "a/b", commit)
    error = hub_error(status, headers, "", source, None)
    assert words in error.what and error.next_step


@pytest.mark.parametrize(
    "token, words",
    [(None, "no token was given"), (Token("secret", "env X"), "the token (env X) has no access")],
)
def test_a_gate_says_whether_a_token_was_shown(token: Optional[Token], words: str) -> None:
    source = Source("https://hub", "a/b", "v1", "a/b", "")
    error = hub_error(403, {"X-Error-Code": "GatedRepo"}, "", source, token)
    assert error.why.startswith(words) and "https://hub/a/b" in error.next_step


def test_redirects_in_a_circle_end(monkeypatch: pytest.MonkeyPatch) -> None:
    client = HubClient(load_settings({}), None, Reporter("none", -1), threading.Event())
    circle = ApiAnswer(307, {"Location": "/api/models/a/b"}, "")
    asked: List[str] = []

    def redirect(url: str) -> ApiAnswer:
        asked.append(url)
        return circle

    monkeypatch.setattr(client, "exchange", redirect)
    with pytest.raises(NetworkError, match="in a circle"):
        client._ask("https://hub/api/models/a/b")
    assert len(asked) == MAX_REDIRECTS


def test_readers_speak_through_their_parent() -> None:
    """What a forked client has for a reporter and a gate reaches those of its parent."""
    err, stop = io.StringIO(), threading.Event()
    client = HubClient(load_settings({}), None, Reporter("plain", 1, err=err), stop)
    proxy = ParentProxy(client.receive)
    proxy.info("a line")
    proxy.detail("a detail")
    before = time.monotonic()
    proxy.hold(1000, "429")
    proxy.wait()
    assert time.monotonic() - before < 100, "the parent waits, not the reader"
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        client.gate.wait()
    assert "a line" in err.getvalue() and "a detail" in err.getvalue()


def test_a_wait_that_is_no_number_is_none() -> None:
    assert rate_limit_wait({"Retry-After": "\xb2"}) is None


@pytest.mark.parametrize("asked, waited", [(7.0, 7.0), (9999.0, API_RETRY.longest_asked_s)])
def test_what_the_hub_asks_to_wait_is_waited(
    asked: float, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HubClient(load_settings({}), None, Reporter("none", -1), threading.Event())
    waits: List[float] = []

    def unavailable(_: str) -> Any:
        raise RetryableError("503", asked)

    monkeypatch.setattr(client, "exchange", unavailable)
    monkeypatch.setattr(client, "_stop", SimpleNamespace(wait=waits.append))
    with pytest.raises(NetworkError):
        client._ask("https://hub/api")
    assert waits == [waited] * (API_RETRY.attempts - 1)


def test_gate_wakes_up_when_the_run_ends() -> None:
    stop = threading.Event()
    gate = Gate(Reporter(progress="none", verbosity=-1), stop)
    gate.hold(60, "test")
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        gate.wait()


def test_waiting_is_shown(hfship: Program, hub: FaultHub, published: Path, tmp_path: Path) -> None:
    vars(hub.faults).update(too_many=1, too_many_headers={"Retry-After": "2"})
    done = hfship(
        "fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out", "--progress", "json"
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    seconds = [event["seconds"] for event in events if event["event"] == "waiting"]
    assert seconds == sorted(seconds, reverse=True) and (seconds[0], seconds[-1]) == (2, 0)
    assert any("too many requests" in event.get("text", "") for event in events)


def test_unreachable_hub_is_a_network_error(hfship: Program, tmp_path: Path) -> None:
    done = hfship(
        "fetch", "org/tiny", "--endpoint", "http://127.0.0.1:9", "-o", tmp_path, code=8, timeout=200
    )
    assert "cannot be reached" in done.stderr


@pytest.mark.parametrize(
    "address, env, code, words",
    [
        ("https://127.0.0.1:{port}", {}, 8, "does not speak https"),
        ("http://127.0.0.1:{port}/xyz", {}, 5, "no Hub answers"),
        ("https://127.0.0.1:{port}", {"SSL_CERT_FILE": "/nowhere.pem"}, 8, "CA bundle"),
    ],
)
def test_wrong_endpoints(
    address: str,
    env: Dict[str, str],
    code: int,
    words: str,
    hfship: Program,
    hub: FaultHub,
    published: Path,
    tmp_path: Path,
) -> None:
    port = hub.url.rpartition(":")[2]
    done = hfship(
        "fetch",
        "org/tiny",
        "--endpoint",
        address.format(port=port),
        "-o",
        tmp_path,
        env=env,
        code=code,
    )
    assert words in done.stderr and "next" in done.stderr


def test_renamed_repository_is_followed_and_recorded(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    hub.faults.renamed_from = "old/name"
    done = hfship("fetch", "old/name", "--endpoint", hub.url, "-o", tmp_path)
    source = json.loads((tmp_path / "name" / ".hfship" / "manifest.json").read_text())["source"]
    assert (source["repo"], source["resolved_repo"]) == (
        "old/name",
        "org/tiny",
    ) and "is now org/tiny" in done.stderr


def test_gated_repository_with_its_token(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    vars(hub.faults).update(gated=True, token="hf_good1234")
    hfship(
        "fetch",
        "org/tiny",
        "--endpoint",
        hub.url,
        "-o",
        tmp_path,
        env={"HF_TOKEN": "hf_good1234\n"},
    )
    assert same_files(published, tmp_path / "tiny")


def test_token_goes_to_the_hub_and_nowhere_else(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    """A ~/.netrc entry must not replace it either: git users keep their Hub credentials there."""
    hub.faults.token = "hf_good1234"
    token, netrc = tmp_path / "token", tmp_path / "home" / ".netrc"
    token.write_text("hf_good1234\n")
    netrc.write_text(
        "machine 127.0.0.1 login me password wrong\nmachine localhost login me password wrong\n"
    )
    netrc.chmod(0o600)
    done = hfship(
        "fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, "--token-file", token, "-v"
    )
    for _, _, headers in hub.traffic.requests:
        assert headers.get("Authorization") == (
            None if headers["Host"].startswith("localhost") else "Bearer hf_good1234"
        )
    assert "hf_good1234" not in done.stdout + done.stderr


@pytest.mark.parametrize("token", ["hf_secret\nline", "“hf_secret”", "hf secret", ""])
def test_what_is_no_token_is_said_and_not_shown(
    token: str, hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    done = hfship(
        "fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, "--token-file", file, code=4
    )
    assert (
        "is not a token" in done.stderr and "secret" not in done.stderr and str(file) in done.stderr
    )
    if token:
        done = hfship(
            "fetch",
            "org/tiny",
            "--endpoint",
            hub.url,
            "-o",
            tmp_path,
            env={"HF_TOKEN": token},
            code=4,
        )
        assert "HF_TOKEN" in done.stderr and "secret" not in done.stderr
    missing = hfship("fetch", "org/tiny", "--token-file", tmp_path / "no", "-o", tmp_path, code=4)
    assert "No such file" in missing.stderr


def test_tls_needs_the_sites_certificate(hfship: Program, model: Path, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path).both
    with FaultHub(tmp_path / "hub2", certificate) as hub:
        hub.add(model)
        hub.faults.direct = True
        command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
        assert "SSL_CERT_FILE" in hfship(*command, code=8).stderr
        other = hfship(*command, env={"REQUESTS_CA_BUNDLE": str(tmp_path / "cert2")}, code=8)
        assert "REQUESTS_CA_BUNDLE" in other.stderr
        hfship(*command, env={"SSL_CERT_FILE": str(certificate)})
    assert same_files(model, tmp_path / "tiny")


def test_a_proxy_is_used(hfship: Program, hub: FaultHub, published: Path, tmp_path: Path) -> None:
    """The Hub's name does not resolve here: only the proxy knows it."""
    hub.faults.direct = True
    command = ("fetch", "org/tiny", "--endpoint", "http://hub.invalid", "-o", tmp_path)
    hfship(*command, env={"HTTP_PROXY": hub.url, "http_proxy": hub.url})
    assert same_files(published, tmp_path / "tiny")
    done = hfship(
        *command, env={"http_proxy": "http://me:secretword@127.0.0.1:9"}, code=8, timeout=200
    )
    assert "proxy" in done.stderr and "secretword" not in done.stderr
