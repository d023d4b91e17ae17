"""The index of forget rows: few are searched one by one, many by an inverted file."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from classifiers.neighbours import FLAT_ROWS, PrototypeIndex
from classifiers.space import unit
from guard.types import FloatArray

SIZE = 64


def targets(count: int, each: int, seed: int = 0) -> list[FloatArray]:
    """Rows of a target lie around a centre of its own."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 1, SIZE))
    return list(unit((centres + 0.6 * rng.normal(size=(count, each, SIZE))).astype(np.float32)))


def near(prototypes: list[FloatArray], seed: int, count: int = 300) -> tuple[FloatArray, list[int]]:
    """Windows close to some target's row, of any length, and the target of each."""
    rng = np.random.default_rng(seed)
    owners = rng.integers(len(prototypes), size=count)
    rows = np.stack([prototypes[n][int(rng.integers(len(prototypes[n])))] for n in owners])
    noisy = rows + 0.5 / np.sqrt(SIZE) * rng.normal(size=rows.shape)
    return (7.0 * noisy).astype(np.float32), owners.tolist()


def flat_best(prototypes: list[FloatArray], row: FloatArray) -> int:
    return int(np.argmax([(mine @ row).max() for mine in prototypes]))


def test_few_rows_are_searched_exactly() -> None:
    prototypes = targets(40, 6)
    index = PrototypeIndex(prototypes, SIZE)
    for row in np.random.default_rng(1).normal(size=(50, SIZE)).astype(np.float32):
        assert index.targets(row[None], 1) == [flat_best(prototypes, row)]


def test_the_inverted_file_finds_what_a_flat_search_finds() -> None:
    prototypes = targets(1_200, 10)
    assert sum(len(mine) for mine in prototypes) > FLAT_ROWS
    index = PrototypeIndex(prototypes, SIZE)
    rows, owners = near(prototypes, 2)
    found = [index.targets(row[None], 8) for row in rows]
    exact = [flat_best(prototypes, row) for row in rows]
    firsts = [mine[0] for mine in found]
    assert np.mean(np.array(firsts) == np.array(exact)) > 0.97
    assert np.mean([n in mine for mine, n in zip(found, owners, strict=True)]) > 0.97


def test_the_same_rows_give_the_same_index() -> None:
    prototypes = targets(900, 10)
    first, second = PrototypeIndex(prototypes, SIZE), PrototypeIndex(prototypes, SIZE)
    rows, _ = near(prototypes, 3, 100)
    assert first.targets(rows, 8) == second.targets(rows, 8)


def test_targets_of_all_windows_come_nearest_first_and_once() -> None:
    prototypes = targets(30, 5)
    index = PrototypeIndex(prototypes, SIZE)
    rows = np.stack([prototypes[4][0], prototypes[9][1] + prototypes[4][1], prototypes[9][2]])
    found = index.targets(rows, 2)
    assert set(found[:2]) == {4, 9} and len(found) == len(set(found))
    cosines = [(unit(rows) @ prototypes[n].T).max() for n in found]
    assert cosines == sorted(cosines, reverse=True)
    assert len(index.targets(rows[:1], 2)) <= 2


def test_targets_may_have_no_rows() -> None:
    none = np.zeros((0, SIZE), np.float32)
    (mine,) = targets(1, 3)
    assert PrototypeIndex([none, mine, none], SIZE).targets(mine, 4) == [1]
    assert PrototypeIndex([none], SIZE).targets(mine, 4) == []
    assert PrototypeIndex([], SIZE).targets(mine, 4) == []
    assert PrototypeIndex([mine], SIZE).targets(none, 4) == []


def test_threads_share_one_index() -> None:
    prototypes = targets(900, 10)
    index = PrototypeIndex(prototypes, SIZE)
    rows, _ = near(prototypes, 4, 200)
    wanted = [index.targets(row[None], 4) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: index.targets(row[None], 4), rows)) == wanted
