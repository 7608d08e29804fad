# SPDX-License-Identifier: Apache-2.0
"""Doctor: the gateway and the monitoring of a site.

Owns the probes of their images and of the certificate. Where a host has neither, nothing is said.
Never: starts anything but `haproxy -v` in a container that ends at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

from hfship.base.errors import HfshipError, HostError
from hfship.ops.probe import Finding, ProbeWarning, local_probe
from hfship.serve.docker import docker
from hfship.site.gateway_run import find_image, haproxy_images, image_warning
from hfship.site.monitoring_run import monitoring_folder, newest_image
from hfship.site.readings import certificate_days
from hfship.site.store import GATEWAY_FILE, gateway_folder

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.base.settings import Settings

SOON_DAYS = 30.0
_TRIAL_S = 60.0
_RENEW = "renew it, then: hfship serve --models FILE"
_MONITORING = ("prometheus", "grafana", "alertmanager", "node-exporter")


def gateway_findings(settings: Settings, reporter: Reporter) -> Iterator[Finding]:
    """What the probes find, where docker answers."""
    folder = gateway_folder(settings.deploy_dir)
    has_gateway = (folder / GATEWAY_FILE).exists()
    has_monitoring = monitoring_folder(settings.deploy_dir).is_dir()
    try:
        listing = docker(["image", "ls", "--format", "{{json .}}"], "list images")
    except HfshipError:  # which the row of docker says
        return
    if has_gateway or haproxy_images(listing):
        gateway = local_probe("gateway", probe_gateway_image, _TRIAL_S)
        yield gateway.run(reporter)
    if has_gateway:
        look = partial(probe_certificate, folder)
        certificate = local_probe("certificate", look)
        yield certificate.run(reporter)
    if has_monitoring or newest_image(listing, "prometheus"):
        look = partial(probe_monitoring, listing)
        monitoring = local_probe("monitoring", look)
        yield monitoring.run(reporter)


def probe_gateway_image() -> str:
    """The image that a gateway would be. Raises HostError, ProbeWarning."""
    image = find_image("")
    version = ".".join(map(str, image.version))
    warning = image_warning(image)
    if warning:
        step = "hfship fetch docker://haproxy:3.4     # connected side"
        raise ProbeWarning(warning, step)
    return f"{image.reference}: HAProxy {version}"


def probe_certificate(folder: Path) -> str:
    """How long the certificate of the gateway is good. Raises HostError, ProbeWarning."""
    days = certificate_days(folder)
    if days is None:
        return "the gateway has none, or there is no openssl to read it"
    if days <= 0:
        raise HostError(f"that of the gateway ended {-days:.0f} days ago", "", _RENEW)
    if days < SOON_DAYS:
        raise ProbeWarning(f"that of the gateway ends in {days:.0f} days", _RENEW)
    return f"that of the gateway is good for {days:.0f} days"


def probe_monitoring(listing: str) -> str:
    """Which images of monitoring docker has. Raises HostError, ProbeWarning."""
    found = {name: newest_image(listing, name) for name in _MONITORING}
    here = ", ".join(image for image in found.values() if image)
    if not found["prometheus"]:
        step = "hfship fetch docker://prom/prometheus     # connected side"
        raise HostError("docker has no image of Prometheus", "", step)
    if not found["grafana"]:
        step = "hfship fetch docker://grafana/grafana     # connected side"
        raise ProbeWarning(f"{here}; no Grafana: figures and alerts without dashboards", step)
    return here
