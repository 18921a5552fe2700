"""Counts of calls and of collectives, for promises of how often something happens."""

import collections
import re
import sys


def counted_calls(run, *functions):
    """Returns how often a call of `run` calls each of these Python functions."""
    codes = [function.__code__ for function in functions]
    counts = [0] * len(codes)

    def count(frame, event, _):
        if event == "call" and frame.f_code in codes:
            counts[codes.index(frame.f_code)] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return counts


KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text):
    """Counts the collectives of a compiled program by kind: all of them, and those in its loops."""
    total: collections.Counter[str] = collections.Counter()
    in_loops: collections.Counter[str] = collections.Counter()
    entry = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if found := re.search(rf" ({KINDS})(-start)?\(", line):
            total[found[1]] += 1
            in_loops[found[1]] += not entry
    return dict(total), dict(+in_loops)
