"""A Transformer encoder (Vaswani et al. 2017, arXiv:1706.03762) that tells where a name is from."""

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from quantifind.name_archive import alphabet, read_names
from quantifind.utils import device

PADDING = 0
LONGEST_WAVE = 100


class LanguageTransformer(nn.Module):
    """Character codes (examples, length), 0 where a name has ended → logits (examples, classes)."""

    def __init__(
        self, classes: int, vocabulary: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=4 * width, dropout=dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def positions(self, padding: Tensor) -> Tensor:
        """Half of the columns count from the start of a name, half from its end."""
        width = self.embedding.embedding_dim
        from_start = torch.arange(padding.shape[1], device=padding.device).expand(padding.shape)
        from_end = (~padding).sum(1, keepdim=True) - 1 - from_start
        halves = sinusoids(from_start, width // 2), sinusoids(from_end, width - width // 2)
        return torch.cat(halves, dim=-1).to(self.embedding.weight.dtype)

    def forward(self, codes: Tensor) -> Tensor:
        # columns in which every name has ended are masked everywhere: leave them out
        codes = codes[:, : int((codes != PADDING).sum(1).max())]
        padding = codes == PADDING
        hidden = self.dropout(self.embedding(codes) + self.positions(padding))
        hidden = self.encoder(hidden, src_key_padding_mask=padding)  # (examples, length, width)
        letters = (~padding).unsqueeze(-1)
        return self.head((hidden * letters).sum(1) / letters.sum(1))


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines (even columns) and cosines (odd) of positions (...), a tensor (..., width)."""
    column = torch.arange(width, device=position.device)
    angle = position.unsqueeze(-1) / LONGEST_WAVE ** (column // 2 * 2 / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def create_model_context(
    *,
    classes: int | None = None,
    vocabulary: int | None = None,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.2,
) -> tuple[nn.Module, nn.Module, Optimizer]:
    """The network, cross entropy, optimizer.

    classes, vocabulary: numbers of nationalities and of character codes, padding included; by
    default those of datasets/languagenames.tar. The original study's size is vocabulary=65535,
    width=512, layers=32, heads=4.
    """
    if classes is None or vocabulary is None:
        names = read_names()
        classes = classes or len(names)
        vocabulary = vocabulary or len(alphabet(names)) + 1
    model = LanguageTransformer(classes, vocabulary, width, layers, heads, dropout).to(device())
    return model, nn.CrossEntropyLoss(), Adam(model.parameters(), lr=0.001)
