# SPDX-License-Identifier: Apache-2.0
"""Placement: which host and which GPUs each copy of each model gets. One host is the special case.

A copy is planned for what the others leave of a host: those that run keep their place, then come
copies that name hosts, labels or GPUs, first copies, then second ones, standbys last, and the large
before the small, which find a place later.

Of the hosts that may run a copy the first that holds it is taken:
  where it runs; where no other copy of its model is; where the model's files are; the fullest, so
  that whole hosts stay free for large models; the first of the models file.
A model that no host holds alone spans several that are alike and idle (site/groups.py).

Promises: pure; what is given to one copy is given to no other; planned again, nothing moves; when a
host leaves, only its copies move; a refusal has the arithmetic of each host.
"""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from hfship.base.errors import HfshipError, HostError
from hfship.base.text import counted, human_bytes, table
from hfship.base.values import dataclass, field, replace
from hfship.serve.gpus import with_claims
from hfship.serve.parallel import demand_of
from hfship.serve.survey import claims_of, free_host, with_plans
from hfship.serve.terms import CUDA_SEES
from hfship.serve.vllm_table import version_text
from hfship.site.groups import Member, node_plans
from hfship.site.hosts import HostFacts, Placing, SiteHost, member_of

if TYPE_CHECKING:
    from hfship.serve.survey import Request
    from hfship.serve.terms import Gpu, Host, Image, Plan

Decide = Callable[["Request", "Host", Optional["Plan"]], "Plan"]
PortsInUse = Callable[["Request", Optional[int]], AbstractSet[int]]
STANDBY_TURN = 1000  # behind all replicas
MOST_SPANNED = 16  # hosts of one copy
COLUMNS = ("model", "host", "GPUs", "share", "context", "port", "state", "image")
HOST_COLUMNS = ("host", "GPUs", "free", "runs")


@dataclass(frozen=True)
class Wish:
    """One copy of a model that is to run. Copies of the same `model` are spread over hosts."""

    request: Request
    model: str = ""
    placing: Placing = Placing()
    standby: bool = False


@dataclass(frozen=True)
class Placed:
    """Where a copy runs: on each of `hosts`, the first of which answers, by the plan for it."""

    hosts: Tuple[str, ...]
    plans: Tuple[Plan, ...]
    before: Tuple[str, ...] = ()  # the hosts that it runs on until now
    standby: bool = False
    is_known: bool = False  # has been served on one of its hosts before

    @property
    def moves(self) -> bool:
        """Whether it runs elsewhere until now."""
        if not self.before:
            return False
        return set(self.before) != set(self.hosts)

    @property
    def state(self) -> str:
        """How it is now, before anything is done.

        >>> Placed(("a",), (), before=("b",)).state, Placed(("a",), (), before=("a",)).state
        ('moves', 'runs')
        >>> Placed(("a",), (), is_known=True).state, Placed(("a",), ()).state
        ('does not run', 'new')
        """
        if self.moves:
            return "moves"
        if self.before:
            return "runs"
        if self.is_known:
            return "does not run"
        return "new"


@dataclass(frozen=True)
class Placement:
    """Where all copies run, and the errors of those that find no place, by their deployments."""

    placed: Mapping[str, Placed]
    refused: Mapping[str, HfshipError]
    warnings: Tuple[str, ...] = ()
    surplus: Tuple[Tuple[str, str], ...] = ()  # (host, deployment) that run beside their place
    hosts: Mapping[str, Host] = field(default_factory=dict)  # what was shared out, by host

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The plan of each deployment, on the host that answers."""
        return {name: placed.plans[0] for name, placed in self.placed.items()}

    def beside(self, name: str, host: str = "") -> List[Plan]:
        """The plans of the others on a host."""
        return [plan for other, plan in self.on_host(host) if other != name]

    def on_host(self, host: str) -> Iterator[Tuple[str, Plan]]:
        """(deployment, plan) of all that a host runs."""
        for name, placed in self.placed.items():
            for at, plan in zip(placed.hosts, placed.plans):
                if at == host:
                    yield name, plan

    def text(self) -> str:
        """One table of all copies in the order in which they were asked for; with hosts, a second
        one of what each of them runs."""
        rows = []
        for name, placed in self.placed.items():
            rows.append(_row_of(name, placed))
        for name, error in self.refused.items():
            rows.append([name, "none", "none", "", "", "", "finds no place", error.what])
        if not any(self.hosts):
            narrow = [_without_host(row) for row in rows]
            return table(narrow, _without_host(COLUMNS))
        usage = []
        for host in self.hosts:
            usage.append([host, *self._usage(host)])
        copies = table(rows, COLUMNS)
        hosts = table(usage, HOST_COLUMNS)
        return f"{copies}\n\n{hosts}"

    def notes(self) -> List[str]:
        """What is to be said beside the tables: what will not hold as one may expect, once for all
        copies, and the arithmetic of each refusal."""
        said: Dict[str, str] = {}
        for name, placed in self.placed.items():
            for warning in placed.plans[0].warnings:
                said.setdefault(warning, f"{name}: {warning}")
        notes = [*self.warnings, *said.values()]
        for error in self.refused.values():
            notes.append(f"{error.what}:")
            for line in error.why.splitlines():
                notes.append(f"  {line}")
        return notes

    def _usage(self, host: str) -> List[str]:
        gpus = [gpu for gpu in self.hosts[host].gpus if not gpu.mig]
        plans = []
        names = []
        for name, plan in self.on_host(host):
            plans.append(plan)
            names.append(f"{name} on {_numbers(plan)}")
        free = 0
        for gpu in with_claims(gpus, plans):
            if not _is_taken(gpu):
                free += 1
        runs = ", ".join(names) or "nothing"
        if not gpus:
            return ["none", str(free), runs]
        kinds: Dict[str, None] = {}
        for gpu in gpus:
            size = human_bytes(gpu.total)
            kinds[f"{gpu.name} {size}"] = None
        named = ", ".join(kinds)
        return [f"{len(gpus)} x {named}", str(free), runs]


def _without_host(row: Sequence[str]) -> List[str]:
    return [row[0], *row[2:]]


def _row_of(name: str, placed: Placed) -> List[str]:
    plan = placed.plans[0]
    gpus = _numbers(plan)
    share = ""
    if plan.gpus:
        share = f"{plan.gpu_memory_utilization:g}"
    if len(placed.hosts) > 1:
        gpus += " of each"
    called = f"{name} (standby)" if placed.standby else name
    version = version_text(plan.version)
    port = str(plan.port)
    if plan.network and not plan.port:
        port = "gateway"
    return [
        called,
        " + ".join(placed.hosts),
        gpus,
        share,
        str(plan.max_model_len),
        port,
        placed.state,
        f"{plan.image} ({version})",
    ]


def _numbers(plan: Plan) -> str:
    """The GPUs of a plan, for people."""
    numbers = []
    for label in plan.gpu_names:
        short, _, _ = label.partition(" (")
        numbers.append(short.replace("GPU ", ""))
    return in_runs(numbers) or "CPU"


def in_runs(numbers: Sequence[str]) -> str:
    """Numbers with what follows each other put together.

    >>> in_runs(["0", "1", "2", "5", "7:1"]), in_runs(["0", "1"])
    ('0-2, 5, 7:1', '0, 1')
    """
    runs: List[List[str]] = []
    for number in numbers:
        last = runs[-1][-1] if runs else ""
        if last.isdigit() and number == str(int(last) + 1):
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = []
    for run in runs:
        texts.append(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(run))
    return ", ".join(texts)


# -- the seats: what hosts have left


class _Shape(NamedTuple):
    """All that a plan for a new copy depends on. Hosts of one shape give one answer."""

    gpus: Tuple[Gpu, ...]
    images: Tuple[Image, ...]
    memory: int


class _Seat:
    """A host, and what was given away of it so far."""

    def __init__(
        self,
        site: SiteHost,
        facts: HostFacts,
        order: int,
        wished: AbstractSet[str],
        shapes: Dict[_Shape, int],
    ) -> None:
        self.site = site
        self.facts = facts
        self.order = order
        self.given: Dict[str, Plan] = {}
        self.copies: Dict[str, int] = {}  # of each model
        # What runs holds its GPUs until it is placed here again: a copy that moves is stopped
        # after it runs elsewhere.
        self.held = {plan.name: plan for plan in facts.running_plans if plan.name in wished}
        self.before = {plan.name: plan for plan in facts.plans}
        self.free = 0.0
        self.shape = 0  # the number of its shape
        self._shapes = shapes
        self._count()

    def give(self, name: str, model: str, plan: Plan) -> None:
        """Give a copy its part."""
        self.given[name] = plan
        self.copies[model] = self.copies.get(model, 0) + 1
        self.held.pop(name, None)
        self._count()

    def _count(self) -> None:
        """What is left, after something was given."""
        offer = self.facts.offer
        taken = []
        for plan in self.facts.running_plans:
            if self._is_other(plan.name):
                taken.append(plan)
        taken += self.held.values()
        taken += self.given.values()
        parts = []
        gpus = []
        for gpu in with_claims(offer.gpus, taken):
            used = gpu.used / max(1, gpu.total)
            parts.append(1 - min(1.0, used))
            gpus.append(replace(gpu, uuid="", index=0))
        self.free = sum(parts)
        shape = _Shape(tuple(gpus), offer.images, offer.memory)
        self.shape = self._shapes.setdefault(shape, len(self._shapes))

    def _is_other(self, name: str) -> bool:
        return name not in self.held and name not in self.given

    def own(self, name: str) -> Optional[Plan]:
        """The plan of a copy that runs here."""
        return self.held.get(name)

    def left(self, request: Request, ports_in_use: PortsInUse) -> Tuple[Host, Optional[Plan]]:
        """(what is left for a copy, its plan so far)."""
        offer = self.facts.offer
        name = request.name
        others = []
        for plan in self.held.values():
            if plan.name != name:
                others.append(plan)
        others += self.given.values()
        running = self.facts.running
        claims = claims_of(self.before, name, running)
        claims = with_plans(claims, others)
        in_use = ports_in_use(request, claims.own_port)
        in_use = in_use | offer.taken_ports
        if claims.own_port:
            in_use = in_use - {claims.own_port}
        left = free_host(offer, claims, in_use)
        return left, claims.own

    def without_own(self, name: str, gpus: Sequence[Gpu]) -> Tuple[Gpu, ...]:
        """GPUs as a copy sees them that runs here: what it uses is free for it."""
        own = self.own(name)
        if own is None:
            return tuple(gpus)
        seen = []
        for gpu in gpus:
            if gpu.uuid in own.gpus:
                seen.append(replace(gpu, used=0))
            else:
                seen.append(gpu)
        return tuple(seen)

    @property
    def is_idle(self) -> bool:
        """Whether no GPU of it is used or promised."""
        gpus = self.facts.offer.gpus
        if not gpus:
            return False
        for plan in (*self.held.values(), *self.given.values()):
            if plan.gpus:
                return False
        for gpu in gpus:
            if gpu.mig or gpu.slice:
                return False
        return self.free > len(gpus) * 0.97


def _is_taken(gpu: Gpu) -> bool:
    return gpu.used > gpu.total * CUDA_SEES / 10


# -- placing


def nothing_in_use(_request: Request, _own_port: Optional[int]) -> FrozenSet[int]:
    """For hosts whose ports in use are told with their facts."""
    return frozenset()


def place(
    wishes: Sequence[Wish],
    hosts: Sequence[SiteHost],
    facts: Mapping[str, HostFacts],
    decide: Decide,
    ports_in_use: PortsInUse = nothing_in_use,
) -> Placement:
    """Share the hosts out among the copies that are wished for.

    `decide` plans one copy for what is left of a host, or raises HfshipError. A host without facts,
    or that does not answer, gets none.
    """
    table_of_seats = _Seats(
        wishes,
        hosts,
        facts,
        decide,
        ports_in_use,
    )
    for wish in _in_turn(wishes, facts):
        table_of_seats.place(wish)
    return table_of_seats.placement()


def _in_turn(wishes: Sequence[Wish], facts: Mapping[str, HostFacts]) -> List[Wish]:
    """The wishes in the order in which they are placed."""
    running: Dict[str, bool] = {}
    for host in facts.values():
        for name in host.running:
            running[name] = True
    numbers: Dict[str, int] = {}
    ranks: Dict[str, int] = {}
    for wish in wishes:
        name = wish.request.name
        model = wish.model or name
        rank = numbers.get(model, 0)
        numbers[model] = rank + 1
        if wish.standby:
            rank += STANDBY_TURN
        ranks[name] = rank

    def turn(wish: Wish) -> Tuple[bool, bool, int, int]:
        request = wish.request
        is_new = request.name not in running
        # What may run in few places goes before what may run anywhere.
        is_free = not (request.options.gpus or wish.placing.hosts or wish.placing.host_labels)
        return (
            is_new,
            is_free,
            ranks[request.name],
            -request.facts.weight_bytes,
        )

    return sorted(wishes, key=turn)


class _Seats:
    """The hosts while they are shared out."""

    def __init__(
        self,
        wishes: Sequence[Wish],
        hosts: Sequence[SiteHost],
        facts: Mapping[str, HostFacts],
        decide: Decide,
        ports_in_use: PortsInUse,
    ) -> None:
        self.wishes = wishes
        self.decide = decide
        self.ports_in_use = ports_in_use
        self.placed: Dict[str, Placed] = {}
        self.refused: Dict[str, HfshipError] = {}
        self.surplus: List[Tuple[str, str]] = []
        self._known: Dict[Any, HfshipError] = {}  # refusals by wish and shape
        wished = frozenset(wish.request.name for wish in wishes)
        self.seats: List[_Seat] = []
        self.named: Dict[str, _Seat] = {}
        self.absent: Dict[str, str] = {}
        shapes: Dict[_Shape, int] = {}
        for order, host in enumerate(hosts):
            found = facts.get(host.name, HostFacts(host.name, "was not asked"))
            if found.answers:
                seat = _Seat(host, found, order, wished, shapes)
                self.seats.append(seat)
                self.named[host.name] = seat
            else:
                self.absent[host.name] = _without_name(found.problem, host.name)

    def place(self, wish: Wish) -> None:
        """Find a place for one copy, or the reason why there is none."""
        name = wish.request.name
        reasons = dict(self.absent)
        seats = []
        for seat in self.seats:
            reason = _refusal(wish, seat)
            if reason:
                reasons[seat.site.name] = reason
            else:
                seats.append(seat)

        found = None
        errors: Dict[str, HfshipError] = {}
        seats = self._in_order(wish, seats)
        if wish.placing.nodes < 2:
            found = self._on_one(wish, seats, errors)
        if found is None and wish.placing.nodes != 1:
            found = self._on_several(wish, seats, errors)
        if found is None:
            self.refused[name] = self._error(wish, reasons, errors)
            return
        self._take(wish, found)

    def _in_order(self, wish: Wish, seats: Sequence[_Seat]) -> List[_Seat]:
        name = wish.request.name
        model = wish.model or name
        folder = wish.request.model.folder.name

        def rank(seat: _Seat) -> Tuple[bool, bool, int, bool, float, int]:
            runs = seat.own(name) is not None
            well = name in seat.facts.healthy
            brought = folder in seat.facts.models
            copies = seat.copies.get(model, 0)
            return (
                not runs,
                not well,
                copies,
                not brought,
                round(seat.free, 3),
                seat.order,
            )

        return sorted(seats, key=rank)

    def _on_one(
        self, wish: Wish, seats: Sequence[_Seat], errors: Dict[str, HfshipError]
    ) -> Optional[Placed]:
        """The first host that holds a useful context, else that with the longest."""
        best: Optional[Placed] = None
        for seat in seats:
            plan = self._plan(wish, seat, errors)
            if plan is None:
                continue
            host = seat.site.name
            found = Placed((host,), (plan,))
            runs = seat.own(wish.request.name)
            if runs or _is_enough(wish.request, plan):
                return found
            if best is None or plan.max_model_len > best.plans[0].max_model_len:
                best = found
        return best

    def _plan(self, wish: Wish, seat: _Seat, errors: Dict[str, HfshipError]) -> Optional[Plan]:
        """The plan for one host, None with an error. Of a copy that runs its own GPUs are tried
        first: it must not change because others left room."""
        request = wish.request
        host = seat.site.name
        model = wish.model or request.name
        asked = (request.options.gpus, request.options.port)
        key = (model, asked, seat.shape)
        own = seat.own(request.name)
        if own is None and key in self._known:
            errors[host] = self._known[key]
            return None
        left, previous = seat.left(request, self.ports_in_use)
        if own and own.gpus and not own.nodes:
            kept = self._as_it_runs(request, left, own)
            if kept:
                return kept
        try:
            return self.decide(request, left, previous)
        except HfshipError as exc:
            errors[host] = exc
            if own is None:
                self._known[key] = exc
            return None

    def _as_it_runs(self, request: Request, left: Host, own: Plan) -> Optional[Plan]:
        gpus = tuple(gpu for gpu in left.gpus if gpu.uuid in own.gpus)
        if len(gpus) < len(own.gpus):
            return None
        own_part = replace(left, gpus=gpus)
        try:
            return self.decide(request, own_part, own)
        except HfshipError:
            return None

    def _on_several(
        self, wish: Wish, seats: Sequence[_Seat], errors: Dict[str, HfshipError]
    ) -> Optional[Placed]:
        """Hosts that are alike, as few as hold the model together, or as many as are asked for."""
        largest: Dict[str, HfshipError] = {}  # of the last group that was tried
        for group in self._groups(wish, seats):
            try:
                return self._over(wish, group)
            except HfshipError as exc:
                names = [seat.site.name for seat in group]
                largest = {_few(names): exc}
        errors.update(largest)
        asked = wish.placing.nodes
        if asked and not largest:
            most = max([len(kind) for kind in _kinds_of(seats)], default=0)
            what = f"{counted(asked, 'idle host')} of one kind are wanted, there are {most}"
            errors[""] = HostError(what)
        return None

    def _groups(self, wish: Wish, seats: Sequence[_Seat]) -> Iterator[List[_Seat]]:
        """Groups of hosts to be tried: that of before, then small ones before large ones."""
        before = _group_before(wish.request.name, seats)
        if before:
            yield before
        asked = wish.placing.nodes
        sizes = [asked] if asked else list(range(2, MOST_SPANNED + 1))
        kinds = _kinds_of(seats)
        for size in sizes:
            for kind in kinds:
                if len(kind) >= size:
                    yield kind[:size]

    def _over(self, wish: Wish, seats: Sequence[_Seat]) -> Placed:
        """A copy over all of some hosts. Raises HfshipError."""
        request = wish.request
        members = []
        together: List[Gpu] = []
        for seat in seats:
            left, _ = seat.left(request, self.ports_in_use)
            gpus = seat.without_own(request.name, left.gpus)
            network = member_of(seat.site, seat.facts)
            members.append(Member(gpus, *network))
            together += gpus
        first, previous = seats[0].left(request, self.ports_in_use)
        whole = replace(first, gpus=tuple(together))
        plans = node_plans(
            request,
            whole,
            members,
            previous,
            self.decide,
        )
        names = tuple(seat.site.name for seat in seats)
        return Placed(names, plans)

    def _take(self, wish: Wish, found: Placed) -> None:
        """Give a copy its hosts; where else it runs is told."""
        name = wish.request.name
        model = wish.model or name
        stays = []
        left = []
        for seat in self.seats:
            host = seat.site.name
            if not seat.own(name):
                continue
            if host in found.hosts:
                stays.append(host)
            else:
                left.append(host)
        for host, plan in zip(found.hosts, found.plans):
            self.named[host].give(name, model, plan)
        for host in left:
            self.surplus.append((host, name))
        before = tuple(stays or left)
        is_known = any(name in self.named[host].before for host in found.hosts)
        self.placed[name] = replace(
            found,
            before=before,
            standby=wish.standby,
            is_known=is_known,
        )

    def _error(
        self, wish: Wish, reasons: Mapping[str, str], errors: Mapping[str, HfshipError]
    ) -> HfshipError:
        """Why a copy has no place: the error of the only host, or the arithmetic of each."""
        if [seat.site.name for seat in self.seats] == [""]:
            taken: List[Plan] = []
            for placed in self.placed.values():
                taken += placed.plans
            (error,) = errors.values()
            return _with_holders(error, wish.request, taken)

        said: Dict[str, List[str]] = {}
        for host, reason in reasons.items():
            said.setdefault(reason, []).append(host)
        for host, error in errors.items():
            text = error.what
            if error.why:
                text = f"{error.what}: {error.why}"
            said.setdefault(text, []).append(host)
        lines = []
        for text, names in said.items():
            line = f"{_few(names)}: {text}"
            lines.append(line.lstrip(": "))
        what = f"no host has a place for {wish.request.name}"
        why = "\n".join(lines)
        step = "add a [[host]], ask for less, widen its hosts and labels, or leave a model out"
        return HostError(what, why, step)

    def placement(self) -> Placement:
        """All that was placed, in the order of the wishes."""
        placed = {}
        refused = {}
        for wish in self.wishes:
            name = wish.request.name
            if name in self.placed:
                placed[name] = self.placed[name]
            if name in self.refused:
                refused[name] = self.refused[name]
        offers = {}
        for seat in self.seats:
            offers[seat.site.name] = seat.facts.offer
        warnings = (
            *_together_warnings(self.wishes, placed),
            *_context_warnings(self.wishes, placed),
        )
        return Placement(placed, refused, warnings, tuple(self.surplus), offers)


def _without_name(problem: str, host: str) -> str:
    """A problem as it is said behind the name of its host.

    >>> _without_name("gpu1 does not answer", "gpu1"), _without_name("was not asked", "gpu1")
    ('does not answer', 'was not asked')
    """
    for start in (f"{host}: ", f"{host} "):
        if problem.startswith(start):
            return problem[len(start) :]
    return problem


def _refusal(wish: Wish, seat: _Seat) -> str:
    """Why a host may not run a copy, "" when it may."""
    if not seat.site.name:  # a site without [[host]] is this machine
        return ""
    if seat.site.drain or seat.facts.drained:
        return "is drained"
    return wish.placing.refuses(seat.site)


def _kinds_of(seats: Sequence[_Seat]) -> List[List[_Seat]]:
    """Idle hosts, those that are alike together."""
    alike: Dict[int, List[_Seat]] = {}
    for seat in seats:
        if seat.is_idle:
            alike.setdefault(seat.shape, []).append(seat)
    return list(alike.values())


def _group_before(name: str, seats: Sequence[_Seat]) -> List[_Seat]:
    """The hosts that a group had, in its order, if all of them can be had again; else none. It is
    one group, too, when a member has died."""
    members: Dict[int, _Seat] = {}
    nodes: Tuple[str, ...] = ()
    for seat in sorted(seats, key=lambda one: one.own(name) is None):
        plan = seat.before.get(name)
        if plan is None or not plan.nodes:
            continue
        if not (seat.own(name) or seat.is_idle):
            continue
        nodes = nodes or plan.nodes
        if plan.nodes == nodes:
            members[plan.node_rank] = seat
    ranks = sorted(members)
    if len(ranks) < len(nodes):
        return []
    return [members[rank] for rank in ranks]


def _is_enough(request: Request, plan: Plan) -> bool:
    """Whether a plan holds a useful context, or what was asked for."""
    if not plan.max_model_len:
        return True
    demand = demand_of(request.facts, request.options)
    return plan.max_model_len >= demand.length


def _few(names: Sequence[str]) -> str:
    """
    >>> _few(["a", "b", "c", "d"]), _few(["a", "b"])
    ('a, b and 2 more', 'a, b')
    """
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def _copies_of(
    wishes: Sequence[Wish], placed: Mapping[str, Placed]
) -> Dict[str, List[Tuple[str, Placed]]]:
    copies: Dict[str, List[Tuple[str, Placed]]] = {}
    for wish in wishes:
        name = wish.request.name
        if wish.model and name in placed:
            copies.setdefault(wish.model, []).append((name, placed[name]))
    return copies


def _together_warnings(wishes: Sequence[Wish], placed: Mapping[str, Placed]) -> Iterator[str]:
    """Copies that one host takes with it."""
    for copies in _copies_of(wishes, placed).values():
        at: Dict[str, List[str]] = {}
        for name, one in copies:
            for host in one.hosts:
                at.setdefault(host, []).append(name)
        for host, names in at.items():
            if host and len(names) > 1:
                yield f"{', '.join(names)} are all on {host}: when it fails, all of them do"


def _context_warnings(wishes: Sequence[Wish], placed: Mapping[str, Placed]) -> Iterator[str]:
    """Copies of one model that do not take the same requests."""
    for model, copies in _copies_of(wishes, placed).items():
        lengths = {name: one.plans[0].max_model_len for name, one in copies}
        if len(set(lengths.values())) > 1:
            least = min(lengths.values())
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            yield f"copies of {model} hold contexts that differ ({told}): max_model_len = {least}"


def _with_holders(error: HfshipError, request: Request, taken: Sequence[Plan]) -> HfshipError:
    """The error with what the other models of the list were given."""
    holders = []
    for plan in taken:
        if not plan.gpus:
            continue
        gpus = ", ".join(plan.gpu_names)
        share = plan.gpu_memory_utilization
        holder = f"{plan.name} is given {gpus}, a share of {share:g}"
        holders.append(holder)

    if not holders or not isinstance(error, HostError):
        return error
    lines = [error.why, *holders]
    why = "\n".join(lines)
    share_them = "let two share their GPUs: gpu_memory_utilization = 0.45 for both"
    step = f"{error.next_step}\nor leave {request.name} out, or {share_them}"
    return HostError(error.what, why.strip(), step)


def pinned(request: Request, placement: Placement) -> Request:
    """The request for the very GPUs and the port that a model was given among the others.

    Raises the error of a model that found no place.
    """
    error = placement.refused.get(request.name)
    if error:
        raise error
    plan = placement.plans.get(request.name)
    if plan is None:
        return request
    options = replace(request.options, gpus=plan.gpus, port=plan.port)
    return replace(request, options=options)
