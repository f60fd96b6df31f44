"""The package as a user meets it: import, info, layers in a model of one's own, and the direction of the
arrows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pruned_ops
from inputs import cu_seqlens, randn
from pruned_ops import LayerShape, ModelShape, PackedBatch, PrunedEncoder

ROOT = Path(pruned_ops.__file__).parent
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


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def test_arrows_point_down_only() -> None:
    assert not any("pruned_trainer" in _imports(path) for path in ROOT.rglob("*.py"))
    lower = [
        ROOT / name
        for name in ("shape.py", "reference.py", "registry.py", "ops.py", "packing.py", "layers.py")
    ]
    for path in [*lower, *(ROOT / "backends").rglob("*.py")]:
        assert "transformers" not in _imports(path), path


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


def test_version_is_what_the_changelog_says() -> None:
    changelog = ROOT.parent / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("installed without the checkout")
    newest = re.search(r"^## (\S+)", changelog.read_text(), re.MULTILINE)
    assert newest is not None and newest[1].strip("[]") == pruned_ops.__version__
