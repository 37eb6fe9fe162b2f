from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from precision_runtime.casting import NOTHING, TO, TO_DOUBLE, cast_call, cast_module, cast_tree

HALF = TO[torch.float16]
Pair = namedtuple("Pair", "a b")


@dataclass
class Batch:
    x: torch.Tensor
    ids: torch.Tensor
    name: str = "batch"


def test_nested_containers_are_cast_and_keep_their_types():
    value = {
        "l": [torch.ones(1), 3],
        "t": (torch.ones(1),),
        "p": Pair(torch.ones(1), None),
        "o": OrderedDict(k=torch.ones(1)),
    }
    cast = cast_tree({**value, "b": Batch(torch.ones(1), torch.ones(1, dtype=torch.long))}, HALF)
    assert cast["l"][0].dtype is cast["t"][0].dtype is cast["p"].a.dtype is cast["o"]["k"].dtype is torch.float16
    assert cast["l"][1] == 3
    assert type(cast["p"]) is Pair
    assert type(cast["o"]) is OrderedDict
    assert type(cast["b"]) is Batch
    assert (cast["b"].x.dtype, cast["b"].ids.dtype, cast["b"].name) == (torch.float16, torch.long, "batch")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.long, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_whole_numbers_bools_complex_and_fp8_are_untouched_in_half(dtype):
    tensor = torch.zeros(2).to(dtype)
    assert cast_tree(tensor, HALF) is tensor


def test_double_takes_complex_along():
    assert cast_tree(torch.zeros(1, dtype=torch.complex64), TO_DOUBLE).dtype is torch.complex128


def test_what_needs_no_cast_comes_back_as_the_same_object():
    cache = [torch.ones(1, dtype=torch.float16)]
    assert cast_tree(cache, HALF) is cache  # forward may append to it
    args, kwargs = (torch.ones(1),), {}
    assert cast_call(args, kwargs, NOTHING) == (args, kwargs)


def test_one_tensor_in_two_arguments_stays_one_tensor():
    x = torch.ones(2)
    (a,), kwargs = cast_call((x,), {"again": x}, HALF)
    assert a is kwargs["again"]


def test_unknown_objects_are_passed_on_whole():
    class Cache:
        def __init__(self):
            self.keys = torch.ones(1)

    cache = Cache()
    _, kwargs = cast_call((torch.ones(1),), {"cache": cache}, HALF)
    assert kwargs["cache"] is cache
    assert cache.keys.dtype is torch.float32


def test_casting_carries_gradients():
    x = torch.ones(2, requires_grad=True)
    cast_tree([x], HALF)[0].sum().backward()
    assert x.grad.dtype is torch.float32


LEAF = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.long, torch.bool]).map(
    lambda d: torch.zeros(1, dtype=d)
)
TREE = st.recursive(
    LEAF, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=2), s, max_size=3), max_leaves=8
)


@given(TREE, st.sampled_from(list(TO)))
def test_any_tree_keeps_its_shape_and_only_floating_tensors_change(tree, dtype):
    def same(before, after):
        if isinstance(before, torch.Tensor):
            return after.dtype is (dtype if before.is_floating_point() else before.dtype)
        if isinstance(before, dict):
            return before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
        return len(before) == len(after) and all(map(same, before, after))

    assert same(tree, cast_tree(tree, TO[dtype]))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.z = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("table", torch.randn(3, dtype=torch.float64))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_complex_parameters_and_buffers_keep_their_imaginary_part(dtype):
    model = Everything()
    z, phase = model.z.detach().clone(), model.phase.clone()
    cast_module(model, TO[dtype])
    assert torch.equal(model.z, z)
    assert torch.equal(model.phase, phase)
    assert model.w.dtype is model.table.dtype is dtype
    assert model.count.dtype is torch.long


def test_double_makes_complex_parameters_complex128():
    model = cast_module(Everything(), TO_DOUBLE)
    assert model.z.dtype is model.phase.dtype is torch.complex128
    assert model.w.dtype is torch.float64


def test_a_cast_gives_what_module_to_gives_where_that_loses_nothing():
    torch.manual_seed(0)
    ours, theirs = nn.LSTM(3, 4), nn.LSTM(3, 4)
    theirs.load_state_dict(ours.state_dict())
    theirs.to(torch.bfloat16)
    cast_module(ours, TO[torch.bfloat16])
    x = torch.randn(2, 1, 3, dtype=torch.bfloat16)
    assert torch.equal(ours(x)[0], theirs(x)[0])


def test_parameters_and_gradients_stay_the_same_objects():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = list(model.parameters())
    cast_module(model, HALF)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad.dtype is torch.float16 for p in before)


def test_tied_weights_and_shared_buffers_stay_tied():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    table = torch.ones(2)
    for part in model:
        part.register_buffer("table", table)
    cast_module(model, HALF)
    assert model[0].weight is model[1].weight
    assert model[0].table is model[1].table
    assert model[0].table.dtype is torch.float16


def test_a_module_that_overrides_apply_is_asked():
    class Shy(nn.Linear):
        def _apply(self, fn, recurse=True):
            return self

    assert cast_module(Shy(2, 2), HALF).weight.dtype is torch.float32


class Declares(nn.Module):
    """Shaped like a Hugging Face model that names parts for float32."""

    _keep_in_fp32_modules = ("wo",)
    _keep_in_fp32_modules_strict = frozenset({"gate.*bias"})

    def __init__(self):
        super().__init__()
        self.wo, self.wi, self.gate = nn.Linear(2, 2), nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, {"wo.weight", "wo.bias", "gate.0.bias"}),
        (torch.bfloat16, {"gate.0.bias"}),
        (torch.float64, set()),
    ],
)
def test_parts_declared_to_need_float32_keep_it_in_half_modes(dtype, kept):
    model = nn.Sequential(cast_module(nn.Linear(1, 1), NOTHING), Declares())
    cast_module(model, TO[dtype])
    assert {n for n, p in model[1].named_parameters() if p.dtype is torch.float32} == kept
    assert model[0].weight.dtype is dtype


def test_a_declared_part_that_is_half_already_becomes_float32():
    model = cast_module(Declares().half(), HALF)
    assert model.wo.weight.dtype is torch.float32


@pytest.mark.parametrize(("dtype", "mode"), [(torch.float16, "16-true"), (torch.bfloat16, "bf16-true")])
def test_t5_has_the_dtypes_that_transformers_loads_it_with_and_runs(dtype, mode, tmp_path):
    transformers = pytest.importorskip("transformers")
    from precision_runtime.runtime import PrecisionRuntime

    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    PrecisionRuntime(mode, "cpu").setup(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    ids = torch.arange(6).view(2, 3)
    out = model(input_ids=ids, decoder_input_ids=ids)
    assert type(out).__name__ == "Seq2SeqLMOutput"
    assert out.logits.dtype is torch.float32
    assert out["logits"] is out.logits
    out.logits.sum().backward()
