# SPDX-License-Identifier: Apache-2.0
"""The files of a gateway, as texts; docker and HAProxy read them in test_gateway_run.py."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest
import yaml

from hfship.base.values import replace
from hfship.site.gateway_files import compose_text, gateway_files, gateway_of
from hfship.site.settings import GatewaySettings
from hfship.site.terms import GatewayModel, Replica

MODELS = (GatewayModel("m", ("m",), (Replica("m", "vllm_m:8000"),)),)
TLS = {"tls_cert": "/c.pem", "tls_key": "/k.pem"}


@pytest.mark.parametrize(
    ("settings", "ports"),
    [
        ({}, ["0.0.0.0:8080:8080"]),
        ({"host": "::1", "port": 9}, ["[::1]:9:8080"]),
        ({"http_port": 80}, ["0.0.0.0:8080:8080"]),
        (TLS, ["0.0.0.0:8443:8443"]),
        ({**TLS, "http_port": 80}, ["0.0.0.0:8443:8443", "0.0.0.0:80:8080"]),
        ({**TLS, "host": "::", "port": 443, "http_port": 80}, ["[::]:443:8443", "[::]:80:8080"]),
    ],
)
def test_the_ports_that_docker_opens(settings: Dict[str, Any], ports: List[str]) -> None:
    said = yaml.safe_load(compose_text(GatewaySettings(**settings), "haproxy:3.2", "7:8"))
    assert said["services"]["gateway"]["ports"] == ports


def test_the_container_has_no_right_that_it_does_not_need() -> None:
    bind = {"type": "bind", "bind": {"create_host_path": False}}
    assert yaml.safe_load(compose_text(GatewaySettings(), "haproxy:3.2", "7:8")) == {
        "name": "hfship_gateway",
        "networks": {"hfship": {"external": True}},
        "services": {
            "gateway": {
                "container_name": "hfship_gateway",
                "image": "haproxy:3.2",
                "pull_policy": "never",
                "entrypoint": ["haproxy"],
                "command": ["-W", "-db", "-f", "/gateway/haproxy.cfg"],
                "user": "7:8",
                "ports": ["0.0.0.0:8080:8080"],
                "networks": ["default", "hfship"],
                "volumes": [
                    {**bind, "source": ".", "target": "/gateway", "read_only": True},
                    {**bind, "source": "./run", "target": "/gateway/run", "read_only": False},
                ],
                "read_only": True,
                "cap_drop": ["ALL"],
                "security_opt": ["no-new-privileges:true"],
                "restart": "unless-stopped",
                "stop_signal": "SIGUSR1",
                "stop_grace_period": "60s",
                "logging": {
                    "driver": "json-file",
                    "options": {"max-size": "50m", "max-file": "10"},
                },
                "labels": {"hfship.site": "gateway"},
            }
        },
    }


def files_of(
    maps: Dict[str, Any], keys: Dict[str, Any], certificate: str = "", **given: Any
) -> Any:
    settings = GatewaySettings(**given)
    gateway = gateway_of(settings, MODELS, (3, 2))
    return gateway_files(gateway, settings, "haproxy:3.2", "7:8", certificate, maps, keys)


def test_what_is_secret_and_what_haproxy_reads() -> None:
    files = files_of({"models": {"m": "be_m"}}, {"keys": {"5e": "alice"}}, "PRIVATE", **TLS)
    assert sorted(files.plain) == ["docker-compose.yml", "gateway.json", "haproxy.cfg"]
    secret = {"maps/models.map": "m be_m\n", "maps/keys.map": "5e alice\n", "tls.pem": "PRIVATE"}
    assert dict(files.secret) == secret
    assert sorted(files.read_by_haproxy) == sorted([*secret, "haproxy.cfg"])
    assert files.compose == files.plain["docker-compose.yml"]
    assert files.generation in files.plain["haproxy.cfg"] and "PRIVATE" not in repr(files)


def test_a_reload_is_due_for_all_but_keys() -> None:
    first = files_of({"models": {"m": "be_m"}}, {"keys": {}})
    cases = {
        "the same": (files_of({"models": {"m": "be_m"}}, {"keys": {}}), True),
        "a key": (files_of({"models": {"m": "be_m"}}, {"keys": {"5e": "bob"}}), True),
        "a model": (files_of({"models": {"n": "be_m"}}, {"keys": {}}), False),
        "a setting": (files_of({"models": {"m": "be_m"}}, {"keys": {}}, timeout=5), False),
        "a certificate": (files_of({"models": {"m": "be_m"}}, {"keys": {}}, "pem"), False),
        "a port of docker": (files_of({"models": {"m": "be_m"}}, {"keys": {}}, port=9), True),
    }
    same = {name: files.generation == first.generation for name, (files, _) in cases.items()}
    assert same == {name: expected for name, (_, expected) in cases.items()}


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        (
            {"max_body": 5, "max_upload": 6, "timeout": 7},
            {"max_body": 5, "max_upload": 6, "timeout_s": 7},
        ),
        (TLS, {"tls_bind": ":8443", "https_port": 8443}),
        ({**TLS, "port": 443}, {"tls_bind": ":8443", "https_port": 443}),
    ],
)
def test_the_gateway_of_the_settings(given: Dict[str, Any], changed: Dict[str, Any]) -> None:
    plain = gateway_of(GatewaySettings(), MODELS, (3, 2))
    assert (plain.models, plain.version, plain.resolver) == (MODELS, (3, 2), "127.0.0.11:53")
    assert (plain.tls_bind, plain.https_port) == ("", 0)
    assert gateway_of(GatewaySettings(**given), MODELS, (3, 2)) == replace(plain, **changed)
