"""Which accelerators this machine has, asked as late and as seldom as possible."""

from __future__ import annotations

import sys


class Machine:
    """The accelerators that the runtime finds. ``probe=False`` (``--collect-only``) never imports torch for that.

    Where torch is loaded already, by the tests that are being collected, asking is cheap, and the ids that
    ``--collect-only`` lists are then those of a real run.
    """

    def __init__(self, probe: bool = True) -> None:
        self._probe = probe
        self._found: tuple[str, ...] | None = None

    def found(self) -> tuple[str, ...]:
        """All accelerators of this machine, the default one first."""
        if self._found is None:
            if not self._probe and "torch" not in sys.modules:
                return ("cpu",)  # not kept: another test file may bring torch in
            from precision_runtime.accelerators import ACCELERATORS, machine

            here = machine()
            found = [name for name in ACCELERATORS if here.missing(name) is None]
            self._found = tuple(dict.fromkeys((here.auto(), *found)))
        return self._found

    def default(self) -> str:
        """The accelerator that tests run on when nothing names one."""
        return self.found()[0]
