"""The page of `bkd report` in a real browser: Debian's packages `chromium` and `chromium-driver`."""

import shutil
import time

import pytest

from bkd.report.page import write_report
from tests.report_runs import HOSTILE, PROMPTS, add_evaluation, add_picture, add_speed, make_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
SMUGGLED = """
const words = '<img src="data:," onerror="window.hacked = 1"><b style="color: red"></b>';
const script = document.createElement('script');
script.textContent = 'window.hacked = 2';
document.body.insertAdjacentHTML('beforeend', words);
document.body.append(script);
"""
OPEN_ALL = "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
OVERFLOWING = """
const wide = (element) => element.closest('.wide, pre, nav') || element.closest('svg') || element.matches('.skip');
return [...document.body.querySelectorAll('*')]
  .filter((element) => !wide(element) && element.getBoundingClientRect().right > innerWidth + 1)
  .map((element) => element.outerHTML.slice(0, 80));
"""
CONTRASTS = """
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = numbers(color).map((c) => (c / 255 <= 0.04 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (numbers(color)[3] !== 0) return color;
  }
  return 'rgb(255, 255, 255)';
};
const words = 'h1, h2, p, td, th, dt, dd, figcaption, .soft, .model, button, .tick';
return [...document.querySelectorAll(words)].map((element) => {
  const style = getComputedStyle(element);
  const [a, b] = [light(element.matches('.tick') ? style.fill : style.color), light(behind(element))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 60)];
}).filter(([contrast]) => contrast < 4.5);
"""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, many_page):
    """Paths by name: one run, several, hostile words, and many pictures."""
    root = tmp_path_factory.mktemp("pages")
    run = make_run(root / "run")
    for step in (10, 20, 30):
        add_picture(run.samples / f"00-step-{step:08d}.png", seed=step)
    add_picture(run.eval / "shapes.png", models=("teacher", "run untrained", "run"), seed=5)
    add_evaluation(run, ("teacher", "run untrained", "run"))
    add_speed(run, ("teacher", "run"))
    other = make_run(root / "a run with a rather long name that has to go somewhere", "shapes/halving")
    add_picture(other.eval / "shapes.png", models=("teacher", "other"), seed=8)
    add_evaluation(other, ("teacher", "other"))
    evil = make_run(root / HOSTILE.replace("/", ""), prompts=(HOSTILE, "b"), teacher=HOSTILE, command=HOSTILE)
    for step in (10, 20):
        add_picture(evil.samples / f"00-step-{step:08d}.png", (HOSTILE, "b"), (HOSTILE, HOSTILE + "2"), seed=step)
    add_evaluation(evil, (HOSTILE, "student"))
    evil.metrics.write_text(evil.metrics.read_text().replace("task_", HOSTILE[:17]))
    runs = {"one": [run], "several": [run, other], "hostile": [evil]}
    made = {name: write_report([each.path for each in found], root / f"{name}.html") for name, found in runs.items()}
    return {**made, "many": many_page}


def phone(browser, **changed):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**PHONE, **changed})


def emulate(browser, scheme="light"):
    wished = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wished.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def opened(browser, pages):
    """Open a page; in the end nothing may have complained."""

    def open_(name):
        browser.get(pages[name].as_uri())
        return browser

    browser.get_log("browser")
    emulate(browser)
    yield open_
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.get_log("browser") == []


def one(browser, selector):
    return browser.find_element("css selector", selector)


def every(browser, selector):
    return browser.find_elements("css selector", selector)


@pytest.mark.parametrize("name", ["one", "several", "hostile", "many"])
def test_every_picture_is_there_and_nothing_is_fetched(opened, name):
    page = opened(name)
    page.execute_script(OPEN_ALL)
    loaded = page.execute_async_script(
        "const done = arguments[0]; const all = [...document.images];"
        "Promise.all(all.map((image) => image.decode())).then(() => done(all.length), (error) => done(String(error)))"
    )
    assert isinstance(loaded, int) and loaded >= 4
    assert (
        page.execute_script(
            "return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length"
        )
        == 0
    )


def test_hostile_words_are_words(opened):
    page = opened("hostile")
    slider = one(page, ".slider input")
    slider.send_keys("\ue012")  # left: the script writes captions anew
    one(page, ".plot").send_keys("\ue012")
    assert page.execute_script("return window.hacked") is None
    assert HOSTILE in one(page, "h1 ~ .lead").text and HOSTILE in one(page, ".prompt figcaption").text
    assert one(page, ".tile .model").text == HOSTILE
    assert one(page, ".tile img").get_attribute("alt") == f"{HOSTILE}: {HOSTILE}"


def test_what_should_slip_through_is_stopped_by_the_policy(opened):
    page = opened("one")
    page.execute_script(SMUGGLED)
    time.sleep(0.3)
    assert page.execute_script("return window.hacked") is None
    complaints = [entry["message"] for entry in page.get_log("browser")]
    assert len(complaints) == 3 and all("Content Security Policy" in message for message in complaints)


def test_the_slider_changes_the_pictures_by_keyboard_mouse_and_buttons(opened):
    page = opened("one")
    slider, label = one(page, ".slider input"), one(page, ".slider output")
    teacher, student = every(page, ".tile img")[:2]

    def state():
        return label.text, student.get_attribute("src")

    fixed, seen = teacher.get_attribute("src"), [state()]
    slider.send_keys("\ue012")  # left
    seen.append(state())
    one(page, ".slider .back").click()
    seen.append(state())
    assert [text for text, _ in seen] == ["step 30", "step 20", "step 10"]
    assert len({source for _, source in seen}) == 3 and teacher.get_attribute("src") == fixed
    assert slider.get_attribute("aria-valuetext") == "step 10" and "training steps" in slider.get_attribute(
        "aria-label"
    )
    slider.click()  # in its middle
    assert state() == seen[1]
    slider.send_keys("\ue010")  # end
    assert state() == seen[0]
    one(page, ".slider .on").click()  # round again
    assert state() == seen[2]
    play = one(page, ".slider .play")
    play.click()
    deadline = time.time() + 5
    while state() == seen[2] and time.time() < deadline:
        time.sleep(0.05)
    assert state() == seen[1] and play.text == "Stop" and play.get_attribute("aria-pressed") == "true"
    play.click()
    assert play.text == "Play"


def test_values_of_curves_are_read_by_keyboard_and_mouse(opened):
    from selenium.webdriver import ActionChains

    page = opened("one")
    plot, readout = one(page, ".plot"), one(page, ".readout")
    page.execute_script("arguments[0].focus()", plot)
    last = readout.text
    assert last.startswith("step 40 · ") and "(logged 0.3" in last
    plot.send_keys("\ue012")  # left
    assert readout.text.startswith("step 39 · ") and plot.get_attribute("aria-valuetext") == readout.text
    plot.send_keys("\ue011")  # home
    assert readout.text.startswith("step 1 · ") and plot.get_attribute("role") == "slider"
    plot.send_keys("\ue00f")  # page down, at the end of the road
    assert plot.get_attribute("aria-valuenow") == "0"
    ActionChains(page).move_to_element(plot).perform()
    middle = int(readout.text.split()[1])
    assert 15 <= middle <= 25 and one(page, ".cursor").get_attribute("visibility") == "visible"


def test_curves_of_several_runs_are_told_apart(opened):
    page = opened("several")
    plot = one(page, ".plot")
    page.execute_script("arguments[0].focus()", plot)
    plot.send_keys("\ue011")  # home
    read = one(page, ".readout").text
    assert read.startswith("step 1 · run: ") and " · a run with a rather long name" in read


def test_commands_are_copied_or_selected(opened):
    page = opened("one")
    origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    button = one(page, "#recipe-1 .copy")
    page.execute_cdp_cmd("Browser.grantPermissions", origin)
    button.click()
    time.sleep(0.3)
    assert button.text == "Copied"
    assert page.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == "bkd train RECIPE"
    page.execute_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    button.click()
    time.sleep(0.3)
    assert button.text == "Selected" and page.execute_script("return String(getSelection())") == "bkd train RECIPE"


@pytest.mark.parametrize("name", ["one", "several", "hostile", "many"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows_the_page(opened, browser, name, width):
    phone(browser, width=width, mobile=width == 360)
    page = opened(name)
    page.execute_script(OPEN_ALL)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script(OVERFLOWING) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(opened, browser, scheme):
    emulate(browser, scheme)
    page = opened("one")
    assert page.execute_script(CONTRASTS) == []
    dark = page.execute_script("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_the_page_is_read_by_keyboard(opened):
    from selenium.webdriver import ActionChains

    page = opened("one")
    ActionChains(page).send_keys("\ue004").perform()  # tab
    first = page.switch_to.active_element
    assert first.text == "Skip to the content" and first.rect["x"] >= 0
    first.send_keys("\ue007")  # enter
    assert page.current_url.endswith("#main")
    seen = []
    for _ in range(4):
        ActionChains(page).send_keys("\ue004").perform()
        focused = page.switch_to.active_element
        seen.append(focused.get_attribute("class") or focused.get_attribute("type"))
        assert focused.value_of_css_property("outline-style") == "solid"
    assert seen == ["back", "range", "on", "play"]
    for landmark in ("header", "nav[aria-label]", "main", "footer"):
        assert len(every(page, landmark)) == 1
    for section in every(page, "section"):
        assert one(page, f"#{section.get_attribute('aria-labelledby')}").text


def test_without_scripts_the_page_can_still_be_read(opened, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page = opened("one")
    assert not any(element.is_displayed() for element in every(page, ".js-only"))
    assert one(page, ".prompt figcaption").text == PROMPTS[0]
    assert one(page, ".tile img").get_attribute("src").startswith("data:image/webp")
    assert "97.5%" in one(page, ".rows").text or "95.0%" in one(page, ".rows").text


def test_two_hundred_pictures_are_there_in_two_seconds(opened, pages):
    """From the beginning of the navigation to a slider that has answered."""
    page = opened("many")
    one(page, ".slider input").send_keys("\ue012")  # left
    assert one(page, ".slider output").text == "step 8"
    answered = page.execute_script("return performance.now()")
    ready = page.execute_script("return performance.getEntriesByName('interactive')[0].startTime")
    size = pages["many"].stat().st_size
    print(f"{size / 1e6:.1f} MB: interactive after {ready:.0f} ms, a key answered after {answered:.0f} ms")
    assert answered < 2000 and size <= 15_000_000 and "200 pictures" in one(page, "footer").text
