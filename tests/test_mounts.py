"""What a container is given beside the model, and paths of the host in what is passed on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import pytest

from hfship.base.errors import HostError, NotFoundError, UsageError
from hfship.serve.mounts import (
    Adapter,
    Mount,
    folder_mounts,
    mounts_of,
    rank_limit,
    read_adapter,
    refuse_host_paths,
    require_mount,
    rights_to_read,
    seen_as,
)
from hfship.serve.plan import vllm_arguments
from hfship.serve.vllm import flags_in
from hfship.serve.vllm_table import FLAGS, all_known, versions
from test_deploy import PLAN, compose

GIVEN = replace(
    PLAN,
    chat_template="/t/x.jinja",
    lora=("sql=/a/sql", "style=/a/style"),
    mounts=("/data/media",),
    max_lora_rank=32,
    extra_args=("--allowed-local-media-path", "/data/media/in"),
)


def adapter(folder: Path, weights: str = "adapter_model.safetensors", **config: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    if weights:
        (folder / weights).write_bytes(b"x")
    return f"mine={folder}"


def test_all_is_given_read_only_and_named_as_the_container_sees_it() -> None:
    volumes = compose(GIVEN)["services"]["vllm"]["volumes"][2:]
    assert [(volume["source"], volume["target"]) for volume in volumes] == [
        ("/t/x.jinja", "/hfship/chat_template.jinja"),
        ("/a/sql", "/adapters/sql"),
        ("/a/style", "/adapters/style"),
        ("/data/media", "/mnt/media"),
    ]
    assert all(volume["read_only"] and not volume["bind"]["create_host_path"] for volume in volumes)
    arguments = vllm_arguments(GIVEN)
    assert " ".join(arguments).endswith(
        "--chat-template /hfship/chat_template.jinja --enable-lora --max-lora-rank 32"
        " --lora-modules sql=/adapters/sql style=/adapters/style"
        " --allowed-local-media-path /mnt/media/in"
    )
    for version in versions():
        assert set(flags_in(vllm_arguments(replace(GIVEN, version=version)))) <= all_known(
            version, FLAGS
        )


def test_operators_own_flag_wins_over_the_template() -> None:
    own = vllm_arguments(replace(GIVEN, extra_args=("--chat-template", "/models/x/t.jinja")))
    assert own.count("--chat-template") == 1 and own[-1] == "/models/x/t.jinja"


@pytest.mark.parametrize(
    "config, weights, said",
    [
        ({"r": 64}, "adapter_model.bin", 64),
        ({"rank_pattern": {"q": 24}}, "adapter_model.safetensors", 24),
        ({}, "", "not whole"),
        ({"peft_type": "IA3"}, "adapter_model.bin", "of type IA3"),
        ({"use_dora": True}, "adapter_model.bin", "DoRA"),
        ({"r": 1024}, "adapter_model.bin", "rank is 1024"),
        ({"r": None}, "adapter_model.bin", "rank is None"),
    ],
)
def test_an_adapter_is_read_or_refused(
    config: Dict[str, Any], weights: str, said: Any, tmp_path: Path
) -> None:
    text = adapter(tmp_path / "a", weights, **config)
    if isinstance(said, int):
        assert read_adapter(text).rank == said
        return
    with pytest.raises((HostError, NotFoundError)) as caught:
        read_adapter(text)
    assert said in caught.value.text()


@pytest.mark.parametrize("text", ["sql", "=/a", "a b=/a", "../x=/a", "a/b=/a"])
def test_a_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no adapter"):
        read_adapter(text)


def test_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no LoRA adapter"):
        read_adapter(f"x={tmp_path}")


@pytest.mark.parametrize("folder", ["/", "/proc", "/var/run", "/dev"])
def test_a_mount_that_shows_the_host_is_refused(folder: str) -> None:
    with pytest.raises(UsageError, match="is not given to a container"):
        require_mount(folder)
    with pytest.raises(NotFoundError):
        require_mount("/no/such/folder")


@pytest.mark.parametrize(
    "arguments, option",
    [
        (["--chat-template", "{}/x.jinja"], "hfship serve m --chat-template {}/x.jinja"),
        (["--chat_template={}/x.jinja"], "hfship serve m --chat-template {}/x.jinja"),
        (["--lora-modules", "a={}/sub"], "hfship serve m --lora NAME={}/sub"),
        (["--allowed-local-media-path", "{}/sub"], "hfship serve m --mount {}/sub"),
        (["--hf-overrides", '{{"x": "{}/x.jinja"}}'], "hfship serve m --mount {}"),
        (["--download-dir", "/tmp", "--x", "/models/m/y", "--url", "http://h/p"], None),
        (["--x", "{}/gone"], None),
        (["--dtype", "half"], None),
    ],
)
def test_paths_of_the_host_after_the_dashes(arguments: Any, option: Any, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.jinja").write_text("x")
    words = [
        word.replace("{}", str(tmp_path)).replace("{{", "{").replace("}}", "}")
        for word in arguments
    ]
    if option is None:
        refuse_host_paths(words, [], "m")
        return
    with pytest.raises(UsageError) as caught:
        refuse_host_paths(words, [], "m")
    assert option.format(tmp_path) in caught.value.next_step
    refuse_host_paths(words, folder_mounts([str(tmp_path)]), "m")


@pytest.mark.parametrize(
    "text, seen",
    [
        ("/data/a", "/mnt/a"),
        ("/data/a/b.yaml", "/mnt/a/b.yaml"),
        ("--x=/data/a/b", "--x=/mnt/a/b"),
        ('{"p": "/data/a"}', '{"p": "/mnt/a"}'),
        ("/data/ab", "/data/ab"),
        ("/other/data/a", "/other/data/a"),
    ],
)
def test_paths_below_a_mount_are_rewritten(text: str, seen: str) -> None:
    assert seen_as(text, folder_mounts(["/data/a"])) == seen


def test_nothing_is_given_unasked() -> None:
    assert mounts_of(PLAN) == []


@pytest.mark.parametrize(
    "mode, owner, rights", [(0o644, 1000, ()), (0o600, 0, ()), (0o600, 1000, ("DAC_OVERRIDE",))]
)
def test_root_of_a_container_reads_files_of_others_by_a_right_alone(
    mode: int, owner: int, rights: Any, tmp_path: Path
) -> None:
    """cap_drop: ALL takes from root what it reads private files of others by."""
    if os.geteuid():
        pytest.skip("gives files away")
    tmp_path.chmod(0o755)
    (tmp_path / "a").mkdir(mode=0o755)
    file = tmp_path / "a" / "x"
    file.write_text("x")
    file.chmod(mode)
    os.chown(file, owner, owner)
    assert rights_to_read([str(tmp_path)]) == rights


@pytest.mark.parametrize("ranks, limit", [([], 0), ([8], 8), ([8, 24, 16], 32), ([64, 8], 64)])
def test_the_rank_that_holds_all_adapters(ranks: Any, limit: int) -> None:
    adapters = [Adapter("a", Path("/a"), rank) for rank in ranks]
    assert rank_limit(adapters) == limit


def test_a_folder_of_any_name_has_a_plain_one_in_the_container() -> None:
    (mount,) = folder_mounts(["/data/my media (ü)"])
    assert mount.container == "/mnt/my_media____"


@pytest.mark.parametrize("place", ["", "/in/it"])
def test_what_the_container_has_under_that_name_is_not_the_hosts(
    place: str, tmp_path: Path
) -> None:
    """The same path may be there on both sides; with two mounts, below the second alone."""
    inside = tmp_path / "seen"
    (inside / "in").mkdir(parents=True)
    (inside / "in/it").write_text("x")
    (tmp_path / "seen-not").mkdir()
    mounts = [Mount("/a", "/mnt/a"), Mount("/b", str(inside))]
    refuse_host_paths([f"--config={inside}{place}"], mounts, "m")
    with pytest.raises(UsageError, match="vLLM would not find"):
        refuse_host_paths([f"--config={tmp_path}/seen-not"], mounts, "m")


def test_the_root_of_all_is_no_path_of_the_host() -> None:
    refuse_host_paths(["--root-path=/", "--x=//"], [], "m")


@pytest.mark.parametrize(
    "mode, uid, needs", [(0o755, 0, False), (0o744, 1000, True), (0o700, 1000, True)]
)
def test_a_folder_is_read_by_who_may_enter_and_list_it(
    mode: int, uid: int, needs: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    os.chown(folder, uid, uid)
    folder.chmod(mode)
    assert bool(rights_to_read([str(folder)])) == needs
    file = tmp_path / "file"
    file.write_text("x")
    os.chown(file, uid, uid)
    file.chmod(0o600)
    assert bool(rights_to_read([str(file)])) == bool(uid), "also what is no folder"
