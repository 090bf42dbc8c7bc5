"""The report as a reader meets it: in Chromium, offline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from bitlaw.report import write_report

pytestmark = pytest.mark.browser


@contextmanager
def opened(browser: Browser, report: Path, **context: Any) -> Iterator[Page]:
    """The report in a page of its own; fails on console errors, script errors and requests to the network."""
    problems: list[str] = []
    page = browser.new_context(**context).new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if is_remote(request.url) else None)
    page.set_default_timeout(30_000)  # of a machine that does other work as well
    page.goto(report.as_uri())
    page.wait_for_selector("#plots .points path")
    yield page
    assert problems == []
    page.context.close()


@pytest.fixture(scope="module")
def desktop(browser: Browser, report: Path) -> Iterator[Page]:
    """One page for the tests that leave it as they found it but for the budget: loading it takes seconds."""
    with opened(browser, report) as page:
        yield page


@pytest.fixture
def page(desktop: Page) -> Page:
    """The shared page, back at its first budget."""
    desktop.evaluate("document.querySelector('#axes input').checked = true; chooseAxis(Object.keys(axes)[0])")
    return desktop


def is_remote(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def move_slider(page: Page, step: str) -> None:
    """Put the slider to a step: a number or "max"."""
    page.evaluate(
        """step => {
            const slider = document.getElementById("slider");
            slider.value = step === "max" ? slider.max : step;
            slider.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        step,
    )


def card(page: Page, family: str) -> str:
    return page.locator(f".card[data-family={family}]").inner_text()


def plotted_x(page: Page, family: str) -> list[float]:
    """Budgets of all cells in a family's plot, smallest first."""
    return page.evaluate(
        """id => document.getElementById(id).data.filter((trace) => trace.text).flatMap((trace) => trace.x)
            .sort((a, b) => a - b)""",
        f"plot-{family}",
    )


def test_answers_first_and_the_slider_changes_them(page: Page) -> None:
    question = page.locator("#answer-title")
    before, answer = question.inner_text(), card(page, "dit")
    assert "kB" in before and "FD" in answer and "measured" in answer and "By the law" in answer

    move_slider(page, "0")
    assert question.inner_text() != before
    assert "Nothing measured fits" in card(page, "dit") and "extrapolates" in card(page, "dit")

    move_slider(page, "max")
    assert "dit-l at W" in card(page, "dit") and "larger than dit-l" in card(page, "dit")


def test_slider_works_from_the_keyboard_and_says_its_budget(page: Page) -> None:
    slider = page.get_by_role("slider", name="Budget")
    before = slider.get_attribute("aria-valuetext")
    slider.press("End")
    assert slider.get_attribute("aria-valuetext") != before
    assert slider.get_attribute("aria-valuetext") in page.locator("#answer-title").inner_text()


def test_slider_moves_the_budget_line_and_the_ring_in_the_plot(page: Page) -> None:
    def marks(page: Page) -> list[Any]:
        return page.evaluate(
            """() => {
                const plot = document.getElementById("plot-var");
                return [plot.layout.shapes[0].x0, plot.data.at(-1).x];
            }"""
        )

    line, ring = marks(page)
    move_slider(page, "max")
    new_line, new_ring = marks(page)
    assert new_line > line and new_ring[0] > ring[0]


def test_axis_switch_changes_budget_plots_and_tables(page: Page) -> None:
    stored = plotted_x(page, "var")
    expect(page.locator("[data-axis=model_bits]").first).to_be_visible()
    page.get_by_text("Compute per image", exact=True).first.click()
    assert "bit²" in page.locator("#answer-title").inner_text()
    assert plotted_x(page, "var")[0] > 100 * stored[0]
    assert "compute per image" in page.locator("#plot-var .xtitle").text_content().lower()
    expect(page.locator("[data-axis=model_bits]").first).to_be_hidden()
    expect(page.locator("[data-axis=compute_bits_used]").first).to_be_visible()


def test_plot_shows_every_cell_with_its_details(page: Page) -> None:
    assert len(plotted_x(page, "var")) == 23  # 4 sizes x 6 precisions, one failed
    page.locator("#plot-var .points path").first.hover(force=True)
    hover = page.locator("#plot-var .hoverlayer").text_content()
    assert "var-xs W16A16" in hover and "Size as stored" in hover and "loss" in hover


def test_precision_can_be_hidden(page: Page) -> None:
    chip = page.get_by_role("button", name="W4A4", exact=True)
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert len(plotted_x(page, "var")) == 19
    chip.click()
    assert len(plotted_x(page, "var")) == 23


def test_samples_switch_family_and_images_and_open_beside_full_precision(page: Page) -> None:
    rows = page.locator("#samples tbody th")
    assert rows.all_inner_texts() == ["var-xs", "var-s", "var-m", "var-l"]
    assert page.locator("#samples tbody tr").first.locator("button").count() == 6
    shown = page.locator("#samples .tiles").first
    before = shown.evaluate("tiles => tiles.style.backgroundPosition")
    page.get_by_role("radio", name="Images 3 to 4").check(force=True)
    assert shown.evaluate("tiles => tiles.style.backgroundPosition") != before

    page.locator("#sample-family").get_by_text("DiT").click()
    assert rows.first.inner_text() == "dit-xs"
    page.get_by_role("button", name="dit-m at W2A16").click()
    dialog = page.locator("#detail")
    expect(dialog).to_be_visible()
    assert dialog.locator("img").count() == 2 and "W16A16" in dialog.inner_text()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_table_sorts_by_number_and_by_text(page: Page) -> None:
    table = page.locator("#cells-title ~ .scroll table")
    header = table.locator("thead th", has_text="FD").first
    index = header.evaluate("cell => cell.cellIndex")

    def column() -> list[float]:
        return table.evaluate(
            "(t, i) => [...t.tBodies[0].rows].map((row) => Number(row.cells[i].dataset.value))", index
        )

    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(column()) and len(column()) == 46
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert column() == sorted(column(), reverse=True)

    table.locator("thead button", has_text="Model").click()
    models = [text.strip() for text in table.locator("tbody th").all_inner_texts()]
    assert models == sorted(models)
    assert header.get_attribute("aria-sort") is None


def test_csv_holds_every_cell(page: Page) -> None:
    with page.expect_download() as download:
        page.locator("#csv").click()
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == 47 and lines[0].startswith('"Model","Precision"')
    assert len({line.count(",") for line in lines}) == 1


def test_dark_mode_by_preference_and_by_button(browser: Browser, report: Path) -> None:
    def colors(page: Page) -> tuple[str, str]:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        text = page.evaluate("document.querySelector('#plot-var .xtick text').style.fill")
        return background, text

    with opened(browser, report, color_scheme="light") as page:
        light = colors(page)
        page.locator("#theme").click()
        dark = colors(page)
        assert dark[0] != light[0] and dark[1] != light[1]
        page.locator("#theme").click()
        assert colors(page) == light
    with opened(browser, report, color_scheme="dark") as page:
        assert colors(page) == dark


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, viewport={"width": width, "height": 844}, has_touch=width < 400) as page:
        for axis in page.locator("#axes label").all():
            axis.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_line_colours_have_contrast(browser: Browser, report: Path, scheme: str) -> None:
    """WCAG: 4.5:1 for text, 3:1 for marks."""
    with opened(browser, report, color_scheme=scheme) as page:
        ratios = page.evaluate(
            """() => {
                const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
                const luminance = (color) => channels(color).map((value) => value / 255)
                    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
                    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
                const contrast = (a, b) => {
                    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
                    return (high + 0.05) / (low + 0.05);
                };
                const color = (selector) => getComputedStyle(document.querySelector(selector)).color;
                const surface = getComputedStyle(document.querySelector(".card")).backgroundColor;
                return {
                    text: ["body", ".muted", "#budget"].map((selector) => contrast(color(selector), surface)),
                    marks: [...document.querySelectorAll("#key span")].map((mark) =>
                        contrast(getComputedStyle(mark).color, surface)),
                };
            }"""
        )
        assert min(ratios["text"]) >= 4.5
        assert len(ratios["marks"]) == 6 and min(ratios["marks"]) >= 3


def test_a_study_too_small_for_laws_still_has_answers(browser: Browser, make_study: Callable[..., Path]) -> None:
    small = write_report(make_study(sizes=("s",), precisions=("W16A16", "W4A16"), seeds=(0, 1)), num_resamples=40)
    with opened(browser, small) as page:
        assert "var-s at W" in card(page, "var") and "law" not in card(page, "var")
        page.locator("#plot-var .points path").first.hover(force=True)
        assert "seed 0, 1" in page.locator("#plot-var .hoverlayer").text_content()
