"""What the page shows of a network and an image: from pixels to scores, capsules, reconstruction and couplings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capszoo import inspect
from capszoo.contract import HasCapsules, decoder_of, has_couplings, to_probabilities
from capszoo.engine.task import Normalization
from capszoo.errors import InspectionError, UsageError
from capszoo.opening import OpenedModel
from capszoo.prediction import class_names_of

__all__ = ["Drawing", "Looking", "Network"]

# Tensors that `Looking` gives, in its order; a network without capsules or couplings gives the first of them.
OUTPUTS = ("scores", "capsules", "shares", "presence")


class Looking(nn.Module):
    """A network as a function of pixels: what the server computes, and what the static page has as an ONNX graph.

    Args:
        model: The network, in evaluation mode.
        parts: Whether to give couplings of the parts of an image, which it must have.
    """

    def __init__(self, model: Any, parts: bool):
        super().__init__()
        self.model, self.parts = model, parts
        self.has_capsules = bool(model.capsule_layers()) and isinstance(model, HasCapsules)
        self.normalization = Normalization(model, next(model.parameters()).device)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Look at pixels ``[B, C, H, W]`` in [0, 1].

        Returns:
            As far as the network has them: scores ``[B, J]`` from 0 to 1; the class capsules ``[B, J, D]``; shares
            ``[R, B, P, J]`` and presence ``[B, P]`` of :func:`capszoo.inspect.place_couplings`.
        """
        model: Any = self.model
        x = self.normalization(pixels)
        if not self.has_capsules:
            return (to_probabilities(model, model(x).float()),)
        capsules, scores = model.forward_capsules(x)
        found = to_probabilities(model, scores.float()), capsules.flatten(2)
        return (*found, *inspect.couplings_by_place(model, x)) if self.parts else found


class Drawing(nn.Module):
    """The decoder of a network as a function of flat class capsules.

    Args:
        decoder: The decoder.
        shape: Of a class capsule.
    """

    def __init__(self, decoder: nn.Module, shape: Sequence[int]):
        super().__init__()
        self.decoder, self.shape = decoder, tuple(shape)

    def forward(self, capsules: Tensor, target: Tensor) -> Tensor:
        """Draw pixels ``[B, C, H, W]`` from class capsules ``[B, J, D]`` and the classes ``[B]`` to draw."""
        return self.decoder(capsules.unflatten(2, self.shape), target).float().clamp(0, 1)


class Network:
    """A network to explore.

    Args:
        opened: The model with its weights; it is put into evaluation mode.
        device: Where it computes.

    Raises:
        UsageError: If no image that can be drawn has its channels, or it has no classes.
    """

    def __init__(self, opened: OpenedModel, device: torch.device | str = "cpu"):
        model: Any = opened.model.to(device).eval().requires_grad_(False)
        if not model.num_classes:
            raise UsageError(f"{opened.name!r} has no classes to explore: use other weights")
        if model.in_chans not in (1, 3):
            raise UsageError(f"{opened.name!r} takes images of {model.in_chans} channels: nobody can draw such images")
        # Pages are shown to others: of a file's path they say the folder of the run, or its own name.
        file = opened.file
        short = file.parent.name if file.stem in ("best", "last", "model") and file.parent.name else file.name
        self.model, self.name, self.dataset = model, opened.name.replace(str(file), short), opened.dataset
        self.shape = (model.in_chans, *model.img_size)
        self.device = torch.device(device)
        self.classes = class_names_of(model)
        self.centers = _centers_of(model)
        self.looking = Looking(model, parts=bool(self.centers))
        capsules: Tensor | None = None
        self.score = "probability" if getattr(model, "returns_logits", False) else "score"
        if self.looking.has_capsules:
            with torch.inference_mode():
                capsules, scores = model.forward_capsules(torch.full((1, *self.shape), 0.5, device=device))
            if self.score == "score":  # matrix capsules are poses, and their activations no lengths
                is_length = torch.allclose(capsules.flatten(2).norm(dim=2).float(), scores.float(), atol=1e-3)
                self.score = "length" if is_length else "activation"
        self.dims = 0 if capsules is None else capsules[0, 0].numel()
        decoder = decoder_of(model)
        self.drawing = None if decoder is None or capsules is None else Drawing(decoder, capsules.shape[2:])

    def describe(self) -> dict[str, Any]:
        """What the page must know, as JSON holds it.

        `name`, `dataset`, `parameters`; `classes`, their names; `shape` [C, H, W] of the images; `dims`, the numbers of
        a class capsule, 0 without; `draws`, whether it has a decoder; `centers` [row, column] in pixels of the parts
        that vote, none where the network has no couplings or they have no place; `score`, what a score is.
        """
        return {
            "name": self.name,
            "dataset": self.dataset,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "classes": self.classes,
            "shape": list(self.shape),
            "dims": self.dims,
            "draws": self.drawing is not None,
            "centers": [[round(value, 2) for value in center] for center in self.centers],
            "score": self.score,
        }

    @torch.inference_mode()
    def look(self, pixels: Sequence[int], target: int | None = None) -> dict[str, Any]:
        """Look at an image.

        Args:
            pixels: Its C * H * W numbers from 0 to 255, by channel, then row by row.
            target: Class whose capsule is drawn; that of the highest score if None.

        Returns:
            Lists by name, as far as the network has them; `scores` [J], `target`, `capsules` [J * D], `drawn`, the
            reconstruction as C * H * W numbers from 0 to 255, `shares` [R][P][J], `presence` [P].
        """
        x = torch.tensor(pixels, dtype=torch.float32, device=self.device).view(1, *self.shape) / 255
        found = dict(zip(OUTPUTS, self.looking(x), strict=False))
        if target is None:
            target = int(found["scores"].argmax())
        answer: dict[str, Any] = {"scores": _rounded(found["scores"][0]), "target": target}
        if "capsules" in found:
            answer["capsules"] = _rounded(found["capsules"].flatten())
            answer["drawn"] = self._draw(found["capsules"], target)
        if "shares" in found:
            answer["shares"] = [[_rounded(row) for row in iteration] for iteration in found["shares"][:, 0]]
            answer["presence"] = _rounded(found["presence"][0])
        return answer

    @torch.inference_mode()
    def draw(self, capsules: Sequence[float], target: int) -> dict[str, Any]:
        """Draw what class capsules encode.

        Args:
            capsules: Their J * D numbers.
            target: Class whose capsule is drawn.

        Returns:
            `drawn`, as of :meth:`look`.

        Raises:
            InspectionError: If the network has no decoder.
        """
        if self.drawing is None:
            raise InspectionError(f"{self.name!r} has no decoder to draw with: use weights that have one")
        flat = torch.tensor(capsules, dtype=torch.float32, device=self.device)
        return {"drawn": self._draw(flat.view(1, len(self.classes), self.dims), target)}

    def _draw(self, capsules: Tensor, target: int) -> list[int] | None:
        if self.drawing is None:
            return None
        drawn = self.drawing(capsules, torch.tensor([target], device=self.device))
        return (drawn.flatten() * 255).round().int().tolist()


def _centers_of(model: Any) -> list[list[float]]:
    if not has_couplings(model):
        return []
    try:
        centers = inspect.place_centers(model).tolist()
    except InspectionError:  # capsules of the whole image have no place in it
        return []
    return centers if len(centers) > 1 else []  # one place is the whole image, too


def _rounded(values: Tensor) -> list[float]:
    """Numbers that are short to send, and finite: JSON has no others."""
    return [round(value, 6) for value in values.float().nan_to_num().tolist()]
