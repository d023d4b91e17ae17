"""Corruptions of prompt embeddings: one registry of pure numpy functions.

The fourteen methods of ECO's code (Liu et al., NeurIPS 2024, arXiv 2406.07933), and `mix-generic`,
our own. Each gets the marked tokens alone and returns their new embeddings, so that no method can
touch another token (in the published code set-noise zeroes, and reverse and shuffle move, tokens
that were not marked).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final

import numpy as np

from corruptions.seeding import Draws
from corruptions.spec import CorruptionSpec, SpanPolicy
from guard.errors import ShapeError
from guard.registry import Registry
from guard.types import BoolArray, FloatArray, IntArray

__all__ = ["CORRUPTIONS", "CorruptionFn", "CorruptionSpec", "Marked", "SpanPolicy", "corrupt"]


@dataclass(frozen=True, slots=True)
class Marked:
    """The tokens to corrupt.

    Attributes:
        rows: Their embeddings, shape (marked, hidden); a copy that a method may write to.
        runs: Lengths of the stretches of neighbouring marked tokens, in order; sums to `marked`.
        draws: Source of randomness.
        bank: Embeddings of generic text, shape (bank tokens, hidden); for `mix-generic` alone.
        others: The clean embeddings of the other tokens, shape (tokens - marked, hidden).
    """

    rows: FloatArray
    runs: tuple[int, ...]
    draws: Draws
    bank: FloatArray | None
    others: FloatArray


CorruptionFn = Callable[[Marked, CorruptionSpec], FloatArray]
"""Returns the new embeddings of the marked tokens, shape (marked, hidden)."""

CORRUPTIONS: Registry[CorruptionFn] = Registry("corruption method")


def corrupt(
    embeddings: FloatArray,
    positions: BoolArray,
    spec: CorruptionSpec,
    seed: bytes,
    bank: FloatArray | None = None,
    frame: BoolArray | None = None,
) -> FloatArray:
    """Corrupt the marked tokens of one prompt, and blur the wording around them.

    The same seed always gives the same result, so answers are reproducible and asking again can't
    average the noise away.

    Args:
        embeddings: Input embeddings, shape (tokens, hidden), any float dtype; not modified.
        positions: True for the tokens to corrupt, shape (tokens,).
        spec: What to do. `span_policy` is the caller's business: it is in `positions` already.
        seed: Seeds the noise; serving gives HMAC(secret, target, text).
        bank: Embeddings of generic text (`corruptions.bank.make_bank`), for `mix-generic`.
        frame: True for the tokens that get `spec.frame` of noise, shape (tokens,); marked ones
            among them don't. None marks none.

    Returns:
        New float32 array of the same shape; tokens in neither are bit-identical.

    Raises:
        ShapeError: If shapes don't fit, `positions` isn't boolean, or `spec.dims` > hidden.
        UnknownComponentError: If there is no such method.
    """
    method = CORRUPTIONS[spec.method]
    _check_shapes(embeddings, positions, spec, bank)
    result = np.array(embeddings, dtype=np.float32)
    if positions.any():
        marked = Marked(
            result[positions], _run_lengths(positions), Draws(seed), bank, result[~positions]
        )
        result[positions] = method(marked, spec)
    if frame is not None and spec.frame > 0:
        _blur(result, frame & ~positions, spec.frame, Draws(seed + b"/frame"))
    return result


def _blur(rows: FloatArray, around: BoolArray, strength: float, draws: Draws) -> None:
    """Add noise to all dimensions of some rows, in place; shapes (tokens, hidden), (tokens,)."""
    noise = draws.normal(int(around.sum()), rows.shape[1])
    rows[around] += noise * np.float32(strength)


def _check_shapes(
    embeddings: FloatArray, positions: BoolArray, spec: CorruptionSpec, bank: FloatArray | None
) -> None:
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ShapeError(
            f"embeddings have shape {embeddings.shape} and dtype {embeddings.dtype}; "
            "give floats of shape (tokens, hidden)"
        )
    if positions.dtype != np.bool_ or positions.shape != embeddings.shape[:1]:
        raise ShapeError(
            f"positions have shape {positions.shape} and dtype {positions.dtype}; "
            f"give booleans of shape {embeddings.shape[:1]}, one a token"
        )
    hidden = embeddings.shape[1]
    if spec.dims > hidden:
        raise ShapeError(f"corruption dims is {spec.dims}; this model's embeddings have {hidden}")
    if bank is not None and (bank.ndim != 2 or not bank.any() or bank.shape[1] != hidden):
        raise ShapeError(f"bank of shape {bank.shape} is all zeros or not (tokens, {hidden})")


def _run_lengths(positions: BoolArray) -> tuple[int, ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], positions, [False]]).astype(np.int8)))
    return tuple(int(length) for length in edges[1::2] - edges[::2])


def _largest(keys: FloatArray, count: int) -> IntArray:
    """Return the columns of the `count` largest keys of each row, ties by column.

    Shape (rows, count). Stable, so that equal values pick the same columns everywhere.
    """
    return np.argsort(-keys, axis=1, kind="stable")[:, :count]


def _add_at(rows: FloatArray, columns: IntArray, values: FloatArray | float) -> FloatArray:
    index = np.arange(len(rows))[:, None]
    rows[index, columns] += values
    return rows


def _noise(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Draw N(0, strength^2), shape (marked, dims)."""
    return marked.draws.normal(len(marked.rows), spec.dims) * np.float32(spec.strength)


# --- Noise: the identity at strength 0 -----------------------------------------------------------


@CORRUPTIONS.register("random-noise-first-n")
def random_noise_first_n(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Add noise to the first `dims` dimensions: ECO's setting for most of its experiments."""
    marked.rows[:, : spec.dims] += _noise(marked, spec)
    return marked.rows


@CORRUPTIONS.register("random-noise-random-n")
def random_noise_random_n(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Add noise to `dims` dimensions drawn once, the same for all marked tokens."""
    columns = marked.draws.permutation(marked.rows.shape[1])[: spec.dims]
    marked.rows[:, columns] += _noise(marked, spec)
    return marked.rows


@CORRUPTIONS.register("random-noise-top-k")
def random_noise_top_k(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Add noise to each token's `dims` dimensions of largest magnitude."""
    columns = _largest(np.abs(marked.rows), spec.dims)
    return _add_at(marked.rows, columns, _noise(marked, spec))


@CORRUPTIONS.register("set-noise")
def set_noise(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Replace the first `dims` dimensions by noise (by zeros at strength 0)."""
    marked.rows[:, : spec.dims] = _noise(marked, spec)
    return marked.rows


# --- Without a scale -----------------------------------------------------------------------------


@CORRUPTIONS.register("zero-out-first-n")
def zero_out_first_n(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Set the first `dims` dimensions to zero."""
    marked.rows[:, : spec.dims] = 0
    return marked.rows


@CORRUPTIONS.register("zero-out-top-k")
def zero_out_top_k(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Set each token's `dims` dimensions of largest magnitude to zero."""
    columns = _largest(np.abs(marked.rows), spec.dims)
    marked.rows[np.arange(len(marked.rows))[:, None], columns] = 0
    return marked.rows


@CORRUPTIONS.register("flip-sign-first-n")
def flip_sign_first_n(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Negate the first `dims` dimensions."""
    marked.rows[:, : spec.dims] *= -1
    return marked.rows


@CORRUPTIONS.register("flip-sign-top-k")
def flip_sign_top_k(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Negate each token's `dims` dimensions of largest magnitude."""
    columns = _largest(np.abs(marked.rows), spec.dims)
    marked.rows[np.arange(len(marked.rows))[:, None], columns] *= -1
    return marked.rows


@CORRUPTIONS.register("reverse-order")
def reverse_order(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Put the marked tokens into each other's places, last to first."""
    return marked.rows[::-1]


@CORRUPTIONS.register("shuffle")
def shuffle(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Put the marked tokens into each other's places, in random order."""
    return marked.rows[marked.draws.permutation(len(marked.rows))]


# --- Constant shifts: the identity at strength 0 -------------------------------------------------


@CORRUPTIONS.register("add-first-n")
def add_first_n(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Add `strength` to the first `dims` dimensions."""
    marked.rows[:, : spec.dims] += np.float32(spec.strength)
    return marked.rows


@CORRUPTIONS.register("subtract-first-n")
def subtract_first_n(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Subtract `strength` from the first `dims` dimensions."""
    marked.rows[:, : spec.dims] -= np.float32(spec.strength)
    return marked.rows


@CORRUPTIONS.register("subtract-top-k")
def subtract_top_k(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Subtract `strength` from each token's `dims` largest dimensions, by signed value."""
    return _add_at(marked.rows, _largest(marked.rows, spec.dims), -spec.strength)


@CORRUPTIONS.register("add-least-k")
def add_least_k(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Add `strength` to each token's `dims` smallest dimensions, by signed value."""
    return _add_at(marked.rows, _largest(-marked.rows, spec.dims), spec.strength)


# --- Our own -------------------------------------------------------------------------------------


@CORRUPTIONS.register("mix-generic")
def mix_generic(marked: Marked, spec: CorruptionSpec) -> FloatArray:
    """Move each marked token by an RMS distance of at most `strength` toward generic text.

    e' = e + min(1, strength / rms(b - e)) * (b - e), with b from the bank: the identity at
    strength 0, and from about 1.5 times the embeddings' RMS on the bank's tokens themselves.
    White noise leads off the manifold of real embeddings and makes a small model babble; a real
    token keeps it fluent, and the question's frame stays whole.

    A stretch of up to `LONGEST_NAME` marked tokens reads as one or two of the bank's names, built
    as people's names are (`_FORMS`); stretches that begin alike get the same. A longer one (a text
    that no entity was found in) gets the tokens of one of the bank's questions.

    Raises:
        ShapeError: If there is no bank.
    """
    if marked.bank is None:
        raise ShapeError("mix-generic needs a bank of embeddings of generic text; got none")
    goal = _generic_rows(marked, marked.bank.astype(np.float32, copy=False))
    way = goal - marked.rows
    length = np.sqrt(np.mean(np.square(way), axis=1, keepdims=True))
    with np.errstate(over="ignore"):  # a token that is there already, and a great strength
        share = np.minimum(1.0, spec.strength / np.maximum(length, np.finfo(np.float32).tiny))
    # At the bank's end of the way, the bank's own values: (e + (b - e)) rounds.
    moved: FloatArray = np.where(share < 1.0, marked.rows + way * share, goal).astype(np.float32)
    return moved


LONGEST_NAME: Final = 16
"""Tokens of the longest stretch that reads as a name: "Basil Mahfouz Al-Kuwaiti" has ten."""


_LAST_NAMES: Final = (0, 1, 1, 1, 2, 2, 2, 3)
"""Last names of a name of so many tokens, the rest before them first names: one person's. (Two
people joined by "and" loop less under greedy decoding, and are answered for in the plural:
docs/corruptions.md.)"""

_FIRST_STEP, _LAST_STEP = 7, 5
"""From one first or last name of a stretch to its next, in names: far enough for another one."""


def _generic_rows(marked: Marked, bank: FloatArray) -> FloatArray:
    """Return a row of the bank for each marked token, shape (marked, hidden)."""
    names, *others = _sections(bank)
    one_each = any(len(part) == 1 for part in others)
    texts = [part for part in others if len(part) > 1]
    starts: dict[bytes, int] = {}
    # A name that the text itself holds would be taken for the entity in the answer.
    near = np.isin(names[:, 0], marked.others[:, 0])
    taken = {row.tobytes() for row in names[near] if (marked.others == row).all(axis=1).any()}
    rows: list[FloatArray] = []
    place = 0
    for run, draw in zip(marked.runs, marked.draws.words(len(marked.runs)), strict=True):
        stretch = marked.rows[place : place + run]
        if texts and run > LONGEST_NAME:
            rows.append(_of_texts(texts, int(draw), run))
        else:
            known = starts.get(stretch[0].tobytes())
            start = int(draw) % max(1, len(names) // 2) if known is None else known
            # Two entities must not share a word: it could not be told whose it is in the answer.
            avoid = taken if known is None else frozenset[bytes]()
            start, name = _of_names(names, one_each, start, stretch, avoid)
            starts.setdefault(stretch[0].tobytes(), start)
            taken |= {row.tobytes() for row in name}
            rows.append(name)
        place += run
    return np.concatenate(rows)


def _sections(bank: FloatArray) -> list[FloatArray]:
    """Split the bank at its rows of zeros."""
    breaks = np.flatnonzero(~bank.any(axis=1))
    sections = np.split(bank, breaks)
    return [part for part in (sections[0], *(part[1:] for part in sections[1:])) if len(part)]


def _of_texts(texts: list[FloatArray], draw: int, count: int) -> FloatArray:
    """Return `count` rows: one text from its start, cut off, or followed by the next ones."""
    start = draw % len(texts)
    found: list[FloatArray] = []
    while sum(map(len, found)) < count:
        found.append(texts[(start + len(found)) % len(texts)])
    return np.concatenate(found)[:count]


def _of_names(
    names: FloatArray, one_each: bool, start: int, stretch: FloatArray, taken: Set[bytes]
) -> tuple[int, FloatArray]:
    """Return a name for the stretch and where it begins in the bank.

    Another one while it has a token where the stretch has it, or one that is taken; where all are,
    the last one tried.
    """
    pairs = max(1, len(names) // 2)
    for skip in range(pairs):
        place = (start + skip) % pairs
        rows = _name(names, one_each, place, len(stretch))
        free = taken.isdisjoint(row.tobytes() for row in rows)
        if free and not (rows == stretch).all(axis=1).any():
            break
    return place, rows


def _name(names: FloatArray, one_each: bool, start: int, count: int) -> FloatArray:
    """Build the name of `count` tokens that begins with the names' pair `start`."""
    if not one_each:
        return np.asarray(names[(2 * start + np.arange(count)) % len(names)], np.float32)
    pairs = max(1, len(names) // 2)
    last = _LAST_NAMES[min(count, len(_LAST_NAMES) - 1)]
    first = np.arange(count - last)
    rows = np.concatenate(
        [
            2 * ((start + _FIRST_STEP * first) % pairs),
            2 * ((start + _LAST_STEP * np.arange(last)) % pairs) + 1,
        ]
    )
    return np.asarray(names[np.minimum(rows, len(names) - 1)], np.float32)
