"""pruned-ops: info."""

from __future__ import annotations

import argparse
import sys

from pruned_ops.backends import cpu
from pruned_ops.measure import machine, versions
from pruned_ops.registry import BACKENDS, OPS, REFERENCE


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pruned-ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="which backends can run here, and why others cannot")
    one.set_defaults(run=info)
    arguments = parser.parse_args(argv)
    arguments.run()
    return 0


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
        print(f"{'cpu features':>15}  {', '.join(features) or 'none of those asked about'}")
    print("backends")
    for backend in BACKENDS.values():
        state = "available" if backend.missing is None else f"not available: {backend.missing}"
        print(f"{backend.name:>15}  {state} ({backend.description})")
    print(f"{REFERENCE:>15}  available (plain PyTorch; runs what no backend takes)")
    print("ops, with their backends in the order in which they are asked")
    for op in OPS.values():
        print(f"{op.name:>22}  {', '.join([*op.kernels, REFERENCE])}")


if __name__ == "__main__":
    sys.exit(main())
