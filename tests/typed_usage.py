"""What a user's program sees of the types; mypy checks it (.ci/run), nothing runs it."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import capszoo
from capszoo.data import DataSplits, Loader, load_data
from capszoo.engine import Evaluation, Trainer, evaluate
from capszoo.engine.task import CapsuleTask
from capszoo.explore import Solution, pareto_front
from capszoo.kernels import dynamic_routing, squash
from capszoo.layers import ClassCaps, Decoder, PrimaryCaps
from capszoo.losses import margin_loss, reconstruction_loss, spread_loss
from capszoo.models import CapsNet
from capszoo.policies import Policy, create_policy
from capszoo.prune import PruneReport, cost, prune

model = capszoo.create_model("capsnet_tiny", num_classes=10, decoder=True)
assert_type(model, nn.Module)
assert_type(capszoo.list_models(), list[str])
assert_type(capszoo.list_pretrained("capsnet*"), list[str])
assert_type(capszoo.model_info(model).parameters, int)
assert_type(capszoo.load_model("runs/NAME/best.safetensors"), nn.Module)

network = CapsNet(num_classes=3, img_size=28)
assert_type(network.primary_caps, PrimaryCaps)
assert_type(network.class_caps, ClassCaps)
assert_type(network.decoder, Decoder | None)
capszoo.save_model("model.safetensors", model, class_names=["cat", "dog"])

images, labels = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
lengths = dynamic_routing(torch.rand(2, 6, 4), torch.rand(6, 4, 3, 5), torch.rand(3, 5), num_iters=3).norm(dim=-1)
assert_type(squash(images), Tensor)
for loss in (margin_loss(lengths, labels), spread_loss(lengths, labels), reconstruction_loss(images, images)):
    assert_type(loss, Tensor)

data = load_data("digits")
assert_type(data, DataSplits)
policy = create_policy("one_cycle", lr=1e-3, batch_size=16, epochs=3, num_images=len(data.train))
assert_type(policy, Policy)
assert_type(policy.batch_size(0), int)
assert_type(policy.lr(policy.progress(0, 0)), float)
task = CapsuleTask(model)
trainer = Trainer(task, torch.optim.Adam(model.parameters()), policy, data.train, data.val)
assert_type(trainer.fit(), bool)
measured = evaluate(model, Loader(data.test, 256, "cpu"))
assert_type(measured, Evaluation)
assert_type(measured.top1, float)
assert_type(measured.confusion, Tensor | None)
assert_type(measured.mean_average_precision, float | None)

smaller, report = prune(network, {"types": 0.5})
assert_type(smaller, CapsNet)
assert_type(report, PruneReport)
assert_type(cost(smaller).macs, int)
solutions: list[Solution] = []
assert_type(pareto_front(solutions, ["accuracy", "seconds"]), list[Solution])
