"""One stage of a recipe: from a teacher and a plan to a trained student on the disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bkd.data.latent_set import LatentSet
from bkd.errors import OutputError
from bkd.eval.pictures import ValidationPictures
from bkd.lora.adapter_file import ADAPTER_FILE, Adapter
from bkd.lora.adapters import merged, trained_tensors, unshared
from bkd.models.folder import model_digest
from bkd.models.load import load_unet, training_dtype
from bkd.models.locate import locate
from bkd.models.student_folder import plan_facts, write_student
from bkd.progress import Progress, silent
from bkd.recipe.load import result_keys
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import Stage
from bkd.runs.folder import STARTING_STUDENT, RunFolder, seconds_key
from bkd.runs.stage_plan import PlannedStage
from bkd.runs.stage_setup import build_method, start_student, with_trained
from bkd.training.checkpoint import Checkpoints
from bkd.training.fit import Events, Fit
from bkd.training.journal import StepReport
from bkd.training.parallel import Parallel
from bkd.training.stop import StopSignal
from bkd.training.tracking import MetricsLog, TrackedStage, Trackers


@dataclass(frozen=True)
class Listener:
    """Where a run reports to; only the command line prints.

    Attributes:
        phase: Called with one line when something new begins, or went wrong and was mended.
        progress: Called with (done, total) during a phase.
        step: Called after each optimizer step.
        resumed: Called with the number of steps done before, when a stage continues.
    """

    phase: Callable[[str], None] = lambda text: None
    progress: Progress = silent
    step: Callable[[StepReport], None] = lambda report: None
    resumed: Callable[[int], None] = lambda step: None


@dataclass(frozen=True)
class Job:
    """What the stages of a run have in common.

    Attributes:
        recipe: As validated.
        run: The run folder.
        data: Cached samples.
        parallel: This process among the others.
        listener: Told what happens, on the main process.
        stop: Requests to stop.
        force: Whether checkpoints made with another plan, teacher or data are continued from.
    """

    recipe: Recipe
    run: RunFolder
    data: LatentSet
    parallel: Parallel
    listener: Listener
    stop: StopSignal
    force: bool = False


class StageRun:
    """Train one stage.

    Args:
        job: What it has in common with the others.
        planned: The stage.
        teacher: The teacher's pipeline folder.
        pipe: The same loaded, frozen, in float32 on the CPU.
    """

    def __init__(self, job: Job, planned: PlannedStage, teacher: Path, pipe: StableDiffusionPipeline) -> None:
        self._job, self._planned, self._teacher, self._pipe = job, planned, teacher, pipe
        self._number, self._stage, self._plan = planned.number, planned.stage, planned.plan
        self._digest = model_digest(teacher) if job.parallel.is_main else ""
        self._device = job.parallel.device
        self._dtype = training_dtype(job.recipe.train.mixed_precision)
        self._pictures = ValidationPictures(
            job.recipe.origin, pipe, job.recipe.samples, self._dtype, self._device, planned.kind, planned.teacher.kind
        )
        self._metrics = MetricsLog(job.run.metrics)

    def train(self) -> None:
        """To the last step, and leave a student folder."""
        job = self._job
        of_stages = f"stage {self._number + 1} of {len(job.recipe.stages)}: " if len(job.recipe.stages) > 1 else ""
        job.listener.phase(f"{of_stages}training {self._stage.title} on {job.parallel}")
        if job.parallel.is_main and (job.parallel.kind == "fsdp2" or self._stage.method.name == "finetune"):
            # In shards it could draw only with all processes together, and what is fine-tuned is no longer the same.
            self._pictures.draw_teacher()
        method = build_method(self._planned, self._pipe, self._device)
        self._student, self._adapted = method.trainable, tuple(trained_tensors(method.trainable))
        started = time.monotonic()
        with Trackers(job.recipe.train.trackers, self._tracked()) as self._trackers:
            fit = Fit(
                method,
                job.data,
                self._planned.train,
                checkpoints=self._checkpoints(),
                parallel=job.parallel,
                seed=self._planned.seed,
                mirror=job.recipe.data.mirror,
                events=Events(self._on_resume, self._on_step, self._draw),
            )
            try:
                fit.run(job.stop)
            finally:
                self._add_seconds(time.monotonic() - started)
        self._finish(fit)

    def _tracked(self) -> TrackedStage | None:
        job = self._job
        if not job.parallel.is_main:
            return None
        return TrackedStage(job.run.path, job.run.identity(), self._number, result_keys(job.recipe))

    def _checkpoints(self) -> Checkpoints:
        job = self._job
        identity = {
            "plan": hashlib.sha256(self._plan.to_json().encode()).hexdigest(),
            "teacher": self._digest,
            "data": job.data.fingerprint,
        }
        return Checkpoints(
            job.run.checkpoints(self._number),
            identity,
            keep=job.recipe.train.keep_checkpoints,
            force=job.force,
            on_damaged=job.listener.phase,
        )

    def _on_resume(self, step: int) -> None:
        self._trackers.start(step)
        if self._stage.lora is not None and self._stage.lora.share_base:
            copies = unshared(self._student, self._pipe.unet, self._plan, own=self._adapted)
            assert not copies, f"weights that should be the teacher's are copies: {copies[:3]}"
        if not self._job.parallel.is_main:
            return
        self._metrics.rewind(self._number, step)
        if step:
            self._job.listener.resumed(step)

    def _on_step(self, report: StepReport) -> None:
        if not self._job.parallel.is_main:
            return
        self._job.listener.step(report)
        if report.step == 1 and (predicts := self._planned.kind.prediction_type):
            self._job.listener.phase(
                f"the student predicts {predicts} and its teacher does not: loss {report.total:.4g} before the first "
                "update"
            )
        every = self._job.recipe.train.log_every
        if report.trouble or report.step % every == 0 or report.step in (1, report.max_steps):
            self._metrics.write(self._number, report)
            self._trackers.log(report)

    @contextmanager
    def _averaged(self, fit: Fit) -> Iterator[UNet2DConditionModel | None]:
        """The student with its averaged weights, whole, on the main process; None on the others."""
        if self._job.parallel.kind != "fsdp2":
            with fit.averaged() as student:
                yield student if self._job.parallel.is_main else None
            return
        weights = fit.average_in_full()
        yield None if weights is None else self._rebuilt(weights)

    def _rebuilt(self, trained: Mapping[str, Tensor]) -> UNet2DConditionModel:
        """The student as it started, on the CPU, with what has trained since."""
        student = start_student(load_unet(self._teacher), self._plan, self._stage, self._planned.seed)
        return with_trained(student, trained).eval()

    def _draw(self, fit: Fit, step: int) -> None:
        """Teacher | student for each validation prompt, from the same noise."""
        with self._averaged(fit) as student:
            if student is not None:
                self._save_pictures(f"step-{step:08d}", student)

    def _save_pictures(self, name: str, student: UNet2DConditionModel) -> None:
        self._pictures.save(self._job.run.samples / f"{self._number:02d}-{name}.png", student.to(self._device))

    def _finish(self, fit: Fit) -> None:
        job = self._job
        with self._averaged(fit) as student:
            if student is None:
                return
            job.listener.phase("writing and reloading the student")
            self._write(student)
            if self._pictures.wanted:
                job.listener.phase("drawing validation pictures")
            self._save_pictures("final", student)

    def _write(self, student: UNet2DConditionModel) -> None:
        """The stage's student, and its adapter where it has one."""
        job = self._job
        self._require_same_teacher()
        if self._stage.lora is not None:
            require_same_start(job.run, self._stage, force=job.force)
        students = job.run.students(job.recipe)
        output = students[self._number]
        if self._stage.lora is None:
            stock = student.to("cpu", memory_format=torch.contiguous_format)
        else:
            trained = {name: student.get_parameter(name).detach().cpu() for name in self._adapted}
            stock = merged(self._rebuilt(trained))  # onto the teacher's weights as they are stored
        before = students[self._number - 1].relative_to(job.run.path)
        facts = {
            "teacher": str(before) if self._number else job.recipe.teacher.id,
            "teacher_digest": self._digest,
            "teacher_plan": plan_facts(self._teacher),
            "steps": self._planned.train.max_steps,
        }
        if self._stage.lora is not None:  # first: once the student is there, the stage counts as done
            Adapter(trained, self._stage.lora, self._plan, self._digest).save(output.parent / ADAPTER_FILE)
        write_student(output, teacher=self._teacher, unet=stock, plan=self._plan, kind=self._planned.kind, facts=facts)

    def _require_same_teacher(self) -> None:
        """Its folder is read again when the student is written, and trainings are long."""
        if (now := model_digest(self._teacher)) != self._digest and not self._job.force:
            raise OutputError(
                "the teacher's folder has changed since its training began",
                where=self._teacher,
                got=now,
                allowed=self._digest,
                remedy="restore it and give the same command; --force goes on all the same",
            )

    def _add_seconds(self, seconds: float) -> None:
        """Training time of the stage, over all the calls it took."""
        if self._job.parallel.is_main:
            name = seconds_key(self._number)
            self._job.run.record(**{name: round(self._job.run.facts().get(name, 0.0) + seconds, 1)})


def require_same_start(run: RunFolder, stage: Stage, *, force: bool) -> None:
    """Refuse to go on when what `student.path` names has changed: weights that do not train are in no checkpoint.

    Raises:
        OutputError: If it is another model than when the run began.
    """
    if stage.student.path is not None and run.writes:
        run.require_same(STARTING_STUDENT, model_digest(locate(stage.student.path)), force=force)
