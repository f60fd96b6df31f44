"""Small models as a server holds them, and servers of them on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BertForSequenceClassification, BertModel

from inputs import shake, stock_model
from pruned_ops.models.natural_questions import with_answer_types
from pruned_ops.runtime.packed_encoder import optimised_encoders
from pruned_ops.serving.application import Access, application
from pruned_ops.serving.connections import Hosts, Server, bound
from pruned_ops.serving.limits import Limits
from pruned_ops.serving.models import Loading, Served, load_all
from pruned_ops.serving.service import Service
from tiny_tokenizers import word_tokenizer

HUNG = 60  # seconds after which somebody is taken to hang
BROKEN = "w7"  # the word of which `broken_embedder` makes NaN
LABELS = {0: "bad", 1: "so so", 2: "good"}


def embedder() -> Any:
    """A bare encoder."""
    return shake(BertModel(stock_model().config, add_pooling_layer=False).eval(), 1)


def classifier(labels: int) -> Any:
    """A classifier of texts or pairs; with one label, a reranker."""
    config = stock_model().config
    names = {0: "LABEL_0"} if labels == 1 else LABELS
    config.update({"num_labels": labels, "id2label": names, "label2id": {v: k for k, v in names.items()}})
    return shake(BertForSequenceClassification(config).eval(), 2)


MAKERS = {
    "embedder": embedder,
    "broken": embedder,
    "reranker": lambda: classifier(1),
    "classifier": lambda: classifier(3),
    "reader": stock_model,
    "pages": lambda: with_answer_types(stock_model()),
}


def saved(folder: Path, *names: str) -> list[str]:
    """The folders of these models, each with a tokenizer of the words w0 to w95."""
    for name in names:
        MAKERS[name]().save_pretrained(folder / name)
        word_tokenizer(96).save_pretrained(folder / name)
    return [str(folder / name) for name in names]


def loaded(folder: Path, *names: str, loading: Loading | None = None) -> dict[str, Served]:
    """These models as a server holds them; the one called "broken" gives NaN for texts with one word."""
    models = load_all(saved(folder, *names), loading or Loading(device="cpu"))
    if "broken" in models:  # which no folder could be: weights that are not finite are refused
        (encoder,) = optimised_encoders(models["broken"].runner._model)
        with torch.no_grad():
            encoder.embeddings.word_embeddings.weight[4 + int(BROKEN[1:])] = float("nan")
    return models


class Slow:
    """Stands in for an embedder that computes for as long as it is told to."""

    name, kind, source, prompts, dimension, dtype = "slow", "embedder", "slow", {}, 2, "float32"
    default_prompt = None
    pooling, labels, notes = "mean", (), ()

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.encoder = self

    def encode(self, texts: list[str], cut: bool, side: str) -> list[str]:
        return texts

    def compute(self, texts: list[str]) -> list[Any]:
        self.texts += texts
        self.is_asked.set()
        assert self.may_answer.wait(HUNG)
        return [np.ones(2, dtype=np.float32) for _ in texts]


class Running(NamedTuple):
    """A server that runs, its address, and what its routes share."""

    url: str
    service: Service
    server: Server


@contextmanager
def served(
    models: dict[str, Any], limits: Limits | None = None, access: Access | None = None
) -> Iterator[Running]:
    """A real server of these models on this machine."""
    limits = limits or Limits()
    service = Service(models, limits)
    place = bound("127.0.0.1", 0)
    port = place.getsockname()[1]
    server = Server(application(service, access or Access(Hosts("localhost"))), service, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield Running(f"http://127.0.0.1:{port}", service, server)
    finally:
        server.should_exit = True
        thread.join()
