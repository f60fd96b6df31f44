"""Where the installed commands `pruned-ops` and `pruned-trainer` begin.

`import pruned_ops` imports torch, which takes seconds, and registers the models with transformers. A parser
needs neither. So the parser is imported first, from a package whose `__init__` has not run yet; that runs
once the arguments are read. --help, --version and a mistyped option are answered before that.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any


def ops() -> int:
    """Run `pruned-ops`; returns its exit status."""
    return _run("pruned_ops")


def trainer() -> int:
    """Run `pruned-trainer`; returns its exit status."""
    return _run("pruned_ops", "pruned_trainer")


def _run(*packages: str) -> int:
    """Run the command line of the last package, `PACKAGE.cli`, which imports nothing heavy to parse."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may hold what no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    modules = [_without_init(package) for package in packages]
    cli = import_module(f"{packages[-1]}.cli")
    arguments = cli.parse(sys.argv[1:])
    for module in modules:
        module.__loader__.exec_module(module)
    return cli.run(arguments)


def _without_init(package: str) -> Any:
    """The package, whose modules can be imported from now on, with its `__init__` still to be run."""
    spec = find_spec(package)
    assert spec is not None
    sys.modules[package] = module_from_spec(spec)
    return sys.modules[package]
