"""The cases of `jaxpack bench gpu`: their order, sizes and environments."""

import os

import pytest

from jaxpack.cli.bench.gpu.cases import GRAPHS, TINY, all_cases
from jaxpack.cli.bench.peers import PEERS

FIRST = "lognormal-lstm-float32-64x256"


def test_cases_are_all_layers_dtypes_and_sizes_of_the_issue():
    cases = all_cases()
    names = [case.name for case in cases]
    assert len({*names}) == len(names) == 3 * 3 * 2 * 2 * 3 + 3 * 2 + 2
    for lengths in ("lognormal", "equal", "bilstm2"):
        for cell in ("lstm", "gru", "rnn"):
            for dtype in ("float32", "bfloat16"):
                for batch_size in (64, 256):
                    for hidden_size in (256, 512, 1024):
                        assert f"{lengths}-{cell}-{dtype}-{batch_size}x{hidden_size}" in names
                assert f"long-{cell}-{dtype}-16x768" in names


def test_the_first_cases_differ_in_one_respect_from_the_first_of_all():
    first, *others = all_cases()
    assert first.name == FIRST

    def differs(case):
        fields = {"lengths"} if case.lengths == "long" else {"lengths", "batch_size", "hidden_size"}
        return sum(getattr(case, field) != getattr(first, field) for field in fields | {"cell", "dtype", "graphs"})

    counts = [differs(case) for case in others]
    assert counts == sorted(counts)
    assert counts.count(1) == 11


@pytest.mark.parametrize(("name", "flag"), GRAPHS.items())
def test_graphs_are_a_flag_of_every_process_and_do_not_replace_others(monkeypatch, name, flag):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_hlo_as_text=false")
    cases = all_cases(name)
    assert len(cases) == 114
    assert {case.graphs for case in cases} == {name}
    for case in (cases[0], cases[-1]):
        assert case.environment()["XLA_FLAGS"] == f"--xla_dump_hlo_as_text=false {flag}".strip()
        assert case.environment()["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert case.environment()["PATH"] == os.environ["PATH"]


def test_only_libraries_that_read_the_flags_are_measured_with_other_graphs():
    by_graphs = {case.graphs: {name for group in case.groups for name in group} for case in all_cases()}
    assert by_graphs["off"] == by_graphs["loops"] == {"jaxpack", "jaxpack-padded", "flax.nnx"}
    assert by_graphs["default"] >= {"jaxpack-rows", "jaxpack-buckets", "jax-cudnn", "torch-packed", "torch-padded"}
    assert by_graphs["default"] <= {*PEERS}


def test_workloads_have_the_lengths_that_their_names_say():
    sizes: dict[str, list[tuple[int, int]]] = {}
    for case in all_cases():
        workload = case.workload(0)
        assert (workload.cell, workload.dtype, workload.batch_size) == (case.cell, case.dtype, case.batch_size)
        assert (workload.num_layers, workload.bidirectional) == ((2, True) if case.lengths == "bilstm2" else (1, False))
        sizes.setdefault(case.lengths, []).append((workload.lengths.min(), workload.longest))
    assert {*sizes["long"]} == {(1024, 1024)}
    assert {*sizes["equal"]} == {(100, 100)}
    assert max(shortest for shortest, _ in sizes["lognormal"]) < 50 < 150 < min(t for _, t in sizes["bilstm2"])


def test_a_try_out_divides_all_sizes():
    for case, tiny in zip(all_cases(), all_cases(divisor=TINY), strict=True):
        full, small = case.workload(0), tiny.workload(0)
        assert (small.batch_size, small.hidden_size, small.features) == (
            full.batch_size // 16,
            full.hidden_size // 16,
            8,
        )
        assert small.longest <= 64
        assert tiny.environment()["JAX_PLATFORMS"] == "cpu"
