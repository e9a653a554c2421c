rule assemble:
    input:
        patients=PATHS.patients,
        slides=PATHS.slides,
        flow=PATHS.cohort_flow,
        index=PATHS.index,
        panels=list(PATHS.panels.values()),
    output:
        patients=PATHS.analysis,
        flow=PATHS.analysis_flow,
    log:
        PATHS.log("assemble"),
    conda:
        "../../envs/models.yaml"
    resources:
        mem_mb=4000,
    params:
        key=key_of("assemble"),
        code=code_hash("assemble"),
    message:
        "assemble: who is analysed"
    shell:
        "morphome assemble > {log:q} 2>&1"


rule split:
    input:
        patients=PATHS.analysis,
        published=split_files(CONFIG),
    output:
        splits=PATHS.splits,
        facts=PATHS.split_facts,
    log:
        PATHS.log("split"),
    conda:
        "../../envs/models.yaml"
    resources:
        mem_mb=2000,
    params:
        key=key_of("split"),
        code=code_hash("split"),
    message:
        "split: folds and horizon"
    shell:
        "morphome split > {log:q} 2>&1"


rule train:
    input:
        patients=PATHS.analysis,
        index=PATHS.index,
        panels=list(PATHS.panels.values()),
        groups=PATHS.groups or [],
        encoded=encoded_rna,
        splits=PATHS.splits,
        facts=PATHS.split_facts,
    output:
        PATHS.run_files("{model}", "{repeat}", "{fold}"),
    log:
        PATHS.log("train", "{model}", "{repeat}", "{fold}"),
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=8000,
    params:
        key=key_of("train"),
        code=lambda wildcards: train_code_hash(CONFIG, wildcards.model),
    message:
        "train {wildcards.model}, repeat {wildcards.repeat}, fold {wildcards.fold}"
    shell:
        "morphome train --model {wildcards.model:q} --repeat {wildcards.repeat}"
        " --fold {wildcards.fold} --threads {threads} > {log:q} 2>&1"
