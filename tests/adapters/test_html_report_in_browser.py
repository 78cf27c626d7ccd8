"""The HTML report in a real browser: nothing overflows, nothing is blank, the script works."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Page, browser
from test_html_report import exported, trained
from torch import nn

from purprune import Random, Rule
from purprune_adapters import Pruner
from purprune_adapters.html_report import write_html

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on the PATH")

WIDTHS, SCHEMES = (375, 1400), ("light", "dark")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """Start the browser once."""
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report with everything in it."""
    pruner, options = trained()
    options |= {"accuracy": {"dense": 0.9, "pruned": 0.885}, "export": exported()}
    return write_html(tmp_path_factory.mktemp("page") / "report.html", pruner, **options)


def colours(page: Page, selector: str) -> int:
    """Return how many colours a screenshot of an element has."""
    clip: dict[str, Any] = page.ask(
        f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })()"
    )
    image = Image.open(io.BytesIO(page.photograph(clip=clip))).convert("RGB")
    return len(image.getcolors(1 << 24))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_is_drawn_in_silence(page, file, width, scheme):
    """Defends phones and screens, light and dark: no error, no request, no scroll to the side."""
    page.open(file, width, scheme)
    assert page.ask("document.documentElement.scrollWidth") <= width
    for selector in (".chart.wide .plot", ".pair .plot", ".mask", ".look .plot"):
        assert colours(page, selector) >= 3, selector
    dark = page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    assert dark == (scheme == "dark")
    assert page.problems == []


@pytest.mark.parametrize("width", WIDTHS)
def test_long_names_and_many_layers_do_not_push_the_page_wide(page, tmp_path, width):
    """Defends names without a place to break, in tables, headings and the chooser."""
    torch.manual_seed(0)
    names = ["x" * 120, *(f"encoder.layer_{i}.attention".replace(".", "_") for i in range(30))]
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in names})
    pruner = Pruner(model, Rule(0.5, score=Random(0)))
    pruner.prepare(inplace=True)
    page.open(write_html(tmp_path / "report.html", pruner, title="y" * 200), width, "light")
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert page.problems == []


def test_a_table_is_sorted_by_its_numbers(page, file):
    """Defends 432 before 1,200: numbers, not words."""
    page.open(file, 1400, "light")
    place = page.ask(
        "[...document.querySelectorAll('.sortable thead th')].findIndex("
        "head => head.textContent.trim() == 'Entries')"
    )
    for expected in (["1,200", "216"], ["216", "1,200"]):
        page.ask(f"document.querySelectorAll('.sortable thead button')[{place}].click()")
        cells = page.ask(
            f"[...document.querySelectorAll('.sortable tbody tr')].map("
            f"row => row.cells[{place}].textContent)"
        )
        assert cells == expected
    assert page.ask("document.querySelectorAll('[aria-sort=ascending]').length") == 1


SHOWN = "[...document.querySelectorAll('.look')].filter(e => e.offsetHeight).map(e => e.id)"


def test_one_layer_is_shown_and_another_can_be_chosen(page, file):
    """Defends the chooser, and links from the table."""
    page.open(file, 1400, "light")
    assert page.ask(SHOWN) == ["layer-1"]
    page.ask("choose.value = 'layer-2'; choose.dispatchEvent(new Event('change'))")
    assert page.ask(SHOWN) == ["layer-2"]
    page.ask("document.querySelector('.sortable a').click()")
    page.ask("new Promise(done => setTimeout(done))")
    assert page.ask(SHOWN) == ["layer-1"]
    assert page.ask("choose.value") == "layer-1"


def test_a_mask_is_zoomed_and_moved_within_its_frame(page, file):
    """Defends what the words below the picture say is seen."""
    page.open(file, 1400, "light")
    look = "document.querySelector('#layer-1 {}')"
    press = look.format(".mask") + ".dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"
    seen = look.format("output") + ".textContent"
    assert page.ask(seen) == "rows 1–8, columns 1–27"
    page.ask(look.format('[data-zoom="2"]') + ".click()")
    assert page.ask(seen) == "rows 3–6, columns 7–21"
    for _ in range(20):
        page.ask(press.format("ArrowUp"))
        page.ask(press.format("ArrowRight"))
    assert page.ask(seen) == "rows 1–4, columns 14–27"
    assert colours(page, "#layer-1 .mask") >= 2
    page.ask(press.format("0"))
    assert page.ask(seen) == "rows 1–8, columns 1–27"
    assert page.problems == []
