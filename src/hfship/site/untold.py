# SPDX-License-Identifier: Apache-2.0
"""Gateways of other hosts that do not know yet which keys were changed.

Owns DEPLOY_DIR/_site/untold.json of a control host, hfship-untold/1, mode 0600: "format"; "hosts",
by the name of each host the names of the keys that its gateway may still take as they were.

Promises: a change is noted for all gateways before it counts here, and forgotten for each that has
it. So what is killed in between, or meets a host that is silent, is not lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, Iterable, Mapping, Tuple

from hfship.base.errors import IntegrityError
from hfship.base.files import write_below
from hfship.base.reading import LIST_SIZE, parse_json
from hfship.serve.deployments import make_own_folder, read_own
from hfship.site.record import SITE_FOLDER

UNTOLD_FILE = "untold.json"
UNTOLD_FORMAT = "hfship-untold/1"
Untold = Mapping[str, Tuple[str, ...]]  # the names of keys, by that of the host


def read_untold(deploy_dir: Path) -> Untold:
    """What gateways do not know yet. Raises IntegrityError, HostError."""
    path = deploy_dir / SITE_FOLDER / UNTOLD_FILE
    content = read_own(path.parent, UNTOLD_FILE, LIST_SIZE)
    if content is None:
        return {}
    try:
        value = parse_json(content)
        if value["format"] != UNTOLD_FORMAT:
            raise ValueError(f"format is {value['format']!r}")
        return {str(host): tuple(map(str, names)) for host, names in value["hosts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        step = f"move {path} away, then: hfship key sync"
        raise IntegrityError(f"{path} cannot be read", str(exc), step) from exc


def note_untold(deploy_dir: Path, hosts: Iterable[str], keys: Iterable[str]) -> None:
    """Note that the gateways of these hosts do not know of a change of these keys. Raises
    HfshipError."""
    names = tuple(keys)
    untold: Dict[str, Tuple[str, ...]] = dict(read_untold(deploy_dir))
    for host in hosts:
        both = (*untold.get(host, ()), *names)
        untold[host] = tuple(dict.fromkeys(both))
    _write(deploy_dir, untold)


def forget_untold(deploy_dir: Path, hosts: Iterable[str]) -> None:
    """Note that the gateways of these hosts know all, or are no more. Raises HfshipError."""
    untold = read_untold(deploy_dir)
    gone = set(hosts)
    left = {host: names for host, names in untold.items() if host not in gone}
    if left != untold:
        _write(deploy_dir, left)


def _write(deploy_dir: Path, untold: Untold) -> None:
    make_own_folder(deploy_dir / SITE_FOLDER)
    value = {
        "format": UNTOLD_FORMAT,
        "hosts": {host: list(names) for host, names in untold.items()},
    }
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    write_below(deploy_dir, f"{SITE_FOLDER}/{UNTOLD_FILE}", text, 0o600)
