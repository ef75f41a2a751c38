"""What headless Chromium makes of a page."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom"),
]
LOOK = """<script>onload = () => parent.postMessage(JSON.stringify({
    inner: innerWidth,
    scroll: document.documentElement.scrollWidth,
    images: [...document.images].map(image => image.naturalWidth),
    charts: [...document.querySelectorAll("figure > svg")].map(chart => chart.getBoundingClientRect().height),
}), "*")</script>"""
FRAME = """<script>onmessage = event => { document.documentElement.dataset.seen = event.data }</script>
<iframe src="page.html" style="width: WIDTH; height: 1000px; border: 0"></iframe>"""


def seen(page: Path, folder: Path, width: int) -> dict:
    """Widths in pixels of window and page, of its images, heights of its charts, and messages on the console.

    The page is in a frame, since Chromium's own windows are not as narrow as a telephone.
    """
    folder.mkdir()
    (folder / "page.html").write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", f"{width}px"))
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1200", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    return json.loads(html.unescape(found[1])) | {"console": re.findall(r".*CONSOLE.*", done.stderr)}


def assert_well_formed(page: Path, folder: Path, width: int) -> None:
    """No message on the console, every picture there, and nothing wider than the window."""
    found = seen(page, folder, width)
    assert found["console"] == []
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert all(image > 0 for image in found["images"])
    assert all(chart > 50 for chart in found["charts"])
    assert len(found["charts"]) == page.read_text().count("<figure>") > 0
    assert len(found["images"]) == page.read_text().count("<img ")
