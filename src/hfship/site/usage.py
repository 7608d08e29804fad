# SPDX-License-Identifier: Apache-2.0
"""What each key was used for, also by gateways that are gone.

The access log is docker's, which forgets it with the container, and its oldest part after 500 MB.
So what it tells is added up now and then, and kept: before the container is made anew, each time
somebody asks, each hour that the watchdog looks.

Owns DEPLOY_DIR/_gateway/usage.json, hfship-usage/1: "format"; "since" and "until", docker's times
of the first and last line that were added up; "keys", the fields of KeyUsage by name. Promises: a
line counts once, whatever is killed. Never: keeps a line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping

from hfship.base.errors import IntegrityError
from hfship.base.reading import LIST_SIZE, parse_json
from hfship.base.settings import typed_fields
from hfship.base.values import asdict, dataclass, field
from hfship.serve.deployments import read_own
from hfship.site.gateway_run import access_log
from hfship.site.keys import KeyUsage, add_usage
from hfship.site.store import write_files

USAGE_FILE, USAGE_FORMAT = "usage.json", "hfship-usage/1"
# As `docker logs --timestamps` writes a time: nine digits, so that times sort as text.
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) ")


@dataclass
class Ledger:
    """The usage of all keys between two times of the log, "" for none."""

    since: str = ""
    until: str = ""
    keys: Dict[str, KeyUsage] = field(default_factory=dict)

    def add(self, lines: Iterable[str]) -> None:
        """Add what lines with docker's times tell; of those that were added before, nothing.

        >>> ledger, stamp = Ledger(), "2026-01-31T04:05:06.{:09}Z"
        >>> line = '{"time":9,"key":"a","status":200}'
        >>> for numbers in ([1, 2], [2, 3]):
        ...     ledger.add(f"{stamp.format(number)} {line}" for number in numbers)
        >>> ledger.keys["a"].requests, ledger.until[-4:]
        (3, '003Z')
        """
        add_usage(self.keys, self._new(lines))

    def _new(self, lines: Iterable[str]) -> Iterator[str]:
        before = self.until
        for line in lines:
            stamp = _STAMP.match(line)
            if stamp is None:
                continue
            moment = stamp[1]
            if moment <= before:
                continue
            self.since = self.since or moment
            self.until = max(self.until, moment)
            yield line[stamp.end() :]


def read_ledger(folder: Path) -> Ledger:
    """What was kept, and what the log of the gateway tells since then. Raises HostError,
    IntegrityError."""
    ledger = _kept(folder)
    ledger.add(access_log(ledger.until))
    return ledger


def keep_usage(folder: Path) -> Ledger:
    """Add up, and keep that. Raises HostError, IntegrityError, DiskError."""
    ledger = read_ledger(folder)
    if not ledger.until:
        return ledger
    value = {"format": USAGE_FORMAT, **asdict(ledger)}
    text = json.dumps(value, indent=1)
    write_files(folder, {USAGE_FILE: text + "\n"}, 0o600)
    return ledger


def _kept(folder: Path) -> Ledger:
    content = read_own(folder, USAGE_FILE, LIST_SIZE)
    if content is None:
        return Ledger()
    try:
        value = parse_json(content)
        if value["format"] != USAGE_FORMAT:
            raise ValueError(f"format is {value['format']!r}")
        keys = {str(name): _usage_of(entry) for name, entry in value["keys"].items()}
        return Ledger(str(value["since"]), str(value["until"]), keys)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        path = folder / USAGE_FILE
        step = f"move {path} away: what was used is counted anew, as far as the log goes back"
        raise IntegrityError(f"{path} is not valid", f"{type(exc).__name__}: {exc}", step) from exc


def _usage_of(entry: Mapping[str, Any]) -> KeyUsage:
    return KeyUsage(**typed_fields(KeyUsage(), entry))
