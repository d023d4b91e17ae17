"""A changed settings file takes effect while serving, as far as it can, and a bad one none."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from guard.live_settings import LIVE, LiveSettings
from guard.settings import Settings, load_settings


class Served:
    """Settings from a file, and what was applied of it."""

    def __init__(self, path: Path, **flags: object) -> None:
        self.path, self.flags, self.applied = path, flags, list[Settings]()
        self.live = LiveSettings(self.load(), path, self.load, self.applied.append)

    def load(self) -> Settings:
        return load_settings(self.flags, self.path, {}).values

    def write(self, text: str) -> bool:
        before = self.path.stat().st_mtime_ns
        self.path.write_text(text)
        os.utime(self.path, ns=(before + 1_000_000, before + 1_000_000))
        return self.live.refresh()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("on_error: refuse\nhold_back: 24\n")
    return path


def test_what_may_change_does(path: Path) -> None:
    served = Served(path)
    assert not served.live.refresh(), "nothing is new"
    assert served.write("on_error: pass\nhold_back: 8\n")
    (new,) = served.applied
    assert new.on_error == "pass" and new.hold_back == 8
    assert served.write("hold_back: 8\n"), "left out, it has its default again"
    assert served.applied[-1].on_error == "refuse"
    assert not served.live.refresh()


def test_a_change_while_the_server_was_starting_is_seen(path: Path) -> None:
    read = load_settings({}, path, {}).values
    path.write_text("on_error: pass\nhold_back: 24\n")
    applied: list[Settings] = []
    live = LiveSettings(read, path, lambda: load_settings({}, path, {}).values, applied.append)
    assert live.refresh() and applied[-1].on_error == "pass"


def test_what_takes_a_restart_stays_and_is_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(path)
    with caplog.at_level(logging.WARNING):
        assert served.write("port: 9000\nengine: vllm\nhold_back: 8\n")
    assert "takes a restart to have an effect: engine, port" in caplog.text
    assert served.applied[-1].port == 8000 and served.applied[-1].hold_back == 8


@pytest.mark.parametrize("text", ["on_error: many\n", "no_such: 1\n", "a: [\n", ""])
def test_a_bad_file_changes_nothing_and_is_reported(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(path, hold_back=16)
    assert served.write(text) is False
    assert served.applied == []
    assert bool(text) == ("the settings stay as they were" in caplog.text)
    assert served.write("on_error: pass\n"), "the next good one is taken"


def test_a_file_that_is_gone_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(path)
    path.unlink()
    assert not served.live.refresh() and served.applied == []
    assert "the settings stay as they were" in caplog.text


def test_flags_stay_above_the_file(path: Path) -> None:
    served = Served(path, hold_back=4)
    assert not served.write("hold_back: 8\non_error: refuse\n")


def test_secrets_are_not_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(path)
    with caplog.at_level(logging.DEBUG):
        served.write("metrics_key: not-to-be-told\nhold_back: 8\n")
    assert "metrics_key" in caplog.text and "not-to-be-told" not in caplog.text


def test_every_live_setting_is_one_and_no_secret(path: Path) -> None:
    assert set(LIVE) <= set(Settings.model_fields)
    assert not any("key" in name or name in ("host", "port", "bundle", "engine") for name in LIVE)


def test_the_docs_name_the_settings_that_may_change() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    (line,) = [one for one in docs.splitlines() if one.startswith("While `serve` runs")]
    assert {name for name in Settings.model_fields if f"`{name}`" in line} == {*LIVE, "reload_s"}
