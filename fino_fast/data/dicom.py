"""DICOM in: the pixels of one frame, and nothing else of the file.

No attribute is copied into a shard, so none that could name a patient is; `attributes` reads those
that a schema lists. What is rejected says so in our own words: pydicom's messages quote headers.
"""

import importlib.util
import io
import zlib
from typing import IO, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import FinoError, MissingExtraError

from .declaration import ImagesDeclaration
from .stored import ImageRejected, Stored, check_size, most_unfolded
from .tiff import converted

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_DEFLATED = "1.2.840.10008.1.2.1.99"
# Of every image, whatever its pixels are (PS3.3 C.7.6.3).
_REQUIRED = ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation")
# Defined by PS3.3 C.7.6.3.1.2, without a meaning in grey or RGB here.
_OTHER_COLOURS = ("PALETTE COLOR", "HSV", "ARGB", "CMYK", "XYB")


def import_pydicom() -> Any:
    """pydicom, or the error that says which extra brings it."""
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise MissingExtraError("pydicom", "dicom") from error
    return pydicom


def prepare_dicom(data: bytes, limits: ImagesDeclaration) -> Stored:
    """Convert a single-frame DICOM file.

    Grey values are turned so that greater is brighter (MONOCHROME1 is inverted) and pass the
    modality transformation (PS3.3 C.11.1) where the file has one that changes them; those are
    stored as the nearest float32, stored values as they are.

    Raises:
        ImageRejected: damaged, more than one frame, or a colour space other than grey and RGB.
        MissingExtraError: pydicom is not installed.
    """
    pydicom = import_pydicom()
    part = "header"
    try:
        # Its warnings would print what a header holds, of patients too, into logs.
        with pydicom.config.disable_value_validation():
            dataset = _checked(pydicom, data, limits)
            part = "pixels"
            axes = "YXS" if dataset.SamplesPerPixel > 1 else "YX"
            return converted(_pixels(pydicom, dataset), axes)
    except (ImageRejected, FinoError):
        raise
    except Exception as error:
        # On damaged files pydicom and its decoders raise whatever their parsing ran into.
        raise ImageRejected("decode_failed", parser_fault(error, part)) from None


def parser_fault(error: Exception, part: str) -> str:
    """What to tell of an exception of pydicom's in reading a part of a file.

    Not its text: that may quote a value of the header, a patient's name too, and what is told ends
    up in sidecars and in `rejects.parquet`.
    """
    return (
        f"DICOM: {type(error).__name__} in its {part}; pydicom's message may quote the header and "
        "is left out: open the file with pydicom to see it"
    )


def refuse_deflated_bomb(file: IO[bytes]) -> None:
    """Refuse a file whose data set is deflated (PS3.5 A.5) and too long: pydicom would inflate all
    of it before anybody can look at its header. Others are left where they were: at the beginning.

    Raises:
        ImageRejected: it is one.
        MissingExtraError: pydicom is not installed.
        Exception: it is damaged, in whatever way pydicom or zlib ran into.
    """
    if file.read(132)[128:] == b"DICM" and _transfer_syntax(file) == _DEFLATED:
        start, packed = file.tell(), file.read()
        size = start + len(packed)
        room = most_unfolded(size)
        if len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, room + 1)) > room:
            raise ImageRejected(
                "expansion", f"{size} bytes of deflated DICOM would unfold to more than {room}"
            )
    file.seek(0)


def _transfer_syntax(file: IO[bytes]) -> str | None:
    """That of the file meta group, behind which the file is left (PS3.10, 7.1).

    Read as pydicom will read it, however it was forged.
    """
    from pydicom.filereader import read_dataset

    group = read_dataset(
        cast(BinaryIO, file), is_implicit_VR=False, is_little_endian=True,
        stop_when=lambda tag, _representation, _length: tag >> 16 != 2,
    )  # fmt: skip
    syntax: str | None = group.get("TransferSyntaxUID")
    return syntax


def _checked(pydicom: Any, data: bytes, limits: ImagesDeclaration) -> Any:
    """The dataset of a file, whose header allows for its pixels to be decoded.

    Raises:
        ImageRejected: it does not.
        MissingExtraError: a decoder is not installed.
    """
    file = io.BytesIO(data)
    refuse_deflated_bomb(file)
    dataset = pydicom.dcmread(file)
    if "SamplesPerPixel" not in dataset or not any(keyword in dataset for keyword in _PIXELS):
        raise ImageRejected("no_pixels", "a DICOM object that is no image")
    if absent := [keyword for keyword in _REQUIRED if keyword not in dataset]:
        raise ImageRejected("header_damaged", f"DICOM image without {', '.join(absent)}")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    samples, allocated = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated)
    height, width = int(dataset.Rows), int(dataset.Columns)
    if frames != 1:
        raise ImageRejected("multi_page", "several frames; export the one that you mean")
    check_size(height, width, samples, max(allocated // 8, 1), len(data), limits)
    _check_decoder(pydicom, dataset.file_meta.TransferSyntaxUID)
    return dataset


def _check_decoder(pydicom: Any, syntax: Any) -> None:
    """Tell a decoder that is not installed from a damaged image.

    Raises:
        MissingExtraError: the extra brings one.
        ImageRejected: nobody has one.
    """
    if not syntax.is_encapsulated or pydicom.pixels.get_decoder(syntax).is_available:
        return
    if importlib.util.find_spec("gdcm") is None:
        raise MissingExtraError("python-gdcm", "dicom")
    raise ImageRejected("decode_failed", f"no decoder reads the transfer syntax {syntax.name}")


def _pixels(pydicom: Any, dataset: Any) -> NDArray[Any]:
    """[H, W, C] of a dataset."""
    pixels: NDArray[Any] = dataset.pixel_array
    colour = str(dataset.PhotometricInterpretation)
    if colour in ("MONOCHROME1", "MONOCHROME2"):
        grey = _modality(pydicom, dataset, pixels)
        if colour == "MONOCHROME1":
            grey = _inverted(grey, dataset)
        return np.ascontiguousarray(grey[:, :, None])
    # pydicom has turned YBR into RGB while decoding.
    if colour == "RGB" or colour.startswith("YBR"):
        return np.ascontiguousarray(pixels)
    if colour not in _OTHER_COLOURS:
        raise ImageRejected("header_damaged", "a photometric interpretation that DICOM has not")
    raise ImageRejected("unsupported_color", f"photometric interpretation {colour}")


def _modality(pydicom: Any, dataset: Any, pixels: NDArray[Any]) -> NDArray[Any]:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    if slope == 0:
        raise ImageRejected("header_damaged", "a RescaleSlope of 0 leaves nothing of the image")
    if slope == 1 and float(intercept or 0) == 0 and "ModalityLUTSequence" not in dataset:
        return pixels
    values: NDArray[Any] = pydicom.pixels.apply_modality_lut(pixels, dataset)
    return values.astype(np.float32)


def _inverted(grey: NDArray[Any], dataset: Any) -> NDArray[Any]:
    if grey.dtype.kind == "u":
        white = (1 << int(dataset.BitsStored)) - 1
        inverted: NDArray[Any] = grey.dtype.type(white) - grey
        return inverted
    return -grey.astype(np.float32)
