"""DICOM in: the pixels of one frame, and nothing else of the file.

No attribute is copied into a shard, so none that could name a patient is; `attributes` reads those
that a schema lists.
"""

import importlib.util
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import FinoError, MissingExtraError

from .declaration import ImagesDeclaration
from .stored import ImageRejected, Stored, check_size
from .tiff import converted


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
    try:
        # Its warnings would print what a header holds, of patients too, into logs.
        with pydicom.config.disable_value_validation():
            return _prepare(pydicom, data, limits)
    except (ImageRejected, FinoError):
        raise
    except Exception as error:
        # On damaged files pydicom and its decoders raise whatever their parsing ran into.
        detail = f"{type(error).__name__}: {error}"
        raise ImageRejected("decode_failed", detail) from error


def _prepare(pydicom: Any, data: bytes, limits: ImagesDeclaration) -> Stored:
    dataset = pydicom.dcmread(io.BytesIO(data))
    if "SamplesPerPixel" not in dataset:
        raise ImageRejected("no_pixels", "a DICOM object that is no image")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    samples, allocated = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated)
    height, width = int(dataset.Rows), int(dataset.Columns)
    if frames != 1:
        raise ImageRejected("multi_page", f"{frames} frames; export the one that you mean")
    check_size(height, width, samples, max(allocated // 8, 1), len(data), limits)
    _check_decoder(pydicom, dataset.file_meta.TransferSyntaxUID)
    return converted(_pixels(pydicom, dataset), "YXS" if samples > 1 else "YX")


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
    raise ImageRejected("unsupported_color", f"photometric interpretation {colour}")


def _modality(pydicom: Any, dataset: Any, pixels: NDArray[Any]) -> NDArray[Any]:
    identity = (
        float(dataset.get("RescaleSlope", 1) or 1) == 1
        and float(dataset.get("RescaleIntercept", 0) or 0) == 0
        and "ModalityLUTSequence" not in dataset
    )
    if identity:
        return pixels
    values: NDArray[Any] = pydicom.pixels.apply_modality_lut(pixels, dataset)
    return values.astype(np.float32)


def _inverted(grey: NDArray[Any], dataset: Any) -> NDArray[Any]:
    if grey.dtype.kind == "u":
        white = (1 << int(dataset.BitsStored)) - 1
        inverted: NDArray[Any] = grey.dtype.type(white) - grey
        return inverted
    return -grey.astype(np.float32)
