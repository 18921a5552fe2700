"""The data that ship with the package are what the source's text files say."""

import importlib.resources

import numpy as np
import pytest

from jaxpack.datasets import japanese_vowels

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
