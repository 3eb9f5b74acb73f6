rule convert:
    input:
        tokenizer=graph.done("tokenizer"),
        pretrain=graph.done("pretrain"),
    output:
        done=graph.done("convert"),
    log:
        graph.log("convert"),
    benchmark:
        graph.file("convert", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
    message:
        "convert: write the Hub folder"
    shell:
        graph.command("convert")
