"""Server: a function of packed batches, compiled ahead of time under each plan of a family."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxpack._checks import unchecked
from jaxpack._dtypes import canonical
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.cost import CostModel
from jaxpack._types import PyTree
from jaxpack.data._packing import pack_on_host
from jaxpack.serving._files import Saved, check_flatbuffers, read_server, undamaged, write_server
from jaxpack.serving._results import check_forms, form_of, results_of
from jaxpack.serving._routing import Route, Router
from jaxpack.serving._schema import Request, Schema

Program = Callable[[list[jax.Array], PackedSequence], PyTree]


class Server:
    """Answers sequences of any lengths with programs that are all compiled when it is made.

    Each call lays its sequences out on the host, runs them under the cheapest plan that they fit together, in several
    batches if they fit none, and takes the results apart on the host again: nothing is left to compile. A server may be
    called from several threads; for many small calls see `jaxpack.serving.Queue`.

    The example fixes the dtypes: whatever values they hold are taken, in any dtype, and others are an error. float64 is
    rounded to float32, as JAX does by default; Python's floats to any float.

    Examples:
      >>> plans = [jaxpack.plan_padded(2, 3)]
      >>> def weighted_sum(weight, packed):
      ...     return weight * jaxpack.segment_sum(packed)
      >>> server = Server(weighted_sum, 10, plans, example=np.zeros(1, int))
      >>> [int(result) for result in server([[1, 2, 3], [4], [5, 6]])]  # NumPy, one result a sequence, in order
      [60, 40, 110]

    Args:
      function: function(params, packed) -> results: a pytree of arrays [B, ...], a row a sequence in the order of the
        batch (layer.final_output(state)), and of PackedSequences, for values per step. Jittable.
      params: what it takes first, any pytree of arrays.
      plans: at least one BucketPlan; the longest limits the length of a request. As batches that fit none are split,
        none need be large enough for all: jaxpack.data.plan_cover(lengths, size, miss=0.1) for a few sizes, and
        plan_padded(1, longest), do less work than a large padded plan, which every batch would fit.
      example: what a sequence looks like: an array [L, *F], or a pytree of arrays, of any number of steps; or
        jax.ShapeDtypeStructs.
      cost_model: says which plan is cheapest, by its run_time. Default: CostModel().

    Raises:
      ValueError: if there is no plan, example is no sequence, params hold an integer that JAX does not, or the
        function's results are not per sequence or have a form that depends on the plan.
      TypeError: if plans holds something else, or example no arrays.
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
        weights, structure = jax.tree.flatten(jax.tree_util.tree_map_with_path(_weight, params))

        @unchecked
        def program(weights: list[jax.Array], packed: PackedSequence) -> PyTree:
            return function(jax.tree.unflatten(structure, weights), packed)

        programs = dict.fromkeys(_checked_plans(plans), program)
        self._start(programs, weights, Schema.of(example), cost_model or CostModel())

    def _start(
        self,
        programs: Mapping[BucketPlan, Program],
        weights: list[jax.Array],
        schema: Schema,
        cost_model: CostModel,
    ) -> None:
        """Compiles every program, and runs it once on an empty batch."""
        self._programs, self._weights, self._schema, self._cost_model = programs, weights, schema, cost_model
        self._x64 = jax.config.read("jax_enable_x64")  # of this thread; the server's own in every other
        self._process = os.getpid()
        self._router = Router.of(tuple(programs), cost_model)
        lowered = {plan: jax.jit(program).lower(weights, schema.packed(plan)) for plan, program in programs.items()}
        check_forms({plan: form_of(one.out_info, plan) for plan, one in lowered.items()})
        self._compiled = {plan: one.compile() for plan, one in lowered.items()}
        for plan in self.plans:
            self.run(plan, [schema.empty()])

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The plans, the cheapest first."""
        return self._router.plans

    @property
    def max_length(self) -> int:
        """The steps of the longest sequence that can be answered."""
        return self._router.max_length

    @property
    def batch_size(self) -> int:
        """The most sequences that a plan holds."""
        return max(plan.num_sequences for plan in self.plans)

    def __call__(self, sequences: Iterable[PyTree]) -> list[PyTree]:
        """The result of each sequence, in order, as NumPy arrays: [...] for an array [B, ...], [L, ...] where packed.

        Raises:
          ValueError: naming the first sequence that is longer than every plan, whose structure or features are not the
            example's, or with a value that the example's dtype does not hold.
          TypeError: naming the first that holds no numbers, or numbers of another kind (floats for integers); if
            sequences is no list.
          RuntimeError: in a forked child of the process that made the server, where JAX would hang.
        """
        if isinstance(sequences, (str, Mapping, PackedSequence)) or not isinstance(sequences, Iterable):
            raise TypeError(f"a server takes a list of sequences, got {type(sequences).__name__}.")
        requests = [self.check(sequence, f"sequences[{i}]") for i, sequence in enumerate(sequences)]
        results: list[PyTree] = [None] * len(requests)
        for plan, rows in self.route([request.length for request in requests]):
            for row, result in zip(rows, self.run(plan, [requests[row] for row in rows]), strict=True):
                results[row] = result
        return results

    def check(self, sequence: PyTree, name: str = "sequence") -> Request:
        """The entrance of every sequence: what `run` takes. Raises as a call does, with the name in front."""
        self._check_process()
        request = self._schema.read(sequence, name)
        if request.length > self.max_length:
            raise ValueError(
                f"{name} has {request.length} steps, but the longest plan has room for {self.max_length}. Make "
                f"the server with a plan that covers it (jaxpack.plan_padded(1, {request.length})) or truncate it."
            )
        return request

    def route(self, lengths: npt.ArrayLike) -> list[Route]:
        """The batches in which sequences of these lengths would run; `Router.route` says how they are chosen."""
        return self._router.route(lengths)

    def run(self, plan: BucketPlan, requests: Sequence[Request]) -> list[PyTree]:
        """The results of requests that fit a plan together, in order."""
        with jax.enable_x64(self._x64):
            packed = pack_on_host([request.arrays for request in requests], plan)
            output = jax.device_get(self._compiled[plan](self._weights, packed))
        return results_of(output, len(requests))

    def save(self, directory: str | os.PathLike[str], *, platforms: Sequence[str] | None = None) -> None:
        """Writes the programs and weights to a folder, from which `Server.load` makes a server without this code.

        Programs are written by jax.export, which promises that JAX reads them for six months at least. Pytree nodes in
        sequences and results other than tuples, lists, dicts and PackedSequence must be registered with
        jax.export.register_pytree_node_serialization, those of params need not.

        Args:
          directory: made if there is none. A server in it is replaced.
          platforms: where it may be loaded, of "cpu", "cuda", "rocm" and "tpu". Default: the present one.

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
                jax.export.export(jax.jit(program), platforms=platforms)(self._weights, self._schema.packed(plan))
                for plan, program in self._programs.items()
            ]
        settings = {"x64": self._x64, "cost_model": dataclasses.asdict(self._cost_model)}
        write_server(directory, Saved(programs, weights, settings))

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, cost_model: CostModel | None = None) -> Server:
        """A server from a folder that `save` wrote. Compiles each program, once.

        Args:
          directory: the folder. Load only what you trust: programs run as they are.
          cost_model: as in the constructor, for another machine. Default: the saved server's.

        Raises:
          ModuleNotFoundError: if flatbuffers is not installed (extra `serving`).
          FileNotFoundError: if there is no folder, or no server in it; it is a ValueError too.
          ValueError: naming the file that is damaged or missing; if the server was saved for other platforms or by an
            incompatible version.
        """
        saved = read_server(directory)
        batches = []
        for i, program in enumerate(saved.programs):
            with undamaged(directory, i):
                batches.append(_batch_of(program, saved.weights))
                if Schema.of(batches[i].data) != Schema.of(batches[0].data):
                    raise ValueError("it takes other sequences than the first program")
        with undamaged(directory):
            x64, costs = (saved.settings[key] for key in ("x64", "cost_model"))
            saved_model = CostModel(**costs)
            if not isinstance(x64, bool):
                raise TypeError(f"x64 is {x64!r}")
        server = cls.__new__(cls)
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
                "the server was made in another process, of which this is a fork, and JAX's threads do not live on in "
                "a fork. Make or load a server in this process, which must be started before JAX computes, or by "
                "multiprocessing.get_context('spawn')."
            )

    def __repr__(self) -> str:
        return f"Server({len(self.plans)} plans, max_length={self.max_length}, batch_size={self.batch_size})"


def _checked_plans(plans: Iterable[BucketPlan]) -> tuple[BucketPlan, ...]:
    if isinstance(plans, BucketPlan) or not isinstance(plans, Iterable):
        raise TypeError(f"plans must be a sequence of BucketPlans, got {type(plans).__name__}.")
    plans = tuple(plans)
    if not plans:
        raise ValueError("plans is empty: a server needs at least one (jaxpack.data.plan_family(lengths, batch_size)).")
    for i, plan in enumerate(plans):
        if not isinstance(plan, BucketPlan):
            raise TypeError(f"plans must hold BucketPlans, got {type(plan).__name__} as plans[{i}].")
    return plans


def _weight(path: Any, leaf: Any) -> jax.Array:
    if isinstance(leaf, (np.ndarray, np.generic)) and np.issubdtype(leaf.dtype, np.integer):
        leaf = canonical(np.asarray(leaf), f"params{jax.tree_util.keystr(path)}")
    return jnp.asarray(leaf)


def _saveable(leaf: jax.Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"params hold a PRNG key of shape {leaf.shape}, which is not saved. Serve without randomness.")
    return np.asarray(leaf)


def _batch_of(program: jax.export.Exported, weights: Sequence[np.ndarray]) -> PackedSequence:
    """The batch that a saved program takes, in shapes and dtypes, after these weights."""
    (taken, batch), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    if not isinstance(batch, PackedSequence):
        raise TypeError(f"it takes no packed batch, but a {type(batch).__name__}")
    found, expected = ([(each.shape, each.dtype) for each in leaves] for leaves in (weights, taken))
    if found != expected:
        raise ValueError(f"it takes parameters of other shapes and dtypes than those saved: {expected}, not {found}")
    return batch
