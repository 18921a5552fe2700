"""Programs compiled for accelerators that are not there, and what is counted in them.

The compilers read the environment when they are loaded. CPU is the platform that runs anything; libtpu asks no metadata
server, and several processes may load it, since none has a TPU to itself.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
