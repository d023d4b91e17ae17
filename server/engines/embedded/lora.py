"""LoRA adapters at exact weights, with a base model that stays bit-identical.

Adapted weights are put in place of the base's for the time of a call and taken out again by
reference, so that no rounding is left behind and the base runs without any extra work. Several
adapters act as one whose ranks stand side by side: the sum of what each adds.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from guard.errors import EngineError, IncompatibleArtifactError
from guard.types import AdapterUse
from server.engines.embedded.lora_files import Delta, Shape, delta_shapes, read_deltas

KEPT: Final = 16
"""Adapters whose matrices stay in memory: a few MB each."""

Deltas = Mapping[str, Delta]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapters:
    """The adapters of one call, in memory: what happens to their files doesn't matter any more.

    Attributes:
        uses: Sorted by key, since their order doesn't count; those at weight 0 left out.
        deltas: What each adds, in the order of `uses`.
    """

    uses: tuple[AdapterUse, ...] = ()
    deltas: tuple[Deltas, ...] = ()


Adapters = Sequence[AdapterUse] | LoadedAdapters


class LoraSwitch:
    """Puts adapters onto a model for the time of a block.

    `load`, `check` and `keep_only` are safe in any thread; blocks of `applied` must not overlap
    but within one another, where the innermost holds.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Deltas] = OrderedDict()
        self._base: dict[str, Any] = {}
        self._put_on: Mapping[str, Tensor] = {}
        self._merged: tuple[tuple[AdapterUse, ...], Mapping[str, Tensor]] = ((), {})

    @contextmanager
    def applied(self, adapters: Adapters) -> Iterator[None]:
        """Run the block with exactly these adapters; none is the base.

        Raises:
            ArtifactError: There is no readable adapter.
            IncompatibleArtifactError: It was made for another model or isn't plain LoRA.
            EngineError: A weight is no finite number.
        """
        wanted, before = self._weights(self.load(adapters)), self._put_on
        self._put(wanted)
        try:
            yield
        finally:
            self._put(before)

    def load(self, adapters: Adapters) -> LoadedAdapters:
        """Read the adapters' matrices, those not in memory; see `applied` for what it raises."""
        if isinstance(adapters, LoadedAdapters):
            return adapters
        if not all(math.isfinite(use.weight) for use in adapters):
            raise EngineError("an adapter's weight must be a finite number")
        uses = sorted((use for use in adapters if use.weight != 0), key=lambda use: use.key)
        return LoadedAdapters(tuple(uses), tuple(self._deltas(use) for use in uses))

    def check(self, use: AdapterUse) -> None:
        """Return if the adapter fits the model; its matrices aren't read.

        Raises:
            ArtifactError: There is no readable adapter.
            IncompatibleArtifactError: It was made for another model or isn't plain LoRA.
        """
        self._check(delta_shapes(use.path), use)

    def keep_only(self, uses: Iterable[AdapterUse]) -> None:
        """Give up the memory of all other adapters; blocks that run are left alone."""
        keys = {use.key for use in uses}
        with self._lock:
            for key in self._kept.keys() - keys:
                del self._kept[key]
        if not keys.issuperset(use.key for use in self._merged[0]):
            self._merged = ((), {})

    def _deltas(self, use: AdapterUse) -> Deltas:
        with self._lock:
            found = self._kept.get(use.key)
            if found is None:
                found = read_deltas(use.path)
                self._check({name: delta.shape for name, delta in found.items()}, use)
                self._kept[use.key] = found
            self._kept.move_to_end(use.key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def _check(self, shapes: Mapping[str, Shape], use: AdapterUse) -> None:
        for name, shape in shapes.items():
            try:
                weight: Tensor = self._model.get_submodule(name).weight
            except AttributeError:
                raise IncompatibleArtifactError(
                    f"adapter {use.path.name} changes {name}, which the model doesn't have"
                ) from None
            if shape != tuple(weight.shape):
                raise IncompatibleArtifactError(
                    f"adapter {use.path.name} has {shape} for {name}, the model "
                    f"{tuple(weight.shape)}: it was made for another model"
                )

    def _put(self, wanted: Mapping[str, Tensor]) -> None:
        """Put on these weights in place of those that are on; all others become the base's."""
        for name in self._put_on.keys() - wanted.keys():
            self._model.get_submodule(name).weight = self._base.pop(name)
        for name, weight in wanted.items():
            module = self._model.get_submodule(name)
            self._base.setdefault(name, module.weight)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        self._put_on = wanted

    def _weights(self, loaded: LoadedAdapters) -> Mapping[str, Tensor]:
        """Return the adapted weights by module; the last ones stay in memory."""
        if not loaded.uses:
            return {}
        uses, weights = self._merged
        if uses != loaded.uses:
            # First let go of the old ones: both at once may not fit.
            self._merged, weights = ((), {}), {}
            weights = self._merge(loaded)
            self._merged = (loaded.uses, weights)
        return weights

    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, loaded: LoadedAdapters) -> dict[str, Tensor]:
        parts: dict[str, list[tuple[float, Delta]]] = {}
        for use, deltas in zip(loaded.uses, loaded.deltas, strict=True):
            for name, delta in deltas.items():
                parts.setdefault(name, []).append((use.weight * delta.strength, delta))
        return {name: self._sum(name, terms) for name, terms in parts.items()}

    def _sum(self, name: str, terms: Sequence[tuple[float, Delta]]) -> Tensor:
        """Return the base's weight and all that is added to it, in one product."""
        weight: Tensor = self._base.get(name, self._model.get_submodule(name).weight)
        left = torch.cat([delta.left.to(weight) * factor for factor, delta in terms], dim=1)
        right = torch.cat([delta.right.to(weight) for _, delta in terms])
        return torch.addmm(weight, left, right)
