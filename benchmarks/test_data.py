"""Ingestion and loading against what people use now, in interleaved rounds on 2 cores.

`extra_info["speedup"]` is ours over the named peer, by medians of the same rounds; it is noted only
after the results were checked.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import imagecodecs
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torchvision.transforms import v2

from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import Engine, LocalEngine
from fino_fast.data.ingest import Request, ingest

COUNT, BATCH, CORES, ROUNDS = 1024, 64, 2, 3


class Lab:
    """Real solar cells (elpv-dataset, 300×300) as one folder of PNG or JPEG, and their shards."""

    def __init__(self, root: Path, form: str) -> None:
        import elpv_dataset

        self.images, self.out, self.root = root / "images", root / "shards", root
        self.images.mkdir(parents=True)
        sources = sorted(Path(elpv_dataset.__file__).parent.rglob("*.png"))[:COUNT]
        lines = ["id,file,cell"]
        for i, source in enumerate(sources):
            target = self.images / f"{i:05d}.{form}"
            if form == "png":
                target.write_bytes(source.read_bytes())
            else:
                Image.open(source).save(target, quality=90)
            lines.append(f"{i},{target.name},{i % 7}")
        (root / "table.csv").write_text("\n".join(lines), encoding="utf-8")
        self.files = sorted(self.images.iterdir())
        self.ingest(self.out, LocalEngine(CORES))

    def ingest(self, out: Path, engine: Engine, check: bool = True) -> None:
        factors = {"cell": {"kind": "categorical", "role": "ignore"}}
        declaration = Declaration.model_validate({"factors": factors})
        size = 4 << 20
        request = Request(
            self.root / "table.csv", self.images, "id", "file", declaration, out,
            shard_bytes=size, check=check,
        )  # fmt: skip
        assert ingest(request, engine).manifest is not None


class Warm:
    """An engine whose workers, like the peers', are started before the clock."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, function: Any, tasks: Any) -> Iterator[Any]:
        return self.pool.map(function, tasks)


@pytest.fixture(scope="module", params=["png", "jpg"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab") / request.param, request.param)


def contest(benchmark: Any, ours: Callable[[], None], peers: dict[str, Callable[[], None]]) -> None:
    """Time all in turn, round by round; note images a second and ratios of medians."""
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - start)

    def others() -> None:
        for name, work in peers.items():
            timed(name, work)

    benchmark.pedantic(lambda: timed("ours", ours), setup=others, rounds=ROUNDS, warmup_rounds=1)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    benchmark.extra_info["images_per_second"] = {name: COUNT / s for name, s in median.items()}
    benchmark.extra_info["speedup"] = {name: median[name] / median["ours"] for name in peers}


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """The usual data set: PIL, two random resized crops, flip, normalise."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(224, scale=(0.3, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.files[index])
        return torch.stack([self.transform(image), self.transform(image)])


@pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None)
def webdataset(tars: list[str], extension: str) -> Any:
    """DALI's own reader in front of the same operators as ours."""
    encoded = fn.readers.webdataset(
        paths=tars, ext=[extension], random_shuffle=True, initial_fill=256
    )
    image = fn.decoders.image(encoded, output_type=types.GRAY, adjust_orientation=False)
    views = []
    for _ in range(2):
        anchor, shape = fn.random_crop_generator(
            image.shape()[:2], random_area=[0.3, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        crop = fn.slice(image, start=anchor, shape=shape, axes=(0, 1))
        view = fn.resize(crop, size=(224, 224), antialias=True, dtype=types.FLOAT)
        view = fn.flip(view, horizontal=fn.random.coin_flip())
        views.append(fn.crop_mirror_normalize(view, mean=[127.5], std=[127.5], output_layout="CHW"))
    return tuple(views)


def test_loader(lab: Lab, benchmark: Any) -> None:
    """Two views of 224² from 300², a full shuffle, against PyTorch's loader and DALI's reader."""
    views = Views(mean=[0.5], std=[0.5])
    loaders = {
        backend: Loader(ShardSet.open(lab.out), views, BATCH, backend=backend, threads=CORES)
        for backend in ("dali", "torch")
    }
    dali, plain = (next(loaders[backend].epoch(0)) for backend in ("dali", "torch"))
    assert torch.equal(dali.rows, plain.rows)
    assert (dali.views - plain.views).abs().mean() < 0.01
    usual = torch.utils.data.DataLoader(
        Files(lab.files), BATCH, shuffle=True, num_workers=CORES, persistent_workers=True
    )
    pipe = webdataset(
        [str(path) for path in sorted(lab.out.glob("*.tar"))], lab.files[0].suffix[1:]
    )
    pipe.build()
    epochs = iter(range(1, 1000))

    def own(backend: str) -> None:
        rows = [batch.rows for batch in loaders[backend].epoch(next(epochs))]
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(COUNT))

    def torch_loader() -> None:
        assert sum(len(batch) for batch in usual) == COUNT

    def dali_reader() -> None:
        for _ in range(COUNT // BATCH):
            stack = torch.empty(2, BATCH, 1, 224, 224)
            for view, output in zip(stack, pipe.run(), strict=True):
                view.copy_(torch.utils.dlpack.from_dlpack(output.as_tensor()))

    contest(
        benchmark,
        lambda: own("dali"),
        {
            "DataLoader + PIL": torch_loader,
            "DALI webdataset": dali_reader,
            "our torch backend": lambda: own("torch"),
        },
    )


def decode_all(files: list[Path]) -> int:
    """The fastest plain decoder found: imagecodecs."""
    decode = imagecodecs.png_decode if files[0].suffix == ".png" else imagecodecs.jpeg8_decode
    return sum(decode(path.read_bytes()).shape[0] for path in files)


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_ingest(lab: Lab, benchmark: Any, tmp_path: Path, check: bool) -> None:
    """From the table to the sealed set; against decoding alone, and against tar and sha256sum.

    All have their processes before the clock starts: a set of a size that needs ingestion does not
    feel the second that they take.
    """
    numbers = iter(range(1000))
    with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        parts = [lab.files[i::CORES] for i in range(CORES)]
        list(pool.map(decode_all, parts))

        def ours() -> None:
            lab.ingest(tmp_path / str(next(numbers)), Warm(pool), check)

        def decode() -> None:
            assert sum(pool.map(decode_all, parts)) == 300 * COUNT

        def tar_and_hash() -> None:
            target = tmp_path / "all.tar"
            subprocess.run(["tar", "cf", target, "-C", lab.images, "."], check=True)
            subprocess.run(["sha256sum", target], check=True, capture_output=True)

        contest(benchmark, ours, {"decode alone": decode, "tar + sha256sum": tar_and_hash})
