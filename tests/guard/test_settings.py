import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.settings import MASK, Settings, load_settings


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "guard.yaml"
    file.write_text(text)
    return file


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1111\nhost: a\nseed: 1\n")
    environ = {"UNLEARN_GUARD_PORT": "2222", "UNLEARN_GUARD_HOST": "b", "PATH": "/bin"}

    loaded = load_settings({"port": 3333, "seed": None}, file, environ)

    assert (loaded.values.port, loaded.values.host, loaded.values.seed) == (3333, "b", 1)
    assert loaded.values.fpr_budget == 0.001
    assert loaded.sources["port"] == "flag"
    assert loaded.sources["host"] == "environment UNLEARN_GUARD_HOST"
    assert loaded.sources["seed"] == f"file {file}"
    assert loaded.sources["fpr_budget"] == "default"


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1111\n")

    assert load_settings(environ={"UNLEARN_GUARD_CONFIG": str(file)}).values.port == 1111


def test_values_come_as_what_they_are() -> None:
    environ = {
        "UNLEARN_GUARD_API_KEYS": "one, two",
        "UNLEARN_GUARD_SELF_CHECK": "false",
        "UNLEARN_GUARD_BUNDLE": "bundles/x",
        "UNLEARN_GUARD_UPSTREAM": "http://localhost:8001/v1/",
        "UNLEARN_GUARD_THREADS": "",
    }
    settings = load_settings(environ=environ).values

    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert settings.self_check is False
    assert settings.bundle == Path("bundles/x")
    assert settings.upstream == "http://localhost:8001"
    assert settings.threads is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"UNLEARN_GUARD_UPSTREM": "x"}, "UNLEARN_GUARD_UPSTREM; did you mean UNLEARN_GUARD_UPS"),
        ({"UNLEARN_GUARD_ZZZZZ": "x"}, "unknown environment variable UNLEARN_GUARD_ZZZZZ"),
        ({"UNLEARN_GUARD_port": "1"}, "UNLEARN_GUARD_port; did you mean UNLEARN_GUARD_PORT"),
        ({"UNLEARN_GUARD_PORT": "http"}, "port from environment UNLEARN_GUARD_PORT.*'http'"),
        ({"UNLEARN_GUARD_PORT": "70000"}, "less than or equal to 65535"),
        ({"UNLEARN_GUARD_ENGINE": "tgi"}, "'embedded' or 'vllm'"),
        ({"UNLEARN_GUARD_UPSTREAM": "localhost:8001"}, "expected a URL"),
        ({"UNLEARN_GUARD_UPSTREAM": "http://u:p@h"}, "credentials"),
        ({"UNLEARN_GUARD_UPSTREAM": "http://h/?a=b"}, "base URL"),
        ({"UNLEARN_GUARD_FPR_BUDGET": "1"}, "less than 1"),
        ({"UNLEARN_GUARD_FPR_BUDGET": "nan"}, "fpr_budget"),
    ],
)
def test_what_cannot_be_used_is_told(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(environ=environ)


@pytest.mark.parametrize("where", ["api_keys", "api_keys_file"])
def test_keys_are_asked_for_here_or_by_the_engine(where: str) -> None:
    flags = {"forward_authorization": True, where: "SECRET"}
    with pytest.raises(ConfigError, match=f"forward_authorization .* {where} ") as caught:
        load_settings(flags, environ={})
    assert "SECRET" not in str(caught.value)
    for one in flags:
        load_settings({one: flags[one]}, environ={})
    load_settings({"forward_authorization": True, "upstream_api_key": "a"}, environ={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown setting 'prot'; did you mean port"),
        ("1: 2", "unknown setting 1"),
        ("- port", "expected `name: value`"),
        ("port: [", "not valid YAML"),
        ("port: 1\nport: 2", "given twice"),
        ("port: {a: 1}", "port from file"),
        ("key: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("api_keys: 3", "api_keys from file"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(config=write(tmp_path, text), environ={})


def test_an_empty_file_is_fine_and_a_missing_one_is_not(tmp_path: Path) -> None:
    assert load_settings(config=write(tmp_path, "# nothing\n"), environ={}).values == Settings()
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(config=tmp_path / "nothing.yaml", environ={})
    (tmp_path / "latin.yaml").write_bytes(b"host: \xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_settings(config=tmp_path / "latin.yaml", environ={})


def test_secrets_are_masked_everywhere(tmp_path: Path) -> None:
    file = write(tmp_path, "key: SECRET1\napi_keys: [SECRET2]\nupstream_api_key: SECRET3\n")
    loaded = load_settings(config=file, environ={"UNLEARN_GUARD_METRICS_KEY": "SECRET4"})

    described = json.dumps(loaded.describe())

    assert "SECRET" not in described + repr(loaded.values)
    assert json.loads(described)["key"] == {"value": MASK, "source": f"file {file}"}
    assert json.loads(described)["api_keys"]["value"] == [MASK]
    assert json.loads(described)["bundle"]["value"] == "bundles/default"
    with pytest.raises(ConfigError) as caught:
        load_settings(config=write(tmp_path, "key: [SECRET5]"), environ={})
    assert "SECRET" not in str(caught.value)


def test_the_process_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("UNLEARN_GUARD_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("UNLEARN_GUARD_SEED", "7")

    assert load_settings().values.seed == 7


@given(st.dictionaries(st.text(max_size=12), st.integers() | st.text(max_size=12), max_size=3))
def test_any_flags_give_settings_or_a_config_error(flags: dict[str, object]) -> None:
    try:
        load_settings(flags, environ={})
    except ConfigError:
        return
    assert set(flags) <= set(Settings.model_fields)
