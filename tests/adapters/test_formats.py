"""The forms of others: what is checked before torch's 2:4 kernels, and dense state dicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from purprune import NM, Block, Rule, compute_masks
from purprune_adapters import Pruner
from purprune_adapters.formats import to_semi_structured, zeroed_state_dict


def halves(rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def two_of_four(weight: Tensor) -> dict[str, Tensor]:
    return compute_masks({"w": weight}, 0, Rule(pattern=NM(2, 4)))


class OnCuda(Tensor):
    """A tensor of the CPU that says it lies on a CUDA device."""

    device = torch.device("cuda", 1)  # type: ignore[assignment]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return what torch's function is called with, on a machine that has the device."""
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "purprune_adapters.formats.apply_masks",
        lambda params, masks: {
            name: torch.where(masks[name], weight, 0).as_subclass(OnCuda)
            for name, weight in params.items()
        },
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.sparse, "to_sparse_semi_structured", lambda weight: seen.append(weight) or weight
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_on_the_cpu_is_checked_and_stays_dense(dtype):
    """Defends the report in place of a warning: zeros are there, and the reason is said."""
    weight = halves(dtype=dtype)
    masks = two_of_four(weight)
    found = to_semi_structured({"w": weight, "dense": halves()}, masks)
    assert list(found.weights) == ["w"]
    assert torch.equal(found.weights["w"], torch.where(masks["w"], weight, 0))
    assert found.compressed == ()
    assert "CUDA" in found.reason
    assert str(found).startswith("0 of 1 weights are compressed: ")


def test_one_group_too_full_is_found_and_named():
    """Defends exactness: one entry more in one group of a thousand is refused."""
    weight = halves()
    masks = two_of_four(weight)
    group = masks["w"][17, 40:44]
    group[int((~group).nonzero()[0])] = True
    with pytest.raises(ValueError, match=r"1 of 512 groups.*row 17 from column 40.*NM\(zeros=2"):
        to_semi_structured({"w": weight}, masks)


def test_more_zeros_than_two_of_four_are_fine():
    """Defends blocks of zeros and weights that were zero before: at most two are kept."""
    weight = halves()
    masks = compute_masks({"w": weight}, 0, Rule(0.75, pattern=Block((1, 4))))
    masks["w"] &= two_of_four(weight)["w"]
    weight[:, :4] = 0
    masks["w"][:, :4] = True
    assert list(to_semi_structured({"w": weight}, masks).weights) == ["w"]


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (halves(dtype=torch.float32), "float16, bfloat16 or int8.*half"),
        (halves(30, 64), r"rows that are a multiple of \d+"),
        (halves(32, 60), "columns of"),
        (halves(0, 64), "columns of"),
        (halves().reshape(32, 16, 2, 2), r"two dims.*\(32, 16, 2, 2\)"),
    ],
)
def test_what_torch_has_no_kernel_for_is_refused_before_anything(weight, words):
    """Defends the words of torch's own refusal, on machines without the device too."""
    masks = {"w": torch.ones(weight.shape, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"(?s){words}"):
        to_semi_structured({"w": weight}, masks)


def test_names_that_are_no_parameters_are_refused():
    """Defends typing errors."""
    with pytest.raises(KeyError, match="'v'"):
        to_semi_structured({"w": halves()}, {"v": torch.ones(32, 64, dtype=torch.bool)})


def test_on_a_device_torch_gets_the_masked_weight_contiguous(calls):
    """Defends the call: each weight with its zeros, in a layout that torch's function takes."""
    weight = halves(64, 32).t()
    masks = two_of_four(weight)
    found = to_semi_structured({"w": weight}, masks)
    assert found.compressed == ("w",)
    assert str(found) == "1 of 1 weights are compressed"
    (given,) = calls
    assert given.is_contiguous()
    assert torch.equal(given.as_subclass(Tensor), torch.where(masks["w"], weight, 0))


def test_an_old_device_is_told_apart(calls, monkeypatch):
    """Defends machines whose GPU has no 2:4 units."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = to_semi_structured({"w": halves()}, two_of_four(halves()))
    assert not calls
    assert "cuda:1 has 7.5" in found.reason


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="no CUDA device of capability 8.0",
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_on_a_real_device_the_product_is_that_of_the_zeroed_weight():
    """Defends the numbers of torch's kernel."""
    weight = halves(128, 128).cuda()
    masks = two_of_four(weight)
    found = to_semi_structured({"w": weight}, masks)
    x = halves(128, 64).cuda()
    expected = torch.where(masks["w"], weight, 0) @ x
    torch.testing.assert_close(found.weights["w"] @ x, expected, rtol=1e-2, atol=1e-2)


class Tied(nn.Module):
    """A weight with two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_the_zeroed_state_dict_is_that_of_the_finalized_model():
    """Defends keys, buffers, tied weights, and the model that nobody touches."""
    torch.manual_seed(0)
    model = Tied()
    rule = Rule(0.5)
    masks = compute_masks({"embed.weight": model.embed.weight}, 0, rule)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = zeroed_state_dict(model, masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert state["embed.weight"] is state["head.weight"]
    Tied().load_state_dict(state)
    pruner = Pruner(model, {"module_name_configs": {"embed.weight": {"target_sparsity": 0.5}}})
    pruner.prepare(inplace=True)
    final = pruner.finalize().state_dict()
    assert list(state) == list(final)
    assert all(torch.equal(state[name], final[name]) for name in final)


def test_a_mask_that_does_not_fit_is_refused():
    """Defends the way of apply_masks, and the name."""
    with pytest.raises(ValueError, match="weight"):
        zeroed_state_dict(nn.Linear(2, 2), {"weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(KeyError, match="wieght"):
        zeroed_state_dict(nn.Linear(2, 2), {"wieght": torch.ones(2, 2, dtype=torch.bool)})
