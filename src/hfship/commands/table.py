# SPDX-License-Identifier: Apache-2.0
"""The table of commands, as words: nothing of their work is imported here."""

from __future__ import annotations

from typing import List, Tuple

from hfship.commands.context import Command

# In the order in which models go. Fields of a row: see Command.
COMMANDS: Tuple[Command, ...] = (
    Command("fetch", "download models and images, resumable and verified", "fetch", "repos", True),
    Command("pack", "pack models into NAME.tar.zst, whole or in parts", "pack", "models", True),
    Command("push", "copy archives to a host or medium, proven there", "push", "archives", True),
    Command("sync", "bring a site what is new: fetch, ask it, pack, push", "sync", job=True),
    Command("sign", "sign archives and models in a role, for approval", "approving", "targets"),
    Command("bom", "print the bill of materials, CycloneDX 1.6, of models, images", "bom"),
    Command("custody", "show who did what with a model, and check that log", "custody", "targets"),
    Command("verify", "prove archives and models; name what is damaged", "verify", "targets", True),
    Command("unpack", "restore models from archives, verified", "unpack", "archives", True),
    Command("serve", "start vLLM in docker, and wait until it answers", "serve", "names", True),
    Command(
        "status", "ask deployments whether they answer; exits with 0, 3 or 9", "status", "names"
    ),
    Command("stop", "stop deployments and jobs; their files stay", "status", "names"),
    Command("restart", "start deployments again, and wait until they answer", "status", "names"),
    Command("logs", "show the log of a deployment or job", "status"),
    Command("drain", "move what runs on hosts to others, and leave them empty", "drain"),
    Command("undrain", "let hosts that were drained be given models again", "drain"),
    Command("key", "make, list and revoke API keys of the gateway", "key"),
    Command("export", "write files for Prometheus and Grafana, systemd, Kubernetes", "export"),
    Command("list", "say what is here: models, packages, images, deployments", "listing"),
    Command("watch", "show jobs live; resume them after a reboot", "watch"),
    Command("models", "check and list a models file, or print an example", "models"),
    Command("mirror", "serve a folder of models as a private, read-only Hub", "mirror", job=True),
    Command("clean", "remove what killed downloads, packs and pushes left", "clean"),
    Command("doctor", "say what this machine can do: its network, or docker and GPUs", "doctor"),
    Command("completion", "print what makes bash, zsh or fish complete hfship", "completion"),
    Command("help", "print what the far side needs: runbook, exit codes, formats", "guide"),
    Command("version", "print the version; --verify proves this file", "version"),
)

# What --help says above a command, and below all of them.
GROUPS = {"fetch": "connected side", "verify": "offline side", "list": "both sides"}
EXIT_CODES = """\
exit codes:
    0  ok
    2  the command line or a models file is wrong
    3  incomplete, or still loading: run the same command again to continue
    4  the token is missing, wrong, or has no access
    5  not found
    6  integrity: bytes are not what they must be
    7  the disk is full, or refuses
    8  the network failed for too long
    9  this machine cannot do it: docker, GPU, image, memory
  130  interrupted: run the same command again to continue
"""

# Each command shows its own lines.
EXAMPLES = """\
hfship fetch Qwen/Qwen3-8B
hfship fetch org/name@v1.0 --exclude 'onnx/' -o /mnt/disk
hfship fetch docker://vllm/vllm-openai:v0.11.0     # without docker
hfship fetch --models models.toml
hfship fetch Qwen/Qwen3-8B --background     # prints the name of the job: fetch-Qwen3-8B
hfship pack Qwen3-8B
hfship pack Qwen3-8B --split fat32 -o /media/usb
hfship pack /media/usb/Qwen3-8B.tar.zst.0001 --join -o /data     # --split cuts
hfship pack vllm-openai_v0.11.0 -o /media/usb     # an image that was fetched
hfship pack Qwen3-8B --with-image -o /media/usb     # model, image and tool as one delivery
hfship pack Qwen3-8B --since /media/old/Qwen3-8B.tar.zst     # only what is new since then
hfship push Qwen3-8B ops@gpu1:/data/transfer
hfship push Qwen3-8B /media/usb
hfship push Qwen3-8B docker://registry.site:5000/models/qwen3-8b:1     # into a registry
hfship push Qwen3-8B.tar.zst.0001 ops@gpu1:transfer \
--port 2222 --identity ~/.ssh/site --bwlimit 50M
hfship sync ops@gpu1:/data/transfer --models models.toml     # what it lacks, deltas where it can
hfship sync Qwen3-8B ops@gpu1:/data/transfer --dry-run
hfship sign Qwen3-8B --key ~/keys/release.pem
hfship sign /media/usb/Qwen3-8B.tar.zst --key security.pem --as security
hfship bom Qwen3-8B > Qwen3-8B.cdx.json
hfship bom --models models.toml -o site.cdx.json
hfship custody Qwen3-8B
hfship custody /media/usb/Qwen3-8B.tar.zst --json
hfship verify /media/usb/Qwen3-8B.tar.zst     # also of parts
hfship verify /media/usb/Qwen3-8B.tar.zst.0001     # this part alone
hfship verify /data/models/huggingface/Qwen3-8B
hfship unpack /data/transfer/Qwen3-8B.tar.zst
hfship unpack Qwen3-8B -o /data/models/huggingface
hfship unpack vllm-openai_v0.11.0.tar.zst     # an image: into docker
hfship unpack --all /media/usb     # all that is new: images, models, deltas; --dry-run says what
hfship unpack - < Qwen3-8B.tar.zst     # or: cat Qwen3-8B.tar.zst.0* | ssh HOST hfship unpack -
hfship serve Qwen3-8B
hfship serve Qwen3-8B --plan --assume-gpus 2xH100
hfship serve Llama-3.1-70B --gpus 0,1 --max-model-len 32768 -- --enable-auto-tool-choice
hfship serve --models models.toml
hfship serve /media/usb/Qwen3-8B.bundle.json     # a delivery: image and model
hfship serve Qwen3-8B --rollback     # the version before; forward again: --rollback newest
hfship status     # exit code: 0 all healthy, 3 one is loading or degraded, 9 one is down or unknown
hfship status Qwen3-8B --json
hfship status --format prometheus -o /var/lib/prometheus/node-exporter/hfship.prom     # from cron
hfship status --repair     # restarts what is dead or proven hung; --install: each minute
hfship restart Qwen3-8B
hfship stop Qwen3-8B
hfship stop Qwen3-8B --remove
hfship stop fetch-Qwen3-8B     # a job
hfship logs Qwen3-8B --tail 100
hfship logs -f fetch-Qwen3-8B
hfship logs fetch-Qwen3-8B --since 7d     # all its runs of a week; without it: the last run
hfship list
hfship list packages --json
hfship list --models models.toml     # also what the file wants and is not here
hfship drain gpu1 --models models.toml
hfship undrain gpu1 --models models.toml
hfship key add alice --models Qwen3-8B --rate 60/min --expires 90d     # prints the key, this once
hfship key list --usage
hfship key suspend alice     # resume ends that
hfship key revoke alice
hfship export monitoring /etc/hfship
hfship export kubernetes site/ --models models.toml --assume-gpus 8xH100
hfship watch
hfship watch --json --interval 5
hfship watch --resume-all
hfship watch --install
hfship models --example > models.toml
hfship models models.toml
hfship mirror /data/models/huggingface --host 0.0.0.0     \
# then: HF_ENDPOINT=http://HOST:8090 hf download ORG/NAME
hfship mirror --background     # ends with: hfship stop mirror-all
hfship mirror /data/models/huggingface --host 0.0.0.0 --install     # at each boot
hfship clean
hfship clean --cache --older-than 7d --dry-run
hfship clean --yes /data/models/huggingface
hfship clean --jobs --older-than 30d     # records and logs of what has ended
hfship doctor
hfship doctor --offline     # docker, images, GPUs in a container, folders, ports
hfship doctor meta-llama/Llama-3.1-8B --mirror https://hf-mirror.com
hfship completion bash > ~/.hfship-completion    # then in ~/.bashrc: source ~/.hfship-completion
hfship completion fish > ~/.config/fish/completions/hfship.fish
hfship completion zsh > ~/.zfunc/_hfship         \
# with fpath+=(~/.zfunc) before compinit in ~/.zshrc
hfship help
hfship help offline     # also: runbook, exit-codes, json, formats
hfship help serve
hfship version
hfship version --verify
"""


def examples_of(command: str) -> List[str]:
    """The lines of EXAMPLES for a command."""
    start = f"hfship {command}"
    return [line for line in EXAMPLES.splitlines() if f"{line} ".startswith(f"{start} ")]
