"""The configuration, checked before any rule exists, and the helpers that rules share."""

import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

SOURCE = Path(workflow.current_basedir).parent.parent / "src"
sys.path.insert(0, str(SOURCE))

from morphome.config import check_config, read_yaml
from morphome.errors import MorphomeError
from morphome.paths import Paths
from morphome.steps import code_hash, mask_file, step_key, write_resolved
from morphome.workflow import (
    encode_jobs,
    external_feature_files,
    molecular_files,
    run_folders,
    simulated_files,
    slide_paths,
    split_files,
)

try:
    for file in workflow.configfiles:
        read_yaml(
            file
        )  # Snakemake keeps the last of two equal keys in silence; this refuses them
    CONFIG = check_config(config)
    SLIDES = slide_paths(CONFIG)
    JOBS = encode_jobs(CONFIG, list(SLIDES))
    PATHS = Paths(CONFIG)
    ENCODED = [PATHS.encode_job(job) for job in range(1, len(JOBS) + 1)]
except MorphomeError as error:
    raise WorkflowError(str(error))

RESOLVED = write_resolved(CONFIG)
# Inside a conda environment the interpreter is that environment's; otherwise it is the one that runs Snakemake,
# whether or not its folder is on the PATH.
PYTHON = (
    "python"
    if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    else sys.executable
)
# What every rule's command finds: the checked configuration, and `morphome` of this checkout in whatever environment
# the rule has (environments hold dependencies only). Where the code lies is no reason to repeat a job, so this is
# no parameter of a rule: the content of the code is (code_hash), and the settings are (key).
shell.prefix(
    f"export MORPHOME_CONFIG={shlex.quote(str(RESOLVED))}; "
    f"morphome() {{{{ PYTHONPATH={shlex.quote(str(SOURCE))} {shlex.quote(PYTHON)} -m morphome"
    ' "$@"; }}; '
)


wildcard_constraints:
    slide="[^/]+",
    model="[^/]+",
    repeat=r"\d+",
    fold=r"\d+",
    job=r"\d+",


def slide_file(wildcards):
    return SLIDES[wildcards.slide]


def slides_of_job(wildcards):
    return JOBS[int(wildcards.job) - 1]


def key_of(step):
    """A function of the wildcards that gives the hash of the settings of one job."""

    def key(wildcards):
        known = {k: v for k, v in wildcards.items() if k in ("slide", "model")}
        return step_key(CONFIG, step, **known)

    return key
