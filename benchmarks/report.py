"""From pytest-benchmark's JSON to a Markdown table, plots, and the README's copy of the table.

python benchmarks/report.py benchmarks/results/{contrastive,data,heads,loss,orthogonal}.json
"""

import argparse
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import torch
from contest import SIDE
from data_plots import plot_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt

README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote")
    sources: list[Path] = parser.parse_args().json
    folder = sources[0].parent
    files = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    runs = [run for file in files for run in file["benchmarks"]]
    kernels = [run for run in runs if "gemm_share" in run["extra_info"]]
    data = [run for run in runs if "images_per_second" in run["extra_info"]]
    text = table(kernels) + "\n" + machine(files) + "\n\n" + data_table(data)
    (folder / "benchmarks.md").write_text(text, encoding="utf-8")
    for group in sorted({run["name"].split("[")[0] for run in kernels}):
        members = [r for r in kernels if r["name"].split("[")[0] == group]
        for axis, value in (members[0]["params"] or {}).items():
            if isinstance(value, int):
                plot(group.removeprefix("test_"), axis, members, folder)
    plot_data(data, folder)
    readme = README.read_text(encoding="utf-8")
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")
    print(text)


def table(runs: list[dict[str, Any]]) -> str:
    """Ratios of median times: how many times faster the native backend is than each peer.

    Below it, a line each, what is compared with a form of itself only.
    """
    counted = Counter(peer for run in runs for peer in run["extra_info"]["speedup"])
    peers = [peer for peer, count in counted.items() if count > 1]
    head = ["work (forward + backward)", "time", "rounds", *(f"× {p}" for p in peers)]
    head += ["GEMM", "memory"]
    lines, alone = [" | ".join(head), " | ".join(["---"] * len(head))], []
    for run in runs:
        info = run["extra_info"]
        name = run["name"].split("[")[0].removeprefix("test_").replace("_", " ")
        sizes = [
            f"{key} = {value:,}" if isinstance(value, int) else value
            for key, value in (run["params"] or {}).items()
        ]
        memory, speedup = info["memory_mb"], info["speedup"]
        work, time = ", ".join([name, *sizes]), duration(info["seconds"]["native"])
        if speedup and not set(speedup) & set(peers):
            ratios = [f"{ratio:.2f} × {peer}" for peer, ratio in speedup.items()]
            alone.append(f"* {work}: {time}, {', '.join(ratios)}\n")
            continue
        others = [f"{peer} {memory[peer]:.0f}" for peer in list(memory)[1:2]]
        cells = [
            work,
            time,
            str(info["rounds"]),
            *(f"{speedup[p]:.2f}" if p in speedup else "–" for p in peers),
            f"{info['gemm_share']:.0%}" if info["gemm_share"] else "–",
            " ".join([f"{memory['native']:.0f} MB", *(f"({other})" for other in others)]),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "".join(alone)


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def data_table(runs: list[dict[str, Any]]) -> str:
    """Images a second of ingestion and loading, and how many times faster than each peer.

    Below it, a line each, what has a bar but no peer.
    """
    peers = list(dict.fromkeys(peer for run in runs for peer in run["extra_info"]["speedup"]))
    lines = [["work", "images/s", *(f"× {p}" for p in peers)], ["---"] * (len(peers) + 2)]
    alone = []
    for run in runs:
        info = run["extra_info"]
        name = run["name"].removeprefix("test_").replace("_", " ")
        if info["speedup"]:
            ratios = [f"{info['speedup'][p]:.2f}" if p in info["speedup"] else "–" for p in peers]
            lines.append([name, f"{info['images_per_second']['ours']:.0f}", *ratios])
        else:
            figures = [
                f"{key.replace('_', ' ')} {figure(value)}"
                for key, value in info.items()
                if key not in ("speedup", "images_per_second")
            ]
            alone.append(f"* {name}: {'; '.join(figures)}\n")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "".join(alone)


def figure(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number:.4g} ({name})" for name, number in value.items())
    return f"{value:.4g}"


def machine(files: list[dict[str, Any]]) -> str:
    """What the figures were taken on and when, and how to read them."""
    cpus = [file["machine_info"]["cpu"].get("brand_raw", platform.processor()) for file in files]
    if len(set(cpus)) > 1:
        raise SystemExit(f"results of different machines do not go into one table: {cpus}")
    days = sorted({file["datetime"][:10] for file in files})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return (
        f"{torch.get_num_threads()} threads of {cpus[0]}, torch {torch.__version__}, {when}; fp32 "
        f"where it does not say bf16. “× peer”: the peer's time over that of ours right before and "
        f"after it, median of all rounds. Time: median of the half of the runs that stood beside "
        f"the fastest {SIDE}² fp32 products. GEMM: share of the rate of these, counting only what "
        f"the algorithm has to multiply. Memory: resident peak of one step, results included."
    )


def plot(group: str, axis: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """Time and memory against the parameter `axis`, one line a contender, log–log.

    One figure for each setting of the other parameters that was run at two values or more.
    """
    others = [name for name in runs[0]["params"] if name != axis]
    for fixed in sorted({tuple(run["params"][o] for o in others) for run in runs}, key=str):
        chosen = [r for r in runs if tuple(r["params"][o] for o in others) == fixed]
        if len(chosen) < 2:
            continue
        chosen.sort(key=lambda run: run["params"][axis])
        picture, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for panel, key, unit in zip(
            panels, ("seconds", "memory_mb"), ("seconds", "MB at the peak"), strict=True
        ):
            for peer in dict.fromkeys(p for run in chosen for p in run["extra_info"][key]):
                points = [
                    (run["params"][axis], run["extra_info"][key][peer])
                    for run in chosen
                    if peer in run["extra_info"][key]
                ]
                panel.plot(*zip(*points, strict=True), marker="o", label=peer)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
            panel.grid(which="both", alpha=0.3)
        panels[0].legend()
        suffix = "".join(f", {o} = {v}" for o, v in zip(others, fixed, strict=True))
        picture.suptitle(f"{group.replace('_', ' ')}{suffix}: forward + backward")
        name = "_".join([group, axis, *(f"{o}{v}" for o, v in zip(others, fixed, strict=True))])
        picture.savefig(folder / f"{name}.png", dpi=120)
        plt.close(picture)


if __name__ == "__main__":
    main()
