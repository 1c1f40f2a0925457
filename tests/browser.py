"""Headless Chromium, driven through its debugging pipe: no driver and no package is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "there is no Chromium; apt-get install -y chromium"

PATIENCE_S = 60
"""Seconds in which it answers, on a busy machine too."""


class Tab:
    """A page in the browser.

    Attributes:
        requests: the addresses of all that it asked for.
        said: errors of the page and what it wrote to the console.
    """

    def __init__(self, commands, replies):
        self.commands, self.replies = commands, replies
        self.waiting, self.number, self.session = b"", 0, None
        self.requests, self.said, self.loaded = [], [], False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """The browser's answer to a command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (found := self.receive()).get("id") != self.number:
            pass
        assert "error" not in found, found
        return found["result"]

    def receive(self):
        """The next message; what happened in the page is noted."""
        while b"\0" not in self.waiting:
            assert select.select([self.replies], [], [], PATIENCE_S)[0], "Chromium does not answer"
            self.waiting += (new := os.read(self.replies, 1 << 20))
            assert new, "Chromium has ended"
        text, self.waiting = self.waiting.split(b"\0", 1)
        message = json.loads(text)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case (
                "Log.entryAdded"
                | "Runtime.consoleAPICalled"
                | "Runtime.exceptionThrown"
                | "Page.javascriptDialogOpening"
            ):
                self.said.append(message["params"])
            case "Page.loadEventFired":
                self.loaded = True
        return message

    def open(self, path, width=1280, height=900, dark=False):
        """Open a file as a window of this size, or a phone, shows it."""
        self.requests, self.said, self.loaded = [], [], False
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self.receive()

    def ask(self, expression):
        """What a JavaScript expression gives in the page. The page's own policy does not hold for it."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path, whole=False):
        """Write what is shown, or the whole page, as PNG."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def chromium(folder):
    """A tab of a browser whose profile lies in a folder; it ends with the block."""
    for_browser, commands = os.pipe()
    replies, from_browser = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
    script = f'exec "$0" "$@" 3<&{for_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", script, CHROMIUM, *options],
        pass_fds=(for_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        os.close(for_browser)
        os.close(from_browser)
        yield Tab(commands, replies)
    finally:
        process.terminate()
        process.wait()
        os.close(commands)
        os.close(replies)
