"""Capsule networks in Hugging Face transformers: importing this teaches its wrapper of timm what they need.

transformers loads a folder of `recipes/export.py hub` as any timm model, by its TimmWrapper, once capszoo is imported.
With this module imported as well

- images become grey or colour, as the model wants them (transformers gives every model colour images);
- weights that a folder does not have, such as those of other classes, begin as in a fresh model (transformers knows
  only how to initialise torch's own layers, and leaves other new weights as memory happens to be);
- the loss of labels is the model's own, such as the margin loss of lengths, so that `Trainer` fine-tunes by it.

Other timm models keep transformers' loss and initialisation.

```python
import capszoo.transformers
from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER", function_to_apply="none")
```
"""

from typing import Any

from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from .contract import HasCriterion, keeps_contract
from .data.decoding import to_channels
from .losses import MarginLoss

__all__ = ["CapsuleForImageClassification", "CapsuleImageProcessor"]


class CapsuleImageProcessor(TimmWrapperImageProcessor):
    """The image processor of timm's models, for models of one channel, too.

    Args:
        pretrained_cfg: timm's configuration of the weights; the first number of `input_size` is the channels.
        **kwargs: As transformers has them.
    """

    def __init__(self, pretrained_cfg: dict[str, Any], **kwargs: Any):
        super().__init__(pretrained_cfg, **kwargs)
        self.in_chans = int(self.data_config["input_size"][0])

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> Any:
        """Turn images (PIL, arrays, or lists of them) into `pixel_values` ``[B, C, H, W]``; tensors keep their C."""
        if not isinstance(images, Tensor):
            images = [to_channels(to_pil_image(image), self.in_chans) for image in make_flat_list_of_images(images)]
        return super().preprocess(images, return_tensors)


def _said_of_images(config: TimmWrapperConfig) -> dict[str, Any]:
    """What a folder's configuration says of images and classes."""
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    cfg = config.pretrained_cfg or {}
    said = {key: tuple(value) if isinstance(value := cfg[key], list) else value for key in keys if key in cfg}
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if names != [f"LABEL_{index}" for index in range(len(names))]:  # of which transformers knows nothing
        said["label_names"] = tuple(names)
    return said


class CapsuleForImageClassification(TimmWrapperForImageClassification):
    """A timm model in transformers; one of capszoo's has its own loss and initialisation.

    Args:
        config: transformers' configuration of a timm model.
    """

    def __init__(self, config: TimmWrapperConfig):
        super().__init__(config)
        model = self.timm_model
        if keeps_contract(type(model)):
            # transformers makes the model by its arguments alone; without these, what is saved of it would be used with
            # images that are normalised otherwise.
            cfg = {**model.pretrained_cfg, **_said_of_images(config)}
            model.pretrained_cfg = model.default_cfg = cfg
            self.criterion = model.default_criterion() if isinstance(model, HasCriterion) else MarginLoss()
            self.loss_function = self._loss

    def _loss(self, labels: Tensor, logits: Tensor, config: Any, **kwargs: Any) -> Tensor:
        """The model's own loss, in this module's mode."""
        return self.criterion(logits, labels)

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        # What has been loaded is marked, and torch.nn.init leaves it alone for the time being.
        loaded = all(getattr(value, "_is_hf_initialized", False) for value in module.parameters(recurse=False))
        if not loaded and keeps_contract(type(self.timm_model)) and hasattr(module, "reset_parameters"):
            module.reset_parameters()


AutoModelForImageClassification.register(TimmWrapperConfig, CapsuleForImageClassification, exist_ok=True)
AutoImageProcessor.register(
    TimmWrapperConfig,
    image_processor_classes=dict.fromkeys(("pil", "torchvision"), CapsuleImageProcessor),
    exist_ok=True,
)
