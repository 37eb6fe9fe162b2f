"""What an audit found, as plain data: findings, remarks, the report and its text. Imports no torch.

Every value is a builtin, so a report crosses processes as ``to_dict()`` and comes back by ``Report.from_dict``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "range", "underflow", "instability", "amplification", "kernel", "cast", "not-applied", "nondeterministic", "error"
]
Where = Literal["forward", "backward", "update"]


@dataclass(frozen=True)
class Worst:
    """The element that is furthest beyond what was allowed: where it stands, what it is, what it should be."""

    tensor: str  # which output, gradient or parameter: "output[0]", "grad of weight"
    index: tuple[int, ...]
    value: float
    reference: float
    allowed: float  # the largest |value - reference| that the mode's rounding and the budget explain
    beyond: float = 0.0  # share of elements that are beyond what was allowed, 0 … 1


@dataclass(frozen=True)
class Finding:
    """One judged defect. ``module`` is the path of the guilty module ('' for the root), ``op`` an op where known.

    ``line`` is the line of the user's code that calls the op, ``proof`` the sentence on what remained of the loss when
    the call was run again with that op alone in FP64; it says so where that proves nothing.
    """

    kind: Kind
    where: Where
    module: str
    op: str | None
    lost_bits: float
    excess: float
    message: str
    module_type: str = ""
    call: int = 0  # which call of that module, from 0
    worst: Worst | None = None
    suggestion: str | None = None  # only what was tried, with the figure that came out
    line: str | None = None  # "model.py:31: return torch.log(torch.sigmoid(x))"
    proof: str | None = None

    def title(self) -> str:
        """One line: who, where, what kind, how many bits."""
        who = f"{self.module or 'the whole function'}" + (f" ({self.module_type})" if self.module_type else "")
        op = f", {self.op}" if self.op else ""
        return f"{who}{op}: {self.kind} in {self.where}, {bits(self.lost_bits)} lost"


@dataclass(frozen=True)
class Remark:
    """True, but nothing to fail for: a known backend defect, an ill-conditioned function, a part not judged."""

    kind: str
    message: str
    module: str = ""
    op: str | None = None


@dataclass(frozen=True)
class Layer:
    """What storing or computing in 8 or 4 bits does to one layer; none of it is a defect of the code.

    ``bits`` are bits per weight as stored, ``loss`` is the relative error of the stored weights against those from
    before (L2). ``underflow`` and ``saturation`` are the shares, 0 to 1, of the elements of "input", "weight" and
    "gradient" that became zero, and that were clamped.
    """

    module: str
    storage: str
    bits: float | None = None
    loss: float | None = None
    underflow: dict[str, float] = field(default_factory=dict)
    saturation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Repair:
    """The smallest set of modules found whose FP32 makes the mode hold, as the runtime's ``islands`` and as code.

    ``holds`` is False where no set does; ``note`` says why. Figures are lost bits of the whole report, before and with
    the islands; ``audits`` is the number of proposals that were audited.
    """

    islands: dict[str, str]
    holds: bool
    before: float
    after: float
    audits: int
    patch: str = ""
    note: str = ""

    def __str__(self) -> str:
        tried = f"({self.audits} audit{'' if self.audits == 1 else 's'})"
        if not self.holds:
            return f"repair: none found {tried}: {self.note}"
        fell = f"the loss falls from {bits(self.before)} to {bits(self.after)}"
        head = f"repair: with islands={self.islands} the mode holds: {fell} {tried}; as code:"
        return "\n".join([head, *(f"  {line}" for line in self.patch.splitlines())])


@dataclass(frozen=True)
class Smallest:
    """The smallest input found on which a check fails as it did, as ``source``: a test to paste.

    ``before`` and ``after`` count the elements of all tensors; ``audits`` is what the search cost. ``note`` says why no
    smaller input was looked for.
    """

    before: int = 0
    after: int = 0
    audits: int = 0
    source: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"smallest input that fails in the same way: not found: {self.note}"
        elements = f"{self.after} of {self.before} element{'' if self.before == 1 else 's'}"
        head = f"smallest input that fails in the same way: {elements} ({self.audits} audits); as a test:"
        return "\n".join([head, *(f"  {line}".rstrip() for line in self.source.splitlines())])


@dataclass(frozen=True)
class Report:
    """The verdict on one function in one mode. ``ok`` is True when there are no findings.

    ``excess`` is the worst observed error over the error that rounding the operands must cost, over the whole
    function and every module call, forward and backward; ``whole`` the same for the whole function alone.
    ``figures`` are whatever else was measured, by name: "loss_scale"; in quantised modes "bits_per_parameter" and
    "quantization_loss", the relative error (L2) that the stored weights alone make in the outputs, which is no part of
    ``excess``. ``layers`` says the same, and FP8's shares of underflow and saturation, layer by layer.
    """

    subject: str
    mode: str
    accelerator: str
    status: str  # native, emulated, simulated
    budget: float
    excess: float
    whole: float
    findings: tuple[Finding, ...] = ()
    remarks: tuple[Remark, ...] = ()
    calls: int = 0  # module calls judged
    seed: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    repair: Repair | None = None  # where one was asked for
    smallest: Smallest | None = None  # where it was asked for

    @property
    def ok(self) -> bool:
        """True when nothing was found."""
        return not self.findings

    @property
    def lost_bits(self) -> float:
        """Bits lost beyond what the precision must lose: log2 of the excess, at least 0, inf where a value is lost."""
        return lost_bits(self.excess)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only, for JSON and for crossing processes."""
        return {**dataclasses.asdict(self), "ok": self.ok, "lost_bits": self.lost_bits}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of ``to_dict``."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        values["findings"] = tuple(_finding(f) for f in data.get("findings", ()))
        values["remarks"] = tuple(Remark(**r) for r in data.get("remarks", ()))
        values["repair"] = Repair(**data["repair"]) if data.get("repair") else None
        values["smallest"] = Smallest(**data["smallest"]) if data.get("smallest") else None
        values["layers"] = tuple(Layer(**r) for r in data.get("layers", ()))
        return cls(**values)

    def __str__(self) -> str:
        lane = f"{self.mode} on {self.accelerator}" + ("" if self.status == "native" else f" ({self.status})")
        if self.ok:
            lines = [f"{self.subject} holds in {lane}: {bits(self.lost_bits)} lost of {self.budget:g} allowed"]
        else:
            lines = [
                f"{self.subject} fails in {lane}: {bits(self.lost_bits)} lost beyond what the mode must lose "
                f"({self.budget:g} allowed)"
            ]
        for number, finding in enumerate(self.findings):
            lines += _describe(finding, first=number == 0)
        lines += _storage(self)
        if self.repair is not None:
            lines += [f"  {line}" for line in str(self.repair).splitlines()]
        if self.smallest is not None:
            lines += [f"  {line}".rstrip() for line in str(self.smallest).splitlines()]
        lines += [f"  remark: {f'{r.module}: ' if r.module else ''}{r.message}" for r in self.remarks]
        return "\n".join(lines)


def _storage(report: Report) -> list[str]:
    """What the stored and rounded layers cost, in a line each."""
    lines = []
    losses = [layer for layer in report.layers if layer.loss is not None]
    if losses:
        worst = max(losses, key=lambda layer: layer.loss or 0.0)
        bits_ = report.figures.get("bits_per_parameter")
        output = report.figures.get("quantization_loss")
        lines.append(
            f"  stored in {worst.storage}"
            + (f", {bits_:.3f} bits per parameter" if bits_ is not None else "")
            + (f": that alone moves the output by {output:.2%}" if output is not None else "")
            + f"; the weights by up to {worst.loss:.2%} ({worst.module or 'the layer itself'})"
        )
    for kind in ("underflow", "saturation"):
        shares = [(share, layer, t) for layer in report.layers for t, share in getattr(layer, kind).items()]
        if shares:
            share, layer, tensor = max(shares, key=lambda s: s[0])
            where = f" (most: {tensor} of {layer.module or 'the layer itself'})" if share else ""
            lines.append(f"  {kind} in {layer.storage}: at most {share:.2%} of a tensor{where}")
    return lines


def lost_bits(excess: float) -> float:
    """log2(excess), at least 0."""
    return math.log2(excess) if excess > 1.0 else 0.0


def bits(value: float) -> str:
    """``3.2 bits``, ``1.0 bit``, ``every bit`` for inf."""
    if math.isinf(value) or math.isnan(value):
        return "every bit"
    return f"{value:.1f} bit{'' if f'{value:.1f}' == '1.0' else 's'}"


def _finding(data: dict[str, Any]) -> Finding:
    worst = data.get("worst")
    return Finding(**{**data, "worst": Worst(**{**worst, "index": tuple(worst["index"])}) if worst else None})


def _describe(finding: Finding, first: bool) -> list[str]:
    lines = [f"  {'to blame' if first else 'also'}: {finding.title()}", f"    {finding.message}"]
    if finding.worst is not None:
        w = finding.worst
        place = f"{w.tensor}[{', '.join(map(str, w.index))}]" if w.index else w.tensor
        lines.append(
            f"    worst: {place} = {w.value:.6g}, reference {w.reference:.6g}, "
            f"off by {abs(w.value - w.reference):.3g} where {w.allowed:.3g} is allowed"
            + (f" ({w.beyond:.1%} of the elements are beyond)" if w.beyond > 0 else "")
        )
    if finding.line:
        lines.append(f"    at {finding.line}")
    if finding.proof:
        lines.append(f"    proof: {finding.proof}")
    if finding.suggestion:
        lines.append(f"    tried: {finding.suggestion}")
    return lines
