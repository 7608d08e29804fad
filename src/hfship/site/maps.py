# SPDX-License-Identifier: Apache-2.0
"""The maps of the gateway: what it looks up for each request.

Owns their names and their text: a line for each entry, a key without spaces, a space, the value.
Those of the keys can be replaced while it runs (site/admin.py), those of the models with a reload.

  keys       SHA-256 of a key -> its name
  rate       name of a key -> accepted requests a minute; none where there is no limit
  streams    name of a key -> requests at a time
  expires    name of a key -> Unix time
  suspended  name of a key -> 1
  ops        name of a key -> 1, where it opens the page of the site
  rights     NAME:be_MODEL or NAME:* -> 1
  list       name of a key -> what /v1/models answers
  models     name of a model, as clients call it -> be_MODEL
  model      the same -> its entry in lists
  upstream   be_MODEL -> the API key of its vLLM; secret
"""

from __future__ import annotations

import json
from typing import Dict, Mapping, Sequence

from hfship.site.terms import AccessKey, GatewayModel

MAPS_FOLDER = "maps"
SECRET_MAPS = ("upstream",)
Maps = Mapping[str, Mapping[str, str]]  # by the name of the map


def map_path(name: str) -> str:
    """The map called `name`, as haproxy.cfg and the runtime API name it."""
    return f"{MAPS_FOLDER}/{name}.map"


def compact_json(value: object) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def key_maps(models: Sequence[GatewayModel], keys: Sequence[AccessKey]) -> Maps:
    """The maps that change with the keys, in the order in which they are applied: what a key may
    do is there before the key is, and the key goes before what it may do.

    >>> maps = key_maps([], [AccessKey("a", "5e", rate=6)])
    >>> maps["keys"], maps["rate"], maps["rights"], maps["list"]
    ({'5e': 'a'}, {'a': '6'}, {'a:*': '1'}, {'a': '{"object":"list","data":[]}'})
    """
    names = ("rate", "streams", "expires", "suspended", "ops", "rights", "list", "keys")
    maps: Dict[str, Dict[str, str]] = {name: {} for name in names}
    for key in keys:
        maps["keys"][key.sha256] = key.name
        limits = {"rate": key.rate, "streams": key.streams, "expires": key.expires}
        for name, limit in limits.items():
            if limit:
                maps[name][key.name] = str(limit)
        if key.suspended:
            maps["suspended"][key.name] = "1"
        if key.ops:
            maps["ops"][key.name] = "1"
        maps["list"][key.name] = model_list([one for one in models if key.may_use(one)])
        maps["rights"].update(_rights(key, models))
    return maps


def _rights(key: AccessKey, models: Sequence[GatewayModel]) -> Dict[str, str]:
    if "*" in key.models:
        return {f"{key.name}:*": "1"}
    return {f"{key.name}:{one.backend}": "1" for one in models if key.may_use(one)}


def model_maps(models: Sequence[GatewayModel], upstream: Mapping[str, str]) -> Maps:
    """The maps that change with the models. `upstream` are the models' own keys, by model."""
    backends = {}
    entries = {}
    secrets = {}
    for one in models:
        secrets[one.backend] = upstream[one.name]
        for name in one.names:
            backends[name] = one.backend
            entries[name] = compact_json(model_entry(name))
    return {"models": backends, "model": entries, "upstream": secrets}


def model_list(models: Sequence[GatewayModel]) -> str:
    """What /v1/models answers: each name of the models."""
    entries = [model_entry(name) for one in models for name in one.names]
    return compact_json({"object": "list", "data": entries})


def model_entry(name: str) -> Dict[str, object]:
    """A name of a model, as /v1/models lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "site"}


def map_text(entries: Mapping[str, str]) -> str:
    """The text of a map.

    >>> map_text({"a": "1", "b": "2"})
    'a 1\\nb 2\\n'
    """
    return "".join(f"{key} {value}\n" for key, value in entries.items())
