import copy

import pytest
import torch
from torch import nn

from precision_runtime.runtime import PrecisionRuntime


def test_torch_itself_cannot_run_an_lstm_under_float16_autocast():
    # When torch learns it, recurrent.py can go.
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(RuntimeError, match="primitive"):
        nn.LSTM(2, 2)(torch.ones(1, 1, 2))


@pytest.mark.parametrize("root", [True, False], ids=["as the model", "inside one"])
def test_an_lstm_runs_in_16_mixed_and_is_as_near_to_float64_as_float16_allows(root):
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 8, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(3, 5, 4)
    expected = copy.deepcopy(lstm).double()(x.double())[0]
    model = PrecisionRuntime("16-mixed", "cpu").setup(lstm if root else nn.Sequential(lstm))
    out, (h, c) = model(x)
    assert out.dtype is h.dtype is c.dtype is torch.float32
    error = (out.double() - expected).abs().max().item()
    assert 1e-6 < error < 20 * 2.0**-11  # not float32 in disguise; 5 steps, 2 layers of a contraction
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in lstm.parameters())
    assert torch.backends.mkldnn.enabled


def test_packed_sequences_and_given_states_work():
    rt = PrecisionRuntime("16-mixed", "cpu")
    lstm = rt.setup(nn.LSTM(4, 8))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 3]))
    out, _ = lstm(packed, (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))
    assert type(out) is nn.utils.rnn.PackedSequence
    assert out.data.dtype is torch.float32


def test_the_switch_is_put_back_when_the_lstm_raises():
    lstm = PrecisionRuntime("16-mixed", "cpu").setup(nn.LSTM(4, 8))
    with pytest.raises((RuntimeError, ValueError)):
        lstm(torch.ones(1, 1, 3))
    assert torch.backends.mkldnn.enabled


def test_the_switch_is_left_alone_where_it_is_off_and_for_other_layers():
    seen = []
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    model[0].register_forward_hook(lambda *a: seen.append(torch.backends.mkldnn.enabled))
    model = PrecisionRuntime("16-mixed", "cpu").setup(model)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        model(torch.ones(1, 1, 2))
        assert not torch.backends.mkldnn.enabled
    model(torch.ones(1, 1, 2))
    assert seen == [False, True]


def test_a_copy_of_the_model_has_an_lstm_of_its_own():
    model = PrecisionRuntime("16-mixed", "cpu").setup(nn.Sequential(nn.LSTM(2, 2)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin(torch.ones(1, 1, 2))[0].eq(0).all()


def test_other_modes_leave_lstms_unpatched():
    lstm = PrecisionRuntime("bf16-mixed", "cpu").setup(nn.Sequential(nn.LSTM(2, 2)))[0]
    assert "forward" not in lstm.__dict__
