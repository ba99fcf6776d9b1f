"""Size and cost of a network that is pruned."""

from dataclasses import dataclass

from torch import nn

from capszoo.costs import model_info

from .parts import check_model


@dataclass(frozen=True)
class Cost:
    """What a network costs to store and to run on one image.

    All but `parameters_with_decoder` are those of the class scores, to which the decoder contributes nothing.

    Attributes:
        parameters: Weights and biases without the decoder's, frozen ones included.
        parameters_with_decoder: All weights and biases.
        macs: Multiply-accumulate operations of one forward pass of one image.
        routing_macs: Those of the votes and the routing iterations among them.
        float32_bytes: Bytes of `parameters` at 4 bytes each.
        float16_bytes: Bytes of `parameters` at 2 bytes each.
    """

    parameters: int
    parameters_with_decoder: int
    macs: int
    routing_macs: int
    float32_bytes: int
    float16_bytes: int


def cost(model: nn.Module) -> Cost:
    """Count what a network costs.

    Raises:
        ValueError: If the model cannot be pruned.
    """
    check_model(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parameters = sum(size for name, size in sizes.items() if not name.startswith("decoder."))
    num_weights, caps_dim, num_classes, class_dim = model.class_caps.weight.shape
    num_iters = model.class_caps.routing.num_iters
    # Votes, agreements after all iterations but the last, weighted sums in each.
    per_capsule = num_classes * class_dim * (caps_dim + num_iters - 1 + num_iters)
    return Cost(
        parameters=parameters,
        parameters_with_decoder=sum(sizes.values()),
        macs=model_info(model.pretrained_cfg["architecture"], **model.arguments()).macs,
        routing_macs=model.class_caps.num_capsules * per_capsule,
        float32_bytes=4 * parameters,
        float16_bytes=2 * parameters,
    )
