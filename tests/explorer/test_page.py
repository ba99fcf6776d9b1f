"""The page in a headless Chromium, served and static: what a person does to it, and what then is to be seen."""

import contextlib
import functools
import http.server
import json
import os
import re
import threading
import time

import pytest
import torch
from browser import needs_chromium, open_browser
from PIL import Image

import capszoo
from capszoo.errors import UsageError
from capszoo.explorer import ExplorerServer, Network, runtime_from_folder, runtime_from_registry, write_static
from capszoo.opening import open_model

pytestmark = needs_chromium

# A sum of the pixels, to see that a picture changes.
SUM = """
const canvas = document.querySelector(arguments[0]);
const context = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
context.drawImage(canvas, 0, 0);
const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
return data.reduce((sum, value, place) => sum + value * (1 + place % 251), 0);
"""
SLIDE = """
const input = document.querySelector(arguments[0]);
input.value = arguments[1];
input.dispatchEvent(new Event("input"));
"""
BEST = 'return document.querySelector(".panel .best .name")?.textContent'
SEVEN = [(-70, -90), (70, -90), (20, 0), (-15, 95)]


@pytest.fixture(scope="module")
def networks():
    return [Network(open_model(name)) for name in ("capsnet_tiny.mnist", "capsnet_tiny.fashion_mnist")]


@contextlib.contextmanager
def serving(networks):
    """The address of a server of these networks, which then ends."""
    server = ExplorerServer(networks)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def served(networks):
    with serving(networks) as url:
        yield url


@pytest.fixture(scope="module")
def window():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(window):
    """The window, whose pages must not complain, nor ask any other host."""
    window.emulate("Emulation.clearDeviceMetricsOverride")
    yield window
    assert window.problems() == []
    asked = {re.match(r"(?:https?|wss?)://[^/]*", url) for url in window.requests() if not url.startswith("blob:")}
    assert len({match[0] for match in asked}) == 1, asked


def open_page(browser, url):
    browser.open(url)
    browser.wait(
        'return [...document.querySelectorAll(".panel .has-drawn figcaption")].every(text => text.textContent) '
        '&& document.querySelector(".panel")'
    )


def settled(browser, selector):
    """The sum of a picture once it no longer changes: while somebody draws, answers are some images behind."""
    before = None
    while (now := browser.run(SUM, selector)) != before:
        before = now
        time.sleep(0.3)
    return now


def walk_through(browser, url):
    """Draw a digit, read its class, move sliders, and look at what follows."""
    open_page(browser, url)
    assert browser.run(BEST) == "5 - five"  # the first example
    seen, drawn = browser.run(SUM, ".seen"), browser.run(SUM, ".drawn")
    browser.draw("#board", SEVEN)
    browser.wait(f'{BEST} === "7 - seven"')
    drawn_of_five, drawn = drawn, settled(browser, ".drawn")
    length = float(browser.run('return document.querySelector(".panel .best .length").textContent'))
    assert length > 0.8
    assert browser.run('return document.querySelector(".has-drawn figcaption").textContent').endswith("of 7 - seven")
    assert browser.run(SUM, ".seen") != seen and drawn != drawn_of_five
    # A number of its capsule.
    number = float(browser.run('return document.querySelector(".numbers input").value'))
    browser.run(SLIDE, ".numbers input", number + (0.5 if number < 0 else -0.5))
    browser.wait('return document.querySelector(".has-drawn figcaption").textContent.endsWith("changed")')
    assert browser.run(SUM, ".drawn") != drawn
    browser.click(".reset")
    browser.wait('return !document.querySelector(".has-drawn figcaption").textContent.endsWith("changed")')
    assert browser.run(SUM, ".drawn") == drawn
    # Couplings of iterations: equal in the first.
    lines = browser.run(SUM, ".lines")
    browser.click(".radios label:nth-child(1) input")
    assert "evenly: 0.100" in browser.run('return document.querySelector(".couplings-note").textContent')
    assert browser.run(SUM, ".lines") != lines
    # The capsule of another class, and the drawing upside down.
    browser.click(".classes li:nth-child(4) button")
    browser.wait('return document.querySelector(".has-drawn figcaption").textContent.endsWith("of 3 - three")')
    assert browser.run(SUM, ".drawn") != drawn
    browser.run(SLIDE, "#rotate", 180)
    browser.wait(f'{BEST} !== "7 - seven"')


def test_the_served_page(browser, served):
    walk_through(browser, served)
    assert browser.run('return getComputedStyle(document.querySelector(".numbers")).display') == "grid"


def test_two_networks(browser, served):
    open_page(browser, served)
    names = 'return [...document.querySelectorAll(".panel .best .name")].map(name => name.textContent)'
    browser.wait('return document.querySelectorAll(".panel .best").length === 2')
    first, second = browser.run(names)
    assert first == "5 - five" and not second[0].isdigit()
    browser.click("#second")
    assert browser.run('return document.querySelectorAll(".panel").length') == 1
    browser.run(
        'const select = document.querySelector(".head select"); select.value = 1; '
        'select.dispatchEvent(new Event("change"))'
    )
    browser.wait(f"{BEST} === {json.dumps(second)}")


def test_drawing_by_keys(browser, served):
    open_page(browser, served)
    browser.run('document.getElementById("board").focus()')
    up, down, space, delete = "\ue013", "\ue015", " ", "\ue017"
    browser.press("#board", delete)
    browser.press("#board", up * 17 + space + down * 34 + space)
    browser.wait(f'{BEST} === "1 - one"')
    assert browser.run("return document.activeElement.id") == "board"
    before = settled(browser, ".seen")
    browser.press("#board", "\ue009z\ue000")  # Ctrl+Z
    time.sleep(0.2)
    assert settled(browser, ".seen") != before


def test_every_control_has_a_name_and_takes_the_focus(browser, served):
    open_page(browser, served)
    unnamed = browser.run("""
      return [...document.querySelectorAll("button, input, select, canvas, summary, [tabindex]")].filter(element => {
        if (element.closest("[aria-hidden]") || element.closest("[hidden]")) return false;
        const label = element.getAttribute("aria-label") || element.textContent.trim()
          || [...(element.labels ?? [])].map(label => label.textContent.trim()).join("");
        return !label || (element.tabIndex < 0 && element.tagName !== "CANVAS" && !element.disabled);
      }).map(element => element.outerHTML.slice(0, 200));
    """)
    assert unnamed == []
    assert browser.wait('return document.getElementById("said").textContent').startswith("capsnet_tiny.mnist: 5 - five")


def test_a_phone(browser, served):
    """Nothing is wider than 360 pixels, a finger draws, and the answer is in sight of who draws."""
    browser.emulate("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True)
    browser.emulate("Emulation.setTouchEmulationEnabled", enabled=True)
    open_page(browser, served)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    wide = 'return [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > 361).length'
    assert browser.run(wide) == 0
    assert not browser.run('return document.getElementById("changes").open')
    browser.draw("#board", SEVEN, kind="touch")
    browser.wait(f'{BEST} === "7 - seven"')
    browser.wait('return document.getElementById("said").textContent.includes("7 - seven")')
    top, bottom, seen = browser.run("""
      const box = document.getElementById("said").getBoundingClientRect();
      return [box.top, box.bottom, visualViewport.height];
    """)
    assert seen - 100 < top < bottom <= seen
    browser.emulate("Emulation.setTouchEmulationEnabled", enabled=False)


def test_an_image_is_opened(browser, served, tmp_path):
    """Black on white, as on paper: it is inverted."""
    page = Image.new("L", (90, 120), 255)
    page.paste(0, (40, 20, 50, 100))
    page.save(tmp_path / "one.png")
    open_page(browser, served)
    browser.press("#file", str(tmp_path / "one.png"))
    browser.wait(f'{BEST} === "1 - one"')
    assert browser.run('return document.getElementById("invert").checked')
    (tmp_path / "broken.png").write_bytes(b"no image")
    browser.press("#file", str(tmp_path / "broken.png"))
    browser.wait('return document.getElementById("problem").textContent.startsWith("broken.png is not an image")')
    # What comes next ends the complaint, and the image can be opened again.
    browser.click("#clear")
    assert browser.run('return document.getElementById("problem").hidden')
    browser.press("#file", str(tmp_path / "one.png"))
    browser.wait(f'{BEST} === "1 - one" && !document.querySelector(".panel.blank")')


def test_a_second_finger_does_not_draw(browser, served):
    open_page(browser, served)
    browser.click("#clear")
    touch = """
      const board = document.getElementById("board"), box = board.getBoundingClientRect();
      const send = (kind, pointerId, x, y) => board.dispatchEvent(new PointerEvent(kind, {
        pointerId, pointerType: "touch", clientX: box.left + x * box.width, clientY: box.top + y * box.height,
      }));
      board.setPointerCapture = () => {};  // of pointers that no hand moves
      send("pointerdown", 7, .5, .2); send("pointermove", 7, .5, .8);
      SECOND
      send("pointermove", 7, .5, .5); send("pointerup", 7, .5, .5);
    """
    sums = []
    for second in ("", 'send("pointerdown", 8, .1, .1); send("pointermove", 8, .9, .1); send("pointerup", 8, .9, .1);'):
        browser.click("#clear")
        browser.run(touch.replace("SECOND", second))
        sums.append(settled(browser, "#board"))
    assert sums[0] == sums[1]


def test_a_wide_network(browser, tmp_path):
    """A drawing fills the middle square, an image all pixels, and pictures keep the proportions of the network's."""
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", img_size=(20, 40), decoder=True)
    capszoo.save_model(tmp_path / "wide.safetensors", model)
    Image.new("L", (30, 60), 200).save(tmp_path / "grey.png")
    with serving([Network(open_model(tmp_path / "wide.safetensors"))]) as url:
        open_page(browser, url)
        seen = """
          const canvas = document.querySelector(".seen"), box = canvas.getBoundingClientRect();
          const context = new OffscreenCanvas(40, 20).getContext("2d", {willReadFrequently: true});
          context.drawImage(canvas, 0, 0);
          const {data} = context.getImageData(0, 0, 40, 20);
          const ink = [...data].filter((_, i) => i % 4 === 0).map((value, i) => [value, i % 40, Math.floor(i / 40)]);
          const drawn = ink.filter(([value]) => value > 60);
          const ends = [1, 2].flatMap(axis => [Math.min, Math.max].map(end => end(...drawn.map(place => place[axis]))));
          return [box.width / box.height, ...ends];
        """
        shape, left, right, top, bottom = browser.run(seen)
        assert shape == pytest.approx(2, abs=0.05) and left >= 10 and right < 30
        assert 0 < top < 5 and 15 < bottom < 20 - 1  # nothing is cut off
        browser.press("#file", str(tmp_path / "grey.png"))
        browser.wait('return document.getElementById("invert").checked')
        browser.click("#invert")
        browser.wait(f"return (() => {{ {seen} }})().slice(1).join() === '0,39,0,19'")


def test_light_and_dark(browser, served):
    grounds = []
    for scheme in ("light", "dark"):
        browser.emulate("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        open_page(browser, served)
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    browser.emulate("Emulation.setEmulatedMedia", features=[])
    assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]


def test_a_server_that_ended(browser, networks):
    with serving(networks) as url:
        open_page(browser, url)
    browser.click("#digits button:nth-child(2)")
    browser.wait('return document.getElementById("problem").textContent.startsWith("The server does not answer")')
    assert all("ERR_CONNECTION_REFUSED" in entry["message"] for entry in browser.problems())


@pytest.mark.slow
def test_the_static_page(browser, networks, tmp_path):
    """On a host that sends no header of its own, in a sub-folder, and says of no file what it is."""
    given = os.environ.get("CAPSZOO_TEST_ONNXRUNTIME_WEB")
    try:
        runtime = runtime_from_folder(given) if given else runtime_from_registry()
    except UsageError as error:
        pytest.skip(str(error))
    write_static(tmp_path / "some" / "where", networks, runtime)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def guess_type(self, path):
            kind = super().guess_type(path)
            return kind if kind.startswith("text/") or path.endswith(".svg") else "application/octet-stream"

        def log_message(self, *_):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        walk_through(browser, f"http://127.0.0.1:{host.server_port}/some/where/")
        assert not browser.run("return crossOriginIsolated")
    finally:
        host.shutdown()
        host.server_close()
        thread.join()
