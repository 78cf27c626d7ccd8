"""Options that say what to prune, as a config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import typer

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    Pattern,
    PruneConfig,
    Rule,
    SelectionError,
    Unstructured,
)
from purprune_adapters.cli.output import in_words_of

_PANEL = "What to prune"


class Scope(StrEnum):
    """Where a count holds."""

    tensor = "tensor"
    model = "global"


CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .safetensors file, or a folder or index as Hugging Face shards it.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", rich_help_panel=_PANEL, help="Rules in YAML."),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        "--sparsity", metavar="S", rich_help_panel=_PANEL, help="Fraction of zeros: 0.5, or 1/3."
    ),
]
Nm = Annotated[
    str | None,
    typer.Option(
        "--nm", metavar="ZEROS:M", rich_help_panel=_PANEL,
        help="Of every M neighbours ZEROS go: the first number counts zeros.",
    ),
]  # fmt: skip
BlockShape = Annotated[
    str | None,
    typer.Option(
        "--block", metavar="4x1", rich_help_panel=_PANEL,
        help="Blocks of these extents; -1 is a whole dim.",
    ),
]  # fmt: skip
ChannelDim = Annotated[
    int | None,
    typer.Option(
        "--channel", metavar="DIM", rich_help_panel=_PANEL, help="Whole channels along this dim."
    ),
]
Dim = Annotated[
    int | None,
    typer.Option(
        "--dim", metavar="DIM", rich_help_panel=_PANEL,
        help="The dim along which --nm counts neighbours (1, the inputs).",
    ),
]  # fmt: skip
ScopeOption = Annotated[
    Scope | None,
    typer.Option(
        "--scope", rich_help_panel=_PANEL, help="A count for each tensor, or one for all of them."
    ),
]
Leave = Annotated[
    list[str] | None,
    typer.Option(
        "--leave", metavar="NAME", rich_help_panel=_PANEL,
        help="Leave a tensor or module dense; globs too, and more than once.",
    ),
]  # fmt: skip
Step = Annotated[
    int | None,
    typer.Option(
        "--step", min=0, rich_help_panel=_PANEL, help="The step of the schedules (their end)."
    ),
]


def config_of(
    config: Path | None, sparsity: str | None, nm: str | None, block: str | None,
    channel: int | None, dim: int | None, scope: Scope | None, leave: Sequence[str] | None,
) -> PruneConfig:  # fmt: skip
    """Return the config that the options describe.

    Raises:
        ConfigError: nothing is to be pruned, or options contradict each other.
    """
    options = {"--sparsity": sparsity, "--nm": nm, "--block": block, "--channel": channel,
               "--dim": dim, "--scope": scope}  # fmt: skip
    given = [name for name, value in options.items() if value is not None]
    if config is not None and given:
        raise ConfigError(
            f"Expected --config alone, or options without it; got it and {', '.join(given)}."
        )
    if config is not None:
        found = named(PruneConfig.from_yaml(config))
    elif given:
        found = PruneConfig(global_config=_rule(sparsity, nm, block, channel, dim, scope))
    else:
        raise ConfigError(
            "Expected what to prune; got nothing. Give --sparsity 0.5, --nm 2:4 or --config FILE."
        )
    for name in leave or ():
        found = found.set_module_name(name, None)
    return found


def _rule(
    sparsity: str | None, nm: str | None, block: str | None, channel: int | None,
    dim: int | None, scope: Scope | None,
) -> Rule:  # fmt: skip
    where: Literal["tensor", "global"] = "global" if scope is Scope.model else "tensor"
    patterns: dict[str, Pattern] = {}
    if nm is not None:
        patterns["--nm"] = _nm(nm, 1 if dim is None else dim)
    if block is not None:
        extents = _extents(block)
        with in_words_of(f"--block {block}"):
            patterns["--block"] = Block(extents, scope=where)
    if channel is not None:
        patterns["--channel"] = Channel(channel, scope=where)
    if len(patterns) > 1:
        raise ConfigError(f"Expected one pattern; got {' and '.join(patterns)}.")
    if dim is not None and nm is None:
        raise ConfigError("Expected --dim with --nm only; for channels give --channel DIM.")
    if nm is not None and (scope is not None or sparsity is not None):
        raise ConfigError("Expected --nm without --sparsity and --scope: it says both itself.")
    pattern = next(iter(patterns.values()), Unstructured(scope=where))
    return Rule(_fraction(sparsity), pattern=pattern) if nm is None else Rule(pattern=pattern)


def _fraction(text: str | None) -> float:
    """Return the sparsity; a text like 1/3 is taken by Rule itself."""
    if text is None:
        raise ConfigError("Expected --sparsity with this pattern; got none. Half is 0.5.")
    number = text.removesuffix("%").strip()
    try:
        found = Fraction(number)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"Expected --sparsity as a fraction of zeros such as 0.5 or 1/3; got {text!r}."
        ) from None
    if text == number and 0 <= found <= 1:
        return text if "/" in text else float(text)  # type: ignore[return-value]
    way_out = f" Write --sparsity {float(found / 100):g}." if 0 <= found <= 100 else ""
    raise ConfigError(
        f"Expected --sparsity as a fraction of zeros in [0, 1]; got {text!r}.{way_out}"
    )


def _nm(text: str, dim: int) -> Pattern:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise ConfigError(
            f"Expected --nm ZEROS:M such as 2:4, of every 4 neighbours 2 zeros; got {text!r}."
        )
    zeros, m = int(found[1]), int(found[2])
    with in_words_of(f"--nm {text}", {"m": "M"}):
        if zeros > m:
            raise ConfigError(f"expected ZEROS <= M, of M neighbours; write --nm {m}:{zeros}.")
        return NM(zeros, m, dim=dim)


def _extents(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"-?\d+(x-?\d+)*", text) is None:
        raise ConfigError(f"Expected --block extents such as 4x1 or 2x-1; got {text!r}.")
    return tuple(int(extent) for extent in text.split("x"))


def named(config: PruneConfig) -> PruneConfig:
    """Return a config that has rules by name alone, as a checkpoint has names alone.

    Raises:
        SelectionError: it has rules by module type.
    """
    if config.module_type_configs:
        raise SelectionError(
            f"Expected rules by name, since a checkpoint has no modules; got module types "
            f"{', '.join(config.module_type_configs)}. Write module_name_configs: "
            f"{{'layers.*.mlp': ...}}, or a global_config."
        )
    return config


@contextmanager
def selecting(leave: Sequence[str] | None) -> Iterator[None]:
    """Tell what selects nothing in the words of the option that it came from."""
    try:
        yield
    except SelectionError as error:
        lines = [
            line.replace("module_name_configs", "--leave")
            if any(f"{name!r} matches nothing" in line for name in leave or ())
            else line
            for line in str(error).splitlines()
        ]
        raise SelectionError("\n".join(lines)) from None
