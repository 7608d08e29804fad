# SPDX-License-Identifier: Apache-2.0
"""What must never be shown: tokens, keys, signed URLs, passwords in URLs.

Promises: what was registered as a secret is replaced wherever it stands, also as it looks in a
URL; what looks like a secret is replaced without being registered.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, Set

_SECRET_PATTERNS = (
    # As long as tokens and keys are: names of folders may begin like them.
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"), "hf_***"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"), "sk-***"),
    (re.compile(r"(?i)(bearer\s+)[^\s\"']+"), r"\1***"),
    (re.compile(r"(?i)(://[^/\s:@]*:)[^/\s@]+@"), r"\1***@"),
    # A password with a slash in it, unless what looks so is the port before a path.
    (re.compile(r"(://[^/\s:@]+:)(?![0-9]{1,5}/)[^\s@]*/[^\s@]*@(?=[\w\[])"), r"\1***@"),
    # A token in the place of the user; a user of ssh is none.
    (re.compile(r"(?i)\b((?:https?|ftp|socks\w*)://)[^/\s:@]+@"), r"\1***@"),
    # Signed URLs carry their credential in the query: keep host and path only.
    (re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]*"), r"\1?***"),
)

# Each of these patterns has one of these in it. Most texts have none, and one look tells.
_MAY_BE_SECRET = re.compile(r"(?i)hf_|sk-|bearer|://")

# Variables whose values are secrets by their names, as HF_HUB_TOKEN, AWS_SECRET_ACCESS_KEY or
# PGPASSWORD; but for those that name a place, or switch something on or off.
_SECRET_NAME = re.compile(
    r"(?i)TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|SSHPASS|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY"
)
_NAME_OF_PLACE = re.compile(r"(?i)_(PATH|FILE|DIR|SOCK)$")
_PROXY_NAME = re.compile(r"(?i)(https?|all)_proxy")
_SWITCHES = frozenset({"", "0", "1", "on", "off", "yes", "no", "true", "false"})


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable holds what must not be written down or handed on.

    >>> is_secret_variable("HF_HUB_TOKEN", "abc"), is_secret_variable("HF_TOKEN_PATH", "/t")
    (True, False)
    >>> is_secret_variable("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    False
    >>> is_secret_variable("https_proxy", "me:pw@proxy"), is_secret_variable("MY", "hf_" + 34 * "a")
    (True, True)
    """
    if redact(value) != value:
        return True
    if _PROXY_NAME.fullmatch(name):
        from hfship.base.proxies import tells_no_login  # most commands never need it

        return not tells_no_login(name, value)
    if not _SECRET_NAME.search(name) or _NAME_OF_PLACE.search(name):
        return False
    return value.lower() not in _SWITCHES


# Letters. One of fewer is replaced as a word only: it stands in many, also in keys of JSON, and
# would be known by what is missing.
SHORTEST_SECRET = 4


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the given secrets, tokens, bearer headers, URL passwords and URL queries.

    >>> redact("GET https://cdn/x?Signature=abc with Bearer hf_abcdefghij")
    'GET https://cdn/x?*** with Bearer ***'
    >>> redact("at:pw@host, powder", ["pw", "a", "powder"])
    'at:***@host, ***'
    """
    for secret in sorted(secrets, key=len, reverse=True):  # one may be the beginning of another
        if len(secret) < SHORTEST_SECRET:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
        else:
            text = text.replace(secret, "***")

    if not _MAY_BE_SECRET.search(text):
        return text
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class Redactor:
    """The registered secrets of this process, and texts and values without them."""

    def __init__(self) -> None:
        self._secrets: Set[str] = set()

    def hide(self, secret: str) -> None:
        """Register a secret, unless it is empty: it is replaced by *** from now on."""
        from urllib.parse import quote

        if secret:
            # A new set: another thread may walk through the old one.
            self._secrets = self._secrets | {secret, quote(secret), quote(secret, safe="")}

    def text(self, text: str) -> str:
        """`text` as it may be shown."""
        return redact(text, self._secrets)

    def value(self, value: Any) -> Any:
        """`value` with every text in it redacted; before it is JSON, whose escapes hide secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(inner) for inner in value]
        return value
