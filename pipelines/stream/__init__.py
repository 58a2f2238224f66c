"""Catalogue + score cache -> each learner's share of the super-batches, in order.

source         the catalogue, order and score cache that a run's super-batches are made of
windows        the task: read, decode and tokenise the examples of one window of the order
read_ahead     run such tasks anywhere on the cluster, ahead of the learner; their rows in order
read_costs     what reading the run's own examples takes of one CPU
super_batches  windows -> each learner's share of the super-batches
"""
