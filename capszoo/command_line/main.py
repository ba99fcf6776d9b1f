"""The console command `capszoo`: what there is, what this machine can do with it, and the recipes.

    capszoo list "*_ws"            capszoo train --dataset mnist --download
    capszoo info capsnet_ws        capszoo validate capsnet_ws.mnist
    capszoo predict runs/NAME cat.png
    capszoo doctor                 capszoo prune | explore | benchmark ...

A recipe's command takes the options of the script in recipes/ with its name.
"""

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capszoo import __version__
from capszoo.command_line import OptionParser, UsageError, add_options, run, unknown_name
from capszoo.costs import model_info
from capszoo.engine.options import OPTIONS
from capszoo.kernels import dispatch
from capszoo.layers import use_fused_routing
from capszoo.opening import is_shipped_name, open_model
from capszoo.precision import explain_auto, time_precisions
from capszoo.pretrained import read_table
from capszoo.registry import create_model, is_model, list_models, list_pretrained

__all__ = ["main", "routing_backend"]

# Options of training that `info` takes, too.
INFO_OPTIONS = ("img_size", "in_chans", "backbone", "backbone_level", "model_kwargs")

RECIPES = {
    "train": "train a capsule network",
    "validate": "measure a checkpoint, or shipped weights",
    "show": "look into a trained network: one HTML report",
    "prune": "prune a trained network, and train what is left",
    "explore": "search for the Pareto-optimal ways to train",
    "explorer": "draw digits for a trained network, in the browser",
    "export": "make a model folder, a compiled package or a kernel of the Hub, or ship weights",
    "benchmark": "time routing, training and inference on this machine",
}


def build_parser() -> OptionParser:
    parser = OptionParser(prog="capszoo", description="Capsule networks for timm, with fused dynamic routing.")
    parser.add_argument("--version", action="version", version=f"capszoo {__version__}")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    job = jobs.add_parser("list", allow_abbrev=False, help="names of the models, or of the shipped weights")
    job.add_argument("filter", nargs="?", default="", help='wildcards that a name must match, such as "*_ws"')
    job.add_argument("--pretrained", action="store_true", help="the shipped weights instead of the models")
    job = jobs.add_parser("info", allow_abbrev=False, help="size of a model, work of a forward pass, and its weights")
    job.add_argument(
        "model", help="name of a model, or of shipped weights such as capsnet_ws.mnist; a file, or a run folder"
    )
    add_options(job, {name: OPTIONS[name] for name in INFO_OPTIONS}, {})
    jobs.add_parser("predict", help="say what image files show, by a trained model", add_help=False)
    jobs.add_parser("doctor", allow_abbrev=False, help="what this machine has, which routing runs on it, and why")
    for name, text in RECIPES.items():
        jobs.add_parser(name, help=text, add_help=False)
    for job in jobs.choices.values():
        job.error = parser.error  # type: ignore[method-assign]  # one line, as everywhere
    return parser


def routing_backend(device: torch.device | str) -> tuple[str, str]:
    """Say what computes the routing on a device, and why.

    Args:
        device: A CPU or CUDA device that is there.

    Returns:
        'Triton kernels', 'PyTorch tiles' or 'plain reference', and the reason.
    """
    device = torch.device(device)
    if not use_fused_routing():
        return "plain reference", "CAPSZOO_FUSED_ROUTING=0 or set_fused_routing(False) asks for it"
    if device.type != "cuda":
        return "PyTorch tiles", f"Triton has no kernels for {device.type}"
    problem = dispatch.triton_problem(device)
    return ("PyTorch tiles", problem) if problem else ("Triton kernels", "Triton compiles and runs here")


def doctor() -> int:
    """Print what this machine has; return 1 if something is wrong."""
    lines = [("capszoo", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in ("torch", "torchvision", "triton", "timm", "safetensors", "optuna"):
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for gpu in gpus:
        properties = torch.cuda.get_device_properties(gpu)
        text = f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        lines.append((str(gpu), text + f"{properties.total_memory / 2**30:.0f} GiB"))
    if not gpus:
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, but finds no GPU and driver" if built else "torch is built without CUDA"
        lines.append(("GPU", f"none ({why})"))
    capability = torch.backends.cpu.get_cpu_capability()
    lines.append(("CPU", f"{platform.machine()} with {capability}, {torch.get_num_threads()} threads"))
    for device in [*gpus, torch.device("cpu")]:
        backend, why = routing_backend(device)
        lines.append((f"routing on {device}", f"{backend}: {why}"))
        dtype, why = explain_auto(device)
        lines.append((f"precision on {device}", f"{str(dtype or torch.float32).removeprefix('torch.')}: {why}"))
    times = time_precisions(torch.device("cpu"))
    ratio = times[torch.bfloat16] / times[None]
    # A fifth is more than such a short measurement errs.
    better = "bf16" if ratio < 0.8 and dtype is None else "none" if ratio > 1.25 and dtype is not None else None
    advice = "" if better is None else f": try --amp {better}"
    lines.append(("bfloat16 on cpu", f"a small training step takes {ratio:.2f} times as long as in float32{advice}"))
    if not gpus and dispatch.TRITON_PROBLEM:
        lines.append(("Triton", dispatch.TRITON_PROBLEM))
    wrong = []
    for name in read_table():
        try:
            create_model(name, pretrained=True)
        except ValueError as error:
            wrong.append(str(error))
    lines.append(("weights", f"{len(read_table())} shipped, {len(wrong) or 'none'} damaged"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    for problem in wrong:
        print(f"wrong: {problem}")
    return 1 if wrong else 0


def info(name: str, kwargs: Mapping[str, Any]) -> None:
    """Print size and work of a model with these keywords."""
    if Path(name).exists() and not is_shipped_name(name):
        opened = open_model(name, **kwargs)
        print(model_info(opened.model))
        facts = ("dataset", "policy", "epochs", "epoch", "eval_top1", "seed", "capszoo_version")
        print(f"  {opened.file}: " + ", ".join(f"{key} {opened.header[key]}" for key in facts if key in opened.header))
        return
    if not is_model(name):
        if "/" in name and ":" not in name:
            open_model(name)  # says that there is no such file
        create_model(name)  # says what is unknown, with near matches
    found = model_info(name, **kwargs)
    print(str(found), *filter(None, [found.warning()]), sep="\n")
    table = read_table()
    for weights in found.weights:
        entry = table[weights]
        print(f"  {weights}: {entry['dataset']}, top-1 {100 * entry['top1']:.2f} %, by {entry['recipe']}")
    if not found.weights:
        print("  no weights are shipped")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in RECIPES:
        # The outermost layer of all: what it runs must not be imported before it is asked for.
        recipe = importlib.import_module(f"capszoo.recipes.{argv[0]}")
        sys.argv[0] = f"capszoo {argv[0]}"  # what its help calls it
        return recipe.main(argv[1:])
    if argv and argv[0] == "predict":
        from .predict import main as predict

        return predict(argv[1:])
    if argv and not argv[0].startswith("-"):
        known = ["list", "info", "predict", "doctor", *RECIPES]
        if argv[0] not in known:
            raise UsageError(unknown_name("command", argv[0], known, f"choose from {', '.join(known)}"))
    args = build_parser().parse_args(argv)
    if args.job == "doctor":
        return doctor()
    if args.job == "info":
        kwargs = {key: getattr(args, key) for key in INFO_OPTIONS if getattr(args, key) is not None}
        more = dict(kwargs.pop("model_kwargs", ()))
        info(args.model, {**kwargs, **more})
    else:
        for name in list_pretrained(args.filter) if args.pretrained else list_models(args.filter):
            print(name)
    return 0


def entry_point() -> None:
    """What the console command calls."""
    run(main)
