"""A headless Chromium, driven over two pipes in the DevTools protocol: JSON messages with a zero byte after each.

Pipes need neither a port nor a package. The shell that starts Chromium gives it the pipes as descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = "no Chromium on PATH: apt-get install chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def executable() -> str | None:
    """The path of Chromium, or None where none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one Chromium. ``errors`` collects exceptions, console errors and failed loads.

    Args:
        profile: an empty folder for the profile. timeout_s: longest wait for one answer.
    """

    def __init__(self, path: str, profile: Path, timeout_s: float = 60) -> None:
        self.timeout_s, self.errors, self._unread, self._last, self._loaded = timeout_s, [], b"", 0, False
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        start = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, "bash", path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._session: str | None = None
        pages = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # else focus events wait for a window

    def close(self) -> None:
        """End Chromium and all that it started."""
        os.close(self._commands)
        os.close(self._answers)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def call(self, method: str, **params) -> dict:
        """The result of one method of the protocol. Raises RuntimeError with Chromium's message."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            self._note(answer)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, method: str) -> dict:
        deadline = time.monotonic() + self.timeout_s
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"{method}: no answer from Chromium in {self.timeout_s:.0f} s")
            received = os.read(self._answers, 1 << 16)
            if not received:
                raise RuntimeError(f"{method}: Chromium has ended")
            self._unread += received
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"].get("exception", params).get("description", str(params)))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])

    def run(self, script: str):
        """The value of a JavaScript expression (of a promise: what it gives). Raises RuntimeError with the exception."""
        given = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in given:
            raise RuntimeError(given["exceptionDetails"]["exception"]["description"])
        return given["result"].get("value")

    def open(self, url: str) -> None:
        """Load a page and wait until it is complete."""
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not (self._loaded and self.run("location.href") == url):
            self._note(self._next("Page.navigate"))

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        """The window in CSS pixels; a phone has a touch screen and no mouse."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=0, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def prefer(self, **features: str) -> None:
        """Media features, for example ``prefer(color_scheme="dark", reduced_motion="reduce")``."""
        wanted = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def press(self, key: str) -> None:
        """Press and release a key by its name: ArrowLeft, Tab, Home, Enter."""
        codes = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        about |= {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def tap(self, x: float, y: float) -> None:
        """Touch and let go at a place of the window."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))
