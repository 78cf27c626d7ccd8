"""The page: what it tells is gathered once, and a template writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from purprune_adapters.coreml.report import ExportReport
from purprune_adapters.distributed import is_sharded
from purprune_adapters.html_report.headlines import compared, reasons_of, tiles_of
from purprune_adapters.html_report.layers import layers_of, looked_at, overview
from purprune_adapters.html_report.progress import schedule
from purprune_adapters.html_report.sizes import size_chart, stored
from purprune_adapters.html_report.template import render
from purprune_adapters.places import check_folder
from purprune_adapters.pruner import Pruner
from purprune_adapters.report import Report
from purprune_adapters.trackers import Record

_DRAWN = ("step", "zeros", "entries", "sparsity", "scheduled_sparsity", "newly_pruned", "regrown")


def write_html(
    path: str | os.PathLike[str],
    pruned: Pruner | Report,
    *,
    before: Mapping[str, Tensor] | None = None,
    history: Iterable[Record] = (),
    export: ExportReport | None = None,
    accuracy: Mapping[str, float] | None = None,
    title: str = "Pruning report",
) -> Path:
    """Write a report as one HTML file that needs nothing outside itself, and return its path.

    The same arguments give the same bytes. A file that is there is replaced.

    Args:
        path: the file to write.
        pruned: a pruner; of a :class:`Report` alone the page has the numbers, but no schedule,
            histograms and pictures of masks.
        before: dense weights by parameter name, such as clones from before the training, to be
            compared with those of now. Names that are not pruned are left aside.
        history: records of a :class:`purprune_adapters.trackers.SparsityLog`.
        export: what ``export_coreml`` returned, for measured sizes.
        accuracy: shares in [0, 1] by what was measured, the one to compare with first, such as
            ``{"dense": 0.973, "pruned": 0.969}``.
        title: the page's title.

    Raises:
        ValueError: weights are in shards, ``before`` has another shape, an accuracy is no share, or
            ``history`` has no records of a log.
        FileNotFoundError, PermissionError: there is no such folder, or it is read-only.
        TypeError: what is to be told of is no pruner and no report.

    >>> import tempfile
    >>> from torch import nn
    >>> from purprune import Rule
    >>> pruner = Pruner(nn.Linear(64, 32), Rule(0.75))
    >>> _ = pruner.prepare(inplace=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_html(f"{folder}/report.html", pruner).read_text()
    >>> "75.0\u202f%" in page
    True
    """
    if not isinstance(pruned, Pruner | Report):
        raise TypeError(
            f"Expected a Pruner or a Report; got {type(pruned).__name__}. The order is "
            f"write_html(path, pruned)."
        )
    _refuse_others(before, history, accuracy)
    file = check_folder(path)
    _refuse_no_shares(accuracy or {})
    history = [_record(record) for record in history]
    pruner = pruned if isinstance(pruned, Pruner) else None
    if pruner is not None:
        _refuse_shards(pruner)
        _refuse_other_shapes(pruner, before or {})
    report = pruned if isinstance(pruned, Report) else pruned.report()
    page = _page(report, pruner, before, history, export, accuracy or {}, title)
    file.write_text(page, encoding="utf-8")
    return file


def _page(
    report: Report,
    pruner: Pruner | None,
    before: Mapping[str, Tensor] | None,
    history: list[Record],
    export: ExportReport | None,
    accuracy: Mapping[str, float],
    title: str,
) -> str:
    layers = layers_of(report)
    curves = schedule(report, pruner, history)
    looks = [] if pruner is None else looked_at(layers, pruner, before)
    return render(
        "page.html",
        title=title,
        report=report,
        tiles=tiles_of(report, pruner, export, compared(accuracy)),
        layers=layers,
        overview=overview(layers, report.model_entries),
        schedule=curves,
        several=curves is not None and any(path.kind == "one" for path in curves.paths),
        history=history,
        sizes=size_chart(report, export) if report.total.entries else None,
        stored=stored(report.total.zeros, report.total.entries),
        export=export,
        accuracy=compared(accuracy),
        looks=looks,
        shown={layer.number for layer in looks},
        whole=pruner is not None,
        compares=bool(before),
        reasons=reasons_of(report),
    )


def _record(record: Record) -> Record:
    """Return a record that has all that is drawn of it, as one of a file may not."""
    missing = [key for key in _DRAWN if key not in record]
    if missing:
        raise ValueError(
            f"Expected records of a SparsityLog in history; one has no {missing[0]!r}. Give "
            f"log.history, or what json.loads made of its lines."
        )
    return record


def _refuse_others(before: object, history: object, accuracy: object) -> None:
    """Raise for what holds the thing that is meant, or is one of several."""
    for name, given, way_out in (
        ("before", before, "{name: p.detach().clone() for name, p in model.named_parameters()}"),
        ("accuracy", accuracy, "{'pruned': 0.969}"),
    ):
        if given is not None and not isinstance(given, Mapping):
            got = type(given).__name__
            raise TypeError(f"Expected {name} as a dict by name; got {got}. Pass {way_out}.")
    if not isinstance(history, Iterable):
        got = type(history).__name__
        raise TypeError(f"Expected history as records; got {got}. Pass log.history of a log.")


def _refuse_no_shares(accuracy: Mapping[str, float]) -> None:
    for name, value in accuracy.items():
        if not 0 <= value <= 1:
            raise ValueError(
                f"Expected the accuracy {name!r} as a share in [0, 1]; got {value!r}. Divide "
                f"percent by 100."
            )


def _refuse_shards(pruner: Pruner) -> None:
    for name in pruner.resolved_config.module_name_configs:
        if is_sharded(pruner.model.get_parameter(name)):
            raise ValueError(
                f"Expected whole weights; {name!r} is in shards. Call pruner.report() in all "
                f"processes, and write_html(path, report) in one."
            )


def _refuse_other_shapes(pruner: Pruner, before: Mapping[str, Tensor]) -> None:
    for name in pruner.resolved_config.module_name_configs:
        shape = pruner.model.get_parameter(name).shape
        if name in before and before[name].shape != shape:
            raise ValueError(
                f"Expected {name!r} before in the shape {tuple(shape)} of now; got "
                f"{tuple(before[name].shape)}."
            )
