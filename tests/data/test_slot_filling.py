"""SlotFilling: one plan, one program, nearly full, and as random as shuffling."""

import jax
import pytest
from corpora import CORPORA, Sized

import jaxpack
from jaxpack import plan_padded
from jaxpack.data import SlotFilling, coverage, plan_cover
from jaxpack.datasets import japanese_vowels


@pytest.mark.parametrize("corpus", CORPORA)
def test_one_plan_reaches_97_percent_of_the_slot_bound_in_random_order(corpus):
    lengths = CORPORA[corpus]()
    plan = plan_cover(lengths, 64)
    expected = coverage(lengths, plan)
    statistics = SlotFilling(Sized(lengths), plan, lengths=lengths).statistics()
    assert plan.num_buckets <= 8
    assert statistics.programs == 1
    assert statistics.rows == len(lengths)
    assert statistics.efficiency == pytest.approx(expected.efficiency)
    assert statistics.efficiency > 0.97 * expected.slot_bound
    assert abs(statistics.rank_correlation) < 0.05
    if corpus == "words":
        assert statistics.efficiency > 0.95


def test_larger_batches_come_closer_to_full():
    lengths = CORPORA["log-normal"]()
    found = [SlotFilling(Sized(lengths), batch_size=size, lengths=lengths).statistics() for size in (16, 64, 256)]
    assert found[0].efficiency < found[1].efficiency < found[2].efficiency


@pytest.mark.parametrize("buffer_size", [1024, 4096])
def test_a_buffer_does_nearly_as_well_as_the_whole_corpus(buffer_size):
    lengths = CORPORA["gamma"]()
    plan = plan_cover(lengths, 64)
    whole = SlotFilling(Sized(lengths), plan, lengths=lengths).statistics()
    buffered = SlotFilling(Sized(lengths), plan, lengths=lengths, buffer_size=buffer_size).statistics()
    assert buffered.rows == whole.rows
    assert buffered.efficiency > 0.97 * whole.efficiency
    assert abs(buffered.rank_correlation) < 0.05


def test_a_real_epoch_compiles_one_program():
    train, _ = japanese_vowels()
    lstm = jaxpack.LSTM(12, 4)
    params = lstm.init(jax.random.key(0))
    traced = []

    @jax.jit
    def total(params, batch):
        traced.append(batch.inputs.plan)
        _, (h_n, _) = lstm.apply(params, batch.inputs)
        return (h_n[-1].sum(1) * batch.weights).sum()

    def epoch(batches):
        return sum(float(total(params, batch)) for batch in batches)

    first = epoch(SlotFilling(train.sequences, batch_size=32))
    assert len(traced) == 1
    expected = epoch(SlotFilling(train.sequences, plan_padded(90, 26)))
    assert first == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SlotFilling([[1]]), "pass either batch_size or max_cells"),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), batch_size=1), "pass a plan, or batch_size"),
        (lambda: SlotFilling(iter([[1]]), batch_size=1), "no lengths to make a plan from"),
    ],
)
def test_what_makes_the_plan_is_given_once(call, message):
    with pytest.raises(ValueError, match=message):
        call()
