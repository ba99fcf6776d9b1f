"""Packages of AOTInductor: a model compiled ahead of time, in one file."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capszoo.errors import UsageError, first_line
from capszoo.files import check_target, write_atomically
from capszoo.layers import set_fused_routing
from capszoo.modes import evaluation_mode

__all__ = ["compile_package"]

# Between compiled and eager scores, where both compute in float32.
_TOLERANCE = 1e-4


def compile_package(path: str | Path, model: nn.Module, /, *, plain: bool = False, **metadata: Any) -> float:
    """Compile a model for its device, and write it as a package that takes batches of any size.

    `torch._inductor.aoti_load_package(path)` gives the function from images ``[B, C, H, W]`` to scores ``[B, J]``. The
    package calls the operators of capszoo, so that a process needs `import capszoo` before it loads one; the plain form
    computes the same by PyTorch's operators alone, and needs neither capszoo nor Python.

    Args:
        path: File to write, NAME.pt2; its folder must exist.
        model: The model; it is compiled in eval mode, and left in the mode that it is in.
        plain: Without the operators of capszoo.
        **metadata: Facts that the loaded package's `get_metadata()` gives; other values than strings become JSON.

    Returns:
        The largest difference between scores of the package and of the model, for three random batches.

    Raises:
        UsageError: If the file is not named .pt2, its folder is not there or may not be written to, there is no C++
            compiler that works, or scores differ by more than 1e-4.
        WriteError: If the file cannot be written.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if Path(path).suffix != ".pt2":
        raise UsageError(f"{str(path)!r} is no name of a package: end it with .pt2")
    check_target(path, "package")
    parameter = next(model.parameters())
    network: Any = model
    shape = (network.in_chans, *network.img_size)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, *shape, generator=generator).to(parameter) for count in (2, 5, 1)]
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    try:
        with (
            evaluation_mode(model),
            tempfile.TemporaryDirectory() as folder,
            torch.no_grad(),
            set_fused_routing(not plain),
        ):
            batch = ({0: torch.export.Dim("batch", min=1, max=2**30)},)
            program = torch.export.export(model, (batches[0],), dynamic_shapes=batch)
            made = aoti_compile_and_package(
                program,
                package_path=str(Path(folder) / "model.pt2"),
                inductor_configs={"aot_inductor.metadata": facts},
            )
            package = aoti_load_package(made)
            differences = [(package(images) - model(images)).abs().max() for images in batches]
            largest = torch.stack(differences).max().item()
            if not largest <= _TOLERANCE:
                raise UsageError(
                    f"scores of the package differ by {largest:.2g} from the model's: compile it on a machine "
                    "with another compiler, or with another PyTorch"
                )
            write_atomically(path, lambda temporary: shutil.copyfile(made, temporary))
    except (CppCompileError, InvalidCxxCompiler) as error:
        raise UsageError(
            f"the package cannot be compiled ({first_line(error)}): install g++, or name a C++ compiler in CXX"
        ) from None
    return largest
