"""CFP's tables 2 and 3 and `auto` at the same MACs, with figures 4 and 5, on one GPU, in parts that resume.

    python -m bench.gpu_tables --data FOLDER --minutes 8

Each call goes on where the last one stopped and ends after so many minutes, with status 75 as long as something is left
and what was done since the last epoch lost; call it until it ends with 0. Images lie on the GPU and are augmented
there; training computes in bf16, channels last, and each step is a CUDA graph. The schedules are the recipes' own.
Networks whose published weights ``--weights`` doesn't hold are trained first, once for all rows of a network. Rows get
into ``bench/results/gpu-tables.jsonl`` and ``gpu-figures.jsonl``, beside what was measured on CPUs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur as sc
from bench.rows import Row, Store
from bench.sections import Section
from secateur.data import DataBundle, load
from secateur.deploy.timing import benchmark
from secateur.engine import loop
from secateur.runfile import config, configured_run, sources
from secateur.runfile.config import RunConfig
from secateur.training import baseline, stages

ROOT = Path(__file__).resolve().parent.parent
TABLES = Store("gpu-tables.jsonl", ("table", "row", "method", "seed"))
FIGURES = Store("gpu-figures.jsonl", ("row", "method", "network", "backend", "precision", "batch"))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
AGAIN = 75
"""Exit status while something is left: EX_TEMPFAIL."""


@dataclass(frozen=True)
class Job:
    """One row: a recipe, or `auto` to what the recipe removes."""

    table: int
    row: str
    recipe: str
    """File below ``recipes``, without its suffix."""
    method: str
    paper: float
    """Test error of the paper, in per cent."""
    auto: dict[str, Any] | None = None
    """Keys that make `auto` of the recipe; as many images are trained on."""
    figures: bool = False
    """Whether figures 4 and 5 are of this row's network."""

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.recipe}-auto" if self.auto else self.recipe


def _auto(macs: float, finetune: int) -> dict[str, Any]:
    settings = {"finetune_epochs": finetune, "final_epochs": 30, "lr": 0.01, "final_lr": 0.01, "weight_decay": 1e-4}
    return {"method": "auto", "target": {"macs": macs}, "settings": settings}


VGG, RES = "vgg16_cifar10", "resnet56_cifar10_cfp"
JOBS = (
    Job(2, "80.36%", f"{VGG}_cfp_80", "cfp", 6.77, figures=True),
    Job(2, "80.36%", f"{VGG}_noopt_80", "cfp without optimisation", 7.20),
    Job(2, "80.36%", f"{VGG}_cfp_80", "auto", 6.77, _auto(0.8036, 9)),
    Job(2, "81.93%", f"{VGG}_cfp_82", "cfp", 7.02),
    Job(2, "81.93%", f"{VGG}_noopt_82", "cfp without optimisation", 7.61),
    Job(2, "81.93%", f"{VGG}_cfp_82", "auto", 7.02, _auto(0.8193, 9)),
    Job(3, "(10, 20, 38)", f"{RES}_10_20_38", "cfp", 6.68, figures=True),
    Job(3, "(10, 20, 38)", f"{RES}_10_20_38", "auto", 6.68, _auto(0.6147, 14)),
    Job(3, "(9, 18, 36)", f"{RES}_9_18_36", "cfp", 6.93),
    Job(3, "(9, 18, 36)", f"{RES}_9_18_36", "auto", 6.93, _auto(0.6761, 14)),
    Job(3, "(8, 16, 27)", f"{RES}_8_16_27", "cfp", 7.37),
    Job(3, "(8, 16, 27)", f"{RES}_8_16_27", "auto", 7.37, _auto(0.7655, 20)),
)
"""In table 2 `auto` goes in three rounds, in table 3 in two; it fine-tunes for as many epochs as the recipe's own."""


class OutOfTime(KeyboardInterrupt):
    """The call's minutes are over; the run goes on from its last whole epoch."""


@dataclass
class Clock:
    """Ends a run when the time is over, from where it shows its progress."""

    end: float
    said: str = ""

    def __call__(self, step: str, done: int, total: int | None = None, note: str = "") -> None:
        """Show nothing but what is new, and stop when the time is over."""
        if time.monotonic() > self.end:
            raise OutOfTime
        if note != self.said and step == "compressing":
            self.said = note
            print(f"  {note}", flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step."""
        self(name, 0)
        yield


def resident(root: str, device: str = "cuda", kind: str = "cifar10", **options: Any) -> DataBundle:
    """Load a data set in memory and lay it on a device, where its batches are then made too."""
    found = load(kind, root=None if kind == "digits" else root, **options)
    parts = {part: getattr(found, part).to(device) for part in ("train", "validation", "test")}
    return replace(found, **parts)


class GraphedStage(stages.Stage):
    """A stage of training whose steps are one CUDA graph: forward, losses and backward, replayed on each full batch.

    A network of many small layers waits for its kernels to be launched, one by one; a graph launches them at once. The
    first batches run as they are, and so does one of another shape, after which the graph is taken anew.
    """

    WARM = 4
    """Steps before the graph is taken: cuDNN chooses its algorithms in them."""
    failed: str = ""
    """Why steps run one by one, where a graph can't be had."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._taken: tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor] | None = None
        self._steps = 0

    def _step(self, inputs: Any, target: Any, where: str) -> Tensor:
        plain = self.settings.clip_norm is None and self._scaler is None and isinstance(inputs, Tensor)
        shape = inputs.shape if isinstance(inputs, Tensor) else None
        if self._taken is not None and shape != self._taken[1].shape:
            self._taken, self._steps = (
                None,
                self.WARM,
            )  # an eager step sets the gradients that the graph wrote into aside
            return super()._step(inputs, target, where)
        self._steps += 1
        if not plain or GraphedStage.failed or self._steps <= self.WARM:
            return super()._step(inputs, target, where)
        if self._taken is None:
            try:
                self._taken = self._take(inputs, target, where)
            except (RuntimeError, sc.SecateurError) as error:
                GraphedStage.failed = " ".join(str(error).split())[:200]
                return super()._step(inputs, target, where)
        graph, x, y, loss = self._taken
        x.copy_(inputs)
        y.copy_(target)
        graph.replay()
        self._optimizer.step()
        return loss.detach().clone()

    def _take(self, inputs: Tensor, target: Tensor, where: str) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        x, y = inputs.clone(), target.clone()
        # The graph makes the gradients itself, and writes them anew in each replay.
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._forward(self._prepared, x, where)
            loss = self.loss(output, y)
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self._forward(self.teacher, x, where)
                loss = self.distillation(loss, output, taught)
            if self.regulariser is not None:
                loss = loss + self.regulariser()
            self.runtime.backward(loss)
        return graph, x, y, loss


@contextmanager
def graphed(device: str) -> Iterator[None]:
    """Let the engine and the baseline train by graphs, on CUDA."""
    places = (loop, baseline) if device == "cuda" else ()
    for place in places:
        place.Stage = GraphedStage  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place in places:
            place.Stage = stages.Stage  # type: ignore[attr-defined]


@dataclass
class Bench:
    """What all rows share."""

    data: Path
    work: Path
    device: str
    weights: Path | None = None
    seed: int = 0
    kind: str = "cifar10"
    given: dict[str, Any] = field(default_factory=dict)
    """Keys that go before the recipes' own, in miniature."""

    def run_of(self, job: Job) -> RunConfig:
        """Return a row's run: the recipe with its data on the device, in bf16 on a GPU."""
        fast = {"precision": "bf16", "channels_last": True} if self.device == "cuda" else {"device": "cpu"}
        recipe = config.load(ROOT / "recipes" / f"{job.recipe}.yaml")
        options = {key: value for key, value in recipe.data_options.items() if key != "cache"}
        changes: dict[str, Any] = {
            "data": f"{Path(__file__).resolve()}:resident",
            "data_options": options | {"root": str(self.data), "device": self.device, "kind": self.kind},
            "seed": self.seed,
            "run_dir": str(self.work / f"{job.name}-{self.seed}"),
            "weights": self.start(recipe) or "none",
        }
        if job.auto:
            kept = recipe.model_dump(mode="json", include={"model", "model_options", "baseline", "batch_size"})
            skipped = {"skip": list(recipe.skip)} if recipe.skip else {}
            smoothing = {"label_smoothing": recipe.settings.label_smoothing}
            values = kept | skipped | job.auto | changes
            values["settings"] = job.auto["settings"] | smoothing | fast
        else:
            values = config.plain(recipe) | changes
            values["settings"] = values["settings"] | fast
        for key, value in self.given.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        if values["weights"] == "none":
            del values["weights"]
        return config.build(values)

    def start(self, recipe: RunConfig) -> str | None:
        """Return the weights that rows of a network begin with: published ones, or a baseline that a row trained."""
        published = None if recipe.weights is None or self.weights is None else self.weights / Path(recipe.weights).name
        if published is not None and published.is_file():
            return str(published)
        for folder in sorted(self.work.glob(f"{recipe.model}*-{self.seed}")):
            trained = sorted((folder / "checkpoint").glob(f"*-{12 * '?'}.safetensors"))
            if trained:
                return str(trained[0])
        return None

    def measure(self, job: Job, clock: Clock) -> Row:
        """Run a row to its end, or as far as the time allows."""
        run = self.run_of(job)
        begun = Path(str(run.run_dir)) / config.FILE
        if begun.is_file():  # what it began with stays, though a baseline may lie there by now
            run = config.load(begun)
        with graphed(self.device):
            try:
                result = configured_run.start(run, clock, go_on_with=True).report
            except configured_run.FinishedRunError as finished:
                result = finished.report
        return {
            "table": job.table, "row": job.row, "method": job.method, "seed": self.seed, "paper": job.paper,
            "before": round(100 * (1 - result["baseline"]["test"]), 2),
            "error": round(100 * (1 - result["final"]["test"]), 2),
            "removed": round(100 * (1 - result["final"]["macs"] / result["baseline"]["macs"]), 2),
            "images": result["images"], "seconds": round(result["seconds"]), "exact": result["verification"]["exact"],
            "graphed": self.device == "cuda" and not GraphedStage.failed, "machine": machine(self.device),
        }  # fmt: skip

    def draw(self, job: Job, batches: Sequence[int] = BATCHES) -> list[Row]:
        """Measure figures 4 and 5 of a finished row: images a second, and memory of a forward pass with its weights."""
        run = config.load(Path(str(self.run_of(job).run_dir)) / config.FILE)
        bundle = resident(**run.data_options)
        found = sources.open_model(run.model, run.model_options, None, (), bundle)
        original, x = found.model.cpu(), torch.randn(2, *bundle.input_shape)
        pruned = sc.load(original, f"{run.run_dir}/model.safetensors").eval()
        cuda = self.device == "cuda"
        measured = benchmark(
            pruned, original, example_inputs=x, batch_sizes=batches, devices=(self.device,),
            precisions=("fp32", "bf16") if cuda else ("fp32",), backends=("eager", "compile") if cuda else ("eager",),
            names=("pruned", "original"), rounds=5, min_seconds=0.05 if cuda else 0.001,
        )  # fmt: skip
        return [
            {
                "row": f"table {job.table}, {job.row}", "method": job.method, "network": row.variant,
                "backend": row.backend, "precision": row.precision, "batch": row.batch_size,
                "images_a_second": round(row.batch_size / row.seconds, 1),
                "bytes": None if row.peak_bytes is None else row.peak_bytes + (row.weight_bytes or 0),
                "machine": machine(self.device),
            }
            for row in measured.rows
        ]  # fmt: skip


def machine(device: str) -> str:
    """Return what a row was measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{device}, in miniature"


def left(jobs: Sequence[Job], seed: int, tables: Store, figures: Store) -> list[tuple[Job, str]]:
    """Return what is not measured yet: rows, and figures of rows."""
    rows = {tables.name(row) for row in tables.read()}
    drawn = {(row["row"], row["method"]) for row in figures.read()}
    todo = []
    for job in jobs:
        if tables.name({"table": job.table, "row": job.row, "method": job.method, "seed": seed}) not in rows:
            todo.append((job, "row"))
        if job.figures and (f"table {job.table}, {job.row}", job.method) not in drawn:
            todo.append((job, "figures"))
    return todo


def go_on(bench: Bench, jobs: Sequence[Job], seconds: float, tables: Store, figures: Store) -> int:
    """Measure until the time is over or nothing is left; return the exit status."""
    clock = Clock(time.monotonic() + seconds)
    for job, what in left(jobs, bench.seed, tables, figures):
        print(f"table {job.table}, {job.row}, {job.method}: {what}", flush=True)
        try:
            if what == "row":
                tables.keep(bench.measure(job, clock))
            else:
                clock(what, 0)
                for row in bench.draw(job):
                    figures.keep(row)
        except OutOfTime:
            print(f"the time is over; {len(left(jobs, bench.seed, tables, figures))} left: the same command goes on")
            return AGAIN
    return 0


def render() -> str:
    """Return the section as Markdown."""
    rows = TABLES.read()
    lines = [
        "## CFP's tables 2 and 3 on a GPU",
        "",
        (
            "Test errors in per cent. `auto` goes to the MACs of the row, trained on as many images. Written by "
            "`python -m bench.gpu_tables`, which resumes."
        ),
        "",
    ]
    if not rows:
        return "\n".join([*lines, "Not measured yet: no GPU was at hand."])
    lines += [
        "| table | row | method | seeds | before | error | the paper | MACs removed | exact | machine |",
        "|---|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for job in JOBS:
        own = [r for r in rows if (r["table"], r["row"], r["method"]) == (job.table, job.row, job.method)]
        if own:
            means = {key: sum(r[key] for r in own) / len(own) for key in ("before", "error", "removed")}
            exact = "yes" if all(r["exact"] for r in own) else "no"
            lines.append(
                f"| {job.table} | {job.row} | {job.method} | {len(own)} | {means['before']:.2f} | {means['error']:.2f} "
                f"| {job.paper:.2f} | {means['removed']:.2f}% | {exact} | {own[0]['machine']} |"
            )
    return "\n".join([*lines, *_drawn(FIGURES.read())])


def _drawn(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "Figures 4 and 5: images a second, and the memory of a forward pass with its weights, in MB.",
        "",
        "| row | runs in | batch | original | pruned | original, MB | pruned, MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    of: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        of.setdefault((row["row"], row["backend"], row["precision"], row["batch"]), {})[row["network"]] = row
    for (name, backend, precision, batch), pair in sorted(of.items()):
        both = [pair.get("original", {}), pair.get("pruned", {})]
        cells = [f"{r.get('images_a_second', 0):,.0f}" for r in both]
        cells += ["" if r.get("bytes") is None else f"{r['bytes'] / 1e6:.1f}" for r in both]
        lines.append(f"| {name} | {backend}, {precision} | {batch} | {' | '.join(cells)} |")
    return lines


SECTION = Section("results.md", "gpu-tables", render)


def main() -> int:
    """Go on for so many minutes, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10, in any of its layouts")
    parser.add_argument("--weights", type=Path, help="folder of cifar10-resnet56-projected.safetensors")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which a call ends")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is at hand, and rows of a CPU belong into other tables")
    bench = Bench(given.data.resolve(), given.work.resolve(), "cuda", given.weights, given.seed)
    status = go_on(bench, JOBS, 60 * given.minutes, TABLES, FIGURES)
    SECTION.write()
    return status


if __name__ == "__main__":
    sys.exit(main())
