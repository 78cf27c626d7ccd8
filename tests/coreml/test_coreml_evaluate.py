"""The evaluator of saved programs: it agrees with torch, and it can disagree."""

import numpy as np
import pytest
import torch
from coreml_models import build, digits_net, prune
from torch import nn
from torch.nn import functional as fn

from purprune_adapters.coreml import UnknownOpError, VerificationError, evaluate_coreml
from purprune_adapters.coreml import export as export_module
from purprune_adapters.coreml.export import export_coreml
from purprune_adapters.coreml.numeric import TOLERANCE
from purprune_adapters.coreml.ops import OPS
from purprune_adapters.coreml.package import Package


class Function(nn.Module):
    """A pruned product (so that there is something to export), then any function of x and y."""

    def __init__(self, function, size=16):
        super().__init__()
        self.product = prune(nn.Linear(size, size, bias=False), 0.5)
        self.function = function

    def forward(self, x):
        return self.function(self.product(x), x)


FUNCTIONS = {
    "activations": lambda a, x: (
        fn.relu(a)
        + fn.relu6(a)
        + fn.gelu(a)
        + fn.gelu(a, approximate="tanh")
        + fn.silu(a)
        + fn.leaky_relu(a, 0.2)
        + fn.elu(a, 0.5)
        + fn.softplus(a)
        + fn.hardsigmoid(a)
        + fn.hardswish(a)
        + fn.mish(a)
        + fn.softsign(a)
        + torch.tanh(a)
        + fn.hardtanh(a)
    ),
    "unary": lambda a, x: (
        a.abs().sqrt()
        + (a.abs() + 1).rsqrt()
        + a.exp()
        + (a.abs() + 1).log()
        + a.sin()
        + a.cos()
        + a.floor()
        + a.ceil()
        + a.sign()
        + a.square()
        + torch.erf(a)
        + 1 / (a.abs() + 1)
        + a.atan()
        + a.round()
    ),
    "binary": lambda a, x: (
        (a + x) * (a - x) / (x.abs() + 1)
        + torch.maximum(a, x)
        + torch.minimum(a, x)
        + (a.abs() + 1).pow(x)
    ),
    "comparing": lambda a, x: (
        torch.where(a > x, a, x)
        + (a < x).float()
        + (a >= 0).float() * a.clamp(-0.3, 0.4)
        + torch.where((a != x) & ~(x < 0), a, torch.zeros_like(a))
    ),
    "reductions": lambda a, x: (
        a.sum(-1)
        + a.mean(-1)
        + a.amax(-1)
        + a.amin(-1)
        + a.norm(dim=-1)
        + a.logsumexp(-1)
        + a.var(-1)
    ),
    "softmax": lambda a, x: fn.softmax(a, -1) + fn.log_softmax(x, 1) + fn.softmin(a, 0),
    "reshaping": lambda a, x: torch.cat(
        [a.reshape(4, -1), x.transpose(0, 1).flatten(1).reshape(4, -1)[:, ::2]], 1
    ),
    "slicing": lambda a, x: a[1:, ::2, -5:] + x[:-1, 1::2, 2:7],
    "selecting": lambda a, x: a[:, -1] + x[:, 0] + a[1:2, 2, 3],
    "splitting": lambda a, x: (
        torch.stack([p.sum(-1) for p in a.chunk(4, -1)], 1)
        + torch.stack([p.sum(-1) for p in x.split([2, 4, 8, 2], -1)], 1)
    ),
    "padding": lambda a, x: fn.pad(a, (1, 2, 3, 0)) + fn.pad(x, (2, 1, 0, 3), mode="replicate"),
    "reflecting": lambda a, x: fn.pad(a, (2, 3), mode="reflect"),
    "tiling": lambda a, x: a.repeat(2, 1, 3) + x[:1, :1].expand(8, 6, 16).repeat(1, 1, 3),
    "gathering": lambda a, x: (
        a[:, torch.tensor([2, 0, 0])]
        + x.gather(1, torch.tensor([[[1] * 16, [0] * 16, [5] * 16]] * 4))
    ),
    "flipping": lambda a, x: a.flip(-1) + x.roll(1, 1) + a.cumsum(1),
    "triangles": lambda a, x: a.tril() + x.triu(1),
    "layer norm": lambda a, x: fn.layer_norm(a, (6, 16)) + fn.rms_norm(x, (16,)),
    "attention": lambda a, x: fn.scaled_dot_product_attention(a, x, x),
    "masked attention": lambda a, x: fn.scaled_dot_product_attention(
        a, x, x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()
    ),
    "products": lambda a, x: a @ x.transpose(1, 2) @ torch.einsum("bij,bkj->bik", x, a),
    "pooling": lambda a, x: (
        fn.max_pool1d(a, 3, 2, 1)
        + fn.avg_pool1d(x, 3, 2, 1)
        + fn.avg_pool1d(x, 3, 2, 1, count_include_pad=False)
    ),
    "ceiling": lambda a, x: (
        fn.max_pool1d(a, 3, 2, ceil_mode=True) + fn.avg_pool1d(x, 3, 2, ceil_mode=True)
    ),
    "adaptive": lambda a, x: fn.adaptive_avg_pool1d(a, 4) + fn.adaptive_max_pool1d(x, 4),
    "convolving": lambda a, x: (
        fn.conv1d(a, torch.ones(3, 6, 4) / 9, stride=3, padding=2)
        + fn.conv1d(x, torch.arange(36.0).reshape(3, 6, 2) / 99, dilation=3, stride=3, padding=2)
    ),
    "transposed": lambda a, x: fn.conv_transpose1d(
        a, torch.arange(72.0).reshape(6, 4, 3) / 99, stride=3, padding=2, output_padding=1
    ),
    "arguments": lambda a, x: (a.argmax(-1), x.topk(3, -1).values),
    "group norm": lambda a, x: fn.group_norm(a, 3) + fn.instance_norm(x),
    "upsampling": lambda a, x: (
        fn.interpolate(a[:, None], scale_factor=2, mode="nearest")
        + fn.interpolate(x[:, None], size=(12, 32), mode="bilinear")
    ),
    "aligned": lambda a, x: fn.interpolate(
        a[:, None], scale_factor=2, mode="bilinear", align_corners=True
    ),
    "shuffling": lambda a, x: (
        fn.pixel_shuffle(a.reshape(2, 4, 6, 8), 2) + fn.pixel_unshuffle(x.reshape(2, 1, 12, 16), 1)
    ),
    "nothing left": lambda a, x: {"a": a * 0, "b": [x + 1, x.mean()]},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_program_of_a_function_gives_what_torch_gives(name, tmp_path):
    """Every operation in the table is driven by a conversion, in exact arithmetic."""
    model = Function(FUNCTIONS[name]).eval()
    report = export_coreml(
        model, torch.randn(4, 6, 16), tmp_path / "m", precision="float32", strict=False
    )
    assert report.check.status == "passed", report
    assert report.check.error < 5e-5


def test_outputs_come_by_name_in_torch_types(tmp_path):
    """Floats as float32, integers as int64, whatever the package declares."""
    model = Function(FUNCTIONS["arguments"]).eval()
    x = torch.randn(4, 6, 16)
    path = export_coreml(model, x, tmp_path / "m", output_names=["best", "top"]).path
    found = evaluate_coreml(path, x)
    best, top = model(x)
    assert found["best"].dtype == torch.int64
    assert torch.equal(found["best"], best)
    assert found["top"].dtype == torch.float32
    torch.testing.assert_close(found["top"], top, atol=1e-2, rtol=1e-2)


def test_declared_precision_rounds_after_every_operation(tmp_path):
    """float16 outputs are multiples of what float16 can hold; float32 arithmetic isn't."""
    model, x = digits_net(), torch.randn(2, 1, 28, 28)
    path = export_coreml(model, x, tmp_path / "m", check=False).path
    rough = evaluate_coreml(path, x, compute="declared").popitem()[1]
    plain = evaluate_coreml(path, x).popitem()[1]
    assert torch.equal(rough, rough.half().float())
    assert not torch.equal(plain, plain.half().float())
    torch.testing.assert_close(rough, plain, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="float16"):
        evaluate_coreml(path, x, compute="float16")


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    """By number, by name and, where the package has one shape, by shape."""
    path = export_coreml(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m", check=False).path
    x = torch.randn(1, 1, 28, 28)
    for bad in ((x, x), {"image": x}):
        with pytest.raises(ValueError, match="Expected inputs"):
            evaluate_coreml(path, bad)
    with pytest.raises(ValueError, match=r"\(1, 1, 28, 28\); got \(2, 1, 28, 28\)"):
        evaluate_coreml(path, torch.cat([x, x]))


def test_an_unknown_operation_is_not_checked_and_never_passed(tmp_path, monkeypatch):
    """Honest words: 'not checked: op X'."""
    monkeypatch.delitem(OPS, "softmax")
    x = torch.randn(1, 1, 28, 28)
    report = export_coreml(digits_net(), x, tmp_path / "m")
    assert report.check.status == "not checked: op softmax"
    assert "not checked: op softmax" in str(report)
    assert "passed" not in str(report)
    with pytest.raises(UnknownOpError) as caught:
        evaluate_coreml(report.path, x)
    assert caught.value.op == "softmax"


def test_an_operation_used_in_an_unknown_way_is_not_checked(tmp_path, monkeypatch):
    """A known name with an unknown mode counts as unknown."""

    def picky(arguments):
        raise NotImplementedError("this mode")

    monkeypatch.setitem(OPS, "relu", picky)
    report = export_coreml(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m")
    assert report.check.status == "not checked: op relu"
    assert "this mode" in str(report)


def spoil(path, name, factor=1.01):
    """Multiply one value of an unpruned tensor on disk."""
    stored = next(s for s in Package(path).stored() if name in s.name)
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    raw = np.fromfile(file, dtype=np.uint8)
    ((_, place),) = stored.blobs
    size, start = raw[place + 8 : place + 24].view(np.uint64)
    values = raw[int(start) : int(start + size)].view(stored.dtype)
    values[np.abs(values).argmax()] *= factor
    raw.tofile(file)


@pytest.mark.parametrize("name", ["0_bias", "4_bias"])
def test_a_wrong_weight_that_is_not_pruned_is_caught_by_the_numbers(name, tmp_path, monkeypatch):
    """The read-back looks at pruned parameters; the numbers see everything else."""
    save = export_module.save

    def save_spoiled(coremltools, model, path, names):
        save(coremltools, model, path, names)
        spoil(path, name, 1.5)

    monkeypatch.setattr(export_module, "save", save_spoiled)
    model, x = digits_net(), torch.randn(4, 1, 28, 28)
    with pytest.raises(VerificationError, match="compute what the model computes") as caught:
        export_coreml(model, x, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert caught.value.report.check.error > TOLERANCE
    report = export_coreml(model, x, tmp_path / "m", strict=False)
    assert report.check.failed
    assert "failed" in str(report)


def test_a_wrong_operation_is_caught_by_the_numbers(tmp_path, monkeypatch):
    """An evaluator that always agreed would prove nothing."""
    monkeypatch.setitem(OPS, "relu", lambda a: a.tensor("x").abs())
    with pytest.raises(VerificationError, match="compute what the model computes"):
        export_coreml(digits_net(), torch.randn(4, 1, 28, 28), tmp_path / "m")


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_loops_and_recurrent_layers_run_over_any_number_of_steps(name, tmp_path):
    """GRUs become while loops; their weights stand in nested blocks."""
    model, inputs = build(name)
    report = export_coreml(model, inputs, tmp_path / "m", precision="float32")
    assert report.check.status == "passed"
    out = evaluate_coreml(report.path, inputs).popitem()[1]
    torch.testing.assert_close(out, model(*inputs), atol=1e-5, rtol=1e-5)


def test_a_variance_that_float16_cannot_hold_is_caught_and_the_way_out_works(tmp_path):
    """A norm behind an activation keeps its variance; large ones are inf, and its channel 0."""
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.running_var.fill_(4e5)
        norm.weight.fill_(600.0)
    model = nn.Sequential(prune(nn.Conv1d(2, 3, 4), 0.5), nn.ReLU(), norm).eval()
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VerificationError, match="precision='float32'"):
        export_coreml(model, x, tmp_path / "narrow")
    assert export_coreml(model, x, tmp_path / "wide", precision="float32").check.passed
