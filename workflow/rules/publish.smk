rule publish:
    input:
        corpus=graph.done("corpus"),
        tokenizer=graph.done("tokenizer"),
        tokenize=graph.done("tokenize"),
        pretrain=graph.done("pretrain"),
        convert=graph.done("convert"),
        evaluate=graph.done("evaluate"),
    output:
        done=graph.done("publish"),
    log:
        graph.log("publish"),
    benchmark:
        graph.file("publish", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    message:
        "publish: card, gate, folder, Hub"
    shell:
        graph.command("publish")
