"""What every command shares: the checked configuration with its paths, and errors in one message."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from morphome.config import load_config
from morphome.errors import MorphomeError
from morphome.paths import Paths
from morphome.steps import require_made_by, step_settings
from morphome.workflow import encodes_rna

Config = Annotated[Path, typer.Option("--config", envvar="MORPHOME_CONFIG", help="Configuration of the run.")]
DEFAULT = Path("config.yaml")


class Run:
    """A checked configuration with its paths and the settings of each step."""

    def __init__(self, config: Path) -> None:
        self.config = load_config(config)
        self.paths = Paths(self.config)

    def settings(self, step: str, **wildcards: str) -> dict[str, Any]:
        return step_settings(self.config, step, **wildcards)

    def made(self, path: Path, format_name: str, step: str, **wildcards: str) -> Path:
        """``path``, after checking that it was made by ``step`` with the settings of this configuration."""
        return require_made_by(path, format_name, self.settings(step, **wildcards))

    @property
    def external(self) -> bool:
        return self.config["features"]["source"] == "external"

    @property
    def index(self) -> Path:
        return self.made(self.paths.index, "morphome.feature_index", "import" if self.external else "collect")

    @property
    def panels(self) -> dict[str, Path]:
        return {k: self.made(v, "morphome.panel", "genes") for k, v in self.paths.panels.items()}

    @property
    def patients(self) -> Path:
        return self.made(self.paths.patients, "morphome.patients", "cohort")

    @property
    def slides(self) -> Path:
        return self.made(self.paths.slides, "morphome.slides", "cohort")

    @property
    def flow(self) -> Path:
        return self.made(self.paths.cohort_flow, "morphome.flow", "cohort")

    @property
    def groups(self) -> Path | None:
        return self.paths.groups and self.made(self.paths.groups, "morphome.groups", "genes")

    @property
    def encoded(self) -> dict[str, Path]:
        """The panel of vectors that a frozen encoder of RNA made; empty without one."""
        if not encodes_rna(self.config):
            return {}
        return {"encoded": self.made(self.paths.encoded, "morphome.encoded", "rna")}

    @property
    def splits(self) -> Path:
        return self.made(self.paths.splits, "morphome.splits", "split")

    @property
    def split_facts(self) -> Path:
        return self.made(self.paths.split_facts, "morphome.split_facts", "split")

    @property
    def analysis(self) -> Path:
        return self.made(self.paths.analysis, "morphome.analysis", "assemble")


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can mend into one message and exit code 1; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except MorphomeError as error:
            print(f"morphome: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapped
