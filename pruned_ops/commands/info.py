"""`pruned-ops info`: which backends run on this machine, and why the others do not."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "info",
        help="which backends run here, and why others do not",
        description="Print versions, the machine, which backends run on it, why the others do not, and the "
        "order of backends for each op.",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Print versions, machine, backends with the reason where one is missing, and each op's backends."""
    from pruned_ops.measure.timing import machine, versions
    from pruned_ops.ops.registry import BACKENDS, OPS, REFERENCE

    for name, value in {**versions(), **machine(), **_extension()}.items():
        print(f"{name:>15}  {value if value is not None else '-'}")
    print("backends")
    for backend in BACKENDS.values():
        state = "available" if backend.missing is None else f"not available: {backend.missing}"
        print(f"{backend.name:>15}  {state} ({backend.description})")
    print(f"{REFERENCE:>15}  available (plain PyTorch; runs what no backend takes)")
    print("ops, with their backends in the order in which they are asked")
    for op in OPS.values():
        print(f"{op.name:>22}  {', '.join([*op.kernels, REFERENCE])}")


def _extension() -> dict[str, str]:
    """What the C++ extension was built for, and what this processor has; empty without the extension."""
    from pruned_ops.ops.backends.cpu import bf16_capability, extension, int8_capability, slow_int8

    if extension is None:
        return {}
    built, slow = extension.build_info(), slow_int8()
    features = [name for name, present in extension.cpu_features().items() if present]
    cuda = built.get("cuda")  # an extension of before there were CUDA kernels does not say
    return {
        "extension": f"built with torch {built['torch']}, {built['compiler']}",
        "kernels": f"{', '.join(built['capabilities'])}; runs {extension.cpu_capability()}",
        "int8 kernels": f"runs {int8_capability()}" + (f" ({slow})" if slow else ""),
        "bf16 kernels": f"runs {bf16_capability()}"
        if bf16_capability()
        else "this processor has neither AVX512_BF16 nor AMX, or ATEN_CPU_CAPABILITY forbids them",
        "cuda kernels": f"CUDA {cuda['version']}, for {cuda['architectures']}" if cuda else "not built",
        "cpu features": ", ".join(features) or "none of those asked about",
    }
