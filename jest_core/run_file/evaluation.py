"""The part `evaluation`: on which pictures checkpoints are evaluated, and how."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jest_core.run_file.parts import Part, Unit


class Pictures(Part):
    """Pictures to evaluate on, with captions or labels."""

    format: Literal["shards", "folder", "webdataset", "karpathy"] = "shards"
    """Layout of the pictures. shards: as they are trained on. folder: a directory for each class, as ImageNet comes.
    webdataset: a directory as CLIP_benchmark lays it out (SPLIT/0.tar, classnames.txt). karpathy: COCO's or Flickr's
    JSON file."""

    shards: str | list[str] = Field(examples=["eval/*.parquet", "imagenet/val", "dataset_coco.json"])
    """Where the pictures are: of format shards, paths, globs and braces as in data.shards; of folder and webdataset,
    their directory; of karpathy, the JSON file."""

    split: str = Field(default="test", examples=["test"])
    """Name of the split that is read. Of formats webdataset and karpathy only."""

    images: str | None = Field(default=None, examples=["coco"])
    """Directory that the file names of the JSON file start from. Of format karpathy only. If not given, the JSON file's
    directory."""

    columns: dict[str, str] = Field(default={}, examples=[{"caption": "my_text"}])
    """Names of columns, as in data.columns: jest's name of a column, then the shards'. Of format shards only."""


class FewShot(Part):
    """A linear classifier on frozen image features, fitted to a few labelled pictures of each class."""

    pool: Pictures
    """Labelled pictures from which the shots are drawn."""

    classes: str | None = Field(default=None, examples=["species"])
    """Task of evaluation.classes whose classes are used. If not given, those that come with the evaluation set; the
    pool has the same classes."""

    n_shots: Annotated[PositiveInt, Unit("examples")] = 10
    """Number of pictures of each class that a classifier is fitted to."""

    n_seeds: PositiveInt = 3
    """Number of classifiers, each fitted to other shots. The score is their mean."""

    l2: PositiveFloat = 1024.0
    """Strength of the L2 penalty of the ridge regression. The default is big_vision's 2^10."""


class EvaluationSet(Pictures):
    """An evaluation set: pictures, a name, and the tasks on them."""

    name: str = Field(examples=["imagenet"])
    """Name of the evaluation set in metrics and reports. No other set has it."""

    tasks: list[str] = Field(min_length=1, examples=[["zero_shot", "few_shot"], ["retrieval", "species"]])
    """Tasks on the set: `retrieval` (image to text and text to image), `zero_shot` (classes that come with the set),
    `few_shot`, and zero-shot tasks of evaluation.classes by their names."""

    few_shot: FewShot | None = None
    """Settings of the task `few_shot`, which needs them. May be left out for other tasks."""

    view: Literal["model", "crop", "squash"] = "model"
    """How pictures become square. model: as the model is trained. crop: resized to size / 0.875, then centre cropped.
    squash: the whole picture resized, whatever its aspect ratio."""


class Evaluation(Part):
    """How checkpoints are evaluated, by `jest evaluate` or in the training loop."""

    classes: str | None = Field(default=None, examples=["classes.json"])
    """JSON file of zero-shot tasks: task -> {label: column, classes: [{id, names}], templates}. May be left out where
    the classes come with the sets."""

    sets: list[EvaluationSet] = Field(min_length=1)
    """Evaluation sets. Each has a name of its own."""

    batch_size: Annotated[PositiveInt, Unit("examples")] = 512
    """Number of pictures or captions that are embedded in one forward pass."""

    every_steps: Annotated[NonNegativeInt, Unit("steps")] = 0
    """How often the training loop evaluates, in steps. 0: never, `jest evaluate` does it."""

    canonical_prompts: bool = False
    """Whether prompts are made lower case and lose their punctuation, as big_vision presents them."""

    gpus: Annotated[NonNegativeFloat, Unit("GPUs")] = 0
    """GPUs of each Ray task that `jest evaluate` runs on a cluster, one task a checkpoint."""
