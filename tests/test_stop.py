"""Deployments that were stopped on purpose: what is noted of it."""

from __future__ import annotations

import os
import pwd

import pytest

from hfship.serve import stop


def test_who_asked_for_it_is_who_called_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name
    for by, expected in (("kim", "kim"), ("", own)):
        monkeypatch.setenv("SUDO_USER", by)
        assert stop._user() == expected


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, or where the directory service does not answer."""
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    assert stop._user() == "user 3999999999"
