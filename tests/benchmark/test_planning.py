"""capszoo.benchmark.planning: what is measured, and in which order."""

import torch

from capszoo.benchmark.planning import SUBJECTS, Scope, plan
from capszoo.benchmark.steps import own_variants


def test_order_on_a_gpu_begins_with_what_matters():
    scope = Scope(
        device=torch.device("cuda", 0),
        amp=torch.bfloat16,
        models=["capsnet_tiny", "capsnet_ws", "capsnet"],
        batch_sizes=[1, 128, 1024],
        compile_batch_sizes=[128],
        subjects=SUBJECTS,
    )
    groups = plan(scope, ["float32", "tf32", "bfloat16"])  # float16 had wrong numbers, say
    names = [group.name for group in groups]
    assert names[:6] == [
        "routing capsnet_ws 128 float32",
        "routing capsnet 128 float32",
        "routing capsnet_tiny 128 float32",
        "training step capsnet_ws 128 bfloat16",
        "training step capsnet 128 bfloat16",
        "routing large 128 float32",
    ]
    assert list(groups[3].makers) == ["fused", "plain", "compiled", "none", "reference"]
    assert "compiled" not in {variant for group in groups if "1024" in group.name for variant in group.makers}
    assert names.index("epoch capsnet_ws 128 bfloat16") < names.index("inference capsnet_ws 128 bfloat16")
    assert names.index("routing capsnet 128 tf32") < names.index("routing capsnet_ws 1 float32")
    assert names[-1] == "inference capsnet_tiny 1024 bfloat16" and "routing capsnet 128 float16" not in names
    ways = [(group.name, group.graph) for group in groups]
    assert len(set(ways)) == len(ways)
    assert [name for name, graph in ways if not graph] == [
        "routing large 128 float32",
        *(f"routing {name} 128 float32" for name in ("capsnet_ws", "capsnet", "capsnet_tiny")),
    ]


def test_families_of_another_routing_have_forms_of_their_own_to_compare():
    names = ["efficient_capsnet", "capsnet_vb_mini", "cnn_baseline_tiny"]
    scope = Scope(["training"], names, [4], [4], torch.device("cpu"), None)
    assert [list(group.makers) for group in plan(scope, ["float32"])] == [
        ["fused", "unfused", "uniform"],
        ["fused", "unfused", "uniform"],
        [variant for variant in ("fused", "direct") if variant in own_variants("cnn_baseline_tiny")],
    ]
