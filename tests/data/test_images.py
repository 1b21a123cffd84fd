"""Images: what passes untouched decodes to the same pixels everywhere; the rest is converted
exactly, or rejected with a code. Bad bytes give nothing but `ImageRejected`."""

import contextlib
import importlib.util
import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageOps

from fino_fast import data as package
from fino_fast.data.declaration import ImagesDeclaration
from fino_fast.data.images import decode, prepare
from fino_fast.data.stored import ImageRejected, Stored
from fino_fast.errors import MissingExtraError

from .labs import dicom, pixels, png

LIMITS = ImagesDeclaration()
DALI_TYPES = {"uint8": types.UINT8, "uint16": types.UINT16, "float32": types.FLOAT}


def noise(dtype: str, channels: int) -> np.ndarray:
    """[37, 53, channels] with values from all over the type."""
    generator = np.random.default_rng(channels)
    if dtype == "float32":
        return (generator.normal(size=(37, 53, channels)) * 1e3).astype(np.float32)
    return generator.integers(0, np.iinfo(dtype).max + 1, (37, 53, channels)).astype(dtype)


def tiff(image: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **options)
    return buffer.getvalue()


def plain_tiff(image: np.ndarray, **options: Any) -> bytes:
    channels = image.shape[2]
    layout: dict[str, Any] = {"photometric": "rgb" if channels == 3 else "minisblack"}
    if channels > 1:
        layout["planarconfig"] = "contig"
    if channels not in (1, 3):
        layout["extrasamples"] = [0] * (channels - 1)
    return tiff(image if channels > 1 else image[:, :, 0], metadata=None, **(layout | options))


def dali_pixels(stored: Stored) -> np.ndarray:
    """Decode as the loader's pipeline does."""
    colour = {1: types.GRAY, 3: types.RGB}.get(stored.channels, types.ANY_DATA)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(
            encoded,
            output_type=colour,
            dtype=DALI_TYPES[stored.dtype],
            adjust_orientation=False,
        )

    pipe = graph()
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(stored.payload, np.uint8)])
    return np.array(pipe.run()[0].at(0))


def rejection(data: bytes, limits: ImagesDeclaration = LIMITS) -> str:
    with pytest.raises(ImageRejected) as caught:
        prepare(data, limits)
    return caught.value.code


PASSED = [("png", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 3)] + [
    (codec, dtype, channels)
    for codec in ("none", "zstd", "deflate", "lzw")
    for dtype in ("uint8", "uint16", "float32")
    for channels in range(1, 7)
]


@pytest.mark.parametrize(("codec", "dtype", "channels"), PASSED)
def test_passed_bytes_are_untouched_and_decode_alike_everywhere(
    codec: str, dtype: str, channels: int
) -> None:
    image = noise(dtype, channels)
    if codec == "png":
        data = bytes(imagecodecs.png_encode(image if channels > 1 else image[:, :, 0]))
    else:
        data = plain_tiff(image, compression=codec, predictor=codec != "none")
    stored = prepare(data, LIMITS)
    assert stored.payload == data
    assert (stored.height, stored.width, stored.channels) == image.shape
    assert (stored.dtype, stored.axes) == (dtype, "")
    np.testing.assert_array_equal(decode(stored.payload, stored.extension), image)
    np.testing.assert_array_equal(dali_pixels(stored), image)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_jpeg_passes_and_decodes_alike(mode: str, options: dict[str, Any]) -> None:
    image = pixels(3, 61, 47, 1 if mode == "L" else 3)
    data = png(image, "JPEG", **options)
    stored = prepare(data, LIMITS)
    assert (stored.payload, stored.extension) == (data, "jpg")
    np.testing.assert_array_equal(dali_pixels(stored), decode(data, "jpg"))


def converted(data: bytes) -> np.ndarray:
    """Pixels of an image that must have been converted, checked in both decoders."""
    stored = prepare(data, LIMITS)
    assert stored.extension == "tiff"
    assert stored.axes
    assert stored.payload != data
    image = decode(stored.payload, "tiff")
    np.testing.assert_array_equal(dali_pixels(stored), image)
    assert prepare(data, LIMITS).payload == stored.payload
    return image


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_photographs_are_stored_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(pixels(1, 32, 48, 3), "JPEG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(converted(data), upright)


def test_palette_bits_and_opaque_alpha_are_expanded() -> None:
    rgb = pixels(2, channels=3)
    palette = Image.fromarray(rgb).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    np.testing.assert_array_equal(converted(buffer.getvalue()), np.asarray(palette.convert("RGB")))
    bits = pixels(2) > 127
    np.testing.assert_array_equal(converted(png(bits))[:, :, 0], bits * np.uint8(255))
    opaque = np.concatenate([rgb, np.full_like(rgb[:, :, :1], 255)], axis=2)
    np.testing.assert_array_equal(converted(png(opaque)), rgb)
    deep = np.concatenate([noise("uint16", 3), np.full((37, 53, 1), 65535, np.uint16)], axis=2)
    np.testing.assert_array_equal(converted(imagecodecs.png_encode(deep)), deep[:, :, :3])
    for form in ("BMP", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        np.testing.assert_array_equal(converted(png(rgb, form, **options)), rgb)


def test_transparency_is_never_dropped() -> None:
    image = np.concatenate([pixels(0, channels=3), pixels(1)[:, :, None]], axis=2)
    assert rejection(png(image)) == "transparent"
    assert rejection(plain_tiff(image, extrasamples=["unassalpha"], photometric="rgb")) == (
        "transparent"
    )


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "int32", "float64", "float16"])
def test_other_number_types_keep_their_values(dtype: str) -> None:
    image = np.arange(37 * 53).reshape(37, 53, 1).astype(dtype) % 97
    image = image - image.dtype.type(5) if np.dtype(dtype).kind != "u" else image
    stored = converted(plain_tiff(image))
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored.astype(dtype), image)


@pytest.mark.filterwarnings("error")
def test_values_that_no_stored_type_holds_are_rejected() -> None:
    assert rejection(plain_tiff(np.full((4, 4, 1), 2**24 + 1, np.uint32))) == "precision_loss"
    # 2³² − 1 becomes 2³² in float32, which no uint32 can be compared with.
    assert rejection(plain_tiff(np.full((4, 4, 1), 2**32 - 1, np.uint32))) == "precision_loss"
    assert rejection(plain_tiff(np.full((4, 4, 1), 2**31 - 1, np.int32))) == "precision_loss"
    assert rejection(plain_tiff(np.full((4, 4, 1), 0.1, np.float64))) == "precision_loss"
    assert rejection(plain_tiff(np.full((4, 4, 1), np.nan, np.float32))) == "not_finite"
    assert rejection(plain_tiff(np.full((4, 4, 1), np.inf, np.float64))) == "not_finite"
    assert rejection(plain_tiff(np.zeros((4, 4, 1), np.complex64))) == "unsupported_dtype"


def test_layouts_of_microscopes() -> None:
    image = noise("uint16", 4)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    planar = tiff(planes, photometric="minisblack", planarconfig="separate", metadata=None)
    pages = tiff(planes, photometric="minisblack", metadata=None)
    ome = tiff(planes, photometric="minisblack", ome=True, metadata={"axes": "CYX"})
    imagej = tiff(planes, imagej=True, metadata={"axes": "CYX"})
    big_endian = tiff(image[:, :, 0], byteorder=">", metadata=None)
    for data in (planar, pages, ome, imagej):
        np.testing.assert_array_equal(converted(data), image)
    np.testing.assert_array_equal(converted(big_endian), image[:, :, :1])
    assert prepare(ome, LIMITS).axes == "CYX"
    white_is_zero = tiff(image[:, :, 0], photometric="miniswhite", metadata=None)
    np.testing.assert_array_equal(converted(white_is_zero), 65535 - image[:, :, :1])


def test_tiled_tiff_decodes_alike() -> None:
    image = noise("uint16", 1)
    stored = prepare(plain_tiff(image, tile=(16, 32)), LIMITS)
    np.testing.assert_array_equal(decode(stored.payload, "tiff"), image)
    np.testing.assert_array_equal(dali_pixels(stored), image)


def test_stacks_are_rejected_and_not_cut() -> None:
    stack = np.zeros((3, 2, 16, 16), np.uint8)
    for axes in ("ZCYX", "TCYX"):
        data = tiff(stack, ome=True, photometric="minisblack", metadata={"axes": axes})
        assert rejection(data) == "multi_page"
    assert rejection(tiff(stack[:, 0], imagej=True, metadata={"axes": "TYX"})) == "multi_page"
    frames = [Image.fromarray(pixels(i)) for i in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert rejection(buffer.getvalue()) == "multi_page"
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    assert rejection(buffer.getvalue()) == "multi_page"
    many = tiff(np.zeros((7, 8, 8), np.uint8), photometric="minisblack", metadata=None)
    assert rejection(many) == "wrong_channels"


def test_dicom_becomes_its_pixels_and_nothing_else() -> None:
    image = noise("uint16", 1)[:, :52, 0]
    data = dicom(image)
    np.testing.assert_array_equal(converted(data)[:, :, 0], image)
    assert b"Doe" in data
    assert b"Doe" not in prepare(data, LIMITS).payload
    np.testing.assert_array_equal(
        converted(dicom(image, "MONOCHROME1", BitsStored=16))[:, :, 0], 65535 - image
    )
    signed = image.astype(np.int16)
    hounsfield = converted(dicom(signed, RescaleSlope="2", RescaleIntercept="-1024"))
    np.testing.assert_array_equal(hounsfield[:, :, 0], signed.astype(np.float32) * 2 - 1024)
    rgb = np.ascontiguousarray(pixels(1, channels=3))
    np.testing.assert_array_equal(converted(dicom(rgb, "RGB")), rgb)


def test_dicom_that_cannot_be_taken() -> None:
    image = noise("uint16", 1)[:, :52, 0]
    assert rejection(dicom(image, NumberOfFrames=2)) == "multi_page"
    assert rejection(dicom(image)[:-100]) == "decode_failed"
    assert rejection(dicom(image, RescaleSlope="0", RescaleIntercept="0")) == "header_damaged"
    assert rejection(dicom(image, "PALETTE COLOR")) in ("unsupported_color", "decode_failed")


DICOM_FILES = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_dicom_files_of_many_makers() -> None:
    """pydicom's own collection: its pixels, or a rejection; some begin like a TIFF."""
    taken = {}
    for path in DICOM_FILES:
        data = path.read_bytes()
        try:
            stored = prepare(data, LIMITS)
        except ImageRejected:
            continue
        dataset = pydicom.dcmread(path)
        expected = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        image = taken[path.stem] = decode(stored.payload, stored.extension)
        np.testing.assert_array_equal(np.squeeze(image), expected.astype(np.float32))
    assert len(taken) > 40
    assert {encoded(name)[:4] for name in taken} >= {b"II*\0", bytes(4)}
    one = taken["MR_small"]
    same = ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded")
    for name in same:
        np.testing.assert_array_equal(taken[f"MR_small_{name}"], one)
    assert taken["SC_rgb_jpeg_gdcm"][5, 50].tolist() == [255, 0, 0]
    assert rejection(encoded("MR_truncated")) == "decode_failed"
    assert rejection(encoded("rtdose")) == "multi_page"
    assert rejection(encoded("test-SR")) == "no_pixels"


def encoded(name: str) -> bytes:
    return next(path for path in DICOM_FILES if path.stem == name).read_bytes()


@pytest.mark.parametrize("gdcm_is_there", [False, True])
def test_a_dicom_decoder_that_is_missing_rejects_no_image(
    monkeypatch: pytest.MonkeyPatch, gdcm_is_there: bool
) -> None:
    """JPEG-LS, which only an optional package decodes; or which nobody would."""
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless)
    monkeypatch.setattr(decoder, "_available", {})
    found = importlib.util.find_spec("gdcm") if gdcm_is_there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    data = encoded("MR_small_jpeg_ls_lossless")
    if gdcm_is_there:
        assert rejection(data) == "decode_failed"
        return
    with pytest.raises(MissingExtraError, match=r"python-gdcm .*fino-fast\[dicom\]"):
        prepare(data, LIMITS)


GEO_TAGS = [
    (33550, "d", 3, (10.0, 10.0, 0.0), False),
    (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 4.6e6, 0.0), False),
    (34735, "H", 8, (1, 1, 0, 1, 3072, 0, 1, 32633), False),
]


def test_geotiff() -> None:
    """As GDAL writes it: tiled and interleaved passes, bands are brought together, and of a
    cloud-optimised one the overviews are left out. A mask makes two images of a file."""
    image = noise("uint16", 4)
    tags: dict[str, Any] = {"extratags": GEO_TAGS, "metadata": None}
    tiles: dict[str, Any] = {"tile": (16, 16), "compression": "deflate", "predictor": True}
    data = plain_tiff(image, extratags=GEO_TAGS, **tiles)
    assert prepare(data, LIMITS).payload == data
    np.testing.assert_array_equal(dali_pixels(prepare(data, LIMITS)), image)
    bands = np.ascontiguousarray(image.transpose(2, 0, 1))
    separate = tiff(bands, photometric="minisblack", planarconfig="separate", **tags)
    np.testing.assert_array_equal(converted(separate), image)
    rgb = np.ascontiguousarray(image[:, :, :3])
    pyramid = pages((rgb, {}), (rgb[::2, ::2], {"subfiletype": 1}), photometric="rgb", **tags)
    np.testing.assert_array_equal(converted(pyramid), rgb)
    mask = pages((rgb, {}), (rgb[:, :, 0] > 9, {"subfiletype": 4}), metadata=None)
    assert rejection(mask) == "multi_page"


def pages(*images: tuple[np.ndarray, dict[str, Any]], **options: Any) -> bytes:
    """A TIFF of several pages, each with options of its own."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for image, own in images:
            writer.write(image, **(options | own))
    return buffer.getvalue()


def test_declared_channels_are_kept_to() -> None:
    grey = png(pixels(0))
    assert prepare(grey, ImagesDeclaration(channels=1)).channels == 1
    assert rejection(grey, ImagesDeclaration(channels=3)) == "wrong_channels"


SOUND = {
    "png": png(pixels(0)),
    "deep png": bytes(imagecodecs.png_encode(noise("uint16", 1)[:, :, 0])),
    "jpeg": png(pixels(0), "JPEG"),
    "tiff": plain_tiff(noise("uint16", 2)),
    "zstd tiff": plain_tiff(noise("float32", 1), compression="zstd", predictor=True),
    "dicom": dicom(noise("uint16", 1)[:, :52, 0]),
    "bmp": png(pixels(0), "BMP"),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_cut_files_are_rejected(name: str, share: float) -> None:
    data = SOUND[name]
    assert prepare(data, LIMITS)
    assert rejection(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", ["png", "deep png"])
def test_a_flipped_bit_is_found_where_the_format_has_checksums(name: str) -> None:
    data = bytearray(SOUND[name])
    data[len(data) // 2] ^= 0x10
    assert rejection(bytes(data)) == "decode_failed"


def test_a_jpeg_that_decodes_with_a_warning_is_rejected() -> None:
    """Pillow decodes both without a word: the decoder fills up what is missing with grey."""
    data = SOUND["jpeg"]
    middle = (data.find(b"\xff\xda") + len(data)) // 2
    for damaged in (
        data[:middle] + b"\xff\xd9" + data[middle + 2 :],
        data[:middle] + data[middle + 40 :],
    ):
        Image.open(io.BytesIO(damaged)).load()
        assert rejection(damaged) == "decode_failed"


def test_a_jpeg_of_an_unnamed_sampling_is_converted() -> None:
    """Five units of 3 blocks, read as three of 3 + 1 + 1: a sound stream of another picture."""
    data = bytearray(imagecodecs.jpeg8_encode(pixels(3, 8, 40, 3), level=90, outcolorspace="RGB"))
    frame = data.find(b"\xff\xc0")
    data[frame + 7 : frame + 9] = (72).to_bytes(2)
    data[frame + 11] = 0x31
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == (8, 72, 3)
    np.testing.assert_array_equal(converted(bytes(data)), image)


def test_what_is_no_image() -> None:
    assert rejection(b"") == "empty_file"
    assert rejection(b"<!DOCTYPE html><html><body>404</body></html>") == "unknown_format"
    assert rejection(b"\x89PNG\r\n\x1a\n") == "header_damaged"
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(cmyk, "JPEG")
    assert rejection(cmyk.getvalue()) == "unsupported_color"


def test_every_code_of_a_rejection_is_documented() -> None:
    root = Path(__file__).parents[2]
    codes = {
        code
        for source in Path(package.__file__).parent.glob("*.py")
        for code in re.findall(r'ImageRejected\(\s*"(\w+)"', source.read_text(encoding="utf-8"))
    }
    text = (root / "docs" / "data.md").read_text(encoding="utf-8")
    assert len(codes) > 15
    assert [code for code in codes if f"`{code}`" not in text] == []


def bomb(side: int) -> bytes:
    """A sound PNG of side² black RGB pixels (side a multiple of 100), never held in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    # After a full flush equal input gives equal output: pack 100 rows once, repeat the result.
    rows = bytes(100 * (1 + 3 * side))
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(rows) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = 1
    for _ in range(side // 100):
        adler = zlib.adler32(rows, adler)
    body = b"\x78\xda" + packed * (side // 100) + b"\x03\x00" + struct.pack(">I", adler)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def outcome_alone(data: bytes) -> tuple[str, int]:
    """The code of a rejection and the growth of memory's peak, in kB, in a process of its own."""
    script = (
        "import resource, sys\n"
        "from fino_fast.data.declaration import ImagesDeclaration\n"
        "from fino_fast.data.images import prepare\n"
        "from fino_fast.data.stored import ImageRejected\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    prepare(data, ImagesDeclaration())\n"
        "except ImageRejected as rejection:\n    print(rejection.code)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, check=True
    )
    code, grown = done.stdout.decode().split()
    return code, int(grown)


def test_a_bomb_is_refused_before_it_unfolds() -> None:
    data = bomb(12_000)
    assert len(data) < 500_000
    # 144 million pixels are above the default limit; the smaller one falls by its ratio.
    code, grown = outcome_alone(data)
    assert code == "too_large"
    assert grown < 20_000
    assert rejection(bomb(6_000)) == "expansion"
    # It is a sound image: only the limits stand against it.
    assert prepare(bomb(2_000), LIMITS).channels == 3


DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
# Long beginnings of a file meta group, and a whole one without value representations.
FORGED_META = {
    "OB": b"\2\0\2\1OB" + struct.pack("<HI", 0, 1 << 16) + bytes(1 << 16),
    "OF": b"\2\0\2\1OF" + struct.pack("<HI", 0, 1 << 16) + bytes(1 << 16),
    "implicit": (
        b"\2\0\1\0" + struct.pack("<I", 1 << 13) + bytes(1 << 13)
        + b"\2\0\x10\0" + struct.pack("<I", len(DEFLATED_SYNTAX)) + DEFLATED_SYNTAX
    ),
}  # fmt: skip


def deflated(count: int, image: np.ndarray, meta: str = "") -> bytes:
    """A deflated DICOM file of `image`, behind which a private element holds `count` zeros."""
    plain = dicom(image)
    start = plain.index(b"\x08\0\x16\0UI")  # the first element behind the file meta group
    place = plain.index(DEFLATED_SYNTAX[:-3] + b"\0")
    group = plain[132 : place - 2] + struct.pack("<H", 22) + DEFLATED_SYNTAX
    group += plain[place + 20 : start]
    head = plain[:132] + FORGED_META.get(meta, b"") + (b"" if meta == "implicit" else group)
    packer = zlib.compressobj(9, wbits=-15)
    parts = [packer.compress(plain[start:])]
    parts.append(packer.compress(b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", count)))
    parts += [packer.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    return head + b"".join(parts) + packer.flush()


@pytest.mark.filterwarnings("ignore:Expected explicit VR")
@pytest.mark.parametrize("meta", ["", *FORGED_META])
def test_a_deflated_dicom_bomb_is_refused_before_it_unfolds(meta: str) -> None:
    image = noise("uint16", 1)[:, :, 0]
    np.testing.assert_array_equal(converted(deflated(0, image, meta))[:, :, 0], image)
    data = deflated(400 << 20, image, meta)
    assert len(data) < 500_000
    code, grown = outcome_alone(data)
    assert code == "expansion"
    # What is inflated to find out, and room for it to grow in; pydicom would take 400 MB and more.
    assert grown < 200_000


def test_blank_images_are_no_bombs() -> None:
    assert prepare(png(np.zeros((1000, 1000), np.uint8)), LIMITS).channels == 1


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), magic=st.sampled_from(sorted(SOUND)))
def test_random_bytes_behind_a_true_beginning(data: bytes, magic: str) -> None:
    keep = 140 if magic == "dicom" else 16
    with contextlib.suppress(ImageRejected):
        prepare(SOUND[magic][:keep] + data, LIMITS)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SOUND)),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(1, 255),
)
def test_one_changed_byte_gives_an_image_or_a_rejection(name: str, place: float, byte: int) -> None:
    data = bytearray(SOUND[name])
    data[int(place * len(data))] ^= byte
    try:
        stored = prepare(bytes(data), LIMITS)
    except ImageRejected:
        return
    image = decode(stored.payload, stored.extension)
    assert image.shape == (stored.height, stored.width, stored.channels)
    assert image.dtype.name == stored.dtype
