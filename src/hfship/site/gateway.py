# SPDX-License-Identifier: Apache-2.0
"""The configuration of the gateway: HAProxy, by its version.

Owns the text of haproxy.cfg: a pure function of a Gateway; the same value gives the same bytes. Who
may do what is in the maps beside it (site/maps.py).

Who gets in, and whither:
  the key      `Authorization: Bearer KEY`, or `x-api-key: KEY` as clients of /v1/messages send it;
               its SHA-256 is looked up in keys.map
  the model    `model` of the body, or the path /MODEL/v1/..., for which no body is read
  the right    of a key to a model, whatever name the model was called by. A model is one rights
               domain: a body that names two gives no right to either but the one that it reaches
  the page     /ops, of the site (ops/site_page): for keys with the right to it, which browsers send
               as a password (Basic), with any name
  the path     only those of ROUTES; all else of vLLM (/invocations, /pause, /metrics, /tokenize)
               cannot be reached
Only what went through all of that counts against the rate of a key.

No prompt runs twice: a request goes to another replica only when no connection to the first came
about. After that vLLM may have begun, so what breaks off ends with an error (502, or a stream that
ends without [DONE]), and the client decides. What waits for an engine that hangs is let go of
before that is proven, where there is another replica: HAProxy from 3.0 on closes such a connection
without an answer, which clients take as one that broke. For the same reason connections to vLLM are
not kept: it closes idle ones after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), and a request that meets
that close cannot be told from one that was read.

The access log has a line of JSON for each request, with names out of our own maps only: nothing of
a body, a header or a query.

Paths in haproxy.cfg are relative to its folder (`default-path config`): it can be checked anywhere.
"""

from __future__ import annotations

from typing import Iterable, Iterator, List, Mapping, NamedTuple, Sequence

from hfship.site.maps import compact_json, map_path
from hfship.site.terms import (
    CERTIFICATE_FILE,
    MIB,
    ON_DEMAND,
    PAGE_ROUTE,
    PREFIX,
    Gateway,
    GatewayModel,
    HaproxyVersion,
)

CONFIG_FILE = "haproxy.cfg"

LARGE_BUFFERS: HaproxyVersion = (3, 4)  # tune.bufsize.large and use-large-buffer came with it
OLDEST: HaproxyVersion = (2, 6)  # the first with all that is used here
# Without large buffers every connection has one that holds a whole body: 1 MiB costs 300 MB and a
# second at 200 streams, 128 KiB 60 MB.
_SMALL_BUFFER = 128 << 10
_HEADERS = 32 << 10  # bytes of headers, which share the buffer with the body
SMALL_BODY = _SMALL_BUFFER - _HEADERS
LARGEST_BODY = 64 * MIB

POST_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
    "/v1/score",
)
UPLOAD_ROUTES = ("/v1/audio/transcriptions", "/v1/audio/translations")  # forms: no JSON
LIST_ROUTE = "/v1/models"
# By which vLLM is told on which rank to run, and asked how full it is.
STEERING = ("x-data-parallel-rank", "endpoint-load-metrics-format")


class ApiError(NamedTuple):
    """An error as OpenAI's clients read it. `message` may have %[...] of HAProxy in it."""

    status: int
    code: str
    message: str
    kind: str = "invalid_request_error"
    headers: str = ""  # as `hdr NAME VALUE` of HAProxy


_NO_MODEL = "The model does not exist, or this key has no right to it"
ERRORS: Mapping[str, ApiError] = {
    "headers": ApiError(431, "headers_too_large", "The headers of this request are too large"),
    "no_key": ApiError(
        401,
        "invalid_api_key",
        "Missing or unknown API key. Send it as: Authorization: Bearer KEY",
        headers="hdr WWW-Authenticate Bearer",
    ),
    "expired": ApiError(
        401, "expired_api_key", "This API key has expired", headers="hdr WWW-Authenticate Bearer"
    ),
    "log_in": ApiError(
        401,
        "invalid_api_key",
        "The password is an API key with the right ops; the name is any",
        headers='hdr WWW-Authenticate "Basic realm=\\"hfship\\""',
    ),
    "no_ops": ApiError(403, "no_right", "This key does not open the page: hfship key add --ops"),
    "suspended": ApiError(403, "suspended_api_key", "This API key is suspended"),
    "no_path": ApiError(404, "unknown_url", "No such path on this gateway"),
    "no_get": ApiError(405, "method_not_allowed", "Use POST", headers="hdr Allow POST"),
    "no_post": ApiError(405, "method_not_allowed", "Use GET", headers="hdr Allow GET"),
    "rate": ApiError(
        429,
        "rate_limit_exceeded",
        "Rate limit of this key reached: %[var(txn.rate)] requests a minute",
        "rate_limit_error",
        'hdr Retry-After "%[int(60),div(txn.rate),add(1)]"',
    ),
    "streams": ApiError(
        429,
        "concurrency_limit_exceeded",
        "Too many requests of this key at once: %[var(txn.streams)] are allowed",
        "rate_limit_error",
        "hdr Retry-After 2",
    ),
    "no_length": ApiError(411, "length_required", "Send this request with a Content-Length"),
    "upload": ApiError(
        400,
        "model_in_path_required",
        f"Files are sent to /MODEL{UPLOAD_ROUTES[0]}, with the model in the path",
    ),
    "unread": ApiError(408, "request_timeout", "The body of this request did not come in time"),
    "unnamed": ApiError(
        400,
        "missing_model",
        "The body names no model: send JSON, with the name of a model as model",
    ),
    "no_model": ApiError(404, "model_not_found", _NO_MODEL),
    "asleep": ApiError(
        503,
        "model_asleep",
        "This model is served on demand, and sleeps now; ask the operators for its hours",
        "server_error",
        "hdr Retry-After 60",
    ),
}
# What HAProxy itself answers, by status.
_OWN_ERRORS = (
    ApiError(400, "bad_request", "This is not a valid HTTP request"),
    ApiError(408, "request_timeout", "The request did not come in time"),
    ApiError(500, "internal_error", "The gateway failed", "server_error"),
    ApiError(502, "bad_gateway", "The model server broke off", "server_error"),
    ApiError(
        503,
        "model_unavailable",
        "No replica of this model answers now; try again later",
        "server_error",
        "hdr Retry-After 10",
    ),
    ApiError(504, "timeout", "The model server took too long", "server_error"),
)


def body_limit(gateway: Gateway) -> int:
    """Bytes that a body may have from which the gateway reads the model."""
    if gateway.version >= LARGE_BUFFERS:
        return gateway.max_body
    return min(gateway.max_body, SMALL_BODY)


def gateway_warnings(gateway: Gateway) -> List[str]:
    """What the gateway will not do as one may expect."""
    warnings = []
    limit = body_limit(gateway)
    if limit < gateway.max_body:
        version = ".".join(map(str, gateway.version))
        warnings.append(
            f"HAProxy {version} reads bodies of up to {limit >> 10} KiB; larger ones get 413,"
            " unless they are sent to /MODEL/v1/...; 3.4 and later take more"
        )
    return warnings


# -- haproxy.cfg


def config_text(gateway: Gateway, generation: str = "") -> str:
    """The text of haproxy.cfg. `generation` is what `show info` will tell of it."""
    lines = ["# Written by hfship; `hfship serve --models FILE` writes it again."]
    lines += _section("global", _global_lines(gateway, generation))
    lines += _section("defaults", _default_lines(gateway))
    if gateway.resolver:
        lines += _section("resolvers site", _resolver_lines(gateway.resolver))
    lines += _section("backend st_key", _table_lines())
    lines += _section("frontend metrics", _metrics_lines(gateway))
    if gateway.tls_bind:
        lines += _section("frontend plain", _redirect_lines(gateway))
    lines += _section("frontend openai", _frontend_lines(gateway))
    lines += _section("backend site_page", _page_server_lines(gateway))
    for model in gateway.models:
        lines += _section(f"backend {model.backend}", _backend_lines(gateway, model))
    return "\n".join(lines) + "\n"


def _section(head: str, lines: Iterable[str]) -> List[str]:
    return ["", head, *(f"    {line}" for line in lines)]


def _global_lines(gateway: Gateway, generation: str) -> Iterator[str]:
    yield "default-path config"
    if generation:
        yield f"description {generation}"
    yield "log stdout format raw local0 info"
    yield "maxconn 4000"
    yield "nbthread 2"  # of hundreds of streams it takes a part of one core
    # expose-fd: a reload hands the listening sockets over, and drops nothing.
    yield f"stats socket {gateway.admin_socket} mode 600 level admin expose-fd listeners"
    yield "hard-stop-after 1h"
    yield "ssl-default-bind-options ssl-min-ver TLSv1.2"
    if gateway.version >= LARGE_BUFFERS:
        yield f"tune.bufsize.large {gateway.max_body + _HEADERS}"
    else:
        yield f"tune.bufsize {_SMALL_BUFFER}"


def _default_lines(gateway: Gateway) -> Iterator[str]:
    yield "mode http"
    yield "log global"
    yield "option dontlognull"
    # Before 3.4.7 small pieces of a stream wait for each other without it.
    yield "option http-no-delay"
    yield "option http-server-close"
    yield "option redispatch 1"
    yield "retries 3"
    yield "retry-on conn-failure"
    yield "timeout connect 1s"
    yield f"timeout client {gateway.timeout_s}s"
    yield f"timeout server {gateway.timeout_s}s"
    yield "timeout http-request 30s"
    yield "timeout http-keep-alive 60s"
    yield "timeout queue 30s"
    for error in _OWN_ERRORS:
        body = _error_body(error)
        answer = f"content-type application/json string '{body}' {error.headers}"
        yield f"http-error status {error.status} {answer}".rstrip()


def _log_format() -> str:
    """A line of JSON for each request: what comes from clients is their address alone."""
    fields = {
        "time": "%Ts",
        "client": '"%ci"',
        "key": '"%[var(txn.key)]"',
        "model": '"%[var(txn.be)]"',
        "server": '"%s"',
        "route": '"%[var(txn.route)]"',
        "status": "%ST",
        "first_byte_ms": "%Tr",
        "ms": "%Ta",
        "in": "%U",
        "out": "%B",
        "end": '"%ts"',
    }
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def _resolver_lines(address: str) -> Sequence[str]:
    return (
        f"nameserver docker {address}",
        "accepted_payload_size 8192",
        "resolve_retries 2",
        "timeout resolve 1s",
        "timeout retry 500ms",
        "hold valid 1s",
        "hold obsolete 5s",
    )


def _table_lines() -> Sequence[str]:
    # gpc0 counts accepted requests alone: refused ones must not keep a key locked out.
    return ("stick-table type string len 64 size 10k expire 1h store gpc0,gpc0_rate(60s),conn_cur",)


def _metrics_lines(gateway: Gateway) -> Sequence[str]:
    return (
        f"bind {gateway.metrics_bind}",
        "no log",
        "http-request use-service prometheus-exporter if { path /metrics }",
        "http-request deny deny_status 404",
    )


def _redirect_lines(gateway: Gateway) -> Sequence[str]:
    host = "%[req.hdr(host),host_only]"
    return (
        f"bind {gateway.bind}",
        f"http-request redirect location https://{host}:{gateway.https_port}%[path] code 308",
    )


def _frontend_lines(gateway: Gateway) -> Iterator[str]:
    if gateway.tls_bind:
        yield f"bind {gateway.tls_bind} ssl crt {CERTIFICATE_FILE} alpn h2,http/1.1"
    else:
        yield f"bind {gateway.bind}"
    yield f"log-format '{_log_format()}'"
    yield "http-request return status 200 content-type text/plain string ok if { path /health }"
    yield _refusal("headers", f"if {{ req.hdrs,length gt {_HEADERS - 2048} }}")
    yield from _key_lines()
    yield from _page_lines()
    yield from _path_lines()
    yield from _limit_lines()
    yield from _model_list_lines()
    yield from _body_lines(gateway)
    yield from _right_lines()
    yield from _forward_lines()
    yield "use_backend site_page if page"
    yield "use_backend %[var(txn.be)]"


def _key_lines() -> Iterator[str]:
    """Who asks: txn.key, the name of the key."""
    yield "http-request set-var(txn.secret) http_auth_bearer"
    no_bearer = "!{ req.hdr(authorization) -m found }"
    yield f"http-request set-var(txn.secret) req.hdr(x-api-key) if {no_bearer}"
    yield f"acl page path {PAGE_ROUTE}"
    basic = "{ req.hdr(authorization) -m beg -i basic }"
    password = "req.hdr(authorization),word(2, ),b64dec,field(2,:)"
    yield f'http-request set-var(txn.secret) "{password}" if page {basic}'
    digest = "var(txn.secret),sha2(256),hex,lower"
    yield f"http-request set-var(txn.key) {digest},map_str({map_path('keys')})"
    yield "http-request unset-var(txn.secret)"
    yield _refusal("log_in", "if page !{ var(txn.key) -m found }")
    yield _refusal("no_key", "if !{ var(txn.key) -m found }")
    yield _refusal("suspended", f"if {{ var(txn.key),map_str({map_path('suspended')}) -m found }}")
    yield f"http-request set-var(txn.expires) var(txn.key),map_str_int({map_path('expires')})"
    expired = "{ var(txn.expires) -m found } { date,sub(txn.expires) ge 0 }"
    yield _refusal("expired", f"if {expired}")


def _page_lines() -> Iterator[str]:
    """The page of the site: nothing of what follows is asked of who may see it."""
    yield _refusal("no_ops", f"if page !{{ var(txn.key),map_str({map_path('ops')}) -m found }}")
    yield _refusal("no_post", "if page !{ method GET HEAD }")
    yield "http-request set-var(txn.route) path if page"
    yield "http-request set-uri %[path] if page"
    for name in ("authorization", "x-api-key", "cookie", "upgrade"):
        yield f"http-request del-header {name} if page"
    yield "http-request allow if page"


def _path_lines() -> Iterator[str]:
    """What is asked for: txn.route, and txn.model where the path names it."""
    posts = " ".join(POST_ROUTES)
    uploads = " ".join(UPLOAD_ROUTES)
    in_path = "{ path_reg ^/[^/]+/v1/ } !{ path_beg /v1/ }"
    yield f"http-request set-var(txn.in_path) bool(true) if {in_path}"
    yield "acl in_path var(txn.in_path) -m found"
    yield "http-request set-var(txn.model) path,field(2,/) if in_path"
    yield r"http-request replace-path ^/[^/]+(/v1/.*) \1 if in_path"
    # The query goes: vLLM needs none, and would log it.
    yield "http-request set-uri %[path]"
    yield f"acl posted path {posts}"
    yield f"acl uploaded path {uploads}"
    yield f"acl listed path {LIST_ROUTE}"
    yield f"acl looked_up path_beg {LIST_ROUTE}/"
    yield "acl gets method GET"
    yield "acl posts method POST"
    yield _refusal("no_path", "if !posted !uploaded !listed !looked_up")
    yield "http-request set-var(txn.route) path if posted || uploaded || listed"
    yield _refusal("no_get", "if posted !posts || uploaded !posts")
    yield _refusal("no_post", "if listed !gets || looked_up !gets")


def _limit_lines() -> Iterator[str]:
    """The limits of the key."""
    yield "http-request track-sc0 var(txn.key) table st_key"
    yield f"http-request set-var(txn.rate) var(txn.key),map_str_int({map_path('rate')})"
    yield f"http-request set-var(txn.streams) var(txn.key),map_str_int({map_path('streams')})"
    yield _rate_line()
    over_streams = "{ var(txn.streams) -m found } { sc0_conn_cur(st_key),sub(txn.streams) gt 0 }"
    yield _refusal("streams", f"if {over_streams}")


def _rate_line() -> str:
    over_rate = "{ var(txn.rate) -m found } { sc0_gpc0_rate(st_key),sub(txn.rate) ge 0 }"
    return _refusal("rate", f"if {over_rate}")


def _model_list_lines() -> Iterator[str]:
    """/v1/models: what the key may use, and no more."""
    answer = "http-request return status 200 content-type application/json lf-string"
    yield f"{answer} '%[var(txn.key),map_str({map_path('list')})]' if listed"
    name = f"path,regsub(^{LIST_ROUTE}/,),url_dec"
    yield f"http-request set-var(txn.model) {name} if looked_up"
    yield f"http-request set-var(txn.be) var(txn.model),map_str({map_path('models')}) if looked_up"
    yield from _right_lines("looked_up")
    yield f"{answer} '%[var(txn.model),map_str({map_path('model')})]' if looked_up"


def _body_lines(gateway: Gateway) -> Iterator[str]:
    """The model that the body names, where the path names none; and what is too large."""
    limit = body_limit(gateway)
    chunked = "{ req.hdr(transfer-encoding) -m found }"
    yield _refusal("upload", "if uploaded !in_path")
    # HTTP/2 has bodies of unknown size without a header that says so.
    yield _refusal("no_length", "if in_path !{ req.hdr(content-length) -m found }")
    upload = _too_large(gateway.max_upload)
    yield _return(upload, f"if in_path {{ req.hdr_val(content-length) gt {gateway.max_upload} }}")
    too_large = _too_large(limit)
    yield _return(too_large, f"if !in_path {{ req.hdr_val(content-length) gt {limit} }}")
    large = ""
    if gateway.version >= LARGE_BUFFERS:
        large = " use-large-buffer"
    yield f"http-request wait-for-body time 30s{large} if !in_path"
    # Of a chunked body nobody knows the size before it has come.
    yield _return(too_large, f"if !in_path {{ req.body_len gt {limit} }}")
    late = "{ req.hdr_val(content-length),sub(txn.length) gt 0 }"
    yield "http-request set-var(txn.length) req.body_len if !in_path"
    yield _refusal("unread", f"if !in_path !{chunked} {late}")
    yield "http-request set-var(txn.model) req.body,json_query('$.model') if !in_path"
    yield _refusal("unnamed", "if !{ var(txn.model) -m found }")
    yield f"http-request set-var(txn.be) var(txn.model),map_str({map_path('models')})"
    yield "http-request set-var(txn.prefix) req.body,bytes(0,1024),xxh64 if !in_path"


def _right_lines(when: str = "TRUE") -> Iterator[str]:
    """Whether the key may use the model: a right to it, or to all."""
    rights = f"map_str({map_path('rights')})"
    yield _refusal("no_model", f"if {when} !{{ var(txn.be) -m found }}")
    for right in ("concat(:,txn.be)", "concat(:*)"):
        found = f"var(txn.key),{right},{rights}"
        yield f"http-request set-var(txn.right) {found} if {when} !{{ var(txn.right) -m found }}"
    yield _refusal("no_model", f"if {when} !{{ var(txn.right) -m found }}")


def _forward_lines() -> Iterator[str]:
    """What goes on to vLLM: its own key, and nothing by which a client could steer it."""
    # Again: others may have been accepted while the body of this one was waited for.
    yield _rate_line()
    yield "http-request sc-inc-gpc0(0)"
    upstream = f"%[var(txn.be),map_str({map_path('upstream')})]"
    yield f'http-request set-header Authorization "Bearer {upstream}"'
    for name in ("x-api-key", "upgrade", "cookie", *STEERING):
        yield f"http-request del-header {name}"


def _page_server_lines(gateway: Gateway) -> Sequence[str]:
    step = "The page of this site is not served now: hfship watch --site --page"
    body = _error_body(ApiError(503, "no_page", step, "server_error"))
    return (
        f"http-error status 503 content-type application/json string '{body}'",
        f"server page unix@{gateway.page_socket}",
    )


def _backend_lines(gateway: Gateway, model: GatewayModel) -> Iterator[str]:
    if model.affinity == PREFIX:
        yield "balance hash var(txn.prefix)"
        yield "hash-type consistent"
        yield "hash-balance-factor 150"
    else:
        yield "balance leastconn"
    yield "option httpchk"
    yield "http-check send meth GET uri /health"
    yield "http-check expect status 200"
    if model.mode == ON_DEMAND:
        yield _refusal("asleep", "if { nbsrv eq 0 }")
    # With a replica to go to, a silent one is left after some 6 s. The only one is given more
    # time: an API server that reads large prompts answers late, too.
    checks = "timeout check 5s", "fall 4"
    if len(model.replicas) > 1:
        checks = "timeout check 2s", "fall 2"
    patience, fall = checks
    yield patience
    yield f"default-server check inter 1s fastinter 500ms downinter 1s rise 2 {fall}"
    yield "default-server observe layer4 error-limit 1 on-error mark-down"
    # A container that comes back is taken as up until its first check. Its requests then find
    # nobody listening, which the next replica answers and which marks it down. `init-state down`
    # (3.1) would do more harm: after each reload no server would be up for a second.
    if gateway.resolver:
        yield "default-server resolvers site init-addr last,libc,none"
    for replica in model.replicas:
        backup = " backup" if replica.standby else ""
        yield f"server {replica.name} {replica.address}{backup}"


def _too_large(limit: int) -> ApiError:
    message = f"The body of this request is too large: {limit} bytes are taken"

    return ApiError(413, "request_too_large", message)


def _refusal(name: str, condition: str) -> str:
    return _return(ERRORS[name], condition)


def _return(error: ApiError, condition: str) -> str:
    """The rule that answers with an error.

    >>> _return(ApiError(404, "x", "No %[path]"), "if a")[:66]
    'http-request return status 404 content-type application/json lf-st'
    """
    body = _error_body(error)
    kind = "string"
    if "%[" in error.message:
        kind = "lf-string"

    answer = f"content-type application/json {kind} '{body}' {error.headers}".rstrip()

    return f"http-request return status {error.status} {answer} {condition}"


def _error_body(error: ApiError) -> str:
    """The JSON of an error, as OpenAI's API has them.

    >>> _error_body(ApiError(404, "x", "No"))
    '{"error":{"message":"No","type":"invalid_request_error","param":null,"code":"x"}}'
    """
    value = {
        "message": error.message,
        "type": error.kind,
        "param": None,
        "code": error.code,
    }
    return compact_json({"error": value})
