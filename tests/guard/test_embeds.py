"""The embeds archive against torch itself: what torch writes and reads, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.embeds import (
    best_dtype,
    decode_embeds,
    decode_embeds_part,
    embeds_part,
    encode_embeds,
    round_bfloat16,
    widen_bfloat16,
)
from guard.errors import RequestError, ShapeError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LIMIT = 10_000_000


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def sample(rows: int, hidden: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, hidden)) * scale
    return values.astype(np.float32)


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy().tobytes()
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    hidden=st.integers(1, 600),
    dtype=st.sampled_from(sorted(DTYPES)),
    power=st.integers(-6, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_torch_reads_what_is_written_bit_for_bit(
    rows: int, hidden: int, dtype: Any, power: int, seed: int
) -> None:
    array = sample(rows, hidden, 10.0**power, seed)
    expected = torch.from_numpy(array).to(DTYPES[dtype])
    loaded = torch.load(io.BytesIO(encode_embeds(array, dtype)), weights_only=True)
    assert loaded.dtype == DTYPES[dtype]
    assert loaded.shape == (rows, hidden)
    assert loaded.is_contiguous()
    assert bits(loaded) == bits(expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    hidden=st.integers(1, 600),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_torch_writes_is_read_bit_for_bit(
    rows: int, hidden: int, dtype: str, seed: int
) -> None:
    tensor = torch.from_numpy(sample(rows, hidden, 3.0, seed)).to(DTYPES[dtype])
    values = decode_embeds(torch_bytes(tensor), LIMIT)
    assert values.dtype == np.float32
    assert values.tobytes() == tensor.float().numpy().tobytes()


@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (255, 1), (256, 2), (300, 576), (70000, 2)])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_pickle_is_torchs_own(rows: int, hidden: int, dtype: Any) -> None:
    array = sample(rows, hidden)
    ours = zipfile.ZipFile(io.BytesIO(encode_embeds(array, dtype)))
    theirs = zipfile.ZipFile(io.BytesIO(torch_bytes(torch.from_numpy(array).to(DTYPES[dtype]))))
    for name in ("archive/data.pkl", "archive/data/0", "archive/byteorder", "archive/version"):
        assert ours.read(name) == theirs.read(name)


def test_data_is_aligned_as_torch_aligns_it() -> None:
    data = encode_embeds(sample(5, 7), "float16")
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        name, extra = (
            int.from_bytes(data[info.header_offset + at : info.header_offset + at + 2], "little")
            for at in (26, 28)
        )
        assert (info.header_offset + 30 + name + extra) % 64 == 0


def test_the_same_array_gives_the_same_bytes() -> None:
    assert encode_embeds(sample(3, 4)) == encode_embeds(sample(3, 4))


def test_a_strided_array_is_written_in_row_order() -> None:
    array = sample(8, 6)[::2, ::-1]
    loaded = torch.load(io.BytesIO(encode_embeds(array)), weights_only=True)
    assert np.array_equal(loaded.numpy(), array)


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_rounds_as_torch_rounds(value: float) -> None:
    array = np.array([value], dtype=np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert round_bfloat16(array) == expected
    assert np.array_equal(
        widen_bfloat16(expected), torch.from_numpy(array).bfloat16().float().numpy()
    )


def test_part_is_base64_of_the_archive_and_comes_back() -> None:
    array = sample(4, 9)
    assert np.array_equal(decode_embeds_part(embeds_part(array), LIMIT), array)


# --- Range ---------------------------------------------------------------------------------------


def test_a_value_beyond_float16_is_refused_and_float32_chosen() -> None:
    array = np.array([[1.0, 65520.0]], dtype=np.float32)
    with pytest.raises(ShapeError, match="65520 does not fit float16"):
        encode_embeds(array, "float16")
    assert best_dtype(array, "float16") == "float32"
    assert best_dtype(array, "bfloat16") == "bfloat16"


def test_the_largest_float16_fits() -> None:
    array = np.array([[65504.0, -65519.0]], dtype=np.float32)
    assert best_dtype(array, "float16") == "float16"
    assert np.array_equal(decode_embeds(encode_embeds(array, "float16"), LIMIT), [[65504, -65504]])


def test_the_largest_float32_overflows_bfloat16() -> None:
    array = np.full((1, 1), np.finfo(np.float32).max)
    assert best_dtype(array, "bfloat16") == "float32"
    with pytest.raises(ShapeError, match="bfloat16"):
        encode_embeds(array, "bfloat16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_both_ways(bad: float) -> None:
    array = np.array([[0.0, bad]], dtype=np.float32)
    with pytest.raises(ShapeError, match="finite"):
        encode_embeds(array)
    with pytest.raises(RequestError, match="NaN or infinite"):
        decode_embeds(torch_bytes(torch.from_numpy(array)), LIMIT)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (0, 4), (4, 0), ()])
def test_other_shapes_are_refused_both_ways(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\(tokens, hidden\)"):
        encode_embeds(np.zeros(shape, dtype=np.float32))
    with pytest.raises(RequestError):
        decode_embeds(torch_bytes(torch.zeros(shape)), LIMIT)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ShapeError, match="int8"):
        encode_embeds(sample(1, 1), "int8")  # type: ignore[arg-type]


# --- What the reader refuses ---------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def repacked(data: bytes, **changes: bytes | None) -> bytes:
    """Return the archive with files replaced (None removes), dots as double underscores."""
    source = zipfile.ZipFile(io.BytesIO(data))
    files = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    for key, value in changes.items():
        name = key.replace("__", ".").replace("_slash_", "/")
        files.pop(name, None)
        if value is not None:
            files[name] = value
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


REFUSED: dict[str, Any] = {
    "integers": lambda: torch_bytes(torch.ones(2, 3, dtype=torch.int64)),
    "float64": lambda: torch_bytes(torch.ones(2, 3, dtype=torch.float64)),
    "complex": lambda: torch_bytes(torch.ones(2, 3, dtype=torch.complex64)),
    "transposed": lambda: torch_bytes(torch.ones(3, 2).t()),
    "slice of a larger storage": lambda: torch_bytes(torch.ones(9, 2)[3:5]),
    "expanded": lambda: torch_bytes(torch.ones(1, 3).expand(5000, 3)),
    "sparse": lambda: torch_bytes(torch.eye(3).to_sparse()),
    "parameter": lambda: torch_bytes(torch.nn.Parameter(torch.ones(2, 3))),
    "requires grad": lambda: torch_bytes(torch.ones(2, 3, requires_grad=True)),
    "dictionary": lambda: torch_bytes({"x": torch.ones(2, 3)}),
    "two tensors": lambda: torch_bytes([torch.ones(2, 3), torch.ones(2, 3)]),
    "object": lambda: torch_bytes(Malicious()),
    "bare pickle": lambda: pickle.dumps(Malicious()),
    "malicious pickle in the archive": lambda: repacked(
        encode_embeds(sample(2, 3)), data__pkl=pickle.dumps(Malicious(), protocol=2)
    ),
    "pickle with a suffix": lambda: repacked(
        encode_embeds(sample(2, 3)),
        data__pkl=zipfile.ZipFile(io.BytesIO(encode_embeds(sample(2, 3)))).read("archive/data.pkl")
        + b"I1\n.",
    ),
    "storage too short": lambda: repacked(encode_embeds(sample(2, 3)), data_slash_0=b"\0" * 20),
    "storage too long": lambda: repacked(encode_embeds(sample(2, 3)), data_slash_0=b"\0" * 28),
    "no storage": lambda: repacked(encode_embeds(sample(2, 3)), data_slash_0=None),
    "no version": lambda: repacked(encode_embeds(sample(2, 3)), version=None),
    "unknown version": lambda: repacked(encode_embeds(sample(2, 3)), version=b"9\n"),
    "big endian": lambda: repacked(encode_embeds(sample(2, 3)), byteorder=b"big"),
    "extra file": lambda: repacked(encode_embeds(sample(2, 3)), code_slash_x=b"1"),
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "legacy torch format": lambda: _legacy(),
}


def _legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.ones(2, 3), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_anything_but_one_plain_tensor_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="prompt_embeds cannot be read") as caught:
        decode_embeds(REFUSED[name](), LIMIT)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_prompt_embeds"


def test_a_zip_bomb_is_refused_without_inflating_it() -> None:
    source = zipfile.ZipFile(io.BytesIO(encode_embeds(sample(2, 3))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            content = bytes(200_000_000) if name.endswith("data/0") else source.read(name)
            archive.writestr(name, content)
    assert len(buffer.getvalue()) < 1_000_000
    with pytest.raises(RequestError, match="compressed"):
        decode_embeds(buffer.getvalue(), LIMIT)


def test_an_archive_over_the_limit_is_refused() -> None:
    data = encode_embeds(sample(10, 10))
    assert decode_embeds(data, len(data)).shape == (10, 10)
    with pytest.raises(RequestError, match="at most"):
        decode_embeds(data, len(data) - 1)
    with pytest.raises(RequestError, match="more than"):
        decode_embeds_part(embeds_part(sample(100, 100)), 1000)


@pytest.mark.parametrize("text", ["%%%", "abc", "äö", "QUJD\nQUJD"])
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="prompt_embeds cannot be read"):
        decode_embeds_part(text, LIMIT)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_archives_are_read_exactly_or_refused(data: st.DataObject) -> None:
    array = sample(3, 4)
    source = (
        encode_embeds(array, "float32")
        if data.draw(st.booleans())
        else torch_bytes(torch.from_numpy(array))
    )
    damaged = bytearray(source)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    for candidate in (bytes(damaged), cut):
        try:
            values = decode_embeds(candidate, LIMIT)
        except RequestError:
            continue
        # The checksum guards the values; only padding and names may differ.
        assert np.array_equal(values, array)
