"""The run file: `Run`, which has all parts, and every size that follows from them.

A run file is complete, and unknown keys are errors. Paths that are neither absolute nor URLs are below `root`.
"""

from pydantic import Field, NonNegativeInt

from jest_core.choices import CRITERIA
from jest_core.run_file.data import Data
from jest_core.run_file.evaluation import Evaluation
from jest_core.run_file.ingest import Ingest
from jest_core.run_file.model import Model
from jest_core.run_file.parts import Circumstance, Part
from jest_core.run_file.paths import join
from jest_core.run_file.reference import Reference
from jest_core.run_file.selection import Selection
from jest_core.run_file.subset import Subset
from jest_core.run_file.training import LearnerRange, Training


class Run(Part):
    """One run: what `jest STAGE RUN.yaml` reads, and what it saves, resolved, as run.yaml in run_dir."""

    root: Circumstance[str] = Field(default=".", examples=["s3://my-bucket/laion2b", "/data"])
    """Directory or URL below which all paths of the run file are, but those that are absolute or URLs. If not given,
    the working directory."""

    run_dir: Circumstance[str] = Field(examples=["runs/joint"])
    """Run directory, in which `jest train` and `jest evaluate` write checkpoints, selection log and metrics."""

    seed: NonNegativeInt = Field(examples=[0])
    """Seed of all random numbers: fresh weights, the order of examples, selection and augmentation."""

    ingest: Circumstance[Ingest | None] = None
    """How `jest ingest` downloads lists of URLs into image shards. May be left out where the shards are there."""

    data: Data
    """The shards, which of their rows are kept, and in which order they come."""

    model: Model
    """The learner's model."""

    reference: Reference | None = None
    """The reference model, and its score cache. May be left out where nothing is scored by it: with selection.method
    uniform or selection.criterion hard."""

    selection: Selection
    """How each step's sub-batch is selected from its super-batch."""

    training: Training
    """How the learner is trained."""

    evaluation: Circumstance[Evaluation | None] = None
    """How checkpoints are evaluated. If not given, they are not."""

    subset: Circumstance[Subset | None] = None
    """What `jest select` writes. If not given, that command has nothing to do, and the others do not need it."""

    @property
    def sub_batch_size(self) -> int:
        """b, all learners together."""
        return self.training.sub_batch_size

    @property
    def super_batch_size(self) -> int:
        """B, all learners together; a uniform run's super-batch is its sub-batch."""
        if not self.selection.selects:
            return self.sub_batch_size
        return round(self.sub_batch_size / (1 - self.selection.filter_ratio))

    @property
    def n_low_resolution(self) -> int:
        """How many of a sub-batch's examples are trained at training.low_resolution."""
        low = self.training.low_resolution
        return 0 if low is None else round(low.share * self.sub_batch_size)

    @property
    def learner_numbers(self) -> list[int]:
        """The numbers of learners that the run may have, ascending: of training.n_learners those that divide the
        batches."""
        given, batches = self.training.n_learners, (self.sub_batch_size, self.super_batch_size, self.n_low_resolution)
        numbers = range(given.min, given.max + 1) if isinstance(given, LearnerRange) else [given]
        return [n for n in numbers if not any(size % n for size in batches)]

    @property
    def n_steps(self) -> int:
        return self.training.examples_trained // self.sub_batch_size

    @property
    def uses_reference(self) -> bool:
        return self.selection.selects and CRITERIA[self.selection.criterion].uses_reference

    @property
    def uses_learner(self) -> bool:
        """Whether the learner scores super-batches."""
        return self.selection.selects and CRITERIA[self.selection.criterion].uses_learner

    @property
    def reads_scores(self) -> bool:
        """Whether the reference's embeddings come from its score cache: it may embed in the learner, or not at all."""
        return self.uses_reference and self.reference is not None and not self.reference.online

    def path(self, value: str) -> str:
        """A path of the run file as an absolute path or a URL."""
        return join(self.root, value)
