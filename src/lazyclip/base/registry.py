"""Name -> value tables; a duplicate or unknown name is an error that lists the others."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lazyclip.base.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind, in the order in which they were added."""

    def __init__(self, kind: str) -> None:
        """Make an empty table; `kind` is the word used in error messages."""
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its object under `name`."""

        def file(item: T) -> T:
            if name in self._items:
                raise RuntimeError(f"{self.kind} '{name}' is registered twice")
            self._items[name] = item
            return item

        return file

    def __getitem__(self, name: str) -> T:
        """Return the item; an unknown name raises `UserError` with the nearest names."""
        if name not in self._items:
            raise unknown(self.kind, name, self._items)
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._items)

    def __len__(self) -> int:
        """Count the names."""
        return len(self._items)
