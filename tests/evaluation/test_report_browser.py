"""The report in a headless Chromium, driven by selenium. Skipped without either."""

import shutil

import numpy as np
import pytest
import torch

from longalign.evaluation.report import write_report
from longalign.evaluation.report_examples import Example
from longalign.evaluation.table import MetricTable
from longalign.metrics import Value

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'longalign[browser]'")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH"),
    pytest.mark.skipif(DRIVER is None, reason="needs chromedriver on the PATH"),
    # selenium leaves the sockets of a closed browser to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

COUNT = 14
GAINS = {3: 0.5, 7: -0.5}
"""Gains of ``tuned`` by prompt; 0 for others."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    prompts = [
        ["The <script>red</script> fox sleeps."] + ["It is small & here."] * (10 * (i % 2)) for i in range(COUNT)
    ]
    prompts[5] = ["A heron waits."]
    base = np.full(COUNT, 0.5)
    tuned = base + [GAINS.get(i, 0.0) for i in range(COUNT)]
    facts = {"base": {"facts": base}, "tuned": {"facts": tuned}}
    for model, values in (("base", base), ("tuned", tuned)):
        facts[model] |= {f"facts/place/{name}": values for name in ("top left", "bottom right")}
        facts[model] |= {f"metric-number-{i}": values for i in range(4)}
    table = MetricTable(facts, [" ".join(p) for p in prompts], list(range(COUNT)), {"facts": Value("%")})
    examples = [
        Example(
            sentences=texts,
            seed=i,
            images={"base": torch.rand(3, 16, 16), "tuned": torch.rand(3, 16, 16)},
            verdicts={"base": [[False, True]] * len(texts), "tuned": [[True, True]] * len(texts)},
            scores={"base": [0.1] * len(texts), "tuned": [0.4] * len(texts)},
            facts=[["shape fox", "colour red"]] * len(texts),
            row=i,
        )
        for i, texts in enumerate(prompts)
    ]
    log = folder / "log.jsonl"
    log.write_text("\n".join(f'{{"step": {i}, "reward": {i}}}' for i in range(4)))
    return write_report(
        folder / "report.html", title="T", lead="L", table=table, examples=examples, logs={"run": log}
    ).as_uri()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    resize(browser, 1300, 900)
    browser.get(page)
    yield browser
    assert browser.get_log("browser") == []  # no error, and nothing that the policy blocked


def resize(browser, width, height, dark=False):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def seeds(browser):
    """Seeds of the prompts that are shown, in order."""
    cards = [c for c in browser.find_elements(By.CSS_SELECTOR, "#cards .example") if c.is_displayed()]
    return [int(card.find_element(By.CSS_SELECTOR, ".meta").text.split()[-1]) for card in cards]


def choose(browser, name, value):
    browser.find_element(By.CSS_SELECTOR, f"#{name} option[value='{value}']").click()


def press(browser, *keys):
    webdriver.ActionChains(browser).send_keys(*keys).perform()


def test_report_search_from_the_keyboard(opened):
    press(opened, "/", "HERON")
    assert seeds(opened) == [5] and opened.find_element(By.ID, "count").text == "1 of 1 prompts"
    press(opened, Keys.ESCAPE)
    assert seeds(opened) == list(range(12)) and opened.find_element(By.ID, "search").get_attribute("value") == ""


def test_report_show_more(opened):
    more = opened.find_element(By.ID, "more")
    more.click()
    assert seeds(opened) == list(range(COUNT)) and not more.is_displayed()


def test_report_filters_by_length(opened):
    choose(opened, "length", "31-60")
    assert seeds(opened) == [1, 3, 7, 9, 11, 13]
    choose(opened, "length", "1-30")
    assert seeds(opened) == [0, 2, 4, 5, 6, 8, 10, 12]


def test_report_sorts_by_gain_loss_and_length(opened):
    choose(opened, "sort", "gain-0")
    assert seeds(opened)[:2] == [3, 0]
    choose(opened, "sort", "loss-0")
    assert seeds(opened)[:2] == [7, 0]
    choose(opened, "sort", "short")
    assert seeds(opened)[0] == 5
    choose(opened, "sort", "")
    assert seeds(opened) == list(range(12))


def test_report_hover_lights_a_sentence_in_all_images(opened):
    row = opened.find_element(By.CSS_SELECTOR, ".sentences tbody tr")
    webdriver.ActionChains(opened).move_to_element(row).perform()
    figures = opened.find_elements(By.CSS_SELECTOR, ".example:first-child figure")
    assert ["lit" in f.get_attribute("class") for f in figures] == [True, True]
    notes = [f.find_element(By.CSS_SELECTOR, ".now").text for f in figures]
    assert notes == ["✗ shape fox, ✓ colour red, 0.100", "✓ shape fox, ✓ colour red, 0.400"]
    webdriver.ActionChains(opened).move_to_element(opened.find_element(By.ID, "count")).perform()
    assert figures[0].get_attribute("class") == ""


def test_report_arrows_move_between_sentences(opened):
    rows = opened.find_elements(By.CSS_SELECTOR, ".example:nth-child(2) tbody tr")
    opened.execute_script("arguments[0].focus()", rows[0])
    press(opened, Keys.ARROW_DOWN)
    assert opened.switch_to.active_element == rows[1] and "lit" in rows[1].get_attribute("class")
    press(opened, Keys.ARROW_UP)
    assert opened.switch_to.active_element == rows[0]


def test_report_large_images_with_keyboard(opened):
    choose(opened, "sort", "gain-0")
    opened.find_element(By.CSS_SELECTOR, ".open").click()
    dialog = opened.find_element(By.ID, "large")

    def shown():
        figures = dialog.find_elements(By.CSS_SELECTOR, "figure")
        return dialog.find_element(By.CSS_SELECTOR, ".meta").text, [f.is_displayed() for f in figures]

    assert dialog.is_displayed() and shown()[0].endswith("seed 3") and shown()[1] == [True, True]
    press(opened, Keys.ARROW_RIGHT)
    assert shown()[0].endswith("seed 0")
    press(opened, Keys.ARROW_DOWN)
    assert shown()[1] == [True, False]
    sentence = dialog.find_element(By.CSS_SELECTOR, "tbody th")
    assert "part" in sentence.get_attribute("class").split()
    press(opened, Keys.ARROW_DOWN)
    assert shown()[1] == [False, True] and "true" in sentence.get_attribute("class").split()
    press(opened, Keys.ARROW_LEFT)
    assert shown()[0].endswith("seed 3") and shown()[1] == [False, True]
    press(opened, Keys.ESCAPE)
    assert not dialog.is_displayed()


def test_report_colours_by_score(opened):
    chip = opened.find_element(By.CSS_SELECTOR, ".chip.part.s0, td .chip.part")
    before = chip.value_of_css_property("background-color")
    choose(opened, "colour", "score")
    assert chip.value_of_css_property("background-color") != before
    assert opened.find_element(By.CSS_SELECTOR, ".legend.score").is_displayed()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 1300])
def test_report_has_no_horizontal_overflow(opened, width, dark):
    resize(opened, width, 844, dark)
    opened.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    measure = "return [document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
    assert max(opened.execute_script(measure)) <= width
    opened.find_element(By.CSS_SELECTOR, ".open").click()
    assert opened.execute_script("const d = document.getElementById('large'); return d.scrollWidth <= d.clientWidth")


def test_report_dark_mode_is_dark(opened):
    luminance = []
    for dark in (False, True):
        resize(opened, 1300, 900, dark)
        color = opened.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        luminance.append(sum(int(v) for v in color[color.index("(") + 1 : -1].split(",")[:3]))
    assert luminance[0] > 600 > 150 > luminance[1]


def test_report_prints_without_tools(opened):
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not opened.find_element(By.CSS_SELECTOR, ".tools").is_displayed()
    assert opened.find_element(By.CSS_SELECTOR, ".example img").is_displayed()
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
