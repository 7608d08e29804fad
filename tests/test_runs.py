# SPDX-License-Identifier: Apache-2.0
"""The runs of one command over a models file; test_models.py runs them."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.settings import ListedModel, ModelsFile
from hfship.commands.context import Context
from hfship.commands.runs import _runs_of_images
from hfship.commands.table import COMMANDS

TABLES: Dict[str, Any] = {
    "image": [
        {"reference": "docker://vllm/vllm-openai:v1", "platform": "linux/arm64"},
        {"reference": "docker://app:2"},
    ],
    "gateway": {"image": "haproxy:3"},
    "monitoring": {},
}


@pytest.mark.parametrize("platform", [None, "linux/amd64"])
@pytest.mark.parametrize("name", ["fetch", "pack", "verify", "serve"])
def test_images_of_a_models_file_have_runs_of_their_own(name: str, platform: Optional[str]) -> None:
    """Those that are listed, and those that the site is made of; fetch knows them by their address."""
    warned: List[str] = []
    reporter: Any = SimpleNamespace(warn=warned.append)
    [command] = [one for one in COMMANDS if one.name == name]
    args = argparse.Namespace(**{command.models: [], "keep": 7})
    if name == "fetch":
        args.platform = platform
    settings: Any = None
    file = ModelsFile(Path("/m.toml"), {}, (), ListedModel(""), tables=TABLES)
    runs = _runs_of_images(command, Context(args, settings, reporter), file)
    if name == "serve":
        assert runs == {} and warned == []
        return
    assert list(runs) == ["vllm-openai_v1", "app_2", "haproxy_3"]
    words = [getattr(run.args, command.models) for run in runs.values()]
    if name == "fetch":
        assert words[0] == ["docker://vllm/vllm-openai:v1"]
        platforms = [run.args.platform for run in runs.values()]
        assert platforms == [platform or "linux/arm64", platform, platform]
    else:
        assert words == [[folder] for folder in runs]
        assert not any(hasattr(run.args, "platform") for run in runs.values())
    assert {run.args.keep for run in runs.values()} == {7}
    lacks = ["/m.toml has no [monitoring] prometheus_image"] if name != "verify" else []
    assert [line.partition(",")[0] for line in warned] == lacks
