"""What a run will cost, and what can be checked of it before it starts.

sizes         bytes that a run has in memory, reads and writes
machines      the machines of a cluster, by its manifest
learners      whether learners find room in a cluster, and how many
large_row_groups  row groups with far more rows than a window: what they cost, and the remedy
preflight     what can be checked of storage, metadata, shards, earlier stages and the cluster
unit_costs    CPU time of each part of reading an example, as measured
calibrate     `jest plan --calibrate`: what a machine sustains, by real steps of a run
assumptions   prices, and rates that nobody measured, each with its source
basis         what a plan follows from
reading       what an example takes on its way from a shard to a learner
flow          pictures a second that machines read and learners take, and what limits
costs         hours, machines and money of each stage, and what limits it
cost_tables   the same for a terminal
stage_status  which stages are done, and which can run
plan          `jest plan`: cost by part, beside other methods
"""
