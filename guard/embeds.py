"""Prompt embeddings on the wire: torch's zip archive of one tensor, without torch.

vLLM takes prompt embeddings as base64 of `torch.save(tensor)`. This module writes that archive and
reads it back. The reader never unpickles: it compares the pickle with the one byte sequence that
torch writes for a plain contiguous CPU tensor, and refuses everything else.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError, ShapeError
from guard.types import FloatArray

EmbedsDtype = Literal["float32", "float16", "bfloat16"]

_STORAGE: Final[dict[str, str]] = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}
_ITEM_SIZE: Final[dict[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}
_ROOT: Final = "archive"
_ALIGNMENT: Final = 64
_LOCAL_HEADER: Final = 30
_MAX_ROWS: Final = 2**31 - 1

# One tensor pickled by torch (protocol 2), cut where dtype, sizes and strides stand.
_PICKLE_HEAD: Final = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storageq\x01ctorch\n"
)
_PICKLE_KEY: Final = b"\nq\x02X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04"
_PICKLE_OFFSET: Final = b"tq\x05QK\x00"
_PICKLE_SIZE_END: Final = b"\x86q\x06"
_PICKLE_TAIL: Final = b"K\x01\x86q\x07\x89ccollections\nOrderedDict\nq\x08)Rq\ttq\nRq\x0b."

_INT: Final = rb"(K.|M..|J....)"
_PICKLE: Final = re.compile(
    re.escape(_PICKLE_HEAD)
    + rb"(FloatStorage|HalfStorage|BFloat16Storage)"
    + re.escape(_PICKLE_KEY)
    + _INT
    + re.escape(_PICKLE_OFFSET)
    + _INT
    + _INT
    + re.escape(_PICKLE_SIZE_END)
    + _INT
    + re.escape(_PICKLE_TAIL),
    re.DOTALL,
)
_REQUIRED_FILES: Final = frozenset({"data.pkl", "data/0", "version"})
_ALLOWED_FILES: Final = _REQUIRED_FILES | {
    "byteorder",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
}
_MAX_SMALL_FILE: Final = 1024
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


# --- Number formats ------------------------------------------------------------------------------


def round_bfloat16(array: FloatArray) -> NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, to nearest, ties to even.

    Args:
        array: Any shape, finite.

    Returns:
        The upper 16 bits of each value, same shape; values beyond bfloat16's range become inf.
    """
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    # Adding 0x7fff and the lowest kept bit carries exactly where nearest-even rounds up.
    # Finite values leave room for it in 32 bits.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def widen_bfloat16(bits: NDArray[np.uint16]) -> FloatArray:
    """Return bfloat16 bit patterns as float32, exactly; same shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_wire(array: FloatArray, dtype: str) -> NDArray[Any] | None:
    """Convert to the little-endian wire format, or None if a value does not fit `dtype`."""
    if dtype == "bfloat16":
        bits = round_bfloat16(array)
        return bits.astype("<u2") if np.isfinite(widen_bfloat16(bits)).all() else None
    with np.errstate(over="ignore", under="ignore"):
        wire = array.astype("<f2" if dtype == "float16" else "<f4")
    return wire if np.isfinite(wire).all() else None


def best_dtype(array: FloatArray, table_dtype: EmbedsDtype) -> EmbedsDtype:
    """Return the dtype to send: the table's own, or float32 where a value does not fit it.

    Rows of the table come through unchanged in the table's own dtype. float16 ends at 65504,
    which strong corruption exceeds.

    Args:
        array: Embeddings, shape (tokens, hidden).
        table_dtype: The dtype of the model's embedding table.
    """
    if table_dtype == "float32" or _to_wire(array, table_dtype) is not None:
        return table_dtype
    return "float32"


# --- Writing -------------------------------------------------------------------------------------


def encode_embeds(array: FloatArray, dtype: EmbedsDtype = "float32") -> bytes:
    """Write embeddings as `torch.save` would write the tensor.

    The same array always gives the same bytes.

    Args:
        array: Embeddings, shape (tokens, hidden), at least one of each, finite.
        dtype: The tensor's dtype; values are rounded to nearest even.

    Returns:
        The archive; `torch.load(..., weights_only=True)` reads it.

    Raises:
        ShapeError: Not two-dimensional, empty, not finite, or a value does not fit `dtype`.
    """
    if dtype not in get_args(EmbedsDtype):
        raise ShapeError(f"dtype {dtype!r} cannot be sent (allowed: {', '.join(_STORAGE)})")
    wire = _to_wire(_checked(array), dtype)
    if wire is None:
        largest = float(np.abs(array).max())
        raise ShapeError(
            f"a value of magnitude {largest:.6g} does not fit {dtype}; send float32 "
            "(guard.embeds.best_dtype chooses)"
        )
    rows, hidden = wire.shape
    files = {
        "data.pkl": _pickle(dtype, rows, hidden),
        "byteorder": b"little",
        "data/0": wire.tobytes(),
        "version": b"3\n",
    }
    return _zip(files)


def embeds_part(array: FloatArray, dtype: EmbedsDtype = "float32") -> str:
    """Return `encode_embeds(array, dtype)` as base64: the `data` of a `prompt_embeds` part."""
    return base64.b64encode(encode_embeds(array, dtype)).decode("ascii")


def _checked(array: FloatArray) -> FloatArray:
    values = np.asarray(array, dtype=np.float32)
    if values.ndim != 2 or 0 in values.shape or max(values.shape) > _MAX_ROWS:
        raise ShapeError(f"embeddings must have shape (tokens, hidden); got {values.shape}")
    if not np.isfinite(values).all():
        raise ShapeError("embeddings hold NaN or infinite values; only finite ones can be sent")
    return values


def _pickle(dtype: str, rows: int, hidden: int) -> bytes:
    return b"".join(
        (
            _PICKLE_HEAD,
            _STORAGE[dtype].encode("ascii"),
            _PICKLE_KEY,
            _pickle_int(rows * hidden),
            _PICKLE_OFFSET,
            _pickle_int(rows),
            _pickle_int(hidden),
            _PICKLE_SIZE_END,
            _pickle_int(hidden),
            _PICKLE_TAIL,
        )
    )


def _pickle_int(value: int) -> bytes:
    if value < 2**8:
        return b"K" + struct.pack("<B", value)
    if value < 2**16:
        return b"M" + struct.pack("<H", value)
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raise ShapeError(f"embeddings with {value} values are too large (fewer than 2**31 allowed)")


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.extra = _padding(buffer.tell(), len(info.filename))
            archive.writestr(info, data)
    return buffer.getvalue()


def _padding(offset: int, name_length: int) -> bytes:
    """Return an extra field that puts the file's data at a multiple of torch's alignment."""
    used = offset + _LOCAL_HEADER + name_length + 4
    length = -used % _ALIGNMENT
    return b"FB" + struct.pack("<H", length) + b"Z" * length


# --- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    dtype: str
    rows: int
    hidden: int


def decode_embeds(data: bytes, max_bytes: int) -> FloatArray:
    """Read embeddings that `torch.save` or `encode_embeds` wrote, without unpickling.

    Args:
        data: The archive.
        max_bytes: Largest archive that is read.

    Returns:
        The values as float32, shape (tokens, hidden).

    Raises:
        RequestError: Anything but one plain, contiguous, finite, two-dimensional float32, float16
            or bfloat16 CPU tensor that owns its whole storage.
    """
    if len(data) > max_bytes:
        raise _refused(f"the archive has {len(data)} bytes; at most {max_bytes} are read")
    files = _read_files(data)
    if files["version"].strip() not in (b"3", b"2"):
        raise _refused("the archive's version is not 2 or 3")
    if files.get("byteorder", b"little") != b"little":
        raise _refused("the tensor is not little-endian")
    layout = _read_layout(files["data.pkl"])
    return _read_values(files["data/0"], layout)


def decode_embeds_part(text: str, max_bytes: int) -> FloatArray:
    """Read the base64 `data` of a `prompt_embeds` part; see `decode_embeds`.

    Raises:
        RequestError: Not base64, or not such an archive.
    """
    if len(text) > 4 * (max_bytes // 3 + 1):
        raise _refused(f"the part has {len(text)} characters, more than {max_bytes} bytes need")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"the part is not base64 ({error})") from error
    return decode_embeds(data, max_bytes)


def _refused(reason: str) -> RequestError:
    return RequestError(
        f"prompt_embeds cannot be read: {reason}. Send base64 of torch.save(tensor) of one "
        "contiguous float32, float16 or bfloat16 CPU tensor of shape (tokens, hidden).",
        code="invalid_prompt_embeds",
        param="prompt_embeds",
    )


def _read_files(data: bytes) -> dict[str, bytes]:
    """Return the archive's files by name without the root folder; all of them stored."""
    if not data.startswith(b"PK\x03\x04"):
        raise _refused("it is not a zip archive")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = _checked_names(archive.infolist(), len(data))
            return {name: archive.read(info) for name, info in names.items()}
    except _ZIP_ERRORS as error:
        if isinstance(error, RequestError):
            raise
        raise _refused(f"the zip archive is damaged ({type(error).__name__})") from error


def _checked_names(infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    names: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for info in infos:
        root, _, name = info.filename.partition("/")
        roots.add(root)
        if name not in _ALLOWED_FILES or name in names:
            raise _refused(f"the archive holds an unexpected file {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _refused("the archive is compressed; torch stores tensors uncompressed")
        if info.file_size > (size if name == "data/0" else _MAX_SMALL_FILE):
            raise _refused("a file in the archive is larger than it can be")
        names[name] = info
    if len(roots) != 1 or not names.keys() >= _REQUIRED_FILES:
        raise _refused("the archive does not hold exactly one tensor")
    return names


def _read_layout(pickle: bytes) -> _Layout:
    match = _PICKLE.fullmatch(pickle)
    if match is None:
        raise _refused("the archive holds something else than one plain tensor")
    storage, *encoded = match.groups()
    dtype = next(name for name, kind in _STORAGE.items() if kind.encode() == storage)
    values, rows, hidden, stride = (_read_int(item) for item in encoded)
    if rows < 1 or hidden < 1 or stride != hidden or values != rows * hidden:
        raise _refused(
            f"the tensor has shape ({rows}, {hidden}), stride {stride} and {values} stored values; "
            "it must be contiguous, own its storage and not be empty (.contiguous().clone())"
        )
    return _Layout(dtype, rows, hidden)


def _read_int(encoded: bytes) -> int:
    return int.from_bytes(encoded[1:], "little", signed=encoded[:1] == b"J")


def _read_values(raw: bytes, layout: _Layout) -> FloatArray:
    expected = layout.rows * layout.hidden * _ITEM_SIZE[layout.dtype]
    if len(raw) != expected:
        raise _refused(f"the tensor's storage has {len(raw)} bytes; its shape needs {expected}")
    if layout.dtype == "bfloat16":
        values = widen_bfloat16(np.frombuffer(raw, dtype="<u2"))
    else:
        kind = "<f2" if layout.dtype == "float16" else "<f4"
        values = np.frombuffer(raw, dtype=kind).astype(np.float32)
    if not np.isfinite(values).all():
        raise _refused("the tensor holds NaN or infinite values")
    return cast(FloatArray, values.reshape(layout.rows, layout.hidden))
