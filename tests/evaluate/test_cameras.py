import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fino_fast.evaluate.cameras import RANGES, Camera, draw_cameras

IDEAL = {
    "gain": 1.0,
    "gamma": 1.0,
    "vignette": 0.0,
    "centre_x": 0.5,
    "centre_y": 0.5,
    "read_noise": 0.0,
    "shot_noise": 0.0,
    "blur": 0.0,
}


def camera(**changes: float) -> Camera:
    return Camera("test", **{**IDEAL, **changes})


def scene(value: float, size: int = 65) -> np.ndarray:
    return np.full((size, size), value, dtype=np.float32)


def test_an_ideal_camera_changes_nothing_but_the_depth(rng: np.random.Generator) -> None:
    light = rng.random((40, 60), dtype=np.float32)
    picture = camera().image(light, 1.0, rng)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, np.rint(light * 255))


def test_gain_exposure_and_gamma_follow_the_formula(rng: np.random.Generator) -> None:
    picture = camera(gain=0.5, gamma=2.0).image(scene(0.8), 1.5, rng)
    assert np.unique(picture).tolist() == [round(255 * (0.5 * 1.5 * 0.8) ** 2)]
    assert np.unique(camera(gain=2.0).image(scene(0.8), 1.0, rng)).tolist() == [255]  # saturated


def test_vignette_takes_its_share_in_the_farthest_corner(rng: np.random.Generator) -> None:
    picture = camera(vignette=0.5, centre_x=0.4, centre_y=0.3).image(scene(1.0, 1001), 1.0, rng)
    assert picture[300, 400] == 255
    assert picture[-1, -1] == pytest.approx(255 * 0.5, abs=1)
    assert picture.min() == picture[-1, -1]


def test_noise_has_the_declared_deviation(rng: np.random.Generator) -> None:
    chain = camera(read_noise=0.03, shot_noise=0.08)
    for level in (0.2, 0.6):
        picture = chain.image(scene(level, 400), 1.0, rng) / 255
        assert picture.mean() == pytest.approx(level, abs=1e-3)
        assert picture.std() == pytest.approx(np.sqrt(0.03**2 + 0.08**2 * level), rel=0.02)


def test_blur_scales_with_the_image(rng: np.random.Generator) -> None:
    light = rng.random((200, 200), dtype=np.float32)
    picture = camera(blur=0.01).image(light, 1.0, rng)
    np.testing.assert_allclose(
        picture / 255, gaussian_filter(light, 2.0, mode="nearest"), atol=3e-3
    )


def test_cameras_fill_their_ranges_and_never_share_a_value() -> None:
    cameras = draw_cameras(8, np.random.default_rng(3))
    assert len({c.name for c in cameras}) == 8
    for name, (low, high, logarithmic) in RANGES.items():
        values = np.array([getattr(c, name) for c in cameras])
        if logarithmic:
            share = np.log(values / low) / np.log(high / low)
        else:
            share = (values - low) / (high - low)
        assert sorted(np.floor(share * 8).astype(int)) == list(range(8)), name


def test_the_same_seed_draws_the_same_cameras_and_noise() -> None:
    light = scene(0.5)
    first, second = (draw_cameras(3, np.random.default_rng(7)) for _ in range(2))
    assert first == second
    pictures = [first[0].image(light, 1.0, np.random.default_rng(s)) for s in (1, 1, 2)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize(
    ("light", "exposure", "message"),
    [
        (scene(2.0), 1.0, "scene"),
        (scene(-0.1), 1.0, "scene"),
        (scene(np.nan), 1.0, "scene"),
        (scene(0.5)[0], 1.0, "scene"),
        (scene(0.5), 0.0, "exposure"),
        (scene(0.5), float("nan"), "exposure"),
    ],
)
def test_impossible_scenes_are_refused(
    light: np.ndarray, exposure: float, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        camera().image(light, exposure, rng)


def test_no_camera_cannot_be_drawn(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        draw_cameras(0, rng)
