"""A real Docker engine with the NVIDIA hook's stand-in: the GPUs of a plan are those that a container is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import PYZ, missing
from support import components

pytestmark = [pytest.mark.real, pytest.mark.alone, pytest.mark.timeout(300)]

UUID = "00000000-0000-4000-8000-00000000000"
GPU, SLICE = f"GPU-{UUID}%d", "MIG-00000000-0000-4000-8000-000001000000"
FLAGS = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "--replicas": "--data-parallel-size",
}
SPEC = "cdiVersion: 0.6.0\nkind: nvidia.com/gpu\ndevices:\n" + "".join(
    f'- {{name: "{name}", containerEdits: {{env: [CDI=1]}}}}\n' for name in (GPU % 0, GPU % 1)
)
# Of two models in turn: the options of serve, and the devices of the container.
BY_RUNTIME: Dict[str, List[str]] = {
    "--gpus 1:0": [SLICE],
    "-tp 1 -pp 2 --reset": [GPU % 0, GPU % 2],
    "--replicas 2 -tp 1 --reset": [GPU % 0, GPU % 2],
}
BY_CDI = {"-tp 2": [f"nvidia.com/gpu={GPU % 0}", f"nvidia.com/gpu={GPU % 1}"]}


@pytest.mark.parametrize("driver, cases", [("nvidia", BY_RUNTIME), ("cdi", BY_CDI)])
def test_a_container_is_given_the_gpus_of_its_plan(
    driver: str, cases: Dict[str, List[str]], model: Path, tmp_path: Path
) -> None:
    components.require("site-images")
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    env = {**os.environ, "HFSHIP_STUB_GPUS": "3x H100 81559", "HFSHIP_STUB_MIG": "1 3g.40gb 40448"}
    if driver == "cdi":
        (tmp_path / "cdi").mkdir()
        (tmp_path / "cdi/nvidia.yaml").write_text(SPEC)
        env["HFSHIP_STUB_GPUS"], env["HFSHIP_STUB_MIG"] = "2x H100 81559", ""
        settings: Dict[str, Any] = {"features": {"cdi": True}, "cdi-spec-dirs": [f"{tmp_path}/cdi"]}
        env["HFSHIP_DOCKER_SETTINGS"] = json.dumps(settings)
    image = "vllm/vllm-openai:v0.32.0"
    script = f"""
    export HOME={tmp_path} HFSHIP_DEPLOY_DIR={tmp_path}/deploy
    docker tag {components.ENGINE_IMAGE} {image}; trap 'docker rmi {image}' EXIT
    """
    for options in cases:
        script += f"""
        {sys.executable} {PYZ} serve {model} --name m --no-preflight -q {options} >&2
        docker inspect vllm_m --format 'seen {{{{json .HostConfig.DeviceRequests}}}} {{{{json .Args}}}}'
        """
    argv = components.with_docker_argv(["sh", "-euc", script])
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [line[5:] for line in done.stdout.splitlines() if line.startswith("seen ")]
    assert len(seen) == len(cases)
    for (options, devices), line in zip(cases.items(), seen):
        requests, end = json.JSONDecoder().raw_decode(line)
        (request,) = requests
        assert (request["Driver"], request["DeviceIDs"]) == (driver, devices), options
        arguments = json.loads(line[end:])
        words = options.split()
        for flag, value in zip(words, words[1:]):
            if flag in FLAGS:
                assert arguments[arguments.index(FLAGS[flag]) + 1] == value
