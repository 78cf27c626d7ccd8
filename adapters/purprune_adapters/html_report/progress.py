"""The schedule: what was planned, and what a log says was reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from purprune import Rule
from purprune_adapters.html_report.charts import (
    PERCENT_TICKS,
    Chart,
    Dot,
    Label,
    Path,
    Scale,
    staircase,
)
from purprune_adapters.html_report.words import percent, plural, short_percent
from purprune_adapters.pruner import Pruner
from purprune_adapters.report import Report
from purprune_adapters.trackers import Record

_SAMPLES = 250
"""The most corners of a line."""
_WALKED = 20_000
"""How many steps are asked whether something changes there."""
_DOTS = 120
"""How many points of a log are drawn, about."""
_APART = 7
"""How far words at the ends of lines are apart at least, in percent of the height."""


def schedule(report: Report, pruner: Pruner | None, history: Sequence[Record]) -> Chart | None:
    """Return the chart of planned and reached sparsity; None where there is none to draw."""
    end = max([report.step, *(record["step"] for record in history)])
    if pruner is not None:
        end = max(end, pruner.last_step or 0)
    if end == 0 or (pruner is None and not history):
        return None
    x = Scale(0, end)
    paths, labels = ([], []) if pruner is None else _planned(report, pruner, end, x)
    now = x(report.step)
    dots = [
        Dot(
            x(record["step"]),
            100 * record["sparsity"],
            "reached",
            f"step {record['step']:,}: {percent(record['zeros'], record['entries'])} zero",
        )
        for record in _thinned(history)
    ]
    if 0 < report.step < end:
        paths.append(Path(f"M{now:.2f} 0V100", "now"))
        labels.append(
            Label(now, 8, f"step {report.step:,}", "now", "right" if now < 50 else "left")
        )
    return Chart(
        _description(report, paths, dots, end),
        "optimizer step",
        "sparsity",
        x.ticks(6, "whole"),
        PERCENT_TICKS,
        paths,
        dots,
        labels,
    )


def _planned(report: Report, pruner: Pruner, end: int, x: Scale) -> tuple[list[Path], list[Label]]:
    """Return a line for each curve that some layers share, and their mean where they differ."""
    steps = _steps(pruner, end)
    at = [pruner.sparsity_at(step) for step in steps]
    curves: dict[tuple[float, ...], list[str]] = {}
    for name in at[0]:
        curves.setdefault(tuple(found[name] for found in at), []).append(name)
    places = [x(step) for step in steps]
    paths = []
    for curve, names in curves.items():
        line = staircase(list(zip(places, (100 * s for s in curve), strict=True)))
        words = f"{short_percent(curve[-1])} in {plural(len(names), 'layer')}"
        paths.append(Path(line, "planned" if len(curves) == 1 else "one", f"planned: {words}"))
    if len(curves) > 1:
        entries = {row.name: row.weight.entries for row in report.rows}
        total = sum(entries.values()) or 1
        mean = [100 * sum(found[n] * entries[n] for n in found) / total for found in at]
        line = staircase(list(zip(places, mean, strict=True)))
        paths.append(Path(line, "planned", "planned: all layers together"))
    return paths, _ends(at[-1])


def _steps(pruner: Pruner, end: int) -> list[int]:
    """Return where lines have corners; so many steps evenly spread where there are more."""
    rules: list[Rule] = []
    for rule in pruner.resolved_config.rules.values():
        rules += [] if rule in rules else [rule]
    found = {0, end}
    for step in range(end + 1) if end <= _WALKED else ():
        if any(rule.changes_at(step) for rule in rules):
            found.add(step)
    if end > _WALKED or len(found) > _SAMPLES:
        found = {round(i * end / _SAMPLES) for i in range(_SAMPLES + 1)}
    return sorted(found)


def _ends(last: Mapping[str, float]) -> list[Label]:
    """Return words at the ends of the lines, the most common first; none over another."""
    labels: list[Label] = []
    for target, count in Counter(last.values()).most_common():
        if all(abs(100 * target - label.y) >= _APART for label in labels):
            words = f"{short_percent(target)} in {plural(count, 'layer')}"
            labels.append(Label(100, 100 * target, words, "end", "end"))
    return labels


def _thinned(history: Sequence[Record]) -> list[Record]:
    """Return about so many of the records, the last among them."""
    stride = -(-len(history) // _DOTS) or 1
    return list(reversed(history[::-1][::stride]))


def _description(report: Report, paths: list[Path], dots: list[Dot], end: int) -> str:
    words = [path.title for path in paths if path.kind in ("planned", "one")]
    words += [f"reached: {dots[-1].title}"] if dots else []
    return f"Sparsity from step 0 to {end:,}, now at {report.step:,}. " + "; ".join(words[:6])
