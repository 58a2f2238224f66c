"""The run file: typed parts, every size that follows from them, what is wrong with them, and how it is read.

parts        what a part is, and what its fields say of themselves: description, unit, circumstance
rules        the rules of a catalogue
paths        which paths are absolute, and which are below root
model        the part model: architecture, weights, how it sees pictures and captions
data         the part data: shards, catalogue, order
ingest       the part ingest: lists of URLs -> shards
reference    the part reference: the reference model and its score cache
selection    the part selection: super-batch -> sub-batch
training     the part training: optimisation, learners, checkpoints, limits
evaluation   the part evaluation: evaluation sets and their tasks
subset       the part subset: what `jest select` writes
schema       Run, which has all parts, and every size that follows
consistency  what is wrong with values taken together, each with a remedy
identity     which fields decide whether a run may go on
explain      what is wrong with a value alone, a line each
yaml_text    YAML text -> keys and values
load         text and overrides -> Run, and back
describe     the parts -> run-file.md and run-file.schema.json
"""

from jest_core.run_file.data import Data
from jest_core.run_file.evaluation import Evaluation, EvaluationSet, FewShot, Pictures
from jest_core.run_file.identity import Identity, identity, in_todays_fields
from jest_core.run_file.ingest import Ingest
from jest_core.run_file.load import dump, load, merged, parse
from jest_core.run_file.model import Model
from jest_core.run_file.paths import join, sources
from jest_core.run_file.reference import Features, Reference
from jest_core.run_file.schema import Run
from jest_core.run_file.selection import Selection
from jest_core.run_file.training import LowResolution, Training

__all__ = [
    "Data",
    "Evaluation",
    "EvaluationSet",
    "Features",
    "FewShot",
    "Identity",
    "Ingest",
    "LowResolution",
    "Model",
    "Pictures",
    "Reference",
    "Run",
    "Selection",
    "Training",
    "dump",
    "identity",
    "in_todays_fields",
    "join",
    "load",
    "merged",
    "parse",
    "sources",
]
