"""The configuration, checked before any rule exists, and the helpers that rules share."""

import functools
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

SOURCE = Path(workflow.current_basedir).parent.parent / "src"
sys.path.insert(0, str(SOURCE))

from morphome.config import check_config, read_yaml
from morphome.download.published import published_names
from morphome.errors import MorphomeError
from morphome.models.catalog import row_needs
from morphome.paths import PANELS, PUBLISHED, Paths
from morphome.steps import (
    code_hash,
    mask_file,
    step_key,
    train_code_hash,
    write_resolved,
)
from morphome.workflow import (
    encodes_rna,
    external_feature_files,
    fetched_weights,
    gdc_kinds,
    molecular_files,
    pinned_files,
    published_inputs,
    rna_files,
    rna_substitution,
    run_folders,
    simulated_files,
    slide_jobs,
    slide_paths,
    slides_from_gdc,
    split_files,
)


@functools.cache
def slides():
    """File of every slide; with the GDC, once it has been asked which slides there are."""
    if slides_from_gdc(CONFIG):
        checkpoints.manifest.get()
    return told(slide_paths, CONFIG)


@functools.cache
def jobs():
    return slide_jobs(CONFIG, list(slides()))


def told(function, *arguments):
    """The function's result; what a user can mend is one message without a traceback."""
    try:
        return function(*arguments)
    except MorphomeError as error:
        raise WorkflowError(str(error))


for file in workflow.configfiles:
    # Snakemake keeps the last of two equal keys in silence; this refuses them.
    told(read_yaml, file)
CONFIG = told(check_config, config)
PATHS = told(Paths, CONFIG)
told(getattr, PATHS, "feature_folder")  # the encoder's weights are known
if not slides_from_gdc(CONFIG):
    slides()

if rna_substitution(CONFIG):
    logger.warning(rna_substitution(CONFIG))

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
    model="[^/]+",
    repeat=r"\d+",
    fold=r"\d+",
    job=r"\d+",
    name="|".join(re.escape(name) for name in published_names()),
    panel="|".join(PANELS),


def slides_of_job(wildcards):
    return jobs()[int(wildcards.job) - 1]


def slide_files(wildcards):
    """What says that the slides of a job are there: the slides, or the list of those that were fetched."""
    if slides_from_gdc(CONFIG):
        return PATHS.fetched(f"slides_{wildcards.job}")
    return [slides()[slide] for slide in slides_of_job(wildcards)]


def masks_of_job(wildcards):
    found = [mask_file(CONFIG, slide) for slide in slides_of_job(wildcards)]
    return [mask for mask in found if mask]


def tiled(wildcards):
    return [PATHS.tile_job(job) for job in range(1, len(jobs()) + 1)]


def encoded(wildcards):
    return [PATHS.encode_job(job) for job in range(1, len(jobs()) + 1)]


def encoded_rna(wildcards):
    """The vectors of RNA, for the rows that read them."""
    needs = row_needs(CONFIG["models"][wildcards.model])
    return PATHS.encoded if encodes_rna(CONFIG) and "rna" in needs else []


def keys_of_job(step):
    """As :func:`key_of` for each slide of a job."""

    def keys(wildcards):
        return [
            step_key(CONFIG, step, slide=slide) for slide in slides_of_job(wildcards)
        ]

    return keys


def key_of(step):
    """A function of the wildcards that gives the hash of the settings of one job."""

    def key(wildcards):
        known = {k: v for k, v in wildcards.items() if k == "model"}
        return step_key(CONFIG, step, **known)

    return key
