"""A program of two processes, which compare values that differ in one way at a time, and print what they are told."""

import json

import jax
import numpy as np

import jaxpack
from jaxpack.sharding import check_hosts_agree, start_hosts

start_hosts()
me = jax.process_index()
same = {"plan": jaxpack.plan_buckets([5, 3, 2]), "lengths": np.arange(4000)}


def told(**values):
    try:
        check_hosts_agree(**values)
    except ValueError as error:
        return str(error)
    return "they agree"


lengths = np.arange(4000)
lengths[3999] += me
print(
    json.dumps(
        {
            "nothing": told(),
            "same": told(seed=0, name="corpus", state={"epoch": 1, "batch": 2}, **same),
            "seed": told(seed=me, **same),
            "plan": told(seed=0, plan=jaxpack.plan_padded(3, 5 + me)),
            "lengths": told(lengths=lengths),
            "dtype": told(lengths=np.arange(9, dtype=[np.int32, np.int64][me])),
            "names": told(**{["seed", "seeds"][me]: 0}),
        }
    )
)
