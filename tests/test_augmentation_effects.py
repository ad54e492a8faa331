"""The single effects of an augmentation: what they do to pixels is what they say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sonovqa import augmentation_effects

SIZE = (400, 300)


def test_geometry_moves_pixels_where_it_says():
    image = Image.new("L", SIZE)
    image.paste(255, (290, 90, 300, 100))
    for moved in (None, np.zeros((augmentation_effects.MESH[1] + 1, augmentation_effects.MESH[0] + 1, 2))):
        how = augmentation_effects.Geometry(SIZE, 12.0, (180.0, 160.0), (7.0, -9.0), True, moved)
        made = np.asarray(how.apply(image), float)
        y, x = (float((made * at).sum() / made.sum()) + 0.5 for at in np.indices(made.shape))
        assert np.allclose((x, y), how.target(np.array((295.0, 95.0))), atol=0.2)


def test_displacement_is_smooth_and_stays_inside():
    for seed in range(20):
        moved = augmentation_effects.displacement(SIZE, np.random.default_rng(seed))
        assert not moved[[0, -1]].any() and not moved[:, [0, -1]].any() and moved.any()
        cell = min(SIZE[0] / augmentation_effects.MESH[0], SIZE[1] / augmentation_effects.MESH[1])
        steps = max(np.abs(np.diff(moved, axis=axis)).max() for axis in (0, 1))
        assert steps <= augmentation_effects.STRAIN * cell + 1e-9


def test_speckle_attenuation_and_shadow_are_what_they_say():
    rng = np.random.default_rng(0)
    for decibels in (0.8, 2.0):
        made = augmentation_effects.speckle((300, 400), decibels, rng)
        assert made.std() == pytest.approx(decibels, rel=0.03)
        assert float((10 ** (made / 10)).mean()) == pytest.approx(1, abs=0.01)  # the mean intensity stays
    depth, line = np.mgrid[0:1:50j, 0:1:60j]
    lost = augmentation_effects.attenuation(depth, 6.0)
    assert np.allclose(lost[[0, -1], 0], (3, -3)) and (np.diff(lost, axis=0) < 0).all()
    dark = augmentation_effects.shadow(line, depth, 5.0, rng)
    assert dark.min() >= -5 and dark.max() <= 0 and not dark[0].any() and dark[-1].min() < -3
