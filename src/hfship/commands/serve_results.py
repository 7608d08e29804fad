# SPDX-License-Identifier: Apache-2.0
"""What comes of `hfship serve`: results for people, and rows for --json (docs/json.md)."""

from __future__ import annotations

import json
import shlex
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Sequence, Tuple

from hfship.base.text import counted, human_bytes, labelled, table
from hfship.base.values import asdict, dataclass, field
from hfship.serve.deployments import Deployment
from hfship.serve.facts import ModelFacts
from hfship.serve.files import ENV_FILE, plan_value
from hfship.serve.measured import Measured, measured_text
from hfship.serve.messages import Answer
from hfship.serve.plan import vllm_arguments
from hfship.serve.start import Started
from hfship.serve.task import UNKNOWN, task_named
from hfship.serve.terms import KEY_VARIABLE, Plan
from hfship.serve.vllm_table import version_text

if TYPE_CHECKING:
    from hfship.serve.choices import Choice
    from hfship.serve.explain import Line

EXAMPLE_TOKENS = 16  # of the answer to the request that is proposed


@dataclass(frozen=True)
class Sizing:
    """--plan without a machine to plan for: what to buy. `rows` as of serve.fit.sizing."""

    name: str
    facts: ModelFacts
    rows: List[List[str]]

    def text(self) -> str:
        """The model, and a table."""
        header = [
            "split",
            "weights per GPU",
            "short context",
            "full context",
        ]
        model = facts_summary(self.name, self.facts)
        advice = table(self.rows, header)
        return f"{model}\n{advice}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md: serve."""
        return {
            "name": self.name,
            "facts": asdict(self.facts),
            "sizing": self.rows,
        }


@dataclass(frozen=True)
class PlannedModel:
    """--plan: how the model would be served, what else could be, and how that comes about."""

    facts: ModelFacts
    plan: Plan
    measured: Measured = field(default_factory=Measured)  # of an earlier start that was alike
    choices: Tuple[Choice, ...] = ()
    explanation: Tuple[Line, ...] = ()
    changes: Tuple[str, ...] = ()  # of the deployment that is there

    def text(self) -> str:
        """The model and the plan, then the choices in groups."""
        parts = [facts_summary(self.plan.name, self.facts), plan_summary(self.plan, self.measured)]
        if self.explanation:
            parts.append("on each GPU")
            parts.append(_indented(table(self.explanation)))
        if self.changes:
            parts.append("changes of the deployment")
            parts.extend(f"  {change}" for change in self.changes)
        parts.extend(choices_summary(self.choices))
        return "\n".join(parts)

    def json(self) -> Dict[str, Any]:
        """docs/json.md: serve."""
        found = {
            "name": self.plan.name,
            "facts": asdict(self.facts),
            "plan": plan_value(self.plan),
            "arguments": vllm_arguments(self.plan),
            "measured": asdict(self.measured) if self.measured.at else None,
            "changes": list(self.changes),
            "choices": [asdict(choice) for choice in self.choices],
        }
        found["explanation"] = [line._asdict() for line in self.explanation]
        return found


def choices_summary(choices: Sequence[Choice]) -> Iterator[str]:
    """The choices in their groups: what each GPU needs, and what comes of it."""
    from hfship.serve.choices import GROUPS

    for group in GROUPS:
        rows = [_choice_row(choice) for choice in choices if choice.group == group]
        if rows:
            yield group
            yield _indented(table(rows))


def _choice_row(choice: Choice) -> List[str]:
    need = ""
    if choice.need:
        need = f"{human_bytes(choice.need)} per GPU"
    comes_of_it = choice.why
    if choice.length:
        requests = f"about {choice.requests:g} requests"
        comes_of_it = f"holds {choice.length} tokens, {requests}: {choice.flags}"
    return [choice.image.rpartition("/")[2], choice.split, need, comes_of_it]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


@dataclass(frozen=True)
class WrittenDeployment:
    """--write-only: where the files are."""

    deployment: Deployment

    def text(self) -> str:
        """The folder, and how to start what it describes without hfship."""
        folder = self.deployment.folder
        quoted = shlex.quote(str(folder))
        start_it = f"cd {quoted} && docker compose up -d"
        return f"wrote {folder}\n  start    {start_it}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md: serve."""
        return {
            "name": self.deployment.plan.name,
            "state": "written",
            "folder": str(self.deployment.folder),
        }


@dataclass(frozen=True)
class ServedModel:
    """A model that answers: where, and how to ask it, by commands that have no key in them."""

    deployment: Deployment
    facts: ModelFacts
    started: Started
    measured: Measured

    @property
    def answer(self) -> Answer:
        """The first answer."""
        return self.started.answer

    @property
    def env_file(self) -> Path:
        """The file with the key."""
        return self.deployment.folder / ENV_FILE

    def text(self) -> str:
        """The address, the names, and a command to try."""
        plan = self.deployment.plan
        if plan.network:
            seconds = f"{self.answer.seconds:.2f} s"
            return f"{plan.name} answers, behind the gateway (first token after {seconds})"
        tokens = self.measured.kv_tokens
        lines = labelled(
            names=", ".join(plan.served_names),
            key=f"{KEY_VARIABLE} in {self.env_file}",
            cache=f"{tokens} tokens, as vLLM measured" if tokens else "",
            start=self.started.phases_text(),
            **{"try": curl_example(plan, self.env_file, self.answer)},
        )
        return f"{plan.name} answers at {plan.url} ({self._proof()})\n{lines}"

    def _proof(self) -> str:
        """What proved that it works."""
        answer = self.answer
        if answer.task == UNKNOWN:
            return answer.note
        if answer.task in ("chat", "completion"):
            return f"{answer.task}, first token after {answer.seconds:.2f} s"
        return f"{answer.task}, answered in {answer.seconds:.2f} s"

    def json(self) -> Dict[str, Any]:
        """docs/json.md: serve."""
        plan = self.deployment.plan
        return {
            **plan_value(plan),
            "state": "healthy",
            "url": plan.url,
            "env_file": str(self.env_file),
            "folder": str(self.deployment.folder),
            "kv_cache_tokens": self.measured.kv_tokens or None,
            "latency_s": round(self.answer.seconds, 3),
            "task": self.answer.task,
            "start_s": self.started.seconds or None,
            "phases": dict(self.started.phases),
        }


def facts_summary(name: str, facts: ModelFacts) -> str:
    """One line about the model."""
    parts = [facts.architecture, counted(facts.layers, "layer")]
    if facts.experts:
        parts.append(f"{facts.experts} experts")
    parts.append(facts.dtype)
    if facts.quantization:
        parts.append(facts.quantization.method)
    weights = human_bytes(facts.weight_bytes)
    parts.append(f"{weights} of weights")
    parts.append(f"context up to {facts.max_length} tokens")
    return f"{name}: " + ", ".join(parts)


def split_summary(plan: Plan) -> str:
    """How a model is spread over its GPUs, for people.

    >>> split_summary(Plan(tensor_parallel_size=2, data_parallel_size=3))
    '3 copies, each split over 2'
    >>> split_summary(Plan(tensor_parallel_size=1, pipeline_parallel_size=3))
    'a pipeline of 3 stages'
    """
    parts = []
    if plan.pipeline_parallel_size > 1:
        parts.append(f"a pipeline of {plan.pipeline_parallel_size} stages")
    if plan.tensor_parallel_size > 1:
        parts.append(f"split over {plan.tensor_parallel_size}")
    if plan.data_parallel_size > 1:
        copies = [f"{plan.data_parallel_size} copies", *parts]
        return ", each ".join(copies)
    return ", each stage ".join(parts)


def plan_summary(plan: Plan, measured: Measured) -> str:
    """The plan for people, as it will run; what was measured where it has been, else estimated."""
    image = f"{plan.image}, not loaded here"
    if plan.image_id:
        image = f"{plan.image} (vLLM {version_text(plan.version)})"
    runs_on = ", ".join(plan.gpu_names) or "CPU"
    if len(plan.gpus) > 1:
        runs_on += f": {split_summary(plan)}"
    context = "as vLLM decides"
    if plan.max_model_len:
        context = f"{plan.max_model_len} tokens"
    cache = f"{human_bytes(plan.kv_bytes)} of KV cache"
    if plan.gpus:
        cache += " per GPU"
    tools = ", ".join(name for name in (plan.tool_parser, plan.reasoning_parser) if name)
    adapters = ", ".join(text.partition("=")[0] for text in plan.lora)
    signed = ""
    if plan.signed_by:
        signed = f"by {plan.signed_by}"
    return labelled(
        image=image,
        runs_on=runs_on,
        dtype=dtype_text(plan),
        context=context,
        cache=f"{cache}, for about {plan.concurrency:g} requests of full length",
        idle=plan.idle,
        measured=measured_text(measured),
        names=", ".join(plan.served_names),
        tools=tools,
        adapters=adapters,
        address=address_text(plan),
        signed=signed,
    )


def dtype_text(plan: Plan) -> str:
    """The type that it is computed in, where that is not the model's own, which stands above."""
    parts = []
    if plan.dtype != "auto":
        parts.append(plan.dtype)
    if plan.kv_cache_dtype != "auto":
        parts.append(f"KV cache in {plan.kv_cache_dtype}")
    return ", ".join(parts)


def address_text(plan: Plan) -> str:
    """Where it listens, and a word where that is more than this machine.

    >>> address_text(Plan(bind="0.0.0.0", port=8000))
    'http://127.0.0.1:8000/v1, open to all networks of this machine: 0.0.0.0:8000'
    """
    if ip_address(plan.bind).is_loopback:
        return plan.url
    bind = f"[{plan.bind}]" if ":" in plan.bind else plan.bind
    where = "the network of this address"
    if ip_address(plan.bind).is_unspecified:
        where = "all networks of this machine"
    return f"{plan.url}, open to {where}: {bind}:{plan.port}"


def curl_example(plan: Plan, env_file: Path, answer: Answer) -> str:
    """The request that proved the model, by curl that reads the key from .env through a pipe.

    Command lines can be read by everybody.
    """
    program = f'/^{KEY_VARIABLE}=/{{print "Authorization: Bearer",$2}}'
    header = f"awk -F= '{program}' {shlex.quote(str(env_file))}"
    root = plan.url[: -len("/v1")]
    task = task_named(answer.task)
    curl = f"{header} | curl -s -H @-"
    if task is None:
        return f"{curl} {root}{answer.route}"
    if task.is_upload:
        model = plan.served_names[0]
        return f"{curl} {root}{answer.route} -F file=@FILE.wav -F model={shlex.quote(model)}"

    question = {"model": plan.served_names[0], **task.body}
    if "max_tokens" in question:
        question["max_tokens"] = EXAMPLE_TOKENS
        question.pop("temperature")
    body = shlex.quote(json.dumps(question))
    return f"{curl} -H 'Content-Type: application/json' {root}{answer.route} -d {body}"
