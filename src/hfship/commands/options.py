# SPDX-License-Identifier: Apache-2.0
"""Values of options, and options that several commands share."""

from __future__ import annotations

import argparse
import calendar
import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Union

from hfship.base.errors import UsageError
from hfship.base.settings import home_path
from hfship.base.workers import default_jobs


class _Refused(argparse.ArgumentTypeError, ValueError):
    """A value that an option does not take, for argparse and for a models file alike."""


def option_type(
    read: Callable[[str], Any], good: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """A type for argparse: reads a value, and refuses one that is not good.

    It says: 'X' is not `expected`.
    """

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError, KeyError, OSError):
            value = read(text)
            if good(value):
                return value
        shown = text[:40]
        raise _Refused(f"{shown!r} is not {expected}")

    return convert


def env_variable(text: str) -> str:
    """A variable, K=V, that a container can be given. Raises UsageError."""
    from hfship.serve.files import require_env

    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--env {name} has no value", "", f"--env {name}=VALUE")
    require_env(name, value)
    return text


def signing_key(text: str) -> Union[Path, str]:
    """A private key: its file, or the pkcs11: URI of one that stays in its token. Raises UsageError
    for a PIN on the command line.

    >>> signing_key("/keys/a.pem"), signing_key("pkcs11:object=a;pin-source=file:///run/pin")
    (PosixPath('/keys/a.pem'), 'pkcs11:object=a;pin-source=file:///run/pin')
    """
    from hfship.archive.signature import is_of_hardware

    if not is_of_hardware(text):
        return home_path(text)
    if "pin-value" in text:
        what = "the URI of the key has its PIN in it, which all users of this machine can see"
        raise UsageError(what, "", "put the PIN into a file of yours: ...;pin-source=file:PATH")
    return text


def absolute_path(text: str) -> str:
    """A path that is remembered: a later call may come from another folder."""
    return os.path.abspath(os.path.expanduser(text)) if text else ""


def adapter(text: str) -> str:
    """A LoRA adapter, NAME=DIR, with the absolute path of its folder. Raises UsageError."""
    from hfship.serve.mounts import adapter_parts

    name, folder = adapter_parts(text)
    return f"{name}={absolute_path(folder)}"


def kept_version(text: str) -> str:
    """A version of a model that is kept: digits of its commit, or the way forward."""
    from hfship.archive.kept import NEWEST

    if text and text != NEWEST and not re.fullmatch(r"[0-9a-f]{4,64}", text):
        expected = f"digits of a commit, nor {NEWEST}: name the model before --rollback"
        raise _Refused(f"{text[:40]!r} is not {expected}")
    return text


def ssh_option(text: str) -> str:
    """An option of ssh_config(5), KEY=VALUE. Raises UsageError."""
    if not re.fullmatch(r"[A-Za-z]\w*=.+", text) or not text.isprintable():
        step = "write it like --ssh-option ProxyJump=gate"
        raise UsageError(f"{text!r} is no KEY=VALUE", "", step)
    return text


def _is_address(text: str) -> bool:
    """Is it an IP address, of either family? Raises OSError and ValueError."""
    import socket  # loads much, and few addresses are given

    from hfship.base.network import family_of

    return bool(socket.inet_pton(family_of(text), text))


def _seconds_of(age: str) -> int:
    """The seconds of an age, like 90m. Raises ValueError and KeyError."""
    return int(age[:-1]) * _UNITS_S[age[-1:]]


def _time_of(text: str) -> float:
    """The time, in seconds since the epoch, that an age ("2h" ago) or a date of UTC means, like
    2026-01-31, 2026-01-31T04:05 or 2026-01-31T04:05:06Z. Raises ValueError and KeyError."""
    if re.fullmatch(r"\d+[a-z]", text, re.ASCII):
        return time.time() - _seconds_of(text)
    date = text.rstrip("Z").replace(" ", "T")
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"):
        with contextlib.suppress(ValueError):
            return float(calendar.timegm(time.strptime(date, form)))
    raise ValueError(text)


# Indexes, GPU:DEVICE of a slice, and UUIDs; those of slices by old drivers have strokes.
_GPUS = re.compile(r"(all|((\d+(:\d+)?|(GPU|MIG)-[\w/-]+)(,(?!$)|$))*)$", re.ASCII)
_TAIL = re.compile(r"all|\d+", re.ASCII)
MOST = 10**9 - 1  # tokens, workers, seconds: more is a slip, and overflows where it is used
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_PORTS = range(1, 1 << 16)

# Types for argparse.
positive_number = option_type(int, lambda n: 0 < n <= MOST, "a positive number below a billion")
port_number = option_type(int, lambda port: port in _PORTS, "a port")
any_port = option_type(int, lambda port: port == 0 or port in _PORTS, "a port")
some_seconds = option_type(float, lambda seconds: 0 < seconds < 1e6, "a positive number of seconds")
share_of_one = option_type(float, lambda share: 0 < share <= 1, "above 0 and at most 1")
line_count = option_type(str, lambda text: bool(_TAIL.fullmatch(text)), "a number of lines")
gpu_list = option_type(
    str, lambda text: bool(_GPUS.match(text)), "a list of GPUs, like 0,1 or 0:1 (a slice)"
)
ip_address = option_type(str, _is_address, "an IP address (0.0.0.0: all)")
past_time = option_type(
    _time_of, lambda seconds: seconds >= 0, "a time, like 2h, 7d or 2026-01-31T04:05"
)
age_s = option_type(_seconds_of, lambda age: age >= 0, "an age, like 90m, 12h or 7d")


def add_jobs_option(parser: argparse.ArgumentParser) -> None:
    """Add -j: how many workers."""
    what = "workers (default: %(default)s, one per core; 1 reads a slow disk in order)"
    number = default_jobs()
    parser.add_argument(
        "-j", "--jobs", type=positive_number, default=number, metavar="N", help=what
    )


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """Add --key: whose signature is required."""
    what = "require a signature by this key (default: HFSHIP_KEY, else none)"
    parser.add_argument("--key", type=home_path, metavar="PUB.pem", help=what)


def hosts_arguments(parser: argparse.ArgumentParser, does: str) -> None:
    """--hosts and --on."""
    group = parser.add_argument_group("hosts, the [[host]]s of a models file")
    group.add_argument("--hosts", action="store_true", help=f"{does} on all of them, at once")
    what = "only on these; can be given again"
    group.add_argument("--on", action="append", default=[], metavar="HOST", help=what)


def means_hosts(args: argparse.Namespace) -> bool:
    """Whether a command line is for hosts."""
    return bool(getattr(args, "hosts", False) or getattr(args, "on", []))
