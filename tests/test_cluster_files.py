"""What cluster/ says, held against Ray's own schemas and against the repository."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

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
    claim, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return claim, job


def pods() -> dict[str, dict[str, Any]]:
    """The pod of the head and that of each group of workers."""
    spec = kuberay()[1]["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"]} | groups


def assert_it_plans(command: list[str], place: Path) -> None:
    """`python SCRIPT OPTION...` is a script of this repository, and its options are among those it takes."""
    python, script, *options = command
    assert python == "python"
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
    assert config["setup_commands"] == []  # Ray's own would install a Ray of the day


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


def test_no_secret_is_written_in_a_file_of_the_cluster() -> None:
    for pod in pods().values():
        (container,) = pod["containers"]
        for variable in container["env"]:
            assert ("TOKEN" in variable["name"]) == ("valueFrom" in variable)
            assert "secretKeyRef" in variable.get("valueFrom", {"secretKeyRef": None})
    environment = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["env_vars"]
    assert not [name for name in environment if re.search("TOKEN$|KEY|SECRET|PASSWORD", name)]


def test_the_kuberay_jobs_command_is_one_of_this_repository(tmp_path: Path) -> None:
    """Its script is where the image has it, it plans, and its results go to the shared volume."""
    command = shlex.split(kuberay()[1]["spec"]["entrypoint"])
    image = (CLUSTER / "Dockerfile").read_text()
    (home,) = re.findall(r"^WORKDIR (.+)$", image, re.MULTILINE)
    assert re.search(r"^COPY .*pipelines pipelines$", image, re.MULTILINE)
    script = Path(command[1]).relative_to(home)
    storage = command[command.index("--storage") + 1]
    mounts = [mount["mountPath"] for mount in pods()["head"]["containers"][0]["volumeMounts"]]
    assert any(Path(storage).is_relative_to(mount) for mount in mounts)
    assert {"--placement.gpu", "--placement.autoscale"} <= set(command)  # no GPU is there when it begins
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
    for submission in (line for line in lines if line.startswith("ray job submit")):
        assert "--runtime-env cluster/runtime_env.yaml" in submission


def test_the_image_has_what_is_pinned() -> None:
    image = (CLUSTER / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-py311-gpu$", image, re.MULTILINE)
    assert base == PINNED["ray"]
    wanted = [entry[1:] for entry in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if entry[:1] == "!"]
    copied = [word for line in re.findall(r"^COPY --chown\S+ (.+) \S+$", image, re.MULTILINE) for word in line.split()]
    assert sorted(copied) == sorted(wanted)
    assert all((ROOT / name).exists() for name in copied)


def test_a_job_takes_along_the_code_and_little_else(tmp_path: Path) -> None:
    """The package as Ray makes it, .gitignore and .rayignore heeded."""
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
    """`tune`, `cluster`, `pipelines` and `tests` stay in the repository: in a wheel they would be anybody's modules."""
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
