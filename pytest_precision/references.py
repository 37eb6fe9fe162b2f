"""FP64 references shared by the lanes of one test case, kept only while that case runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from precision_runtime.auditing import References


class CaseReferences:
    """One cache for each check of the current case, by its number within the test.

    Lanes of a case are neighbours, so references of one case are enough, and memory stays that of one test. The audit
    verifies that what it finds here fits its inputs and weights.
    """

    def __init__(self) -> None:
        self._case: str | None = None
        self._caches: dict[int, References] = {}

    def at(self, case: str, number: int) -> References:
        """Return the cache for check ``number`` of ``case``; another case's caches are dropped."""
        from precision_runtime.auditing import References

        if case != self._case:
            self._case, self._caches = case, {}
        return self._caches.setdefault(number, References())


REFERENCES = pytest.StashKey[CaseReferences]()


def references_of(config: pytest.Config) -> CaseReferences:
    """Return the session's references."""
    return config.stash.setdefault(REFERENCES, CaseReferences())
