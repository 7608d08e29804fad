#!/usr/bin/env python3
"""fetch beside its peers, in one run on one machine: python3 benchmarks/fetch.py [--json FILE] [--gb 1] [SCENARIO…]

A Hub on loopback sends large files to an nginx with TLS, as huggingface.co does. `hf download` (Xet off), `aria2c -x16
-s16` and curl (the floor: one plain connection per file) bring the same files. What counts are the ratios.

    raw        nothing is in the way: MB/s and CPU seconds per GB
    lanes      each connection gets 8.7 or 68 MB/s, as on CDN edges (huggingface/xet-core#821)
    collapse   a server that crawls while more than 8 connections are open; hfship against its own fixed settings
    delay      50 ms round trip, 200 Mbit/s and 1 % loss (slow_link.py; needs root)
    small      2,000 files of 10 kB
    kill       killed with SIGKILL at half, run again: bytes sent twice
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import components  # noqa: E402
from hub import FaultHub  # noqa: E402
from slow_link import ENDS, inside  # noqa: E402

REPO = "org/bench"
NGINX = """
daemon off; pid {root}/nginx.pid; error_log {root}/error.log; worker_processes 1;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
  client_body_temp_path {root}; proxy_temp_path {root}; fastcgi_temp_path {root}; uwsgi_temp_path {root};
  scgi_temp_path {root};
  split_clients "$connection" $lane {{ 70% 8700k; * 68m; }}
  server {{
    listen {host}:{port} ssl; ssl_certificate {root}/cert.pem; ssl_certificate_key {root}/key.pem;
    location /raw/ {{ alias {files}/; }}
    location /lanes/ {{ alias {files}/; limit_rate $lane; }}
  }}
}}
"""


class Run(NamedTuple):
    """One measured command: wall and CPU seconds (of the command and all its children), and its largest RSS (bytes)."""

    seconds: float
    cpu: float
    rss: int


def peak_memory(pid: int) -> int:
    """Peak RSS of a process so far, in bytes (the rusage of a child counts what its parent had when it forked)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Bench:
    """The servers, the certificate and the files of one benchmark run."""

    def __init__(self, root: Path, gigabytes: float) -> None:
        self.root, self.files = root, root / "hub"
        self.size = int(gigabytes * 1e9)
        self.hub, self.base = FaultHub(self.files), ""
        self.around: List[str] = []  # what runs the tools: in another namespace, or as they are
        self.port = 20000 + os.getpid() % 20000
        self.cert = root / "cert.pem"
        root.chmod(0o755)
        self.make_certificate()
        self.rows: List[Dict[str, Any]] = []

    def make_certificate(self) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        names = f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{ENDS['hfship-a']}"
        command += ["-addext", names, "-keyout", str(self.root / "key.pem")]
        subprocess.run([*command, "-out", str(self.cert)], check=True, capture_output=True)

    @contextmanager
    def servers(self, host: str = "127.0.0.1") -> Iterator[None]:
        """nginx and the Hub, in the network namespace of the caller."""
        before = self.hub, self.base
        self.hub = FaultHub(self.files, host=host)
        self.base = f"https://{'localhost' if host == '127.0.0.1' else host}:{self.port}"
        config = self.root / f"nginx-{host}.conf"
        config.write_text(NGINX.format(root=self.root, host=host, port=self.port, files=self.files))
        nginx = subprocess.Popen([shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config)])
        try:
            with self.hub:
                time.sleep(0.5)
                yield
        finally:
            nginx.terminate()
            nginx.wait()
            self.hub, self.base = before

    def publish(self, sizes: Dict[str, int]) -> None:
        """Put files of noise under org/bench."""
        folder = self.files / REPO
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng = random.Random(1)
        for name, size in sizes.items():
            with (folder / name).open("wb") as out:
                for start in range(0, size, 64 << 20):
                    out.write(rng.randbytes(min(64 << 20, size - start)))
        time.sleep(2.1)  # the Hub looks again

    # -- the tools

    def environment(self) -> Dict[str, str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root / "home"), "HF_ENDPOINT": self.hub.url}
        env.update({"SSL_CERT_FILE": str(self.cert), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
        return env

    def command(self, tool: str, out: Path, location: str) -> List[str]:
        """The command line of a tool; `location` is where nginx has the files."""
        base = f"{self.base}/{location}/{REPO}"
        names = sorted(path.name for path in (self.files / REPO).iterdir())
        if tool.startswith("hfship"):
            jobs = tool.split()[1:]
            return [sys.executable, str(ROOT / "dist/hfship.pyz"), "fetch", REPO, "-o", str(out), "-q", *jobs]
        if tool == "hf":
            return [str(components.path("hf")), "download", REPO, "--local-dir", str(out)]
        if tool == "aria2c":
            (self.root / "list").write_text("".join(f"{base}/{name}\n  out={name}\n" for name in names))
            options = ["-x16", "-s16", "-k1M", "-j5", "--file-allocation=none", "--console-log-level=error", "-q"]
            return ["aria2c", *options, f"--ca-certificate={self.cert}", "-d", str(out), "-i", str(self.root / "list")]
        urls = [word for name in names for word in ("-o", str(out / name), f"{base}/{name}")]
        return ["curl", "-sS", "--cacert", str(self.cert), "--create-dirs", "-Z", *urls]

    def measure(self, tool: str, location: str) -> Run:
        """Run a tool into a fresh folder and check that every byte is there."""
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*self.around, *self.command(tool, out, location)], env=self.environment(), **quiet)
        rss, pid = 0, 0
        while not pid:
            rss = max(rss, peak_memory(process.pid))
            time.sleep(0.02)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        have = sum(path.stat().st_size for path in out.rglob("*") if path.name in self.names() and path.is_file())
        if process.returncode or have != sum(path.stat().st_size for path in (self.files / REPO).iterdir()):
            raise SystemExit(f"{tool} failed: exit {process.returncode}, {have} bytes")
        return Run(seconds, usage.ru_utime + usage.ru_stime, rss)

    def names(self) -> set:
        return {path.name for path in (self.files / REPO).iterdir()}

    def compare(self, scenario: str, tools: Sequence[str], location: str, rounds: int = 3) -> None:
        """Tools in turn, the best of some rounds; one row each."""
        best: Dict[str, Run] = {}
        for _ in range(rounds):
            for tool in tools:
                run = self.measure(tool, location)
                best[tool] = min(best.get(tool, run), run)
        total = sum(path.stat().st_size for path in (self.files / REPO).iterdir())
        for tool, run in best.items():
            row = {"scenario": scenario, "tool": tool, "seconds": round(run.seconds, 2)}
            row.update({"MB/s": round(total / run.seconds / 1e6), "CPU s/GB": round(run.cpu / total * 1e9, 2)})
            self.add(
                {**row, "RSS MB": round(run.rss / 1e6), "x hfship": round(run.seconds / best["hfship"].seconds, 2)}
            )

    def add(self, row: Dict[str, Any]) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    # -- the scenarios

    def raw(self) -> None:
        self.hub.faults.cdn = f"{self.base}/raw"
        self.publish({f"model-{i}.safetensors": self.size // 4 for i in range(4)})
        self.compare("raw", ["hfship", "hf", "aria2c", "curl"], "raw")

    def lanes(self) -> None:
        self.hub.faults.cdn = f"{self.base}/lanes"
        self.publish({"model.safetensors": 4 * self.size})
        self.compare("lanes", ["hfship", "aria2c"], "lanes", rounds=2)

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
        self.hub.faults.cdn = ""
        self.hub.faults.rate_bps = 20e6
        self.publish({"model.safetensors": 400_000_000})
        for tool in ("hfship", "hf"):
            out = self.root / "out"
            shutil.rmtree(out, ignore_errors=True)
            self.hub.forget()
            process = subprocess.Popen(
                self.command(tool, out, "raw"), env=self.environment(), stdout=subprocess.DEVNULL
            )
            while self.hub.traffic.body_bytes < 200_000_000:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.5)
            subprocess.run(self.command(tool, out, "raw"), env=self.environment(), check=True, capture_output=True)
            again = self.hub.traffic.body_bytes / 400_000_000 - 1
            self.add({"scenario": "kill", "tool": tool, "sent twice %": round(100 * again, 2)})
        self.hub.faults.rate_bps = None


def main() -> None:
    """The command line."""
    scenarios = ("raw", "lanes", "collapse", "delay", "small", "kill")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(scenarios)} (default: all)")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the large transfers")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hfship-bench-") as folder:
        bench = Bench(Path(folder), args.gb)
        with bench.servers():
            for name in args.scenario or scenarios:
                getattr(bench, name)()
    if args.json:
        args.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
