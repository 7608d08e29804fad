# SPDX-License-Identifier: Apache-2.0
"""What registries of images say, and how images are called. Pure.

Owns references as docker reads them, the addresses of the API (OCI distribution-spec 1.1, Docker
Registry v2), the challenge of a 401, indexes, manifests and configurations, and the texts that make
a folder of blobs an archive that every engine loads.
Promises: what an answer says is checked before it becomes a path, an address or a size; a platform
that is not there is said with those that are.
Never: touches a socket or a disk.

An image folder, IMAGE_TAG/ (tried with docker 20.10 to 28.5 in both stores, ctr, podman, skopeo):
  oci-layout, index.json       OCI layout, with io.containerd.image.name: without it containerd's
                               store and podman load an image without a name
  manifest.json                docker's own list, without which its classic store loads nothing
  blobs/sha256/HEX             configuration, manifest, index and layers as the registry gave them
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import quote, urlencode

from hfship.base.errors import HostError, IntegrityError, UsageError
from hfship.base.imagefacts import BLOBS, DIGEST, MOST_LAYERS, PLATFORM, REPOSITORY, TAG, familiar
from hfship.base.reading import parse_json
from hfship.base.text import printable, shorten
from hfship.base.values import dataclass
from hfship.hub.protocol import LARGEST_FILE, RemoteFile

SCHEME = "docker://"
DOCKER_HUB = "docker.io"
DOCKER_HUB_API = "registry-1.docker.io"
OTHER_NAMES = ("index.docker.io", DOCKER_HUB_API)
LONGEST_REPOSITORY = 255  # characters, of distribution/reference
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = (OCI_INDEX, DOCKER_LIST)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
ACCEPT = ", ".join((*INDEXES, *MANIFESTS))
LARGEST_MANIFEST = 4 << 20  # bytes; the distribution specification lets registries refuse more
LARGEST_CONFIG = 8 << 20  # of an image, with its history and labels
LONGEST_NAME = 96  # characters of the name of a folder, as base/manifest.py has it


# -- references


@dataclass(frozen=True)
class ImageReference:
    """An image in a registry: host, path of the repository, and a tag, a digest or both.

    >>> parse_reference("docker://vllm/vllm-openai:v1")
    ImageReference(registry='docker.io', path='vllm/vllm-openai', tag='v1', digest='')
    """

    registry: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """With its registry."""
        return f"{self.registry}/{self.path}"

    @property
    def wanted(self) -> str:
        """What the registry is asked for: the digest where there is one, which wins."""
        return self.digest or self.tag

    @property
    def name(self) -> str:
        """As it is shown: familiar, with all that was given."""
        text = familiar(self.repository)
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text

    @property
    def url(self) -> str:
        """As it is typed."""
        return f"{SCHEME}{self.name}"

    @property
    def folder_name(self) -> str:
        """The name of its folder.

        >>> parse_reference("docker://vllm/vllm-openai:v0.11.0").folder_name
        'vllm-openai_v0.11.0'
        """
        last = self.path.rpartition("/")[2]
        tag = self.local_tag
        whole = f"{last}_{tag}"
        if len(whole) <= LONGEST_NAME:
            return whole
        sum_of_all = hashlib.sha256(whole.encode()).hexdigest()[:12]
        return f"{whole[: LONGEST_NAME - 13]}_{sum_of_all}"

    @property
    def local_tag(self) -> str:
        """The tag that it has where it is loaded: one of its digest where none was given."""
        return self.tag or f"sha256-{self.digest[7:19]}"

    @property
    def local_reference(self) -> str:
        """What it is called where it is loaded."""
        return f"{self.repository}:{self.local_tag}"


def parse_reference(text: str) -> ImageReference:
    """The image that docker://[REGISTRY/]REPO[:TAG][@DIGEST] means; `latest` without a tag and a
    digest. Raises UsageError.

    The first name is a registry if it has a dot or a port, or is localhost
    (distribution/reference); without one it is Docker Hub's, and a single name is in `library/`.

    >>> parse_reference("docker://busybox").repository
    'docker.io/library/busybox'
    >>> parse_reference("docker://localhost:5000/a/b:1").name
    'localhost:5000/a/b:1'
    """
    rest, at, digest = text[len(SCHEME) :].partition("@")
    tag = ""
    last = rest.rpartition("/")[2]
    if ":" in last:
        rest, _, tag = rest.rpartition(":")
    registry, path = _split_registry(rest)
    if not tag and not at:
        tag = "latest"

    reference = ImageReference(registry, path, tag, digest)
    if _is_usable(reference, bool(at)):
        return reference

    raise UsageError(
        f"{printable(text)[:200]!r} is not an image",
        "names are in small letters; a digest is sha256: and 64 hex digits",
        "give it as docker://[REGISTRY/]NAME:TAG, for example docker://vllm/vllm-openai:v0.11.0",
    )


def _split_registry(name: str) -> Tuple[str, str]:
    """The host of a registry, and the path of a repository there."""
    host, slash, path = name.partition("/")
    is_host = bool(slash) and (bool(re.search("[.:]", host)) or host == "localhost")
    if not is_host:
        host, path = DOCKER_HUB, name
    if host in OTHER_NAMES:
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    return host, path


def _is_usable(reference: ImageReference, with_digest: bool) -> bool:
    repository = reference.repository
    if not REPOSITORY.match(repository) or len(repository) > LONGEST_REPOSITORY:
        return False
    if reference.tag and not TAG.match(reference.tag):
        return False
    return not with_digest or bool(DIGEST.match(reference.digest))


def is_local(registry: str) -> bool:
    """Is it a registry of this machine, which docker lets speak plain http?

    >>> is_local("localhost:5000"), is_local("127.0.0.1"), is_local("[::1]:5000"), is_local("a.b")
    (True, True, True, False)
    """
    host = re.sub(r":[0-9]+\Z", "", registry).strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def endpoint_of(registry: str, plain_http: bool) -> str:
    """The address of the API of a registry."""
    host = registry
    if registry == DOCKER_HUB:
        host = DOCKER_HUB_API
    scheme = "https"
    if plain_http:
        scheme = "http"
    return f"{scheme}://{host}"


def manifest_url(endpoint: str, path: str, wanted: str) -> str:
    """Where a manifest is, by tag or digest."""
    return f"{endpoint}/v2/{path}/manifests/{wanted}"


def tags_url(endpoint: str, path: str) -> str:
    """Where the tags of a repository are listed."""
    return f"{endpoint}/v2/{path}/tags/list"


def read_tags(text: str) -> List[str]:
    """The tags of such a list; none of what is none.

    >>> read_tags('{"name": "org/app", "tags": ["1", "2"]}'), read_tags("<html>")
    (['1', '2'], [])
    """
    try:
        listed = parse_json(text)["tags"]
        return [tag for tag in listed if TAG.match(tag)]
    except (ValueError, KeyError, TypeError):
        return []


def blob_url(endpoint: str, path: str, digest: str) -> str:
    """Where a blob is."""
    return f"{endpoint}/v2/{path}/blobs/{digest}"


def blob_path(digest: str) -> str:
    """Where a blob lies in an image folder.

    >>> blob_path("sha256:" + "0" * 64)[:20]
    'blobs/sha256/0000000'
    """
    return BLOBS + digest.partition(":")[2]


def digest_of(content: bytes) -> str:
    """The digest of a content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


# -- the challenge of a 401


@dataclass(frozen=True)
class Challenge:
    """Who gives the tokens of a registry, and for what one is needed."""

    realm: str
    service: str = ""
    scope: str = ""

    def token_url(self) -> str:
        """Where a token is asked for."""
        given = {}
        if self.service:
            given["service"] = self.service
        if self.scope:
            given["scope"] = self.scope
        query = urlencode(given, quote_via=quote)
        joint = "?"
        if joint in self.realm:
            joint = "&"
        return f"{self.realm}{joint}{query}"


def parse_challenge(header: str) -> Optional[Challenge]:
    """The Bearer challenge of a WWW-Authenticate; None for another or none.

    >>> parse_challenge('Bearer realm="https://a/t",service="r",scope="repository:x:pull,push"')
    Challenge(realm='https://a/t', service='r', scope='repository:x:pull,push')
    """
    found = re.match(r"\s*bearer\s+", header[:4096], re.IGNORECASE)
    if not found:
        return None
    pairs = re.findall(r'(\w+)="([^"]*)"', header[found.end() : 4096])
    values = {name.lower(): value for name, value in pairs}
    realm = values.get("realm", "")
    if not re.match(r"https?://[^\s]+\Z", realm):
        return None
    return Challenge(realm, values.get("service", ""), values.get("scope", ""))


# -- indexes, manifests, configurations


@dataclass(frozen=True)
class Descriptor:
    """A blob that another one names."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]
    platform: str = ""  # of an entry of an index
    urls: Tuple[str, ...] = ()  # of a foreign layer

    @property
    def remote(self) -> RemoteFile:
        """As a file of an image folder."""
        path = blob_path(self.digest)
        sha256 = self.digest[7:]
        return RemoteFile(path, self.size, "", sha256)


def read_descriptor(value: Any) -> Descriptor:
    """A descriptor in parsed JSON of any shape. Raises ValueError, KeyError, TypeError."""
    digest, size = value["digest"], value["size"]
    if not isinstance(digest, str) or not DIGEST.match(digest):
        raise ValueError(f"{digest!r:.100} is no digest that can be proven here")
    if type(size) is not int or not 0 <= size <= LARGEST_FILE:
        raise ValueError(f"the size of {digest} is {size!r:.50}")
    platform = ""
    if value.get("platform"):
        platform = _platform_in(value["platform"])
    return Descriptor(
        media_type=str(value.get("mediaType", ""))[:200],
        digest=digest,
        size=size,
        annotations={str(k): str(v) for k, v in (value.get("annotations") or {}).items()},
        platform=platform,
        urls=tuple(str(url) for url in value.get("urls") or ()),
    )


def _platform_in(value: Any) -> str:
    """os/architecture[/variant] of an entry of an index; "" for one that is no image to run."""
    parts = [value.get("os", ""), value.get("architecture", "")]
    if value.get("variant"):
        parts.append(value["variant"])
    text = "/".join(map(str, parts)).lower()
    if not PLATFORM.match(text) or "unknown" in text:
        return ""
    return text


@dataclass(frozen=True)
class ImageManifest:
    """A manifest: the configuration and the layers of one image, or the files of an artifact."""

    config: Descriptor
    layers: Tuple[Descriptor, ...]
    artifact_type: str
    annotations: Mapping[str, str]
    media_type: str


def media_type_of(value: Any, header: str) -> str:
    """What a body is: it says so itself, else the header does, else its fields."""
    if isinstance(value, dict):
        said = value.get("mediaType") or header.partition(";")[0].strip()
        if said in (*INDEXES, *MANIFESTS):
            return str(said)
        if "manifests" in value:
            return OCI_INDEX
        if "config" in value and "layers" in value:
            return OCI_MANIFEST
    return ""


def parse_index(body: bytes) -> List[Descriptor]:
    """The entries of an index. Raises ValueError, KeyError, TypeError, AttributeError."""
    value = parse_json(body)
    return [read_descriptor(entry) for entry in value["manifests"][:MOST_LAYERS]]


def parse_image_manifest(body: bytes) -> ImageManifest:
    """A manifest. Raises ValueError, KeyError, TypeError, AttributeError."""
    value = parse_json(body)
    layers = [read_descriptor(layer) for layer in value["layers"]]
    if len(layers) > MOST_LAYERS * 10:
        raise ValueError(f"it has {len(layers)} layers")
    annotations = {str(k): str(v) for k, v in (value.get("annotations") or {}).items()}
    return ImageManifest(
        config=read_descriptor(value["config"]),
        layers=tuple(layers),
        artifact_type=str(value.get("artifactType") or ""),
        annotations=annotations,
        media_type=media_type_of(value, ""),
    )


def choose_platform(entries: Sequence[Descriptor], platform: str, name: str) -> Descriptor:
    """The entry of an index for a platform; a variant may be left out. Raises HostError that names
    what is there."""
    exact = [entry for entry in entries if entry.platform == platform]
    near = [entry for entry in entries if entry.platform.startswith(f"{platform}/")]
    for entry in (*exact, *near):
        return entry

    known = [entry.platform for entry in entries if entry.platform]
    step = "give one of them with --platform"
    if not known:
        step = "name another tag"
    raise HostError(
        f"{name} has no image for {platform}",
        f"it is there for: {shorten(known, 10) or 'nothing that can run'}",
        step,
    )


@dataclass(frozen=True)
class ImageConfig:
    """What the configuration of an image says: its platform, the digests of its layers when not
    compressed, and its labels."""

    platform: str
    diff_ids: Tuple[str, ...]
    labels: Mapping[str, str]


def parse_config(body: bytes) -> ImageConfig:
    """The configuration of an image. Raises ValueError, KeyError, TypeError, AttributeError."""
    value = parse_json(body)
    platform = _platform_in(value)
    if not platform:
        raise ValueError("it names no platform")
    diff_ids = value["rootfs"]["diff_ids"]
    if not isinstance(diff_ids, list) or not 0 < len(diff_ids) <= MOST_LAYERS:
        raise ValueError("it has no layers")
    for digest in diff_ids:
        if not isinstance(digest, str) or not DIGEST.match(digest):
            raise ValueError(f"{digest!r:.100} is no digest")
    labels = (value.get("config") or {}).get("Labels") or {}
    shown = {printable(str(key)[:200]): printable(str(text)[:500]) for key, text in labels.items()}
    return ImageConfig(platform, tuple(diff_ids), shown)


def require_platform(config: ImageConfig, wanted: str, name: str) -> None:
    """Refuse an image that was built for another platform. Raises HostError."""
    if (config.platform + "/").startswith(wanted + "/"):
        return
    raise HostError(
        f"{name} is an image for {config.platform}, not for {wanted}",
        "the registry has it for that platform only",
        f"name another tag, or take it as it is: --platform {config.platform}",
    )


def mismatch(name: str, what: str, found: str, wanted: str) -> IntegrityError:
    """The error for an answer that is not what its digest says."""
    return IntegrityError(
        f"the registry sends another {what} of {name}",
        f"it has {found}, wanted is {wanted}",
        "run the same command again; if it stays so, something in between changes bytes",
    )


# -- the files that make a folder of blobs an archive


def _text(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def layout_texts(
    reference: ImageReference, top: Descriptor, manifest: ImageManifest
) -> Dict[str, bytes]:
    """path -> content of what lies beside the blobs. `top` is what the tag means: the index, or the
    manifest itself."""
    entry = {
        "mediaType": top.media_type,
        "digest": top.digest,
        "size": top.size,
        "annotations": {
            "io.containerd.image.name": reference.local_reference,
            "org.opencontainers.image.ref.name": reference.local_tag,
        },
    }
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    classic = {
        "Config": blob_path(manifest.config.digest),
        "RepoTags": [familiar(reference.local_reference)],
        "Layers": [blob_path(layer.digest) for layer in manifest.layers],
    }
    return {
        "oci-layout": _text({"imageLayoutVersion": "1.0.0"}),
        "index.json": _text(index),
        "manifest.json": _text([classic]),
    }
