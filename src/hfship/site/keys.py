# SPDX-License-Identifier: Apache-2.0
"""API keys of the gateway: made, changed, applied at once, and what they were used for.

A key is 256 random bits; of it hfship keeps the SHA-256, which tells nobody the key (there is
nothing to guess, and so nothing to salt).

Promises: a change holds for the next request, without a reload, and after every restart. Whatever
is wrong with a change is said before anything is changed. What already runs is not cut off when its
key goes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping, Sequence, Tuple

from hfship.base.errors import NotFoundError, UsageError, nearest
from hfship.base.values import dataclass, replace
from hfship.site.admin import GatewayDownError, replace_maps
from hfship.site.maps import key_maps
from hfship.site.store import read_gateway, read_keys, write_keys, write_maps
from hfship.site.terms import AccessKey, GatewayModel

_KEY_BYTES = 32


@dataclass
class KeyUsage:
    """What the access log tells of a key."""

    requests: int = 0  # that reached a model
    refused: int = 0  # answered by the gateway with 4xx
    failed: int = 0  # 5xx, or broken off
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0  # of all its requests together
    last: int = 0  # Unix time of its last request


def new_secret() -> str:
    """A key, to be shown once."""
    return "sk-" + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def named_key(keys: Sequence[AccessKey], name: str) -> AccessKey:
    """The key called `name`. Raises NotFoundError."""
    known = {key.name: key for key in keys}
    if name in known:
        return known[name]
    here = ", ".join(known) or "none"
    what = f"there is no key {name}{nearest(name, known)}"
    raise NotFoundError(what, f"there are: {here}", "hfship key list")


def with_key(keys: Sequence[AccessKey], key: AccessKey) -> Tuple[AccessKey, ...]:
    """The keys with a new one. Raises UsageError where its name is taken."""
    if any(one.name == key.name for one in keys):
        step = f"hfship key revoke {key.name}     # then add it again: with a new key"
        raise UsageError(f"there is a key {key.name} already", "", step)
    return (*keys, key)


def changed(keys: Sequence[AccessKey], name: str, **fields: Any) -> Tuple[AccessKey, ...]:
    """The keys with one of them changed. Raises NotFoundError.

    >>> [key.suspended for key in changed([AccessKey("a", "")], "a", suspended=True)]
    [True]
    """
    wanted = named_key(keys, name)
    return tuple(replace(key, **fields) if key is wanted else key for key in keys)


def without_key(keys: Sequence[AccessKey], name: str) -> Tuple[AccessKey, ...]:
    """The keys without one of them. Raises NotFoundError."""
    gone = named_key(keys, name)
    return tuple(key for key in keys if key is not gone)


def with_rights(
    keys: Sequence[AccessKey], rights: Mapping[str, Mapping[str, Any]]
) -> Tuple[AccessKey, ...]:
    """The keys with what a models file says of them; it says all anew for those that it lists."""
    listed = []
    for key in keys:
        if key.name not in rights:
            listed.append(key)
            continue
        fields: Dict[str, Any] = {
            "created": key.created,
            "suspended": key.suspended,
        }
        fields.update(rights[key.name])
        anew = AccessKey(key.name, key.sha256, **fields)
        listed.append(anew)
    return tuple(listed)


def require_known_models(models: Sequence[str], known: Sequence[GatewayModel]) -> None:
    """Raise UsageError for a name that no model of the site has."""
    names = [name for model in known for name in (model.name, *model.names)]
    for name in models:
        if name != "*" and name not in names:
            here = ", ".join(model.name for model in known) or "none"
            what = f"no model is called {name}{nearest(name, names)}"
            raise UsageError(what, f"behind the gateway are: {here}", "")


def keep_keys(folder: Path, keys: Sequence[AccessKey]) -> bool:
    """Keep the keys and apply them; whether a gateway runs that has them now. Raises HostError,
    DiskError."""
    write_keys(folder, keys)
    gateway = read_gateway(folder)
    if gateway is None:
        return False
    maps = key_maps(gateway.models, keys)
    write_maps(folder, maps)
    try:
        replace_maps(folder, maps)
    except GatewayDownError:
        return False
    return True


def apply_keys(folder: Path) -> bool:
    """Apply the keys that are kept, as after a command that was killed."""
    return keep_keys(folder, read_keys(folder))


# -- usage


def usage_of(lines: Iterable[str]) -> Dict[str, KeyUsage]:
    """What the access log of the gateway tells, by key. Other lines are passed over.

    >>> line = '{"time":9,"key":"a","model":"be_m","status":200,"ms":1500,"in":5,"out":7}'
    >>> usage_of([line, "[NOTICE] started"])["a"]
    KeyUsage(requests=1, refused=0, failed=0, bytes_in=5, bytes_out=7, seconds=1.5, last=9)
    """
    usage: Dict[str, KeyUsage] = {}
    add_usage(usage, lines)
    return usage


def add_usage(usage: Dict[str, KeyUsage], lines: Iterable[str]) -> None:
    """Add what lines of the access log tell to the usage by key."""
    for entry in log_entries(lines):
        name = str(entry.get("key", "-"))
        if name == "-":
            continue
        own = usage.setdefault(name, KeyUsage())
        _count(own, entry)


def log_entries(lines: Iterable[str]) -> Iterator[Dict[str, Any]]:
    """The requests in lines of the access log."""
    for line in lines:
        start = line.find("{")
        if start < 0:
            continue
        try:
            entry = json.loads(line[start:])
        except (ValueError, RecursionError):  # a line that was cut off, or is none of ours
            continue
        if isinstance(entry, dict):
            yield entry


def _count(usage: KeyUsage, entry: Mapping[str, Any]) -> None:
    status = _number(entry, "status")
    if status >= 500 or status <= 0:
        usage.failed += 1
    elif status >= 400:
        usage.refused += 1
    else:
        usage.requests += 1
    usage.bytes_in += _number(entry, "in")
    usage.bytes_out += _number(entry, "out")
    usage.seconds += max(0, _number(entry, "ms")) / 1000
    usage.last = max(usage.last, _number(entry, "time"))


def _number(entry: Mapping[str, Any], name: str) -> int:
    value = entry.get(name, 0)
    if isinstance(value, int):
        return value
    return 0
