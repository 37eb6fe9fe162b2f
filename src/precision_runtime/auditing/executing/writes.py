"""Which of its arguments an op writes to, by its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Places = tuple[tuple[int, str], ...]  # by position, and by name where they come as keywords


def places_written(func: Any) -> Places:
    """The arguments that an op writes to; to be asked once for each op."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def values_at(places: Places, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call has there."""
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in places]
