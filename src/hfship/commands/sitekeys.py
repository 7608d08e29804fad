# SPDX-License-Identifier: Apache-2.0
"""What a models file may say of a site: keys of its tables, and mistakes that only the whole file
shows.

Promises: what would start and then not work is refused before anything is touched.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_interface
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Mapping, Tuple

from hfship.base.errors import UsageError, nearest
from hfship.base.modelsfile import Key, Mistake
from hfship.base.settings import parse_size
from hfship.commands.hostkeys import host_key, host_mistakes, placing_keys
from hfship.commands.options import ip_address, port_number, positive_number
from hfship.site.settings import copies_of, expiry, key_name, rate_per_minute
from hfship.site.terms import AFFINITIES, MODES

if TYPE_CHECKING:
    from hfship.base.settings import ListedModel, ModelsFile

MOST_COPIES = 64


def _whole(about: str, least: int, most: int) -> Key:
    """A key whose value is a whole number from `least` to `most`."""

    def read(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"{value} is not from {least} to {most}")
        return value

    return Key("integer", about, read)


def _port(about: str) -> Key:
    return Key("integer", about, lambda value: port_number(str(value)))


def _text(about: str) -> Key:
    return Key("string", about, one_line)


def one_line(text: str) -> str:
    """A text that a configuration can carry. Raises ValueError."""
    if not text.isprintable() or '"' in text or "\\" in text:
        raise ValueError("is not one line of text without quotes")

    return text


def _size(about: str, most: str) -> Key:
    def read(text: str) -> int:
        size = parse_size(text)
        if not 1024 <= size <= parse_size(most):
            raise ValueError(f"{text} is not from 1KiB to {most}")

        return size

    return Key("string", about, read)


def _names(value: List[Any]) -> List[str]:
    if not value or not all(isinstance(item, str) for item in value):
        raise ValueError("expects names of models")
    return value


def _seconds(value: int) -> int:
    seconds: int = positive_number(str(value))
    return seconds


def _address(text: str) -> str:
    if "/" not in text:
        raise ValueError(f"{text!r:.50} is not like 10.0.0.100/24")
    return str(ip_interface(text))


def gateway_key() -> Key:
    """[gateway]."""
    inside = {
        "host": Key("string", "address to listen on (default: 0.0.0.0, all)", ip_address),
        "port": _port("for clients (default: 8080; 8443 with a certificate)"),
        "http_port": _port("with a certificate: sends clients from here to the port with TLS"),
        "tls_cert": _text("file of the certificate and its chain, in PEM"),
        "tls_key": _text("file of its key, in PEM (default: in the file of the certificate)"),
        "address": Key("string", "one address of all gateways, like 10.0.0.100/24", _address),
        "image": _text("image of HAProxy (default: the newest that docker has)"),
        "max_body": _size("largest body without the model in the path (default: 4MiB)", "64MiB"),
        "max_upload": _size("largest body with the model in the path (default: 64MiB)", "4GiB"),
        "timeout": Key("integer", "seconds between two bytes of an answer (3600)", _seconds),
    }
    return Key("object", "one address for all models", inside=inside)


def monitoring_key() -> Key:
    """[monitoring]."""

    def retention(text: str) -> str:
        if not text[:-1].isdigit() or text[-1:] not in ("h", "d", "w", "y"):
            raise ValueError(f"{text!r} is not a time like 30d")
        return text

    inside = {
        "host": Key("string", "address to listen on (default: 127.0.0.1)", ip_address),
        "prometheus_port": _port("of Prometheus (default: 9090)"),
        "grafana_port": _port("of Grafana (default: 3000)"),
        "retention": Key("string", "how long figures are kept (default: 30d)", retention),
        "prometheus_image": _text("image of Prometheus (default: the newest that docker has)"),
        "grafana_image": _text("image of Grafana (default: the newest that docker has)"),
        "alertmanager_image": _text("image of Alertmanager (default: the newest here)"),
        "node_exporter_image": _text("image of node exporter (default: the newest here)"),
        "dcgm_image": _text("image of DCGM's exporter: GPUs"),
        "webhook": _text("address that alerts are posted to"),
        "mail_to": _text("address that alerts are mailed to"),
        "mail_from": _text("address that they come from"),
        "smtp": _text("HOST:PORT of the mail server"),
    }
    return Key("object", "Prometheus and Grafana beside the models", inside=inside)


def access_key_key() -> Key:
    """[[key]]."""
    inside = {
        "name": Key("string", "of a key that `hfship key add` makes", key_name),
        "models": Key("array", "names of models (default: all)", _names),
        "rate": Key(
            "string", "accepted requests, like 60/min (default: no limit)", rate_per_minute
        ),
        "streams": _whole("requests at a time (default: no limit)", 1, 100_000),
        "expires": Key("string", "last day, like 2027-01-31", _last_day),
        "ops": Key("boolean", "may see the page of the site"),
    }
    return Key("tables", "what a key of the gateway may do", inside=inside)


def _last_day(text: str) -> int:
    """A file is read again and again: a time from now on would never come."""
    if "-" not in text:
        raise UsageError(f"{text[:40]!r} is not a day", "", "write it like 2027-01-31")

    return expiry(text, 0)


def schedule_key() -> Key:
    """[[schedule]]."""
    inside = {
        "at": _text("when, as OnCalendar of systemd.time(7), like 22:00 or Mon..Fri 08:00"),
        "model": _text("the model that is started"),
        "instead_of": _text("the model that is stopped before"),
    }
    return Key("tables", "when a model on demand takes the place of another", inside=inside)


def site_keys() -> Dict[str, Key]:
    """The tables of a site, by name."""
    return {
        "gateway": gateway_key(),
        "monitoring": monitoring_key(),
        "key": access_key_key(),
        "schedule": schedule_key(),
        "host": host_key(),
    }


def copy_keys() -> Dict[str, Key]:
    """Keys of [[model]]: how many of it run, and where."""
    return {
        "replicas": _whole("how many share the requests (default: 1)", 1, MOST_COPIES),
        "standby": _whole("how many more wait, loaded, for these to fail (0)", 0, MOST_COPIES),
        "affinity": Key("string", "which replica gets a request", choices=AFFINITIES),
        "mode": Key(
            "string", "always, or on-demand: started by hand or [[schedule]]", choices=MODES
        ),
        **placing_keys(),
    }


# -- mistakes that only the whole file shows


def site_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    """What does not go together in a models file."""
    yield from _gateway_mistakes(file)
    yield from _monitoring_mistakes(file)
    yield from _name_mistakes(file)
    yield from _port_mistakes(file)
    yield from _gpu_mistakes(file)
    yield from _key_mistakes(file)
    yield from _schedule_mistakes(file)
    yield from host_mistakes(file)


def _gateway_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    gateway = file.tables.get("gateway")
    if gateway is None:
        for index, model in enumerate(file.models):
            copies = copies_of(model)
            if copies.replicas + copies.standby > 1:
                yield Mistake(("model", index), "has replicas, but there is no [gateway]")
        for name in ("key", "schedule"):
            if name in file.tables:
                yield Mistake((name,), "needs a [gateway]")
        return

    for name in ("tls_key", "http_port"):
        if name in gateway and "tls_cert" not in gateway:
            yield Mistake(("gateway", name), "needs tls_cert")
    if "http_port" in gateway and gateway["http_port"] == gateway.get("port", 8443):
        yield Mistake(("gateway", "http_port"), "is the port with TLS, too")


def _monitoring_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    monitoring = file.tables.get("monitoring", {})
    tells = {"webhook", "mail_to"} & set(monitoring)
    for name in ("alertmanager_image", "mail_from", "smtp"):
        if name in monitoring and not tells:
            yield Mistake(("monitoring", name), "needs somebody to tell: webhook or mail_to")
    if "monitoring" in file.tables and "gateway" not in file.tables:
        yield Mistake(("monitoring",), "needs a [gateway]: what is watched is behind it")


def api_names(model: ListedModel) -> List[str]:
    """The names that clients may call a model by.

    >>> from hfship.base.settings import ListedModel
    >>> api_names(ListedModel("m", "org/m@main", serve={"aliases": ["chat"]}))
    ['m', 'org/m', 'chat']
    """
    names = list(model.serve.get("served_model_name", ()))
    if not names:
        repo = model.repo.partition("@")[0]
        names = [model.deployment, *filter(None, [repo])]
    return list(dict.fromkeys([*names, *model.serve.get("aliases", ())]))


def _name_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    """Names by which the gateway could not tell models apart."""
    if "gateway" not in file.tables:
        return
    first: Dict[str, str] = {}
    for index, model in enumerate(file.models):
        for name in api_names(model):
            other = first.setdefault(name, model.name)
            if other != model.name:
                yield Mistake(("model", index), f"clients would call {other} {name}, too")
            if not name.isprintable() or " " in name:
                yield Mistake(("model", index), f"the gateway carries no name like {name!r}")
        if model.deployment.lower() == "v1":
            yield Mistake(("model", index), "v1 is no name behind a gateway: paths start so")


def _port_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    taken: Dict[int, str] = {}
    gateway = file.tables.get("gateway", {})
    for name in ("port", "http_port"):
        if name in gateway:
            taken[gateway[name]] = "the gateway"
    if "host" in file.tables:
        return  # each of a host of its own
    for index, model in enumerate(file.models):
        port = model.serve.get("port")
        if port is None:
            continue
        other = taken.setdefault(port, model.name)
        if other != model.name:
            yield Mistake(("model", index, "serve", "port"), f"{other} has {port}, too")


def _gpu_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    """GPUs that are given away more than once, and too few for the copies of a model."""
    for index, model in enumerate(file.models):
        path = ("model", index, "serve", "gpus")
        for gpu, count in Counter(_named_gpus(model)).items():
            if count > 1:
                yield Mistake(path, f"has {gpu} twice")
    if "host" not in file.tables:  # else those of each host are meant
        yield from _mistakes_of_one_host(file)


def _named_gpus(model: ListedModel) -> List[str]:
    return [str(gpu) for gpu in model.serve.get("gpus", ()) if gpu != "all"]


def _mistakes_of_one_host(file: ModelsFile) -> Iterator[Mistake]:
    """GPUs of models on demand may be the same: they take turns."""
    shares: Dict[str, List[Tuple[str, float]]] = {}
    for index, model in enumerate(file.models):
        path = ("model", index, "serve", "gpus")
        gpus = _named_gpus(model)
        copies = copies_of(model)
        count = copies.replicas + copies.standby
        needed = count
        for kind in ("tensor", "pipeline", "data"):
            needed *= model.serve.get(f"{kind}_parallel_size", 1)
        if gpus and needed > len(gpus) and count > 1:
            yield Mistake(path, f"its copies need {needed} GPUs, these are {len(gpus)}")
        if copies.mode != "always":
            continue
        share = model.serve.get("gpu_memory_utilization", 0.9)
        for gpu in dict.fromkeys(gpus):
            yield from _share_mistakes(shares.setdefault(gpu, []), gpu, model.name, share, path)


def _share_mistakes(
    taken: List[Tuple[str, float]],
    gpu: str,
    name: str,
    share: float,
    path: Tuple[Any, ...],
) -> Iterator[Mistake]:
    if sum(one for _, one in taken) + share > 1:
        others = ", ".join(f"{one:g} by {other}" for other, one in taken)
        what = f"{share:g} of GPU {gpu} is asked for, besides {others}"
        yield Mistake(path, f"{what}: set gpu_memory_utilization of each")
    taken.append((name, share))


def _key_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    known = _known_names(file)
    seen = set()
    for index, table in enumerate(file.tables.get("key", ())):
        name = table.get("name")
        if name is None:
            yield Mistake(("key", index), "has no name")
        elif name in seen:
            yield Mistake(("key", index, "name"), f"another key is called {name}, too")
        seen.add(name)
        for model in table.get("models", ()):
            if model not in known and model != "*":
                hint = nearest(model, known)
                yield Mistake(("key", index, "models"), f"no model is called {model}{hint}")


def _known_names(file: ModelsFile) -> List[str]:
    names = [name for model in file.models for name in (model.name, *api_names(model))]
    return list(dict.fromkeys(names))


def _schedule_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    modes = {model.name: copies_of(model).mode for model in file.models}
    for index, table in enumerate(file.tables.get("schedule", ())):
        yield from _missing(("schedule", index), table, ("at", "model", "instead_of"))
        for name in ("model", "instead_of"):
            model = table.get(name)
            path = ("schedule", index, name)
            if model is None:
                continue
            if model not in modes:
                yield Mistake(path, f"no model is called {model}{nearest(model, modes)}")
            elif modes[model] != "on-demand":
                yield Mistake(path, f'{model} is not one of mode = "on-demand"')


def _missing(
    path: Tuple[Any, ...], table: Mapping[str, Any], names: Iterable[str]
) -> Iterator[Mistake]:
    for name in names:
        if name not in table:
            yield Mistake(path, f"has no {name}")
