"""What tests of exported models share: programs and ONNX files whose batch size is open."""

import inspect
import warnings

import torch

import capszoo

# The newer exporter of torch 2.7 does not say that it runs, and is kept from the fused operators by hand.
ONNX_SAYS_SO = "_is_onnx_exporting" in inspect.getsource(torch.onnx.is_in_onnx_export)


def batches_like(x):
    """Batches of other sizes than that of `x` [B, ...], made of its images."""
    return x, torch.cat([x, x.flip(-1), x[:1]]), x[:1]


def check_export(model, x, **options):
    """torch.export keeps the batch size open, and the numbers."""
    batch = ({0: torch.export.Dim("batch", min=1, max=2**30)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=batch, **options).module()
    for images in batches_like(x):
        torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-5)


def check_onnx(model, x, path):
    """So does ONNX, by the newer exporter and as onnxruntime computes it; the fused operators are not in the file."""
    with warnings.catch_warnings(), capszoo.set_fused_routing(ONNX_SAYS_SO):
        warnings.simplefilter("ignore")  # the exporters deprecate each other
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    for images in batches_like(x):
        found = torch.from_numpy(run_onnx(path, images))
        torch.testing.assert_close(found, model(images).detach(), rtol=0, atol=1e-5)


def run_onnx(path, x):
    """The first output of an ONNX file for its only input."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
