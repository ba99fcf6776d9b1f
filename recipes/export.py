"""Put trained weights and operators where others load them from.

    python recipes/export.py ship runs/NAME/best.safetensors --name capsnet_ws.mnist
    python recipes/export.py hub capsnet_ws.mnist --output FOLDER            # shipped weights
    python recipes/export.py hub runs/NAME/best.safetensors --output FOLDER  # the weights of a run
    python recipes/export.py aoti capsnet_ws.mnist --output model.pt2        # a compiled package
    python recipes/export.py kernels FOLDER                                  # the operators, for kernel-builder

`ship` writes capszoo/weights/NAME.safetensors in float16, with a card in its header, and its sha256 and the essentials
of the card to capszoo/weights/weights.json. `hub` writes config.json, model.safetensors and README.md, as timm's
`local-dir:FOLDER` and `hf-hub:OWNER/NAME` read them, and transformers, too. `aoti` compiles a model ahead of time, and
`kernels` writes the project that Hugging Face's kernel-builder builds; see docs/timm.md.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import COMPUTING, load_tensors, read_metadata, save_tensors
from capszoo.command_line import OptionParser, run
from capszoo.errors import UsageError, first_line
from capszoo.export import compile_package, model_card, write_kernel
from capszoo.files import check_kinds, read_json, read_yaml, write_json
from capszoo.layers import unfold_scales
from capszoo.opening import open_model, weights_in
from capszoo.precision import choose_device
from capszoo.registry import model_header

# Options that say where and how fast a run is computed, and not what comes out.
NOT_IN_RECIPE = set("data_dir device download workers quiet tensorboard save_every cuda_graphs report".split())
# Recipes that train, and leave an args.yaml.
TRAINERS = ("train", "prune")
# Options that a recipe names even at their default, for those who read it.
ALWAYS_IN_RECIPE = {"model", "dataset", "policy", "epochs"}
# What a card may hold: it comes from the header of a file that anybody may have made.
MISSING = type(None)
CARD_KINDS: dict[str, Any] = {
    "model": str,
    **dict.fromkeys(("model_args", "criterion"), (dict, MISSING)),
    **dict.fromkeys(("class_names", "mean", "std"), (list, MISSING)),
    **dict.fromkeys(("eval_top1", "test_top1", "test_mean_average_precision"), (float, MISSING)),
    **dict.fromkeys(("epoch", "epochs", "seed"), (int, MISSING)),
    **dict.fromkeys(("dataset", "policy", "amp", "license", "recipe", "capszoo_version", "date"), (str, MISSING)),
}
# All files together; they are part of every clone and every wheel.
MAX_BYTES = 50_000_000
WEIGHTS = "name of shipped weights, a run folder, or a safetensors file"


def build_parser() -> OptionParser:
    parser = OptionParser(description="Ship trained weights, or write them and the operators for other software.")
    jobs = parser.add_subparsers(dest="job", required=True, parser_class=argparse.ArgumentParser)
    job = jobs.add_parser("ship", allow_abbrev=False, help="write weights into capszoo/weights, in float16")
    job.add_argument("file", help="best.safetensors of a finished run")
    job.add_argument("--name", required=True, metavar="MODEL.TAG", help="name of the weights, such as capsnet_ws.mnist")
    job.add_argument("--recipe", help="command that made the weights; default from the run folder's args.yaml")
    job.add_argument("--license", default="mit", help="licence of the weights (default: mit)")
    job.add_argument("--replace", action="store_true", help="replace weights of this name")
    job = jobs.add_parser("hub", allow_abbrev=False, help="make a model folder in the Hugging Face hub's layout")
    job.add_argument("weights", metavar="NAME_OR_FILE", help=WEIGHTS)
    job.add_argument("--output", required=True, metavar="FOLDER", help="folder to make; must be empty or absent")
    job.add_argument("--license", help="licence of the weights; default as shipped, else none")
    job = jobs.add_parser("aoti", allow_abbrev=False, help="compile a model ahead of time into a package, NAME.pt2")
    job.add_argument("weights", metavar="NAME_OR_FILE", help=WEIGHTS)
    job.add_argument("--output", required=True, metavar="FILE.pt2", help="package to write")
    job.add_argument(
        "--device", default="auto", help="what it is compiled for: auto, cpu, cuda, cuda:1 ... (default: auto)"
    )
    job.add_argument("--plain", action="store_true", help="for processes without capszoo: by PyTorch's operators alone")
    job = jobs.add_parser("kernels", allow_abbrev=False, help="write the operators as a project of kernel-builder")
    job.add_argument("folder", metavar="FOLDER", help="folder to make; must be empty or absent")
    job.add_argument("--repo-id", metavar="OWNER/NAME", help="where the builder uploads it")
    for job in jobs.choices.values():
        job.error = parser.error  # one line, as everywhere
    return parser


def read_card(file: Path) -> dict[str, Any]:
    """Facts about weights: the header of their file, and result.json where it lies beside them; null is left out."""
    header = read_metadata(file)
    if "model" not in header:
        raise UsageError(f"{str(file)!r} does not say what model it holds: give the best.safetensors of a run")
    card: dict[str, Any] = {}
    for key, value in header.items():
        card[key] = value
        # Checkpoints hold everything but text as JSON, and a text may look like it: a data set named 2024.
        if value == "null" or CARD_KINDS.get(key) not in (str, (str, MISSING)):
            with contextlib.suppress(ValueError, RecursionError):
                card[key] = json.loads(value)
    try:
        check_kinds(card, CARD_KINDS)
        if not all(isinstance(label, str) for label in card.get("class_names") or []):
            raise ValueError("class_names are no texts")
    except ValueError as error:
        raise UsageError(f"the header of {str(file)!r} is damaged ({first_line(error)}): give another file") from None
    result_file = file.with_name("result.json")
    if result_file.is_file():
        measured = ("eval_top1", "test_top1", "test_mean_average_precision", "amp")
        kinds = {key: CARD_KINDS[key] for key in measured}
        result = read_json(result_file, {**kinds, "best_epoch": (int, MISSING)}, "move it away, or run again")
        if card.get("epoch") is not None and result.get("best_epoch") not in (None, card["epoch"]):
            raise UsageError(
                f"{str(file)!r} holds epoch {card['epoch']}, and {str(result_file)!r} is the result of epoch "
                f"{result['best_epoch']}: give best.safetensors"
            )
        card.update({key: result[key] for key in measured if key in result})
    return {key: value for key, value in card.items() if value is not None}


def read_recipe(folder: Path) -> str | None:
    """The command that repeats a run, from the args.yaml that its recipe wrote; most defaults are left out.

    Its first line names the recipe, whose parser knows the options; None where there is no such file.
    """
    file = folder / "args.yaml"
    if not file.is_file():
        return None
    values = read_yaml(file)
    with open(file, encoding="utf-8") as stream:
        match = re.match(r"# python recipes/(\w+)\.py ", stream.readline(1000))
    if match is None or match[1] not in TRAINERS:
        return None
    script = Path(__file__).with_name(f"{match[1]}.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser, saved = module.build_parser(), module.build_parser()
    saved.set_values({key: value for key, value in values.items() if key in parser.destinations}, file)
    words, named = ["python", f"recipes/{script.name}"], []
    for key in values:
        value, default = saved.get_default(key), parser.get_default(key)
        if key not in parser.destinations or key in NOT_IN_RECIPE:
            continue
        if value == default and key not in ALWAYS_IN_RECIPE:
            continue
        # What has no name stands before the options that take any number of values.
        if parser.destinations[key].option_strings:
            named += parser.words(key, value)
        else:
            words += parser.words(key, value)[1:]
    return shlex.join([*words, *named])


def check_fit(name: str, tensors: dict[str, Tensor], model_args: dict[str, Any]) -> nn.Module:
    """Make the model that `create_model(name)` would load the weights into, on the meta device.

    Args:
        name: Name of a model.
        tensors: The weights.
        model_args: Arguments of the model that they were trained in.

    Raises:
        UsageError: If the weights are those of another model; it names the first difference.
    """
    task = {key: model_args[key] for key in ("num_classes", "in_chans", "img_size") if key in model_args}
    decoder = {"decoder": True} if model_args.get("decoder") else {}
    model = capszoo.create_model(name, device="meta", **task, **decoder)
    own, tensors = model.state_dict(), unfold_scales(tensors, model)
    for key in [*own, *tensors]:
        if key not in own:
            raise UsageError(f"the weights do not fit {name!r}: it has no {key!r}")
        if key not in tensors:
            raise UsageError(f"the weights do not fit {name!r}: they lack {key!r}")
        if tensors[key].shape != own[key].shape:
            raise UsageError(
                f"the weights do not fit {name!r}: {key!r} has shape {tuple(tensors[key].shape)}, the model needs "
                f"{tuple(own[key].shape)}"
            )
    ours = model.arguments()
    for key in COMPUTING:
        if ours.get(key) != model_args.get(key):
            raise UsageError(
                f"the weights do not fit {name!r}: they were trained with {key}={model_args.get(key)!r}, the model has "
                f"{key}={ours.get(key)!r}"
            )
    return model


def ship(args: argparse.Namespace) -> int:
    """Write weights and their entry in the table."""
    file, name = Path(args.file), args.name
    arch, _, tag = name.partition(".")
    if arch not in capszoo.list_models():
        capszoo.create_model(arch, device="meta")  # says which name is near
    if not re.fullmatch(r"[a-z0-9_]+", tag):
        raise UsageError(f"--name {name!r} needs a tag in small letters, such as {arch}.mnist")
    path, table = pretrained.weights_path(name), pretrained.read_table()
    if (name in table or path.exists()) and not args.replace:
        raise UsageError(f"weights {name!r} are there already: choose another tag, or add --replace")
    tensors, _ = load_tensors(file)
    card = read_card(file)
    for key in ("eval_top1", "test_top1", "dataset", "class_names", "epochs", "seed"):
        if key not in card:
            raise UsageError(f"{str(file)!r} comes without {key}: give the file of a run that has ended")
    recipe = args.recipe or read_recipe(file.parent)
    if recipe is None:
        raise UsageError(f"{str(file.parent)!r} has no args.yaml of a recipe: give --recipe with what made the weights")
    for word in shlex.split(recipe):
        if Path(word.rpartition("=")[2]).is_absolute():
            raise UsageError(f"the recipe has {word!r}, a path of this machine: give the command with --recipe")
    trained = capszoo.load_model(file)
    model = check_fit(arch, tensors, trained.arguments())

    small = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    for key, value in small.items():
        if not value.isfinite().all():
            raise UsageError(f"{key!r} holds numbers that float16 cannot: the largest is {tensors[key].abs().max():g}")
    others = sum(pretrained.weights_path(other).stat().st_size for other in table if other != name)
    size = sum(value.nbytes for value in small.values())
    if others + size > MAX_BYTES:
        raise UsageError(f"{size / 1e6:.1f} MB more than {others / 1e6:.1f} MB would pass {MAX_BYTES / 1e6:.0f} MB")

    features = model.forward_features(torch.empty(1, model.in_chans, *model.img_size, device="meta"))
    header = model_header(
        trained if card["model"] == arch else model,
        **{key: list(trained.pretrained_cfg[key]) for key in ("mean", "std")},
        dataset=card["dataset"],
        class_names=card["class_names"],
        recipe=recipe,
        **{key: card[key] for key in ("policy", "epochs", "epoch", "seed", "criterion", "amp") if key in card},
        eval_top1=card["eval_top1"],
        test_top1=card["test_top1"],
        precision="float16",
        license=args.license,
        date=time.strftime("%Y-%m-%d"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_tensors(path, small, text)
    path.chmod(0o644)
    table[name] = {
        "sha256": pretrained.sha256_of(path),
        "description": f"{arch} trained on {card['dataset']} by capszoo",
        "dataset": card["dataset"],
        "num_classes": model.num_classes,
        "input_size": [model.in_chans, *model.img_size],
        "pool_size": list(features.shape[-2:]),
        **{key: card[key] for key in ("mean", "std") if key in card},
        "label_names": card["class_names"],
        "license": args.license,
        "top1": card["test_top1"],
        "recipe": recipe,
    }
    # Last: a file without entry is ignored, an entry without its file would be an error.
    write_json(path.with_name("weights.json"), dict(sorted(table.items())))
    total = others + path.stat().st_size
    print(
        f"{name}: {path.stat().st_size / 1e6:.1f} MB, test top1 of the run {card['test_top1']:.4f}, "
        f"{total / 1e6:.1f} of {MAX_BYTES / 1e6:.0f} MB shipped"
    )
    return 0


def hub(args: argparse.Namespace) -> int:
    """Make a model folder."""
    folder = Path(args.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"folder {str(folder)!r} is not empty: choose another --output")
    name = args.weights
    if capszoo.is_model(name):
        if name not in pretrained.read_table():
            known = ", ".join(capszoo.list_pretrained()) or "none yet"
            raise UsageError(f"no weights are shipped as {name!r} (there are: {known})")
        file = pretrained.weights_path(name)
        pretrained.check_shipped(name.partition(".")[0], {"file": str(file)})
        card = read_card(file)
    else:
        file = weights_in(name)
        if not file.is_file():
            open_model(name)  # says what is wrong, with the names of what is shipped
        card = read_card(file)
        name = f"{card['model']}.{Path(card.get('dataset', 'custom')).name}"
        card.setdefault("recipe", read_recipe(file.parent))
    model = open_model(file).model
    card["license"] = args.license or card.get("license")  # nobody else says for which use somebody's weights are
    label_names = card.get("class_names")
    # The configuration is that of the model's default weights, unless these are they.
    own_cfg = {
        "tag": name.partition(".")[2],
        "description": f"{card['model']} trained on {card.get('dataset', 'unknown data')} by capszoo",
        "license": card["license"],
        "label_names": label_names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights, config_file = folder / "model.safetensors", folder / "config.json"
    write_hub_weights(file, model, weights)
    own_cfg["notes"] = [f"sha256 {pretrained.sha256_of(weights)}"]
    # Half precision saves space in the file; transformers would also compute in it.
    facts = {"label_names": label_names, "pretrained_cfg": own_cfg, "dtype": "float32"}
    save_config_for_hf(model, config_file, model_config=facts)
    config = read_json(config_file, {}, "run again")
    config["model_args"].pop("num_classes", None)  # of the root, where transformers and timm look for it
    write_json(config_file, config)
    (folder / "README.md").write_text(model_card(name, card, capszoo.model_info(model)), encoding="utf-8")
    print(f"{folder}: {name}, load it with capszoo.create_model('local-dir:{folder}', pretrained=True)")
    if not card["license"]:
        print("it names no licence, before you publish it: give --license")
    return 0


def write_hub_weights(file: Path, model: nn.Module, path: Path) -> None:
    """Write the weights of `file`, which `model` holds, under exactly the names of the model's state dict.

    That is the file itself, byte for byte, unless it is older than the scales of convolutions, or holds a decoder that
    the model was opened without: transformers fills in what is missing by its own initialisation.
    """
    tensors, header = load_tensors(file)
    own = model.state_dict()
    if tensors.keys() == own.keys():
        shutil.copyfile(file, path)
        return
    for key, value in own.items():
        smaller = value.to(tensors[key].dtype) if key in tensors else value
        own[key] = smaller if torch.equal(smaller.to(value.dtype), value) else value
    save_tensors(path, own, {key: value for key, value in header.items() if key != "precision"})


def aoti(args: argparse.Namespace) -> int:
    """Write a compiled package."""
    opened = open_model(args.weights, decoder=False)
    model = opened.model.to(choose_device(args.device))
    header = model_header(
        model, **{key: opened.header[key] for key in ("class_names", "dataset") if key in opened.header}
    )
    difference = compile_package(args.output, model, plain=args.plain, **header)
    needs = "PyTorch alone" if args.plain else "import capszoo before it is loaded"
    print(f"{args.output}: {opened.name}, scores within {difference:.1g} of the model's; needs {needs}")
    return 0


def kernels(args: argparse.Namespace) -> int:
    """Write the project of the operators."""
    files = write_kernel(args.folder, args.repo_id)
    print(f"{args.folder}: {len(files)} files, build them there with: kernel-builder build-and-copy")
    return 0


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    return {"ship": ship, "hub": hub, "aoti": aoti, "kernels": kernels}[args.job](args)


if __name__ == "__main__":
    run(main)
