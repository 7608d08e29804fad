"""A real vLLM in a real docker: tools called, an adapter and a template served, a plan refused by the image."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Dict

import pytest

from conftest import PYZ, ROOT
from hfship.serve.in_image import MARK
from support import components
from support.make_model import HEAD_DIM, KV_HEADS
from test_end_to_end import AIR_GAPPED, in_the_box

TEMPLATE = (
    "{% if tools %}You may call {{ tools | tojson }} by <tool_call>{...}</tool_call>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "name": "f",
    # Else vLLM holds the model to the form of a call alone, and the arguments may be any JSON:
    # vllm/tool_parsers/structural_tag_registry.py of 0.32, resolve_tool_strictness.
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
ASK = """
import json, re, sys, urllib.request
folder, question = sys.argv[1:]
env = open(folder + "/.env").read()
key = re.search("VLLM_API_KEY=(.*)", env)[1]
port = re.search(r':(\\d+):8000"', open(folder + "/docker-compose.yml").read())[1]
headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
url = "http://127.0.0.1:" + port + "/v1/chat/completions"
asked = urllib.request.Request(url, question.encode(), headers)
with urllib.request.urlopen(asked, timeout=120) as answer:
    print("answer", json.dumps(json.load(answer)["choices"][0]["message"]))
"""
# The same by the client that agents use: a call in one piece, and one in pieces.
AGENT = """
import json, re, sys, openai
folder, tool = sys.argv[1], json.loads(sys.argv[2])
key = re.search("VLLM_API_KEY=(.*)", open(folder + "/.env").read())[1]
port = re.search(r':(\\d+):8000"', open(folder + "/docker-compose.yml").read())[1]
client = openai.OpenAI(api_key=key, base_url="http://127.0.0.1:" + port + "/v1", max_retries=0)
tools = [{"type": "function", "function": tool}]
messages = [{"role": "user", "content": "hello"}]
named = {"type": "function", "function": {"name": tool["name"]}}
def ask(**options):
    return client.chat.completions.create(
        model="tiny", messages=messages, tools=tools, tool_choice=named, max_tokens=100, **options
    )
(call,) = ask().choices[0].message.tool_calls
print("called", json.dumps([call.function.name, json.loads(call.function.arguments)]))
name, arguments = "", ""
for piece in ask(stream=True):
    for part in piece.choices[0].delta.tool_calls or ():
        name = part.function.name or name
        arguments += part.function.arguments or ""
print("called", json.dumps([name, json.loads(arguments)]))
"""


def make_adapter(model: Path, folder: Path, rank: int = 8) -> None:
    """A LoRA adapter of a model: not of zeros, which would look as if they had never arrived."""
    config = json.loads((model / "config.json").read_text())
    tensors: Dict[str, Any] = {}
    data = b""
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("q_proj", config["hidden_size"]), ("v_proj", KV_HEADS * HEAD_DIM)):
            for part, shape in (
                ("lora_A", [rank, config["hidden_size"]]),
                ("lora_B", [rows, rank]),
            ):
                start, size = len(data), shape[0] * shape[1] * 2
                data += b"\1\2" * (size // 2)
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.{part}.weight"
                tensors[key] = {
                    "dtype": "F16",
                    "shape": shape,
                    "data_offsets": [start, start + size],
                }
    head = json.dumps(tensors).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    about = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_agents_find_what_they_need(model: Path, tmp_path: Path) -> None:
    python = components.require("openai")
    make_adapter(model, tmp_path / "adapter")
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "ask.py").write_text(ASK)
    said_by_user = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 100}
    tools = [{"type": "function", "function": TOOL}]
    named = {"type": "function", "function": {"name": "f"}}
    questions = {
        "auto": {"model": "tiny", "tools": tools, "tool_choice": "auto", **said_by_user},
        "named": {"model": "tiny", "tools": tools, "tool_choice": named, **said_by_user},
        "lora": {"model": "mine", **said_by_user},
    }
    for name, question in questions.items():
        (tmp_path / name).write_text(json.dumps(question))
    deploy = tmp_path / "deploy"
    script = f"""
    {AIR_GAPPED}
    export HOME={tmp_path} HFSHIP_DEPLOY_DIR={deploy} HFSHIP_CACHE={tmp_path}/cache
    python3 {PYZ} serve {model} --name tiny --chat-template {tmp_path}/t.jinja --lora mine={tmp_path}/adapter -q
    before=$(docker inspect vllm_tiny --format '{{{{.Id}}}}')
    for question in {" ".join(questions)}; do
      python3 {tmp_path}/ask.py {deploy}/tiny "$(cat {tmp_path}/$question)"
    done
    {python} {tmp_path}/agent.py {deploy}/tiny '{json.dumps(TOOL)}'
    code=0; python3 {PYZ} serve {model} --name tiny -- --max-model-len 1000000 || code=$?
    echo "refused $code"
    test "$before" = "$(docker inspect vllm_tiny --format '{{{{.Id}}}}')" && echo "runs on"
    docker inspect vllm_tiny --format '{{{{.HostConfig.CapDrop}}}} {{{{.HostConfig.PidsLimit}}}}'
    python3 {PYZ} stop tiny -q
    """
    said = in_the_box(script, HFSHIP_STUB_GPUS="none")
    answers = [json.loads(line[7:]) for line in said.splitlines() if line.startswith("answer ")]
    assert len(answers) == 3, said
    assert "would not serve tiny" in said and "refused 9" in said and "runs on" in said, said
    assert "[ALL] 32768" in said
    calls = [json.loads(line[7:]) for line in said.splitlines() if line.startswith("called ")]
    assert len(calls) == 2, said
    assert all(call in (["f", {"a": True}], ["f", {"a": False}]) for call in calls), calls
    (call,) = answers[1]["tool_calls"]
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) in ({"a": True}, {"a": False})


# Ways to spread a model -> what vLLM says, as far as it comes without GPUs.
WAYS = {
    "--pipeline-parallel-size 2": {"stage": "done", "max_model_len": 2048, "kv_bytes": 512},
    "--tensor-parallel-size 2 --enable-expert-parallel": {
        "stage": "config",
        "refused": "Number of experts in the model must be greater than 0 when expert"
        " parallelism is enabled.",
    },
}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_the_image_judges_how_a_model_is_spread(way: str, model: Path, tmp_path: Path) -> None:
    program = tmp_path / "in_image.py"
    program.write_text((ROOT / "src/hfship/serve/in_image.py").read_text())
    mounts = f"-v {model}:/models/m:ro -v {program}:/in_image.py:ro"
    said = in_the_box(
        f"docker run --rm --network none --cap-drop ALL {mounts} --entrypoint python3"
        f" {components.VLLM_IMAGE} /in_image.py free /models/m {way}"
    )
    rows = [json.loads(line[len(MARK) :]) for line in said.splitlines() if line.startswith(MARK)]
    assert rows[-1] == WAYS[way], said
