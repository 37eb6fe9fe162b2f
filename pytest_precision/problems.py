"""Collects everything that is wrong with what a user wrote, so that it is all said at once."""

from __future__ import annotations

from collections.abc import Sequence

from precision_runtime.errors import UnknownNameError, unknown_names
from precision_runtime.modes import expand_modes


class Problems:
    """Unknown modes and accelerators by the place they were given in, and other complaints, in order of arrival."""

    def __init__(self) -> None:
        self._modes: dict[str, list[object]] = {}
        self._accelerators: dict[str, tuple[list[object], Sequence[str]]] = {}
        self._others: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._modes or self._accelerators or self._others)

    def unknown_mode(self, name: object, where: str) -> None:
        """Note a mode that does not exist."""
        self._modes.setdefault(where, []).append(name)

    def unknown_accelerator(self, name: object, known: Sequence[str], where: str) -> None:
        """Note an accelerator that does not exist."""
        self._accelerators.setdefault(where, ([], known))[0].append(name)

    def add(self, text: str) -> None:
        """Note anything else."""
        self._others.append(text)

    def text(self) -> str:
        """Every problem, one a line, each list of known names once."""
        lines = []
        for where, bad in self._modes.items():
            try:
                expand_modes(bad, where)  # the runtime words it: known names, groups, "did you mean"
            except UnknownNameError as error:
                lines.append(str(error))
        lines += [str(unknown_names("accelerator", bad, known, w)) for w, (bad, known) in self._accelerators.items()]
        return "\n".join([*lines, *self._others])
