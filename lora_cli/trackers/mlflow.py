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
from mlflow.exceptions import MlflowException

from lora_cli.trackers.tracker import NOTHING, PROJECT, TrackedRun

FOLDER = "mlruns"
_LONGEST_VALUE = 500  # characters; the least that a server of the last years takes
_MOST_AT_ONCE = 100  # params in a request
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

logging.getLogger("mlflow").setLevel(logging.ERROR)


class Mlflow:
    """Metrics by their names, the config as params; a request for each step."""

    address: str | None = None

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self.id: str | None = run.known.id

    def start(self, step: int) -> int:
        """Begin a run, or continue the one that is known, which says itself what it holds."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (self._run.place / FOLDER).absolute().as_uri()
        self._client = MlflowClient(uri)
        if self.id is None or not self._is_there(self.id):
            self.id = self._create()
            return NOTHING
        self._client.update_run(self.id, status="RUNNING")
        names = ("train/loss", "validation/loss")
        held = [each.step for name in names for each in self._client.get_metric_history(self.id, name)]
        return max(held, default=NOTHING)

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step in one request."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(str(self.id), metrics=[Metric(name, one, now, step) for name, one in figures.items()])

    def flush(self) -> None:
        """Nothing is held back."""

    def end(self, status: str, reason: str) -> None:
        """Say how it ended."""
        self._client.set_tag(str(self.id), "reason", reason)
        self._client.set_terminated(str(self.id), _ENDS[status])

    def _is_there(self, known: str) -> bool:
        try:
            return bool(self._client.get_run(known).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False  # deleted, or of another server

    def _create(self) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment()
        created = self._client.create_run(experiment, run_name=self._run.name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in self._run.settings.items()]
        for first in range(0, len(params), _MOST_AT_ONCE):
            self._client.log_batch(created, params=params[first : first + _MOST_AT_ONCE])
        return str(created)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name))
