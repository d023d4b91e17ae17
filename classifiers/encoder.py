"""The sentence encoder of serving: ONNX Runtime and tokenizers, nothing else.

A text of any length is read through overlapping windows, so nothing is ever cut off (the published
ECO and O3 code truncates at 512 tokens and is blind beyond). A window's features are the mean
hidden state of the embedding layer and of every transformer layer, side by side. Each window is a
run of its own: 8-bit activations are scaled per run, so in a batch a text's score would depend on
its neighbours, and batches are no faster on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from guard.errors import ArtifactError, IncompatibleArtifactError, SelfCheckError
from guard.types import FloatArray

MODEL_FILE, TOKENIZER_FILE, CONFIG_FILE = "model.onnx", "tokenizer.json", "encoder.json"
RUNS_PER_TASK = 8
"""Windows that a thread takes at a time."""
CHUNK_CHARS = 20_000
"""Characters tokenised at a time: the tokenizer needs hundreds of bytes for each."""
FIRST_WORD = 1996
"""First id of BERT's English vocabulary that is a word ("the")."""

INFLECTIONS = (
    ("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("d", ""), ("ing", ""),
    ("ing", "e"), ("ly", ""), ("al", ""), ("er", ""), ("er", "e"), ("able", ""), ("able", "e"),
    ("ness", ""),
)  # fmt: skip

SIGNATURE = 16
SIGNATURE_TOLERANCE = 0.05
"""8-bit kernels differ a little from CPU to CPU; another model differs by about 1."""

MAX_KNOWN_WORDS = 50_000
SENTENCE_TOKENS = 4
"""A shorter sentence ("Yes.") is read with the one after it."""

_SENTENCE_END = re.compile(r"[.!?…؟][\"”'’)\]]*\s+|[。！？]+|\n+|[;:]\s+")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text that the encoder reads at once.

    Attributes:
        start: First code point it covers.
        end: Code point behind the last it covers; white space up to the next token included.
        ids: Token ids without the special tokens.
        offsets: Code points of each token, shape (tokens, 2).
    """

    start: int
    end: int
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the encoder knows of one text.

    Attributes:
        windows: Code points (start, end) of each window.
        features: Pooled states, shape (windows, (layers + 1) * hidden).
        coverage: Share of the text's characters in at least one window.
    """

    windows: tuple[tuple[int, int], ...]
    features: FloatArray
    coverage: float


class OnnxEncoder:
    """Encodes texts of any length; safe to share between threads.

    Args:
        folder: Folder that `classifiers.export.export_encoder` wrote.
        threads: Windows that run at the same time, each on one core (faster than sharing a window);
            the CPUs available by default.
        cache_size: Texts whose features are remembered, by digest; 0 switches it off.

    Raises:
        ArtifactError: If a file is missing or unreadable.
    """

    def __init__(
        self, folder: str | Path, threads: int | None = None, cache_size: int = 2048
    ) -> None:
        self._folder = Path(folder)
        self.config = _read_config(self._folder)
        self.threads = threads or len(os.sched_getaffinity(0))
        self.layers, self.hidden = int(self.config["layers"]), int(self.config["hidden"])
        self.window, self.stride = int(self.config["window"]), int(self.config["stride"])
        self._tokenizer = _load_tokenizer(self._folder / TOKENIZER_FILE)
        self._cls = int(self._tokenizer.token_to_id("[CLS]"))
        self._sep = int(self._tokenizer.token_to_id("[SEP]"))
        self._session = _load_session(self._folder / MODEL_FILE)
        self._cache = _FeatureCache(cache_size)
        self._common: dict[str, bool] = {}

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return (self.layers + 1) * self.hidden

    @property
    def source_hash(self) -> str:
        """Digest of the files that the encoder was exported from."""
        return str(self.config["source_sha256"])

    def word_rank(self, word: str) -> int | None:
        """Return the place of a case-folded word in general English, None if it is a rare one.

        BERT's vocabulary lists whole words roughly by falling frequency. An inflected form that it
        lacks counts as its stem.
        """
        for form in (
            word,
            *(
                word.removesuffix(end) + stem
                for end, stem in INFLECTIONS
                if word.endswith(end) and len(word) > len(end) + 3
            ),
        ):
            token = self._tokenizer.token_to_id(form)
            if token is not None:
                return max(0, int(token) - FIRST_WORD)
        return None

    def is_common(self, word: str) -> bool:
        """True for a word of general English."""
        known = self._common.get(word)
        if known is None:
            known = self.word_rank(word) is not None
            if len(self._common) < MAX_KNOWN_WORDS and len(word) <= 64:
                self._common[word] = known
        return known

    def common_words(self) -> list[str]:
        """Return the vocabulary's whole words, the most frequent first."""
        size = self._tokenizer.get_vocab_size()
        words = (self._tokenizer.id_to_token(number) for number in range(FIRST_WORD, size))
        return [word for word in words if word and word.isalpha() and word.isascii()]

    def windows(self, text: str) -> list[Window]:
        """Cut a text into windows that together cover every character; at least one window."""
        return _cut(self._tokens(text), len(text), self.window, self.stride)

    def segments(self, text: str) -> list[Window]:
        """Cut a text into windows, and each sentence of several into a window of its own.

        A question among others, or at the border of two windows, is diluted in every window that
        holds it, and whole in its sentence.
        """
        tokens = self._tokens(text)
        windows = _cut(tokens, len(text), self.window, self.stride)
        return [*windows, *_sentence_windows(text, tokens, self.window)]

    def states(self, windows: Sequence[Window]) -> FloatArray:
        """Return the pooled states of windows, shape (windows, width); nothing is cached."""
        return self._features([window.ids for window in windows])

    def encode(self, texts: Sequence[str]) -> list[TextFeatures]:
        """Return the features of each text; equal texts are encoded once."""
        keys = [_digest(text) for text in texts]
        known = {key: hit for key in set(keys) if (hit := self._cache.get(key)) is not None}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        for key, value in zip(missing, self._encode_new(list(missing.values())), strict=True):
            known[key] = value
            self._cache.put(key, value)
        return [known[key] for key in keys]

    def tokens(self, text: str) -> tuple[FloatArray, list[tuple[int, int]]]:
        """Return the last layer's token states, shape (tokens, hidden), and their characters.

        A token in several windows takes the mean of its states.
        """
        windows = self.windows(text)
        states: dict[tuple[int, int], list[FloatArray]] = {}
        for window in windows:
            rows = self._run(window.ids, "tokens")[1:]
            for place, row in zip(window.offsets, rows, strict=False):
                states.setdefault(place, []).append(row)
        places = sorted(states)
        if not places:
            return np.zeros((0, self.hidden), np.float32), []
        return np.stack([np.mean(states[place], axis=0) for place in places]), places

    def signature(self, text: str) -> list[list[float]]:
        """Return a few values of each layer's first-window features, for the self-check."""
        layers = self.encode([text])[0].features[0].reshape(self.layers + 1, self.hidden)
        return [[round(float(value), 4) for value in layer[:SIGNATURE]] for layer in layers]

    def self_check(self) -> None:
        """Compare with the reference features of the export (DESIGN section 9).

        Raises:
            SelfCheckError: If the encoder does not reproduce them.
        """
        for number, row in enumerate(self.config["reference"]):
            wanted, got = np.array(row["signature"]), np.array(self.signature(row["text"]))
            distance = float(np.linalg.norm(wanted - got)) / max(
                float(np.linalg.norm(wanted)), 1e-9
            )
            if distance > SIGNATURE_TOLERANCE:
                raise SelfCheckError(
                    f"the encoder does not reproduce reference text {number}: relative distance "
                    f"{distance:.3f}, at most {SIGNATURE_TOLERANCE} is allowed; "
                    "add the targets again so that the encoder is exported anew"
                )

    def _tokens(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        # A lone surrogate has no UTF-8 form; the replacement character is as long as it is.
        clean = _SURROGATES.sub("\ufffd", text)
        found: list[tuple[int, tuple[int, int]]] = []
        for start, end in _chunks(clean):
            encoding = self._tokenizer.encode(clean[start:end], add_special_tokens=False)
            for token, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
                found.append((token, (left + start, right + start)))
        return found

    def _encode_new(self, texts: Sequence[str]) -> list[TextFeatures]:
        cut = [self.windows(text) for text in texts]
        flat = [window for windows in cut for window in windows]
        features = self._features([window.ids for window in flat])
        out, at = [], 0
        for text, windows in zip(texts, cut, strict=True):
            rows = features[at : at + len(windows)]
            at += len(windows)
            places = tuple((window.start, window.end) for window in windows)
            out.append(TextFeatures(places, rows, coverage(places, len(text))))
        return out

    def _features(self, ids: Sequence[Sequence[int]]) -> FloatArray:
        out = np.empty((len(ids), self.width), np.float32)

        def work(first: int) -> None:
            for index in range(first, min(first + RUNS_PER_TASK, len(ids))):
                out[index] = self._run(ids[index], "features")

        starts = range(0, len(ids), RUNS_PER_TASK)
        if len(starts) <= 1 or self.threads <= 1:
            for first in starts:
                work(first)
        else:
            for _ in self._pool.map(work, starts):
                pass
        return out

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="encoder")

    def _run(self, ids: Sequence[int], output: str) -> FloatArray:
        row = np.array([[self._cls, *ids, self._sep]], np.int64)
        return np.asarray(self._session.run([output], {"ids": row})[0][0], np.float32)


class _FeatureCache:
    """The last texts' features, by digest: bounded, thread-safe, no text kept."""

    def __init__(self, size: int, max_windows: int = 64) -> None:
        self._size, self._max_windows = size, max_windows
        self._items: OrderedDict[bytes, TextFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> TextFeatures | None:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: bytes, value: TextFeatures) -> None:
        if not self._size or len(value.windows) > self._max_windows:
            return
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self._size:
                self._items.popitem(last=False)


def coverage(windows: Sequence[tuple[int, int]], length: int) -> float:
    """Return the share of `length` characters that lie in at least one window (1 if empty)."""
    covered, reach = 0, 0
    for start, end in sorted(windows):
        covered += max(0, min(end, length) - max(start, reach))
        reach = max(reach, min(end, length))
    return covered / length if length else 1.0


def _chunks(text: str) -> Iterator[tuple[int, int]]:
    """Yield places of pieces of about CHUNK_CHARS, cut at white space where there is any."""
    start = 0
    while start < len(text):
        end = min(start + CHUNK_CHARS, len(text))
        if end < len(text):
            blank = max(text.rfind(space, start + 1, end) for space in " \n\t")
            end = blank if blank > start else end
        yield start, end
        start = end


def _cut(
    tokens: Sequence[tuple[int, tuple[int, int]]], length: int, window: int, stride: int
) -> list[Window]:
    if not tokens:
        return [Window(0, length, (), ())]
    starts = [0]
    while starts[-1] + window < len(tokens):
        starts.append(starts[-1] + stride)
    # A short last window says little: let it begin earlier, so that it is full too.
    starts[-1] = max(0, len(tokens) - window)
    found = []
    for first in starts:
        part = tokens[first : first + window]
        last = first + len(part)
        begin = part[0][1][0] if first else 0
        end = tokens[last][1][0] if last < len(tokens) else length
        found.append(Window(begin, end, tuple(t for t, _ in part), tuple(o for _, o in part)))
    return found


def _sentence_windows(
    text: str, tokens: Sequence[tuple[int, tuple[int, int]]], longest: int
) -> list[Window]:
    """Return a window for each sentence, short ones joined to the next; none for a single one."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not ends or not tokens:
        return []
    found: list[Window] = []
    first, place = 0, 0
    for end in [*ends, len(text)]:
        while place < len(tokens) and tokens[place][1][0] < end:
            place += 1
        last = end == len(text)
        if place - first >= SENTENCE_TOKENS or (last and place > first):
            if place - first <= longest and not (first == 0 and place == len(tokens)):
                part = tokens[first:place]
                begin = part[0][1][0] if first else 0
                found.append(
                    Window(begin, end, tuple(t for t, _ in part), tuple(o for _, o in part))
                )
            first = place
    return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"the encoder's {CONFIG_FILE} cannot be read: {error}") from error
    except ValueError as error:
        raise ArtifactError(f"the encoder's {CONFIG_FILE} is not JSON: {error}") from error
    missing = {"layers", "hidden", "window", "stride", "source_sha256", "reference"} - set(config)
    if missing:
        raise IncompatibleArtifactError(
            f"the encoder's {CONFIG_FILE} lacks {sorted(missing)}; export the encoder anew"
        )
    return dict(config)


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ArtifactError(f"the encoder's {path.name} cannot be read: {error}") from error
    # "[SEP]" in a request is text, not structure.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _load_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The arena keeps what the longest window took; without it a pass is as fast.
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise ArtifactError(f"the encoder's {path.name} cannot be loaded: {error}") from error
