rule evaluate:
    input:
        corpus=graph.done("corpus"),
        tokenizer=graph.done("tokenizer"),
        tokenize=graph.done("tokenize"),
        pretrain=graph.done("pretrain"),
        convert=graph.done("convert"),
    output:
        done=graph.done("evaluate"),
    log:
        graph.log("evaluate"),
    benchmark:
        graph.file("evaluate", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: workflow.cores
    resources:
        mem_mb=8000,
        runtime=240,
    message:
        "evaluate: score the converted model"
    shell:
        graph.command("evaluate")
