"""A headless Chromium that opens pages from the disk, and tells what went wrong in them.

It needs the Python package selenium, and Debian's packages chromium and chromium-driver, which `.ci/install-chromium`
installs. Google's Chrome, with a chromedriver of its version, does as well.
"""

import base64
import json
import shutil
import time

BROWSERS = ("chromium", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)


def program():
    """Return the path of the browser, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def missing():
    """Say what a browser test lacks here, or return None."""
    for name, path in (("chromium", program()), ("chromedriver", shutil.which("chromedriver"))):
        if path is None:
            return f"there is no {name}: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "there is no selenium: pip install selenium"
    return None


class Browser:
    """One Chromium."""

    def __init__(self):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = program()
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        for flag in FLAGS:
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def close(self):
        self.driver.quit()

    def open(self, path, *, width=1280, height=900, dark=False):
        """Open a file in a window of a size, light or dark; forget what happened before."""
        self.problems()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.absolute().as_uri())
        self.path = path

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, script, seconds=20):
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; {self.problems()}"
            time.sleep(0.02)
        return found

    def press(self, selector, *keys):
        """Focus an element and press keys."""
        self.run("document.querySelector(arguments[0]).focus()", selector)
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key})

    def point(self, selector, across, down, *, click=False):
        """Move the mouse to a place of an element, as shares of its size from its upper left corner."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.run("document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        place = {"x": box["left"] + across * box["width"], "y": box["top"] + down * box["height"]}
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            event = {"type": kind, **place} | ({"button": "left", "clickCount": 1} if kind != "mouseMoved" else {})
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def problems(self):
        """Return the console's errors and the requests that are not for the page itself, since the last call."""
        found = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    found.append(f"request: {url}")
        return found

    def picture(self, path, *, whole=False):
        """Save a screenshot as PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))
