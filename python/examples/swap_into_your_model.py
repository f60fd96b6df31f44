"""Put the packed encoder into a model of your own: a custom module around a stock BERT computes no padding.

Runs offline on a small random model: python python/examples/swap_into_your_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import pruned_ops


class Sentiment(nn.Module):
    """A classifier of your own. The encoder may sit anywhere inside it."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=6, intermediate_size=384)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, 0])


def main() -> None:
    torch.manual_seed(0)
    model = Sentiment().eval()
    lengths = torch.tensor([12, 90, 33, 4])
    mask = (torch.arange(90) < lengths[:, None]).long()
    ids = torch.randint(1, 30_000, mask.shape) * mask
    with torch.no_grad():
        before = model(ids, mask)
        pruned_ops.optimize(model)  # the calls stay the same, but only the 139 real tokens are computed
        with pruned_ops.record() as ran:
            after = model(ids, mask)
    print(f"largest difference: {float((after - before).abs().max()):.1e}")
    print("ran on:", {op: dict(counts) for op, counts in ran.items()})
    pruned_ops.restore(model)  # the stock encoder is back, for training or saving
    model.train()


if __name__ == "__main__":
    main()
