# SPDX-License-Identifier: Apache-2.0
"""The bill of materials of models and images: CycloneDX 1.6 (ECMA-424), in JSON. Pure.

Owns what of a manifest stands where in it:

  metadata    hfship with the packages inside it as tool; the time is that of the fetch
  model       component "machine-learning-model": licence, purl, commit, where it came from, base
              models as pedigree, the terms of a gated repository; inside it each file, with SHA-256
  image       component "container": digests, layers (diff IDs), platform, and where its registry
              would have its SBOM
  hfship:*    properties: bytes, the SHA-256 of the manifest, what was declared of files

Promises: equal manifests give equal bytes, whoever asks and whenever. Never: guesses a licence, or
calls one by an SPDX name that it does not have.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence
from urllib.parse import quote

from hfship.base.card import SPDX

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry, Manifest

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
_SPACE = uuid.UUID("7a3f3f0e-5d0b-5c6e-9d55-3a2c1f6b1c6e")  # of serial numbers made here
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z\Z")
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def bill_of(manifests: Sequence[Manifest], version: str, lock: str) -> str:
    """The bill of some models and images, as text. `version` is hfship's, `lock` the text of
    vendor.lock."""
    components = [_component_of(manifest) for manifest in manifests]
    components.sort(key=lambda component: str(component["bom-ref"]))
    bill: Dict[str, Any] = {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [_tool(version, lock)]}},
    }
    sources = [manifest.source for manifest in manifests if manifest.source]
    times = [source.fetched_at for source in sources]
    known = [time for time in times if _TIME.match(time)]
    if known:
        bill["metadata"]["timestamp"] = max(known)

    if len(components) == 1:
        (only,) = components
        files = only.pop("components", [])
        bill["metadata"]["component"] = only
        bill["components"] = files
    else:
        bill["components"] = components
    content = json.dumps(bill, sort_keys=True)
    serial = uuid.uuid5(_SPACE, content)
    bill["serialNumber"] = f"urn:uuid:{serial}"
    return json.dumps(bill, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


def _tool(version: str, lock: str) -> Dict[str, Any]:
    """hfship, with the packages inside it."""
    packages = []
    for name, pinned in sorted(_PINNED.findall(lock)):
        purl = f"pkg:pypi/{name.lower()}@{pinned}"
        package = {"type": "library", "name": name, "version": pinned, "purl": purl}
        packages.append(package)
    tool: Dict[str, Any] = {
        "type": "application",
        "name": "hfship",
        "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    if packages:
        tool["components"] = packages
    return tool


def _component_of(manifest: Manifest) -> Dict[str, Any]:
    if manifest.image:
        return _image(manifest)
    return _model(manifest)


def _model(manifest: Manifest) -> Dict[str, Any]:
    """A model, with its files."""
    reference = f"model:{manifest.name}"
    component: Dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": manifest.name,
        "properties": _properties(manifest),
    }
    licences = _licences(manifest)
    if licences:
        component["licenses"] = licences
    component.update(_origin(manifest))
    bases = [_base_model(name) for name in manifest.card.base_model]
    if bases:
        component["pedigree"] = {"ancestors": bases}
    files = [_file(entry, reference) for entry in manifest.files]
    if files:
        component["components"] = files
    return component


def _base_model(name: str) -> Dict[str, str]:
    return {"type": "machine-learning-model", "name": name}


def _file(entry: FileEntry, reference: str) -> Dict[str, Any]:
    size = {"name": "hfship:bytes", "value": str(entry.size)}
    digest = {"alg": "SHA-256", "content": entry.sha256}
    return {
        "type": "file",
        "bom-ref": f"{reference}/{entry.path}",
        "name": entry.path,
        "hashes": [digest],
        "properties": [size],
    }


def _licences(manifest: Manifest) -> List[Dict[str, Any]]:
    """The licence: by its SPDX name where it has one, else as the card calls it."""
    name = manifest.licence
    if not name:
        return []
    known = SPDX.get(name.lower())
    licence: Dict[str, str] = {"name": name}
    if known:
        licence = {"id": known}
    link = manifest.card.license_link
    if link.startswith(("https://", "http://")) and _is_plain(link):
        licence["url"] = link
    return [{"license": licence}]


def _is_plain(address: str) -> bool:
    if re.search(r'[<>"{}|\\^`]', address):
        return False
    printed = re.fullmatch(r"[!-~]+", address)
    return bool(printed)


def _origin(manifest: Manifest) -> Dict[str, Any]:
    """Where a model came from: version, purl and address; {} where nobody knows."""
    source = manifest.source
    if source is None:
        return {}
    repo = source.resolved_repo
    path = quote(repo, safe="/")
    page = f"{source.endpoint}/{path}/tree/{source.commit}"
    return {
        "version": source.commit,
        "purl": f"pkg:huggingface/{path}@{source.commit}",
        "publisher": repo.partition("/")[0],
        "externalReferences": [{"type": "distribution", "url": page}],
    }


def _properties(manifest: Manifest) -> List[Dict[str, str]]:
    """What CycloneDX has no place for."""
    text = manifest.to_json().encode()
    told = {
        "hfship:bytes": str(manifest.size),
        "hfship:files": str(len(manifest.files)),
        "hfship:manifest-sha256": hashlib.sha256(text).hexdigest(),
        "hfship:terms": manifest.card.terms,
        "hfship:left-out": ", ".join(manifest.left_out_paths[:100]),
    }
    source = manifest.source
    if source:
        gated = str(source.gated)
        told["hfship:gated"] = gated.lower()
        told["hfship:revision"] = source.revision
        told["hfship:fetched-at"] = source.fetched_at

    rows = []
    for name, value in told.items():
        if value:
            rows.append(_property(name, value))
    for one in manifest.declared:
        value = f"{one.path}: {one.kind}: {one.says}; {one.outcome}"
        if one.reason:
            value += f": {one.reason}"
        rows.append(_property("hfship:declared", value))
    return rows


def _property(name: str, value: str) -> Dict[str, str]:
    return {
        "name": name,
        "value": value,
    }


def _image(manifest: Manifest) -> Dict[str, Any]:
    """A container image. Its own bill lies in its registry, if its makers put one there, under the
    digest (OCI referrers, or BuildKit's attestations)."""
    image = manifest.image
    assert image
    repository, _, tag = image.reference.rpartition(":")
    told: Mapping[str, str] = {
        "hfship:platform": image.platform,
        "hfship:manifest-digest": image.manifest_digest,
        "hfship:image-id": image.config_digest,
        "hfship:bytes": str(manifest.size or ""),
    }
    properties = [_property(key, value) for key, value in told.items() if value]
    properties += [_property("hfship:diff-id", layer) for layer in image.diff_ids]
    component: Dict[str, Any] = {
        "type": "container",
        "bom-ref": f"image:{image.reference}",
        "name": repository,
        "version": tag,
        "properties": properties,
    }
    if image.digest:  # else it came into docker as a file, and no registry is known
        component.update(_in_registry(repository, image.digest))
    return component


def _in_registry(repository: str, digest: str) -> Dict[str, Any]:
    """What an image is in its registry."""
    name = repository.rpartition("/")[2]
    where = quote(repository, safe="")
    return {
        "hashes": [{"alg": "SHA-256", "content": digest.partition(":")[2]}],
        "purl": f"pkg:oci/{name}@{quote(digest, safe='')}?repository_url={where}",
        "externalReferences": [{"type": "bom", "url": f"oci://{repository}@{digest}"}],
    }


def statement_of(name: str, content: bytes) -> Dict[str, Any]:
    """The in-toto statement by which a bill is signed: its name and SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}}],
        "predicateType": "https://cyclonedx.org/bom",
        "predicate": {"specVersion": "1.6"},
    }
