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

from guard.cli_serve import serve
from guard.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
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
