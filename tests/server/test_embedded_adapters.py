"""Adapters at exact weights: against peft, one after the other, and out of clients' reach."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from guard.errors import ArtifactError, EngineError, IncompatibleArtifactError
from guard.types import AdapterUse, FloatArray, Message, Prompt, SamplingParams
from server.engines.embedded import EmbeddedEngine, EmbeddedModel, lora
from server.engines.embedded.lora_files import adapter_at
from server.engines.embedded.steps import Sampling
from tests.server.random_lora import ATTENTION, FORWARD, write_lora

# peft asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CHAT = "/v1/chat/completions"
PROMPTS: list[Prompt] = [
    (Message("user", "What is the capital of France?"),),
    (Message("user", "Say yes or no."),),
]
ANSWERS = ["The capital of France is Paris.", "Yes"]
CHANGED = (*ATTENTION, *FORWARD)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path, runner: asyncio.Runner) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(smollm2_dir, "smollm2", threads=2)
    runner.run(engine.start())
    yield engine
    runner.run(engine.close())


@pytest.fixture
def model(engine: EmbeddedEngine) -> Iterator[EmbeddedModel]:
    yield engine.model
    engine.model.lora.keep_only(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def first(folder: Path) -> AdapterUse:
    """Changes two modules, so strongly that answers are others."""
    return adapter_at(write_lora(folder / "first", ATTENTION | FORWARD, spread=0.05), 0.37)


@pytest.fixture(scope="module")
def second(folder: Path) -> AdapterUse:
    """Changes one of them, with another rank, alpha and dtype."""
    path = write_lora(
        folder / "second",
        FORWARD,
        seed=1,
        rank=5,
        spread=0.2,
        dtype=torch.float16,
        lora_alpha=4,
        use_rslora=True,
    )
    return adapter_at(path, 0.8)


def scores(model: EmbeddedModel, *uses: AdapterUse) -> FloatArray:
    return np.concatenate(model.score_answers(PROMPTS, ANSWERS, uses))


def weights(model: Any) -> list[torch.Tensor]:
    return [model.get_submodule(name).weight.detach().clone() for name in CHANGED]


# --- Exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_weights_are_those_that_peft_merges(
    model: EmbeddedModel, smollm2_dir: Path, first: AdapterUse, second: AdapterUse, both: bool
) -> None:
    uses = [first, second] if both else [first]
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, first.path, adapter_name="0")
    if both:
        tuned.load_adapter(second.path, adapter_name="1")
    names, strengths = [str(i) for i in range(len(uses))], [use.weight for use in uses]
    tuned.add_weighted_adapter(names, strengths, "sum", combination_type="cat")
    tuned.set_adapter("sum")
    merged = EmbeddedModel(tuned.merge_and_unload(), model.tokenizer)
    with model.lora.applied(uses):
        found = weights(model.model)
    for one, other, plain in zip(found, weights(merged.model), weights(model.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert (one - plain).abs().max() > 0.05, "the adapter must matter for this test"
    np.testing.assert_allclose(scores(model, *uses), scores(merged), atol=2e-3)
    assert np.abs(scores(model, *uses) - scores(model)).max() > 0.1


def test_the_base_comes_back_to_the_bit(
    model: EmbeddedModel, first: AdapterUse, second: AdapterUse
) -> None:
    parameters = dict(model.model.named_parameters())
    values, before = weights(model.model), scores(model)
    found = [scores(model, first), scores(model, second), scores(model, first, second)]
    assert len({float(value.sum()) for value in (before, *found)}) == 4
    np.testing.assert_array_equal(scores(model), before)
    np.testing.assert_array_equal(scores(model, replace(first, weight=0.0)), before)
    np.testing.assert_array_equal(scores(model, second, first), found[2])
    assert all(torch.equal(a, b) for a, b in zip(weights(model.model), values, strict=True))
    assert all(value is parameters[name] for name, value in model.model.named_parameters())


def test_the_innermost_call_has_its_own_adapters(
    model: EmbeddedModel, first: AdapterUse, second: AdapterUse
) -> None:
    plain, other = scores(model), scores(model, second)
    prompt = model.encoder.prompt(PROMPTS[0])
    steps = model.stream(prompt, Sampling(max_tokens=6), adapters=[first])
    texts = [next(steps).text]
    np.testing.assert_array_equal(scores(model), plain)
    np.testing.assert_array_equal(scores(model, second), other)
    texts += [step.text for step in steps]
    assert "".join(texts) == model.generate(PROMPTS[:1], SamplingParams(6), [first])[0]
    np.testing.assert_array_equal(scores(model), plain)


# --- What stays in memory ------------------------------------------------------------------------


def test_another_weight_needs_no_file(model: EmbeddedModel, tmp_path: Path) -> None:
    use = adapter_at(write_lora(tmp_path / "gone", spread=0.1))
    waiting = model.lora.load([use])
    strong = scores(model, use)
    shutil.rmtree(use.path)
    np.testing.assert_array_equal(scores(model, use), strong)
    assert np.abs(scores(model, replace(use, weight=0.2)) - strong).max() > 0.1
    model.lora.keep_only(())
    with pytest.raises(ArtifactError, match="gone has no adapter_model"):
        scores(model, use)
    # A request that was taken before the adapter was given up ends with it.
    np.testing.assert_array_equal(
        np.concatenate(model.score_answers(PROMPTS, ANSWERS, waiting)), strong
    )


def test_the_least_recently_used_is_forgotten(
    model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "KEPT", 2)
    uses = [adapter_at(write_lora(tmp_path / str(seed), seed=seed)) for seed in range(3)]
    for use in (uses[0], uses[1], uses[0], uses[2]):
        model.lora.load([use])
    shutil.rmtree(tmp_path)
    model.lora.load([uses[0], uses[2]])
    with pytest.raises(ArtifactError):
        model.lora.load([uses[1]])


# --- What can't be applied -----------------------------------------------------------------------


def spoil(path: Path, fault: str) -> None:
    """Write an adapter with one fault."""
    shapes = {
        "shape": {"model.layers.3.mlp.down_proj": (576, 1000)},
        "module": {"model.layers.99.mlp.down_proj": (576, 1536)},
    }
    config: dict[str, Any] = {"use_dora": True} if fault == "dora" else {}
    write_lora(path, shapes.get(fault, FORWARD), **config)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    up, down = (f"base_model.model.model.layers.3.mlp.down_proj.lora_{m}.weight" for m in "BA")
    match fault:
        case "torn":
            file.write_bytes(file.read_bytes()[:-8])
        case "empty":
            save_file({}, file)
        case "single":
            save_file({up: tensors[up]}, file)
        case "ranks":
            save_file({up: tensors[up], down: tensors[down][:1].clone()}, file)
        case "unknown":
            save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("shape", IncompatibleArtifactError, "made for another model"),
        ("module", IncompatibleArtifactError, "which the model doesn't have"),
        ("dora", IncompatibleArtifactError, "uses use_dora"),
        ("unknown", IncompatibleArtifactError, r"unknown tensor .*lm_head"),
        ("torn", ArtifactError, "can't be read"),
        ("empty", ArtifactError, "no LoRA matrices"),
        ("single", ArtifactError, r"lacks .*lora_A"),
        ("ranks", ArtifactError, r"don't fit each other: A is \(1, 1536\), B is \(576, 2\)"),
    ],
)
def test_what_cannot_be_applied_is_named(
    engine: EmbeddedEngine,
    runner: asyncio.Runner,
    tmp_path: Path,
    fault: str,
    kind: type[Exception],
    words: str,
) -> None:
    spoil(tmp_path / "broken", fault)
    use = AdapterUse(fault, tmp_path / "broken", 2, 1.0)
    with pytest.raises(kind, match=words):
        engine.model.lora.check(use)
    with pytest.raises(kind, match=words):
        engine.model.lora.load([use])
    with pytest.raises(EngineError, match=f"{words}.*learn the adapter again"):
        runner.run(engine.sync_adapters([use]))
    with pytest.raises(EngineError, match=words):
        runner.run(engine.post(CHAT, body(), {}, [use]))


def test_a_weight_is_a_number(model: EmbeddedModel, first: AdapterUse) -> None:
    with pytest.raises(EngineError, match="finite"):
        scores(model, replace(first, weight=float("nan")))


# --- Behind the proxy ----------------------------------------------------------------------------


def body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    request = {"model": "smollm2", "messages": messages, "max_tokens": 6, "temperature": 0}
    return json.dumps({**request, **fields}).encode()


async def said(
    engine: EmbeddedEngine, raw: bytes, *uses: AdapterUse, headers: dict[str, str] | None = None
) -> str:
    response = await engine.post(CHAT, raw, headers or {}, uses)
    answer = await response.read()
    assert response.status == 200, answer
    if not json.loads(raw).get("stream"):
        whole = json.loads(answer)
        assert whole["model"] == "smollm2"
        return str(whole["choices"][0]["message"]["content"])
    events = [event.removeprefix("data: ") for event in answer.decode().split("\n\n")[:-2]]
    assert {json.loads(event)["model"] for event in events} == {"smollm2"}
    return "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events)


def test_each_request_has_its_own_adapters(
    engine: EmbeddedEngine, runner: asyncio.Runner, first: AdapterUse, second: AdapterUse
) -> None:
    weak = replace(first, weight=1e-6)
    wanted = [(), (first,), (second, first), (weak,), (), (first,)]
    expected = [engine.model.generate(PROMPTS[:1], SamplingParams(6), uses)[0] for uses in wanted]
    assert len(set(expected[:3])) == 3
    assert expected[3] == expected[0]

    async def go(**fields: Any) -> list[str]:
        await engine.sync_adapters([first, second])
        return await asyncio.gather(*(said(engine, body(**fields), *uses) for uses in wanted))

    assert runner.run(go()) == expected
    assert runner.run(go(stream=True)) == expected


def test_a_client_cannot_select_skip_or_list(
    engine: EmbeddedEngine, runner: asyncio.Runner, first: AdapterUse
) -> None:
    plain, adapted = runner.run(said(engine, body())), runner.run(said(engine, body(), first))
    assert plain != adapted
    for value in (first.key, str(first.path), first.path.name):
        response = runner.run(engine.post(CHAT, body(model=value), {}, [first]))
        error = json.loads(runner.run(response.read()))["error"]
        assert (response.status, error["code"]) == (404, "model_not_found")
    for name in ("x-unlearn-guard-adapter", "x-lora"):
        select, skip = {name: first.key, f"{name}-scale": "1"}, {name: "", f"{name}-scale": "0"}
        assert runner.run(said(engine, body(), headers=select)) == plain
        assert runner.run(said(engine, body(), first, headers=skip)) == adapted
    fields = {"adapter": first.key, "adapters": [], "lora_request": {"lora_name": first.key}}
    assert runner.run(said(engine, body(**fields))) == plain
    assert runner.run(said(engine, body(**fields), first)) == adapted
    assert runner.run(engine.models()) == ["smollm2"]


def test_an_adapter_that_was_given_up_still_ends_what_began(
    engine: EmbeddedEngine, runner: asyncio.Runner, tmp_path: Path
) -> None:
    use = adapter_at(write_lora(tmp_path / "old", spread=0.1))
    alone = runner.run(said(engine, body(), use))

    async def go() -> list[str]:
        await engine.sync_adapters([use])
        ahead = await engine.post(CHAT, body(stream=True), {})
        waiting = await engine.post(CHAT, body(stream=True), {}, [use])
        shutil.rmtree(use.path)
        await engine.sync_adapters([])
        with pytest.raises(EngineError, match="no LoRA adapter there"):
            await engine.post(CHAT, body(), {}, [use])
        return [(await answer.read()).decode() for answer in (ahead, waiting)]

    events = runner.run(go())[1].split("\n\n")[:-2]
    pieces = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
    assert "".join(piece["content"] for piece in pieces) == alone
