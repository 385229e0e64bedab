"""Make every section of the documents that comes from measured rows anew.

    python -m bench.pages

Nothing is measured: the rows of ``bench/results`` say all that ``docs/patterns.md``, ``docs/benchmarks.md`` and their
sections of ``docs/results.md`` do. Each bench writes its own section in the same way when it has measured.
"""

from __future__ import annotations

from bench import (
    accuracy_tables,
    criteria,
    finetuning,
    gpu_tables,
    int8,
    latency,
    optimisation,
    patterns,
    recipes,
    zoo_table,
)

STORES = [
    patterns.STORE,
    zoo_table.STORE,
    *criteria.STORES.values(),
    finetuning.STORE,
    optimisation.STORE,
    recipes.STORE,
    accuracy_tables.STORE,
    latency.STORE,
    int8.STORE,
    gpu_tables.TABLES,
    gpu_tables.FIGURES,
]
SECTIONS = [
    patterns.SECTION,
    zoo_table.SECTION,
    *criteria.SECTIONS.values(),
    finetuning.SECTION,
    optimisation.SECTION,
    recipes.SECTION,
    accuracy_tables.SECTION,
    latency.SECTION,
    int8.SECTION,
    gpu_tables.SECTION,
]
FIGURES = [accuracy_tables.FIGURE]


def main() -> None:
    """Write them all."""
    for section in SECTIONS:
        section.write()
        print(f"docs/{section.document}: {section.name}")
    for figure in FIGURES:
        figure.write()
        print(f"docs/{figure.file}")


if __name__ == "__main__":
    main()
