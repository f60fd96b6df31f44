"""Answer a corpus of questions on many machines with Ray Data; each worker has a QuestionAnswerer.

    pip install "ray[data]"
    python corpus_on_ray.py CHECKPOINT questions.jsonl more.parquet --out ANSWERS --workers 4 --cpus 2

Each record has a question, a context and, if you like, an id. The corpus is divided into blocks, and every
block's answers are a file, which gets its name when it is whole. So the same command continues where it was
stopped, and a block whose worker dies is answered again by another: no answer is lost, and none is there
twice. On several machines the paths must be on a file system that all of them see; --address names the
cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pruned_ops import Answer, QuestionAnswerer
from pruned_ops.files import parse_json
from pruned_ops.qa.windows import RefusedQuestion

# A part of a file, as a row of Ray's data: path, number, first and last, which are bytes of JSON lines or row
# groups of Parquet.
Block = dict[str, Any]


def blocks_of(path: Path, records: int) -> Iterator[Block]:
    """A file as blocks of `records` lines, or of one Parquet row group; none is held in memory."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        for group in range(ParquetFile(path).num_row_groups):
            yield {"path": str(path), "number": group, "first": group, "last": group + 1}
        return
    number, first, last = 0, 0, 0
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            last += len(line)
            if count % records == 0:
                yield {"path": str(path), "number": number, "first": first, "last": last}
                number, first = number + 1, last
    if last > first:
        yield {"path": str(path), "number": number, "first": first, "last": last}


def records_of(block: Block) -> Iterator[Any]:
    """A block's records; a line that is no JSON gives the refusal that says so."""
    if block["path"].endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        yield from ParquetFile(block["path"]).read_row_group(block["first"]).to_pylist()
        return
    with open(block["path"], "rb") as file:
        file.seek(block["first"])
        for number, line in enumerate(file.read(block["last"] - block["first"]).splitlines()):
            if line.strip():
                try:
                    yield parse_json(line)
                except ValueError as error:
                    yield RefusedQuestion(number, f"is no JSON: {error}")


def answers_file(out: Path, block: Block) -> Path:
    """The file of a block's answers, which exists once it is whole."""
    return out / f"{Path(block['path']).name}-{block['number']:06d}.jsonl"


class Worker:
    """One copy of the model. Ray makes it once in each of its processes, and again when a process dies."""

    def __init__(self, model: str, out: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.answerer, self.out = QuestionAnswerer(model), Path(out)

    def __call__(self, batch: Block) -> Block:
        """Answer one block (a batch of one row) and write its file; returns how many records it had."""
        block: Block = {name: int(values[0]) for name, values in batch.items() if name != "path"}
        block["path"] = str(batch["path"][0])
        records = list(records_of(block))
        path = answers_file(self.out, block)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("w", encoding="utf-8") as file:
            answers = self.answerer.stream(records, progress=False, keep_refused=True)
            for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
                key = record.get("id") if isinstance(record, dict) else None
                fields = asdict(answer) if isinstance(answer, Answer) else {"refused": answer.reason}
                row = {"id": f"{path.stem}:{number}" if key is None else key, **fields}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, path)
        return {"records": [len(records)]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or hub name")
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines or Parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answers, one file per block")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="threads of each worker")
    parser.add_argument(
        "--block", type=int, default=256, help="records per block (Parquet: a row group each)"
    )
    parser.add_argument("--address", help="of a Ray cluster; by default one is started on this machine")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        import ray
    except ImportError:
        sys.exit('this example needs Ray: pip install "ray[data]"')
    names = [path.name for path in arguments.files]
    if len(set(names)) < len(names):
        sys.exit("two of the files have one name, and so would their answers: give them different names")
    arguments.out.mkdir(parents=True, exist_ok=True)
    blocks = [block for path in arguments.files for block in blocks_of(path.absolute(), arguments.block)]
    unanswered = [block for block in blocks if not answers_file(arguments.out, block).exists()]
    print(f"{len(blocks)} blocks, {len(unanswered)} of them to be answered")
    if unanswered:
        local_cpus = None if arguments.address else arguments.workers * arguments.cpus
        ray.init(address=arguments.address, num_cpus=local_cpus)
        model = str(Path(arguments.model).absolute()) if Path(arguments.model).exists() else arguments.model
        worker_arguments = (model, str(arguments.out.absolute()), arguments.cpus)
        counts = ray.data.from_items(unanswered, override_num_blocks=len(unanswered)).map_batches(
            Worker,
            fn_constructor_args=worker_arguments,
            batch_size=1,
            num_cpus=arguments.cpus,
            concurrency=arguments.workers,
        )
        print(f"{counts.sum('records')} records answered in {arguments.out}")


if __name__ == "__main__":
    main()
