"""Training on a cluster: Ray Train runs the loop on every worker, and the output gets the model.

A training that was killed goes on from its newest checkpoint; one whose manifest is there is done.
What workers have to say (steps, and what ended them) comes through a queue on the driver's node.
"""

import functools
import gc
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.exceptions import RayError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors import SafetensorError

from pipeline import checkpoints, cluster, manifests, models, storage, training_data
from pipeline.adapters import add_adapters
from pipeline.batches import count_steps
from pipeline.cluster import Trainers
from pipeline.config import ClusterConfig
from pipeline.devices import keep_freed_memory
from pipeline.errors import CherryError, ConfigError, ModelError, StorageError, TrainingError
from pipeline.manifests import Finished
from pipeline.parallel import agreed
from pipeline.texts import describe_cause
from pipeline.training_data import Examples
from pipeline.training_job import TrainJob
from pipeline.training_loop import StepDone, train
from pipeline.watching import SILENCE, Progress, TrainingMetrics

log = logging.getLogger("cherry")

_MOST_FAILURES = 3
"""Times that workers may be lost; each time the newest checkpoint is gone back to."""

_MOST_STARTS = 30
"""Times that Ray Train may ask for its workers in vain, a minute each: a spot node is replaced in
less, and what never comes is not waited for while the other GPUs are paid for."""


Load = Callable[[], tuple[pa.Table, int]]
"""Gives rows in the EXAMPLES schema, and how many were left out."""


def train_all(
    planned: Sequence[tuple[TrainJob, Load]], cluster_config: ClusterConfig, progress: Progress
) -> list[Finished]:
    """Train one after the other what is not done yet, in the same workers.

    Args:
        planned: Each training, and what gives its rows; their workers must be alike.
        cluster_config: Where.
        progress: Told of each step.

    Raises:
        InputError: There is no row to train on.
        TrainingError: A loss is not finite, or workers were lost too often.
        StorageError: The disk is full, or the output cannot be written.
    """
    todo = [(job, load) for job, load in planned if manifests.find(job.url) is None]
    if todo:
        trainers = cluster.plan_trainers(cluster_config, todo[0][0].config)
        _fit([_prepare(job, load, trainers) for job, load in todo], trainers, progress)
    for job, _ in planned:  # also of one whose driver died after its manifest
        checkpoints.remove_all(job.checkpoints_url)
        storage.remove(job.examples_url)
    return [trained for job, _ in planned if (trained := manifests.find(job.url)) is not None]


def _prepare(job: TrainJob, load: Load, trainers: Trainers) -> TrainJob:
    """Publish the rows for the workers, and note what they are."""
    name = job.manifest["trained_on"]
    table, left_out = load()
    training_data.refuse_empty(table, left_out, name)
    if left_out:
        log.warning("%s: %d rows have no answer that fits, and are left out", name, left_out)
    training_data.save_examples(job.examples_url, table)
    steps = count_steps(len(table), job.config)
    log.info("training on %s: %d rows, %d steps, %s", name, len(table), steps, trainers.describe())
    tokens = int(pc.sum(pc.list_value_length(table["input_ids"])).as_py())
    facts = {"rows": len(table), "rows_left_out": left_out, "tokens": tokens}
    return job.ready(facts, trainers.threads)


def _fit(jobs: list[TrainJob], trainers: Trainers, progress: Progress) -> None:
    """Train on the cluster, each from its newest checkpoint on if there is one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    said = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    told: list[CherryError] = []
    broken: list[Exception] = []
    listener = threading.Thread(target=_listen, args=(said, progress, told, broken), daemon=True)
    listener.start()
    cause = None
    try:
        _run(jobs, trainers, said)
    except Exception as err:  # noqa: BLE001  # what the workers said comes first
        cause = err
    finally:  # also of an interrupted run: a thread that asks Ray as it ends can end the process
        with suppress(RayError):
            said.put(None)
            listener.join()
    said.shutdown()
    if broken:
        raise broken[0]
    for job in jobs:
        if manifests.find(job.url) is None:
            raise (told[-1] if told else None) or TrainingError(
                f"training of {job.url}: its workers were lost {_MOST_FAILURES + 1} times, or did "
                f"not come in {_MOST_STARTS} minutes (wanted: {trainers.describe()}). The last "
                f"cause: {describe_cause(cause)}. Look at the logs of the workers; most often the "
                "model does not fit the memory. Run again to go on from the newest checkpoint, on "
                "the workers that are there."
            ) from cause


def _listen(
    said: Queue, progress: Progress, told: list[CherryError], broken: list[Exception]
) -> None:
    """Hand on what the workers say, and keep their errors since the last step.

    A progress that cannot be shown is `broken`, which does not end the training.
    """
    while (message := said.get()) is not None:
        try:
            if isinstance(message, str):
                progress.phase(message)
            elif isinstance(message, StepDone):
                told.clear()  # of workers that were replaced since
                progress.step(message)
            else:
                told.append(message)
        except Exception as err:  # noqa: BLE001  # raised by the thread that waits
            broken.append(err)
            progress = SILENCE


def _run(jobs: list[TrainJob], trainers: Trainers, said: Queue) -> None:
    """Run Ray Train to its end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # not before: most only score
    from ray.train.torch import TorchTrainer

    class Interruptible(TorchTrainer):
        """Ctrl-C ends it as it ends the rest of a run; its own handler would exit with 0."""

        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    with tempfile.TemporaryDirectory(prefix="cherry-train-") as folder:
        Interruptible(
            _worker,
            train_loop_config={"jobs": jobs, "said": said},
            scaling_config=ScalingConfig(
                num_workers=trainers.workers,
                use_gpu=trainers.use_gpu,
                resources_per_worker=trainers.resources,
            ),
            run_config=RunConfig(
                name="cherry",
                storage_path=folder,  # of Ray's own notes; checkpoints go to the output
                failure_config=FailureConfig(
                    max_failures=_MOST_FAILURES,
                    controller_failure_limit=_MOST_STARTS,  # type: ignore[call-arg]  # of v2
                ),
            ),
        ).fit()


def _worker(config: dict[str, Any]) -> None:
    """One process of some trainings."""
    from ray.train.torch import get_device

    said: Queue = config["said"]
    jobs: list[TrainJob] = config["jobs"]
    first = ray.train.get_context().get_world_rank() == 0
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(jobs[0].threads)
    try:
        for job in jobs:
            # One looks for all: a driver beside this one may finish it between two looks.
            if agreed(first and manifests.find(job.url) is not None):
                continue
            _train_here(job, device, said if first else None)
            gc.collect()  # a model and its hooks refer to each other in circles
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except CherryError as err:
        if first:
            said.put(err)
        # Which all workers raise, and would again.
        if not isinstance(err, (TrainingError, ModelError, ConfigError)):
            raise


def _train_here(job: TrainJob, device: torch.device, said: Queue | None) -> None:
    """Train, and publish what came out; only the first worker has something to say."""
    if said is not None:  # an empty queue is false
        said.put(f"training on {job.manifest['trained_on']}")
    metrics = None if said is None else TrainingMetrics()

    def report(step: StepDone) -> None:
        if said is not None and metrics is not None:
            metrics.set(step)
            said.put(step)

    model = models.load(job.model, torch.float32, device)
    if job.config.lora:
        model = add_adapters(model, job.config.lora, job.config.seed).get_base_model()
    weights, history = train(
        model,
        Examples.load(job.examples_url),
        job.config,
        getattr(torch, job.dtype),
        job.checkpoints_url,
        report,
        max_length=job.max_length,
        held_out={name: Examples.load(url) for name, url in job.held_out.urls.items()},
        points=job.held_out.points,
    )
    if said is not None:
        publish_model(job, weights, history)
        checkpoints.remove_all(job.checkpoints_url)


def publish_model(
    job: TrainJob, weights: dict[str, torch.Tensor], history: list[dict[str, Any]]
) -> None:
    """Write a model directory in the base model's own dtype, its manifest last."""
    files = _publish_files(job, weights) if job.keep_model else []
    manifests.finish(job.url, {**job.manifest, "history": history, "files": files})


def _publish_files(job: TrainJob, weights: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    dtype = models.load_config(job.model).dtype or torch.float32
    model = models.load(job.model, torch.float32, torch.device("cpu"))
    if job.config.lora:
        adapted = add_adapters(model, job.config.lora, job.config.seed)
        _load(adapted.get_base_model(), weights)
        model = adapted.merge_and_unload()
    else:
        _load(model, weights)
    with tempfile.TemporaryDirectory(prefix="cherry-model-") as folder:
        try:
            # One file of weights: two drivers at once could otherwise mix theirs.
            model.to(dtype).save_pretrained(folder, max_shard_size="1TB")
            models.copy_tokenizer(job.model, folder)
        except (OSError, SafetensorError) as err:
            raise StorageError(
                f"{folder}: the trained model cannot be written: {err}. Free some space there, or "
                "set TMPDIR, and run again: the training goes on from its newest checkpoint."
            ) from err
        files = []
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            storage.publish_file(
                storage.join(job.url, name), functools.partial(shutil.copyfile, path)
            )
            files.append({"path": name, "bytes": os.path.getsize(path)})
        return files


def _load(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Trained weights into a model; what was frozen is not among them."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
