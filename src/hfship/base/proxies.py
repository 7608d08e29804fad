# SPDX-License-Identifier: Apache-2.0
"""The proxies that the environment names.

Owns how http_proxy, https_proxy, all_proxy and no_proxy are read: by curl's and urllib's rules, in
one place. A lower-case name wins over the other, an empty value means none, and the scheme may be
left out.
Promises: the login of a proxy is in no text made here, and neither is a value that cannot be read:
a password may be what is wrong in it.
Never: connects.
"""

from __future__ import annotations

import base64
import contextlib
import re
from typing import Dict, Iterator, List, Mapping, Optional, Tuple
from urllib.parse import quote, unquote, urlsplit

from hfship.base.errors import AuthError, UsageError
from hfship.base.values import dataclass, field

DEFAULT_PORTS = {"http": 80, "https": 443}
ANY_SCHEME = "all"
PROXY_SCHEMES = ("http", "https", ANY_SCHEME)  # of what is asked for: http_proxy, https_proxy, ...
HIDDEN_PASSWORD = 8  # characters; to hide a shorter one wherever it stands would spoil paths

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_OTHER_KINDS = re.compile(r"socks\w{0,2}|ftp")
_ADDRESS = re.compile(
    r"""
    (?: \[ (?P<ipv6>[0-9A-Fa-f:.]+) \] | (?P<name>[\w.-]+) )
    (?: : (?P<port>[0-9]{1,5}) )?
    """,
    re.VERBOSE,
)


class ProxyLoginError(AuthError):
    """A proxy wants a login. Whoever asks again shows it the same one, which may lock an
    account."""


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the variable that names it."""

    variable: str
    scheme: str  # spoken with the proxy itself: http or https
    host: str
    port: int
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """HOST:PORT"""
        host = self.host
        if ":" in host:
            host = f"[{host}]"
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Its URL without the login."""
        return f"{self.scheme}://{self.address}"

    @property
    def headers(self) -> Dict[str, str]:
        """What logs in there.

        >>> parse_proxy("https_proxy", "me@proxy:3128").headers
        {'Proxy-Authorization': 'Basic bWU6'}
        """
        if not self.user and not self.password:
            return {}
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Proxy-Authorization": f"Basic {login}"}


def parse_proxy(variable: str, value: str) -> Proxy:
    """The proxy that a variable names: [SCHEME://][USER[:PASSWORD]@]HOST[:PORT], where the login
    may be quoted with % but need not be. Raises UsageError, which does not show the value.

    >>> proxy = parse_proxy("http_proxy", "bob:p/w@proxy:3128/")
    >>> proxy.url, proxy.user, proxy.password
    ('http://proxy:3128', 'bob', 'p/w')
    """
    text = value.strip()
    scheme = "http"
    named = _SCHEME.match(text)
    if named:
        scheme = named[1].lower()
        text = text[named.end() :]
    if scheme not in DEFAULT_PORTS:
        raise _unusable(variable, _why_not(scheme))

    login, _, address = text.lstrip("/").rpartition("@")
    found = _ADDRESS.fullmatch(re.split("[/?#]", address)[0])
    port = DEFAULT_PORTS[scheme]
    if found and found["port"]:
        port = int(found["port"])
    if not found or not 0 < port < 1 << 16:
        raise _unusable(variable, "what it says is no address (it may hold a password: not shown)")

    user, _, password = login.partition(":")
    return Proxy(
        variable=variable,
        scheme=scheme,
        host=found["ipv6"] or found["name"],
        port=port,
        user=unquote(user),
        password=unquote(password),
    )


def _why_not(scheme: str) -> str:
    if _OTHER_KINDS.fullmatch(scheme):
        return f"hfship speaks with HTTP proxies only, not by {scheme}"
    return "its proxy is of another kind than http and https"


def _unusable(variable: str, why: str) -> UsageError:
    return UsageError(
        f"{variable} names no proxy that can be used",
        why,
        f"export {variable}=http://HOST:PORT, or unset {variable}",
    )


def tells_no_login(variable: str, value: str) -> bool:
    """May the value of a proxy variable be written down? Not while it cannot be read."""
    try:
        return not value.strip() or not parse_proxy(variable, value).headers
    except UsageError:
        return False


# -- the environment


class Proxies:
    """The proxies of an environment, each parsed when it is first asked for.

    >>> proxies = Proxies({"https_proxy": "proxy:3128", "no_proxy": ".example.com"})
    >>> proxies.of("https://hub/x").url, proxies.of("https://a.example.com"), proxies.of("http://b")
    ('http://proxy:3128', None, None)
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._values = dict(_named_proxies(env))
        self._exceptions = re.split(r"[\s,]+", env.get("no_proxy", env.get("NO_PROXY", "")))
        self._known: Dict[Tuple[str, str, int], Optional[Proxy]] = {}

    def of(self, url: str) -> Optional[Proxy]:
        """The proxy for an address; None where there is none. Raises UsageError for a variable
        that names none which can be used, ValueError for what is no address."""
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        target = (parts.scheme, parts.hostname or "", port)
        if target not in self._known:
            self._known[target] = self._find(*target)
        return self._known[target]

    def _find(self, scheme: str, host: str, port: int) -> Optional[Proxy]:
        named = self._values.get(scheme) or self._values.get(ANY_SCHEME)
        if not named:
            return None

        is_exception = any(_is_exception(entry, host, port) for entry in self._exceptions)
        if is_exception:
            return None
        return parse_proxy(*named)

    def usable(self) -> Dict[str, Proxy]:
        """Those that can be used, by the scheme of what is asked for."""
        found = {}
        for scheme, (variable, value) in self._values.items():
            with contextlib.suppress(UsageError):
                found[scheme] = parse_proxy(variable, value)

        return found

    def for_children(self) -> Dict[str, str]:
        """The variables for another program that goes to the network: spelled as all programs
        understand them. One that names no proxy is left as it is."""
        variables = {}
        for scheme, proxy in self.usable().items():
            login = ""
            if proxy.headers:
                user = quote(proxy.user, safe="")
                password = quote(proxy.password, safe="")
                login = f"{user}:{password}@"
            variables[f"{scheme}_proxy"] = f"{proxy.scheme}://{login}{proxy.address}"

        return variables

    @property
    def secrets(self) -> List[str]:
        """What may be shown nowhere, in all its forms."""
        found: List[str] = []
        for variable, value in self._values.values():
            if tells_no_login(variable, value):
                continue
            text = value.strip()
            login = text.rpartition("@")[0]
            found += [text, _SCHEME.sub("", login)]

        for proxy in self.usable().values():
            secret = proxy.password or proxy.user  # a token may stand for both
            if len(secret) >= HIDDEN_PASSWORD:
                found += [secret, *proxy.headers.values()]

        return found


def _named_proxies(env: Mapping[str, str]) -> Iterator[Tuple[str, Tuple[str, str]]]:
    """(scheme, (variable, value)) of those that are set."""
    for scheme in PROXY_SCHEMES:
        variable = f"{scheme}_proxy"
        if variable not in env:
            variable = variable.upper()
        if variable == "HTTP_PROXY" and "REQUEST_METHOD" in env:
            continue  # of a CGI script: a header of its client (httpoxy, CVE-2016-1000110)
        value = env.get(variable, "")
        if value.strip():
            yield scheme, (variable, value)


def _is_exception(entry: str, host: str, port: int) -> bool:
    """Does an entry of no_proxy mean this host?

    A name means its subdomains, too; a network is that of an address, never of a name.

    >>> [_is_exception(e, "a.b", 80) for e in ("*", "b", ".b", "*.b", "a.b:80", "a.b:1", "xb", "")]
    [True, True, True, True, True, False, False, False]
    >>> _is_exception("10.0.0.0/8", "10.1.2.3", 80), _is_exception("[::1]:80", "::1", 80)
    (True, True)
    """
    if entry == "*":
        return True
    with_port = re.fullmatch(r"\[?(.*?)\]?:([0-9]{1,5})", entry)
    if with_port and (entry.startswith("[") or ":" not in with_port[1]):
        if int(with_port[2]) != port:
            return False
        entry = with_port[1]
    name = entry.strip("[]").lower()
    if _in_network(name, host):
        return True
    domain = re.sub(r"^\*?\.", "", name)
    return bool(domain) and f".{host}".endswith(f".{domain}")


def _in_network(entry: str, host: str) -> bool:
    import ipaddress  # some milliseconds, where no_proxy is set

    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


# -- what a proxy answers


def login_error(proxy: Optional[Proxy], offered: str = "") -> ProxyLoginError:
    """The error for a 407. `offered` is its Proxy-Authenticate, where that is known; without a
    `proxy` it is one that nobody named, on the way."""
    variable = "https_proxy"
    what = "a proxy on the way wants a login"
    why = "no variable names a proxy"
    address = "HOST:PORT"
    if proxy:
        variable = proxy.variable
        address = proxy.address
        what = f"the proxy {address} wants a login"
        why = f"{variable} has none"
        if proxy.headers:
            why = f"it refuses the one in {variable}"

    schemes = ", ".join(re.findall(r"(?:^|, *)([A-Za-z]{1,20})(?= |,|$)", offered[:1000]))
    if schemes and "basic" not in schemes.lower():
        why += f"; it takes {schemes}, and hfship speaks Basic: a local helper like cntlm or px may"
    step = f"export {variable}=http://USER:PASSWORD@{address}"
    return ProxyLoginError(what, why, f"{step} (in PASSWORD write %40 for @, %2F for /, %25 for %)")
