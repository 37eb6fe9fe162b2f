"""What a test may change in torch, numpy and Python that outlives it: kept before, put back after."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SEED = 0  # of every lane: models built in a test have the same weights in all of them

# Switches that decide how torch multiplies; which of them exist depends on torch's version. The newer fp32_precision
# comes before allow_tf32, which torch refuses to read once the newer one was set to something it cannot express.
_SWITCHES = (
    "backends.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.mkldnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.cuda.matmul.allow_tf32",
    "backends.cudnn.allow_tf32",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cudnn.enabled",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    "backends.mkldnn.enabled",
)
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "xla")


@contextmanager
def isolated(seed: int = SEED) -> Iterator[None]:
    """Seed every generator, and on leaving, however that comes, put back generators and switches as they were."""
    restore = [_autocast(), _switches(), _scalars(), _generators()]
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _generators() -> Callable[[], None]:
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    array = numpy.random.get_state() if numpy is not None else None
    # Asking a GPU for its state starts its context; before that nobody can have drawn from it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def put_back() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(array)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


def _scalars() -> Callable[[], None]:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    anomaly = torch.is_anomaly_enabled()

    def put_back() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.autograd.set_detect_anomaly(anomaly)

    return put_back


def _autocast() -> Callable[[], None]:
    known = [d for d in _AUTOCAST_DEVICES if torch.amp.is_autocast_available(d)]
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in known]
    cache = torch.is_autocast_cache_enabled()

    def put_back() -> None:
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache)
        torch.clear_autocast_cache()  # casts of the lane's weights must not meet the next lane

    return put_back


def _switches() -> Callable[[], None]:
    before = []
    for path in _SWITCHES:
        *way, name = path.split(".")
        owner: object = torch
        for step in way:
            owner = getattr(owner, step, None)
        try:
            before.append((owner, name, getattr(owner, name)))
        except (AttributeError, RuntimeError):  # not in this torch; or old and new switches were mixed before us
            continue

    def put_back() -> None:
        for owner, name, value in before:
            try:
                changed = getattr(owner, name) != value
            except RuntimeError:  # the test mixed old and new switches: set it without asking
                changed = True
            if changed:
                setattr(owner, name, value)

    return put_back
