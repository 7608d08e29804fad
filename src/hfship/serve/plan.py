# SPDX-License-Identifier: Apache-2.0
"""The plan: how one model is served.

Owns the decision: which image, which GPUs, split over how many, how much context, which port.
Facts, host and options in; a Plan out, or a HostError that says why not and what would work.
Promises: pure, so that any machine can plan for any other; the same input gives the same plan.
Estimates lean to the safe side by some 10 %; vLLM's own numbers are read from its log once it runs.
Never: asks docker or a GPU anything.
"""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from hfship.base.errors import HostError
from hfship.base.manifest import BRING_AGAIN
from hfship.base.text import GIB
from hfship.serve.clients import parser_settings, parser_warnings, parsers_for
from hfship.serve.fit import (
    USEFUL_LENGTH,
    Fit,
    GpuKind,
    as_loaded,
    batch_limits,
    fit_cpu,
    usual_length,
)
from hfship.serve.gpus import GpuPool, gpu_pools
from hfship.serve.images import is_own, require_capability
from hfship.serve.mounts import mount_arguments, passed_on
from hfship.serve.nodes import node_settings
from hfship.serve.parallel import (
    choose_split,
    demand_of,
    idle_advice,
    kind_of,
    requests_held,
    require_known_ways,
    rounded_requests,
)
from hfship.serve.task import likely_tasks
from hfship.serve.terms import NEWEST, Plan
from hfship.serve.vllm import (
    LEAST_DRIVER,
    cuda_of,
    flag_warnings,
    flags_in,
    knows_flag,
    refuse_own_flags,
)
from hfship.serve.vllm_table import (
    ARCHITECTURES,
    QUANTIZATIONS,
    intervals_of,
    knows,
    version_text,
    versions,
)

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import Gpu, Host, Image, ServeOptions

# Seconds that a container may take to load; a shorter --timeout shortens our patience, not its.
LOADING_S = 3600
PORTS = range(8000, 9000)
BELIEVED_LENGTH = 1 << 28  # tokens; the longest context of 2026 has some 10 million
CAPABILITY_OF_BFLOAT16 = (8, 0)

# Model types that overflow in float16: _FLOAT16_NOT_SUPPORTED_MODELS in vllm/config/model.py.
NEVER_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})

MISTRAL = "mistral"  # vLLM's name of Mistral's own layout and tokenizer

# Variables that keep programs in the container from looking for a network.
_OFFLINE = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "VLLM_NO_USAGE_STATS",
    "DO_NOT_TRACK",
)


def make_plan(
    name: str,
    model_dir: str,
    facts: ModelFacts,
    host: Host,
    image: Image,
    options: ServeOptions,
    previous: Optional[Plan] = None,
) -> Plan:
    """The plan for a device and image that choose_device and choose_image settled.

    `previous` is the deployment's plan so far: its port and GPUs are kept where they can be. Raises
    HostError that names what would work.
    """
    version = image.version or NEWEST
    facts = as_loaded(facts, version, options)
    require_known_model(name, facts, options)
    require_supported(name, facts, image)
    refuse_own_flags(options.extra_args)

    parsers = parsers_for(facts, version, options)
    own_gpus = previous.gpus if previous else ()
    pool, found = best_fit(name, facts, host, image, options, own_gpus)
    gpus = pool.gpus[: found.gpus]
    length = context_length(name, found, options)
    own_port = previous.port if previous else None
    port = choose_port(name, options.port, own_port, host.taken_ports)

    return Plan(
        # as asked
        device=options.device,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_seqs=requests_at_a_time(found, pool.gpus, options),
        enable_expert_parallel=options.enable_expert_parallel,
        wanted_concurrency=options.wanted_concurrency,
        kv_cache_dtype=options.kv_cache_dtype,
        trust_remote_code=options.trust_remote_code,
        no_tools=options.no_tools,
        chat_template=options.chat_template,
        lora=options.lora,
        mounts=options.mounts,
        bind=options.bind,
        ready_timeout_s=options.ready_timeout_s,
        extra_args=options.extra_args,
        aliases=options.aliases,
        allow_changed=options.allow_changed,
        key=options.key,
        wishes=options.wishes,
        # chosen where nothing was asked for
        served_names=options.served_names or (name,),
        gpus=tuple(gpu.uuid for gpu in gpus),
        tensor_parallel_size=found.split.tp,
        pipeline_parallel_size=found.split.pp,
        data_parallel_size=found.split.dp,
        max_model_len=length,
        dtype=choose_dtype(name, facts, gpus, options),
        port=port,
        shm_size=options.shm_size or default_shm_size(found.gpus),
        env=environment(name, facts, options, found.kv),
        # what the choices rest on
        name=name,
        model_dir=model_dir,
        image=image.reference,
        image_id=image.id,
        entrypoint=image.entrypoint,
        version=version,
        embeds=facts.embeds,
        tokenizer_mode=MISTRAL if facts.own_tokenizer else "",
        load_format=MISTRAL if facts.own_layout else "",
        tool_parser=parsers.tools,
        reasoning_parser=parsers.reasoning,
        tasks=tuple(likely_tasks(facts.architecture, facts.embeds, facts.chat_template)),
        gpu_names=tuple(gpu.label for gpu in gpus),
        weight_bytes=facts.weight_bytes,
        kv_bytes=found.kv,
        concurrency=concurrent_requests(facts, found, pool.gpus, length, options),
        idle=idle_gpus(name, facts, pool.gpus, found, options),
        warnings=(*pool.warnings, *plan_warnings(facts, gpus, image, options, length)),
    )


def require_known_model(name: str, facts: ModelFacts, options: ServeOptions) -> None:
    """Refuse at once what vLLM would refuse after minutes.

    Raises HostError for a model without an architecture, and for a context beyond the model's own.
    """
    if not facts.architecture:
        raise HostError(f"cannot serve {name}", "config.json names no architecture", BRING_AGAIN)

    insists = options.env.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    if 0 < facts.max_length < options.max_model_len and not insists:
        raise HostError(
            f"cannot serve {name} with {options.max_model_len} tokens of context",
            f"the model was made for {facts.max_length}",
            f"hfship serve {name} --max-model-len {facts.max_length}"
            "\nor insist with --env VLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
        )


def best_fit(
    name: str,
    facts: ModelFacts,
    host: Host,
    image: Image,
    options: ServeOptions,
    own: Sequence[str] = (),
) -> Tuple[GpuPool, Fit]:
    """(the GPUs that may be used, the split over them), or the fit in RAM where there are none.

    Of the kinds of GPUs the first that holds a useful context is taken, else that with the longest.
    Raises HostError.
    """
    refused: List[HostError] = []
    works: List[Tuple[GpuPool, Fit]] = []
    for pool in gpu_pools(host, options, own):
        try:
            found = _fit_of_kind(name, facts, pool, host, image, options)
        except HostError as exc:
            refused.append(exc)
            continue
        works.append((pool, found))
        if found.length >= demand_of(facts, options).length:
            return pool, found

    if not works:
        raise refused[0]
    return max(works, key=_longest)


def _longest(choice: Tuple[GpuPool, Fit]) -> int:
    _, found = choice
    return found.length


def _fit_of_kind(
    name: str,
    facts: ModelFacts,
    pool: GpuPool,
    host: Host,
    image: Image,
    options: ServeOptions,
) -> Fit:
    if not pool.gpus:
        require_known_ways(name, facts, image.version or NEWEST, options)
        return fit_cpu(name, facts, host.memory, options, host.held)
    require_capability(name, facts, pool.gpus, image)
    return choose_split(name, facts, pool.gpus, image.version or NEWEST, options)


def idle_gpus(
    name: str, facts: ModelFacts, pool: Sequence[Gpu], found: Fit, options: ServeOptions
) -> str:
    """GPUs that nothing uses, with the command that does; "" where all are used."""
    if not pool:
        return ""
    return idle_advice(name, facts, pool, found, options)


def context_length(name: str, found: Fit, options: ServeOptions) -> int:
    """The context in tokens: as asked, or what fits.

    Raises HostError where a context fits that no model was made for: vLLM makes tables for it.
    """
    if options.max_model_len:
        return options.max_model_len
    if found.length > BELIEVED_LENGTH:
        what = f"cannot serve {name} with {found.length} tokens of context"
        why = "config.json says so, and no model was made for so many"
        raise HostError(what, why, f"hfship serve {name} --max-model-len {USEFUL_LENGTH}")

    return found.length


def requests_at_a_time(found: Fit, pool: Sequence[Gpu], options: ServeOptions) -> int:
    """--max-num-seqs as asked for, or what the states of requests allow; 0 leaves it to vLLM."""
    if options.max_num_seqs or not found.sequences or not pool:
        return options.max_num_seqs
    _, usual = batch_limits(kind_of(pool))
    if found.sequences < usual:
        return found.sequences
    return 0


def choose_dtype(name: str, facts: ModelFacts, gpus: Sequence[Gpu], options: ServeOptions) -> str:
    """The type to compute in; GPUs older than Ampere have no bfloat16.

    Raises HostError for a model that vLLM does not run in float16 there.
    """
    if options.dtype != "auto" or facts.dtype != "bfloat16":
        return options.dtype
    for gpu in gpus:
        if not (0, 0) < gpu.capability < CAPABILITY_OF_BFLOAT16:
            continue
        if facts.model_type in NEVER_FLOAT16:
            what = f"cannot serve {name} on {gpu.label}, which has no bfloat16"
            why = f"vLLM runs {facts.model_type} not in float16 either"
            step = "newer GPUs, or --dtype float32, which takes twice the memory"
            raise HostError(what, why, step)
        return "float16"
    return options.dtype


def choose_port(
    name: str, wanted: Optional[int], previous: Optional[int], taken: AbstractSet[int]
) -> int:
    """The port asked for, the one the deployment has, or the first free one from 8000.

    Raises HostError.
    """
    if wanted:
        return _require_free(name, wanted, taken)
    if previous and previous not in taken:
        return previous
    return _first_free(taken)


def _require_free(name: str, port: int, taken: AbstractSet[int]) -> int:
    if port in taken:
        why = "another program or deployment has it"
        free = _first_free(taken)
        step = f"hfship serve {name} --port {free}"
        raise HostError(f"port {port} is taken", why, step)
    return port


def _first_free(taken: AbstractSet[int]) -> int:
    for port in PORTS:
        if port not in taken:
            return port
    what = f"no port from {PORTS[0]} to {PORTS[-1]} is free"
    raise HostError(what, "", "give one with --port")


def default_shm_size(gpus: int) -> str:
    """Shared memory of the container; NCCL moves data between processes there."""
    if gpus > 1:
        return "16gb"
    return "4gb"


def concurrent_requests(
    facts: ModelFacts, found: Fit, pool: Sequence[Gpu], length: int, options: ServeOptions
) -> float:
    """How many requests of full length the KV cache of all copies holds.

    To one decimal place, to none beyond 10. 0 for a model whose requests take no cache.
    """
    kind = GpuKind()
    if pool:
        kind = kind_of(pool)
    requests = requests_held(facts, found, length or USEFUL_LENGTH, kind, options)
    return rounded_requests(requests)


def environment(name: str, facts: ModelFacts, options: ServeOptions, kv: int) -> Mapping[str, str]:
    """Variables of the container, in the order of their names. `kv`: bytes of KV cache.

    Nothing may look for a network, nothing phones home. The operator's win.
    """
    values = dict.fromkeys(_OFFLINE, "1")
    # vLLM's own patience is 600 s, which slow disks outlast.
    values["VLLM_ENGINE_READY_TIMEOUT_S"] = str(max(LOADING_S, options.ready_timeout_s))
    if options.device == "cpu":
        values["VLLM_CPU_KVCACHE_SPACE"] = str(kv // GIB)
        # Binding threads to cores needs rights that the container does not have.
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

    if facts.tiktoken:
        values["TIKTOKEN_ENCODINGS_BASE"] = f"/models/{name}"
    values.update(options.env)
    return dict(sorted(values.items()))


def plan_warnings(
    facts: ModelFacts, gpus: Sequence[Gpu], image: Image, options: ServeOptions, length: int
) -> List[str]:
    """What will work, but not as one may expect. `length`: tokens of context."""
    warnings = []
    if image.id and image.version is None:
        warnings.append(f"the vLLM version of {image.reference} is unknown; taken for the newest")
    warnings += _support_warnings(facts, image)
    warnings += _api_warnings(facts)
    if not options.no_tools:
        warnings += parser_warnings(facts, image.version or NEWEST)
    warnings += _code_warnings(facts, options)
    warnings += _offline_warnings(facts, options)
    warnings += _context_warnings(facts, options, length)
    warnings += _driver_warnings(gpus, image)
    warnings += flag_warnings(options.extra_args, image.version or NEWEST)
    return warnings


def _support_warnings(facts: ModelFacts, image: Image) -> Iterator[str]:
    """A class of models, or a quantisation, that other versions of vLLM have and this one not."""
    for kind, name in _names_in_table(facts).items():
        missing = _where_else(kind, name, image)
        if missing:
            yield f"vLLM {version_text(image.version or NEWEST)} may not run {name}: {missing}"


def _names_in_table(facts: ModelFacts) -> Mapping[str, str]:
    """What the table of vLLM can say something of: kind -> name."""
    names = {ARCHITECTURES: facts.architecture}
    if facts.quantization:
        names[QUANTIZATIONS] = facts.quantization.method
    return names


def _where_else(kind: str, name: str, image: Image) -> str:
    """Which versions have what the image's version lacks, "" when it has it or none does."""
    spans = intervals_of(kind, name)
    if not image.version or not spans or knows(image.version, kind, name):
        return ""
    have = ", ".join(span.text() for span in spans)
    return f"it is there {have}"


def require_supported(name: str, facts: ModelFacts, image: Image) -> None:
    """Refuse what an image of vLLM's own surely does not run: a quantisation that it has not, or a
    class of models that it dropped. One that it has not yet may run as a class of transformers.

    Raises HostError.
    """
    version = image.version
    if version is None or version not in versions() or not is_own(image.reference):
        return
    for kind, what in _names_in_table(facts).items():
        missing = _where_else(kind, what, image)
        dropped = all(span.last < version for span in intervals_of(kind, what))
        if missing and (dropped or kind == QUANTIZATIONS):
            raise HostError(
                f"cannot serve {name} with {image.reference}",
                f"vLLM {version_text(version)} does not run {what}: {missing}",
                "choose an --image of such a version, or another form of the model",
            )


def _api_warnings(facts: ModelFacts) -> Iterator[str]:
    """What clients of the API will meet."""
    tasks = likely_tasks(facts.architecture, facts.embeds, facts.chat_template)
    writes = not tasks or "completion" in tasks
    if writes and not facts.embeds and not facts.chat_template:
        yield "no chat template: /v1/chat/completions will answer 400"


def _code_warnings(facts: ModelFacts, options: ServeOptions) -> Iterator[str]:
    """Code that the model brings: pickles, classes of its own and of other repositories."""
    if facts.pickled:
        yield (
            "the weights are pickles: loading them can run code;"
            " prefer a repository with safetensors"
        )

    if facts.remote_code and not options.trust_remote_code:
        yield (
            f"the model brings own code; if vLLM does not know {facts.architecture},"
            " it needs --trust-remote-code"
        )

    foreign = [name for name in facts.remote_code if "--" in name]
    if foreign and options.trust_remote_code:
        yield f"code of another repository is not in the folder: {', '.join(foreign)}"


def _offline_warnings(facts: ModelFacts, options: ServeOptions) -> Iterator[str]:
    """Files that the model would load from a network."""
    has_tiktoken = facts.tiktoken or "TIKTOKEN_ENCODINGS_BASE" in options.env
    if facts.model_type == "gpt_oss" and not has_tiktoken:
        yield (
            "gpt-oss needs o200k_base.tiktoken and cl100k_base.tiktoken offline:"
            " put them into the model folder"
        )


def _context_warnings(facts: ModelFacts, options: ServeOptions, length: int) -> Iterator[str]:
    """A context that is a guess, or less than the model's own."""
    if not facts.heads or not facts.layers:
        yield "config.json does not tell the model's shape: the KV cache is a guess"
    if facts.stretched_length > facts.max_length and not options.max_model_len:
        yield (
            f"YaRN is set for {facts.stretched_length} tokens, but this vLLM goes by"
            f" max_position_embeddings, {facts.max_length}: raise it in config.json, too"
        )
    if options.max_model_len:
        return
    if length == usual_length(facts) < facts.max_length:
        yield (
            f"context of {length} tokens, as vLLM takes it: beyond that, LongRoPE answers short"
            f" prompts worse; for all of it --max-model-len {facts.max_length}"
        )
    elif 0 < length < facts.max_length:
        yield f"context shortened to {length} of {facts.max_length} tokens: that is what fits"


def _driver_warnings(gpus: Sequence[Gpu], image: Image) -> Iterator[str]:
    """Drivers older than the image's CUDA."""
    cuda, _ = cuda_of(image)
    least = LEAST_DRIVER.get(cuda, 0)
    old = set()
    for gpu in gpus:
        major = gpu.driver.partition(".")[0]
        if major and int(major) < least:
            old.add(gpu.driver)

    if old:
        yield f"the image has CUDA {image.cuda}, the driver {', '.join(sorted(old))} is older"


def vllm_arguments(plan: Plan) -> List[str]:
    """The arguments of `vllm serve` for the plan's version of vLLM.

    What the operator passes on wins over ours. The key is not among them: argv is public.
    """
    arguments = [
        f"/models/{plan.name}",
        "--served-model-name",
        *plan.served_names,
    ]
    arguments += ["--host", plan.listens_on, "--port", str(plan.inner_port)]
    given = flags_in(plan.extra_args)
    for flag, value in vllm_settings(plan).items():
        if flag in given or not knows_flag(plan.version, flag):
            continue
        arguments.append(flag)
        if value:
            arguments.append(value)

    for flag, values in mount_arguments(plan).items():
        if flag not in given:
            arguments += [flag, *values]

    return arguments + passed_on(plan)


def _gpu_settings(plan: Plan) -> Mapping[str, str]:
    """How vLLM shares out its work over the GPUs, and how much of their memory it takes."""
    settings = {"--tensor-parallel-size": str(plan.tensor_parallel_size)}
    if plan.pipeline_parallel_size > 1:
        settings["--pipeline-parallel-size"] = str(plan.pipeline_parallel_size)
    if plan.data_parallel_size > 1:
        settings["--data-parallel-size"] = str(plan.data_parallel_size)
    if plan.enable_expert_parallel:
        settings["--enable-expert-parallel"] = ""
    settings["--gpu-memory-utilization"] = f"{plan.gpu_memory_utilization:g}"
    return settings


def vllm_settings(plan: Plan) -> Mapping[str, str]:
    """Flags of `vllm serve` and their values ("": a flag without one), for any version of vLLM."""
    settings: Dict[str, str] = {}
    if plan.device == "gpu":
        settings.update(_gpu_settings(plan))
    if plan.nodes:
        settings.update(node_settings(plan))
    if plan.max_model_len:
        settings["--max-model-len"] = str(plan.max_model_len)
    if plan.max_num_seqs:
        settings["--max-num-seqs"] = str(plan.max_num_seqs)
    if plan.dtype != "auto":
        settings["--dtype"] = plan.dtype
    if plan.kv_cache_dtype != "auto":
        settings["--kv-cache-dtype"] = plan.kv_cache_dtype
    if plan.tokenizer_mode:
        settings["--tokenizer-mode"] = plan.tokenizer_mode
    if plan.load_format:
        settings["--config-format"] = plan.load_format
        settings["--load-format"] = plan.load_format
    if plan.trust_remote_code:
        settings["--trust-remote-code"] = ""
    settings.update(parser_settings(plan))
    # Prompts do not belong into logs; later versions keep them out unless asked.
    if plan.version < (0, 10, 2):
        settings["--disable-log-requests"] = ""
    # Else a health check every 15 s fills the log.
    settings["--disable-access-log-for-endpoints"] = "/health,/metrics,/ping"
    settings["--shutdown-timeout"] = "30"  # else a stop cuts answers in mid-sentence
    return settings
