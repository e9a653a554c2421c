"""Script: run both steps into folders with too little room, then with enough, and print what happened as JSON.

    python full_disk.py tmpfs|rlimit WORK_FOLDER SLIDE

``tmpfs`` mounts small file systems (call it in a mount namespace of its own: ``unshare -r -m``), which gives ENOSPC;
``rlimit`` limits the size of a file, which gives EFBIG as a full quota or an old file system does.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from morphome.slides.tile import run_tile

SYNTHETIC = Path(__file__).parents[1] / "slides" / "synthetic.py"
#: Room in kB. The outputs of the small slide need some 10 to 60 kB: each size stops another file at another place.
SIZES_KB = (0, 8, 12, 16, 20, 28, 64)


def main(kind: str, folder: Path, slide: Path) -> None:
    """Print per step ``[{kb, error, text, left, after, files}]``.

    ``error`` and ``text``: class and text of the first run's error; ``left``: files it left behind; ``after``: error
    of the second run; ``files``: sizes of all files then.
    """
    spec = importlib.util.spec_from_file_location("synthetic", SYNTHETIC)
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    steps = {"tile": tile(synthetic, slide), "encode": encode(synthetic, folder, slide)}
    print(json.dumps({
        step: [one_size(kind, folder / f"{step}{kb}", kb, run) for kb in SIZES_KB] for step, run in steps.items()
    }))  # fmt: skip


def one_size(kind: str, out: Path, kb: int, run: Callable[[Path], None]) -> dict[str, Any]:
    """A run with ``kb`` of room and one with enough."""
    out.mkdir()
    room(kind, out, kb)
    error = attempt(run, out)
    left = sorted(f.name for f in out.iterdir())
    room(kind, out, None)
    after = attempt(run, out)
    files = {f.name: f.stat().st_size for f in out.iterdir()}
    return {"kb": kb, "error": error and error[0], "text": error and error[1], "left": left, "after": after,
            "files": files}  # fmt: skip


def room(kind: str, out: Path, kb: int | None) -> None:
    """Leave ``kb`` of room in the folder; None is enough."""
    if kind == "rlimit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if kb is None else kb * 1024, -1))
    elif kb is None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
    else:
        # Size 0 would be without a limit.
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(kb, 1)}k", "tmpfs", str(out)], check=True)
        if kb == 0:
            (out / "other.bin").write_bytes(bytes(4096))


def attempt(run: Callable[[Path], None], out: Path) -> tuple[str, str] | None:
    """Name and text of the error that a run raises."""
    try:
        run(out)
    except Exception as error:  # noqa: BLE001 - whatever comes is what the test looks at
        return type(error).__name__, str(error)
    return None


def tile(synthetic: Any, slide: Path) -> Callable[[Path], None]:
    """The tile step into a folder."""
    settings = {"tiling": synthetic.tiling(min_fragment_mm2=0.0005), "slides": {"reader": "auto"}}

    def run(out: Path) -> None:
        h5 = out / "S.h5"
        outputs = {"qc_out": ".json", "geojson_out": ".geojson", "thumbnail_out": ".jpg"}
        others = {name: h5.with_suffix(end) for name, end in outputs.items()}
        run_tile(slide_path=slide, slide_id="S", settings=settings, h5_out=h5, **others)

    return run


def encode(synthetic: Any, folder: Path, slide: Path) -> Callable[[Path], None]:
    """The encode step into a folder, after one tile step with enough room."""
    from morphome.features.encode import EncodeJob, run_encode

    tiles = folder / "tiles"
    tiles.mkdir()
    tile(synthetic, slide)(tiles)
    stamped = {name: synthetic.FEATURES[name] for name in ("encoder", "precision", "max_failed_tiles")}
    tiling = synthetic.tiling(min_fragment_mm2=0.0005)
    settings = {"tiling": tiling, "features": stamped, "slides": {"reader": "auto"}}

    def run(out: Path) -> None:
        h5 = out / "S.h5"
        job = EncodeJob(slide_path=slide, slide_id="S", tiles_h5=tiles / "S.h5", h5_out=h5,
                        timing_out=h5.with_suffix(".json"), settings=settings)  # fmt: skip
        run_encode(jobs=[job], features=synthetic.FEATURES, code="0123456789ab", threads=1)

    return run


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
