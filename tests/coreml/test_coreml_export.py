"""Exporting: every kind of weight, every option, and what must stay untouched."""

import json
import logging
import statistics
import subprocess
import sys
import time
import warnings

import pytest
import torch
from coreml_models import MODELS, build, digits_net, prune
from rich.console import Console
from torch import nn

from purprune_adapters.coreml import evaluate_coreml, export_coreml, verify_coreml

RECOGNISED = {
    "lstm": "LSTM gate order",
    "gru": "thirds of dim 0",
    "residual": "batch norm 'b1' folded",
    "products": "transposed",
    "lstm at the top": "LSTM gate order",
    "attention": "one third and two thirds of dim 0",
}


def assert_good(report):
    assert report.verification.ok, report
    assert report.check.status == "passed", report
    for row in report.rows:
        assert row.found
        assert row.dropped == row.revived == row.wrong == 0


def test_the_demo_network_is_exact_and_takes_under_45_percent_of_the_dense_weights(tmp_path):
    """The main promise: no weight lost, the counts in integers, the bytes as documented."""
    report = export_coreml(digits_net(), torch.randn(4, 1, 28, 28), tmp_path / "digits")
    assert_good(report)
    assert report.path == tmp_path / "digits.mlpackage"
    assert report.path.is_dir()
    assert [row.zeros_torch for row in report.rows] == [75, 18816]
    assert [row.zeros_stored for row in report.rows] == [75, 18816]
    assert report.weight_bytes < 0.45 * report.dense_weight_bytes
    assert report.package_bytes < report.dense_package_bytes
    assert report.check.error < 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["digits.mlpackage"]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_weight_is_stored_sparse_found_again_and_computes_the_same(name, tmp_path):
    """MIL names can't be trusted, so the content is; the words tell which layout matched."""
    model, inputs = build(name)
    report = export_coreml(model, inputs, tmp_path / "m")
    assert_good(report)
    assert any(RECOGNISED.get(name, "as is") in row.matched for row in report.rows), report
    assert any(row.storage == "sparse" for row in report.rows)
    for row in report.rows:
        assert row.storage == "sparse" or row.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"target": "iOS18"},
        {"target": "iOS26", "precision": "float32"},
        {"target": "macOS14", "precision": "float32"},
        {"target": "iOS18", "compress": "int8"},
        {"target": "macOS15", "compress": "palette4"},
        {"target": "iOS18", "compress": "int4"},
    ],
    ids=str,
)
def test_every_kind_of_weight_works_with_every_target_and_compression(name, options, tmp_path):
    """The wide sweep behind the table of supported layers."""
    model, inputs = build(name)
    assert_good(export_coreml(model, inputs, tmp_path / "m", **options))


def test_weights_that_float16_can_barely_hold_are_kept_and_those_it_cannot_are_counted(tmp_path):
    """The converters' own thresholds (9.77e-4, 1e-12) drop real weights; ours drops none."""
    model = prune(nn.Sequential(nn.Linear(64, 64)), 0.5)
    with torch.no_grad():
        kept = model[0].weight.nonzero()
        model[0].weight[kept[0][0], kept[0][1]] = 1e-7
        model[0].weight[kept[1][0], kept[1][1]] = 1e-9
    row = export_coreml(model, torch.randn(2, 64), tmp_path / "m").rows[0]
    assert (row.dropped, row.underflowed) == (0, 1)
    assert row.zeros_stored == row.zeros_torch + 1


def test_the_model_is_not_modified(tmp_path):
    """Exporting is reading: values, dtypes, flags and metadata buffers stay."""
    model = digits_net()
    model[4].register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    model[4].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert_good(export_coreml(model, torch.randn(1, 1, 28, 28), tmp_path / "m"))
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]


def test_nothing_is_printed_logged_or_warned(tmp_path, capfd, caplog):
    """coremltools prints bars, log lines and warnings, and has no switch for them."""
    logger = logging.getLogger("coremltools")
    before = (logger.level, logger.propagate, logger.handlers[:], logging.getLogger().filters[:])
    streams = (sys.stdout, sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_coreml(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m")
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]
    after = (logger.level, logger.propagate, logger.handlers[:], logging.getLogger().filters[:])
    assert after == before
    assert (sys.stdout, sys.stderr) == streams


def test_a_fresh_process_prints_nothing_either(tmp_path):
    """The first import of coremltools is the noisiest moment."""
    code = (
        "import torch, coreml_models as m\n"
        "from purprune_adapters.coreml import export_coreml\n"
        f"export_coreml(m.digits_net(), torch.randn(1, 1, 28, 28), {str(tmp_path / 'm')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_the_package_does_not_import_coremltools():
    """coremltools is an extra, and takes seconds to import."""
    code = (
        "import sys, purprune_adapters.coreml\n"
        "assert not [m for m in sys.modules if m.startswith(('coremltools', 'rich'))]"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_progress_bar_is_shown_when_it_is_asked_for(tmp_path, capsys):
    """Long conversions show their stage; the bar survives the capture of stderr."""
    export_coreml(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m", progress=True)
    assert "done" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_exported_from_a_float32_copy(dtype, tmp_path):
    """coremltools refuses bfloat16; the report says what was done instead."""
    model = digits_net().to(dtype)
    report = export_coreml(model, torch.randn(1, 1, 28, 28).to(dtype), tmp_path / "m")
    assert_good(report)
    assert "float32 copy" in str(report)
    assert str(dtype).removeprefix("torch.") in str(report)


def test_masks_decide_what_counts_as_pruned(tmp_path):
    """Without masks any zero counts; with them only what they name."""
    model = digits_net()
    masks = {"4.weight": model[4].weight != 0}
    report = export_coreml(model, torch.randn(1, 1, 28, 28), tmp_path / "m", masks=masks)
    assert_good(report)
    assert [row.name for row in report.rows] == ["4.weight"]


def test_a_pruned_bias_is_stored_dense_and_the_reason_given(tmp_path):
    """coremltools never stores one-dimensional tensors sparse."""
    model = digits_net()
    with torch.no_grad():
        model[4].bias[:5] = 0
    masks = {"4.weight": model[4].weight != 0, "4.bias": model[4].bias != 0}
    report = export_coreml(model, torch.randn(1, 1, 28, 28), tmp_path / "m", masks=masks)
    assert_good(report)
    assert report.rows[1].storage == "dense"
    assert report.rows[1].reason == "one-dimensional"


def test_min_sparsity_replaces_the_rule_of_the_smaller_size(tmp_path):
    """Apple advises sparse storage from 75 % on for the Neural Engine; the user may want that."""
    model, inputs = digits_net(), torch.randn(1, 1, 28, 28)
    auto = export_coreml(model, inputs, tmp_path / "a", check=False)
    assert [row.storage for row in auto.rows] == ["dense", "sparse"]
    assert "sparse would take" in auto.rows[0].reason
    low = export_coreml(model, inputs, tmp_path / "b", check=False, min_sparsity=0.5)
    assert [row.storage for row in low.rows] == ["sparse", "sparse"]
    high = export_coreml(model, inputs, tmp_path / "c", check=False, min_sparsity=0.9)
    assert [row.storage for row in high.rows] == ["dense", "dense"]
    assert "below min_sparsity=0.9" in high.rows[1].reason


@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.3])
def test_sparse_storage_begins_where_it_saves_bytes(sparsity, tmp_path):
    """coremltools stays dense below one half and so gives up a quarter of the bytes at 0.3."""
    model = prune(nn.Sequential(nn.Linear(256, 256)), sparsity)
    report = export_coreml(model, torch.randn(1, 256), tmp_path / "m", check=False)
    assert report.rows[0].storage == ("sparse" if sparsity > 1 / 16 else "dense")
    assert report.package_bytes <= report.dense_package_bytes


def test_start_states_of_a_recurrent_layer_are_left_alone(tmp_path):
    """A blanket threshold of 0 turns their zeros into sparse tensors too."""
    model, inputs = build("lstm")
    report = export_coreml(model, inputs, tmp_path / "m", check=False)
    sparse = {name for row in report.rows for name in row.mil_names}
    from purprune_adapters.coreml.package import Package

    assert {s.name for s in Package(report.path).stored() if s.sparse} == sparse


def test_names_of_inputs_and_outputs_can_be_chosen(tmp_path):
    """The app calls the model by them."""
    model, inputs = build("attention")
    names = ["query", "memory"]
    report = export_coreml(model, inputs, tmp_path / "m", input_names=names, output_names=["mixed"])
    assert_good(report)
    named = dict(zip(names, inputs, strict=True))
    assert list(evaluate_coreml(report.path, named)) == ["mixed"]


class Crossed(nn.Module):
    """Two inputs, and a value inside called h."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, y):
        h = torch.relu(self.a(x))
        return self.b(h) + y


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_chosen_names_may_be_swapped_and_may_stand_inside_the_program(frontend, tmp_path):
    """Renaming one after the other would merge x and y, and the output with a value inside."""
    model, inputs = prune(Crossed(), 0.5), (torch.randn(2, 16), torch.randn(2, 16))
    with torch.no_grad():
        wanted = model(*inputs)
    for output in ("h", "relu"):
        report = export_coreml(
            model,
            inputs,
            tmp_path / output,
            input_names=["y", "x"],
            output_names=[output],
            frontend=frontend,
        )
        assert_good(report)
        named = {"y": inputs[0], "x": inputs[1]}
        found = evaluate_coreml(report.path, named)
        assert list(found) == [output]
        assert torch.allclose(found[output], wanted, atol=1e-2)


def test_the_frontend_can_be_chosen_and_is_reported(tmp_path):
    """torch.export by default, tracing for RNNs and on demand."""
    model, inputs = digits_net(), torch.randn(1, 1, 28, 28)
    default = export_coreml(model, inputs, tmp_path / "a")
    assert (default.frontend, default.frontend_reason) == ("torch.export", "the default")
    traced = export_coreml(model, inputs, tmp_path / "b", frontend="trace")
    assert_good(traced)
    assert traced.frontend == "torch.jit.trace"
    model, inputs = build("bidirectional rnn")
    fallback = export_coreml(model, inputs, tmp_path / "c")
    assert fallback.frontend == "torch.export, core decompositions"
    assert "Bidirectional simple RNN" in fallback.frontend_reason
    assert fallback.frontend_reason.startswith("torch.jit.trace failed: ")
    assert "; it was tried first (" in fallback.frontend_reason


def test_flexible_shapes_pass_through(tmp_path):
    """``inputs`` takes coremltools' own types."""
    import coremltools as ct

    shape = ct.Shape(shape=(ct.RangeDim(1, 8, default=1), 64))
    report = export_coreml(
        prune(nn.Sequential(nn.Linear(64, 64), nn.ReLU())),
        torch.randn(1, 64),
        tmp_path / "m",
        inputs=[ct.TensorType(name="x", shape=shape)],
    )
    assert_good(report)
    assert report.frontend == "torch.jit.trace"
    assert evaluate_coreml(report.path, torch.randn(5, 64)).popitem()[1].shape == (5, 64)


def test_joint_compression_keeps_zeros_and_reports_what_it_rounds(tmp_path):
    """Values become approximate: how much is stated, and zeros stay exactly zero."""
    model, inputs = build("residual")
    sizes = {}
    for compress in (None, "int8", "palette6", "int4"):
        report = export_coreml(
            model, inputs, tmp_path / str(compress), target="iOS18", compress=compress
        )
        assert_good(report)
        sizes[compress] = report.weight_bytes
        for row in report.rows:
            if compress and row.storage != "dense":
                assert row.storage == f"sparse + {compress}"
                assert 0 < row.max_relative_error < 0.2
                assert row.zeros_stored == row.zeros_torch + row.rounded_to_zero
    assert sizes["int4"] < sizes["int8"] < sizes[None]


def test_survivors_that_the_quantizer_rounds_to_zero_are_counted_apart(tmp_path):
    """They aren't lost by the format, but the user must see them."""
    model = prune(nn.Sequential(nn.Linear(64, 64)), 0.75)
    with torch.no_grad():
        model[0].weight[model[0].weight != 0] *= 10.0
        kept = model[0].weight.nonzero()
        for row, column in kept[::8]:
            model[0].weight[row, column] = 1e-3
    report = export_coreml(
        model, torch.randn(1, 64), tmp_path / "m", target="iOS18", compress="int8"
    )
    assert_good(report)
    assert report.rows[0].rounded_to_zero > 0
    assert "rounded to zero" in str(report)


def test_the_report_is_json_text_and_a_rich_table(tmp_path):
    """One result, four forms, and no claim about speed."""
    report = export_coreml(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m")
    data = json.loads(report.to_json())
    assert data == report.as_dict()
    assert data["verification"]["parameters"][1]["zeros_torch"] == 18816
    assert data["speed"] == "not measured"
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123,SIM115
    console.print(report)
    rich = console.export_text()
    console.file.close()
    for text in (str(report), rich):
        assert "speed not measured" in text
        assert "4.weight" in text
        assert "18816/23520" in text
        assert str(tmp_path) not in text
        if sys.platform != "darwin":
            assert "not run (needs macOS)" in text
    assert {"torch", "coremltools"} <= set(data["versions"])
    mil_name = report.rows[1].mil_names[0]
    assert mil_name in rich
    assert mil_name not in str(report)
    assert data["path"] == str(report.path)


def test_the_text_of_the_report_fits_a_terminal_and_keeps_how_each_weight_was_matched(tmp_path):
    """Words of any length stand below the table."""
    model, inputs = build("residual")
    text = str(export_coreml(model, inputs, tmp_path / "m"))
    assert max(map(len, text.splitlines())) <= 100
    assert "matched scaled per output channel (batch norm 'b1' folded): c1.weight" in text
    assert "matched as is: 1 of 4" in text
    assert "skip.weight: sparse would take" in text


def test_log_of_softmax_overflows_in_float16_and_the_report_names_the_cure(tmp_path):
    """softmax underflows in float16, log makes -inf of it; keep_float32 cures it."""
    model = digits_net()
    with torch.no_grad():
        model[4].weight *= 40
    inputs = torch.randn(16, 1, 28, 28)
    bad = export_coreml(model, inputs, tmp_path / "bad")
    assert bad.check.status == "passed"
    assert bad.check.declared_nonfinite > 0
    assert "keep_float32=('softmax', 'log')" in str(bad)
    good = export_coreml(model, inputs, tmp_path / "good", keep_float32=("softmax", "log"))
    assert good.check.declared_nonfinite == 0
    assert "keep_float32" not in str(good)


def test_batch_norm_is_left_unfolded_where_the_converter_folds_it_wrongly(tmp_path):
    """coremltools 9.0 mixes up channels of grouped transposed convolutions."""
    model, inputs = build("grouped transposed")
    report = export_coreml(model, inputs, tmp_path / "m")
    assert_good(report)
    assert "left unfolded" in str(report)


def test_channels_that_batch_norm_silences_are_not_called_lost(tmp_path):
    """A gamma of zero makes the folded weights zero by right; the count is separate."""
    model = prune(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)), 0.5)
    with torch.no_grad():
        model[1].weight[3] = 0
    report = export_coreml(model, torch.randn(1, 8, 6, 6), tmp_path / "m")
    assert_good(report)
    assert report.rows[0].scaled_to_zero == int(model[0].weight[3].count_nonzero())


@pytest.mark.slow
def test_twenty_million_parameters_take_less_than_half_more_time_than_coremltools_alone(tmp_path):
    """Hashing, not brute force: converted, stored, verified and checked in under 1.5 x."""
    import coremltools as ct

    layers = [m for _ in range(5) for m in (nn.Linear(2048, 2048), nn.ReLU())]
    model, x = prune(nn.Sequential(*layers), 0.75), torch.randn(4, 2048)
    optimize = ct.optimize.coreml
    threshold = optimize.OpThresholdPrunerConfig(
        threshold=0.0, minimum_sparsity_percentile=0.0, weight_threshold=2048
    )

    def alone(i):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (x,)).run_decompositions({})
            dense = ct.convert(
                program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True
            )
            config = optimize.OptimizationConfig(global_config=threshold)
            optimize.prune_weights(dense, config).save(str(tmp_path / f"ct{i}.mlpackage"))

    def ours(i):
        report = export_coreml(model, x, tmp_path / f"ours{i}")
        assert_good(report)
        assert report.weight_bytes < 0.32 * report.dense_weight_bytes

    # Processor time: what other processes do in the meantime is not counted.
    times = {"alone": [], "ours": []}
    walls = {"alone": [], "ours": []}
    for i in range(6):
        for name, run in (("alone", alone), ("ours", ours)):
            start, wall = time.process_time(), time.perf_counter()
            run(i)
            times[name].append(time.process_time() - start)
            walls[name].append(time.perf_counter() - wall)
    cpu = {name: statistics.median(runs[1:]) for name, runs in times.items()}
    wall = {name: statistics.median(runs[1:]) for name, runs in walls.items()}
    for kind, found in (("processor", cpu), ("wall", wall)):
        ratio = found["ours"] / found["alone"]
        print(f"\n21 M parameters, {kind} time, medians of 5: {found}, ratio {ratio:.2f}")
    assert cpu["ours"] < 1.5 * cpu["alone"]


def test_verification_alone_accepts_an_exported_package(tmp_path):
    """The read-back works on any system and any time later, with a model or its parameters."""
    model, inputs = build("residual")
    report = export_coreml(model, inputs, tmp_path / "m", check=False)
    again = verify_coreml(report.path, model)
    assert again.ok
    assert [row.zeros_stored for row in again.rows] == [row.zeros_stored for row in report.rows]
    model, inputs = build("lstm")
    report = export_coreml(model, inputs, tmp_path / "n", check=False)
    assert verify_coreml(report.path, dict(model.named_parameters())).ok
