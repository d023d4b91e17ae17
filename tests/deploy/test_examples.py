"""The container examples agree with the command line, with vLLM's needs and with one another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from guard.cli_serve import _GRACE_S as GRACE_S
from guard.cli_serve import serve
from guard.settings import Settings, load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
VLLM_ENDS_S = 15
"""For vLLM to end by itself once it was told."""
VALUES = {"SERVED_NAME": "llama-70b", "MODEL_DIR": "/models/llama-70b"}


def documents(name: str) -> list[dict[str, Any]]:
    text = re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", _value, (DEPLOY / name).read_text())
    return list(yaml.safe_load_all(text))


def _value(match: re.Match[str]) -> str:
    return VALUES.get(match[1], match[2] or "")


def kind(name: str, wanted: str) -> dict[str, Any]:
    (found,) = [document for document in documents(name) if document["kind"] == wanted]
    return found


def containers(name: str, workload: str) -> dict[str, dict[str, Any]]:
    spec = kind(name, workload)["spec"]["template"]["spec"]
    return {container["name"]: container for container in spec["containers"]}


def pairs() -> Iterator[tuple[list[str], list[str], str]]:
    """Arguments of guard and vLLM, and vLLM's host as the guard sees it."""
    services = documents("compose/compose.yaml")[0]["services"]
    yield services["guard"]["command"], services["vllm"]["command"], "vllm"
    pod = containers("kubernetes/serve.yaml", "Deployment")
    yield pod["guard"]["args"], pod["vllm"]["args"], "127.0.0.1"


def flags(arguments: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (a.partition("=") for a in arguments)}


@pytest.mark.parametrize(("guard", "vllm", "host"), list(pairs()), ids=["compose", "kubernetes"])
def test_guard_and_vllm_fit_together(guard: list[str], vllm: list[str], host: str) -> None:
    assert guard[0] == "serve"
    taken = serve.make_context("serve", guard[1:]).params
    theirs = flags(vllm)
    assert taken["engine"] == "vllm"
    upstream = urlsplit(taken["upstream"])
    assert (upstream.hostname, str(upstream.port)) == (host, theirs["--port"])
    assert taken["served_model_name"] == theirs["--served-model-name"]
    assert taken["model"] == theirs["--model"]
    assert "--enable-prompt-embeds" in theirs
    assert "--chat-template" not in theirs


@pytest.mark.parametrize("vllm", [vllm for _, vllm, _ in pairs()], ids=["compose", "kubernetes"])
def test_vllm_takes_the_adapters_that_the_guard_gives_it(vllm: list[str]) -> None:
    theirs, settings = flags(vllm), Settings()
    assert "--enable-lora" in theirs
    assert int(theirs["--max-loras"]) >= 1
    assert int(theirs["--max-cpu-loras"]) >= settings.max_loaded_adapters
    assert int(theirs["--max-lora-rank"]) >= settings.max_lora_rank
    modules = listed(vllm, "--lora-target-modules")
    assert {"q_proj", "v_proj", "down_proj"} <= set(modules)
    assert not [name for name in modules if "embed" in name], "they break --enable-prompt-embeds"
    if "--data-parallel-size" in theirs:
        assert theirs["--api-server-count"] == "1", "each API server knows only its own adapters"


def test_guard_and_vllm_share_the_adapters_folder() -> None:
    compose = documents("compose/compose.yaml")[0]["services"]
    guard, vllm = compose["guard"], compose["vllm"]
    folder = guard["environment"]["UNLEARN_GUARD_ADAPTER_DIR"]
    assert f"adapters:{folder}" in guard["volumes"]
    (shared,) = [one for one in vllm["volumes"] if isinstance(one, dict)]
    assert (shared["source"], shared["target"], shared["read_only"]) == ("adapters", folder, True)
    assert vllm["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"

    pod = containers("kubernetes/serve.yaml", "Deployment")
    env = {name: {one["name"]: one["value"] for one in pod[name]["env"]} for name in pod}
    folder = env["guard"]["UNLEARN_GUARD_ADAPTER_DIR"]
    mounts = {
        name: {one["mountPath"]: one for one in pod[name]["volumeMounts"]}[folder] for name in pod
    }
    assert mounts["guard"]["name"] == mounts["vllm"]["name"]
    assert mounts["vllm"]["readOnly"] and not mounts["guard"].get("readOnly")
    assert env["vllm"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def listed(arguments: list[str], flag: str) -> list[str]:
    """The values that follow a flag."""
    after = arguments[arguments.index(flag) + 1 :]
    return list(takewhile(lambda word: not word.startswith("-"), after))


def test_clients_reach_only_guards() -> None:
    compose = documents("compose/compose.yaml")[0]
    assert "ports" not in compose["services"]["vllm"]
    assert compose["services"]["vllm"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True
    pod = containers("kubernetes/serve.yaml", "Deployment")
    assert flags(pod["vllm"]["args"])["--host"] == "127.0.0.1"
    service = kind("kubernetes/serve.yaml", "Service")["spec"]
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
    assert [port["name"] for port in pod["guard"]["ports"]] == ["http"]
    assert "ports" not in pod["vllm"]


def served_with(arguments: list[str], environment: dict[str, str]) -> Settings:
    """The settings that the guard of an example runs with."""
    flags = serve.make_context("serve", arguments[1:]).params
    # A bundle and a model are not needed to know the times.
    return load_settings({name: v for name, v in flags.items() if v}, environ=environment).values


def longest_end_s(settings: Settings) -> float:
    return settings.drain_s + settings.shutdown_timeout_s + GRACE_S


def test_kubernetes_lets_the_guard_and_its_streams_end() -> None:
    spec = kind("kubernetes/serve.yaml", "Deployment")["spec"]["template"]["spec"]
    pod = containers("kubernetes/serve.yaml", "Deployment")
    guard, vllm = pod["guard"], pod["vllm"]
    environment = {one["name"]: one["value"] for one in guard["env"]}
    settings = served_with(guard["args"], environment)
    command, seconds = vllm["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert "lifecycle" not in guard, "a preStop of the guard would come before its drain_s"
    # The guard is heard out, then vLLM ends too, all of it before anything is killed.
    assert longest_end_s(settings) < int(seconds)
    assert int(seconds) + VLLM_ENDS_S <= spec["terminationGracePeriodSeconds"]


def test_kubernetes_sends_nobody_to_a_guard_that_ends_and_kills_none_that_does() -> None:
    guard = containers("kubernetes/serve.yaml", "Deployment")["guard"]
    environment = {one["name"]: one["value"] for one in guard["env"]}
    settings = served_with(guard["args"], environment)
    ready, alive = guard["readinessProbe"], guard["livenessProbe"]
    assert (ready["httpGet"]["path"], alive["httpGet"]["path"]) == ("/ready", "/health")
    for probe in (ready, alive):
        (port,) = [one for one in guard["ports"] if one["name"] == probe["httpGet"]["port"]]
        assert port["containerPort"] == settings.port
        assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    assert settings.drain_s > ready["periodSeconds"] * ready["failureThreshold"]
    assert settings.shutdown_timeout_s < alive["periodSeconds"] * (alive["failureThreshold"] - 1)


def test_compose_lets_the_guard_and_its_streams_end() -> None:
    services = documents("compose/compose.yaml")[0]["services"]
    guard = services["guard"]
    settings = served_with(guard["command"], guard["environment"])
    period = re.fullmatch(r"(\d+)s", guard["stop_grace_period"])
    assert period is not None and int(period[1]) > longest_end_s(settings)
    assert "vllm" in guard["depends_on"], "else vLLM may be stopped first"
    assert f"127.0.0.1:{settings.port}/ready" in guard["healthcheck"]["test"][-1]
    for service in services.values():
        assert service["restart"] == "unless-stopped"


def test_the_image_hands_signals_to_the_guard_itself() -> None:
    lines = (DEPLOY / "guard" / "Dockerfile").read_text().splitlines()
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert entry == 'ENTRYPOINT ["unlearn-guard"]', "a shell in between would swallow SIGTERM"
    assert not [line for line in lines if line.startswith("STOPSIGNAL")]


def test_replicas_for_learning_have_names_and_a_door() -> None:
    workload = kind("kubernetes/learn.yaml", "StatefulSet")
    service = kind("kubernetes/learn.yaml", "Service")
    policy = kind("kubernetes/learn.yaml", "NetworkPolicy")
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["replicas"] >= 2
    assert workload["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == labels == workload["spec"]["selector"]["matchLabels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    vllm = containers("kubernetes/learn.yaml", "StatefulSet")["vllm"]
    assert "--enable-prompt-embeds" in vllm["args"]


def test_the_image_gets_all_that_the_package_needs() -> None:
    import tomllib

    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    ignored = (DEPLOY / "guard" / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    tops = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert tops <= sent
    assert {project["project"]["readme"], "pyproject.toml"} <= sent
    assert set(project["project"]["license-files"]) <= sent
    assert all(os.path.lexists(DEPLOY.parent / name) for name in sent)
