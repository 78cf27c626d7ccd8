"""A headless Chromium for tests of pages, spoken to in the DevTools protocol through two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
"""The program, or an empty text."""


class Page:
    """One page of the browser: opened, asked and photographed."""

    def __init__(self, read: int, write: int) -> None:
        """Attach to the page that the browser opened at its start."""
        self._read, self._write = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._calls, self._rest, self._session = 0, b"", ""
        self.problems: list[str] = []
        """What the console said, and requests that were made, since :meth:`open`."""
        (target,) = (t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while (answer := self._next()).get("id") != self._calls:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def open(self, file: Path, width: int, scheme: str, height: int = 900) -> None:
        """Open a file in a window of this width, in a light or a dark scheme."""
        self.problems.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", features=features)
        self("Page.navigate", url=file.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def photograph(self, *, clip: dict[str, float] | None = None) -> bytes:
        """Return a PNG of the whole page, or of a part of it."""
        part = {"clip": {**clip, "scale": 1}} if clip else {}
        shot = self("Page.captureScreenshot", captureBeyondViewport=True, **part)
        return base64.b64decode(shot["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read1(1 << 20)
            if not part:
                raise RuntimeError("The browser is gone.")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        event: dict[str, Any] = json.loads(text)
        self._note(event.get("method", ""), event.get("params", {}))
        return event

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(params)[:500])
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.problems.append(f"a request of {url}")


@contextmanager
def browser() -> Iterator[Page]:
    """Start a browser with one empty page, and end it."""
    for_it, our_end = os.pipe()
    our_read, its_end = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shell = f'exec "$0" "$@" 3<&{for_it} 4>&{its_end}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
                 "--disable-dev-shm-usage", "--disable-background-networking"]  # fmt: skip
        process = subprocess.Popen(
            ["bash", "-c", shell, CHROMIUM, *flags, "about:blank"],
            pass_fds=(for_it, its_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(for_it)
        os.close(its_end)
        page = Page(our_read, our_end)
        try:
            yield page
        finally:
            page._session = ""
            page("Browser.close")
            process.wait(20)
            page._read.close()
            page._write.close()
