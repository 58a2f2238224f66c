"""Super-batches -> checkpoints, the selection log and metrics.

run_directory  whether a run may begin in its directory, go on there, or be made longer
selection_log  what was drawn at each step, committed with checkpoints
replay         the sub-batches of another run, read from its selection log
sub_batches    the selected sub-batches, for `jest train` and for a training loop of a user
heartbeat      learners report their step, and read whether to stop
metrics_line   keys, types and units of metrics.jsonl
hardware       what makes arithmetic faster on a learner's machine
bottleneck     where the time of a step goes, which part limits it, and what would help
online_reference  the reference of reference.online, and the record of its weights
trackers       gauges for Prometheus; TensorBoard, W&B and MLflow
metrics        writes a line of metrics.jsonl for each step, and sends it to the trackers
shown          what is new on the board, on the progress bar and as lines
draining       nodes that are taken away with notice
room           room in the cluster for a number of learners that follows it
attempts       starts the learners, again after a failure or a drained node, on fewer or more of them
loop           one learner: score, select, train, log and checkpoint, step by step
doubtful       settings that are allowed, and hardly meant
train          the stage: has the learners started, and shows how far they are
"""
