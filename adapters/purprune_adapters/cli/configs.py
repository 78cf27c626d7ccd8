"""``purprune config``: whether a YAML file is a config, and what its rules are for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from purprune import ConfigError, PruneConfig, Rule
from purprune.selection import select
from purprune.tables import skipped_text
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.cli.output import AsJson, say, say_json, table
from purprune_adapters.cli.rules import named

_EXAMPLES = (
    "Examples:\n\n"
    "purprune config rules.yaml\n\n"
    "purprune config rules.yaml --checkpoint llama/\n\n"
    "purprune config --schema > purprune.schema.json"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("config", epilog=_EXAMPLES)(config_command)


def config_command(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A config in YAML.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Say which tensor gets which rule.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a config, and print its rules, by selector or by tensor of a checkpoint."""
    if schema:
        say_json(PruneConfig.json_schema())
        return
    if file is None:
        raise ConfigError("Expected a config FILE, or --schema; got neither.")
    config = PruneConfig.from_yaml(file)
    rules: dict[str, Rule] = config.rules
    skipped: dict[str, str] = {}
    if checkpoint is not None:
        rules, skipped = select(named(config), Checkpoint(checkpoint).shapes())
    if as_json:
        say_json({"config": config.as_dict(), "rules": _plain(rules), "skipped": skipped})
    else:
        say(_text(rules, skipped))


def _plain(rules: dict[str, Rule]) -> dict[str, Any]:
    found: dict[str, Any] = PruneConfig(module_name_configs=rules).as_dict()["module_name_configs"]
    return found


def _text(rules: dict[str, Rule], skipped: dict[str, str]) -> str:
    head = ("for", "target", "from", "schedule", "score", "pattern")
    rows = [
        (
            name,
            f"{float(rule.target):.4g}",
            f"{float(rule.initial_sparsity):.4g}",
            str(rule.schedule),
            str(rule.score),
            str(rule.pattern),
        )
        for name, rule in rules.items()
    ]
    return table(head, rows) + skipped_text(skipped)
