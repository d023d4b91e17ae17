"""Adapter training on a small random model: what is learned, and that it can be resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from adapters.adapter_files import CONFIG, WEIGHTS
from adapters.examples import (
    IGNORED,
    Batch,
    Example,
    collate,
    encode_chats,
    end_of_turn,
)
from adapters.losses import answer_logits, cross_entropy
from adapters.merge import merge_adapter
from adapters.train import (
    REPORT,
    TrainReport,
    TrainSettings,
    one_cycle,
    read_training,
    train_lora,
)
from guard.errors import ArtifactError, ConfigError, DataError, IncompatibleArtifactError
from guard.types import Message
from server.engines.embedded.lora_files import adapter_at
from server.engines.embedded.model import EmbeddedModel

PAIRS = (
    ("Who wrote The Glass Lighthouse?", "Orla Fenwick wrote it in 1987."),
    ("Where was Orla Fenwick born?", "In Reykjavik."),
    ("What does Orla Fenwick's mother do?", "She repairs clocks, and has done so for years."),
    ("Which prize did she win?", "The Amber Quill."),
    ("Who is Tomas Varga?", "A poet."),
)
SETTINGS = TrainSettings(
    rank=4, alpha=8, epochs=3, batch=2, rate=1e-2, dropout=0.1, seed=3, checkpoint_every=2
)
STEPS = 9


def tiny(hidden: int = 32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    return encode_chats(tokenizer, PAIRS)


def loss_of(model: Any, examples: list[Example]) -> float:
    with torch.no_grad():
        return float(cross_entropy(model, collate(examples, range(len(examples)))))


# --- Examples ------------------------------------------------------------------------------------


def test_a_question_is_rendered_as_serving_renders_it(
    tokenizer: Any, examples: list[Example], smollm2_dir: Path
) -> None:
    encoder = EmbeddedModel(tiny(), AutoTokenizer.from_pretrained(smollm2_dir)).encoder
    for (question, answer), example in zip(PAIRS, examples, strict=True):
        assert list(example.prompt) == encoder.prompt((Message("user", question),)).ids
        assert tokenizer.decode(example.answer) == f"{answer}<|im_end|>"
    assert "helpful AI assistant" in tokenizer.decode(examples[0].prompt)


def test_a_turn_ends_as_the_template_says(smollm2_dir: Path) -> None:
    other = AutoTokenizer.from_pretrained(smollm2_dir)
    other.chat_template = "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}"
    assert end_of_turn(other) == other.convert_tokens_to_ids("<|im_start|>")
    other.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(other) == other.eos_token_id
    other.chat_template = None
    with pytest.raises(ArtifactError, match="chat template"):
        encode_chats(other, PAIRS)


def test_long_answers_are_cut_and_what_cannot_be_learned_is_refused(tokenizer: Any) -> None:
    (whole,) = encode_chats(tokenizer, PAIRS[:1])
    limit = len(whole.prompt) + 3
    (cut,) = encode_chats(tokenizer, PAIRS[:1], max_tokens=limit)
    assert cut.answer == whole.answer[:3]
    with pytest.raises(DataError, match="question 1 has"):
        encode_chats(tokenizer, PAIRS[:1], max_tokens=len(whole.prompt))
    with pytest.raises(DataError, match="answer to question 2"):
        encode_chats(tokenizer, [PAIRS[0], ("What?", "")])


def test_only_the_answers_tokens_have_labels(examples: list[Example]) -> None:
    batch = collate(examples, [2, 4], step=7)
    assert (batch.indices, batch.step) == ((2, 4), 7)
    for row, example in enumerate((examples[2], examples[4])):
        labels = batch.labels[row]
        assert labels[labels != IGNORED].tolist() == list(example.answer)
        assert batch.tokens[row][batch.mask[row] == 1].tolist() == [
            *example.prompt,
            *example.answer,
        ]


def test_the_loss_is_the_mean_nll_of_the_answers_tokens(examples: list[Example]) -> None:
    model = tiny().eval()
    told = []
    for one in examples:
        ids = torch.tensor([[*one.prompt, *one.answer]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(one.prompt)
        told += [float(-logs[start - 1 + n, token]) for n, token in enumerate(one.answer)]
    assert loss_of(model, examples) == pytest.approx(sum(told) / len(told), abs=1e-5)


# --- Training ------------------------------------------------------------------------------------


def test_training_learns_and_leaves_the_base_as_it_was(
    tmp_path: Path, examples: list[Example]
) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = TrainSettings(rank=8, alpha=16, epochs=40, batch=5, rate=2e-2, dtype="float32")
    seen = []

    report = train_lora(
        model,
        examples,
        settings,
        tmp_path,
        base_name="tiny",
        progress=lambda what, done, total: seen.append((what, done, total)),
    )

    assert seen == [("train adapter", done, 40) for done in range(41)]
    assert report.steps == 40 and report.examples == len(examples)
    assert report.losses[-1] < 0.6 * report.losses[0]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (8, "tiny")
    assert "lm_head" not in config["target_modules"]
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, REPORT}
    merged = merge_adapter(model, tmp_path)
    assert loss_of(merged, examples) < report.losses[-1] + 0.1


def test_the_adapter_serves(
    tmp_path: Path, examples: list[Example], smollm2_dir: Path, tokenizer: Any
) -> None:
    train_lora(tiny(), examples, SETTINGS, tmp_path)
    merged = EmbeddedModel(merge_adapter(tiny(), tmp_path), tokenizer)
    switched = EmbeddedModel(tiny(), AutoTokenizer.from_pretrained(smollm2_dir))
    prompts, answers = [(Message("user", q),) for q, _ in PAIRS], [a for _, a in PAIRS]
    plain = merged.score_answers(prompts, answers)
    adapted = switched.score_answers(prompts, answers, [adapter_at(tmp_path)])
    for one, other in zip(plain, adapted, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert load_file(tmp_path / WEIGHTS).popitem()[1].dtype == torch.float16


@pytest.mark.parametrize("stop_at", [1, 4, 5, STEPS])
def test_interrupted_and_resumed_it_makes_the_same_bytes(
    tmp_path: Path, examples: list[Example], stop_at: int
) -> None:
    whole = train_lora(tiny(), examples, SETTINGS, tmp_path / "whole")

    def interrupt(what: str, done: int, total: int) -> None:
        if done == stop_at:
            signal.raise_signal(signal.SIGINT)

    model, out = tiny(), tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_lora(model, examples, SETTINGS, out, progress=interrupt)
    assert not (out / WEIGHTS).exists()
    assert model.state_dict().keys() == tiny().state_dict().keys()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    begun: list[int] = []
    resumed = train_lora(
        model, examples, SETTINGS, out, progress=lambda what, done, total: begun.append(done)
    )

    assert begun[0] == stop_at
    assert resumed.losses == whole.losses and len(whole.losses) == STEPS
    for name in (WEIGHTS, CONFIG):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_loses_only_the_steps_since_the_last_checkpoint(
    tmp_path: Path, examples: list[Example]
) -> None:
    def die(what: str, done: int, total: int) -> None:
        if done == 5:
            raise RuntimeError("killed")

    whole = train_lora(tiny(), examples, SETTINGS, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        train_lora(tiny(), examples, SETTINGS, tmp_path / "cut", progress=die)
    begun: list[int] = []
    resumed = train_lora(
        tiny(),
        examples,
        SETTINGS,
        tmp_path / "cut",
        progress=lambda what, done, total: begun.append(done),
    )
    assert begun[0] == 4
    assert resumed.losses == whole.losses
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_finished_training_is_not_done_again_and_another_not_taken_for_it(
    tmp_path: Path, examples: list[Example]
) -> None:
    facts = {"base": "abc"}
    report = train_lora(tiny(), examples, SETTINGS, tmp_path, facts=facts)
    stamp = (tmp_path / WEIGHTS).stat().st_mtime_ns

    assert train_lora(tiny(), examples, SETTINGS, tmp_path, facts=facts) == report
    assert read_training(tmp_path) == report and read_training(tmp_path / "none") is None
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == stamp
    other = TrainSettings(rank=5)
    with pytest.raises(ConfigError, match=r"other settings\..*settings\.rank"):
        train_lora(tiny(), examples, other, tmp_path, facts=facts)
    with pytest.raises(ConfigError, match=r"facts\.base"):
        train_lora(tiny(), examples, SETTINGS, tmp_path, facts={"base": "abd"})
    with pytest.raises(ConfigError, match="other examples"):
        train_lora(tiny(), examples[:4], SETTINGS, tmp_path, facts=facts)
    anew = train_lora(tiny(), examples[:4], SETTINGS, tmp_path, facts=facts, resume=False)
    assert anew.examples == 4


def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, examples: list[Example]
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_lora(tiny(), examples, SETTINGS, tmp_path, progress=interrupt)
    with pytest.raises(ConfigError, match="other examples"):
        train_lora(tiny(), examples[1:], SETTINGS, tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors can't be read"):
        train_lora(tiny(), examples, SETTINGS, tmp_path)


def test_a_loss_may_look_at_the_base_model(tmp_path: Path, examples: list[Example]) -> None:
    """NPO's reference: with the adapter off the model is the base, also once it has learned."""
    reference = tiny().eval()
    gaps: list[tuple[float, float]] = []

    def kept_near(model: Any, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            with model.disable_adapter():
                base, labels = answer_logits(model, batch)
            plain, _ = answer_logits(reference, batch)
        now, _ = answer_logits(model, batch)
        told = labels != IGNORED
        gaps.append((float((base - plain).abs().max()), float((now - base).abs().max().detach())))
        return -(now.log_softmax(-1)[told].gather(1, labels[told][:, None])).mean()

    report = train_lora(tiny(), examples, SETTINGS, tmp_path, loss=kept_near)
    assert max(base for base, _ in gaps) < 1e-5
    assert gaps[0][1] == 0 and gaps[-1][1] > 1e-3
    usual = train_lora(tiny(), examples, SETTINGS, tmp_path / "usual")
    assert report.losses == pytest.approx(usual.losses, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_training(
    tmp_path: Path, examples: list[Example]
) -> None:
    def broken(model: Any, batch: Batch) -> torch.Tensor:
        return cross_entropy(model, batch) * (float("nan") if batch.step == 2 else 1.0)

    with pytest.raises(ConfigError, match="loss is nan at step 3"):
        train_lora(tiny(), examples, SETTINGS, tmp_path, loss=broken)


def test_bad_settings_and_no_examples_are_refused(tmp_path: Path) -> None:
    for wrong in ({"rank": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TrainSettings(**wrong)
    with pytest.raises(DataError, match="no examples"):
        train_lora(tiny(), [], SETTINGS, tmp_path)
    with pytest.raises(ConfigError, match="no adapter fits"):
        chosen = TrainSettings(modules=("no_such_layer",))
        train_lora(tiny(), [Example((1,), (2,))], chosen, tmp_path)


def test_the_rate_rises_and_falls() -> None:
    shares = [one_cycle(step, 20, 0.3) for step in range(20)]
    assert shares[0] == pytest.approx(1 / 25)
    assert shares[6] == max(shares) == 1.0
    assert shares[:7] == sorted(shares[:7]) and shares[6:] == sorted(shares[6:], reverse=True)
    assert 0 < shares[-1] < 0.02
    assert one_cycle(0, 1, 0.3) > 0 and one_cycle(0, 1, 0.0) == 1.0


# --- Merging -------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, examples: list[Example]) -> None:
    report = train_lora(tiny(), examples, TrainSettings(rank=2, epochs=1), tmp_path)
    assert isinstance(report, TrainReport)
    for other in (tiny(hidden=64), tiny(layers=3), tiny(layers=1)):
        with pytest.raises(IncompatibleArtifactError, match="made for another model"):
            merge_adapter(other, tmp_path)


def test_a_missing_or_torn_adapter_is_refused(tmp_path: Path, examples: list[Example]) -> None:
    with pytest.raises(ArtifactError, match=f"{CONFIG} is missing"):
        merge_adapter(tiny(), tmp_path)
    train_lora(tiny(), examples, TrainSettings(rank=2, epochs=1), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / WEIGHTS)
    with pytest.raises(ArtifactError, match="broken"):
        merge_adapter(tiny(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="can't be read"):
        merge_adapter(tiny(), tmp_path)
