"""``purprune plan``: what would be pruned, and how large the result would be."""

from __future__ import annotations

from collections.abc import Mapping

import typer
from torch import Tensor

from purprune import Plan, plan
from purprune.tables import skipped_text
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.cli import rules
from purprune_adapters.cli.output import AsJson, Command, human, say, say_json, table
from purprune_adapters.coreml.storage import OVERHEAD
from purprune_adapters.predicted import Bounds, Prediction, predict
from purprune_adapters.tensor_files import read_layout

_EXAMPLES = (
    "Examples:\n\n"
    "purprune plan model.safetensors --sparsity 0.5\n\n"
    "purprune plan llama/ --nm 2:4 --leave 'model.embed_tokens' --leave lm_head\n\n"
    "purprune plan llama/ --sparsity 0.6 --scope global --json"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan", cls=Command, epilog=_EXAMPLES)(plan_command)


def plan_command(
    checkpoint: rules.CheckpointPath,
    config: rules.ConfigFile = None,
    sparsity: rules.Sparsity = None,
    nm: rules.Nm = None,
    block: rules.BlockShape = None,
    channel: rules.ChannelDim = None,
    dim: rules.Dim = None,
    scope: rules.ScopeOption = None,
    leave: rules.Leave = None,
    step: rules.Step = None,
    as_json: AsJson = False,
) -> None:
    """Say what would be pruned, in integers, and the bytes that follow; reads headers only."""
    cfg = rules.config_of(config, sparsity, nm, block, channel, dim, scope, leave)
    source = Checkpoint(checkpoint)
    shapes = source.shapes()
    with rules.selecting(leave):
        planned = plan(shapes, cfg, step)
    predicted = predict(shapes, planned)
    size = sum(read_layout(file).size for file in set(source.files().values()))
    if as_json:
        say_json({**_as_dict(planned, predicted), "file_bytes": size})
    else:
        say(_text(shapes, planned, predicted, size))


def _as_dict(planned: Plan, predicted: Prediction) -> dict[str, object]:
    found = planned.as_dict()
    found["tensors"] = [
        {**row, **predicted.tensors[row["name"]].as_dict()} for row in found["tensors"]
    ]
    return {**found, "total": predicted.total.as_dict()}


def _text(shapes: Mapping[str, Tensor], planned: Plan, predicted: Prediction, size: int) -> str:
    head = ("tensor", "shape", "dtype", "entries", "zeros", "dense bytes", "bit mask", "Core ML")
    rows = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            str(shapes[row.name].dtype).removeprefix("torch."),
            f"{row.entries:,}",
            str(found.zeros),
            f"{found.dense:,}",
            str(found.bitmask),
            str(found.coreml),
        )
        for row in planned.tensors
        for found in [predicted.tensors[row.name]]
    ]
    total = predicted.total
    entries = sum(row.entries for row in planned.tensors)
    lines = [
        table(head, rows) + "".join(map(str, planned.shared)) + skipped_text(planned.skipped),
        "",
        f"zeros: {total.zeros} of {entries:,} entries in {len(rows)} tensors",
        "all tensors, in bytes:",
        f"  safetensors, dense with zeros: {size:,} ({human(size)}), as before",
        f"  bit mask and the rest:         {_share(total.bitmask, total.dense)}",
        f"  Core ML weights, float16:      {_share(total.coreml, total.coreml_dense)}",
        f"    of which {OVERHEAD} for the records of each sparse tensor, in no export's table",
    ]
    return "\n".join(lines)


def _share(size: Bounds, dense: int) -> str:
    words = human(size.most) if size.least == size.most else f"at most {human(size.most)}"
    percent = f", {size.most / dense:.1%} of dense" if dense else ""
    return f"{size} ({words}{percent})"
