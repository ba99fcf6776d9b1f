"""A headless Chromium for tests of pages, driven through chromedriver by the plain WebDriver protocol."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))),
    reason="needs chromium and chromedriver",
)


class Browser:
    """A window, see :func:`open_browser`."""

    def __init__(self, address, session):
        self.address = f"{address}/session/{session}"

    def call(self, path, values=None, method="POST"):
        return _call(self.address + path, values, method)

    def open(self, url):
        self.call("/url", {"url": url})

    def run(self, code, *arguments):
        """Run JavaScript; a promise that it returns is awaited."""
        return self.call("/execute/sync", {"script": code, "args": list(arguments)})

    def wait(self, code, seconds=20):
        """Run JavaScript until it returns something true; return that."""
        end = time.monotonic() + seconds
        while not (found := self.run(code)):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.05)
        return found

    def find(self, selector):
        return self.call("/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def click(self, selector):
        self.call(f"/element/{self.find(selector)}/click", {})

    def press(self, selector, keys):
        self.call(f"/element/{self.find(selector)}/value", {"text": keys})

    def draw(self, selector, points, kind="mouse"):
        """Draw a line through points, from the middle of an element, in pixels."""
        origin = {_ELEMENT: self.find(selector)}
        moves = [
            {"type": "pointerMove", "duration": 20, "origin": origin, "x": round(x), "y": round(y)} for x, y in points
        ]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self.call("/actions", {"actions": [pointer]})

    def emulate(self, command, **values):
        """A command of the DevTools protocol."""
        return self.call("/goog/cdp/execute", {"cmd": command, "params": values})

    def screenshot(self):
        return base64.b64decode(self.call("/screenshot", method="GET"))

    def problems(self):
        """What the console has of warnings and errors since the last call."""
        return [entry for entry in self.call("/se/log", {"type": "browser"}) if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self):
        """Addresses that pages asked for since the last call."""
        found = []
        for entry in self.call("/se/log", {"type": "performance"}):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found


def _call(url, values=None, method="POST"):
    data = None if method in ("GET", "DELETE") else json.dumps(values or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


@contextlib.contextmanager
def open_browser(width=1280, height=900):
    """A fresh browser with a window of so many pixels."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ}
    )
    browser = None
    try:
        port = next(line.rstrip(".\n").rsplit(" ", 1)[1] for line in driver.stdout if "started successfully" in line)
        address = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        arguments += [f"--window-size={width},{height}", "--proxy-server=direct://", "--hide-scrollbars"]
        options = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = _call(f"{address}/session", {"capabilities": {"alwaysMatch": options}})
        browser = Browser(address, session["sessionId"])
        yield browser
    finally:
        if browser is not None:
            with contextlib.suppress(AssertionError, OSError):
                browser.call("", method="DELETE")
        driver.terminate()
        driver.wait()
