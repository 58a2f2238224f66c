"""The part `reference`: the model that learnability is measured against, and where its scores come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from jest_core.choices import ForwardPrecision
from jest_core.run_file.model import Model
from jest_core.run_file.parts import Circumstance, Part, Unit


class Scorer(Part):
    """A further score of every pair, computed beside its embeddings and stored as a column of the score cache."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$", examples=["text_quality"])
    """Name of the column in the score cache, which the rule `score` can refer to: lower case letters, digits, `_`."""

    scorer: str = Field(examples=["fasttext", "linear_head", "my_package.my_module:my_factory"])
    """What computes the score: `fasttext` (a classifier of captions), `linear_head` (a linear layer on an embedding, as
    LAION's aesthetic predictors are), or a factory of your own as package.module:factory."""

    options: dict[str, Any] = Field(
        default={}, examples=[{"path": "models/text_quality.bin", "label": "__label__good"}]
    )
    """Keyword arguments of the scorer. `path` is below `root`, as the other paths of a run file."""


class Features(Part):
    """Embeddings that another tool computed: DataComp's metadata with its .npz files, or clip-retrieval's folder."""

    format: Literal["datacomp", "clip-retrieval"]
    """Layout of the folder. datacomp: STEM.parquet with STEM.npz. clip-retrieval: img_emb, text_emb and metadata."""

    folder: str = Field(examples=["metadata"])
    """Folder of the embeddings. Pairs are found in it by uid."""

    kind: Literal["b32", "l14"] = "l14"
    """Which of DataComp's embeddings are read: by CLIP ViT-B/32 (b32) or ViT-L/14 (l14). Of format datacomp only."""

    logit_scale: PositiveFloat = 100.0
    """Multiplier of similarities, as the model that made the embeddings has it. The default is CLIP's at the end of its
    training."""

    uid_column: str = Field(default="uid", examples=["uid"])
    """Column of clip-retrieval's metadata that has the uids. Of format clip-retrieval only."""


class Reference(Part):
    """The pretrained model that pairs are measured against; it has a logit_scale and a logit_bias of its own.

    Its weights come from one of `checkpoint`, `model.pretrained` and `features`. `jest reference-scores` embeds every
    kept pair with it once, and `jest train` reads the embeddings.
    """

    model: Model
    """The reference model: its architecture, and how it sees pictures and captions."""

    checkpoint: str | None = Field(default=None, examples=["reference", "weights/open_clip_model.pt"])
    """Checkpoint with the reference's weights: a file, a run directory, of which the newest checkpoint is read, or a
    folder as open_clip and Hugging Face have them. Not together with `model.pretrained`."""

    scores: str = Field(examples=["scores"])
    """Directory of the score cache, which `jest reference-scores` writes: embeddings of every kept pair."""

    online: bool = False
    """Whether learners embed super-batches with the reference in each step, instead of reading the score cache."""

    score_image_size: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Side of the square pictures that the reference embeds, in pixels. If not given, the model's image size."""

    score_patch_size: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Side of the patches in which the reference, a ViT, embeds pictures, in pixels. If not given, the model's patch
    size."""

    features: Features | None = None
    """Embeddings that another tool computed, from which `jest reference-scores` makes the score cache. If not given, it
    embeds the pictures with the model."""

    scorers: list[Scorer] = Field(default=[])
    """Further scores that `jest reference-scores` computes of each pair, such as text quality and aesthetics. Each is a
    column of the score cache."""

    batch_size: Circumstance[Annotated[PositiveInt, Unit("examples")]] = 256
    """Number of pairs of a forward pass of `jest reference-scores`."""

    precision: ForwardPrecision = "fp32"
    """Precision of the reference's forward pass: fp32, or autocast to bf16 or fp16."""

    compile: Circumstance[bool] = False
    """Whether `jest reference-scores` compiles both towers with torch.compile."""

    n_actors: Circumstance[PositiveInt | None] = None
    """Number of Ray actors by which `jest reference-scores` embeds. If not given, as many as the GPUs of the cluster
    allow, or as the cores do without GPUs; on one small machine without GPUs none: the command embeds by itself."""

    gpus_per_actor: Circumstance[Annotated[NonNegativeFloat, Unit("GPUs")]] = 0
    """GPUs of each of these Ray actors: 1 for a GPU each, 0.5 for two actors a GPU, 0 for CPUs."""

    logit_bias: float | None = None
    """Bias of the reference's logits, for sigmoid scores by a model that was trained with a softmax and has none. If
    not given, `jest reference-scores` fits one to cached pairs."""
