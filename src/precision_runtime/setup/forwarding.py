"""How ``setup`` gives a module its mode: the same object, with an instance attribute ``forward`` that casts.

No wrapper: isinstance, attributes, hooks and state_dict keys stay. The attribute is an object of a plain class, so a
set-up model can be pickled and deep-copied, and the copy calls its own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import partial
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.uncompiled import stance

if TYPE_CHECKING:
    from precision_runtime.strategies import Strategy

_SUSPENDED: ContextVar[bool] = ContextVar("precision_runtime_suspended", default=False)
_SUSPENSIONS: list[None] = []  # one for each suspended() that is open in any thread; empty, nobody need ask further


class ScriptingError(ConfigurationError, AttributeError):
    """torch.jit.script was given a module that is set up. An ``AttributeError``, for others ask with ``hasattr``."""


class PatchedMethod:
    """Base of the objects that stand in a module's ``__dict__`` in place of one of its methods.

    ``own`` is the instance attribute that stood there before, None where the class's method counts. The class's
    method is looked up at each call: whoever patches the class afterwards is obeyed.
    """

    method: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own: Callable[..., Any] | None = module.__dict__.get(self.method)
        module.__dict__[self.method] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method without the patch, bound."""
        if self.own is not None:
            return self.own
        method = getattr(type(self.module), self.method)
        return MethodType(method, self.module) if inspect.isfunction(method) else method.__get__(self.module)

    def undo(self) -> None:
        """Put back what stood there before."""
        if self.own is None:
            del self.module.__dict__[self.method]
        else:
            self.module.__dict__[self.method] = self.own


class PatchedForward(PatchedMethod):
    """Base of the objects that stand there as ``forward``."""

    method = "forward"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)  # generation code asks which arguments forward takes

    @property
    def __code__(self) -> Any:
        return getattr(self.__wrapped__, "__code__", None)  # torch.export names the user's file in its messages

    @property
    def __globals__(self) -> Any:
        name = type(self.module).__name__
        raise ScriptingError(
            f"torch.jit.script reads the source code of {name}.forward, in which the casts and the autocast of setup "
            "do not stand. Script the plain model and set up what that returns, or give the model that is set up to "
            "torch.jit.trace, torch.export or torch.compile"
        )


class PatchedApply(PatchedMethod):
    """Base of the objects that stand there as ``_apply``, through which ``.to()``, ``.half()`` and the like go."""

    method = "_apply"


Patch = TypeVar("Patch", bound=PatchedMethod)


class SetUpForward(PatchedForward):
    """The forward of a set-up module: inputs cast, forward run in the mode, outputs cast."""

    def __init__(self, module: nn.Module, strategy: Strategy) -> None:
        super().__init__(module)
        self.strategy = strategy

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module in its mode, or plainly inside ``suspended()``."""
        # A context variable would break the compiler's graph; suspended() sees to it that compiled code is not run.
        if _SUSPENSIONS and not torch.compiler.is_dynamo_compiling() and _SUSPENDED.get():
            return self.__wrapped__(*args, **kwargs)
        # Not __wrapped__: this line is run at every call, and torch.compile must see through it.
        if self.own is None:
            module = self.module
            return self.strategy.call(partial(type(module).forward, module), args, kwargs)
        return self.strategy.call(self.own, args, kwargs)

    def __repr__(self) -> str:
        return f"<forward of {type(self.module).__name__} in {self.strategy.mode}>"


def install(module: nn.Module, strategy: Strategy) -> None:
    """Make ``module`` run in the strategy's mode. Again in the same mode: nothing happens.

    Raises ``ConfigurationError`` where the module or a part of it is set up in another mode or on another device.
    """
    check(module, strategy)
    if not is_set_up(module):
        SetUpForward(module, strategy)


def check(module: nn.Module, strategy: Strategy) -> None:
    """Raise ``ConfigurationError`` where ``module`` or a part of it is set up differently."""
    for path, part in module.named_modules():
        if is_set_up(part) and strategy_of(part) != strategy:
            there = strategy_of(part)
            raise ConfigurationError(
                f"{type(module).__name__}{f' has a part, {path!r}, that' if path else ''} is set up in {there.mode} on "
                f"{there.device} already and cannot be set up in {strategy.mode} on {strategy.device} as well. "
                "Set up a fresh model: what a cast has lost does not come back."
            )


def is_set_up(module: nn.Module) -> bool:
    """Whether ``module`` itself (not only a part of it) has been set up."""
    return patch_of(module, SetUpForward) is not None


def strategy_of(module: nn.Module) -> Strategy:
    """The strategy that ``module`` was set up with; raises ``ConfigurationError`` where it was not."""
    patch = patch_of(module, SetUpForward)
    if patch is None:
        raise ConfigurationError(f"{type(module).__name__} has not been set up in any precision mode")
    return patch.strategy


def restore(module: nn.Module) -> nn.Module:
    """Take the patches of ``module`` and its parts away and return it. Parameters keep the dtype that they have."""
    for part in module.modules():
        for method in (PatchedForward.method, PatchedApply.method):
            while isinstance(patch := part.__dict__.get(method), PatchedMethod):
                patch.undo()
    return module


def patch_of(module: nn.Module, kind: type[Patch]) -> Patch | None:
    """The patch of this kind among those that stand on the method of ``module`` that it patches, or None."""
    patch = module.__dict__.get(kind.method)
    while isinstance(patch, PatchedMethod):
        if isinstance(patch, kind):
            return patch
        patch = patch.own
    return None


_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "xla")


class suspended:  # noqa: N801  # reads as the verb that it is: with suspended():
    """Inside, set-up modules run plainly: nothing is cast and autocast is off, also one switched on outside.

    For this thread (or task) only; compiled models, whose casts are compiled into them, run eagerly meanwhile in the
    whole process. The audit's FP64 reference uses it.
    """

    def __enter__(self) -> None:
        self._stance = stance("force_eager")
        self._token: Token[bool] = _SUSPENDED.set(True)
        _SUSPENSIONS.append(None)
        self._enabled = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
        for device in self._enabled:
            torch.set_autocast_enabled(device, False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for device in self._enabled:
            torch.set_autocast_enabled(device, True)
        _SUSPENSIONS.pop()
        _SUSPENDED.reset(self._token)
        self._stance.__exit__(kind, error, trace)


def is_suspended() -> bool:
    """Whether this code runs inside ``suspended()``."""
    return _SUSPENDED.get()
