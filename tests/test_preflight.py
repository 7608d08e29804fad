"""The preflight: what docker is asked, what vLLM's answer means, and what is remembered of it."""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HostError
from hfship.base.processes import Completed
from hfship.base.pyz import own_entry
from hfship.serve import preflight
from hfship.serve.docker import IN_IMAGE, parse_info, read_image
from hfship.serve.images import image_that_says, parse_images
from hfship.serve.in_image import MARK, Refused, checked, sentence
from hfship.serve.mounts import Mount
from hfship.serve.preflight import (
    MOST_CHECKS,
    Check,
    Running,
    as_derived,
    check_key,
    docker_arguments,
    mount_text,
    read_check,
    refusal,
    remember,
    remembered,
)
from hfship.serve.terms import IMAGE_SAYS, Image, Plan
from test_deploy import PLAN
from test_serve import Site, site  # noqa: F401

YARN = (
    "User-specified max_model_len (8192) is greater than the derived max_model_len"
    " (max_position_embeddings=2048.0 or model_max_length=None in model's config.json)."
)


def lines(*rows: Dict[str, Any]) -> str:
    return "INFO 11-29 a log\n" + "".join(f"\n{MARK}{json.dumps(row)}\n" for row in rows)


READ = {
    "taken": (
        lines({"stage": "version", "version": "0.32.0"}, {"stage": "done", "max_model_len": 8, "kv_bytes": 2}),
        Check(version="0.32.0", max_model_len=8, kv_bytes=2, finished=True),
    ),
    "refused": (
        lines({"stage": "version", "version": "0.32.0"}, {"stage": "config", "refused": "no"}),
        Check(refused="no", version="0.32.0", finished=True),
    ),
    "skipped": (
        lines({"stage": "kv", "skipped": "AttributeError: x"}, {"stage": "done", "kv_bytes": None}),
        Check(skipped=("kv",), finished=True),
    ),
    "broken off": (lines({"stage": "version", "version": "0.9.0"}), Check(version="0.9.0")),
    "another program": ("0.31.0\n", Check()),
    "nonsense": (f"{MARK}[1]\n{MARK}{{\n{MARK}7\n", Check()),
    "odd numbers": (lines({"stage": "done", "max_model_len": -1, "kv_bytes": "x"}), Check(finished=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_the_image_says(case: str) -> None:
    output, expected = READ[case]
    assert read_check(output) == expected


def test_an_image_gets_its_variables_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []

    def run(argv: List[str], **options: Any) -> Completed:
        asked.append((argv, options))
        return Completed(0, lines({"stage": "version", "version": "0.32.0"}), "")

    monkeypatch.setattr(preflight, "run_program", run)
    plan = replace(PLAN, env={"A": "1", "B": "two words"})
    assert preflight.run_check(plan, beside=True) == Check(version="0.32.0")
    program = own_entry(IN_IMAGE).decode()
    argv = ["docker", *docker_arguments(plan, True, program)]
    limit_s = preflight.CHECK_TIMEOUT_S
    assert asked == [(argv, {"stdin": "A=1\nB=two words\n", "timeout_s": limit_s})]


def test_what_docker_is_asked_tells_no_secret() -> None:
    plan = replace(PLAN, env={"HF_TOKEN": "hf_secret"}, model_dir="/a,b", lora=("x=/l",))
    words = docker_arguments(plan, beside=True, program="PROGRAM")
    said = shlex.join(words)
    assert "hf_secret" not in said and "--env-file /dev/stdin" in said
    for option in ("--network none", "--pull never", "--cap-drop ALL", "--cpu-shares 64"):
        assert option in said
    assert f'"device={",".join(PLAN.gpus)}"' in words
    assert 'type=bind,"source=/a,b",target=/models/Llama-3.1-70B,readonly' in words
    assert "type=bind,source=/l,target=/adapters/x,readonly" in words
    assert words[words.index("PROGRAM") + 1 :][:2] == ["free", "/models/Llama-3.1-70B"]
    asked = docker_arguments(replace(plan, wishes={"max_model_len": 9}, gpus=()), False, "PROGRAM")
    passed_on = docker_arguments(replace(plan, extra_args=("--max_model_len=5",)), False, "PROGRAM")
    assert "fixed" in passed_on and "free" not in passed_on
    assert "fixed" in asked and "--gpus" not in asked and "--cpu-shares" not in asked


@pytest.mark.parametrize(
    "said, cause, step",
    [
        (YARN, "this vLLM derives a context of 2048 tokens", "--max-model-len 2048"),
        ("Unknown quantization method: bitsandbytes. Must be one of []", "bitsandbytes", "--image"),
        ("something new", "vLLM 0.32.0 would not serve", "--plan"),
        ("unrecognized arguments: --nope", "does not know --nope", "leave it out"),
    ],
)
def test_a_refusal_has_vllms_sentence_a_cause_and_a_step(said: str, cause: str, step: str) -> None:
    error = refusal(PLAN, Check(refused=said, version="0.32.0"))
    assert cause in error.what and said in error.why and step in error.next_step


def test_what_vllm_derives_replaces_the_estimate() -> None:
    plan = Plan(max_model_len=4096, kv_bytes=1 << 20, concurrency=9.0, version=(0, 8, 3))
    found = as_derived(plan, Check(max_model_len=2048, kv_bytes=256, version="0.9.1"))
    assert (found.max_model_len, found.concurrency, found.version) == (2048, 2.0, (0, 9, 1))
    assert "2048 tokens" in found.warnings[0]
    assert as_derived(plan, Check(max_model_len=8192)) == plan
    # A token takes more than we thought: no more of them than fit.
    found = as_derived(plan, Check(kv_bytes=500, max_model_len=4096))
    assert (found.max_model_len, found.concurrency) == (2048, 1.0)
    asked = replace(plan, wishes={"max_model_len": 4096})
    assert as_derived(asked, Check(kv_bytes=500)).max_model_len == 4096
    assert as_derived(replace(plan, data_parallel_size=3), Check(kv_bytes=256)).concurrency == 3.0


def test_checks_are_remembered_per_image_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFSHIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    plan = replace(PLAN, model_dir=str(model), image_id="sha256:ab")
    assert remembered(plan) is None
    check = Check(version="0.32.0", max_model_len=8, finished=True)
    remember(plan, check)
    assert remembered(plan) == check
    file = tmp_path / "cache" / "images" / "ab.json"
    assert file.stat().st_mode & 0o777 == 0o600
    for other in (
        replace(plan, image_id="sha256:cd"),
        replace(plan, max_num_seqs=5),
        replace(plan, env={"A": "b"}),
        replace(plan, gpu_names=("T4",)),
    ):
        assert remembered(other) is None
    assert remembered(replace(plan, port=9)) == check  # vLLM does not see it
    (model / "config.json").write_text('{"a": 1}')
    assert remembered(plan) is None
    for number in range(MOST_CHECKS + 5):
        remember(replace(plan, max_num_seqs=number + 1), check)
    assert len(json.loads(file.read_text())["checks"]) == MOST_CHECKS
    for text in ("{", "[]", '{"format": "x"}', '{"format": "hfship-image/1", "checks": {"k": 1}}'):
        file.write_text(text)
        assert remembered(plan) is None


def test_an_image_is_asked_once_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSHIP_CACHE", str(tmp_path))
    says = lines({"stage": "about", "version": "0.11.0", "cuda": "12.8", "program": "/bin/vllm"})
    answers = ["", says]  # it tells nothing while docker is busy, say
    monkeypatch.setattr("hfship.serve.docker.ask_image", lambda _: answers.pop(0))
    found = {"Id": "sha256:ab", "Config": {}}
    monkeypatch.setattr("hfship.serve.docker.inspect_image", lambda _: found)
    image = Image("harbor.local/llm/engine:prod")
    assert read_image(image).version is None
    assert [read_image(image).version for _ in range(3)] == [(0, 11, 0)] * 3
    remember(replace(PLAN, image_id="sha256:ab", model_dir=str(tmp_path)), Check())
    assert read_image(image).cuda == "12.8"


def test_a_key_depends_on_all_files_that_are_given(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("x")
    plan = replace(PLAN, model_dir=str(tmp_path / "none"), chat_template=str(template))
    before = check_key(plan)
    template.write_text("xy")
    assert check_key(plan) != before


def test_the_program_travels_with_hfship() -> None:
    text = own_entry(IN_IMAGE).decode()
    compile(text, "in_image.py", "exec")
    assert MARK == IMAGE_SAYS
    assert "import hfship" not in text and "from hfship" not in text


def test_sentences_have_no_frame_of_pydantic() -> None:
    framed = "1 validation error for ModelConfig\n  Value error, too long. [type=value_error, x]"
    assert sentence(ValueError(framed)) == "too long."
    assert sentence(KeyError("x")) == "KeyError: 'x'" and sentence(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "said, version, entrypoint",
    [
        ({"version": "0.11.0", "cuda": "12.8", "program": "/usr/bin/vllm"}, (0, 11, 0), "vllm"),
        ({"version": "0.11.0", "cuda": "12.8", "program": ""}, (0, 11, 0), "python3"),
        ({"version": "", "cuda": "", "program": "/usr/bin/vllm"}, None, "vllm"),
        (None, None, "vllm"),
    ],
)
def test_an_image_of_another_is_asked(said: Any, version: Any, entrypoint: str) -> None:
    (image,) = parse_images(
        '{"Repository": "lmcache/vllm-openai", "Tag": "v0.3.12", "ID": "sha256:1"}'
    )
    assert image.version is None
    output = lines({"stage": "about", **said}) if said else "no such program"
    found = image_that_says(image, output)
    assert found.version == version and found.entrypoint[0] == entrypoint
    assert found.cuda == ("12.8" if said and said["cuda"] else "")


def test_an_image_without_vllm_is_refused() -> None:
    nothing = lines({"stage": "about", "version": "", "cuda": "", "program": ""})
    with pytest.raises(HostError, match="there is no vLLM in x:1"):
        image_that_says(Image("x:1"), nothing)


def test_images_for_other_devices_are_left_out() -> None:
    names = ["vllm/vllm-ascend", "quay.io/ascend/vllm-ascend", "lmstack/vllm-router"]
    rows = [json.dumps({"Repository": name, "Tag": "v0.11.0", "ID": "1"}) for name in names]
    assert parse_images("\n".join(rows)) == ()


# -- as an operator meets it, on a machine that a stub plays


def checks(site: Site) -> List[List[str]]:  # noqa: F811
    return [call for call in site.calls() if call[0] == "run"]


def asked(site: Site, said: str) -> Dict[str, str]:  # noqa: F811
    """What the image says, where nothing is remembered of other tests."""
    return {"FAKE_CHECK": said, "HFSHIP_CACHE": str(site.state)}


TAKEN = json.dumps(
    [{"stage": "version", "version": "0.27.1"}, {"stage": "done", "max_model_len": 2048}]
)
REFUSED = json.dumps([{"stage": "config", "refused": YARN}])


def test_a_plan_is_checked_once(site: Site) -> None:  # noqa: F811
    site("serve", "m", env=asked(site, TAKEN))
    assert len(checks(site)) == 1
    site("stop", "m")
    site("serve", "m", env=asked(site, TAKEN))
    assert len(checks(site)) == 1
    site("serve", "m", "--max-num-seqs", "7", env=asked(site, TAKEN))
    assert len(checks(site)) == 2


def test_a_refusal_stops_the_container_that_started_beside_it(site: Site) -> None:  # noqa: F811
    done = site("serve", "m", play="exits", env=asked(site, REFUSED), code=9)
    assert "would not serve m: this vLLM derives a context of 2048 tokens" in done.stderr
    assert "serve m --max-model-len 2048" in done.stderr
    assert [call[5] for call in site.calls() if call[0] == "compose" and call[-1] == "stop"][
        :1
    ] == ["stop"]


def test_what_serves_goes_on_when_the_new_plan_is_refused(site: Site) -> None:  # noqa: F811
    site("serve", "m", env=asked(site, TAKEN))
    before = site.text("docker-compose.yml")
    ups = [call for call in site.calls() if "up" in call]
    done = site("serve", "m", "--max-num-seqs", "7", env=asked(site, REFUSED), code=9)
    assert "goes on serving while its image checks the new plan" in done.stderr
    assert site.text("docker-compose.yml") == before
    assert [call for call in site.calls() if "up" in call] == ups
    assert "healthy" in site("status", "m").stdout


def test_another_length_is_served_when_vllm_derives_it(site: Site) -> None:  # noqa: F811
    shorter = json.dumps([{"stage": "done", "max_model_len": 1024}])
    site("serve", "m", env=asked(site, TAKEN))
    site("serve", "m", "--max-num-seqs", "7", env=asked(site, shorter))
    assert '"1024"' in site.text("docker-compose.yml")


def test_an_operator_who_knows_better_starts_without(site: Site) -> None:  # noqa: F811
    site("serve", "m", "--no-preflight", env=asked(site, REFUSED))
    assert checks(site) == []


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("no"), {"refused": "no"}),
        (NotImplementedError("no"), {"refused": "no"}),
        (KeyError("x"), {"refused": "KeyError: 'x'"}),
        (RuntimeError("no engine"), {"skipped": "RuntimeError: no engine"}),
        (PermissionError("no"), {"skipped": "PermissionError: no"}),
        (AttributeError("no"), {"skipped": "AttributeError: no"}),
    ],
)
def test_what_is_a_refusal_and_what_is_not(
    error: Exception, said: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    with contextlib.suppress(Refused):
        assert checked("config", work) is None
    row = json.loads(capsys.readouterr().out.strip()[len(MARK) :])
    assert row == {"stage": "config", **said}


@pytest.mark.parametrize(
    "info, expected",
    [
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=GPU-1"}]}, {"nvidia.com/gpu=GPU-1"}),
        ({"Runtimes": {"nvidia": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=GPU-1"}]}, set()),
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": None}, set()),
        ([], set()),
        ("an engine on another machine", set()),
    ],
)  # fmt: skip
def test_cdi_is_for_engines_that_have_nothing_else(info: Any, expected: Any) -> None:
    text = info if isinstance(info, str) else json.dumps(info)
    assert parse_info(text).devices == expected


def test_a_check_has_the_devices_and_rights_of_the_plan() -> None:
    plan = replace(PLAN, cdi=True, cap_add=("DAC_OVERRIDE",))
    words = docker_arguments(plan, False, "PROGRAM")
    devices = [words[at + 1] for at, word in enumerate(words) if word == "--device"]
    assert devices == [f"nvidia.com/gpu={uuid}" for uuid in PLAN.gpus] and "--gpus" not in words
    assert words[words.index("--cap-add") + 1] == "DAC_OVERRIDE"


# -- beside a start


@pytest.mark.parametrize(
    "answer, stops",
    [
        (Check(refused="no", finished=True), 1),
        (Check(version="0.32.0", finished=True), 0),
        (HostError("docker is gone", "", ""), 0),
        (OSError(28, "No space left on device"), 0),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_check_beside_a_start_stops_what_is_refused(
    answer: Any, stops: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    asked: List[Any] = []

    def run(plan: Plan, beside: bool = False) -> Check:
        asked.append((plan.name, beside))
        assert go_on.wait(60)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    stopped: List[int] = []

    def stop() -> None:
        stopped.append(1)
        if fails:
            raise HostError("it does not stop", "", "")

    monkeypatch.setattr("hfship.serve.preflight.run_check", run)
    running = Running(replace(PLAN, name="m"), True, stop)
    assert running.so_far() is None
    go_on.set()
    expected = Check() if isinstance(answer, Exception) else answer
    assert running.result() == running.so_far() == expected
    assert len(stopped) == stops and asked == [("m", True)]


def test_a_check_that_is_forgotten_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def run(*_: Any) -> Check:
        assert go_on.wait(60)
        return Check(refused="no", finished=True)

    stopped: List[int] = []
    monkeypatch.setattr("hfship.serve.preflight.run_check", run)
    running = Running(PLAN, False, lambda: stopped.append(1))
    running.forget()
    go_on.set()
    assert running.result().refused == "no" and not stopped


def test_of_checks_the_newest_are_kept_with_all_that_they_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFSHIP_CACHE", str(tmp_path))
    clock = [1000.0]
    monkeypatch.setattr("hfship.serve.preflight.time.time", lambda: clock[0])
    plans = [
        replace(PLAN, image_id="sha256:ab", max_num_seqs=n + 1) for n in range(MOST_CHECKS + 2)
    ]
    for number, plan in enumerate(plans):
        clock[0] += 1
        remember(plan, Check("", f"0.{number}", 8, 256, finished=True))
    assert [remembered(plan) is None for plan in plans[:3]] == [True, True, False]
    last = MOST_CHECKS + 1
    assert remembered(plans[-1]) == Check("", f"0.{last}", 8, 256, finished=True)


def test_a_mount_with_quotes_is_a_line_of_csv() -> None:
    mount = mount_text(Mount('/a"b', "/models/m"))
    assert mount == 'type=bind,"source=/a""b",target=/models/m,readonly'


def test_who_knows_better_is_told_how_to_say_so() -> None:
    error = refusal(PLAN, Check(refused="something new"))
    assert f"hfship serve {PLAN.name} --no-preflight" in error.next_step
