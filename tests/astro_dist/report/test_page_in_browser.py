"""The report in a real browser: it loads nothing, is cut off nowhere, and can be read in every scheme.

The screenshots stay in the temporary folder of the test.
"""

import shutil

import pytest

from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1280, 900), "phone": (390, 844), "narrow": (320, 640)}
OVERFLOWING = """() => [...document.querySelectorAll("body *:not(svg *)")].filter(element => {
    const box = element.getBoundingClientRect(), scrolls = element.closest(".scroll, pre, details:not([open])");
    return box.width && !scrolls && (box.right > innerWidth + 1 || box.left < -1);
}).map(element => element.outerHTML.slice(0, 120))"""
FAINT = """() => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const linear = value => value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const light = rgb => rgb.slice(0, 3).map(value => linear(value / 255))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const hasText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    return [...document.querySelectorAll("body *:not(svg *)")].filter(hasText).map(element => {
        const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
        return [(a + .05) / (b + .05), element.outerHTML.slice(0, 120)];
    }).filter(([contrast]) => contrast < 4.5);
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_page_in_a_browser(browser, finished, tmp_path, size, scheme):
    address = write_report(Findings.read(finished)).as_uri()
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, told, requests = context.new_page(), [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.screenshot(path=str(tmp_path / f"{size}-{scheme}.png"), full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert told == []
    assert requests == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(FAINT) == []
    context.close()
