"""The wrong-channel score: every pattern of ``tests/cases`` pruned by Secateur and by Torch-Pruning.

Usage: ``python -m bench.patterns [--only NAME ...] [--no-peer]``. All patterns' verdicts go to
``bench/results/patterns.jsonl``, and from there to ``docs/patterns.md``, as ``python -m bench.pages`` writes it; with
``--only`` or ``--no-peer`` they are printed alone.

For each pattern the layers before the output are pruned to half their channels, and the pruned network is compared
with the original whose removed channels are zeroed where they are read (``tests/oracle.py``). A verdict is ``exact``;
``refused`` (nothing was pruned, and the tool said so or left it alone); ``crash`` (the tool or the pruned network
raised); ``inexact`` (the pattern normalises over the channels themselves, so that no selection can equal zeroing, and
the tool pruned it all the same); ``wrong-shape``; or ``wrong-channel``: the right shape and wrong
values, which nobody notices.
"""

from __future__ import annotations

import argparse
import copy
import signal
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from bench import peer
from bench.rows import Row, Store
from bench.sections import Section
from tests import oracle
from tests.cases import CASES, Case

if TYPE_CHECKING:
    from collections.abc import Iterator

STORE = Store("patterns.jsonl", ("name",))
KINDS = ("exact", "refused", "inexact", "crash", "wrong-shape", "wrong-channel")


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _built(case: Case) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.randomise(case.build()).eval(), oracle.doubled(case.inputs())


def judge_secateur(case: Case, ratio: float = 0.5) -> oracle.Verdict:
    """Prune half of every exact group with Secateur."""
    model, inputs = _built(case)
    rng = np.random.default_rng(0)
    try:
        graph = sc.trace(model, inputs)
        chosen = {g.name: oracle.select(g, ratio, rng) for g in graph.groups if g.exact}
        chosen = {name: channels for name, channels in chosen.items() if channels}
        if not chosen:
            return oracle.Verdict("refused", "; ".join(r.reason for r in graph.refused))
        plan = sc.plan_removal(graph, chosen)
        small = sc.apply(model, plan)
    except sc.SecateurError as error:
        return oracle.Verdict("refused", str(error))
    except Exception as error:  # noqa: BLE001 - any other exception is the verdict
        return oracle.Verdict("crash", f"{type(error).__name__}: {error}")
    return _judged(case, model, small, plan, oracle.fresh(inputs, 1))


def _judged(case: Case, model: nn.Module, small: nn.Module, plan: oracle.Plan, inputs: Any) -> oracle.Verdict:
    """Compare, and tell a wrong channel from a norm over fewer channels."""
    verdict = oracle.judge(model, small, plan, inputs, modes=case.modes)
    if verdict.kind == "wrong-channel" and (
        case.normalising or oracle.judge(model, small, plan, inputs, modes=case.modes, norms=True).exact
    ):
        return oracle.Verdict("inexact", verdict.detail, verdict.error)
    return verdict


def judge_peer(case: Case, ratio: float = 0.5) -> oracle.Verdict:
    """Prune with Torch-Pruning and read its selection off the pruned network's values."""
    model, inputs = _built(case)
    names = {name for name, _ in model.named_modules()}
    small = copy.deepcopy(model)
    try:
        with _limit(60):
            peer.prune(small, inputs, [o for o in case.outputs if o in names], ratio)
    except Exception as error:  # noqa: BLE001
        return oracle.Verdict("crash", f"{type(error).__name__}: {error}")
    before = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if before == {n: tuple(p.shape) for n, p in small.named_parameters()}:
        return oracle.Verdict("refused", "nothing was pruned")
    try:
        oracle.run(small, inputs)
    except Exception as error:  # noqa: BLE001
        return oracle.Verdict("crash", f"{type(error).__name__}: {error}")
    try:
        plan = oracle.recover(model, small)
    except ValueError as error:
        return oracle.Verdict("wrong-channel", str(error))
    return _judged(case, model, small, plan, oracle.fresh(inputs, 1))


def score(rows: list[Row]) -> list[str]:
    """Count the verdicts, as the lines of a Markdown table."""
    counts = {tool: Counter(row.get(tool) for row in rows) for tool in ("secateur", "peer")}
    return [
        "| verdict | Secateur | Torch-Pruning |",
        "|---|---:|---:|",
        *(f"| {kind} | {counts['secateur'][kind]} | {counts['peer'][kind]} |" for kind in KINDS),
    ]


def render() -> str:
    """Return the score and every pattern's verdicts as Markdown."""
    rows = STORE.read()
    return "\n".join(
        [
            "Small networks, one for each pattern (`tests/cases`), pruned to half their channels and compared with the",
            "original whose removed channels are zeroed where they are read. `python -m bench.patterns` measures it.",
            "",
            *score(rows),
            "",
            "| pattern | Secateur | Torch-Pruning |",
            "|---|---|---|",
            *(f"| `{row['name']}`: {row['pattern']} | {row['secateur']} | {row['peer']} |" for row in rows),
        ]
    )


SECTION = Section("patterns.md", "patterns", render)


def main() -> None:
    """Judge both tools on every pattern."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES.values():
        if options.only and case.name not in options.only:
            continue
        row: Row = {"name": case.name, "pattern": case.pattern.splitlines()[0]}
        for tool, judge in (("secateur", judge_secateur), *((("peer", judge_peer),) if options.peer else ())):
            verdict = judge(case)
            row[tool] = verdict.kind
            print(f"{case.name:40s} {tool:9s} {verdict.kind:15s} {verdict.detail}", flush=True)
        rows.append(row)
    print(*score(rows), sep="\n")
    if options.peer and not options.only:
        STORE.write(rows)
        SECTION.write()


if __name__ == "__main__":
    main()
