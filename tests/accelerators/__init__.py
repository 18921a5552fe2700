"""Programs compiled for accelerators that are not there, and what is counted in them.

The environment is set before JAX loads: CPU is the platform that runs anything, and libtpu asks no metadata server.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
