"""Bad input is refused before any work, with the name, the values and the way out."""

import importlib.util

import pytest
import torch
from coreml_models import digits_net, prune
from torch import nn

from purprune_adapters.coreml import ExportError, VerificationError, export_coreml, verify_coreml
from purprune_adapters.coreml import export as export_module


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Expect a refusal, with the conversion made impossible and the folder left empty."""

    def never(*args, **options):
        raise AssertionError("the conversion was begun")

    monkeypatch.setattr(export_module, "convert", never)

    def check(error, *words, model=None, inputs=None, path=None, **options):
        inputs = torch.randn(1, 1, 28, 28) if inputs is None else inputs
        with pytest.raises(error) as caught:
            export_coreml(model or digits_net(), inputs, path or tmp_path / "m", **options)
        for word in words:
            assert word in str(caught.value), str(caught.value)
        assert not list(tmp_path.iterdir())

    return check


def test_missing_coremltools_names_the_extra(refused, monkeypatch):
    """The extra is what the user has to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name)
    )
    refused(ImportError, 'pip install "purprune[coreml]"')


def test_old_and_unknown_targets_are_refused_with_the_list_of_able_ones(refused):
    """Before iOS16 there is no sparse storage, and coremltools stays silent about it."""
    import coremltools as ct

    refused(ValueError, "iOS15", "no sparse weights", "iOS16", "macOS13", target="iOS15")
    refused(ValueError, "iOS15", target=ct.target.iOS15)
    refused(ValueError, "'iOS99'", "iOS18", target="iOS99")
    refused(ValueError, "Did you mean 'iOS17'?", target="ios17")
    refused(TypeError, "16", target=16)


def test_options_outside_their_values_are_refused(refused):
    """Each names the argument, what is allowed, and what came."""
    refused(ValueError, "compress='int8'", "iOS16", "iOS18", compress="int8")
    refused(ValueError, "'int3'", "'palette6'", target="iOS18", compress="int3")
    refused(ValueError, "precision", "'float16'", "'half'", precision="half")
    refused(ValueError, "frontend", "'trace'", "'onnx'", frontend="onnx")
    refused(ValueError, "min_sparsity", "75", min_sparsity=75)


def test_a_model_in_training_mode_is_refused_by_the_name_of_the_submodule(refused):
    """Dropout and batch norm would be exported as they train."""
    refused(ValueError, "the model", "eval", model=digits_net().train())
    model = digits_net()
    model[4].train()
    refused(ValueError, "'4'", "Linear", "eval()", model=model)
    refused(TypeError, "Module", model=lambda x: x)


def test_a_model_that_was_never_pruned_is_refused(refused):
    """A dense package with a pruning report would be a false claim."""
    dense = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    refused(ValueError, "finalize", model=dense)
    keep = {"1.weight": torch.ones(10, 784, dtype=torch.bool)}
    refused(ValueError, "keep every entry", model=dense, masks=keep)


def test_example_inputs_of_another_type_are_refused(refused):
    """Arrays, dicts and empty tuples."""
    refused(TypeError, "example_inputs", "dict", inputs={"x": torch.ones(1)})
    refused(TypeError, "example_inputs[1]", "int", inputs=(torch.ones(1), 3))
    refused(TypeError, "example_inputs", inputs=())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_with_the_parameter_and_the_count(refused, bad):
    """They would spread through the package unseen."""
    model = digits_net()
    with torch.no_grad():
        model[4].weight[0, :3] = bad
    refused(ValueError, "'4.weight'", "3 NaN or inf", model=model)


def test_weights_beyond_float16_are_refused_unless_the_package_is_float32(refused, tmp_path):
    """They would become inf."""
    model = digits_net()
    with torch.no_grad():
        model[4].weight[0, 0] = 1e5
    refused(ValueError, "65504", "precision='float32'", "'4.weight'", model=model)


def test_meta_tensors_are_refused(refused):
    """There is nothing to export."""
    refused(
        ValueError, "meta", "0.weight", model=nn.Sequential(nn.Linear(4, 4, device="meta")).eval()
    )


def test_masks_that_do_not_fit_are_refused(refused):
    """Unknown names, other shapes, other types, and masks that weren't applied."""
    model = digits_net()
    mask = model[4].weight != 0
    refused(ValueError, "'head.weight'", masks={"head.weight": mask})
    refused(ValueError, "(10, 2352)", "(2352, 10)", masks={"4.weight": mask.T})
    refused(TypeError, "float32", "4.weight", masks={"4.weight": mask.float()})
    refused(ValueError, "4704 pruned entries", "finalize()", masks={"4.weight": ~mask}, model=model)


def test_paths_are_checked(refused, tmp_path, monkeypatch):
    """Wrong suffix, missing folder, wrong type."""
    refused(ValueError, "'.mlpackage'", "m.mlmodel", path=tmp_path / "m.mlmodel")
    refused(FileNotFoundError, "missing", path=tmp_path / "missing" / "m")
    refused(TypeError, "path", path=3)


def test_names_in_the_wrong_number_are_refused(tmp_path):
    """Silently using the first names would mislabel the rest."""
    for which in ("input_names", "output_names"):
        with pytest.raises(ValueError, match=f"1 different {which}"):
            export_coreml(
                digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m", **{which: ["a", "b"]}
            )
    assert not list(tmp_path.iterdir())


def test_inputs_that_the_model_does_not_take_fail_with_torch_own_words(tmp_path):
    """The first run of the model is torch's; its message is kept."""
    with pytest.raises(ExportError, match="does not run on example_inputs: RuntimeError"):
        export_coreml(digits_net(), torch.randn(1, 1, 8, 8), tmp_path / "m")
    assert not list(tmp_path.iterdir())


class Unconvertible(nn.Module):
    """coremltools has no conversion for ``nn.Bilinear``."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(16, 16, 8)
        with torch.no_grad():
            self.mix.weight[:4] = 0

    def forward(self, x):
        return self.mix(x, x)


def test_a_failed_conversion_tells_every_way_that_was_tried_and_what_was_said(tmp_path):
    """Quiet until it matters."""
    with pytest.raises(ExportError) as caught:
        export_coreml(Unconvertible().eval(), torch.randn(2, 16), tmp_path / "m", frontend="trace")
    assert "torch.jit.trace failed" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_verification_refuses_what_is_no_package(tmp_path):
    """The same care where an existing path is given."""
    with pytest.raises(FileNotFoundError, match="Core ML package"):
        verify_coreml(tmp_path / "nothing", digits_net())
    with pytest.raises(ValueError, match="pruned"):
        verify_coreml(tmp_path / "nothing", nn.Linear(3, 3))


def test_verification_errors_are_export_errors():
    """One except clause catches both."""
    assert issubclass(VerificationError, ExportError)


def test_impossible_interfaces_are_refused_before_the_conversion(refused):
    """One name for an input and an output, or a name that a program can't have."""
    refused(ValueError, "'x'", "input and an output", input_names=["x"], output_names=["x"])
    refused(ValueError, "'a-b'", "letters", output_names=["a-b"])
    refused(ValueError, "'1st'", "input_names", input_names=["1st"])
    refused(ValueError, "'tensor'", "MIL", input_names=["tensor"])
    refused(ValueError, "2 different output_names", "'p'", output_names=["p", "p"])
    refused(TypeError, "output_names", "'out'", output_names="out")
    refused(TypeError, "output_names", "3", output_names=[3])


class Twice(nn.Module):
    """Returns one tensor under two names, and another."""

    def __init__(self):
        super().__init__()
        self.linear = prune(nn.Linear(16, 16), 0.5)

    def forward(self, x):
        y = self.linear(x)
        return y, y, y + 1


def test_names_for_a_tensor_that_is_returned_twice_are_refused(tmp_path):
    """The program has one output for both, and one of the names would be lost."""
    with pytest.raises(ValueError, match="returns one tensor twice"):
        export_coreml(
            Twice().eval(), torch.randn(1, 16), tmp_path / "m", output_names=["p", "q", "r"]
        )
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_converter_gave_to_the_other_side_is_refused(tmp_path):
    """The input is called x by the signature of forward."""
    model = prune(nn.Sequential(nn.Linear(16, 16)), 0.5)
    for frontend in ("export", "trace"):
        with pytest.raises(ValueError, match="both would hold 'input'"):
            export_coreml(
                model, torch.randn(1, 16), tmp_path / "m", output_names=["input"], frontend=frontend
            )
    assert not list(tmp_path.iterdir())


def test_operations_that_mil_does_not_have_are_refused_with_the_near_ones(refused):
    """A misspelled one would keep nothing in float32; a bare text would be taken apart."""
    refused(ValueError, "'sofmax'", "Did you mean 'softmax'", keep_float32=("softmax", "sofmax"))
    refused(ValueError, "3", keep_float32=(3,))
    refused(ValueError, "'placeholder'", keep_float32=("placeholder",))
    refused(TypeError, "keep_float32", "('softmax',)", keep_float32="softmax")


def test_types_of_inputs_do_not_go_with_torch_export(refused):
    """They would be ignored."""
    import coremltools as ct

    inputs = [ct.TensorType(name="x", shape=(1, 1, 28, 28))]
    with pytest.raises(ValueError, match="frontend='export'"):
        export_coreml(
            digits_net(), torch.randn(1, 1, 28, 28), "m", inputs=inputs, frontend="export"
        )


def test_paths_without_a_name_are_refused_before_any_work(refused):
    """The parent folder, an unknown home, and a suffix alone."""
    refused(ValueError, "name a package", path="..")
    refused(ValueError, "home", "~nouser-of-that-name", path="~nouser-of-that-name/x")
    refused(ValueError, "name a package", path=".mlpackage")
    refused(ValueError, "name a package", path="folder/.mlpackage")


class Talking(nn.Module):
    """Returns a text beside its tensor."""

    def __init__(self, *, mute=False):
        super().__init__()
        self.linear, self.mute = prune(nn.Linear(16, 16), 0.5), mute

    def forward(self, x):
        return ("nothing",) if self.mute else (self.linear(x), "text")


def test_a_text_among_the_outputs_is_left_out(tmp_path):
    """Taking it apart letter by letter never ends."""
    report = export_coreml(Talking().eval(), torch.randn(1, 16), tmp_path / "m")
    assert report.check.status == "passed"
    with pytest.raises(ExportError, match="returns none"):
        export_coreml(Talking(mute=True).eval(), torch.randn(1, 16), tmp_path / "n")


def test_a_model_that_a_pruner_still_holds_is_refused(tmp_path):
    """Defends against exporting a schedule's half-way weights by mistake."""
    from purprune import Rule
    from purprune_adapters import Pruner, export_coreml

    pruner = Pruner(torch.nn.Linear(8, 8), Rule(0.5))
    prepared = pruner.prepare().eval()
    with pytest.raises(ValueError, match=r"Export what pruner\.finalize\(\) returns"):
        export_coreml(prepared, torch.ones(1, 8), tmp_path / "net.mlpackage")
