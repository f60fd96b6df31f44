"""What a folder of sentence-transformers says of the encoder in it: where it lies, and what becomes of a text
before the tokenizer gets it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruned_ops.checkpoints.loading import ENCODER_SETTINGS
from pruned_ops.files import read_json, shown

SETTINGS = "config_sentence_transformers.json"  # which holds the prompts that are put before texts
# The modules of sentence-transformers that do not know the vocabulary.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")


def modules_of(root: Path) -> list[dict[str, str]]:
    """The modules of a folder of sentence-transformers; none where it is a plain checkpoint. Errors:
    ValueError for one that may know the vocabulary, or that lies outside of the folder."""
    path = root / "modules.json"
    if not path.is_file():
        return []
    modules = read_json(path)
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("path", "type"))
        for module in modules
    ):
        raise ValueError(f"{path} is no list of modules with a path and a type")
    for module in modules:
        if ".." in Path(module["path"]).parts or Path(module["path"]).is_absolute():
            raise ValueError(f"{path} leads out of its folder: {shown(module['path'])}")
        if module["type"].rpartition(".")[2] not in _MODULES:
            raise ValueError(
                f"{path} has a {module['type'].rpartition('.')[2]}, which may know the vocabulary; "
                f"{', '.join(_MODULES)} do not"
            )
    return modules


def inner_folder(root: Path) -> str:
    """Where in the folder the encoder lies: its name, or "" for the folder itself."""
    modules = modules_of(root)
    inner = [module["path"] for module in modules if module["type"].endswith(".Transformer")]
    if modules and len(inner) != 1:
        raise ValueError(f"{root / 'modules.json'} has {len(inner)} Transformer modules; one is needed")
    return inner[0] if inner else ""


@dataclass(frozen=True)
class Reading:
    """How texts come to the tokenizer. prompts: what may be put before any of them. lower_case: whether they
    are made lower-case first, whatever the tokenizer does."""

    prompts: tuple[str, ...]
    lower_case: bool

    @classmethod
    def of(cls, root: Path) -> Reading:
        """That of a folder; a plain checkpoint's tokenizer gets the texts as they are."""
        prompts = _object(root / SETTINGS).get("prompts")
        named = prompts.values() if isinstance(prompts, dict) else ()
        lower_case = False
        if modules_of(root):
            files = [root / inner_folder(root) / name for name in ENCODER_SETTINGS]
            file = next((file for file in files if file.is_file()), files[0])
            lower_case = bool(_object(file).get("do_lower_case"))
        return cls(tuple(dict.fromkeys(text for text in named if text and isinstance(text, str))), lower_case)

    def forms(self, text: str) -> list[str]:
        """What the tokenizer may get for a text: the text itself, and the text behind each prompt. The pieces
        at its beginning may be others there."""
        forms = [prompt + text for prompt in ("", *self.prompts)]
        return [form.lower() for form in forms] if self.lower_case else forms


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file or another value."""
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
