"""Explore capsule networks by hand: one page to draw a digit on, see its capsules, and change their numbers.

    python recipes/explorer.py                                        # capsnet_tiny.mnist, in the browser
    python recipes/explorer.py capsnet.mnist runs/NAME                # two networks side by side
    python recipes/explorer.py capsnet_tiny.mnist --export site       # a static page, for any web host

The page is served to this machine alone. An exported page needs no server of its own: ONNX Runtime Web, fetched from
the npm registry or given as a folder, runs the networks in the browser.
"""

import signal
import sys
import threading
import webbrowser
from pathlib import Path

from rich.console import Console

from capszoo.command_line import OptionParser, make_console, run
from capszoo.errors import UsageError
from capszoo.explorer import (
    RUNTIME_VERSION,
    ExplorerServer,
    Network,
    runtime_from_folder,
    runtime_from_registry,
    write_static,
)
from capszoo.explorer.static import check_export
from capszoo.opening import open_model
from capszoo.precision import choose_device


def build_parser() -> OptionParser:
    parser = OptionParser(description="Explore capsule networks by hand, on a page in the browser.")
    add = parser.add_argument
    add("weights", nargs="*", help="run folders, safetensors files or shipped weights; default capsnet_tiny.mnist")
    add("--port", type=int, default=8765, help="port to serve the page on, 0 for any that is free")
    add("--host", default="127.0.0.1", help="address to serve the page on, of this machine alone")
    add("--open-to-network", action="store_true", help="let --host be an address that other machines reach")
    add("--no-browser", action="store_true", help="do not open the page in the browser")
    add("--export", metavar="FOLDER", help="write a static page for any web host, and serve nothing")
    add(
        "--onnxruntime-web",
        metavar="FOLDER",
        help=f"for --export: an unpacked npm package onnxruntime-web; without it {RUNTIME_VERSION} is fetched",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    return parser


def serve(server: ExplorerServer, console: Console, browser: bool) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    console.print(f"{', '.join(network.name for network in server.networks)} at {server.url} - Ctrl-C ends it")
    if browser:
        # Some browsers return when they are closed.
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        console.print("ended")
    finally:
        signal.signal(signal.SIGTERM, before)
        server.server_close()


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port} is not a port: give a number from 0 to 65535")
    if args.onnxruntime_web is not None and args.export is None:
        raise UsageError("--onnxruntime-web is for --export: give both, or neither")
    console = make_console()
    # A graph is traced on the CPU.
    device = choose_device("cpu" if args.export is not None else args.device)
    if args.export is not None:
        check_export(Path(args.export))
    networks = [Network(open_model(name), device) for name in args.weights or ["capsnet_tiny.mnist"]]
    if args.export is None:
        serve(ExplorerServer(networks, args.host, args.port, args.open_to_network), console, not args.no_browser)
        return 0
    given = args.onnxruntime_web
    runtime = runtime_from_registry() if given is None else runtime_from_folder(given)
    page, *others = write_static(args.export, networks, runtime)
    size = sum(file.stat().st_size for file in (page, *others)) / 2**20
    console.print(f"{page}, and {len(others)} more files, {size:.1f} MiB: put the folder on any web host")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
