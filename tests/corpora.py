"""Corpora and sources that tests of data share."""

import json

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
    """A source whose examples are never looked at."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return np.zeros(self.lengths[index], np.int8)


class Stream:
    """A source without an index, whose iteration starts anew each time."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def assert_equal(batches, others):
    """Two lists of batches are the same, plans included."""
    for batch, other in zip(batches, others, strict=True):
        assert jax.tree.structure(batch) == jax.tree.structure(other)  # plans are part of it
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def assert_resumes(dataset):
    """From its state before each batch, by way of JSON, another iterator gives the batches that were left."""
    iterator = iter(dataset)
    states, batches = [json.dumps(iterator.get_state())], []
    for batch in iterator:
        batches.append(batch)
        states.append(json.dumps(iterator.get_state()))
    resumed = iter(dataset)  # one for all, which so has others' examples to forget
    for done in reversed(range(len(states))):
        resumed.set_state(json.loads(states[done]))
        assert json.dumps(resumed.get_state()) == states[done]
        assert_equal(list(resumed), batches[done:])
