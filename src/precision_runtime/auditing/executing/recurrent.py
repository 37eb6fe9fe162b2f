"""RNN, LSTM and GRU layers with noise on sums, gates and states at every step, forward and backward.

A layer that runs 160 steps in half precision rounds its state 160 times, and what its gates let through, too. One
disturbance of its parameters does not stand for that, so the perturbed FP64 run steps through the layer itself and
disturbs what a layer that is written out of modules would have as their results, and the gradients that come back.
Backward, the gradient of the weights that meet the state is a running total over the steps, rounded as often: there
each partial sum is disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from precision_runtime.auditing.executing.hooks import on_gradient

Perturb = Callable[[torch.Tensor], torch.Tensor]
State = tuple[torch.Tensor, ...]


@contextmanager
def noisy_states(modules: Iterable[nn.Module], perturb: Perturb) -> Iterator[None]:
    """For the time of the block, every ``nn.RNNBase`` among ``modules`` disturbs its state and gates at each step."""

    def both_ways(t: torch.Tensor) -> torch.Tensor:
        new = perturb(t)
        if new is not t and new.requires_grad:
            on_gradient(new, perturb)
        return new

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.RNNBase):
                stack.enter_context(_replaced(module, both_ways))
        yield


@contextmanager
def _replaced(module: nn.RNNBase, perturb: Perturb) -> Iterator[None]:
    before = vars(module).get("forward")

    def forward(input: Any, hx: Any = None) -> Any:
        return step_through(module, input, hx, perturb)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def step_through(module: nn.RNNBase, sequence: Any, hx: Any, perturb: Perturb) -> tuple[Any, Any]:
    """Run the layer as torch documents it, one step after the other; ``perturb`` disturbs each sum, gate and new state.

    ``sequence`` is (time, batch, features), batch-first or unbatched as the module wants it, or a PackedSequence;
    the result is what ``module(sequence, hx)`` returns.
    """
    if isinstance(sequence, PackedSequence):
        return _packed(module, sequence, hx, perturb)
    batched = sequence.dim() == 3
    x = sequence if batched else sequence.unsqueeze(0 if module.batch_first else 1)
    x = x.transpose(0, 1) if module.batch_first else x
    out, state = _layers(module, x, _initial(module, x, hx, batched), None, perturb)
    out = out.transpose(0, 1) if module.batch_first else out
    if not batched:
        out = out.squeeze(0 if module.batch_first else 1)
        state = tuple(s.squeeze(1) for s in state)
    return out, state if module.mode == "LSTM" else state[0]


def _packed(module: nn.RNNBase, sequence: PackedSequence, hx: Any, perturb: Perturb) -> tuple[Any, Any]:
    x, lengths = pad_packed_sequence(sequence)
    state = _initial(module, x, hx, True)
    out, final = _layers(module, x, state, lengths, perturb)
    enforce = sequence.sorted_indices is None
    packed = pack_padded_sequence(out, lengths, enforce_sorted=enforce)
    return packed, final if module.mode == "LSTM" else final[0]


def _initial(module: nn.RNNBase, x: torch.Tensor, hx: Any, batched: bool) -> State:
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size]
    if module.mode == "LSTM":
        sizes.append(module.hidden_size)
    if hx is None:
        return tuple(x.new_zeros(count, x.shape[1], size) for size in sizes)
    state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    return state if batched else tuple(s.unsqueeze(1) for s in state)


def _layers(
    module: nn.RNNBase, x: torch.Tensor, state: State, lengths: torch.Tensor | None, perturb: Perturb
) -> tuple[torch.Tensor, State]:
    directions = 2 if module.bidirectional else 1
    finals: list[State] = []
    for layer in range(module.num_layers):
        outs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            row = layer * directions + direction
            out, final = _direction(module, suffix, x, tuple(s[row] for s in state), lengths, bool(direction), perturb)
            outs.append(out)
            finals.append(final)
        x = torch.cat(outs, -1)
        if module.dropout and module.training and layer < module.num_layers - 1:
            x = functional.dropout(x, module.dropout)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _direction(
    module: nn.RNNBase, suffix: str, x: torch.Tensor, state: State, lengths: torch.Tensor | None, reverse: bool,
    perturb: Perturb,
) -> tuple[torch.Tensor, State]:  # fmt: skip
    weights: dict[str, Any] = {
        n: getattr(module, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    }
    gates = perturb(functional.linear(x, weights["weight_ih"], weights["bias_ih"]))
    steps = range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0])
    cell = _CELLS[module.mode]
    out: list[torch.Tensor] = [x] * x.shape[0]
    for t in steps:
        weights |= {n: _totalled(w, perturb) for n, w in weights.items() if n in _EACH_STEP}
        new = tuple(perturb(s) for s in cell(gates[t], state, weights, perturb))
        if lengths is not None:
            alive = (lengths.to(x.device) > t).unsqueeze(-1)
            new = tuple(torch.where(alive, a, b) for a, b in zip(new, state, strict=True))
            out[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
        else:
            out[t] = new[0]
        state = new
    return torch.stack(out), state


_EACH_STEP = ("weight_hh", "bias_hh", "weight_hr")  # the others meet the whole sequence in one product


def _totalled(weight: torch.Tensor | None, perturb: Perturb) -> torch.Tensor | None:
    """The weight for one more step: its gradient, that of all the steps to come, is disturbed on its way back."""
    if weight is None or not weight.requires_grad or not torch.is_grad_enabled():
        return weight
    again = weight.view_as(weight)
    on_gradient(again, perturb)
    return again


def _lstm(gates: torch.Tensor, state: State, w: dict[str, Any], perturb: Perturb) -> State:
    h, c = state
    i, f, g, o = perturb(gates + functional.linear(h, w["weight_hh"], w["bias_hh"])).chunk(4, -1)
    i, f, g, o = (perturb(gate) for gate in (torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)))
    c = f * c + i * g
    h = o * perturb(torch.tanh(c))
    return (h if w["weight_hr"] is None else functional.linear(h, w["weight_hr"])), c


def _gru(gates: torch.Tensor, state: State, w: dict[str, Any], perturb: Perturb) -> State:
    (h,) = state
    xr, xz, xn = gates.chunk(3, -1)
    hr, hz, hn = perturb(functional.linear(h, w["weight_hh"], w["bias_hh"])).chunk(3, -1)
    # 1 - z is all that a GRU lets in where z is nearly 1, and z is stored like the state.
    r, z = perturb(torch.sigmoid(perturb(xr + hr))), perturb(torch.sigmoid(perturb(xz + hz)))
    n = perturb(torch.tanh(perturb(xn + r * hn)))
    return ((1 - z) * n + z * h,)


def _plain(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., State]:
    def cell(gates: torch.Tensor, state: State, w: dict[str, Any], perturb: Perturb) -> State:
        return (activation(perturb(gates + functional.linear(state[0], w["weight_hh"], w["bias_hh"]))),)

    return cell


_CELLS: dict[str, Callable[..., State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _plain(torch.tanh),
    "RNN_RELU": _plain(torch.relu),
}
