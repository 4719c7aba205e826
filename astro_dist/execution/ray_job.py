"""`ray job submit` of a run: this package and the configuration travel, logs come back, the exit code too."""

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
from astro_dist.config.schema import RunConfig

__all__ = ["submit"]

_FAILED = 1
_AGAIN_S = 2.0
_UNREACHABLE_S = 600.0
_CONFIG = "run.yaml"


def submit(config: RunConfig, address: str, say: Callable[[str], Any], follow: bool = True) -> int:
    """Submit a run as a job.

    What travels is a folder with this package's own code and the resolved configuration, so that the cluster runs what
    was asked for; libraries must be installed there. No token and no variable of this machine travels with it.

    Args:
        config: of the run; its paths are those of the cluster.
        address: of the job server, e.g. http://127.0.0.1:8265.
        say: takes what the user shall see.
        follow: whether to wait for the end and show the job's log.

    Returns:
        The exit code of the job: 0 done, 1 failed, 2 wrong input, 130 interrupted; 0 where it is not followed to its
        end.

    Raises:
        ConfigError: the address is none of a job server.
        RunError: the job server cannot be reached, or refuses.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: expected the job server's, e.g. http://127.0.0.1:8265")
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
        return 0
    try:
        return _follow(client, job, say)
    except KeyboardInterrupt:
        say(f"the job goes on; `ray job logs --follow {job}` shows it, `ray job stop {job}` ends it")
        return 0


def _fill(folder: Path, config: RunConfig) -> None:
    for package in (astro, astro_dist):
        origin = Path(str(package.__file__)).parent
        shutil.copytree(origin, folder / origin.name, ignore=shutil.ignore_patterns("__pycache__"))
    # Which version this is, is read from beside the packages.
    (folder / "pyproject.toml").write_text(f'[project]\nname = "astro-dist"\nversion = "{astro.__version__}"\n')
    (folder / _CONFIG).write_text(config.to_yaml(), encoding="utf-8")


def _follow(client: JobSubmissionClient, job: str, say: Callable[[str], Any]) -> int:
    """Show the log until the job ends, over however many connections that takes."""
    shown, unreachable_since = 0, None
    while True:
        try:
            # Every connection tells the log from its beginning.
            shown = asyncio.run(_tail(client, job, say, shown))
            info = client.get_job_info(job)
            unreachable_since = None
        except Exception as error:  # of sockets, HTTP and Ray alike: the tunnel is down, the job is not
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
    count = 0
    async for text in client.tail_job_logs(job):
        for line in text.splitlines():
            count += 1
            if count > shown:
                say(line)
    return max(count, shown)
