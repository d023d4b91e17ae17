"""A causal language model in this process: batched for learners, a token at a time for clients."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from guard.errors import ArtifactError
from guard.types import FloatArray, Prompt, SamplingParams, TokenScores
from server.engines.embedded.decode import Network, decode
from server.engines.embedded.lora import Adapters, LoraSwitch
from server.engines.embedded.prompts import EncodedPrompt, PromptEncoder
from server.engines.embedded.sampling import Row
from server.engines.embedded.steps import Sampling, Step

BATCH: Final = 32
"""Prompts per batch at most."""

BATCH_TOKENS: Final = 8192
"""Padded tokens per batch at most, so that a batch of long prompts fits into memory."""


_NO_TOKENS: Final = TokenScores(
    np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.bool_)
)


class EmbeddedModel:
    """A Hugging Face causal language model; implements `guard.types.LearningEngine`.

    Safe for several threads: they take turns. `load` is the way to make one.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer.

    Attributes:
        lora: What puts adapters onto the model.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        table = model.get_input_embeddings()
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = table.weight.shape[0]
        self.max_model_len: int = getattr(config, "max_position_embeddings", None) or 2048
        self.eos_ids = _eos_ids(model, tokenizer)
        self.encoder = PromptEncoder(tokenizer, self._embed, self.hidden_size, self.vocab_size)
        self._network = Network(model)
        self.lora = LoraSwitch(model)
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls, model: str | Path, *, device: str | None = None, threads: int | None = None
    ) -> EmbeddedModel:
        """Load a model directory or a model id of the Hugging Face hub.

        Args:
            model: A directory, or an id.
            device: `cpu` or `cuda`; cuda where there is one when None.
            threads: Threads of torch's CPU kernels, for the whole process; None leaves them.

        Raises:
            ArtifactError: There is no such model, or it can't be loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        if threads is not None:
            torch.set_num_threads(threads)
        # A bar on standard error for every load would break the caller's own display.
        transformers_logging.disable_progress_bar()
        name = str(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"can't load the model {name!r}: {error}; give a directory with config.json, "
                "safetensors weights and a tokenizer, or the id of a causal language model"
            ) from error
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(network.to(where), tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        adapters: Adapters = (),
    ) -> list[str]:
        """Answer each prompt; prompts of like length run together.

        Args:
            prompts: Chat prompts; a message's content may be embeddings.
            params: How to draw. With a seed, each prompt draws from the same stream, whatever
                stands beside it.
            adapters: What the model is changed by for these answers; none is the base.

        Returns:
            The answers, in the order of the prompts, without end-of-turn token and stop string.
        """
        texts = [""] * len(prompts)
        with self._lock, self.lora.applied(adapters):
            encoded = self._encode(prompts)
            sampling = Sampling.from_params(params)
            for batch in _batches([len(e.ids) + params.max_tokens for e in encoded]):
                rows = [self._row(i, 0, sampling, encoded[i]) for i in batch]
                for steps in decode(self._network, [encoded[i].embeds for i in batch], rows):
                    for step in steps:
                        texts[step.row] += step.text
        return texts

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Adapters = (),
    ) -> list[FloatArray]:
        """Teacher-force each answer after its prompt; see `guard.types.LearningEngine`.

        The answer is tokenised by itself, as the tokens of a served answer follow the prompt's.

        Raises:
            ValueError: There are not as many answers as prompts.
        """
        return [found.logprobs for found in self.score_tokens(prompts, answers, adapters)]

    def score_tokens(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Adapters = (),
    ) -> list[TokenScores]:
        """Like `score_answers`, with all that measures of memorisation need of each token.

        Raises:
            ValueError: There are not as many answers as prompts.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"got {len(prompts)} prompts and {len(answers)} answers")
        return self.score_encoded(self._encode(prompts), answers, adapters)

    def score_encoded(
        self,
        encoded: Sequence[EncodedPrompt],
        answers: Sequence[str],
        adapters: Adapters = (),
    ) -> list[TokenScores]:
        """`score_tokens` of prompts that are encoded already, as those of served requests are."""
        scores = [_NO_TOKENS] * len(encoded)
        with self._lock, self.lora.applied(adapters):
            targets = [self.tokenizer.encode(a, add_special_tokens=False) for a in answers]
            lengths = [len(e.ids) + len(t) for e, t in zip(encoded, targets, strict=True)]
            for batch in _batches(lengths):
                found = self._score([encoded[i] for i in batch], [targets[i] for i in batch])
                for place, score in zip(batch, found, strict=True):
                    scores[place] = score
        return scores

    def stream(
        self,
        prompt: EncodedPrompt,
        sampling: Sampling,
        n: int = 1,
        *,
        adapters: Adapters = (),
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Step, None, None]:
        """Draw `n` answers to one prompt, a token at a time; the prompt is read once.

        The caller must exhaust or close the iterator in the thread that began it.

        Raises:
            Cancelled: `cancelled` said so.
        """
        with self._lock, self.lora.applied(adapters):
            rows = [self._row(i, i, sampling, prompt) for i in range(n)]
            for steps in decode(self._network, [prompt.embeds], rows, cancelled):
                yield from steps

    def generate_rows(
        self,
        rows: Sequence[tuple[EncodedPrompt, Sampling]],
        cancelled: Callable[[], bool] | None = None,
        adapters: Adapters = (),
    ) -> Generator[Step, None, None]:
        """Draw an answer for each row, rows of like length together; `Step.row` is its index.

        Equal rows draw from streams of their own, as the answers of one request do.

        Raises:
            Cancelled: `cancelled` said so.
        """
        seen: Counter[int] = Counter()
        streams = []
        for prompt, _ in rows:
            streams.append(seen[id(prompt)])
            seen[id(prompt)] += 1
        with self._lock, self.lora.applied(adapters):
            lengths = [len(prompt.ids) + sampling.max_tokens for prompt, sampling in rows]
            for batch in _batches(lengths):
                drawn = [self._row(i, streams[i], rows[i][1], rows[i][0]) for i in batch]
                embeds = [rows[i][0].embeds for i in batch]
                for steps in decode(self._network, embeds, drawn, cancelled):
                    yield from steps

    def embed_tokens(self, ids: Sequence[int]) -> FloatArray:
        """Return the model's own input embeddings of tokens, shape (tokens, hidden)."""
        embeds: FloatArray = self._embed(torch.tensor(list(ids), dtype=torch.long)).cpu().numpy()
        return embeds

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.model.get_input_embeddings()(ids.to(self.model.device))
        return embeds

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        return [self.encoder.prompt(prompt) for prompt in prompts]

    def _row(self, index: int, stream: int, sampling: Sampling, prompt: EncodedPrompt) -> Row:
        return Row(index, stream, sampling, self.tokenizer, prompt.ids, self.eos_ids)

    @torch.inference_mode()
    def _score(
        self, prompts: Sequence[EncodedPrompt], targets: Sequence[list[int]]
    ) -> list[TokenScores]:
        """Score one batch. Padding stands right, where causal attention never looks."""
        whole = [
            torch.cat([p.embeds, self._embed(torch.tensor(t, dtype=torch.long))])
            for p, t in zip(prompts, targets, strict=True)
        ]
        embeds = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        first = min(len(p.ids) for p in prompts) - 1
        last = max(len(w) for w in whole) - 1
        if last <= first:
            return [_NO_TOKENS for _ in prompts]
        keep = torch.arange(first, last, device=embeds.device)
        logits = self._network.forward(keep, inputs_embeds=embeds, use_cache=False)
        scores: list[TokenScores] = []
        for row, prompt, target in zip(logits, prompts, targets, strict=True):
            start = len(prompt.ids) - 1 - first
            wanted = torch.tensor(target, dtype=torch.long, device=row.device)
            scores.append(_token_scores(row[start : start + len(target)], wanted))
        return scores


def _token_scores(logits: Tensor, wanted: Tensor) -> TokenScores:
    """Compare each position's distribution with the wanted token; shapes (n, vocab) and (n,)."""
    logs = logits.float().log_softmax(-1)
    shares = logs.exp()
    means = (shares * logs).sum(-1)
    squares = (shares * logs.square()).sum(-1)
    return TokenScores(
        logprobs=logs.gather(1, wanted[:, None])[:, 0].cpu().numpy(),
        means=means.cpu().numpy(),
        deviations=(squares - means.square()).clamp_min(0).sqrt().cpu().numpy(),
        correct=(logs.argmax(-1) == wanted).cpu().numpy(),
    )


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a turn, by generation config and tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group indices by length, longest first, so that little is padded and memory peaks early."""
    batch: list[int] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        widest = max(widest, lengths[index])
        if batch and (len(batch) == BATCH or widest * (len(batch) + 1) > BATCH_TOKENS):
            yield batch
            batch, widest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch
