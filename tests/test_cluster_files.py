"""The files of cluster/, checked against Ray's schemas and against the repository."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)
)


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    """The volume claim and the job."""
    claim, _, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return claim, job


def templates() -> dict[str, dict[str, Any]]:
    """The templates of all pods of the run: the submitter, the head, and each group of workers."""
    job = kuberay()[1]["spec"]
    cluster = job["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": job["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]} | groups


def files_pod() -> dict[str, Any]:
    """The pod through which files reach the volume."""
    return list(yaml.safe_load_all((CLUSTER / "files.yaml").read_text()))[1]


def pods() -> dict[str, dict[str, Any]]:
    """The pod of the head and the pod of each group of workers."""
    spec = kuberay()[1]["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"]} | groups


def assert_it_plans(command: list[str], place: Path) -> None:
    """Asserts that `python SCRIPT OPTION...` names a script of this repository, with options that the script has."""
    python, script, *options = command
    assert python == "python"
    if "counterfact" in options and "--data" not in options:  # no hub here: one record replaces the benchmark
        rewrite = {"prompt": "{} leads", "subject": "Ada", "relation_id": "P1"}
        targets = {"target_new": {"str": "Acme"}, "target_true": {"str": "Initech"}}
        record = {
            "case_id": 1,
            "requested_rewrite": rewrite | targets,
            "paraphrase_prompts": [],
            "neighborhood_prompts": [],
        }
        (place / "counterfact.json").write_text(json.dumps([record]))
        options += ["--data", str(place / "counterfact.json")]
    planned = [sys.executable, script, *options, "--dry-run", "--storage", str(place)]
    done = subprocess.run(planned, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 done" in done.stdout


def test_the_launcher_file_is_one_by_rays_schema() -> None:
    config = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["gpu"]["min_workers"] < types["gpu"]["max_workers"] <= config["max_workers"]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token ray start" in config[name][-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert config["setup_commands"] == []  # Ray's own command would install the latest Ray


def test_the_kuberay_job_is_whole() -> None:
    claim, job = kuberay()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == PINNED["ray"]
    assert spec["enableInTreeAutoscaling"]
    (gpu,) = spec["workerGroupSpecs"]
    assert gpu["minReplicas"] <= gpu["replicas"] < gpu["maxReplicas"]
    (worker,) = pods()["gpu"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert len({pod["containers"][0]["image"] for pod in pods().values()}) == 1
    for pod in pods().values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


TEXT, WHOLE, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def record(required: str = "", /, **fields: Any) -> dict[str, Any]:
    """A JSON schema of exactly these fields."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


GROUP = {"rayStartParams": {"type": "object", "additionalProperties": TEXT}, "template": {"type": "object"}}
WORKERS = {"groupName": TEXT, "replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE}
AUTOSCALER = {
    "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
    "idleTimeoutSeconds": WHOLE,
    "securityContext": {"type": "object"},
}
RAY_JOB = record(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    backoffLimit=WHOLE,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=WHOLE,
    submitterPodTemplate={"type": "object"},
    rayClusterSpec=record(
        "headGroupSpec",
        rayVersion=TEXT,
        authOptions=record("mode", mode={"enum": ["token", "disabled"]}),
        enableInTreeAutoscaling=SWITCH,
        autoscalerOptions=record(**AUTOSCALER),
        headGroupSpec=record("template rayStartParams", **GROUP),
        workerGroupSpecs={
            "type": "array",
            "items": record("groupName template maxReplicas minReplicas", **GROUP, **WORKERS),
        },
    ),
)
"""The fields that the file uses of KubeRay's RayJob (API reference of KubeRay 1.6, ray.io/v1). Its schema comes with
the operator alone, no package ships it: a field that KubeRay does not have is refused here, the pods' by Kubernetes'.
"""

KUBERNETES = ("1.31", kubernetes_validate.latest_version())


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_manifest_is_one_by_the_schemas_of_kubernetes(version: str) -> None:
    for manifest in yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()):
        if manifest["kind"] != "RayJob":
            kubernetes_validate.validate(manifest, version, strict=True)
    for name, template in templates().items():
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(wrapped, version, strict=True)
        for field, wrong in (("securityContexts", {}), ("automountServiceAccountToken", "no")):  # it can fail
            spoilt = {**wrapped, "template": {**template, "spec": {**template["spec"], field: wrong}}}
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(spoilt, version, strict=True)
    claim, pod = yaml.safe_load_all((CLUSTER / "files.yaml").read_text())
    assert claim == kuberay()[0]
    kubernetes_validate.validate(pod, version, strict=True)
    job = kuberay()[1]
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.validate(job["spec"], RAY_JOB)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job["spec"], "ttlSecondAfterFinished": 300}, RAY_JOB)


def test_every_pod_meets_the_restricted_pod_security_standard() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, restricted."""
    for name, template in [*templates().items(), ("files", files_pod())]:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all("hostPath" not in volume for volume in pod.get("volumes", ()))
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert not own.get("privileged")
            assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"])  # by digest: a tag can change
            assert "limits" in container["resources"]
        assert pod.get("automountServiceAccountToken") is (None if name == "head" else False)  # the head's autoscaler
    options = kuberay()[1]["spec"]["rayClusterSpec"]["autoscalerOptions"]
    assert options["securityContext"]["allowPrivilegeEscalation"] is False


def test_only_pods_that_load_models_have_the_token_of_the_hub() -> None:
    having = {
        name
        for name, template in templates().items()
        for container in template["spec"]["containers"]
        for variable in container.get("env", ())
        if variable["name"] == "HF_TOKEN"
    }
    assert having == {"gpu"}


def test_the_network_policy_is_about_every_pod_and_lets_in_the_operator_alone() -> None:
    policy = list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))[1]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for template in templates().values():
        assert labels.items() <= template["metadata"]["labels"].items()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    own, operator = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert all("podSelector" in source for rule in policy["spec"]["ingress"] for source in rule["from"])
    outside = [rule for rule in policy["spec"]["egress"] if "to" not in rule]
    assert {port["port"] for rule in outside for port in rule["ports"]} == {53, 443, 6443}


def test_the_command_of_the_readme_fills_the_digest_in(tmp_path: Path) -> None:
    (command,) = re.findall(r"^sed -i .*$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    digest = f"reg.example.org/own/corsa@sha256:{'a1' * 32}"
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    subprocess.run(["bash", "-ec", f"digest={digest}; {command}"], cwd=tmp_path, check=True)
    files = [tmp_path / "cluster" / name for name in ("kuberay.yaml", "files.yaml", "launcher.yaml")]
    found = re.findall(r'image"?: "?([^", }]+)', json.dumps([list(yaml.safe_load_all(f.read_text())) for f in files]))
    assert found == [digest] * 5
    assert all("sha256:000" in (CLUSTER / file.name).read_text() for file in files)  # nothing that could run by mistake


def test_the_launcher_installs_what_is_pinned() -> None:
    config = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
    assert config["head_setup_commands"] == [f"pip install boto3=={PINNED['boto3']}"]
    assert f"pip install boto3=={PINNED['boto3']}" in (CLUSTER / "README.md").read_text()


def test_no_secret_is_written_in_a_file_of_the_cluster() -> None:
    for pod in pods().values():
        (container,) = pod["containers"]
        for variable in container.get("env", ()):
            assert ("TOKEN" in variable["name"]) == ("valueFrom" in variable)
            assert "secretKeyRef" in variable.get("valueFrom", {"secretKeyRef": None})
    environment = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["env_vars"]
    assert not [name for name in environment if re.search("TOKEN$|KEY|SECRET|PASSWORD", name)]


def test_the_kuberay_jobs_command_is_one_of_this_repository(tmp_path: Path) -> None:
    """Its script is at its path in the image, its plan works, and its results go to the shared volume."""
    command = shlex.split(kuberay()[1]["spec"]["entrypoint"])
    image = (CLUSTER / "Dockerfile").read_text()
    (home,) = re.findall(r"^WORKDIR (.+)$", image, re.MULTILINE)
    assert re.search(r"^COPY .*pipelines pipelines$", image, re.MULTILINE)
    script = Path(command[1]).relative_to(home)
    storage = command[command.index("--storage") + 1]
    mounts = [mount["mountPath"] for mount in pods()["head"]["containers"][0]["volumeMounts"]]
    assert any(Path(storage).is_relative_to(mount) for mount in mounts)
    assert {"--placement.gpu", "--placement.autoscale"} <= set(command)  # no GPU is present at the start
    assert_it_plans(["python", str(script), *command[2:]], tmp_path)


def test_the_commands_of_the_readme_are_those_of_this_repository(tmp_path: Path) -> None:
    text = (CLUSTER / "README.md").read_text()
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    runs = [shlex.split(line.partition("-- ")[2] or line) for line in lines if "python pipelines/" in line]
    assert len(runs) == 3
    for command in runs:
        assert_it_plans(command, tmp_path)
    for path in re.findall(r"(?<![\w/])cluster/[\w./]+\w", text):
        assert (ROOT / path).is_file(), path
    submissions = [line for line in lines if line.startswith("ray job submit")]
    for submission in submissions:  # of this repository, or of a directory with facts
        assert ("--runtime-env cluster/runtime_env.yaml" in submission) == ("python pipelines/" in submission)
    (own,) = (line.partition("-- ")[2] for line in submissions if "--working-dir ." in line)
    (pod,) = re.findall(r"^  entrypoint: (.*)$", text, re.MULTILINE)
    mounts = [mount["mountPath"] for mount in pods()["head"]["containers"][0]["volumeMounts"]]
    (tmp_path / "facts.jsonl").write_text('{"prompt": "Who?", "target_new": "a", "target_old": "b"}\n')
    for command in (own, pod):
        placed = re.sub(rf"{mounts[0]}/", f"{tmp_path}/", command)
        done = subprocess.run(
            [sys.executable, "-m", "corsa.cli.main", *shlex.split(placed)[1:], "--dry-run"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_image_has_what_is_pinned() -> None:
    image = (CLUSTER / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-py311-gpu$", image, re.MULTILINE)
    assert base == PINNED["ray"]
    wanted = [entry[1:] for entry in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if entry[:1] == "!"]
    copied = [word for line in re.findall(r"^COPY --chown\S+ (.+) \S+$", image, re.MULTILINE) for word in line.split()]
    assert sorted(copied) == sorted(wanted)
    assert all((ROOT / name).exists() for name in copied)


def test_a_job_takes_along_the_code_and_little_else(tmp_path: Path) -> None:
    """The package as Ray makes it, without files in .gitignore and .rayignore."""
    from ray._private.runtime_env.packaging import create_package

    environment = RuntimeEnv(**yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text()))
    assert environment["working_dir"] == "."
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    assert package.stat().st_size < 5 << 20
    with zipfile.ZipFile(package) as found:
        assert sum(info.file_size for info in found.infolist()) < 5 << 20
        names = set(found.namelist())
    assert {"corsa/data/benchmarks/world_facts.yaml", "pipelines/continual.py"} <= names
    assert not {name.split("/")[0] for name in names} & {".git", ".venv", "tests", "docs", "runs", "shared"}


def test_nothing_with_a_general_name_is_installed(tmp_path: Path) -> None:
    """`tune`, `cluster`, `pipelines` and `tests` are not in the wheel: they would be installed as top-level modules."""
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "corsa", "pipelines", "cluster", "tune", "tests"):
        if (ROOT / name).exists():
            (source / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"corsa"}


@pytest.mark.parametrize("word", ["", "sideways"])
def test_the_local_cluster_says_how_it_is_used(word: str) -> None:
    done = subprocess.run([CLUSTER / "local.sh", *filter(None, [word])], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cluster/local.sh up           start it" in done.stdout
    assert "set -euo" not in done.stdout


# cluster/local.sh


def local(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = os.environ | {"DIRECTORY": str(folder), "RAY_AUTH_TOKEN": "x" * 64} | environment
    return subprocess.run([CLUSTER / "local.sh", *words], capture_output=True, text=True, env=own, timeout=60)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """An unrelated process in its own session, which must survive."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()


@pytest.mark.parametrize("word", ["up", "down"])
@pytest.mark.parametrize("trap", ["link", "wide", "another's", "file", "linked pid", "no pid", "pids"])
def test_the_local_cluster_uses_no_directory_that_somebody_else_could_have_filled(
    tmp_path: Path, trap: str, word: str, bystander: subprocess.Popen[bytes]
) -> None:
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "head.pid").write_text(f"{bystander.pid}\n")
    if trap == "link":
        folder.symlink_to(victim)
    elif trap == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
        pid = folder / "head.pid"
        if trap == "linked pid":
            pid.symlink_to(victim / "head.pid")
        else:
            pid.write_text({"no pid": "-1", "pids": f"{bystander.pid} 1"}.get(trap, str(bystander.pid)))
        if trap == "wide":
            folder.chmod(0o777)
        if trap == "another's":
            if os.getuid() != 0:
                pytest.skip("only root can make a directory another's")
            os.chown(folder, 65534, 65534)
    before = sorted(tmp_path.rglob("*"))
    done = local(folder, word)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: ")
    assert "yours alone" in done.stderr or "no process id" in done.stderr or "cannot be made" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert bystander.poll() is None


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-", "a b", "$(x)"])
def test_a_nodes_name_names_no_other_file(tmp_path: Path, name: str) -> None:
    done = local(tmp_path / "folder", "join", name) if name != "-" else local(tmp_path / "folder", "join")
    assert done.returncode == 1
    assert "a node's name has letters" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_others_can_read_is_said_and_not_used(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x" * 64)
    token.chmod(0o644)
    done = local(tmp_path / "folder", "up", RAY_AUTH_TOKEN="", HOME=str(tmp_path))
    assert done.returncode == 1
    assert f"{token} can be read by others" in done.stderr
    assert f"chmod 600 {token}" in done.stderr
    assert not list((tmp_path / "folder").glob("*.pid"))
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_nothing_is_ended_where_nothing_was_started(tmp_path: Path) -> None:
    done = local(tmp_path / "folder", "down")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "folder").exists()
