# SPDX-License-Identifier: Apache-2.0
"""What is on disk of a gateway: DEPLOY_DIR/_gateway.

Owns these files; HAProxy reads them, and needs nothing of hfship:
  gateway.json        hfship-gateway/1: "format", "generation", and the fields of Gateway
  keys.json           hfship-keys/1: "format", and "keys", a list of the fields of AccessKey; 0600
  rights.json         hfship-rights/1: what the models file says of keys, also of those that are not
                      made yet: "format", and "rights", fields of AccessKey by name
  haproxy.cfg, maps/  what these two mean to HAProxy; the maps 0600
  tls.pem             certificate and key, as HAProxy wants them; 0600
  docker-compose.yml  of its container
  run/admin.sock      where HAProxy takes commands

Promises: no key is on disk; what another user could have written is not believed. A change of keys
is in keys.json first: whatever is killed after that, the next command, or the next start of the
gateway, applies it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import IntegrityError
from hfship.base.files import write_below
from hfship.base.manifest import _SHA256
from hfship.base.reading import LIST_SIZE, parse_json
from hfship.base.settings import typed_fields
from hfship.base.values import asdict, replace
from hfship.serve.deployments import make_own_folder, read_own
from hfship.site.maps import Maps, map_path, map_text
from hfship.site.settings import KEY_NAME
from hfship.site.terms import GATEWAY_FOLDER, AccessKey, Gateway, GatewayModel, Replica

GATEWAY_FORMAT, KEYS_FORMAT = "hfship-gateway/1", "hfship-keys/1"
GATEWAY_FILE, KEYS_FILE = "gateway.json", "keys.json"
RIGHTS_FILE, RIGHTS_FORMAT = "rights.json", "hfship-rights/1"


def gateway_folder(deploy_dir: Path) -> Path:
    """The folder of the gateway."""
    return deploy_dir / GATEWAY_FOLDER


# -- keys


def read_keys(folder: Path) -> Tuple[AccessKey, ...]:
    """The keys, in the order in which they were made. Raises HostError, IntegrityError."""
    content = read_own(folder, KEYS_FILE, LIST_SIZE)
    if content is None:
        return ()

    try:
        value = parse_json(content)
        _require_format(value, KEYS_FORMAT)
        return tuple(_key_of(entry) for entry in value["keys"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _broken(folder / KEYS_FILE, exc) from exc


def _key_of(entry: Mapping[str, Any]) -> AccessKey:
    key = AccessKey(**typed_fields(AccessKey("", ""), entry))
    if not _SHA256.match(key.sha256) or not KEY_NAME.match(key.name):
        raise ValueError("a key is not what it should be")
    return replace(key, models=tuple(str(one) for one in key.models))


def write_keys(folder: Path, keys: Sequence[AccessKey]) -> None:
    """Keep the keys, where they differ. Raises DiskError, HostError."""
    make_own_folder(folder)
    value = {"format": KEYS_FORMAT, "keys": [asdict(key) for key in keys]}
    write_files(folder, {KEYS_FILE: _json_text(value)}, 0o600)


def read_rights(folder: Path) -> Dict[str, Dict[str, Any]]:
    """What the models file says of keys, as the fields of AccessKey by name. Raises HostError,
    IntegrityError."""
    content = read_own(folder, RIGHTS_FILE, LIST_SIZE)
    if content is None:
        return {}
    try:
        value = parse_json(content)
        _require_format(value, RIGHTS_FORMAT)
        rights = {}
        for name, entry in value["rights"].items():
            rights[str(name)] = _rights_of(entry)
        return rights
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _broken(folder / RIGHTS_FILE, exc) from exc


def _rights_of(entry: Mapping[str, Any]) -> Dict[str, Any]:
    values = {**entry, "models": tuple(str(one) for one in entry.get("models", ("*",)))}
    return typed_fields(AccessKey("", ""), values)


def write_rights(folder: Path, rights: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep what the models file says of keys. Raises DiskError, HostError."""
    value = {"format": RIGHTS_FORMAT, "rights": rights}
    write_files(folder, {RIGHTS_FILE: _json_text(value)}, 0o600)


# -- the gateway


def read_gateway(folder: Path) -> Optional[Gateway]:
    """The gateway as it was set up last, None without one. Raises HostError, IntegrityError."""
    content = read_own(folder, GATEWAY_FILE, LIST_SIZE)
    if content is None:
        return None
    try:
        value = parse_json(content)
        _require_format(value, GATEWAY_FORMAT)
        first, second = value["version"]
        known = {
            **value,
            "models": [_model_of(entry) for entry in value["models"]],
            "version": [int(first), int(second)],
        }
        return Gateway(**typed_fields(Gateway((), (0, 0)), known))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _broken(folder / GATEWAY_FILE, exc) from exc


def _model_of(entry: Mapping[str, Any]) -> GatewayModel:
    nobody = Replica("", "")
    replicas = [Replica(**typed_fields(nobody, one)) for one in entry["replicas"]]
    usual = GatewayModel("", (), ())
    return GatewayModel(**typed_fields(usual, {**entry, "replicas": replicas}))


def gateway_text(gateway: Gateway) -> str:
    """The text of gateway.json."""
    return _json_text({"format": GATEWAY_FORMAT, **asdict(gateway)})


def _require_format(value: Mapping[str, Any], form: str) -> None:
    if value["format"] != form:
        raise ValueError(f"format is {value['format']!r}, this hfship reads {form}")


def _broken(path: Path, exc: Exception) -> IntegrityError:
    why = f"{type(exc).__name__}: {exc}"
    step = f"restore {path} from a copy; without it, hfship serve --models FILE makes it anew"
    return IntegrityError(f"{path} is not valid", why, step)


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# -- files


def write_maps(folder: Path, maps: Maps) -> List[str]:
    """Write the maps that differ; the names of these. Raises DiskError."""
    texts: Dict[str, str] = {map_path(name): map_text(entries) for name, entries in maps.items()}
    return write_files(folder, texts, 0o600)


def write_files(folder: Path, texts: Mapping[str, str], mode: int) -> List[str]:
    """Write those files of the gateway that differ; their names. Raises DiskError, HostError."""
    written = []
    for name, text in texts.items():
        place, _, own = name.rpartition("/")
        if read_own(folder / place, own, LIST_SIZE) == text.encode():
            continue
        _write(folder, name, text, mode)
        written.append(name)

    return written


def _write(folder: Path, name: str, text: str, mode: int) -> None:
    write_below(folder.parent, f"{folder.name}/{name}", text, mode)
