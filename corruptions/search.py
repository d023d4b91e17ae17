"""Zeroth-order optimisers behind one ask/tell interface: ECO's estimator, and nevergrad's.

They see points and losses only. All are deterministic under their seed, so an interrupted search
resumes by asking again in the same order and telling the losses of its log.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from corruptions.space import Choice, Point, Real, Space
from guard.errors import ConfigError

ECO_ZO: Final = "eco-zo"
NEVERGRAD: Final = "nevergrad:"
DEFAULT_OPTIMIZERS: Final = {"strength": "nevergrad:TBPSA", "joint": "nevergrad:OnePlusOne"}
"""By what is searched; docs/learning-corruptions.md tells how they were chosen."""

SUGGESTED: Final = ("OnePlusOne", "CMA", "TBPSA", "NGOpt", "SPSA", "DE", "PSO")
"""Optimisers of nevergrad that an error message names; every one can be asked for."""


class Optimiser(Protocol):
    """Proposes points and learns from their losses, told in the order in which they were asked."""

    @property
    def room(self) -> int:
        """Points that may be asked now, before the next loss is told; 0 if it waits for one."""
        ...

    def ask(self) -> Point:
        """Return the next point to evaluate."""
        ...

    def tell(self, loss: float) -> None:
        """Learn the loss of the earliest point that was asked and not told yet."""
        ...


def make_optimiser(name: str, space: Space, budget: int, seed: int, parallel: int) -> Optimiser:
    """Make an optimiser, a coarse scan before it (`Space.anchors`).

    Args:
        name: `eco-zo`, or `nevergrad:` and the name of one of its optimisers.
        space: What to search.
        budget: Evaluations in all, those of the scan included.
        seed: Of everything random in it.
        parallel: Points that the caller wants to evaluate at once; an optimiser may allow fewer.

    Raises:
        ConfigError: If there is no such optimiser, or it can't search this space.
    """
    anchors = space.anchors(budget)
    left = max(1, budget - len(anchors))
    if name == ECO_ZO:
        if space.joint:
            raise ConfigError(
                "optimizer eco-zo searches the strength alone (it needs a slope); give --search "
                "strength, or a nevergrad optimizer"
            )
        return Scanned(anchors, lambda best: EcoZo(space, best), min(2, max(1, parallel)))
    algorithm = _algorithm(name)
    # Made once before it is needed: a wrong name has to show before anything is evaluated.
    at_once = Nevergrad(algorithm, space, anchors[0], left, seed, parallel).room
    return Scanned(
        anchors, lambda best: Nevergrad(algorithm, space, best, left, seed, at_once), at_once
    )


class Scanned:
    """Evaluates given points first, then starts another optimiser at the best of them.

    Args:
        points: The points of the scan, at least one.
        begin: Makes the other optimiser from the best point.
        parallel: Points of the scan that may be asked at once.
    """

    def __init__(
        self, points: Sequence[Point], begin: Callable[[Point], Optimiser], parallel: int
    ) -> None:
        self._parallel = parallel
        self._points, self._begin = list(points), begin
        self._losses: list[float] = []
        self._asked = 0
        self._next: Optimiser | None = None

    def ask(self) -> Point:
        """Return the next point; of the other optimiser once all points of the scan were asked."""
        if self._asked < len(self._points):
            self._asked += 1
            return self._points[self._asked - 1]
        return self._after().ask()

    def tell(self, loss: float) -> None:
        """Learn the loss of the earliest point that was asked and not told yet."""
        if len(self._losses) < len(self._points):
            self._losses.append(loss)
        else:
            self._after().tell(loss)

    @property
    def room(self) -> int:
        """Points that may be asked now; the first after the scan waits for all of its losses."""
        if len(self._losses) == len(self._points):
            return self._after().room
        free = self._parallel - (self._asked - len(self._losses))
        return min(free, len(self._points) - self._asked)

    def _after(self) -> Optimiser:
        if self._next is None:
            if len(self._losses) < len(self._points):
                raise RuntimeError("a point was asked before the scan's losses were told")
            best = min(range(len(self._points)), key=lambda i: (self._losses[i], i))
            self._next = self._begin(self._points[best])
        return self._next


class EcoZo:
    """ECO's scalar two-point estimator, on log10 sigma.

    g = (s(x + eps) - s(x - eps)) / (distance of the two points), x <- x - rate * g. Liu et al.
    2024, arXiv 2406.07933. Differs from the released code: the distance is that of the points that
    were really evaluated (the code divides by 2 eps where a point is clamped too), the search is
    over log sigma, the loss is a distance to the retained value, and a step is bounded.

    Args:
        space: A space of one variable.
        start: Where to begin.
    """

    HALF: Final = 0.0999
    """Half the distance of the two points (ECO, released code), in log10 sigma."""

    RATE: Final = 1.0
    """Decades per loss and decade. ECO's 100 is for sigma itself, not its logarithm."""

    LONGEST: Final = 0.5
    """Decades that one step goes at most: beyond the knee a slope says nothing."""

    def __init__(self, space: Space, start: Point) -> None:
        variable = space.variables["log_strength"]
        assert isinstance(variable, Real)
        self._bounds = variable
        self._at = self._clamp(float(start["log_strength"]))
        self._asked: list[float] = []
        self._told: list[float] = []

    @property
    def room(self) -> int:
        """What is left of the pair."""
        return 2 - len(self._asked)

    @property
    def at(self) -> float:
        """Where the search stands, log10 of multiples of the RMS."""
        return self._at

    def ask(self) -> Point:
        """Return the lower point of a pair, then the upper one."""
        if len(self._asked) == 2:
            raise RuntimeError("both points of the pair were asked; tell their losses first")
        step = self.HALF if self._asked else -self.HALF
        self._asked.append(self._clamp(self._at + step))
        return {"log_strength": self._asked[-1]}

    def tell(self, loss: float) -> None:
        """Learn a loss; the second of a pair moves the search."""
        self._told.append(loss)
        if len(self._told) < 2:
            return
        before, after = self._asked
        slope = (self._told[1] - self._told[0]) / (after - before)
        step = min(max(-self.RATE * slope, -self.LONGEST), self.LONGEST)
        self._at = self._clamp(self._at + step)
        self._asked, self._told = [], []

    def _clamp(self, log: float) -> float:
        return min(max(log, self._bounds.low), self._bounds.high)


class Nevergrad:
    """An optimiser of nevergrad.

    Args:
        algorithm: A class of nevergrad's registry.
        space: What to search.
        start: Where to begin.
        budget: Evaluations that it will get; many of them plan by it.
        seed: Of everything random in it.
        parallel: Points that are to be asked at once.
    """

    def __init__(
        self, algorithm: Any, space: Space, start: Point, budget: int, seed: int, parallel: int
    ) -> None:
        parametrization = _parametrization(space, start)
        parametrization.random_state.seed(seed)
        try:
            self._optimiser = algorithm(parametrization, budget=budget, num_workers=parallel)
            self._parallel = parallel
        except ValueError:  # it is strictly sequential
            self._optimiser = algorithm(parametrization, budget=budget, num_workers=1)
            self._parallel = 1
        self._asked: list[Any] = []

    @property
    def room(self) -> int:
        """Points that may be asked now."""
        return self._parallel - len(self._asked)

    def ask(self) -> Point:
        """Return the next point."""
        with _without_metamodel(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, about the settings that nevergrad gives it
            candidate = self._optimiser.ask()
        self._asked.append(candidate)
        return {
            name: value if isinstance(value, str) else float(value)
            for name, value in candidate.value.items()
        }

    def tell(self, loss: float) -> None:
        """Learn the loss of the earliest point that was asked and not told yet."""
        self._optimiser.tell(self._asked.pop(0), loss)


@contextmanager
def _without_metamodel() -> Iterator[None]:
    """Keep nevergrad's optimisers (NGOpt, for one) from fitting a model to the losses so far.

    It would be searched for 20 s of wall-clock time at most, so that a resumed search could end
    elsewhere; and in nevergrad 1.0.12 it fails under numpy 2.4. They go on as they do where no
    model fits.
    """
    from nevergrad.optimization import metamodel, optimizerlib

    def fail(*_: Any, **__: Any) -> Any:
        raise metamodel.MetaModelFailure("left out, to be repeatable")

    kept = [(module, module.learn_on_k_best) for module in (metamodel, optimizerlib)]
    try:
        for module, _ in kept:
            module.learn_on_k_best = fail
        yield
    finally:
        for module, function in kept:
            module.learn_on_k_best = function


def _algorithm(name: str) -> Any:
    """Find a nevergrad optimiser by name."""
    wanted = name.removeprefix(NEVERGRAD)
    try:
        import nevergrad as ng
        from nevergrad.optimization.recaster import RecastOptimizer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"optimizer {name!r} needs {error.name}: install the extra `learn`, or give eco-zo"
        ) from error
    known = ng.optimizers.registry
    if not name.startswith(NEVERGRAD) or wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f"; did you mean {NEVERGRAD}{close[0]}?" if close else ""
        some = ", ".join([ECO_ZO, *(NEVERGRAD + one for one in SUGGESTED)])
        raise ConfigError(
            f"no optimizer {name!r}{hint} (some of them: {some}; the others of nevergrad's "
            "registry too)"
        )
    algorithm = known[wanted]
    if isinstance(algorithm, type) and issubclass(algorithm, RecastOptimizer):
        raise ConfigError(_THREADED.format(name))
    made = algorithm(ng.p.Scalar(lower=-1.0, upper=1.0), budget=4, num_workers=1)
    if isinstance(made, RecastOptimizer):
        raise ConfigError(_THREADED.format(name))
    return algorithm


_THREADED: Final = (
    "optimizer {0!r} runs in a thread of its own, so that an interrupted search could not be "
    "resumed to the same result; give another, such as nevergrad:CMA"
)


def _parametrization(space: Space, start: Point) -> Any:
    import nevergrad as ng

    parts = {}
    for name, variable in space.variables.items():
        if isinstance(variable, Choice):
            parts[name] = ng.p.Choice(list(variable.values))
        else:
            middle = (variable.low + variable.high) / 2
            parts[name] = ng.p.Scalar(init=middle, lower=variable.low, upper=variable.high)
    parametrization = ng.p.Dict(**parts)
    parametrization.value = dict(start)
    return parametrization
