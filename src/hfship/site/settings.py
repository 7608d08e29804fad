# SPDX-License-Identifier: Apache-2.0
"""What a models file says of a site: its tables [gateway], [monitoring], [[key]] and [[schedule]].

Pure: values of a file that holds no mistake in, frozen values out.
"""

from __future__ import annotations

import re
import time
from typing import Any, Dict, Optional, Tuple

from hfship.base.errors import UsageError
from hfship.base.settings import ListedModel, ModelsFile, known_fields, parse_size
from hfship.base.values import dataclass
from hfship.site.terms import ALWAYS, LEAST_CONNECTIONS, MIB, PLAIN_PORT, TLS_PORT

KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_DAY_S = 86400
_UNITS_S = {"m": 60, "h": 3600, "d": _DAY_S, "w": 7 * _DAY_S}


@dataclass(frozen=True)
class GatewaySettings:
    """[gateway]: where clients come in. A port of 0 is 8080, with a certificate 8443."""

    host: str = "0.0.0.0"
    port: int = 0
    http_port: int = 0  # sends clients to the port with TLS
    tls_cert: str = ""
    tls_key: str = ""
    address: str = ""  # ADDRESS/BITS that keepalived moves between the hosts with a gateway
    image: str = ""
    max_body: int = 4 * MIB
    max_upload: int = 64 * MIB
    timeout: int = 3600  # seconds between two bytes of an answer

    @property
    def published_port(self) -> int:
        """The port that clients use."""
        usual = TLS_PORT if self.tls_cert else PLAIN_PORT

        return self.port or usual


@dataclass(frozen=True)
class MonitoringSettings:
    """[monitoring]: what watches the site, and who hears of it."""

    host: str = "127.0.0.1"
    prometheus_port: int = 9090
    grafana_port: int = 3000
    retention: str = "30d"
    prometheus_image: str = ""
    grafana_image: str = ""
    alertmanager_image: str = ""
    node_exporter_image: str = ""
    dcgm_image: str = ""
    webhook: str = ""
    mail_to: str = ""
    mail_from: str = ""
    smtp: str = ""  # HOST:PORT


@dataclass(frozen=True)
class Schedule:
    """[[schedule]]: when a model takes the place of another; `at` is a systemd OnCalendar."""

    at: str
    model: str
    instead_of: str


@dataclass(frozen=True)
class Copies:
    """How many of a model run. `standby` ones come on top of `replicas`."""

    replicas: int = 1
    standby: int = 0
    affinity: str = LEAST_CONNECTIONS
    mode: str = ALWAYS

    def deployments(self, name: str) -> Tuple[str, ...]:
        """The names of its deployments: the first has the model's own, so that a second one later
        leaves it alone.

        >>> Copies(replicas=2, standby=1).deployments("m")
        ('m', 'm.2', 'm.3')
        """
        more = [f"{name}.{number}" for number in range(2, self.replicas + self.standby + 1)]
        return (name, *more)


def gateway_settings(file: ModelsFile) -> Optional[GatewaySettings]:
    """[gateway]; None where the file has none."""
    if "gateway" not in file.tables:
        return None

    values = dict(file.tables["gateway"])
    for name in ("max_body", "max_upload"):
        if name in values:
            values[name] = parse_size(values[name])

    for name in ("tls_cert", "tls_key"):
        if name in values:
            values[name] = str(file.path.parent.absolute() / values[name])

    return GatewaySettings(**known_fields(GatewaySettings, values))


def monitoring_settings(file: ModelsFile) -> Optional[MonitoringSettings]:
    """[monitoring]; None where the file has none."""
    if "monitoring" not in file.tables:
        return None

    return MonitoringSettings(**known_fields(MonitoringSettings, file.tables["monitoring"]))


def site_images(file: ModelsFile) -> Tuple[str, ...]:
    """The images that [gateway] and [monitoring] name, as docker calls them."""
    named = []
    gateway, monitoring = gateway_settings(file), monitoring_settings(file)
    if gateway:
        named.append(gateway.image)
    if monitoring:
        named += [
            monitoring.prometheus_image,
            monitoring.grafana_image,
            monitoring.alertmanager_image,
            monitoring.node_exporter_image,
            monitoring.dcgm_image,
        ]
    return tuple(dict.fromkeys(name for name in named if name))


def site_lacks(file: ModelsFile) -> Tuple[str, ...]:
    """The keys that name no image, where a site needs one: nobody can know which shall travel."""
    lacking = []
    gateway = gateway_settings(file)
    monitoring = monitoring_settings(file)
    if gateway and not gateway.image:
        lacking.append("[gateway] image")
    if monitoring and not monitoring.prometheus_image:
        lacking.append("[monitoring] prometheus_image")
    return tuple(lacking)


def schedules(file: ModelsFile) -> Tuple[Schedule, ...]:
    """All [[schedule]]."""
    tables = file.tables.get("schedule", ())
    return tuple(Schedule(**known_fields(Schedule, table)) for table in tables)


def copies_of(model: ListedModel) -> Copies:
    """How many of a model run."""
    return Copies(**known_fields(Copies, model.copies))


# -- keys


def key_rights(file: ModelsFile, now: float) -> Dict[str, Dict[str, Any]]:
    """What the [[key]]s say, by name: the fields of AccessKey that each sets."""
    rights = {}
    for table in file.tables.get("key", ()):
        fields = {name: table[name] for name in ("streams", "ops") if name in table}
        if "models" in table:
            fields["models"] = tuple(table["models"])
        if "rate" in table:
            fields["rate"] = rate_per_minute(table["rate"])
        if "expires" in table:
            fields["expires"] = expiry(table["expires"], now)
        rights[table["name"]] = fields
    return rights


def key_name(text: str) -> str:
    """A name for a key. Raises UsageError."""
    if not KEY_NAME.match(text):
        why = "names have letters, digits, '.', '_' and '-', and start with a letter or digit"
        raise UsageError(f"{text[:40]!r} cannot be the name of a key", why, "")

    return text


def rate_per_minute(text: str) -> int:
    """The requests a minute of a rate. Raises UsageError.

    >>> rate_per_minute("60/min"), rate_per_minute("2/s"), rate_per_minute("10")
    (60, 120, 10)
    """
    match = re.match(r"([1-9]\d{0,6})(?:/(s|sec|min|m))?\Z", text)
    if match is None:
        raise UsageError(f"{text[:40]!r} is not a rate", "", "write it like 60/min or 2/s")

    number, unit = match.groups()
    if unit in ("s", "sec"):
        return int(number) * 60

    return int(number)


def expiry(text: str, now: float) -> int:
    """When a key ends, as Unix time: a day (to its end, in UTC), or so long from `now` on. Raises
    UsageError.

    >>> expiry("90d", 0), expiry("1970-01-02", 0)
    (7776000, 172800)
    """
    age = re.match(r"([1-9]\d{0,5})([mhdw])\Z", text)
    if age:
        return int(now) + int(age[1]) * _UNITS_S[age[2]]

    try:
        import calendar

        day = time.strptime(text, "%Y-%m-%d")
        return calendar.timegm(day) + _DAY_S
    except ValueError as exc:
        step = "write it like 90d, 12h or 2027-01-31"
        raise UsageError(f"{text[:40]!r} is not when a key ends", "", step) from exc
