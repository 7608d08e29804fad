# SPDX-License-Identifier: Apache-2.0
"""`hfship serve`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, List, Tuple

from hfship.base.errors import Exit, UsageError, command_line
from hfship.commands.options import (
    absolute_path,
    adapter,
    env_variable,
    gpu_list,
    ip_address,
    kept_version,
    port_number,
    positive_number,
    share_of_one,
)
from hfship.commands.results import print_results

if TYPE_CHECKING:
    from hfship.commands.context import Context


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship serve`; the `dest` of an option is its field of ServeOptions."""
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME|DIR|BUNDLE",
        help="a model, its folder, or a delivery: *.bundle.json, its folder",
    )
    add("--plan", action="store_true", help="say how it would be served, and do nothing")
    add("--explain", action="store_true", help="with --plan: the arithmetic, line by line")
    add(
        "--write-only",
        action="store_true",
        help="write the deployment's files without starting it",
    )
    add(
        "--instead-of",
        metavar="NAME",
        help="stop this deployment first, when its requests are answered: for models on demand",
    )
    add(
        "--rollback",
        type=kept_version,
        nargs="?",
        const="",
        metavar="COMMIT",
        help="go back to the version before this one, or to COMMIT; 'newest' goes forward again",
    )
    planned = "as a control host planned it: DEPLOY_DIR/_site/planned/NAME; can be given again"
    add("--planned", action="append", default=[], metavar="NAME", help=planned)
    gateway = "set up the gateway that a control host put here: DEPLOY_DIR/_site/gateway.json"
    add("--gateway", action="store_true", help=gateway)
    add("--name", help="name of the deployment (default: the folder's name)")
    add(
        "--reset",
        action="store_true",
        help="forget the options of earlier calls, all of them: --device and --port, too",
    )
    add(
        "--no-preflight",
        action="store_true",
        help="start without asking the image's vLLM first whether it takes the plan",
    )
    _model_arguments(parser)
    _machine_arguments(parser)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    from hfship.serve.vllm import DTYPES, KV_DTYPES

    add = parser.add_argument_group("model").add_argument
    add(
        "--served-model-name",
        dest="served_names",
        action="append",
        default=[],
        metavar="NAME",
        help="name in the API, instead of NAME and ORG/NAME; repeatable",
    )
    add(
        "--alias",
        dest="aliases",
        action="append",
        default=[],
        metavar="NAME",
        help="one more name in the API; repeatable",
    )
    add(
        "--allow-changed",
        action="append",
        default=[],
        metavar="FILE",
        help="serve although this file was edited or added here; edited weights never",
    )
    add(
        "--key",
        type=absolute_path,
        default="",
        metavar="PUB.pem",
        help="require a signature by this key (default: HFSHIP_KEY, else none)",
    )
    add(
        "--max-model-len",
        type=positive_number,
        default=0,
        metavar="TOKENS",
        help="context (default: the most that fits)",
    )
    add(
        "--max-num-seqs",
        type=positive_number,
        default=0,
        metavar="N",
        help="requests at a time, at most",
    )
    add(
        "--concurrency",
        dest="wanted_concurrency",
        type=positive_number,
        default=0,
        metavar="N",
        help="requests of full length that must be held at a time",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        metavar="DTYPE",
        help="bfloat16, float16, ... (default: the model's)",
    )
    add(
        "--kv-cache-dtype",
        choices=KV_DTYPES,
        default="auto",
        metavar="DTYPE",
        help="fp8 halves the KV cache (default: the model's)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the model brings",
    )
    add(
        "--no-tools",
        action="store_true",
        help="no parsers of tool calls and thoughts, which are on where vLLM has them",
    )
    add(
        "--chat-template",
        type=absolute_path,
        default="",
        metavar="FILE",
        help="chat template, instead of the model's",
    )
    add(
        "--lora",
        type=adapter,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="LoRA adapter, NAME in the API; repeatable",
    )
    add(
        "--mount",
        dest="mounts",
        type=absolute_path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder that the container may read, also when named after --; repeatable",
    )
    add(
        "--env",
        type=env_variable,
        action="append",
        default=[],
        metavar="K=V",
        help="variable of the container; repeatable",
    )
    add(
        "--extra-arg",
        dest="extra_args",
        action="append",
        default=[],
        metavar="ARG",
        help="passed on to vllm serve, as is everything after --",
    )


def _machine_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add(
        "--device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="where it runs (default: %(default)s)",
    )
    add(
        "--gpus",
        type=gpu_list,
        default="",
        metavar="0,1|UUID",
        help="GPUs, or MIG slices (0:1), that may be used (default: the free ones)",
    )
    add(
        "--tensor-parallel-size",
        "-tp",
        type=positive_number,
        default=0,
        metavar="N",
        help="GPUs to split it over",
    )
    add(
        "--pipeline-parallel-size",
        "-pp",
        type=positive_number,
        default=0,
        metavar="N",
        help="stages of layers, each on GPUs of its own",
    )
    add(
        "--data-parallel-size",
        "--replicas",
        type=positive_number,
        default=0,
        metavar="N",
        help="copies, each on GPUs of its own, behind one address",
    )
    add(
        "--enable-expert-parallel",
        "-ep",
        action="store_true",
        help="give each GPU whole experts instead of a part of each",
    )
    add(
        "--gpu-memory-utilization",
        type=share_of_one,
        default=0.9,
        metavar="0.9",
        help="share of each GPU (default: 0.9)",
    )
    add(
        "--assume-gpus",
        metavar="2xH100|2x80GB",
        help="with --plan: for a machine with these; several kinds with commas",
    )
    add(
        "--image",
        default="",
        help="docker image (default: the newest vLLM image that is loaded)",
    )
    add(
        "--host",
        dest="bind",
        type=ip_address,
        default="127.0.0.1",
        metavar="IP",
        help="to listen on (default: %(default)s)",
    )
    add(
        "--port",
        type=port_number,
        default=0,
        help="port to listen on (default: the first free one from 8000)",
    )
    add(
        "--shm-size",
        default="",
        metavar="SIZE",
        help="shared memory of the container, like 16gb",
    )
    add(
        "--timeout",
        dest="ready_timeout_s",
        type=positive_number,
        default=3600,
        metavar="SECONDS",
        help="to wait until it answers (default: %(default)s)",
    )


def cmd_serve(context: Context) -> Exit:
    """Serve models: plan, write the files, start, wait for a real answer."""
    from hfship.commands.bundles import is_bundle
    from hfship.commands.serve_bundle import bring_bundle
    from hfship.commands.serve_model import serve_model
    from hfship.commands.serve_options import serve_options

    args = context.args
    require_sensible(args)
    serve_options(vars(args))  # refuses what is wrong before anything is done
    if args.gateway:
        from hfship.commands.gateway_hosts import serve_gateway

        serve_gateway(context)
        return Exit.OK
    if args.planned:
        from hfship.commands.serve_planned import serve_planned

        print_results(context, (serve_planned(context, name) for name in args.planned))
        return Exit.OK
    if args.instead_of:
        from hfship.commands.swap import make_room

        make_room(context)
    if args.rollback is not None:
        from hfship.commands.rollback import roll_back

        for word in args.names:
            roll_back(word, args.rollback, context)
    pairs: List[Tuple[Context, str]] = []
    for word in args.names:
        if is_bundle(word):
            pairs += bring_bundle(context, word)
        else:
            pairs.append((context, word))
    if len(pairs) > 1:
        from hfship.commands.serve_host import pairs_together

        pairs = pairs_together(pairs)
    print_results(context, (serve_model(run, word) for run, word in pairs))
    return Exit.OK


def require_sensible(args: argparse.Namespace) -> None:
    """Raise UsageError for options that make no sense together."""
    if args.explain and not args.plan:
        why = "it explains a plan that is shown"
        raise UsageError("--explain is for planning", why, "add --plan")
    if args.assume_gpus and not args.plan:
        why = "it describes a machine that is not here"
        raise UsageError("--assume-gpus is for planning", why, "add --plan")
    if args.rollback is not None and args.plan:
        why = "it puts another version into place, and --plan changes nothing"
        raise UsageError("--rollback is no plan", why, _rollback_command(args))
    if len(args.names) > 1 and (args.port or args.name or args.served_names):
        what = "--port, --name and --served-model-name are for one model"
        raise UsageError(what, "", "serve them one by one")


def _rollback_command(args: argparse.Namespace) -> str:
    words = [*args.names, "--rollback"]
    if args.rollback:
        words.append(args.rollback)
    return command_line("hfship", "serve", *words)
