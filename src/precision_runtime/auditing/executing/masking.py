"""Rows of attention that are masked entirely: nothing is attended to, so they have no right result.

``scaled_dot_product_attention`` gives 0 where the mask is -inf in every place, and an average of everything where it
is a large negative number: which of the two depends on how float32's smallest number rounds to the mode's dtype. A
softmax by hand gives an average of those places that are masked once and not twice, or of those whose score still
shows beside float16's smallest number. Callers throw such rows away (they belong to padding). So they are the same in
every run of an audit: an average of all places after a softmax by hand (zeros would leave a norm behind it without
variance, and its gradient out of range), 0 otherwise, and then no gradient comes in through them. A row that comes out
as NaN stays as it is, since that spreads.

Where adding such a number to a score has made -inf of it in the low-precision run, code is one step from a row of
nothing but -inf, which is NaN: then no row of a softmax by hand is settled, in any run, and the overflow shows.

A choice of the largest that has to take some masked places, too, may take any of them: float16's smallest number
swallows what a score adds to it, float64's does not. So all masked places of such a row are alike in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from precision_runtime.formats import FORMATS, Format

_BY_HAND = "aten::_softmax"
_SOFTMAX = frozenset(("aten::_safe_softmax", _BY_HAND))
_ATTENTION = frozenset(
    f"aten::_scaled_dot_product_{name}" for name in ("flash_attention_for_cpu", "efficient_attention")
)
_BACKWARD = frozenset(f"{name}_backward" for name in _ATTENTION)
_CHOICES = frozenset(("aten::topk", "aten::sort"))
MASKED = _SOFTMAX | _ATTENTION | _BACKWARD | _CHOICES


# Beside a score of this size another one is lost even in float32, whose steps are 8 wide there: a mask of -1e9 or -1e10
# hides all scores of a row, and what FP64 still tells apart there nobody gets.
SWALLOWED = 2.0**26

# What is above the first is masked in no format, what is below the second is in every one.
_SOMEWHERE, _EVERYWHERE = -FORMATS["float16"].max / 2.0, -FORMATS["float64"].max / 2.0


class Masking:
    """Runs the ops of ``MASKED``. Half of the largest value of ``format_``, negative, is what no score comes to.

    ``masked`` and ``depends`` say of the FP64 runs so far whether they have masked any score, and whether they might
    have masked others with the limit of another format: then they are no reference for a mode in that format.
    """

    def __init__(self, format_: Format) -> None:
        self._limit = -format_.max / 2.0
        self.spilt = False  # a score has become -inf by a mask that is finite
        self.masked = self.depends = False

    def serves(self, other: Masking) -> bool:
        """Whether runs with this one are what they would be with ``other``.

        bfloat16 and float32 end at about the same number, and a mask's constant is not between these.
        """
        alike = 0.9 < self._limit / other._limit < 1.1
        return (alike or not self.depends) and (self.spilt == other.spilt or not self.masked)

    def watch(self, scores: torch.Tensor, mask: object, total: torch.Tensor) -> None:
        """Look at a sum of the low-precision run for a score that its mask has made -inf."""
        if self.spilt or not isinstance(mask, torch.Tensor) or total.dtype is not torch.float16:
            return
        if total.layout is not torch.strided:
            return
        made = total == -torch.inf
        if made.any():
            one, other = scores.expand_as(total)[made], mask.expand_as(total)[made]
            finite, masks = one.isfinite() & other.isfinite(), (one <= self._limit, other <= self._limit)
            self.spilt = bool((finite & (masks[0] != masks[1])).any())

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``func(*args, **kwargs)`` with entirely masked rows settled."""
        name = func._schema.name
        if name in _SOFTMAX:
            scores, dim, result = args[0], int(args[1]), func(*args, **kwargs)
            if name != _BY_HAND:
                return self._settled(result, scores, dim)
            return self._settled(result, scores, dim, None if self.spilt else 1.0 / max(1, result.shape[dim]))
        if name in _CHOICES:
            return self._chosen(func, args, kwargs)
        shift = 1 if name in _BACKWARD else 0
        mask = kwargs.get("attn_mask", args[3 + shift] if name.startswith("aten::_scaled_dot_product_eff") else None)
        if not isinstance(mask, torch.Tensor) or not mask.is_floating_point() or not mask.numel():
            return func(*args, **kwargs)
        if shift:
            rows = self._below(mask.amax(-1, keepdim=True), self._limit)
            return func(args[0].masked_fill(rows, 0.0), *args[1:], **kwargs) if rows.any() else func(*args, **kwargs)
        first, *others = func(*args, **kwargs)
        return (self._settled(first, mask, -1), *others)

    def _chosen(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        scores, result = args[0], func(*args, **kwargs)
        if not scores.is_floating_point() or not scores.dim() or not scores.numel():
            return result
        masked = self._below(scores, self._limit)
        if not masked.any() or bool(scores.amax() <= self._limit):
            return result
        _, indices = func(scores.masked_fill(masked, self._limit), *args[1:], **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        dim = kwargs.get("dim", args[names.index("dim")] if len(args) > names.index("dim") else -1)
        return type(result)((scores.gather(dim, indices), indices))

    def _below(self, scores: torch.Tensor, limit: float) -> torch.Tensor:
        """Where ``scores`` are no larger than ``limit``; notes whether other formats have other such places."""
        if scores.dtype is torch.float64 and not self.depends:
            lowest = float(scores.amin())
            self.masked |= lowest <= _SOMEWHERE
            if self.masked:
                self.depends = bool(((scores <= _SOMEWHERE) & (scores > _EVERYWHERE)).any())
        return scores <= limit

    def _settled(self, result: torch.Tensor, scores: torch.Tensor, dim: int, to: float | None = 0.0) -> torch.Tensor:
        """The result with rows that are masked entirely made ``to``; None leaves them as they are."""
        if not scores.is_floating_point() or not scores.dim() or not scores.numel():
            return result
        rows = self._below(scores.amax(dim, keepdim=True), max(self._limit, -SWALLOWED))
        if to is None or not rows.any():
            return result
        return result.masked_fill(rows & result.isfinite(), to)
