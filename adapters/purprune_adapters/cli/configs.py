"""``purprune config``: whether a YAML file is a config, and what its rules are for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from purprune import ConfigError, PruneConfig, Rule
from purprune.selection import select
from purprune.tables import skipped_text
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.cli.output import AsJson, Command, say, say_json, table
from purprune_adapters.cli.pattern_names import pattern_name
from purprune_adapters.cli.rules import named

_EXAMPLES = (
    "Examples:\n\n"
    "purprune config rules.yaml\n\n"
    "purprune config rules.yaml --checkpoint llama/\n\n"
    "purprune config --schema > purprune.schema.json"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("config", cls=Command, epilog=_EXAMPLES)(config_command)


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
    rules: dict[str, Rule | None] = _all_rules(config)
    skipped: dict[str, str] = {}
    if checkpoint is not None:
        found, skipped = select(named(config), Checkpoint(checkpoint).shapes())
        rules = {**found}
    if as_json:
        say_json({"config": config.as_dict(), "rules": _plain(rules), "skipped": skipped})
    else:
        say(_text(rules, skipped))


def _all_rules(config: PruneConfig) -> dict[str, Rule | None]:
    """Return the rules by selector; what leaves dense is None."""
    everything = {} if config.global_config is None else {"global_config": config.global_config}
    return {**everything, **config.module_type_configs, **config.module_name_configs}


def _plain(rules: dict[str, Rule | None]) -> dict[str, Any]:
    found: dict[str, Any] = PruneConfig(module_name_configs=rules).as_dict()["module_name_configs"]
    return found


def _text(rules: dict[str, Rule | None], skipped: dict[str, str]) -> str:
    head = ("for", "target", "from", "schedule", "score", "pattern")
    rows = [(name, *_cells(rule)) for name, rule in rules.items()]
    return table(head, rows) + skipped_text(skipped)


def _cells(rule: Rule | None) -> tuple[str, ...]:
    if rule is None:
        return "dense", "-", "-", "-", "-"
    return (
        f"{float(rule.target):.4g}",
        f"{float(rule.initial_sparsity):.4g}",
        str(rule.schedule),
        str(rule.score),
        pattern_name(rule.pattern),
    )
