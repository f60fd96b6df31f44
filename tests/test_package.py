"""The package as a user meets it: import, info, layers in a model of one's own, and the direction of the
arrows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

import pruned_ops
import pruned_trainer
from inputs import cu_seqlens, randn
from pruned_ops import LayerShape, ModelShape, PackedBatch, PrunedEncoder

ROOT = Path(pruned_ops.__file__).parent
TRAINER = Path(pruned_trainer.__file__).parent
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("pruned_ops._C", "triton") or name.startswith("triton."):
            raise ImportError(f"no {name} here")
sys.meta_path.insert(0, Refuse())
import torch, pruned_ops
from pruned_ops.cli import main
main(["info"])
qkv = torch.randn(5, 3 * 32)
with pruned_ops.record() as ran:
    pruned_ops.ops.attention(qkv, torch.tensor([0, 5], dtype=torch.int32), 5, 16)
print(ran)
try:
    with pruned_ops.use_backend("cpu"):
        pass
except pruned_ops.BackendError as error:
    print("refused:", error)
"""


def test_import_without_extension_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cpu  not available: the C++ extension pruned_ops._C cannot be loaded" in done.stdout
    assert "cuda  not available: the C++ extension pruned_ops._C cannot be loaded" in done.stdout
    assert "pip install --no-build-isolation ." in done.stdout
    assert "'attention': Counter({'reference': 1})" in done.stdout
    assert "refused: backend 'cpu' is not available" in done.stdout


# A package imports only packages on lines below its own; those on one line do not import each other.
FLOORS = {
    ROOT: (
        ("cli", ""),
        ("commands",),
        ("serving",),
        ("qa",),
        ("checkpoints", "measure", "natural_questions"),
        ("runtime",),
        ("models",),
        ("layers",),
        ("ops",),
        ("command_line",),
        ("shape",),
        ("files", "version"),
    ),
    TRAINER: (
        ("cli", ""),
        ("command_options",),
        ("demo",),
        ("jobs",),
        ("report", "training"),
        ("pruning",),
        ("tasks",),
        ("distributed",),
    ),
    ROOT.parent / "benchmarks": (
        ("scripts",),
        ("study", "whole_models"),
        ("single_kernels", "rivals", "serving"),
        ("harness", "presentation", "torch_ways"),
    ),
}
WITHOUT_TRANSFORMERS = ("shape", "files", "version", "ops", "layers")


def _imports(path: Path) -> set[str]:
    """What a file imports, under its full name: `from package import name` is `package.name`."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def _room(module: str, root: Path, rooms: Collection[str]) -> str | None:
    """The package or file of `root` that an import is from: "" for its face, None for another root."""
    parts = module.split(".")
    if root.name == "benchmarks":
        scripts = {path.stem for path in root.glob("*.py")} - set(rooms)
        return parts[0] if parts[0] in rooms else "scripts" if parts[0] in scripts else None
    if parts[0] != root.name:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in rooms else ""


def _upward(root: Path, floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """The imports from a package of `root` to one that is not below it."""
    level = {room: number for number, rooms in enumerate(floors) for room in rooms}
    faults = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).with_suffix("").parts
        own = _room(
            ".".join(inside if root.name == "benchmarks" else (root.name, *inside)).removesuffix(".__init__"),
            root, level,
        )  # fmt: skip
        assert own is not None, f"{path} is on no floor: give it one in FLOORS"
        for module in _imports(path):
            room = _room(module, root, level)
            if room is not None and room != own and level[room] <= level[own]:
                faults.append(f"{path.relative_to(root.parent)} imports {module}")
    return faults


@pytest.mark.parametrize("root", FLOORS, ids=lambda root: root.name)
def test_a_package_imports_only_packages_below_it(root: Path) -> None:
    if not root.is_dir():
        pytest.skip("installed without the checkout")
    assert _upward(root, FLOORS[root]) == []


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    root = tmp_path / "house"
    for name, text in (("low/a.py", "from house.high import b"), ("high/b.py", "import house.low.a")):
        path = root / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert _upward(root, (("high",), ("low",))) == ["house/low/a.py imports house.high.b"]
    assert _upward(root, (("low",), ("high",))) == ["house/high/b.py imports house.low.a"]


def _module_of(imported: str, modules: Collection[str]) -> str:
    """The module that an import is from: itself, or the one with that name in it; "" for others."""
    parent = imported.rpartition(".")[0]
    return imported if imported in modules else parent if parent in modules else ""


def _modules(root: Path) -> dict[str, set[str]]:
    """Each module under `root` with those of its own package that it imports."""
    names = {}
    for path in root.rglob("*.py"):
        inside = path.relative_to(root.parent).with_suffix("").parts
        names[".".join(inside).removesuffix(".__init__")] = path
    return {
        name: {_module_of(module, names) for module in _imports(path)} - {""} for name, path in names.items()
    }


def test_no_test_imports_a_test() -> None:
    """What tests share is in tests/support."""
    files = list(Path(__file__).parent.rglob("*.py"))
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    importing = {path.name: {name.split(".")[0] for name in _imports(path)} & tests for path in files}
    assert {name: imported for name, imported in importing.items() if imported} == {}


@pytest.mark.parametrize("root", [ROOT, TRAINER], ids=lambda root: root.name)
def test_no_imports_go_in_a_circle(root: Path) -> None:
    """Between files, too. A package's face and its own files are one: `ops/__init__` is imported by all."""
    remaining = _modules(root)
    faces = {name for name in remaining if any(other.startswith(f"{name}.") for other in remaining)}
    remaining = {name: modules - faces for name, modules in remaining.items() if name not in faces}
    while remaining:
        free = [name for name, modules in remaining.items() if not modules & (remaining.keys() - {name})]
        assert free, f"in a circle: {sorted(remaining)}"
        for name in free:
            del remaining[name]


def test_the_trainer_stands_on_the_runtime() -> None:
    for path in ROOT.rglob("*.py"):
        assert not any(module.split(".")[0] == "pruned_trainer" for module in _imports(path)), path


@pytest.mark.parametrize("room", WITHOUT_TRANSFORMERS)
def test_ops_and_layers_know_no_hugging_face(room: str) -> None:
    paths = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else list((ROOT / room).rglob("*.py"))
    assert paths
    for path in paths:
        assert not any(module.split(".")[0] == "transformers" for module in _imports(path)), path


def test_csrc_includes_only_what_is_below() -> None:
    """bindings | cpu, cuda | check | panels, rows; and of csrc/cuda only ops.* know torch."""
    csrc = ROOT.parent / "csrc"
    if not csrc.is_dir():
        pytest.skip("installed without the checkout")
    level = {"bindings": 0, "cpu": 1, "cuda": 1, "check": 2, "panels": 3, "rows": 3}
    for path in sorted(csrc.rglob("*.*")):
        inside = path.relative_to(csrc).parts
        own = inside[0].split(".")[0]
        for header in re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8")):
            beside = (path.parent / header).resolve()
            target = beside if beside.is_file() else (csrc / header).resolve()
            if header == "emulator.h":  # the host's side of launch.h, with the tests
                continue
            assert target.is_file(), f"{path}: {header}"
            other = target.relative_to(csrc).parts[0].split(".")[0]
            assert other == own or level[other] > level[own], f"{path.name} includes {header}"
        if own == "cuda" and path.stem != "ops":
            assert not re.search(r"#include <(torch|ATen|c10)/", path.read_text(encoding="utf-8")), path


def test_layers_in_a_model_of_ones_own() -> None:
    """PrunedEncoder alone, without Hugging Face: each layer passes a batch on whatever its shape."""
    shape = ModelShape((LayerShape(2, 24), LayerShape(0, 8), LayerShape(3, 0)), hidden_size=20, head_dim=8)
    encoder = PrunedEncoder(shape).eval()
    batch = PackedBatch.from_mask(torch.ones(2, 6), 2, 6, torch.device("cpu"))
    x = randn(0, 12, 20)
    with torch.no_grad():
        out = encoder(x, batch)
        alone = encoder.layers[0](x[6:], cu_seqlens((6,)), 6)
        together = encoder.layers[0](x, batch.cu_seqlens, batch.max_seqlen)
    assert out.shape == x.shape and torch.isfinite(out).all()
    torch.testing.assert_close(together[6:], alone)


@pytest.mark.parametrize("folder", ["benchmarks", "tests/support", "python", "python/examples"])
def test_no_module_hides_a_package_that_is_installed(folder: str) -> None:
    """A script's folder comes first on Python's path: a module of the name of a library that transformers
    imports would be imported in its place."""
    modules = {path.stem for path in (ROOT.parent / folder).iterdir() if path.suffix in ("", ".py")}
    assert modules & (set(packages_distributions()) | sys.stdlib_module_names) <= {
        "pruned_trainer",
        "pruned_cli",
    }


def test_version_is_what_the_changelog_says() -> None:
    changelog = ROOT.parent / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("installed without the checkout")
    newest = re.search(r"^## (\S+)", changelog.read_text(), re.MULTILINE)
    assert newest is not None and newest[1].strip("[]") == pruned_ops.__version__
