# SPDX-License-Identifier: Apache-2.0
"""`hfship models`: check and list a models file, or print an example or the schema of one."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, List

from hfship.base.errors import Exit, UsageError
from hfship.base.modelsfile import json_schema
from hfship.base.text import table
from hfship.base.values import asdict
from hfship.commands.modelskeys import models_file, models_schema

if TYPE_CHECKING:
    from hfship.base.settings import ListedModel, ModelsFile
    from hfship.commands.context import Context

MODELS_EXAMPLE = """\
# The models of a site, for: hfship VERB --models models.toml [NAME...]
# Flags win over HFSHIP_* and HF_* variables, those over this file. \
Relative folders start where this file lies.

[defaults]
models_dir = "~/models"                          # connected side: fetch writes here,
package_dir = "~/transfer_package"               # and pack here
transfer_dir = "/data/transfer"                  # offline side: archives arrive here,
site_models_dir = "/data/models/huggingface"     # are unpacked to here,
deploy_dir = "/data/deploy"                      # and served from here
log_dir = "~/logs/hfship"
# endpoint = "https://hub.example.org"           # default: huggingface.co
# mirror = ["https://mirror.example.org"]        # asked before the endpoint
# profile = "smallest"                           # of archives; default: standard
# split = "fat32"                                # or dvd, bd25, bd50, 8G; default: one file
# image = "vllm/vllm-openai:v0.27.1"             # default: the newest that docker has

[defaults.serve]
gpu_memory_utilization = 0.9

[policy]                                         # what may cross; HFSHIP_POLICY_* wins over it
pickle = "report"                                # or allow, weights-only, refuse
remote_code = "report"                           # or allow, refuse
# licences = ["apache-2.0", "mit", "!*-nc-*"]    # with ! they refuse
# max_file = "50G"
# require = ["release", "security"]              # roles that must have signed
# keys = "/etc/hfship/keys"                      # DIR/ROLE/NAME.pem
# scan = ["clamscan -r --no-summary {}"]         # before pack and after unpack

[[model]]
repo = "Qwen/Qwen3-8B"                           # called Qwen3-8B unless `name` says otherwise
revision = "main"                                # branch, tag or commit
exclude = ["*.onnx"]

[model.serve]                                    # whatever `hfship serve` has as an option
port = 8001
max_model_len = 32768
aliases = ["chat"]                               # names in the API beside \
Qwen3-8B and Qwen/Qwen3-8B

[[model]]
repo = "meta-llama/Llama-3.1-70B-Instruct"
name = "llama-70b"
split = "bd25"

[model.serve]
gpus = [0, 1, 2, 3]
tensor_parallel_size = 4
port = 8002
env = { VLLM_LOGGING_LEVEL = "INFO" }
extra_args = ["--enable-auto-tool-choice", "--tool-call-parser", "llama3_json"]

# One address for all of them, with keys that `hfship key add NAME` makes:
# [gateway]
# port = 443                                     # default: 8080, with a certificate 8443
# tls_cert = "/etc/ssl/site.pem"
# tls_key = "/etc/ssl/private/site.key"
# http_port = 80                                 # sends clients to 443
#
# In a [[model]]: replicas = 2, standby = 1, affinity = "prefix", mode = "on-demand".
#
# [[key]]                                        # what a key may do; without it, all
# name = "alice"
# models = ["Qwen3-8B"]
# rate = "60/min"
# streams = 8
# expires = "2027-01-31"
#
# [[host]]                                       # models on several machines, over ssh
# name = "gpu1"                                  # address, user, port, key, jump as ssh has them
# labels = { gpu = "h200" }
#
# In a [[model]]: hosts = ["gpu1"], host_labels = { gpu = "h200" }, nodes = 2.
"""


def models_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `models`."""
    add = parser.add_argument
    add("models_file", nargs="?", metavar="FILE", help="models file (default: HFSHIP_MODELS_FILE)")
    add("--example", action="store_true", help="print a models file that shows every part, in TOML")
    add("--schema", action="store_true", help="print a JSON Schema of all keys, for editors")


def cmd_models(context: Context) -> Exit:
    """What a models file holds, after it was checked."""
    args, reporter = context.args, context.reporter
    if args.example:
        reporter.result(MODELS_EXAMPLE.rstrip("\n"))
        return Exit.OK
    if args.schema:
        reporter.result(schema_text())
        return Exit.OK

    file = models_file(args)
    if not file:
        raise UsageError("no models file is named", "", "hfship models --example > models.toml")

    models = [{**asdict(model), "deployment": model.deployment} for model in file.models]
    value = {
        "path": str(file.path),
        "defaults": file.defaults,
        "models": models,
    }
    lines = models_table(file).splitlines()
    reporter.result_of("\n".join(line[: reporter.width] for line in lines), value)
    return Exit.OK


def schema_text() -> str:
    """The JSON Schema of a models file."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**dialect, **json_schema(models_schema())}, indent=2)


def models_table(file: ModelsFile) -> str:
    """The models of a file, for people."""
    if not file.models:
        return f"{file.path} lists no model"
    return table([_cells(model) for model in file.models], ("name", "repo", "revision", "serve"))


def _cells(model: ListedModel) -> List[str]:
    served = " ".join(f"{key}={json.dumps(value)}" for key, value in model.serve.items())
    return [model.name, model.repo or "-", model.wishes.get("revision", "-"), served]
