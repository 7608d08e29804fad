# SPDX-License-Identifier: Apache-2.0
"""A gateway that a control host sets up on another host: all that it stands on, in one file.

Owns DEPLOY_DIR/_site/gateway.json, hfship-gateway-set/1, mode 0600: "format"; "settings", the
fields of GatewaySettings; "certificate", the text of tls.pem; "models" and "keys", lists of the
fields of GatewayModel and AccessKey; "upstream", the API key of each model's vLLM; "files", texts
that are put beside those of the gateway.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Mapping, Tuple

from hfship.base.errors import IntegrityError
from hfship.base.reading import parse_json
from hfship.base.settings import typed_fields
from hfship.base.values import asdict, dataclass, field, replace
from hfship.site.settings import GatewaySettings
from hfship.site.terms import AccessKey, GatewayModel, Replica

SET_FILE = "gateway.json"
SET_FORMAT = "hfship-gateway-set/1"


@dataclass(frozen=True)
class GatewaySet:
    """What a gateway stands on."""

    settings: GatewaySettings
    models: Tuple[GatewayModel, ...]
    keys: Tuple[AccessKey, ...]
    upstream: Mapping[str, str] = field(repr=False, default_factory=dict)
    certificate: str = field(repr=False, default="")
    files: Mapping[str, str] = field(default_factory=dict)


def set_text(gateway: GatewaySet) -> str:
    """The text of the file; it is secret."""
    value = {
        "format": SET_FORMAT,
        "settings": asdict(gateway.settings),
        "certificate": gateway.certificate,
        "models": [asdict(model) for model in gateway.models],
        "keys": [asdict(key) for key in gateway.keys],
        "upstream": dict(gateway.upstream),
        "files": dict(gateway.files),
    }
    return json.dumps(value, indent=1) + "\n"


def parse_set(content: bytes, where: str) -> GatewaySet:
    """What the file says. Raises IntegrityError."""
    try:
        value = parse_json(content)
        if value["format"] != SET_FORMAT:
            raise ValueError(f"format is {value['format']!r}")
        return GatewaySet(
            GatewaySettings(**typed_fields(GatewaySettings(), value["settings"])),
            tuple(_model_of(one) for one in value["models"]),
            tuple(_key_of(one) for one in value["keys"]),
            _texts(value["upstream"]),
            str(value["certificate"]),
            _texts(value["files"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        step = "hfship serve on the control host"
        raise IntegrityError(f"{where} cannot be read", str(exc), step) from exc


def _texts(value: Mapping[str, Any]) -> Dict[str, str]:
    return {str(name): str(text) for name, text in value.items()}


def _model_of(value: Mapping[str, Any]) -> GatewayModel:
    model = GatewayModel(**typed_fields(GatewayModel("", (), ()), _tuples(value)))
    replicas = [Replica(**typed_fields(Replica("", ""), one)) for one in value["replicas"]]
    return replace(model, names=tuple(map(str, model.names)), replicas=tuple(replicas))


def _key_of(value: Mapping[str, Any]) -> AccessKey:
    key = AccessKey(**typed_fields(AccessKey("", ""), _tuples(value)))
    return replace(key, models=tuple(map(str, key.models)))


def _tuples(value: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
