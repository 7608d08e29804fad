# SPDX-License-Identifier: Apache-2.0
"""The terms of a site: what the gateway stands before, and who may come in. Values only.

Nothing here is secret: of a key there is its SHA-256, and the keys of the models themselves, which
clients never see, are handed over apart from these.
"""

from __future__ import annotations

from typing import Tuple

from hfship.base.values import dataclass, field

HaproxyVersion = Tuple[int, int]  # 3.4.7 is (3, 4)

# The affinities of a model with several replicas, as models files have them.
LEAST_CONNECTIONS = "least-connections"
PREFIX = "prefix"  # the same start of a prompt goes to the same replica, for its prefix cache
AFFINITIES = (LEAST_CONNECTIONS, PREFIX)

ALWAYS, ON_DEMAND = "always", "on-demand"
MODES = (ALWAYS, ON_DEMAND)

BACKEND = "be_"  # how the backends of models start
GATEWAY_FOLDER = "_gateway"  # in the deployments' folder; names of deployments start otherwise
SITE_NETWORK = "hfship"  # of docker: internal, for the gateway, models and monitoring
INSIDE = "/gateway"  # where that folder is in the container
ADMIN_SOCKET = "run/admin.sock"  # in that folder
PAGE_SOCKET = "run/page.sock"  # and where the page of the site is served
PAGE_ROUTE = "/ops"
LOCAL, IMAGE = "local", "image"  # where pods of Kubernetes have models from
VOLUMES = (LOCAL, IMAGE)
MIB = 1 << 20
PLAIN_PORT, TLS_PORT, METRICS_PORT = 8080, 8443, 8405  # inside the gateway's container
CERTIFICATE_FILE = "tls.pem"


@dataclass(frozen=True)
class Replica:
    """One vLLM of a model: the name of its deployment, and where the gateway reaches it."""

    name: str
    address: str  # HOST:PORT
    standby: bool = False  # gets requests only while no other replica of the model answers


@dataclass(frozen=True)
class GatewayModel:
    """A model behind the gateway. `names` are those that clients may call it by."""

    name: str
    names: Tuple[str, ...]
    replicas: Tuple[Replica, ...]
    affinity: str = LEAST_CONNECTIONS
    mode: str = ALWAYS

    @property
    def backend(self) -> str:
        """Its name in HAProxy, in its metrics and in the access log."""
        return f"{BACKEND}{self.name}"


@dataclass(frozen=True)
class Gateway:
    """What HAProxy is told. Addresses are those inside its container: [HOST]:PORT.

    Without `tls_bind` there is no TLS; with it, `bind` only sends clients to `https_port`.
    """

    models: Tuple[GatewayModel, ...]
    version: HaproxyVersion
    bind: str = f":{PLAIN_PORT}"
    tls_bind: str = ""
    https_port: int = 0
    metrics_bind: str = f":{METRICS_PORT}"
    admin_socket: str = f"{INSIDE}/{ADMIN_SOCKET}"
    page_socket: str = f"{INSIDE}/{PAGE_SOCKET}"
    resolver: str = ""  # HOST:PORT of the DNS that knows the replicas; "": they are IP addresses
    max_body: int = 4 * MIB  # bytes of a request that is routed by its body
    max_upload: int = 64 * MIB  # bytes of one that is routed by its path
    timeout_s: int = 3600  # between two bytes of an answer


@dataclass(frozen=True)
class AccessKey:
    """A key of a client, as hfship stores it; the key itself was shown once, and is nowhere.

    `models` are names of models ("*": all); a rate or number of streams of 0 is not limited.
    """

    name: str
    sha256: str
    models: Tuple[str, ...] = ("*",)
    rate: int = 0  # accepted requests a minute
    streams: int = 0  # requests at a time
    expires: int = 0  # Unix time; 0: never
    created: str = ""
    suspended: bool = False
    ops: bool = field(default=False)  # may see the page of the site

    def may_use(self, model: GatewayModel) -> bool:
        """Whether it opens a model."""
        return "*" in self.models or bool(set(self.models) & {model.name, *model.names})
