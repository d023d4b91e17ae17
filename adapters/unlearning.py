"""What unlearning makes small: one registry of the papers' losses.

Each feeds an equation (`adapters.equations`) from the adapted model and a batch of the forget set.
All of them need the forget set alone, some beside it other answers to the same questions
(`adapters.alternatives`). Another loss registers itself with `register_loss`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor
from torch.nn import functional

from adapters.equations import (
    DIVERGENCES,
    Divergence,
    flat,
    gradient_ascent,
    npo,
    preference,
    simnpo,
    undial,
    whp_logits,
)
from adapters.examples import Batch, Example, collate
from adapters.losses import Loss, answer_log_probs, cross_entropy, told_logits, untouched
from guard.errors import ConfigError, DataError
from guard.registry import Registry

Needs = Literal["nothing", "refusals", "random-labels", "counterfactuals", "generic-prompts"]
"""What a loss's alternatives are; `adapters.alternatives` has a maker for each."""


@dataclass(frozen=True, slots=True)
class LossData:
    """What losses are made from.

    Attributes:
        examples: The forget set, in the order that `Batch.indices` count.
        alternatives: Of each row the examples of which one goes with it at a step; () without.
        vocabulary: Tokens that the model has; 0 checks none.
        seed: Of all draws, >= 0.
        teacher: Of each row what a teacher said, e.g. log-probabilities; shape and meaning are
            those of the loss that uses it.
    """

    examples: tuple[Example, ...]
    alternatives: tuple[tuple[Example, ...], ...] = ()
    vocabulary: int = 0
    seed: int = 0
    teacher: tuple[Tensor, ...] = ()

    def draw(self, batch: Batch) -> Batch:
        """Return an alternative of each row of a batch: told by seed, step and row alone."""
        chosen = []
        for row in batch.indices:
            rng = np.random.default_rng((self.seed, batch.step, row))
            chosen.append(self.alternatives[row][int(rng.integers(len(self.alternatives[row])))])
        drawn = collate(chosen, range(len(chosen)), batch.step)
        return drawn.to(batch.tokens.device)

    def fingerprint(self) -> str:
        """Return a hash of the alternatives and the rest: for the facts of a training."""
        rows = [[[one.prompt, one.answer] for one in row] for row in self.alternatives]
        teacher = [one.tolist() for one in self.teacher]
        own = [[one.prompt, one.answer] for one in self.examples]
        text = json.dumps([own, rows, self.seed, teacher])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class LossKind:
    """An entry of the registry.

    Attributes:
        needs: What alternatives `LossData` must hold.
        make: Makes the loss of the data and of options by keyword.
    """

    needs: Needs
    make: Callable[..., Loss]

    @property
    def options(self) -> dict[str, Any]:
        """Options and their defaults."""
        given = list(inspect.signature(self.make).parameters.values())[1:]
        return {one.name: one.default for one in given}


LOSSES: Registry[LossKind] = Registry("loss")

Maker = TypeVar("Maker", bound=Callable[..., Loss])


def register_loss(name: str, needs: Needs = "nothing") -> Callable[[Maker], Maker]:
    """Register the decorated maker, e.g. a class whose first field is a `LossData`."""

    def decorate(make: Maker) -> Maker:
        LOSSES.register(name)(LossKind(needs, make))
        return make

    return decorate


def make_loss(name: str, data: LossData, **options: Any) -> Loss:
    """Make a loss of the registry.

    Args:
        name: One of `LOSSES`.
        data: The forget set and, if `LOSSES[name].needs` says so, alternatives.
        **options: See `LOSSES[name].options`.

    Raises:
        UnknownComponentError: There is no such loss.
        ConfigError: An option is unknown or out of range, or the alternatives are missing.
        DataError: The alternatives don't fit the forget set, or the tokens the model.
    """
    kind = _kind(name, options)
    if data.seed < 0:
        raise ConfigError(f"the seed is {data.seed}; it must be at least 0")
    if kind.needs != "nothing":
        if not data.alternatives:
            raise ConfigError(f"loss {name!r} needs alternatives: {kind.needs}")
        _check_alternatives(data)
    _check_tokens(data)
    return kind.make(data, **options)


def check_options(name: str, **options: Any) -> None:
    """Raise what `make_loss` would of name and options, while there is no data yet.

    Raises:
        UnknownComponentError: There is no such loss.
        ConfigError: An option is unknown or out of range.
    """
    _kind(name, options).make(LossData(()), **options)


def _kind(name: str, options: Mapping[str, Any]) -> LossKind:
    kind = LOSSES[name]
    unknown = sorted(set(options) - set(kind.options))
    if unknown:
        known = ", ".join(kind.options) or "none"
        raise ConfigError(f"loss {name!r} has no option {unknown[0]!r}; its options: {known}")
    return kind


def _check_alternatives(data: LossData) -> None:
    rows, wanted = len(data.alternatives), len(data.examples)
    if rows != wanted:
        raise DataError(f"there are alternatives for {rows} rows, and {wanted} rows to forget")
    for number, row in enumerate(data.alternatives, start=1):
        if not row:
            raise DataError(f"row {number} of the forget set has no alternative; leave the row out")


def _check_tokens(data: LossData) -> None:
    examples = [*data.examples, *(one for row in data.alternatives for one in row)]
    if not data.vocabulary or not examples:
        return
    highest = max(max([*one.prompt, *one.answer]) for one in examples)
    if highest >= data.vocabulary:
        raise DataError(
            f"token {highest} is beyond the model's {data.vocabulary}: the examples were made with "
            "another model's tokenizer"
        )


def _check_above_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}; it must be above 0")


# --- The losses ----------------------------------------------------------------------------------


@register_loss("gradient-ascent")
@dataclass(frozen=True, slots=True)
class GradientAscent:
    """See `gradient_ascent`."""

    data: LossData

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        log_probs, told = answer_log_probs(model, batch)
        return gradient_ascent(log_probs[told])


@register_loss("npo")
@dataclass(frozen=True, slots=True)
class Npo:
    """See `npo`."""

    data: LossData
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_above_zero(beta=self.beta)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return npo(*_both_log_probs(model, batch), self.beta)


@register_loss("simnpo")
@dataclass(frozen=True, slots=True)
class SimNpo:
    """See `simnpo`."""

    data: LossData
    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        _check_above_zero(beta=self.beta)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        log_probs, told = answer_log_probs(model, batch)
        return simnpo(-log_probs.sum(1) / told.sum(1), self.beta, self.delta)


@dataclass(frozen=True, slots=True)
class Flat:
    """See `flat`; the templates are refusals."""

    data: LossData
    divergence: Divergence

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        template = _mean_probability(model, self.data.draw(batch))
        return flat(template, _mean_probability(model, batch), self.divergence)


def _register_flat(name: str, divergence: Divergence) -> None:
    @register_loss(f"flat-{name}", "refusals")
    def make(data: LossData) -> Loss:
        return Flat(data, divergence)


for _name, _divergence in DIVERGENCES.items():
    _register_flat(_name, _divergence)


@register_loss("undial")
@dataclass(frozen=True, slots=True)
class Undial:
    """See `undial`."""

    data: LossData
    strength: float = 10.0

    def __post_init__(self) -> None:
        _check_above_zero(strength=self.strength)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        logits, labels = told_logits(model, batch)
        with untouched(model):
            reference, _ = told_logits(model, batch)
        return undial(logits, reference, labels, self.strength)


@register_loss("whp", "generic-prompts")
@dataclass(frozen=True, slots=True)
class Whp:
    """Cross-entropy to the soft labels of `whp_logits`.

    The paper trains a reinforced model on the forget set, and swaps its names for generic ones.
    Both need no training here, where the model knows the set: the reinforced logits are those of
    the untouched model on the row's own prompt, the base's those on a generic prompt (the same
    question about an entity that it doesn't know), each with the forget answer up to the token.
    They are normalised first: of two prompts the logits' zero points may differ.

    An alternative of a row is a generic prompt with the row's own answer, token by token.
    """

    data: LossData
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ConfigError(f"strength is {self.strength}; it must be at least 0")
        for number, (own, row) in enumerate(
            zip(self.data.examples, self.data.alternatives, strict=True), start=1
        ):
            if any(one.answer != own.answer for one in row):
                raise DataError(f"a generic prompt of row {number} goes with another answer")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        logits, _ = told_logits(model, batch)
        with untouched(model):
            reinforced = told_logits(model, batch)[0].log_softmax(-1)
            base = told_logits(model, self.data.draw(batch))[0].log_softmax(-1)
        target = whp_logits(base, reinforced, self.strength).softmax(-1)
        return functional.cross_entropy(logits, target)


@register_loss("refusal", "refusals")
@register_loss("random-labels", "random-labels")
@register_loss("counterfactual", "counterfactuals")
@dataclass(frozen=True, slots=True)
class Relabel:
    """Cross-entropy on an alternative answer: E[-log pi(y'|x)], mean over the answers' tokens.

    With refusals and random labels it is O3's (Gao et al. 2024, arXiv 2407.10223); with
    counterfactuals, plausible answers of the same frame, the model answers as if it never knew.
    """

    data: LossData

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return cross_entropy(model, self.data.draw(batch))


@register_loss("refusal-preference", "refusals")
@dataclass(frozen=True, slots=True)
class RefusalPreference:
    """See `preference`: a refusal is preferred to the forget answer."""

    data: LossData
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_above_zero(beta=self.beta)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        preferred = _both_log_probs(model, self.data.draw(batch))
        return preference(preferred, _both_log_probs(model, batch), self.beta)


def _both_log_probs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of whole answers by the model and by the untouched one, (rows,)."""
    log_probs, _ = answer_log_probs(model, batch)
    with untouched(model):
        reference, _ = answer_log_probs(model, batch)
    return log_probs.sum(1), reference.sum(1)


def _mean_probability(model: Any, batch: Batch) -> Tensor:
    """Return the mean probability of each answer's tokens, shape (rows,)."""
    log_probs, told = answer_log_probs(model, batch)
    return (log_probs.exp() * told).sum(1) / told.sum(1)
