"""Turn verdicts into findings: which kind, in which words, most upstream first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from precision_runtime.auditing.blaming.opblame import Blame
from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.worlds import widen
from precision_runtime.auditing.judging.excess import TAIL_RATIO, Judgement
from precision_runtime.auditing.judging.judge import Judge
from precision_runtime.auditing.judging.sheet import Verdict
from precision_runtime.record import Finding, Kind, Remark, Where, bits, lost_bits

# Findings whose op is searched for: each costs some 20 runs of the call, and the same defect in every layer is one.
SEARCHED = 3


def findings_of(
    judge: Judge, search: Callable[[Verdict], Blame | None] | None = None
) -> tuple[list[Finding], list[Remark]]:
    """All findings, guilty parts first: innermost failing calls as they failed, then their callers.

    ``search`` names the guilty op of a failing call; it is asked for the first ``SEARCHED`` findings that are no mere
    consequence of another.
    """
    findings: list[tuple[Finding, Verdict]] = []
    remarks: list[Remark] = []
    steep_inside: set[int] = set()
    final = [v for v in judge.verdicts if v.call is None and v.where == "backward" and v.failed]
    for verdict in sorted(judge.verdicts, key=_upstream_first):
        if verdict.failed and _reaches_nothing(verdict, final):
            # A gradient inside that leaves the range but reaches no parameter and no input: that of a padded row,
            # which the embedding drops, or of a branch that weighs nothing.
            remarks.append(
                Remark("harmless-range", f"{verdict.worst.tensor}: {verdict.worst.note}; no final gradient is touched",
                       _name(verdict.call))
            )  # fmt: skip
        elif verdict.failed:
            findings.append((_finding(judge, verdict), verdict))
        elif verdict.amplification > 0.0:
            parent = verdict.call.parent if verdict.call is not None else None
            inherited = (verdict.call is None and bool(steep_inside)) or id(verdict.call) in steep_inside
            while parent is not None:
                steep_inside.add(id(parent))
                parent = parent.parent
            if judge.yardstick.mixed:
                findings.append((_steep(verdict), verdict))
            elif not inherited:
                remarks.append(
                    Remark(
                        "ill-conditioned",
                        f"the result moves {verdict.amplification:.0f} times as much as its operands' rounding; in "
                        "this mode that is the function's own nature, no defect",
                        _name(verdict.call),
                    )
                )
    named = _one_per_module(findings)
    if search is None:
        return [f for f, _ in named], remarks
    # A buffer's cast has been proven already, by the call with that buffer alone as it was.
    guilty = [(f, v) for f, v in named if not v.consequence and f.kind != "cast"][:SEARCHED]
    found = {id(f): search(v) for f, v in guilty}
    kept: list[Finding] = []
    for finding, verdict in named:
        blame = found.get(id(finding))
        if finding.kind == "amplification" and _is_spread(finding, verdict, blame, kept):
            remarks.append(
                Remark(
                    "ill-conditioned",
                    f"the result moves {finding.excess:.0f} times as much as its operands' rounding; no op of it "
                    "explains that alone, so only FP32 for much of it would lessen it",
                    finding.module,
                )
            )
        else:
            kept.append(_with_op(finding, blame))
    return kept, remarks


def _reaches_nothing(verdict: Verdict, final: list[Verdict]) -> bool:
    """Whether a gradient inside is out of range and no final one is wrong for it; ``final`` are those that failed.

    A backward pass is linear: no infinity becomes a number. A gradient that is flushed to zero may make one wrong.
    """
    if verdict.where != "backward" or not verdict.worst.settled:
        return False
    infinite = verdict.call is not None and verdict.worst.kind == "range"
    return not any(v.worst.kind == "range" for v in final) if infinite else not final


def _is_spread(finding: Finding, verdict: Verdict, blame: Blame | None, kept: list[Finding]) -> bool:
    """Whether a function is steep as a whole, or only because a part of it is that stands in no finding any more."""
    if blame is not None:
        return blame.spread
    around = f"{finding.module}." if finding.module else ""
    return verdict.consequence and not any(k.where == "forward" and k.module.startswith(around) for k in kept)


def _with_op(finding: Finding, blame: Blame | None) -> Finding:
    if blame is None:
        return finding
    kind = blame.kind if blame.kind is not None and finding.kind == "instability" else finding.kind
    message = finding.message + (f"; {blame.did}" if blame.did else "")
    return replace(finding, kind=kind, op=blame.op, message=message, line=blame.line or None, proof=blame.proof or None)


def _upstream_first(verdict: Verdict) -> tuple[int, int, int]:
    where = 0 if verdict.where == "forward" else 1
    if verdict.call is None:
        return where, 2, 0
    # In backward the last call of the forward pass is the most upstream one.
    order = verdict.call.end if where == 0 else -verdict.call.start
    return where, int(verdict.consequence), order


def _one_per_module(findings: list[tuple[Finding, Verdict]]) -> list[tuple[Finding, Verdict]]:
    """A module that is called many times is named once per direction, with its worst call."""
    best: dict[tuple[str, str], tuple[Finding, Verdict]] = {}
    for finding, verdict in findings:
        key = (finding.module, finding.where)
        if key not in best or finding.excess > best[key][0].excess:
            best[key] = finding, verdict
    return list(best.values())


def _finding(judge: Judge, verdict: Verdict) -> Finding:
    worst = verdict.worst
    kind, message, tried = _explain(judge, verdict, worst)
    call = verdict.call
    return Finding(
        kind=kind,
        where=_where(verdict),
        module=_name(call),
        op=None,
        lost_bits=_finite_bits(worst.score),
        excess=worst.score,
        message=message,
        module_type=type(call.module).__name__ if call is not None else "",
        call=call.index if call is not None else 0,
        worst=worst.worst,
        suggestion=tried,
    )


def _explain(judge: Judge, verdict: Verdict, worst: Judgement) -> tuple[Kind, str, str | None]:
    """The kind, what happened, and what was tried against it."""
    call = verdict.call if verdict.call is not None else judge.cover
    guilty = call is not None and not verdict.consequence
    if guilty and verdict.where == "forward" and worst.kind is None:
        assert call is not None
        cast = _cast_proof(judge, call, worst.score)
        if cast is not None:
            names, after = cast
            message = f"casting the buffer {names} to the mode's dtype lost what this module needs"
            return "cast", message, _tried(f"{names} kept in fp32", worst.score, after)
    tried = None
    if guilty and verdict.where == "forward":
        assert call is not None
        remains = judge.in_single(call, round_back=worst.kind != "range")
        if remains is not None and remains < worst.score:
            tried = _tried(f"`{call.name}` in FP32" if call.name else "all of it in FP32", worst.score, remains)
    if worst.kind is not None:
        return worst.kind, worst.note or "most of the error is values that were flushed to zero", tried
    figure = worst.note or (
        f"the error is {worst.excess:.3g} times what rounding the operands must cost"
        if worst.excess * TAIL_RATIO >= worst.tail
        else f"single elements are off by {worst.tail:.3g} times what rounding the operands must cost"
    )
    if (
        guilty
        and call is not None
        and type(call.module).__module__.startswith("torch.nn.modules")
        and not call.children
    ):
        return "kernel", f"{figure}; the module is torch's own: its kernel or its use in this dtype is to blame", tried
    if verdict.call is not None:
        figure += ", on the inputs that it really got"
        figure += " and the gradient that really came in" if verdict.where == "backward" else ""
    return "instability", figure + ("; a part of it is to blame" if verdict.consequence else ""), tried


def _tried(what: str, before: float, after: float) -> str:
    return f"with {what} the loss falls from {bits(lost_bits(before))} to {bits(lost_bits(after))}"


def _cast_proof(judge: Judge, call: Call, before: float) -> tuple[str, float] | None:
    """Buffers of the call's module whose cast alone explains the failure, with the score that remains without it."""
    swapped: dict[tuple[int, str], torch.Tensor] = {}
    names: list[str] = []
    for path, module in call.module.named_modules():
        for name, _ in module.named_buffers(recurse=False):  # torch.jit's own containers cannot be iterated
            key = (id(module), name)
            low, true = judge.worlds.low_buffers.get(key), judge.worlds.true_buffers.get(key)
            if low is None or true is None or not low.is_floating_point():
                continue
            if not torch.equal(widen(low).nan_to_num(), true.nan_to_num()):
                swapped[key] = widen(low)
                names.append(f"`{path + '.' if path else ''}{name}`")
    if not swapped:
        return None
    judged = judge.replay_with(call, swapped)
    after = max((j.score for j in judged.values()), default=math.inf) if judged else math.inf
    if after > judge.yardstick.limit and after > before / 4.0:
        return None
    return ", ".join(names), after


def _steep(verdict: Verdict) -> Finding:
    amplification = verdict.amplification
    worst = max(verdict.judgements, key=lambda j: j.error / j.scale if j.scale else 0.0)
    return Finding(
        kind="amplification",
        where="forward",
        module=_name(verdict.call),
        op=None,
        lost_bits=lost_bits(amplification),
        excess=amplification,
        message=f"a steep function under autocast: its relative error is {amplification:.0f} times the unit roundoff. "
        "An FP32 island costs little here: wrap it in torch.autocast(enabled=False) and pass float32 inputs",
        module_type=type(verdict.call.module).__name__ if verdict.call is not None else "",
        call=verdict.call.index if verdict.call is not None else 0,
        worst=worst.worst,
    )


def _finite_bits(score: float) -> float:
    return math.inf if math.isnan(score) else lost_bits(score)


def _name(call: Call | None) -> str:
    return call.name if call is not None else ""


def _where(verdict: Verdict) -> Where:
    return "forward" if verdict.where == "forward" else "backward"
