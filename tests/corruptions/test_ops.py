"""Properties of every corruption method, and of what each one promises."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corruptions.ops import CORRUPTIONS, CorruptionSpec, corrupt
from corruptions.seeding import Draws
from guard.errors import ConfigError, ShapeError, UnknownComponentError
from guard.types import BoolArray, FloatArray

NOISE = ("random-noise-first-n", "random-noise-random-n", "random-noise-top-k")
IDENTITY_AT_ZERO = (
    *NOISE,
    "add-first-n",
    "subtract-first-n",
    "subtract-top-k",
    "add-least-k",
    "mix-generic",
)
RANDOM = (*NOISE, "set-noise", "shuffle", "mix-generic")
ECO = (
    *NOISE,
    "set-noise",
    "zero-out-first-n",
    "zero-out-top-k",
    "flip-sign-first-n",
    "flip-sign-top-k",
    "add-first-n",
    "subtract-first-n",
    "subtract-top-k",
    "add-least-k",
    "reverse-order",
    "shuffle",
)
HIDDEN = 12


def bank() -> FloatArray:
    """Six names of one token each, then two texts of nine tokens."""
    rows = np.random.default_rng(7).normal(size=(12 + 2 * 9, HIDDEN)).astype(np.float32)
    gap = np.zeros((1, HIDDEN), np.float32)
    return np.concatenate([rows[:12], gap, rows[12:21], gap, rows[21:]])


def world(tokens: int, seed: int = 0) -> tuple[FloatArray, BoolArray]:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
    return embeddings, rng.random(tokens) < 0.5


def spec(method: str, dims: int = 4, strength: float = 2.0) -> CorruptionSpec:
    return CorruptionSpec(method, dims, strength)


def test_the_registry_holds_ecos_fourteen_methods_and_ours() -> None:
    assert set(CORRUPTIONS) == {*ECO, "mix-generic"}
    assert len(ECO) == 14


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(sorted(CORRUPTIONS)),
    tokens=st.integers(0, 25),
    dims=st.integers(1, HIDDEN),
    strength=st.floats(0, 1e6),
    seed=st.binary(max_size=8),
    data=st.data(),
)
def test_every_method_touches_marked_tokens_alone(
    method: str, tokens: int, dims: int, strength: float, seed: bytes, data: st.DataObject
) -> None:
    embeddings = np.random.default_rng(tokens).normal(size=(tokens, HIDDEN)).astype(np.float32)
    mask = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    positions = np.array(mask, dtype=np.bool_)
    before = embeddings.tobytes(), positions.tobytes()

    first = corrupt(embeddings, positions, spec(method, dims, strength), seed, bank())
    again = corrupt(embeddings, positions, spec(method, dims, strength), seed, bank())

    assert (embeddings.tobytes(), positions.tobytes()) == before
    assert first is not embeddings
    assert first.shape == embeddings.shape
    assert first.dtype == np.float32
    assert first[~positions].tobytes() == embeddings[~positions].tobytes()
    assert first.tobytes() == again.tobytes()
    assert np.isfinite(first).all()


@pytest.mark.parametrize("method", IDENTITY_AT_ZERO)
def test_strength_zero_is_the_identity(method: str) -> None:
    embeddings, positions = world(20)
    result = corrupt(embeddings, positions, spec(method, strength=0.0), b"s", bank())
    np.testing.assert_array_equal(result, embeddings)


@pytest.mark.parametrize("method", sorted(CORRUPTIONS))
def test_nothing_marked_is_the_identity(method: str) -> None:
    embeddings, _ = world(9)
    result = corrupt(embeddings, np.zeros(9, np.bool_), spec(method), b"s", bank())
    assert result.tobytes() == embeddings.tobytes()


@pytest.mark.parametrize("method", sorted(CORRUPTIONS))
def test_every_method_has_an_effect(method: str) -> None:
    embeddings, _ = world(9)
    result = corrupt(embeddings, np.ones(9, np.bool_), spec(method), b"s", bank())
    assert not np.array_equal(result, embeddings)


@pytest.mark.parametrize("method", RANDOM)
def test_another_seed_gives_another_result(method: str) -> None:
    embeddings, _ = world(9)
    marked = np.ones(9, np.bool_)
    results = {
        corrupt(embeddings, marked, spec(method), bytes([s]), bank()).tobytes() for s in b"abcdefgh"
    }
    assert len(results) > 1


@pytest.mark.parametrize("method", sorted(set(CORRUPTIONS) - set(RANDOM)))
def test_methods_without_randomness_ignore_the_seed(method: str) -> None:
    embeddings, positions = world(9)
    one, two = (corrupt(embeddings, positions, spec(method), s, bank()) for s in (b"a", b"b"))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("method", [*NOISE, "set-noise"])
@pytest.mark.parametrize("strength", [0.05, 3.0, 1e5])
def test_the_noise_has_mean_0_and_the_asked_standard_deviation(
    method: str, strength: float
) -> None:
    embeddings = np.zeros((4000, HIDDEN), np.float32)
    result = corrupt(embeddings, np.ones(4000, np.bool_), spec(method, HIDDEN, strength), b"s")
    assert np.std(result) == pytest.approx(strength, rel=0.02)
    assert abs(np.mean(result)) < 0.02 * strength


def test_noise_goes_to_as_many_dimensions_as_asked() -> None:
    embeddings, _ = world(9)
    everything = np.ones(9, np.bool_)
    for method in NOISE:
        changed = corrupt(embeddings, everything, spec(method, 4), b"s") != embeddings
        assert (changed.sum(axis=1) == 4).all(), method
    first = corrupt(embeddings, everything, spec("random-noise-first-n", 4), b"s")
    np.testing.assert_array_equal(first[:, 4:], embeddings[:, 4:])
    drawn = corrupt(embeddings, everything, spec("random-noise-random-n", 4), b"s") != embeddings
    assert (drawn == drawn[0]).all()


ROW = np.array([[0.5, -3.0, 2.0, -0.1, 1.0]], np.float32)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zero-out-first-n", [0.0, 0.0, 2.0, -0.1, 1.0]),
        ("zero-out-top-k", [0.5, 0.0, 0.0, -0.1, 1.0]),  # largest by magnitude
        ("flip-sign-first-n", [-0.5, 3.0, 2.0, -0.1, 1.0]),
        ("flip-sign-top-k", [0.5, 3.0, -2.0, -0.1, 1.0]),  # largest by magnitude
        ("add-first-n", [10.5, 7.0, 2.0, -0.1, 1.0]),
        ("subtract-first-n", [-9.5, -13.0, 2.0, -0.1, 1.0]),
        ("subtract-top-k", [0.5, -3.0, -8.0, -0.1, -9.0]),  # largest by signed value
        ("add-least-k", [0.5, 7.0, 2.0, 9.9, 1.0]),  # smallest by signed value
    ],
)
def test_each_method_does_what_its_name_says(method: str, expected: list[float]) -> None:
    result = corrupt(ROW, np.ones(1, np.bool_), spec(method, 2, 10.0), b"s")
    np.testing.assert_allclose(result, [expected], rtol=1e-6)


def test_noise_on_the_top_k_picks_by_magnitude() -> None:
    result = corrupt(ROW, np.ones(1, np.bool_), spec("random-noise-top-k", 2), b"s")
    assert (result != ROW).tolist() == [[False, True, True, False, False]]


def test_reverse_and_shuffle_move_marked_tokens_among_themselves() -> None:
    embeddings, positions = world(20)
    reverse = corrupt(embeddings, positions, spec("reverse-order"), b"s")
    np.testing.assert_array_equal(reverse[positions], embeddings[positions][::-1])
    shuffled = corrupt(embeddings, positions, spec("shuffle"), b"s")
    assert sorted(map(bytes, shuffled[positions])) == sorted(map(bytes, embeddings[positions]))


# --- mix-generic ---------------------------------------------------------------------------------


def test_mix_generic_moves_by_the_asked_distance_and_then_stands_on_the_bank() -> None:
    embeddings, positions = world(20)
    near = corrupt(embeddings, positions, spec("mix-generic", strength=0.1), b"s", bank())
    moved = np.sqrt(np.mean(np.square(near - embeddings), axis=1))
    np.testing.assert_allclose(moved[positions], 0.1, rtol=1e-4)
    far = corrupt(embeddings, positions, spec("mix-generic", strength=1e6), b"s", bank())
    rows = {row.tobytes() for row in bank()}
    assert all(row.tobytes() in rows for row in far[positions])


def test_mix_generic_reads_a_first_name_where_a_stretch_begins_and_repeats_itself() -> None:
    embeddings, _ = world(7)
    embeddings[5] = embeddings[1]
    positions = np.array([False, True, True, False, False, True, False])
    names = [row.tobytes() for row in bank()[:12]]
    for seed in range(20):
        far = corrupt(
            embeddings, positions, spec("mix-generic", strength=1e6), b"%d" % seed, bank()
        )
        first = names.index(far[1].tobytes())
        assert first % 2 == 0
        assert names.index(far[2].tobytes()) == first + 1
        assert far[5].tobytes() == far[1].tobytes()


def test_mix_generic_reads_a_text_from_its_start_in_place_of_a_long_stretch() -> None:
    embeddings, _ = world(18)
    positions = np.ones(18, np.bool_)
    texts = bank()[13:22], bank()[23:32]
    far = corrupt(embeddings, positions, spec("mix-generic", strength=1e6), b"s", bank())
    orders = [np.concatenate(pair)[:18].tobytes() for pair in (texts, texts[::-1])]
    assert far.tobytes() in orders


def test_mix_generic_never_puts_a_token_in_its_own_place() -> None:
    names = bank()[:12]
    for seed in range(30):
        far = corrupt(names[4:5], np.ones(1, np.bool_), spec("mix-generic"), b"%d" % seed, names)
        assert far.tobytes() != names[4:5].tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        np.zeros((0, HIDDEN), np.float32),
        np.ones((3, 5), np.float32),
        np.zeros((3, HIDDEN), np.float32),
    ],
)
def test_mix_generic_needs_a_bank_that_fits(wrong: FloatArray | None) -> None:
    embeddings, _ = world(4)
    with pytest.raises(ShapeError, match="bank"):
        corrupt(embeddings, np.ones(4, np.bool_), spec("mix-generic"), b"s", wrong)


# --- Errors and values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embeddings", "positions", "message"),
    [
        (np.zeros((2, 3, 4), np.float32), np.zeros(2, np.bool_), "embeddings"),
        (np.zeros((2, 4), np.int64), np.zeros(2, np.bool_), "embeddings"),
        (np.zeros((2, 4), np.float32), np.zeros(3, np.bool_), "positions"),
        (np.zeros((2, 4), np.float32), np.zeros((2, 1), np.bool_), "positions"),
        (np.zeros((2, 4), np.float32), np.zeros(2, np.int64), "positions"),
        (np.zeros((2, 3), np.float32), np.zeros(2, np.bool_), "dims"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    embeddings: FloatArray, positions: BoolArray, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        corrupt(embeddings, positions, spec("zero-out-first-n", 4), b"s")


def test_half_precision_comes_back_as_float32() -> None:
    result = corrupt(np.ones((2, 4), np.float16), np.ones(2, np.bool_), spec("shuffle"), b"s")
    assert result.dtype == np.float32


@pytest.mark.parametrize(
    ("tokens", "form"),
    [(1, "l"), (2, "fl"), (3, "ffl"), (4, "ffll"), (5, "fffll"), (6, "ffffll"), (8, "ffffflll")],
)
def test_mix_generic_builds_names_as_peoples_names_are(tokens: int, form: str) -> None:
    gap = np.zeros((1, HIDDEN), np.float32)
    names, joint = bank()[:12], np.full((1, HIDDEN), 9.0, np.float32)
    kinds = {row.tobytes(): "fl"[index % 2] for index, row in enumerate(names)}
    marked = np.full((tokens, HIDDEN), 0.5, np.float32)
    far = corrupt(
        marked,
        np.ones(tokens, np.bool_),
        spec("mix-generic", strength=1e6),
        b"seed",
        np.concatenate([names, gap, joint]),
    )
    assert "".join(kinds[row.tobytes()] for row in far) == form


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownComponentError, match="zero-out-top-k"):
        corrupt(np.ones((2, 4), np.float32), np.ones(2, np.bool_), spec("zero-out-topk"), b"s")


def test_a_spec_survives_its_dict() -> None:
    one = CorruptionSpec("random-noise-first-n", 1, 13.5, "all-but-last")
    assert CorruptionSpec.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    "change",
    [
        {"method": ""},
        {"method": 3},
        {"dims": 0},
        {"dims": 1.5},
        {"dims": True},
        {"strength": -0.1},
        {"strength": float("nan")},
        {"strength": float("inf")},
        {"strength": "1"},
        {"span_policy": "everything"},
        {"extra": 1},
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    values = {**CorruptionSpec("shuffle", 1, 1.0).to_dict(), **change}
    with pytest.raises(ConfigError):
        CorruptionSpec.from_dict(values)


def test_a_spec_without_a_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="dims"):
        CorruptionSpec.from_dict({"method": "shuffle", "strength": 1.0, "span_policy": "entity"})


# --- Draws ---------------------------------------------------------------------------------------


def test_draws_stay_the_same_for_ever() -> None:
    """A bundle's answers must not change with numpy: golden words and normals of one seed."""
    words = hashlib.sha256(Draws(b"unlearn-guard").words(64).astype("<u8").tobytes()).hexdigest()
    assert words == GOLDEN_WORDS
    np.testing.assert_allclose(Draws(b"unlearn-guard").normal(1, 4)[0], GOLDEN_NORMALS, rtol=1e-5)


GOLDEN_WORDS = "c56c2cf6d0fbdd6adf3355dad00b40a1f6a595c8c44918fd8bd622fa235b51ad"
GOLDEN_NORMALS = [0.289514, -1.098679, -1.528565, -0.239673]


@given(count=st.integers(0, 50), seed=st.binary(max_size=4))
def test_a_permutation_holds_every_number_once(count: int, seed: bytes) -> None:
    assert sorted(Draws(seed).permutation(count)) == list(range(count))


def test_the_frame_is_blurred_beside_marked_tokens_alone() -> None:
    rows = np.ones((6, HIDDEN), np.float32)
    marked = np.array([False, True, False, False, False, False])
    frame = np.array([True, True, True, False, False, True])
    blurred = CorruptionSpec("zero-out-first-n", HIDDEN, 0.0, frame=0.5)
    result = corrupt(rows, marked, blurred, b"seed", frame=frame)
    assert (result[1] == 0).all()
    assert (result[[3, 4]] == rows[[3, 4]]).all()
    moved = result[[0, 2, 5]] - 1
    assert (moved != 0).all() and 0.2 < moved.std() < 0.8
    assert (corrupt(rows, marked, blurred, b"seed", frame=frame) == result).all()
    assert (corrupt(rows, marked, blurred, b"other", frame=frame) != result).any()
    still = CorruptionSpec("zero-out-first-n", HIDDEN, 0.0)
    assert (corrupt(rows, marked, still, b"seed", frame=frame)[~marked] == 1).all()


def test_a_spec_of_before_frames_is_read() -> None:
    old = {"method": "shuffle", "dims": 1, "strength": 0.0, "span_policy": "entity"}
    assert CorruptionSpec.from_dict(old).frame == 0.0
    with pytest.raises(ConfigError, match="frame"):
        CorruptionSpec.from_dict({**old, "frame": -1.0})


def test_names_of_one_text_share_no_word() -> None:
    embeddings, _ = world(11)
    positions = np.array([True, True, False, True, True, True, False, True, True, False, False])
    for seed in range(30):
        far = corrupt(
            embeddings, positions, spec("mix-generic", strength=1e6), b"%d" % seed, bank()
        )
        words = [row.tobytes() for row in far[positions]]
        assert len(set(words)) == len(words)


def test_a_name_that_the_text_holds_is_not_given_to_the_entity() -> None:
    embeddings, _ = world(5)
    positions = np.array([True, True, False, False, False])
    names = bank()[:12]
    for seed in range(20):
        free = corrupt(
            embeddings, positions, spec("mix-generic", strength=1e6), b"%d" % seed, bank()
        )
        held = embeddings.copy()
        held[3] = free[0]
        far = corrupt(held, positions, spec("mix-generic", strength=1e6), b"%d" % seed, bank())
        assert far[0].tobytes() != free[0].tobytes()
        assert far[0].tobytes() in {row.tobytes() for row in names}
