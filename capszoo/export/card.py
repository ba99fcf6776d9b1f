"""The card of a model folder for the Hugging Face hub."""

from pathlib import Path
from typing import Any

from capszoo.costs import ModelInfo

__all__ = ["model_card"]

# Names of the data sets on the Hugging Face hub.
HUB_DATASETS = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
}


def model_card(name: str, card: dict[str, Any], info: ModelInfo) -> str:
    """The README.md of a model folder: YAML for the hub, and what a reader wants to know."""
    import yaml

    dataset, top1 = card.get("dataset"), card.get("test_top1")
    dataset = None if dataset is None else Path(str(dataset)).name  # a folder of images may be given by its path
    front: dict[str, Any] = {
        "library_name": "timm",
        "tags": ["image-classification", "timm", "capszoo", "capsule-network"],
        **({"license": card["license"]} if card["license"] else {}),
        "pipeline_tag": "image-classification",
    }
    if dataset is not None:
        hub_dataset = HUB_DATASETS.get(dataset, dataset)
        front["datasets"] = [hub_dataset]
    precision = card.get("test_mean_average_precision")  # of images that show several classes
    metric, accuracy = ("accuracy", "top-1") if precision is None else ("exact_match", "exact-match accuracy")
    front["metrics"] = [metric]
    if dataset is not None and top1 is not None:
        front["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": hub_dataset, "name": dataset, "split": "test"},
                        "metrics": [{"type": metric, "value": round(top1, 6)}],
                    }
                ],
            }
        ]
    channels, height, width = info.input_size
    pixels = "pixels in [0, 1]"
    if "mean" in card and "std" in card and (card["mean"], card["std"]) != ([0.0], [1.0]):
        mean, std = (", ".join(f"{value:.4f}" for value in card[key]) for key in ("mean", "std"))
        pixels += f", normalised by mean {mean} and standard deviation {std}"
    facts = [
        ("Parameters", f"{info.parameters:,}"),
        ("MACs", f"{info.macs / 1e6:.1f} M"),
        ("Image size", f"{height} x {width}, {channels} channel{'s' if channels > 1 else ''}, {pixels}"),
        ("Data set", dataset),
        (f"Test {accuracy} (float32)", None if top1 is None else f"{top1:.4f}"),
        ("Test mean average precision (float32)", None if precision is None else f"{precision:.4f}"),
        (f"Validation {accuracy} (float32)", f"{card['eval_top1']:.4f}" if "eval_top1" in card else None),
        ("Epochs", card.get("epochs")),
        ("Seed", card.get("seed")),
        ("Recipe", f"`{card['recipe']}`" if card.get("recipe") else None),
        ("capszoo", card.get("capszoo_version")),
        ("Date", card.get("date")),
        ("Licence", card["license"]),
    ]
    lines = "\n".join(f"- **{key}:** {value}" for key, value in facts if value is not None)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {name}

A model of capszoo, capsule networks for timm. Importing capszoo registers the architecture with timm.

{lines}

```python
import capszoo, timm, torch

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
scores = model(torch.rand(1, {channels}, {height}, {width}))  # the largest is the class
```
"""
