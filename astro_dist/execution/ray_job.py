"""A run as a job of a Ray cluster: this package and the configuration travel there, log and exit code come back."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.exceptions
from ray.job_submission import JobSubmissionClient

import astro
import astro_dist
from astro.errors import ConfigError, RunError
from astro_dist.config.cluster_paths import require_absolute_paths
from astro_dist.config.schema import RunConfig

__all__ = ["submit"]

_FAILED = 1
"""Exit code of a run that failed."""
_AGAIN_S = 2.0
"""Seconds between two questions whether the job has ended."""
_UNREACHABLE_S = 600.0
"""Seconds without any answer of the job server after which the job is not followed any more."""
_CONFIG = "run.yaml"


def submit(config: RunConfig, address: str, say: Callable[[str], Any], follow: bool = True) -> int:
    """Submit a run as a job.

    A folder with the code of this package and the resolved configuration travels to the cluster. Libraries must be
    installed there. No token and no environment variable of this machine travels.

    Args:
        config: Configuration of the run, whose paths are those of the cluster.
        address: URL of the job server, for example http://127.0.0.1:8265.
        say: Function that shows the user a line.
        follow: Whether to show the job's log and wait for its end.

    Returns:
        Exit code of the job: 0 done, 1 failed, 2 wrong input, 130 interrupted. It is 0 for a job that is not followed
        to its end.

    Raises:
        ConfigError: The address is not the URL of a job server, or a path of the configuration is relative.
        RunError: The job server cannot be reached, or refuses the job.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: expected the job server's, e.g. http://127.0.0.1:8265")
    require_absolute_paths(config)  # for any executor, because the job's working folder is deleted with the job
    with tempfile.TemporaryDirectory(prefix="astro-dist-") as folder:
        _fill(Path(folder), config)
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=f"python -m astro_dist quantize {_CONFIG}", runtime_env={"working_dir": folder}
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines()[-1].rstrip(".")
            raise RunError(
                f"job server {address}: {reason}. It listens on the head node's dashboard port, mostly reached through "
                "an SSH tunnel; with token authentication RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH must be set here too"
            ) from error
    say(f"submitted as {job}")
    if not follow:
        say(
            f"`RAY_API_SERVER_ADDRESS={address} ray job logs --follow {job}` shows its log, `astro-dist status "
            f"{config.output.dir}` how far it is, on a machine that sees that folder"
        )
        return 0
    try:
        return _follow(client, job, say)
    except KeyboardInterrupt:
        say(f"the job goes on; `ray job logs --follow {job}` shows it, `ray job stop {job}` ends it")
        return 0


def _fill(folder: Path, config: RunConfig) -> None:
    """Copy everything that travels into a folder."""
    for package in (astro, astro_dist):
        origin = Path(str(package.__file__)).parent
        shutil.copytree(origin, folder / origin.name, ignore=shutil.ignore_patterns("__pycache__"))
    # The version is read from the pyproject.toml that stands beside the packages.
    (folder / "pyproject.toml").write_text(f'[project]\nname = "astro-dist"\nversion = "{astro.__version__}"\n')
    (folder / _CONFIG).write_text(config.to_yaml(), encoding="utf-8")


def _follow(client: JobSubmissionClient, job: str, say: Callable[[str], Any]) -> int:
    """Show the log until the job ends, connecting again as often as needed, and return the exit code."""
    shown, unreachable_since = 0, None
    while True:
        try:
            # Every connection sends the log from its beginning.
            shown = asyncio.run(_tail(client, job, say, shown))
            info = client.get_job_info(job)
            unreachable_since = None
        except Exception as error:  # sockets, HTTP and Ray raise their own when only the tunnel is down
            unreachable_since = unreachable_since or time.monotonic()
            if time.monotonic() - unreachable_since > _UNREACHABLE_S:
                raise RunError(
                    f"job server: not reached for {_UNREACHABLE_S:.0f} s ({error}); the job goes on as far as is "
                    f"known. `ray job logs --follow {job}` shows it again"
                ) from error
            time.sleep(_AGAIN_S)
            continue
        if info.status.is_terminal():
            if info.driver_exit_code is not None:
                return int(info.driver_exit_code)
            say(f"{job}: {info.status.value}. {info.message or ''} What is finished is kept; submit it again to go on")
            return _FAILED
        time.sleep(_AGAIN_S)


async def _tail(client: JobSubmissionClient, job: str, say: Callable[[str], Any], shown: int) -> int:
    """Show the lines of the log after the first `shown`, and return how many it has."""
    count = 0
    async for text in client.tail_job_logs(job):
        for line in text.splitlines():
            count += 1
            if count > shown:
                say(line)
    return max(count, shown)
