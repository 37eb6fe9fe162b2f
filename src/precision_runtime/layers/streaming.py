"""Models made in quantised layers, with one float32 weight in memory at a time: what ``init_module`` opens there.

A layer is done only when the model is: after nn.Linear has drawn its weight, a model draws it again (``apply`` of its
own initialisation), scales it, ties it or reads it, and which layers are to be quantised depends on names that exist in
the end only. So a weight is quantised as soon as another one is touched, and its memory is given back, but the object
stays, and how its values came about is on record: the operations since they were last overwritten as a whole, with the
generator's state before each. Whatever touches the weight later finds its memory there again, and its values where they
are read, drawn again from the record. The model is that of ``setup(Net())``, bit by bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from precision_runtime.dispatching import OwnMode, opened
from precision_runtime.errors import ConfigurationError
from precision_runtime.setup.building import Building

if TYPE_CHECKING:
    from precision_runtime.strategies.quantized import QuantizedStrategy

Pack = Callable[[torch.Tensor], nn.Parameter]

# Operations that write every element of their first argument, whatever was in it.
_FILLS = frozenset({"bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_",
                    "random_", "uniform_", "zero_"})  # fmt: skip

# What reads or hands out memory without an operation that a dispatch mode would see.
_RAW = frozenset({"__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "_typed_storage", "data_ptr", "numpy",
                  "share_memory_", "storage", "tolist", "untyped_storage"})  # fmt: skip

_SMALL = 1024  # elements of another tensor that the record copies; a larger one would cost what is to be saved
_LARGE = 1 << 18  # elements of a new tensor before which memory is given back


@dataclass(frozen=True)
class _Alias:
    """A view of a watched weight, without holding it."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, t: torch.Tensor) -> _Alias:
        return cls(t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()))

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Written:
    """One operation that wrote to a weight, and the generator with its state before, where it draws."""

    function: Any
    args: Any
    kwargs: Any
    generator: torch.Generator | None
    state: torch.Tensor | None

    def again(self, storage: torch.UntypedStorage) -> None:
        args, kwargs = tree_map(lambda v: v.on(storage) if isinstance(v, _Alias) else v, (self.args, self.kwargs))
        if self.generator is None or self.state is None:
            self.function(*args, **kwargs)
            return
        before = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            self.function(*args, **kwargs)
        finally:
            self.generator.set_state(before)


@dataclass(eq=False)
class _Weight:
    """A watched weight. ``record`` is None where nobody saw its values come about; then they are not had twice."""

    parameter: weakref.ref[nn.Parameter]
    name: str
    alias: _Alias
    storage: torch.UntypedStorage
    size: int = field(init=False)
    state: Literal["live", "stale", "freed"] = "live"  # values there; memory there; neither
    record: list[_Written] | None = None
    packed: nn.Parameter | None = None  # the present values quantised
    pinned: bool = False

    def __post_init__(self) -> None:
        self.size = self.storage.nbytes()

    def allocate(self) -> None:
        if self.state == "freed":
            self.storage.resize_(self.size)
            self.state = "stale"

    def revive(self, wanted: str) -> None:
        """Have the values in memory. Raises ``ConfigurationError`` where they are quantised already for good."""
        self.allocate()
        if self.state == "live":
            return
        if self.record is None:
            raise ConfigurationError(
                f"init_module has quantised the weight of {self.name} as soon as another layer was made, and now "
                f"{wanted} needs its former values, which came from elsewhere (a copy, a checkpoint). Make the model "
                "outside and use setup(model), or set the values once and for all before the next layer is touched"
            )
        with torch.no_grad():
            for written in self.record:
                written.again(self.storage)
        self.state = "live"

    def free(self, pack: Pack) -> int:
        """Quantise, give the memory back, and say how many bytes: none where values that are not finite must stay."""
        if self.state == "freed" or self.pinned:
            return 0
        if self.state == "live" and self.packed is None:
            with torch.no_grad():
                values = self.alias.on(self.storage)
                if not all_finite(values):
                    return 0
                self.packed = pack(values)
        self.storage.resize_(0)
        self.state = "freed"
        return self.size


def all_finite(values: torch.Tensor) -> bool:
    """Whether every value is finite as float32; makes no copy."""
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low.float()) & torch.isfinite(high.float()))


class Watch(OwnMode):
    """Sees every operation of its thread; keeps one of the weights that it was shown in memory, or those in use."""

    def __init__(self, pack: Pack, choosy: bool) -> None:
        super().__init__()
        self.pack = pack
        self.choosy = choosy  # whether a layer may have to stay plain for its name, which nobody knows yet
        self.weights: dict[int, _Weight] = {}  # by storage

    def add(self, parameter: nn.Parameter, name: str) -> None:
        """Watch ``parameter`` from now on, where it owns its memory."""
        with _raw():
            if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.is_floating_point():
                return
            if type(parameter.data) is not torch.Tensor or not parameter.is_contiguous() or not parameter.numel():
                return
            storage = parameter.untyped_storage()
            if storage.nbytes() != parameter.numel() * parameter.element_size() or not storage.resizable():
                return
            if storage._cdata in self.weights:
                return
            added = _Weight(weakref.ref(parameter), name, _Alias.of(parameter), storage)
            self.weights[storage._cdata] = added
        with _disable_current_modes():
            self._make_room([added])

    def of(self, tensor: torch.Tensor) -> _Weight | None:
        """The watched weight that ``tensor`` shares memory with."""
        if tensor.layout is not torch.strided or tensor.is_meta or not self.weights:
            return None
        with _raw():
            return self.weights.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return opened(self, func, args, kwargs)
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
        found = {id(t): w for t in tensors if (w := self.of(t)) is not None}
        if not found and _elements(func, args) >= _LARGE:
            self._make_room([])  # before the next large tensor, so that it finds the place of the last
        if not found or func is torch.ops.aten.detach.default:
            return func(*args, **kwargs)
        touched = list({id(w): w for w in found.values()}.values())
        self._make_room(touched)
        name = func._schema.name.removeprefix("aten::")
        written = _written_to(func, args, kwargs, found)
        filled = written[0] if name in _FILLS and self._fills(args[0], found, tensors) else None
        viewed = not written and _is_view(func)
        for weight in touched:
            if viewed or weight is filled:
                weight.allocate()
            else:
                weight.revive(name)
        entry = self._entry(func, args, kwargs, found) if written else None
        result = func(*args, **kwargs)
        for weight in written:
            weight.state, weight.packed = "live", None
            if weight is filled:
                weight.record = None if entry is None else [entry]
            elif weight.record is not None:
                weight.record = None if entry is None or len(touched) > 1 else [*weight.record, entry]
        return result

    def pin(self, tensor: torch.Tensor, wanted: str) -> None:
        """Somebody gets at the memory of ``tensor`` itself: it stays from now on."""
        weight = self.of(tensor)
        if weight is not None:
            weight.revive(wanted)
            weight.pinned, weight.packed = True, None

    def _make_room(self, needed: list[_Weight]) -> None:
        freed = 0
        for weight in self.weights.values():
            if weight.state != "freed" and all(weight is not other for other in needed):
                freed += 0 if self.choosy and weight.record is None else weight.free(self.pack)
        if freed >= _LARGE * 4:
            _trim()

    def _fills(self, target: torch.Tensor, found: dict[int, _Weight], tensors: list[torch.Tensor]) -> bool:
        weight = found.get(id(target))
        if weight is None or target.numel() * target.element_size() != weight.size:
            return False
        return all(found.get(id(t)) is not weight for t in tensors if t is not target)

    def _entry(self, func: Any, args: Any, kwargs: Any, found: dict[int, _Weight]) -> _Written | None:
        """The record of an operation, or None where it could not be done again."""
        possible = True

        def kept(value: Any) -> Any:
            nonlocal possible
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in found:
                return _Alias.of(value)
            possible = possible and value.numel() <= _SMALL
            return value.detach().clone() if possible else value

        saved_args, saved_kwargs = tree_map(kept, (args, kwargs))
        if not possible:
            return None
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return _Written(func, saved_args, saved_kwargs, None, None)
        generator = kwargs.get("generator") or _default_generator(args[0].device)
        state = None if generator is None else generator.get_state()
        return None if generator is None else _Written(func, saved_args, saved_kwargs, generator, state)


class _RawAccess(TorchFunctionMode):
    """Has values in memory before Python gets at that memory without an operation."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _RAW and args and isinstance(args[0], torch.Tensor):
            self.watch.pin(args[0], name)
        return func(*args, **(kwargs or {}))


class StreamedBuilding(Building):
    """See the module. ``strategy`` says in the end which layers are swapped."""

    strategy: QuantizedStrategy

    def __enter__(self) -> None:
        options = self.strategy.options
        self._watch = Watch(self.strategy.pack, bool(options.ignore_modules or options.islands))
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(_RawAccess(self._watch))  # first: modes are left in the reverse order
        super().__enter__()
        self._modes.enter_context(self._watch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)  # watched: casts of weights that stay plain find their values
        finally:
            self._modes.close()
            self._settle(failed=kind is not None)

    def _convert(self, roots: list[nn.Module]) -> None:
        self.strategy.convert_ready(roots, self._ready)

    def _ready(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """The weight quantised, where its values are not in memory or have been quantised already."""
        weight = self._watch.of(parameter)
        if weight is None:
            return None
        if weight.packed is None and weight.state != "live":
            weight.revive("its last form")
        return weight.packed

    def _settle(self, failed: bool) -> None:
        """What is not quantised after all, or is held by somebody, gets its values back; by an exception, too."""
        for weight in self._watch.weights.values():
            if weight.state == "live" or not _is_held(weight.storage):
                continue
            try:
                weight.revive("its owner")
            except ConfigurationError:
                weight.alias.on(weight.storage).fill_(float("nan"))  # no values at all, and visibly so
                if not failed:  # then the block's own error is what is to be seen
                    raise

    def _registered(self, module: nn.Module, name: str, value: Any) -> None:
        super()._registered(module, name, value)
        for layer, weight in _weights(module, name, value):
            self._watch.add(weight, f"{type(layer).__name__}({layer.in_features}, {layer.out_features})")


def _weights(module: nn.Module, name: str, value: Any) -> Iterator[tuple[nn.Linear, nn.Parameter]]:
    if isinstance(value, nn.Parameter):
        if type(module) is nn.Linear and name == "weight":
            yield module, value
    elif isinstance(value, nn.Module):
        for part in value.modules():  # a copy of a layer registers nothing by itself
            weight = part._parameters.get("weight") if type(part) is nn.Linear else None
            if isinstance(part, nn.Linear) and isinstance(weight, nn.Parameter):
                yield part, weight


def _written_to(func: Any, args: Any, kwargs: Any, found: dict[int, _Weight]) -> list[_Weight]:
    """The watched weights that ``func`` writes to, by its schema."""
    written: dict[int, _Weight] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for tensor in _tensors(value):
            if id(tensor) in found:
                written[id(found[id(tensor)])] = found[id(tensor)]
    return list(written.values())


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return [v for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)]


def _elements(func: Any, args: Any) -> int:
    """How many elements a function that makes a tensor from nothing (empty, zeros, randn) makes; 0 for others."""
    arguments = func._schema.arguments
    return math.prod(args[0]) if args and arguments[0].name == "size" else 0


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _default_generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found: torch.Generator = torch.cuda.default_generators[index]
        return found
    return None


def _is_held(storage: torch.UntypedStorage) -> bool:
    """Whether anybody else than this record has the storage."""
    probe = torch.empty(1).untyped_storage()
    count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
    return count is None or count(storage._cdata) > count(probe._cdata)


def _trim() -> None:
    """Have the C library give back what it keeps: with layers of some megabytes that is as much as several of them."""
    trim = getattr(_process(), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


@functools.cache
def _process() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _raw() -> Any:
    return torch._C.DisableTorchFunction()
