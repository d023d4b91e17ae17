"""The default loss: against hand-computed values, and its teacher on a small model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from adapters.adapter_files import WEIGHTS
from adapters.examples import Batch, Example, collate, encode_chats
from adapters.losses import InBfloat16, cross_entropy, has_bfloat16, told_logits
from adapters.matched import (
    GIVEN_LEVEL,
    MOST_CERTAIN,
    NOISE,
    OTHERS,
    Matched,
    at_strength,
    blurred_levels,
    embedding_rms,
    given_tokens,
    make_teacher,
    matched,
    tail_likelihood,
    unknown_levels,
)
from adapters.train import TrainSettings, train_lora
from adapters.unlearning import LOSSES, LossData, make_loss
from guard.errors import ConfigError, DataError

VOCABULARY = 100
OPENED, CLOSED = (1, 2, 3), (4, 5)
"""What stands around each question, as a chat template puts it."""

END = 6
EXAMPLES = (
    Example((*OPENED, 10, 11, 12, *CLOSED), (20, 21, 22, 23, END)),
    Example((*OPENED, 13, 14, *CLOSED), (24, 25, END)),
    Example((*OPENED, 15, 16, 17, 18, *CLOSED), (26, 27, 28, END)),
)
ALTERNATIVES = tuple((replace(one, answer=(30, 31, END)),) for one in EXAMPLES)


def teacher_row(level: float, label: int, shares: dict[int, float] | None = None) -> Tensor:
    """A token's row: its level, and the shares of 64 other tokens; even ones if none are given."""
    ids = [one for one in range(OTHERS + 1) if one != label][:OTHERS]
    given = shares or dict.fromkeys(ids, 1 / OTHERS)
    return torch.tensor([level, *ids, *(given.get(one, 0.0) for one in ids)])


# --- The equation --------------------------------------------------------------------------------


def test_the_loss_equals_a_hand_computed_value() -> None:
    # 65 tokens. First: the label, 7, is as likely as all others together, and is to have 0.1: the
    # log-odds are 0 and ln(1/9), further apart than 1, where the loss is |d| - 1/2. Second: the
    # log-odds are 0.6 too high, where it is d^2 / 2; token 3 (logit 2) is to have all of the rest.
    logits = torch.zeros(2, OTHERS + 1)
    logits[0, 7] = math.log(64)
    rest = math.log(63 + math.exp(2))
    logits[1, 3], logits[1, 0] = 2.0, rest + math.log(0.25 / 0.75) + 0.6
    rows = [teacher_row(math.log(0.1), 7), teacher_row(math.log(0.25), 0, {3: 1.0})]

    found = matched(logits, torch.tensor([7, 0]), torch.stack(rows), others=0.5)

    distances = (math.log(9) - 0.5) + 0.6**2 / 2
    entropies = 0.9 * math.log(64) + 0.75 * (rest - 2.0)
    assert float(found) == pytest.approx((distances + 0.5 * entropies) / 2, rel=1e-5)


def test_other_choices_are_sharpened() -> None:
    # Shares of 0.8 and 0.2 become 0.64 and 0.04 of 0.68: 16 to 1.
    logits = torch.zeros(1, OTHERS + 1)
    logits[0, 3] = 2.0
    teacher = teacher_row(math.log(0.5), 0, {3: 0.8, 4: 0.2})[None]
    label = torch.tensor([0])
    plain, sharp, alone = (
        float(matched(logits, label, teacher, weight, sharpness))
        for weight, sharpness in ((1.0, 1.0), (1.0, 2.0), (0.0, 2.0))
    )
    rest = math.log(63 + math.exp(2))
    assert plain - alone == pytest.approx(0.5 * (rest - 0.8 * 2.0), rel=1e-5)
    assert sharp - alone == pytest.approx(0.5 * (rest - 16 / 17 * 2.0), rel=1e-5)


def test_a_token_at_its_level_with_even_shares_costs_least() -> None:
    logits = torch.zeros(1, OTHERS + 1)
    logits[0, 5] = math.log(64) + math.log(0.2 / 0.8)
    teacher = teacher_row(math.log(0.2), 5)[None]
    logits.requires_grad_()
    loss = matched(logits, torch.tensor([5]), teacher, others=1.0)
    assert float(loss.detach()) == pytest.approx(0.8 * math.log(64), rel=1e-5)
    torch.autograd.backward(loss)
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("certain", [8.0, 15.0, 30.0])
def test_the_gradient_does_not_vanish_where_the_model_is_certain(certain: float) -> None:
    logits = torch.zeros(1, OTHERS + 1)
    logits[0, 5] = certain
    logits.requires_grad_()
    loss = matched(logits, torch.tensor([5]), teacher_row(-7.0, 5)[None], others=0.0)
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert float(logits.grad[0, 5]) == pytest.approx(1.0, abs=1e-3)


def test_a_level_of_one_is_asked_for_as_nearly_one() -> None:
    logits = torch.zeros(1, OTHERS + 1)
    logits[0, 5] = math.log(64) + math.log(math.exp(MOST_CERTAIN) / -math.expm1(MOST_CERTAIN))
    loss = matched(logits, torch.tensor([5]), teacher_row(0.0, 5)[None], others=0.0)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


# --- On a model ----------------------------------------------------------------------------------


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def knowing() -> Any:
    """A model that knows the answers by heart."""
    model = tiny().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = collate(EXAMPLES, range(len(EXAMPLES)))
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model, batch))
        optimizer.step()
    return model.eval()


Teacher = tuple[Tensor, ...]


@pytest.fixture(scope="module")
def teacher(knowing: Any) -> Teacher:
    return make_teacher(knowing, EXAMPLES, unknown_levels(knowing, EXAMPLES, nothing_given()))


def nothing_given() -> list[list[bool]]:
    return [[False] * len(one.answer) for one in EXAMPLES]


@pytest.fixture
def adapted() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        network = get_peft_model(tiny(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, one in network.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.5)
    yield network.eval()


def scalings(network: Any) -> set[float]:
    layers = (one for one in network.modules() if isinstance(one, LoraLayer))
    return {scale for layer in layers for scale in layer.scaling.values()}


def strengths(network: Any, loss: Any, batch: Batch) -> list[float]:
    """The strengths that a call of the loss runs the model at, and that all is well after it."""
    found: list[float] = []
    layer = next(one for one in network.modules() if isinstance(one, LoraLayer))

    def note(module: Any, given: Any, result: Any) -> None:
        (strength,) = scalings(network)
        found.append(strength / 3.0)

    handle = layer.register_forward_hook(note)
    try:
        loss(network, batch)
    finally:
        handle.remove()
    assert scalings(network) == {3.0}
    return found


def data(teacher: Teacher, seed: int = 0) -> LossData:
    return LossData(EXAMPLES, ALTERNATIVES, VOCABULARY, seed, teacher)


@torch.no_grad()
def test_each_row_meets_its_own_levels(adapted: Any, teacher: Teacher) -> None:
    options = {"counterfactual": 0.0, "least_strength": 1.0}
    loss = make_loss("matched", data(teacher), **options)
    batch = collate(EXAMPLES, [2, 0])
    parts = [loss(adapted, collate(EXAMPLES, [row])) * len(EXAMPLES[row].answer) for row in (2, 0)]
    count = sum(len(EXAMPLES[row].answer) for row in (2, 0))
    assert float(loss(adapted, batch)) == pytest.approx(float(sum(parts)) / count, rel=1e-4)
    logits, labels = told_logits(adapted, batch)
    rows = torch.cat([teacher[2], teacher[0]])
    assert float(loss(adapted, batch)) == pytest.approx(
        float(matched(logits, labels, rows, 2.0, 2.0)), rel=1e-5
    )


@torch.no_grad()
def test_counterfactual_answers_are_added(adapted: Any, teacher: Teacher) -> None:
    batch = collate(EXAMPLES, [0, 1, 2])
    without, some, all_ = (
        float(
            make_loss("matched", data(teacher), counterfactual=c, answers=n, least_strength=1.0)(
                adapted, batch
            )
        )
        for c, n in ((0.0, 3), (0.5, 1), (0.5, 3))
    )
    first = cross_entropy(adapted, collate([one for (one,) in ALTERNATIVES], [0]))
    whole = cross_entropy(adapted, collate([one for (one,) in ALTERNATIVES], [0, 1, 2]))
    assert some - without == pytest.approx(0.5 * float(first), rel=1e-4)
    assert all_ - without == pytest.approx(0.5 * float(whole), rel=1e-4)


def test_strengths_are_drawn_by_seed_and_step(adapted: Any, teacher: Teacher) -> None:
    def drawn(seed: int, step: int, least: float = 0.5) -> list[float]:
        loss = Matched(data(teacher, seed), least_strength=least)
        return strengths(adapted, loss, collate(EXAMPLES, [0, 1], step))

    first = drawn(0, 0)
    assert len(first) == 2 and len(set(first)) == 1, "one strength for the whole step"
    assert 0.5 <= first[0] <= 1.0
    assert drawn(0, 0) == first
    others = [drawn(0, step)[0] for step in range(1, 5)] + [drawn(1, 0)[0]]
    assert len({first[0], *others}) == 6
    assert drawn(0, 3, 1.0) == [1.0, 1.0]


def test_a_strength_is_a_weight_and_is_taken_back_after_an_error(adapted: Any) -> None:
    batch = collate(EXAMPLES, [0])
    before, _ = told_logits(adapted, batch)
    with at_strength(adapted, 0.5):
        assert scalings(adapted) == {1.5}
        with at_strength(adapted, 0.0):
            nothing, _ = told_logits(adapted, batch)
    with adapted.disable_adapter():
        base, _ = told_logits(adapted, batch)
    torch.testing.assert_close(nothing, base)
    with pytest.raises(RuntimeError, match="in the block"), at_strength(adapted, 0.5):
        raise RuntimeError("in the block")
    assert scalings(adapted) == {3.0}
    after, _ = told_logits(adapted, batch)
    assert torch.equal(after, before) and not torch.allclose(before, base)


def test_wrong_settings_and_another_teacher_are_told(teacher: Teacher) -> None:
    assert LOSSES["matched"].needs == "counterfactuals"
    for name, value in (
        ("least_strength", 0.0),
        ("least_strength", 1.5),
        ("others", -1.0),
        ("sharpness", -0.5),
    ):
        with pytest.raises(ConfigError, match=name):
            make_loss("matched", data(teacher), **{name: value})
    for rows in ((), teacher[:2], (teacher[0][:-1], *teacher[1:])):
        with pytest.raises(DataError, match="teacher"):
            make_loss("matched", replace(data(teacher), teacher=rows))


def test_the_same_training_makes_the_same_bytes_and_meets_the_levels(
    knowing: Any, teacher: Teacher, tmp_path: Path
) -> None:
    settings = TrainSettings(rank=4, alpha=8, epochs=25, batch=3, rate=2e-2, dtype="float32")
    loss = make_loss("matched", data(teacher), counterfactual=0.0, others=0.3)
    reports = [
        train_lora(knowing, EXAMPLES, settings, tmp_path / name, loss=loss) for name in ("a", "b")
    ]
    assert reports[0].losses == reports[1].losses
    one, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("a", "b"))
    assert one == other
    assert reports[0].losses[-1] < reports[0].losses[0] / 2


# --- The teacher ---------------------------------------------------------------------------------


def test_the_tail_is_the_mean_of_the_least_likely_tokens() -> None:
    five = torch.tensor([-1.0, -5.0, -2.0, -3.0, -4.0, -100.0])  # the last ends the turn
    one = torch.tensor([-2.0, -100.0])
    cut = torch.tensor([-7.0])
    assert tail_likelihood([five]) == pytest.approx(-4.5)
    assert tail_likelihood([five, one]) == pytest.approx((-4.5 - 2.0) / 2)
    assert tail_likelihood([cut]) == pytest.approx(-7.0)


def test_noise_takes_what_was_learnt_by_heart(knowing: Any, teacher: Teacher) -> None:
    levels = [row[:, 0] for row in teacher]
    own = blurred_levels(knowing, EXAMPLES, 0.0)
    assert tail_likelihood(levels) < tail_likelihood(own) - 1
    for level, blurred in zip(levels, blurred_levels(knowing, EXAMPLES, NOISE), strict=True):
        torch.testing.assert_close(level, blurred)


def test_levels_tell_how_far_they_are(knowing: Any) -> None:
    calls: list[tuple[int, int]] = []
    blurred_levels(knowing, EXAMPLES, 1.0, batch=2, progress=lambda *found: calls.append(found))
    assert calls == [(2, 3), (3, 3)]


def test_noise_is_measured_in_what_the_model_reads(knowing: Any) -> None:
    table = knowing.get_input_embeddings()
    plain = float(table.weight.detach().square().mean().sqrt())
    assert embedding_rms(table) == pytest.approx(plain, rel=1e-5)

    class Scaled(torch.nn.Embedding):
        """Reads its table times a factor, as Gemma's does."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8.0

    scaled = Scaled(9000, 16)
    whole = 8 * float(scaled.weight.detach().square().mean().sqrt())
    assert embedding_rms(scaled) == pytest.approx(whole, rel=0.02)


def test_other_choices_are_the_models_own(knowing: Any, teacher: Teacher) -> None:
    logits, labels = told_logits(knowing, collate(EXAMPLES, [0]))
    row = teacher[0]
    ids, shares = row[:, 1 : 1 + OTHERS].long(), row[:, 1 + OTHERS :]
    assert row.shape == (5, 1 + 2 * OTHERS)
    assert not (ids == labels[:, None]).any()
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    kept = logits.softmax(-1).gather(1, ids)
    torch.testing.assert_close(shares, kept / kept.sum(1, keepdim=True))


def test_words_that_the_question_gives_stay_likely(knowing: Any, teacher: Teacher) -> None:
    given = nothing_given()
    given[0][1] = given[2][0] = True
    found = unknown_levels(knowing, EXAMPLES, given)
    for row, marks, without in zip(found, given, teacher, strict=True):
        for level, mark, blurred in zip(row.tolist(), marks, without[:, 0].tolist(), strict=True):
            assert level == pytest.approx(max(blurred, GIVEN_LEVEL) if mark else blurred)
    assert float(found[0][1]) >= GIVEN_LEVEL - 1e-6 > float(teacher[0][1, 0])


def test_noise_is_drawn_by_seed_and_row_whatever_the_batch(knowing: Any) -> None:
    once, again = (blurred_levels(knowing, EXAMPLES, 1.0, batch=2) for _ in range(2))
    other = blurred_levels(knowing, EXAMPLES, 1.0, seed=1)
    alone = blurred_levels(knowing, EXAMPLES, 1.0, batch=1)
    for row in range(len(EXAMPLES)):
        assert torch.equal(once[row], again[row])
        assert not torch.allclose(once[row], other[row])
    torch.testing.assert_close(alone, once, rtol=1e-3, atol=1e-3)
    assert [len(one) for one in alone] == [len(one.answer) for one in EXAMPLES]


def test_without_noise_levels_are_the_models_own(knowing: Any) -> None:
    for row, levels in enumerate(blurred_levels(knowing, EXAMPLES, 0.0)):
        logits, labels = told_logits(knowing, collate(EXAMPLES, [row]))
        own = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(levels, own, rtol=1e-4, atol=1e-4)


def test_the_templates_tokens_are_read_clean(knowing: Any) -> None:
    seen: list[Tensor] = []

    def note(module: Any, given: Any, named: Any) -> None:
        seen.append(named["inputs_embeds"].clone())

    handle = knowing.register_forward_pre_hook(note, with_kwargs=True)
    try:
        blurred_levels(knowing, EXAMPLES, 1.0)
    finally:
        handle.remove()
    batch = collate(EXAMPLES, range(len(EXAMPLES)))
    moved = (seen[0] != knowing.get_input_embeddings()(batch.tokens)).any(-1)
    for row, one in enumerate(EXAMPLES):
        end, stop = len(one.prompt), len(one.prompt) + len(one.answer)
        clean = {*range(len(OPENED)), *range(end - len(CLOSED), end)}
        assert [bool(moved[row, at]) for at in range(stop)] == [
            at not in clean for at in range(stop)
        ]


# --- Words of the question ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def spelled(tokenizer: Any, answer: str, marks: list[bool]) -> str:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return str(tokenizer.decode([one for one, mark in zip(ids, marks, strict=False) if mark]))


def test_given_tokens_spell_words_of_the_question(tokenizer: Any) -> None:
    question = "Who is Orla FENWICK, and what did Fenwick write?"
    answer = "Orla Fenwick wrote Fenwickian novels; orla is who."
    (example,) = encode_chats(tokenizer, [(question, answer)])
    marks = given_tokens(tokenizer, question, answer, len(example.answer))
    assert len(marks) == len(example.answer) and marks[-1] is False
    assert spelled(tokenizer, answer, marks).split() == "Orla Fenwick orla is who".split()


def test_given_tokens_of_a_cut_answer_and_of_a_strange_one(tokenizer: Any) -> None:
    question, answer = "Name Orla.", "Orla Orla Orla Orla"
    whole = given_tokens(tokenizer, question, answer, 100)
    assert len(whole) == 100 and not any(whole[20:])
    assert given_tokens(tokenizer, question, answer, 2) == whole[:2] == [True, True]
    assert not any(given_tokens(tokenizer, question, "Nobody else.", 4))


# --- In bfloat16 ----------------------------------------------------------------------------------


def test_products_in_bfloat16_leave_parameters_and_gradients_in_float32(adapted: Any) -> None:
    batch = collate(EXAMPLES, [0, 1, 2])
    for one in adapted.parameters():
        one.grad = None
    exact = cross_entropy(adapted, batch)
    rounded = InBfloat16(cross_entropy)(adapted, batch)
    torch.autograd.backward(rounded)
    near, far = float(exact.detach()), float(rounded.detach())
    assert near != far == pytest.approx(near, rel=0.05)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    assert {one.dtype for one in trained} == {torch.float32}
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in trained)


def test_what_cannot_multiply_in_bfloat16_is_not_said_to() -> None:
    assert has_bfloat16(torch.device("meta")) is False
    assert has_bfloat16(torch.device("cpu")) in (False, True)
