"""Quality of single tiles.

Each tile is read once. With ``tiling.min_sharpness: 0`` the tile step needs no pixels at the target resolution, and
the encode step measures sharpness on the tiles that it reads anyway; it stands in the feature file and the audit.
With a limit above 0 the tile step must read its candidates, and sharpness stands in the tile file as well.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def sharpness(tile: np.ndarray) -> float:
    """Variance of the Laplacian of a tile: small where it is out of focus (Pech-Pacheco et al., ICPR 2000).

    Args:
        tile: uint8 (H, W, 3) at the target resolution. Grey is ITU-R 601 luma rounded to 8 bits; the Laplacian
            has 4 neighbours and leaves out the border.

    Returns:
        Squared grey levels; 0 for tiles below 3 px.
    """
    return laplacian_variance(np.asarray(Image.fromarray(tile).convert("L")))


def laplacian_variance(grey: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of uint8 (H, W), the border left out; 0 below 3 px."""
    if min(grey.shape) < 3:
        return 0.0
    grey = grey.astype(np.int16)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    # Whole numbers: the sums are exact, whatever the order in which they are added.
    n = laplacian.size
    total, squares = int(laplacian.sum(dtype=np.int64)), int((laplacian.astype(np.int32) ** 2).sum(dtype=np.int64))
    return squares / n - (total / n) ** 2
