# SPDX-License-Identifier: Apache-2.0
"""Where logins lie, which one is used, and what is said of those that cannot be."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.errors import HostError, UsageError
from hfship.base.processes import Completed
from hfship.hub import registry_login as room
from hfship.hub.registry_login import (
    LONGEST_FILE,
    RegistryLogin,
    find_login,
    given_login,
    known_cas,
    login_files,
)

HOST = "r.example:5000"
REPOSITORY = f"{HOST}/org/app"


def auth(pair: str = "u:p") -> Dict[str, str]:
    return {"auth": base64.b64encode(pair.encode()).decode()}


def found_in(folder: Path, *configs: Any, registry: str = HOST, warned: Any = None) -> Any:
    """The login of config.json and auth.json; user, password, token and where it is from."""
    places = [folder / ".docker/config.json", folder / ".config/containers/auth.json"]
    for path, config in zip(places, configs):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = config if isinstance(config, str) else json.dumps(config)
        path.write_text(text)
    warnings = warned if warned is not None else []
    return find_login(registry, f"{registry}/org/app", {"HOME": str(folder)}, warnings.append)


# -- a login


@pytest.mark.parametrize(
    ("login", "basic", "secrets"),
    [
        (RegistryLogin("u", "pä", "", "f"), "Basic dTpww6Q=", ["pä", "dTpww6Q="]),
        (RegistryLogin("u", "p", "token", "f"), "", ["p", "token"]),
        (RegistryLogin("", "", "token", "f"), "", ["token"]),
    ],
)
def test_what_a_login_shows_and_hides(login: RegistryLogin, basic: str, secrets: List[str]) -> None:
    assert login.basic == basic and login.secrets == secrets
    assert repr(login) == "RegistryLogin('f')"


# -- where they lie


@pytest.mark.parametrize(
    ("env", "places"),
    [
        ({"HOME": "/h"}, ["/h/.docker/config.json", "/h/.config/containers/auth.json"]),
        (
            {
                "HOME": "/h",
                "REGISTRY_AUTH_FILE": "/a",
                "DOCKER_CONFIG": "/d",
                "XDG_RUNTIME_DIR": "/x",
            },
            ["/a", "/d/config.json", "/x/containers/auth.json", "/h/.config/containers/auth.json"],
        ),
    ],
)
def test_files_are_looked_at_in_the_order_of_docker_and_podman(
    env: Dict[str, str], places: List[str]
) -> None:
    assert [str(path) for path in login_files(env)] == places


def test_without_a_home_that_of_the_user_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/of/user")
    assert str(login_files({})[0]) == "/of/user/.docker/config.json"
    assert not list(known_cas("r.example", {}))


# -- which is used

# what the two files hold -> user of the login, and which file it is from
CHOSEN: Dict[str, Any] = {
    "the first file wins": ([{"auths": {HOST: auth("a:p")}}, {"auths": {HOST: auth("b:p")}}], "a"),
    "where it has none, the next": ([{"auths": {}}, {"auths": {HOST: auth("b:p")}}], "b"),
    "a list is none": ([[], {"auths": {HOST: auth("b:p")}}], "b"),
    "no json": (["{", {"auths": {HOST: auth("b:p")}}], "b"),
    "auths is no table": ([{"auths": 7}, {"auths": {HOST: auth("b:p")}}], "b"),
    "helpers are no table": ([{"credHelpers": 7, "auths": {HOST: auth("a:p")}}], "a"),
    "an empty entry": ([{"auths": {HOST: {}, f"https://{HOST}": auth("b:p")}}], "b"),
    "the repository before its part": (
        [{"auths": {HOST: auth("a:p"), f"{HOST}/org": auth("b:p"), REPOSITORY: auth("c:p")}}],
        "c",
    ),
    "a part before the host": ([{"auths": {HOST: auth("a:p"), f"{HOST}/org": auth("b:p")}}], "b"),
    "http": ([{"auths": {f"http://{HOST}": auth("a:p")}}], "a"),
    "an old key": ([{"auths": {f"https://{HOST}/v1/": auth("a:p")}}], "a"),
    "a password with colons": ([{"auths": {HOST: auth("a:p:q")}}], "a"),
    "no password": ([{"auths": {HOST: auth("a")}}], None),
    "of another": ([{"auths": {"index.docker.io": auth("a:p")}}], None),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_which_login_is_used(name: str, tmp_path: Path) -> None:
    configs, user = CHOSEN[name]
    found = found_in(tmp_path, *configs)
    assert (found and found.user) == user
    if name == "a password with colons":
        assert found.password == "p:q" and found.source == f"{tmp_path}/.docker/config.json"


@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "index.docker.io", "docker.io/org/app"]
)
def test_keys_of_docker_hub(key: str, tmp_path: Path) -> None:
    found = found_in(tmp_path, {"auths": {key: auth("a:p")}}, registry="docker.io")
    assert found and found.user == "a"


# an entry -> password and token, and what is warned of
ENTRIES: Dict[str, Any] = {
    json.dumps(auth("u:p\0\0")): ("p", ""),
    json.dumps({**auth(), "identitytoken": "t"}): ("p", "t"),
    json.dumps({"identitytoken": "t"}): ("", "t"),
    json.dumps({**auth(), "identitytoken": None}): ("p", ""),
    '{"auth": "?"}': None,
    '{"auth": "abc"}': "another form",
    '{"auth": "\\u00fc"}': "another form",
    '{"auth": "/w=="}': "another form",
    '{"auth": 7}': "another form",
    "7": "another form",
    '["x"]': "another form",
    '{"auth": "dTo="}': None,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_read_or_told(entry: str, tmp_path: Path) -> None:
    warned: List[str] = []
    found = found_in(tmp_path, {"auths": {HOST: json.loads(entry)}}, warned=warned)
    wanted = ENTRIES[entry]
    if isinstance(wanted, tuple):
        assert found[1:3] == wanted and not warned
    else:
        assert found is None and len(warned) == bool(wanted)
        assert not wanted or wanted in warned[0]


def test_a_file_that_cannot_be_read_is_told_and_the_next_one_taken(tmp_path: Path) -> None:
    (tmp_path / ".docker/config.json").mkdir(parents=True)
    warned: List[str] = []
    path = tmp_path / ".config/containers/auth.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"auths": {HOST: auth("b:p")}}))
    found = find_login(HOST, REPOSITORY, {"HOME": str(tmp_path)}, warned.append)
    assert found and found.user == "b" and len(warned) == 1 and "cannot be read" in warned[0]
    warned.clear()
    assert found_in(tmp_path / "other", "{" * 9, warned=warned) is None
    assert f"{tmp_path}/other/.docker/config.json cannot be read" in warned[0]


def test_no_file_is_nothing_to_tell_of(tmp_path: Path) -> None:
    warned: List[str] = []
    assert find_login(HOST, REPOSITORY, {"HOME": str(tmp_path)}, warned.append) is None
    assert not warned


# -- helpers


class Helpers:
    """docker-credential-NAME: what each answers, and for which host it was asked."""

    def __init__(self, answers: Dict[str, Any]) -> None:
        self.answers = answers
        self.asked: List[Any] = []

    def __call__(self, argv: List[str], stdin: str, timeout_s: float) -> Completed:
        """A program that gives the login of the host on its stdin."""
        assert timeout_s == room.HELPER_TIMEOUT_S and argv[1:] == ["get"]
        self.asked.append((argv[0], stdin))
        answer = self.answers[argv[0][len("docker-credential-") :]]
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            return Completed(1, "credentials not found", "")
        return Completed(0, answer if isinstance(answer, str) else json.dumps(answer), "")


OF_STORE = {"Username": "store", "Secret": "s"}
OF_HELPER = {"Username": "helper", "Secret": "s"}

# config -> who is asked for which host, and the user
ASKED: Dict[str, Any] = {
    "for this host": ({"credHelpers": {HOST: "h"}, "credsStore": "s"}, ["h"], "helper"),
    "for all": ({"credHelpers": {"else": "h"}, "credsStore": "s"}, ["s"], "store"),
    "for all, then the entry": (
        {"credsStore": "none", "auths": {HOST: auth("a:p")}},
        ["none"],
        "a",
    ),
    "for this host alone": ({"credHelpers": {HOST: "none"}, "credsStore": "s"}, ["none"], None),
    "an empty store": ({"credsStore": "", "auths": {HOST: auth("a:p")}}, [], "a"),
}


@pytest.mark.parametrize("name", ASKED)
def test_which_helper_is_asked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, names, user = ASKED[name]
    helpers = Helpers({"h": OF_HELPER, "s": OF_STORE, "none": None})
    monkeypatch.setattr(room, "run_program", helpers)
    found = found_in(tmp_path, config)
    assert (found and found.user) == user
    assert helpers.asked == [(f"docker-credential-{one}", HOST) for one in names]


@pytest.mark.parametrize("field", ["credHelpers", "credsStore"])
def test_a_helper_knows_docker_hub_by_an_address(
    field: str, tmp_path: Path, monkeypatch: Any
) -> None:
    helpers = Helpers({"h": OF_HELPER})
    monkeypatch.setattr(room, "run_program", helpers)
    value = {"https://index.docker.io/v1/": "h"} if field == "credHelpers" else "h"
    assert found_in(tmp_path, {field: value}, registry="docker.io").user == "helper"
    assert helpers.asked == [("docker-credential-h", "https://index.docker.io/v1/")]


# answer of a helper -> user, password, token; or what is warned of
SAID: List[Any] = [
    ({"Username": "u", "Secret": "p"}, ("u", "p", "")),
    ({"Username": "<token>", "Secret": "t"}, ("", "", "t")),
    (None, ""),
    (HostError("docker-credential-h is not installed", "", ""), "going on without the login"),
    ("no json", "does not answer like a credential helper"),
    ({"Username": "u"}, "does not answer like a credential helper"),
    ({"Secret": "u"}, "does not answer like a credential helper"),
    ([], "does not answer like a credential helper"),
]


@pytest.mark.parametrize(("answer", "wanted"), SAID, ids=str)
def test_what_a_helper_says(answer: Any, wanted: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "run_program", Helpers({"h": answer}))
    warned: List[str] = []
    found = found_in(tmp_path, {"credsStore": "h"}, warned=warned)
    if isinstance(wanted, tuple):
        assert found[:3] == wanted and found.source == "docker-credential-h" and not warned
    else:
        assert found is None and len(warned) == bool(wanted) and wanted in "".join(warned)


@pytest.mark.parametrize("name", ["../x", "a b", "", 7, "x\n", ["x"]])
def test_what_is_no_name_of_a_helper_is_not_run(
    name: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(room, "run_program", pytest.fail)
    warned: List[str] = []
    assert found_in(tmp_path, {"credHelpers": {HOST: name}}, warned=warned) is None
    assert warned == [f"{name!r:.50} is no name of a credential helper"]


# -- what is given, and whom one believes


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"secret\r\n", "secret"),
        (b" se cret ", " se cret "),
        ("pä\n".encode(), "pä"),
        (b"\n", None),
        (b"", None),
        (b"a\nb\n", None),
    ],
)
def test_a_password_is_one_line(content: bytes, password: Optional[str], tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    if password is not None:
        assert given_login("u", path) == RegistryLogin("u", password, "", "--registry-user u")
        return
    with pytest.raises(UsageError) as told:
        given_login("u", path)
    assert told.value.what == f"{path} holds no password"
    assert told.value.next_step == "write the password into it, in one line"


@pytest.mark.parametrize("content", [None, b"\xff", b"x" * (LONGEST_FILE + 1)])
def test_a_password_that_cannot_be_read_is_told(content: Optional[bytes], tmp_path: Path) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as told:
        given_login("u", path)
    assert told.value.what == f"the password in {path} cannot be read"
    assert told.value.next_step == "write it into that file"


def test_a_user_needs_a_password() -> None:
    with pytest.raises(UsageError, match="--registry-user u has no password") as told:
        given_login("u", None)
    assert told.value.next_step.startswith("give --registry-password-file FILE")


def test_cas_are_those_of_docker_and_podman(tmp_path: Path) -> None:
    names = [".config/containers/certs.d", ".docker/certs.d"]
    for number, name in enumerate(names):
        for registry, file in ((HOST, "b.crt"), (HOST, "a.crt"), (HOST, "a.key"), ("x", "c.crt")):
            place = tmp_path / name / registry
            place.mkdir(parents=True, exist_ok=True)
            (place / file).write_text(f"{number}")
    found = list(known_cas(HOST, {"HOME": str(tmp_path)}))
    assert found == [f"{tmp_path}/{name}/{HOST}/{one}.crt" for name in names for one in "ab"]
