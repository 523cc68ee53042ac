from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import settings as settings_module
from runtime.settings import (
    OPTIONS,
    Manifest,
    SettingsError,
    VllmArgument,
    describe,
    help_text,
    load,
    read_api_keys,
)
from runtime.switches import Switch

ROOT = Path(__file__).parents[2]
MANIFEST = Manifest("/models/tiny", "tiny", "cpu", ("--enforce-eager", "--max-model-len", "4"))
KNOWN = (
    VllmArgument("ModelConfig", ("--max-model-len",), "Longest context."),
    VllmArgument("ModelConfig", ("--quantization", "-q"), ""),
    VllmArgument("ParallelConfig", ("--tensor-parallel-size", "-tp"), "Ranks."),
    VllmArgument("ParallelConfig", ("--compilation-config", "-cc"), ""),
    VllmArgument("Frontend", ("--api-key",), "Not ours to show."),
)


def test_flags_over_environment_over_manifest() -> None:
    assert load([], {}, MANIFEST).served_model_name == "tiny"
    environ = {"COLDSTART_SERVED_MODEL_NAME": "env", "COLDSTART_PORT": "9000"}
    assert load([], environ, MANIFEST).served_model_name == "env"
    settings = load(["--served-model-name", "flag"], environ, MANIFEST)
    assert (settings.served_model_name, settings.port) == ("flag", 9000)
    assert settings.sources["served_model_names"] == "flag"
    assert settings.sources["port"] == "environment"
    assert settings.sources["host"] == "default"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COLDSTART_PORT", "tcp://10.0.0.1:8000"),
        ("COLDSTART_SERVICE_HOST", "10.0.0.1"),
        ("COLDSTART_SERVICE_PORT", "8000"),
        ("COLDSTART_SERVICE_PORT_HTTP", "8000"),
        ("COLDSTART_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("COLDSTART_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("COLDSTART_QWEN3_PORT", "tcp://10.0.0.1:8000"),
        ("COLDSTART_QWEN3_SERVICE_HOST", "10.0.0.1"),
    ],
)
def test_variables_that_kubernetes_sets_for_a_service_are_ignored(name: str, value: str) -> None:
    assert load([], {name: value}, MANIFEST).port == 8000


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("COLDSTART_DRAIN_TIME_OUT", "COLDSTART_DRAIN_TIMEOUT"),
        ("COLDSTART_API_KEYS", "COLDSTART_API_KEY"),
        ("COLDSTART_HTTP_PORT", "COLDSTART_PORT"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name}: did you mean {nearest}\?"):
        load([], {name: "1"}, MANIFEST)


def test_unknown_flag_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match=r"--max-modle-len: did you mean --max-model-len\?"):
        load(["--max-modle-len", "8"], {}, MANIFEST, KNOWN)
    with pytest.raises(SettingsError, match=r"--drain-dely: did you mean --drain-delay\?"):
        load(["--drain-dely=8"], {}, MANIFEST, KNOWN)
    with pytest.raises(SettingsError, match="unknown flag --zzz"):
        load(["--zzz"], {}, MANIFEST, KNOWN)
    # An abbreviation is no name: it would get past whoever looks for the whole one.
    with pytest.raises(SettingsError, match="unknown flag --max-model"):
        load(["--max-model", "8"], {}, MANIFEST, KNOWN)
    with pytest.raises(SettingsError, match="unknown command 'serv': did you mean serve"):
        load(["serv"], {}, MANIFEST, KNOWN)


@pytest.mark.parametrize(
    "argv",
    [
        ["--max_model_len", "-1"],
        ["--max-model-len=8"],
        ["-tp", "2"],
        ["-O3"],
        ["-qawq"],
        ["-cc.mode=3"],
        ["--compilation-config.pass_config.x", "1"],
        ["--compilation-config", '{"mode": 3}'],
    ],
)
def test_every_form_that_vllm_takes_passes(argv: list[str]) -> None:
    assert load(argv, {}, MANIFEST, KNOWN).vllm_args()[-1] == argv[-1].replace("--max_model", "--max-model")


@pytest.mark.parametrize(
    ("argv", "environ", "names"),
    [
        (["--served-model-name", "a", "b"], {}, ("a", "b")),
        (["--max-model-len", "8", "--served-model-name", "a", "b", "--port", "1"], {}, ("a", "b")),
        (["--served_model_name=a"], {"COLDSTART_SERVED_MODEL_NAME": "c d"}, ("a",)),
        (["--served-model-name", "my model"], {}, ("my model",)),
        ([], {"COLDSTART_SERVED_MODEL_NAME": "c d"}, ("c", "d")),
        ([], {}, ("tiny",)),
    ],
)
def test_a_model_may_have_several_names(
    argv: list[str], environ: dict[str, str], names: tuple[str, ...]
) -> None:
    settings = load(argv, environ, MANIFEST, KNOWN)
    assert (settings.served_model_names, settings.served_model_name) == (names, names[0])
    arguments = settings.vllm_args()
    after = arguments.index("--served-model-name") + 1
    assert tuple(arguments[after : arguments.index("--enforce-eager")]) == names
    assert settings.engine_value("--max-model-len") == ("8" if "--max-model-len" in argv else "4")
    rows = {row["name"]: row["value"] for row in json.loads(describe(settings, environ, as_json=True))}
    assert rows["--served-model-name"] == " ".join(names)


# One argument of each kind that vLLM 0.32's parser has, as its list names it.
KINDS = (
    VllmArgument("", ("--seed",), ""),
    VllmArgument("", ("--quantization", "-q"), ""),
    VllmArgument("", ("--tensor-parallel-size", "-tp"), ""),
    VllmArgument("", ("--enforce-eager", "--no-enforce-eager"), ""),
    VllmArgument("", ("--enable-expert-parallel", "--no-enable-expert-parallel", "-ep"), ""),
    VllmArgument("", ("--disable-log-stats",), ""),
    VllmArgument("", ("--cudagraph-capture-sizes",), ""),
    VllmArgument("", ("--lora-modules",), ""),
    VllmArgument("", ("--hf-token",), ""),
    VllmArgument("", ("--hf-overrides",), ""),
    VllmArgument("", ("--compilation-config", "-cc"), ""),
    VllmArgument("", ("--allowed-origins",), ""),
    VllmArgument("", ("--kv-cache-memory-bytes",), ""),
)


@pytest.mark.parametrize(
    ("argv", "flags", "value"),
    [
        (["--seed", "-1"], ("--seed",), "-1"),
        (["-q", "awq"], ("--quantization", "-q"), "awq"),
        (["-tp=2"], ("-tp",), "2"),
        (["--no-enforce-eager"], ("--no-enforce-eager",), ""),
        (["-ep"], ("-ep",), ""),
        (["--disable-log-stats"], ("--disable-log-stats",), ""),
        (["--cudagraph-capture-sizes", "1", "2", "4"], ("--cudagraph-capture-sizes",), "1 2 4"),  # nargs="+"
        (["--lora-modules", "a=/a", "b=/b"], ("--lora-modules",), "a=/a b=/b"),
        (
            ["--lora-modules", '{"name": "a", "path": "/a"}'],
            ("--lora-modules",),
            '{"name": "a", "path": "/a"}',
        ),
        (["--hf-token"], ("--hf-token",), ""),  # nargs="?"
        (["--hf-token", "t"], ("--hf-token",), "t"),
        (["--hf_overrides", '{"a_b": 1}'], ("--hf-overrides",), '{"a_b": 1}'),
        (["--hf-overrides.a_b.c", "1"], ("--hf-overrides",), "1"),
        (["-cc.cudagraph_capture_sizes+=1,2"], ("-cc",), "1,2"),
        (["-cc.cudagraph_capture_sizes+", "1"], ("-cc",), "1"),
        (["-O3"], ("-O3",), ""),
        (["-O.mode=3"], ("-O",), "3"),
        (["--allowed-origins", '["https://a"]'], ("--allowed-origins",), '["https://a"]'),
        (["--kv-cache-memory-bytes", "1.5g"], ("--kv-cache-memory-bytes",), "1.5g"),
    ],
)
def test_a_value_of_every_kind_passes(argv: list[str], flags: tuple[str, ...], value: str) -> None:
    manifest = replace(MANIFEST, engine_args=())
    for given in (
        argv,
        ["--port", "1", *argv],
        [*argv, "--port", "1"],
        [*argv, "--served-model-name", "a", "b"],
    ):
        settings = load(given, {}, manifest, KINDS)
        assert settings.engine_value(*flags) == value
        assert settings.engine_args == tuple(settings_module._dashed(word) for word in argv)


def test_without_a_list_unknown_flags_go_to_vllm_after_the_baked_ones() -> None:
    settings = load(["--anything", "8", "--drain-delay", "0"], {}, MANIFEST)
    assert settings.vllm_args() == [
        *("--model", "/models/tiny", "--served-model-name", "tiny"),
        *("--enforce-eager", "--max-model-len", "4", "--anything", "8"),
    ]
    assert settings.drain_delay == 0.0


def test_our_flags_with_underscores_are_ours_too() -> None:
    settings = load(["--served_model_name", "a_b", "--drain_delay=1"], {}, MANIFEST)
    assert (settings.served_model_name, settings.drain_delay) == ("a_b", 1.0)
    assert settings.engine_args == ()


def test_engine_value_is_the_last_given_by_any_name() -> None:
    settings = load(["-tp", "2", "--tensor-parallel-size=4"], {}, MANIFEST)
    assert settings.engine_value("--tensor-parallel-size", "-tp") == "4"
    assert settings.engine_value("--max-model-len") == "4"
    assert settings.engine_value("--enforce-eager") == ""
    assert settings.engine_value("--other") is None


@pytest.mark.parametrize(
    "flag",
    [
        *("--model=x", "--uds=x", "--api_server_count=2", "-asc=2", "--headless"),
        *("--api-key=secret", "--api_key=secret", "--config=x", "--grpc"),
    ],
)
def test_flags_that_contradict_the_image_are_refused(flag: str) -> None:
    with pytest.raises(SettingsError, match="cannot be set here") as caught:
        load([flag], {}, MANIFEST)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--port", "70000"], {}),
        (["--port"], {}),
        (["--drain-timeout", "-1"], {}),
        (["--max-request-bytes", "1.5"], {}),
        (["--metrics-auth", "closed"], {}),
        (["--log-format", "xml"], {}),
        (["--host", ""], {}),
        ([], {"COLDSTART_PORT": "http"}),
        ([], {"COLDSTART_PORT": "inf"}),
        ([], {"COLDSTART_DRAIN_TIMEOUT": "nan"}),
        (["--drain-delay", "inf"], {}),
        ([], {"COLDSTART_DRAIN_DELAY": "soon"}),
        ([], {"VLLM_SERVER_DEV_MODE": "1"}),
        (["--log-format=json", "--log-config-file=x"], {}),
        (["--log-format=json", "--logging-config.log_level=DEBUG"], {}),
        (["--log-format=json"], {"VLLM_LOGGING_CONFIG_PATH": "x"}),
    ],
)
def test_values_out_of_range_and_contradictions(argv: list[str], environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        load(argv, environ, MANIFEST)


def test_keys_come_from_a_file_or_one_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    from_file = load(["--api-key-file", str(file)], {}, MANIFEST)
    assert read_api_keys(from_file, {}) == ("one", "two")
    open_server = load([], {}, MANIFEST)
    assert read_api_keys(open_server, {}) == ()
    assert read_api_keys(open_server, {"VLLM_API_KEY": "k"}) == ("k",)
    assert read_api_keys(open_server, {"COLDSTART_API_KEY": "k"}) == ("k",)


def test_a_key_that_is_not_one_never_opens_the_server(tmp_path: Path) -> None:
    open_server = load([], {}, MANIFEST)
    for environ in ({"VLLM_API_KEY": ""}, {"COLDSTART_API_KEY": " "}, {"COLDSTART_API_KEY": "two words"}):
        with pytest.raises(SettingsError):
            read_api_keys(open_server, environ)
    with pytest.raises(SettingsError, match="both set"):
        read_api_keys(open_server, {"VLLM_API_KEY": "a", "COLDSTART_API_KEY": "a"})
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(SettingsError, match=name):
            read_api_keys(load(["--api-key-file", str(tmp_path / name)], {}, MANIFEST), {})
    with pytest.raises(SettingsError, match="needs an API key"):
        read_api_keys(load(["--metrics-auth", "key"], {}, MANIFEST), {})


def test_print_config_says_where_each_value_came_from_and_hides_secrets() -> None:
    environ = {"COLDSTART_PORT": "9000", "VLLM_API_KEY": "k3y", "VLLM_X": "1"}
    environ["COLDSTART_PHASE_TIMEOUT"] = "weight_load=3600"
    settings = load(["--max-model-len", "8", "--hf-token", "t0ken"], environ, MANIFEST)
    text = describe(settings, environ)
    rows = {row["name"]: row for row in json.loads(describe(settings, environ, as_json=True))}
    assert rows["--phase-timeout"]["value"] == "600,weight_load=3600"
    assert (rows["--port"]["value"], rows["--port"]["from"]) == ("9000", "environment")
    assert (rows["--max-model-len"]["value"], rows["--max-model-len"]["from"]) == ("8", "flag")
    assert rows["--enforce-eager"]["from"] == "image"
    assert rows["--served-model-name"]["from"] == "image"
    assert rows["--drain-delay"]["from"] == "default"
    assert rows["VLLM_X"]["value"] == "1"
    assert rows["VLLM_API_KEY"]["value"] == "***"
    assert "k3y" not in text
    assert "t0ken" not in text
    assert all(name in text for name in rows)


def test_print_config_has_one_row_for_an_argument_and_hides_secrets_inside_values() -> None:
    manifest = replace(MANIFEST, engine_args=("--tensor-parallel-size", "2", "--enable-x"))
    known = (*KNOWN, VllmArgument("Frontend", ("--enable-x", "--no-enable-x"), ""))
    inside = [
        "--kv-transfer-config",
        '{"password": "pa ss", "max_tokens": 5}',
        "--otlp",
        "http://me:pa55@host/x",
    ]
    settings = load(["-tp", "4", "--no-enable-x", *inside], {}, manifest)
    rows = {row["name"]: row for row in json.loads(describe(settings, {}, known, as_json=True))}
    assert (rows["--tensor-parallel-size"]["value"], rows["--tensor-parallel-size"]["from"]) == ("4", "flag")
    assert "-tp" not in rows
    assert rows["--no-enable-x"]["from"] == "flag"
    assert rows["--kv-transfer-config"]["value"] == '{"password": ***, "max_tokens": 5}'
    assert rows["--otlp"]["value"] == "http://***@host/x"
    environ = {"COLDSTART_MANIFEST": "/m.json"}
    rows = {row["name"]: row for row in json.loads(describe(settings, environ, as_json=True))}
    assert rows["COLDSTART_MANIFEST"]["value"] == "/m.json"


def test_help_lists_ours_and_vllms_by_group_without_what_is_refused() -> None:
    text = help_text(KNOWN)
    assert all(option.flag in text and option.variable in text for option in OPTIONS)
    assert "vLLM, ModelConfig:" in text
    assert "--tensor-parallel-size, -tp" in text
    assert "  --api-key\n" not in text


def test_the_documented_tables_are_those_in_the_code() -> None:
    documented = (ROOT / "docs" / "operating.md").read_text()
    assert settings_module.markdown_table() in documented
    assert settings_module.markdown_switches() in documented


def test_optimisations_are_switched_off_by_name() -> None:
    assert load([], {}, MANIFEST).off == ()
    settings = load(["--off", "read-ahead, gc-pause,read-ahead"], {"COLDSTART_OFF": "template"}, MANIFEST)
    assert settings.off == ("read-ahead", "gc-pause")
    assert load([], {"COLDSTART_OFF": "template"}, MANIFEST).off == ("template",)
    rows = {row["name"]: row for row in json.loads(describe(settings, {}, as_json=True))}
    assert (rows["--off"]["value"], rows["--off"]["from"]) == ("read-ahead,gc-pause", "flag")
    text = help_text()
    assert all(f"  {switch.label}\n      {switch.help[:30]}" in text for switch in Switch)
    with pytest.raises(SettingsError, match=r"--off must name optimisations \(did you mean read-ahead\?\)"):
        load(["--off", "raed-ahead"], {}, MANIFEST)
    with pytest.raises(SettingsError, match=r"COLDSTART_OFF must name .*lists them"):
        load([], {"COLDSTART_OFF": "zzz"}, MANIFEST)


def test_a_switch_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDSTART_OFF", raising=False)
    assert all(switch.on for switch in Switch)
    monkeypatch.setenv("COLDSTART_OFF", "lazy-kv-cache,template")
    assert [switch for switch in Switch if not switch.on] == [Switch.TEMPLATE, Switch.LAZY_KV_CACHE]


def test_keys_are_not_in_the_representation() -> None:
    from dataclasses import replace

    assert "k3y" not in repr(replace(load([], {}, MANIFEST), api_keys=("k3y",)))


def test_command_stops_with_one_line_before_anything_is_imported(tmp_path: Path) -> None:
    """The process itself: exit codes, one message, JSON where asked for, no traceback."""
    manifest = tmp_path / "manifest.json"
    model = {"path": "/models/tiny", "served_name": "tiny", "files": []}
    manifest.write_text(json.dumps({"device": "cpu", "engine_args": [], "model": model}))
    arguments = [{"group": "g", "flags": ["--max-model-len"], "help": "h"}]
    (tmp_path / "vllm-arguments.json").write_text(json.dumps(arguments))

    def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runtime", *argv],
            env={"PYTHONPATH": str(ROOT), "COLDSTART_MANIFEST": str(manifest), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    wrong = run("--max-modle-len", "8")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "coldstart: exit 2: unknown flag --max-modle-len: did you mean --max-model-len?\n"
    in_json = run("--log-format=json", "--max-modle-len", "8")
    record = json.loads(in_json.stdout)  # where all JSON goes
    assert (in_json.returncode, record["level"], record["logger"]) == (2, "error", "coldstart")
    assert in_json.stderr == ""
    assert run(COLDSTART_DRIAN_DELAY="1").returncode == 2
    (tmp_path / "damaged.json").write_text("{")
    for words, argv, environ in (
        ("is missing: this image was not made by", [], {"COLDSTART_MANIFEST": str(tmp_path / "none.json")}),
        ("is damaged", [], {"COLDSTART_MANIFEST": str(tmp_path / "damaged.json")}),
        ("cannot read the API keys in /none", ["--api-key-file", "/none"], {}),
        ("are both set", [], {"COLDSTART_API_KEY": "a", "VLLM_API_KEY": "b"}),
        ("did you mean weight_load?", ["--phase-timeout", "600,weight_laod=60"], {}),
        ("seconds above 0", [], {"COLDSTART_PHASE_TIMEOUT": "soon"}),
    ):
        refused = run(*argv, **environ)
        assert (refused.returncode, refused.stdout) == (2, "")
        [line] = refused.stderr.splitlines()
        assert line.startswith("coldstart: exit 2: ")
        assert words in line
    shown = run("--print-config", "--max-model-len", "8", COLDSTART_API_KEY="k3y")
    assert shown.returncode == 0
    assert "--max-model-len" in shown.stdout
    assert "k3y" not in shown.stdout + shown.stderr
    helped = run("--help")
    assert helped.returncode == 0
    assert "vLLM, g:" in helped.stdout
    listed = run("switches")
    assert [entry["name"] for entry in json.loads(listed.stdout)] == [switch.label for switch in Switch]
    assert listed.returncode == 0
    hidden = run()
    assert hidden.returncode == 3
    [line] = hidden.stderr.splitlines()
    assert line.startswith("coldstart: exit 3: ")
    assert "mounted over it" in line
    [line] = run("--log-format=json").stdout.splitlines()
    assert json.loads(line)["message"].startswith("exit 3: ")
    unrecorded = run("warm", "--output", str(tmp_path / "out"))
    assert (unrecorded.returncode, unrecorded.stderr) == (3, hidden.stderr)


def test_baked_arguments_may_have_underscores(tmp_path: Path) -> None:
    model = {"path": "/m", "served_name": "m", "files": []}
    arguments = ["--tensor_parallel_size", "3"]
    (tmp_path / "manifest.json").write_text(
        json.dumps({"device": "cpu", "engine_args": arguments, "model": model})
    )
    manifest = Manifest.read(tmp_path / "manifest.json")
    assert load([], {}, manifest).engine_value("--tensor-parallel-size", "-tp") == "3"


def test_manifest_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not made by"):
        Manifest.read(tmp_path / "manifest.json")
    for text in ("{", "[]", json.dumps({"model": {}})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(SettingsError, match="damaged"):
            Manifest.read(tmp_path / "manifest.json")
