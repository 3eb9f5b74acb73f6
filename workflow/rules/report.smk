rule report:
    input:
        corpus=graph.done("corpus"),
        tokenizer=graph.done("tokenizer"),
        tokenize=graph.done("tokenize"),
        pretrain=graph.done("pretrain"),
        convert=graph.done("convert"),
        evaluate=graph.done("evaluate"),
        publish=graph.done("publish"),
        precision_study=graph.study(),
    output:
        done=graph.done("report"),
        html=report(
            graph.file("report", "report.html"),
            caption="../report/report.rst",
            category="Report",
        ),
    log:
        graph.log("report"),
    benchmark:
        graph.file("report", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    message:
        "report: figures and tables of the whole run"
    shell:
        graph.page_command("report", "report.html")
