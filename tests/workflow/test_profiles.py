"""The slurm and kubernetes profiles: the sbatch line that the real plugin makes, the resources that pods ask for."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.stages.graph import Graph
from project import ROOT, Project, copy_of

pytestmark = pytest.mark.workflow

SBATCH = """#!/bin/sh
printf '%s\\n' "$@" >> "$SBATCH_ARGUMENTS"
echo 'sbatch: error: this is a test' >&2
exit 1
"""


def sbatch_words(project: Project, folder: Path, target: str) -> list[str]:
    """Arguments with which snakemake's slurm plugin calls sbatch for `target`; the call itself fails."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "sinfo": "#!/bin/sh\n",
        "sacct": "#!/bin/sh\n",
        "squeue": "#!/bin/sh\n",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    recorded = folder / "arguments"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SBATCH_ARGUMENTS": str(recorded)}
    command = project.command(
        target, "--workflow-profile", str(ROOT / "profiles" / "slurm"), "--latency-wait", "0",
        "--slurm-init-seconds-before-status-checks", "1",
    )  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert recorded.exists(), result.stderr + result.stdout
    return recorded.read_text().splitlines()


def test_slurm_asks_for_one_gpu_one_node_and_no_contradiction(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path / "project", ("corpus", "tokenizer", "tokenize"))
    words = sbatch_words(project, tmp_path, "pretrain")
    assert "--gres=gpu:1" in words
    assert "--nodes=1" in words
    assert "--cpus-per-task=12" in words
    assert not any(word.startswith(("--gpus", "--ntasks-per-gpu")) for word in words)
    assert words[words.index("--mem") + 1] == "96000"
    assert words[words.index("-t") + 1] == "1440"
    assert "--requeue" in words


def test_slurm_requeues_on_75_and_only_then(tmp_path: Path) -> None:
    graph = Graph({"experiment": "tiny", "launch": "slurm", "set": f"paths.results={tmp_path}"}, False)
    done = graph.places["pretrain"].done
    done.parent.mkdir(parents=True)
    done.touch()
    line = graph.command("pretrain").replace("{output.done:q}", str(done))
    for code, requeues in ((0, 0), (1, 0), (2, 0), (75, 1)):
        script = tmp_path / "stage.sh"
        script.write_text(f"#!/bin/sh\nexit {code}\n")
        script.chmod(stat.S_IRWXU)
        start, _, rest = line.partition("code=0; ")
        shell = f"{start}code=0; {script} || code=$?;{rest.partition('|| code=$?;')[2]}"
        log = tmp_path / "requeued"
        log.write_text("")
        fakes = f'scontrol() {{ echo "$@" >> {log}; }}; sleep() {{ exit 0; }}; SLURM_JOB_ID=17; set -euo pipefail; '
        result = subprocess.run(["bash", "-c", fakes + shell], capture_output=True, text=True, timeout=30)
        assert log.read_text().splitlines() == ["requeue 17"] * requeues
        assert result.returncode == (0 if code == 75 else code)


# The real plugin makes the job; only the cluster's API is replaced: the first job is written down, then all ends.
KUBERNETES = """
import json, os, sys
import kubernetes
def record(self, namespace, body, **_):
    with open(sys.argv.pop(), "w") as file:
        json.dump(kubernetes.client.ApiClient().sanitize_for_serialization(body), file)
    os._exit(0)
kubernetes.config.load_kube_config = lambda *_, **__: None
kubernetes.client.CoreV1Api.create_namespaced_secret = lambda *_, **__: None
kubernetes.client.BatchV1Api.create_namespaced_job = record
from snakemake.cli import main
main(sys.argv[1:-1])
"""


def test_kubernetes_asks_for_a_gpu_with_limits_and_mounts_the_volume(tmp_path: Path) -> None:
    settings = "paths.results=results"
    graph = Graph({"experiment": "tiny", "set": f"paths.results={tmp_path}"}, False)
    storage = tmp_path / "storage"
    done = storage / "results" / "tokenize" / graph.places["tokenize"].fingerprint / "done"
    done.parent.mkdir(parents=True)
    done.write_text("sha256:0\n")
    profile = ["--workflow-profile", str(ROOT / "profiles" / "kubernetes"), "--default-storage-prefix", str(storage)]
    words = Project(tmp_path).command("pretrain", *profile, settings=settings)[3:]
    recorded = tmp_path / "job.json"
    # The storage plugin copies with rsync, which this machine may lack.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "rsync").write_text('#!/bin/sh\nfor word; do from="$to"; to="$word"; done\ncp -R "$from" "$to"\n')
    (tools / "rsync").chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", KUBERNETES, *words, str(recorded)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert recorded.exists(), result.stderr + result.stdout
    pod = json.loads(recorded.read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "headrace", "mountPath": "/work"} in container["volumeMounts"]
    assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod["tolerations"])
