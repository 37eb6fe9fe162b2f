"""Judging a training: run in a mode, ranked among FP64 trainings disturbed by the mode's rounding."""

from __future__ import annotations

from precision_runtime.training.procedure import audit_training

__all__ = ["audit_training"]
