#!/usr/bin/env python3
"""fetch beside its peers, in one run on one machine: python3 benchmarks/fetch.py [--json FILE] [--gb 4] [SCENARIO…]

A Hub on loopback sends large files to an nginx with TLS, as huggingface.co does. dist/hfship.pyz, `hf download` (Xet
off), `aria2c -x16 -s16` and curl (the floor: one plain connection per file) bring the same files. What counts are the
ratios. Of these only hfship proves the bytes, so two rows more say what a proof costs the others: curl or hf, and then
openssl's SHA-256 over what they brought (all files at once). "curl, then sha256" in CPU seconds is the floor of every
downloader that verifies. "hf, Xet" rebuilds the files from a local Xet store on disk: no network is in its way, and the
store is no part of the figures; a Xet server that speaks HTTP cannot be had.

    raw        nothing is in the way: MB/s and CPU seconds per GB
    jobs       raw, hfship against its own fixed numbers of connections: TLS holds Python's one lock for every 16 KiB
    lanes      each connection gets 8.7 or 68 MB/s, as on CDN edges (huggingface/xet-core#821); with fewer than 16 cores
               proportionally less of a smaller file, or the cores and not the lanes would be measured
    collapse   a server that crawls while more than 8 connections are open; hfship against its own fixed settings
    delay      50 ms round trip, 200 Mbit/s and 1 % loss (slow_link.py; needs root)
    small      2,000 files of 10 kB
    kill       killed with SIGKILL at half, run again: bytes sent twice
    flip       a CDN that changes one byte: exit codes, and whether what lies there is right

Tools are taken from dist/tools/bin where that exists (a machine without a network), else from PATH and from
tests/components.py. Files lie in --folder, by default the temporary folder: name a tmpfs to leave the disk out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
PYZ = ROOT / "dist/hfship.pyz"
TOOLS = ROOT / "dist/tools/bin"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import components  # noqa: E402
from hub import FaultHub  # noqa: E402
from network import make_certificate  # noqa: E402
from pack import pss  # noqa: E402
from slow_link import ENDS, inside  # noqa: E402

REPO = "org/bench"
CORES = len(os.sched_getaffinity(0))
LANE_SHARE = min(1.0, CORES / 16)
NGINX = """
daemon off; pid {root}/nginx.pid; error_log {root}/error.log; worker_processes {workers};
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
  client_body_temp_path {root}; proxy_temp_path {root}; fastcgi_temp_path {root}; uwsgi_temp_path {root};
  scgi_temp_path {root};
  split_clients "$connection" $lane {{ 70% {slow}k; * {fast}k; }}
  server {{
    listen {host}:{port} ssl reuseport; ssl_certificate {root}/cert.pem; ssl_certificate_key {root}/key.pem;
    location /raw/ {{ alias {files}/; }}
    location /lanes/ {{ alias {files}/; limit_rate $lane; }}
  }}
}}
"""
VERSIONS = {"nginx": "-v", "curl": "--version", "aria2c": "--version", "openssl": "version", "hf": "version"}


class Run(NamedTuple):
    """One measured command: wall and CPU seconds (of it and all its children), and their most memory (bytes)."""

    seconds: float
    cpu: float
    memory: int


def program(name: str) -> str:
    """A tool of this benchmark: carried along, else of this machine."""
    folders = os.pathsep.join([str(TOOLS), os.environ["PATH"], "/usr/sbin"])
    client = components.path("hf")
    installed = {"hf": client, "hf-python": client and client.with_name("python3")}.get(name)
    found = str(TOOLS / name) if (TOOLS / name).exists() else installed or shutil.which(name, path=folders)
    if not found:
        raise SystemExit(f"{name} is missing; install it, or put it into {TOOLS}")
    return str(found)


def machine(folder: Path) -> Dict[str, Any]:
    """What the figures depend on: the machine, the versions, and the filesystem that was written to."""
    said = {}
    for name, flag in VERSIONS.items():
        done = subprocess.run([program(name), flag], capture_output=True, text=True, check=False)
        said[name] = " ".join(re.findall(r"\d+(?:\.\d+)+", done.stdout + done.stderr)[:1])
    models = [
        line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    filesystem = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=False).stdout
    facts = {"cpu": models[0] if models else platform.machine(), "cores": CORES, "kernel": platform.release()}
    facts.update({"memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)})
    facts.update({"filesystem": filesystem.split()[-1], "python": platform.python_version(), **said})
    facts["hfship.pyz sha256"] = hashlib.sha256(PYZ.read_bytes()).hexdigest()
    return {**facts, "load before": os.getloadavg(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def family(pid: int) -> List[int]:
    """A process and all its descendants that run now."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def held_memory(pid: int) -> int:
    """Bytes that a process and its descendants hold now; what they share counts once (PSS, proc_pid_smaps(5))."""
    return sum(map(pss, family(pid)))


class Bench:
    """The servers, the certificate and the files of one benchmark run."""

    def __init__(self, root: Path, gigabytes: float) -> None:
        self.root, self.files = root, root / "hub"
        self.size = int(gigabytes * 1e9)
        self.hub, self.base = FaultHub(self.files), ""
        self.around: List[str] = []  # what runs the tools: in another namespace, or as they are
        self.port = 20000 + os.getpid() % 20000
        self.cert = root / "ca.pem"  # what the clients believe: our own certificate, and those of this machine
        root.chmod(0o755)
        self.make_certificate()
        self.rows: List[Dict[str, Any]] = []

    def make_certificate(self) -> None:
        names = f"DNS:localhost,IP:127.0.0.1,IP:{ENDS['hfship-a']}"
        own = make_certificate(self.root, names=names, openssl=program("openssl")).cert
        public = Path("/etc/ssl/certs/ca-certificates.crt")  # reading it costs time, and all of them have to
        self.cert.write_bytes(own.read_bytes() + (public.read_bytes() if public.exists() else b""))

    @contextmanager
    def servers(self, host: str = "127.0.0.1") -> Iterator[None]:
        """nginx and the Hub, in the network namespace of the caller."""
        before = self.hub, self.base
        self.hub = FaultHub(self.files, host=host)
        self.base = f"https://{'localhost' if host == '127.0.0.1' else host}:{self.port}"
        config = self.root / f"nginx-{host}.conf"
        workers = max(1, CORES // 4)  # one core of 2, four of 16: the clients are measured, not the server
        values = {"root": self.root, "host": host, "port": self.port, "files": self.files, "workers": workers}
        config.write_text(NGINX.format(**values, slow=int(8700 * LANE_SHARE), fast=int(68000 * LANE_SHARE)))
        command = [program("nginx"), "-p", str(self.root), "-e", str(self.root / "error.log"), "-c", str(config)]
        nginx = subprocess.Popen([*command, *(["-g", "user root;"] if os.geteuid() == 0 else [])])
        try:
            with self.hub:
                time.sleep(0.5)
                yield
        finally:
            nginx.terminate()
            nginx.wait()
            self.hub, self.base = before

    def publish(self, sizes: Dict[str, int]) -> None:
        """Put files of noise under org/bench, and let the Hub hash them before anybody is measured."""
        shutil.rmtree(self.files / REPO, ignore_errors=True)
        (self.files / REPO).mkdir(parents=True)
        self.sizes = sizes
        noise = bytearray(random.Random(1).randbytes(64 << 20))
        for number, (name, size) in enumerate(sizes.items()):
            with (self.files / REPO / name).open("wb") as out:
                for start in range(0, size, len(noise)):
                    noise[:16] = b"%016x" % (number * 10**12 + start)
                    out.write(noise[: size - start])
        time.sleep(2.1)  # the Hub looks again
        urllib.request.urlopen(f"{self.hub.url}/api/models/{REPO}/tree/main", timeout=600).close()

    # -- the tools

    def store_in_xet(self) -> None:
        """Let hf_xet put the published files into a store of its own, and the Hub offer them from there."""
        stored = "hf_xet.upload_files(sys.argv[2:], sys.argv[1], None, None, None, 'model')"
        code = f"import hf_xet, sys; [print(file.hash) for file in {stored}]"
        store = f"local://{self.root / 'xet'}"
        paths = [str(self.files / REPO / name) for name in self.sizes]
        done = subprocess.run(
            [program("hf-python"), "-c", code, store, *paths], capture_output=True, text=True, check=True
        )
        vars(self.hub.faults).update(xet=dict(zip(self.sizes, done.stdout.split())), xet_store=store)

    def environment(self, xet: bool = False) -> Dict[str, str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root / "home"), "HF_ENDPOINT": self.hub.url}
        env.update(
            {"SSL_CERT_FILE": str(self.cert), "HF_HUB_DISABLE_XET": str(int(not xet)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        )
        return env

    def command(self, tool: str, out: Path, base: str) -> List[str]:
        """The command line of a tool; `base` is the address below which the files are."""
        if tool.endswith(", then sha256"):
            first = shlex.join(self.command(tool.partition(",")[0], out, base))
            digest = shlex.join([program("openssl"), "dgst", "-sha256"])
            found = f"find {shlex.quote(str(out))} -maxdepth 1 -type f -print0"
            return ["sh", "-c", f"{first} && {found} | xargs -0 -n1 -P{CORES} {digest}"]
        if tool.startswith("hfship"):
            return [sys.executable, str(PYZ), "fetch", REPO, "-o", str(out), "--name", "x", "-q", *tool.split()[1:]]
        if tool in ("hf", "hf, Xet"):
            return [program("hf"), "download", REPO, "--local-dir", str(out)]
        if tool == "aria2c":
            orders = self.root / "list"
            orders.write_text("".join(f"{base}/{name}\n  out={name}\n" for name in self.sizes))
            options = ["-x16", "-s16", "-k1M", "-j5", "-c", "--file-allocation=none", "--console-log-level=error", "-q"]
            return [program("aria2c"), *options, f"--ca-certificate={self.cert}", "-d", str(out), "-i", str(orders)]
        urls = [word for name in self.sizes for word in ("-o", str(out / name), f"{base}/{name}")]
        return [program("curl"), "-sS", "--cacert", str(self.cert), "--create-dirs", "-Z", *urls]

    def start(self, tool: str, base: str) -> subprocess.Popen[bytes]:
        """A tool at work on the folder `out`."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [*self.around, *self.command(tool, self.root / "out", base)]
        return subprocess.Popen(command, env=self.environment("Xet" in tool), **quiet)  # type: ignore[call-overload,no-any-return]

    def arrived(self) -> Dict[str, Path]:
        """The published files that lie in `out` under their final names, wherever a tool puts them."""
        found = {path.name: path for path in (self.root / "out").rglob("*") if path.is_file()}
        return {name: found[name] for name in self.sizes if name in found}

    def measure(self, tool: str, base: str) -> Run:
        """Run a tool into a fresh folder and check that every byte is there."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        began = time.monotonic()
        process = self.start(tool, base)
        memory, pid = 0, 0
        while not pid:
            memory = max(memory, held_memory(process.pid))
            time.sleep(0.02)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        have = {name: path.stat().st_size for name, path in self.arrived().items()}
        if process.returncode or have != self.sizes:
            raise SystemExit(f"{tool} failed: exit {process.returncode}, {sum(have.values())} bytes")
        return Run(seconds, usage.ru_utime + usage.ru_stime, memory)

    def compare(
        self, scenario: str, tools: Sequence[str], location: str, rounds: int = 3, pick: Callable[..., float] = min
    ) -> None:
        """Tools in turn; the shortest time (or as `pick` says) and the least CPU of some rounds make one row each."""
        runs: Dict[str, List[Run]] = {tool: [] for tool in tools}
        for _ in range(rounds):
            for tool in tools:
                runs[tool].append(self.measure(tool, f"{self.base}/{location}/{REPO}"))
        total, ours = sum(self.sizes.values()), pick(run.seconds for run in runs["hfship"])
        for tool, of_tool in runs.items():
            seconds, cpu = pick(run.seconds for run in of_tool), min(run.cpu for run in of_tool)
            row = {
                "scenario": scenario,
                "tool": tool,
                "seconds": round(seconds, 2),
                "MB/s": round(total / seconds / 1e6),
            }
            row.update(
                {"CPU s/GB": round(cpu / total * 1e9, 2), "memory MB": round(max(r.memory for r in of_tool) / 1e6)}
            )
            row.update({"x hfship": round(seconds / ours, 2)})
            self.add(row, [run._asdict() for run in of_tool])

    def add(self, row: Dict[str, Any], rounds: Optional[List[Dict[str, Any]]] = None) -> None:
        """Print a row; the JSON file keeps the rounds behind it too."""
        self.rows.append({**row, **({"rounds": rounds} if rounds else {})})
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    # -- the scenarios

    def raw(self) -> None:
        self.hub.faults.cdn = f"{self.base}/raw"
        self.publish({f"model-{i}.safetensors": self.size // 4 for i in range(4)})
        self.store_in_xet()
        proofs = ["curl, then sha256", "hf, then sha256"]
        self.compare("raw", ["hfship", "hf", "hf, Xet", "aria2c", "curl", *proofs], "raw")
        shutil.rmtree(self.root / "xet")

    def jobs(self) -> None:
        self.hub.faults.cdn = f"{self.base}/raw"
        self.publish({f"model-{i}.safetensors": self.size // 4 for i in range(4)})
        self.compare("jobs", ["hfship", *(f"hfship -j {n}" for n in (1, 2, 4, 8, 16))], "raw")

    def lanes(self) -> None:
        self.hub.faults.cdn = f"{self.base}/lanes"
        self.publish({"model.safetensors": int(2 * self.size * LANE_SHARE)})
        self.compare("lanes", ["hfship", "aria2c"], "lanes", pick=statistics.median)  # which lanes come is luck

    def collapse(self) -> None:
        self.hub.faults.cdn = ""
        vars(self.hub.faults).update(rate_bps=60e6, most_connections=8, slow_bps=2e6)
        self.publish({"model.safetensors": 900_000_000})
        self.compare("collapse", ["hfship", *(f"hfship -j {n}" for n in (2, 4, 8, 12, 16))], "raw", rounds=1)
        vars(self.hub.faults).update(rate_bps=None, most_connections=0)

    def delay(self) -> None:
        line = [sys.executable, str(ROOT / "benchmarks/slow_link.py"), "25", "200", "0.01"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as link:
            assert link.stdout is not None and link.stdout.readline() == "ready\n"
            try:
                with inside("hfship-a"), self.servers(ENDS["hfship-a"]):
                    self.hub.faults.cdn = f"{self.base}/raw"
                    self.publish({f"model-{i}.safetensors": 50_000_000 for i in range(2)})
                    self.around = ["ip", "netns", "exec", "hfship-b"]
                    self.compare("delay", ["hfship", "aria2c", "hf", "curl"], "raw", rounds=1)
            finally:
                self.around = []
                link.terminate()

    def small(self) -> None:
        self.hub.faults.cdn = ""
        self.publish({f"part-{i:04d}.json": 10_000 for i in range(2000)})
        self.compare("small", ["hfship", "hf"], "raw", rounds=2)

    def kill(self) -> None:
        self.hub.faults.cdn, self.hub.faults.rate_bps = "", 20e6
        self.publish({"model.safetensors": 400_000_000})
        base = f"{self.hub.url}/{REPO}/resolve/main"
        for tool in ("hfship", "aria2c", "hf"):
            shutil.rmtree(self.root / "out", ignore_errors=True)
            self.hub.forget()
            process = self.start(tool, base)
            while self.hub.traffic.body_bytes < 200_000_000:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.5)
            if self.start(tool, base).wait():
                raise SystemExit(f"{tool} failed after the kill")
            again = self.hub.traffic.body_bytes / 400_000_000 - 1
            self.add({"scenario": "kill", "tool": tool, "sent twice %": round(100 * again, 2)})
        self.hub.faults.rate_bps = None

    def flip(self) -> None:
        self.hub.faults.cdn = ""
        self.publish({"model.safetensors": 60_000_000})
        right = hashlib.sha256((self.files / REPO / "model.safetensors").read_bytes()).hexdigest()
        for times, what in ((1, "once"), (10**9, "always")):
            for tool in ("hfship", "hf", "aria2c"):
                shutil.rmtree(self.root / "out", ignore_errors=True)
                vars(self.hub.faults).update(flip_at=7_000_000, flip_times=times)
                code = self.start(tool, f"{self.hub.url}/{REPO}/resolve/main").wait()
                there = self.arrived().get("model.safetensors")
                same = there is not None and hashlib.sha256(there.read_bytes()).hexdigest() == right
                found = "no file" if there is None else "right" if same else "WRONG BYTES"
                self.add({"scenario": f"flip {what}", "tool": tool, "exit": code, "on disk": found})
        vars(self.hub.faults).update(flip_at=None, flip_times=1)


def main() -> None:
    """The command line."""
    scenarios = ("raw", "jobs", "lanes", "collapse", "delay", "small", "kill", "flip")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(scenarios)} (default: all)")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the large transfers")
    parser.add_argument("--folder", type=Path, help="where the files lie, on both sides")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hfship-bench-", dir=args.folder) as folder:
        facts = machine(Path(folder))
        print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
        bench = Bench(Path(folder), args.gb)
        with bench.servers():
            for name in args.scenario or scenarios:
                getattr(bench, name)()
                if args.json:  # after each scenario: what was measured outlives a time limit
                    args.json.write_text(json.dumps({"machine": facts, "rows": bench.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
