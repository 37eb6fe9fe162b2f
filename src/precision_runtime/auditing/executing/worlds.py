"""One set of module objects, two worlds: the mode's own tensors, and the true FP64 ones.

The objects stay the same (closures, tied weights, hooks and methods keep working); only the tensors behind parameters
and buffers are exchanged, and everything is put back in the end, also when user code raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.dispatch import WIDE
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.provenance import Provenance
from precision_runtime.auditing.executing.scripted import script_attributes, set_script_attribute
from precision_runtime.layers import QuantizedLayer
from precision_runtime.tree import leaves, map_tensors

# torch's own bookkeeping in a module's __dict__; hooks are ours and users', and survive.
_INTERNAL = frozenset(k for k in vars(nn.Module()) if k != "training")
_MISSING = object()


@dataclass
class _Content:
    """What a tensor or container attribute holds: the same objects (an LSTM lists its own parameters), and values."""

    structure: Any  # the container with containers of its own and the very same tensors; None for a tensor
    values: list[tuple[torch.Tensor, torch.Tensor, int]]  # tensor, copy, version

    @classmethod
    def of(cls, value: Any) -> _Content:
        tensors = [t for _, t in leaves(value) if not isinstance(t, nn.Parameter)]
        structure = None if isinstance(value, torch.Tensor) else map_tensors(lambda t: t, value)
        return cls(structure, [(t, t.detach().clone(), t._version) for t in tensors])

    def written(self) -> bool:
        """Whether a tensor's values have been changed in place."""
        return any(t._version != version for t, _, version in self.values)

    def resized(self, value: Any) -> bool:
        """Whether a container has another number of entries now."""
        return self.structure is not None and len(value) != len(self.structure)

    def put_back(self, value: Any) -> None:
        """Give the attribute its content back, keeping its identity."""
        for i, (t, kept, version) in enumerate(self.values):
            if t._version != version and t.shape == kept.shape:
                with torch.no_grad():
                    t.copy_(kept)
                self.values[i] = (t, kept, t._version)
        if self.structure is None:
            return
        fresh = map_tensors(lambda t: t, self.structure)
        value.clear()
        if isinstance(value, (list, deque)):
            value.extend(fresh)
        else:
            value.update(fresh)


@dataclass
class _Shelf:
    """What one module holds, shallowly; containers and tensors with a copy of their content."""

    module: nn.Module
    kind: type[nn.Module]  # a mode may swap a layer by giving it another class
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    modules: dict[str, nn.Module | None]
    attributes: dict[str, Any]
    scripted: dict[str, Any]  # attributes of a module of torch.jit
    contents: dict[str, _Content] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> _Shelf:
        attributes = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
        held = (dict(module._parameters), dict(module._buffers), dict(module._modules))
        scripted = script_attributes(module)
        shelf = cls(module, type(module), *held, attributes, scripted)
        for key, value in (attributes | scripted).items():
            if isinstance(value, (torch.Tensor, list, dict, set, deque)):
                shelf.contents[key] = _Content.of(value)
        return shelf

    def put_attributes_back(self) -> None:
        now = vars(self.module)
        for key in [k for k in now if k not in _INTERNAL and k not in self.attributes]:
            del now[key]
        for key, value in self.attributes.items():
            if now.get(key, _MISSING) is not value:
                now[key] = value
            if key in self.contents:
                self.contents[key].put_back(value)
        for key, value in self.scripted.items():
            if key in self.contents:  # a container came as a copy of torch.jit's own, and goes back as one
                self.contents[key].put_back(value)
            set_script_attribute(self.module, key, value)


class Worlds:
    """The modules of one audited function, with their state before the audit, in the mode, and in FP64."""

    def __init__(self, roots: Mapping[str, nn.Module], originals: Originals) -> None:
        self.grad = False  # whether the code differentiates by itself, so that it cannot run under no_grad
        self.names: dict[str, nn.Module] = {}
        seen: set[int] = set()
        for root_name, root in roots.items():
            for name, module in root.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    self.names[".".join(filter(None, (root_name, name)))] = module
        self._modules = list(self.names.values())
        self._shelves = [_Shelf.of(m) for m in self._modules]
        self._base = self._shelves
        self._state: set[int] = set()
        self._parameters = {id(p): p for m in self._modules for p in m._parameters.values() if p is not None}
        self._data = {k: p.data for k, p in self._parameters.items()}
        self._grads = {k: p.grad for k, p in self._parameters.items()}
        self._buffers = {
            id(b): (b, b.detach().clone(), b._version)
            for m in self._modules for b in m._buffers.values() if b is not None
        }  # fmt: skip
        self.true_parameters: dict[int, torch.Tensor] = {}
        self.true_buffers: dict[tuple[int, str], torch.Tensor] = {}
        # Where a mode has quantised a weight, the truth is what its layer multiplies by: quantising costs what it
        # costs. Here are the weights from before.
        self.unquantized: dict[int, torch.Tensor] = {}
        self.low_parameters: dict[int, torch.Tensor] = {}
        self.unrounded: frozenset[int] = frozenset()  # parameters, by id, that the mode computes with as they are
        self.low_buffers: dict[tuple[int, str], torch.Tensor] = {}
        # FP64 parameters beside what they were widened from, so that they can be written over and made anew.
        self._sources: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        shared: dict[int, torch.Tensor] = {}
        for module in self._modules:
            for name, p in module._parameters.items():
                if p is not None and id(p) not in self.true_parameters:
                    source = originals.truth(module, name, p.data)
                    self.true_parameters[id(p)] = widen(source)
                    self._sources[id(p)] = (self.true_parameters[id(p)], source)
            for name, b in module._buffers.items():
                if b is not None:
                    if id(b) not in shared:
                        shared[id(b)] = widen(originals.truth(module, name, b))
                    self.true_buffers[id(module), name] = shared[id(b)]
        for p in self._parameters.values():
            p.grad = None  # the mode's cast would change it in place, as module.to does

    def note_low(self) -> None:
        """Take the present tensors (after the mode's cast) as the low world."""
        self._base = [_Shelf.of(m) for m in self._modules]
        self._state = {
            t.untyped_storage().data_ptr()
            for shelf in self._base for content in shelf.contents.values() for t, _, _ in content.values
            if t.layout is torch.strided
        }  # fmt: skip
        self._state |= {true.untyped_storage().data_ptr() for true, _ in self._sources.values() if _strided(true)}
        for module, shelf in zip(self._modules, self._shelves, strict=True):
            if isinstance(module, QuantizedLayer):
                old, new = shelf.parameters["weight"], module.weight
                before = self.true_parameters.get(id(old))
                if before is not None and before.is_floating_point():
                    self.unquantized[id(new)] = before
                self.true_parameters[id(new)] = module.dequantized().to(torch.float64)
            for p in module._parameters.values():
                if p is not None:
                    self._parameters.setdefault(id(p), p)
                    self.low_parameters[id(p)] = p.data
            for name, b in module._buffers.items():
                if b is not None:
                    self.low_buffers[id(module), name] = b.detach().clone()
        used = {id(p) for m in self._modules for p in m._parameters.values() if p is not None}
        self.true_parameters = {k: t for k, t in self.true_parameters.items() if k in used}

    def is_state(self, t: torch.Tensor) -> bool:
        """Whether ``t`` shares memory with what is written to between runs.

        That are tensors that are attributes, which are put back, and FP64 parameters, which are disturbed in place.
        """
        return bool(self._state) and _strided(t) and t.untyped_storage().data_ptr() in self._state

    def provenance(self) -> Provenance:
        """One that knows the parameters and buffers of the world that stands."""
        modules = list(self.names.values())
        buffers = [b for m in modules for b in m._buffers.values() if b is not None]
        return Provenance(buffers, [p for m in modules for p in m._parameters.values() if p is not None])

    @contextmanager
    def low(self) -> Iterator[None]:
        """The mode's own tensors, fresh."""
        self._enter(self.low_parameters, self.low_buffers)
        try:
            yield
        finally:
            self._reset_attributes()

    @contextmanager
    def true(
        self, parameters: Mapping[int, torch.Tensor] | None = None,
        buffers: Mapping[tuple[int, str], torch.Tensor] | None = None,
        state: Mapping[tuple[int, str], Any] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """The FP64 tensors, fresh; some of them, or attributes, replaced by what is given."""
        self._enter({**self.true_parameters, **(parameters or {})}, {**self.true_buffers, **(buffers or {})})
        for (key, name), value in (state or {}).items():
            module = self._by_id[key]
            if name in self._shelf_of[key].scripted:
                set_script_attribute(module, name, widen_tree(value))
                continue
            holder = module._buffers if name in module._buffers else vars(module)
            holder[name] = widen_tree(value)
        try:
            yield
        finally:
            self._reset_attributes()

    @contextmanager
    def disturbed(
        self, noise: Noise, used: Set[int], moved: Mapping[int, torch.Tensor]
    ) -> Iterator[dict[int, torch.Tensor]]:
        """The FP64 parameters in ``used`` (by id) disturbed by ``noise``, those in ``moved`` also as far as it says.

        Those that the mode does not round (``unrounded``) are disturbed as float32 rounds.
        They are disturbed where they are and widened anew afterwards: no second copy of a large model in FP64.
        """
        keys = [key for key in self.true_parameters if key in used]
        out: dict[int, torch.Tensor] = {}
        try:
            for key in keys:
                value = self.true_parameters[key]
                value = noise.single(value) if key in self.unrounded else noise.rounded(value)
                if key in moved:
                    value = noise.within(value, moved[key])
                out[key] = self._put(key, value)  # once: what has been written over is no longer known as its source
            yield out
        finally:
            for key in keys:
                true, source = self._sources.get(key, (None, None))
                if true is not None and source is not None and out.get(key) is true:
                    true.copy_(source)

    def _put(self, key: int, value: torch.Tensor) -> torch.Tensor:
        """Write ``value`` over the FP64 parameter where that can be made anew; what stands for it otherwise."""
        now = self.true_parameters[key]
        true, source = self._sources.get(key, (None, None))
        if now is not true or source is None or value is now:
            return value
        if source.dtype == now.dtype or not torch.equal(now.to(source.dtype), source):
            return value  # FP64 from the start, the user's own; or code in the mode has written to its parameter
        return now.copy_(value)

    @contextmanager
    def standing(self, true: Mapping[int, torch.Tensor], low: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Other values stand for some of the parameters meanwhile, in FP64 and in the mode."""
        before = self.true_parameters, self.low_parameters
        self.true_parameters, self.low_parameters = {**before[0], **true}, {**before[1], **low}
        try:
            yield
        finally:
            self.true_parameters, self.low_parameters = before

    def restore(self) -> None:
        """Put back every tensor, gradient and attribute as it was before the audit."""
        for shelf in self._shelves:
            module = shelf.module
            module.__class__ = shelf.kind
            for now, before in (
                (module._parameters, shelf.parameters),
                (module._buffers, shelf.buffers),
                (module._modules, shelf.modules),
            ):
                if dict(now) != before if now is module._modules else not _same(now, before):
                    if isinstance(now, dict):
                        now.clear()
                    for name, value in before.items():  # torch.jit's own containers can do nothing else
                        now[name] = value  # type: ignore[assignment]
            shelf.put_attributes_back()
        for key, data in self._data.items():
            self._parameters[key].data = data
            self._parameters[key].grad = self._grads[key]
        for buffer, value, version in self._buffers.values():
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)

    def changed_state(self, modules: list[nn.Module]) -> dict[tuple[int, str], Any]:
        """Buffers and attributes of ``modules`` that differ from a fresh world's, as copies: a call's own state."""
        changed: dict[tuple[int, str], Any] = {}
        for module in modules:
            for name, b in module._buffers.items():
                fresh = self._fresh.get((id(module), name))
                if b is not None and (fresh is None or fresh[0] is not b or b._version != fresh[1]):
                    changed[id(module), name] = clone(b)
            shelf = self._shelf_of[id(module)]
            for key, value in script_attributes(module).items():
                same = value is shelf.scripted[key] and not (key in shelf.contents and shelf.contents[key].written())
                if not same:  # a container comes as a new copy each time
                    changed[id(module), key] = clone(value)
            for key, value in vars(module).items():
                if key in _INTERNAL:
                    continue
                before = shelf.attributes.get(key, _MISSING)
                if (
                    (value is not before and not isinstance(value, nn.Module))
                    or (isinstance(value, torch.Tensor) and shelf.contents[key].written())
                    or (isinstance(value, (list, dict, set, deque)) and shelf.contents[key].resized(value))
                ):
                    changed[id(module), key] = clone(value)
        return changed

    def _enter(self, parameters: Mapping[int, torch.Tensor], buffers: Mapping[tuple[int, str], torch.Tensor]) -> None:
        self._by_id = {id(m): m for m in self._modules}
        self._shelf_of = {id(s.module): s for s in self._base}
        self._reset_attributes()
        for key, p in self._parameters.items():
            p.grad = None
            if key in parameters:
                p.data = parameters[key]
        copies: dict[int, torch.Tensor] = {}
        self._fresh: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}
        for (key, name), value in buffers.items():
            new = copies.setdefault(id(value), value.clone())
            self._by_id[key]._buffers[name] = new
            self._fresh[key, name] = (new, new._version)

    def _reset_attributes(self) -> None:
        for shelf in self._base:
            shelf.put_attributes_back()
            if len(shelf.module._buffers) != len(shelf.buffers):
                for name in [n for n in shelf.module._buffers if n not in shelf.buffers]:
                    del shelf.module._buffers[name]
            for name, b in shelf.buffers.items():
                if b is None:
                    shelf.module._buffers[name] = None


def widen(t: torch.Tensor) -> torch.Tensor:
    """A copy in FP64 (complex128); integers and bools are copied as they are."""
    t = t.detach()
    return t.to(WIDE[t.dtype]) if t.dtype in WIDE else t.clone()


def widen_tree(value: Any) -> Any:
    """Every tensor of a container or cache object, widened; containers are new."""
    return map_tensors(widen, value)


def clone(value: Any) -> Any:
    """Every tensor of a container or cache object, cloned and detached; containers are new."""
    return map_tensors(lambda t: t.detach().clone(), value)


def _strided(t: torch.Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return len(a) == len(b) and all(k in b and b[k] is v for k, v in a.items())
