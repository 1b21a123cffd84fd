"""A seeded simulation of cameras: the same scene, seen by different sensors and optics.

It gives the demo a nuisance factor whose truth is known. One camera is a fixed chain

    s = exposure · gain · V(r) · (G_σ * x)             optics and sensitivity
    y = s + sqrt(read² + shot² · s) · n,  n ~ N(0, 1)  shot and read noise
    image = clip(y, 0, 1)^gamma                        tone curve, then 8 bits

with x in [0, 1], G_σ a Gaussian blur and V(r) = 1 − vignette · r² the fall-off towards the
corners (r = 1 at the corner farthest from the optical centre). The noise terms are the usual
photon-transfer model of a sensor: a constant part and one that grows with the signal.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Plane = NDArray[np.float32]

# Parameter → (low, high, drawn on a logarithmic scale). Wide: a dark, noisy camera with a hard tone
# curve hardly shows a fine crack.
RANGES: dict[str, tuple[float, float, bool]] = {
    "gain": (0.35, 1.1, True),
    "gamma": (0.45, 2.2, True),
    "vignette": (0.0, 0.8, False),
    "centre_x": (0.35, 0.65, False),
    "centre_y": (0.35, 0.65, False),
    "read_noise": (0.004, 0.12, True),
    "shot_noise": (0.004, 0.12, True),
    "blur": (0.0, 0.012, False),
}
EXPOSURE = (0.6, 1.4)  # relative to the nominal exposure; uniform


@dataclass(frozen=True)
class Camera:
    """One camera. Lengths are fractions of the image's width, so they do not depend on its size.

    Attributes:
        name: what stands in the table.
        gain: output per unit of light, relative.
        gamma: exponent of the tone curve; below 1 it lifts the shadows.
        vignette: share of light lost in the farthest corner.
        centre_x: optical centre from the left, in image widths.
        centre_y: optical centre from the top, in image heights.
        read_noise: standard deviation of the noise in the dark, full scale = 1.
        shot_noise: standard deviation of the signal-dependent part at full scale.
        blur: standard deviation of the Gaussian blur, in image widths.
    """

    name: str
    gain: float
    gamma: float
    vignette: float
    centre_x: float
    centre_y: float
    read_noise: float
    shot_noise: float
    blur: float

    def image(self, scene: Plane, exposure: float, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Take one picture.

        Args:
            scene: [H, W] light per pixel in [0, 1].
            exposure: exposure time relative to the nominal one, > 0.
            rng: source of the noise.

        Returns:
            [H, W] uint8.

        Raises:
            ValueError: `scene` is no [H, W] array in [0, 1], or `exposure` is not positive.
        """
        if scene.ndim != 2 or not (scene.min() >= 0 and scene.max() <= 1):
            raise ValueError(f"scene: expected [H, W] in [0, 1], found shape {scene.shape}")
        if not exposure > 0:
            raise ValueError(f"exposure: expected a positive number, found {exposure}")
        height, width = scene.shape
        light = gaussian_filter(scene, self.blur * width, mode="nearest")
        signal = exposure * self.gain * self._falloff(height, width) * light
        spread = np.sqrt(self.read_noise**2 + self.shot_noise**2 * signal)
        noisy = signal + spread * rng.standard_normal(scene.shape, dtype=np.float32)
        levels: NDArray[np.uint8] = np.rint(255 * np.clip(noisy, 0, 1) ** self.gamma).astype(
            np.uint8
        )
        return levels

    def _falloff(self, height: int, width: int) -> Plane:
        y = (np.arange(height, dtype=np.float32) + 0.5) / height - self.centre_y
        x = (np.arange(width, dtype=np.float32) + 0.5) / width - self.centre_x
        farthest = max(self.centre_x, 1 - self.centre_x) ** 2
        farthest += max(self.centre_y, 1 - self.centre_y) ** 2
        squares = np.asarray(y[:, None] ** 2 + x[None, :] ** 2, dtype=np.float32)
        return 1 - np.float32(self.vignette / farthest) * squares


def draw_cameras(count: int, rng: np.random.Generator) -> list[Camera]:
    """`count` different cameras, by a Latin hypercube over `RANGES`.

    Each parameter's range is cut into `count` strata and each stratum is used once, so that no two
    cameras agree in any parameter and the set covers the ranges whatever the seed.

    Raises:
        ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 camera, found {count}")
    columns = {}
    for name, (low, high, logarithmic) in RANGES.items():
        share = (rng.permutation(count) + rng.random(count)) / count
        if logarithmic:
            columns[name] = low * (high / low) ** share
        else:
            columns[name] = low + (high - low) * share
    return [
        Camera(f"camera-{i + 1}", **{name: float(column[i]) for name, column in columns.items()})
        for i in range(count)
    ]
