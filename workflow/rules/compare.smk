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
