"""Collects everything that is wrong with what a user wrote, so that it is all said at once."""

from __future__ import annotations

from collections.abc import Sequence

from precision_runtime.accelerators import ELSEWHERE
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

    def take(self, other: Problems) -> None:
        """Take over another's."""
        for where, names in other._modes.items():
            self._modes.setdefault(where, []).extend(names)
        for where, (names, known) in other._accelerators.items():
            self._accelerators.setdefault(where, ([], known))[0].extend(names)
        self._others += other._others

    def text(self) -> str:
        """Every problem, one a line, and each list of known names once."""
        lines: list[str] = []
        for where, bad in self._modes.items():
            try:
                expand_modes(bad, where)  # the runtime words it: known names, groups, "did you mean"
            except UnknownNameError as error:
                lines += str(error).splitlines()
        for where, (bad, known) in self._accelerators.items():
            lines += str(unknown_names("accelerator", bad, known, where, ELSEWHERE)).splitlines()
        lines += self._others
        known_names = dict.fromkeys(line for line in lines if line.startswith("Known "))
        return "\n".join([*(line for line in lines if line not in known_names), *known_names])
