# So that `snakemake --cores 8 --use-conda` works at the root; the workflow itself is in workflow/.
include: "workflow/Snakefile"


# An included file cannot name the default target (Snakemake 9 forgets it), so it is named here again.
rule default:
    default_target: True
    input:
        rules.all.input,
    message:
        "default: the report"
