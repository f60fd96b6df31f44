"""What a folder of sentence-transformers says of the encoder in it: where it lies, what becomes of a text
before the tokenizer gets it, and of the states after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pruned_ops.checkpoints.loading import ENCODER_SETTINGS, file_beside
from pruned_ops.files import read_json, shown

SETTINGS = "config_sentence_transformers.json"  # which holds the prompts that are put before texts
MODULES = "modules.json"  # which lists the modules that a text goes through


class Module(NamedTuple):
    """A module as it is listed. path: its folder, from the root on; "" for the root. type: its class, with
    the package."""

    path: str
    type: str

    @property
    def name(self) -> str:
        """The name of its class."""
        return self.type.rpartition(".")[2]


def modules_of(source: str) -> list[Module]:
    """The modules of sentence-transformers in a folder, or under a hub name; none where it is a plain
    checkpoint. Errors: `file_beside`'s; ValueError for a file that lists none, or one outside of the
    folder."""
    file = file_beside(source, MODULES)
    if file is None:
        return []
    listed = read_json(file)
    if not (isinstance(listed, list) and listed) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in Module._fields)
        for module in listed
    ):
        raise ValueError(f"{file} is no list of modules with a path and a type")
    modules = [Module(module["path"], module["type"]) for module in listed]
    for path in (PurePosixPath(module.path) for module in modules):
        if ".." in path.parts or path.is_absolute():
            raise ValueError(f"{file} leads out of its folder: {shown(str(path))}")
    return modules


def inner_folder(root: Path) -> str:
    """Where in the folder the encoder lies: its name, or "" for the folder itself."""
    modules = modules_of(str(root))
    inner = [module.path for module in modules if module.name == "Transformer"]
    if modules and len(inner) != 1:
        raise ValueError(f"{root / MODULES} has {len(inner)} Transformer modules; one is needed")
    return inner[0] if inner else ""


def pooling_config(source: str) -> dict[str, Any]:
    """The config of the Pooling in a folder or under a hub name, from where its modules.json says that it
    lies; of the mean where it has none. Errors: as `modules_of`'s."""
    path = next((module.path for module in modules_of(source) if module.name == "Pooling"), None)
    if path is None:
        return {"pooling_mode": "mean"}
    file = file_beside(source, str(PurePosixPath(path, "config.json")))
    return {} if file is None else object_in(file)


def pooling_modes(config: dict[str, Any]) -> list[str]:
    """What a Pooling of this config makes an embedding of, such as "mean", "cls" and "max", one or several;
    earlier versions wrote a field for each."""
    modes = config.get("pooling_mode")
    if modes is not None:
        return [str(mode) for mode in (modes if isinstance(modes, list) else [modes])]
    start = "pooling_mode_"
    fields = [name for name, is_on in config.items() if name.startswith(start) and is_on]
    return [name.removeprefix(start).removesuffix("s").removesuffix("_token") for name in fields]


@dataclass(frozen=True)
class Reading:
    """How texts come to the tokenizer. prompts: what may be put before any of them. lower_case: whether they
    are made lower-case first, whatever the tokenizer does."""

    prompts: tuple[str, ...]
    lower_case: bool

    @classmethod
    def of(cls, root: Path) -> Reading:
        """That of a folder; a plain checkpoint's tokenizer gets the texts as they are."""
        prompts = object_in(root / SETTINGS).get("prompts")
        named = prompts.values() if isinstance(prompts, dict) else ()
        lower_case = False
        if modules_of(str(root)):
            files = [root / inner_folder(root) / name for name in ENCODER_SETTINGS]
            file = next((file for file in files if file.is_file()), files[0])
            lower_case = bool(object_in(file).get("do_lower_case"))
        return cls(tuple(dict.fromkeys(text for text in named if text and isinstance(text, str))), lower_case)

    def forms(self, text: str) -> list[str]:
        """What the tokenizer may get for a text: the text itself, and the text behind each prompt. The pieces
        at its beginning may be others there."""
        forms = [prompt + text for prompt in ("", *self.prompts)]
        return [form.lower() for form in forms] if self.lower_case else forms


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file or another value."""
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
