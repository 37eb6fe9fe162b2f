"""nf4, nf4-dq, fp4, fp4-dq, int8 and int8-training: bitsandbytes layers in place of nn.Linear.

What is no swapped weight is cast as in the true modes, and forward runs as there. Nothing here imports bitsandbytes
before a model is converted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from precision_runtime.casting import cast_module
from precision_runtime.errors import ConfigurationError, NothingToSwapError
from precision_runtime.layers import QuantizedLayer
from precision_runtime.setup.fastpath import leave_fast_path
from precision_runtime.setup.forwarding import PatchedForward
from precision_runtime.setup.islands import island_around, islands_in, plan_islands
from precision_runtime.setup.keeping import Island
from precision_runtime.setup.swapping import Swap, matching, swaps
from precision_runtime.strategies.half import HalfStrategy

Ready = Callable[[nn.Parameter], "nn.Parameter | None"]


def _none_ready(parameter: nn.Parameter) -> nn.Parameter | None:
    return None


class QuantizedStrategy(HalfStrategy):
    """Swaps layers by rule, casts everything else to the compute dtype.

    A model that has bitsandbytes layers already is taken as its author made it: nothing is swapped, the layers that are
    there compute in the mode's dtype.
    """

    def swaps(self, module: nn.Module) -> list[Swap]:
        """See ``Strategy.swaps``."""
        islands = islands_in(module) or plan_islands(module, self)
        return self._rows(module, self.options.ignore_modules, islands, _none_ready)

    def convert(self, module: nn.Module) -> nn.Module:
        """See ``Strategy.convert``. Raises ``NothingToSwapError`` where there is nothing to swap."""
        self.convert_all([module])
        if not any(_is_quantized(part) for part in module.modules()):
            raise NothingToSwapError(self._nothing(module))
        return module

    def convert_all(self, modules: list[nn.Module]) -> None:
        """See ``Strategy.convert_all``; having nothing to swap is no mistake here."""
        self.convert_ready(modules, _none_ready)

    def convert_ready(self, roots: list[nn.Module], ready: Ready) -> None:
        """Convert several modules; ``ready`` gives weights that have been quantised beforehand."""
        # A pattern is about the whole model, of which these may be parts. One that matches in no part is looked for in
        # the first, in vain, and so refused.
        patterns = self.options.ignore_modules
        found = [matching(module, patterns) for module in roots]
        lost = set(patterns).difference(*found)
        for i, module in enumerate(roots):
            own = (*found[i], *(lost if i == 0 else ()))
            rows = self._rows(module, own, islands_in(module), ready)
            self._check_storage(module)
            self._swap([row.layer for row in rows if row.swapped], ready)
            self._settle(module)
            cast_module(module, self.module_table)

    def init_context(self) -> AbstractContextManager[None]:
        """See ``Strategy.init_context``: each layer is quantised as it is made."""
        if self.mode.weights == "int8-training":  # whose weights stay what they are
            return super().init_context()
        from precision_runtime.layers.streaming import StreamedBuilding

        return StreamedBuilding(self)

    def pack(self, weight: torch.Tensor) -> nn.Parameter:
        """The parameter that stands for ``weight`` in a swapped layer, on the strategy's device."""
        from precision_runtime.layers.swap import PACKED

        kind: Any = PACKED[self.mode.weights]
        there = weight.detach()
        packed: nn.Parameter = kind.quantized(there if there.is_meta else there.to(self.device), self.mode.weights)
        return packed

    def _rows(
        self, module: nn.Module, patterns: tuple[str, ...], islands: Sequence[Island], ready: Ready
    ) -> list[Swap]:
        taken = next((name for name, part in module.named_modules() if _is_quantized(part)), None)

        def refuse(name: str, layer: nn.Module) -> str:
            if taken is not None:
                return f"the model has bitsandbytes layers already ({taken!r}) and is taken as it was made"
            island = island_around(f"{name}.weight" if name else "weight", islands)
            return island.reason if island else _refusal(layer, self.mode.weights, ready)

        embeddings = self.options.quantize_embeddings and self.mode.weights != "int8-training"
        kinds = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
        found = [row for row in swaps(module, kinds, patterns, refuse) if not _is_quantized(row.layer)]
        return _untied(module, found)

    def _swap(self, layers: list[nn.Module], ready: Ready) -> None:
        from precision_runtime.layers.swap import PACKED, swap

        shared: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the key alive while its id is in use
        uses = _uses(layers)
        for layer in layers:
            if self.mode.weights not in PACKED:
                swap(layer, self.mode.weights, self.compute)
                continue
            weight = layer._parameters["weight"]
            assert weight is not None
            key = id(weight)
            if key in shared:
                packed = shared[key][1]
            else:
                prepared = ready(weight)
                packed = self.pack(weight) if prepared is None else prepared
                if uses[key] > 1:
                    shared[key] = weight, packed
            swap(layer, self.mode.weights, self.compute, packed)
            del weight

    def _settle(self, module: nn.Module) -> None:
        """Have quantised layers, also those that the user made, compute in the mode's dtype."""
        leave_fast_path(module, _is_quantized)
        for part in module.modules():
            if not _is_quantized(part):
                continue
            vars(part)["compute_dtype"] = self.compute
            if not isinstance(part, QuantizedLayer):
                vars(part)["compute_type_is_set"] = True
                weight = part._parameters["weight"]
                if weight is not None and weight.is_floating_point() and not weight.requires_grad:
                    part.to(self.device)  # that is how bitsandbytes quantises; a cast beforehand would lose bits

    def _check_storage(self, module: nn.Module) -> None:
        kinds = {part.storage for part in module.modules() if isinstance(part, QuantizedLayer)}
        if kinds and self.mode.weights not in kinds:
            raise ConfigurationError(
                f"{type(module).__name__} is quantised already, as {', '.join(sorted(kinds))}, and cannot run in "
                f"{self.mode}. Take a fresh model, or load layers.dequantized_state_dict(model) into one"
            )

    def _nothing(self, module: nn.Module) -> str:
        rows = self.swaps(module)
        head = f"{self.mode} puts quantised layers in place of nn.Linear, and {type(module).__name__} has "
        if not rows:
            return f"{head}no nn.Linear. Use {_PLAIN.get(self.mode.compute, '32-true')}, which quantises nothing"
        stay = "".join(f"\n  {row.name or '(the model itself)'}: {row.reason}" for row in rows[:_SHOWN])
        more = f"\n  and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return f"{head}none that can be swapped:{stay}{more}"


_SHOWN = 10
_PLAIN = {"bfloat16": "bf16-true", "float16": "16-true"}


def _is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a quantised layer, ours or one that the user made with bitsandbytes."""
    if isinstance(module, QuantizedLayer):
        return True
    library = sys.modules.get("bitsandbytes")  # where it has not been imported there are none of its layers
    nn_ = getattr(library, "nn", None)
    return nn_ is not None and isinstance(
        module, (nn_.Linear4bit, nn_.Linear8bitLt, nn_.Embedding4bit, nn_.Embedding8bit)
    )


def _refusal(layer: nn.Module, storage: str, ready: Ready) -> str:
    """Why ``layer`` stays for a reason of its own, or ""."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter but computed (by a hook or a parametrisation)"
    if "forward" in vars(layer) and not isinstance(vars(layer)["forward"], PatchedForward):
        return "its forward was replaced on the object and may read the weight"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm changes its weight in forward"
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}, which has a storage of its own"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "it is empty"
    if weight.is_meta or storage == "int8-training" or ready(weight) is not None:
        return ""
    from precision_runtime.layers.streaming import all_finite

    return (
        "" if all_finite(weight) else "its weight has values that float32 cannot hold, which would spoil a whole block"
    )


def _untied(module: nn.Module, rows: list[Swap]) -> list[Swap]:
    """``rows`` without the layers whose weight somebody else has, too: for them it would become codes.

    A weight that only swapped layers share is quantised once and stays shared.
    """
    swapped = {id(row.layer) for row in rows if row.swapped}
    elsewhere: dict[int, str] = {}  # memory of a tensor that is no swapped weight -> its name
    objects: dict[int, int] = {}
    for path, part, name, tensor in _tensors(module):
        memory = _memory(tensor)
        if memory is None:
            continue
        # The last: two parameters over the same memory.
        if id(part) not in swapped or name != "weight" or objects.setdefault(memory, id(tensor)) != id(tensor):
            elsewhere.setdefault(memory, ".".join(filter(None, (path, name))))
    found = []
    for row in rows:
        weight = row.layer._parameters.get("weight")
        holder = elsewhere.get(_memory(weight) or 0) if row.swapped and weight is not None else None
        reason = f"its weight is also {holder!r}, which is not swapped" if holder else row.reason
        found.append(replace(row, reason=reason))
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    for path, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield path, part, name, tensor


def _memory(tensor: torch.Tensor) -> int | None:
    """What stands for the memory of ``tensor``; on the meta device, which has none, the object itself."""
    if tensor.is_meta:
        return id(tensor)
    if tensor.layout is not torch.strided or type(tensor.data) is not torch.Tensor:
        return None
    with torch._C.DisableTorchFunction():  # asking for the address is no use of the values
        address: int = tensor.untyped_storage()._cdata
        return address


def _uses(layers: list[nn.Module]) -> dict[int, int]:
    uses: dict[int, int] = {}
    for layer in layers:
        key = id(layer._parameters["weight"])
        uses[key] = uses.get(key, 0) + 1
    return uses
