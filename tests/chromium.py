"""A real headless Chromium, driven by the DevTools protocol over a pipe; no package is needed."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

PROGRAM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
_FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
    *("--disable-component-update", "--disable-dev-shm-usage", "--mute-audio"),
)
# Chromium reads commands from descriptor 3 and writes to 4.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Chromium:
    """A running browser; a context manager."""

    def __init__(self, profile, timeout=60):
        self._timeout, self._number, self._buffer = timeout, 0, b""
        self.events = []
        pipes = [*os.pipe(), *os.pipe()]
        # Above 4, which the launcher overwrites.
        high = [fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 10) for pipe in pipes]
        for pipe in pipes:
            os.close(pipe)
        commands, self._write, self._read, answers = high
        program = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(commands), str(answers), *program],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.send("Browser.close")
        for pipe in (self._write, self._read):
            os.close(pipe)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method, session=None, **parameters):
        """Returns the result of a command; events that come first are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._write, content) :]
        while True:
            answer = self._receive(self._timeout)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, timeout):
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            block = os.read(self._read, 1 << 20)
            if not block:
                raise RuntimeError(f"Chromium ended, status {self._process.poll()}")
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path, **settings):
        """Returns a page that shows a file, once it is loaded; see `Page`."""
        return Page(self, path, **settings)


class Page:
    """One page. `errors` and `requests` look at everything since it was opened."""

    def __init__(self, browser, path, width=1280, height=900, dark=False, script=True):
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        attached = browser.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.url = path.absolute().as_uri()
        self.load(self.url)

    def load(self, url):
        """Shows another address."""
        before = self._loads()
        within = "loaderId" not in self.send("Page.navigate", url=url)  # only the fragment differs
        while not within and self._loads() == before:
            time.sleep(0.01)
            self.evaluate("0")

    def _loads(self):
        return len(self._events("Page.loadEventFired"))

    def close(self):
        """Closes the page."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def send(self, method, **parameters):
        """Sends a command to this page."""
        return self._browser.send(method, self._session, **parameters)

    def evaluate(self, expression):
        """Returns the value of a JavaScript expression."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, expression):
        """Waits until a JavaScript expression is true; TimeoutError if it stays false."""
        end = time.monotonic() + 60
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)

    def press(self, *keys):
        """Presses keys: letters, or names such as ArrowDown."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def choose(self, name, value):
        """Sets a field of the page's form as a person would."""
        self.evaluate(
            f"(() => {{ const field = document.querySelector('form').elements[{json.dumps(name)}];"
            f"field.value = {json.dumps(value)};"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def screenshot(self, path, whole=True):
        """Writes a PNG of the window, or of the whole page."""
        image = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            image = self.send(
                "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
            )
        path.write_bytes(base64.b64decode(image["data"]))

    def _events(self, method):
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]

    @property
    def errors(self):
        """What the console shows, broken rules of the policy included."""
        self.evaluate("0")
        return [
            *(event["exceptionDetails"] for event in self._events("Runtime.exceptionThrown")),
            *(event["args"] for event in self._events("Runtime.consoleAPICalled")),
            *(event["entry"] for event in self._events("Log.entryAdded")),
        ]

    @property
    def requests(self):
        """Addresses that the page asked for, without itself and data URIs."""
        self.evaluate("0")
        asked = (event["request"]["url"] for event in self._events("Network.requestWillBeSent"))
        return [url for url in asked if url.split("#")[0] != self.url and url[:5] != "data:"]
