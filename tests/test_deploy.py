"""Deployment files: the plan in, text out, and read back by the programs that will read it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from hfship.base.errors import DiskError, HostError, IntegrityError, UsageError
from hfship.base.report import Reporter
from hfship.serve import deployments
from hfship.serve.deployments import (
    NotOursError,
    list_deployments,
    look_at_deployment,
    read_deployment,
    read_key,
    write_deployment,
)
from hfship.serve.files import (
    compose_text,
    env_quote,
    env_text,
    key_in_env,
    parse_plan,
    plan_text,
    require_env,
    yaml_lines,
)
from hfship.serve.plan import vllm_arguments
from hfship.serve.terms import NEWEST, Plan
from support import components
from test_plan import plan

PLAN = plan("Llama-3.1-70B", "4x80GB", served_names=("Llama-3.1-70B", "meta-llama/Llama-3.1-70B"))
printable = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)


def compose(of: Plan) -> Dict[str, Any]:
    return yaml.safe_load(compose_text(of))


def uninterpolated(text: str) -> str:
    """What compose makes of a string: $$ is $."""
    assert "$" not in text.replace("$$", ""), text
    return text.replace("$$", "$")


def test_compose_file_says_what_the_plan_says() -> None:
    service = compose(PLAN)["services"]["vllm"]
    assert service["image"] == PLAN.image and service["pull_policy"] == "never"
    assert (
        service["entrypoint"] == ["vllm", "serve"]
        and service["command"][0] == "/models/Llama-3.1-70B"
    )
    assert service["container_name"] == "vllm_Llama-3.1-70B"
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["volumes"][0] == {
        "type": "bind",
        "source": "/m",
        "target": "/models/Llama-3.1-70B",
        "read_only": True,
        "bind": {"create_host_path": False},
    }
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "device_ids": list(PLAN.gpus), "capabilities": ["gpu"]}]
    assert service["security_opt"] == ["no-new-privileges:true"] and service["ipc"] == "private"
    assert "ulimits" not in service and service["cap_drop"] == ["ALL"]
    assert service["pids_limit"] == 32768 and "cap_add" not in service
    assert (
        service["restart"] == "unless-stopped" and service["healthcheck"]["start_period"] == "3600s"
    )


def test_cpu_reserves_no_gpu() -> None:
    cpu = replace(PLAN, device="cpu", gpus=())
    service = compose(cpu)["services"]["vllm"]
    assert "deploy" not in service
    assert (
        "--tensor-parallel-size" not in service["command"]
        and "--gpu-memory-utilization" not in service["command"]
    )


@pytest.mark.parametrize(
    "version, flags, absent",
    [
        (
            (0, 8, 3),
            ["--disable-log-requests"],
            ["--shutdown-timeout", "--disable-access-log-for-endpoints"],
        ),
        ((0, 10, 2), [], ["--disable-log-requests", "--shutdown-timeout"]),
        ((0, 16, 0), ["--disable-access-log-for-endpoints"], ["--shutdown-timeout"]),
        (
            (0, 33, 0),
            ["--disable-access-log-for-endpoints", "--shutdown-timeout"],
            ["--disable-log-requests"],
        ),
        (NEWEST, ["--shutdown-timeout"], ["--disable-log-requests"]),
    ],
)
def test_arguments_are_those_that_the_version_knows(
    version: tuple, flags: list, absent: list
) -> None:
    arguments = vllm_arguments(replace(PLAN, version=version))
    assert set(flags) <= set(arguments) and not set(absent) & set(arguments)


def test_operators_arguments_win() -> None:
    arguments = vllm_arguments(
        replace(PLAN, extra_args=("--max_model_len=512", "--shutdown-timeout", "5"))
    )
    assert arguments.count("--shutdown-timeout") == 1 and "--max-model-len" not in arguments
    dashes = vllm_arguments(replace(PLAN, extra_args=("--max-model-len=512",)))
    assert "--max-model-len" not in dashes and dashes[-1] == "--max-model-len=512"


def test_key_is_in_env_file_alone() -> None:
    key = "sk-secret"
    assert key not in plan_text(PLAN) + compose_text(PLAN)
    assert key_in_env(env_text(PLAN, key)) == key
    assert "key" not in " ".join(vllm_arguments(PLAN))


@pytest.mark.parametrize("key", ["a b", "a$b", "a=b", "é", "a\\b", "a#b", "a\tb"])
def test_key_that_would_not_arrive_unchanged_is_refused(key: str, tmp_path: Path) -> None:
    """Whoever edits .env hears it at once, without the key, and not as 401 from the API or as a traceback."""
    (tmp_path / ".env").write_text(f"VLLM_API_KEY='{key}'\n")
    with pytest.raises(UsageError) as caught:
        read_key(tmp_path, Reporter("none"))
    assert key not in caught.value.text() and str(tmp_path) in caught.value.what
    assert caught.value.__cause__ is None


def test_same_plan_same_bytes() -> None:
    for text in (plan_text, compose_text, lambda p: env_text(p, "k")):
        assert text(PLAN) == text(replace(PLAN))


def test_nothing_may_look_for_a_network() -> None:
    text = env_text(PLAN, "k")
    for line in (
        "HF_HUB_OFFLINE=1",
        "TRANSFORMERS_OFFLINE=1",
        "VLLM_NO_USAGE_STATS=1",
        "DO_NOT_TRACK=1",
    ):
        assert line in text.splitlines()


def test_plan_is_read_back() -> None:
    assert parse_plan(plan_text(PLAN), "x") == PLAN
    newer = json.loads(plan_text(PLAN))
    newer["field_of_a_later_version"] = 1
    assert parse_plan(json.dumps(newer), "x") == PLAN


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "hfship-plan/2"}', '{"format": "hfship-plan/1"}']
)
def test_damaged_plan_is_named(text: str) -> None:
    with pytest.raises(IntegrityError, match="x/plan.json"):
        parse_plan(text, "x/plan.json")


@pytest.mark.parametrize(
    "bind, port, url",
    [("::1", "[::1]:8000:8000", "[::1]"), ("0.0.0.0", "0.0.0.0:8000:8000", "127.0.0.1")],
)
def test_bind_address(bind: str, port: str, url: str) -> None:
    bound = replace(PLAN, bind=bind)
    assert (
        compose(bound)["services"]["vllm"]["ports"] == [port]
        and bound.url == f"http://{url}:8000/v1"
    )


values = st.recursive(
    st.booleans() | st.integers() | printable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z]{1,8}_", fullmatch=True), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(values)
def test_every_value_survives_yaml(value: Any) -> None:
    def doubled(v: Any) -> Any:
        if isinstance(v, str):
            return v.replace("$", "$$")
        if isinstance(v, list):
            return [doubled(i) for i in v]
        return {k: doubled(i) for k, i in v.items()} if isinstance(v, dict) else v

    assert yaml.safe_load("\n".join(yaml_lines(value))) == doubled(value)


@given(printable, printable)
def test_no_path_or_argument_changes_the_meaning(path: str, argument: str) -> None:
    service = compose(replace(PLAN, model_dir="/m/" + path, extra_args=(argument,)))["services"][
        "vllm"
    ]
    assert uninterpolated(service["volumes"][0]["source"]) == "/m/" + path
    assert uninterpolated(service["command"][-1]) == argument
    assert set(service) == set(compose(PLAN)["services"]["vllm"])


@given(st.text(max_size=5), st.text(max_size=5))
def test_variables_that_env_files_cannot_carry_are_refused(name: str, value: str) -> None:
    try:
        require_env(name, value)
    except UsageError:
        return
    assert name.isidentifier() and not set("\n\r\0") & set(value)


@pytest.mark.parametrize("name", ["", "A B", "1A", "A=B", "VLLM_API_KEY", "Ä", "A\n"])
def test_bad_variable_names(name: str) -> None:
    with pytest.raises(UsageError):
        require_env(name, "x")


NASTY = [
    "1",
    "",
    "a b",
    "a#b",
    "a #b",
    "$HOME",
    "${X}",
    "it's",
    'say "x"',
    "\\n",
    "it's \\ $5 `x`",
    "x=y",
    "ü 漢",
    "'",
    '"',
    "-",
]


@pytest.mark.real
def test_docker_compose_reads_it_all_back(tmp_path: Path) -> None:
    """The real compose, where it is installed: names, arguments and variables arrive as they were written."""
    docker = components.path("docker")
    if not docker:
        missing("docker compose")
    env = {f"V{i}": value for i, value in enumerate(NASTY)}
    nasty = replace(PLAN, env=env, extra_args=tuple(NASTY), model_dir="/m/a: b $c #d 'e' \"f\"")
    (tmp_path / "docker-compose.yml").write_text(compose_text(nasty))
    (tmp_path / ".env").write_text(env_text(nasty, "sk-1"))
    argv = [
        str(docker),
        "compose",
        "-f",
        str(tmp_path / "docker-compose.yml"),
        "config",
        "--format",
        "json",
    ]
    plugins = {"DOCKER_CONFIG": str(components.HOME / "docker/config"), "PATH": os.environ["PATH"]}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=plugins)
    assert done.returncode == 0, done.stderr
    service = json.loads(done.stdout)["services"]["vllm"]
    # `config` prints what can be read again: its own $ are doubled.
    assert {k: uninterpolated(v) for k, v in service["environment"].items()} == {
        **env,
        "VLLM_API_KEY": "sk-1",
    }
    assert [uninterpolated(v) for v in service["command"][-len(NASTY) :]] == NASTY
    assert uninterpolated(service["volumes"][0]["source"]) == nasty.model_dir


def test_a_deploy_folder_that_may_not_be_read_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(HostError, match="cannot read"):
        list_deployments(tmp_path, Reporter("none", -1))


# -- what somebody else put there


def in_deploy_dir(tmp_path: Path, key: str = "sk-planted") -> Path:
    """A deployment as hfship makes it."""
    folder = tmp_path / "deploy" / "m"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "plan.json").write_text(plan_text(replace(PLAN, name="m")))
    (folder / ".env").write_text(env_text(PLAN, key))
    (folder / ".env").chmod(0o600)
    return folder


def another_user(path: Path) -> None:
    if os.geteuid():
        missing("root, to give a file to another user")
    os.chown(path, 4242, 4242)


def moved_behind_a_link(path: Path) -> None:
    path.rename(path.parent / "_aside")
    path.symlink_to(path.parent / "_aside")


def named_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


PLANTED: Dict[str, Tuple[str, Callable[[Path], Any], str]] = {
    "folder of another user": ("", another_user, "belongs to user 4242"),
    "folder that all may write": ("", lambda path: path.chmod(0o777), "others may write to"),
    "folder behind a link": ("", moved_behind_a_link, "m is a symbolic link"),
    "plan of another user": ("plan.json", another_user, "belongs to user 4242"),
    "plan behind a link": ("plan.json", moved_behind_a_link, "plan.json is a symbolic link"),
    "plan that is a pipe": ("plan.json", named_pipe, "named pipe"),
    "plan of terabytes": ("plan.json", lambda path: os.truncate(path, 1 << 42), "more than"),
    "key of another user": (".env", another_user, "belongs to user 4242"),
    "key that all may write": (".env", lambda path: path.chmod(0o666), "others may write to"),
    "key behind a link": (".env", moved_behind_a_link, ".env is a symbolic link"),
    "key that is a pipe": (".env", named_pipe, "named pipe"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_what_somebody_else_put_there_is_not_read(case: str, tmp_path: Path) -> None:
    name, plant, said = PLANTED[case]
    folder = in_deploy_dir(tmp_path)
    reporter = Reporter("none", -1)
    found = read_deployment(folder, reporter)
    assert found and found.key == "sk-planted"
    plant(folder / name)
    with pytest.raises(HostError, match=said):
        read_deployment(folder, reporter)
    found_all, wrong = list_deployments(folder.parent, reporter)
    assert not found_all and isinstance(wrong["m"], NotOursError)


@pytest.mark.parametrize("case", [case for case in PLANTED if "plan" not in case])
def test_what_somebody_else_put_there_is_not_written_to(case: str, tmp_path: Path) -> None:
    name, plant, said = PLANTED[case]
    folder = in_deploy_dir(tmp_path)
    plant(folder / name)
    reporter = Reporter("none", -1)
    if case == "folder that all may write":  # ours: it is closed, and each file looked at
        assert write_deployment(folder, PLAN, reporter).key == "sk-planted"
        assert folder.stat().st_mode & 0o777 == 0o750
        return
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises((HostError, DiskError), match=said):
        write_deployment(folder, PLAN, reporter)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_variables_that_were_asked_for_are_in_env_alone(tmp_path: Path) -> None:
    reporter = Reporter("none", -1)
    env = {"HF_HUB_OFFLINE": "0", "PASSWORD": "it's $5", "VLLM_NO_USAGE_STATS": "1"}
    wishes = {"env": ["PASSWORD=it's $5", "HF_HUB_OFFLINE=0"], "port": 1}
    planned = replace(PLAN, name="m", env=env, wishes=wishes)
    folder = tmp_path / "m"
    write_deployment(folder, planned, reporter)
    text = (folder / "plan.json").read_text()
    assert "$5" not in text and json.loads(text)["env"] == {"VLLM_NO_USAGE_STATS": "1"}
    assert "$5" not in (folder / "docker-compose.yml").read_text()
    found = read_deployment(folder, reporter)
    assert found and (found.plan.wishes, found.plan.env) == (wishes, env)
    # An operator who edits .env is heard; a plan of an older hfship had the values, which now count less.
    lines = (folder / ".env").read_text()
    (folder / ".env").write_text(lines.replace(env_quote("it's $5"), "new"))
    (folder / "plan.json").write_text(text.replace('"PASSWORD"', '"PASSWORD=old"'))
    found = read_deployment(folder, reporter)
    assert found and found.plan.wishes["env"][0] == "PASSWORD=new"


def test_limits_and_rights_are_those_of_the_plan() -> None:
    service = compose(replace(PLAN, memory_limit=5 << 30, cap_add=("DAC_OVERRIDE",)))["services"][
        "vllm"
    ]
    assert service["mem_limit"] == 5 << 30 and service["cap_add"] == ["DAC_OVERRIDE"]


def test_gpus_by_cdi() -> None:
    service = compose(replace(PLAN, cdi=True))["services"]["vllm"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    names = [f"nvidia.com/gpu={uuid}" for uuid in PLAN.gpus]
    assert device == {"driver": "cdi", "device_ids": names, "capabilities": ["gpu"]}


# A folder whose files are of another user and group, and what is done to it: what is said of it when
# it is looked at. Root may look at all but what everybody may write to.
LOOKED_AT: Dict[str, Tuple[Callable[[Path], Any], str]] = {
    "theirs": (lambda _: None, ""),
    "the folder is open to all": (lambda folder: folder.chmod(0o777), "belongs to user 4242"),
    "the plan is open to all": (
        lambda folder: (folder / "plan.json").chmod(0o666),
        "belongs to user 4242",
    ),
    "it names another": (
        lambda folder: (folder / "plan.json").write_text(plan_text(replace(PLAN, name="x"))),
        "is not of this deployment",
    ),
}


@pytest.mark.parametrize("case", LOOKED_AT)
def test_of_another_users_deployment_the_plan_alone_is_looked_at(case: str, tmp_path: Path) -> None:
    change, said = LOOKED_AT[case]
    folder = in_deploy_dir(tmp_path)
    for path in (folder, *folder.iterdir()):
        another_user(path)
    change(folder)
    reporter = Reporter("none", -1)
    if said:
        with pytest.raises(NotOursError, match=said):
            look_at_deployment(folder, reporter)
        return
    found = look_at_deployment(folder, reporter)
    assert found and (found.plan.name, found.key, found.owner) == ("m", "", "user 4242")
    (folder / "plan.json").unlink()
    assert look_at_deployment(folder, reporter) is None


def test_our_own_deployment_is_looked_at_with_its_key(tmp_path: Path) -> None:
    found = look_at_deployment(in_deploy_dir(tmp_path), Reporter("none", -1))
    assert found and (found.key, found.owner) == ("sk-planted", "")


@pytest.mark.parametrize(
    "mode, group, may",
    [
        (0o750, "own", True),
        (0o750, "one of ours", True),
        (0o750, "theirs", False),
        (0o757, "own", False),
    ],
)
def test_of_other_users_those_of_our_groups_are_looked_at(
    mode: int, group: str, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 100)
    monkeypatch.setattr(os, "getgroups", lambda: [200])
    gid = {"own": 100, "one of ours": 200, "theirs": 300}[group]
    status = os.stat_result((0o040000 | mode, 1, 1, 1, 4242, gid, 0, 0, 0, 0))
    assert deployments._may_be_looked_at(status) == may


@pytest.mark.parametrize("mode, may", [(0o700, True), (0o707, False)])
def test_root_looks_at_those_of_all_but_what_everybody_may_write(
    mode: int, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "getegid", lambda: 0)
    monkeypatch.setattr(os, "getgroups", lambda: [0])
    status = os.stat_result((0o040000 | mode, 1, 1, 1, 4242, 4242, 0, 0, 0, 0))
    assert deployments._may_be_looked_at(status) == may


def test_what_cannot_be_read_is_told_and_hides_no_other(tmp_path: Path) -> None:
    folder = in_deploy_dir(tmp_path)
    for name in ("a", "z", "_site", ".hidden", "xs"):
        (folder.parent / name).mkdir(mode=0o700)
    (folder.parent / "a/plan.json").write_bytes(b"\xff")
    for name in ("_site", ".hidden", "xs"):
        (folder.parent / name / "plan.json").write_text(plan_text(replace(PLAN, name=name)))
    found, wrong = list_deployments(folder.parent, Reporter("none", -1))
    assert [one.plan.name for one in found] == ["m", "xs"]
    assert list(wrong) == ["a"] and "not text in UTF-8" in wrong["a"].what


@pytest.mark.parametrize(
    "number, why", [(13, "the folder belongs to the user who ran serve"), (5, "")]
)
def test_a_disk_that_gives_nothing_is_told(
    number: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(number, "no")

    folder = in_deploy_dir(tmp_path)
    monkeypatch.setattr(deployments, "read_whole", refuse)
    with pytest.raises(HostError, match="cannot read .*plan.json: no") as caught:
        read_deployment(folder, Reporter("none", -1))
    assert caught.value.why == why and not isinstance(caught.value, NotOursError)


def test_only_who_owns_it_reads_the_key_and_what_stays_is_not_written(tmp_path: Path) -> None:
    reporter = Reporter("none", -1)
    folder = tmp_path / "m"
    first = write_deployment(folder, PLAN, reporter)
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", first.key), "256 bits"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"plan.json": 0o644, ".env": 0o600, "docker-compose.yml": 0o644}
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert write_deployment(folder, replace(PLAN, port=8009), reporter).key == first.key
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert [name for name in before if before[name] == after[name]] == [".env"]
    assert (
        write_deployment(folder, PLAN, reporter, "sk-of-all-replicas").key == "sk-of-all-replicas"
    )
    assert read_key(folder, reporter) == "sk-of-all-replicas"


def test_files_of_a_deployment_are_closed_again(tmp_path: Path) -> None:
    folder = in_deploy_dir(tmp_path)
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_deployment(folder, Reporter("none", -1))
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_network_of_the_gateway_is_there_already_and_no_port_leads_in() -> None:
    value = compose(replace(PLAN, network="hfship-site", model_version="v2"))
    service = value["services"]["vllm"]
    assert value["networks"] == {"hfship-site": {"external": True}}
    assert service["networks"] == ["hfship-site"] and "ports" not in service
    assert service["labels"]["hfship.model-version"] == "v2"
    alone = compose(PLAN)
    assert "networks" not in alone and alone["services"]["vllm"]["ports"]
    assert "hfship.model-version" not in alone["services"]["vllm"]["labels"]


@pytest.mark.parametrize(
    "nodes, bind, address",
    [
        ((), "192.0.2.1", "127.0.0.1"),  # in a network of its own
        (("10.0.0.1", "10.0.0.2"), "192.0.2.1", "192.0.2.1"),  # in that of the host
        (("10.0.0.1", "10.0.0.2"), "0.0.0.0", "127.0.0.1"),
        (("10.0.0.1", "10.0.0.2"), "::", r"\[::1\]"),
    ],
)
def test_the_health_check_asks_where_the_api_listens(nodes: Any, bind: str, address: str) -> None:
    service = compose(replace(PLAN, nodes=nodes, bind=bind))["services"]["vllm"]
    assert re.search(rf"http://{address}:\d+/health", str(service["healthcheck"]["test"]))
