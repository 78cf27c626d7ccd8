"""``purprune verify``: a Core ML package against the checkpoint that it was made from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from purprune import unpack_masks
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.cli.output import AsJson, Command, say, say_json, table
from purprune_adapters.coreml.paths import is_package, package_path
from purprune_adapters.coreml.records import ParameterRecord, Verification
from purprune_adapters.coreml.verify import verify_coreml
from purprune_adapters.weights import load_weights

_EXAMPLES = (
    "Examples:\n\n"
    "purprune verify net.mlpackage pruned.safetensors\n\n"
    "purprune verify net.mlpackage model.pt --masks masks.safetensors --json"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify", cls=Command, epilog=_EXAMPLES)(verify_command)


def verify_command(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="The .mlpackage.")],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="safetensors, or of torch.save.")
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            "--masks",
            metavar="FILE",
            help="Packed masks that say what is pruned; else every weight that holds a zero.",
        ),
    ] = None,
    eps: Annotated[
        float, typer.Option(help="Of batch norms in the checkpoint, which it does not say.")
    ] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Find every pruned weight in a package by its values.

    Exit code 1 when one is missing, lost an entry, has one more, or was changed.
    """
    _refuse_no_package(package, checkpoint)
    weights = load_weights(checkpoint)
    given = None if masks is None else unpack_masks(Checkpoint(masks))
    if given is None:
        _refuse_dense(weights, checkpoint)
    found = verify_coreml(package, module_of(weights, eps), given, strict=False)
    if as_json:
        say_json(found.as_dict())
    else:
        say(_text(found))
    if not found.ok:
        raise typer.Exit(1)


def _refuse_no_package(package: Path, checkpoint: Path) -> None:
    if is_package(checkpoint) and not is_package(package):
        right = shlex.join(["purprune", "verify", str(checkpoint), str(package)])
        raise ValueError(
            f"Expected PACKAGE and then CHECKPOINT; got the package second. Write {right}."
        )
    if not is_package(package_path(package)):
        raise FileNotFoundError(f"Expected a Core ML package at '{package}'; there is none.")


def _refuse_dense(weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise when no weight holds a zero, so that none counts as pruned."""
    for tensor in weights.values():
        if tensor.is_floating_point() and tensor.ndim >= 2 and bool((tensor == 0).any()):
            return
    raise ValueError(
        f"Expected a pruned checkpoint; '{checkpoint}' holds no zeros in tensors of two or more "
        f"dims. Give the one that the package was made from, or --masks."
    )


def module_of(weights: Mapping[str, Tensor], eps: float) -> nn.Module:
    """Return a module with these parameters, and batch norms where their statistics are.

    It can't be called. It tells :func:`verify_coreml` which factors were folded into weights.
    """
    root = nn.Module()
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = _below(root, path, weights, eps)
        if leaf.startswith("running_"):
            owner.register_buffer(leaf, tensor)
        elif tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root.eval()


def _below(root: nn.Module, path: str, weights: Mapping[str, Tensor], eps: float) -> nn.Module:
    owner, walked = root, ""
    for part in filter(None, path.split(".")):
        walked = f"{walked}.{part}" if walked else part
        child = owner._modules.get(part)
        if child is None:
            child = _made(walked, weights, eps)
            owner.add_module(part, child)
        owner = child
    return owner


def _made(path: str, weights: Mapping[str, Tensor], eps: float) -> nn.Module:
    variance = weights.get(f"{path}.running_var")
    if variance is None:
        return nn.Module()
    return nn.BatchNorm2d(len(variance), eps=eps, affine=f"{path}.weight" in weights)


def _text(found: Verification) -> str:
    head = ("tensor", "stored", "zeros", "lost", "extra", "changed", "bytes", "matched")
    rows = [_row(row) for row in found.rows]
    verdict = ["every surviving weight is there"] if found.ok else found.problems
    lines = "\n  ".join(verdict)
    return (
        f"{table(head, rows)}\n\nweights: {found.weight_bytes:,} bytes, dense "
        f"{found.weight_bytes_dense:,}\nread back: {lines}"
    )


def _row(row: ParameterRecord) -> tuple[str, ...]:
    return (
        row.name,
        row.storage,
        f"{row.zeros_stored:,} of {row.entries:,}",
        f"{row.dropped:,}",
        f"{row.revived:,}",
        f"{row.wrong:,}",
        f"{row.bytes_stored:,}",
        row.matched or "-",
    )
