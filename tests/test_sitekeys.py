"""The tables of a site in a models file: what they mean, and mistakes that are named with file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import List, Tuple

import pytest

from hfship.base.errors import UsageError
from hfship.base.modelsfile import read_models_file
from hfship.base.settings import ModelsFile
from hfship.commands.modelskeys import models_schema
from hfship.commands.sitekeys import site_mistakes
from hfship.site.settings import (
    GatewaySettings,
    Schedule,
    copies_of,
    expiry,
    gateway_settings,
    key_rights,
    monitoring_settings,
    schedules,
    site_images,
    site_lacks,
)

SCHEMA = models_schema()


def read(folder: Path, text: str) -> ModelsFile:
    path = folder / "models.toml"
    path.write_text(text, encoding="utf-8")
    return read_models_file(path, SCHEMA, (site_mistakes,))


SITE = """
[gateway]
port = 443
http_port = 80
tls_cert = "site.pem"
max_body = "8MiB"
[monitoring]
retention = "90d"
[[model]]
repo = "org/a@main"
replicas = 2
standby = 1
affinity = "prefix"
serve = { gpus = [0, 1, 2], aliases = ["chat"] }
[[model]]
name = "b"
mode = "on-demand"
[[model]]
name = "c"
mode = "on-demand"
[[key]]
name = "alice"
models = ["chat", "b"]
rate = "2/s"
streams = 4
expires = "2030-01-31"
[[schedule]]
at = "22:00"
model = "b"
instead_of = "c"
"""


def test_what_the_tables_of_a_site_mean(tmp_path: Path) -> None:
    file = read(tmp_path, SITE)
    gateway = gateway_settings(file)
    assert gateway == GatewaySettings(
        port=443, http_port=80, tls_cert=str(tmp_path / "site.pem"), max_body=8 << 20
    )
    assert gateway.published_port == 443
    watched = monitoring_settings(file)
    assert watched and watched.retention == "90d"
    copies = copies_of(file.models[0])
    assert copies.deployments("a") == ("a", "a.2", "a.3") and copies.affinity == "prefix"
    assert schedules(file) == (Schedule("22:00", "b", "c"),)
    assert key_rights(file, 0) == {
        "alice": {"models": ("chat", "b"), "rate": 120, "streams": 4, "expires": 1896134400}
    }


def test_a_file_without_a_site_has_none(tmp_path: Path) -> None:
    file = read(tmp_path, '[[model]]\nname = "a"\n')
    assert gateway_settings(file) is None and monitoring_settings(file) is None
    assert key_rights(file, 0) == {} and schedules(file) == ()


G = "[gateway]\n"
W = "[gateway]\n[monitoring]\n"
A = '[[model]]\nname = "a"\n'
B = '[[model]]\nname = "b"\n'
C = '[[model]]\nname = "c"\n'
D = '[[model]]\nname = "d"\nmode = "on-demand"\n'
H = '[[host]]\nname = "h"\n'
MISTAKES: List[Tuple[str, str]] = [
    (G + 'prt = 1', "models.toml:2: gateway.prt: is not a key; did you mean port?"),
    (G + 'port = "443"', "models.toml:2: gateway.port: expects a whole number"),
    (G + 'port = 70000', "models.toml:2: gateway.port: '70000' is not a port"),
    (G + 'max_body = "1GiB"', "gateway.max_body: 1GiB is not from 1KiB to 64MiB"),
    (G + 'tls_key = "k"', "models.toml:2: gateway.tls_key: needs tls_cert"),
    (G + 'http_port = 80', "models.toml:2: gateway.http_port: needs tls_cert"),
    (G + 'http_port = 443\nport = 443\ntls_cert = "c"', "gateway.http_port: is the port with TLS, too"),
    (G + "image = 'a\"b'", "gateway.image: is not one line of text without quotes"),
    ("[monitoring]\nretention = '30'", "monitoring.retention: '30' is not a time like 30d"),
    (A + "replicas = 2", "models.toml:1: model 1: has replicas, but there is no [gateway]"),
    (G + A + "replicas = 0", "models.toml:4: model 1: replicas: 0 is not from 1 to 64"),
    (G + A + 'affinity = "random"', "affinity: 'random' is not one of: least-connections, prefix"),
    (G + A + 'mode = "sometimes"', "mode: 'sometimes' is not one of: always, on-demand"),
    ('[[key]]\nname = "k"', "models.toml:1: key: needs a [gateway]"),
    ('[[schedule]]\nat = "22:00"', "models.toml:1: schedule: needs a [gateway]"),
    (A + "standby = 1", "models.toml:1: model 1: has replicas, but there is no [gateway]"),
    (G + 'http_port = 8443\ntls_cert = "c"', "gateway.http_port: is the port with TLS, too"),
    ("[monitoring]", "models.toml:1: monitoring: needs a [gateway]"),
    ("[monitoring]\nhost = '127.0.0.1'", "models.toml:1: monitoring: needs a [gateway]"),
    (W + 'alertmanager_image = "a"', "models.toml:3: monitoring.alertmanager_image: needs somebody to tell"),
    (W + 'mail_from = "a@b"', "models.toml:3: monitoring.mail_from: needs somebody to tell"),
    (W + 'smtp = "mail:25"', "models.toml:3: monitoring.smtp: needs somebody to tell"),
    (G + "[[key]]\nstreams = 1", "models.toml:2: key 1: has no name"),
    (G + '[[key]]\nname = "k"\n[[key]]\nname = "k"', "models.toml:5: key 2: name: another key is called k, too"),
    (G + '[[key]]\nname = "a b"', "key 1: name: 'a b' cannot be the name of a key"),
    (G + '[[model]]\nname = "alpha"\n[[key]]\nname = "k"\nmodels = ["alpa"]', "models.toml:6: key 1: models: no model is called alpa; did you mean alpha?"),
    (G + '[[key]]\nname = "k"\nmodels = []', "key 1: models: expects names of models"),
    (G + '[[key]]\nname = "k"\nrate = "6/h"', "key 1: rate: '6/h' is not a rate"),
    (G + '[[key]]\nname = "k"\nexpires = "90d"', "key 1: expires: '90d' is not a day"),
    (G + '[[key]]\nname = "k"\nexpires = "2030-13-01"', "expires: '2030-13-01' is not when a key ends"),
    (G + A + 'serve.aliases = ["x"]\n' + B + 'serve.aliases = ["x"]', "models.toml:5: model 2: clients would call a x, too"),
    (G + A + B + 'serve.aliases = ["a"]', "model 2: clients would call a a, too"),
    (G + A + 'serve.aliases = ["my model"]', "the gateway carries no name like 'my model'"),
    (G + '[[model]]\nname = "v1"', "v1 is no name behind a gateway"),
    (A + "serve.port = 8001\n" + B + "serve.port = 8001", "models.toml:6: model 2: serve.port: a has 8001, too"),
    (G + "port = 8001\n" + A + "serve.port = 8001", "models.toml:5: model 1: serve.port: the gateway has 8001, too"),
    (A + "serve.gpus = [0]\n" + B + "serve.gpus = [0]", "models.toml:6: model 2: serve.gpus: 0.9 of GPU 0 is asked for, besides 0.9 by a"),
    (A + "serve.gpus = [0, 0]", "models.toml:3: model 1: serve.gpus: has 0 twice"),
    (G + A + "replicas = 2\nserve.gpus = [0, 1, 2]\nserve.tensor_parallel_size = 2", "serve.gpus: its copies need 4 GPUs, these are 3"),
    (G + A + "replicas = 2\nserve.gpus = [0, 1, 2]\nserve.pipeline_parallel_size = 2", "serve.gpus: its copies need 4 GPUs, these are 3"),
    (G + A + "standby = 1\nserve.gpus = [0, 1, 2]\nserve.data_parallel_size = 2", "serve.gpus: its copies need 4 GPUs, these are 3"),
    (G + A + "replicas = 2\nstandby = 1\nserve.gpus = [0, 1]", "serve.gpus: its copies need 3 GPUs, these are 2"),
    (A + "serve = { gpus = [0], gpu_memory_utilization = 0.25 }\n" + B + "serve = { gpus = [0], gpu_memory_utilization = 0.5 }\n" + C + "serve = { gpus = [1, 0], gpu_memory_utilization = 0.3 }", "model 3: serve.gpus: 0.3 of GPU 0 is asked for, besides 0.25 by a, 0.5 by b: set"),
    (H + A + "serve.gpus = [0, 0]", "model 1: serve.gpus: has 0 twice"),
    (G + A + "port = 1", "models.toml:4: model 1: port: is not a key"),
    (G + 'http_port = 80\ntls_cert = "c"\n' + A + "serve.port = 80", "serve.port: the gateway has 80, too"),
    (G + '[[key]]\nname = "k"\nmodels = ["*"]\n[[key]]\nmodels = ["a"]', "key 2: has no name"),
    (G + '[[model]]\nname = "V1"', "v1 is no name behind a gateway"),
    (G + A + 'serve.aliases = ["\\u0007"]', "the gateway carries no name like"),
    (G + D + '[[schedule]]\nat = "1"\nmodel = "d"\ninstead_of = "dd"', "models.toml:8: schedule 1: instead_of: no model is called dd"),
    (G + D + '[[schedule]]\nmodel = "d"\ninstead_of = "d"', "schedule 1: has no at"),
    (G + D + '[[schedule]]\nat = "1"\ninstead_of = "d"', "schedule 1: has no model"),
    (G + D + A + '[[schedule]]\nat = "1"\nmodel = "d"\ninstead_of = "a"', 'schedule 1: instead_of: a is not one of mode'),
    (G + '[[schedule]]\nat = "22:00"\nmodel = "a"', "models.toml:2: schedule 1: has no instead_of"),
    (G + A + '[[schedule]]\nat = "22:00"\nmodel = "a"\ninstead_of = "b"', "schedule 1: instead_of: no model is called b"),
    (G + A + '[[schedule]]\nat = "1"\nmodel = "a"\ninstead_of = "a"', 'schedule 1: model: a is not one of mode = "on-demand"'),
]  # fmt: skip


@pytest.mark.parametrize("text, said", MISTAKES, ids=[said for _, said in MISTAKES])
def test_mistakes_are_named_with_file_line_and_key(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert said in caught.value.text()


RIGHT = [
    A + "serve = { gpus = [0], gpu_memory_utilization = 0.5 }\n" + B + "serve = { gpus = [0], gpu_memory_utilization = 0.5 }",
    G + A + 'mode = "on-demand"\nserve.gpus = [0]\n' + B + 'mode = "on-demand"\nserve.gpus = [0]',
    G + A + "standby = 1\nserve.gpus = [0, 1]",
    G + A + 'serve.aliases = ["a"]',
    A + "replicas = 1",
    W + 'alertmanager_image = "a"\nwebhook = "http://x"',
    W + 'mail_to = "a@b"\nmail_from = "a@b"\nsmtp = "mail:25"',
    G + 'http_port = 8443\nport = 443\ntls_cert = "c"\ntls_key = "k"',
    A + 'serve.aliases = ["x"]\n' + B + 'serve.aliases = ["x"]',
    H + G + A + "serve.port = 8080\n" + B + "serve.port = 8080",
    H + A + "serve.gpus = [0]\n" + B + "serve.gpus = [0]",
    A + 'serve.gpus = ["all"]\n' + B + 'serve.gpus = ["all"]',
    A + "serve.gpus = [0]\nserve.tensor_parallel_size = 2",
    G + A + "serve.port = 8001\n" + B + "serve.port = 8002",
    G + A + '[[key]]\nname = "k"\nmodels = ["*", "a"]',
    G + '[[model]]\nrepo = "org/m"\n[[key]]\nname = "k"\nmodels = ["org/m", "m"]',
    G + D + '[[schedule]]\nat = "1"\nmodel = "d"\ninstead_of = "d"',
]  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_what_goes_together(text: str, tmp_path: Path) -> None:
    read(tmp_path, text)


@pytest.mark.parametrize("text", ["", "9", "0d", "-1d", "90", "2030-02-30", "tomorrow", "1e9d"])
def test_when_no_key_ends(text: str) -> None:
    with pytest.raises(UsageError):
        expiry(text, 0)


GATEWAY = "[gateway]\nimage = 'h:1'\n"
# [gateway] and [monitoring] -> the images that travel, and the keys that name none
IMAGES: List[Tuple[str, Tuple[str, ...], Tuple[str, ...]]] = [
    ("", (), ()),
    ("[gateway]\nimage = 'haproxy:3.2'", ("haproxy:3.2",), ()),
    ("[gateway]", (), ("[gateway] image",)),
    (GATEWAY + "[monitoring]\nprometheus_image = 'p:1'", ("h:1", "p:1"), ()),
    (
        GATEWAY + "[monitoring]\ngrafana_image = 'g:1'",
        ("h:1", "g:1"),
        ("[monitoring] prometheus_image",),
    ),
    (
        GATEWAY + "[monitoring]\nprometheus_image = 'p:1'\ngrafana_image = 'g:1'\n"
        "alertmanager_image = 'a:1'\nwebhook = 'http://x'\n"
        "node_exporter_image = 'n:1'\ndcgm_image = 'd:1'",
        ("h:1", "p:1", "g:1", "a:1", "n:1", "d:1"),
        (),
    ),
    (
        GATEWAY + "[monitoring]\nprometheus_image = 'p:1'\nalertmanager_image = 'a:1'\n"
        "mail_to = 'ops@site'\nmail_from = 'h@site'\nsmtp = 'mail:25'\n"
        "host = '127.0.0.1'\nprometheus_port = 1\ngrafana_port = 2\nretention = '9d'",
        ("h:1", "p:1", "a:1"),
        (),
    ),
    (GATEWAY + "[monitoring]\nprometheus_image = 'h:1'", ("h:1",), ()),
    ("[gateway]\n[monitoring]", (), ("[gateway] image", "[monitoring] prometheus_image")),
]


@pytest.mark.parametrize(("text", "images", "lacks"), IMAGES)
def test_the_images_that_a_site_is_made_of(
    text: str, images: Tuple[str, ...], lacks: Tuple[str, ...], tmp_path: Path
) -> None:
    file = read(tmp_path, "[[model]]\nname = 'm'\n" + text)
    assert (site_images(file), site_lacks(file)) == (images, lacks)
