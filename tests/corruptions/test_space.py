"""Points of the search and the corruptions that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from corruptions.ops import CORRUPTIONS
from corruptions.space import LOG_STRENGTH, Choice, Real, Space
from corruptions.spec import CorruptionSpec
from guard.errors import ConfigError, UnknownComponentError

BASE = CorruptionSpec("random-noise-first-n", 3, 1.0, "all-but-last")
JOINT = Space(BASE, 64, 0.1, joint=True)


def test_the_strength_alone_keeps_everything_else() -> None:
    space = Space(BASE, 64, 0.1)
    assert list(space.variables) == ["log_strength"]
    assert space.spec({"log_strength": 2.0}) == CorruptionSpec(
        "random-noise-first-n", 3, 10.0, "all-but-last"
    )


def test_a_joint_point_gives_every_field() -> None:
    point = {**JOINT.anchors(30)[0], "method": "set-noise", "log_dims": 1.0, "log_strength": -1.0}
    spec = JOINT.spec({**point, "span_policy": "entity"})
    assert (spec.method, spec.dims, spec.span_policy) == ("set-noise", 10, "entity")
    assert spec.strength == pytest.approx(0.01)
    assert set(CORRUPTIONS) == set(JOINT.variables["method"].values)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["shuffle", "zero-out-top-k"])
def test_what_a_method_ignores_makes_no_other_corruption(method: str) -> None:
    point = {**JOINT.anchors(30)[0], "method": method, "log_dims": 0.5}
    weak, strong = (JOINT.spec({**point, "log_strength": log}) for log in (-1.0, 3.0))
    assert weak == strong
    other = JOINT.spec({**point, "log_dims": 1.5})
    assert (other == weak) == (method == "shuffle")


def test_the_frame_is_searched_from_the_one_that_is_served() -> None:
    point = {**JOINT.anchors(30)[0], "frame": "on", "log_frame": 1.0}
    assert JOINT.spec(point).frame == pytest.approx(1.0)
    assert JOINT.spec({**point, "frame": "off"}).frame == 0.0
    assert JOINT.spec(JOINT.anchors(30)[0]).frame == BASE.frame == 0.0
    blurred = replace(JOINT, base=replace(BASE, frame=0.085))
    assert blurred.spec(blurred.anchors(30)[0]).frame == pytest.approx(0.085)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("budget", [3, 10, 100])
def test_the_scan_lies_inside_and_leaves_most_of_the_budget(joint: bool, budget: int) -> None:
    space = Space(BASE, 64, 0.1, joint)
    anchors = space.anchors(budget)
    assert 1 <= len(anchors) <= max(1, budget // 3)
    for point in anchors:
        assert set(point) == set(space.variables)
        for name, variable in space.variables.items():
            if isinstance(variable, Real):
                assert variable.low <= point[name] <= variable.high
            else:
                assert isinstance(variable, Choice)
                assert point[name] in variable.values


def test_a_scan_of_chosen_methods_has_no_others() -> None:
    space = Space(BASE, 64, 0.1, True, ("reverse-order", "set-noise"))
    assert {point["method"] for point in space.anchors(90)} == {"reverse-order", "set-noise"}


def test_nothing_to_search_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no strength to search"):
        Space(CorruptionSpec("shuffle", 1, 0.0), 64, 0.1)
    with pytest.raises(UnknownComponentError, match="set-noise"):
        Space(BASE, 64, 0.1, True, ("set-nose",))
    assert LOG_STRENGTH == (-2.0, 6.0)
