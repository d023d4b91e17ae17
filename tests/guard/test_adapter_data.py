"""Levels of the unknown: figures of them, by hand, and of which rows."""

from __future__ import annotations

import math

import pytest
import torch

from guard.adapter_data import Levels

LEVELS = Levels(
    (
        torch.tensor([-1.0, -5.0, -2.0, -3.0, -4.0, -100.0]),  # the last token ends the turn
        torch.tensor([-2.0, -100.0]),
        torch.tensor([-7.0]),  # cut: nothing ends it
    )
)


def test_the_turns_end_is_no_part_of_the_figures() -> None:
    assert LEVELS.only([0]).tail == pytest.approx(-4.5)
    assert LEVELS.only([0]).probability == pytest.approx(math.exp(-3.0))
    assert LEVELS.only([2]).probability == pytest.approx(math.exp(-7.0))


def test_figures_are_means_over_rows() -> None:
    assert LEVELS.tail == pytest.approx((-4.5 - 2.0 - 7.0) / 3)
    told = (math.exp(-3.0), math.exp(-2.0), math.exp(-7.0))
    assert LEVELS.probability == pytest.approx(sum(told) / 3)


def test_some_rows_come_in_the_order_asked_for() -> None:
    some = LEVELS.only([2, 0])
    assert some.rows[0] is LEVELS.rows[2] and some.rows[1] is LEVELS.rows[0]
    assert some.tail == pytest.approx((-7.0 - 4.5) / 2)
