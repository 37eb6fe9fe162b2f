"""``precision_ctx.train``: a training judged in each lane."""

from __future__ import annotations

TRAINING = """
def model():
    return nn.Linear(8, 4)

def batches(ctx):
    x = ctx.randn(16, 8).float()
    return [(x, x[:, :4] * 0.5)]

def loss(model, batch):
    x, y = batch
    return (model(x).float() - y.to(model(x).device).float()).square().mean() if model(x).dtype != torch.float64 \\
        else (model(x) - y).square().mean()
"""


def test_a_training_holds_in_one_lane_and_fails_with_its_parameter_in_another(run):
    result = run(
        TRAINING
        + """
@pytest.mark.precision("bf16-mixed", "bf16-true")
def test_it(precision_ctx):
    def filled():
        made = model()
        nn.init.constant_(made.weight, 1.0)
        return made
    optimizer = lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.9, 0.95))
    report = precision_ctx.train(filled, optimizer, loss, batches(precision_ctx), steps=16)
    assert report.mode == precision_ctx.mode
""",
        "-rf",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "E  *training Linear for 16 steps fails in bf16-true on cpu: *",
            "E  * to blame: *underflow in update*",
            "E  *parameter 'weight'*left no trace*",
            "  test_it * FAIL *",
        ]
    )
    result.stdout.no_fnmatch_line("*context.py*")


def test_the_marker_s_runtime_options_reach_the_training(run):
    result = run(
        TRAINING
        + """
from precision_runtime.scaling import StaticScaler

@pytest.mark.precision("16-mixed", runtime={"scaler": StaticScaler(8.0)})
def test_it(precision_ctx):
    optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.05)
    report = precision_ctx.train(model, optimizer, loss, batches(precision_ctx), steps=2)
    assert report.figures["loss_scale"] == 8.0
"""
    )
    result.assert_outcomes(passed=1)
