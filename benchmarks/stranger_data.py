"""Data for networks that nobody here wrote: made by seeded scripts or shipped in packages.

Sounds are synthesised, so that their pitch and where there is speech is known: harmonic tones, and
eSpeak NG's voice under noise. Sentences are those of Python's language reference, faces those of
scikit-image's cut of Labeled Faces in the Wild, reactions are put together from groups.
"""

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import lfilter, resample_poly
from torch import Tensor

from quantifind.utils.loaders import Loaders, Tensors, random_split, split_loaders

RATE = 16_000
# of the bins of torchcrepe and torchfcpe, in cents above 10 Hz: the first, and between two
BINS, FIRST_CENTS, CENTS_PER_BIN = 360, 1997.3794084376191, 20
# of a bin's target around the true pitch, as they were trained
BLUR_CENTS = 25
FRAME, CONTEXT = 512, 64
# root mean square of clean speech above which a frame has speech
SPEECH = 0.01
VOICES = ("en-us", "en-gb", "en-gb-scotland", "de", "fr", "es")


def split(*tensors: Tensor, parts: Sequence[int], batch_size: int, seed: int) -> Loaders:
    """Train, validation and test loaders of so many examples."""
    split_tensors = random_split(Tensors(*tensors), parts, seed=seed)
    return split_loaders(*split_tensors, batch_size=batch_size, seed=seed)


def tones(pitches: Tensor, generator: torch.Generator) -> Tensor:
    """Sounds (examples, samples) with those pitches (Hz, the same shape): sums of harmonics, each
    example with a timbre and noise of its own."""
    examples = len(pitches)
    phase = pitches.double().cumsum(1) / RATE
    sound = torch.zeros_like(phase)
    slope = 0.5 + 1.5 * torch.rand(examples, 1, generator=generator)
    for harmonic in range(1, 13):
        strength = harmonic**-slope * (0.3 + 0.7 * torch.rand(examples, 1, generator=generator))
        start = torch.rand(examples, 1, generator=generator)
        # what is above half the rate can't be sampled
        audible = pitches * harmonic < RATE / 2
        sound += strength * audible * torch.sin(2 * torch.pi * (harmonic * phase + start))
    sound = sound / sound.std(1, keepdim=True)
    decibel = -10 - 30 * torch.rand(examples, 1, generator=generator)
    noise = torch.randn(sound.shape, generator=generator)
    return 0.2 * (sound + 10 ** (decibel / 20) * noise).float()


def pitch_targets(pitches: Tensor) -> Tensor:
    """The bins' targets (..., bins), 1 at the true pitch (Hz) and falling off around it."""
    cents = 1200 * torch.log2(pitches / 10)
    bins = FIRST_CENTS + CENTS_PER_BIN * torch.arange(BINS)
    return torch.exp(-((bins - cents[..., None]) ** 2) / (2 * BLUR_CENTS**2))


def pitched_frames(*, parts: Sequence[int], batch_size: int, seed: int) -> Loaders:
    """Frames (examples, 1024) with mean 0 and deviation 1, and targets (examples, 360)."""
    generator = torch.Generator().manual_seed(seed)
    octaves = np.log2(1200 / 60) * torch.rand(sum(parts), 1, generator=generator)
    pitches = 60 * 2**octaves
    frames = tones(pitches.expand(-1, 1024), generator)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    targets = pitch_targets(pitches[:, 0])
    return split(frames, targets, parts=parts, batch_size=batch_size, seed=seed)


def glides(seconds: float, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sounds (examples, samples) that glide from one pitch to another, and the pitch (Hz) at each
    sample."""
    ends = 80 * 2 ** (3 * torch.rand(examples, 2, generator=generator))
    way = torch.linspace(0, 1, int(seconds * RATE))
    pitches = ends[:, :1] * (ends[:, 1:] / ends[:, :1]) ** way
    return tones(pitches, generator), pitches


@cache
def sentences() -> list[str]:
    """Those of Python's language reference, in a fixed order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # no code, no markup, no headings
    plain = [re.sub(r"\s+", " ", part) for part in text.split("\n\n") if not part.startswith(" ")]
    found = [s.strip() for part in plain for s in re.split(r"(?<=[.?!])\s", part)]
    return list(dict.fromkeys(s for s in found if re.fullmatch(r"[A-Z][\w ,;()'\"-]{30,200}\.", s)))


@cache
def _espeak() -> ctypes.CDLL:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    # its output is handed to a callback, nothing is played
    if library.espeak_Initialize(1, 0, str(espeakng_loader.get_data_path()).encode(), 0) < 0:
        raise RuntimeError("eSpeak NG does not start")
    return library


def speech(text: str, *, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A sentence as eSpeak NG says it, (samples,) float32."""
    library, parts = _espeak(), []

    def keep(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: object) -> int:
        if count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    pointer = ctypes.POINTER(ctypes.c_short)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int, ctypes.c_void_p)(keep)
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(voice.encode())
    library.espeak_SetParameter(1, speed, 0)
    library.espeak_SetParameter(3, pitch, 0)
    said = text.encode()
    library.espeak_Synth(said, len(said) + 1, 0, 1, 0, 1, None, None)
    library.espeak_Synchronize()
    return resample_poly(np.concatenate(parts) / 32768, RATE, 22_050).astype(np.float32)


def spoken_clips(*, frames: int, parts: Sequence[int], batch_size: int, seed: int) -> Loaders:
    """Frames (examples, frames, 576), each with the end of the one before it, and whether there is
    speech in each (examples, frames)."""
    generator = np.random.default_rng(seed)
    texts, clips, labels = sentences(), [], []
    for _ in range(sum(parts)):
        clean = np.zeros(frames * FRAME, np.float32)
        said = speech(
            texts[generator.integers(len(texts))],
            voice=VOICES[generator.integers(len(VOICES))],
            speed=int(generator.integers(120, 240)),
            pitch=int(generator.integers(10, 90)),
        )
        start = generator.integers(0, len(clean))
        # from somewhere in the sentence, so that there is silence before, after or neither
        part = said[generator.integers(0, len(said) // 2) :][: len(clean) - start]
        clean[start : start + len(part)] = part
        loud = np.sqrt((clean.reshape(frames, FRAME) ** 2).mean(1))
        gain = 10 ** generator.uniform(-1, 0.2)
        # from white to a rumble
        noise = lfilter([1], [1, -generator.uniform(0, 0.95)], generator.normal(size=len(clean)))
        noisy = clean + 10 ** generator.uniform(-3, -1.5) * noise / noise.std()
        clips.append((gain * noisy).astype(np.float32))
        labels.append(loud > SPEECH)
    sound = torch.from_numpy(np.stack(clips))
    heard = F.pad(sound, (CONTEXT, 0)).unfold(1, CONTEXT + FRAME, FRAME).contiguous()
    voiced = torch.from_numpy(np.stack(labels)).float()
    return split(heard, voiced, parts=parts, batch_size=batch_size, seed=seed)


def faces(size: int, *, parts: Sequence[int], batch_size: int, seed: int) -> Loaders:
    """Images (examples, 3, size, size) as the detector scales them, and whether each is a face:
    scikit-image's 200, turned, moved, lighter and darker."""
    generator = torch.Generator().manual_seed(seed)
    images = np.load(str(files("skimage.data") / "lfw_subset.npy"))
    given = torch.from_numpy(images).float()[:, None]  # (200, 1, 25, 25), 100 faces first
    drawn = []
    # a picture's copies are all in one part: none is judged on what calibrated it
    for part in torch.randperm(200, generator=generator).split([80, 40, 80]):
        number = parts[len(drawn)]
        chosen = part[torch.randint(len(part), (number,), generator=generator)]
        drawn.append(Tensors(_varied(given[chosen], size, generator), (chosen < 100).long()))
    return split_loaders(*drawn, batch_size=batch_size, seed=seed)


def _varied(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    turn, scale, mirror = drawn(-0.2, 0.2), drawn(0.9, 1.1), drawn(-1, 1).sign()
    rows = [mirror * scale * turn.cos(), -scale * turn.sin(), drawn(-0.1, 0.1)]
    rows += [mirror * scale * turn.sin(), scale * turn.cos(), drawn(-0.1, 0.1)]
    shape = [len(images), 1, size, size]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), shape, align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    light = drawn(0.7, 1.2).view(-1, 1, 1, 1)
    tint = 0.8 + 0.4 * torch.rand(len(images), 3, 1, 1, generator=generator)
    pixels = (255 * light * tint * moved).clamp(0, 255)
    return (pixels - 127.5) / 128


# parts of molecules as SMILES: alkyl and aryl groups to put before a bond
GROUPS = ["C", "CC", "CCC", "CC(C)", "CCCC", "CC(C)C", "C1CCCC1", "C1CCCCC1", "COCC", "CC(C)(C)"]
GROUPS += ["c1ccccc1", "Cc1ccc(cc1)", "COc1ccc(cc1)", "Fc1ccc(cc1)", "Clc1ccc(cc1)", "c1ccncc1"]
GROUPS += ["N#Cc1ccc(cc1)", "c1ccoc1", "c1ccsc1", "O=[N+]([O-])c1ccc(cc1)", "c1ccc2ccccc2c1"]
ARYL = ["c1ccccc1", "c1ccc(C)cc1", "c1ccc(OC)cc1", "c1ccc(F)cc1", "c1ccc(C#N)cc1", "c1cccnc1"]
ARYL += ["c1ccc(C(F)(F)F)cc1", "c1cccc(Cl)c1", "c1ccsc1", "c1ccc2ccccc2c1", "c1ccc(C=O)cc1"]
ALKYL = ["C", "CC", "CCC", "C(C)C", "CCOC", "Cc1ccccc1", "C1CCCC1", "CC(C)C", "CCc1ccccc1"]
# reactions of a group before a bond, {a}, and one behind a bond, {b}
REACTIONS = [
    "{a}C(=O)O.N{b}>>{a}C(=O)N{b}",
    "{a}C(=O)Cl.N{b}.CCN(CC)CC>>{a}C(=O)N{b}",
    "{a}C(=O)O.O{b}.O=S(=O)(O)O>>{a}C(=O)O{b}",
    "{a}C(=O)O{b}.[Na+].[OH-]>>{a}C(=O)O",
    "{a}C=O.N{b}.[BH4-].[Na+]>>{a}CN{b}",
    "{a}CBr.O{b}.[H-].[Na+]>>{a}CO{b}",
    "{a}CCl.S{b}.O=C([O-])[O-].[K+].[K+]>>{a}CS{b}",
    "{a}S(=O)(=O)Cl.N{b}.c1ccncc1>>{a}S(=O)(=O)N{b}",
    "{a}C(=O)O{b}.[AlH4-].[Li+]>>{a}CO",
    "{a}N=C=O.O{b}>>{a}NC(=O)O{b}",
]
TOKEN = re.compile(r"\[[^\]]+]|Br|Cl|>>|.")


def reactions(number: int, *, seed: int) -> list[str]:
    """Different reaction SMILES, in an order that is drawn."""
    made = [
        reaction.format(a=group, b=behind)
        for reaction in REACTIONS
        for group in GROUPS
        for behind in ARYL + ALKYL
    ]
    made = sorted(set(made))
    order = np.random.default_rng(seed).permutation(len(made))[:number]
    return [made[i] for i in order]
