"""The differences from PyTorch that .docs/coming-from.md lists, tested beside PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxpack
import jaxpack.losses

pytestmark = oracles.needs_torch
torch = oracles.torch

X = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
SORTED = {"batch_first": True, "enforce_sorted": True}
UNSORTED = {"batch_first": True, "enforce_sorted": False}


def theirs(name, *args, **options):
    tensors = [torch.tensor(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    return getattr(torch.nn.utils.rnn, name)(*tensors, **options)


def ours(name, *args, **options):
    return getattr(jaxpack, name)(*args, **options)


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {
    "not sorted": (("pack_padded_sequence", X, [2, 3]), SORTED, RuntimeError),
    "a length of 0": (("pack_padded_sequence", X, [3, 0]), SORTED, RuntimeError),
    "fewer lengths than rows": (("pack_padded_sequence", X, [3]), SORTED, RuntimeError),
    "more lengths than rows": (("pack_padded_sequence", X, [3, 2, 1]), UNSORTED, IndexError),
    "no sequences": (("pad_sequence", []), {}, RuntimeError),
    "no sequences to pack": (("pack_sequence", []), {}, RuntimeError),
    "padding_side": (("pad_sequence", [np.ones(1)]), {"padding_side": "top"}, (RuntimeError, TypeError)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_torch_refuses_in_several_ways_are_value_errors(case):
    call, options, error = REFUSED[case]
    with pytest.raises(error):
        theirs(*call, **options)
    with pytest.raises(ValueError, match=r"\w+"):
        ours(*call, **options)


@pytest.mark.parametrize(
    ("lengths", "taken"),
    [([4, 2], [2, 2, 1, 1]), ([3], [1, 1, 1]), (np.array([2.7, 2.0]), [2, 2]), (np.array([True, True]), [2])],
    ids=["above T", "fewer than rows", "fractions", "booleans"],
)
def test_lengths_that_torch_reinterprets_are_refused(lengths, taken):
    assert theirs("pack_padded_sequence", X, lengths, **UNSORTED).batch_sizes.tolist() == taken
    with pytest.raises((ValueError, TypeError), match="length"):
        ours("pack_padded_sequence", X, lengths, **UNSORTED)


def test_indices_are_always_there_and_lengths_are_int32():
    packed, packed_there = (each("pack_padded_sequence", X, [3, 2], **SORTED) for each in (ours, theirs))
    assert packed_there.sorted_indices is None
    assert packed.sorted_indices.tolist() == packed.unsorted_indices.tolist() == [0, 1]
    assert theirs("pad_packed_sequence", packed_there)[1].dtype == torch.int64
    assert ours("pad_packed_sequence", packed)[1].dtype == jnp.int32
    assert isinstance(packed.batch_sizes, np.ndarray)


def test_unpad_sequence_leaves_its_input_and_takes_lists():
    tensor = torch.tensor(X).transpose(0, 1).contiguous()
    torch.nn.utils.rnn.unpad_sequence(tensor, torch.tensor([3, 2]))
    assert tuple(tensor.shape) == (2, 3, 2)  # was [3, 2, 2]
    array = jnp.asarray(X).swapaxes(0, 1)
    assert [each.shape for each in jaxpack.unpad_sequence(array, [3, 2])] == [(3, 2), (2, 2)]
    assert array.shape == (3, 2, 2)
    with pytest.raises(AttributeError):
        theirs("unpad_sequence", X, [3, 2], batch_first=True)


def test_other_objects_and_keys_raise_type_and_key_errors():
    with pytest.raises(AttributeError):
        theirs("pad_packed_sequence", X)
    with pytest.raises(TypeError, match="takes a PackedSequence"):
        ours("pad_packed_sequence", X)
    with pytest.raises(RuntimeError):
        torch.nn.GRU(2, 4).load_state_dict({})
    with pytest.raises(KeyError, match="missing"):
        jaxpack.GRU(2, 4).from_torch({})


def test_the_mean_of_torchs_ctc_is_over_labels_first():
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((length, 4)).astype(np.float32) for length in (9, 5)]
    labels, label_lengths = np.array([[1, 2, 3], [2, 0, 0]]), np.array([3, 1])
    log_probs = torch.log_softmax(torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in logits]), -1)
    there = torch.nn.functional.ctc_loss(
        log_probs, torch.tensor(labels), torch.tensor([9, 5]), torch.tensor(label_lengths)
    )
    weights = 1 / np.maximum(label_lengths, 1).astype(np.float32)
    here = jax.jit(jaxpack.losses.ctc)(jaxpack.pack_sequence(logits), labels, label_lengths, weights)
    np.testing.assert_allclose(here.total / len(label_lengths), there, rtol=1e-6)
