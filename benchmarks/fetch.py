#!/usr/bin/env python3
"""fetch beside its peers, in one run on one machine:

    python3 benchmarks/all.py fetch                       all of it, in the one table
    python3 benchmarks/fetch.py [--gb 4] [SCENARIO…]      some of it

A Hub on loopback sends large files to an nginx with TLS, as huggingface.co does. dist/hfship.pyz,
`hf download` (Xet off), `aria2c -x16 -s16` and curl (the floor: one plain connection per file)
bring the same files. What counts are the ratios. Of these only hfship proves the bytes, so two rows
more say what a proof costs the others: curl or hf, and then openssl's SHA-256 over what they
brought (all files at once). "curl, then sha256" in CPU seconds is the floor of every downloader
that verifies. "hf, Xet" rebuilds the files from a local Xet store on disk: no network is in its
way, and the store is no part of the figures; a Xet server that speaks HTTP cannot be had.

    raw        nothing is in the way: MB/s and CPU seconds per GB
    jobs       raw, hfship against its own fixed numbers of connections: TLS holds Python's one lock
               for every 16 KiB
    lanes      each connection gets 8.7 or 68 MB/s, as on CDN edges (huggingface/xet-core#821); with
               fewer than 16 cores proportionally less of a smaller file, or the cores and not
               the lanes would be measured
    collapse   a server that crawls while more than 8 connections are open; hfship against its own
               fixed settings
    delay      50 ms round trip, 200 Mbit/s and 1 % loss (slow_link.py; needs root)
    small      2,000 files of 10 kB. An nginx in front of the Hub sends them as huggingface.co does:
               307 to its cache, and there the bytes with the headers that clients look for. Only
               the listing is the Hub's, whose Python would be what is measured, on the clients'
               own cores. curl has the names for nothing, and makes no file durable
    kill       killed with SIGKILL at half, run again: bytes sent twice
    flip       a CDN that changes one byte: exit codes, and whether what lies there is right

Tools are taken from dist/tools/bin where that exists (a machine without a network), else from PATH
and from tests/support/components.py. Files lie in --folder, by default the temporary folder: name a
tmpfs to leave the disk out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from measure import (  # noqa: E402
    CORES,
    Row,
    Run,
    Scale,
    facts_text,
    full,
    has,
    in_turns,
    program,
    rows_of,
    ship,
    table,
    watch,
)
from slow_link import ENDS, inside  # noqa: E402

from hfship.hub.protocol import git_blob_sha1  # noqa: E402
from support.hub import FaultHub  # noqa: E402
from support.network import make_certificate  # noqa: E402

REPO = "org/bench"
LANE_SHARE = min(1.0, CORES / 16)
MANY_FILES = 100
NGINX = """
daemon off; pid {root}/nginx-{port}.pid; error_log {root}/error.log; worker_processes {workers};
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
  client_body_temp_path {root}; proxy_temp_path {root};
  fastcgi_temp_path {root}; uwsgi_temp_path {root};
  scgi_temp_path {root};
  ssl_certificate {root}/cert.pem; ssl_certificate_key {root}/key.pem;
  ssl_protocols TLSv1.2 TLSv1.3;
  {servers}
}}
"""
CDN = """
  split_clients "$connection" $lane {{ 70% {slow}k; * {fast}k; }}
  server {{
    listen {host}:{port} ssl reuseport;
    location /raw/ {{ alias {files}/; }}
    location /lanes/ {{ alias {files}/; limit_rate $lane; }}
  }}
"""
# The Hub as clients see it, with small files alone: $etag by name, as the Hub lists them.
FRONT = """
  map_hash_max_size 8192; map_hash_bucket_size 128;
  map $file $etag {{ {etags} }}
  server {{
    listen {host}:{port} ssl reuseport;
    location /api/ {{
      proxy_pass {hub}; proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto https;
    }}
    location ~ ^/{repo}/resolve/(?<commit>[^/]+)/(?<file>.+)$ {{
      add_header X-Repo-Commit $commit always; add_header X-Linked-Etag $etag always;
      return 307 /api/resolve-cache/models/{repo}/$commit/$file;
    }}
    location ~ ^/api/resolve-cache/models/{repo}/(?<commit>[^/]+)/(?<file>.+)$ {{
      alias {files}/{repo}/$file; etag off;
      add_header X-Repo-Commit $commit; add_header ETag $etag;
    }}
  }}
"""

# A script around aria2c: it asks the Hub for the list, and is sent on to each file. "aria2c" alone
# is told where the files are.
FROM_THE_HUB = "aria2c, asking the Hub"


class Bench:
    """The servers, the certificate and the files of one benchmark run."""

    def __init__(self, root: Path, scale: Scale) -> None:
        self.root, self.files = root, root / "hub"
        self.scale = scale
        self.hub, self.base = FaultHub(self.files), ""
        self.front = ""  # what clients take for the Hub, if it is another
        self.around: List[str] = []  # what runs the tools: in another namespace, or as they are
        self.port = 20000 + os.getpid() % 20000
        # What the clients believe: our own certificate, and those of this machine.
        self.cert = root / "ca.pem"
        root.chmod(0o755)
        self.make_certificate()

    def make_certificate(self) -> None:
        names = f"DNS:localhost,IP:127.0.0.1,IP:{ENDS['hfship-a']}"
        own = make_certificate(self.root, names=names, openssl=program("openssl")).cert
        # Reading it costs time, and all of them have to.
        public = Path("/etc/ssl/certs/ca-certificates.crt")
        self.cert.write_bytes(own.read_bytes() + (public.read_bytes() if public.exists() else b""))

    @contextmanager
    def servers(self, host: str = "127.0.0.1") -> Iterator[None]:
        """nginx and the Hub, in the network namespace of the caller."""
        before = self.hub, self.base
        self.hub = FaultHub(self.files, host=host)
        self.base = f"https://{'localhost' if host == '127.0.0.1' else host}:{self.port}"
        cdn = CDN.format(
            host=host,
            port=self.port,
            files=self.files,
            slow=int(8700 * LANE_SHARE),
            fast=int(68000 * LANE_SHARE),
        )
        try:
            with self.nginx(self.port, cdn), self.hub:
                yield
        finally:
            self.hub, self.base = before

    @contextmanager
    def nginx(self, port: int, servers: str) -> Iterator[None]:
        """An nginx with the `servers` of its configuration, at a port of its own."""
        # One core of 2, four of 16: the clients are measured, not the server.
        workers = max(1, CORES // 4)
        config = self.root / f"nginx-{port}.conf"
        config.write_text(NGINX.format(root=self.root, port=port, workers=workers, servers=servers))
        errors = str(self.root / "error.log")
        command = [program("nginx"), "-p", str(self.root), "-e", errors, "-c", str(config)]
        if os.geteuid() == 0:
            command += ["-g", "user root;"]
        nginx = subprocess.Popen(command)
        try:
            time.sleep(0.5)
            yield
        finally:
            nginx.terminate()
            nginx.wait()

    @contextmanager
    def fast_hub(self) -> Iterator[None]:
        """nginx in front of the Hub, which sends what is published."""
        port = self.port + 1
        etags = {name: blob_id_of(self.files / REPO / name) for name in self.sizes}
        front = FRONT.format(
            host="127.0.0.1",
            port=port,
            files=self.files,
            hub=self.hub.url,
            repo=REPO,
            etags=" ".join(f'"{name}" \'"{etag}"\';' for name, etag in etags.items()),
        )
        with self.nginx(port, front):
            self.front = f"https://localhost:{port}"
            try:
                yield
            finally:
                self.front = ""

    def publish(self, sizes: Dict[str, int]) -> None:
        """Put files of noise under org/bench."""
        shutil.rmtree(self.files / REPO, ignore_errors=True)
        (self.files / REPO).mkdir(parents=True)
        noise = bytearray(random.Random(1).randbytes(16 << 20))
        for number, (name, size) in enumerate(sizes.items()):
            with (self.files / REPO / name).open("wb") as out:
                for start in range(0, size, len(noise)):
                    noise[:16] = b"%016x" % (number * 10**12 + start)
                    out.write(noise[: size - start])
        self.published(sizes)

    def published(self, sizes: Mapping[str, int]) -> None:
        """Let the Hub hash what lies under org/bench before anybody is measured."""
        self.sizes = dict(sizes)
        time.sleep(2.1)  # the Hub looks again
        while not self.is_listed():
            time.sleep(1)

    @property
    def commit(self) -> str:
        """Of what is published."""
        with urllib.request.urlopen(f"{self.hub.url}/api/models/{REPO}/revision/main") as answer:
            found: str = json.load(answer)["sha"]
        return found

    def is_listed(self) -> bool:
        """Whether the Hub lists them; while it hashes it answers 503."""
        url = f"{self.hub.url}/api/models/{REPO}/tree/main"
        try:
            with urllib.request.urlopen(url, timeout=600):
                return True
        except urllib.error.HTTPError as exc:
            if exc.code == 503:
                return False
            raise

    def publish_shards(self) -> None:
        """Four large files, which nginx sends."""
        self.hub.faults.cdn = f"{self.base}/raw"
        self.publish({f"model-{i}.safetensors": self.scale.size // 4 for i in range(4)})

    # -- the tools

    def store_in_xet(self) -> None:
        """Let hf_xet put the published files into a store of its own, and the Hub offer them
        from there.
        """
        stored = "hf_xet.upload_files(sys.argv[2:], sys.argv[1], None, None, None, 'model')"
        code = f"import hf_xet, sys; [print(file.hash) for file in {stored}]"
        store = f"local://{self.root / 'xet'}"
        paths = [str(self.files / REPO / name) for name in self.sizes]
        done = subprocess.run(
            [program("hf-python"), "-c", code, store, *paths],
            capture_output=True,
            text=True,
            check=True,
        )
        vars(self.hub.faults).update(
            xet=dict(zip(self.sizes, done.stdout.split())), xet_store=store
        )

    def environment(self, xet: bool = False) -> Dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root / "home"),
            "HF_ENDPOINT": self.front or self.hub.url,
            "SSL_CERT_FILE": str(self.cert),
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def command(self, tool: str, out: Path, base: str) -> List[str]:
        """The command line of a tool; `base` is the address below which the files are."""
        if tool.endswith(", then sha256"):
            first = shlex.join(self.command(tool.partition(",")[0], out, base))
            digest = shlex.join([program("openssl"), "dgst", "-sha256"])
            found = f"find {shlex.quote(str(out))} -maxdepth 1 -type f -print0"
            at_once = max(1, len(self.sizes) // (4 * CORES))  # files for one openssl
            each = f"xargs -0 -n{at_once} -P{CORES} {digest}"
            return ["sh", "-c", f"{first} && {found} | {each}"]
        if tool.startswith("hfship"):
            return ship("fetch", REPO, "-o", out, "--name", "x", "-q", *tool.split()[1:])
        if tool in ("hf", "hf, Xet"):
            return [program("hf"), "download", REPO, "--local-dir", str(out)]
        if tool == "aria2c":
            return self.aria2c(out, base)
        if tool == FROM_THE_HUB:
            listing = [program("curl"), "-sS", f"{self.hub.url}/api/models/{REPO}/tree/main"]
            fetch = self.aria2c(out, f"{self.hub.url}/{REPO}/resolve/main")
            return ["sh", "-c", f"{shlex.join(listing)} && exec {shlex.join(fetch)}"]
        return self.curl(out, base)

    def curl(self, out: Path, base: str) -> List[str]:
        """curl, a plain request for each file, 50 at a time."""
        orders = self.root / "curl"
        lines = [f'url = "{base}/{name}"\noutput = "{out / name}"\n' for name in self.sizes]
        orders.write_text("".join(lines))
        options = ["-sSL", "--cacert", str(self.cert), "--create-dirs", "-Z"]
        return [program("curl"), *options, "-K", str(orders)]

    def aria2c(self, out: Path, base: str) -> List[str]:
        """aria2c, as people call it for models."""
        orders = self.root / "list"
        orders.write_text("".join(f"{base}/{name}\n  out={name}\n" for name in self.sizes))
        options = ["-x16", "-s16", "-k1M", "-j5", "-c", "--file-allocation=none"]
        options += ["--console-log-level=error", "-q", f"--ca-certificate={self.cert}"]
        return [program("aria2c"), *options, "-d", str(out), "-i", str(orders)]

    def start(self, tool: str, base: str) -> subprocess.Popen[bytes]:
        """A tool at work on the folder `out`."""
        command = [*self.around, *self.command(tool, self.root / "out", base)]
        return subprocess.Popen(
            command,
            env=self.environment("Xet" in tool),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def arrived(self) -> Dict[str, Path]:
        """The published files that lie in `out` under their final names, wherever a tool puts
        them.
        """
        found = {path.name: path for path in (self.root / "out").rglob("*") if path.is_file()}
        return {name: found[name] for name in self.sizes if name in found}

    def put_away(self) -> None:
        """Make `out` a folder that is not there. Many small files are kept until the end: ext4 does
        not give an inode anew for some seconds after a file is gone, and who makes thousands of
        files then pays for the search.
        """
        out = self.root / "out"
        if len(self.sizes) > MANY_FILES and out.exists():
            out.rename(tempfile.mkdtemp(prefix="out-", dir=self.root))
        shutil.rmtree(out, ignore_errors=True)

    def measure(self, tool: str, base: str) -> Run:
        """Run a tool into a fresh folder and check that every byte is there."""
        self.put_away()
        process = self.start(tool, base)
        run = watch(process)
        have = {name: path.stat().st_size for name, path in self.arrived().items()}
        if process.returncode or have != self.sizes:
            raise SystemExit(
                f"{tool} failed: exit {process.returncode}, {sum(have.values())} bytes"
            )
        return run

    def compare(
        self,
        step: str,
        tools: Sequence[str],
        location: str,
        pick: Callable[..., float] = min,
    ) -> List[Row]:
        """Tools in turn, those that are there."""
        return self.compare_at(step, tools, f"{self.base}/{location}/{REPO}", pick)

    def compare_at(
        self, step: str, tools: Sequence[str], base: str, pick: Callable[..., float] = min
    ) -> List[Row]:
        """The same, with the address below which curl and aria2c find the files."""
        there = [tool for tool in tools if self.is_there(tool)]
        runs = in_turns({tool: partial(self.measure, tool, base) for tool in there}, self.rounds)
        return rows_of(step, runs, sum(self.sizes.values()), pick)

    @property
    def rounds(self) -> int:
        return self.scale.rounds

    def is_there(self, tool: str) -> bool:
        """Whether this machine has a tool."""
        name = tool.partition(",")[0]
        return name.startswith("hfship") or has(name)

    # -- the scenarios

    def raw(self) -> List[Row]:
        self.publish_shards()
        tools = ["hfship", "hf", "aria2c", "curl", "curl, then sha256"]
        if self.scale.is_small:
            return self.compare("fetch", tools, "raw")
        tools.append("hf, then sha256")
        if not has("hf-python"):
            return self.compare("fetch", tools, "raw")
        self.store_in_xet()
        rows = self.compare("fetch", [*tools, "hf, Xet"], "raw")
        shutil.rmtree(self.root / "xet")
        self.hub.faults.xet = {}
        return rows

    def jobs(self) -> List[Row]:
        self.publish_shards()
        tools = ["hfship", *(f"hfship -j {n}" for n in (1, 2, 4, 8, 16))]
        return self.compare("fetch, connections", tools, "raw")

    def lanes(self) -> List[Row]:
        self.hub.faults.cdn = f"{self.base}/lanes"
        self.publish({"model.safetensors": int(2 * self.scale.size * LANE_SHARE)})
        # Which lanes come is luck.
        return self.compare("fetch, uneven lanes", ["hfship", "aria2c"], "lanes", statistics.median)

    def collapse(self) -> List[Row]:
        self.hub.faults.cdn = ""
        vars(self.hub.faults).update(rate_bps=60e6, most_connections=8, slow_bps=2e6)
        self.publish({"model.safetensors": 900_000_000})
        tools = ["hfship", *(f"hfship -j {n}" for n in (2, 4, 8, 12, 16))]
        try:
            return self.compare("fetch, a server that collapses", tools, "raw")
        finally:
            vars(self.hub.faults).update(rate_bps=None, most_connections=0)

    def delay(self) -> List[Row]:
        if os.geteuid() or not Path("/dev/net/tun").exists():
            return [Row("fetch, 50 ms and 1 % loss", "all", said="left out: needs root and TUN")]
        line = [sys.executable, str(ROOT / "benchmarks/slow_link.py"), "25", "200", "0.01"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as link:
            assert link.stdout is not None and link.stdout.readline() == "ready\n"
            try:
                with inside("hfship-a"), self.servers(ENDS["hfship-a"]):
                    self.hub.faults.cdn = f"{self.base}/raw"
                    half = min(50_000_000, self.scale.size // 4)
                    self.publish({f"model-{i}.safetensors": half for i in range(2)})
                    self.around = ["ip", "netns", "exec", "hfship-b"]
                    tools = ["hfship", "aria2c", FROM_THE_HUB, "hf", "curl"]
                    if self.scale.is_small:
                        tools = tools[:3]
                    return self.compare("fetch, 50 ms and 1 % loss", tools, "raw")
            finally:
                self.around = []
                link.terminate()

    def small(self) -> List[Row]:
        self.hub.faults.cdn = ""
        count = self.scale.files
        self.publish({f"part-{i:04d}.json": 10_000 for i in range(count)})
        tools = ["hfship", "hf", "curl, then sha256"]
        with self.fast_hub():
            base = f"{self.front}/{REPO}/resolve/{self.commit}"
            return self.compare_at(f"fetch, {count} small files", tools, base)

    def kill(self) -> List[Row]:
        size = min(400_000_000, self.scale.size)
        self.hub.faults.cdn, self.hub.faults.rate_bps = "", 20e6
        self.publish({"model.safetensors": size})
        rows = []
        for tool in self.compared("hfship", "aria2c", "hf"):
            rows.append(Row("fetch, killed at half", tool, said=self.sent_twice(tool)))
        self.hub.faults.rate_bps = None
        return rows

    def compared(self, *tools: str) -> List[str]:
        """Of some tools those that are there, and in small the first: the others prove nothing of
        this benchmark.
        """
        there = [tool for tool in tools if self.is_there(tool)]
        if self.scale.is_small:
            return there[:1]
        return there

    def sent_twice(self, tool: str) -> str:
        """What a killed run costs."""
        base = f"{self.hub.url}/{REPO}/resolve/main"
        (size,) = self.sizes.values()
        shutil.rmtree(self.root / "out", ignore_errors=True)
        self.hub.forget()
        process = self.start(tool, base)
        while self.hub.traffic.body_bytes < size // 2:
            if process.poll() is not None:
                raise SystemExit(f"{tool} ended before half of it was there")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        if self.start(tool, base).wait():
            raise SystemExit(f"{tool} failed after the kill")
        again = self.hub.traffic.body_bytes / size - 1
        return f"{100 * again:.1f} % sent twice"

    def flip(self) -> List[Row]:
        self.hub.faults.cdn = ""
        self.publish({"model.safetensors": min(60_000_000, self.scale.size)})
        rows = []
        for times, what in ((1, "once"), (10**9, "always")):
            for tool in self.compared("hfship", "hf", "aria2c"):
                said = self.after_flips(tool, times)
                rows.append(Row(f"fetch, a byte changed {what}", tool, said=said))
        vars(self.hub.faults).update(flip_at=None, flip_times=1)
        return rows

    def after_flips(self, tool: str, times: int) -> str:
        """How a tool ends, and what it leaves, when a byte changes on the way."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        vars(self.hub.faults).update(flip_at=7_000_000, flip_times=times)
        code = self.start(tool, f"{self.hub.url}/{REPO}/resolve/main").wait()
        there = self.arrived().get("model.safetensors")
        if there is None:
            return f"exit {code}, no file"
        if sha256_of(there) == sha256_of(self.files / REPO / "model.safetensors"):
            return f"exit {code}, the right file"
        return f"exit {code}, WRONG BYTES"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blob_id_of(path: Path) -> str:
    """What git, and the Hub for small files, calls a content."""
    digest = git_blob_sha1(path.stat().st_size)
    digest.update(path.read_bytes())
    found: str = digest.hexdigest()
    return found


SCENARIOS: Mapping[str, Callable[[Bench], List[Row]]] = {
    "raw": Bench.raw,
    "jobs": Bench.jobs,
    "lanes": Bench.lanes,
    "collapse": Bench.collapse,
    "delay": Bench.delay,
    "small": Bench.small,
    "kill": Bench.kill,
    "flip": Bench.flip,
}
IN_SMALL = ("raw", "delay", "small", "kill", "flip")


def rows(work: Path, scale: Scale, scenarios: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of some scenarios, by default of all, in small of those that take little time."""
    chosen = scenarios or (IN_SMALL if scale.is_small else tuple(SCENARIOS))
    bench = Bench(work, scale)
    with bench.servers():
        for name in chosen:
            yield from SCENARIOS[name](bench)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ", ".join(SCENARIOS)
    parser.add_argument("scenario", nargs="*", help=f"of {names} (default: all)")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the large transfers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files lie, on both sides")
    args = parser.parse_args()
    scale = full(args.gb)._replace(rounds=args.rounds)
    with tempfile.TemporaryDirectory(prefix="hfship-bench-", dir=args.folder) as folder:
        print(facts_text(Path(folder)), flush=True)
        print(table(rows(Path(folder), scale, args.scenario)))


if __name__ == "__main__":
    main()
