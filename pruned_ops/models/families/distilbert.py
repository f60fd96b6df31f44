"""DistilBERT: BERT's layers under other names, without token types and without a pooler."""

from __future__ import annotations

from pruned_ops.models.families.description import Family, LayerNames, Stock, TextHeadNames

DISTILBERT = Family(
    name="DistilBERT",
    stock=(Stock("DistilBert", "distilbert", "DistilBertTokenizerFast"),),
    prefix="distilbert",
    layers="transformer.layer",
    layer=LayerNames(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        ffn_norm="output_layer_norm",
    ),
    text_head=TextHeadNames("pre_classifier", "classifier", "relu", dropout="seq_classif_dropout"),
    words_head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    words_rows=("vocab_projector",),
    answers_dropout="qa_dropout",
    drops_context=False,
    has_pooler=False,
    fields={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    constants={"layer_norm_eps": 1e-12, "type_vocab_size": 0, "classifier_dropout": None},
)
