# SPDX-License-Identifier: Apache-2.0
"""Deployment files.

Owns the text of what lies in DEPLOY_DIR/NAME: plan.json, .env, docker-compose.yml. Pure functions
of the plan, and the key for .env; the same plan gives the same bytes.
Promises: plain files that an operator can read, and run without hfship (`docker compose up -d`
there). The key and what --env gave are in .env alone: not in the plan, not on a command line. Every
string is quoted, so no name or path can change what a file means.

Formats (docs/formats.md):
  plan.json           hfship-plan/1: "format" and the fields of Plan, keys sorted, indented by one
                      space, UTF-8; of the variables that were asked for it has the names; readers
                      ignore fields they do not know
  .env                a comment; VLLM_API_KEY=KEY, unquoted; then all variables, a line each
  docker-compose.yml  a comment; then YAML with every text in double quotes
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping

from hfship.base.errors import IntegrityError, UsageError
from hfship.base.reading import parse_json
from hfship.base.settings import typed_fields
from hfship.base.values import asdict, replace
from hfship.serve.terms import CONTAINER_PORT, KEY_VARIABLE, LOOPBACK_OF, Plan

PLAN_FORMAT = "hfship-plan/1"
# Far above what vLLM takes, which has threads for each of 8 GPUs and 192 cores, and far below what
# ends a host.
PIDS_LIMIT = 32768
CDI_KIND = "nvidia.com/gpu"
PLAN_FILE, ENV_FILE, COMPOSE_FILE = "plan.json", ".env", "docker-compose.yml"

_HEALTH_CHECK = (
    "import urllib.request as u;"
    " u.build_opener(u.ProxyHandler({})).open('http://%s/health', timeout=8)"
)


def plan_value(plan: Plan) -> Dict[str, Any]:
    """The fields of a plan as anybody may read them: of the variables that were asked for, which
    may be secret, the names alone."""
    asked = asked_variables(plan.wishes)
    value = asdict(plan)
    if not asked:
        return value

    for name in asked:
        value["env"].pop(name, None)
    value["wishes"]["env"] = asked
    return value


def asked_variables(wishes: Mapping[str, Any]) -> List[str]:
    """The names of the variables that were asked for with --env.

    >>> asked_variables({"env": ["A=1", "B"]})
    ['A', 'B']
    """
    items = wishes.get("env")
    if not isinstance(items, list):
        return []
    names = []
    for item in items:
        name, _, _ = str(item).partition("=")
        names.append(name)
    return names


def with_variables(plan: Plan, values: Mapping[str, str]) -> Plan:
    """A plan that was read, with the variables that were asked for as its .env has them."""
    asked = asked_variables(plan.wishes)
    if not asked:
        return plan
    env = dict(plan.env)
    items = []
    for name in asked:
        if name in values:
            value = values[name]
            env[name] = value
            items.append(f"{name}={value}")

    wishes = {**plan.wishes, "env": items}
    return replace(plan, env=env, wishes=wishes)


def plan_text(plan: Plan) -> str:
    """The text of plan.json."""
    value = {"format": PLAN_FORMAT, **plan_value(plan)}
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1)
    return text + "\n"


def parse_plan(text: str, where: str) -> Plan:
    """The plan in the text of a plan.json. `where` names the file. Raises IntegrityError."""
    try:
        value = parse_json(text)
        form = value["format"]
        if form != PLAN_FORMAT or not value["name"]:
            raise ValueError(f"format is {form!r}, this hfship reads {PLAN_FORMAT}")
        return Plan(**typed_fields(Plan(), value))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        why = f"{type(exc).__name__}: {exc}"
        raise IntegrityError(f"{where} is not a valid plan", why, "run hfship serve again") from exc


def env_text(plan: Plan, key: str) -> str:
    """The text of .env: the API key first and unquoted, so that scripts can read it."""
    container = container_name(plan.name)
    lines = [
        f"# Variables of {container}, and its API key: keep this file at mode 0600.",
        f"{KEY_VARIABLE}={key}",
    ]
    for variable, value in plan.env.items():
        lines.append(f"{variable}={env_quote(value)}")

    return "\n".join(lines) + "\n"


def env_quote(value: str) -> str:
    """A value as docker compose reads it back: bare where nothing can be misread, else in quotes.

    >>> env_quote("1"), env_quote("a $b"), env_quote("it's $5")
    ('1', "'a $b'", '"it\\'s \\\\$5"')
    """
    if re.match(r"[A-Za-z0-9_./:,@%+-]+\Z", value):
        return value
    if "'" not in value and "\\" not in value:
        return f"'{value}'"
    escaped = re.sub(r'(["\\$])', r"\\\1", value)
    return f'"{escaped}"'


def env_unquote(text: str) -> str:
    r"""The value that `env_quote` wrote, or an operator in the same way.

    >>> [env_unquote(env_quote(value)) for value in ("1", "a $b", "it's $5", "it's \\n")]
    ['1', 'a $b', "it's $5", "it's \\n"]
    """
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    if len(text) > 1 and text[0] == text[-1] == '"':
        return re.sub(r'\\(["\\$])', r"\1", text[1:-1])
    return text


def variables_in_env(text: str) -> Dict[str, str]:
    r"""The variables in the text of a .env, but for the API key.

    >>> variables_in_env("# x\nVLLM_API_KEY=sk-1\nA='b c'\n")
    {'A': 'b c'}
    """
    values = {}
    for name, value in re.findall(r"^([A-Za-z_][A-Za-z0-9_]*)=(.*)$", text, re.MULTILINE):
        if name != KEY_VARIABLE:
            values[name] = env_unquote(value)
    return values


def key_in_env(text: str) -> str:
    """The API key in the text of a .env, "" when there is none.

    Raises ValueError for one that compose, curl or an HTTP header would not carry unchanged.

    >>> key_in_env("# x\\nVLLM_API_KEY=sk-1\\nA=b\\n")
    'sk-1'
    """
    match = re.search(rf"^{KEY_VARIABLE}=(.*)$", text, re.MULTILINE)
    if match is None:
        return ""
    key = match[1].strip().strip("'\"")
    if not re.match(r"[A-Za-z0-9_.~/:@%+-]*\Z", key):
        raise ValueError(f"{KEY_VARIABLE} may have letters, digits and _.~/:@%+- only")
    return key


def require_env(name: str, value: str) -> None:
    """Raise UsageError for a variable that .env cannot carry."""
    good_name = re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", name)
    control = re.search(r"[\x00-\x1f\x7f]", value)
    if not good_name or control:
        what = f"--env {name}: not a variable"
        why = "names have letters, digits and _, values one line"
        raise UsageError(what, why, "")
    if name == KEY_VARIABLE:
        what = f"--env {KEY_VARIABLE} is refused"
        why = "command lines can be read by everybody"
        raise UsageError(what, why, "edit the deployment's .env")


def container_name(name: str) -> str:
    """The name of a deployment's container."""
    return f"vllm_{name}"


def project_name(name: str) -> str:
    """A compose project name (lower case letters, digits, - and _), different for different names.

    >>> project_name("qwen3-8b"), project_name("Qwen3.8B")
    ('hfship-qwen3-8b', 'hfship-qwen3-8b-50a0b8')
    """
    plain = re.sub(r"[^a-z0-9_-]", "-", name.lower())
    if plain == name:
        return f"hfship-{plain}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"hfship-{plain}-{digest[:6]}"


def gpu_devices(plan: Plan) -> Dict[str, Any]:
    """The GPUs of a plan as docker-compose.yml reserves them, by UUID."""
    if not plan.cdi:
        return {"driver": "nvidia", "device_ids": list(plan.gpus), "capabilities": ["gpu"]}
    names = [f"{CDI_KIND}={uuid}" for uuid in plan.gpus]
    return {"driver": "cdi", "device_ids": names, "capabilities": ["gpu"]}


def _in_brackets(address: str) -> str:
    """An address before a port.

    >>> _in_brackets("::1")
    '[::1]'
    """
    return f"[{address}]" if ":" in address else address


def _own_address(plan: Plan) -> str:
    """HOST:PORT of the API, seen from inside its container."""
    host = "127.0.0.1"
    if plan.nodes:
        host = LOOPBACK_OF.get(plan.bind, plan.bind)
    return f"{_in_brackets(host)}:{plan.inner_port}"


def compose_value(plan: Plan) -> Mapping[str, Any]:
    """What docker-compose.yml says."""
    # Not for those who only read deployments, such as `status`.
    from hfship.serve.mounts import Mount, mount_volumes, volume_of
    from hfship.serve.nodes import node_command, node_service
    from hfship.serve.plan import LOADING_S, vllm_arguments

    model = volume_of(Mount(plan.model_dir, f"/models/{plan.name}"))
    cache = {"type": "volume", "source": "vllm-cache", "target": "/root/.cache"}
    entrypoint, command = node_command(plan, vllm_arguments(plan))
    service: Dict[str, Any] = {
        "container_name": container_name(plan.name),
        "image": plan.image,
        "pull_policy": "never",
        "entrypoint": entrypoint,
        "command": command,
        "env_file": [ENV_FILE],
        "volumes": [model, cache, *mount_volumes(plan)],
        "shm_size": plan.shm_size,
        "ipc": "private",
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": "60s",
        "security_opt": ["no-new-privileges:true"],
        "cap_drop": ["ALL"],
        "pids_limit": PIDS_LIMIT,
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}},
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _HEALTH_CHECK % _own_address(plan)],
            "interval": "15s",
            "timeout": "10s",
            "retries": 4,
            "start_period": f"{max(LOADING_S, plan.ready_timeout_s)}s",
        },
        "labels": {"hfship.name": plan.name, "hfship.image-id": plan.image_id},
    }
    if plan.model_version:
        # A folder that another version took the place of stays mounted as it was: with a new
        # label docker makes the container anew.
        service["labels"]["hfship.model-version"] = plan.model_version
    if plan.cap_add:
        service["cap_add"] = list(plan.cap_add)
    if plan.memory_limit:
        service["mem_limit"] = plan.memory_limit
    networks: Dict[str, Any] = {}
    if plan.nodes:
        service.update(node_service(plan))
    elif plan.network:
        # No port of this machine leads to it: the gateway asks for keys, vLLM not on all paths.
        networks = {plan.network: {"external": True}}
        service["networks"] = [plan.network]
    else:
        service["ports"] = [f"{_in_brackets(plan.bind)}:{plan.port}:{CONTAINER_PORT}"]
    if plan.device == "gpu":
        service["deploy"] = {"resources": {"reservations": {"devices": [gpu_devices(plan)]}}}

    value: Dict[str, Any] = {
        "name": project_name(plan.name),
        "services": {"vllm": service},
        "volumes": {"vllm-cache": {}},
    }
    if networks:
        value["networks"] = networks
    return value


def compose_text(plan: Plan) -> str:
    """The text of docker-compose.yml."""
    head = f"# Written by hfship from {PLAN_FILE}; `hfship serve {plan.name}` writes it again."
    lines = [head, *yaml_lines(compose_value(plan))]
    return "\n".join(lines) + "\n"


def yaml_lines(value: Any) -> List[str]:
    """A value of tables, lists, texts, numbers and booleans as YAML that compose takes literally.

    >>> print("\\n".join(yaml_lines({"a": ["x: $y", 1], "b": {"c": True}, "d": {}})))
    a:
      - "x: $$y"
      - 1
    b:
      c: true
    d: {}
    """
    return _yaml(value, lambda text: [yaml_string(text)])


def plain_yaml(value: Any) -> List[str]:
    """A value as YAML for programs that replace no variables in it, such as Kubernetes: texts of
    several lines stay readable.

    >>> print("\\n".join(plain_yaml({"a": "$x", "b": "one\\n two\\n"})))
    a: "$x"
    b: |
      one
       two
    """
    return _yaml(value, _text_lines)


def _text_lines(text: str) -> List[str]:
    lines = text.split("\n")
    last = lines.pop()
    are_plain = all(line.isprintable() for line in lines)
    if not lines or last or not are_plain or not lines[-1] or text[0] in " \n":
        return [_quoted(text)]
    return ["|", *_indented(lines)]


def _yaml(value: Any, quote: Callable[[str], List[str]]) -> List[str]:
    if isinstance(value, str):
        return quote(value)
    if not value or not isinstance(value, (dict, list)):
        return [json.dumps(value)]

    lines: List[str] = []
    if isinstance(value, list):
        for item in value:
            first, *more = _yaml(item, quote)
            lines.append(f"- {first}")
            lines += _indented(more)
        return lines

    for key, item in value.items():
        nested = _yaml(item, quote)
        if item and isinstance(item, (dict, list)):
            lines.append(f"{key}:")
            lines += _indented(nested)
        else:
            lines.append(f"{key}: {nested[0]}")
            lines += nested[1:]

    return lines


def _indented(lines: Iterable[str]) -> List[str]:
    return [f"  {line}" for line in lines]


def yaml_string(text: str) -> str:
    """A double-quoted YAML string; `$` doubled, because compose would interpolate it.

    >>> yaml_string('say "$x"')
    '"say \\\\"$$x\\\\""'
    """
    return _quoted(text.replace("$", "$$"))


def _quoted(text: str) -> str:
    """A double-quoted YAML string."""
    quoted = json.dumps(text, ensure_ascii=False)
    # JSON leaves some characters bare that YAML must have escaped.
    bare = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
    return re.sub(bare, lambda match: f"\\u{ord(match[0]):04x}", quoted)
