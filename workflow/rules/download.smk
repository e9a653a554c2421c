# Everything that needs a network and nothing else: `snakemake --configfile FILE --cores 4 downloads`.
rule downloads:
    input:
        published_inputs(CONFIG),
        [PATHS.fetched(kind) for kind in gdc_kinds(CONFIG) if kind != "slides"],
        lambda wildcards: (
            [PATHS.fetched(f"slides_{job}") for job in range(1, len(jobs()) + 1)]
            if slides_from_gdc(CONFIG)
            else []
        ),
        PATHS.weights if fetched_weights(CONFIG) else [],
    localrule: True
    message:
        "downloads: all is here"


# Files that others published, each with its checksum: TCGA-CDR, gene sets.
rule published:
    output:
        PUBLISHED / "{name}",
    log:
        PATHS.log("published", "{name}"),
    priority: 100
    localrule: True  # nodes of a cluster often have no network
    conda:
        "../../envs/models.yaml"
    resources:
        network=1,
    message:
        "published: {wildcards.name}"
    shell:
        "morphome published {wildcards.name:q} > {log:q} 2>&1"


if "gdc" in CONFIG:

    # Until this has run, nobody knows which slides there are. The list is then pinned: new code does not ask again.
    checkpoint manifest:
        input:
            pinned_files(CONFIG),
        output:
            PATHS.gdc_tables,
        log:
            PATHS.log("manifest"),
        priority: 100
        localrule: True
        conda:
            "../../envs/models.yaml"
        resources:
            network=1,
        params:
            key=key_of("manifest"),
        message:
            "manifest: which slides and tables the GDC has"
        shell:
            "morphome manifest > {log:q} 2>&1"

    # `--set-resources fetch_slides:mb_per_second=20` limits one download (0 is no limit), `--resources gpu=1 network=4
    # mb_per_second=80` all of them together.
    rule fetch_tables:
        input:
            PATHS.gdc_manifest,
        output:
            PATHS.fetched("{panel}"),
        log:
            PATHS.log("fetch", "{panel}"),
        priority: 100
        conda:
            "../../envs/models.yaml"
        resources:
            network=1,
            mb_per_second=0,
        message:
            "fetch_tables: files of {wildcards.panel}"
        shell:
            "morphome fetch --panel {wildcards.panel} --mb-per-second {resources.mb_per_second} > {log:q} 2>&1"

    # The list of a job's slides, not the slides themselves: these may lie in another folder, and be shared by runs.
    # Where slides are deleted once they are encoded, the list is temporary, so that Snakemake fetches them again when a
    # changed setting needs their pixels. Other slides in the manifest are no reason to fetch these again.
    rule fetch_slides:
        input:
            ancient(PATHS.gdc_manifest),
            ancient(PATHS.gdc_sheet),
        output:
            (
                temp(PATHS.fetched("slides_{job}"))
                if CONFIG["gdc"]["delete_slides"]
                else PATHS.fetched("slides_{job}")
            ),
        log:
            PATHS.log("fetch", "slides_{job}"),
        conda:
            "../../envs/models.yaml"
        resources:
            network=1,
            mb_per_second=0,
        params:
            slides=slides_of_job,
        message:
            "fetch_slides {wildcards.job}"
        shell:
            "morphome fetch --job {wildcards.job} --mb-per-second {resources.mb_per_second} > {log:q} 2>&1"
