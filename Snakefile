# So that `snakemake --cores 8 --use-conda` works at the root; the workflow itself is in workflow/.
include: "workflow/Snakefile"
