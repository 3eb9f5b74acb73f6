rule compare:
    log:
        graph.compare_log(),
    localrule: True
    conda:
        "../envs/main.yaml"
    message:
        "compare: finished evaluations side by side, paired item by item"
    shell:
        graph.compare_command(config.get("runs", []))


rule ablations:
    log:
        graph.ablations_log(),
    localrule: True
    conda:
        "../envs/main.yaml"
    threads: workflow.cores
    message:
        "ablations: the paper's comparisons at demo size, trained, evaluated and compared"
    shell:
        graph.ablations_command()
