"""Make the picture of docs/explorer.md: python tests/explorer/screenshot.py docs/images/explorer.png"""

import io
import sys
import threading
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import open_browser  # noqa: E402

from capszoo.explorer import ExplorerServer, Network  # noqa: E402
from capszoo.opening import open_model  # noqa: E402


def main(path: str) -> None:
    """Write a picture of two networks side by side; 64 colours are enough for it, and make it small."""
    server = ExplorerServer([Network(open_model(name)) for name in ("capsnet_tiny.mnist", "capsnet.mnist")])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open_browser() as browser:
        browser.emulate("Emulation.setDeviceMetricsOverride", width=1320, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(server.url)
        browser.wait('return document.querySelectorAll(".panel .best").length === 2')
        browser.click("#digits button:nth-child(4)")
        time.sleep(1)
        browser.run("document.activeElement.blur(); scrollTo(0, 0)")
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    Path(path).parent.mkdir(exist_ok=True)
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
