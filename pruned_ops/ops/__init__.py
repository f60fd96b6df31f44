"""The operations: what each one means, and the backends that run it.

Each has a line here. The function of the same name in reference.py (`encoder`: reference_encoder.py) is its
meaning.
"""

from pruned_ops.ops import reference, reference_encoder
from pruned_ops.ops.reference import (
    check_attention_values,
    check_embed_layer_norm_values,
    with_longest,
)
from pruned_ops.ops.reference_encoder import check_encoder_values
from pruned_ops.ops.registry import Op

attention = Op(reference.attention, check_attention_values, with_longest)
linear_gelu = Op(reference.linear_gelu)
linear_geglu = Op(reference.linear_geglu)
add_layer_norm = Op(reference.add_layer_norm)
linear_add_layer_norm = Op(reference.linear_add_layer_norm)
embed_layer_norm = Op(reference.embed_layer_norm, check_embed_layer_norm_values)
encoder = Op(reference_encoder.encoder, check_encoder_values, with_longest)
