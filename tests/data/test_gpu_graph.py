"""The graph for a GPU, as far as it goes without one: DALI builds it in Python and checks every
operator's arguments and devices; only handing it to the driver is left out."""

from typing import Any, cast

import pytest
import torch
from nvidia import dali

from fino_fast.data import ShardSet, Views
from fino_fast.data.dali_views import DaliViews
from fino_fast.data.pipeline import PixelForm

VIEWS = Views(size=16, local_count=2, local_size=8, vflip=0.5, brightness=0.1, contrast=0.1)


def operators(
    monkeypatch: pytest.MonkeyPatch, form: PixelForm, device: str, views: Views
) -> list[tuple[str, str]]:
    """(name, device of its output) of every operator of the graph."""
    monkeypatch.setattr(dali.Pipeline, "build", lambda pipe: pipe._build_graph())
    nothing = cast(ShardSet, None)  # a graph is built from the images' form alone
    counts = [(2, views.size), (2, views.local_size)]
    graph = DaliViews(nothing, views, form, 4, 1, torch.device(device), counts)
    pipe: Any = graph._build(graph.depth)
    return [
        (output.name.strip("_0123456789"), output.device)
        for operator in pipe._ops
        for output in operator.outputs
    ]


@pytest.mark.parametrize(
    "form",
    [
        PixelForm("uint8", 1, 3, 255.0),
        PixelForm("uint16", 1, 1, 4095.0),
        PixelForm("uint8", 3, 3, 255.0),
        PixelForm("float32", 5, 5, 1.0),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_decoding_is_mixed_and_all_behind_it_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, form: PixelForm, normalize: bool
) -> None:
    views = VIEWS.model_copy(update={"normalize": normalize})
    on_cpu = operators(monkeypatch, form, "cpu", views)
    on_gpu = operators(monkeypatch, form, "cuda:0", views)
    assert [name for name, _ in on_gpu] == [name for name, _ in on_cpu]
    assert {device for _, device in on_cpu} == {"cpu"}
    # What is fed has a name of ours, in small letters; decoder and operators have DALI's.
    assert on_gpu[:2] == [("encoded", "cpu"), ("Image", "gpu")]
    assert all(device == ("cpu" if name.islower() else "gpu") for name, device in on_gpu)
    assert sum(name == "CropMirrorNormalize" for name, _ in on_gpu) == 4
