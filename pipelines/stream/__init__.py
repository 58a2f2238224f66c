"""Catalogue + score cache -> each learner's share of the super-batches, in order.

source         what super-batches are made of, by the manifests
windows        a window of the order -> its examples: what the tasks do
read_ahead     what is to be read -> its rows in order, by tasks of Ray Data
super_batches  windows -> each learner's share of the super-batches
"""
