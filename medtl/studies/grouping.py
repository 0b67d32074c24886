"""Who is one and the same patient, where header and table may not agree. Pure.

If one scan carries patient A in its header and patient B in the label table, A and B are taken as one person, because
to merge two people costs a little power, and to separate one person from himself lets him stand on both sides of a
split.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def connected(pairs: Iterable[tuple[T, T]]) -> dict[T, T]:
    """Join everything that is linked by a chain of pairs; give each member its group's smallest member.

    Args:
        pairs: links between sortable names.
    """
    parent: dict[T, T] = {}

    def root(item: T) -> T:
        parent.setdefault(item, item)
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for left, right in pairs:
        low, high = sorted((root(left), root(right)), key=str)
        parent[high] = low
    return {item: root(item) for item in parent}
