"""Learning-rate and batch-size policies: formulas, for any training loop.

A policy answers two questions: which batch size in this epoch, and which learning rate at this step. It holds no
optimizer, loader or counter; the same question has the same answer in any order, so a resumed run just asks again:

    policy = create_policy("warm_ada_batch", lr=1e-3, batch_size=128, epochs=100, num_images=60000)
    for epoch in range(policy.epochs):
        loader = make_loader(policy.batch_size(epoch))
        for step, batch in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = policy.lr(policy.progress(epoch, step))
            ...

Formulas: "FasTrCaps: An Integrated Framework for Fast yet Accurate Training of Capsule Networks", section on training
policies, https://arxiv.org/abs/1905.10142. Where they came from: one cycle, https://arxiv.org/abs/1708.07120; warm
restarts, https://arxiv.org/abs/1608.03983; AdaBatch, https://arxiv.org/abs/1712.02029; the learning-rate finder,
https://arxiv.org/abs/1506.01186.

Units: `step` counts optimizer steps from 0; `epoch` counts passes over the data from 0, where the paper counts from 1;
a batch is all images of one optimizer step, over all devices together, and the last of an epoch may be short. A phase
is a stretch of epochs with one batch size and, where the policy restarts, one cycle of the learning rate.
"""

from .base import Phase, Policy, Progress
from .finder import LRFinder, suggest_lr
from .names import create_policy, list_policies, policy_options
from .schedules import AdaBatch, ExpDecay, Fixed, OneCycle, WarmAdaBatch, WarmRestarts

__all__ = [
    "AdaBatch",
    "ExpDecay",
    "Fixed",
    "LRFinder",
    "OneCycle",
    "Phase",
    "Policy",
    "Progress",
    "WarmAdaBatch",
    "WarmRestarts",
    "create_policy",
    "list_policies",
    "policy_options",
    "suggest_lr",
]
