"""What `--amp auto` takes, on processors and GPUs that are pretended."""

import platform

import pytest
import torch

from capszoo.command_line.main import main
from capszoo.kernels import processor
from capszoo.precision import explain_auto, resolve_amp, time_precisions

CPU = torch.device("cpu")
ZEN_5 = "AuthenticAMD", 26


@pytest.fixture
def pretend(monkeypatch):
    """Pretend a processor; forget it afterwards."""

    def forget():
        for function in (processor.matrix_unit_problem, processor.has_matrix_units):
            function.cache_clear()

    def make(
        machine="x86_64", amx=True, vectors=True, allowed=True, onednn=True, limit=None, family=("GenuineIntel", 6)
    ):
        forget()
        monkeypatch.setattr(processor, "family", lambda: family)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        features = {"amx_bf16": amx, "amx_tile": amx}
        if hasattr(torch.cpu, "get_capabilities"):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    yield make
    forget()


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        ({}, torch.bfloat16, "AMX multiplies its matrices"),
        ({"limit": "AVX10_1_512_AMX"}, torch.bfloat16, "AMX"),
        ({"amx": False}, None, "avx512_bf16 alone is slower"),
        ({"amx": False, "vectors": False}, None, "no AMX"),
        ({"allowed": False}, None, "operating system"),
        ({"onednn": False}, None, "oneDNN"),
        ({"limit": "avx512_core_bf16"}, None, "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"),
        ({"amx": False, "family": ZEN_5}, torch.bfloat16, "AMD"),
        ({"amx": False, "family": ("AuthenticAMD", 25)}, None, "avx512_bf16 alone is slower"),
        ({"amx": False, "family": ZEN_5, "vectors": False}, None, "no AMX"),
        ({"amx": False, "family": ZEN_5, "onednn": False}, None, "avx512_bf16 alone is slower"),
        ({"amx": False, "family": ZEN_5, "limit": "AVX2"}, None, "avx512_bf16 alone is slower"),
        ({"machine": "aarch64"}, None, "not measured on aarch64"),
        ({"machine": ""}, None, "not measured on this processor"),
    ],
)
def test_auto_on_processors(pretend, kind, dtype, why):
    pretend(**kind)
    found, reason = explain_auto(CPU)
    assert found is dtype and why in reason and resolve_amp("auto", CPU) is dtype
    assert processor.has_matrix_units() == ("AMX" in why and dtype is not None)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_gpus(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert resolve_amp("auto", torch.device("cuda")) is dtype


def test_auto_elsewhere():
    assert resolve_amp("auto", torch.device("mps")) is None


def test_small_steps_are_timed():
    times = time_precisions(CPU, seconds=0.01)
    assert times.keys() == {None, torch.bfloat16} and all(0 < value < 10 for value in times.values())


@pytest.mark.parametrize(
    ("amx", "ratio", "expected"),
    [(True, 0.5, None), (True, 1.5, "try --amp none"), (False, 0.5, "try --amp bf16"), (False, 1.5, None),
     (False, 0.9, None)],
)  # fmt: skip
def test_doctor_says_what_auto_takes_and_what_is_faster(pretend, monkeypatch, capsys, amx, ratio, expected):
    pretend(amx=amx)
    from capszoo.command_line import main as module

    monkeypatch.setattr(module, "time_precisions", lambda device: {None: 1.0, torch.bfloat16: ratio})
    assert main(["doctor"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["precision on cpu"].strip().startswith("bfloat16: AMX" if amx else "float32: no AMX")
    told = lines["bfloat16 on cpu"]
    assert f"takes {ratio:.2f} times as long as in float32" in told
    assert told.endswith(expected) if expected else "--amp" not in told
