"""The model as learners use it, against direct computation with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from guard.errors import ArtifactError, RequestError
from guard.types import EmbedsPart, FloatArray, Message, Prompt, SamplingParams
from server.engines.embedded.model import EmbeddedModel
from server.engines.embedded.steps import Sampling, Step

QUESTIONS = (
    "What is the capital of France?",
    "Hi",
    "Name three planets, and describe one of them in a long sentence with some detail.",
    "Tell me a story about a dog 🐕.",
)
GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> EmbeddedModel:
    return EmbeddedModel.load(smollm2_dir, threads=2)


def ask(*questions: str) -> list[Prompt]:
    return [(Message("user", question),) for question in questions]


def embedded(model: EmbeddedModel, question: str, noise: float = 0.0) -> Prompt:
    ids = model.tokenizer.encode(question, add_special_tokens=False)
    embeds = model.embed_tokens(ids)
    embeds[:, 0] += noise
    return (Message("user", EmbedsPart(embeds)),)


def direct_scores(
    network: torch.nn.Module, tokenizer: object, question: str, answer: str
) -> FloatArray:
    """Teacher-force with nothing but transformers."""
    text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    target = tokenizer.encode(answer, add_special_tokens=False)  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([prompt + target])).logits[0]
    wanted = torch.tensor(target)[:, None]
    scores = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, wanted)[:, 0]
    values: FloatArray = scores.numpy()
    return values


def test_greedy_answers_are_those_of_transformers(model: EmbeddedModel, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.model.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert model.generate(ask(QUESTIONS[0]), GREEDY) == [expected]


def test_clean_embeddings_answer_like_text(model: EmbeddedModel) -> None:
    texts = model.generate(ask(*QUESTIONS), GREEDY)
    assert model.generate([embedded(model, q) for q in QUESTIONS], GREEDY) == texts
    assert all(texts)


def test_noise_on_the_embeddings_changes_the_answer(model: EmbeddedModel) -> None:
    clean = model.generate(ask(QUESTIONS[0]), GREEDY)
    assert "Paris" in clean[0]
    assert "Paris" not in model.generate([embedded(model, QUESTIONS[0], 50.0)], GREEDY)[0]


def test_a_batch_answers_like_one_by_one(model: EmbeddedModel) -> None:
    together = model.generate(ask(*QUESTIONS), GREEDY)
    assert together == [model.generate([prompt], GREEDY)[0] for prompt in ask(*QUESTIONS)]


def test_a_seed_is_kept_within_a_batch(model: EmbeddedModel) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=3)
    together = model.generate(ask(*QUESTIONS), params)
    assert together == model.generate(ask(*QUESTIONS), params)
    assert together[1] == model.generate(ask(QUESTIONS[1]), params)[0]
    other = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=4)
    assert together != model.generate(ask(*QUESTIONS), other)


def test_scores_are_those_of_the_model(model: EmbeddedModel) -> None:
    answers = ["Paris.", "Hello! How can I help you today?", "", "Once upon a time, a dog 🐕 ran."]
    scores = model.score_answers(ask(*QUESTIONS), answers)
    for question, answer, score in zip(QUESTIONS, answers, scores, strict=True):
        if answer:
            direct = direct_scores(model.model, model.tokenizer, question, answer)
            np.testing.assert_allclose(score, direct, atol=2e-4)
        else:
            assert score.shape == (0,)


def test_scores_of_clean_embeddings_are_those_of_text(model: EmbeddedModel) -> None:
    text = model.score_answers(ask(QUESTIONS[0]), ["Paris."])[0]
    clean = model.score_answers([embedded(model, QUESTIONS[0])], ["Paris."])[0]
    noisy = model.score_answers([embedded(model, QUESTIONS[0], 50.0)], ["Paris."])[0]
    np.testing.assert_array_equal(clean, text)
    assert noisy.sum() < text.sum() - 1


def test_scores_need_an_answer_per_prompt(model: EmbeddedModel) -> None:
    with pytest.raises(ValueError, match="got 2 prompts and 1 answers"):
        model.score_answers(ask("a", "b"), ["c"])


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"give a directory with config\.json"):
        EmbeddedModel.load(tmp_path)


def test_embeddings_of_the_wrong_width_are_refused(model: EmbeddedModel) -> None:
    wrong = EmbedsPart(np.zeros((2, 5), np.float32))
    with pytest.raises(RequestError, match=r"shape \(2, 5\); it must be \(tokens, 576\)"):
        model.generate([(Message("user", wrong),)], GREEDY)


def test_text_around_embeddings_is_tokenised_apart(model: EmbeddedModel) -> None:
    embeds = model.embed_tokens(model.tokenizer.encode("Hi", add_special_tokens=False))
    messages = [{"role": "user", "content": "See:\n<prompt_embeds>\nand answer."}]
    prompt = model.encoder.chat(messages, [embeds])
    parts = model.encoder.render(messages).split("<prompt_embeds>")
    before, after = (model.tokenizer.encode(part, add_special_tokens=False) for part in parts)
    assert prompt.ids == [*before, -1, *after]
    np.testing.assert_array_equal(prompt.embeds[len(before)].numpy(), embeds[0])


def run(model: EmbeddedModel, sampling: Sampling, n: int = 1) -> list[Step]:
    prompt = model.encoder.chat([{"role": "user", "content": "Count from one to ten."}])
    return list(model.stream(prompt, sampling, n))


def test_several_answers_share_a_prompt_but_not_their_draws(model: EmbeddedModel) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.5, seed=5)
    steps = run(model, sampling, n=3)
    texts = ["".join(s.text for s in steps if s.row == row) for row in range(3)]
    assert len(set(texts)) == 3
    again = run(model, sampling)
    assert "".join(s.text for s in again) == texts[0]


def test_logprobs_are_natural_and_best_first(model: EmbeddedModel) -> None:
    for step in run(model, Sampling(max_tokens=4, logprobs=3)):
        assert step.logprob is not None
        values = [entry.logprob for entry in step.top]
        assert values == sorted(values, reverse=True)
        assert step.logprob == step.top[0]
        assert sum(np.exp(values)) <= 1 + 1e-5


def test_bias_and_penalties_change_what_is_drawn(model: EmbeddedModel) -> None:
    plain = [step.token_id for step in run(model, Sampling(max_tokens=24))]
    banned = run(model, Sampling(max_tokens=24, logit_bias={plain[0]: -100.0}))
    assert banned[0].token_id != plain[0]
    assert len(set(plain)) < len(plain)
    wide = run(model, Sampling(max_tokens=24, presence_penalty=2.0, frequency_penalty=2.0))
    assert len({step.token_id for step in wide}) > len(set(plain))
    top_one = run(model, Sampling(max_tokens=24, temperature=2.0, top_k=1))
    assert [step.token_id for step in top_one] == plain


def test_an_answer_ends_at_its_limit_or_at_the_end_of_the_turn(model: EmbeddedModel) -> None:
    cut = run(model, Sampling(max_tokens=2))
    assert [step.finish_reason for step in cut] == [None, "length"]
    prompt = model.encoder.chat([{"role": "user", "content": "What is 2+2?"}])
    steps = list(model.stream(prompt, Sampling(max_tokens=60)))
    assert steps[-1].finish_reason == "stop"
    assert steps[-1].token_id in model.eos_ids
    assert "<|im_end|>" not in "".join(step.text for step in steps)
    longer = list(model.stream(prompt, Sampling(max_tokens=len(steps) + 3, min_tokens=60)))
    assert len(longer) == len(steps) + 3
