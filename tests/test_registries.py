# SPDX-License-Identifier: Apache-2.0
"""How commands name a registry and log in there; test_registry.py has servers."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Tuple

import pytest

from hfship.base.errors import UsageError
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.commands.context import Context
from hfship.commands.parser import parse_words
from hfship.commands.registries import registry_client, registry_login, this_platform
from hfship.hub.registry_protocol import parse_reference

REFERENCE = parse_reference("docker://r.example/org/app:1")
AT = "hfship.hub.registry"


def context_of(*words: str) -> Context:
    args, given = parse_words([*words])
    return Context(args, load_settings({"HOME": "/"}), Reporter("none", -1), given)


@pytest.mark.parametrize(
    "machine, name",
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64"),
        ("armv7l", "linux/arm/v7"),
        ("i686", "linux/386"),
        ("riscv64", "linux/riscv64"),
    ],
)
def test_what_images_for_this_machine_are_built_for(
    machine: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert this_platform() == name


# What was typed: whether plain http was asked for, and the mirrors.
TYPED: List[Tuple[List[str], bool, List[str]]] = [
    (["fetch", "docker://a"], False, []),
    (["fetch", "docker://a", "--plain-http", "--mirror", "https://b/"], True, ["https://b"]),
    (["push", "m", "docker://a", "--plain-http"], True, []),
]


@pytest.mark.parametrize("words, plain, mirrors", TYPED)
def test_a_client_is_for_what_was_typed(
    words: List[str], plain: bool, mirrors: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr("hfship.commands.registries.registry_login", lambda *_: "LOGIN")
    monkeypatch.setattr(
        f"{AT}.registry_endpoint", lambda *given: asked.append(given) or "https://r"
    )
    monkeypatch.setattr(f"{AT}.RegistryClient", lambda *given: given)
    context, stop = context_of(*words), threading.Event()
    made: Any = registry_client(REFERENCE, context, stop, 5)
    reporter = context.reporter
    assert asked == [(REFERENCE, plain, "LOGIN", reporter)]
    assert made == (REFERENCE, "https://r", "LOGIN", reporter, stop, 5, mirrors)


def test_a_login_is_given_or_is_the_one_that_docker_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text("word\n")
    words = ["fetch", "docker://a", "--registry-user", "ann"]
    given = registry_login(
        REFERENCE, context_of(*words, "--registry-password-file", str(tmp_path / "password"))
    )
    assert given and (given.user, given.password) == ("ann", "word")
    with pytest.raises(UsageError, match="ann has no password"):
        registry_login(REFERENCE, context_of(*words))

    asked: List[Any] = []
    kept = SimpleNamespace(user="kept")
    monkeypatch.setattr(
        "hfship.hub.registry_login.find_login", lambda *given: asked.append(given[:2]) or kept
    )
    found: Any = registry_login(REFERENCE, context_of("fetch", "docker://a"))
    assert found is kept and asked == [("r.example", REFERENCE.repository)]
