# SPDX-License-Identifier: Apache-2.0
"""Runs in an image of vLLM, not in hfship: would this vLLM serve a model with these arguments?

    python3 -c THIS free|fixed ARGUMENTS OF `vllm serve`
    python3 -c THIS about                  versions alone, within a second: nothing of vLLM is run

Others read this file as text (serve/preflight.py, serve/docker.py). It does what `vllm serve` does
before it loads weights: parses the arguments, makes the configuration, loads the tokenizer, fills
in the chat template, reads adapters. With `free` a context that is too long is shortened to what
vLLM derives.

It prints lines `hfship-preflight {"stage": ...}` with `refused`, a sentence of vLLM's; `skipped`,
what this version of vLLM does not let be checked; or what was found. The last is of stage `done`.
It imports nothing of hfship, and of vLLM what 0.8.3 to 0.33 have.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
from typing import Any, Callable, Dict, List, NoReturn, Optional

MARK = "hfship-preflight "
PATIENCE_S = 170
MOST_TEXT = 2000  # characters of a sentence
# What this program meets on a version that it does not know, or because it has no network and no
# engine; all else is vLLM's refusal, and so is NotImplementedError.
NOT_KNOWN = (
    ImportError,
    AttributeError,
    TypeError,
    NameError,
    RuntimeError,
    MemoryError,
    ConnectionError,
    PermissionError,
    TimeoutError,
    socket.gaierror,
)
DERIVED = re.compile(r"greater than the derived max_model_len \(\w+=(\d+)")
PYDANTIC = re.compile(r"(?:Value|Assertion) error, (.*?)(?: \[type=|\Z)", re.DOTALL)


class Refused(Exception):
    """vLLM would not start; it was said."""


def tell(stage: str, **said: Any) -> None:
    """Say what came of a stage."""
    row = {"stage": stage, **said}
    text = json.dumps(row)
    print(f"\n{MARK}{text}", flush=True)  # noqa: T201


def sentence(error: BaseException) -> str:
    """What vLLM says, without pydantic's frame."""
    text = str(error) or type(error).__name__
    found = PYDANTIC.search(text)
    if found:
        text = found[1]
    if isinstance(error, KeyError):
        text = f"KeyError: {text}"
    return text.strip()[:MOST_TEXT]


def checked(stage: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; None where this version of vLLM has it in another way."""
    try:
        return work()
    except Refused:
        raise
    except NotImplementedError as error:
        tell(stage, refused=sentence(error))
        raise Refused from error
    except NOT_KNOWN as error:
        tell(stage, skipped=f"{type(error).__name__}: {sentence(error)}")
        return None
    except Exception as error:
        tell(stage, refused=sentence(error))
        raise Refused from error


def engine_config(args: Any, free: bool) -> Any:
    """vLLM's configuration: architecture, quantisation, context, splits."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    def create() -> Any:
        engine = AsyncEngineArgs.from_cli_args(args)
        usage = UsageContext.OPENAI_API_SERVER
        return engine.create_engine_config(usage_context=usage)

    try:
        return create()
    except ValueError as error:
        derived = DERIVED.search(str(error))
        if not derived or not free:
            raise
        args.max_model_len = int(derived[1])
        return create()


def tokenizer_of(args: Any, model: Any) -> Any:
    """The tokenizer; vLLM itself would notice only at the first request that it has no words."""
    if getattr(args, "skip_tokenizer_init", False):
        return None
    try:
        from vllm.tokenizers import cached_tokenizer_from_config
    except ImportError:
        from vllm.transformers_utils.tokenizer import cached_tokenizer_from_config
    tokenizer = cached_tokenizer_from_config(model)
    if not tokenizer.encode("Hello"):
        raise ValueError("the tokenizer makes nothing of a text: its files are not there")
    return tokenizer


def fill_template(args: Any, tokenizer: Any) -> None:
    """Fill in a chat template, the operator's or the model's.

    Only one that cannot be read is refused: what it wants of a conversation is its own affair.
    """
    from jinja2 import TemplateSyntaxError

    given = args.chat_template
    if given and os.path.isfile(given):
        with open(given, encoding="utf-8") as file:
            given = file.read()
    question = [{"role": "user", "content": "Hello"}]
    try:
        tokenizer.apply_chat_template(
            question, chat_template=given, tokenize=False, add_generation_prompt=True
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template, line {error.lineno}: {error}") from error
    except Exception as error:
        raise ImportError(sentence(error)) from error


def read_adapters(args: Any, config: Any) -> None:
    """Let vLLM look at what the adapters say of themselves."""
    from vllm.lora.peft_helper import PEFTHelper

    for module in args.lora_modules or ():
        helper = PEFTHelper.from_local_dir(module.path, config.model_config.max_model_len)
        helper.validate_legal(config.lora_config)


def find_parsers(args: Any) -> None:
    """The parsers that are named, by the managers that `vllm serve` asks."""
    try:
        from vllm.tool_parsers import ToolParserManager
    except ImportError:
        from vllm.entrypoints.openai.tool_parsers import ToolParserManager
    from vllm.reasoning import ReasoningParserManager

    if getattr(args, "tool_call_parser", None):
        ToolParserManager.get_tool_parser(args.tool_call_parser)
    if getattr(args, "reasoning_parser", None):
        ReasoningParserManager.get_reasoning_parser(args.reasoning_parser)


def kv_bytes_per_token(config: Any) -> Optional[int]:
    """Bytes of KV cache per token on each GPU; None where layers differ from each other."""
    model = config.model_config
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ["full_attention"])
    if model.is_hybrid or model.use_mla or model.get_sliding_window():
        return None
    if kinds != {"full_attention"}:
        return None
    width = model.dtype.itemsize
    if str(config.cache_config.cache_dtype).startswith("fp8"):
        width = 1
    heads = model.get_num_kv_heads(config.parallel_config)
    layers = model.get_num_layers(config.parallel_config)
    per_head = model.get_head_size() * width
    return int(2 * layers * heads * per_head)


def check(args: Any, free: bool) -> None:
    """All stages, with the arguments as vLLM parsed them."""
    if getattr(args, "model_tag", None):
        args.model = args.model_tag
    config = checked("config", lambda: engine_config(args, free))
    found: Dict[str, Any] = {}
    if config is not None:
        model = config.model_config
        found["max_model_len"] = int(model.max_model_len)
        tokenizer = checked("tokenizer", lambda: tokenizer_of(args, model))
        if tokenizer is not None:
            checked("template", lambda: fill_template(args, tokenizer))
        checked("lora", lambda: read_adapters(args, config))
        found["kv_bytes"] = checked("kv", lambda: kv_bytes_per_token(config))
    checked("parsers", lambda: find_parsers(args))
    tell("done", **found)


def serve_command(words: List[str], free: bool) -> None:
    """`vllm serve WORDS`, which ends in `check` instead of a server."""
    import vllm
    from vllm.entrypoints.cli import serve

    tell("version", version=vllm.__version__)
    serve.ServeSubcommand.cmd = staticmethod(lambda args: check(args, free))
    sys.argv = ["vllm", "serve", *words]
    from vllm.entrypoints.cli.main import main

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main()
    except SystemExit as error:
        if error.code:
            _, _, reason = said.getvalue().rpartition("error: ")
            tell("arguments", refused=reason.strip()[:MOST_TEXT])
            raise Refused from error


def about() -> None:
    """The versions of vLLM and of torch's CUDA, and where the program is; "" for none."""
    version, cuda = "", ""
    import importlib.metadata  # loads much, and outside of images nobody asks
    import importlib.util

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("vllm")
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        place = os.path.join(os.path.dirname(torch.origin), "version.py")
        with contextlib.suppress(OSError), open(place, encoding="utf-8") as file:
            found = re.search(r"^cuda\b.*= *'([\d.]+)'", file.read(), re.MULTILINE)
            if found:
                cuda = found[1]
    tell("about", version=version, cuda=cuda, program=shutil.which("vllm") or "")


def stop(*_: object) -> NoReturn:
    """End at once."""
    os._exit(143)


if __name__ == "__main__":
    # The first process of a container ignores signals that it has no handler for.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE_S)
    with contextlib.suppress(Refused):
        if sys.argv[1] == "about":
            about()
            sys.exit()
        checked("arguments", lambda: serve_command(sys.argv[2:], sys.argv[1] == "free"))
