import gc
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from precision_runtime.counting.bookkeeping import OUTSIDE
from precision_runtime.counting.ledger import Entry, Ledger
from precision_runtime.counting.work import work_of
from precision_runtime.errors import ConfigurationError, PrecisionError
from precision_runtime.runtime import PrecisionRuntime

LOW = {"16-true": "float16", "bf16-true": "bfloat16", "16-mixed": "float16", "bf16-mixed": "bfloat16"}


def products(ledger):
    """(module, direction) -> {dtype: operations}"""
    found = {}
    for e in ledger.entries:
        if e.kind == "product":
            found.setdefault((e.module, e.where), {})[e.dtype] = e.work
    return found


def total(ledger, where):
    return sum(e.work for e in ledger.entries if e.kind == "product" and e.where == where)


def step(mode, model, *args, **options):
    runtime = PrecisionRuntime(mode, "cpu", **options)
    model = runtime.setup(model)
    with runtime.ledger() as ledger:
        runtime.backward(model(*args).square().mean())
    return runtime, ledger


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.down(F.gelu(self.norm(self.up(x))))


@pytest.mark.parametrize(("mode", "dtype"), LOW.items())
def test_operations_are_put_down_to_modules_directions_and_dtypes(mode, dtype):
    _, ledger = step(mode, Mlp(), torch.randn(10, 6))
    assert products(ledger) == {
        ("up", "forward"): {dtype: 2 * 10 * 6 * 16},
        ("down", "forward"): {dtype: 2 * 10 * 16 * 4},
        ("down", "backward"): {dtype: 2 * (2 * 10 * 16 * 4)},  # for the weight and for the input
        ("up", "backward"): {dtype: 2 * 10 * 6 * 16},  # nobody asks for the input's
    }
    assert ledger.low_precision == 1.0


@pytest.mark.parametrize(("mode", "dtype"), [("32-true", "float32"), ("64-true", "float64")])
def test_full_modes_have_no_share_and_verify_says_so(mode, dtype):
    runtime, ledger = step(mode, Mlp(), torch.randn(10, 6))
    assert {d for ds in products(ledger).values() for d in ds} == {dtype}
    assert ledger.low_precision == 0.0
    with pytest.raises(PrecisionError, match=rf"only 0\.0% .* in {mode} on cpu, 90\.0% is asked for \({dtype} 100\.0%"):
        runtime.verify()
    assert runtime.verify(0) == 0.0


def test_reductions_have_the_dtype_that_they_were_rounded_to():
    _, ledger = step("bf16-true", Mlp(), torch.randn(10, 6))
    reductions = {(e.module, e.where): (e.dtype, e.work) for e in ledger.entries if e.kind == "reduction"}
    assert reductions["norm", "forward"] == ("bfloat16", 160)
    assert reductions["norm", "backward"] == ("bfloat16", 160)
    assert reductions[OUTSIDE, "forward"] == ("float32", 40)  # the mean, outside of the model
    assert ledger.share("reduction", "backward") == 1.0
    with Ledger() as ledger:
        torch.ones(7, dtype=torch.float16).sum(dtype=torch.float32)
    assert ledger.by_dtype("reduction") == {"float32": 7}


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "bf16-mixed"])
def test_work_agrees_with_torch_s_own_counter(mode):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    runtime, ledger = step(mode, Blocks(), x)
    model = runtime.setup(Blocks())
    # Its attention on a CPU has no formula there: its backend without a fused kernel is made of counted products.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            runtime.backward(model(x).square().mean())
        with runtime.ledger(model) as unfused:
            runtime.backward(model(x).square().mean())
    assert sum(unfused.by_dtype().values()) == counter.get_total_flops()
    whole = counter.get_flop_counts()
    for part in unfused.parts():
        if not part.module.endswith("self_attn"):
            assert part.work == sum(whole[f"Blocks.{part.module}"].values())
    assert total(ledger, "forward") == total(unfused, "forward")


def test_a_whole_model_is_attributed_and_nothing_is_left_over():
    _, ledger = step("bf16-mixed", Blocks(), torch.randn(2, 3, 8))
    leaves = {"stem", "head", *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("self_attn", "linear1", "linear2"))}
    assert {p.module for p in ledger.parts()} == leaves
    assert {e.module for e in ledger.entries if e.where == "backward" and e.kind == "product"} == leaves


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_again_is_forward_work_of_its_module(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=reentrant))

    model, x = Net(), torch.randn(4, 8, requires_grad=True)
    with Ledger(model) as ledger, set_checkpoint_early_stop(False):
        model(x).sum().backward()
    one = 2 * 4 * 8 * 8
    assert products(ledger) == {
        ("a", "forward"): {"float32": 2 * one},
        ("a", "backward"): {"float32": 2 * one},
        ("b", "forward"): {"float32": one},
        ("b", "backward"): {"float32": 2 * one},
    }


def test_the_backward_of_a_custom_function_belongs_to_its_module():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g.double() @ w.double().T, (x.T @ g)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return Product.apply(x, self.w)

    model = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 4))
    with Ledger(model) as ledger:
        model(torch.randn(3, 4)).sum().backward()
    assert products(ledger)["1", "backward"] == {"float64": 96, "float32": 96}


def test_recurrent_layers_count():
    lstm = nn.LSTM(5, 7, batch_first=True)
    with Ledger(lstm) as ledger:
        lstm(torch.randn(3, 11, 5))[0].sum().backward()
    one = 2 * 33 * 4 * 7 * (5 + 7)
    assert products(ledger) == {("", "forward"): {"float32": one}, ("", "backward"): {"float32": 2 * one}}


def test_a_part_that_silently_runs_float32_is_named_with_its_share():
    class Upcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return x.float() @ self.weight.float()

    model = nn.Sequential(nn.Linear(8, 8), Upcast(), nn.Linear(8, 8))
    runtime, ledger = step("bf16-mixed", model, torch.randn(4, 8))
    assert ledger.low_precision == pytest.approx(5 / 8)  # 2 products of the first, 3 of the last; 3 between
    with pytest.raises(PrecisionError) as caught:
        runtime.verify(0.9)
    assert "only 62.5% of the work of matrix products and convolutions ran in low precision" in str(caught.value)
    assert "1 (Upcast): 37.5% of all work, in float32, forward and backward" in str(caught.value)
    assert runtime.verify(0.6) == ledger.low_precision


def test_declared_islands_do_not_count_against_the_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    runtime, ledger = step("bf16-mixed", model, torch.randn(4, 8), islands="1")
    assert ledger.low_precision == pytest.approx(5 / 8)
    assert runtime.verify(1.0) == 1.0
    assert [(p.module, p.island, p.low) for p in ledger.parts() if p.island] == [("1.0", True, 0.0)]
    assert "1.0 (Linear, an island)" in str(ledger)


def test_a_model_of_islands_only_proves_nothing():
    runtime, _ = step("bf16-true", nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), islands="0")
    with pytest.raises(PrecisionError, match="nothing shows that the mode took effect"):
        runtime.verify()


def test_accelerate_s_fp16_on_a_cpu_is_caught():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
        model = accelerator.prepare(nn.Linear(8, 8))
        assert accelerator.mixed_precision == "fp16"  # what it reports
        with Ledger(model) as ledger:
            model(torch.randn(2, 8)).sum().backward()
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    with pytest.raises(PrecisionError, match=r"only 0\.0% .*float32 100\.0%"):
        ledger.verify()
    runtime, ledger = step("16-mixed", nn.Linear(8, 8), torch.randn(2, 8))
    assert runtime.verify(1.0) == 1.0


def test_fabric_s_modules_are_seen():
    fabric = pytest.importorskip("lightning.fabric")
    runner = fabric.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = runner.setup(nn.Linear(8, 8))
    with Ledger(model) as ledger:
        runner.backward(model(torch.randn(2, 8)).sum())
    assert ledger.verify(1.0) == 1.0


# -- layers that say what they run in ----------------------------------------------------------------------------------


class Emulated(nn.Linear):
    """Rounds to eight bits, and multiplies the rounded values in float32."""

    ledger_dtype = "float8_e4m3fn"


def test_a_layer_says_what_it_emulates():
    model = nn.Sequential(Emulated(8, 8), nn.Linear(8, 8))
    with Ledger(model) as ledger:
        model(torch.randn(2, 8)).sum().backward()
    assert products(ledger)["0", "forward"] == {"float8_e4m3fn": 256}
    assert products(ledger)["1", "forward"] == {"float32": 256}
    assert ledger.low_precision == pytest.approx(2 / 5)
    model[0].ledger_dtype = {"forward": "float8_e4m3fn", "backward": torch.float8_e5m2}
    with ledger:
        model(torch.randn(2, 8)).sum().backward()
    assert products(ledger)["0", "backward"] == {"float8_e5m2": 256}
    model[0].ledger_dtype = {"forward": "nf4"}
    with ledger:
        model(torch.randn(2, 8)).sum().backward()
    assert products(ledger)["0", "forward"] == {"nf4": 256}
    assert products(ledger)["0", "backward"] == {"float32": 256}


def test_tf32_is_told_from_float32_by_the_operands_of_a_product():
    runtime, ledger = step("tf32", Mlp(), torch.randn(10, 6))
    assert ledger.by_dtype().keys() == {"tf32"}
    assert runtime.verify(1.0) == 1.0
    with Ledger(tf32=True) as ledger:
        torch.randn(4, 4) @ torch.randn(4, 4)
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert ledger.by_dtype() == {"float32": 128, "tf32": 128}


# -- work that torch has no formula for --------------------------------------------------------------------------------


def counted(function, *args):
    with Ledger() as ledger:
        function(*args)
    return sum(ledger.by_dtype().values())


def test_products_without_a_formula_of_torch_are_counted_as_torch_counts():
    a, b, v = torch.randn(3, 5), torch.randn(5, 7), torch.randn(5)
    assert counted(torch.mv, a, v) == counted(torch.mm, a, v[:, None]) == 30
    assert counted(torch.dot, v, v) == counted(torch.mm, v[None], v[:, None]) == 10
    assert counted(torch.addmv, torch.randn(3), a, v) == 30
    assert counted(torch.addmm, torch.randn(3, 7), a, b) == counted(torch.mm, a, b) == 210
    assert counted(lambda: torch.zeros(3, 7).addmm_(a, b)) == 210
    batch = torch.randn(2, 3, 5), torch.randn(2, 5, 7)
    assert counted(torch.addbmm, torch.zeros(3, 7), *batch) == counted(torch.bmm, *batch) == 420
    whole = torch.ones(17, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    with Ledger() as ledger:
        torch._int_mm(*whole)
    assert ledger.by_dtype() == {"int8": 2 * 17 * 16 * 8}


def test_grouped_products_are_the_sum_of_their_groups():
    count = work_of(torch.ops.aten._grouped_mm.default).amount
    groups, rows, inner, columns = 3, 12, 5, 7
    a, b = torch.empty(rows, inner), torch.empty(groups, inner, columns)
    assert count((a, b), {}, None) == 2 * rows * inner * columns  # each row meets the columns of its own group
    assert count((torch.empty(4, rows), torch.empty(rows, 7)), {}, None) == 2 * 4 * rows * 7
    assert count((torch.empty(groups, 4, inner), b), {}, None) == groups * (2 * 4 * inner * columns)
    assert count((torch.empty(groups, 4, inner), torch.empty(inner, 9)), {}, None) == 2 * 4 * inner * 9


def test_fused_attention_counts_as_its_two_products_do():
    q = torch.randn(2, 3, 11, 8)
    assert counted(F.scaled_dot_product_attention, q, q, q) == 2 * (2 * 2 * 3 * 11 * 11 * 8)


def test_an_op_of_unknown_work_is_listed():
    with torch.library._scoped_library("precision_test", "DEF") as library:
        library.define("product(Tensor x) -> Tensor")
        library.impl("product", lambda x: x @ x, "CPU")
        with Ledger() as ledger:
            torch.ops.precision_test.product(torch.randn(3, 3))
    assert ledger.unknown == ("precision_test::product",)
    assert "not weighed, because their work is unknown" in " ".join(str(ledger).split())


# -- the block ---------------------------------------------------------------------------------------------------------


def traces(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, len(_get_current_dispatch_mode_stack()), torch.backends.mha.get_fastpath_enabled()


def test_nothing_is_left_behind_also_when_user_code_raises():
    model = nn.Sequential(nn.Linear(4, 4))
    before = traces(model)
    runtime = PrecisionRuntime("bf16-true", "cpu")
    runtime.setup(model)
    with runtime.ledger():
        assert traces(model) != before
        model(torch.randn(2, 4))
    assert traces(model) == before
    with pytest.raises(RuntimeError, match="shapes"), runtime.ledger() as broken:
        model(torch.randn(2, 5))
    assert traces(model) == before
    assert broken.recorded
    assert sum(runtime.ledger().by_dtype().values()) == 64  # the broken step is not the runtime's record


def test_results_and_gradients_are_the_same_as_without():
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(2, 3, 8)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with Ledger(model):
        model(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_a_compiled_model_is_seen_and_compiled_again_afterwards():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    compiled = torch.compile(model, backend=backend)
    with Ledger(model) as ledger:
        compiled(torch.randn(2, 8).bfloat16())
    assert products(ledger) == {("0", "forward"): {"bfloat16": 256}}
    assert graphs == []
    compiled(torch.randn(2, 8).bfloat16())
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_inference_on_a_fused_path_is_seen():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.inference_mode(), Ledger(model) as ledger:
        model(torch.randn(2, 8, 16))
    assert {p.module for p in ledger.parts()} == {"self_attn", "linear1", "linear2"}
    assert ledger.unknown == ()


def test_the_runtime_shows_and_verifies_what_was_recorded_last():
    runtime = PrecisionRuntime("bf16-true", "cpu")
    model = runtime.setup(nn.Linear(4, 4))
    assert repr(runtime.ledger()) == str(runtime.ledger()) == "<Ledger, nothing recorded yet>"
    with pytest.raises(ConfigurationError, match="recorded nothing yet; run a step inside it"):
        runtime.verify()
    with runtime.ledger() as first:
        assert repr(first) == "<Ledger, recording>"
        model(torch.randn(2, 4))
    with runtime.ledger() as second:
        model(torch.randn(20, 4))
    assert (sum(first.by_dtype().values()), sum(second.by_dtype().values())) == (64, 640)
    assert runtime.ledger().entries == second.entries
    assert repr(runtime.ledger()) == "<Ledger, 100.0% of the work in low precision>"
    ref = weakref.ref(model)
    del model, first, second
    gc.collect()
    assert ref() is None  # a runtime keeps figures, no models


def test_a_ledger_inside_another_and_the_same_twice():
    model = nn.Linear(4, 4)
    with Ledger(model) as outer, Ledger() as inner:
        model(torch.randn(2, 4))
        with pytest.raises(ConfigurationError, match="recording already"):
            outer.__enter__()
    assert {e.module for e in inner.entries} == {OUTSIDE}
    assert {e.module for e in outer.entries} == {""}


def test_several_models_are_told_apart():
    runtime = PrecisionRuntime("bf16-true", "cpu", islands="0")
    models = [runtime.setup(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) for _ in range(2)]
    with runtime.ledger() as ledger:
        for model in models:
            model(torch.randn(2, 4))
    assert {(p.module, p.island) for p in ledger.parts()} == {
        ("Sequential.0", True), ("Sequential.1", False), ("Sequential1.0", True), ("Sequential1.1", False),
    }  # fmt: skip


def test_code_without_products_is_judged_by_its_reductions_and_code_without_work_not_at_all():
    with Ledger() as ledger:
        torch.ones(30, dtype=torch.float16).sum()
        torch.ones(10).sum()
    assert ledger.low_precision == 0.75
    assert math.isnan(ledger.share("product"))
    with pytest.raises(PrecisionError, match=r"75\.0% of the work of reductions"):
        ledger.verify(0.8)
    with Ledger(lane="here") as ledger:
        torch.ones(3) + 1
    with pytest.raises(PrecisionError, match="ran in here outside of islands"):
        ledger.verify()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    ledger = Ledger(before=[Entry("", "", "forward", "product", "float32", 1.0)])
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        ledger.verify(share)


def test_only_modules_have_ledgers():
    with pytest.raises(ConfigurationError, match="got function"):
        Ledger(lambda x: x)


def test_machines_get_json_and_people_a_table():
    _, ledger = step("bf16-mixed", Mlp(), torch.randn(10, 6))
    data = json.loads(ledger.to_json())
    assert data == ledger.to_dict()
    assert (data["low_precision"], data["lane"]) == (1.0, "bf16-mixed on cpu")
    assert data["products"] == {"forward": 1.0, "backward": 1.0}
    assert {e["module"] for e in data["entries"] if e["kind"] == "product"} == {"up", "down"}
    text = str(ledger)
    assert "share of the work that really ran in low precision, bf16-mixed on cpu" in text
    up = 4 * 10 * 6 * 16 / (4 * 10 * 6 * 16 + 6 * 10 * 16 * 4)
    (row,) = [line for line in text.splitlines() if "up (Linear)" in line and "products" in line]
    assert f"{up:.1%}" in row
    with Ledger() as ledger:
        torch.ones(3) + 1
    assert json.loads(ledger.to_json())["low_precision"] is None
    many = [Entry(f"m{i}", "", "forward", "product", "int8", i) for i in range(9)]
    assert len(Ledger(before=many).table(5).rows) == 5 + 2  # those, the rest, and all
