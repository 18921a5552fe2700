"""Rollouts of recurrent policies, and long or endless sequences in pieces.

Done flags become resets (`resets_from_dones`). A rollout runs as it is, with `resets=` of a layer, or cut into
fragments of episodes (`cut_rollout`). Inputs that never end run a chunk at a time (`Stream`).
"""

from jaxpack._namespace import publish as _publish
from jaxpack._rollouts.fragments import Fragments, cut_rollout, fragment_lengths
from jaxpack._rollouts.resets import resets_from_dones
from jaxpack._rollouts.stream import Stream

__all__ = ["Fragments", "Stream", "cut_rollout", "fragment_lengths", "resets_from_dones"]

_publish(__name__)
