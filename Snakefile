# Headrace: raw text to a published DeepSeek-V3-style model.
#
#   snakemake                                     the whole pipeline, experiment=demo
#   snakemake evaluate                            one stage and what it needs
#   snakemake --config experiment=tiny            another run (targets come before --config)
#   snakemake --config set="recipe.learning_rate.peak=2e-3"
#   snakemake precision_study                     FP8 against BF16 with paired seeds; not part of the whole
#   snakemake compare --config runs=[a,b,c]       finished evaluations side by side, paired
#   snakemake ablations                           the paper's comparisons at demo size, in one go
#   snakemake -n                                  what would run, and why
from snakemake.utils import min_version

min_version("9.27")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"


rule all:
    default_target: True
    input:
        report=graph.done("report"),


include: "workflow/rules/corpus.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/publish.smk"
include: "workflow/rules/precision_study.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/compare.smk"
include: "workflow/rules/sync.smk"
