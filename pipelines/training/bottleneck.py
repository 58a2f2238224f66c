"""Where the time of a run's steps goes: the share of each part, which part limits the run, and what would help."""

from collections.abc import Sequence

from .metrics_line import MetricsLine, part_seconds

# Parts of a step, as metrics.jsonl names their seconds (jest/wait_time ...), each with what makes it shorter
REMEDIES = {
    "wait": "the data comes too slowly: more CPUs for the cluster's readers, faster storage, or data.decode late "
    "with a small selection.score_image_size",
    "score": "a larger selection.score_patch_size or a smaller score_image_size (FlexiJEST)",
    "reference": "a score cache: `jest reference-scores`, and reference.online false",
    "select": "fewer selection.n_chunks",
    "log": "a smaller training.n_refused_logged",
    "agreement": "a larger selection.agreement_every_steps",
    "exchange": "a faster network between the learners",
    "train": "training.low_resolution; no other part is slower",
    "checkpoint": "a larger training.checkpoint_every_steps, or faster storage",
}
# On a GPU; most CPUs compute bf16 more slowly than fp32, and a short run ends before torch.compile has paid
ON_A_GPU = {
    "score": "selection.score_precision bf16 and training.compile",
    "train": "training.precision bf16 and compile",
    "select": "selection.precision fast",
}


def shares(lines: Sequence[MetricsLine]) -> dict[str, float]:
    """Each part's share of the time of these lines of metrics.jsonl, the greatest first; `other`: the rest."""
    seconds = {part: sum(part_seconds(line, part) for line in lines) for part in REMEDIES}
    total = sum(line.get("train/batch_time", 0.0) for line in lines) + seconds["checkpoint"]
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    ordered = sorted(seconds.items(), key=lambda item: item[1], reverse=True)
    return {part: spent / total for part, spent in ordered} if total else {}


def note(lines: Sequence[MetricsLine]) -> str:
    """For a line of progress: what was seen and trained so far, and the parts that take a hundredth or more."""
    last = lines[-1]
    parts = [f"{part} {share:.0%}" for part, share in shares(lines).items() if share >= 0.01]
    return (
        f"loss {last['train/loss']:.3f}, {last['jest/samples_trained']:,} trained of {last['jest/samples_seen']:,} "
        f"seen; {', '.join(parts)}"
    )


def limit(lines: Sequence[MetricsLine], *, gpus: float) -> str:
    """The part that takes most of the time after the first step, which also starts the readers; and its remedy.

    gpus: of each learner.
    """
    found = [(part, share) for part, share in shares(lines[1:] or lines).items() if part in REMEDIES]
    if not found:
        return "the lines of metrics.jsonl do not say how long its steps took"  # lost, and made again from the log
    part, share = found[0]
    on_a_gpu = f"{ON_A_GPU[part]}; " if gpus and part in ON_A_GPU else ""
    return f"limited by {part}, {share:.0%} of the time; what shortens it: {on_a_gpu}{REMEDIES[part]}"
