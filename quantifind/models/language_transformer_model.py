"""A Transformer encoder (Vaswani et al. 2017, arXiv:1706.03762) that tells where a name is from."""

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from quantifind.utils.devices import device

PADDING = 0


class LanguageTransformer(nn.Module):
    """Character codes (examples, length), 0 where a name has ended → logits (examples, classes)."""

    def __init__(
        self,
        classes: int,
        vocabulary: int,
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        neighbours: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.neighbours = nn.Conv1d(width, width, 3, padding=1) if neighbours else None
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=4 * width, dropout=dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, codes: Tensor) -> Tensor:
        # columns in which every name has ended are masked everywhere: leave them out
        if not torch.compiler.is_exporting():  # whose programs have one length
            codes = codes[:, : int((codes != PADDING).sum(1).max())]
        padding = codes == PADDING
        hidden = self.embedding(codes)  # (examples, length, width), 0 where a name has ended
        if self.neighbours is not None:
            hidden = hidden + self.neighbours(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = self.dropout(hidden + sinusoidal_positions(hidden))
        hidden = self.encoder(hidden, src_key_padding_mask=padding)
        letters = (~padding).unsqueeze(-1)
        return self.head((hidden * letters).sum(1) / letters.sum(1))


def sinusoidal_positions(hidden: Tensor) -> Tensor:
    """Sines (even columns) and cosines (odd) of each position, (length, width), for ``hidden``."""
    _, length, width = hidden.shape
    position = torch.arange(length, device=hidden.device).unsqueeze(1)
    column = torch.arange(width, device=hidden.device)
    angle = position / 10_000 ** (column // 2 * 2 / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(hidden.dtype)


def create_model_context(
    *,
    classes: int | None = None,
    vocabulary: int | None = None,
    width: int = 96,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.15,
    neighbours: bool = True,
) -> tuple[nn.Module, nn.Module, Optimizer]:
    """The network, cross entropy, optimizer.

    classes, vocabulary: numbers of nationalities and of character codes, padding included; by
    default those of datasets/languagenames.tar.
    neighbours: add to each character's embedding a convolution over it and the two beside it, from
    which a network of this size learns faster than from attention alone.
    The original study's network has vocabulary=65535, width=512, layers=32, heads=4 and no
    neighbours.
    """
    if classes is None or vocabulary is None:
        # the pipeline gives both, so its later stages don't depend on the archive
        from quantifind.utils.name_archive import alphabet, read_names

        names = read_names()
        classes = classes or len(names)
        vocabulary = vocabulary or len(alphabet(names)) + 1
    model = LanguageTransformer(
        classes,
        vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        dropout=dropout,
        neighbours=neighbours,
    ).to(device())
    return model, nn.CrossEntropyLoss(), Adam(model.parameters(), lr=0.001)
