# SPDX-License-Identifier: Apache-2.0
"""`hfship serve --models FILE` with [[host]]s: the models of the file on the hosts of the file.

All hosts are asked, every copy is placed, and then each host is told what is its part: archives and
images that it lacks are brought, the plan is put there, and its own hfship proves, starts and waits
(commands/serve_planned.py). The gateway of this machine stands before all of them.

Promises: one control host at a time (ops/hostlease.py); a host that fails or is silent holds no
other up, and what runs there is left as it is; killed anywhere and run again, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shlex
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from hfship.base.errors import (
    Exit,
    HfshipError,
    HostError,
    command_line,
    error_row,
)
from hfship.base.locks import lock_within
from hfship.base.report import Reporter
from hfship.base.text import table
from hfship.base.values import replace
from hfship.commands.gateway_hosts import (
    NOTE_PATIENCE_S,
    end_gateways,
    gateway_hosts,
    keepalived_files,
    read_set,
    send_now,
    send_sets,
    telling,
    without_copy,
)
from hfship.commands.group_start import GroupStart
from hfship.commands.hosts import hosts_called
from hfship.commands.hosts_carry import speaker
from hfship.commands.names import named_archives
from hfship.commands.results import exit_of_list
from hfship.commands.serve_model import read_request
from hfship.commands.serve_planned import PLANNED_FOLDER
from hfship.commands.serve_site import address_of, put_gateway
from hfship.hub.registry_protocol import parse_reference
from hfship.ops.bring import bring
from hfship.ops.hostlease import leased
from hfship.ops.inventory import Inventory, failure_lines, take_inventory
from hfship.ops.push import PUSH_JOBS, files_to_push
from hfship.ops.reach import FarHost, at_once
from hfship.serve.cards import assumed_gpus
from hfship.serve.files import PLAN_FILE, env_text, key_in_env, plan_text
from hfship.serve.survey import Purpose, decide
from hfship.serve.terms import Host, Plan
from hfship.site.everywhere import Step, Work, reached, with_pool, work_of
from hfship.site.gateway_files import CONTAINER
from hfship.site.gateway_run import find_image, read_certificate, require_network
from hfship.site.gatewayset import GatewaySet
from hfship.site.groups import DOWN, STOP, UP, group_steps, require_same
from hfship.site.hosts import HostFacts, SiteHost, placing_of
from hfship.site.placement import gateway_models, place_of
from hfship.site.record import read_record, write_record
from hfship.site.rolling import await_up, drained
from hfship.site.settings import copies_of, gateway_settings
from hfship.site.spread import Placement, Wish, place
from hfship.site.store import gateway_folder, read_gateway, write_files
from hfship.site.untold import forget_untold, note_untold

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile
    from hfship.commands.context import Context
    from hfship.serve.survey import Request
    from hfship.serve.terms import Image
    from hfship.site.terms import GatewayModel

ANSWER_S = 7200.0  # without a word from a host that loads a model: it says something each 15 s
Answers = Dict[str, Union[Any, HfshipError]]


def serve_on_hosts(context: Context, runs: Mapping[str, Context], gone: Sequence[str] = ()) -> Exit:
    """Serve the models on the hosts of the models file. What runs on hosts that are silent stays
    there, but for those that are `gone`: their copies are placed on others."""
    assert context.file
    hosts = hosts_called(context.file, [])
    if context.args.plan:
        if context.args.assume_gpus:
            inventory = assumed_inventory(hosts, context.args.assume_gpus)
        else:
            inventory = take_inventory(far_hosts(hosts, context.reporter))
        site = Everywhere(context, hosts, inventory, gone)
        site.plan(runs)
        return site.told()

    lost: List[str] = []
    with leased(far_hosts(hosts, context.reporter), lost.append):
        inventory = take_inventory(far_hosts(hosts, context.reporter))
        site = Everywhere(context, hosts, inventory, gone)
        site.plan(runs)
        site.lost = lost
        return site.serve()


def assumed_inventory(hosts: Sequence[SiteHost], spec: str) -> Inventory:
    """Hosts that are idle and have these GPUs each: a site can be planned before it is bought."""
    facts = {}
    for one in hosts:
        gpus = assumed_gpus(spec)
        offer = Host(gpus)
        facts[one.name] = HostFacts(one.name, offer=offer)
    return Inventory(facts, {})


def far_hosts(hosts: Sequence[SiteHost], reporter: Reporter) -> List[FarHost]:
    """The hosts, to be told something; what they say is told under their names."""
    return [FarHost(one, speaker(one.name, reporter)) for one in hosts]


class Everywhere:
    """One run of `serve` on several hosts. `lost` are hosts that another control host took."""

    def __init__(
        self,
        context: Context,
        hosts: Sequence[SiteHost],
        inventory: Inventory,
        gone: Sequence[str] = (),
    ) -> None:
        self.context, self.hosts, self.inventory, self.gone = context, hosts, inventory, gone
        self.reporter = context.reporter
        self.by_name = {one.name: one for one in self.hosts}
        self.record = read_record(self.context.settings.deploy_dir)
        self.failures: List[Tuple[str, HfshipError]] = list(self.inventory.failures.items())
        self.folders: Dict[str, str] = {}
        self.models: Dict[str, str] = {}  # the model of each deployment
        self.placement = Placement({}, {})
        self.work = Work()
        self.lost: List[str] = []
        self.gateways: List[str] = []
        self.files: Dict[str, Dict[str, str]] = {}
        self._note_hosts_without_docker()
        for name, error in self.failures:
            [line] = failure_lines({name: error})
            if error.next_step:
                step = error.next_step.replace("\n", "\n        ")
                line += f"\n  next  {step}"
            self.reporter.warn(line)

    def _note_hosts_without_docker(self) -> None:
        """Hosts that answer, and whose docker does not: nothing can be changed there."""
        for name, facts in self.inventory.facts.items():
            if facts.silent or facts.answers or self._is_drained(name):
                continue
            step = f"on {name}: {facts.next_step}; then run the same command again"
            error = HostError(f"{name}: {facts.problem}", "", step)
            self.failures.append((name, error))

    def _is_drained(self, name: str) -> bool:
        return self.by_name[name].drain or self.inventory.facts[name].drained

    # -- what is to be done

    def plan(self, runs: Mapping[str, Context]) -> None:
        """Place all copies that are wished for."""
        wishes = list(self._wishes(runs))
        facts = with_pool(self.inventory.facts)
        quiet = Reporter("none", -1)

        def plan_of(request: Request, left: Host, previous: Optional[Plan]) -> Plan:
            return decide(request, left, previous, quiet, _as_told)

        self.placement = place(wishes, self.hosts, facts, plan_of)
        self.work = work_of(self.placement, self.by_name, facts, self.folders)

    def _wishes(self, runs: Mapping[str, Context]) -> Iterator[Wish]:
        """The copies that are wished for; those on a host that is silent, or whose docker is, stay
        there."""
        file = self.context.file
        assert file
        for name, run in runs.items():
            place = place_of(file, name)
            first = place.first if place else name
            self.models[name] = first
            if self._stays(name):
                continue
            try:
                request = self._request(run)
            except HfshipError as exc:
                self.failures.append((name, exc))
                self.reporter.error(exc)
                continue
            listed = next(one for one in file.models if one.deployment == first)
            copies = copies_of(listed)
            standby = name in copies.deployments(first)[copies.replicas :]
            yield Wish(request, first, placing_of(listed), standby)

    def _stays(self, name: str) -> bool:
        """Whether a copy is where nothing can be changed now; said."""
        for host in self.record.places.get(name, ()):
            facts = self.inventory.facts.get(host)
            if facts is None or facts.answers or host in self.gone:
                continue
            if facts.silent:
                self.reporter.warn(f"{name} stays on {host}, which does not answer")
                return True
            if not self._is_drained(host):
                self.reporter.warn(f"{name} stays on {host}, whose docker does not answer")
                return True
        return False

    def _request(self, run: Context) -> Request:
        args = argparse.Namespace(**{**vars(run.args), "plan": True})
        quiet = replace(run, args=args, reporter=Reporter("none", -1))
        [word] = run.args.names
        request = read_request(quiet, word)
        self.folders[request.name] = request.model.folder.resolve().name
        return replace(request, network="", purpose=Purpose.SHOW)

    def told(self) -> Exit:
        """--plan: show what would be."""
        notes = [f"note  {line}" for line in self.placement.notes()]
        text = "\n".join([self.placement.text(), "", *notes, self.work.text()])
        value = [{**placed_row(step), "state": "planned"} for step in self.work.steps]
        value += [{"name": n, **error_row(exc)} for n, exc in self.placement.refused.items()]
        self.reporter.result_of(text, value)
        failures = [*self.placement.refused.values(), *(exc for _, exc in self.failures)]
        return exit_of_list(exc.code for exc in failures)

    # -- doing it

    def serve(self) -> Exit:
        """Bring, start, prove, put the gateway before it, and end what has no place any more."""
        file, deploy_dir = self.context.file, self.context.settings.deploy_dir
        assert file
        settings = gateway_settings(file)
        if settings:
            certificate = read_certificate(settings.tls_cert, settings.tls_key)
            image = find_image(settings.image)
            require_network()
        self.reporter.info(self.placement.text())
        for warning in self.placement.warnings:
            self.reporter.warn(warning)
        for name, error in self.placement.refused.items():
            self.failures.append((name, error))
            self.reporter.error(error)
        keys = {**self.record.keys, **self._new_keys()}
        for key in keys.values():
            self.reporter.hide(key)
        self.record = replace(self.record, keys=keys)
        write_record(deploy_dir, self.record)

        self._bring_all()
        self._begin()

        def put() -> None:
            if settings:
                models = reached(self._gateway_models(file), self.record.addresses)
                put_gateway(
                    self.context,
                    settings,
                    image,
                    certificate,
                    models,
                    keys,
                )
                wanted = GatewaySet(settings, models, (), keys, certificate)
                self._put_elsewhere(file, wanted)

        put()
        self._change()
        self._end()
        put()
        address = ""
        if settings:
            address = address_of(settings)
        return self._summary(address)

    def _new_keys(self) -> Dict[str, str]:
        """Keys of models that are not remembered: as a host has them that runs the model, which
        another control host may have started; else new ones."""
        found = {}
        for model in set(self.models.values()) - set(self.record.keys):
            copies = {name for name, of in self.models.items() if of == model}
            found[model] = self._key_there(copies) or new_key()
        return found

    def _key_there(self, copies: Set[str]) -> str:
        for facts in self.inventory.facts.values():
            for name in copies & facts.running:
                [host] = self._far([facts.name])
                path = f"{host.host.folders['deploy_dir']}/{name}/.env"
                done = host.sh(f"cat -- {shlex.quote(path)}")
                if not done.code:
                    return key_in_env(done.out)
        return ""

    def _gateway_models(self, file: ModelsFile) -> Sequence[GatewayModel]:
        """The models whose copies are known; of one on a silent host as the gateway has it now."""
        plans = {step.name: step.plans[step.head] for step in self.work.steps}
        for facts in self.inventory.facts.values():
            for plan in facts.plans:
                plans.setdefault(plan.name, plan)
        before = read_gateway(gateway_folder(self.context.settings.deploy_dir))
        models = before.models if before else ()
        for model in models:
            for copy in model.replicas:
                plans.setdefault(copy.name, Plan(name=copy.name, served_names=model.names))
        known = {name: plan for name, plan in plans.items() if name in self.record.addresses}
        return gateway_models(file, known)

    def _put_elsewhere(self, file: ModelsFile, wanted: GatewaySet) -> None:
        """The same gateway on the other hosts that have one."""
        named = gateway_hosts(file, self.hosts)
        hosts = [one for one in named if one.name not in self._failed]
        deploy_dir = self.context.settings.deploy_dir
        self._end_gateways([one.name for one in named])
        self.gateways = [one.name for one in hosts]
        self.files = keepalived_files(wanted.settings, hosts, self.inventory.facts, deploy_dir)
        write_files(gateway_folder(deploy_dir), self.files.get("", {}), 0o644)
        if not named:
            return
        with lock_within(deploy_dir, NOTE_PATIENCE_S):
            note_untold(deploy_dir, [one.name for one in named], ())
        failures = send_now(deploy_dir, self._far(self.gateways), self.files, wanted)
        for name, error in failures.items():
            self._fail([name], error)

    def _end_gateways(self, named: Sequence[str]) -> None:
        """Stop the gateways of hosts whose roles no longer name it. Those that cannot be reached
        now stay known: keys that are revoked must be told to them, too. Of a host that the models
        file no longer has nobody knows how it is reached: that is said, this once."""
        deploy_dir = self.context.settings.deploy_dir
        left, lost = [], []
        for name in self.record.gateways:
            if name not in self.by_name:
                lost.append(name)
            elif name not in named:
                left.append(name)
        for name in lost:
            said = f"{name} left the models file with a gateway, which takes keys as they were"
            self.reporter.warn(f"{said}: on {name}: docker rm -f {CONTAINER}")
        reached = [name for name in left if name not in self._failed]
        failures = end_gateways(self._far(reached))
        for name, error in failures.items():
            self._fail([name], error)
        ended = set(reached).difference(failures)
        for name in sorted(ended):
            self.reporter.info(f"{name}: its gateway was stopped, and its keys were removed")
        known = [*named, *(name for name in left if name not in ended)]
        self.record = replace(self.record, gateways=tuple(known))
        write_record(deploy_dir, self.record)
        with lock_within(deploy_dir, NOTE_PATIENCE_S):
            forget_untold(deploy_dir, [*ended, *lost])

    @contextlib.contextmanager
    def _let_go(self, name: str) -> Iterator[None]:
        """No gateway sends requests to a copy meanwhile, if there is another one."""
        deploy_dir = self.context.settings.deploy_dir
        gateway = gateway_folder(deploy_dir)
        if self.gateways:
            with telling(deploy_dir):
                wanted = without_copy(read_set(deploy_dir), name)
                send_sets(self._far(self.gateways), wanted, self.files)
        with drained(gateway, name, self.reporter):
            yield
        if self.gateways:
            with telling(deploy_dir):
                send_sets(self._far(self.gateways), read_set(deploy_dir), self.files)
        await_up(gateway, name)

    def _bring_all(self) -> None:
        """Have the models and images on the hosts that need them."""
        wanted: Dict[str, Dict[str, List[str]]] = {}  # the word of an archive -> host -> copies
        for step in self.work.steps:
            for host, plan in step.plans.items():
                for word in self._lacks(host, step.name, plan):
                    wanted.setdefault(word, {}).setdefault(host, []).append(step.name)
        for word, copies in wanted.items():
            for host, error in self._bring(word, list(copies)).items():
                self._fail(copies[host], error)

    def _lacks(self, host: str, name: str, plan: Plan) -> Iterator[str]:
        """The words of the archives that a host lacks for a copy."""
        facts = self.inventory.facts[host]
        if self.folders[name] not in facts.models:
            yield self.folders[name]
        if plan.image_id not in {image.id for image in facts.offer.images}:
            yield parse_reference(f"docker://{plan.image}").folder_name

    def _bring(self, word: str, names: Sequence[str]) -> Dict[str, HfshipError]:
        """Have one model or image there, unpacked; the errors of hosts that do not get it."""
        settings = self.context.settings
        places = [settings.package_dir, settings.transfer_dir]
        try:
            step = command_line("hfship", "pack", word)
            archives = named_archives(word, places, step)[:1]
            files = files_to_push(archives, self.reporter)
        except HfshipError as exc:
            return dict.fromkeys(names, exc)
        self.reporter.info(f"{word}: to " + ", ".join(names))
        brought = bring(self._far(names), files, PUSH_JOBS, 0, self.reporter)
        good = [name for name in names if name not in brought.failures]
        answers = at_once(self._far(good), lambda one: one.asked("unpack", word))
        failures = dict(brought.failures)
        for name, answer in answers.items():
            if isinstance(answer, HfshipError):
                failures[name] = answer
        return failures

    def _far(self, names: Sequence[str]) -> List[FarHost]:
        return far_hosts([self.by_name[name] for name in names], self.reporter)

    def _fail(self, names: Sequence[str], error: HfshipError) -> None:
        """Note what failed for hosts or copies."""
        for name in names:
            self.failures.append((name, error))
        self.reporter.error(error)

    @property
    def _failed(self) -> Set[str]:
        return {name for name, _ in self.failures} | set(self.lost)

    def _begin(self) -> None:
        """Start what does not run yet: all hosts at once, one after the other on each."""
        by_host: Dict[str, List[Step]] = {}
        groups = []
        for step in self.work.begin:
            if step.name in self._failed:
                continue
            if len(step.plans) > 1:
                groups.append(step)
            else:
                by_host.setdefault(step.head, []).append(step)
        names = [name for name in by_host if name not in self._failed]

        def start(host: FarHost) -> Answers:
            return {step.name: self._try(host, step) for step in by_host[host.name]}

        for host, answer in at_once(self._far(names), start).items():
            if isinstance(answer, HfshipError):
                self._fail([host], answer)
                continue
            for name, result in answer.items():
                self._note(name, result)
        for step in groups:
            self._note(step.name, self._start_group(step))
        for step in (*self.work.keep, *self.work.change):
            self._remember(step)
        write_record(self.context.settings.deploy_dir, self.record)

    def _try(self, host: FarHost, step: Step) -> Union[Any, HfshipError]:
        try:
            return self._start(host, step)
        except HfshipError as exc:
            return exc

    def _start(self, host: FarHost, step: Step) -> Any:
        """Put the plan there, and have it started."""
        plan = step.plans[host.name]
        folder = f"{host.host.folders['deploy_dir']}/{PLANNED_FOLDER}/{step.name}"
        key = self.record.keys[self.models[step.name]]
        host.put(f"{folder}/.env", env_text(plan, key).encode(), 0o600)
        host.put(f"{folder}/{PLAN_FILE}", plan_text(plan).encode())
        return host.asked("serve", "--planned", step.name, silence_s=ANSWER_S)

    def _start_group(self, step: Step) -> Union[Any, HfshipError]:
        """Start a copy over several hosts: all members at once, after what is left of the group was
        stopped. Where one fails, all are stopped: what is left hangs."""
        try:
            self._prepare_group(step)
        except HfshipError as exc:
            return exc
        return self._group(step).run()

    def _prepare_group(self, step: Step) -> None:
        """Prove that all members have the same files, and stop those that are up while others are
        not. Raises HfshipError."""
        hosts = list(step.plans)
        inventory = take_inventory(self._far(hosts))
        for error in inventory.failures.values():
            raise error
        folder = self.folders[step.name]
        plan = step.plans[step.head]
        image = parse_reference(f"docker://{plan.image}").folder_name
        models = {}
        images = {}
        states = []
        for host, facts in inventory.facts.items():
            models[host] = facts.models.get(folder, "")
            ids = {one.reference: one.id for one in facts.offer.images}
            images[host] = ids.get(plan.image, "")
            states.append(UP if step.name in facts.running else DOWN)
        require_same(folder, "model", models)
        require_same(image, "image", images)
        for verb, rank in group_steps(states):
            if verb == STOP:
                [member] = self._far([hosts[rank]])
                member.asked("stop", step.name)

    def _note(self, name: str, result: Union[Any, HfshipError]) -> None:
        if isinstance(result, HfshipError):
            self.failures.append((name, result))
            self.reporter.error(result)
            return
        step = next(one for one in self.work.steps if one.name == name)
        self._remember(step)
        self.reporter.info(f"{name} answers on {' + '.join(step.plans)}, at {step.address}")

    def _remember(self, step: Step) -> None:
        places = {**self.record.places, step.name: tuple(step.plans)}
        addresses = {**self.record.addresses, step.name: step.address}
        self.record = replace(self.record, places=places, addresses=addresses)

    def _change(self) -> None:
        """Start anew what runs otherwise, one after the other, each let go of by its clients."""
        for step in self.work.change:
            if {step.name, *step.plans} & self._failed:
                continue
            self.reporter.info(f"{step.name}: waiting until its requests are answered")
            with self._let_go(step.name):
                if len(step.plans) > 1:
                    self._group(step).stop()
                    self._note(step.name, self._start_group(step))
                else:
                    [host] = self._far([step.head])
                    self._note(step.name, self._try(host, step))

    def _group(self, step: Step) -> GroupStart:
        hosts = self._far(list(step.plans))
        return GroupStart(step.name, hosts, lambda one: self._start(one, step))

    def _end(self) -> None:
        """Stop what has no place any more, when its last request is answered."""
        for host, name in self.work.end:
            if name in self._failed or host in self._failed:
                continue
            [far] = self._far([host])
            try:
                far.asked("stop", name, "--when-idle", silence_s=ANSWER_S)
            except HfshipError as exc:
                self._fail([host], exc)

    def _summary(self, address: str) -> Exit:
        """One table of all."""
        for name in self.lost:
            error = HostError(f"{name} was taken by another control host", "", "")
            self.failures.append((name, error))
        failed = dict(self.failures)
        rows, value = [], []
        for step in self.work.steps:
            found = failed.get(step.name) or failed.get(step.head)
            state = found.what if found else "answers"
            rows.append([step.name, " + ".join(step.plans), step.address, state])
            value.append(self._row(step, state))
        value += [{"name": name, **error_row(error)} for name, error in failed.items()]
        of_hosts = {name: error for name, error in failed.items() if name in self.by_name}
        lines = [table(rows, ["deployment", "host", "address", ""]), *failure_lines(of_hosts)]
        if address:
            lines.append(f"the gateway is at {address}")
        self.reporter.result_of("\n".join(filter(None, lines)), value)
        return exit_of_list(error.code for _, error in self.failures)

    def _row(self, step: Step, state: str) -> Dict[str, Any]:
        return {**placed_row(step), "state": "healthy" if state == "answers" else "failed"}


def _as_told(image: Image) -> Image:
    """An image of a host has all that is known of it."""
    return image


def placed_row(step: Step) -> Dict[str, Any]:
    """docs/json.md, "serve"."""
    return {
        "schema": "hfship-placed/1",
        "name": step.name,
        "hosts": list(step.plans),
        "address": step.address,
        "gpus": [uuid for plan in step.plans.values() for uuid in plan.gpus],
    }


def new_key() -> str:
    """An API key for the copies of a model."""
    return "sk-" + secrets.token_urlsafe(32)
