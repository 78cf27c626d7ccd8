"""Real architectures, small and with random weights: selected, trained, resumed, finalized."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from purprune import PolynomialDecay, PruneConfig, Rule, SelectionError
from purprune_adapters import Pruner, export_coreml, resolve

transformers = pytest.importorskip("transformers", reason="transformers isn't installed")

RULE = Rule(0.75, PolynomialDecay([1, 2, 3]), 0.25)
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16, "attn_implementation": "eager"}


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, **TEXT, intermediate_size=32)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, intermediate_size=32)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **sizes))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit
}  # fmt: skip
PRUNED = {  # with the global rule: the layers' matrices, and those of the head
    "bert": 2 * 6 + 2,  # and the pooler's; query, key, value, output, and two of the MLP
    "llama": 2 * 7 + 1,  # query, grouped key and value, output, and three of the MLP
    "vit": 2 * 6 + 2,  # and the convolution of the patches
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name]().eval()  # no dropout: a resumed run is compared


def config_for(name: str, rule: Rule = RULE) -> PruneConfig:
    """Return the global rule; GPT-2 has Conv1D in place of Linear, which must be named."""
    kind = PruneConfig().set_module_type("Conv1D", rule)
    return kind if name == "gpt2" else PruneConfig(rule)


def inputs(name: str, step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(0, 40, (2, 8), generator=generator)}


def train_step(name: str, model: nn.Module, optimizer: Any, pruner: Pruner, step: int) -> None:
    optimizer.zero_grad()
    logits = model(**inputs(name, step)).logits
    nn.functional.cross_entropy(
        logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 2
    ).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    pruner.step()


def is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


@pytest.mark.parametrize("name", PRUNED)
def test_the_global_rule_takes_the_matrices_and_leaves_embeddings(name: str):
    """Defends what is selected of each architecture, grouped-query attention included."""
    model = make(name)
    names = list(resolve(model, Rule(0.5)).rules)
    assert len(names) == PRUNED[name]
    assert not any(is_embedding(model, n) for n in names)
    assert all(model.get_parameter(n).dim() >= 2 for n in names)
    by_type = list(resolve(model, PruneConfig().set_module_type("Linear", Rule(0.5))).rules)
    assert set(names) - set(by_type) == {n for n in names if "projection" in n}


def test_gpt2_is_pruned_by_its_own_kind_of_layer():
    """Defends Conv1D, and its head, which is the embedding: no global rule prunes that alone."""
    model = make("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(SelectionError, match=r"the global rule is not for 'weight' of Conv1D"):
        Pruner(model, Rule(0.5))
    names = list(resolve(model, config_for("gpt2")).rules)
    assert len(names) == 2 * 4
    assert not any("wte" in n or "ln_" in n for n in names)
    head = PruneConfig().set_module_name("lm_head", Rule(0.5))
    assert list(resolve(model, head).rules) == ["transformer.wte.weight"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_train_pruned_and_resume_with_the_same_bits(name: str):
    """Defends training, a checkpoint in the middle of the schedule, and the finalized model."""

    def start() -> tuple[nn.Module, Any, Pruner]:
        model = make(name)
        return model, torch.optim.AdamW(model.parameters(), 0.01), Pruner(model, config_for(name))

    model, optimizer, pruner = start()
    pruner.prepare(inplace=True)
    before = model(**inputs(name)).logits.detach()
    file = io.BytesIO()
    for step in range(1, 5):
        train_step(name, model, optimizer, pruner, step)
        if step == 2:
            torch.save([x.state_dict() for x in (model, optimizer, pruner)], file)
    file.seek(0)
    weights, moments, masks = torch.load(file, weights_only=True)
    again, restarted, resumed = start()
    again.load_state_dict(weights)
    restarted.load_state_dict(moments)
    resumed.load_state_dict(masks)
    resumed.prepare(inplace=True)
    for step in range(3, 5):
        train_step(name, again, restarted, resumed, step)
    for (key, mine), its in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, its), key
    for row in pruner.report().rows:
        assert row.weight.zeros == row.mask.zeros == int(row.weight.entries * 0.75), row.name
    final = pruner.finalize()
    after = final(**inputs(name)).logits
    assert torch.equal(after, model(**inputs(name)).logits)
    assert not torch.equal(after, before)
    assert not any(module._forward_pre_hooks for module in final.modules())


def test_a_finalized_model_is_saved_and_loaded_by_its_own_library(tmp_path):
    """Defends save_pretrained: the names are those of the architecture, and the zeros are there."""
    model = make("llama")
    pruner = Pruner(model, Rule(0.75))
    pruner.prepare(inplace=True)
    final = pruner.finalize(inplace=True)
    final.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for name, mask in pruner.masks.items():
        assert torch.equal(loaded.get_parameter(name) == 0, ~mask), name
    prompt = inputs("llama")["input_ids"]
    tokens = final.generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, loaded.generate(prompt, max_new_tokens=3, do_sample=False))


class Logits(nn.Module):
    """What is exported: one tensor in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])  # coremltools 9.0 converts no Llama
def test_architectures_are_exported_to_core_ml(name: str, tmp_path):
    """Defends the way to a device: every pruned weight is found in the package, with its zeros."""
    pytest.importorskip("coremltools.version", reason="the extra 'coreml' isn't installed")
    model = Logits(make(name))
    pruner = Pruner(model, config_for(name, Rule(0.75)))
    pruner.prepare(inplace=True)
    final = pruner.finalize(inplace=True)
    (example,) = inputs(name).values()
    report = export_coreml(final.eval(), example, tmp_path / "net.mlpackage")
    rows = {row.name: row for row in report.rows}
    for key, mask in pruner.masks.items():
        assert rows[key].zeros_stored >= int((~mask).sum()), key
        assert rows[key].dropped == 0, key
