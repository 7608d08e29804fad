# SPDX-License-Identifier: Apache-2.0
"""What a control host remembers of a site of several hosts.

Owns DEPLOY_DIR/_site/site.json, hfship-site-record/1, mode 0600: "format"; "keys", the API key of
each model's vLLM, which all its copies have; "places", for each deployment the names of its hosts,
that which answers first; "addresses", HOST:PORT of it, where the gateway reaches it;
"gateways", the hosts that have a gateway beside this one.

Promises: it can be lost: keys are read from the hosts again, places are asked. Nothing of it is
needed to run what runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

from hfship.base.errors import IntegrityError
from hfship.base.files import write_below
from hfship.base.reading import LIST_SIZE, parse_json
from hfship.base.values import dataclass, field
from hfship.serve.deployments import make_own_folder, read_own
from hfship.serve.files import key_in_env
from hfship.serve.terms import KEY_VARIABLE

SITE_FOLDER = "_site"  # in the folder of deployments
RECORD_FILE = "site.json"
RECORD_FORMAT = "hfship-site-record/1"


@dataclass(frozen=True)
class SiteRecord:
    """Keys by model; places and addresses by deployment."""

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    places: Mapping[str, Tuple[str, ...]] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    gateways: Tuple[str, ...] = ()


def read_record(deploy_dir: Path) -> SiteRecord:
    """What is remembered; nothing where there is no file. Raises IntegrityError, HostError."""
    folder = deploy_dir / SITE_FOLDER
    content = read_own(folder, RECORD_FILE, LIST_SIZE)
    if content is None:
        return SiteRecord()
    try:
        value = parse_json(content)
        if value["format"] != RECORD_FORMAT:
            raise ValueError(f"format is {value['format']!r}")
        keys = {str(k): key_in_env(f"{KEY_VARIABLE}={v}") for k, v in value["keys"].items()}
        places = {str(k): tuple(map(str, v)) for k, v in value["places"].items()}
        addresses = {str(k): str(v) for k, v in value["addresses"].items()}
        gateways = tuple(map(str, value.get("gateways", ())))
        return SiteRecord(keys, places, addresses, gateways)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        step = f"move {folder / RECORD_FILE} away, then serve again: it is made anew"
        raise IntegrityError(f"{folder / RECORD_FILE} cannot be read", str(exc), step) from exc


def write_record(deploy_dir: Path, record: SiteRecord) -> None:
    """Keep what is to be remembered. Raises DiskError, HostError."""
    make_own_folder(deploy_dir / SITE_FOLDER)
    places = {}
    for name, hosts in record.places.items():
        places[name] = list(hosts)
    value: Dict[str, Any] = {
        "format": RECORD_FORMAT,
        "keys": dict(record.keys),
        "places": places,
        "addresses": dict(record.addresses),
        "gateways": list(record.gateways),
    }
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    path = f"{SITE_FOLDER}/{RECORD_FILE}"
    write_below(deploy_dir, path, text, 0o600)
