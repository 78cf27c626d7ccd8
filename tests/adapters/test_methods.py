"""Every method of docs/methods.md by configuration alone: from YAML through a Pruner, exact."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from purprune import PruneConfig, grasp_scores, synflow_scores
from purprune.schedules import OwnSchedule
from purprune.scores import OwnScore
from purprune_adapters import Pruner, collect_stats, resolve

STEPS = 12
RAMP = "schedule: {update_steps: [2, 4, 6, 8]}"
METHODS = {
    "one-shot": "{target_sparsity: 0.8}",
    "one-shot, later": "{target_sparsity: 0.8, schedule: {begin_step: 5}}",
    "gradual": f"{{target_sparsity: 0.8, {RAMP}}}",
    "cosine": "{target_sparsity: 0.8, schedule: {kind: cosine, update_steps: [2, 4, 6, 8]}}",
    "exponential": "{target_sparsity: 0.8, schedule: {kind: exponential, update_steps: [2, 5, 8]}}",
    "random": "{target_sparsity: 0.8, score: {kind: random, seed: 3}}",
    "taylor": f"{{target_sparsity: 0.8, {RAMP}, score: taylor}}",
    "snip": f"{{target_sparsity: 0.8, {RAMP}, score: snip}}",
    "gradient": f"{{target_sparsity: 0.8, {RAMP}, score: gradient}}",
    "movement": f"{{target_sparsity: 0.8, {RAMP}, score: movement}}",
    "fisher, summed": f"{{target_sparsity: 0.8, {RAMP}, score: fisher}}",
    "wanda": "{target_sparsity: 0.8, score: wanda, pattern: {group: {kind: row}}}",
    "ria": "{n_m_ratio: [2, 4], score: {kind: ria, power: 0.5}}",
    "lamp": "{target_sparsity: 0.8, score: lamp, pattern: {group: {kind: global}}}",
    "synflow": "{target_sparsity: 0.8, score: synflow, pattern: {group: {kind: global}}}",
    "grasp": "{target_sparsity: 0.8, score: grasp, pattern: {group: {kind: global}}}",
    "uniform": f"{{target_sparsity: 0.8, {RAMP}, budget: uniform}}",
    "er": f"{{target_sparsity: 0.8, {RAMP}, budget: er}}",
    "erk": f"{{target_sparsity: 0.8, {RAMP}, budget: erk}}",
    "global": f"{{target_sparsity: 0.8, {RAMP}, pattern: {{group: {{kind: global}}}}}}",
    "global with bounds": "{target_sparsity: 0.8, pattern: {group: {kind: global, "
    "min_sparsity: 0.5, max_sparsity: 0.9, normalize: l2}}}",
    "channels, global": "{target_sparsity: 0.5, pattern: {unit: {kind: channel}, "
    "group: {kind: global}}}",
    "2:4": "{n_m_ratio: [2, 4]}",
    "2:4, transposable": "{pattern: {group: {kind: transposable, zeros: 2, m: 4}}}",
    "SET": "{target_sparsity: 0.8, budget: erk, regrow: {every: 3, decay: constant, "
    "score: {kind: random, seed: 1}}}",
    "RigL": "{target_sparsity: 0.8, budget: erk, regrow: {every: 3, end_step: 9}}",
    "GraNet": f"{{target_sparsity: 0.8, {RAMP}, initial_sparsity: 0.5, "
    "regrow: {every: 2, end_step: 9}}",
    "global RigL": "{target_sparsity: 0.8, pattern: {group: {kind: global}}, "
    "regrow: {every: 3, end_step: 9}}",
    "STE": f"{{target_sparsity: 0.8, {RAMP}, regrow: {{kind: straight_through}}}}",
    "SR-STE": "{n_m_ratio: [2, 4], regrow: {kind: straight_through, decay: 2.0e-4}}",
    "AC/DC": "{target_sparsity: 0.8, schedule: {kind: alternating, begin_step: 2, "
    "sparse_steps: 3, dense_steps: 2, end_step: 9}}",
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((8, 24), (24, 16), (16, 4))
    return nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=generator), torch.arange(16) % 4


def stats_for(model: nn.Module, config: PruneConfig) -> dict[str, dict[str, Tensor]]:
    """Return what the scores of a config need and a Pruner does not have."""
    score = config.rules["global_config"].score
    named = list(resolve(model, config).module_name_configs)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(some: dict[str, Tensor]) -> Tensor:
        x, y = batch(0)
        return nn.functional.cross_entropy(torch.func.functional_call(model, some, x), y)

    def flow(some: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, some, torch.ones(1, 8, dtype=torch.float64))

    needs = getattr(score, "needs", ())
    if "input_norm" in needs:
        return collect_stats(model, [batch(0), batch(1)], config, progress=False)
    if needs in (("synflow",), ("grasp",)):
        found = (
            synflow_scores(flow, params) if needs == ("synflow",) else grasp_scores(loss, params)
        )
        return {name: {needs[0]: found[name]} for name in named}
    return {}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_yaml_with_exact_counts_at_every_step(method: str):
    """Defends configuration alone, exact totals at each step, and zeros in the final model."""
    config = PruneConfig.from_yaml(io.StringIO(f"global_config: {METHODS[method]}"))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, config, optimizer=optimizer, stats=stats_for(model, config))
    pruner.prepare(inplace=True)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        planned, pruned = pruner.plan(step), pruner.report()
        shared = {name for group in planned.shared for name in group.names}
        for tensor in planned.tensors:
            if tensor.pruned_units is not None:
                zeros = pruned[tensor.name].mask.zeros
                assert zeros == tensor.pruned_units * math.prod(tensor.unit), (step, tensor.name)
        for group in planned.shared:
            units = {t.name: math.prod(t.unit) for t in planned.tensors}
            gone = sum(Fraction(pruned[name].mask.zeros, units[name]) for name in group.names)
            assert gone == group.pruned, step
        assert shared or all(t.pruned_units is not None for t in planned.tensors)
    final = pruner.finalize(inplace=True)
    rows = pruner.report().rows  # what came back in the last step is still zero
    assert all(row.weight.zeros >= row.mask.zeros for row in rows)
    assert torch.isfinite(final(batch(0)[0])).all()


def test_the_page_of_methods_names_every_kind_that_a_file_can_have():
    """Defends docs/methods.md against scores, budgets and schedules that it forgets."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    for cls in (*get_args(OwnSchedule), *get_args(OwnScore)):
        assert cls.__name__ in page or f"`{cls.kind}`" in page or f"kind: {cls.kind}" in page, cls
