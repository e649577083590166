"""MLflow: the server that MLFLOW_TRACKING_URI names; without one, MLflow's files in the run directory.

A local database would want packages that mlflow-skinny does not bring along, and locks that shared disks lack. MLflow
asks for MLFLOW_ALLOW_FILE_STORE before it writes files (mlflow/store/tracking/file_store.py).
"""

import logging
import os
import time
from collections.abc import Mapping

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from lora_cli.trackers.tracker import NOTHING, PROJECT, TrackedRun

FOLDER = "mlruns"
_TAG = "lora.id"  # by which a run is found again, even where it was killed before it knew MLflow's own id
_LONGEST_VALUE = 500  # characters; the least that a server of the last years takes
_MOST_AT_ONCE = 100  # params in a request
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

logging.getLogger("mlflow").setLevel(logging.ERROR)


class Mlflow:
    """Metrics by their names, the config as params; a request for each step."""

    address: str | None = None

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._id = ""

    def start(self, step: int) -> int:
        """Begin a run, or continue the one that has this id, which says itself what it holds."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (self._run.place / FOLDER).absolute().as_uri()
        self._client = MlflowClient(uri)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment()
        known = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{self._run.known.id}'")
        if not known:
            self._id = self._create(experiment)
            return NOTHING
        self._id = known[0].info.run_id
        self._client.update_run(self._id, status="RUNNING")
        names = ("train/loss", "validation/loss")
        held = [each.step for name in names for each in self._client.get_metric_history(self._id, name)]
        return max(held, default=NOTHING)

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step in one request."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, metrics=[Metric(name, one, now, step) for name, one in figures.items()])

    def flush(self) -> None:
        """Nothing is held back."""

    def end(self, status: str, reason: str) -> None:
        """Say how it ended."""
        self._client.set_tag(self._id, "reason", reason)
        self._client.set_terminated(self._id, _ENDS[status])

    def _create(self, experiment: str) -> str:
        tags = {_TAG: self._run.known.id}
        created = str(self._client.create_run(experiment, tags=tags, run_name=self._run.name).info.run_id)
        params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in self._run.settings.items()]
        for first in range(0, len(params), _MOST_AT_ONCE):
            self._client.log_batch(created, params=params[first : first + _MOST_AT_ONCE])
        return created

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name))
