# SPDX-License-Identifier: Apache-2.0
"""`hfship key`: the API keys of the gateway."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Sequence, Tuple

from hfship.base.errors import Exit, UsageError, as_typed
from hfship.base.text import counted, human_bytes, human_seconds, narrow_table, utc
from hfship.base.values import dataclass
from hfship.commands.options import positive_number
from hfship.commands.results import confirm
from hfship.site.settings import expiry, key_name, rate_per_minute

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.commands.context import Context
    from hfship.site.admin import KeyUse
    from hfship.site.keys import KeyUsage
    from hfship.site.terms import AccessKey

ACTIONS = ("add", "list", "revoke", "suspend", "resume", "sync")


def key_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship key`."""
    add = parser.add_argument
    add("action", choices=ACTIONS, help="what to do; sync tells the gateways of other hosts again")
    add("names", nargs="*", metavar="NAME", help="keys")
    group = parser.add_argument_group("add")
    group.add_argument(
        "--models",
        dest="key_models",
        type=_model_names,
        metavar="NAME,NAME",
        help="models that the key opens (default: all)",
    )
    group.add_argument(
        "--rate",
        type=rate_per_minute,
        metavar="N/min",
        help="accepted requests a minute (default: no limit)",
    )
    group.add_argument(
        "--streams",
        type=positive_number,
        metavar="N",
        help="requests at a time (default: no limit)",
    )
    group.add_argument(
        "--expires",
        type=_when,
        metavar="90d|DATE",
        help="when it ends: after a time, or with a day (default: never)",
    )
    group.add_argument("--ops", action="store_true", help="it also opens the page of the site")
    add("--usage", action="store_true", help="list: what each key did, from the access log")
    add("-y", "--yes", action="store_true", help="revoke: do not ask")


def _when(text: str) -> int:
    """When a key ends, from now on. Raises UsageError."""
    return expiry(text, time.time())


def _model_names(text: str) -> Tuple[str, ...]:
    """The names in a list of models. Raises UsageError."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError("--models names no model", "", "--models NAME,NAME")
    return names


@dataclass(frozen=True)
class KeyRow:
    """A key for people and for --json; `use` and `usage` where they are known."""

    key: AccessKey
    now: float
    use: Mapping[str, int]
    usage: Mapping[str, Any]

    @property
    def state(self) -> str:
        """active, suspended or expired."""
        if self.key.suspended:
            return "suspended"
        if self.key.expires and self.key.expires <= self.now:
            return "expired"
        return "active"

    def json(self) -> Dict[str, Any]:
        """docs/json.md: key."""
        return {
            "name": self.key.name,
            "models": list(self.key.models),
            "rate": self.key.rate or None,
            "streams": self.key.streams or None,
            "expires": utc_of(self.key.expires) or None,
            "created": self.key.created,
            "ops": self.key.ops,
            "state": self.state,
            **self.use,
            **self.usage,
        }

    def cells(self) -> Dict[str, str]:
        """The row of a table."""
        key = self.key
        cells = {
            "name": key.name,
            "state": self.state,
            "models": ", ".join(key.models).replace("*", "all"),
            "rate": f"{key.rate}/min" if key.rate else "-",
            "streams": str(key.streams or "-"),
            "expires": utc_of(key.expires)[:10] or "never",
        }
        cells.update({name: str(value) for name, value in self.use.items()})
        if self.usage:
            cells.update(usage_cells(self.usage))
        return cells


def usage_cells(usage: Mapping[str, Any]) -> Dict[str, str]:
    """What a key did, for people."""
    last = usage["last"] or "-"
    return {
        "requests": str(usage["requests"]),
        "refused": str(usage["refused"]),
        "failed": str(usage["failed"]),
        "in": human_bytes(usage["bytes_in"]),
        "out": human_bytes(usage["bytes_out"]),
        "time": human_seconds(usage["seconds"]),
        "last": last[:16].replace("T", " "),
    }


def utc_of(seconds: int) -> str:
    """A Unix time as ISO 8601, "" for 0."""
    if not seconds:
        return ""
    return utc(seconds)


def cmd_key(context: Context) -> Exit:
    """Make, list and change the keys of the gateway."""
    args = context.args
    if args.action == "list":
        list_keys(context)
        return Exit.OK
    if args.action == "sync":
        sync_keys(context)
        return Exit.OK
    if not args.names:
        step = f"hfship key {args.action} NAME"
        raise UsageError(f"nothing to {args.action}", "no key is named", step)
    if args.action == "add":
        add_key(context)
        return Exit.OK

    change_keys(context)
    return Exit.OK


def add_key(context: Context) -> None:
    """Make a key, apply it, and show it this once."""
    from hfship.site.keys import digest_of, new_secret, require_known_models, with_key
    from hfship.site.store import read_gateway
    from hfship.site.terms import AccessKey

    if len(context.args.names) > 1:
        raise UsageError("one key at a time: each is shown once", "", "")
    name = key_name(context.args.names[0])
    folder = _folder(context)
    gateway = read_gateway(folder)
    rights = asked_rights(context, name)
    if gateway:
        require_known_models(rights.get("models", ("*",)), gateway.models)
    secret = new_secret()
    key = AccessKey(name, digest_of(secret), created=utc(), **rights)
    runs = _change(context, [name], lambda keys: with_key(keys, key))
    value = {**KeyRow(key, time.time(), {}, {}).json(), "key": secret}
    context.reporter.info(f"the key {name}, shown this once; hfship keeps only its SHA-256:")
    context.reporter.reveal(secret, value)
    _tell_gateways(context, runs)


def asked_rights(context: Context, name: str) -> Dict[str, Any]:
    """The rights of a new key: as the models file says, which the last `serve` read, and over it
    as asked for now."""
    from hfship.site.settings import key_rights
    from hfship.site.store import read_rights

    rights: Dict[str, Any] = dict(read_rights(_folder(context)).get(name, {}))
    if context.file:
        rights.update(key_rights(context.file, time.time()).get(name, {}))

    options = {
        "models": "key_models",
        "rate": "rate",
        "streams": "streams",
        "expires": "expires",
        "ops": "ops",
    }
    for field, dest in options.items():
        if dest in context.asked:
            rights[field] = context.asked[dest]

    return rights


def change_keys(context: Context) -> None:
    """Revoke, suspend or resume keys; all that are named, or none. One that was revoked, and of
    which a gateway does not know that yet, may be revoked again."""
    from hfship.site.keys import changed, named_key, without_key
    from hfship.site.store import read_keys

    args = context.args
    known = read_keys(_folder(context))
    here = [key.name for key in known]
    again: List[str] = []
    if args.action == "revoke":
        again = [name for name in _untold_keys(context) if name not in here]
    for name in args.names:
        if name not in again:
            named_key(known, name)
    names = ", ".join(args.names)
    if args.action == "revoke" and not args.yes:
        confirm(f"revoke {names}? No key can be restored.", context.reporter)

    def change(keys: Sequence[AccessKey]) -> Tuple[AccessKey, ...]:
        for name in args.names:
            if name in again:
                continue
            if args.action == "revoke":
                keys = without_key(keys, name)
            else:
                keys = changed(keys, name, suspended=args.action == "suspend")
        return tuple(keys)

    runs = _change(context, args.names, change)
    done = {"revoke": "revoked", "suspend": "suspended", "resume": "active"}[args.action]
    rows = [{"name": name, "state": done} for name in args.names]
    context.reporter.result_of(f"{names}: {done}", rows)
    _tell_gateways(context, runs)


def _change(
    context: Context,
    names: Sequence[str],
    change: Callable[[Sequence[AccessKey]], Tuple[AccessKey, ...]],
) -> bool:
    """Change these keys under the lock; whether a gateway runs here that has them now. Those of
    other hosts are told by `_tell_gateways`, which comes after the result: they may take long."""
    from hfship.base.locks import FolderLock
    from hfship.site.keys import keep_keys
    from hfship.site.record import read_record
    from hfship.site.store import read_keys
    from hfship.site.untold import note_untold

    folder = _folder(context)
    deploy_dir = context.settings.deploy_dir
    with FolderLock(deploy_dir):
        keys = change(read_keys(folder))
        gateways = read_record(deploy_dir).gateways
        if gateways:
            note_untold(deploy_dir, gateways, names)
        return keep_keys(folder, keys)


def _untold_keys(context: Context) -> List[str]:
    """The keys whose last change a gateway of another host does not know yet."""
    from hfship.site.untold import read_untold

    names: List[str] = []
    for keys in read_untold(context.settings.deploy_dir).values():
        names += keys
    return names


def sync_keys(context: Context) -> None:
    """Have all gateways know the keys as they are kept, this one and those of other hosts."""
    from hfship.base.locks import FolderLock
    from hfship.site.keys import apply_keys
    from hfship.site.record import read_record

    with FolderLock(context.settings.deploy_dir):
        runs = apply_keys(_folder(context))
    _tell_gateways(context, runs)
    hosts = read_record(context.settings.deploy_dir).gateways
    text = f"known at the gateways of other hosts, too: {', '.join(hosts)}"
    if not hosts:
        text = "no other host has a gateway"
    context.reporter.result_of(text, [{"name": host, "state": "told"} for host in hosts])


def _tell_gateways(context: Context, runs: bool) -> None:
    """Have the gateways of other hosts know the keys, too. Raises IncompleteError."""
    from hfship.site.record import read_record

    if not runs:
        context.reporter.info("no gateway runs here now; its next start has that")
    if read_record(context.settings.deploy_dir).gateways:
        from hfship.commands.gateway_hosts import tell_gateways

        tell_gateways(context)


def _folder(context: Context) -> Path:
    from hfship.site.store import gateway_folder

    return gateway_folder(context.settings.deploy_dir)


COLUMNS = ("name", "state", "models", "rate", "streams", "expires", "running", "last_minute")
USAGE_COLUMNS = ("requests", "refused", "failed", "in", "out", "time", "last")
OPTIONAL_COLUMNS = ("in", "time", "streams", "rate", "expires", "last", "models")


def list_keys(context: Context) -> None:
    """All keys, or those that are named; with --usage what they did."""
    from hfship.site.keys import named_key
    from hfship.site.store import read_keys

    reporter = context.reporter
    keys = read_keys(_folder(context))
    if context.args.names:
        keys = tuple(named_key(keys, name) for name in context.args.names)
    rows = _rows(context, keys)
    if not rows and not context.args.json:
        reporter.info(as_typed("there are no keys; hfship key add NAME makes one"))
        _warn_of_untold(context)
        return
    columns = [*COLUMNS]
    if context.args.usage:
        columns += USAGE_COLUMNS
    cells = []
    for row in rows:
        known = row.cells()
        cells.append({column: known.get(column, "-") for column in columns})

    table = narrow_table(cells, columns, OPTIONAL_COLUMNS, reporter.width)
    reporter.result_of(table, [row.json() for row in rows])
    _warn_of_untold(context)


def _warn_of_untold(context: Context) -> None:
    """Say which gateways of other hosts take keys as they were."""
    from hfship.site.untold import read_untold

    for host, names in read_untold(context.settings.deploy_dir).items():
        changed = ", ".join(names) or "keys"
        said = f"not known yet at the gateway on {host}: what changed of {changed}"
        context.reporter.warn(as_typed(f"{said}: hfship key sync"))


def _rows(context: Context, keys: Sequence[AccessKey]) -> List[KeyRow]:
    now = time.time()
    uses = _uses(context)
    usages: Mapping[str, KeyUsage] = {}
    if context.args.usage:
        usages = _usages(context)
    rows = []
    for key in keys:
        use: Dict[str, int] = {}
        if key.name in uses:
            use = {"running": uses[key.name].running, "last_minute": uses[key.name].last_minute}
        usage: Mapping[str, Any] = {}
        if context.args.usage:
            usage = usage_values(usages.get(key.name))
        rows.append(KeyRow(key, now, use, usage))
    return rows


def _uses(context: Context) -> Dict[str, KeyUse]:
    """What runs now, by key; nothing without a gateway."""
    from hfship.site.admin import GatewayDownError, key_uses

    try:
        return {use.name: use for use in key_uses(_folder(context))}
    except GatewayDownError:
        return {}


def _usages(context: Context) -> Mapping[str, KeyUsage]:
    from hfship.base.locks import FolderLock, InUseError
    from hfship.site.usage import keep_usage, read_ledger

    folder = _folder(context)
    try:
        with FolderLock(context.settings.deploy_dir):
            ledger = keep_usage(folder)
    except InUseError:  # whoever has it keeps the usage itself
        ledger = read_ledger(folder)
    since = ledger.since[:16].replace("T", " ")
    context.reporter.info(f"usage of {counted(len(ledger.keys), 'key')} since {since or 'never'}")
    return ledger.keys


def usage_values(usage: Any) -> Dict[str, Any]:
    """docs/json.md: what a key did."""
    from hfship.site.keys import KeyUsage

    usage = usage or KeyUsage()
    return {
        "requests": usage.requests,
        "refused": usage.refused,
        "failed": usage.failed,
        "bytes_in": usage.bytes_in,
        "bytes_out": usage.bytes_out,
        "seconds": round(usage.seconds, 1),
        "last": utc_of(usage.last) or None,
    }
