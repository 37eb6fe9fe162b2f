"""Master weights: float32 copies of half parameters that the optimizer updates in their place.

The optimizer's ``param_groups`` hold the masters, so its state is float32, and ``optimizer.state_dict()`` needs no
help. After each backward pass the half gradients move to the masters, where they accumulate, are unscaled and clipped;
after each step the masters are rounded into the model. A model's ``state_dict()`` gives the masters, in float32: with
it, the optimizer's and the runtime's state a run goes on bit by bit, and a float32 model loads it as it is. An
optimizer's state is to be loaded after ``setup(model, optimizer)``: before it, torch would round it to half.

(Micikevicius et al., "Mixed Precision Training", 2018, section 3.1; NVIDIA Apex, level O2.)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from precision_runtime.casting import HALF
from precision_runtime.errors import ConfigurationError

_WIDE = (torch.float32, torch.float64)


@dataclass
class _Master:
    """A master, and the version of the half parameter that it was last in step with."""

    tensor: torch.Tensor
    version: int


# Half parameter to master. One table for the process, since state_dict hooks have only the module to ask.
_MASTERS: Any = WeakTensorKeyDictionary()
_BEHIND: Any = WeakTensorKeyDictionary()  # master to a weak reference to its half parameter


def keep_full(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Note the float32 values that ``parameter`` had before it was cast to half: its master begins with them."""
    master = full.detach().requires_grad_(parameter.requires_grad)
    _MASTERS[parameter] = _Master(master, parameter._version)
    _BEHIND[master] = weakref.ref(parameter)


@contextlib.contextmanager
def keeping(models: Iterable[nn.Module]) -> Iterator[None]:
    """Trainable parameters of ``models`` that become half inside: their values from before become their masters."""
    full = [
        (p, p.detach())
        for model in models
        for p in model.parameters()
        if p.requires_grad and p.dtype in _WIDE and not is_lazy(p)
    ]
    yield
    while full:
        parameter, before = full.pop()
        if parameter.dtype in HALF:
            keep_full(parameter, before.to(torch.float32, copy=True))  # others may still hold what was there


def master_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The master of a half parameter, None where it has none."""
    found = _MASTERS.get(parameter) if parameter.dtype in HALF else None
    return None if found is None else found.tensor


def attach(model: nn.Module) -> None:
    """Make checkpoints of ``model`` and its parts float32: the masters where there are some, or the half values."""
    for part in model.modules():
        if _give_full not in part._state_dict_hooks.values():
            part.register_state_dict_post_hook(_give_full)
            part.register_load_state_dict_pre_hook(_take_full)


class NoMasters:
    """What the runtime has in modes without master weights: nothing happens."""

    def keeping(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context of ``model``'s cast: where there are masters, they begin with the values from before it."""
        return contextlib.nullcontext()

    def attach(self, model: nn.Module) -> None:
        """Make ``model``'s checkpoints those of the masters."""

    def adopt(self, optimizer: Optimizer, strictly: bool = False) -> None:
        """Put masters in place of half parameters in ``optimizer``, with the state that it has collected."""

    def gather(self, optimizers: Iterable[Optimizer]) -> None:
        """Move gradients of half parameters to their masters."""

    def spread(self, optimizer: Optimizer) -> None:
        """After a step: round the masters into the model. Their gradients are spent."""

    def refuse(self, closure: object) -> None:
        """Raise ``ConfigurationError`` for a step with a closure, where that cannot work."""

    def behind(self, parameter: torch.Tensor) -> torch.Tensor:
        """The model's parameter that stands behind an optimizer's."""
        return parameter


class Masters(NoMasters):
    """Master weights for every optimizer that a runtime meets, at ``setup`` or later."""

    def keeping(self, model: nn.Module) -> AbstractContextManager[None]:
        """See ``NoMasters.keeping``."""
        return keeping([model])

    def attach(self, model: nn.Module) -> None:
        """See ``NoMasters.attach``."""
        attach(model)

    def adopt(self, optimizer: Optimizer, strictly: bool = False) -> None:
        """See ``NoMasters.adopt``. Groups that were added since are adopted, too.

        A model's parameter that was written to meanwhile (loaded, initialised) passes its new values on to its master.
        Writing through ``.data`` leaves no trace; ``strictly`` compares all values, which ``setup`` does.
        """
        for group in optimizer.param_groups:
            parameters = group["params"]
            for i, p in enumerate(parameters):
                if p.dtype in HALF and p.requires_grad:
                    master = _follow(p, strictly)
                    parameters[i] = master
                    if p in optimizer.state:
                        optimizer.state[master] = optimizer.state.pop(p)
                elif (half := self.behind(p)) is not p:
                    _follow(half, strictly)

    @torch.no_grad()
    def gather(self, optimizers: Iterable[Optimizer]) -> None:
        """See ``NoMasters.gather``: they accumulate in float32, and the half ones are let go."""
        for optimizer in optimizers:
            self.adopt(optimizer)
            for half, master in self._pairs(optimizer):
                if half.grad is None:
                    continue
                gradient = half.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                half.grad = None

    @torch.no_grad()
    def spread(self, optimizer: Optimizer) -> None:
        """See ``NoMasters.spread``. The masters' gradients go: the model's own ``zero_grad()`` does not reach them."""
        pairs = list(self._pairs(optimizer))
        if pairs:
            torch._foreach_copy_([half for half, _ in pairs], [master for _, master in pairs])
        for half, master in pairs:
            _MASTERS[half].version = half._version
            master.grad = None

    def refuse(self, closure: object) -> None:
        """A closure runs the model on weights that the optimizer has changed in its masters only."""
        if closure is not None:
            raise ConfigurationError(
                "a step with a closure evaluates the model in between, and with master weights the model has not got "
                "the new values yet. Use a mode without master weights (bf16-mixed, 32-true), or leave the closure out"
            )

    def behind(self, parameter: torch.Tensor) -> torch.Tensor:
        """See ``NoMasters.behind``."""
        found = _BEHIND.get(parameter)
        half: torch.Tensor | None = None if found is None else found()
        return parameter if half is None else half

    def _pairs(self, optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for group in optimizer.param_groups:
            for master in group["params"]:
                half = self.behind(master)
                if half is not master:
                    yield half, master


@torch.no_grad()
def _follow(half: torch.Tensor, strictly: bool) -> torch.Tensor:
    """The master of ``half``, made where there is none, with every value that was written into the model since."""
    found = _MASTERS.get(half)
    if found is None or found.tensor.shape != half.shape:
        keep_full(half, half.detach().float())
        found = _MASTERS[half]
    elif strictly or found.version != half._version:
        master = found.tensor
        if master.device != half.device:
            master.data = master.data.to(half.device)
        written = half.ne(master.to(half.dtype))
        master.copy_(torch.where(written, half.float(), master))
        found.version = half._version
    kept: torch.Tensor = found.tensor
    return kept


def _give_full(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put the masters, or the half values in float32, where ``module``'s own half tensors stand in its checkpoint."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        key = prefix + name
        there = state.get(key)
        if tensor is None or tensor.dtype not in HALF or there is None or there is tensor:  # keep_vars asks for itself
            continue
        master = master_of(tensor)
        state[key] = there.float() if master is None else _follow(tensor, strictly=False).detach()


def _take_full(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
    """Give the masters what the checkpoint has beyond half; torch rounds it into the model itself."""
    if metadata.get("assign_to_params_buffers", False):
        raise ConfigurationError(
            "load_state_dict(assign=True) would replace the half parameters that the master weights belong to; "
            "load without assign"
        )
    for name, parameter in module._parameters.items():
        value = state.get(prefix + name)
        if parameter is None or parameter.dtype not in HALF or not parameter.requires_grad or value is None:
            continue
        if value.shape != parameter.shape:  # torch says so itself
            continue
        full = value.detach().to(parameter.device, torch.float32)
        master = master_of(parameter)
        if master is None:
            keep_full(parameter, full.clone())
        else:
            master.detach().copy_(full)
