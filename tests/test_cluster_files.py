"""The files in cluster/ are what Ray, Kubernetes and Slurm take, agree with each other and with the package."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml

from astro_dist import cli
from astro_dist.config.yaml_file import load_config
from astro_dist.execution.ray_executor import METRIC_PREFIX
from astro_dist.report.run_figures import FIGURES
from tests.support.grafana_model import DASHBOARD

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
AUTOSCALER = sorted(CLUSTER.glob("ray-cluster-*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dockerfile_ray():
    return re.search(r"ARG RAY_VERSION=(\S+)", (CLUSTER / "Dockerfile").read_text())[1]


def images(text):
    return set(re.findall(r"REGISTRY/astro-dist:(\S+)", text))


@pytest.mark.parametrize("path", AUTOSCALER, ids=lambda path: path.name)
def test_autoscaler_files_fit_rays_own_schema(path):
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema)
    assert content["head_node_type"] in content["available_node_types"]


@pytest.mark.parametrize("path", AUTOSCALER, ids=lambda path: path.name)
def test_autoscaler_clusters_ask_for_a_token_and_keep_the_dashboard_to_themselves(path):
    content = yaml.safe_load(path.read_text())
    (head,) = [line for line in content["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    starts = [head, *(line for line in content["worker_start_ray_commands"] if "ray start" in line)]
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert "/root/.ray/auth_token" in content["file_mounts"]


def test_kuberay_job_is_whole():
    content = yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = content["spec"], content["spec"]["rayClusterSpec"]
    assert spec["backoffLimit"] > 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == dockerfile_ray()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]


GIVEN_SHM_BYTES = 8 << 30
"""Shared memory of a container, as cluster/README.md says."""


def store_bytes(text):
    """The size of Ray's object store on a command line or among parameters."""
    return int(re.search(r"object-store-memory\D*(\d+)", text)[1])


@pytest.mark.parametrize("path", AUTOSCALER, ids=lambda path: path.name)
def test_object_store_of_autoscaler_clusters_fits_into_shared_memory(path):
    """By default Ray takes at least 10 GB where a node has them, which do not fit: they would lie on the disk."""
    content = yaml.safe_load(path.read_text())
    assert "--shm-size=8g" in content["docker"]["run_options"]
    for commands in (content["head_start_ray_commands"], content["worker_start_ray_commands"]):
        (start,) = [line for line in commands if "ray start" in line]
        assert store_bytes(start) < 0.95 * GIVEN_SHM_BYTES


def test_object_store_of_kuberay_fits_into_shared_memory():
    cluster = yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings"
        assert store_bytes(str(group["rayStartParams"])) < 0.95 * GIVEN_SHM_BYTES
        pod = group["template"]["spec"]
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{GIVEN_SHM_BYTES >> 30}Gi"}


def test_slurm_script_is_sound_bash_and_cleans_up_its_token():
    path = CLUSTER / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT" in text
    assert all(
        re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in text.splitlines() if line.startswith("#SBATCH")
    )


def test_versions_agree():
    asked = next(name for name in PROJECT["dependencies"] if name.startswith("ray[default]"))
    floor = tuple(map(int, asked.split(">=")[1].split(".")))
    assert tuple(map(int, dockerfile_ray().split("."))) >= floor
    assert floor >= (2, 52), "token authentication came with 2.52"
    for path in (*AUTOSCALER, CLUSTER / "kuberay-rayjob.yaml", CLUSTER / "Dockerfile"):
        assert images(path.read_text()) == {PROJECT["version"]}, path
    changes = (CLUSTER.parent / ".github" / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)$", changes, re.M)[1] == PROJECT["version"]


def commands():
    for path in sorted(CLUSTER.iterdir()):
        for line in path.read_text().splitlines():
            found = re.search(r"(?:python -m astro_dist|astro-dist) ((?:quantize|submit) .*?)(?:\s+#.*|`.*)?$", line)
            if found:
                yield pytest.param(found[1].rstrip("."), id=f"{path.name}: {found[1]}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands_parse_and_their_configurations_hold(command):
    name, *arguments = shlex.split(command)
    typer.main.get_command(cli.app).commands[name].make_context(name, [*arguments])
    config = ROOT / "configs" / Path(arguments[0]).name
    if config.suffix == ".yaml":
        load_config(config)


def test_dashboard_asks_for_every_metric_that_a_run_sets_and_for_no_other():
    text = (CLUSTER / "grafana-dashboard.json").read_text()
    panels = json.loads(text)["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    assert all('{run=~"$run"}' in expression for expression in asked)
    names = {name for expression in asked for name in re.findall(r"ray_\w+", expression)}
    assert names == {f"ray_{METRIC_PREFIX}{name}" for name in FIGURES}
    assert set(re.findall(r"ray_\w+", text)) == names, "a variable asks for another one"
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_dashboard_is_one_in_grafanas_model():
    dashboard = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    jsonschema.validate(dashboard, DASHBOARD)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not taken & cells, f"{panel['title']} lies over another panel"
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        used = {name for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])}
        assert used <= variables
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])
