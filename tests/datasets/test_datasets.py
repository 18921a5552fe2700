"""The data that ship with the package are what the source's text files say."""

import hashlib
import importlib.resources
import itertools
import lzma

import numpy as np
import pytest

from jaxpack.datasets import Pronunciations, cmudict, japanese_vowels

# Copied from the text of JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts:
# split, utterance, speaker counted from 1, frames, first frame, last frame.
COPIED = """
train   0 1 20  1.860936 -0.207383 0.261557 -0.214562 -0.171253 -0.118167
               -0.277557  0.025668 0.126701 -0.306756 -0.213076  0.088728
                1.261441 -0.63835  0.217443  0.263384 0.391115 -0.176897
               -0.510697  0.020526 -0.217709 -0.219071 -0.033314 -0.175986
train 100 4 23  1.03122 -0.541376 0.25046 -0.682311 -0.318182 -0.388674
               -0.326179 0.145304 0.246835 -0.162486 -0.080911 0.176163
               -0.079693 -0.767759 0.511448 -0.158564 0.250727 -0.033874
               -0.210605 -0.465049 -0.148833 -0.132345 -0.004342 0.050283
test    0 1 19  1.635533 0.024848 0.432087 -0.361914 -0.074776 -0.693481
               -0.229621 0.261503 -0.089421 -0.020431 -0.008612 0.139754
                1.388998 -0.728562 0.801037 0.101208 0.287227 -0.065235
               -0.36335 -0.138497 -0.127783 -0.235129 -0.06768 0.108629
test  369 9 11  1.421622 -0.386758 -0.187715 -0.504102 -0.026528 -0.56274
                0.087821 0.168902 -0.137287 0.087146 -0.142142 0.101818
                1.177449 -0.40408 0.052026 -0.284812 0.42984 -0.203484
               -0.072393 -0.080955 -0.244424 -0.001849 -0.016634 0.224688
"""

# Copied from cmudict.dict: words whose pronunciations, further ones or remarks a reader may get wrong.
PRONOUNCED = """
'bout B AW1 T
a AH0
a(2) EY1
a.d. EY2 D IY1
aalborg AO1 L B AO0 R G # place, danish
aalborg(2) AA1 L B AO0 R G
fine F AY1 N
fine(2) F IH1 N AH0 # org, irish
mormonism M AO1 R M AH0 N IH0 Z AH0 M
mormonism(2) M AO1 R M AH0 N IH0 Z AH0 M
read R EH1 D
read(2) R IY1 D
semi-colon S EH1 M IY0 K OW1 L AH0 N
semi-colon(2) S EH1 M AH0 K OW1 L AH0 N
zywicki Z IH0 W IH1 K IY0
"""


@pytest.fixture(scope="module")
def splits():
    return dict(zip(("train", "test"), japanese_vowels(), strict=True))


@pytest.mark.parametrize(
    ("name", "per_speaker", "shortest", "longest", "frames"),
    [
        ("train", [30] * 9, 7, 26, 4274),
        ("test", [31, 35, 88, 44, 29, 24, 40, 50, 29], 7, 29, 5687),
    ],
)
def test_splits_have_the_sizes_that_the_source_states(splits, name, per_speaker, shortest, longest, frames):
    split = splits[name]
    assert len(split.sequences) == len(split.labels) == sum(per_speaker)
    np.testing.assert_array_equal(np.bincount(split.labels), per_speaker)
    assert (split.lengths.min(), split.lengths.max(), split.lengths.sum()) == (shortest, longest, frames)


@pytest.mark.parametrize("name", ["train", "test"])
def test_sequences_are_finite_float32_of_12_channels_with_int32_labels(splits, name):
    split = splits[name]
    assert all(s.dtype == np.float32 and s.shape[1:] == (12,) and np.isfinite(s).all() for s in split.sequences)
    assert split.labels.dtype == split.lengths.dtype == np.int32
    assert split.lengths.tolist() == [s.shape[0] for s in split.sequences]


def test_values_are_those_of_the_text_files(splits):
    for words in np.reshape(COPIED.split(), (4, 28)):
        name, index, speaker, length = words[0], *words[1:4].astype(int)
        sequence = splits[name].sequences[index]
        assert sequence.shape == (length, 12)
        assert splits[name].labels[index] == speaker - 1
        np.testing.assert_array_equal(sequence[[0, -1]].ravel(), words[4:].astype(np.float32))


def test_callers_may_write_into_what_they_get():
    japanese_vowels()[0].sequences[0][:] = 0
    assert japanese_vowels()[0].sequences[0].any()


def test_attribution_and_licence_lie_beside_the_data():
    text = (importlib.resources.files("jaxpack.datasets") / "japanese_vowels.md").read_text("utf-8")
    for due in ("Kudo", "Toyama", "Shimbo", "10.24432/C5NS47", "CC BY 4.0", "creativecommons.org/licenses/by/4.0"):
        assert due in text


@pytest.fixture(scope="module")
def pronunciations():
    return cmudict()


def test_dictionary_is_the_file_of_the_source_byte_for_byte():
    file = importlib.resources.files("jaxpack.datasets") / "cmudict.dict.xz"
    text = lzma.decompress(file.read_bytes())
    digest = "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"
    assert (len(text), hashlib.sha256(text).hexdigest()) == (3618488, digest)
    assert digest in (importlib.resources.files("jaxpack.datasets") / "cmudict.md").read_text("utf-8")


def test_dictionary_has_all_words_once_and_nearly_all_lines(pronunciations):
    words = [word for split in pronunciations for word in split.words]
    assert len(words) == len(set(words)) == 126052
    ways = [way for split in pronunciations for ways in split.pronunciations for way in ways]
    assert len(ways) == 135166 - 2  # two are listed twice
    assert min(map(len, ways)) == 1
    assert {symbol for way in ways for symbol in way} >= {"AH0", "AH1", "AH2", "ZH"}


def test_pronunciations_are_those_of_the_text_file(pronunciations):
    lines = [line.partition(" #")[0].split() for line in PRONOUNCED.strip().splitlines()]
    expected: dict[str, list[tuple[str, ...]]] = {}
    for entry, *phonemes in lines:
        ways = expected.setdefault(entry.split("(")[0], [])
        if tuple(phonemes) not in ways:
            ways.append(tuple(phonemes))
    found = {word: ways for split in pronunciations for word, ways in zip(*split, strict=True)}
    assert {word: found[word] for word in expected} == expected


def test_words_are_split_90_5_5_for_good(pronunciations):
    assert [len(split.words) for split in pronunciations] == [113511, 6200, 6341]
    for split, some in zip(pronunciations, ("read tomato zywicki", "abbatiello abloom", "'frisco aalto"), strict=True):
        assert set(some.split()) <= set(split.words)


def test_without_stress_there_are_39_phonemes_and_what_sounds_alike_is_one(pronunciations):
    bare = [split.without_stress() for split in pronunciations]
    ways = [ways for split in bare for ways in split.pronunciations]
    assert len(set(itertools.chain.from_iterable(itertools.chain.from_iterable(ways)))) == 39
    assert all(len(set(each)) == len(each) > 0 for each in ways)
    split = Pronunciations(["a"], [[("AH0", "B"), ("EY1",), ("AH1", "B")]])
    assert split.without_stress() == (["a"], [[("AH", "B"), ("EY",)]])
    assert split.pronunciations == [[("AH0", "B"), ("EY1",), ("AH1", "B")]]


def test_licence_of_the_dictionary_lies_beside_it():
    text = (importlib.resources.files("jaxpack.datasets") / "cmudict.md").read_text("utf-8")
    for due in (
        "Copyright (C) 1993-2015 Carnegie Mellon University. All rights reserved.",
        "1. Redistributions of source code must retain the above copyright",
        "2. Redistributions in binary form must reproduce the above copyright",
        "THIS SOFTWARE IS PROVIDED BY CARNEGIE MELLON UNIVERSITY ``AS IS'' AND",
        "github.com/cmusphinx/cmudict",
    ):
        assert due in text
