"""A registry from names to factories: how configuration and code meet."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from guard.errors import UnknownComponentError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names of one kind of component, e.g. corruption methods.

    Args:
        kind: What is registered, singular, for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Register the decorated object under `name`.

        Raises:
            ValueError: If the name is taken.
        """

        def decorate(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return decorate

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            nearest = difflib.get_close_matches(name, self._items, n=1)
            raise UnknownComponentError(
                self.kind, name, sorted(self._items), nearest[0] if nearest else None
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
