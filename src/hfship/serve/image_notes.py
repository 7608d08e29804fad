# SPDX-License-Identifier: Apache-2.0
"""What is remembered of an image: what it says of itself, and which plans its vLLM took.

~/.cache/hfship/images/IMAGE.json, by its ID (docs/formats.md): {"format": "hfship-image/1", "says":
TEXT, "checks": {...}}. An image of an ID never changes, so that what it says holds for ever.

Promises: what cannot be read is nothing remembered. Never: holds a secret.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, Dict

from hfship.base.files import write_below
from hfship.base.reading import STATE_SIZE, parse_json
from hfship.base.settings import cache_folder
from hfship.serve.deployments import make_own_folder, read_own

IMAGES_FOLDER, IMAGE_FORMAT = "images", "hfship-image/1"
SAYS, CHECKS = "says", "checks"


def noted(image_id: str) -> Dict[str, Any]:
    """What is remembered of an image, {} where nothing is. Raises HostError."""
    cache = cache_folder()
    if cache is None or not image_id:
        return {}
    folder = cache / IMAGES_FOLDER
    content = read_own(folder, _file_of(image_id), STATE_SIZE) or b"{}"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        value = parse_json(content)
        if value["format"] == IMAGE_FORMAT:
            return dict(value)
    return {}


def note(image_id: str, key: str, value: object) -> None:
    """Remember something of an image. Raises DiskError, HostError."""
    cache = cache_folder()
    if cache is None or not image_id:
        return
    make_own_folder(cache / IMAGES_FOLDER)
    notes = {**noted(image_id), "format": IMAGE_FORMAT, key: value}
    text = json.dumps(notes, sort_keys=True, indent=1)
    write_below(cache, f"{IMAGES_FOLDER}/{_file_of(image_id)}", text + "\n", 0o600)


def _file_of(image_id: str) -> str:
    _, _, digest = image_id.rpartition(":")
    return f"{digest[:64]}.json"
