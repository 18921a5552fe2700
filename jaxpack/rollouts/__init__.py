"""Rollouts of recurrent policies, and long or endless sequences in pieces.

Done flags become resets (`resets_from_dones`). A rollout runs as it is (`run_rollout`), or cut into fragments
of episodes (`cut_rollout`). A replay memory gives windows (`replay_windows`), whose first steps warm the
state up (`burn_in`). Long sequences run in chunks (`run_chunks`), and those that never end in a `Stream`.
"""

from jaxpack._namespace import publish as _publish
from jaxpack._rollouts.burn_in import burn_in
from jaxpack._rollouts.chunks import run_chunks
from jaxpack._rollouts.fragments import Fragments, cut_rollout, fragment_lengths
from jaxpack._rollouts.resets import resets_from_dones
from jaxpack._rollouts.rollout import run_rollout
from jaxpack._rollouts.stream import Stream
from jaxpack._rollouts.windows import Windows, replay_windows

__all__ = [
    "Fragments",
    "Stream",
    "Windows",
    "burn_in",
    "cut_rollout",
    "fragment_lengths",
    "replay_windows",
    "resets_from_dones",
    "run_chunks",
    "run_rollout",
]

_publish(__name__)
