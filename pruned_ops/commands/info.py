"""`pruned-ops info`: which backends run on this machine, and why the others do not."""

from __future__ import annotations

from pruned_ops.measure.timing import machine, versions
from pruned_ops.ops.backends import cpu
from pruned_ops.ops.registry import BACKENDS, OPS, REFERENCE


def info() -> None:
    """Versions, machine, backends with the reason where one is missing, and the order of backends for each
    op."""
    for name, value in {**versions(), **machine()}.items():
        print(f"{name:>15}  {value if value is not None else '-'}")
    if cpu.extension is not None:
        built = cpu.extension.build_info()
        features = [name for name, there in cpu.extension.cpu_features().items() if there]
        print(f"{'extension':>15}  built with torch {built['torch']}, {built['compiler']}")
        print(f"{'kernels':>15}  {', '.join(built['capabilities'])}; runs {cpu.extension.cpu_capability()}")
        cuda = built.get("cuda")  # an extension of before there were CUDA kernels does not say
        compiled = f"CUDA {cuda['version']}, for {cuda['architectures']}" if cuda else "not built"
        print(f"{'cuda kernels':>15}  {compiled}")
        print(f"{'cpu features':>15}  {', '.join(features) or 'none of those asked about'}")
    print("backends")
    for backend in BACKENDS.values():
        state = "available" if backend.missing is None else f"not available: {backend.missing}"
        print(f"{backend.name:>15}  {state} ({backend.description})")
    print(f"{REFERENCE:>15}  available (plain PyTorch; runs what no backend takes)")
    print("ops, with their backends in the order in which they are asked")
    for op in OPS.values():
        print(f"{op.name:>22}  {', '.join([*op.kernels, REFERENCE])}")
