"""``purprune schedule``: the sparsity over the steps, drawn in the terminal or as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from purprune import ConfigError, PolynomialDecay, PruneConfig, Rule
from purprune_adapters.cli.output import AsJson, Command, in_words_of, say, say_json
from purprune_adapters.places import check_folder

_EXAMPLES = (
    "Examples:\n\n"
    "purprune schedule --begin 0 --end 800 --frequency 100 --target 0.8\n\n"
    "purprune schedule --update-steps 'range(0, 900, 100)' --power 1 --png ramp.png\n\n"
    "purprune schedule --config rules.yaml --json"
)
_OPTIONS = {
    "update_steps": "--update-steps",
    "begin_step": "--begin",
    "end_step": "--end",
    "frequency": "--frequency",
    "initial_sparsity": "--initial",
    "target_sparsity": "--target",
}
"""What the fields of the schedule and the rule are called here."""
_HEIGHT, _WIDTH = 12, 64
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_MOST_STEPS = 10_000


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("schedule", cls=Command, epilog=_EXAMPLES)(schedule_command)


def schedule_command(
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Draw the rules of a YAML file.")
    ] = None,
    update_steps: Annotated[
        str | None, typer.Option(help="0,100,200 or 'range(start, stop, stride)'.")
    ] = None,
    begin: Annotated[int | None, typer.Option(help="The first update.")] = None,
    end: Annotated[int | None, typer.Option(help="The last update.")] = None,
    frequency: Annotated[int | None, typer.Option(help="Steps between updates.")] = None,
    power: Annotated[float, typer.Option(help="Of the polynomial; 1 is a line.")] = 3,
    initial: Annotated[float, typer.Option(help="The sparsity at the first update.")] = 0.0,
    target: Annotated[float | None, typer.Option(help="The sparsity at the end. [0.5]")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write a picture (matplotlib).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the sparsity over the steps."""
    ramp = (update_steps, begin, end, frequency, target)
    if config is None:
        rules = {"schedule": _rule(update_steps, begin, end, frequency, power, initial, target)}
    elif any(option is not None for option in ramp):
        raise ConfigError("Expected --config alone, or a schedule without it; got both.")
    else:
        rules = _ramps(PruneConfig.from_yaml(config))
    if png is not None:
        check_folder(png)
    points = {name: _points(rule) for name, rule in rules.items()}
    if png is not None:
        _draw(points, png)
    if as_json:
        say_json(
            {"schedules": {name: [{"step": t, "sparsity": s} for t, s in found]
                           for name, found in points.items()}}
        )  # fmt: skip
    else:
        say("\n\n".join(f"{name}\n{_chart(rules[name])}" for name in rules))


def _rule(
    update_steps: str | None, begin: int | None, end: int | None, frequency: int | None,
    power: float, initial: float, target: float | None,
) -> Rule:  # fmt: skip
    steps: Sequence[int] | str | None = update_steps
    if update_steps is not None and "range" not in update_steps:
        try:
            steps = [int(part) for part in update_steps.split(",")]
        except ValueError:
            raise ConfigError(
                f"Expected --update-steps like 0,100,200 or 'range(0, 900, 100)'; got "
                f"{update_steps!r}."
            ) from None
    with in_words_of(fields=_OPTIONS):
        schedule = PolynomialDecay(
            steps, power=power, begin_step=begin, end_step=end, frequency=frequency
        )
        return Rule(target, schedule, initial)


def _ramps(config: PruneConfig) -> dict[str, Rule]:
    """Return the rules of a config that have schedules of different values."""
    found: dict[str, Rule] = {}
    for name, rule in config.rules.items():
        like = (rule.schedule, rule.initial_sparsity, rule.target)
        if all((r.schedule, r.initial_sparsity, r.target) != like for r in found.values()):
            found[name] = rule
    if not found:
        raise ConfigError("Expected a config with at least one rule; got none.")
    return found


def _last(rule: Rule) -> int:
    last = rule.last_step
    if last is None:
        raise ConfigError("Expected a schedule with an end; a callable has none that is known.")
    return last


def _points(rule: Rule) -> list[tuple[int, float]]:
    """Return the steps at which the sparsity is computed anew, thinned where there are many."""
    last = _last(rule)
    steps = getattr(rule.schedule, "update_steps", None) or [0, last]
    stride = -(-len(steps) // _MOST_STEPS)
    chosen = sorted({*steps[::stride], last})
    return [(step, float(rule.sparsity_at(step))) for step in chosen]


def _chart(rule: Rule) -> str:
    """Return bars of eighths of a character, from step 0 to a tenth behind the end."""
    last = _last(rule)
    until = max(last + max(last // 10, 1), _WIDTH - 1) if last else _WIDTH - 1
    columns = [float(rule.sparsity_at(until * x // (_WIDTH - 1))) for x in range(_WIDTH)]
    top = max(*columns, 1e-9)
    lines = []
    for row in range(_HEIGHT, 0, -1):
        eighths = [round(8 * _HEIGHT * s / top) - 8 * (row - 1) for s in columns]
        bars = "".join(_EIGHTHS[min(max(n, 0), 8)] for n in eighths)
        lines.append(f"{top * row / _HEIGHT:7.1%} │{bars}".rstrip())
    axis = f"{'':8}└{'─' * _WIDTH}"
    ends = f"{'':9}0{until!s:>{_WIDTH - 1}}"
    changes = _points(rule)
    facts = (
        f"{float(rule.sparsity_at(0)):.2%} at step 0, {float(rule.target):.2%} from step {last} "
        f"on, in {len(changes)} updates"
    )
    return "\n".join([*lines, axis, ends, facts])


def _draw(points: Mapping[str, Sequence[tuple[int, float]]], file: Path) -> None:
    """Draw steps as a picture."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ImportError(
            "Expected matplotlib for --png; install it with pip install 'purprune[examples]', or "
            "leave --png out."
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for name, found in points.items():
        axis.step(*zip(*found, strict=True), where="post", label=name, marker=".")
    axis.set(xlabel="step", ylabel="sparsity", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
