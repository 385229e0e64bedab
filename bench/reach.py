"""What comes of every criterion, compensation and two rounds of pruning on every small network, counted.

Usage: ``python -m bench.reach [--only NAME ...]``. The networks are those of ``tests/cases`` and
``tests/criteria/networks.py``, each in fp32 and fp64. An attempt ends in a result or in a clean error, of which it is
found out whether it is true; anything else is printed as a fault.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
import warnings
from collections import Counter

import torch

from tests.cases import CASES
from tests.criteria.networks import NETWORKS
from tests.criteria.reach import DTYPES, TRUE, Reach, reach, untrue


def _reason(error: str) -> str:
    return next((part.strip(" :,") for part in TRUE if part in error), re.sub(r"\d+", "N", error))


def _tried(name: str, precision: str) -> Reach | None:
    """Try everything on a network; print what is a fault."""
    try:
        found = reach(name, DTYPES[precision])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        text = (str(error).strip() or "no text").splitlines()[0]
        print(f"FAULT {name} {precision}: {type(error).__name__}: {text}", flush=True)
        return None
    for what, text in untrue(found).items():
        print(f"FAULT {name} {precision}: {what}: {text}", flush=True)
    return found


def main() -> None:
    """Run over the networks and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=(), help="names of networks; all by default")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.perf_counter()
    results: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for name in (name for name in (*CASES, *NETWORKS) if not only or name in only):
        for precision in DTYPES:
            found = _tried(name, precision)
            kinds["fault" if found is None else "with groups" if found.exact else "without a group that can go"] += 1
            if found is not None:
                results += found.results
                reasons += Counter(_reason(str(error)) for error in found.errors.values())
    print(f"{sum(kinds.values())} networks in a precision: {', '.join(f'{n} {k}' for k, n in kinds.items())}")
    print(f"results: {', '.join(f'{n} {kind}' for kind, n in results.items())}")
    print(f"clean errors: {sum(reasons.values())}")
    for reason, count in reasons.most_common():
        print(f"{count:6d}  {reason}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
