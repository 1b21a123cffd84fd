"""Ingestion and loading against what people use now, in interleaved rounds on 2 cores.

`extra_info["images_per_second"]` has every contender's median, `extra_info["speedup"]` is ours over
the named peer: the median of the rounds' ratios, whose least and largest stand in
`extra_info["spread"]`. All are noted only after the results were checked. What
has a bar and no peer (memory, planning, the first batch) has only the first, with its figures
beside it in `extra_info`.
"""

import io
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import imagecodecs
import litdata
import numpy as np
import pytest
import simplejpeg
import synthetic
import torch
import webdataset
from litdata.streaming.writer import BinaryWriter
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from resident import resident_after
from torchvision.transforms import v2

from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.cut import Cutter, empty_views
from fino_fast.data.dali_pipeline import to_torch
from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import Engine, LocalEngine
from fino_fast.data.ingest import Request, ingest, read_plans, write_tasks
from fino_fast.data.pipeline import PixelForm
from fino_fast.data.views import training_draws

COUNT, BATCH, CORES, ROUNDS = 768, 64, 2, 5
HERE = Path(__file__).parent
FACTORS = {"factors": {"cell": {"kind": "categorical", "role": "ignore"}}}

Decode = Callable[[bytes], NDArray[Any]]


def cells() -> list[Path]:
    """Real photographs: 2,624 solar cells of 300×300 grey pixels (elpv-dataset)."""
    import elpv_dataset

    return sorted(Path(elpv_dataset.__file__).parent.rglob("*.png"))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def small_files(form: str, count: int) -> Iterator[bytes]:
    """`count` cells as PNG, as they come, or as JPEG; from the first one again where too few."""
    paths = cells()
    once = [
        path.read_bytes() if form == "png" else jpeg(Image.open(path)) for path in paths[:count]
    ]
    return itertools.islice(itertools.cycle(once), count)


def tiles(form: str, count: int) -> Iterator[bytes]:
    """`count` tiles of 1080×1080 as labs have them, 256 of them different: JPEG, or 16-bit PNG."""
    once = list(_mosaics(form, min(count, 256)))
    return itertools.islice(itertools.cycle(once), count)


def _mosaics(form: str, count: int) -> Iterator[bytes]:
    paths = itertools.cycle(cells())
    side = 4 if form == "jpg" else 2
    for _ in range(count):
        mosaic = Image.new("L", (300 * side, 300 * side))
        for place in range(side * side):
            mosaic.paste(Image.open(next(paths)), (300 * (place % side), 300 * (place // side)))
        if form == "jpg":
            yield jpeg(mosaic.crop((0, 0, 1080, 1080)))
        else:
            # Enlarged: the values between those of 8 bits are what the low byte holds.
            large = mosaic.convert("F").resize((1080, 1080), Image.Resampling.BICUBIC)
            pixels = (np.asarray(large).clip(0, 255) * 257).round().astype(np.uint16)
            yield bytes(imagecodecs.png_encode(pixels, level=1))


class Lab:
    """A folder of images and its table; `out` is where `ingest` brings them."""

    def __init__(
        self, root: Path, form: str, contents: Iterator[bytes], shard_bytes: int = 16 << 20
    ) -> None:
        self.name, self.shard_bytes = root.name, shard_bytes
        self.images, self.out, self.root = root / "images", root / "shards", root
        self.images.mkdir(parents=True)
        lines = ["id,file,cell"]
        for i, content in enumerate(contents):
            name = f"{i:05d}.{form}"
            (self.images / name).write_bytes(content)
            lines.append(f"{i},{name},{i % 7}")
        (root / "table.csv").write_text("\n".join(lines), encoding="utf-8")
        self.files = sorted(self.images.iterdir())

    def request(self, out: Path, check: bool = True) -> Request:
        return Request(
            self.root / "table.csv", self.images, "id", "file",
            Declaration.model_validate(FACTORS), out, shard_bytes=self.shard_bytes, check=check,
        )  # fmt: skip

    def ingest(self, out: Path, engine: Engine, check: bool = True) -> None:
        manifest = ingest(self.request(out, check), engine).manifest
        assert manifest is not None
        assert manifest.samples == len(self.files)


class Warm:
    """An engine whose workers, like the peers', are started before the clock."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, function: Any, tasks: Any) -> Iterator[Any]:
        return self.pool.map(function, tasks)


@pytest.fixture(scope="module", params=["png", "jpg"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """What the loader reads: an epoch of a second or two."""
    root = tmp_path_factory.mktemp("lab") / request.param
    lab = Lab(root, request.param, small_files(request.param, COUNT), 4 << 20)
    lab.ingest(lab.out, LocalEngine(CORES))
    return lab


# As many as take seconds and fill a dozen shards: neither what an ingestion costs once nor a worker
# that is left without a last shard must count.
STORES = {
    "png": lambda: small_files("png", 2 * 2624),
    "jpg": lambda: small_files("jpg", 12 * 2624),
    "tile-png": lambda: tiles("png", 96),
    "tile-jpg": lambda: tiles("jpg", 1536),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: of ingestion, the work is measured and not the disk,
    which has to take every byte before a shard counts as committed (no peer waits for that).
    """
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(params=list(STORES))
def store(request: pytest.FixtureRequest, memory: Path) -> Lab:
    """What is ingested."""
    return Lab(memory / request.param, request.param[-3:], STORES[request.param]())


def contest(
    benchmark: Any, images: int, ours: Callable[[], None], peers: dict[str, Callable[[], None]]
) -> dict[str, list[float]]:
    """Time all in turn, round by round; note images a second, and ratios within a round: a machine
    that others slow down for seconds changes both sides of them. Return the seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - start)

    def others() -> None:
        for name, work in peers.items():
            timed(name, work)

    benchmark.pedantic(lambda: timed("ours", ours), setup=others, rounds=ROUNDS, warmup_rounds=1)
    counted = {name: values[1:] for name, values in times.items()}
    benchmark.extra_info["images_per_second"] = {
        name: images / statistics.median(values) for name, values in counted.items()
    }
    note_ratios(benchmark, {name: (counted[name], counted["ours"]) for name in peers})
    return counted


def note_ratios(benchmark: Any, pairs: dict[str, tuple[list[float], list[float]]]) -> None:
    """By how much the second of each pair of times was shorter, round by round."""
    ratios = {
        name: [theirs / own for theirs, own in zip(*pair, strict=True)]
        for name, pair in pairs.items()
    }
    benchmark.extra_info["speedup"] = {n: statistics.median(r) for n, r in ratios.items()}
    benchmark.extra_info["spread"] = {n: (min(r), max(r)) for n, r in ratios.items()}


def usual_views() -> v2.Compose:
    """What PyTorch users write: a random resized crop, a flip, float, normalise."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.3, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )


def two_views(image: Image.Image, view: v2.Compose) -> torch.Tensor:
    pixels = v2.functional.pil_to_tensor(image)
    return torch.stack([view(pixels), view(pixels)])


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """The usual data set: one file an image, PIL, two views."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.transform = usual_views()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return two_views(Image.open(self.files[index]), self.transform)


class TarSample:
    """A sample of the webdataset package as two views."""

    def __init__(self, extension: str) -> None:
        self.extension = extension
        self.transform = usual_views()

    def __call__(self, sample: dict[str, bytes]) -> tuple[torch.Tensor]:
        return (two_views(Image.open(io.BytesIO(sample[self.extension])), self.transform),)


class Chunks(litdata.StreamingDataset):
    """litdata's chunks of the same encoded images, two views."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), shuffle=True)
        self.views = usual_views()  # `transform` is litdata's own

    def __getitem__(self, index: Any) -> torch.Tensor:
        return two_views(Image.open(io.BytesIO(super().__getitem__(index)["image"])), self.views)


def write_chunks(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=4 << 20)
    for i, path in enumerate(files):
        writer[i] = {"image": path.read_bytes()}
    writer.done()
    writer.merge(1)


@pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None)
def dali_decoded(tars: list[str], extension: str) -> Any:
    """DALI's own reader in front of the decoder that ours stands in front of."""
    encoded = fn.readers.webdataset(
        paths=tars, ext=[extension], random_shuffle=True, initial_fill=256
    )
    return fn.decoders.image(encoded, output_type=types.GRAY, adjust_orientation=False)


@pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None)
def dali_webdataset(tars: list[str], extension: str) -> Any:
    """DALI from the reader to the finished views."""
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


def test_loader(lab: Lab, benchmark: Any, tmp_path: Path) -> None:
    """Two views of 224² from 300²: DALI and PyTorch behind our order, and the peers.

    Ours and `DataLoader + PIL` shuffle fully, the others as far as their formats let them.
    """
    views = Views(mean=[0.5], std=[0.5])
    loaders = {
        backend: Loader(ShardSet.open(lab.out), views, BATCH, backend=backend, threads=CORES)
        for backend in ("dali", "torch")
    }
    dali, plain = (next(loaders[backend].epoch(0)) for backend in ("dali", "torch"))
    assert torch.equal(dali.rows, plain.rows)
    assert (dali.views - plain.views).abs().mean() < 0.01
    workers = {"num_workers": CORES, "persistent_workers": True}
    usual = torch.utils.data.DataLoader(Files(lab.files), BATCH, shuffle=True, **workers)
    tars = [str(path) for path in sorted(lab.out.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(256)
    samples = samples.map(TarSample(lab.files[0].suffix[1:])).batched(BATCH, partial=True)
    tar_loader = webdataset.WebLoader(samples, batch_size=None, **workers)
    write_chunks(lab.files, tmp_path / "chunks")
    chunk_loader = litdata.StreamingDataLoader(
        Chunks(tmp_path / "chunks"), batch_size=BATCH, **workers
    )
    pipe, decoder = (
        graph(tars, lab.files[0].suffix[1:]) for graph in (dali_webdataset, dali_decoded)
    )
    pipe.build()
    decoder.build()
    sides = np.full(BATCH, 300)
    form = PixelForm("uint8", 1, 1, 255.0)
    epochs = iter(range(1, 1000))

    def own(backend: str) -> None:
        rows = [batch.rows for batch in loaders[backend].epoch(next(epochs))]
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(COUNT))

    def torch_loader() -> None:
        assert sum(len(batch) for batch in usual) == COUNT

    def tar_samples() -> None:
        assert sum(len(batch) for (batch,) in tar_loader) == COUNT

    def chunks() -> None:
        assert sum(len(batch) for batch in chunk_loader) == COUNT

    def dali_reader() -> None:
        for _ in range(COUNT // BATCH):
            stack = torch.empty(2, BATCH, 1, 224, 224)
            for view, output in zip(stack, pipe.run(), strict=True):
                view.copy_(torch.utils.dlpack.from_dlpack(output.as_tensor()))

    def dali_reader_our_views() -> None:
        epoch = next(epochs)
        for start in range(0, COUNT, BATCH):
            places = np.arange(start, start + BATCH)
            draws, _ = training_draws(views, sides, sides, places, 0, epoch)
            (decoded,) = decoder.run()
            images = [to_torch(decoded[i]) for i in range(BATCH)]
            Cutter(views, draws, form).cut(images, 0, empty_views(draws, BATCH, 1))

    contest(
        benchmark,
        COUNT,
        lambda: own("dali"),
        {
            "DataLoader + PIL": torch_loader,
            "DALI webdataset": dali_reader,
            "DALI reader, our views": dali_reader_our_views,
            "webdataset": tar_samples,
            "litdata": chunks,
            "our torch backend": lambda: own("torch"),
        },
    )


def decode_grey(data: bytes) -> NDArray[Any]:
    return simplejpeg.decode_jpeg(data, "GRAY")


# The fastest of PIL, imagecodecs, simplejpeg, torchvision and spng (which has no 16-bit grey).
DECODERS: dict[str, Decode] = {
    "png": imagecodecs.spng_decode,
    "tile-png": imagecodecs.png_decode,
    "jpg": decode_grey,
    "tile-jpg": decode_grey,
}


def decode_all(files: list[Path], name: str) -> int:
    decode = DECODERS[name]
    return sum(decode(path.read_bytes()).shape[0] for path in files)


def test_ingest(store: Lab, benchmark: Any, memory: Path) -> None:
    """From the table to the sealed set, with the decode check and without it; against decoding
    alone, and against tar and sha256sum.

    All have their processes before the clock starts; what starting ours takes stands beside.
    """
    count, numbers = len(store.files), iter(range(1000))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fino_fast.data.write"], check=True)
    started = time.perf_counter() - start
    with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        parts = [store.files[i::CORES] for i in range(CORES)]

        def ours(check: bool) -> None:
            out = memory / str(next(numbers))
            store.ingest(out, Warm(pool), check)
            shutil.rmtree(out)

        def decode() -> None:
            rows = sum(pool.map(decode_all, parts, [store.name] * CORES))
            assert rows % count == 0

        def tar_and_hash() -> None:
            target = memory / "all.tar"
            subprocess.run(["tar", "cf", target, "-C", store.images, "."], check=True)
            subprocess.run(["sha256sum", target], check=True, capture_output=True)

        times = contest(
            benchmark,
            count,
            lambda: ours(True),
            {
                "decode alone": decode,
                "tar + sha256sum": tar_and_hash,
                "ours, unchecked": lambda: ours(False),
            },
        )
    note_ratios(
        benchmark,
        {
            "decode alone": (times["decode alone"], times["ours"]),
            "tar + sha256sum (ours unchecked)": (
                times["tar + sha256sum"],
                times["ours, unchecked"],
            ),
        },
    )
    benchmark.extra_info["seconds_to_start_a_worker"] = started


def test_ingest_memory(lab: Lab, benchmark: Any) -> None:
    """A worker holds no more after its last shard than after its third."""
    tasks = write_tasks(lab.request(lab.out), read_plans(lab.out))
    rounds = -(-20 // len(tasks))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def run() -> list[int]:
            return list(pool.map(resident_after, tasks * rounds))

        start = time.perf_counter()
        held = benchmark.pedantic(run, rounds=1)
        seconds = time.perf_counter() - start
    early, late = held[len(tasks) - 1], held[-1]
    assert late < early * 1.03 + (4 << 20), held
    benchmark.extra_info["resident_mb"] = {"one pass": early / 2**20, "last": late / 2**20}
    benchmark.extra_info["images_per_second"] = {"ours": COUNT * rounds / seconds}
    benchmark.extra_info["speedup"] = {}


def run_script(name: str, *arguments: Path) -> dict[str, Any]:
    """What a script of this folder prints, as its last line, in a process of its own."""
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_first_batch(benchmark: Any, tmp_path: Path) -> None:
    """From an empty process to the first batch of 10⁶ samples; memory at 10⁶ and 10⁷.

    Bars: 5 seconds; 32 bytes a sample, all of it shared.
    """
    million = synthetic.sealed_set(tmp_path / "million", 10**6, 10**4)
    ten = synthetic.sealed_set(tmp_path / "ten", 10**7, 10**4)
    runs = []
    benchmark.pedantic(
        lambda: runs.append(run_script("first_batch.py", million)), rounds=ROUNDS, warmup_rounds=1
    )
    large_runs = [run_script("first_batch.py", ten) for _ in range(ROUNDS)]
    small, large = runs[-1], large_runs[-1]
    assert (small["images"], small["samples"]) == (BATCH, 9 * 10**5)
    assert (large["images"], large["samples"]) == (BATCH, 9 * 10**6)

    def least(runs: list[dict[str, Any]], kind: str) -> int:
        # What threads leave with the allocator differs by megabytes from process to process.
        return min(run[kind] for run in runs)

    bytes_a_sample = {
        kind: (least(large_runs, kind) - least(runs, kind)) / (10**7 - 10**6)
        for kind in ("resident", "own")
    }
    assert bytes_a_sample["resident"] <= 32
    assert bytes_a_sample["own"] <= 1
    seconds, torch_alone = (
        statistics.median(run[key] for run in runs[1:]) for key in ("seconds", "torch_seconds")
    )
    benchmark.extra_info |= {
        "seconds_to_first_batch": {
            "10⁶": seconds,
            "importing torch": torch_alone,
            "10⁷": large["seconds"],
        },
        "bytes_a_sample": bytes_a_sample,
        "images_per_second": {"ours": BATCH / seconds},
        "speedup": {},
    }


def test_plan(benchmark: Any, tmp_path: Path) -> None:
    """A Parquet table of 10⁷ rows, from the command to the committed plan.

    Bars: 120 seconds, 2 GB.
    """
    rows = 10**7
    names = synthetic.write_images(tmp_path / "images")
    synthetic.write_table(tmp_path / "table.parquet", rows, names)
    found = benchmark.pedantic(
        lambda: run_script(
            "plan_rows.py", tmp_path / "table.parquet", tmp_path / "images", tmp_path / "out"
        ),
        rounds=1,
    )
    assert found["rows"] == rows
    assert found["peak_mb"] <= 2048
    benchmark.extra_info |= {
        "seconds": found["seconds"],
        "peak_mb": found["peak_mb"],
        "images_per_second": {"ours": rows / found["seconds"]},
        "speedup": {},
    }
