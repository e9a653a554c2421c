if "simulate" in CONFIG:

    rule simulate:
        output:
            simulated_files(CONFIG),
        log:
            PATHS.log("simulate"),
        conda:
            "../../envs/slides.yaml"
        threads: 4
        resources:
            mem_mb=2000,
        params:
            key=key_of("simulate"),
            code=code_hash("simulate"),
        message:
            "simulate: the planted cohort"
        shell:
            "morphome simulate --threads {threads} > {log:q} 2>&1"


rule cohort:
    input:
        clinical=CONFIG["cohort"]["clinical"]["path"],
        covariates=CONFIG["cohort"].get("covariates", {}).get("path", []),
        sheet=CONFIG["slides"].get("sheet", []),
        external=external_feature_files(CONFIG),
    output:
        patients=PATHS.patients,
        slides=PATHS.slides,
        flow=PATHS.cohort_flow,
    log:
        PATHS.log("cohort"),
    priority: 100  # a table that cannot be read is found before hours of slides
    conda:
        "../../envs/models.yaml"
    resources:
        mem_mb=2000,
    params:
        key=key_of("cohort"),
        code=code_hash("cohort"),
    message:
        "cohort: patients, slides and end point"
    shell:
        "morphome cohort > {log:q} 2>&1"


rule genes:
    input:
        molecular_files(CONFIG),
    output:
        [*PATHS.panels.values(), *([PATHS.groups] if PATHS.groups else [])],
    log:
        PATHS.log("genes"),
    priority: 100  # a table that cannot be read is found before hours of slides
    conda:
        "../../envs/models.yaml"
    resources:
        mem_mb=8000,
    params:
        key=key_of("genes"),
        code=code_hash("genes"),
    message:
        "genes: molecular tables and gene groups"
    shell:
        "morphome genes > {log:q} 2>&1"


if encodes_rna(CONFIG):

    rule rna:
        input:
            panels=list(PATHS.panels.values()),
            groups=PATHS.groups or [],
            files=rna_files(CONFIG),
        output:
            vectors=PATHS.encoded,
            facts=PATHS.encoded_facts,
        log:
            PATHS.log("rna"),
        priority: 90  # weights that cannot be used are found before hours of slides
        conda:
            "../../envs/models.yaml"
        threads: 4
        resources:
            mem_mb=8000,
        params:
            key=key_of("rna"),
            code=code_hash("rna"),
        message:
            "rna: vectors of RNA by a frozen encoder"
        shell:
            "OMP_NUM_THREADS={threads} morphome rna > {log:q} 2>&1"
