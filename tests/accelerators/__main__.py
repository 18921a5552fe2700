"""Counts what a layer launches on an accelerator that is not there.

cd tests
../.venv/bin/python -m accelerators LSTM buckets h100 --training
"""

import argparse

from accelerators.cases import DTYPES, FORMS, GATES, Case
from accelerators.counts import count
from accelerators.targets import GPUS, TARGETS, missing


def main() -> None:
    """Prints the counts of the case that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m accelerators", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layer", choices=GATES)
    parser.add_argument("form", choices=FORMS, help="a plan, no plan, plain autodiff or flax.nnx")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--training", action="store_true", help="a loss with its gradients; otherwise the outputs")
    parser.add_argument("--directions", type=int, choices=(1, 2), default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--resets", action="store_true", help="with a flag for each step, whether it begins an episode")
    options = parser.parse_args()
    if options.resets and options.form == "flax":
        parser.error("flax.nnx.RNN takes no resets")
    if reason := missing(options.target):
        parser.error(reason)
    case = Case(**vars(options))
    found = count(case)
    print(case.name)
    passes = zip(("forward", "backward"), found.kernels, found.share, found.cycles, strict=False)
    for name, kernels, share, cycles in passes:
        estimate = f", {cycles:,} cycles" if cycles else ""
        print(f"  {name}: {share:.1%} of the steps in loops, {kernels:.2f} kernels each{estimate}")
    print(f"  {found.launches:,} kernels in all, {found.loops} loops, {found.unknown_trips} of unknown trip count")
    if case.target in GPUS:
        print(f"  the bodies of {found.graphs} of {found.innermost} innermost loops are one CUDA graph each")
    print(f"  {found.weight_gradients} weight gradients in loops")
    print(f"  {found.temporaries / 2**20:.1f} MiB of temporaries, compiled in {found.seconds:.1f} CPU seconds")


if __name__ == "__main__":
    main()
