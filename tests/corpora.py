"""Corpora and sources that the tests of jaxpack.data share."""

import json
from typing import Any

import jax
import numpy as np

from jaxpack.datasets import cmudict, japanese_vowels

CORPORA = {
    "words": lambda: np.array([len(word) for split in cmudict() for word in split.words]),
    "vowels": lambda: np.concatenate([split.lengths for split in japanese_vowels()]),
    "gamma": lambda: np.maximum(1, np.random.default_rng(0).gamma(3, 20, 20_000)).astype(int),
    "log-normal": lambda: np.maximum(1, np.random.default_rng(0).lognormal(np.log(40), 0.7, 20_000)).astype(int),
}


class Sized:
    """A source of blank examples with these lengths."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return np.zeros(self.lengths[index], np.int8)


class Stream:
    """A source without an index, which can be iterated over again."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def assert_equal(batches, others):
    """Asserts that two lists of batches are equal, plans included."""
    for batch, other in zip(batches, others, strict=True):
        structure: Any = jax.tree.structure(batch)
        assert structure == jax.tree.structure(other)  # includes the plans
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def assert_resumes(dataset):
    """Asserts that an iterator resumes from its state before each batch, as JSON, with the remaining batches."""
    iterator = iter(dataset)
    states, batches = [json.dumps(iterator.get_state())], []
    for batch in iterator:
        batches.append(batch)
        states.append(json.dumps(iterator.get_state()))
    resumed = iter(dataset)  # one for all states, so it has examples to forget
    for done in reversed(range(len(states))):
        resumed.set_state(json.loads(states[done]))
        assert json.dumps(resumed.get_state()) == states[done]
        assert_equal(list(resumed), batches[done:])
