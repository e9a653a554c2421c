"""What each number of the stain_texture encoder means, in which unit, and how it is centred and scaled.

The constants are fixed: rounded typical values of stained sections, never fitted to a cohort. A change of any of
them changes vectors and needs a new version of the encoder. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A pixel with every channel above this is white.
WHITE = 220
#: Smaller pieces are no nuclei, pixels of the work image.
NUCLEUS_MIN_PX = 12
#: Side of the blocks in which the direction of fibres is told, pixels of the work image.
FIBRE_BLOCK_PX = 16


@dataclass(frozen=True)
class Dimension:
    """One number of the vector: ``(raw - centre) / scale``."""

    name: str
    unit: str
    meaning: str
    centre: float
    scale: float


def _dimensions() -> tuple[Dimension, ...]:
    rows: list[tuple[str, str, str, float, float]] = [
        ("saturation_mean", "1", "HSV saturation", 0.3, 0.15),
        ("saturation_sd", "1", "its standard deviation", 0.15, 0.06),
        ("brightness_mean", "1", "luma (ITU-R 601) / 255", 0.65, 0.15),
        ("brightness_sd", "1", "its standard deviation", 0.14, 0.06),
        ("white_share", "1", f"share of pixels with every channel above {WHITE}", 0.1, 0.15),
    ]
    for key, name, middle in (("h", "haematoxylin", 0.12), ("e", "eosin", 0.15)):
        rows += [
            (f"{key}_mean", "OD", f"amount of {name}", middle, 0.1),
            (f"{key}_sd", "OD", "its standard deviation", 0.1, 0.06),
            (f"{key}_p10", "OD", "its 10 % quantile", 0.04, 0.05),
            (f"{key}_p50", "OD", "its median", middle, 0.1),
            (f"{key}_p90", "OD", "its 90 % quantile", 0.3, 0.15),
            (f"{key}_skew", "1", "its skewness", 1.0, 1.0),
        ]
    rows += [
        ("r_mean", "OD", "amount of the residual channel: brown pigment, DAB, fixation", 0.17, 0.1),
        ("r_sd", "OD", "its standard deviation", 0.1, 0.05),
        ("r_p90", "OD", "its 90 % quantile", 0.3, 0.12),
    ]
    for key, name, distance in (("h", "haematoxylin", 1), ("h", "haematoxylin", 4), ("e", "eosin", 1)):
        of = f"co-occurrence of {name} codes at {distance} px, mean of four directions"
        near = distance == 1
        rows += [
            (
                f"{key}_glcm{distance}_contrast",
                "levels^2",
                f"contrast, {of}",
                3.0 if near else 5.0,
                2.0 if near else 4.0,
            ),
            (f"{key}_glcm{distance}_homogeneity", "1", f"homogeneity, {of}", 0.6 if near else 0.5, 0.15),
            (f"{key}_glcm{distance}_correlation", "1", f"correlation, {of}", 0.7 if near else 0.4, 0.2),
            (f"{key}_glcm{distance}_entropy", "bit", f"entropy, {of}", 4.5 if near else 5.0, 1.0),
            (f"{key}_glcm{distance}_energy", "1", f"root of the angular second moment, {of}", 0.25, 0.12),
        ]
    rows.append(("h_e_correlation", "1", "correlation of the codes of haematoxylin and eosin", 0.0, 0.3))
    centres = (0.06, 0.08, 0.05, 0.1, 0.14, 0.13, 0.08, 0.09, 0.12, 0.22)
    for ones in range(9):
        meaning = f"share of local binary patterns of luma with {ones} brighter neighbours in one arc"
        rows.append((f"lbp_{ones}", "1", meaning, centres[ones], 0.08 if ones == 8 else 0.03))
    rows += [
        ("lbp_other", "1", "share of local binary patterns with several arcs", centres[9], 0.08),
        ("nuclei_share", "1", "share of the tile covered by nuclei", 0.15, 0.1),
        ("nuclei_density", "1/1000 px", f"nuclei of at least {NUCLEUS_MIN_PX} px", 1.5, 1.0),
        ("nuclei_log_area", "ln px", "mean logarithm of their area", 3.6, 0.5),
        ("nuclei_log_area_sd", "ln px", "its standard deviation: variation of size", 0.8, 0.3),
        ("nuclei_log_area_p90", "ln px", "its 90 % quantile", 4.6, 0.8),
        ("nuclei_elongation", "1", "mean of 1 - minor / major axis of their inertia", 0.45, 0.12),
        ("nuclei_contrast", "OD", "haematoxylin inside less outside nuclei", 0.25, 0.15),
        ("nuclei_inner_sd", "OD", "standard deviation of haematoxylin inside nuclei", 0.1, 0.06),
        ("nuclei_gap", "px", "mean distance between a nucleus and the nearest other", 16.0, 6.0),
        ("nuclei_gap_cv", "1", "coefficient of variation of that distance", 0.45, 0.15),
        ("nuclei_largest", "1", "share of the largest piece in the cover of nuclei: crowding", 0.2, 0.2),
        (
            "h_coarse4",
            "ln",
            "log of the spread of the haematoxylin code between 4-px blocks over pixels",
            -0.25,
            0.2,
        ),
        ("h_coarse16", "ln", "the same for 16-px blocks", -0.8, 0.4),
        ("e_coarse16", "ln", "as h_coarse16, of the eosin code", -0.8, 0.4),
        ("detail", "lg", "decadic log of 1 + variance of the Laplacian of luma: focus and fine detail", 3.0, 0.5),
        ("red_blue", "1", "mean red less mean blue, / 255", 0.05, 0.1),
        ("fibre_local", "1", f"coherence of luma gradients within {FIBRE_BLOCK_PX}-px blocks", 0.3, 0.12),
        ("fibre_global", "1", "coherence of luma gradients over the tile", 0.12, 0.12),
    ]
    return tuple(Dimension(*row) for row in rows)


#: Name, unit, meaning, centre and scale of every dimension, in the order of the vector.
DIMENSIONS: tuple[Dimension, ...] = _dimensions()
