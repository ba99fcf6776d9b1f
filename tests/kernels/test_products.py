"""Products of matrices by either library against float64, and which processors take which."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.kernels import processor, products

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch is built without oneDNN",
)


def matrix(generator, n, rows, columns, transposed):
    shape = (n, columns, rows) if transposed else (n, rows, columns)
    values = torch.randn(shape, generator=generator)
    return values.transpose(1, 2) if transposed else values


@needs_onednn
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, limit) for limit in (3, 40, 40, 40))),
    transposed=st.tuples(st.booleans(), st.booleans()),
    gap=st.integers(0, 3),
    adds=st.booleans(),
    onednn=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact(sizes, transposed, gap, adds, onednn, seed):
    (n, M, K, N), generator = sizes, torch.Generator().manual_seed(seed)
    a, b = matrix(generator, n, M, K, transposed[0]), matrix(generator, n, K, N + gap, transposed[1])[..., :N]
    place = torch.full((M, N + gap), float("nan"))[:, :N]
    into = torch.randn(n, M, N, generator=generator) if adds else torch.full((n, M, N), float("nan"))
    expected = a.double() @ b.double() + (into.double() if adds else 0)
    size = a.double().abs() @ b.double().abs() + (into.double().abs() if adds else 0)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products, "TAKES_ONEDNN", onednn)
        patch.setattr(products, "MIN_PRODUCT", 0)
        patch.setattr(products, "MIN_ROWS", 0)
        single = products.product(a[0], b[0])
        assert products.product(a[0], b[0], out=place).data_ptr() == place.data_ptr()
        products.multiply(a, b, into, adds)
    assert adds or torch.equal(single, into[0]) or not onednn
    for result in (single, place):
        error = (result - a[0].double() @ b[0].double()).abs()
        assert (error <= 1e-6 * (a[0].double().abs() @ b[0].double().abs())).all()
    assert ((into - expected).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", ("AuthenticAMD", 26)),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n", ("GenuineIntel", 6)),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ("", 0)),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", ("AuthenticAMD", 26)),
        ("", ("", 0)),
    ],
)
def test_family(text, expected, monkeypatch):
    def read(path):
        if "Family" in text:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(processor.Path, "read_text", read)
    monkeypatch.setattr(processor.platform, "processor", lambda: text)
    assert processor.family.__wrapped__() == expected


@pytest.mark.parametrize(("vendor", "number", "taken"), [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False)])
@needs_onednn
def test_where_onednn_is_taken(vendor, number, taken, monkeypatch):
    monkeypatch.setattr(processor, "family", lambda: (vendor, number))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert products._takes_onednn() == taken
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not products._takes_onednn()


@pytest.mark.parametrize(
    ("M", "K", "N", "dtype", "taken"),
    [
        (148, 25, 7168, torch.float32, True),
        (10, 148, 71680, torch.float32, False),
        (148, 10, 71680, torch.float32, False),
        (30, 20, 6144, torch.float32, False),
        (576, 20736, 256, torch.bfloat16, False),
    ],
)
def test_which_products_are_onednns(M, K, N, dtype, taken, monkeypatch):
    monkeypatch.setattr(products, "TAKES_ONEDNN", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert products._is_faster(torch.empty(M, K, dtype=dtype, device="meta"), N) == taken
