"""Laws of the drop-in on published weights: a model that somebody trained computes what it computed before.

g2p_en (GRU and GRUCell) spells out 2000 words, Resemblyzer (three layers of LSTM) tells two voices apart.
"""

import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastseq

from .support import real
from .support.budget import assert_within_budget


@pytest.fixture
def kernel_device() -> Iterator[str]:
    """Where our kernels run in this process, in full float32: the truth they are held to knows no TF32."""
    if not torch.cuda.is_available() and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("without a GPU kernels run only under TRITON_INTERPRET=1")
    precision = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.rnn.fp32_precision = precision


# ----------------------------------------------------------------------------------------- g2p_en, 2000 words


class Spelled:
    """The sample, and what torch makes of it in float32 and, as the truth, in float64."""

    def __init__(self) -> None:
        self.accepted = real.pronunciations()
        self.words = real.sample_words(list(self.accepted))
        self.names = real.phoneme_names()
        self.phonemes, self.logits = real.spelling()(self.words)
        ended = (self.phonemes == real.END).cumsum(dim=1)
        self.meant = (ended == 0) | ((ended == 1) & (self.phonemes == real.END))  # up to the END that counts
        phonemes, self.exact = real.spelling().double()(self.words)
        assert torch.equal(phonemes[self.meant], self.phonemes[self.meant])  # or logits cannot be compared

    def errors(self, phonemes: Tensor) -> tuple[float, float]:
        """Phoneme and word error rate."""
        said = real.spoken(phonemes, self.names)
        counts = [
            real.phoneme_errors(phones, self.accepted[word]) for phones, word in zip(said, self.words, strict=True)
        ]
        wrong, length = (sum(column) for column in zip(*counts, strict=True))
        return wrong / length, sum(errors > 0 for errors, _ in counts) / len(counts)

    def assert_same(self, phonemes: Tensor, logits: Tensor, name: str) -> None:
        """Every phoneme is torch's, and every logit as near the truth as torch's: of the first words and steps."""
        part = (slice(phonemes.shape[0]), slice(phonemes.shape[1]))
        meant = self.meant[part]
        assert torch.equal(phonemes.cpu()[meant], self.phonemes[part][meant])
        assert_within_budget(logits.cpu()[meant], self.exact[part][meant], self.logits[part][meant], name)


@pytest.fixture(scope="module")
def spelled() -> Spelled:
    real.download_or_skip(*real.ARCHIVES)
    return Spelled()


def swapped_spelling() -> real.Spelling:
    model = real.spelling()
    report = fastseq.swap(model)
    assert [entry.name for entry in report.swapped] == ["encoder", "decoder"]
    return model


def test_published_error_rates_are_reproduced(spelled: Spelled) -> None:
    phoneme_error, word_error = spelled.errors(spelled.phonemes)
    assert (round(phoneme_error, 3), round(word_error, 3)) == (0.103, 0.341)


def test_swap_changes_no_phoneme(spelled: Spelled) -> None:
    phonemes, logits = swapped_spelling()(spelled.words)
    assert torch.equal(phonemes, spelled.phonemes)
    assert torch.equal(logits, spelled.logits)
    assert spelled.errors(phonemes) == spelled.errors(spelled.phonemes)


def test_lengths_do_what_packing_does(spelled: Spelled) -> None:
    spelled.assert_same(*swapped_spelling()(spelled.words, packed=False), "lengths")


@pytest.mark.parametrize("packed", [True, False])
def test_reference_spells_the_same(spelled: Spelled, packed: bool) -> None:
    with fastseq.use("reference"):
        spelled.assert_same(*swapped_spelling()(spelled.words, packed=packed), "reference")


@pytest.mark.parametrize("packed", [True, False])
def test_kernels_spell_the_same(spelled: Spelled, kernel_device: str, packed: bool) -> None:
    words, steps = (spelled.words, real.LONGEST) if kernel_device == "cuda" else (spelled.words[:3], 6)
    with fastseq.use("triton"):
        spelled.assert_same(*swapped_spelling().to(kernel_device)(words, packed, steps), "triton")


# ------------------------------------------------------------------------------------ Resemblyzer, two voices


@pytest.fixture(scope="module")
def turns() -> list[real.Turn]:
    real.download_or_skip(*real.ARCHIVES)
    return real.turns()


def swapped_speaker() -> real.Speaker:
    model = real.speaker()
    report = fastseq.swap(model)
    assert [entry.name for entry in report.swapped] == ["lstm"]
    return model


def voices(model: nn.Module, turns: list[real.Turn]) -> Tensor:
    return torch.stack([real.voice(model, turn.wave) for turn in turns])


def test_swap_moves_no_voice(turns: list[real.Turn]) -> None:
    assert torch.equal(voices(swapped_speaker(), turns), voices(real.speaker(), turns))


def test_voices_are_told_apart(turns: list[real.Turn]) -> None:
    embeddings = voices(swapped_speaker(), turns)
    cosines: dict[bool, list[float]] = {True: [], False: []}
    for (one, a), (other, b) in combinations(zip(turns, embeddings, strict=True), 2):
        cosines[one.who == other.who].append(float(a @ b))
    same, different = (sum(cosines[key]) / len(cosines[key]) for key in (True, False))
    assert (round(same, 2), round(different, 2)) == (0.84, 0.78)


def test_lengths_give_the_state_at_each_turns_end(turns: list[real.Turn]) -> None:
    frames = [real.mel_spectrogram(turn.wave) for turn in turns]
    lengths = torch.tensor([len(turn) for turn in frames])
    together = swapped_speaker()(pad_sequence(frames, batch_first=True), lengths=lengths)
    model, exact = real.speaker(), real.speaker().double()
    alone = torch.cat([model(turn[None]) for turn in frames])
    truth = torch.cat([exact(turn[None].double()) for turn in frames])
    assert_within_budget(together, truth, alone, "lengths")


def assert_same_voice(model: nn.Module, stretches: Tensor, name: str) -> None:
    exact = real.speaker().double()(stretches.double())
    got = model(stretches.to(next(model.parameters()).device)).cpu()
    assert_within_budget(got, exact, real.speaker()(stretches), name)


def test_reference_hears_the_same(turns: list[real.Turn]) -> None:
    stretches = torch.cat([real.stretches(turn.wave) for turn in turns])
    with fastseq.use("reference"):
        assert_same_voice(swapped_speaker(), stretches, "reference")


def test_kernels_hear_the_same(turns: list[real.Turn], kernel_device: str) -> None:
    stretches = torch.cat([real.stretches(turn.wave) for turn in turns])
    if kernel_device == "cpu":
        stretches = stretches[:2, :12]
    with fastseq.use("triton"):
        assert_same_voice(swapped_speaker().to(kernel_device), stretches, "triton")


# ------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("build", [real.spelling, real.speaker])
def test_published_weights_load_both_ways(build: Callable[..., nn.Module]) -> None:
    real.download_or_skip(*real.ARCHIVES)
    theirs, ours = build(nn), build(fastseq)  # each loads the published file, strictly
    assert list(ours.state_dict()) == list(theirs.state_dict())
    returned = type(theirs)()
    returned.load_state_dict(ours.state_dict())
    received = type(ours)(fastseq)
    received.load_state_dict(theirs.state_dict())
    example = (["fastseq"],) if build is real.spelling else (torch.rand(2, 9, real.CHANNELS),)
    for model in (ours, returned.eval(), received.eval()):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name
        for got, expected in zip(model(*example), theirs(*example), strict=True):
            assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------- the download itself


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No archive at hand, and a pip that knows of no index but those that a test names."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("ci", [True, False])
def test_no_network_skips_but_fails_in_ci(empty_folder: Path, monkeypatch: pytest.MonkeyPatch, ci: bool) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")  # a port where nobody listens
    monkeypatch.setenv("CI", "true" if ci else "")
    with pytest.raises(real.UnreachableError if ci else pytest.skip.Exception, match="connection broken"):
        real.download_or_skip(*real.ARCHIVES)
    assert not list(empty_folder.iterdir())


def test_other_failures_of_the_download_are_errors(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="No matching distribution") as failure:
        real.download_or_skip(*real.ARCHIVES)
    assert not isinstance(failure.value, real.UnreachableError)


def test_another_file_is_refused(empty_folder: Path) -> None:
    (empty_folder / real.G2P.filename).write_bytes(b"not the file that was pinned")
    with pytest.raises(ValueError, match="expected sha256 2a7aabf1"):
        real.fetch(real.G2P)
