"""The report as one HTML file: numbers that are those of the report, names that are no markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from purprune import Channel, PolynomialDecay, PruneConfig, Random, Rule, Unstructured
from purprune_adapters import ExportReport, Pruner
from purprune_adapters.coreml.numeric import NumericalCheck
from purprune_adapters.coreml.records import ParameterRecord, Verification
from purprune_adapters.html_report import write_html
from purprune_adapters.html_report.charts import Scale, bars, staircase
from purprune_adapters.html_report.histograms import binned, histogram, limit_of
from purprune_adapters.html_report.pictures import picture
from purprune_adapters.html_report.progress import schedule
from purprune_adapters.html_report.sizes import break_even, size_chart, stored
from purprune_adapters.trackers import SparsityLog

EVIL = "a<script>alert('x')</script>\"&"
HTML = Path(__file__).parents[2] / "adapters/purprune_adapters/html_report"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"conv": nn.Conv2d(3, 8, 3), EVIL: nn.Linear(40, 30), "head": nn.Linear(30, 5)}
    )


CONFIG = (
    PruneConfig()
    .set_global(Rule(0.8, PolynomialDecay([0, 4, 8])))
    .set_module_name("conv", Rule(0.5, pattern=Channel(dim=0)))
    .set_module_name("head", None)
)


def trained() -> tuple[Pruner, dict[str, Any]]:
    model = network()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    log = SparsityLog(pruner)
    log.step()
    for _ in range(10):
        with torch.no_grad():
            model["head"].weight.add_(0.1)
            model["conv"].weight.add_(0.001)
        pruner.step()
        log.step()
    return pruner, {"before": before, "history": log.history}


def exported() -> ExportReport:
    row = ParameterRecord(
        f"{EVIL}.weight", (30, 40), ("w",), "as is", "sparse", "float16", 1200, 960, 960,
        0, 0, 0, 0, 0, 0, 800, 2400, 0.0,
    )  # fmt: skip
    verification = Verification((row,), 900, 2500)
    check = NumericalCheck("passed", 0.0, 1.0)
    sizes = (9000, 10_000, 2500)
    return ExportReport(
        Path("net.mlpackage"), "iOS16", "float16", "export", "first", verification, check, *sizes,
        compress=None, warnings=(), versions={},
    )  # fmt: skip


class Read(HTMLParser):
    """What a browser would make of a page: its tags, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_tells_the_numbers_of_the_report(tmp_path):
    """Defends the headline, the rows, the reasons, the accuracy and the measured sizes."""
    pruner, options = trained()
    options |= {"accuracy": {"dense": 0.9, "pruned": 0.885}, "export": exported()}
    read = Read(write_html(tmp_path / "report.html", pruner, **options).read_text())
    text = " ".join(read.text.replace("\u202f", " ").split())
    total = pruner.report().total
    assert f"{float(total):.1%}".replace("%", " %") in text
    assert f"{total.zeros:,} of {total.entries:,}" in text
    assert "the schedule is over" in text
    assert "'head' is set to None" in text
    assert "−1.50" in text
    assert "instead of 2.5 kB" in text
    assert all(row.name in text for row in pruner.report().rows)


def test_the_file_needs_nothing_outside_itself(tmp_path):
    """Defends an attachment that is opened on a train: no address, no font, no script elsewhere."""
    pruner, options = trained()
    page = write_html(tmp_path / "report.html", pruner, export=exported(), **options).read_text()
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", page)
    for tag, attributes in Read(page).tags:
        assert tag not in ("link", "iframe", "object", "base")
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("data:image/png;base64,", "#"))


def test_names_are_no_markup(tmp_path):
    """Defends against a parameter, a title and a label that are scripts."""
    pruner, options = trained()
    page = write_html(
        tmp_path / "report.html",
        pruner,
        title=EVIL,
        accuracy={EVIL: 0.5},
        export=exported(),
        **options,
    ).read_text()
    read = Read(page)
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert "<script>alert" not in page
    assert EVIL in read.text


def test_the_same_report_has_the_same_bytes_and_changes_nothing(tmp_path):
    """Defends reports under version control, and the pruner that goes on."""
    pruner, options = trained()
    state = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    pages = [write_html(tmp_path / f"{i}.html", pruner, **options).read_bytes() for i in (0, 1)]
    assert pages[0] == pages[1]
    assert all(torch.equal(state[name], t) for name, t in pruner.model.state_dict().items())
    assert pruner.step_count == 10


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "given", ["new", "finalized", "report", "one shot", "callable", "all", "empty"]
)
def test_every_state_of_a_pruner_has_a_page(tmp_path, given):
    """Defends pages without masks, without weights that are left, and without a schedule's end."""
    pruner, _ = trained()
    rules = {
        "one shot": Rule(0.5),
        "callable": Rule(schedule=lambda step: min(0.5, step / 10)),
        "all": Rule(1.0),
        "empty": Rule(0.5),
    }
    if given in rules:
        model = nn.Linear(0, 4) if given == "empty" else nn.Linear(8, 4)
        pruner = Pruner(model, rules[given])
        pruner.prepare(inplace=True)
    if given == "finalized":
        pruner.finalize(inplace=True)
    shown = {"report": pruner.report(), "new": Pruner(network(), CONFIG)}.get(given, pruner)
    text = Read(write_html(tmp_path / "report.html", shown).read_text()).text
    expected = {
        "new": "the pruner is not prepared",
        "finalized": "the pruner is finalized",
        "report": "Written from a report alone",
        "one shot": "one shot",
        "callable": "the pruner is prepared",
        "all": "No weight is left",
        "empty": "the parameter has no entries",
    }
    assert expected[given] in text
    assert ("A look inside" in text) == (given != "report")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"accuracy": {"dense": 97.3}}, ValueError, r"'dense'.*\[0, 1\].*97.3"),
        ({"before": {"conv.weight": torch.ones(3)}}, ValueError, r"'conv.weight'.*\(3,\)"),
        ({"history": [{"step": 3}]}, ValueError, "no 'zeros'.*log.history"),
        ({"path": "nowhere/report.html"}, FileNotFoundError, "nowhere"),
        ({"pruned": nn.Linear(2, 2)}, TypeError, "Pruner or a Report; got Linear"),
        ({"pruned": "report.html"}, TypeError, r"The order is write_html\(path, pruned\)"),
        ({"accuracy": 0.97}, TypeError, r"dict by name; got float. Pass \{'pruned': 0.969\}"),
        ({"before": nn.Linear(2, 2)}, TypeError, r"got Linear. Pass \{name: p.detach"),
        (
            {"history": SparsityLog(Pruner(nn.Linear(2, 2), Rule()))},
            TypeError,
            "Pass log.history of a log",
        ),
    ],
)
def test_what_can_not_be_told_is_refused_before_a_file_is_there(tmp_path, options, error, words):
    """Defends errors that name the way out, and no half of a file."""
    options = {"pruned": trained()[0], **options}
    path = tmp_path / options.pop("path", "report.html")
    with pytest.raises(error, match=words):
        write_html(path, options.pop("pruned"), **options)
    assert not list(tmp_path.iterdir())


def test_a_hundred_layers_fit_in_a_megabyte(tmp_path):
    """Defends attachments: masks of random bits can't be compressed, so this is the worst case."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(160, 160) for _ in range(100)))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    pruner = Pruner(model, Rule(0.5, score=Random(0)))
    pruner.prepare(inplace=True)
    file = write_html(tmp_path / "report.html", pruner, before=before)
    assert file.stat().st_size < 1_000_000
    assert file.read_text().count('class="look"') == 100


def decoded(uri: str) -> Any:
    """Return the opacity of a picture's pixels."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(image.open(io.BytesIO(data)).convert("RGBA"))[:, :, 3]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_a_small_mask_is_drawn_entry_by_entry(rows, columns, seed):
    """Defends rows that end within a byte."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = picture(mask, 4000)
    assert found is not None
    assert found.exact
    assert np.array_equal(decoded(found.uri), mask.numpy() * 255)


@given(st.lists(st.integers(1, 80), min_size=1, max_size=3), st.integers(40, 400), st.booleans())
def test_a_large_mask_is_drawn_by_the_share_that_is_kept(shape, budget, channels):
    """Defends the counts of cells of unequal size, expanded masks, and the size of the file."""
    generator = torch.Generator().manual_seed(len(shape))
    if channels:
        mask = (torch.rand(shape[:1], generator=generator) < 0.3).view(-1, *[1] * (len(shape) - 1))
        mask = mask.expand(shape)
    else:
        mask = torch.rand(shape, generator=generator) < 0.3
    found = picture(mask, budget)
    assert found is not None
    assert len(base64.b64decode(found.uri.partition(",")[2])) < 2.2 * budget + 250
    if found.exact:
        return
    alpha = decoded(found.uri)
    matrix = mask.reshape(1, -1) if len(shape) == 1 else mask.reshape(shape[0], -1)
    down, across = alpha.shape
    parts = matrix.double().tensor_split(_cuts(len(matrix), down))
    cuts = _cuts(matrix.shape[1], across)
    cells = [[float(cell.mean()) for cell in part.tensor_split(cuts, dim=1)] for part in parts]
    highest = max(map(max, cells))
    expected = np.ceil(np.array(cells) / (highest or 1) * 15 - 1e-6) * 17
    assert np.abs(alpha - expected).max() <= 17, "one level, for sums in another order"
    assert ((alpha > 0) == (np.array(cells) > 0)).all(), "one kept entry is seen"


def _cuts(size: int, parts: int) -> list[int]:
    return [i * size // parts for i in range(1, parts)]


@given(st.lists(st.sampled_from([0.0, -0.5, 0.25, 1.0, 100.0, float("inf")]), max_size=60))
def test_every_weight_is_in_a_bin_or_counted_beside(weights):
    """Defends the sum: bins, zeros and what lies beyond the axis are all there are."""
    tensor = torch.tensor(weights)
    found = binned(tensor, limit_of(tensor))
    assert sum(found.counts) + found.zeros + found.beyond == len(weights)
    assert found.zeros == weights.count(0.0)
    finite = np.array([w for w in weights if w and np.isfinite(w)])
    inside = finite[np.abs(finite) <= found.limit]
    expected, _ = np.histogram(inside, len(found.counts), (-found.limit, found.limit))
    assert sum(found.counts) == expected.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_histograms_take_every_dtype(dtype):
    """Defends half precision, which torch's histogram does not take."""
    chart = histogram(
        "w", torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype), None
    )
    assert chart is not None
    assert len(chart.paths) == 1


def test_the_break_even_is_a_sixteenth_in_float16():
    """Defends the formula of docs/coreml.md: n bits and two bytes for each value that is left."""
    assert stored(100, 1600) == (3200, 3200)
    assert stored(101, 1600).sparse < 3200
    assert (break_even(2), break_even(4)) == (1 / 16, 1 / 32)
    chart = size_chart(trained()[0].report(), exported())
    (measured,) = (dot for dot in chart.dots if dot.kind == "measured")
    assert measured.x == 80


def test_the_schedule_is_drawn_as_planned_and_as_reached():
    """Defends both ends of the curve and one point per update."""
    pruner, options = trained()
    chart = schedule(pruner.report(), pruner, options["history"])
    assert chart is not None
    assert len(chart.dots) == len(options["history"]) == 3
    assert chart.dots[-1].y == 100 * float(pruner.report().total)
    assert {label.text.replace("\u202f", " ") for label in chart.labels} == {
        "80 % in 1 layer",
        "50 % in 1 layer",
    }
    mean = next(path for path in chart.paths if path.kind == "planned").d
    assert mean.startswith("M0 ")
    assert mean.endswith("H100")


@pytest.mark.parametrize(
    ("updates", "corners", "first"),
    [
        (range(0, 9_000, 100), 89, "1.12"),  # exactly at 100 of 8,900
        (range(0, 3_000, 10), 250, "0.4"),
        (range(0, 9_000_000, 100_000), 89, "1.2"),
    ],
)
def test_a_long_schedule_has_corners_where_its_updates_are(updates, corners, first):
    """Defends the update steps themselves, as long as they are few, and small files."""
    pruner = Pruner(nn.Linear(4, 4), Rule(0.8, PolynomialDecay(updates)))
    chart = schedule(pruner.report(), pruner, [])
    assert chart is not None
    (line,) = chart.paths
    assert line.d.count("V") == corners
    assert line.d.startswith(f"M0 100H{first}V")


@given(st.floats(0.001, 1e9), st.integers(2, 8))
def test_ticks_are_round_inside_and_few(high, count):
    """Defends axes of any length."""
    ticks = Scale(0, high).ticks(count)
    assert 1 <= len(ticks) <= 2 * count + 2
    assert all(-0.01 <= tick.at <= 100.01 for tick in ticks)


def test_paths_hold_a_value_until_the_next():
    """Defends steps against slopes, and areas that are closed."""
    assert staircase([(0, 0), (50, 40), (100, 40)]) == "M0 100H50V60H100"
    assert bars([50, 50, 0, 100]) == "M0 100H0V50H50V100H75V0H100V100Z"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_and_lines_can_be_told_from_what_is_behind_them(scheme):
    """Defends contrast as WCAG counts it: 4.5 for words, 3 for the lines of charts."""
    block = re.findall(r":root \{(.*?)\}", (HTML / "page.css").read_text(), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for back in ("surface", "page"):
        for name, least in (("ink", 7), ("soft", 4.5), ("blue", 4.5), ("orange", 4.5), ("grey", 3)):
            a, b = sorted((_luminance(colours[name]), _luminance(colours[back])))
            assert (b + 0.05) / (a + 0.05) >= least, (name, back)


def test_what_is_seen_is_said_too(tmp_path):
    """Defends readers who hear the page: charts, pictures and tables have words."""
    pruner, options = trained()
    page = write_html(tmp_path / "report.html", pruner, **options).read_text()
    read = Read(page)
    for tag, attributes in read.tags:
        if tag == "img":
            assert "pruned" in str(attributes["alt"])
        if attributes.get("role") in ("img", "region", "group"):
            assert attributes["aria-label"]
    tags = [tag for tag, _ in read.tags]
    assert tags.count("caption") == tags.count("table") >= 3
    assert "<html lang=" in page


def test_a_global_group_is_said_to_be_one(tmp_path):
    """Defends against a layer that seems to miss its target."""
    pruner = Pruner(network(), Rule(0.7, pattern=Unstructured(scope="global")))
    pruner.prepare(inplace=True)
    assert "of all" in Read(write_html(tmp_path / "report.html", pruner).read_text()).text
