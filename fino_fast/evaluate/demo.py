"""`fino-fast demo`: the main job on real images, in minutes."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fino_fast.config import CommandModel
from fino_fast.data.files import read_json, write_json
from fino_fast.errors import ConfigError
from fino_fast.train import TrainingInterrupted

from . import summary
from .cells import HELD_OUT, Cells, load_cells, plan_shots
from .plots import arms_figure, camera_sheet
from .report import write_report
from .study import ARMS, Settings, Study

SETTINGS = "settings.json"


class Demo(CommandModel):
    """Adapt an ImageNet backbone to solar cells without labels, and test it on unseen cameras.

    2,624 electroluminescence images (elpv-dataset) are taken by 8 simulated cameras. Three arms
    with equal budget are compared: the frozen backbone, contrastive adaptation, and FINO, which is
    told to forget camera and exposure and to keep the module type. Defects are probed on cameras
    that took part and on two that did not. Run again after an interruption, it goes on there.
    """

    seeds: int = Field(default=1, ge=1)
    """Number of seeds: 0, 1, …; the more, the less one lucky draw decides."""
    out: Path = Path("runs/demo")
    """Folder of everything: images, shards, runs, embeddings, report."""

    def run(self) -> int:
        return run_demo(list(range(self.seeds)), self.out, Settings(), cache(load_cells))


def run_demo(
    seeds: list[int],
    out: Path,
    settings: Settings,
    cells: Callable[[], Cells],
    say: Callable[[str], None] = print,
) -> int:
    """Run the missing seeds and write the report over all of them; the exit code."""
    claim(out, settings)
    start = time.perf_counter(), time.process_time()
    results = []
    for seed in seeds:
        study = Study(out / f"seed-{seed}", seed, settings, say=say)
        say(f"seed {seed}" + (": measured before" if study.finished else ""))
        try:
            results.append(study.run(cells))
        except TrainingInterrupted as stop:
            say(f"stopped after step {stop.step}; run the same command again to go on")
            return stop.exit_code
    folder = out / f"report-{len(seeds)}-seed{'s' if len(seeds) > 1 else ''}"
    if not folder.exists():  # seeds and settings determine it, so an existing one is this one
        save(folder, results, settings, cells)
    say("")
    say((folder / "demo.md").read_text(encoding="utf-8"))
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    say(f"report in {folder}; {wall:.0f} s, {cpu:.0f} s of processor time")
    return 0


def claim(out: Path, settings: Settings) -> None:
    """Make the demo's folder, or check that it is this demo's.

    Raises:
        ConfigError: it holds something else, or a demo with other settings; nothing was touched.
    """
    wanted = settings.model_dump(mode="json")
    path = out / SETTINGS
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    if not path.is_file():
        raise ConfigError(f"{out}: exists and is no folder of a demo; choose another --out")
    found = read_json(path)
    changed = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if changed:
        before = ", ".join(f"{k} {found.get(k)!r} → {wanted.get(k)!r}" for k in changed)
        raise ConfigError(
            f"{out}: holds a demo with other settings ({before}); remove it or choose another --out"
        )


def save(
    folder: Path,
    results: list[dict[str, Any]],
    settings: Settings,
    cells: Callable[[], Cells],
) -> None:
    """Write demo.json, demo.md, arms.png and cameras.png."""
    summary.check_arms(results)
    values = summary.gather(results)
    budget = settings.model_dump(mode="json")
    domains = ("in domain", "out of domain")
    chance = float(np.mean(values[ARMS[0]]["camera chance"]))
    count = f"{len(results)} seed{'s' if len(results) > 1 else ''}"
    figures = {
        "arms": arms_figure(
            ARMS,
            {arm: {domain: values[arm][domain] for domain in domains} for arm in ARMS},
            {arm: values[arm]["camera"] for arm in ARMS},
            chance,
            f"{count}; bars: mean, dots: single seeds" if len(results) > 1 else count,
        ),
        "cameras": cameras_figure(cells(), results[0]["seed"]),
    }
    content = {
        "settings": budget,
        "seeds": results,
        "values": values,
        "verdicts": summary.verdicts(values),
    }
    text = summary.markdown(values, results, budget)
    write_report(folder, "demo", content=content, markdown=text, figures=figures)


def cameras_figure(cells: Cells, seed: int) -> Any:
    """One intact and one defective cell of each module type, by every camera of a seed."""
    shots = plan_shots(cells, seed, "report")
    cameras = sorted({shot.true_camera for shot in shots}, key=lambda camera: camera.name)
    rows = []
    for module_type in ("mono", "poly"):
        for defective in (False, True):
            chosen = (cells.module_type == module_type) & (cells.defective == defective)
            cell = int(np.flatnonzero(chosen)[10])
            rng = np.random.default_rng([seed, 2, cell])
            pictures = [camera.image(cells.scenes[cell], 1.0, rng) for camera in cameras]
            name = f"{module_type}, {'defect' if defective else 'intact'}"
            rows.append((name, np.stack(pictures)))
    titles = [camera.name for camera in cameras]
    titles[-HELD_OUT:] = [f"{title}\n(held out)" for title in titles[-HELD_OUT:]]
    return camera_sheet(rows, titles)
