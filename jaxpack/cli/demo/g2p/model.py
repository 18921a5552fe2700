"""The model of `jaxpack demo g2p`: a bidirectional LSTM from letters to frames of phonemes, trained with CTC."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxpack
from jaxpack.cli.demo.g2p.words import BLANK, FRAMES_PER_LETTER
from jaxpack.data import Batch
from jaxpack.losses import ctc
from jaxpack.metrics import ctc_greedy_decode


class TrainState(NamedTuple):
    """The state between training steps."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32, the number of steps taken, which determines dropout's key


@dataclasses.dataclass(frozen=True)
class Transcriber:
    """An embedding of letters, a bidirectional LSTM, and a linear head with FRAMES_PER_LETTER frames per letter.

    Attributes:
      layer: the class of the LSTM: its name in jaxpack, such as "LayerNormLSTM".
    """

    num_letters: int
    num_classes: int
    embedding_size: int
    layer: str
    hidden_size: int
    num_layers: int
    dropout: float

    @property
    def lstm(self) -> jaxpack.LSTM | jaxpack.LayerNormLSTM:
        """The recurrent layers."""
        layer: type[jaxpack.LSTM | jaxpack.LayerNormLSTM] = getattr(jaxpack, self.layer)
        return layer(self.embedding_size, self.hidden_size, self.num_layers, dropout=self.dropout, bidirectional=True)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws parameters: the layers' by their init, the head's uniform within 1/sqrt(fan-in) of 0."""
        embedding_key, lstm_key, head_key = jax.random.split(key, 3)
        shape = self.lstm.output_size, FRAMES_PER_LETTER * self.num_classes
        bound = self.lstm.output_size**-0.5
        head = {"weight": jax.random.uniform(head_key, shape, minval=-bound, maxval=bound), "bias": jnp.zeros(shape[1])}
        embedding = jax.random.normal(embedding_key, (self.num_letters, self.embedding_size))
        return {"embedding": embedding, "lstm": self.lstm.init(lstm_key), "head": head}

    def apply(
        self, params: dict[str, Any], letters: jaxpack.PackedSequence, dropout_key: jax.Array | None = None
    ) -> jaxpack.PackedSequence:
        """Computes logits [S, frames * classes] of packed letters int32 [S]; applies dropout only with a key."""
        embedded = letters.map(lambda numbers: params["embedding"][numbers])
        output, _ = self.lstm.apply(
            params["lstm"], embedded, dropout_key=dropout_key, deterministic=dropout_key is None
        )
        return output.map(lambda hidden: hidden @ params["head"]["weight"] + params["head"]["bias"])


def make_train_step(
    model: Transcriber, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Returns the training step: a jittable function from a state and a batch to the next state and the loss."""

    def loss(params: Any, batch: Batch, dropout_key: jax.Array) -> jax.Array:
        logits = model.apply(params, batch.inputs["letters"], dropout_key)
        labels, lengths = batch.inputs["phonemes"], batch.inputs["num_phonemes"]
        return ctc(logits, labels, lengths, batch.weights, blank_id=BLANK, frames_per_step=FRAMES_PER_LETTER).value

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, dropout_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return train_step


def make_decode(model: Transcriber) -> Callable[[Any, jaxpack.PackedSequence], tuple[jax.Array, jax.Array]]:
    """Returns a function from parameters and packed letters to padded phonemes int32 [B, N] and their numbers [B]."""

    def decode(params: Any, letters: jaxpack.PackedSequence) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, letters)
        return ctc_greedy_decode(logits, blank_id=BLANK, frames_per_step=FRAMES_PER_LETTER)

    return decode
