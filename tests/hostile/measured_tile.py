"""Script: tile the slide files given, one after the other, in this fresh process, and print what came of it as JSON.

    python measured_tile.py OUTPUT_FOLDER ADDRESS_SPACE_MB SLIDE...

With an address space above 0 an allocation beyond it fails instead of taking the machine's memory.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path

from morphome.files import read_json
from morphome.slides.tile import run_tile

SYNTHETIC = Path(__file__).parents[1] / "slides" / "synthetic.py"


def main(folder: Path, limit_mb: int, slides: list[Path]) -> None:
    """Tile and report: seconds, status, reason and tiles per slide, and the peak of resident memory of all."""
    spec = importlib.util.spec_from_file_location("synthetic", SYNTHETIC)
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    if limit_mb:
        used_mb = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() // 2**20
        resource.setrlimit(resource.RLIMIT_AS, ((used_mb + limit_mb) << 20, -1))
    before_mb = peak_mb()
    found = []
    for number, path in enumerate(slides):
        started = time.perf_counter()
        out = folder / f"{number}.h5"
        run_tile(
            slide_path=path,
            slide_id=path.stem,
            settings={"tiling": synthetic.tiling(min_fragment_mm2=0.0005), "slides": {"reader": "auto"}},
            h5_out=out,
            qc_out=out.with_suffix(".json"),
            geojson_out=out.with_suffix(".geojson"),
            thumbnail_out=out.with_suffix(".jpg"),
        )
        record = read_json(out.with_suffix(".json"), "morphome.slide_qc")
        facts = {name: record[name] for name in ("status", "reason_code", "reason", "n_tiles")}
        found.append({"slide": path.name, "seconds": time.perf_counter() - started, **facts})
    print(json.dumps({"slides": found, "peak_mb": peak_mb(), "own_mb": peak_mb() - before_mb}))


def peak_mb() -> float:
    """Most resident memory of this process; ``ru_maxrss`` would count that of the process that started it too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
