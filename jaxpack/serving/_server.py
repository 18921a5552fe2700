"""Server: a function of packed batches, compiled ahead of time under each plan of a family."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxpack._checks import concrete_lengths
from jaxpack._dtypes import canonical
from jaxpack._packed.host_layout import HostLayout
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.cost import CostModel
from jaxpack._traced_checks import unchecked
from jaxpack._types import PyTree
from jaxpack.serving._files import Saved, check_flatbuffers, read_server, undamaged, write_server
from jaxpack.serving._results import check_forms, form_of, results_of
from jaxpack.serving._routing import Route, Router
from jaxpack.serving._schema import Request, Schema

Program = Callable[[list[jax.Array], PackedSequence], PyTree]


class Server:
    """Answers sequences of any lengths with programs that are compiled when the server is made.

    Each call packs its sequences on the host, runs them under the cheapest plan that they fit together, in several
    batches if they fit none, and splits the results on the host, so it compiles nothing. Several threads may call a
    server; for many small calls see `jaxpack.serving.Queue`.

    The example determines the dtypes. Values of any dtype are accepted if these can hold them; other values are an
    error. float64 is rounded to float32, as JAX does by default, and Python's floats to any float.

    Examples:
      >>> plans = [jaxpack.plan_padded(2, 3)]
      >>> def weighted_sum(weight, packed):
      ...     return weight * jaxpack.segment_sum(packed)
      >>> server = Server(weighted_sum, 10, plans, example=np.zeros(1, int))
      >>> [int(result) for result in server([[1, 2, 3], [4], [5, 6]])]  # NumPy, one result per sequence, in order
      [60, 40, 110]

    Args:
      function: a jittable function(params, packed) -> results. Results are a pytree of arrays [B, ...], with a row per
        sequence in the order of the batch (layer.final_output(state)), and of PackedSequences, for values per step.
      params: the function's first argument, any pytree of arrays.
      plans: at least one BucketPlan; the longest limits the length of a request. No plan needs to hold all sequences,
        since batches that fit none are split: jaxpack.data.plan_cover(lengths, size, miss=0.1) for a few sizes, and
        plan_padded(1, longest), do less work than a large padded plan that every batch fits.
      example: a sequence of any number of steps: an array [L, *F], or a pytree of arrays or jax.ShapeDtypeStructs.
      cost_model: determines the cheapest plan by its run_time. Default: that of forward passes on the platform,
        `CostModel.for_platform(training=False)`.

    Raises:
      ValueError: if there is no plan, example is not a sequence, params hold an integer that JAX cannot hold, or the
        function's results are not per sequence or have a form that depends on the plan.
      TypeError: if plans holds anything but BucketPlans, or example holds no arrays.
    """

    def __init__(
        self,
        function: Callable[[Any, PackedSequence], PyTree],
        params: PyTree,
        plans: Sequence[BucketPlan],
        example: PyTree,
        *,
        cost_model: CostModel | None = None,
    ) -> None:
        weights, structure = jax.tree.flatten(jax.tree_util.tree_map_with_path(as_weight, params))

        @unchecked
        def program(weights: list[jax.Array], packed: PackedSequence) -> PyTree:
            return function(jax.tree.unflatten(structure, weights), packed)

        programs = dict.fromkeys(checked_plans(plans), program)
        self._start(programs, weights, Schema.of(example), cost_model or CostModel.for_platform(training=False))

    def _start(
        self,
        programs: Mapping[BucketPlan, Program],
        weights: list[jax.Array],
        schema: Schema,
        cost_model: CostModel,
    ) -> None:
        """Compiles every program, and runs it once on an empty batch."""
        self._programs, self._weights, self._schema, self._cost_model = programs, weights, schema, cost_model
        self._x64 = jax.config.read("jax_enable_x64")  # this thread's value, which calls from all threads use
        self._process = os.getpid()
        self._router = Router.of(tuple(programs), cost_model)
        lowered = {
            plan: jax.jit(program).lower(weights, *self._argument_shapes(plan)) for plan, program in programs.items()
        }
        check_forms({plan: form_of(self._results(one.out_info, plan), plan) for plan, one in lowered.items()})
        self._compiled = {plan: one.compile() for plan, one in lowered.items()}
        for plan in self.plans:
            self.run(plan, [schema.empty()])

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The plans, cheapest first."""
        return self._router.plans

    @property
    def max_length(self) -> int:
        """The most steps of a sequence."""
        return self._router.max_length

    @property
    def batch_size(self) -> int:
        """The most sequences that a plan holds."""
        return max(plan.num_sequences for plan in self.plans)

    def __call__(self, sequences: Iterable[PyTree]) -> list[PyTree]:
        """Returns the result of each sequence, in order, as NumPy arrays.

        A result is [...] where the function returns an array [B, ...], and [L, ...] where it returns a PackedSequence.

        Raises:
          ValueError: if a sequence is longer than every plan, its structure or features are not the example's, or the
            example's dtype cannot hold one of its values. The message names the first such sequence.
          TypeError: if sequences is not a list, or a sequence does not hold numbers, or holds numbers of another kind
            (floats for integers).
          RuntimeError: in a forked child of the process that made the server, where JAX would hang.
        """
        if isinstance(sequences, (str, Mapping, PackedSequence)) or not isinstance(sequences, Iterable):
            raise TypeError(f"a server takes a list of sequences, got {type(sequences).__name__}.")
        requests = [self.check(sequence, f"sequences[{i}]") for i, sequence in enumerate(sequences)]
        results: list[PyTree] = [None] * len(requests)
        for wave in self._waves(requests):
            for plan, rows in self._router.route([requests[i].length for i in wave]):
                here = [wave[row] for row in rows]
                for i, result in zip(here, self.run(plan, [requests[i] for i in here]), strict=True):
                    results[i] = result
        return results

    def check(self, sequence: PyTree, name: str = "sequence") -> Request:
        """Returns a checked sequence for `run`. Raises as a call does; errors call the sequence `name`."""
        self._check_process()
        request = self._schema.read(sequence, name)
        if request.length > self.max_length:
            raise ValueError(
                f"{name} has {request.length} steps, but the longest plan has room for {self.max_length}. Make "
                f"the server with a plan that covers it (jaxpack.plan_padded(1, {request.length})) or truncate it."
            )
        return request

    def route(self, lengths: npt.ArrayLike) -> list[Route]:
        """Returns the batches in which sequences with these lengths run.

        Sequences that fit one plan together run under the cheapest such plan; others are split into several batches.

        Raises:
          ValueError: if a length is negative, not whole, or above max_length.
          TypeError: if lengths is not a vector of numbers.
        """
        checked = concrete_lengths(lengths)
        if checked.max(initial=0) > self.max_length:
            row = int(checked.argmax())
            raise ValueError(
                f"lengths[{row}] = {checked[row]}, but the longest plan has room for {self.max_length}. Make the "
                f"server with a plan that covers it (jaxpack.plan_padded(1, {checked[row]}))."
            )
        return self._router.route(checked)

    def run(self, plan: BucketPlan, requests: Sequence[Request]) -> list[PyTree]:
        """Runs requests that fit a plan together, and returns their results in order."""
        return results_of(self._output(plan, requests), len(requests))

    def _output(self, plan: BucketPlan, requests: Sequence[Request], *others: PyTree) -> PyTree:
        """Runs the program of a plan on requests, and on further arguments; returns its output in NumPy."""
        lengths = np.array([request.length for request in requests])
        plan.check(lengths)
        rows = HostLayout.of(lengths, plan)
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(request.arrays for request in requests))
        packed = rows.packed(jax.tree.map(rows.spread, joined))
        with jax.enable_x64(self._x64):
            return jax.device_get(self._compiled[plan](self._weights, packed, *others))

    def _argument_shapes(self, plan: BucketPlan) -> tuple[PyTree, ...]:
        """Returns the shapes and dtypes of what a program takes after the weights."""
        return (self._schema.packed(plan),)

    def _results(self, output: PyTree, plan: BucketPlan) -> PyTree:
        """Returns the part of a program's output that is the results of its sequences."""
        return output

    def _waves(self, requests: Sequence[Request]) -> list[list[int]]:
        """Returns the places of requests that may run in one batch, in the order in which they run."""
        return [list(range(len(requests)))]

    def _restore(self, weights: Sequence[np.ndarray], others: Sequence[PyTree]) -> None:
        """Takes from a saved server what `_start` does not: `others` are the arguments of its first program."""
        if others:
            raise ValueError("it holds sessions: load it with SessionServer.load")

    def save(self, directory: str | os.PathLike[str], *, platforms: Sequence[str] | None = None) -> None:
        """Writes the programs and weights to a folder, from which `Server.load` makes a server without this code.

        Programs are written by jax.export, which promises that JAX reads them for at least six months. Pytree nodes in
        sequences and results other than tuples, lists, dicts and PackedSequence must be registered with
        jax.export.register_pytree_node_serialization; those of params need not.

        Args:
          directory: the folder, which is created if it is missing. A server in it is replaced.
          platforms: the platforms that can load the server, of "cpu", "cuda", "rocm" and "tpu". Default: the present
            one.

        Raises:
          ModuleNotFoundError: if flatbuffers is not installed (extra `serving`).
          TypeError: if a parameter is a PRNG key.
          RuntimeError: in a forked child, as a call.
        """
        check_flatbuffers()
        self._check_process()
        weights = [_saveable(leaf) for leaf in self._weights]
        with jax.enable_x64(self._x64):
            programs = [
                jax.export.export(jax.jit(program), platforms=platforms)(self._weights, *self._argument_shapes(plan))
                for plan, program in self._programs.items()
            ]
        settings = {"x64": self._x64, "cost_model": dataclasses.asdict(self._cost_model)}
        write_server(directory, Saved(programs, weights, settings))

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, cost_model: CostModel | None = None) -> Self:
        """Makes a server from a folder that `save` wrote. Compiles each program once.

        Args:
          directory: the folder. Load only folders that you trust, since their programs run.
          cost_model: as in the constructor, for another machine. Default: the saved server's.

        Raises:
          ModuleNotFoundError: if flatbuffers is not installed (extra `serving`).
          FileNotFoundError: if there is no folder, or no server in it; it is also a ValueError.
          ValueError: if a file is damaged or missing (the message names it), or the server was saved for other
            platforms or by an incompatible version.
        """
        saved = read_server(directory)
        batches, others = [], []
        for i, program in enumerate(saved.programs):
            with undamaged(directory, i):
                batch, *rest = _arguments_of(program, saved.weights)
                batches.append(batch)
                others.append(rest)
                if Schema.of(batches[i].data) != Schema.of(batches[0].data):
                    raise ValueError("it takes other sequences than the first program")
        with undamaged(directory):
            x64, costs = (saved.settings[key] for key in ("x64", "cost_model"))
            saved_model = CostModel(**costs)
            if not isinstance(x64, bool):
                raise TypeError(f"x64 is {x64!r}")
        server = cls.__new__(cls)
        with undamaged(directory, 0):
            server._restore(saved.weights, others[0])
        with jax.enable_x64(x64):
            server._start(
                {batch.plan: program.call for batch, program in zip(batches, saved.programs, strict=True)},
                jax.device_put(list(saved.weights)),
                Schema.of(batches[0].data),
                cost_model or saved_model,
            )
        return server

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "the server was made in another process, and this is a fork of it, which does not have JAX's threads. "
                "Make or load a server in this process, which must be started before JAX computes, or by "
                "multiprocessing.get_context('spawn')."
            )

    def __repr__(self) -> str:
        return f"Server({len(self.plans)} plans, max_length={self.max_length}, batch_size={self.batch_size})"


def checked_plans(plans: Iterable[BucketPlan]) -> tuple[BucketPlan, ...]:
    """Returns plans as a tuple; raises unless they are BucketPlans, at least one."""
    if isinstance(plans, BucketPlan) or not isinstance(plans, Iterable):
        raise TypeError(f"plans must be a sequence of BucketPlans, got {type(plans).__name__}.")
    plans = tuple(plans)
    if not plans:
        raise ValueError("plans is empty: a server needs at least one (jaxpack.data.plan_family(lengths, batch_size)).")
    for i, plan in enumerate(plans):
        if not isinstance(plan, BucketPlan):
            raise TypeError(f"plans must hold BucketPlans, got {type(plan).__name__} as plans[{i}].")
    return plans


def as_weight(path: Any, leaf: Any) -> jax.Array:
    """Returns a leaf of the parameters as an array; raises ValueError for an integer that JAX cannot hold."""
    if isinstance(leaf, (np.ndarray, np.generic)) and np.issubdtype(leaf.dtype, np.integer):
        leaf = canonical(np.asarray(leaf), f"params{jax.tree_util.keystr(path)}")
    return jnp.asarray(leaf)


def _saveable(leaf: jax.Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"params hold a PRNG key of shape {leaf.shape}, which is not saved. Serve without randomness.")
    return np.asarray(leaf)


def _arguments_of(program: jax.export.Exported, weights: Sequence[np.ndarray]) -> list[Any]:
    """Returns the shapes and dtypes of what a saved program takes after these weights: a batch, and what follows."""
    (taken, batch, *others), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    if not isinstance(batch, PackedSequence):
        raise TypeError(f"it does not take a packed batch, but a {type(batch).__name__}")
    found, expected = ([(each.shape, each.dtype) for each in leaves] for leaves in (weights, taken))
    if found != expected:
        raise ValueError(f"it takes parameters of other shapes and dtypes than those saved: {expected}, not {found}")
    return [batch, *others]
