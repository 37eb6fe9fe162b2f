"""The smallest set of modules to keep wide so that the mode holds: delta debugging, each proposal audited.

Wide is FP32, and FP64 in 32-true and tf32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from torch import nn

from precision_runtime.modes import Mode
from precision_runtime.record import Finding, Repair, Report

Names = tuple[str, ...]
# How often the set may be widened by what still fails, before all of the model's children are tried.
ROUNDS = 4

Judge = Callable[[Names], Report]  # the audit with these modules kept wide


def wide(mode: Mode) -> str:
    """The dtype, by name, of the islands that a repair in ``mode`` is made of."""
    return "float64" if mode.compute == mode.params == "float32" and not mode.autocast else "float32"


def find_repair(report: Report, root: str, model: nn.Module, mode: Mode, device: str, judge: Judge) -> Repair:
    """Find the islands that a failing ``report`` needs.

    ``model`` is the only model that the function runs, and ``root`` what findings call it ('' for itself). Whether a
    module may be left out is decided by the audit alone; the set found is one of which none may be left out.
    """
    search = _Search(root, model, judge)
    names = search.enough(report)
    if names is None:
        return Repair(
            islands={}, holds=False, before=report.lost_bits, after=report.lost_bits, audits=search.audits,
            note=_own_code(report, model, wide(mode)),
        )  # fmt: skip
    smallest = search.smallest(names)
    after = search.judge(smallest)
    return Repair(
        islands=dict.fromkeys(smallest, wide(mode).removeprefix("float")), holds=True,
        before=report.lost_bits, after=after.lost_bits, audits=search.audits,
        patch="\n".join(_patch(name, model, mode, device) for name in smallest),
    )  # fmt: skip


class _Search:
    def __init__(self, root: str, model: nn.Module, judge: Judge) -> None:
        self.root, self.model, self.audits = root, model, 0

        @lru_cache(None)
        def once(names: Names) -> Report:
            self.audits += 1
            return judge(names)

        self._once = once

    def judge(self, names: Iterable[str]) -> Report:
        """The audit with these islands; each set is audited once."""
        return self._once(tuple(sorted(names)))

    def holds(self, names: Iterable[str]) -> bool:
        """Whether the mode holds with these islands."""
        return self.judge(names).ok

    def enough(self, report: Report) -> Names | None:
        """Some set that repairs: the modules that are named, those that then fail, at last every child."""
        names: Names = ()
        for _ in range(ROUNDS):
            named = self._named(report.findings)
            new = tuple(n for n in named if not any(_covers(m, n) for m in names))
            if not new:
                break
            names = _outermost((*names, *new))
            report = self.judge(names)
            if report.ok:
                return names
        everything = tuple(n for n, child in self.model.named_children() if child is not None)
        return everything if everything and self.holds(everything) else None

    def smallest(self, names: Names) -> Names:
        """A set that repairs and of which nothing may be left out, modules being exchanged for their children, too."""
        names = self._reduced(names)
        for name in names:
            children = tuple(f"{name}.{n}" for n, _ in self.model.get_submodule(name).named_children())
            finer = (*(n for n in names if n != name), *children)
            if children and self.holds(finer):
                return self.smallest(finer)
        return names

    def _reduced(self, names: Names) -> Names:
        """Zeller's minimising delta debugging: drop halves, then quarters, at last single modules."""
        parts = 2
        while len(names) > 1:
            size = -(-len(names) // parts)
            chunks = [names[i : i + size] for i in range(0, len(names), size)]
            rest = next((r for r in _without_each(names, chunks) if self.holds(r)), None)
            if rest is not None:
                names, parts = rest, max(parts - 1, 2)
            elif size == 1:
                return names
            else:
                parts = min(2 * parts, len(names))
        return names

    def _named(self, findings: Sequence[Finding]) -> Names:
        """The modules that are to blame, as the model itself calls them."""
        prefix = f"{self.root}." if self.root else ""
        found = [f.module.removeprefix(prefix) for f in findings if f.module.startswith(prefix)]
        return tuple(dict.fromkeys(n for n in found if n and n != self.root))


def _without_each(names: Names, chunks: Sequence[Names]) -> list[Names]:
    """What is left without each chunk; single chunks first, which are smaller where there are two."""
    return [tuple(n for n in names if n not in chunk) for chunk in chunks]


def _covers(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _outermost(names: Names) -> Names:
    return tuple(n for n in names if not any(m != n and _covers(m, n) for m in names))


def _own_code(report: Report, model: nn.Module, dtype: str) -> str:
    """Why no set of modules repairs, and what is known of the line that would have to change."""
    note = (
        f"no set of modules in {dtype} repairs it: code outside of them is to blame, in {type(model).__name__} itself"
    )
    for finding in report.findings:
        if finding.line and finding.proof:
            return f"{note}, or a value from outside: {finding.line}; {finding.proof}"
    return note


def _patch(name: str, model: nn.Module, mode: Mode, device: str) -> str:
    """The same as code: in the caller's forward under autocast, around a module made FP32 elsewhere."""
    path, _, last = name.rpartition(".")
    owner = type(model.get_submodule(path)).__name__
    cast = "double" if wide(mode) == "float64" else "float"
    call = f"self.{last}" if not last.isdigit() else f"self[{last}]"
    lines: Mapping[bool, Sequence[str]] = {
        True: (
            f"# in the forward of {owner}" + (f" ({path})" if path else "") + f", where it calls {call}:",
            f'with torch.autocast("{device}", enabled=False):',
            f"    y = {call}(x.float())",
        ),
        False: (
            f"# after the cast to {mode.params}: model.{name}.{cast}()",
            f"# in the forward of {owner}" + (f" ({path})" if path else "") + f", where it calls {call}:",
            f"y = {call}(x.{cast}()).to(x.dtype)",
        ),
    }
    return "\n".join(lines[bool(mode.autocast)])
