# SPDX-License-Identifier: Apache-2.0
"""What a `serve` of a models file would change of a gateway and its keys, for `--plan`. Pure."""

from __future__ import annotations

from typing import Iterator, List, Mapping, Optional, Sequence

from hfship.base.values import field_names
from hfship.site.terms import AccessKey, Gateway, GatewayModel

# Fields of Gateway that a models file sets, as it calls them.
_SETTINGS = {
    "version": "HAProxy",
    "max_body": "max_body",
    "max_upload": "max_upload",
    "timeout_s": "timeout",
    "tls_bind": "TLS",
}
_RIGHTS = ("models", "rate", "streams", "expires", "ops")


def gateway_changes(old: Optional[Gateway], new: Gateway) -> List[str]:
    """What of a gateway changes, a text each.

    >>> from hfship.site.terms import Replica
    >>> model = GatewayModel("m", ("m",), (Replica("m", "a:1"),))
    >>> gateway_changes(Gateway((), (3, 4)), Gateway((model,), (3, 4), max_body=9))
    ['max_body 4194304 -> 9', 'new model m, for m']
    """
    if old is None:
        return ["it is new"]
    found = []
    for name, word in _SETTINGS.items():
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            found.append(f"{word} {_shown(before)} -> {_shown(now)}")
    olds = {model.name: model for model in old.models}
    news = {model.name: model for model in new.models}
    for name, model in news.items():
        if name not in olds:
            found.append(f"new model {name}, for {', '.join(model.names)}")
        else:
            found += _model_changes(olds[name], model)
    found += [f"model {name} goes" for name in olds if name not in news]
    return found


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ".".join(map(str, value))
    return str(value) or "none"


def _model_changes(old: GatewayModel, new: GatewayModel) -> Iterator[str]:
    before = [_replica(one.name, one.standby) for one in old.replicas]
    now = [_replica(one.name, one.standby) for one in new.replicas]
    for word, one, other in (
        ("names", old.names, new.names),
        ("replicas", before, now),
        ("affinity", [old.affinity], [new.affinity]),
        ("mode", [old.mode], [new.mode]),
    ):
        if list(one) != list(other):
            yield f"{new.name}: {word} {', '.join(one)} -> {', '.join(other)}"


def _replica(name: str, standby: bool) -> str:
    return f"{name} (standby)" if standby else name


def key_changes(
    old: Sequence[AccessKey], new: Sequence[AccessKey], listed: Mapping[str, object]
) -> List[str]:
    """What of the keys changes, and which of the `listed` ones nobody has made yet.

    >>> key_changes([AccessKey("a", "")], [AccessKey("a", "", rate=6)], {"a": {}, "b": {}})
    ['a: rate 0 -> 6', 'b: to be made by hfship key add b']
    """
    found = []
    for before, now in zip(old, new):
        for name in field_names(AccessKey):
            one, other = getattr(before, name), getattr(now, name)
            if name in _RIGHTS and one != other:
                found.append(f"{now.name}: {name} {_shown(one)} -> {_shown(other)}")
    known = [key.name for key in new]
    found += [
        f"{name}: to be made by hfship key add {name}" for name in listed if name not in known
    ]
    return found
