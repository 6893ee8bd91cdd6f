"""The fine-tuning API's parts, put together for the gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from finetune_api import KIND
from finetune_operator.cluster.reflector import OfNamespace, Reflector
from finetune_operator.cluster.transport import Cluster

from ..access import Access, Caller
from ..catalog import Asked
from ..settings import Settings
from ..store.keeper import Store
from .actor import Actors, Kubernetes
from .answers import resolve
from .api import FineTuning
from .blobs import Blobs
from .creating import Creator
from .files import Files, Limits
from .history import History
from .jobs import Job, Jobs, read_job
from .manifest import Reading
from .models import read
from .uploads import Uploads

_WATCH_SECONDS = 1.0


class Tuning:
    """What of it lives as long as the gateway."""

    def __init__(self, settings: Settings, store: Store, access: Access, kubernetes: Kubernetes) -> None:
        """Raises ValueError where the model map cannot be read."""
        self._settings = settings
        self._models = read(settings.fine_tuning_models)
        self._blobs = Blobs(settings.fine_tuning_storage, settings.fine_tuning_s3_endpoint)
        limits = Limits(settings.fine_tuning_file_bytes, settings.body_seconds, settings.total_seconds)
        self._files = Files(store, self._blobs, limits)
        self._uploads = Uploads(store, self._blobs, self._files, limits)
        self._history = History(store, settings.usage_days)
        self.jobs = Jobs(self._history.see)
        self._creator = Creator(self.jobs, kubernetes, lambda: datetime.now(UTC))
        self._actors = Actors(access, settings.fine_tuning_key_account, users=settings.fine_tuning_impersonate_users)

    def api(self, caller: Callable[[Any], Awaitable[Caller]]) -> FineTuning:
        """The routes. `caller`: who asks, by the scope of a request."""
        reading = Reading(self._settings.fine_tuning_secret, self._settings.fine_tuning_s3_endpoint)
        settings = self._settings
        return FineTuning(
            self.jobs,
            self._files,
            self._uploads,
            self._history,
            self._creator,
            self._actors,
            self._models,
            reading,
            caller,
            settings.body_seconds,
            settings.fine_tuning_file_bytes,
            _WATCH_SECONDS if settings.replicas > 1 else 0.0,
        )

    def resolve(self, model: str) -> Asked | None:
        """What ft:... is called at an endpoint; None for what is nobody's, or was not published to a FineTunedModel."""
        job = self.jobs.named(model)
        return resolve(job) if job is not None else None

    def watch(self, cluster: Cluster, namespace: str) -> Reflector[Job]:
        """Keeps the jobs of a namespace, or of all."""
        return Reflector(cluster, KIND, read_job, OfNamespace(self.jobs, namespace), namespace=namespace)

    async def run(self) -> None:
        """Write the history. Until cancelled."""
        await self._history.run()

    def tidy(self) -> None:
        """Forget what is not there any more."""
        self._history.forget(self.jobs)

    async def close(self) -> None:
        """What is known and not written yet, is."""
        await self._history.flush()
        self._blobs.close()
