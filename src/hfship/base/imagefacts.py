# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of a container image. Pure.

Owns the facts of an image that travel: how it is called, the digests by which its registry knows
it, and those by which an engine is asked whether it has it. Promises: facts that were read can be
shown, and be words of a command line. Never: touches a disk or a program.

In a manifest (docs/formats.md), beside `"kind": "image"`:
  "image": {"reference": "docker.io/vllm/vllm-openai:v0.11.0",
            "digest": "sha256:...",           what the tag meant: of an index, or of the manifest
            "manifest_digest": "sha256:...",  of the manifest for the platform
            "config_digest": "sha256:...",    of its configuration: the image ID of a classic store
            "diff_ids": ["sha256:...", ...],  of the layers, not compressed, in their order
            "platform": "linux/amd64"}
"""

from __future__ import annotations

import re
from typing import Any, Dict, Tuple

from hfship.base.reading import parse_json
from hfship.base.values import dataclass

KIND = "image"
BLOBS = "blobs/sha256/"  # of an image folder
MANIFEST_JSON = "manifest.json"  # of an image folder, as `docker save` has it
MOST_LAYERS = 1000  # overlayfs takes 128

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
# distribution/reference: a host that has a dot, a port or is localhost, then names of a path.
_HOST = (
    r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?|\[[0-9a-fA-F:]+\](?::[0-9]{1,5})?"
)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY = re.compile(rf"(?:{_HOST})(?:/{_PART})+\Z")
TAG = re.compile(r"[\w][\w.-]{0,127}\Z", re.ASCII)
PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(?:/[a-z0-9]+)?\Z")


@dataclass(frozen=True)
class ImageFacts:
    """An image as its registry and its configuration describe it; see above."""

    reference: str
    digest: str
    manifest_digest: str
    config_digest: str
    diff_ids: Tuple[str, ...]
    platform: str

    @property
    def name(self) -> str:
        """How docker calls it.

        >>> facts = ImageFacts("docker.io/library/busybox:1", "", "", "", (), "")
        >>> facts.name
        'busybox:1'
        """
        return familiar(self.reference)

    @property
    def digests(self) -> Tuple[str, ...]:
        """Those that an engine may use as the image ID: of the configuration in a classic store, of
        the manifest or of the index in containerd's."""
        return (self.config_digest, self.manifest_digest, self.digest)

    def json(self) -> Dict[str, Any]:
        """As it stands in a manifest."""
        fields: Dict[str, Any] = dict(vars(self))
        fields["diff_ids"] = list(self.diff_ids)
        return fields


def familiar(reference: str) -> str:
    """A full reference as docker shows it.

    >>> familiar("docker.io/vllm/vllm-openai:v1"), familiar("quay.io/a/b:1")
    ('vllm/vllm-openai:v1', 'quay.io/a/b:1')
    """
    for prefix in ("docker.io/library/", "docker.io/"):
        if reference.startswith(prefix):
            return reference[len(prefix) :]
    return reference


def read_facts(value: Any) -> ImageFacts:
    """The facts in parsed JSON of any shape. Raises ValueError, KeyError, TypeError."""
    diff_ids = value["diff_ids"]
    if not isinstance(diff_ids, list) or not 0 < len(diff_ids) <= MOST_LAYERS:
        raise ValueError("diff_ids is no list of layers")
    facts = ImageFacts(
        reference=value["reference"],
        digest=value["digest"],
        manifest_digest=value["manifest_digest"],
        config_digest=value["config_digest"],
        diff_ids=tuple(diff_ids),
        platform=value["platform"],
    )
    for digest in (*facts.digests, *facts.diff_ids):
        if not DIGEST.match(digest):
            raise ValueError(f"{digest!r:.100} is no digest")
    if not PLATFORM.match(facts.platform):
        raise ValueError(f"platform is {facts.platform!r:.100}")
    if not isinstance(facts.reference, str):
        raise ValueError("reference is no text")
    name, colon, tag = facts.reference.rpartition(":")
    if not colon or not REPOSITORY.match(name) or not TAG.match(tag):
        raise ValueError(f"reference is {facts.reference!r:.100}")
    return facts


def layer_paths(manifest_json: bytes) -> Tuple[str, ...]:
    """The files of an image's layers in their order, by its manifest.json; none of another file.

    >>> layer_paths(b'[{"Layers": ["blobs/sha256/1", "blobs/sha256/2"]}]')
    ('blobs/sha256/1', 'blobs/sha256/2')
    >>> layer_paths(b"{}")
    ()
    """
    try:
        layers = parse_json(manifest_json)[0]["Layers"]
        return tuple(map(str, layers))
    except (ValueError, KeyError, TypeError, IndexError):
        return ()
