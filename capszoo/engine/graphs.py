"""Training steps captured as CUDA graphs."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# Steps taken one operator at a time before one is captured: kernels are compiled and tuned in them, which a capture
# does not allow.
_STEPS_BEFORE_CAPTURE = 3


class CaptureError(RuntimeError):
    """A step that cannot be captured."""


class CapturedStep:
    """A training step for batches of one size: the first few as they are, one captured, all others replayed."""

    def __init__(self, step: Callable[..., None], batch_size: int):
        self.step = step
        self.batch_size = batch_size
        self.count = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, *batch: Tensor) -> None:
        """Take one step with a batch's tensors; raises CaptureError, the step not taken, if it cannot be captured."""
        if self.count < _STEPS_BEFORE_CAPTURE:
            self.count += 1
            with warnings.catch_warnings():
                # torch tells the optimizer's first step that it is not captured: so far, on purpose.
                warnings.filterwarnings("ignore", message=".*capturable=True.*")
                _on_side_stream(lambda: self.step(*batch))
            return
        if self.replay is None:
            # What a replay reads and writes stays where it was at the capture.
            self.batch = [torch.empty_like(some).copy_(some) for some in batch]
            self.replay = _capture(lambda: self.step(*self.batch))
        else:
            for kept, some in zip(self.batch, batch, strict=True):
                kept.copy_(some)
        self.replay()


def _on_side_stream(step: Callable[[], None]) -> None:
    """Run a step on a stream of its own, as torch asks for of the steps before a capture."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()
    current.wait_stream(side)


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of a step without running them; what is returned runs them."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as those that pin memory of the loader, may go on as they like.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        raise CaptureError(str(error).splitlines()[0]) from error
    return graph.replay
