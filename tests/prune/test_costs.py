"""Size and cost of networks before and after."""

import torch
from prune.networks import every_model, images, small
from torch.utils.flop_counter import FlopCounterMode

import capszoo
from capszoo.prune import PruneReport, cost, prune


@every_model
def test_costs(name):
    model = small(name, dtype=torch.float32)
    keep = {"conv1": 4, "capsules": (0, 1, 2, 9, 10, 18), "decoder": (3, 4)}
    smaller, report = prune(model, keep, "magnitude")
    for network, found in ((model, report.before), (smaller, report.after)):
        weights = [w for key, w in network.named_parameters() if not key.startswith("decoder.")]
        assert found.parameters == sum(map(torch.numel, weights))
        assert found.parameters_with_decoder == sum(map(torch.numel, network.parameters()))
        assert (found.float32_bytes, found.float16_bytes) == (4 * found.parameters, 2 * found.parameters)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.forward_features(images(1, torch.float32))  # convolutions alone
        capsules, iterations = network.class_caps.num_capsules, network.class_caps.routing.num_iters
        assert found.routing_macs == capsules * 3 * 5 * (4 + 2 * iterations - 1)
        assert found.macs == counter.get_total_flops() // 2 + found.routing_macs
        assert found == cost(network)
    assert smaller.class_caps.num_capsules == (9 if model.share_weights else 6)  # 3 + 2 + 1, filled up to 3 each
    text = str(report)
    assert isinstance(report, PruneReport) and f"{report.after.parameters:,}" in text and "routing macs" in text
    assert "capsules kept" in text and "3 and 4" in text


def test_costs_count_frozen_parameters():
    model = small().requires_grad_(False)
    assert cost(model) == cost(small())


def test_paper_size():
    model = capszoo.create_model("capsnet", decoder=True, device="meta")
    assert cost(model).parameters == 6_804_384 and cost(model).parameters_with_decoder == 8_215_728
    smaller, report = prune(model, {"types": range(8)})
    expected = capszoo.create_model("capsnet", keep_types=8, decoder=True, device="meta")
    assert report.after == cost(expected) and smaller.class_caps.num_capsules == 288
    assert report.after.routing_macs * 4 == report.before.routing_macs
