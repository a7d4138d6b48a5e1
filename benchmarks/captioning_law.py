"""What private captioning adds to a public initialisation, by noise over batch: results/captioning_law.json.

    python -m benchmarks.captioning_law [--out runs/captioning_law] [--only noise0.25 15000]

A captioner learns scenes of public pictures without privacy (dpcap2024/scenes_public), and goes on from there
on 60,000 scenes of other pictures over 1,000 holders (dpcap2024/scenes_cpu), for equal steps and batches,
with next to no noise and with shares of the noise that epsilon 8 asks for. At a quarter of the scenes
epsilon 8 asks for more: if noise over batch is what counts, that point lies on the line of the others. It
has two seeds.

What is measured is the accuracy of linear and few-shot probes on frozen features: single private pictures on
backgrounds, told apart by category (data.name=named_pictures). Beside it: the encoder as drawn, and pixels.
Probes see three draws of their data. Runs go on where they stopped, and finished ones are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import loading, models, provenance
from fedsim.api import check
from fedsim.cli.many import runner_of
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.engine.run_folder import RunFolder
from fedsim.run import Run
from fedsim.study import probe
from fedsim.study.probe import Encoder, Features

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "results" / "captioning_law.json"
BATCH, STEPS, EPSILON = 1024, 150, 8.0
SCENES, FEWER = 60_000, 15_000
NONE = 1e-6
"""Share of the noise that stands for none: far below what float32 rounds. Examples are clipped all the same,
which preset=nonprivate does not do: what clipping costs would pass for a cost of noise."""
SHARES = (NONE, 1 / 16, 1 / 4, 1.0)
SEEDS, PROBES, SHOTS = (0, 1, 2), (0, 1, 2), 5
COMMON = (
    f"train.expected_batch_size={BATCH}",
    f"train.steps={STEPS}",
    "train.eval_every=25",
    "train.checkpoint_every=25",
    "optimizer.warmup_steps=15",
    "monitor.tensorboard=false",
)


@dataclass(frozen=True)
class Case:
    """One private run.

    Attributes:
        share: of the noise that EPSILON asks for.
        scenes: training examples.
        seed: of the run.
    """

    share: float
    scenes: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.scenes}-noise{self.share:.4g}-seed{self.seed}"


CASES = (
    *(Case(share, SCENES, seed) for seed in SEEDS for share in SHARES[::-1]),
    *(Case(1.0, FEWER, seed) for seed in SEEDS[:2]),
)


def private(case: Case, public: Path) -> Config:
    """Return the configuration of a private run that starts from the public one in `public`."""
    start = f"model.init_from={public / 'final.safetensors'}"
    common = [*COMMON, start, f"seed={case.seed}", f"data.options.train={case.scenes}"]
    if case.share == 1.0:
        return loading.load("dpcap2024/scenes_cpu", [*common, f"privacy.target_epsilon={EPSILON}"])
    whole = private(Case(1.0, case.scenes, case.seed), public)
    noise = check(whole)["noise_multiplier"] * case.share
    given = ["privacy.target_epsilon=null", f"privacy.noise_multiplier={noise!r}"]
    return loading.load("dpcap2024/scenes_cpu", [*common, *given])


def probed(found: Sequence[tuple[str, Features]]) -> dict[str, dict[str, list[float]]]:
    """Return by name the accuracy of the linear and the few-shot probe, one a draw of the probe's data."""
    scores: dict[str, dict[str, list[float]]] = {name: {"linear": [], "few": []} for name, _ in found}
    for draw in PROBES:
        given = ["data.name=named_pictures", f"data.options.scenes_seed={draw}"]
        splits = datasets.load(loading.load("base", given).data)
        (train, train_labels), (test, test_labels) = map(probe.whole, (splits.train, splits.test))
        classes = splits.train.declared.size
        for name, features in found:
            own = probe.standardised(features(train), features(test))
            labels = train_labels, test_labels
            scores[name]["linear"].append(probe.linear(*own, *labels, classes))
            scores[name]["few"].append(probe.few_shot(*own, *labels, classes, SHOTS, draw))
    return scores


def of_run(folder: Path) -> Features:
    """Return the features of a finished run's encoder."""
    run = Run(folder)
    return probe.features_of(run, probe.encoder_of(run))


def beside(public: Path) -> list[tuple[str, Features]]:
    """Return what private runs stand beside: the initialisation, encoders as drawn, pixels."""
    run = Run(public)
    card = run.card
    found = [("initialisation", of_run(public)), ("pixels", probe.pixels)]
    for seed in SEEDS:
        drawn = models.build(card.model, card.example_shape, card.outputs, seed, card.vocabulary).eval()
        assert isinstance(drawn, Encoder)
        found.append((f"drawn {seed}", probe.features_of(run, drawn)))
    return found


def row_of(case: Case, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a private run."""
    noise = result["noise_multiplier"]
    return {
        "share": case.share,
        "scenes": case.scenes,
        "seed": case.seed,
        "noise_multiplier": noise,
        "noise_over_batch": noise / BATCH,
        "epsilon": result["epsilon"]["example"]["value"],
        "perplexity": result["perplexity"],
        "seconds": result["seconds"],
        "commit": result["commit"],
        "probes": probed([("run", of_run(folder))])["run"],
    }


def main() -> int:
    """Run what is missing, probe, and write the result once all is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/captioning_law"), help="of all runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose name has this; writes nothing")
    options = parser.parse_args()
    runner, public = runner_of("local"), options.out.resolve() / "public"
    given = ["monitor.tensorboard=false"]
    started = runner(loading.load("dpcap2024/scenes_public", given), RunFolder(public))
    rows = []
    for case in CASES:
        if options.only and not any(text in case.name for text in options.only):
            continue
        folder = options.out.resolve() / case.name
        row = row_of(case, folder, runner(private(case, public), RunFolder(folder)))
        print(f"{case.name}: {said(row['probes']['linear'])}, {row['perplexity']:.3f}", flush=True)
        rows.append(row)
    known = probed(beside(public))
    print({name: said(scores["linear"]) for name, scores in known.items()})
    if options.only:
        return 0
    held = {
        "command": "python -m benchmarks.captioning_law",
        "commit": ", ".join(dict.fromkeys(row["commit"] for row in rows)),
        "hardware": provenance.hardware(),
        "seeds": list(SEEDS),
        "seconds": sum(row["seconds"] for row in rows) + started["seconds"],
        "batch": BATCH,
        "steps": STEPS,
        "epsilon": EPSILON,
        "shots": SHOTS,
        "public_perplexity": started["perplexity"],
        "beside": known,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return 0


def said(scores: Sequence[float]) -> str:
    """Return the mean, in percent."""
    return f"{100 * statistics.mean(scores):.1f} %"


if __name__ == "__main__":
    sys.exit(main())
