# SPDX-License-Identifier: Apache-2.0
"""--hosts of `doctor`, `list` and `status`: what all hosts of a models file say, at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Sequence, Tuple, Union

from hfship.base.errors import (
    Exit,
    HfshipError,
    NotFoundError,
    UsageError,
    error_fields,
    error_row,
    nearest,
)
from hfship.base.text import narrow_table, table
from hfship.base.values import dataclass
from hfship.ops.inventory import failure_lines, misfits, take_inventory
from hfship.ops.reach import LOOK_S, FarHost, at_once, rows_of
from hfship.serve.status import COLUMNS, OPTIONAL_COLUMNS, DeploymentStatus
from hfship.site.hosts import SiteHost, site_hosts

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile
    from hfship.commands.context import Context

Answers = Mapping[str, Union[Any, HfshipError]]
HostRows = List[Tuple[str, DeploymentStatus]]  # the name of a host, a deployment there


def chosen_hosts(context: Context) -> List[FarHost]:
    """The hosts that are meant. Raises UsageError without a models file that has some, and
    NotFoundError for a name that it does not have."""
    if context.file is None:
        what = "the hosts are in a models file, and none is given"
        step = "--models FILE, or export HFSHIP_MODELS_FILE=FILE"
        raise UsageError(what, "", step)
    hosts = hosts_called(context.file, context.args.on)
    return [FarHost(one) for one in hosts]


def hosts_called(file: ModelsFile, names: Sequence[str]) -> List[SiteHost]:
    """The hosts of a models file with these names, all without. Raises as chosen_hosts."""
    hosts = {one.name: one for one in site_hosts(file)}
    if not hosts:
        what = f"{file.path} has no [[host]]"
        raise UsageError(what, "", "hfship models --example     # shows one")
    wanted = [name for word in names for name in word.split(",")]
    for name in wanted:
        if name not in hosts:
            known = ", ".join(hosts)
            what = f"no host is called {name}{nearest(name, hosts)}"
            raise NotFoundError(what, f"{file.path} has {known}", "")
    return [one for name, one in hosts.items() if not wanted or name in wanted]


# -- list and doctor


def list_hosts(context: Context) -> Exit:
    """`list --hosts`: what each host has."""
    reporter = context.reporter
    hosts = chosen_hosts(context)
    with reporter.clock("asking the hosts", LOOK_S):
        inventory = take_inventory(hosts)
    reporter.result_of(inventory.text(), inventory.json())
    return inventory.exit_code


def diagnose_hosts(context: Context) -> Exit:
    """`doctor --hosts`: what each host can do, and what of them does not fit together."""
    hosts = chosen_hosts(context)
    with context.reporter.clock("asking the hosts", DOCTOR_S):
        inventory = take_inventory(hosts)
        answers = at_once(_fresh(hosts), lambda one: one.hfship("doctor", "--offline"), DOCTOR_S)
    found: List[Tuple[str, Mapping[str, Any]]] = []
    for name, answer in answers.items():
        if isinstance(answer, HfshipError):
            found.append((name, _failed_finding(answer)))
            continue
        found += [(name, row) for row in rows_of(answer.value)]
    for name, what in misfits(list(inventory.facts.values())):
        if name not in inventory.failures and what != inventory.facts[name].problem:
            found.append((name, {"check": "site", "state": "warn", "note": what, "next": ""}))
    view = HostFindings(found)
    context.reporter.result_of(view.text(), view.json())
    return view.exit_code


DOCTOR_S = 150.0  # for a trial container of a large image on a slow disk


def _fresh(hosts: Sequence[FarHost]) -> List[FarHost]:
    """The same hosts, for a second question: one that was given up is asked again."""
    return [FarHost(one.host) for one in hosts]


def _failed_finding(error: HfshipError) -> Mapping[str, Any]:
    step = error_fields(error)["next"]
    text = error.what
    if error.why:
        text += f": {error.why}"
    code = int(error.code)
    return {
        "check": "ssh",
        "state": "fail",
        "note": text,
        "next": step,
        "exit_code": code,
    }


@dataclass(frozen=True)
class HostFindings:
    """What doctor found on each host: the name, and a row of its JSON."""

    rows: Sequence[Tuple[str, Mapping[str, Any]]]

    def text(self) -> str:
        """What is wrong, host by host; of a host that is well one line."""
        lines: List[List[str]] = []
        steps: List[str] = []
        for name in dict.fromkeys(name for name, _ in self.rows):
            own = [row for host, row in self.rows if host == name]
            bad = [row for row in own if row.get("state") != "ok"]
            if not bad:
                lines.append([name, "ok", "", f"{len(own)} checks"])
            for row in bad:
                note = str(row.get("note", "")).replace("\n", "; ")
                lines.append([name, str(row["state"]), str(row.get("check", "")), note])
                if row.get("next"):
                    steps.append(f"next  {name}: {row['next']}")
        return "\n".join([table(lines), *steps])

    def json(self) -> List[Dict[str, Any]]:
        """The rows, each with its host."""
        return [{"host": name, **_without_schema(row)} for name, row in self.rows]

    @property
    def exit_code(self) -> Exit:
        """That of the first failure."""
        for _, row in self.rows:
            if row.get("state") == "fail":
                return Exit(int(row.get("exit_code", Exit.HOST)))
        return Exit.OK


def _without_schema(row: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in row.items() if name != "schema"}


# -- status


def status_of_hosts(
    context: Context,
    exit_of: Callable[[List[DeploymentStatus]], Exit],
    repair: Callable[[HostRows, List[str]], Exit],
) -> Exit:
    """`status --hosts`: the deployments of all hosts. `repair` mends what no host can alone; it is
    given what they told, and the silent ones."""
    hosts = chosen_hosts(context)
    args = context.args
    words = ["status", *args.names, "--hang-after", str(args.hang_after)]
    if args.repair:
        words += ["--repair", "--grace", str(args.grace)]
    limit_s = LOOK_S + args.hang_after
    with context.reporter.clock("asking the hosts", limit_s):
        answers = at_once(hosts, lambda one: one.hfship(*words), limit_s)
    rows, failures = deployments_in(answers)
    text = "\n".join([status_table(rows, context.reporter.width), *failure_lines(failures)])
    value = [{"host": host, **status.json()} for host, status in rows]
    value += [{"name": name, **error_row(exc)} for name, exc in failures.items()]
    context.reporter.result_of(text.strip() or "no deployments", value)
    codes = [exc.code for exc in failures.values()]
    if args.repair:
        codes.append(repair(rows, list(failures)))
    return max([exit_of([status for _, status in rows]), *codes])


def deployments_in(answers: Answers) -> Tuple[HostRows, Dict[str, HfshipError]]:
    """((host, status) of all deployments, the errors of hosts that did not answer)."""
    rows: HostRows = []
    failures: Dict[str, HfshipError] = {}
    for name, answer in answers.items():
        if isinstance(answer, HfshipError):
            failures[name] = answer
            continue
        for row in rows_of(answer.value):
            if "state" not in row:
                continue
            status = _status_in(row)
            rows.append((name, status))
    return rows, failures


def _status_in(row: Mapping[str, Any]) -> DeploymentStatus:
    fields = {name: row.get(name) for name in DeploymentStatus.__dataclass_fields__}
    texts = (
        "name",
        "state",
        "container",
        "image",
        "url",
        "task",
        "phase",
        "fault",
        "repair",
        "note",
    )
    for name in texts:
        fields[name] = str(fields[name] or "")
    fields["gpus"] = tuple(map(str, fields["gpus"] or ()))
    return DeploymentStatus(**fields)  # type: ignore[arg-type]


def status_table(rows: Sequence[Tuple[str, DeploymentStatus]], width: int) -> str:
    """The table of `status` with the hosts, below it what is wrong."""
    if not rows:
        return ""
    cells = [{"host": host, **status.cells()} for host, status in rows]
    lines = [narrow_table(cells, ("host", *COLUMNS), OPTIONAL_COLUMNS, width)]
    lines += [f"{host}: {one.name}: {one.note}" for host, one in rows if one.note]
    return "\n".join(lines)
