"""What the CUDA backend refuses, where it is chosen, and why it is missing; no GPU is needed."""

from __future__ import annotations

import functools
from dataclasses import replace
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ops import ALL, CUDA_OPS, HALVES, NORMS, SKIPPED, OnGpu, arguments_of, moved, native
from inputs import arguments_for, attention_arguments, moved_to, randn
from pruned_ops.ops.backends import cuda, gpu
from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.registry import BACKENDS, OPS, Backend, Kernel
from pruned_ops.runtime import graph_inputs


@pytest.fixture(autouse=True)
def _a_chip_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: (8, 0))


def on_gpu(op: str, dtype: torch.dtype, device: str = "cuda:0", **sizes: int) -> list[Any]:
    """The op's arguments on a GPU that need not be here."""
    arguments = arguments_of(op, dtype, **sizes)
    return [OnGpu(one, device) if isinstance(one, Tensor) else one for one in arguments]


def refusal(op: str, arguments: list[Any]) -> str | None:
    return OPS[op].kernels["cuda"].refuse(*arguments)


@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_dtypes_that_cuda_takes(op: str) -> None:
    for dtype in ALL if op in NORMS else HALVES:
        assert refusal(op, on_gpu(op, dtype)) is None
    names = "fp32, fp16 and bf16" if op in NORMS else "fp16 and bf16"
    others = [torch.float64] if op in NORMS else [torch.float32, torch.float64]
    for dtype in others:
        assert refusal(op, on_gpu(op, dtype)) == f"a tensor is {dtype}; {names} are taken"


@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_devices_that_cuda_takes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_gpu(op, torch.float16)
    assert (
        refusal(op, moved_to("cpu", arguments_of(op, torch.float16), torch.float16))
        == "a tensor is on cpu, the kernel takes tensors on cuda"
    )
    elsewhere = [arguments[0], *on_gpu(op, torch.float16, "cuda:1")[1:]]
    assert refusal(op, elsewhere) == "the tensors are on several devices: cuda:0, cuda:1"
    monkeypatch.setattr(gpu, "capability", lambda device: (7, 5))
    assert refusal(op, arguments) == "this GPU is sm_75, the kernels need sm_80 or later"


def test_the_sizes_that_cuda_takes() -> None:
    qkv, bounds, longest, _ = on_gpu("attention", torch.float16)
    assert refusal("attention", [qkv, bounds, longest, 16]) == "head_dim is 16, the kernel takes 32, 64, 128"
    for op in ("add_layer_norm", "linear_add_layer_norm", "embed_layer_norm"):
        wide = on_gpu(op, torch.float16, tokens=2, hidden=8193)
        assert refusal(op, wide) == "hidden_size is 8193, the kernel takes at most 8192"
    mixed = on_gpu("linear_gelu", torch.float16)
    mixed[2] = on_gpu("linear_gelu", torch.bfloat16)[2]
    dtypes = "torch.bfloat16, torch.float16"
    assert refusal("linear_gelu", mixed) == f"the tensors are of several dtypes: {dtypes}"


@pytest.mark.parametrize("op", CUDA_OPS)
def test_cuda_is_asked_last(op: str) -> None:
    """Nothing is known yet of shapes at which it is faster than Triton."""
    assert list(OPS[op].kernels)[-1] == "cuda" and list(BACKENDS)[-2:] == ["triton", "cuda"]


@pytest.mark.parametrize("op", CUDA_OPS)
def test_cuda_runs_where_triton_does_not(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_gpu(op, torch.float16)
    own = OPS[op].kernels["cuda"]
    willing = replace(own, backend=replace(own.backend, missing=None))
    triton = Kernel(Backend("triton", None, ""), own.launch, lambda *_: None)
    for other, chosen in (
        (triton, "triton"),
        (replace(triton, refuse=lambda *_: "not this shape"), "cuda"),
        (replace(triton, backend=replace(triton.backend, missing="not installed")), "cuda"),
    ):
        # In the order of registration, also where Triton is not installed.
        first = {name: kernel for name, kernel in OPS[op].kernels.items() if name not in ("triton", "cuda")}
        monkeypatch.setattr(OPS[op], "kernels", {**first, "triton": other, "cuda": willing})
        selected = OPS[op].select(*arguments)
        assert selected is not None and selected.backend.name == chosen
    unwilling = on_gpu(op, torch.float64)
    assert OPS[op].select(*unwilling) is None


def test_triton_refuses_where_it_cannot_start_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a C compiler or Python's headers: CUDA's kernels run then, and torch's load the graphs."""
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        asked = 0

        @property
        def active(self) -> Any:
            self.asked += 1
            raise CalledProcessError(1, ["gcc"])

    driver = Driver()
    monkeypatch.setattr(runtime, "driver", driver)
    monkeypatch.setattr(launch, "INTERPRETING", False)
    once = functools.lru_cache(launch.cannot_start.__wrapped__)
    for module in (launch, graph_inputs):
        monkeypatch.setattr(module, "cannot_start", once)
    arguments = on_gpu("linear_gelu", torch.float16)
    for _ in range(2):
        assert "'gcc'" in str(launch.refuse(*arguments)) and "apt install gcc" in str(once())
    monkeypatch.setitem(BACKENDS, "triton", Backend("triton", None, ""))
    assert graph_inputs._loading_kernel(torch.device("cuda", 0)) is None and driver.asked == 1


def test_why_cuda_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CPU", replace(cuda.CPU, missing="it was never built"))
    monkeypatch.setattr(cuda, "extension", None)
    assert cuda._missing() == "it was never built"
    built = {"cuda": {"version": "13.0", "architectures": "8.0"}}
    without = "the C++ extension was built without CUDA; where there is nvcc"
    for info, reason in (({}, without), ({"cuda": None}, without), (built, "torch sees no GPU")):
        monkeypatch.setattr(cuda, "extension", SimpleNamespace(build_info=lambda info=info: info))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        found = cuda._missing() or ""
        assert found.startswith(reason) and ("PRUNED_OPS_BUILD_CUDA=1 pip install" in found or info is built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda._missing() is None


def test_bench_ops_times_every_backend_that_takes_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each beside `ours`, which is the one that runs by itself."""
    import bench_ops
    from single_kernels.cases import Case

    op, arguments = OPS["linear_gelu"], arguments_for("linear_gelu")
    ran: list[str] = []

    def kernel(name: str, refuses: str | None = None) -> Kernel:
        def launch(*args: Any) -> Tensor:
            ran.append(name)
            return op.reference(*args)

        return Kernel(Backend(name, None, ""), launch, lambda *_: refuses)

    others = {"triton": kernel("triton"), "cuda": kernel("cuda"), "cpu": kernel("cpu", "not this")}
    for name, one in others.items():
        monkeypatch.setitem(BACKENDS, name, one.backend)
    monkeypatch.setattr(op, "kernels", others)
    runners = {"ours": lambda _: op(*arguments)}
    case = Case("linear_gelu", (37,), "some", (37, 56, 90), lambda: runners, 1.0, 1.0)
    found = bench_ops.ours_elsewhere(case, runners)
    assert list(found) == ["ours on cuda"]
    ran.clear()
    found["ours on cuda"]({})
    runners["ours"]({})
    assert ran == ["cuda", "triton"]


def refused_natively(op: str, arguments: list[Any], match: str) -> None:
    """By the extension itself, whoever calls it."""
    with pytest.raises(RuntimeError, match=f"{op}: {match}"):
        getattr(native(), op)(*arguments)


@SKIPPED
def test_what_the_cuda_ops_refuse() -> None:
    qkv, bounds, longest, _ = moved(attention_arguments((5, 3), 2, 32), torch.float16)
    refused_natively("attention", [qkv.float(), bounds, longest, 32], "the tensors are Float, the kernel")
    refused_natively(
        "attention", [qkv, bounds, longest, 48], "head_dim is 48, the kernel takes 32, 64 or 128"
    )
    refused_natively("attention", [qkv, bounds, longest, 128], "qkv has 192 columns, which is not a multiple")
    refused_natively("attention", [qkv[0], bounds, longest, 32], "qkv has 1 dimensions")
    refused_natively("attention", [qkv, bounds.long(), longest, 32], "cu_seqlens is Long, Int")
    refused_natively("attention", [qkv, bounds[:0], longest, 32], "cu_seqlens has shape")
    refused_natively("attention", [qkv, bounds, -1, 32], "max_seqlen is -1")
    far = qkv[:1].expand(2**31, 192)
    refused_natively("attention", [far, bounds, longest, 32], "the number of tokens is 2147483648")
    # Of 2^16 blocks each, as if one held all tokens: 2^32, which is 0 in 32 bits.
    many = torch.zeros(2**16 + 1, dtype=torch.int32, device=qkv.device)
    refused_natively(
        "attention", [qkv[:1].expand(2**22, 192), many, 2**22, 32], "a launch has not so many blocks"
    )
    x, weight, bias = moved([randn(0, 5, 8), randn(1, 6, 8), randn(2, 6)], torch.bfloat16)
    for given, match in (
        ([x.double(), weight, bias], "the tensors are Double"),
        ([x, weight.half(), bias], "weight is Half, the kernel takes BFloat16"),
        ([x, weight[:, :7], bias], "x has 8 columns, 7 are needed"),
        ([x, weight, bias[:5]], r"bias has shape \[5\], \[6\] is needed"),
        ([x[:1].expand(2**31, 8), weight, bias], "the number of tokens is 2147483648"),
        ([x, weight[:1].expand(2**31, 8), bias], "weight's width is 2147483648"),
    ):
        refused_natively("linear_gelu", given, match)


@SKIPPED
@pytest.mark.parametrize("op", ["add_layer_norm", "linear_add_layer_norm"])
def test_what_the_cuda_norms_refuse(op: str) -> None:
    dtype = torch.float16
    given = moved(arguments_for(op, 5, 24, 16), dtype)
    residual, norm = len(given) - 4, len(given) - 3
    for place, value, match in (
        (residual, given[residual][:4], "x has 5 rows, residual has 4"),
        (residual, given[residual].float(), "residual is Float, the kernel takes Half"),
        (norm, given[norm][:-1], r"norm_weight has shape \[23\]"),
        (norm + 1, given[norm + 1].to(torch.bfloat16), "norm_bias is BFloat16"),
        (norm + 2, -1.0, "eps is -1, at least 0"),
        (residual - 1, given[residual - 1][:3], r"bias has shape \[3\]"),
    ):
        refused_natively(op, [*given[:place], value, *given[place + 1 :]], match)
    wide = moved(arguments_for(op, 2, 8193, 16), dtype)
    refused_natively(op, wide, "hidden is 8193, the kernel takes at most 8192")


@SKIPPED
def test_what_the_cuda_embedding_refuses() -> None:
    given = moved(arguments_for("embed_layer_norm", 5, 24), torch.float16)
    for place, value, match in (
        (0, given[0][:, None], "input_ids has 2 dimensions"),
        (1, given[1][:4], r"position_ids has shape \[4\], \[5\] is needed"),
        (2, given[2].to(torch.int16), "token_type_ids is Short"),
        (3, given[3][:0], "word has no row"),
        (4, given[4][:, :-1], "position has 23 columns, 24 are needed"),
        (5, given[5].float(), "token_type is Float, the kernel takes Half"),
        (8, -1.0, "eps is -1"),
    ):
        refused_natively("embed_layer_norm", [*given[:place], value, *given[place + 1 :]], match)
